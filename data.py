"""Everything that is read from disk. The head of the file is the way of an example from there into a batch:

    a row of a file   {"image": "a.jpg", "expressions": ["the left dog", "a dog"], "boxes": [[x, y, w, h]]}
    -> read_rows      a Row: one Example for each expression, every value checked
    -> Dataset        one Example of the row, drawn anew in each epoch; its image (3, H, W) is jittered and resized
                      to (3, S, S), its boxes become cxcywh in 0..1
    -> Collate        a Batch of padded tensors; Tokenizer turns the expressions into ids
    -> batches        in training: the Batches of the keys (epoch, index) of MicroBatchSampler, made by worker
                      processes; evaluate.evaluate_dataset reads in threads and collates by itself

    python data.py check --config configs.json:refcoco --images     count what is there, name what is wrong
    python data.py show --config configs.json:refcoco               draw a page of examples
    python data.py convert FILE ... --to PATTERN                    turn other annotation layouts into JSON Lines

Every random choice is a function of (seed, epoch, index), so that ranks, workers and restarts do not change it.
"""

from __future__ import annotations  # so that classes may be named above the place where they are defined

import argparse
import difflib
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
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path
from reprlib import repr as brief  # shortens whatever a message quotes
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from pycocotools.coco import COCO
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, get_worker_info
from torchvision.ops import box_area, box_convert, clip_boxes_to_image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from tqdm import tqdm

# ------------------------------------------------------------------------------------- from rows to batches


class Batch(NamedTuple):
    images: Tensor  # (B, 3, S, S) uint8
    tokens: Tensor  # (B, L) int64
    text_pad: Tensor  # (B, L) bool, True = padding
    boxes: Tensor  # (B, M, 4) cxcywh in 0..1
    box_mask: Tensor  # (B, M) bool, True = a real box
    index: list[int]  # the numbers of the examples' rows in their dataset

    def to(self, device: torch.device) -> Batch:
        return Batch(*(x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in self))


class Dataset:
    """Rows as examples. A key (epoch, index) asks for an example of row `index` and fixes its random choices (D12)."""

    def __init__(self, rows: Sequence[Row], image_size: int, seed: int = 0, jitter: Sequence[float] | None = None):
        self.rows, self.image_size, self.seed, self.jitter = rows, image_size, seed, jitter
        self.images: dict[tuple, Tensor] = {}  # those kept: all, unless some exceed their share of 600 MB
        self.bytes_per_image = 600_000_000 // max(len({row[0].image for row in rows}), 1)  # in all loader processes

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def examples(self) -> list[Example]:
        return expand(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, str, Tensor, int, tuple[int, int]]:
        """(image (3, S, S) uint8, expression, boxes (n, 4) cxcywh in 0..1, index, (width, height) before resizing)."""
        epoch, index = key
        rng = random.Random(f"{self.seed}/{epoch}/{index}")
        row = self.rows[index]
        example = row[rng.randrange(len(row))]  # each epoch trains on one expression of the row
        opened = example.image, example.size
        if (image := self.images.get(opened)) is None:
            image = read_image(example.image, example.size, example.where)  # (3, H, W)
            if image.nbytes * getattr(get_worker_info(), "num_workers", 1) > self.bytes_per_image:
                self.images = {}  # only this one stays: an evaluation asks for its other expressions next
            self.images[opened] = image
        boxes = clip_boxes(example.boxes or (), image.shape[2], image.shape[1])  # (n, 4) xyxy pixels
        if self.jitter:
            image, boxes = large_scale_jitter(image, boxes, self.jitter, self.image_size, rng)
        # The image is stretched to a square, so boxes are relative to width and height from here on.
        height, width = image.shape[1:]
        boxes = box_convert(boxes, "xyxy", "cxcywh") / torch.tensor([width, height, width, height])  # (n, 4)
        resized = resize(image, self.image_size, self.image_size)  # (3, S, S)
        return resized, example.expression, boxes.float(), index, (width, height)


class Tokenizer:
    """XLM-RoBERTa's ids on a sentencepiece model: <s> 0, <pad> 1, </s> 2, <unk> 3, any other piece its number + 1."""

    def __init__(self, path: str | Path):
        if not Path(path).is_file():
            raise InputError(f"{path}: there is no such tokenizer (data.tokenizer; for BEiT-3 it is beit3.spm)")
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
            pieces = self.model.id_to_piece(list(range(self.model.vocab_size())))
        except (RuntimeError, OSError, ValueError) as error:
            raise InputError(f"{path}: is not a sentencepiece model: {error}") from None
        self.path, self.vocab_size = str(path), len(pieces) + 1  # one id past the last piece
        # The digest is of the pieces, because the bytes of the file differ between versions of sentencepiece.
        self.digest = hashlib.sha256("\n".join(pieces).encode()).hexdigest()

    def __call__(self, texts: Sequence[str], max_tokens: int = 20) -> tuple[Tensor, Tensor]:
        """Texts -> tokens (B, L) int64, text_pad (B, L) bool, True = padding; L = max_tokens. Longer texts are cut."""
        tokens = torch.ones(len(texts), max_tokens, dtype=torch.int64)  # all padding
        for row, text in zip(tokens, texts, strict=True):
            pieces = self.model.encode(clean(text))[: max_tokens - 2]
            ids = [0, *(piece + 1 if piece else 3 for piece in pieces), 2]
            row[: len(ids)] = torch.tensor(ids)
        return tokens, tokens == 1

    def seen(self, text: str, max_tokens: int) -> tuple[str, bool]:
        """The part of a text that the model gets, and whether the text was cut there."""
        pieces = self.model.encode(clean(text))
        return self.model.decode(pieces[: max_tokens - 2]), len(pieces) > max_tokens - 2

    def pieces(self, text: str, max_tokens: int = 20) -> list[str]:
        """The pieces between <s> and </s>, as text."""
        pieces = self.model.encode(clean(text), out_type=str)[: max_tokens - 2]
        return [piece.replace("\u2581", " ").strip() for piece in pieces]


def clean(text: str) -> str:
    """The official cleaning: lower case, punctuation is dropped, - and / become spaces."""
    return re.sub(r"[.,'!?\"()*#:;]", "", text.lower()).replace("-", " ").replace("/", " ")


class Collate:
    """A list of examples -> Batch."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int):
        self.tokenizer, self.max_tokens = tokenizer, max_tokens

    def __call__(self, examples: list) -> Batch:
        images, expressions, boxes, index, _ = zip(*examples, strict=True)
        targets = torch.tensor([len(each) for each in boxes])  # (B,)
        padded = pad_sequence([*boxes, torch.zeros(1, 4)], batch_first=True)[:-1]  # (B, M, 4); M is at least 1
        mask = torch.arange(padded.shape[1]) < targets[:, None]  # (B, M)
        return Batch(torch.stack(images), *self.tokenizer(expressions, self.max_tokens), padded, mask, list(index))


class MicroBatchSampler:
    """The keys of one rank's micro-batches, step after step and epoch after epoch, from `start` = (epoch, step) on.

    Each epoch walks through a permutation of all rows; its last batch is filled up from the permutation's start.
    """

    def __init__(self, rows: int, settings: dict, micro: int, start: tuple[int, int], rank: int, world: int):
        self.rows, self.micro, self.start = rows, micro, start
        self.batch, self.seed, self.epochs = (settings[name] for name in ("batch_size", "seed", "epochs"))
        self.share = slice(rank * self.batch // world, (rank + 1) * self.batch // world)  # of each batch
        self.steps = math.ceil(rows / self.batch)  # in an epoch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first_epoch, first_step = self.start
        for epoch in range(first_epoch, self.epochs):
            # Python does not salt the hash of integers, so every rank draws the same permutation.
            generator = torch.Generator().manual_seed(hash((self.seed, epoch)))
            order = torch.randperm(self.rows, generator=generator).tolist()
            for step in range(first_step if epoch == first_epoch else 0, self.steps):
                numbers = [order[i % self.rows] for i in range(step * self.batch, (step + 1) * self.batch)][self.share]
                for i in range(0, len(numbers), self.micro):
                    yield [(epoch, number) for number in numbers[i : i + self.micro]]


def batches(
    dataset: Dataset, collate: Collate, keys: Iterable[list[tuple[int, int]]], workers: int, pin: bool = False
) -> Iterator[Batch]:
    """A Batch for each list of keys, in order. InputError where an image cannot be read or a worker was killed."""
    workers = min(workers, os.cpu_count() or 1)  # more would only wait for each other
    options = {"num_workers": workers, "prefetch_factor": 4 if workers else None, "worker_init_fn": _leave_group}
    options |= {"pin_memory": pin, "generator": torch.Generator()}  # else it would draw from the global generator
    try:
        iterator = iter(DataLoader(dataset, batch_sampler=keys, collate_fn=collate, **options))
        # When a worker dies, torch's handler would raise in the middle of a step; without it the next batch raises.
        with suppress(ValueError, AttributeError):  # not in the main thread; Windows has no SIGCHLD
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        yield from iterator
    except InputError as error:  # of a worker: torch puts a traceback, with line breaks as \\n, in front of the message
        raise InputError(str(error).rpartition("InputError: ")[2].removesuffix("\\n")) from None
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and not re.search("DataLoader worker|[Pp]in memory thread", str(error)):
            raise
        raise InputError("a loader process was killed: out of memory or of /dev/shm? lower data.workers") from None


def _leave_group(worker: int) -> None:
    """Let the main process decide when to stop: Ctrl-C and torchrun signal its whole group, which a worker leaves."""
    with suppress(AttributeError):  # Windows has no groups
        os.setpgid(0, 0)
    sys.excepthook = lambda *_: None  # for the thread that hands tensors over, when the main process is gone


# ---------------------------------------------------------------------------------------- images and jitter

MAX_PIXELS = 50_000_000  # a larger image is refused before it is decoded
Image.MAX_IMAGE_PIXELS = None  # replaces Pillow's own limit, which warns from 89 million on
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "MPO")  # Pillow reads others, too, whose headers are not checked here


@contextmanager
def open_image(path: str, size: tuple[int, int] | None = None, where: str = "") -> Iterator[Image.Image]:
    """An image file whose header fits the row's (width, height). What Pillow raises in the `with` is an InputError."""
    where = where or path
    if not os.path.isfile(path):  # reading a pipe or a device might never end
        raise InputError(f"{where}: there is no image {path}")
    try:
        with Image.open(path, formats=FORMATS) as file:
            about, (width, height) = f"{where}: image {path}", file.size
            if width * height > MAX_PIXELS:
                raise InputError(f"{about} has {width} x {height} pixels, more than {MAX_PIXELS:,}")
            width, height = upright_size(file)
            if size and size not in ((width, height), file.size):
                raise InputError(f"{about} is {width} x {height}, the row says {size[0]} x {size[1]}")
            yield file
    except InputError:
        raise
    except Exception as error:
        fault = getattr(error, "strerror", None) or f"it is damaged, cut off or none of {', '.join(FORMATS)}"
        raise InputError(f"{where}: cannot read the image {path}: {fault}") from None


def upright_size(file: Image.Image) -> tuple[int, int]:
    """(width, height) after the rotation that EXIF asks for."""
    # A PNG's EXIF may lie behind the pixels, which would all be decoded to find it. 0x0112 is the orientation.
    quarter_turn = file.format != "PNG" and file.getexif().get(0x0112, 1) >= 5
    return file.size[::-1] if quarter_turn else file.size


def read_image(path: str, size: tuple[int, int] | None = None, where: str = "") -> Tensor:
    """An image file -> (3, H, W) uint8 RGB, rotated as EXIF says.

    Where the row states the size that the file has without that rotation, its boxes were drawn there, and the image is
    not rotated (D13). EXIF rotations by 180 degrees are always applied, because they keep the size.
    """
    with open_image(path, size, where) as image:
        return pixels(image, turn=not size or size == upright_size(image))


def pixels(image: Image.Image, turn: bool = True) -> Tensor:
    """An image of any mode -> (3, H, W) uint8 RGB, rotated as EXIF says unless `turn` is false."""
    if turn and image.format != "PNG" and image.getexif().get(0x0112, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip to 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P":  # a palette may hold transparent colours, which convert() warns of
        image = image.convert("RGBA")
    return pil_to_tensor(image if image.mode == "RGB" else image.convert("RGB"))  # (3, H, W)


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """(3, H, W) uint8 -> (3, height, width), bilinear without antialias, up to 1 grey level as OpenCV (D14)."""
    return F.interpolate(image[None], size=(height, width), mode="bilinear", align_corners=False)[0]


def clip_boxes(xywh: Sequence[Box], width: int, height: int) -> Tensor:
    """xywh pixels -> (n, 4) xyxy float64, clipped to [0, width-1] x [0, height-1] as the official loader does."""
    boxes = box_convert(torch.tensor(xywh, dtype=torch.float64).reshape(-1, 4), "xywh", "xyxy")
    return clip_boxes_to_image(boxes, (height - 1, width - 1))


def large_scale_jitter(
    image: Tensor, boxes: Tensor, limits: Sequence[float], long_side: int, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """image (3, H, W), boxes (n, 4) xyxy pixels -> both after the jitter, the image of another size.

    The scale s is uniform in `limits`. s <= 1 shrinks the image to s * long_side, which blurs it, since it is enlarged
    again afterwards. s > 1 cuts out a window of 1/s of each side that keeps at least half of every box (D5).
    """
    scale = rng.uniform(*limits)
    height, width = image.shape[1:]
    if scale <= 1:
        factor = scale * long_side / max(height, width)
        new_height, new_width = (max(1, int(side * factor + 0.5)) for side in (height, width))
        ratios = boxes.new_tensor([new_width / width, new_height / height] * 2)
        return resize(image, new_height, new_width), boxes * ratios
    crop_height, crop_width = max(1, round(height / scale)), max(1, round(width / scale))
    area = box_area(boxes)  # (n,)
    for threshold in (0.9, 0.8, 0.7, 0.6, 0.5):  # first look for a window that keeps nearly everything
        for _ in range(20):
            x, y = rng.randint(0, width - crop_width), rng.randint(0, height - crop_height)
            kept = clip_boxes_to_image(boxes - torch.tensor([x, y, x, y]), (crop_height, crop_width))  # (n, 4)
            if (box_area(kept) >= threshold * area).all():
                return image[:, y : y + crop_height, x : x + crop_width], kept
    return image, boxes  # no window was found


# --------------------------------------------------------------------------------------- rows and their checks

Box = tuple[float, float, float, float]  # x, y, w, h in pixels of the original image


@dataclass(frozen=True, slots=True)
class Example:
    """One expression and the boxes that it means in one image."""

    image: str  # path of the file
    expression: str
    boxes: tuple[Box, ...] | None  # empty: the expression has no target; None: the row does not state them
    size: tuple[int, int] | None  # (width, height) if the row states them
    kind: str  # a label that accuracy is reported by, may be empty
    where: str  # "file:line", for messages
    name: str | int = ""  # the image as the row names it


# The expressions of one object (or set of objects) of one image. A training epoch draws one of them.
Row = tuple[Example, ...]


def expand(rows: Sequence[Row]) -> list[Example]:
    """Every expression, in order: what evaluation walks through."""
    return list(chain.from_iterable(rows))


def fingerprint(splits: Sequence[Sequence[Row]]) -> str:
    """A digest of rows and their order that is the same on every machine and wherever the images lie."""
    digest = hashlib.sha256()
    for row in chain(*splits):
        parts = (repr((os.path.basename(each.image), each.expression, each.boxes, each.size)) for each in row)
        digest.update("".join(parts).encode() + b"\n")
    return digest.hexdigest()


def read_rows(settings: dict, split: str, faults: list[InputError] | None = None, need_boxes: bool = True) -> list[Row]:
    """The rows of one split. `settings` is the section `data` of a config; its `annotations` names either a JSON Lines
    file with {split} in its name or an official instances.json, which holds every split.

    InputError names file and line of the first malformed row; if a list `faults` is given, all of them go there. Rows
    without "boxes" are malformed unless `need_boxes` is false.
    """
    path = Path(settings["annotations"].replace("{split}", split))
    if path.suffix == ".json":
        splits = read_json(path)
        if not isinstance(splits, dict) or not isinstance(splits.get(split), list):
            have = ", ".join(splits) if isinstance(splits, dict) else "no splits"
            raise InputError(f"{path}: there is no split {split!r}, it holds: {have:.200}")
        items = ((f"{path}: {split}[{i}]", row) for i, row in enumerate(splits[split]))
    else:
        items = json_lines(path)
    rows = []
    for where, row in items:
        with located(where, faults):
            rows.append(_row(json.loads(row) if isinstance(row, bytes) else row, where, settings, need_boxes))
    if not rows and not faults:
        raise InputError(f"{path}: holds no row of split {split!r}")
    return rows


def read_json(path: Path) -> object:
    with located(path):
        return json.loads(path.read_bytes())


def json_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """("file:line", the line) of every line that is not blank."""
    with located(path), open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{path}:{number}", line


@contextmanager
def located(where: str | Path, faults: list[InputError] | None = None) -> Iterator[None]:
    """Whatever reading a malformed file raises becomes one InputError that says where, raised or put into `faults`."""
    try:
        yield
        return
    except InputError as error:
        fault = str(error)
    except OSError as error:
        fault = f"cannot be read: {error.strerror}"
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        fault = f"is not JSON: {error}"
    except Exception as error:  # a damaged pickle can raise anything
        fault = f"is not of the expected layout: {error!r:.150}"
    if faults is None:
        raise InputError(f"{where}: {fault}") from None
    faults.append(InputError(f"{where}: {fault}"))


def _row(row: dict, where: str, settings: dict, need_boxes: bool = True) -> Row:
    """A row of our JSON Lines or of an official file -> Row."""
    if isinstance(row, dict) and {"image_id", "bbox"} <= row.keys():
        row = _official(row)
    boxes_are_stated = need_boxes or not isinstance(row, dict) or "boxes" in row
    row = row if boxes_are_stated else {**row, "boxes": []}
    if not isinstance(row, dict) or not {"image", "boxes"} <= row.keys():
        raise InputError(f'expected an object with "image", "expressions" and "boxes", not {brief(row)}')
    expressions, kind, size = row.get("expressions"), row.get("kind", ""), (row.get("width"), row.get("height"))
    if not isinstance(expressions, list) or not expressions or not isinstance(kind, str | int):
        raise InputError('"expressions" must be a list of one or more strings, and "kind" a label')
    if size == (None, None):
        size = None  # then the boxes are checked once the image is opened
    elif not all(type(side) is int and side > 0 for side in size):
        raise InputError(f"width and height must be positive integers, not {brief(size)}")
    if not isinstance(row["boxes"], list) or not all(isinstance(each, list) for each in row["boxes"]):
        raise InputError(f'"boxes" must be a list of boxes [x, y, w, h], [] for no target, not {brief(row["boxes"])}')
    of_each = [each == [] or isinstance(each[0], list) for each in row["boxes"]]
    if any(of_each) and (not all(of_each) or len(of_each) != len(expressions)):
        raise InputError('"boxes" must be one list of [x, y, w, h], or one such list for each expression')
    boxes_of_each = row["boxes"] if any(of_each) else [row["boxes"]] * len(expressions)
    path, examples = _image_path(row["image"], row.get("source"), settings), []
    for expression, boxes in zip(expressions, boxes_of_each, strict=True):
        check_expression(expression)
        for box in boxes:
            check_box(box, size)
        boxes = tuple(tuple(map(float, b)) for b in boxes) if boxes_are_stated else None
        examples.append(Example(path, expression, boxes, size, str(kind), where, row["image"]))
    return tuple(examples)


def _official(row: dict) -> dict:
    """A row of an official instances.json in our own form."""
    boxes = [row["bbox"]]  # REC: one box for all expressions
    if "annotations" in row:  # gREC: a list of boxes for each expression, where the category -1 marks "no target"
        of_each = [zip(*each, strict=True) for each in zip(row["bbox"], row["annotations"], strict=True)]
        boxes = [[box for box, target in pairs if target["category_id"] != -1] for pairs in of_each]
    return {**row, "image": row["image_id"], "boxes": boxes, "source": row.get("data_source")}


def _image_path(image: object, source: object, settings: dict) -> str:
    """The image is a file name in a folder, or a number in a pattern such as `folder/COCO_train2014_{:012d}.jpg`."""
    if source is not None and (not isinstance(source, str) or source not in settings["sources"]):
        raise InputError(f"source {brief(source)} has no folder in data.sources")
    pattern = settings["images"] if source is None else settings["sources"][source]
    if isinstance(image, str) and image.isprintable() and image:
        return os.path.join(os.path.dirname(pattern) if "{" in pattern else pattern, image)
    if type(image) is not int:
        raise InputError(f"the image must be a file name or a number, not {brief(image)}")
    if not re.fullmatch(r"[^{}]*\{(:0?\d{0,2}d)?\}[^{}]*", pattern):  # str.format() can do much more than names need
        raise InputError(f"the image is a number, so {pattern!r:.200} should be a pattern: .../{{:012d}}.jpg")
    return pattern.format(image)


def check_expression(text: object, name: str = "an expression") -> None:
    """InputError unless the text holds a letter or a digit and can be written as UTF-8."""
    if not isinstance(text, str) or not any(map(str.isalnum, text)) or re.search("[\ud800-\udfff]", text):
        raise InputError(f"{name} must be a text of UTF-8 with at least one word, not {brief(text)}")


def check_box(box: object, size: tuple[int, int] | None) -> None:
    """InputError unless box is [x, y, w, h] with an area, of which at least half lies in an image of this size.

    What reaches out is clipped later, as in the official loader; some published sets (Visual Genome) have such boxes.
    """
    four = box if isinstance(box, list | tuple) and len(box) == 4 else [None]
    if not all(type(v) in (int, float) and abs(v) < 1e9 for v in four):
        raise InputError(f"a box must be [x, y, w, h] in pixels, not {brief(box)}")
    x, y, w, h = box
    width, height = size or (math.inf, math.inf)
    inside = max(0, min(x + w, width) - max(x, 0)) * max(0, min(y + h, height) - max(y, 0))
    for wrong, fault in (
        (w <= 0 or h <= 0, "has no area"),
        (max(box) < 1, "lies in one pixel (these should not be fractions of the image)"),
        (inside < w * h / 2, f"lies outside the image of {width} x {height} pixels by more than half"),
        (x >= width - 1 or y >= height - 1, "lies in the last column or row of pixels, which is clipped off"),
    ):
        if wrong:
            raise InputError(f"box {list(box)} {fault}; expected [x, y, w, h] in pixels")


def check_files(rows: Sequence[Row], decode: bool = False, faults: list[InputError] | None = None) -> None:
    """InputError unless every image is there, opens, has the size that its rows state and holds their boxes.

    Only headers are read, unless `decode`. The first fault of each image goes into the list `faults`, if one is given.
    """
    of_one_image: dict[tuple, list[Example]] = {}
    for example in expand(rows):
        of_one_image.setdefault((example.image, example.size), []).append(example)

    def fault(examples: list[Example]) -> InputError | None:
        first = examples[0]
        try:
            with open_image(first.image, first.size, first.where) as file:
                upright = upright_size(file)
                if decode:
                    file.load()
            for each in examples if first.size is None else ():  # else the boxes were checked when they were read
                with located(each.where):
                    for box in each.boxes:
                        check_box(box, upright)
        except InputError as error:
            return error

    with ThreadPoolExecutor() as pool:  # threads suffice, because reading and decoding release Python's lock
        answers = tqdm(pool.map(fault, of_one_image.values()), "images", len(of_one_image), disable=None, leave=False)
        found = list(filter(None, answers))
    if faults is not None:
        faults += found
    elif found:
        raise InputError(f"{found[0]}" + (f" (and {len(found) - 1:,} more images are at fault)" if found[1:] else ""))


# ----------------------------------------------------------------------------------------------------- configs

# The values that a key may hold: a type (lists and objects hold strings), (low, high) for a number between them, an
# integer where they are integers, or a list of such pairs for a list of as many numbers (one pair: of any length).
POSITIVE, NATURAL = (1, 1_000_000), (0, 2**63 - 1)
KEYS: dict[str, type | tuple | list] = {
    "data.annotations": str,  # path of the rows: JSON Lines with {split} in the name, or an official .json of all
    "data.images": str,  # folder of the images, or a pattern such as folder/{:012d}.jpg where rows hold image numbers
    "data.sources": dict,  # the same as `images` for the rows that name a source: {"vg": "visual-genome/{}.jpg"}
    "data.tokenizer": str,  # path of the sentencepiece model; for weights of BEiT-3 it is beit3.spm
    "data.max_tokens": (3, 1022),  # tokens of an expression with <s> and </s>, the rest is cut; BEiT-3 takes 1,022
    "data.jitter": [(0.01, 100.0)] * 2,  # smallest and largest scale of the jitter in training; null leaves it out
    "data.eval_splits": list,  # splits to evaluate; the first one is also evaluated while training, to choose best.pt
    "data.workers": NATURAL,  # loader processes of each rank, in evaluation threads; 0 loads in the main process
    "data.generate": str,  # draw an embedded set on first use, "shapes" or "shapes-grec"; "" draws none
    "data.scenes": NATURAL,  # number of training scenes of that set
    "data.label_noise": (0.0, 1.0),  # share of its training rows that get a wrong box, as if annotated carelessly
}
# The keys of `model` are explained at SimVG.__init__ in model.py, those of `train` at the head of train.py.
for section, names, allowed in (
    ("model", "image_size patch_size vocab_size encoder_width encoder_layers encoder_heads encoder_ffn", POSITIVE),
    ("model", "head_width queries tqg_layers tqg_ffn decoder_layers decoder_ffn", POSITIVE),
    ("model", "drop_path dropout", (0.0, 0.999999)),
    ("model", "as_released", bool),
    ("train", "epochs batch_size micro_batch evaluate_every", POSITIVE),
    ("train", "seed warmup_epochs evaluate_from", NATURAL),
    ("train", "lr lr_encoder eps weight_decay decay_factor ema_decay", (0.0, 1.0)),
    ("train", "betas", [(0.0, 0.999999)] * 2),
    ("train", "decay_epochs", [POSITIVE]),
    ("train", "clip_norm no_object_weight", (1e-9, 1e9)),
    ("train", "loss_decoder loss_token_on_truth loss_token_on_teacher save_minutes", (0.0, 1e9)),
    ("train", "freeze_encoder amsgrad ema checkpointing compile", bool),
    ("train", "amp", str),
):
    KEYS |= {f"{section}.{name}": allowed for name in names.split()}
# These may also be null: no such loss term, no jitter; for decay_epochs, a linear fall of the learning rates to 0.
OPTIONAL = {"data.jitter", "train.decay_epochs"} | {key for key in KEYS if key.startswith("train.loss_")}


def load_config(spec: str, overrides: Sequence[str] = ()) -> dict:
    """`configs.json:refcoco` and `["train.lr=1e-4"]` -> {"model": {...}, "data": {...}, "train": {...}}.

    A config is the fragment `default`, then the fragments its name stands for, then the overrides, whose values
    are JSON or else a string. InputError: unknown name or key, or a value that `KEYS` does not allow.
    """
    path, _, name = spec.rpartition(":")
    if not path:
        raise InputError(f"--config {spec}: expected FILE:NAME, such as configs.json:shapes")
    entries = read_json(Path(path))
    if not isinstance(entries, dict) or "default" not in entries:
        raise InputError(f'{path}: expected an object of recipes and fragments, "default" among them')
    recipes = ["default", *(key for key, parts in entries.items() if not isinstance(parts, dict))]
    if name not in recipes:
        fault = "is a fragment of recipes, not a recipe" if name in entries else "is unknown"
        raise InputError(f"{path}: {name!r} {fault}; {nearest(name, recipes)}")
    config: dict = {"model": {}, "data": {}, "train": {}}
    for part in ("default", name):
        _add(config, entries, part, path)
    check_config(config, path)
    override_config(config, overrides)
    return config


def _add(config: dict, entries: dict, name: object, path: str, inside: tuple = ()) -> None:
    """Set the keys of a fragment, or of all that a recipe lists, in order; a recipe may name other recipes."""
    parts = entries.get(name) if isinstance(name, str) else None
    if isinstance(parts, dict) and all(isinstance(keys, dict) for keys in parts.values()):
        for section, keys in parts.items():
            for key, value in keys.items():
                _set(config, f"{path}:{name}", f"{section}.{key}", value)
    elif isinstance(parts, list) and name not in inside:
        for part in parts:
            _add(config, entries, part, path, (*inside, name))
    else:
        raise InputError(f"{path}: {brief(name)} must be a fragment {{section: {{key: value}}}} or a list of others")


def override_config(config: dict, overrides: Sequence[str]) -> None:
    """Change a config in place: `section.key=value`, the value being JSON or else a string."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise InputError(f"--set {brief(override)}: expected section.key=value")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        _set(config, "--set", key, value)
    check_config(config, "--set")


def check_config(config: dict, where: str) -> None:
    """InputError unless a config, of a file or a checkpoint, has every key and the values fit `KEYS` and each other."""
    config["train"].setdefault("freeze_encoder", False)  # checkpoints of older versions lack these two
    config["data"].setdefault("label_noise", 0.0)
    values = {f"{section}.{key}": value for section, keys in config.items() for key, value in keys.items()}
    if missing := KEYS.keys() - values.keys():
        raise InputError(f"{where}: the config lacks {min(missing)}")
    for key, value in values.items():
        _set(config, where, key, value)
    model, annotations, generate = config["model"], config["data"]["annotations"], config["data"]["generate"]
    factors = {"image_size": model["patch_size"], "encoder_width": math.lcm(4, model["encoder_heads"]), "head_width": 8}
    for key, factor in factors.items():  # encoder_width: sine and cosine of y and x take a fourth each
        if model[key] % factor:
            raise InputError(f"{where}: model.{key}={model[key]}: expected a multiple of {factor}")
    if "{split}" not in annotations and not annotations.endswith(".json"):
        raise InputError(f"data.annotations={brief(annotations)}: expected {{split}} in the name, or an official .json")
    if config["train"]["amp"] not in ("", "bf16", "fp16"):
        raise InputError(f'{where}: train.amp must be "" (float32), "bf16" or "fp16", not {config["train"]["amp"]!r}')
    if generate not in ("", *SCENE_SETS):
        raise InputError(f"data.generate={brief(generate)}: there are: {', '.join(SCENE_SETS)}")
    if config["data"]["label_noise"] and not generate:
        raise InputError(f"{where}: data.label_noise is for the embedded sets (data.generate) alone")


def _set(config: dict, where: str, key: str, value: object) -> None:
    """Set `section.key` in a config, where its value fits."""
    if key not in KEYS:
        raise InputError(f"{where}: unknown key {brief(key)}; {nearest(key, list(KEYS))}")
    section, _, leaf = key.partition(".")
    fits, wanted = _check(value, KEYS[key])
    if not fits and not (value is None and key in OPTIONAL):
        wanted += " or null" if key in OPTIONAL else ""
        raise InputError(f"{where}: {key} must be {wanted}, not {brief(value)}")
    is_float = isinstance(KEYS[key], tuple) and isinstance(KEYS[key][0], float)
    config[section][leaf] = float(value) if is_float and value is not None else value


def _check(value: object, allowed: type | tuple | list) -> tuple[bool, str]:
    """Whether a value is one of those allowed, and which these are in words."""
    if isinstance(allowed, tuple):
        low, high = allowed
        fits = type(value) in (int, type(low)) and low <= value <= high  # a bool is no number here
        return fits, f"{'an integer' if type(low) is int else 'a number'} from {low:,} to {high:,}"
    if isinstance(allowed, list):
        fits = isinstance(value, list) and len(allowed) in (1, len(value))
        length = "any length" if len(allowed) == 1 else len(allowed)
        wanted = f"a list of {length}, each {_check(None, allowed[0])[1]}"
        return fits and all(_check(each, allowed[0])[0] for each in value), wanted
    texts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [str(value)]
    fits = isinstance(value, allowed) and value != [] and all(isinstance(v, str) and v.isprintable() for v in texts)
    return fits, {bool: "true or false", str: "a string", list: 'a list such as ["val"]', dict: "an object"}[allowed]


def nearest(word: str, words: Sequence[str]) -> str:
    """A question that suggests the right word for a mistyped one."""
    words = sorted(words, key=len)
    close = [w for w in words if w.startswith(word)][:3] or difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"there are: {', '.join(words):.900}"


# ---------------------------------------------------------------------------------------------- check and show


def check(config: dict, splits: Sequence[str], decode: bool) -> None:
    """Print what the splits hold and up to 20 faults with their rows; InputError if there is a fault."""
    settings, faults, table = config["data"], [], {}
    tokenizer = Tokenizer(settings["tokenizer"])
    for split in splits:
        before = len(faults)
        rows = read_rows(settings, split, faults)
        check_files(rows, decode, faults)
        examples = expand(rows)
        distinct = {(each.image, each.expression, each.boxes) for each in examples}
        table[split] = counts(rows) | {
            "- repeated for the same boxes": len(examples) - len(distinct),
            "- too long, so cut": sum(tokenizer.seen(each.expression, settings["max_tokens"])[1] for each in examples),
            "- with a box over the image's edge": sum(map(_over_the_edge, examples)),
            "faults": len(faults) - before,
        }
    print_table(table)
    several = sum(count["- without a target"] + count["- with several"] for count in table.values())
    if settings["label_noise"] and "train" in splits:
        print(f"note: {100 * settings['label_noise']:g} % of the rows get a wrong box in training", file=sys.stderr)
    if several and config["model"]["queries"] == 1:
        print(f"note: {several:,} expressions need a recipe with several queries, such as grefcoco", file=sys.stderr)
    print(*faults[:20], sep="\n", end="\n" if faults else "")
    if faults:
        raise InputError(f"{len(faults):,} faults" + (", the first 20 are above" if len(faults) > 20 else ""))


def _over_the_edge(example: Example) -> bool:
    """Whether a box reaches out of the image by more than 2 pixels."""
    width, height = example.size or (math.inf, math.inf)
    return any(min(x, y) < -2 or x + w > width + 2 or y + h > height + 2 for x, y, w, h in example.boxes)


def counts(rows: Sequence[Row]) -> dict[str, int]:
    """How many rows, images and expressions there are, the latter also by their number of targets."""
    examples = expand(rows)
    targets = Counter(min(len(each.boxes), 2) for each in examples)
    found = {"rows": len(rows), "images": len({each.image for each in examples}), "expressions": len(examples)}
    return found | {"- without a target": targets[0], "- with one": targets[1], "- with several": targets[2]}


def print_table(table: dict[str, dict[str, int]]) -> None:
    """A column for each split, a line for each figure."""
    print(f"{'':36}" + "".join(f"{split:>12}" for split in table))
    for name in next(iter(table.values())):
        print(f"{name:36}" + "".join(f"{count[name]:>12,}" for count in table.values()))


def show(config: dict, split: str, number: int, path: str) -> None:
    """A page of examples of a split: each as it is on disk, then as training (train) or evaluation gets it. With label
    noise both show the box that is trained with."""
    tokenizer = Tokenizer(config["data"]["tokenizer"])
    rows = read_rows(config["data"], split)
    if split == "train":
        rows = with_wrong_boxes(rows, config["data"]["label_noise"], config["train"]["seed"])
    rows = [(example,) for example in expand(rows)]
    rows = [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), min(number, len(rows))))]
    check_files(rows)
    jitter = config["data"]["jitter"] if split == "train" else None
    dataset = Dataset(rows, config["model"]["image_size"], jitter=jitter)
    pictures = []
    for i, (example,) in enumerate(tqdm(rows, desc="drawing", disable=None, leave=False)):
        image = read_image(example.image, example.size, example.where)
        height, width = image.shape[1:]
        boxes = clip_boxes(example.boxes, width, height) / torch.tensor([width, height, width, height])
        pictures.append(draw(image, {"truth": boxes}, example.expression))
        seen, _, moved, *_ = dataset[0, i]
        text, cut = tokenizer.seen(example.expression, config["data"]["max_tokens"])
        if cut:
            tqdm.write(f"{example.where}: {example.expression!r} is cut after {text!r} (data.max_tokens)")
        caption = f"...{text[-36:]} [cut]" if cut else text
        pictures.append(draw(seen, {"truth": box_convert(moved, "cxcywh", "xyxy")}, caption))
    tile(pictures, path, columns=6)
    print(f"{path}: {len(rows)} examples of {split}, each before and after augmentation and resizing")


INK = {"truth": "lime", "decoder": "orange", "token": "deepskyblue"}


def draw(image: Tensor, boxes: dict[str, Tensor], caption: str, side: int = 280) -> Image.Image:
    """image (3, H, W) uint8 and {"truth" | "decoder" | "token": (n, 4) xyxy in 0..1} -> a captioned picture."""
    height, width = (max(1, round(side * length / max(image.shape[1:]))) for length in image.shape[1:])
    page = Image.new("RGB", (side, height + 32))
    page.paste(to_pil_image(resize(image, height, width)))
    pen = ImageDraw.Draw(page)
    pen.text((3, height + 2), caption[: side // 6], fill="white")
    for i, (name, each) in enumerate(boxes.items()):
        for box in (each * torch.tensor([width, height, width, height])).long().tolist():
            pen.rectangle(box, outline=INK[name], width=2)
        pen.text((3 + 60 * i, height + 17), name, fill=INK[name])
    return page


def tile(pictures: Sequence[Image.Image], path: str | Path, columns: int) -> None:
    """Save pictures side by side as one page."""
    width, height = max(p.width for p in pictures) + 4, max(p.height for p in pictures) + 4
    page = Image.new("RGB", (columns * width, math.ceil(len(pictures) / columns) * height))
    for i, picture in enumerate(pictures):
        page.paste(picture, (i % columns * width, i // columns * height))
    page.save(path)


# ------------------------------------------------------------------------------------- other annotation layouts

# How other projects write a row: the keys of image, of the expressions and of the boxes, and the form of a box.
LAYOUTS = (
    ("image", "sent", "bbox", "xyxy"),  # Qwen-VL, InternVL
    ("image", "normal_caption", "solution", "xyxy"),  # VLM-R1; null = no target
    ("img_path", "expression", "bbox", "xyxy"),  # Shikra, ASM
    ("file_name", "expression", "bbox", "xywh"),
    ("file_name", "expression", "bbox_xyxy", "xyxy"),
    ("file_name", "expression", "boxes_xyxy", "xyxy"),
    ("file_name", "expressions", "boxes", "xywh"),  # made by the readers of the layouts that keep boxes elsewhere
)
PLURAL = ("expressions", "boxes", "boxes_xyxy")  # these keys hold a list, the others one expression or one box
SPLITS = {split.lower(): split for split in ("train", "val", "test", "testA", "testB", "trainval")}


def convert(sources: Sequence[str], to: str, published: str | None) -> None:
    """Write foreign annotation files as JSON Lines, a file a split, all of them or none; print what came out.

    In the training split the expressions of one object (in gRefCOCO: of one image) share a row, since a training
    epoch draws one of them; in the others every expression has its own row. None is dropped, not even repeats.
    """
    folder, known = Path(to).parent, read_json(Path(__file__).with_name("configs.json"))["published-sizes"]
    if published and published not in known:
        raise InputError(f"--published {published}: there are: {', '.join(known)}")
    if "{split}" not in Path(to).name or "{split}" in str(folder):
        raise InputError(f"--to {to}: expected {{split}} in the name, such as data/annotations/refcoco/{{split}}.jsonl")
    folder.mkdir(parents=True, exist_ok=True)
    splits: dict[str, dict[tuple, list[Example]]] = {}  # split -> key of a row -> its examples
    for split, key, example in chain.from_iterable(map(read_foreign, map(Path, sources))):
        rows = splits.setdefault(split, {})
        rows.setdefault(key if split == "train" else (*key, len(rows)), []).append(example)
    if not splits:
        raise InputError(f"{', '.join(sources)}: no expression in there")
    folders = {os.path.dirname(key[0]) for rows in splits.values() for key in rows if isinstance(key[0], str)}
    shared = ""  # the deepest folder that holds all images; their names are written relative to it
    with suppress(ValueError):  # where there are no names, or some are absolute and others are not
        shared = os.path.commonpath(folders)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for split, rows in splits.items():
            target = Path(to.replace("{split}", split))
            if target.exists():
                raise InputError(f"{target}: is there already, nothing was written")
            with open(Path(scratch) / target.name, "w", encoding="utf-8") as file:
                for (image, source, *_), examples in rows.items():
                    row = {"image": os.path.relpath(image, shared) if shared and isinstance(image, str) else image}
                    row["expressions"] = [each.expression for each in examples]
                    boxes = [each.boxes for each in examples]
                    row["boxes"] = boxes[0] if all(own == boxes[0] for own in boxes) else boxes
                    row |= zip(("width", "height"), examples[0].size or (), strict=False)
                    row |= {"source": source} if source else {}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        for written in Path(scratch).iterdir():
            written.replace(folder / written.name)
    table = {split: counts(list(rows.values())) for split, rows in splits.items()}
    print_table(table)
    for split, sizes in known.get(published, {}).items():
        if split in table:
            differences = (f"{name.strip('- ')} {table[split][name] - size:+,}" for name, size in sizes.items())
            print(f"{split} less the published sizes: {', '.join(differences)}")
    print("\n".join(to.replace("{split}", split) for split in splits))
    if shared:
        print(f"image names start inside {shared}, the folder that all share")


def read_foreign(path: Path) -> Iterator[tuple[str, tuple, Example]]:
    """(split, key, Example) for every expression in a file of any known layout, told by the file's name and content.

    The key starts with the image and its source; in training the expressions of one key share a row. InputError names
    file and row. To add a layout, add a line to `LAYOUTS` or a branch to `_dictionary`.
    """
    items, coco = _items(path)
    for where, split, item in tqdm(items, desc=path.name, disable=None, leave=False):
        with located(where):
            key, item = _dictionary(json.loads(item) if isinstance(item, bytes) else item, coco)
            row = _own(item)
            split = split or item.get("split") or SPLITS.get(re.split(r"[^A-Za-z]", path.stem)[-1].lower())
            if not isinstance(split, str) or not re.fullmatch(r"\w+", split):
                example = f"refcoco_testA{path.suffix}"
                raise InputError(f"expected a split, as in {example} or in the row, not {brief(split)}")
            source = row.get("source") or None
            examples = _row({**row, "source": source}, where, {"images": "{}", "sources": {source: "{}"}})
            key = (row["image"], source, path, examples[0].size, where if key is None else str(key))
            several = re.fullmatch("test([A-C]{2,})", split)  # in refclef an object can be in several splits
            for name in [f"test{letter}" for letter in several[1]] if several else [split]:
                yield from ((name, key, example) for example in examples)


def _items(path: Path) -> tuple[Iterable[tuple[str, str | None, object]], COCO | None]:
    """(where, split if known, item) of every item of a foreign file, and the COCO set that they refer to, if any."""
    if path.suffix == ".jsonl":
        return ((where, None, line) for where, line in json_lines(path)), None
    if path.suffix in (".p", ".pth"):
        with located(path), open(path, "rb") as file:
            for _ in range(4 if path.suffix == ".pth" else 1):  # before torch 1.6 a .pth held its object as fourth
                content = _PlainUnpickler(file, encoding="latin1").load()
    else:
        content = read_json(path)
    if isinstance(content, dict) and "images" in content:
        coco = _coco(path, content)
        return [(f"{path}: image {i}", None, image) for i, image in coco.imgs.items()], coco
    if isinstance(content, dict) and all(isinstance(rows, list) for rows in content.values()):
        rows = ((split, i, row) for split, rows in content.items() for i, row in enumerate(rows))
        return ((f"{path}: {split}[{i}]", split, row) for split, i, row in rows), None
    if not isinstance(content, list) or not content:
        raise InputError(f"{path}: holds no rows of a known layout")
    beside = path.parent / "instances.json"
    refers = isinstance(content[0], dict) and "ref_id" in content[0]
    first: dict[str, int] = {}  # the row of each ref_id
    for i, ref in enumerate(content if refers else ()):
        if isinstance(ref, dict) and first.setdefault(str(ref.get("ref_id")), i) != i:
            raise InputError(f"{path}: row {i}: ref_id {brief(ref.get('ref_id'))} repeats")
    rows = ((f"{path}: row {i}", None, row) for i, row in enumerate(content))
    return rows, _coco(beside, read_json(beside)) if refers else None


def _dictionary(item: dict | Sequence, coco: COCO | None) -> tuple[object, dict]:
    """The key of an item's row in training (None: it has a row of its own), and the item in one of the `LAYOUTS`."""
    if not isinstance(item, dict):  # TransVG: file, [object,] box, phrase, ...
        key, box, text = item[1:4] if len(item) > 3 else (None, *item[1:])
        form = "bbox" if item[0].startswith("COCO") else "bbox_xyxy"  # xywh for COCO's images, xyxy for the others
        return key, {"file_name": item[0], "expression": text, form: [float(v) for v in box]}
    if "sentences" in item:  # refer and gRefCOCO with the boxes in COCO's file, ReCLIP with all boxes of the image
        targets = coco.anns if coco else {target["id"]: target for target in item["anns"]}
        numbers = item["ann_id"] if isinstance(item["ann_id"], list) else [item["ann_id"]]
        boxes = [targets[number]["bbox"] for number in numbers if number != -1]
        about = {**coco.imgs[item["image_id"]], "split": item["split"]} if coco else item
        key = item["image_id"] if "no_target" in item else item.get("ref_id", item["ann_id"])  # gRefCOCO's: an image
        return key, {**about, "expressions": [sentence["sent"] for sentence in item["sentences"]], "boxes": boxes}
    if coco:  # MDETR: an image entry for each expression, whose boxes are annotations of that image
        targets = coco.imgToAnns[item["id"]]
        if not targets:
            raise InputError("has no annotation")
        key = item.get("original_id", item["id"])
        if "empty" not in targets[0]:  # a mark of gRefCOCO's, where a row is an image
            key = key, targets[0].get("original_id", targets[0]["id"])
        boxes = [target["bbox"] for target in targets if target["category_id"] != -1]
        return key, {**item, "expressions": item.get("expressions") or [item["caption"]], "boxes": boxes}
    return [item.get(layout[2]) for layout in LAYOUTS], item  # expressions of the same boxes share a row


def _own(item: dict) -> dict:
    """A dictionary in one of the `LAYOUTS` -> a row of our own."""
    layout = next((layout for layout in LAYOUTS if item.keys() >= set(layout[:3])), None)
    if layout is None and {"image_id", "bbox", "expressions"} <= item.keys():  # SeqTR's and SimVG's instances.json
        return _official(item)
    if layout is None:
        raise InputError(f"has the keys {', '.join(item):.200}, which is no known layout")
    texts, boxes = (item[key] if key in PLURAL else [item[key]] for key in layout[1:3])
    if boxes == [None]:  # no target
        boxes = []
    if layout[3] == "xyxy":  # rounded, because 596.87 - 303.58 should be 293.29, not 293.28999999999996
        boxes = [[x1, y1, round(x2 - x1, 6), round(y2 - y1, 6)] for x1, y1, x2, y2 in boxes]
    size = {side: item[side] for side in ("width", "height") if side in item}
    return {"image": item[layout[0]], "expressions": texts, "boxes": [boxes] * len(texts), **size}


def _coco(path: Path, content: dict) -> COCO:
    """The contents of a COCO file, indexed by pycocotools."""
    coco = COCO()
    coco.dataset = content
    with located(path), redirect_stdout(io.StringIO()):
        coco.createIndex()
        for kind, by_id in {"images": coco.imgs, "annotations": coco.anns}.items():
            if len(by_id) != len(content[kind]):  # pycocotools keeps only the last of them
                raise InputError(f"ids of {kind} repeat")
        if unknown := coco.imgToAnns.keys() - coco.imgs.keys():
            raise InputError(f"has annotations of an image {brief(list(unknown)[0])} that it does not list")
    return coco


class _PlainUnpickler(pickle._Unpickler):  # the one in C takes as much memory as a forged number says
    """Reads containers, numbers, strings and numpy arrays. Whatever else a pickle wants to call is refused."""

    def find_class(self, module: str, name: str) -> object:
        numbers = {kind: np.dtype(kind) for kind in ("i4", "i8", "f4", "f8")}  # numpy would crash on some forged types
        # A copy, because what follows in the pickle sets its byte order.
        allowed = {"dtype": lambda kind, *_: np.dtype(numbers[kind], copy=True), "ndarray": np.ndarray}
        allowed |= {"_reconstruct": np._core.multiarray._reconstruct, "encode": str.encode}
        if module.startswith(("numpy", "_codecs")) and name in allowed:
            return allowed[name]
        raise pickle.UnpicklingError(f"it would call {module}.{name}")


# ------------------------------------------------------------------------------------- the embedded shapes set

COLORS = dict(red="d62728", green="2ca02c", blue="1f50c8", yellow="f0d228", purple="943cbd", orange="ff7f0e")
SHAPES = ("circle", "ring", "triangle", "cross")
SCENE_SIZE = 96  # pixels
# The numbers of things in a scene of training, and of val and test. Easy scenes in training speed it up a lot.
SCENE_SETS = {"shapes": ((1, 2, 3, 4), (3, 4)), "shapes-grec": ((1, 2, 3), (2, 3))}
KINDS = ("attribute", "superlative", "relation")
# superlative -> what is compared, +1 for the highest or -1 for the lowest value, and by how much it must win
SUPERLATIVES = dict(leftmost=("x", -1, 0.08), rightmost=("x", 1, 0.08), topmost=("y", -1, 0.08))
SUPERLATIVES |= dict(bottommost=("y", 1, 0.08), largest=("side", 1, 0.05), smallest=("side", -1, 0.05))
RELATIONS = {"left of": ("x", -1), "right of": ("x", 1), "above": ("y", -1), "below": ("y", 1)}


class Thing(NamedTuple):
    color: str
    shape: str
    x: float  # of its centre; all lengths are parts of the image's side
    y: float
    side: float


def make_embedded_set(settings: dict) -> None:
    """Draw the shapes set on first use, unless annotations or tokenizer were set to files outside its folder."""
    folder, wanted = Path(settings["annotations"]).parent, settings["scenes"]
    if not settings["generate"] or folder != Path(settings["tokenizer"]).parent:
        return
    if wanted and not folder.exists():
        make_shapes(folder, wanted, settings["generate"])
    if (scenes := len(list((folder / "images").glob("train_*.jpg")))) != wanted:
        raise InputError(f"{folder}: holds a set of {scenes} scenes, not data.scenes={wanted}; move it away first")


def make_shapes(folder: Path, scenes: int, set_name: str, show: bool = True) -> None:
    """Write the set `set_name`: train, val and test .jsonl, images/*.jpg and shapes.spm; all of it or nothing.

    `scenes` are those of train; val and test hold 2,000 expressions (fewer with few scenes).
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        _draw_set(Path(scratch) / "set", scenes, set_name, show)
        if not folder.exists():  # another process may have been faster
            (Path(scratch) / "set").rename(folder)


def _draw_set(folder: Path, scenes: int, set_name: str, show: bool) -> None:
    """The files of `make_shapes`."""
    (folder / "images").mkdir(parents=True)
    rows: dict[str, list[dict]] = {"train": [], "val": [], "test": []}
    in_training, in_others = SCENE_SETS[set_name]
    for split, of_split in rows.items():
        training, scene = split == "train", 0
        wanted, numbers = (scenes, in_training) if training else (min(2000, scenes), in_others)
        with tqdm(total=wanted, desc=f"drawing {split}", disable=None if show else True, leave=False) as bar:
            while (scene if training else len(of_split)) < wanted:
                rng = random.Random(f"shapes/{split}/{scene}")  # every scene has a seed of its own
                image, things = draw_scene(rng, numbers)
                name = f"{split}_{scene:05d}.jpg"
                image.save(folder / "images" / name, quality=92, subsampling=0)
                new = _shapes_rows(things, name, set_name == "shapes-grec", rng)
                of_split += new if training else [{**row, "expressions": row["expressions"][:1]} for row in new]
                scene += 1
                bar.update(1 if training else len(new))
        lines = [json.dumps(row) + "\n" for row in (of_split if training else of_split[:wanted])]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    # 160 pieces are enough for every word of the phrases to be one piece.
    options = {"model_type": "bpe", "vocab_size": 160, "hard_vocab_limit": False, "minloglevel": 2}
    model, texts = io.BytesIO(), {text for row in rows["train"] for text in row["expressions"]}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(sorted(texts)), model_writer=model, **options)
    (folder / "shapes.spm").write_bytes(model.getvalue())


def draw_scene(rng: random.Random, numbers: Sequence[int]) -> tuple[Image.Image, list[Thing]]:
    """A grey square with some things (as many as one of `numbers`) that do not overlap and often look alike."""
    things: list[Thing] = []
    wanted, tries = rng.choice(numbers), 0
    while len(things) < wanted and tries < 200:
        tries += 1
        side = rng.uniform(0.28, 0.46)
        x, y = rng.uniform(side / 2, 1 - side / 2), rng.uniform(side / 2, 1 - side / 2)
        if any(max(abs(x - t.x), abs(y - t.y)) < (side + t.side) / 2 + 0.01 for t in things):
            continue
        color = rng.choice(things).color if things and rng.random() < 0.3 else rng.choice(list(COLORS))
        shape = rng.choice(things).shape if things and rng.random() < 0.3 else rng.choice(SHAPES)
        things.append(Thing(color, shape, x, y, side))
    fine = 2 * SCENE_SIZE  # drawn at twice the size, then halved: smooth edges
    grey = (rng.randint(90, 170),) * 3
    image = Image.new("RGB", (fine, fine), grey)
    pen = ImageDraw.Draw(image)
    for thing in things:
        x, y, r = thing.x * fine, thing.y * fine, thing.side * fine / 2
        color = tuple(max(0, min(255, c + rng.randint(-20, 20))) for c in bytes.fromhex(COLORS[thing.color]))
        if thing.shape == "triangle":
            pen.polygon([(x - r, y + r), (x, y - r), (x + r, y + r)], fill=color)
        elif thing.shape == "cross":
            pen.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=color)
            pen.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=color)
        else:
            pen.ellipse((x - r, y - r, x + r, y + r), fill=color)
        if thing.shape == "ring":
            pen.ellipse((x - r / 2, y - r / 2, x + r / 2, y + r / 2), fill=grey)
    return image.reduce(2), things


def _shapes_rows(things: list[Thing], image: str, grec: bool, rng: random.Random) -> list[dict]:
    """Up to three rows for a scene, one of each kind; in gREC each draws none, one or several targets first."""
    rows = []
    for kind in KINDS:
        # 2 stands for several; a scene always has phrases for none, so none is drawn less often
        count = rng.choices((0, 1, 2), (1, 2, 2))[0] if grec else 1
        found = [(text, named) for text, named in phrases(things, kind) if min(len(named), 2) == count]
        if not found:
            continue
        named = rng.choice(sorted({tuple(named) for _, named in found}))
        texts = [text for text, same in found if tuple(same) == named]
        row = {"image": image, "expressions": rng.sample(texts, min(3, len(texts)))}
        corners = [(things[i].x - things[i].side / 2, things[i].y - things[i].side / 2, things[i].side) for i in named]
        row["boxes"] = [[round(v * SCENE_SIZE, 2) for v in (x, y, side, side)] for x, y, side in corners]
        rows.append({**row, "width": SCENE_SIZE, "height": SCENE_SIZE, "kind": kind})
    return rows


def phrases(things: list[Thing], kind: str) -> list[tuple[str, list[int]]]:
    """Every unambiguous expression of one kind about a scene -> (expression, numbers of the things it names).

    attribute: what a thing looks like; superlative: the winner of a group; relation: where it lies from another.
    Groups without any thing are named as well: in gREC they are the expressions without a target.
    """
    groups = []
    for color, shape in product((None, *COLORS), (None, *SHAPES)):
        members = [i for i, t in enumerate(things) if color in (None, t.color) and shape in (None, t.shape)]
        groups.append((" ".join(filter(None, (color, shape or "object"))), members))
    found = []
    if kind == "attribute":
        found = [(f"the {words}", members) for words, members in groups if words != "object"]
    elif kind == "superlative":
        for (words, members), (name, (what, sign, margin)) in product(groups, SUPERLATIVES.items()):
            order = sorted(members, key=lambda i: -sign * getattr(things[i], what))
            values = [getattr(things[i], what) for i in order[:2]]
            if not order or len(order) > 1 and abs(values[0] - values[1]) > margin:
                found.append((f"the {name} {words}", order[:1]))
    else:
        anchors = [(words, members[0]) for words, members in groups if len(members) == 1 and " " in words]
        for (anchor_words, anchor), (words, members) in product(anchors, groups):
            others = [i for i in members if i != anchor]
            for name, (what, sign) in RELATIONS.items():
                offsets = [sign * (getattr(things[i], what) - getattr(things[anchor], what)) for i in others]
                if len(others) != 1 and all(abs(offset) > 0.06 for offset in offsets):
                    named = [i for i, offset in zip(others, offsets, strict=True) if offset > 0]
                    found.append((f"the {words} {name} the {anchor_words}", named))
    return found


def with_wrong_boxes(rows: Sequence[Row], share: float, seed: int) -> list[Row]:
    """About this share of the rows with a target, chosen by the seed, gets one wrong box in place of its own: that of
    another row of the image or, where there is none, its first one moved and scaled (a few still overlap it)."""
    if not share:
        return list(rows)
    of_image: dict[str, set[Box]] = {}
    for row in rows:
        of_image.setdefault(row[0].image, set()).update(row[0].boxes)
    noisy = []
    for index, row in enumerate(rows):
        rng, right = random.Random(f"noise/{seed}/{index}"), row[0].boxes
        if right and rng.random() < share:
            side = min(SCENE_SIZE, right[0][2] * rng.uniform(0.6, 1.4))
            moved = (rng.uniform(0, SCENE_SIZE - side), rng.uniform(0, SCENE_SIZE - side), side, side)
            wrong = rng.choice(sorted(of_image[row[0].image] - set(right)) or [moved])
            row = tuple(replace(example, boxes=(wrong,)) for example in row)
        noisy.append(row)
    return noisy


# -------------------------------------------------------------------------------------------------- the program

CONVERT = """Annotations of other projects, checked row by row, to JSON Lines, one file a split. The layout is told by
name and content: refer's refs(*).p and gRefCOCO's grefs(*).json (with instances.json beside them), MDETR's
finetune_*.json, TransVG's *.pth, SeqTR's instances.json, and the flat lines or lists of Qwen-VL, InternVL, Shikra,
VLM-R1 and ReCLIP."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Annotations: convert other layouts, check them, look at them.")
    jobs = parser.add_subparsers(dest="job", required=True, metavar="convert | check | show")
    job = jobs.add_parser("convert", help="other layouts to JSON Lines", description=CONVERT)
    job.add_argument("sources", nargs="+", metavar="FILE", help="annotation files, told apart by name and content")
    job.add_argument("--to", required=True, metavar="PATTERN", help="such as data/annotations/mine/{split}.jsonl")
    job.add_argument("--published", metavar="SET", help="compare sizes with those published, such as refcoco")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", required=True, metavar="FILE:NAME", help="such as configs.json:refcoco")
    common.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="as data.images=DIR")
    job = jobs.add_parser("check", parents=[common], help="count what is there and name what is wrong")
    job.add_argument("--split", nargs="+", metavar="NAME", help="default: train and those the config evaluates")
    job.add_argument("--images", action="store_true", help="also decode every image")
    job = jobs.add_parser("show", parents=[common], help="a page of examples before and after augmentation")
    job.add_argument("--split", default="train", metavar="NAME", help="default: train")
    job.add_argument("-n", type=int, default=16, help="number of examples (default: 16)")
    job.add_argument("--save", default="examples.png", metavar="FILE", help="default: examples.png")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.job == "convert":
        return convert(args.sources, args.to, args.published)
    if args.job == "show":  # before the config, because that may draw the embedded set
        file = Path(args.save)
        if file.suffix not in (".png", ".jpg") or file.is_dir() or not file.absolute().parent.is_dir():
            raise InputError(f"--save {file}: expected a file that ends in .png or .jpg, in a folder that is there")
        if not 1 <= args.n <= 600:
            raise InputError(f"-n {args.n}: expected 1 to 600 examples")
    config = load_config(args.config, args.set)
    make_embedded_set(config["data"])
    if args.job == "check":
        check(config, args.split or ["train", *config["data"]["eval_splits"]], args.images)
    else:
        show(config, args.split, args.n, args.save)


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line that says what, where, and what was expected."""

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))  # names hold anything


def run(main: Callable[[], None], *others: type[Exception]) -> None:
    """Run the main of a program. Bad input (InputError and `others`) is one line and status 2, Ctrl-C status 130."""
    if sys.stdout:  # it is None where it was closed
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)  # file names need not fit the terminal
    status = 2
    try:
        main()
        return
    except KeyboardInterrupt:
        sys.exit(130)
    except (InputError, *others) as error:
        message = str(error)
        if os.environ.get("RANK", "0") != "0":
            time.sleep(2)  # ranks mostly meet the same fault: the first one says it, and torchrun ends the others
    except OSError as error:  # a full disk, a folder that may not be written, ...
        message = f"{error.filename or 'a file'}: {error.strerror or error}"
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # if it is stdout, Python would fail to write to it again at exit
    except RuntimeError as error:  # NCCL raises DistErrors, gloo's errors are known by their words
        if not isinstance(error, torch.distributed.DistError) and not re.search("(closed|reset) by peer", str(error)):
            raise
        message, status = f"rank {os.environ.get('RANK')}: another rank is gone", 1
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    run(main)
