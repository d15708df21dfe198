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
    said = "1 expressions without a target, 1 with more than 1: they need a recipe with more"
    done = start(toys, "mixed", *rows, "train.epochs=1")
    assert f"train: {said}" in done.err and f"val: {said}" in done.err
    assert metrics(toys, "mixed")[-1]["n"] == 2
    line = ("evaluate.py", "--ckpt", trained / "best.pt", "--set", rows[0], "--split")
    done = call(*line, "val", cwd=toys)
    assert f"val: {said}" in done.err and '"n": 2' in done.out
    done = call(*line, "test", cwd=toys)
    assert done.status == 2 and "test: no expression has a box" in done.err


def test_a_model_with_three_queries_says_which_expressions_have_more_targets(capsys):
    examples = [data.Example("a.jpg", "a dog", [(1, 1, 20, 20)] * n) for n in (0, 1, 3, 4)]
    evaluate.check_targets("val", examples[:3], 3)
    assert not capsys.readouterr().err
    evaluate.check_targets("val", examples, 3)
    assert "val: 0 expressions without a target, 1 with more than 3:" in capsys.readouterr().err


def test_a_finished_run_with_more_epochs_names_the_way(toys, trained):
    done = start(toys, "trained", "--resume", "train.epochs=9", status=2)
    assert "--init" in done.err and "best.pt (or last.pt) and another --out" in done.err


def test_a_model_in_16_bits_is_refused_with_the_way(toys):
    tokenizer = data.Tokenizer(toys / "data/toys/toys.spm")
    with pytest.raises(data.InputError, match="amp=torch.float16 runs the encoder in 16 bits"):
        evaluate.ground(tiny_model().half(), torch.zeros(3, 9, 9).byte(), ["a ball"], tokenizer)


def test_a_photo_of_108_megapixels_is_read(tmp_path):
    Image.new("RGB", (12000, 9000)).save(tmp_path / "large.jpg")
    with pytest.warns(Image.DecompressionBombWarning):
        assert data.read_image(tmp_path / "large.jpg").shape == (3, 9000, 12000)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1"])
def test_grey_transparent_and_palette_pictures_are_read_as_rgb(mode, tmp_path):
    """torchtune#1975, detecto#29"""
    picture = Image.new("RGB", (6, 4), "white").convert(mode)
    name = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    picture.save(name)
    for image in (data.read_image(name), evaluate.to_tensor(picture)):
        assert image.shape == (3, 4, 6) and image.float().mean() > 250


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_pictures_with_more_than_8_bits_a_channel_are_refused_before_training(mode, tmp_path):
    """detectron2#1020: Pillow would make nearly all of such a picture white."""
    picture = Image.new(mode, (6, 4))
    picture.save(tmp_path / "a.tif")
    example = data.Example(str(tmp_path / "a.tif"), "a dog", [])
    for use in (
        lambda: data.check_images([example]),
        lambda: data.read_image(tmp_path / "a.tif"),
        lambda: evaluate.to_tensor(picture),
    ):
        with pytest.raises(data.InputError, match="more than 8 bits a channel"):
            use()


def test_boxes_that_reach_out_of_the_image_are_clipped_and_swapped_sizes_refused(tmp_path):
    """py-faster-rcnn#774, BlenderProc#106"""
    Image.new("RGB", (500, 332)).save(tmp_path / "a.jpg")
    row = {"image": "a.jpg", "expressions": ["a dog"], "boxes": [[26, 51, 613, 308]]}
    sizes = {"width": 332, "height": 500}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    (tmp_path / "val.jsonl").write_text(json.dumps(row | sizes | {"boxes": []}))
    config = data.DataConfig(f"{tmp_path}/{{split}}.jsonl", str(tmp_path))
    rows = data.read_rows(config, "train")
    data.check_images(rows[0])
    boxes = data.Dataset(rows, 32)[0, 0].boxes * torch.tensor([500, 332, 500, 332])
    assert boxes[0].tolist() == pytest.approx([262.5, 191, 473, 280])  # up to the last pixel
    with pytest.raises(data.InputError, match=r"\(500, 332\) pixels, the row says \(332, 500\)"):
        data.check_images(data.read_rows(config, "val")[0])


def test_a_pickle_of_refer_that_calls_code_is_refused(tmp_path):
    config = write_refs(tmp_path, [])
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps([print]))
    with pytest.raises(data.InputError, match="would call builtins.print"):
        data.read_rows(data.DataConfig(str(tmp_path / "refs(unc).p"), config.images), "val")


def test_the_recipes_for_several_targets_have_several_queries():
    for name in ("grefcoco", "toys-grec"):
        assert train.read_config(f"{CONFIGS}:{name}", [])[0].queries > 1
