"""Small inputs that other people's reports are about; the right answer to each."""

import json
import pickle

import pytest
import torch
from PIL import Image

import data
import evaluate
import train
from conftest import CONFIGS, call, metrics, start, tiny_model


def write_refs(folder, sentences: list[list[str]]) -> data.DataConfig:
    """gRefCOCO's layout with a reference for each list of sentences."""
    refs = []
    for number, texts in enumerate(sentences):
        ref = {"ref_id": number, "ann_id": [1], "image_id": 9, "split": "val", "no_target": False}
        refs.append(ref | {"sentences": [{"sent": text} for text in texts]})
    (folder / "grefs(unc).json").write_text(json.dumps(refs))
    image = {"id": 9, "file_name": "a.jpg", "width": 64, "height": 48}
    target = {"id": 1, "image_id": 9, "category_id": 1, "bbox": [1, 1, 20, 20]}
    coco = {"images": [image], "annotations": [target], "categories": []}
    (folder / "instances.json").write_text(json.dumps(coco))
    return data.DataConfig(str(folder / "grefs(unc).json"), str(folder))


def test_references_without_a_sentence_are_left_out_and_counted(tmp_path, capsys):
    config = write_refs(tmp_path, [["left dog"], [], ["a dog", "dog"], []])
    texts = [example.expression for example in data.all_examples(data.read_rows(config, "val"))]
    assert texts == ["left dog", "a dog", "dog"]
    assert "val: 2 rows are left out: no sentence, or a source that is null" in (
        capsys.readouterr().err
    )


def test_rows_of_a_source_that_is_null_are_left_out_and_counted(tmp_path, capsys):
    rows = []
    for source in ("coco", "vg", None):
        row = {"image": "a.jpg", "expressions": ["a dog"], "boxes": [], "source": source}
        rows.append(json.dumps(row))
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    config = data.DataConfig(f"{tmp_path}/{{split}}.jsonl", sources={"coco": "x", "vg": None})
    assert len(data.read_rows(config, "train")) == 2
    assert "train: 1 rows are left out" in capsys.readouterr().err
    (tmp_path / "train.jsonl").write_text(rows[0].replace("coco", "flickr"))
    with pytest.raises(data.InputError, match="source 'flickr' has no folder in data.sources"):
        data.read_rows(config, "train")


def test_words_that_the_tokenizer_does_not_know_are_named(toys, trained):
    model, tokenizer = evaluate.load(trained / "best.pt", toys / "data/toys/toys.spm")
    with pytest.warns(UserWarning, match="does not know 'щенок'"):
        evaluate.ground(model, torch.zeros(3, 32, 32).byte(), ["the red щенок"], tokenizer)
    ask = ("--image", "data/toys/images/val_00000.jpg", "--text", *"АБВГДЕЖ")
    done = call("evaluate.py", "--ckpt", trained / "best.pt", *ask, cwd=toys)
    assert done.status == 0 and done.err.count("the tokenizer does not know") == 5
    row = {"image": "train_00000.jpg", "expressions": ["щенок", "the ball"]}
    row["boxes"] = [[1, 1, 20, 20]]
    (toys / "odd-train.jsonl").write_text(json.dumps(row))
    odd = ("data.annotations=odd-{split}.jsonl", 'data.eval_splits=["train"]')
    done = call("data.py", "--config", "configs.json:toys", "--set", *odd, cwd=toys)
    assert "1 phrases with an unknown word" in done.out


def test_a_model_with_one_query_says_which_expressions_it_cannot_answer(toys, trained):
    box = [1, 1, 20, 20]
    texts = {"none": [], "one": [box], "two": [box, [30, 30, 10, 10]]}
    lines = []
    for text, boxes in texts.items():
        row = {"image": "train_00000.jpg", "expressions": [f"the {text}"], "boxes": boxes}
        lines.append(json.dumps(row))
    (toys / "mixed-train.jsonl").write_text("\n".join(lines))
    (toys / "mixed-val.jsonl").write_text("\n".join(lines))
    (toys / "mixed-test.jsonl").write_text(lines[0])
    rows = ("data.annotations=mixed-{split}.jsonl", 'data.eval_splits=["val"]')
    said = "1 expressions without a target and 1 with several: they need a recipe with several"
    done = start(toys, "mixed", *rows, "train.epochs=1")
    assert f"train: {said}" in done.err and f"val: {said}" in done.err
    assert metrics(toys, "mixed")[-1]["n"] == 2
    line = ("evaluate.py", "--ckpt", trained / "best.pt", "--set", rows[0], "--split")
    done = call(*line, "val", cwd=toys)
    assert f"val: {said}" in done.err and '"n": 2' in done.out
    done = call(*line, "test", cwd=toys)
    assert done.status == 2 and "test: no expression has a box" in done.err


def test_a_finished_run_with_more_epochs_names_the_way(toys, trained):
    done = start(toys, "trained", "--resume", "train.epochs=9", status=2)
    assert "--init" in done.err and "best.pt and another --out" in done.err


def test_a_model_in_16_bits_is_refused_with_the_way(toys):
    tokenizer = data.Tokenizer(toys / "data/toys/toys.spm")
    with pytest.raises(data.InputError, match="amp=torch.float16 runs the encoder in 16 bits"):
        evaluate.ground(tiny_model().half(), torch.zeros(3, 9, 9).byte(), ["a ball"], tokenizer)


def test_a_photo_of_108_megapixels_is_read(tmp_path):
    Image.new("RGB", (12000, 9000)).save(tmp_path / "large.jpg")
    with pytest.warns(Image.DecompressionBombWarning):
        assert data.read_image(tmp_path / "large.jpg").shape == (3, 9000, 12000)


def test_a_pickle_of_refer_that_calls_code_is_refused(tmp_path):
    config = write_refs(tmp_path, [])
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps([print]))
    with pytest.raises(data.InputError, match="would call builtins.print"):
        data.read_rows(data.DataConfig(str(tmp_path / "refs(unc).p"), config.images), "val")


def test_the_recipes_for_several_targets_have_several_queries():
    for name in ("grefcoco", "toys-grec"):
        assert train.read_config(f"{CONFIGS}:{name}", [])[0].queries > 1
