"""evaluate.py: each expression counts once, and one phrase in one image gives a box in its pixels."""

import json
import pickle

import pytest
import torch
from PIL import Image

import data
import evaluate
from conftest import program, tiny_model


def row(boxes: int, kind: str = "") -> data.Row:
    box = (10.0, 10.0, 20.0, 20.0)
    return data.Row("a.jpg", (("x", (box,) * boxes),), (100, 100), kind, "rows:1")


def result(correct: bool) -> evaluate.Result:
    return evaluate.Result(correct, 1, torch.zeros(1), torch.zeros(1, 4))


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
    assert evaluate.mean_box_accuracy([row(1)], [data.Row("b", (("y", ((70.0, 70, 5, 5),)),), (100, 100), "", "")]) == 0


def test_evaluating_puts_the_model_back_into_the_mode_it_was_in(shapes):
    rows = data.expand(data.read_rows(shapes_section(shapes), "val"))[:4]
    collate = data.Collate(data.Tokenizer(shapes / "data/shapes/shapes.spm"), 10)
    model = tiny_model().train()
    found = evaluate.evaluate(model, data.Dataset(rows, 32), collate)
    assert model.training and len(found) == 4 and set(found[0]) == {"decoder", "token"}


def shapes_section(shapes):
    return {
        "annotations": f"{shapes}/data/shapes/{{split}}.jsonl",
        "images": f"{shapes}/data/shapes/images",
        "sources": {},
    }


def test_grounding_answers_in_pixels_of_the_original_image(shapes):
    tokenizer = data.Tokenizer(shapes / "data/shapes/shapes.spm")
    image = torch.randint(0, 256, (3, 80, 200), dtype=torch.uint8)
    ((boxes, scores),) = evaluate.ground(tiny_model(), image, ["the red circle"], tokenizer)
    assert boxes.shape == (1, 4) and scores.shape == (1,)
    assert (boxes >= 0).all() and (boxes <= torch.tensor([200, 80, 200, 80])).all()
    ((many, _),) = evaluate.ground(tiny_model(queries=6), image, ["the red circle"], tokenizer, threshold=0.0)
    ((none, _),) = evaluate.ground(tiny_model(queries=6), image, ["the red circle"], tokenizer, threshold=1.0)
    assert len(many) == 6 and len(none) == 0


@pytest.mark.parametrize("branch", ["decoder", "token"])
def test_several_phrases_at_once_are_answered_as_one_by_one(branch, shapes):
    tokenizer, texts = data.Tokenizer(shapes / "data/shapes/shapes.spm"), ["the red circle", "the leftmost ring", "a"]
    image = torch.randint(0, 256, (3, 80, 200), dtype=torch.uint8)
    for text, (boxes, scores) in zip(
        texts, evaluate.ground(tiny_model(), image, texts, tokenizer, branch), strict=True
    ):
        ((alone, score),) = evaluate.ground(tiny_model(), image, [text], tokenizer, branch)
        torch.testing.assert_close(boxes, alone, atol=1e-3, rtol=0)
        torch.testing.assert_close(scores, score, atol=1e-5, rtol=0)


def test_where_memory_runs_out_evaluation_goes_on_with_half_the_batch(shapes, monkeypatch):
    rows = data.expand(data.read_rows(shapes_section(shapes), "val"))[:21]
    collate = data.Collate(data.Tokenizer(shapes / "data/shapes/shapes.spm"), 10)
    dataset, sizes, whole = data.Dataset(rows, 32), [], evaluate.judge_batch

    def tight(model, batch, *rest):
        sizes.append(len(batch.index))
        if len(batch.index) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(model, batch, *rest)

    expected = evaluate.evaluate(tiny_model(), dataset, collate)
    monkeypatch.setattr(evaluate, "judge_batch", tight)
    found = evaluate.evaluate(tiny_model(), dataset, collate, batch_size=16)
    assert sizes == [16, 8, 4, 4, 4, 4, 4, 1]
    assert [r["token"].correct for r in found] == [r["token"].correct for r in expected]


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
    logits, boxes, mask = torch.zeros(64, 1, 2), torch.full((64, 1, 4), 0.5), torch.ones(64, 1, dtype=torch.bool)
    results = evaluate.judge(logits, boxes, boxes, mask, 100)
    assert len(pickle.dumps(results)) / 64 < 1000
