"""data.py: what is read is right or refused with file and row, and boxes stay with their pixels."""

import json
import pickle
import random
import re
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageFile
from sentencepiece import SentencePieceTrainer

import data
import train
from conftest import CONFIGS, ROOT, Done, call, golden

GOOD = {"image": "a.png", "expressions": ["the dog", "a dog"], "boxes": [[1, 2, 30, 40]]}
SIZED = {**GOOD, "width": 64, "height": 48}


def section(folder: Path, *names: str, **changes) -> data.DataConfig:
    files = tuple(f"{folder}/{name}" for name in names or ["{split}.jsonl"])
    return data.DataConfig(**{"annotations": files, "images": str(folder)} | changes)


def write(path: Path, *rows: dict | str) -> None:
    """A file of JSON Lines; texts are written as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")


def save_picture(path: Path, orientation: int = 1, white: tuple = (0, 0, 32, 48)) -> Path:
    """64 x 48 pixels as stored, of grey levels; EXIF says how the camera was held."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.new("L", (64, 48))
    picture.paste(255, white)
    picture.save(path, exif=exif)
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> data.Tokenizer:
    prefix = tmp_path_factory.mktemp("text") / "small"
    texts = iter(["the left dog", "the red circle", "a dog left of the circle"] * 5)
    options = {"vocab_size": 40, "hard_vocab_limit": False, "minloglevel": 2}
    SentencePieceTrainer.train(sentence_iterator=texts, model_prefix=prefix, **options)
    return data.Tokenizer(f"{prefix}.model")


def test_token_ids_are_the_pieces_plus_one_between_bos_and_eos_with_unknown_as_three(tokenizer):
    tokens, pad = tokenizer(["The dog!", "the 犬"], max_tokens=12)
    ids = [piece + 1 for piece in tokenizer.model.encode("the dog")]
    assert tokens[0].tolist() == [0, *ids, 2] + [1] * (10 - len(ids))
    assert torch.equal(pad, tokens == 1) and 3 in tokens[1] and tokens.dtype == torch.int64
    assert tokenizer.vocab_size == tokenizer.model.vocab_size() + 1
    assert tokenizer(["the dog"], len(ids) + 1)[0].tolist() == [[0, *ids[:-1], 2]]  # cut
    assert [tokenizer.is_cut("the dog", len(ids) + more) for more in (1, 2)] == [True, False]


def test_texts_are_cleaned_and_made_ids_as_by_the_official_code():
    for case in golden("golden.json")["tokenizer"]["cases"]:
        assert data.clean(case["text"]) == case["cleaned"]
        if (ROOT / "data/beit3.spm").exists():  # not part of the project
            ids, pad = data.Tokenizer(ROOT / "data/beit3.spm")([case["text"]])
            assert ids[0].tolist() == case["ids"] and pad[0].int().tolist() == case["padding_mask"]


def test_later_fragments_win_over_earlier_ones_and_set_over_all(tmp_path):
    entries = {"base": ["mine"], "slow": {"train": {"lr": 0.25}}, "both": ["base", "slow"]}
    entries["mine"] = {"data": {"workers": 1}, "train": {"lr": 0.5, "decay_epochs": [3]}}
    write(tmp_path / "c.json", entries)
    settings = ["data.workers=2", "data.jitter=null", "data.images=photos/1", "train.clip_norm=1"]
    _, about, training = train.read_config(f"{tmp_path}/c.json:both", settings)
    assert about == data.DataConfig(workers=2, jitter=None, images="photos/1")
    assert (training.lr, training.decay_epochs, training.clip_norm) == (0.25, (3,), 1)
    write(tmp_path / "c.json", entries | {"slow": {"trian": {"lr": 0.25}}})
    with pytest.raises(data.InputError, match="c.json: recipe both: unknown section 'trian'; did"):
        train.read_config(f"{tmp_path}/c.json:both", [])


WRONG_TYPES = "train.lr=fast train.lr=null train.lr=-1 train.epochs=1.5 train.epochs=true"
WRONG_TYPES += ' train.amp=8 train.ema=1 data.jitter=[1] data.eval_splits=val data.sources={"vg":3}'
WRONG_NAMES = {"train.lrr=1": "unknown key train.lrr; did you mean 'lr'?"}
WRONG_NAMES |= {"model.lr=1": "unknown key model.lr", "trian.lr=1": "; did you mean 'train'?"}
WRONG_NAMES |= {"train.lr": "--set train.lr: expected section.key=value"}
WRONG_NAMES |= {"refcocoo": "configs.json: there is no recipe 'refcocoo'; did you mean 'refcoco'?"}


@pytest.mark.parametrize("wrong", [*WRONG_TYPES.split(), *WRONG_NAMES])
def test_a_mistake_in_a_setting_is_one_line_with_the_key_or_the_nearest_one(wrong):
    recipe, settings = ("refcoco", [wrong]) if "." in wrong else (wrong, [])
    expected = WRONG_NAMES.get(wrong, f"{wrong.partition('=')[0]} must be ")
    with pytest.raises(data.InputError, match=f"^.*{re.escape(expected)}.*$"):
        train.read_config(f"{CONFIGS}:{recipe}", settings)


def told(rows: list[data.Row]) -> list[list[tuple]]:
    return [[(example.expression, example.boxes) for example in row] for row in rows]


def test_own_rows_have_any_number_of_boxes_and_expressions_and_know_their_line(tmp_path):
    several = {**GOOD, "boxes": [[1, 2, 3, 4], [5, 6, 7, 8]], "source": "vg", "kind": "far"}
    write(tmp_path / "train.jsonl", SIZED, "", {**GOOD, "image": 7, "boxes": []}, several)
    about = section(tmp_path, images="root/{:04d}.jpg", sources={"vg": "vg/images"})
    rows = data.read_rows(about, "train")
    one, two = [(1, 2, 30, 40)], [(1, 2, 3, 4), (5, 6, 7, 8)]
    assert told(rows) == [[("the dog", boxes), ("a dog", boxes)] for boxes in (one, [], two)]
    firsts = [row[0] for row in rows]
    assert [each.image for each in firsts] == ["root/a.png", "root/0007.jpg", "vg/images/a.png"]
    assert [each.size for each in firsts] == [(64, 48), None, None] and firsts[2].kind == "far"
    assert [each.where[-13:] for each in firsts] == [f"train.jsonl:{n}" for n in (1, 3, 4)]


def test_official_rows_have_one_box_or_in_grefcoco_boxes_of_each_expression(tmp_path):
    row = {"bbox": [1.5, 2, 30, 40], "image_id": 154, "height": 48, "width": 64}
    one, mixed = {**row, "expressions": ["z"]}, {"expressions": ["x", "y"], "data_source": "coco"}
    a, b = [1, 2, 3, 4], [5, 6, 7, 8]
    grec = {"image_id": 1, "expressions": ["both", "no", "b"], "bbox": [[a, b], [[0] * 4], [b]]}
    grec["annotations"] = [[{"category_id": n} for n in each] for each in ([1, 1], [-1], [9])]
    write(tmp_path / "instances.json", {"train": [row | mixed], "val": [one], "test": [grec]})
    about = section(tmp_path, "instances.json", images="{}.jpg", sources={"coco": "c/{:012d}.jpg"})
    ((x, y),), ((z,),) = data.read_rows(about, "train"), data.read_rows(about, "val")
    assert told([[x, y, z]]) == [[(text, [(1.5, 2, 30, 40)]) for text in "xyz"]]
    assert x.image == "c/000000000154.jpg" and z.image == "154.jpg" and x.size == (64, 48)
    several = [("both", [tuple(a), tuple(b)]), ("no", []), ("b", [tuple(b)])]
    assert told(data.read_rows(about, "test")) == [several]


def write_refs(folder: Path, name: str, *refs: tuple) -> None:
    """Each (split, image, objects, texts), beside COCO's file with object n at (n, 9, 9, 9)."""
    images = [dict(id=i, file_name=f"COCO_{i}.jpg", width=64, height=48) for i in (1, 2)]
    boxes = [dict(id=n, image_id=n // 10, category_id=1, bbox=[n, 9, 9, 9]) for n in (11, 12, 21)]
    write(folder / "instances.json", {"images": images, "annotations": boxes, "categories": []})
    rows = []
    for split, image, target, *texts in refs:
        row = {"split": split, "image_id": image, "ann_id": target}
        row["file_name"] = f"COCO_{image}_0.jpg"  # refer adds a number to the image's name
        row["sentences"] = [{"raw": text.upper(), "sent": text} for text in texts]
        rows.append(row | {"no_target": target == [-1]} if name.startswith("grefs") else row)
    content = json.dumps(rows).encode()
    if name.endswith(".p"):  # in Python 2, texts were strings of bytes
        content = re.sub(rb"X(.)\0\0\0", rb"U\1", pickle.dumps(rows, protocol=2))
    (folder / name).write_bytes(content.replace(b"caf?", b"caf\xe9"))


def test_a_pickle_of_refer_written_by_python_2_is_read_object_by_object(tmp_path):
    refs = [("train", 1, 11, "left", "caf?"), ("testA", 2, 21, "other"), ("train", 1, 12, "right")]
    write_refs(tmp_path, "refs(unc).p", *refs)
    about = section(tmp_path, "refs(unc).p", images="root/COCO_train2014_{:012d}.jpg")
    rows = data.read_rows(about, "train")
    left, right = [(11, 9, 9, 9)], [(12, 9, 9, 9)]
    assert told(rows) == [[("left", left), ("café", left)], [("right", right)]]
    assert rows[0][0].image == "root/COCO_1.jpg" and rows[0][0].size == (64, 48)


def test_a_training_row_of_grefcoco_is_an_image_whose_expressions_have_their_own_boxes(tmp_path):
    refs = [(1, [11, 12], "both"), (2, 21, "one"), (1, [-1], "none", "nobody")]
    refs = [(split, *ref) for split in ("train", "val") for ref in refs]
    write_refs(tmp_path, "grefs(unc).json", *refs)
    both, one = ("both", [(11, 9, 9, 9), (12, 9, 9, 9)]), ("one", [(21, 9, 9, 9)])
    none, nobody = ("none", []), ("nobody", [])
    about = section(tmp_path, "grefs(unc).json")
    assert told(data.read_rows(about, "train")) == [[both, none, nobody], [one]]
    assert told(data.read_rows(about, "val")) == [[both], [one], [none, nobody]]


def test_several_files_are_read_in_order_and_one_without_the_split_counts_as_empty(tmp_path):
    for name in ("a_train", "b_train", "b_val"):
        write(tmp_path / f"{name}.jsonl", {**GOOD, "expressions": [name]})
    about = section(tmp_path, "a_{split}.jsonl", "b_{split}.jsonl")
    for split, names in (("train", ["a_train", "b_train"]), ("val", ["b_val"])):
        assert [row[0].expression for row in data.read_rows(about, split)] == names


def test_what_cannot_be_read_is_one_line_that_names_the_file(tmp_path):
    write(tmp_path / "train.jsonl", GOOD)
    write_refs(tmp_path, "refs(unc).p")
    (tmp_path / "refs(unc).p").write_bytes(b"cos\nmkdir\n(S'%s/ran'\ntR." % bytes(tmp_path))
    for names, expected in (
        (["refs(unc).p"], r"refs\(unc\).p: it would call os.mkdir"),
        (["instances.json"], "instances.json: there is no row of split 'train'"),
        (["{split}.jsonl", "a_{split}.jsonl"], "a_train.jsonl: there is no such file"),
        (["train.jsonl"], r"train.jsonl: expected \{split\} in the name"),
    ):
        with pytest.raises(data.InputError, match=f"^.*{expected}.*$"):
            data.read_rows(section(tmp_path, *names), "train")
    assert not (tmp_path / "ran").exists()


WRONG_BOXES = [[1, 2, 3], [1, 2, "3", 4], [1, 2, float("nan"), 4], [1, 2, 0, 4], [30, 20, -5, 4]]
WRONG_BOXES += [[0.1, 0.2, 0.5, 0.6], [40, 30, 40, 30], [-20, 9, 30, 4], [63, 2, 1, 9], 7]
WRONG_ROWS = [
    (SIZED | {"boxes": [box]}, f"box {box}, expected [x, y, w, h]") for box in WRONG_BOXES
]
WRONG_ROWS += [
    ("{", "Expecting"),
    ({"image": "a.png", "expressions": ["x"]}, 'expected "image", "expressions" and a list'),
    ({**SIZED, "boxes": ""}, 'expected "image", "expressions" and a list "boxes"'),
    ({**SIZED, "width": "wide"}, "int() with base 10: 'wide'"),
    ({**SIZED, "expressions": []}, '"expressions" must be a list'),
    ({**SIZED, "expressions": "the dog"}, '"expressions" must be a list'),
    ({**SIZED, "expressions": ["dog", "?!"]}, "at least one word, not '?!'"),
    ({**GOOD, "boxes": [[-20, 10, 30, 4]]}, "more than half of it lies outside"),
    ({**SIZED, "source": "vg"}, "its source 'vg' has no folder in data.sources"),
]


@pytest.mark.parametrize(("row", "expected"), WRONG_ROWS, ids=range(len(WRONG_ROWS)))
def test_a_malformed_row_is_one_line_with_file_and_row(row, expected, tmp_path):
    write(tmp_path / "train.jsonl", GOOD, row, GOOD)
    with pytest.raises(data.InputError) as error:
        data.read_rows(section(tmp_path), "train")
    faults = []
    assert len(data.read_rows(section(tmp_path), "train", faults)) == 2  # the sound rows
    assert [str(fault) for fault in faults] == [str(error.value)] and "\n" not in str(faults[0])
    assert str(faults[0]).startswith(f"{tmp_path}/train.jsonl:2: ") and expected in str(faults[0])


def test_the_digest_depends_on_rows_and_their_order_but_not_on_folders():
    a = data.Example("photos/a.png", "the dog", [(1, 2, 30, 40)], (64, 48))
    b = a._replace(image="photos/b.png")
    assert train.digest([[a], [b]]) == train.digest([[a._replace(image="elsewhere/a.png")], [b]])
    changes = [{"boxes": []}, {"expression": "dog"}, {"size": (65, 48)}, {"image": "photos/c.png"}]
    different = [[[a, b]], [[a], [b]], [[b], [a]], [[a]]]
    different += [[[a._replace(**change)], [b]] for change in changes]
    assert len(set(map(train.digest, different))) == 8


def test_a_picture_is_not_decoded_to_learn_its_size(tmp_path, monkeypatch):
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")  # without EXIF, for which Pillow decodes it
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: 1 / 0)
    data.check_images([data.Example(f"{tmp_path}/a.png", "x", [])])


def test_exif_turns_a_picture_unless_its_row_states_the_size_as_stored(tmp_path):
    cases = [(1, None, "left"), (6, None, "top"), (6, (48, 64), "top"), (6, (64, 48), "left")]
    cases += [(8, (48, 64), "bottom"), (3, (64, 48), "right")]  # 180 degrees: no size can tell
    for orientation, stated, white in cases:
        seen = data.read_image(save_picture(tmp_path / "a.png", orientation), stated)
        sides = {"left": seen[:, :, :20], "right": seen[:, :, -20:]}
        sides |= {"top": seen[:, :20], "bottom": seen[:, -20:]}
        assert [name for name, side in sides.items() if side.min() == 255] == [white]
    with pytest.raises(data.InputError, match=r"has \(64, 48\) pixels, the row says \(48, 48\)"):
        data.read_image(save_picture(tmp_path / "a.png"), (48, 48))


def test_before_anything_starts_every_header_is_held_against_its_rows(tmp_path):
    save_picture(tmp_path / "turned.png", orientation=6)
    whole = save_picture(tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:-60])
    right = {"boxes": [[50, 10, 10, 10]], "expressions": ["x"]}  # it lies outside of 48 x 64
    rows = [GOOD, GOOD | right, GOOD | right | {"image": "turned.png"}]
    rows += [SIZED | right | {"image": "turned.png"}]  # not turned, as the size is that as stored
    rows += [{**GOOD, "image": "gone.png"}, {**GOOD, "image": "cut.png"}, {**SIZED, "width": 65}]
    write(tmp_path / "train.jsonl", *rows)
    examples = data.all_examples(data.read_rows(section(tmp_path), "train"))
    expected = {3: "lies outside", 5: "No such file", 6: "cut.png: ", 7: "the row says (65, 48)"}
    for decode, numbers in ((False, (3, 5, 7)), (True, (3, 5, 6, 7))):
        faults = []
        data.check_images(examples, decode, faults)
        for fault, number in zip(map(str, faults), numbers, strict=True):
            assert f"train.jsonl:{number}: " in fault and expected[number] in fault
    with pytest.raises(data.InputError, match=r"train.jsonl:3: .*\(3 images or boxes are at fault"):
        data.check_images(examples)


def test_resizing_is_bilinear_between_centres_of_pixels_and_does_not_smooth():
    for values, expected in (([0, 100], [0, 25, 75, 100]), ([0, 100, 200, 40], [50, 120])):
        image = torch.tensor(values, dtype=torch.uint8).expand(3, 2, -1)
        assert data.resize(image, 5, len(expected))[1, 4].tolist() == expected


@pytest.mark.parametrize(("limits", "tolerance"), [((0.3, 1.0), 1.5), ((1.0, 1.4), 0)])
def test_what_is_drawn_lies_under_its_box_after_the_jitter(limits, tolerance):
    rng = random.Random(0)
    for _ in range(1000):
        width, height = rng.randint(60, 160), rng.randint(60, 160)
        w, h = (round(rng.uniform(0.1, 0.9) * side) for side in (width, height))
        x, y = rng.randint(0, width - w), rng.randint(0, height - h)
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        image[:, y : y + h, x : x + w] = 255
        box = torch.tensor([[x, y, x + w, y + h]], dtype=torch.float64)
        seen, (box,) = data.large_scale_jitter(image, box, limits, 160, rng)
        assert (0.3 * 159 if tolerance else max(width, height) / 1.42) < max(seen.shape[1:]) <= 160
        rows, columns = seen[0].gt(127).nonzero(as_tuple=True)
        drawn = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert (torch.tensor(drawn) - box).abs().max() <= tolerance


def test_a_window_keeps_half_of_every_box_or_the_picture_stays_whole():
    rng, image, whole = random.Random(1), torch.zeros(3, 100, 50, dtype=torch.uint8), 0
    boxes = torch.tensor([[5.0, 5, 15, 25], [35, 70, 48, 95]])
    for _ in range(40):
        seen, moved = data.large_scale_jitter(image, boxes, (1.01, 3.0), 100, rng)
        kept = (moved[:, 2:] - moved[:, :2]).prod(1)
        assert (kept >= 0.5 * torch.tensor([200, 325])).all()
        whole += seen.shape == image.shape
    assert 0 < whole < 40
    assert data.large_scale_jitter(image, boxes[:0], (2, 2), 100, rng)[0].shape == (3, 50, 25)


def test_boxes_are_centre_and_size_in_parts_of_a_picture_that_is_not_square(tmp_path):
    path = str(save_picture(tmp_path / "a.png", white=(16, 12, 48, 24)))
    boxes = [(16, 12, 32, 12), (40, 30, 32, 20), (-5, -5, 20, 20)]  # the others are clipped
    item = data.Dataset([[data.Example(path, "the dog", boxes)]], image_size=32)[0, 0]
    expected = [[32, 18, 32, 12], [51.5, 38.5, 23, 17], [7.5, 7.5, 15, 15]]
    torch.testing.assert_close(item.boxes, torch.tensor(expected) / torch.tensor([64, 48, 64, 48]))
    rows, columns = item.image[0].gt(127).nonzero(as_tuple=True)
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (8, 8, 23, 15)
    assert item.image.shape == (3, 32, 32) and item.size == (64, 48)


def test_the_jitter_of_an_item_is_a_function_of_seed_epoch_and_row_alone(tmp_path):
    row = [data.Example(str(save_picture(tmp_path / "a.png")), "the dog", [(1, 2, 30, 40)])]
    found = []
    for seed, epoch, index in ((0, 3, 1), (0, 3, 1), (1, 3, 1), (0, 4, 1), (0, 3, 0)):
        item = data.Dataset([row, row], 32, seed, jitter=(0.5, 1.5))[epoch, index]
        found.append(item.image.numpy().tobytes())
    assert found[0] == found[1] and len(set(found)) == 4


def test_over_the_epochs_a_row_shows_all_its_expressions_each_with_its_own_boxes(tmp_path):
    path = str(save_picture(tmp_path / "a.png"))
    row = [data.Example(path, f"{n} dogs", [(1, 2, 30, 40)] * n) for n in range(3)]
    items = [data.Dataset([row], 8)[epoch, 0] for epoch in range(60)]
    seen = [(item.expression, len(item.boxes)) for item in items]
    assert min(seen.count((f"{n} dogs", n)) for n in range(3)) > 9 and len(set(seen)) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_holds_padded_boxes_and_names_what_cannot_be_read(workers, tokenizer, tmp_path):
    (tmp_path / "cut.png").write_bytes(save_picture(tmp_path / "a.png").read_bytes()[:-60])
    rows = [{**GOOD, "boxes": GOOD["boxes"] * n, "expressions": ["dog " * n]} for n in (1, 2, 3)]
    write(tmp_path / "train.jsonl", *rows, {**GOOD, "boxes": []}, {**GOOD, "image": "cut.png"})
    dataset = data.Dataset(data.read_rows(section(tmp_path), "train"), 32, jitter=(0.3, 1.4))
    keys = [[(0, 2), (0, 4), (0, 0)], [(1, 3)], [(1, 4)]]
    mixed, none, broken = data.loader(dataset, keys, data.Collate(tokenizer, 10), workers)
    assert mixed.index == [2, 0] and mixed.sizes.tolist() == [[64, 48]] * 2
    assert mixed.box_mask.tolist() == [[True] * 3, [True, False, False]]
    assert torch.equal(mixed.boxes[0], dataset[0, 2].boxes) and not mixed.boxes[1, 1:].any()
    assert torch.equal(mixed.images[1], dataset[0, 0].image)
    assert torch.equal(mixed.tokens, tokenizer(["dog " * 3, "dog"], 10)[0])
    assert none.boxes.shape == (1, 1, 4) and none.box_mask.tolist() == [[False]]
    assert broken.index == [] and broken.faults.keys() == mixed.faults.keys() == {4}
    fault, where = (
        mixed.faults[4],
        f"{tmp_path}/train.jsonl:5: cannot read the image {tmp_path}/cut",
    )
    assert isinstance(fault, data.InputError) and re.fullmatch(f"{where}.png: .+", str(fault))


def batches(steps: range, rank: int = 0, world: int = 1, micro: int = 4, seed: int = 0) -> list:
    return list(data.MicroBatchSampler(10, 4, micro, seed, steps, rank, world))  # 3 steps an epoch


def test_an_epoch_is_a_new_order_of_all_rows_and_its_last_batch_is_filled_from_its_start():
    orders = {tuple(range(10))}
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        keys = sum(batches(range(3 * epoch, 3 * epoch + 3), seed=seed), [])
        order = [index for _, index in keys]
        assert keys == [(epoch, index) for index in order]
        assert sorted(order[:10]) == list(range(10)) and order[10:] == order[:2]
        orders.add(tuple(order[:10]))
    assert len(orders) == 4


@pytest.mark.parametrize(("world", "micro"), [(1, 4), (1, 2), (2, 2), (2, 1), (4, 1)])
def test_ranks_micro_batches_and_a_resume_only_cut_up_the_same_batches(world, micro):
    parts = [batches(range(2, 6), rank, world, micro) for rank in range(world)]
    each = 4 // world // micro  # micro-batches of a rank in a step
    for step, batch in enumerate(batches(range(6))[2:]):
        assert sum((sum(part[step * each : (step + 1) * each], []) for part in parts), []) == batch


def look(folder: Path, tokenizer: data.Tokenizer, *arguments: str) -> Done:
    about = {"annotations": "{split}.jsonl", "images": ".", "tokenizer": tokenizer.path}
    about |= {"max_tokens": 10, "eval_splits": ["val"]}
    write(folder / "c.json", {"set": {"data": about, "model": {"image_size": 32}}, "mine": ["set"]})
    return call("data.py", "--config", "c.json:mine", *arguments, cwd=folder)


def test_looking_at_a_set_counts_what_is_there_and_draws_a_page(tokenizer, tmp_path):
    for name in "abc":
        save_picture(tmp_path / f"{name}.png")
    long = {**GOOD, "boxes": GOOD["boxes"] * 2, "expressions": ["left circle " * 9]}
    unknown = {**GOOD, "image": "b.png", "boxes": [], "expressions": ["the 犬", "a 犬"]}
    write(tmp_path / "train.jsonl", SIZED, long, unknown)
    write(tmp_path / "val.jsonl", {**SIZED, "image": "c.png"}, {**SIZED, "image": "b.png"})
    done = look(tmp_path, tokenizer)
    counts = [int(line.split()[0]) for line in done.out.splitlines() if line.startswith("  ")]
    assert done.status == 0 and done.err == "" and (tmp_path / "examples.png").exists()
    # rows, images, expressions; with no, one, several targets; cut, unknown, shared images
    assert counts == [3, 2, 5, 2, 2, 1, 1, 2, 1] + [2, 2, 4, 0, 4, 0, 0, 0, 1]


def test_faults_of_a_set_are_named_by_file_and_row_and_sound_rows_still_drawn(tokenizer, tmp_path):
    (tmp_path / "cut.png").write_bytes(save_picture(tmp_path / "a.png").read_bytes()[:-60])
    write(tmp_path / "train.jsonl", GOOD, *[{**GOOD, "boxes": [[1, 2, -3, 4]]}] * 30)
    write(tmp_path / "val.jsonl", GOOD, {**GOOD, "image": "cut.png"}, "nonsense")
    done = look(tmp_path, tokenizer)
    assert done.status == 2 and done.err.startswith("data.py: 31 faults")
    assert [f"train.jsonl:{n}: " in done.out for n in (1, 2, 21, 22)] == [False, True, True, False]
    assert "1 examples of train" in done.out and (tmp_path / "examples.png").exists()
    done = look(tmp_path, tokenizer, "--split", "val", "--images", "--save", "page.png")
    assert done.status == 2 and done.err.startswith("data.py: 2 faults")
    assert done.out.startswith("val\n") and "val.jsonl:2: cannot read the image" in done.out
    assert (tmp_path / "page.png").exists() and look(tmp_path, tokenizer, "--save", "x").out == ""
