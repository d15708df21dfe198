"""evaluate.py: each expression counts once, and one phrase in one image gives a box in its pixels."""

import json
import pickle
import warnings

import pytest
import torch
from PIL import Image

import data
import evaluate
import model as models
from conftest import program, tiny_model


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
