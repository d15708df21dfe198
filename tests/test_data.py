"""data.py: what is read is right or refused with file and line, and boxes stay with their pixels."""

import io
import json
import os
import random
import re
import struct
import subprocess
import sys
import time
import zlib
from dataclasses import replace

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image

import data
from conftest import ROOT, environment, golden

CONFIGS = f"{ROOT}/configs.json"


# ---- configs


def test_every_config_resolves_and_no_fragment_goes_unused():
    entries = json.loads((ROOT / "configs.json").read_text())
    del entries["published-sizes"]
    used = {part for parts in entries.values() if isinstance(parts, list) for part in parts}
    for name, parts in entries.items():
        if isinstance(parts, list) or name == "default":
            assert data.load_config(f"{CONFIGS}:{name}").keys() == {"model", "data", "train"}
        else:
            assert name in used


def test_no_fragment_repeats_a_default():
    entries = json.loads((ROOT / "configs.json").read_text())
    undo = {
        "factors-2-1",
        "no-warmup",
        "data-shapes-grec",
        "quick",
    }  # they take back what a fragment before them has changed
    for name, sections in entries.items():
        if isinstance(sections, dict) and name not in {"default", "published-sizes", *undo}:
            for section, keys in sections.items():
                for key, value in keys.items():
                    assert value != entries["default"][section][key], f"{name}: {section}.{key}"


def test_a_new_dataset_takes_one_fragment_and_one_line(tmp_path):
    entries = json.loads((ROOT / "configs.json").read_text())
    entries["data-mine"] = {"data": {"annotations": "mine/{split}.jsonl", "images": "mine/images"}}
    entries["mine-large-stage2"] = ["data-mine", "large", "large-stage2"]
    (tmp_path / "configs.json").write_text(json.dumps(entries))
    config = data.load_config(f"{tmp_path}/configs.json:mine-large-stage2")
    assert config["data"]["images"] == "mine/images" and config["train"]["epochs"] == 10


def test_every_key_is_in_the_schema_and_every_key_of_data_is_explained_there():
    default = json.loads((ROOT / "configs.json").read_text())["default"]
    assert data.KEYS.keys() == {f"{section}.{key}" for section, keys in default.items() for key in keys}
    for key in default["data"]:
        assert re.search(rf'^    "data.{key}": .*  # \w+( \S+){{4,}}$', (ROOT / "data.py").read_text(), re.M), key


def test_overrides_come_last_and_whole_numbers_serve_as_floats():
    config = data.load_config(f"{CONFIGS}:refcoco-large", ["train.lr=1", "data.jitter=null", "data.images=photos"])
    assert config["train"]["lr"] == 1.0 and isinstance(config["train"]["lr"], float)
    assert config["data"]["jitter"] is None and config["data"]["images"] == "photos"
    assert config["model"]["encoder_layers"] == 24


@pytest.mark.parametrize(
    ("spec", "overrides", "expected"),
    [
        ("refcocoo", [], "'refcoco"),
        ("refcoco", ["train.lrr=1"], "'train.lr'"),
        ("refcoco", ["trian.lr=1"], "'train.lr'"),
        ("refcoco", ["train.lr=fast"], "a number"),
        ("refcoco", ["train.epochs=1.5"], "an integer"),
        ("refcoco", ["train.epochs=true"], "an integer"),
        ("refcoco", ["train.ema=1"], "true or false"),
        ("refcoco", ["train.lr=null"], "a number"),
        ("refcoco", ["data.eval_splits=val"], "a list"),
        ("refcoco", ["train.lr"], "section.key=value"),
        ("refcocog", [], "'refcocog-umd' or 'refcocog-google'"),
        ("quick", [], "is a fragment of recipes, not a recipe; did you mean 'shapes-quick'"),
        ("refcoco", ["data.annotations=mine/train.jsonl"], "expected {split} in the name"),
    ],
)
def test_a_mistake_in_a_config_names_the_nearest_right_thing(spec, overrides, expected):
    with pytest.raises(data.InputError) as error:
        data.load_config(f"{CONFIGS}:{spec}", overrides)
    assert expected in str(error.value) and "\n" not in str(error.value)


# ---- text


def small_tokenizer(path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the left dog", "the red circle", "a dog left of the circle"] * 5),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return data.Tokenizer(path)


def test_token_ids_are_the_pieces_plus_one_between_bos_and_eos_with_unknown_as_three(tmp_path):
    tokenizer = small_tokenizer(tmp_path / "a.spm")
    tokens, pad = tokenizer(["the dog", "the 犬"], max_tokens=12)
    pieces = tokenizer.model.encode("the dog")
    assert tokens[0].tolist() == [0, *(p + 1 for p in pieces), 2] + [1] * (10 - len(pieces))
    assert torch.equal(pad, tokens == 1) and 3 in tokens[1] and tokens.dtype == torch.int64


def test_long_texts_are_cut_and_still_end_with_eos(tmp_path):
    tokens, pad = small_tokenizer(tmp_path / "a.spm")(["the left dog " * 20], max_tokens=8)
    assert tokens.shape == (1, 8) and tokens[0, -1] == 2 and not pad.any()


def test_cleaning_lowers_the_case_drops_punctuation_and_splits_at_hyphens():
    assert data.clean('The LEFT-most "dog", with/out hat!') == "the left most dog with out hat"


def test_the_golden_texts_give_the_official_ids_through_the_real_tokenizer():
    path = ROOT / "data" / "beit3.spm"
    if not path.exists():
        pytest.skip("needs data/beit3.spm, which is not part of the project")
    tokenizer = data.Tokenizer(path)
    for case in golden("golden.json")["tokenizer"]["cases"]:
        assert data.clean(case["text"]) == case["cleaned"]
        tokens, pad = tokenizer([case["text"]])
        assert tokens[0].tolist() == case["ids"] and pad[0].int().tolist() == case["padding_mask"]


# ---- rows


def section(folder, name="rows.jsonl"):
    return {"annotations": str(folder / name), "images": str(folder), "sources": {"vg": f"{folder}/vg/{{}}.jpg"}}


GOOD = {"image": "a.jpg", "expressions": ["the dog", "a dog"], "boxes": [[1, 2, 30, 40]], "width": 64, "height": 48}


def test_a_row_may_have_one_several_or_no_boxes_and_several_expressions(tmp_path):
    lines = [GOOD, {**GOOD, "boxes": []}, {**GOOD, "boxes": [[1, 2, 3, 4], [5, 6, 7, 8]], "source": "vg"}]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(json.dumps(row) for row in lines) + "\n")
    one, none, several = data.read_rows(section(tmp_path), "train")
    assert [each.expression for each in one] == ["the dog", "a dog"]
    assert all(each.boxes == ((1, 2, 30, 40),) for each in one)
    assert none[0].boxes == () and len(several[0].boxes) == 2
    assert several[0].image == str(tmp_path / "vg" / "a.jpg") and several[0].where.endswith("rows.jsonl:5")
    assert [each.expression for each in data.expand([one])] == ["the dog", "a dog"]


def test_an_official_file_is_read_split_by_split_with_its_image_names(tmp_path):
    row = {"bbox": [1, 2, 30, 40], "image_id": 154, "height": 48, "width": 64, "expressions": ["x", "y"]}
    (tmp_path / "instances.json").write_text(json.dumps({"train": [row], "val": [{**row, "expressions": ["z"]}]}))
    about = section(tmp_path, "instances.json") | {"images": "root/COCO_train2014_{:012d}.jpg"}
    (found,) = data.read_rows(about, "val")
    assert found[0].image == "root/COCO_train2014_000000000154.jpg" and found[0].expression == "z"
    with pytest.raises(data.InputError, match="'testA'.*train, val"):
        data.read_rows(about, "testA")


def test_in_the_official_grefcoco_file_each_expression_has_its_own_boxes_or_none(tmp_path):
    row = {
        **{"image_id": 1, "height": 48, "width": 64, "expressions": ["both", "nothing"]},
        "bbox": [[[1, 2, 3, 4], [5, 6, 7, 8]], [[0, 0, 0, 0]]],
        "annotations": [[{"category_id": 1}, {"category_id": 1}], [{"category_id": -1}]],
    }
    (tmp_path / "instances.json").write_text(json.dumps({"train": [row]}))
    (found,) = data.read_rows(section(tmp_path, "instances.json") | {"images": "{}.jpg"}, "train")
    assert [len(each.boxes) for each in found] == [2, 0]


@pytest.mark.parametrize(
    "bad",
    [
        *("{", "[]", "{}", '"a"', "null", "[" * 100_000, b'{"image": "\xff"}'),
        {"image": "a.jpg", "a\nb": 3},
        {**GOOD, "image": 3},
        {**GOOD, "expressions": []},
        {**GOOD, "expressions": "the dog"},
        {**GOOD, "expressions": ["  "]},
        {**GOOD, "expressions": ["?!"]},
        {**GOOD, "expressions": [None]},
        {**GOOD, "boxes": [1, 2, 3, 4]},
        {**GOOD, "boxes": [[1, 2, 3]]},
        {**GOOD, "boxes": [[1, 2, "3", 4]]},
        {**GOOD, "boxes": [[1, 2, float("nan"), 4]]},
        {**GOOD, "boxes": [[1, 2, 0, 4]]},
        {**GOOD, "boxes": [[10, 10, -5, 4]]},
        {**GOOD, "boxes": [[60, 10, 30, 4]]},
        {**GOOD, "boxes": [[0.1, 0.2, 0.5, 0.6]]},
        {**GOOD, "boxes": [[-20, 10, 30, 4]]},
        {**GOOD, "boxes": [[1, 2, 10**400, 4]]},
        {**GOOD, "boxes": [[[1, 2, 3, 4]]]},
        {**GOOD, "boxes": [[[1, 2, 3, 4]], [1, 2, 3, 4]]},
        {**GOOD, "image": ""},
        {**GOOD, "image": "a\n.jpg"},
        {**GOOD, "expressions": ["half \ud800"]},
        {**GOOD, "source": ["vg"]},
        {**GOOD, "width": 0},
        {**GOOD, "width": "64"},
        {**GOOD, "source": "nowhere"},
    ],
)
def test_a_malformed_row_is_refused_with_file_and_line(bad, tmp_path):
    text = bad if isinstance(bad, bytes) else (bad if isinstance(bad, str) else json.dumps(bad)).encode()
    (tmp_path / "rows.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n" + text + b"\n")
    with pytest.raises(data.InputError) as error:
        data.read_rows(section(tmp_path), "train")
    assert f"{tmp_path}/rows.jsonl:2" in str(error.value) and "\n" not in str(error.value)


# ---- images


def save_image(path, size=(64, 48), color=(200, 30, 30), **options):
    Image.new("RGB", size, color).save(path, **options)
    return str(path)


def test_grey_and_palette_images_become_rgb(tmp_path):
    Image.new("L", (8, 6), 77).save(tmp_path / "grey.png")
    image = data.read_image(str(tmp_path / "grey.png"))
    assert image.shape == (3, 6, 8) and (image == 77).all() and image.dtype == torch.uint8


def test_an_image_is_turned_upright_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save_image(tmp_path / "a.jpg", exif=exif)
    assert data.read_image(path, (48, 64)).shape == (3, 64, 48)


def test_where_the_row_states_the_size_on_disk_its_boxes_were_drawn_there_and_exif_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save_image(tmp_path / "a.jpg", exif=exif)
    assert data.read_image(path, (64, 48)).shape == (3, 48, 64)


@pytest.mark.parametrize("mode", ["CMYK", "I;16", "RGBA", "P", "LA", "1"])
def test_images_of_every_mode_become_rgb(mode, tmp_path):
    grey = np.full((6, 8), 100 * 256 if mode == "I;16" else 100, dtype=np.uint16 if mode == "I;16" else np.uint8)
    image = Image.fromarray(grey) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    image.save(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"))
    seen = data.read_image(str(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")))
    assert seen.shape == (3, 6, 8) and seen.dtype == torch.uint8
    assert mode == "1" or (seen.int() - 100).abs().max() <= 2


def test_a_png_named_jpg_is_read_and_a_huge_picture_is_refused_before_it_is_decoded(tmp_path):
    save_image(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert data.read_image(str(tmp_path / "a.jpg")).shape == (3, 48, 64)
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + b"\0" * 4)
    with pytest.raises(data.InputError, match="60000 x 60000 pixels, more than 50,000,000"):
        data.read_image(str(tmp_path / "bomb.png"))


def test_an_image_of_another_size_than_its_row_states_is_refused(tmp_path):
    with pytest.raises(data.InputError, match="64 x 48, the row says 48 x 64"):
        data.read_image(save_image(tmp_path / "a.jpg"), (48, 64), "rows:3")


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text", "cut", "bomb"])
def test_an_image_that_cannot_be_read_is_one_line_that_names_row_and_file(kind, tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("hello")
    elif kind in ("cut", "bomb"):
        save_image(path)
        path.write_bytes(path.read_bytes()[: -40 if kind == "cut" else None])
        monkeypatch.setattr(data, "MAX_PIXELS", 100 if kind == "bomb" else data.MAX_PIXELS)
    with pytest.raises(data.InputError) as error:
        data.read_image(str(path), None, "rows.jsonl:7")
    assert "rows.jsonl:7" in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_over_20000_draws_a_drawn_square_lies_under_its_box_and_no_box_loses_more_than_half():
    rng = random.Random(0)
    crops = 0
    for _ in range(20_000):
        width, height = rng.randint(60, 160), rng.randint(60, 160)
        w, h = (max(1, round(rng.uniform(0.01, 0.9) * side)) for side in (width, height))
        x, y = rng.randint(0, width - w), rng.randint(0, height - h)
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        image[:, y : y + h, x : x + w] = 255
        box = torch.tensor([[x, y, x + w, y + h]], dtype=torch.float64)
        seen, moved = data.large_scale_jitter(image, box, (0.3, 1.4), 160, rng)
        x1, y1, x2, y2 = moved[0].tolist()
        assert 0 <= x1 < x2 <= seen.shape[2] + 1e-9 and 0 <= y1 < y2 <= seen.shape[1] + 1e-9
        whole = box / torch.tensor([width, height] * 2) * torch.tensor([seen.shape[2], seen.shape[1]] * 2)
        if not torch.allclose(whole, moved):  # cut out, at the scale it had
            crops += 1
            assert (x2 - x1) * (y2 - y1) >= 0.5 * w * h
        rows, columns = np.nonzero(seen[0].numpy() > 127)
        assert len(rows) or min(x2 - x1, y2 - y1) < 2  # a thinner one can fall between the samples
        if len(rows):
            assert x1 - 1 <= columns.min() and columns.max() + 1 <= x2 + 1
            assert y1 - 1 <= rows.min() and rows.max() + 1 <= y2 + 1
            if min(x2 - x1, y2 - y1) >= 4:
                assert columns.min() <= x1 + 1.5 and columns.max() + 1 >= x2 - 1.5
                assert rows.min() <= y1 + 1.5 and rows.max() + 1 >= y2 - 1.5
    assert crops > 5000


def test_jitter_keeps_half_of_every_one_of_many_boxes():
    rng = random.Random(1)
    boxes = torch.tensor([[5.0, 5, 25, 25], [60, 60, 95, 95]])
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    for _ in range(200):
        image, moved = data.large_scale_jitter(
            torch.zeros(3, 100, 100, dtype=torch.uint8), boxes, (1.01, 3.0), 100, rng
        )
        kept = (moved[:, 2:] - moved[:, :2]).prod(1)
        assert (kept >= 0.5 * area - 1e-3).all()


def test_missing_images_are_found_before_anything_starts(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({**GOOD, "image": f"{i}.jpg"}) + "\n" for i in range(3)))
    save_image(tmp_path / "0.jpg")
    with pytest.raises(data.InputError, match=r"rows.jsonl:2: there is no image .*1.jpg \(and 1 more"):
        data.check_files(data.read_rows(section(tmp_path), "train"))
    for name in ("1.jpg", "2.jpg"):
        save_image(tmp_path / name, size=(64, 48) if name == "1.jpg" else (20, 20))
    with pytest.raises(data.InputError, match=r"rows.jsonl:3: image .*2.jpg is 20 x 20, the row says 64 x 48"):
        data.check_files(data.read_rows(section(tmp_path), "train"))


# ---- examples and batches


def test_the_same_epoch_and_index_give_the_same_example_and_other_epochs_other_ones(shapes):
    dataset = shapes_dataset(shapes, jitter=(0.5, 1.5))
    first, again = dataset[3, 5], dataset[3, 5]
    assert torch.equal(first[0], again[0]) and first[1] == again[1] and torch.equal(first[2], again[2])
    assert any(not torch.equal(dataset[e, 5][0], first[0]) for e in range(3))


def shapes_dataset(shapes, kind="shapes", split="train", **options):
    about = {
        "annotations": f"{shapes}/data/{kind}/{{split}}.jsonl",
        "images": f"{shapes}/data/{kind}/images",
        "sources": {},
    }
    return data.Dataset(data.read_rows(about, split), 48, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_padded_targets_whatever_the_number_of_workers(shapes, workers):
    dataset = shapes_dataset(shapes, "shapes-grec")
    collate = data.Collate(data.Tokenizer(shapes / "data/shapes-grec/shapes.spm"), 10)
    keys = [[(0, i) for i in range(s, s + 8)] for s in (0, 8)]
    for batch, expected in zip(data.batches(dataset, collate, keys, workers), keys, strict=True):
        assert batch.index == [i for _, i in expected] and batch.images.dtype == torch.uint8
        counts = [len(dataset.rows[i][0].boxes) for i in batch.index]
        assert batch.box_mask.sum(1).tolist() == counts and batch.boxes.shape[1] == max(1, *counts)
        assert (batch.boxes[~batch.box_mask] == 0).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_in_a_worker_is_still_one_line_that_names_its_row(shapes, workers, tmp_path):
    dataset = shapes_dataset(shapes)
    dataset.rows[2] = tuple(replace(example, image=str(tmp_path / "gone.jpg")) for example in dataset.rows[2])
    collate = data.Collate(data.Tokenizer(shapes / "data/shapes/shapes.spm"), 10)
    with pytest.raises(data.InputError) as error:
        list(data.batches(dataset, collate, [[(0, 2)]], workers))
    assert "train.jsonl:3" in str(error.value) and "\n" not in str(error.value)


# ---- the embedded set


@pytest.mark.parametrize("kind", data.KINDS)
def test_every_expression_of_a_scene_is_true_of_exactly_the_things_it_names(kind):
    for number in range(60):
        _, things = data.draw_scene(random.Random(number), (3, 4))
        for text, named in data.phrases(things, kind):
            assert sorted(named) == sorted(understood(text, things)), (text, things)


def understood(text: str, things: list[data.Thing]) -> list[int]:
    """A second reader of the little language, written the other way round: from the words to the things."""
    for relation, (axis, sign) in data.RELATIONS.items():
        if f" {relation} the " in text:
            left, right = text.removeprefix("the ").split(f" {relation} the ")
            (anchor,) = fitting(right, things)
            place = getattr(things[anchor], axis)
            return [i for i in fitting(left, things) if i != anchor and sign * (getattr(things[i], axis) - place) > 0]
    words = text.split()[1:]
    if words[0] in data.SUPERLATIVES:
        axis, sign, _ = data.SUPERLATIVES[words[0]]
        group = fitting(" ".join(words[1:]), things)
        return [max(group, key=lambda i: sign * getattr(things[i], axis))] if group else []
    return fitting(" ".join(words), things)


def fitting(noun: str, things: list[data.Thing]) -> list[int]:
    return [i for i, t in enumerate(things) if set(noun.split()) <= {t.color, t.shape, "object"}]


def test_the_splits_share_no_scene_and_every_kind_is_there(shapes):
    seen = {}
    for split in ("train", "val", "test"):
        dataset = shapes_dataset(shapes, split=split)
        seen[split] = {example.image for example in dataset.examples}
        assert {example.kind for example in dataset.examples} == set(data.KINDS)
        pixels = {data.read_image(image).numpy().tobytes() for image in seen[split]}
        seen[split] = pixels
    assert not seen["train"] & seen["val"] and not seen["train"] & seen["test"] and not seen["val"] & seen["test"]


def test_the_grec_set_has_expressions_with_no_one_and_several_targets(shapes):
    counts = {min(2, len(each.boxes)) for each in shapes_dataset(shapes, "shapes-grec", "val").examples}
    assert counts == {0, 1, 2}


@pytest.mark.parametrize("kind", ["shapes", "shapes-grec"])
def test_label_noise_gives_a_share_of_the_rows_a_box_of_another_thing_as_the_seed_says(shapes, kind):
    clean = shapes_dataset(shapes, kind).rows
    noisy = data.with_wrong_boxes(clean, 0.3, seed=1)
    assert noisy == data.with_wrong_boxes(clean, 0.3, seed=1) != data.with_wrong_boxes(clean, 0.3, seed=2)
    assert data.with_wrong_boxes(clean, 0.0, seed=1) == clean
    with_target = [pair for pair in zip(clean, noisy, strict=True) if pair[0][0].boxes]
    wrong = [(right, row) for right, row in with_target if row != right]
    assert 0.2 < len(wrong) / len(with_target) < 0.4
    others = 0
    for right, row in wrong:
        ((box,),) = {example.boxes for example in row}  # one box, the same for every expression of the row
        assert box not in right[0].boxes
        data.check_box(box, right[0].size)
        assert [replace(example, boxes=right[0].boxes) for example in row] == list(right)  # nothing else changed
        others += any(box in other[0].boxes for other in clean if other[0].image == row[0].image)
    assert others > len(wrong) / 3  # the rest are images with one thing, whose box is moved
    assert all(row == right for right, row in zip(clean, noisy, strict=True) if not right[0].boxes)


def test_making_the_set_twice_gives_the_same_files(tmp_path):
    for name in ("a", "b"):
        data.make_shapes(tmp_path / name, 12, "shapes-grec", show=False)
    names = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(names) > 12
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)


def test_boxes_of_a_row_without_a_size_are_held_against_the_image_before_anything_starts(tmp_path):
    save_image(tmp_path / "a.jpg")
    row = {"image": "a.jpg", "expressions": ["the dog"], "boxes": [[100, 10, 20, 20]]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(data.InputError, match=r"rows.jsonl:1: box .* lies outside the image of 64 x 48"):
        data.check_files(data.read_rows(section(tmp_path), "train"))


# ---- what would be wrong without a word, or end in a traceback


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.image_size=650", "model.image_size=650: expected a multiple of 32"),
        ("model.encoder_heads=5", "model.encoder_width=768: expected a multiple of 20"),
        ("model.head_width=100", "model.head_width=100: expected a multiple of 8"),
        ("model.decoder_layers=0", "model.decoder_layers must be an integer from 1"),
        ("model.queries=0", "model.queries must be an integer from 1"),
        ("train.lr=NaN", "train.lr must be a number from 0.0 to 1.0, not nan"),
        ("train.lr=-1", "train.lr must be"),
        ("train.clip_norm=-1", "train.clip_norm must be"),
        ("train.micro_batch=0", "train.micro_batch must be an integer from 1"),
        ("train.batch_size=0", "train.batch_size must be"),
        ("train.evaluate_every=0", "train.evaluate_every must be"),
        ("train.epochs=0", "train.epochs must be"),
        ("train.seed=99999999999999999999", "train.seed must be"),
        ("train.lr=" + "9" * 400, "train.lr must be"),
        ('train.decay_epochs=["a"]', "train.decay_epochs must be a list of any length, each an integer from 1"),
        ("train.decay_epochs=5", "train.decay_epochs must be a list"),
        ("train.betas=[0.9]", "train.betas must be a list of 2, each a number from 0.0 to 0.999999"),
        ("data.jitter=[1]", "data.jitter must be a list of 2"),
        ("data.workers=-1", "data.workers must be an integer from 0"),
        ("data.max_tokens=2", "data.max_tokens must be an integer from 3 to 1,022"),
        ("data.eval_splits=[]", "data.eval_splits must be a list such as"),
        ("data.eval_splits=[3]", "data.eval_splits must be a list such as"),
        ('data.sources={"vg": 3}', "data.sources must be"),
        ('data.images="a\\u0000b"', "data.images must be a string"),
        ("data.generate=circles", "there are: shapes, shapes-grec"),
        ("data.label_noise=0.3", "data.label_noise is for the embedded sets"),
        ("data.label_noise=30", "data.label_noise must be a number from 0.0 to 1.0"),
        ("train.ema=" + "[" * 100_000, "true or false"),
        ("train.ema=" + "[" * 900 + "]" * 900, "true or false"),
        ("train." + "x" * 100_000 + "=1", "unknown key"),
        ("x" * 100_000, "expected section.key=value"),
        ("a\nb", "expected section.key=value"),
    ],
)
def test_a_setting_out_of_its_bounds_is_refused_in_one_short_line(override, expected):
    with pytest.raises(data.InputError) as error:
        data.load_config(f"{CONFIGS}:refcoco", [override])
    assert expected in str(error.value) and str(error.value).isprintable() and len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([], "expected an object of recipes and fragments"),
        ({"a": []}, '"default" among them'),
        ({"a": ["nothing"]}, "'nothing' must be a fragment"),
        ({"a": ["b"], "b": ["a"]}, "'a' must be a fragment {section: {key: value}} or a list of others"),
        ({"a": 3}, "'a' must be a fragment"),
        ({"a": [["b"]]}, "['b'] must be a fragment"),
        ({"a": ["b"], "b": {"train": 3}}, "'b' must be a fragment"),
        ({"a": [], "default": {"train": {}}}, ": the config lacks "),
        ({"a": ["b"], "b": {"train": {"lr": "fast"}}}, "configs.json:b: train.lr must be a number"),
        ({"a": ["b"], "b": {"model": {"lr": 1}}}, "configs.json:b: unknown key 'model.lr'"),
    ],
)
def test_a_file_of_configs_that_is_wrong_inside_is_refused_in_one_line(entries, expected, tmp_path):
    if isinstance(entries, dict) and expected != '"default" among them':
        entries = {"default": json.loads((ROOT / "configs.json").read_text())["default"], **entries}
    (tmp_path / "configs.json").write_text(json.dumps(entries))
    with pytest.raises(data.InputError) as error:
        data.load_config(f"{tmp_path}/configs.json:a")
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("pattern", ["{.a}", "{:c}", "{[0]}", "{:999999999d}", "{0!x}", "{}{}", "{"])
def test_a_pattern_of_image_names_that_is_not_one_plain_number_is_refused(pattern, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({**GOOD, "image": 1_234_567}))
    with pytest.raises(data.InputError, match="rows.jsonl:1: the image is a number, so .* should be a pattern"):
        data.read_rows(section(tmp_path) | {"images": f"root/{pattern}.jpg"}, "train")


@pytest.mark.parametrize("text", ["\u200b", "\u2060\ufeff", "\x07", "\u2581", "\u2581\u200b \x00", "\u2800"])
def test_a_phrase_of_nothing_to_be_seen_or_of_the_tokenizers_own_blank_is_no_word(text, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({**GOOD, "expressions": ["the dog", text]}))
    with pytest.raises(data.InputError, match="at least one word"):
        data.read_rows(section(tmp_path), "train")


@pytest.mark.parametrize("box", [[63, 2, 1, 40], [63.5, 2, 0.5, 4], [2, 47, 10, 1]])
def test_a_box_that_clipping_leaves_nothing_of_is_refused(box, tmp_path):
    assert data.clip_boxes([box], 64, 48).reshape(2, 2).diff(dim=0).min() <= 0
    (tmp_path / "rows.jsonl").write_text(json.dumps({**GOOD, "boxes": [box]}))
    with pytest.raises(data.InputError, match="rows.jsonl:1: box .* lies in the last column or row of pixels"):
        data.read_rows(section(tmp_path), "train")


@pytest.mark.parametrize("name", ["a.tif", "a.ico", "a.ppm", "a.tga"])
def test_an_image_of_a_format_that_data_sets_do_not_use_is_refused_with_those_that_are_read(name, tmp_path):
    with pytest.raises(data.InputError, match="cannot read the image .*none of JPEG, PNG, WEBP, BMP, GIF, MPO"):
        data.read_image(save_image(tmp_path / name))


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp", "a.gif", "a.mpo"])
def test_images_of_the_formats_of_data_sets_are_read(name, tmp_path):
    assert data.read_image(save_image(tmp_path / name)).shape == (3, 48, 64)


def test_a_pipe_or_a_device_is_no_image_and_nobody_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (str(tmp_path / "pipe.jpg"), "/dev/zero"):
        done = subprocess.run(
            [sys.executable, "-c", "import sys, data; data.read_image(sys.argv[1])", path],
            **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": 60},
        )
        assert done.stderr.splitlines()[-1] == f"data.InputError: {path}: there is no image {path}"


SHAPES = {"annotations": "data/shapes/{split}.jsonl", "tokenizer": "data/shapes/shapes.spm", "generate": "shapes"}
MAKE = "import json, sys, data; data.make_embedded_set(json.loads(sys.argv[1]))"


def make_set(folder, scenes) -> subprocess.Popen:
    line = [sys.executable, "-c", MAKE, json.dumps({**SHAPES, "scenes": scenes})]
    env = {**environment(), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(line, cwd=folder, env=env, stderr=subprocess.PIPE, text=True)


def test_of_two_first_starts_at_once_the_second_uses_the_set_of_the_first(tmp_path):
    both = [make_set(tmp_path, 300) for _ in range(2)]
    assert [(process.communicate(timeout=120)[1], process.returncode) for process in both] == [("", 0)] * 2
    assert [path.name for path in (tmp_path / "data").iterdir() if not path.name.startswith(".")] == ["shapes"]
    assert len(list((tmp_path / "data" / "shapes" / "images").glob("train_*.jpg"))) == 300


def test_what_a_killed_first_start_left_behind_does_not_disturb_the_next(tmp_path):
    killed = make_set(tmp_path, 5000)
    while killed.poll() is None and not list(tmp_path.glob("data/.shapes-*/set/images/*.jpg")):
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert list(tmp_path.glob("data/.shapes-*/set/images/*.jpg"))
    assert make_set(tmp_path, 60).communicate(timeout=120)[1] == ""
    assert [path.name for path in (tmp_path / "data").iterdir() if not path.name.startswith(".")] == ["shapes"]
