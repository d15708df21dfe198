"""evaluate.py: each expression counts once, and one phrase in one image gives a box in its pixels."""

import json
import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

import data
import evaluate
import model as models
from conftest import official_model, program, tiny_model


def row(boxes: int, kind: str = "") -> data.Example:
    box = (10.0, 10.0, 20.0, 20.0)
    return data.Example("a.jpg", "x", (box,) * boxes, (100, 100), kind, "rows:1")


def result(correct: bool) -> dict:
    return {"correct": correct}


def test_accuracy_is_a_share_of_expressions_and_n_acc_of_those_without_a_target():
    found = [{"decoder": result(c), "token": result(not c)} for c in (True, True, False, True)]
    rows = [row(0), row(1), row(0), row(2)]
    assert evaluate.summary(found, rows, grec=True) == {
        **{"n": 4, "n_none": 2, "decoder_f1": 0.75, "decoder_nacc": 0.5, "token_f1": 0.25, "token_nacc": 0.5}
    }
    assert evaluate.summary(found, rows, grec=False) == {"n": 4, "decoder_acc": 0.75, "token_acc": 0.25}


def test_kinds_and_target_counts_are_reported_apart():
    found = [{"token": result(c)} for c in (True, False, True)]
    kinds = evaluate.by_kind(found, [row(1, "a"), row(1, "b"), row(0, "a")])
    assert kinds["a"] == {"n": 2, "token": 1.0} and kinds["b"]["token"] == 0.0
    assert kinds["no target"]["n"] == 1 and kinds["one target"]["n"] == 2


def test_a_no_target_expression_is_right_only_when_nothing_is_answered():
    box, none = torch.tensor([[0.0, 0, 10, 10]]), torch.empty(0, 4)
    assert evaluate.grec_correct(torch.tensor([0.2]), box, none)
    assert not evaluate.grec_correct(torch.tensor([0.9]), box, none)
    assert not evaluate.grec_correct(torch.tensor([0.2]), box, box)


def test_one_box_too_many_or_too_few_is_wrong():
    boxes = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]])
    assert evaluate.grec_correct(torch.tensor([0.9, 0.9]), boxes, boxes.flip(0))
    assert not evaluate.grec_correct(torch.tensor([0.9, 0.9]), boxes, boxes[:1])
    assert not evaluate.grec_correct(torch.tensor([0.9, 0.1]), boxes, boxes)


def test_the_mean_box_is_that_of_the_training_rows():
    assert evaluate.mean_box_accuracy([row(1)], [row(1), row(1)]) == 1.0
    assert evaluate.mean_box_accuracy([row(1)], [data.Example("b", "y", ((70.0, 70, 5, 5),), (100, 100), "", "")]) == 0


def test_evaluating_puts_the_model_back_into_the_mode_it_was_in(shapes):
    rows = [(each,) for each in data.expand(data.read_rows(shapes_section(shapes), "val"))][:4]
    collate = data.Collate(data.Tokenizer(shapes / "data/shapes/shapes.spm"), 10)
    model = tiny_model().train()
    found = evaluate.evaluate_dataset(model, data.Dataset(rows, 32), collate)
    assert model.training and len(found) == 4 and {"decoder", "token"} <= set(found[0])


def shapes_section(shapes):
    return {
        "annotations": f"{shapes}/data/shapes/{{split}}.jsonl",
        "images": f"{shapes}/data/shapes/images",
        "sources": {},
    }


def test_grounding_answers_in_pixels_of_the_original_image(shapes):
    tokenizer = data.Tokenizer(shapes / "data/shapes/shapes.spm")
    image = torch.randint(0, 256, (3, 80, 200), dtype=torch.uint8)
    ((boxes, scores, _),) = evaluate.ground(tiny_model(), image, ["the red circle"], tokenizer)
    assert boxes.shape == (1, 4) and scores.shape == (1,)
    assert (boxes >= 0).all() and (boxes <= torch.tensor([200, 80, 200, 80])).all()
    ((many, *_),) = evaluate.ground(tiny_model(queries=6), image, ["the red circle"], tokenizer, threshold=0.0)
    ((none, *_),) = evaluate.ground(tiny_model(queries=6), image, ["the red circle"], tokenizer, threshold=1.0)
    assert len(many) == 6 and len(none) == 0


@pytest.mark.parametrize("branch", ["decoder", "token"])
def test_several_phrases_at_once_are_answered_as_one_by_one(branch, shapes):
    tokenizer, texts = data.Tokenizer(shapes / "data/shapes/shapes.spm"), ["the red circle", "the leftmost ring", "a"]
    image = torch.randint(0, 256, (3, 80, 200), dtype=torch.uint8)
    for text, (boxes, scores, _) in zip(
        texts, evaluate.ground(tiny_model(), image, texts, tokenizer, branch), strict=True
    ):
        ((alone, score, _),) = evaluate.ground(tiny_model(), image, [text], tokenizer, branch)
        torch.testing.assert_close(boxes, alone, atol=1e-3, rtol=0)
        torch.testing.assert_close(scores, score, atol=1e-5, rtol=0)


@pytest.mark.parametrize("small", [True, False])
def test_an_image_is_read_once_for_its_expressions_and_in_a_small_set_only_once(shapes, monkeypatch, small):
    rows = [(each,) for each in data.expand(data.read_rows(shapes_section(shapes), "val"))]
    collate, read, usual = data.Collate(data.Tokenizer(shapes / "data/shapes/shapes.spm"), 10), [], data.read_image
    monkeypatch.setattr(data, "read_image", lambda path, *rest: read.append(path) or usual(path, *rest))
    dataset, images = data.Dataset(rows, 32), {example.image for (example,) in rows}
    dataset.bytes_per_image = usual(rows[0][0].image).nbytes if small else 0
    together = evaluate.evaluate_dataset(tiny_model(), dataset, collate, batch_size=len(rows))
    assert sorted(read) == sorted(images)
    assert len(dataset.images) == (len(images) if small else 1)
    evaluate.evaluate_dataset(tiny_model(), dataset, collate, batch_size=len(rows))
    assert len(read) == len(images) * (1 if small else 2)
    alone = evaluate.evaluate_dataset(tiny_model(), data.Dataset(rows, 32), collate, batch_size=1)
    for one, other in zip(together, alone, strict=True):
        assert one["expression"] == other["expression"] and one["truth"] == other["truth"]
        assert one["token"]["boxes"][0] == pytest.approx(other["token"]["boxes"][0], abs=0.02)


def test_where_memory_runs_out_evaluation_goes_on_with_half_the_batch(shapes, monkeypatch):
    rows = [(each,) for each in data.expand(data.read_rows(shapes_section(shapes), "val"))][:21]
    collate = data.Collate(data.Tokenizer(shapes / "data/shapes/shapes.spm"), 10)
    dataset, sizes, whole = data.Dataset(rows, 32), [], models.SimVG.forward

    def tight(model, images, *rest):
        sizes.append(len(images))
        if len(images) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(model, images, *rest)

    expected = evaluate.evaluate_dataset(tiny_model(), dataset, collate)
    monkeypatch.setattr(models.SimVG, "forward", tight)
    found = evaluate.evaluate_dataset(tiny_model(), dataset, collate, batch_size=16)
    assert sizes == [16, 8, 4, 4, 8, 4, 4, 5]
    assert [r["token"]["correct"] for r in found] == [r["token"]["correct"] for r in expected]


def test_one_image_and_phrase_print_box_and_score_and_save_a_picture(shapes, trained):
    image = "data/shapes/images/val_00000.jpg"
    done = program(
        *("evaluate.py", "--ckpt", "runs/trained/best.pt", "--image", image, "--text", "the red circle"),
        *("--save", "out.png"),
        cwd=shapes,
    )
    assert (
        "token: 'the red circle' box" in done.stdout
        and "decoder: 'the red circle' box" in done.stdout
        and "score" in done.stdout
    )
    with Image.open(shapes / "out.png") as picture:
        assert min(picture.size) >= 240


def test_the_printed_figures_are_those_of_the_last_training_rows(shapes, trained):
    printed = program("evaluate.py", "--ckpt", "runs/trained/best.pt", "--split", "test", cwd=shapes).stdout
    figures = json.loads(printed.splitlines()[-1])
    logged = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    for name in ("n", "decoder_acc", "token_acc"):
        assert figures[name] == pytest.approx(logged[name], abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--ckpt", "nothing.pt"), "nothing.pt"),
        (("--ckpt", "configs.json"), "configs.json"),
        (("--ckpt", "runs/trained/best.pt", "--split", "tset"), "tset"),
        (("--ckpt", "runs/trained/best.pt", "--set", "data.tokenizer=none.spm"), "none.spm"),
        (("--ckpt", "runs/trained/best.pt", "--image", "none.jpg", "--text", "the star"), "none.jpg"),
        (("--ckpt", "runs/trained/best.pt", "--image", "configs.json", "--text", "the star"), "configs.json"),
        (("--ckpt", "runs/trained/best.pt", "--image", "data/shapes/images/val_00000.jpg", "--text", " ?! "), "--text"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, expected, shapes, trained):
    before = sorted(p.name for p in shapes.iterdir())
    done = program("evaluate.py", *arguments, cwd=shapes, status=2)
    assert expected in done.stderr and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert sorted(p.name for p in shapes.iterdir()) == before


def test_a_result_that_is_sent_to_other_ranks_does_not_carry_its_whole_batch():
    found = evaluate.pick_answers(torch.zeros(64, 1, 2), torch.full((64, 1, 4), 0.5))
    lines = [evaluate.record(row(1), {"token": each}, (100, 100), grec=False) for each in found]
    assert len(pickle.dumps(lines)) / 64 < 1000


# ---- nothing silently wrong


def evaluated(shapes, monkeypatch, *arguments: str) -> None:
    """evaluate.py in this process."""
    monkeypatch.chdir(shapes)
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--ckpt", "runs/trained/best.pt", *arguments])
    evaluate.main()


PHOTO = ("--image", "data/shapes/images/val_00000.jpg", "--text", "the red circle")


@pytest.mark.parametrize("use", [(), PHOTO, ("--attention",), (*PHOTO, "--attention")], ids=str)
def test_a_tokenizer_of_another_set_is_refused_in_whatever_way_a_checkpoint_is_used(use, shapes, trained, monkeypatch):
    with pytest.raises(data.InputError, match="shapes-grec/shapes.spm: is not the tokenizer that this model"):
        evaluated(shapes, monkeypatch, *use, "--set", "data.tokenizer=data/shapes-grec/shapes.spm")


def test_grounding_refuses_a_tokenizer_that_is_not_the_checkpoint_s(shapes, trained):
    model, image = models.load(trained / "best.pt"), torch.zeros(3, 8, 8, dtype=torch.uint8)
    evaluate.ground(model, image, ["the red circle"], data.Tokenizer(shapes / "data/shapes/shapes.spm"))
    with pytest.raises(data.InputError, match="is not the tokenizer"):
        evaluate.ground(model, image, ["the red circle"], data.Tokenizer(shapes / "data/shapes-grec/shapes.spm"))


def test_a_checkpoint_without_a_digest_works_with_every_tokenizer_as_before(shapes, trained, tmp_path):
    state = models.read_checkpoint(trained / "best.pt")
    assert state.pop("tokenizer") == data.Tokenizer(shapes / "data/shapes/shapes.spm").digest
    models.save(tmp_path / "old.pt", state)
    model = models.load(tmp_path / "old.pt")
    image, tokenizer = torch.zeros(3, 8, 8, dtype=torch.uint8), data.Tokenizer(shapes / "data/shapes-grec/shapes.spm")
    assert len(evaluate.ground(model, image, ["the red circle"], tokenizer)) == 1


LONG_PHRASE = "the red circle left of the blue ring above the green star and the cross"


def test_grounding_cuts_a_phrase_where_the_training_did_and_warns_of_it(shapes, trained):
    model, tokenizer = models.load(trained / "best.pt"), data.Tokenizer(shapes / "data/shapes/shapes.spm")
    image = torch.randint(0, 256, (3, 80, 200), dtype=torch.uint8)
    with pytest.warns(UserWarning, match="was cut") as said:
        ((own, *_),) = evaluate.ground(model, image, [LONG_PHRASE], tokenizer)
        ((ten, *_),) = evaluate.ground(model, image, [LONG_PHRASE], tokenizer, max_tokens=10)
    assert model.max_tokens == 10 and torch.equal(own, ten)
    assert all("\n" not in str(each.message) for each in said)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ((long, *_),) = evaluate.ground(model, image, [LONG_PHRASE], tokenizer, max_tokens=60)
    assert not torch.equal(own, long)


def test_the_command_line_says_in_one_line_where_a_phrase_was_cut(shapes, trained, tmp_path):
    done = program(
        *("evaluate.py", "--ckpt", "runs/trained/best.pt", *PHOTO[:3], LONG_PHRASE, "--save", str(tmp_path / "a.png")),
        cwd=shapes,
    )
    assert done.stderr.startswith("evaluate.py: 'the red circle left of") and done.stderr.count("\n") == 1


def test_grounding_takes_no_image_of_other_numbers_and_no_text_for_a_list_of_phrases(shapes):
    tokenizer, pixels = data.Tokenizer(shapes / "data/shapes/shapes.spm"), torch.zeros(3, 8, 8, dtype=torch.uint8)
    for image in (torch.rand(3, 8, 8), torch.zeros(8, 8, dtype=torch.uint8), pixels[None]):
        with pytest.raises(data.InputError, match=r"\(3, H, W\) uint8"):
            evaluate.ground(tiny_model(), image, ["the red circle"], tokenizer)
    with pytest.raises(data.InputError, match="a list of phrases"):
        evaluate.ground(tiny_model(), pixels, "the red circle", tokenizer)


def test_a_kind_named_like_a_number_of_targets_keeps_a_line_of_its_own():
    found = [{"token": result(c)} for c in (True, False, True)]
    kinds = evaluate.by_kind(found, [row(1, "one target"), row(1, "b"), row(0, "one target")])
    assert kinds["'one target'"] == {"n": 2, "token": 1.0} and kinds["one target"] == {"n": 2, "token": 0.5}


@pytest.mark.parametrize(
    "option",
    [
        "--save a.xyz",
        "--save .",
        "--save a",
        "--save nowhere/a.png",
        "--report a.png",
        "--report .",
        "--report no/a.html",
    ],
)
def test_a_file_that_could_not_be_written_is_refused_before_the_work(option, shapes, trained, monkeypatch, capsys):
    monkeypatch.setattr(models, "read_checkpoint", None)  # no work has begun
    with pytest.raises(SystemExit, match="2"):
        evaluated(shapes, monkeypatch, *option.split(), *(PHOTO if "save" in option else ()))
    assert f"error: {option}: expected" in capsys.readouterr().err


@pytest.mark.parametrize("use", [[], ["--attention", "--split", "test"]])
def test_a_picture_that_nothing_would_be_drawn_to_is_refused(use, shapes, trained, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluated(shapes, monkeypatch, *use, "--save", "a.png")
    assert "--save goes with --image" in capsys.readouterr().err


def test_world_size_without_the_other_variables_of_torchrun_is_one_line(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(data.InputError, match="WORLD_SIZE is 2, but there is no RANK, MASTER_ADDR, MASTER_PORT"):
        evaluate.join_ranks()


# ---- agreement of the branches


def found(*boxes: list) -> tuple:
    return torch.full((len(boxes),), 0.9), torch.tensor(boxes).reshape(-1, 4)


def test_agreement_is_the_iou_of_two_boxes_and_in_grec_that_of_pairs_over_the_larger_number_of_boxes():
    left, half, right = [0.0, 0.0, 0.4, 0.4], [0.0, 0.0, 0.4, 0.2], [0.6, 0.6, 0.9, 0.9]
    assert evaluate.agreement({"decoder": found(left), "token": found(half)}) == pytest.approx(0.5)
    assert evaluate.agreement({"decoder": found(left, right), "token": found(right, half)}) == pytest.approx(0.75)
    assert evaluate.agreement({"decoder": found(left, right), "token": found(right)}) == pytest.approx(0.5)
    assert evaluate.agreement({"decoder": found(left), "token": found()}) == 0
    assert evaluate.agreement({"decoder": found(), "token": found()}) == 1
    assert evaluate.agreement({"token": found(left)}) is None


def test_the_table_of_agreement_states_sizes_shares_and_how_well_it_tells_right_from_wrong():
    agreements, right = (0.95, 0.7, 0.7, 0.2), (True, True, False, False)
    lines = [
        {"agreement": a, "decoder": result(r), "token": result(not r)} for a, r in zip(agreements, right, strict=True)
    ]
    assert evaluate.by_agreement(lines) == {
        "agree >= 0.9   25%": {"n": 1, "decoder": 1.0, "token": 0.0},
        "agree 0.5-0.9  50%": {"n": 2, "decoder": 0.5, "token": 0.5},
        "agree < 0.5    25%": {"n": 1, "decoder": 0.0, "token": 1.0},
        # of four pairs three are in order and one is a tie
        "AUROC of agreement": {"n": 4, "decoder": 0.875, "token": 0.125},
    }
    assert evaluate.by_agreement([{"agreement": None, "token": result(True)}]) == {}


def test_the_line_of_a_model_that_diverged_is_valid_json():
    nothing = torch.full((1,), torch.nan), torch.full((1, 4), torch.nan)
    line = evaluate.record(row(1), {"decoder": nothing, "token": nothing}, (100, 100), grec=False)
    assert json.loads(json.dumps(line, allow_nan=False)) == line
    assert line["token"] == {"boxes": [[0.0] * 4], "scores": [0.0], "iou": 0.0, "correct": False}


# ---- ground(): every kind of image


def test_every_kind_of_input_for_a_picture_gives_the_same_answer(shapes, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(shapes)
    model, tokenizer = evaluate.load(trained / "best.pt")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    path = tmp_path / "a.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((200, 150)).save(path, exif=exif)
    pixels = data.read_image(str(path))  # (3, H, W)
    assert pixels.shape == (3, 200, 150)
    array = pixels.permute(1, 2, 0).contiguous().numpy()  # (H, W, 3)
    kinds = [str(path), path, Image.open(path), Image.fromarray(array), array, np.asfortranarray(array)]
    kinds += [array[:, :, ::-1].copy()[:, :, ::-1], pixels, pixels.contiguous()]
    several = evaluate.ground(model, kinds, ["the red circle", "a ring"], tokenizer)
    for answers in several:
        for one, first in zip(answers, several[0], strict=True):
            assert torch.equal(one.boxes, first.boxes) and torch.equal(one.scores, first.scores)
            assert one.agreement == first.agreement


def test_a_grey_or_transparent_pil_image_is_read_like_its_file(shapes, tmp_path):
    tokenizer, model = data.Tokenizer(shapes / "data/shapes/shapes.spm"), tiny_model()
    for mode in ("L", "RGBA", "P", "I;16", "1"):
        Image.effect_noise((60, 40), 90).convert(mode).save(tmp_path / "a.png")
        images = [tmp_path / "a.png", Image.open(tmp_path / "a.png")]
        (first,), (second,) = evaluate.ground(model, images, ["the red circle"], tokenizer)
        assert torch.equal(first.boxes, second.boxes), mode


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 8, 3)),
        np.zeros((3, 8, 8), dtype=np.uint8),
        np.zeros((8, 8), dtype=np.uint8),
        np.zeros((0, 8, 3), dtype=np.uint8),
        torch.zeros(8, 8, 3, dtype=torch.uint8),
        torch.zeros(3, 8, 8),
        None,
        7,
        b"a.jpg",
    ],
    ids=lambda image: f"{type(image).__name__}-{getattr(image, 'shape', '')}",
)
def test_what_is_no_image_is_refused_in_one_line(image, shapes):
    tokenizer = data.Tokenizer(shapes / "data/shapes/shapes.spm")
    with pytest.raises(data.InputError, match=r"a path, a PIL image, an array \(H, W, 3\) uint8 or a tensor"):
        evaluate.ground(tiny_model(), image, ["the red circle"], tokenizer)


def test_where_both_branches_were_trained_the_answer_tells_how_far_they_agree(shapes, trained, monkeypatch):
    monkeypatch.chdir(shapes)
    model, tokenizer = evaluate.load(trained / "best.pt")
    image = shapes / "data/shapes/images/val_00000.jpg"
    (token,) = evaluate.ground(model, image, ["the red circle"], tokenizer)
    (decoder,) = evaluate.ground(model, image, ["the red circle"], tokenizer, "decoder")
    assert not torch.equal(token.boxes, decoder.boxes)
    assert token.agreement == decoder.agreement == pytest.approx(box_iou(token.boxes, decoder.boxes).item(), abs=1e-5)
    (alone,) = evaluate.ground(tiny_model(), image, ["the red circle"], tokenizer)  # nothing says what was trained
    assert alone.agreement is None
    model.config["train"] |= {"loss_decoder": None, "loss_token_on_teacher": None}
    (alone,) = evaluate.ground(model, image, ["the red circle"], tokenizer)
    assert alone.agreement is None
    with pytest.raises(data.InputError, match="branch='decoder': of this checkpoint only the token branch was trained"):
        evaluate.ground(model, image, ["the red circle"], tokenizer, "decoder")


def test_load_refuses_a_checkpoint_without_its_tokenizer(shapes, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.InputError, match=r"data/shapes/shapes.spm: there is no such tokenizer"):
        evaluate.load(trained / "best.pt")
    (tmp_path / "data/shapes").mkdir(parents=True)
    shutil.copy(shapes / "data/shapes-grec/shapes.spm", tmp_path / "data/shapes")
    with pytest.raises(data.InputError, match="is not the tokenizer that this model was trained with"):
        evaluate.load(trained / "best.pt")
    official = official_model(tmp_path)
    monkeypatch.setattr(models, "load", lambda *_: official)
    with pytest.raises(data.InputError, match="an official checkpoint names no tokenizer"):
        evaluate.load(tmp_path / "official.pth")


# ---- answers into a file


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def answers(shapes, trained) -> Path:
    """The answers to a split by one rank."""
    line = ("evaluate.py", "--ckpt", "runs/trained/best.pt", "--split", "val")
    plain = program(*line, cwd=shapes).stdout
    assert program(*line, "--answers", "one.jsonl", cwd=shapes).stdout == plain, "the file changes no figure"
    return shapes / "one.jsonl"


def test_every_expression_gets_a_line_with_boxes_in_pixels_and_what_is_right(answers, shapes):
    examples = data.expand(data.read_rows(shapes_section(shapes), "val"))
    lines = lines_of(answers)
    assert [(each["image"], each["expression"]) for each in lines] == [
        (Path(e.image).name, e.expression) for e in examples
    ]
    for line, example in zip(lines, examples, strict=True):
        x, y, w, h = example.boxes[0]
        assert line["truth"] == [pytest.approx([x, y, x + w, y + h], abs=1.01)]  # clipped to the last pixel
        boxes = torch.tensor([line[branch]["boxes"][0] for branch in ("decoder", "token")])
        assert line["agreement"] == pytest.approx(box_iou(boxes[:1], boxes[1:]).item(), abs=1e-3)
        for branch in ("decoder", "token"):
            iou = box_iou(torch.tensor(line["truth"]), torch.tensor(line[branch]["boxes"])).item()
            assert line[branch]["iou"] == pytest.approx(iou, abs=1e-3) and len(line[branch]["scores"]) == 1
            assert line[branch]["correct"] == (line[branch]["iou"] >= 0.5)


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_writes_the_same_bytes(ranks, answers, shapes):
    line = ("--ckpt", "runs/trained/best.pt", "--split", "val", "--answers", f"{ranks}.jsonl")
    done = program("evaluate.py", *line, cwd=shapes, ranks=ranks)
    assert (shapes / f"{ranks}.jsonl").read_bytes() == answers.read_bytes() and '"split": "val"' in done.stdout


def test_a_stopped_run_keeps_its_batches_and_goes_on_to_the_same_bytes(answers, shapes, trained, monkeypatch):
    usual, calls, file = evaluate.find, [], shapes / "stopped.jsonl"

    def stopping(*arguments):
        if len(calls) % 2 == 1:
            calls.append("stop")
            raise KeyboardInterrupt
        calls.append("batch")
        return usual(*arguments)

    monkeypatch.setattr(evaluate, "find", stopping)
    use = ("--split", "val", "--answers", str(file))
    for resume, batches in ((), 1), (("--resume",), 2):
        with pytest.raises(KeyboardInterrupt):
            evaluated(shapes, monkeypatch, *use, *resume)
        assert len(file.read_text().splitlines()) == batches * evaluate.ANSWER_BATCH
        with open(file, "a") as half:
            half.write('{"image": "val_0')
    monkeypatch.setattr(evaluate, "find", usual)
    evaluated(shapes, monkeypatch, *use, "--resume")
    assert file.read_bytes() == answers.read_bytes()
    evaluated(shapes, monkeypatch, *use, "--resume")  # all is done
    assert file.read_bytes() == answers.read_bytes()


def test_a_file_that_answers_something_else_is_neither_overwritten_nor_continued(
    answers, shapes, trained, monkeypatch, capsys
):
    before = answers.read_bytes()
    with pytest.raises(SystemExit, match="2"):
        evaluated(shapes, monkeypatch, "--split", "val", "--answers", str(answers))
    assert "one.jsonl: exists" in capsys.readouterr().err
    with pytest.raises(data.InputError, match="one.jsonl: line .* answers something else"):
        evaluated(shapes, monkeypatch, "--split", "test", "--answers", str(answers), "--resume")
    rows = shapes / "rows.jsonl"
    shutil.copy(shapes / "data/shapes/val.jsonl", rows)
    with pytest.raises(data.InputError, match="rows.jsonl: is not of the expected layout"):
        evaluated(shapes, monkeypatch, "--split", "val", "--answers", str(rows), "--resume")
    assert answers.read_bytes() == before and rows.read_bytes() == (shapes / "data/shapes/val.jsonl").read_bytes()


def phrases(folder: Path, shapes: Path) -> Path:
    """Rows without boxes about good, damaged and missing pictures in a folder, 36 expressions."""
    folder.mkdir()
    rows = []
    for i in range(18):
        shutil.copy(shapes / f"data/shapes/images/val_{i % 4:05d}.jpg", folder / f"{i}.jpg")
        rows.append({"image": f"{i}.jpg", "expressions": ["the red circle", "the \u5de6 ring"]})
    (folder / "3.jpg").write_bytes((folder / "3.jpg").read_bytes()[:700])
    (folder / "17.jpg").unlink()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


@pytest.mark.parametrize("ranks", [1, 2])
def test_rows_need_no_boxes_and_a_picture_that_cannot_be_read_is_an_error_in_its_lines(
    ranks, shapes, trained, tmp_path
):
    rows, out = phrases(tmp_path / "photos", shapes), tmp_path / "out.jsonl"
    line = ("--rows", str(rows), "--answers", str(out), "--set", f"data.images={tmp_path}/photos")
    done = program("evaluate.py", "--ckpt", "runs/trained/best.pt", *line, cwd=shapes, ranks=ranks)
    assert "4 of 36 expressions have no answer: " in done.stderr and "Traceback" not in done.stderr
    lines = lines_of(out)
    assert [each["image"] for each in lines] == [f"{i // 2}.jpg" for i in range(36)]
    wrong = [each for each in lines if "error" in each]
    assert [each["image"] for each in wrong] == ["3.jpg", "3.jpg", "17.jpg", "17.jpg"]
    assert all(each.keys() == {"image", "expression", "error"} for each in wrong)
    assert all(each.keys() == {"image", "expression", "decoder", "token", "agreement"} for each in lines[:6])
    assert "Acc@0.5" not in done.stdout


def test_training_and_evaluation_still_need_boxes(shapes, trained, tmp_path):
    settings = {**shapes_section(shapes), "annotations": str(phrases(tmp_path / "photos", shapes))}
    with pytest.raises(data.InputError, match='"image", "expressions" and "boxes"'):
        data.read_rows(settings, "")


def test_several_images_and_folders_are_asked_the_same_phrases(shapes, trained, tmp_path, monkeypatch, capsys):
    folder, single = tmp_path / "photos", shapes / "data/shapes/images/val_00002.jpg"
    folder.mkdir()
    for i in (1, 0):
        shutil.copy(shapes / f"data/shapes/images/val_{i:05d}.jpg", folder / f"{i}.JPG")
    (folder / "notes.txt").write_text("no picture")
    use = ("--image", str(single), str(folder), "--text", "the red circle", "a ring")
    evaluated(shapes, monkeypatch, *use)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + 3 * 2 * 2 and printed[1].startswith(f"{single}: decoder: 'the red circle' box ")
    assert all(", score " in line and ", agreement " in line for line in printed[1:])
    evaluated(shapes, monkeypatch, *use, "--answers", str(tmp_path / "out.jsonl"))
    names = [str(single), str(folder / "0.JPG"), str(folder / "1.JPG")]
    assert [each["image"] for each in lines_of(tmp_path / "out.jsonl")] == [name for name in names for _ in range(2)]
    assert "picture" not in capsys.readouterr().out and not list(tmp_path.glob("**/*.png"))
    with pytest.raises(data.InputError, match="--save and --attention are for one image, not for 3"):
        evaluated(shapes, monkeypatch, *use, "--save", str(tmp_path / "a.png"))
    with pytest.raises(data.InputError, match="notes.txt"):
        evaluated(shapes, monkeypatch, "--image", str(folder / "notes.txt"), str(single), "--text", "a ring")


def test_one_branch_alone_is_answered_without_an_agreement(shapes, trained, tmp_path, monkeypatch, capsys):
    evaluated(shapes, monkeypatch, "--split", "val", "--branch", "token", "--answers", str(tmp_path / "out.jsonl"))
    assert all("decoder" not in each and each["agreement"] is None for each in lines_of(tmp_path / "out.jsonl"))
    assert "AUROC" not in capsys.readouterr().out


def test_the_threshold_decides_which_boxes_of_a_grec_model_are_answers(shapes):
    section = {**shapes_section(shapes), "annotations": f"{shapes}/data/shapes-grec/{{split}}.jsonl"}
    section["images"] = f"{shapes}/data/shapes-grec/images"
    rows = [(each,) for each in data.expand(data.read_rows(section, "val"))][:9]
    collate = data.Collate(data.Tokenizer(shapes / "data/shapes-grec/shapes.spm"), 10)
    for threshold, count in ((0.0, 6), (1.0, 0)):
        lines = evaluate.evaluate_dataset(tiny_model(queries=6), data.Dataset(rows, 32), collate, threshold=threshold)
        assert all(len(line[branch]["boxes"]) == count for line in lines for branch in ("decoder", "token"))
    assert [line["token"]["correct"] for line in lines] == [not example.boxes for (example,) in rows]
    assert [line["token"]["iou"] for line in lines] == [float(not example.boxes) for (example,) in rows]


@pytest.mark.parametrize(
    ("use", "expected"),
    [
        ("--resume", "go with --answers"),
        ("--rows a.jsonl", "go with --answers"),
        ("--rows a.jsonl --split val --answers b.jsonl", "only one of --image, --rows and --split"),
        ("--answers a.json", "expected a file name that ends in .jsonl"),
        ("--answers a.jsonl --report a.html", "--answers goes without other files"),
        ("--threshold 7", "expected a score from 0 to 1"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(use, expected, shapes, trained, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluated(shapes, monkeypatch, *use.split())
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gpu", "cuda", "cuda:3", "mps", "cpu:0"])
def test_a_device_that_is_not_there_is_one_line(name, shapes, trained, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(data.InputError, match=r"no device .*; there are cpu \(0 GPUs\)"):
        evaluate.join_ranks(name)
    assert evaluate.join_ranks("cpu")[2] == torch.device("cpu")
