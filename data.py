"""Everything that is read from the user's disk, and the way of an example from there into a batch:

    a row of a file: {"image": "a.jpg", "expressions": ["left dog"], "boxes": [[x, y, w, h]]}
    -> read_rows     a Row: one Example for each expression, every value checked
    -> Dataset       an Item: one Example of the row, drawn anew in each epoch; its image is
                     jittered and stretched to (3, S, S), its boxes become cxcywh in 0..1
    -> Collate       a Batch of padded tensors; Tokenizer turns the expressions into ids

MicroBatchSampler says which examples make up the micro-batches of a rank. Every random choice is a
function of (seed, epoch, index), so that ranks, loader processes and restarts do not change it.

    python data.py --config configs.json:refcoco     counts, up to 20 faults, a page of examples
"""

import argparse
import hashlib
import io
import json
import math
import os
import pickle
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from difflib import get_close_matches
from glob import glob
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, Self, get_args, get_origin, get_type_hints

import sentencepiece
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageDraw, ImageOps
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.ops import box_area, box_convert, clip_boxes_to_image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import save_image
from tqdm import tqdm


@dataclass(frozen=True)
class DataConfig:
    # a file of rows or several, told apart by their names, see `read_rows`
    annotations: str | tuple[str, ...] = "data/annotations/refcoco-unc/instances.json"
    # the folder of the images, or a pattern for rows that hold numbers of images
    images: str = "data/images/mscoco/train2014/COCO_train2014_{:012d}.jpg"
    # the same for rows that name a source, {"vg": "vg/{}.jpg"}; null: these rows are left out
    sources: dict[str, str | None] = field(default_factory=dict)
    tokenizer: str = "pretrain_weights/beit3.spm"  # a sentencepiece model; this is BEiT-3's
    max_tokens: int = 20  # of an expression, with <s> and </s>; the rest is cut
    jitter: tuple[float, float] | None = (0.3, 1.4)  # smallest and largest scale in training
    eval_splits: tuple[str, ...] = ("val", "testA", "testB")  # the first one also chooses best.pt
    workers: int = 4  # loader processes of each rank


Box = tuple[float, float, float, float]  # x, y, w, h in pixels of the original image


class Example(NamedTuple):
    """One expression and the boxes that it means in one image."""

    image: str  # path of the file
    expression: str
    boxes: list[Box] | None = None  # empty: the expression has no target; None: not stated
    size: tuple[int, int] | None = None  # (width, height) if the row states them
    kind: str = ""  # a label that accuracy is reported by
    name: str | int = ""  # the image as the row writes it
    where: str = ""  # file and row, for messages


# the expressions of one object of one image; a training epoch draws one of them
Row = list[Example]
Key = tuple[int, int]  # (epoch, number of a row)
Faults = list["InputError"] | None  # a list that gets the faults; None: the first one is raised


class Item(NamedTuple):
    """An example as the model gets it."""

    image: Tensor  # (3, S, S) uint8
    expression: str
    boxes: Tensor  # (n, 4) cxcywh in 0..1
    size: tuple[int, int]  # (width, height) of the original image
    index: int  # the number of its row in the dataset


class Batch(NamedTuple):
    images: Tensor  # (B, 3, S, S) uint8
    tokens: Tensor  # (B, L) int64
    text_pad: Tensor  # (B, L) bool, True = padding
    boxes: Tensor  # (B, M, 4) cxcywh in 0..1
    box_mask: Tensor  # (B, M) bool, True = a real box
    sizes: Tensor  # (B, 2) width and height of the original images
    index: list[int]  # the numbers of the examples' rows in their dataset
    faults: dict[int, "InputError"] = {}  # number of a row -> why its image cannot be read

    def to(self, device: torch.device) -> Self:
        """The same batch with its first five fields, for model and loss, on the device."""
        tensors = [tensor.to(device, non_blocking=True) for tensor in self[:5]]
        return Batch(*tensors, *self[5:])


# ------------------------------------------------------------------------- from rows to batches


@dataclass
class Dataset:
    """Rows as items. A key (epoch, index) asks for an example of row `index` in that epoch.

    The key holds the epoch, because loader processes live through all epochs and could not be told
    of a new one; together with the seed it fixes all random choices (D12).
    """

    rows: Sequence[Row]
    image_size: int
    seed: int = 0
    jitter: tuple[float, float] | None = None

    def __getitem__(self, key: Key) -> Item | tuple[int, "InputError"]:
        """The item; or, where its image cannot be read, its index and what is wrong."""
        epoch, index = key
        rng = random.Random(f"{self.seed}/{epoch}/{index}")
        row = self.rows[index]
        example = row[rng.randrange(len(row))]  # an epoch trains on one expression of the row
        try:
            image = read_image(example.image, example.size, example.where)  # (3, H, W)
        except InputError as error:
            return index, error
        height, width = image.shape[1:]
        size = (width, height)
        boxes = clip_boxes(example.boxes or [], width, height)  # (n, 4) xyxy pixels
        if self.jitter:
            image, boxes = large_scale_jitter(image, boxes, self.jitter, self.image_size, rng)
            height, width = image.shape[1:]
        # BEiT-3 has one learnt position for each patch of a square. Stretching uses all of them and
        # needs no padding, and boxes relative to width and height are not changed by it.
        boxes = box_convert(boxes, "xyxy", "cxcywh")
        boxes = boxes / torch.tensor([width, height, width, height])  # (n, 4)
        image = resize(image, self.image_size, self.image_size)  # (3, S, S)
        return Item(image, example.expression, boxes.float(), size, index)


# XLM-RoBERTa's special tokens; its <pad> is 1, so that the numbers of sentencepiece move up
BOS, PAD, EOS, UNKNOWN = 0, 1, 2, 3


class Tokenizer:
    """XLM-RoBERTa's ids on a sentencepiece model: piece i > 0 has the id i + 1, unknown ones 3."""

    def __init__(self, path: str | Path):
        self.path = str(path)
        with located(f"{path}: there is no sentencepiece model (data.tokenizer)"):
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        pieces = self.model.id_to_piece(list(range(self.model.vocab_size())))
        self.vocab_size = len(pieces) + 1  # one id past the last piece
        # of the pieces, because the bytes of the file differ between versions of sentencepiece
        self.digest = hashlib.sha256("\n".join(pieces).encode()).hexdigest()

    def __call__(self, texts: Sequence[str], max_tokens: int = 20) -> tuple[Tensor, Tensor]:
        """Texts -> tokens (B, L) int64, text_pad (B, L) bool, True = padding; L = max_tokens.

        Texts are cleaned first, and cut where they are too long.
        """
        tokens = torch.full((len(texts), max_tokens), PAD)
        for line, text in zip(tokens, texts, strict=True):
            pieces = self.pieces(text)[: max_tokens - 2]
            ids = [piece + 1 if piece else UNKNOWN for piece in pieces]
            line[: len(ids) + 2] = torch.tensor([BOS, *ids, EOS])
        return tokens, tokens == PAD

    def pieces(self, text: str) -> list[int]:
        """The numbers of a text's pieces after cleaning; 0 is one that the model does not know."""
        return self.model.encode(clean(text))

    def unknown_words(self, text: str) -> list[str]:
        return [word for word in clean(text).split() if 0 in self.model.encode(word)]

    def is_cut(self, text: str, max_tokens: int) -> bool:
        return len(self.pieces(text)) > max_tokens - 2


def clean(text: str) -> str:
    """The official cleaning: lower case, punctuation is dropped, - and / become spaces."""
    return re.sub(r"[.,'!?\"()*#:;]", "", text.lower()).replace("-", " ").replace("/", " ")


@dataclass
class Collate:
    """What a Dataset gives for several keys -> Batch."""

    tokenizer: Tokenizer
    max_tokens: int

    def __call__(self, found: Sequence[Item | tuple[int, "InputError"]]) -> Batch:
        items = [each for each in found if isinstance(each, Item)]
        faults = dict(each for each in found if not isinstance(each, Item))
        if not items:
            return Batch(*[torch.empty(0)] * 6, index=[], faults=faults)
        tokens, text_pad = self.tokenizer([item.expression for item in items], self.max_tokens)
        most = max(len(item.boxes) for item in items)
        boxes = torch.zeros(len(items), max(most, 1), 4)  # (B, M, 4)
        box_mask = torch.zeros(boxes.shape[:2], dtype=torch.bool)  # (B, M)
        for i, item in enumerate(items):
            boxes[i, : len(item.boxes)] = item.boxes
            box_mask[i, : len(item.boxes)] = True
        images = torch.stack([item.image for item in items])  # (B, 3, S, S)
        sizes = torch.tensor([item.size for item in items])  # (B, 2)
        index = [item.index for item in items]
        return Batch(images, tokens, text_pad, boxes, box_mask, sizes, index, faults)


@dataclass
class MicroBatchSampler:
    """The keys of one rank's micro-batches in the given optimiser steps.

    Each epoch walks through a permutation of all rows; its last batch is filled up from the
    permutation's start. Rank r of `world` gets the r-th of equal parts of every batch.
    """

    rows: int
    batch: int
    micro: int
    seed: int
    steps: range
    rank: int
    world: int

    def __iter__(self) -> Iterator[list[Key]]:
        per_epoch = math.ceil(self.rows / self.batch)
        part = self.batch // self.world  # of the batch, for one rank
        for step in self.steps:
            epoch, place = divmod(step, per_epoch)
            if place == 0 or step == self.steps.start:
                # the hash of integers is the same in every process, unlike that of strings
                generator = torch.Generator().manual_seed(hash((self.seed, epoch)))
                order = torch.randperm(self.rows, generator=generator).tolist()
            start = place * self.batch + self.rank * part
            for i in range(start, start + part, self.micro):
                yield [(epoch, order[j % self.rows]) for j in range(i, i + self.micro)]


def loader(
    dataset: Dataset, keys: Iterable[list[Key]], collate: Collate, workers: int, pin: bool = False
) -> DataLoader:
    """A Batch for each list of keys, in order."""
    return DataLoader(
        dataset,
        batch_sampler=keys,
        collate_fn=collate,
        num_workers=min(workers, os.cpu_count()),  # more would only wait for each other
        pin_memory=pin,
        worker_init_fn=ignore_signals,
    )


def ignore_signals(worker: int) -> None:
    """For loader processes: Ctrl-C and torchrun signal them as well, but the program ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


# --------------------------------------------------------------------------- images and jitter


def read_image(
    path: str | Path, size: tuple[int, int] | None = None, where: str = "read_image"
) -> Tensor:
    """An image file -> (3, H, W) uint8 RGB. InputError, which names `where`, if it cannot be read.

    Cameras store some pictures lying on their side, with a note (EXIF) to turn them. They are
    turned, unless the row's `size` is that of the picture as it is stored: then its boxes were
    drawn on that one (D13). Where the size tells nothing (180 degrees, a square), it is turned.
    """
    with located(f"{where}: cannot read the image {path}"):
        with Image.open(path) as image:
            upright = check_size(image, size)
            if size in (None, upright):
                ImageOps.exif_transpose(image, in_place=True)
            return pil_to_tensor(image.convert("RGB"))  # (3, H, W)


def check_size(image: Image.Image, size: tuple[int, int] | None) -> tuple[int, int]:
    """(width, height) of an image when turned as EXIF says. InputError if it misfits the row's."""
    if image.mode[0] in "IF":  # to RGB, Pillow would clip their values at 255
        raise InputError("it has more than 8 bits a channel")
    upright = image.size
    # 5 to 8: to be turned by 90 degrees. (The getexif of a PNG itself would decode the picture.)
    if Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1) >= 5:
        upright = (image.height, image.width)
    if size not in (None, upright, image.size):
        raise InputError(f"it has {upright} pixels, the row says {size}")
    return upright


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """(3, H, W) uint8 -> (3, height, width), bilinear as OpenCV, up to 1 grey level (D14)."""
    size = (height, width)
    return F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]


def clip_boxes(boxes: Sequence[Box], width: int, height: int) -> Tensor:
    """xywh pixels -> (n, 4) xyxy float64, clipped to the last pixel as the official loader does."""
    xywh = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    return clip_boxes_to_image(box_convert(xywh, "xywh", "xyxy"), (height - 1, width - 1))


def large_scale_jitter(
    image: Tensor, boxes: Tensor, limits: tuple[float, float], long_side: int, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """image (3, H, W), boxes (n, 4) xyxy pixels -> both after the jitter, of another size.

    The scale s is uniform in `limits`. s <= 1 shrinks the image to s * long_side, which blurs it,
    since it is enlarged again afterwards. s > 1 cuts out a window of 1/s of each side that keeps at
    least half of every box; without a box any window will do (D5).
    """
    scale = rng.uniform(*limits)
    height, width = image.shape[1:]
    if scale <= 1:
        factor = scale * long_side / max(height, width)
        new_height = max(1, int(height * factor + 0.5))
        new_width = max(1, int(width * factor + 0.5))
        ratios = boxes.new_tensor([new_width / width, new_height / height] * 2)
        return resize(image, new_height, new_width), boxes * ratios
    crop_height = max(1, round(height / scale))
    crop_width = max(1, round(width / scale))
    area = box_area(boxes)  # (n,)
    for threshold in (0.9, 0.8, 0.7, 0.6, 0.5):  # at first the window must keep nearly everything
        for _ in range(20):
            x = rng.randint(0, width - crop_width)
            y = rng.randint(0, height - crop_height)
            moved = boxes - torch.tensor([x, y, x, y])
            kept = clip_boxes_to_image(moved, (crop_height, crop_width))  # (n, 4)
            if (box_area(kept) >= threshold * area).all():
                return image[:, y : y + crop_height, x : x + crop_width], kept
    return image, boxes  # no window was found


# ---------------------------------------------------------------------------------- annotations


def without_evaluated(config: DataConfig, rows: list[Row]) -> list[Row]:
    """The rows to train on: of several joined files, none whose image any of them evaluates (D15).

    RefCOCO, RefCOCO+ and RefCOCOg share their photos, but split them differently.
    """
    if isinstance(config.annotations, str) or len(config.annotations) == 1:
        return rows
    evaluated = {example.image for example in all_examples(read_rows(config, None))}
    kept = [row for row in rows if row[0].image not in evaluated]
    left_out = len(rows) - len(kept)
    say(f"{left_out:,} of {len(rows):,} training rows are left out: their images are evaluated")
    return kept


def read_rows(config: DataConfig, split: str | None, faults: Faults = None) -> list[Row]:
    """The rows of a split (None: all but train; of .jsonl, eval_splits) of `config.annotations`:

    FOLDER/{split}.jsonl                   our own JSON Lines, see README.md
    FOLDER/instances.json                  SeqTR's and SimVG's, with all splits
    FOLDER/refs(unc).p, grefs(unc).json    refer's and gRefCOCO's, beside COCO's instances.json

    Of several files, one that lacks the split counts as empty if another has it.
    """
    names = config.annotations
    if isinstance(names, str):
        names = (names,)
    rows = []
    for name in names:
        if name.endswith(".jsonl"):
            if "{split}" not in name:
                raise InputError(f"data.annotations={name}: expected {{split}} in the name")
            wanted = (split,) if split else config.eval_splits
            paths = [Path(name.replace("{split}", each)) for each in wanted]
        else:
            paths = [Path(name)]
        for path in paths:
            if not path.is_file():
                if len(names) > 1 and glob(name.replace("{split}", "*")):
                    continue  # it has other splits
                raise InputError(f"{path}: there is no such file (data.annotations)")
            if path.suffix == ".jsonl":
                rows += own_rows(config, path, faults)
            elif path.name.startswith(("refs(", "grefs(")):
                rows += refer_rows(config, path, split, faults)
            else:
                rows += official_rows(config, path, split, faults)
    kept = [row for row in rows if row]
    if len(kept) < len(rows):
        left_out = len(rows) - len(kept)
        about = split or "evaluation"
        say(f"{about}: {left_out:,} rows are left out: no sentence, or a source that is null")
    if split and not kept and not faults:
        raise InputError(f"{', '.join(names)}: there is no row of split {split!r}")
    return kept


def is_wanted(name: str, split: str | None) -> bool:
    return name == split or not split and name != "train"


def own_rows(
    config: DataConfig, path: Path, faults: Faults = None, need_boxes: bool = True
) -> list[Row]:
    """{"image": "a.jpg", "expressions": ["left zebra"], "boxes": [[x, y, w, h]]}, one a line."""
    rows = []
    with located(path), open(path, encoding="utf-8-sig") as file:
        lines = file.readlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        with located(where, faults):
            row = json.loads(line)
            boxes = row.get("boxes")
            is_list = isinstance(boxes, list)
            if not {"image", "expressions"} <= row.keys() or need_boxes and not is_list:
                raise InputError('expected "image", "expressions" and a list "boxes"')
            rows.append(make_row(config, where, row, [boxes] * len(row["expressions"])))
    return rows


def official_rows(config: DataConfig, path: Path, split: str | None, faults: Faults) -> list[Row]:
    """{"train": [{"image_id": 9, "bbox": [x, y, w, h], "expressions": [...], ...}], "val": ...}."""
    rows = []
    found = []
    with located(path):
        for name, some in json.loads(path.read_bytes()).items():
            if is_wanted(name, split):
                found += [(f"{path}: {name}[{number}]", row) for number, row in enumerate(some)]
    for where, row in found:
        with located(where, faults):
            if "annotations" in row:  # gREC: boxes of each expression; category -1 is "no target"
                boxes_of_each = []
                for boxes, targets in zip(row["bbox"], row["annotations"], strict=True):
                    pairs = zip(boxes, targets, strict=True)
                    boxes_of_each.append([b for b, t in pairs if t["category_id"] != -1])
            else:  # REC: one box for all expressions
                boxes_of_each = [[row["bbox"]]] * len(row["expressions"])
            row["image"] = row["image_id"]
            row["source"] = row.get("data_source")
            rows.append(make_row(config, where, row, boxes_of_each))
    return rows


def refer_rows(config: DataConfig, path: Path, split: str | None, faults: Faults) -> list[Row]:
    """[{"ref_id": 1, "ann_id": 2, "image_id": 3, "sentences": [{"sent": "left zebra"}], ...}]."""
    coco_path = path.with_name("instances.json")
    with located(coco_path), redirect_stdout(io.StringIO()):  # COCO prints its timings
        coco = COCO(coco_path)
    with located(path), open(path, "rb") as file:
        if path.suffix == ".json":
            refs = json.load(file)
        else:  # refer's pickles were written by Python 2
            refs = PlainUnpickler(file, encoding="latin1").load()
    rows = {}
    for number, ref in enumerate(refs):
        where = f"{path}: row {number}"
        with located(where, faults):
            if not is_wanted(ref["split"], split):
                continue
            targets = ref["ann_id"]  # a list in gRefCOCO
            if not isinstance(targets, list):
                targets = [targets]
            boxes = [coco.anns[target]["bbox"] for target in targets if target != -1]
            row = dict(coco.imgs[ref["image_id"]])  # with "width" and "height"
            row["image"] = row["file_name"]
            row["expressions"] = [sentence["sent"] for sentence in ref["sentences"]]
            # A training row is an object; in gRefCOCO, whose expressions have any number of
            # targets, it is an image.
            key = ("ref", number)
            if split == "train" and "no_target" in ref:
                key = ("image", ref["image_id"])
            examples = rows.setdefault(key, [])
            if row["expressions"]:  # some references of gRefCOCO have none
                examples += make_row(config, where, row, [boxes] * len(row["expressions"]))
    return list(rows.values())


class PlainUnpickler(pickle.Unpickler):
    """Reads lists, dictionaries, numbers and strings. A pickle that calls code is refused."""

    def find_class(self, module: str, name: str) -> object:
        raise InputError(f"it would call {module}.{name}")


def make_row(
    config: DataConfig, where: str, row: dict, boxes_of_each: Sequence[list[Box] | None]
) -> Row:
    """The Examples of a row, every value checked; [] for a row that `read_rows` leaves out."""
    image = row["image"]
    source = row.get("source")
    if source is not None and source not in config.sources:
        raise InputError(f"its source {source!r} has no folder in data.sources")
    images = config.images if source is None else config.sources[source]
    if images is None:
        return []
    if isinstance(image, int):
        path = images.format(image)
    else:
        # a file name goes into the folder of the pattern
        folder = os.path.dirname(images) if "{" in images else images
        path = os.path.join(folder, image)
    size = None
    if row.get("width") and row.get("height"):
        size = (int(row["width"]), int(row["height"]))
    if not isinstance(row["expressions"], list) or not row["expressions"]:
        raise InputError('"expressions" must be a list of one or more texts')
    examples = []
    for expression, boxes in zip(row["expressions"], boxes_of_each, strict=True):
        check_expression(expression)
        if boxes is not None:
            boxes = [check_box(box, size) for box in boxes]
        kind = str(row.get("kind") or "")
        examples.append(Example(path, expression, boxes, size, kind, image, where))
    return examples


def check_expression(text: object) -> None:
    if not isinstance(text, str) or not any(map(str.isalnum, text)):
        raise InputError(f"an expression must be a text with at least one word, not {text!r:.60}")


def check_box(box: Box, size: tuple[int, int] | None) -> Box:
    """InputError unless a box is [x, y, w, h] in pixels, at least half of it in the image.

    What reaches out of the image is clipped later; some published sets have such boxes.
    """
    with located(f"box {box!r:.80}, expected [x, y, w, h] in pixels"):
        x, y, w, h = box
        width, height = size or (math.inf, math.inf)
        inside_width = min(x + w, width) - max(x, 0)
        inside_height = min(y + h, height) - max(y, 0)
        if not (w > 0 and h > 0 and max(box) >= 1):
            raise InputError("it has no area, or its numbers are fractions of the image")
        is_inside = inside_width > 0 and inside_height > 0  # also false for a NaN
        if not is_inside or inside_width * inside_height < w * h / 2:
            raise InputError("more than half of it lies outside of the image")
        if x >= width - 1 or y >= height - 1:
            raise InputError("nothing of it is left when it is clipped to the last pixel")
    return (x, y, w, h)


def all_examples(rows: Sequence[Row]) -> list[Example]:
    """Every expression, in order: what evaluation walks through."""
    return [example for row in rows for example in row]


def check_images(examples: Sequence[Example], decode: bool = False, faults: Faults = None) -> None:
    """Whether every image is there, opens, has the size that its rows state and holds their boxes.

    Only headers are read, unless `decode`.
    """
    of_one_image = {}
    for example in examples:
        of_one_image.setdefault((example.image, example.size), []).append(example)

    def check(some: list[Example]) -> list[InputError]:
        first = some[0]
        found = []
        with located(f"{first.where}: cannot read the image {first.image}", found):
            with Image.open(first.image) as image:
                upright = check_size(image, first.size)
                if decode:
                    image.load()
        if not found and first.size is None:  # else its boxes were checked when they were read
            of_rows = dict.fromkeys((example.where, tuple(example.boxes)) for example in some)
            for where, boxes in of_rows:
                with located(where, found):
                    for box in boxes:
                        check_box(box, upright)
        return found

    with ThreadPoolExecutor() as pool:  # reading and decoding release Python's lock
        answers = pool.map(check, of_one_image.values())
        bar = tqdm(answers, "images", len(of_one_image), disable=None, leave=False)
        found = [fault for some in bar for fault in some]
    if faults is not None:
        faults += found
    elif found:
        raise InputError(f"{found[0]} ({len(found):,} images or boxes are at fault)")


# ---------------------------------------------------------------------------------------- configs


def read_config(spec: str, overrides: Sequence[str], **classes: type) -> list:
    """configs.json:refcoco, ["train.lr=1e-4"], model=ModelConfig, ... -> a dataclass of each.

    A recipe is a list of fragments and other recipes, laid over the defaults in order. InputError:
    an unknown recipe, section or key, or a value of another type (in a section that has a class).
    """
    path, _, name = spec.rpartition(":")
    if not path:
        raise InputError(f"--config {spec}: expected FILE:NAME, such as configs.json:refcoco")
    with located(path):
        entries = json.loads(Path(path).read_bytes())
        recipes = [entry for entry, parts in entries.items() if isinstance(parts, list)]
    if name not in recipes:
        raise InputError(f"{path}: there is no recipe {name!r}{near(name, recipes)}")
    sections = {"model": {}, "data": {}, "train": {}}
    with located(f"{path}: recipe {name}"):
        lay_over(sections, entries, name)
    override(sections, overrides)
    return [fill(each, sections[section], section) for section, each in classes.items()]


def lay_over(sections: dict[str, dict], entries: dict, part: str | list | dict) -> None:
    """Change `sections` in place by a part of a recipe: a name, a list of parts, or a fragment."""
    if isinstance(part, str):
        part = entries[part]
    if isinstance(part, list):
        for each in part:
            lay_over(sections, entries, each)
        return
    for section, values in part.items():
        if section not in sections:
            raise InputError(f"unknown section {section!r}{near(section, sections)}")
        sections[section].update(values)


def override(sections: dict[str, dict], overrides: Sequence[str]) -> None:
    """Set `section.key=value` in place, the value being JSON or else a string."""
    for each in overrides:
        key, equals, text = each.partition("=")
        section, _, leaf = key.partition(".")
        if section not in sections:
            raise InputError(f"--set {each}: unknown section {section!r}{near(section, sections)}")
        if not equals or not leaf:
            raise InputError(f"--set {each}: expected section.key=value")
        try:
            sections[section][leaf] = json.loads(text)
        except ValueError:
            sections[section][leaf] = text


def fill(kind: type, values: dict, section: str) -> Any:
    """A dataclass from what differs from its defaults."""
    types = get_type_hints(kind)
    for key, value in values.items():
        if key not in types:
            raise InputError(f"unknown key {section}.{key}{near(key, types)}")
        if not fits(value, types[key]):
            wanted = types[key].__name__ if isinstance(types[key], type) else types[key]
            raise InputError(f"{section}.{key} must be {wanted} (JSON, >= 0), not {value!r:.80}")
    tuples = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    with located("config"):
        return kind(**values | tuples)


def fits(value: Any, kind: Any) -> bool:
    """Whether a value of JSON is of a field's type. Numbers must not be negative."""
    origin = get_origin(kind)
    parts = get_args(kind)
    if origin is Literal:
        return value in parts
    if origin is UnionType:  # such as float | None
        return any(fits(value, part) for part in parts)
    if origin is tuple:
        if not isinstance(value, list | tuple) or parts[-1] is not ... and len(value) != len(parts):
            return False
        return bool(value) and all(fits(each, parts[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(each, parts[1]) for each in value.values())
    if kind is float:
        return type(value) in (int, float) and value >= 0  # a bool is no number here
    return type(value) is kind and (kind is not int or value >= 0)


def near(word: str, words: Sequence[str]) -> str:
    """The end of a message about an unknown word: the nearest known one, or all of them."""
    close = get_close_matches(word, words, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are: {', '.join(words):.500}"


# --------------------------------------------------------------------------------------- pictures

INK = {"truth": "lime", "decoder": "orange", "token": "deepskyblue"}


def draw(image: Tensor, boxes: dict[str, Sequence], caption: str, side: int = 280) -> Image.Image:
    """image (3, H, W) uint8, {"truth" | "decoder" | "token": xyxy in pixels} -> a picture."""
    scale = side / max(image.shape[1:])
    height = max(1, round(scale * image.shape[1]))
    width = max(1, round(scale * image.shape[2]))
    page = Image.new("RGB", (side, side + 32))
    page.paste(to_pil_image(resize(image, height, width)))
    pen = ImageDraw.Draw(page)
    pen.text((3, side + 2), caption[: side // 6], fill="white")
    for i, (name, some) in enumerate(boxes.items()):
        pen.text((3 + 60 * i, side + 17), name, fill=INK[name])
        for box in some:
            pen.rectangle([scale * float(value) for value in box], outline=INK[name], width=2)
    return page


def tile(pictures: Sequence[Image.Image], path: str | Path, columns: int = 4) -> None:
    """Save pictures of `draw` side by side as one page."""
    pages = [pil_to_tensor(picture) / 255 for picture in pictures]
    save_image(pages, path, nrow=columns)


# ----------------------------------------------------------------------------------------- errors


class InputError(ValueError):
    """What the user gave is wrong. The message is one line: what, where, and what was expected."""


@contextmanager
def located(where: object, faults: Faults = None) -> Iterator[None]:
    """Whatever malformed input raises inside becomes one InputError that begins with `where`."""
    try:
        yield
    except Exception as error:
        text = getattr(error, "strerror", None) or str(error)
        if not isinstance(error, ValueError | OSError):
            text = f"{type(error).__name__}: {text}"
        fault = InputError(f"{where}: {' '.join(text.split()):.300}")
        if faults is None:
            raise fault from error
        faults.append(fault)


IS_FIRST_RANK = os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """A line on stderr, of rank 0 alone."""
    if IS_FIRST_RANK:
        tqdm.write(text, file=sys.stderr)


def check_output(path: str | None, ending: str) -> None:
    """InputError, before the work, if a file that is asked for could not be written in the end."""
    if path is None:
        return
    can_be_written = os.access(Path(path).absolute().parent, os.W_OK) and not os.path.isdir(path)
    if not path.endswith(ending) or not can_be_written:
        raise InputError(f"{path}: expected a name that ends in {ending}, in a folder to write to")


def run(main: Callable[[], None]) -> None:
    """Run the main of a program. What the user gave wrong is one line and status 2."""
    try:
        main()
    except InputError as error:
        if not IS_FIRST_RANK:
            # Ranks mostly meet the same fault: the first says it, and torchrun ends the others.
            time.sleep(10)
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


# ------------------------------------------------------------------------------------ the program


def main() -> None:
    """Count what the splits hold, name up to 20 faults, and draw a page of examples."""
    import train  # only for the classes of the config's sections

    parser = argparse.ArgumentParser(description="Look at annotations before you train on them.")
    add_config(parser)
    parser.add_argument("--split", help="one split (default: train and those that are evaluated)")
    parser.add_argument("--images", action="store_true", help="decode every image")
    parser.add_argument("--save", default="examples.png", help="the page (default: examples.png)")
    args = parser.parse_args()
    check_output(args.save, ".png")
    model_config, config, train_config = train.read_config(args.config, args.set)
    tokenizer = Tokenizer(config.tokenizer)
    shown = args.split or "train"
    every = ["train", *config.eval_splits]
    asked = [args.split] if args.split else every
    rows = {}
    images = {}
    faults = []
    for split in dict.fromkeys([*asked, *every]):
        found = []
        rows[split] = []
        with located(split, found):
            rows[split] = read_rows(config, split, found)
        examples = all_examples(rows[split])
        images[split] = {example.image for example in examples}
        if split in asked:
            check_images(examples, args.images, found)
            faults += found
    for split in asked:
        others = set().union(*(images[other] for other in images if other != split))
        print_counts(split, rows[split], tokenizer, config.max_tokens)
        print(f"  {len(images[split] & others):>9,} images that other splits hold as well")
    for fault in faults[:20]:
        print(fault)
    if shown == "train" and not faults:
        without_evaluated(config, rows["train"])  # which says how many rows it leaves out
    # the page shows examples as training or evaluation gets them
    jitter = config.jitter if shown == "train" else None
    dataset = Dataset(rows[shown], model_config.image_size, train_config.seed, jitter)
    pictures = []
    for index in random.Random(0).sample(range(len(rows[shown])), min(16, len(rows[shown]))):
        item = dataset[0, index]
        if isinstance(item, Item):
            boxes = box_convert(item.boxes, "cxcywh", "xyxy") * model_config.image_size
            pictures.append(draw(item.image, {"truth": boxes}, clean(item.expression)))
    if pictures:
        tile(pictures, args.save)
        print(f"{args.save}: {len(pictures)} examples of {shown} as the model gets them")
    if faults:
        raise InputError(f"{len(faults):,} faults; up to 20 are listed above")


def print_counts(split: str, rows: Sequence[Row], tokenizer: Tokenizer, max_tokens: int) -> None:
    examples = all_examples(rows)
    targets = Counter(min(len(example.boxes), 2) for example in examples)
    cut = [each for each in examples if tokenizer.is_cut(each.expression, max_tokens)]
    unknown = [each for each in examples if 0 in tokenizer.pieces(each.expression)]
    counts = {
        "rows": len(rows),
        "images": len({example.image for example in examples}),
        "expressions": len(examples),
        "without a target": targets[0],
        "with one target": targets[1],
        "with several targets": targets[2],
        "phrases that are cut (data.max_tokens)": len(cut),
        "phrases with an unknown word": len(unknown),
    }
    print(split)
    for name, count in counts.items():
        print(f"  {count:>9,} {name}")


def add_config(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """The two options of all three programs."""
    parser.add_argument("--config", required=required, help="a recipe: configs.json:refcoco")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")


if __name__ == "__main__":
    run(main)
