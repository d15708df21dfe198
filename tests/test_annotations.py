"""Every annotation layout, from one small made-up set; `data.py convert`, `check` and `show`."""

import io
import json
import os
import pickle
import re
import resource
import subprocess
import sys
from contextlib import redirect_stdout

import numpy as np
import pytest
from PIL import Image

import data
from conftest import ROOT, command_line, environment, program

# image id, object id, split, box (xywh), expressions
OBJECTS = [
    (154, 9001, "train", [11.98, 15.59, 49.08, 24.41], ["left zebra", "the first one", "left zebra"]),
    (154, 9002, "train", [40.46, 2.98, 23.62, 30.17], ["Zebra, on the right"]),
    (309, 9003, "val", [3.58, 9.03, 29.29, 25.79], ["bear with the red ribbon", "big-one"]),
    (605, 9004, "testA", [0.0, 0.0, 64.0, 48.0], ["all of it"]),
    (605, 9005, "testA", [30.5, 20.25, 10.1, 10.2], ["cup"]),
]
NAME = "COCO_train2014_{:012d}.jpg"
SIZE = {"width": 64, "height": 48}
# gRefCOCO: image id, split, [(expression, objects)]
SEVERAL = [
    (154, "train", [("both zebras", [9001, 9002]), ("a lion", []), ("left zebra", [9001])]),
    (605, "testA", [("cup and table", [9004, 9005]), ("a fork", [])]),
]
BOX = {number: box for _, number, _, box, _ in OBJECTS}


def rows_of(folder, name: str, split: str) -> list[tuple]:
    """What is read of a JSON Lines or official file, less where it was read."""
    section = {"annotations": str(folder / name), "images": "root/" + NAME, "sources": {}}
    rows = data.read_rows(section, split)
    return [(row[0].image, tuple((each.expression, each.boxes) for each in row), row[0].size) for row in rows]


def expected(split: str, size: bool = True) -> list[tuple]:
    rows = []
    for image, _, of, box, texts in OBJECTS:
        choices = [(text, (tuple(box),)) for text in texts]
        each = [tuple(choices)] if split == "train" else [(choice,) for choice in choices]
        rows += [("root/" + NAME.format(image), c, (64, 48) if size else None) for c in each if of == split]
    return rows


def expected_grec(split: str) -> list[tuple]:
    rows = []
    for image, of, phrases in SEVERAL:
        choices = [(text, tuple(tuple(BOX[i]) for i in numbers)) for text, numbers in phrases]
        each = [tuple(choices)] if split == "train" else [(choice,) for choice in choices]
        rows += [("root/" + NAME.format(image), c, (64, 48)) for c in each if of == split]
    return rows


def lines() -> list[tuple]:
    """(split, image name, object, box, expression), one a line."""
    return [(split, NAME.format(image), n, box, t) for image, n, split, box, texts in OBJECTS for t in texts]


def corners(box: list[float]) -> list[float]:
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


def write_coco(path) -> None:
    images = [{"id": image, "file_name": NAME.format(image), **SIZE} for image in (154, 309, 605)]
    annotations = [
        {"id": n, "image_id": image, "category_id": 1, "bbox": box, "iscrowd": 0} for image, n, _, box, _ in OBJECTS
    ]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": []}))


def write_refer(folder) -> list:
    write_coco(folder / "instances.json")
    refs = [
        {
            **{"ref_id": i, "ann_id": n, "image_id": image, "split": split, "category_id": 1},
            "file_name": NAME.format(image).replace(".jpg", f"_{i}.jpg"),
            "sentences": [{"sent": text, "raw": text.upper(), "sent_id": 0, "tokens": []} for text in texts],
        }
        for i, (image, n, split, _, texts) in enumerate(OBJECTS)
    ]
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=0))
    return ["refs(unc).p"]


def write_mdetr(folder) -> list:
    for split in ("train", "val", "testA"):
        own = [line for line in lines() if line[0] == split]
        images = [
            {"id": 7 + i, "original_id": int(name[-16:-4]), "file_name": name, "caption": text, **SIZE}
            for i, (_, name, _, _, text) in enumerate(own)
        ]
        annotations = [
            {"id": i, "image_id": 7 + i, "original_id": str(n), "category_id": 1, "bbox": box}
            for i, (_, _, n, box, _) in enumerate(own)
        ]
        (folder / f"finetune_refcoco_{split}.json").write_text(
            json.dumps({"images": images, "annotations": annotations, "categories": []})
        )
    return [f"finetune_refcoco_{split}.json" for split in ("train", "val", "testA")]


def write_seqtr(folder) -> list:
    splits: dict = {"train": [], "val": [], "testA": []}
    for image, _, split, box, texts in OBJECTS:
        for each in [texts] if split == "train" else [[text] for text in texts]:
            splits[split].append({"image_id": image, "bbox": box, "expressions": each, "category_id": 1, **SIZE})
    (folder / "instances.json").write_text(json.dumps(splits))
    return ["instances.json"]


def write_flat(folder, suffix: str, make) -> list:
    """One file a split of what `make(name, n, box, text)` makes, as lines or as one list."""
    for split in ("train", "val", "testA"):
        rows = [make(*line[1:]) for line in lines() if line[0] == split]
        text = json.dumps(rows) if suffix == "json" else "\n".join(json.dumps(row) for row in rows)
        (folder / f"set_{split}.{suffix}").write_text(text)
    return [f"set_{split}.{suffix}" for split in ("train", "val", "testA")]


def write_qwen(folder) -> list:
    return write_flat(
        folder, "jsonl", lambda name, _, box, text: {"image": f"a/b/{name}", "sent": text, "bbox": corners(box), **SIZE}
    )


def write_vlm_r1(folder) -> list:
    def row(name: str, _: int, box: list, text: str) -> dict:
        return {"image": f"train2014/{name}", "normal_caption": text, "solution": corners(box), **SIZE}

    return write_flat(folder, "json", row)


def write_shikra(folder) -> list:
    return write_flat(
        folder, "jsonl", lambda name, _, box, text: {"img_path": name, "expression": text, "bbox": corners(box), **SIZE}
    )


LAYOUTS = [write_refer, write_mdetr, write_seqtr, write_qwen, write_vlm_r1, write_shikra]


@pytest.mark.parametrize("write", LAYOUTS)
def test_the_same_set_comes_out_of_every_layout_as_the_same_rows(write, tmp_path):
    sources = [str(tmp_path / name) for name in write(tmp_path)]
    data.convert(sources, str(tmp_path / "out" / "{split}.jsonl"), None)
    for split in ("train", "val", "testA"):
        assert rows_of(tmp_path, "out/{split}.jsonl", split) == expected(split)
    assert sorted(os.listdir(tmp_path / "out")) == ["testA.jsonl", "train.jsonl", "val.jsonl"]


def write_legacy_pth(path, rows: list) -> None:
    """As torch.save did before 1.6: three pickles in front."""
    path.write_bytes(b"".join(pickle.dumps(part, protocol=2) for part in (0x1950A86A20F9469CFC6C, 1001, {}, rows)))


def test_transvg_boxes_are_xywh_for_coco_and_xyxy_for_the_others(tmp_path):
    write_legacy_pth(tmp_path / "unc_val.pth", [(line[1], f"{line[2]}.pth", *line[3:], []) for line in lines()])
    write_legacy_pth(tmp_path / "referit_train.pth", [("9.jpg", "9_7.pth", [1, 2, 31, 42], t, []) for t in ("a", "b")])
    box = np.array([1, 2, 31, 42], dtype=np.float32)
    write_legacy_pth(tmp_path / "flickr_test.pth", [("5.jpg", box, "bride"), ("5.jpg", box, "her dress")])
    sources = ("unc_val.pth", "referit_train.pth", "flickr_test.pth")
    data.convert([str(tmp_path / name) for name in sources], str(tmp_path / "{split}.jsonl"), None)
    found = rows_of(tmp_path, "{split}.jsonl", "val")
    assert [row[1][0] for row in found] == [(text, (tuple(box),)) for _, _, _, box, text in lines()]
    (both,) = rows_of(tmp_path, "{split}.jsonl", "train")
    assert both == ("root/9.jpg", (("a", ((1, 2, 30, 40),)), ("b", ((1, 2, 30, 40),))), None)
    assert len(rows_of(tmp_path, "{split}.jsonl", "test")) == 2


def write_grefs(folder) -> list:
    write_coco(folder / "instances.json")
    refs = []
    for image, split, phrases in SEVERAL:
        for text, numbers in phrases:
            ids = numbers[0] if len(numbers) == 1 else numbers or [-1]
            ref = {"ref_id": len(refs), "ann_id": ids, "no_target": not numbers, "image_id": image, "split": split}
            refs.append({**ref, "sentences": [{"sent": text}]})
    (folder / "grefs(unc).json").write_text(json.dumps(refs))
    return ["grefs(unc).json"]


NOTHING = {"category_id": -1, "bbox": [0, 0, 0, 0], "empty": True, "original_id": -1}


def write_mdetr_grec(folder) -> list:
    for image, split, phrases in SEVERAL:
        images, annotations = [], []
        for i, (text, numbers) in enumerate(phrases):
            about = {"original_id": image, "file_name": NAME.format(image), "caption": text}
            images.append({"id": i, **about, **SIZE})
            targets = [{"category_id": 1, "bbox": BOX[n], "empty": False, "original_id": n} for n in numbers]
            annotations += [
                {**t, "image_id": i, "id": len(annotations) + k} for k, t in enumerate(targets or [NOTHING])
            ]
        content = {"images": images, "annotations": annotations}
        (folder / f"finetune_grefcoco_{split}.json").write_text(json.dumps(content))
    return ["finetune_grefcoco_train.json", "finetune_grefcoco_testA.json"]


def write_simvg_grec(folder) -> list:
    splits: dict = {"train": [], "testA": []}
    for image, split, phrases in SEVERAL:
        for some in [phrases] if split == "train" else [[phrase] for phrase in phrases]:
            each = [[{"category_id": 1, "bbox": BOX[n]} for n in numbers] or [NOTHING] for _, numbers in some]
            row = {"image_id": image, "expressions": [text for text, _ in some], "annotations": each, **SIZE}
            splits[split].append({**row, "bbox": [[target["bbox"] for target in targets] for targets in each]})
    (folder / "instances.json").write_text(json.dumps(splits))
    return ["instances.json"]


@pytest.mark.parametrize("write", [write_grefs, write_mdetr_grec, write_simvg_grec])
def test_a_grefcoco_training_row_is_an_image_with_boxes_for_each_expression(write, tmp_path, capsys):
    sources = [str(tmp_path / name) for name in write(tmp_path)]
    data.convert(sources, str(tmp_path / "out" / "{split}.jsonl"), "grefcoco")
    for split in ("train", "testA"):
        assert rows_of(tmp_path, "out/{split}.jsonl", split) == expected_grec(split)
    differ = "expressions -209,341, images -16,993, without a target -19,139"
    assert f"train less the published sizes: {differ}" in capsys.readouterr().out


def test_what_has_no_target_is_null_or_an_empty_list_in_the_flat_layouts(tmp_path):
    rows = [
        {"image": "a.jpg", "normal_caption": "a cat", "solution": None},
        {"file_name": "a.jpg", "expression": "a dog", "boxes_xyxy": []},
        {"file_name": "a.jpg", "expression": "two dogs", "boxes_xyxy": [[1, 2, 3, 4], [5, 6, 7, 8]]},
    ]
    (tmp_path / "set_val.json").write_text(json.dumps(rows))
    data.convert([str(tmp_path / "set_val.json")], str(tmp_path / "{split}.jsonl"), None)
    assert [len(row[1][0][1]) for row in rows_of(tmp_path, "{split}.jsonl", "val")] == [0, 0, 2]


def test_a_ref_of_refclef_may_be_in_several_splits_and_a_row_of_reclip_holds_sentences(tmp_path):
    write_refer(tmp_path)
    refs = pickle.loads((tmp_path / "refs(unc).p").read_bytes())[-1:]
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps([{**refs[0], "split": "testAB"}]))
    reclip = {"file_name": "a.jpg", "ann_id": 3, "anns": [{"id": 3, "bbox": [1, 2, 3, 4]}, {"id": 4, "bbox": 0}]}
    (tmp_path / "reclip_val.jsonl").write_text(json.dumps({**reclip, "sentences": [{"sent": "x"}, {"sent": "y"}]}))
    names = ("refs(unc).p", "reclip_val.jsonl")
    data.convert([str(tmp_path / name) for name in names], str(tmp_path / "{split}.jsonl"), None)
    assert [len(rows_of(tmp_path, "{split}.jsonl", split)) for split in ("testA", "testB", "val")] == [1, 1, 2]


# ---- what is refused


class Call:
    def __init__(self, what, *arguments):
        self.what, self.arguments = what, arguments

    def __reduce__(self):
        return self.what, self.arguments


def refused(tmp_path, name: str) -> str:
    """Convert a file that must be refused: one line that names it, and nothing is left behind."""
    before = set(tmp_path.iterdir())
    with pytest.raises(data.InputError) as error:
        data.convert([str(tmp_path / name)], str(tmp_path / "out" / "{split}.jsonl"), None)
    assert not list((tmp_path / "out").iterdir()) and before == set(tmp_path.iterdir()) - {tmp_path / "out"}
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["refs(unc).p", "unc_val.pth"])
def test_a_pickle_that_would_run_something_is_refused_before_it_does(name, tmp_path):
    write_coco(tmp_path / "instances.json")
    rows = [Call(os.system, f"touch {tmp_path}/ran")]
    if name.endswith(".p"):
        (tmp_path / name).write_bytes(pickle.dumps(rows))
    else:
        write_legacy_pth(tmp_path / name, rows)
    assert "would call posix.system" in refused(tmp_path, name) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", pickle.dumps([1, 2])[:-4], pickle.dumps(b"text")])
@pytest.mark.parametrize("name", ["refs(unc).p", "unc_val.pth"])
def test_a_damaged_pickle_is_refused(name, content, tmp_path):
    write_coco(tmp_path / "instances.json")
    (tmp_path / name).write_bytes(content)
    refused(tmp_path, name)


FLAT_ROW = {"image": "a.jpg", "sent": "the dog", "bbox": [1, 2, 30, 40], "width": 64, "height": 48}


@pytest.mark.parametrize(
    "bad",
    [
        *(b"{", b"[1]", b"{}", b'"a"', b"null", b'\xff\xfe{"a": 1}', b'{"image": "a\xff.jpg"}', b"[" * 100_000),
        {**FLAT_ROW, "bbox": [1, 2, 30]},
        {**FLAT_ROW, "bbox": "1 2 3 4"},
        {**FLAT_ROW, "bbox": [30, 40, 1, 2]},
        {**FLAT_ROW, "bbox": [1, 2, 1, 2]},
        {**FLAT_ROW, "bbox": [1, 2, float("nan"), 40]},
        {**FLAT_ROW, "bbox": [1, 2, 10**400, 40]},
        {**FLAT_ROW, "bbox": [100, 2, 130, 40]},
        {**FLAT_ROW, "bbox": [True, 2, "3", 4]},
        {**FLAT_ROW, "sent": ""},
        {**FLAT_ROW, "sent": None},
        {**FLAT_ROW, "sent": ["the dog"]},
        {**FLAT_ROW, "sent": "half \ud800"},
        {**FLAT_ROW, "image": None},
        {**FLAT_ROW, "width": "64"},
        {**FLAT_ROW, "width": -64},
        {"image": "a.jpg", "expressions": ["already ours"], "boxes": []},
    ],
)
def test_a_malformed_foreign_row_is_refused_with_file_and_line(bad, tmp_path):
    text = bad if isinstance(bad, bytes) else json.dumps(bad).encode()
    (tmp_path / "set_val.jsonl").write_bytes(json.dumps(FLAT_ROW).encode() + b"\r\n\r\n" + text + b"\n")
    assert f"{tmp_path}/set_val.jsonl:3: " in refused(tmp_path, "set_val.jsonl")


def change_coco(folder, change) -> None:
    coco = json.loads((folder / "instances.json").read_text())
    change(coco)
    (folder / "instances.json").write_text(json.dumps(coco))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda coco: coco["images"].append(coco["images"][0]), "ids of images repeat"),
        (lambda coco: coco["annotations"].append(coco["annotations"][0]), "ids of annotations repeat"),
        (lambda coco: coco["annotations"][0].update(image_id=1), "of an image 1 that it does not list"),
        (lambda coco: coco.pop("images"), "instances.json: is not of the expected layout: KeyError"),
        (lambda coco: coco.update(annotations=3), "instances.json: is not of the expected layout: TypeError"),
        (lambda coco: coco["annotations"][0].pop("bbox"), "row 0: .*KeyError..bbox"),
        (lambda coco: coco["annotations"].pop(0), "row 0: .*KeyError.9001"),
        (lambda coco: coco["annotations"][0].update(bbox=[1, 2, -3, 4]), "row 0: box"),
        (lambda coco: coco["images"][0].update(file_name=None), "row 0: the image must be a file name or a number"),
        (lambda coco: coco["images"][0].pop("width"), "row 0: width and height must be positive integers"),
    ],
)
def test_a_faulty_coco_file_beside_the_refs_is_refused(change, expected, tmp_path):
    write_refer(tmp_path)
    change_coco(tmp_path, change)
    message = refused(tmp_path, "refs(unc).p")
    assert re.search(expected, message), message


@pytest.mark.parametrize(
    ("ref", "expected"),
    [
        ({"ref_id": 0}, "row 1: ref_id 0 repeats"),
        ({"split": "../x"}, "row 1: expected a split, as in refcoco_testA.p or in the row, not '../x'"),
        ({"sentences": 3}, "row 1"),
    ],
)
def test_a_faulty_ref_is_refused(ref, expected, tmp_path):
    write_refer(tmp_path)
    refs = pickle.loads((tmp_path / "refs(unc).p").read_bytes())
    refs[1] |= ref
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(refs))
    assert expected in refused(tmp_path, "refs(unc).p")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("gone_val.jsonl", None, "cannot be read: No such file"),
        ("set_val.jsonl", "", "no expression in there"),
        ("set_val.json", "", "is not JSON"),
        ("set_val.json", "[]", "no rows of a known layout"),
        ("set_val.json", "3", "no rows of a known layout"),
        ("set.jsonl", json.dumps(FLAT_ROW), "expected a split, as in refcoco_testA.jsonl or in the row, not None"),
        ("instances.json", '{"train": [{"image_id": 3}]}', "train[0]"),
        ("instances.json", '{"train": [3]}', "train[0]"),
        ("finetune_x_val.json", '{"images": [{"id": 1}], "annotations": []}', "image 1: has no annotation"),
        ("refs(unc).p", pickle.dumps([{"ref_id": 1}]), "instances.json: cannot be read"),
    ],
)
def test_a_file_of_no_known_layout_is_refused(name, content, expected, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert expected in refused(tmp_path, name)


def test_a_file_that_is_there_is_not_written_over_and_the_pattern_needs_a_split(tmp_path):
    (tmp_path / "set_val.jsonl").write_text(json.dumps(FLAT_ROW))
    needed = "expected {split} in the name"
    there = "set_{split}.jsonl", "set_val.jsonl: is there already"
    for to, expected in (there, ("x.jsonl", needed), ("{split}/{split}.jsonl", needed)):
        with pytest.raises(data.InputError, match=expected):
            data.convert([str(tmp_path / "set_val.jsonl")], str(tmp_path / to), None)
    assert json.loads((tmp_path / "set_val.jsonl").read_text()) == FLAT_ROW


def test_a_line_of_ten_megabytes_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    row = {"image": "a.jpg", "expressions": ["the dog " * 1_300_000], "boxes": [[1, 2, 3, 4]]}
    short = json.dumps({**row, "expressions": ["the dog"]})
    (tmp_path / "val.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join([short, "", json.dumps(row), short]).encode())
    assert len(rows_of(tmp_path, "{split}.jsonl", "val")) == 3


def test_pictures_of_one_name_in_two_folders_stay_two(tmp_path):
    rows = [{**FLAT_ROW, "image": f"photos/{room}/0001.jpg", "sent": room} for room in ("kitchen", "street")]
    (tmp_path / "set_train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data.convert([str(tmp_path / "set_train.jsonl")], str(tmp_path / "{split}.jsonl"), None)
    found = rows_of(tmp_path, "{split}.jsonl", "train")
    assert [row[0] for row in found] == ["root/kitchen/0001.jpg", "root/street/0001.jpg"]


@pytest.mark.parametrize("name", ["", "a\nb.jpg", "\ud800.jpg", True])
def test_a_name_that_training_refuses_is_not_written(name, tmp_path):
    (tmp_path / "set_val.jsonl").write_text(json.dumps({**FLAT_ROW, "image": name}))
    assert "the image must be a file name" in refused(tmp_path, "set_val.jsonl")


def test_the_help_does_not_claim_to_convert_this_projects_own_rows_which_convert_refuses(tmp_path):
    (tmp_path / "set_val.jsonl").write_text(json.dumps({"image": "a.jpg", "expressions": ["ours"], "boxes": []}))
    assert "which is no known layout" in refused(tmp_path, "set_val.jsonl") and "this project" not in data.CONVERT


@pytest.mark.parametrize("box", [[10**400, 2, 30, 40], [1.5, 2, 10**400, 40], [1, 2, 10**400, 10**400 + 5]])
def test_numbers_of_400_digits_are_refused_in_one_line(box, tmp_path):
    (tmp_path / "set_val.jsonl").write_text(json.dumps({**FLAT_ROW, "bbox": box}))
    write_legacy_pth(tmp_path / "unc_val.pth", [("5.jpg", box, "bride")])
    for name, where in (("set_val.jsonl", ":1: "), ("unc_val.pth", ": row 0: ")):
        with pytest.raises(data.InputError) as error:
            data.convert([str(tmp_path / name)], str(tmp_path / "out" / "{split}.jsonl"), None)
        assert f"{name}{where}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        *((made, "is not of the expected layout: KeyError") for made in (("O8", "|"), ("V8", "|"), ("S4", "|"))),
        (("c16", "<"), "is not of the expected layout: KeyError"),
        (("i8", ">"), "row 0: a box must be [x, y, w, h] in pixels"),  # the bytes of the numbers in the wrong order
    ],
)
def test_a_pickled_array_of_anything_but_plain_numbers_is_refused_and_crashes_nothing(made, expected, tmp_path):
    """The pickle of a whole array, whose dtype is then changed to one of `made`, as a forged file would."""
    array = pickle.dumps([("5.jpg", np.array([1, 2, 31, 42]), "bride")], protocol=2)
    kind, order = made
    forged = array.replace(b"X\x02\x00\x00\x00i8", b"X%c\x00\x00\x00%s" % (len(kind), kind.encode()))
    forged = forged.replace(b"X\x01\x00\x00\x00<", b"X\x01\x00\x00\x00" + order.encode())
    front = b"".join(pickle.dumps(part, protocol=2) for part in (0x1950A86A20F9469CFC6C, 1001, {}))
    (tmp_path / "flickr_val.pth").write_bytes(front + forged)
    line = "import sys, data; data.convert([sys.argv[1]], sys.argv[2], None)"
    done = subprocess.run(
        [sys.executable, "-c", line, str(tmp_path / "flickr_val.pth"), str(tmp_path / "out" / "{split}.jsonl")],
        **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": 60},
    )
    assert done.returncode == 1 and f"flickr_val.pth: {expected}" in done.stderr.splitlines()[-1]


def test_a_pickled_array_in_the_other_byte_order_is_read_as_the_same_numbers(tmp_path):
    write_legacy_pth(tmp_path / "flickr_test.pth", [("5.jpg", np.array([1, 2, 31, 42], dtype=">f4"), "bride")])
    data.convert([str(tmp_path / "flickr_test.pth")], str(tmp_path / "{split}.jsonl"), None)
    assert json.loads((tmp_path / "test.jsonl").read_text())["boxes"] == [[1, 2, 30, 40]]


def test_a_pickle_that_says_it_needs_64_gigabytes_is_refused_without_them(tmp_path):
    write_coco(tmp_path / "instances.json")
    (tmp_path / "refs(unc).p").write_bytes(b"\x80\x02]r\xff\xff\xff\x7f.")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "no rows of a known layout" in refused(tmp_path, "refs(unc).p")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6  # kilobytes


# ---- check and show


@pytest.fixture
def own_set(shapes, tmp_path):
    """Ten good rows of a user's own, on pictures of the embedded set -> (rows, the options that name it)."""
    lines = (shapes / "data" / "shapes" / "val.jsonl").read_text().splitlines()[:10]
    rows = [json.loads(line) for line in lines]
    (tmp_path / "val.jsonl").write_text("\n".join(lines))
    options = [
        *("--config", str(ROOT / "configs.json:shapes"), "--set", f"data.annotations={tmp_path}/{{split}}.jsonl"),
        *(f"data.images={shapes}/data/shapes/images", f"data.tokenizer={shapes}/data/shapes/shapes.spm"),
    ]
    return rows, options


def test_check_counts_what_is_there(own_set, tmp_path):
    rows, options = own_set
    rows[1] = {**rows[1], "boxes": []}
    rows[2] = {**rows[2], "boxes": rows[2]["boxes"] * 2, "expressions": ["red " * 40]}
    rows[3] = {**rows[3], "boxes": [[-4, 10, 30, 30]]}
    rows.append(rows[0])
    (tmp_path / "val.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = program("data.py", "check", *options, "--split", "val", "--images", cwd=tmp_path)
    counts = {line.rsplit(maxsplit=1)[0]: int(line.rsplit(maxsplit=1)[1]) for line in done.stdout.splitlines()[1:]}
    names = ("rows", "expressions", "- without a target", "- with one", "- with several")
    assert [counts[name] for name in names] == [11, 11, 1, 9, 1]
    names = ("- repeated for the same boxes", "- too long, so cut", "- with a box over the image's edge", "faults")
    assert [counts[name] for name in names] == [1, 1, 1, 0]


def test_check_names_the_faulty_rows_and_ends_with_status_2(own_set, tmp_path):
    rows, options = own_set
    rows[1] |= {"boxes": [[1, 2, -3, 4]]}
    rows[3] |= {"image": "gone.jpg"}
    rows[5] |= {"width": 95}
    (tmp_path / "val.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\nnonsense\n")
    done = program("data.py", "check", *options, "--split", "val", "--images", cwd=tmp_path, status=2)
    assert done.stderr == "data.py: 4 faults\n"
    for number, fault in ((2, "has no area"), (4, "there is no image"), (6, "the row says 95"), (11, "is not JSON")):
        assert any(f"val.jsonl:{number}: " in line and fault in line for line in done.stdout.splitlines())


def test_show_draws_every_example_before_and_after(own_set, tmp_path):
    _, options = own_set
    program("data.py", "show", *options, "--split", "val", "-n", "10", "--save", "page.png", cwd=tmp_path)
    with Image.open(tmp_path / "page.png") as page:
        assert page.size == (6 * 284, 4 * 316)


def test_show_draws_a_phrase_as_the_model_gets_it_and_says_where_it_was_cut(own_set, tmp_path, monkeypatch):
    rows, options = own_set
    long = "the red circle left of the " + "green ring " * 20
    (tmp_path / "val.jsonl").write_text(json.dumps({**rows[0], "expressions": [long]}))
    drawn = []
    monkeypatch.setattr(data, "draw", lambda image, boxes, caption: drawn.append(caption) or Image.new("RGB", (9, 9)))
    monkeypatch.setattr("sys.argv", ["data.py", "show", *options, "--split", "val", "--save", str(tmp_path / "a.png")])
    with redirect_stdout(io.StringIO()) as said:
        data.main()
    whole, seen = drawn
    assert whole == long and seen.endswith(" [cut]") and seen[3:-6] in long and len(seen) <= 280 // 6
    assert f"val.jsonl:1: {long!r} is cut after 'the red circle left of the green" in said.getvalue()


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (["-n", "0"], "-n 0: expected 1 to 600"),
        (["-n", "-3"], "-n -3: expected 1 to 600"),
        (["--save", "page.xyz"], "--save page.xyz: expected a file that ends in .png or .jpg"),
        (["--save", "page"], "--save page: expected"),
        (["--save", "folder.png"], "--save folder.png: expected"),
        (["--save", "nowhere/page.png"], "in a folder that is there"),
    ],
)
def test_show_refuses_what_it_cannot_write_before_any_work(wrong, expected, tmp_path, monkeypatch):
    (tmp_path / "folder.png").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["data.py", "show", "--config", f"{ROOT}/configs.json:shapes", *wrong])
    monkeypatch.setattr(data, "make_embedded_set", lambda _: pytest.fail("drew the set first"))
    with pytest.raises(data.InputError, match=expected):
        data.main()


def test_what_a_terminal_cannot_show_is_written_with_backslashes(own_set, tmp_path):
    rows, options = own_set
    (tmp_path / "val.jsonl").write_text(json.dumps({**rows[0], "image": "caf\u00e9.jpg"}))
    line = command_line("data.py", "check", *options, "--split", "val")
    env = {**environment(), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "data.py: 1 faults\n" and "caf\\xe9.jpg" in done.stdout


def test_where_the_output_cannot_be_written_that_is_one_line(own_set, tmp_path):
    _, options = own_set
    line = command_line("data.py", "check", *options, "--split", "val")
    with open("/dev/full", "w") as full:
        done = subprocess.run(line, cwd=tmp_path, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr == "data.py: a file: No space left on device\n"
