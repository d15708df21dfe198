"""Everything that is read from the user's disk: configs, annotations, images, text; and the embedded shapes set.

    row  {"image", "expressions", "boxes"} of a JSON Lines file, or an official instances.json
      -> Row -> Example (uint8 image, expression, boxes) -> augment, resize -> Batch (padded tensors)

Whatever is drawn at random is a function of (seed, epoch, index), so that ranks, workers and restarts change nothing.
"""

import difflib
import io
import json
import math
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.ops import box_convert
from tqdm import tqdm

MAX_PIXELS = 50_000_000  # a larger image is refused before it is decoded
ORIENTATION = 0x0112  # the EXIF tag
Box = tuple[float, float, float, float]  # x, y, w, h in pixels of the original image


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line that says what, where, and what was expected."""


def run(main: Callable[[], None]) -> None:
    """Run a program's main: one line and exit status 2 for bad input, no traceback on Ctrl-C."""
    try:
        main()
    except InputError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(2)  # ranks mostly fail alike: the first one says it, and torchrun ends the others meanwhile
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def nearest(word: str, words: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.4)
    return f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(sorted(words))}"


# ----------------------------------------------------------------------------------------------------- configs

# keys that may also be null: there is no such term, step or augmentation
OPTIONAL = ("loss_decoder", "loss_token_on_truth", "loss_token_on_teacher", "decay_epochs", "jitter")


def load_config(spec: str, overrides: Sequence[str] = ()) -> dict:
    """`configs.json:refcoco` and `["train.lr=1e-4"]` -> {"model": {...}, "data": {...}, "train": {...}}.

    A config is the fragment `default`, then the fragments its name stands for, then the overrides, whose values
    are JSON or else a string. `default` is the schema. InputError for an unknown name or key, or another type.
    """
    path, _, name = spec.rpartition(":")
    if not path:
        raise InputError(f"--config {spec}: expected FILE:NAME, such as configs.json:shapes")
    try:
        entries = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from None
    if name not in entries:
        raise InputError(f"{path}: there is no config {name!r}; {nearest(name, list(entries))}")
    config = {section: dict(keys) for section, keys in entries["default"].items()}
    for fragment in _fragments(entries, name):
        for section, keys in entries[fragment].items():
            for key, value in keys.items():
                _set(config, f"{path}:{fragment}", f"{section}.{key}", value)
    override_config(config, overrides)
    return config


def override_config(config: dict, overrides: Sequence[str]) -> None:
    """Change a config in place: `section.key=value`, the value being JSON or else a string."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise InputError(f"--set {override}: expected section.key=value")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        _set(config, "--set", key, value)


def _fragments(entries: dict, name: str) -> Iterator[str]:
    if isinstance(entries[name], dict):
        yield name
        return
    for part in entries[name]:
        yield from _fragments(entries, part)


def _set(config: dict, where: str, key: str, value: object) -> None:
    section, _, leaf = key.partition(".")
    known = [f"{s}.{k}" for s, keys in config.items() for k in keys]
    if key not in known:
        raise InputError(f"{where}: unknown key {key!r}; {nearest(key, known)}")
    old = config[section][leaf]
    wanted = {bool: (bool,), int: (int,), float: (float, int), type(None): (int, float, list)}.get(
        type(old), (type(old),)
    )
    right = isinstance(value, wanted) and (isinstance(value, bool) == isinstance(old, bool))
    if not right and not (value is None and leaf in OPTIONAL):
        kinds = {bool: "true or false", int: "an integer", float: "a number", str: "a string", list: "a list"}
        kinds |= {dict: "an object", type(None): "a number or a list"}
        raise InputError(f"{where}: {key} must be {kinds[type(old)]}, not {value!r}")
    config[section][leaf] = float(value) if isinstance(old, float) and value is not None else value


# ------------------------------------------------------------------------------------------------- annotations


@dataclass(frozen=True, slots=True)
class Row:
    """One referred object (or set of objects) of one image, with every expression that names it."""

    image: str  # path of the file
    choices: tuple[tuple[str, tuple[Box, ...]], ...]  # (expression, its boxes); no box = no target
    size: tuple[int, int] | None  # width, height, where the annotation states them
    kind: str  # a label to report accuracy by, may be empty
    where: str  # "file:line", for messages


def read_rows(data: dict, split: str) -> list[Row]:
    """The rows of one split. `data` is that section of a config; its `annotations` names either a JSON Lines file
    with {split} in its name or an official instances.json, which holds every split.

    InputError names file and line of a malformed row.
    """
    path = Path(data["annotations"].replace("{split}", split))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if path.suffix == ".json":
        try:
            splits = json.loads(text)
        except ValueError as error:
            raise InputError(f"{path}: is not JSON: {error}") from None
        if not isinstance(splits, dict) or split not in splits:
            have = ", ".join(splits) if isinstance(splits, dict) else "no splits"
            raise InputError(f"{path}: there is no split {split!r}, it holds: {have}")
        rows = [_official_row(row, f"{path}: {split}[{i}]", data) for i, row in enumerate(splits[split])]
    else:
        lines = enumerate(text.split("\n"), 1)
        rows = [_json_row(line, f"{path}:{number}", data) for number, line in lines if line.strip()]
    if not rows:
        raise InputError(f"{path}: holds no row of split {split!r}")
    return rows


def _json_row(line: str, where: str, data: dict) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: is not JSON: {error}") from None
    if not isinstance(row, dict) or not {"image", "expressions", "boxes"} <= row.keys():
        raise InputError(f'{where}: expected an object with "image", "expressions" and "boxes"')
    if not isinstance(row["image"], str) or not isinstance(row["boxes"], list):
        raise InputError(f'{where}: "image" must be a file name and "boxes" a list of [x, y, w, h]')
    if not isinstance(row["expressions"], list) or not row["expressions"]:
        raise InputError(f'{where}: "expressions" must be a list of one or more strings')
    choices = [(expression, row["boxes"]) for expression in row["expressions"]]
    return _checked_row(row, row["image"], choices, row.get("source"), where, data)


def _official_row(row: dict, where: str, data: dict) -> Row:
    """A row of SeqTR's and SimVG's instances.json. In gRefCOCO's, boxes[i] are those of expressions[i], and a
    no-target expression has the category -1."""
    try:
        image, boxes = int(row["image_id"]), row["bbox"]
        if "annotations" in row:
            choices = [
                (expression, [box for box, target in zip(each, targets, strict=True) if target["category_id"] != -1])
                for expression, each, targets in zip(row["expressions"], boxes, row["annotations"], strict=True)
            ]
        else:
            choices = [(expression, [boxes]) for expression in row["expressions"]]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where}: is not a row of instances.json: {type(error).__name__} {error}") from None
    if not choices:
        raise InputError(f"{where}: has no expression")
    return _checked_row(row, image, choices, row.get("data_source"), where, data)


def image_path(pattern: str, image: str | int) -> str:
    """`folder/COCO_train2014_{:012d}.jpg` and a number, or a folder (or such a pattern) and a file name -> a path."""
    if isinstance(image, int):
        return pattern.format(image)
    return os.path.join(os.path.dirname(pattern) if "{" in pattern else pattern, image)


def _checked_row(row: dict, image: str | int, choices: list, source: str | None, where: str, data: dict) -> Row:
    if source is not None and source not in data["sources"]:
        raise InputError(f"{where}: source {source!r} has no folder in data.sources")
    size = row.get("width"), row.get("height")
    if size == (None, None):
        size = None
    elif not all(isinstance(side, int) and side > 0 for side in size):
        raise InputError(f"{where}: width and height must be positive integers, not {size}")
    for expression, boxes in choices:
        if not isinstance(expression, str) or not clean(expression).strip():
            raise InputError(f"{where}: an expression must be a text with at least one word, not {expression!r}")
        for box in boxes:
            check_box(box, size, where)
    pattern = data["images"] if source is None else data["sources"][source]
    choices = tuple((expression, tuple(tuple(map(float, box)) for box in boxes)) for expression, boxes in choices)
    return Row(image_path(pattern, image), choices, size, str(row.get("kind", "")), where)


def check_box(box: object, size: tuple[int, int] | None, where: str) -> None:
    """InputError unless box is [x, y, w, h] with an area and inside the image (2 pixels of slack)."""
    numbers = isinstance(box, (list, tuple)) and len(box) == 4
    if not numbers or not all(type(v) in (int, float) and math.isfinite(v) for v in box):
        raise InputError(f"{where}: a box must be [x, y, w, h] in pixels, not {box}")
    x, y, w, h = box
    if w <= 0 or h <= 0:
        raise InputError(f"{where}: box {list(box)} has no area (expected [x, y, w, h] in pixels)")
    if size and (x < -2 or y < -2 or x + w > size[0] + 2 or y + h > size[1] + 2):
        raise InputError(
            f"{where}: box {list(box)} lies outside the image of {size[0]} x {size[1]} pixels (expected [x, y, w, h])"
        )


def check_files(rows: Sequence[Row]) -> None:
    """InputError unless every image is there, opens, and has the size that its row states. Pixels are not decoded."""
    images = {row.image: row for row in rows}
    missing = [row for row in images.values() if not os.path.isfile(row.image)]
    if missing:
        raise InputError(
            f"{missing[0].where}: there is no image {missing[0].image} ({len(missing)} of {len(images)} are missing)"
        )
    for row in images.values():
        open_image(row.image, row.size, row.where).close()


def expand(rows: Sequence[Row]) -> list[Row]:
    """One row per expression, in order: what evaluation walks through."""
    return [replace(row, choices=(choice,)) for row in rows for choice in row.choices]


# -------------------------------------------------------------------------------------------------------- text


def clean(text: str) -> str:
    """The official cleaning: lower case, punctuation dropped, - and / as blanks."""
    return re.sub(r"[.,'!?\"()*#:;]", "", text.lower()).replace("-", " ").replace("/", " ")


class Tokenizer:
    """XLM-RoBERTa's ids on a sentencepiece model: <s> 0, <pad> 1, </s> 2, <unk> 3, any other piece its number + 1."""

    def __init__(self, path: str | Path):
        if not Path(path).is_file():
            raise InputError(f"{path}: there is no such tokenizer (for BEiT-3 it is beit3.spm)")
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise InputError(f"{path}: is not a sentencepiece model: {error}") from None
        self.vocab_size = self.model.vocab_size() + 1  # one id past the last piece

    def __call__(self, texts: Sequence[str], max_tokens: int = 20) -> tuple[Tensor, Tensor]:
        """Texts -> tokens (B, L) int64, text_pad (B, L) bool, True = padding; L = max_tokens. Longer texts are cut."""
        tokens = torch.ones(len(texts), max_tokens, dtype=torch.int64)
        for row, text in zip(tokens, texts, strict=True):
            pieces = self.model.encode(clean(text))[: max_tokens - 2]
            ids = [0, *(piece + 1 if piece else 3 for piece in pieces), 2]
            row[: len(ids)] = torch.tensor(ids)
        return tokens, tokens == 1


# ------------------------------------------------------------------------------------------------------ images


def open_image(path: str, size: tuple[int, int] | None = None, where: str = "") -> Image.Image:
    """An image file with its header read and checked; `size` is what the row says, (width, height)."""
    where = where or path
    try:
        file = Image.open(path)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{where}: cannot read the image {path}: {image_fault(error)}") from None
    width, height = file.size
    if file.getexif().get(ORIENTATION, 1) >= 5:  # to be turned by a quarter
        width, height = height, width
    if width * height > MAX_PIXELS:
        raise InputError(f"{where}: image {path} has {width} x {height} pixels, more than {MAX_PIXELS:,}")
    if size and size != (width, height):
        raise InputError(f"{where}: image {path} is {width} x {height}, the row says {size[0]} x {size[1]}")
    return file


def image_fault(error: Exception) -> str:
    return getattr(error, "strerror", None) or "damaged, cut off or no image"


def read_image(path: str, size: tuple[int, int] | None = None, where: str = "") -> Tensor:
    """An image file -> (3, H, W) uint8 RGB, turned upright as EXIF says."""
    with open_image(path, size, where) as file:
        try:
            image = ImageOps.exif_transpose(file).convert("RGB")
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"{where or path}: cannot read the image {path}: {image_fault(error)}") from None
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, H, W)


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """(3, H, W) uint8 -> (3, height, width), bilinear without antialias, as OpenCV does it, up to 1 grey level."""
    return F.interpolate(image[None], size=(height, width), mode="bilinear", align_corners=False)[0]


def jitter(image: Tensor, boxes: Tensor, limits: tuple[float, float], long_side: int, rng: random.Random):
    """Large-scale jitter: image (3, H, W), boxes (n, 4) xyxy pixels -> the same, other sizes.

    The scale s is uniform in `limits`. s <= 1 shrinks the image to s * long_side (a blur, since it is resized
    again); s > 1 cuts out a window of 1/s of each side that keeps at least half of every box, and the whole image
    stays where no window was found (D5).
    """
    scale = rng.uniform(*limits)
    height, width = image.shape[1:]
    if scale <= 1:
        factor = scale * long_side / max(height, width)
        new_height, new_width = (max(1, int(side * factor + 0.5)) for side in (height, width))
        return resize(image, new_height, new_width), boxes * boxes.new_tensor(
            [new_width / width, new_height / height] * 2
        )
    crop_height, crop_width = max(1, round(height / scale)), max(1, round(width / scale))
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    for threshold in (0.9, 0.8, 0.7, 0.6, 0.5):
        for _ in range(20):
            x, y = rng.randint(0, width - crop_width), rng.randint(0, height - crop_height)
            kept = boxes - torch.tensor([x, y, x, y])
            kept = torch.stack([kept[:, 0::2].clamp(0, crop_width), kept[:, 1::2].clamp(0, crop_height)], 2).flatten(1)
            if ((kept[:, 2:] - kept[:, :2]).prod(1) >= threshold * area).all():
                return image[:, y : y + crop_height, x : x + crop_width], kept
    return image, boxes


# ----------------------------------------------------------------------------------------------------- batches


class Batch(NamedTuple):
    images: Tensor  # (B, 3, S, S) uint8
    tokens: Tensor  # (B, L) int64
    text_pad: Tensor  # (B, L) bool, True = padding
    boxes: Tensor  # (B, M, 4) cxcywh in 0..1
    box_mask: Tensor  # (B, M) bool, True = a real box
    index: list[int]  # the examples' numbers in their dataset

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in self))


class Dataset:
    """Rows as examples. An example is asked for by (epoch, index), which fixes all its random choices."""

    def __init__(self, rows: Sequence[Row], image_size: int, seed: int = 0, jitter: Sequence[float] | None = None):
        self.rows, self.image_size, self.seed, self.jitter = rows, image_size, seed, jitter

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, str, Tensor, int]:
        """(image (3, S, S) uint8, expression, boxes (n, 4) cxcywh in 0..1, index)."""
        epoch, index = key
        rng = random.Random(f"{self.seed}/{epoch}/{index}")
        row = self.rows[index]
        expression, xywh = row.choices[rng.randrange(len(row.choices))]
        image = read_image(row.image, row.size, row.where)
        height, width = image.shape[1:]
        if row.size is None:
            for box in xywh:
                check_box(box, (width, height), row.where)
        boxes = clip_boxes(xywh, width, height)  # (n, 4) xyxy
        if self.jitter:
            image, boxes = jitter(image, boxes, self.jitter, self.image_size, rng)
            height, width = image.shape[1:]
        boxes = box_convert(boxes, "xyxy", "cxcywh") / torch.tensor([width, height, width, height])
        return resize(image, self.image_size, self.image_size), expression, boxes.float(), index


def clip_boxes(xywh: Sequence[Box], width: int, height: int) -> Tensor:
    """xywh pixels -> (n, 4) xyxy float64, clipped to [0, width-1] x [0, height-1] as the official loader does."""
    boxes = box_convert(torch.tensor(xywh, dtype=torch.float64).reshape(-1, 4), "xywh", "xyxy")
    return torch.stack([boxes[:, 0::2].clamp(0, width - 1), boxes[:, 1::2].clamp(0, height - 1)], 2).flatten(1)


class Collate:
    """A list of examples -> Batch; an InputError in a worker process travels as a value and keeps its one line."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int):
        self.tokenizer, self.max_tokens = tokenizer, max_tokens

    def __call__(self, examples: list) -> Batch:
        images, expressions, boxes, index = zip(*examples, strict=True)
        most = max(1, *(len(each) for each in boxes))
        padded = torch.zeros(len(boxes), most, 4)
        for row, each in zip(padded, boxes, strict=True):
            row[: len(each)] = each
        mask = torch.arange(most) < torch.tensor([len(each) for each in boxes])[:, None]  # (B, M)
        return Batch(torch.stack(images), *self.tokenizer(expressions, self.max_tokens), padded, mask, list(index))


class _Guarded:
    """Fetches whole batches, so that an InputError comes back as a value (see `batches`)."""

    def __init__(self, dataset: Dataset, collate: Collate):
        self.dataset, self.collate = dataset, collate

    def __getitem__(self, keys: list[tuple[int, int]]) -> Batch | InputError:
        try:
            return self.collate([self.dataset[key] for key in keys])
        except InputError as error:
            return error


def batches(dataset: Dataset, collate: Collate, keys: Sequence, workers: int, pin: bool = False) -> Iterator[Batch]:
    """Batches of the examples `keys`, an iterable of lists of (epoch, index)."""
    loader = DataLoader(
        _Guarded(dataset, collate),
        sampler=keys,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
        generator=torch.Generator(),  # else the loader would draw from the global generator
    )
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield batch


class StepKeys:
    """The keys of one rank's micro-batches, step after step, epoch after epoch, from (epoch, step) on (D12).

    Each epoch walks through a permutation of all rows; its last batch is filled up from the permutation's start.
    """

    def __init__(self, rows: int, settings: dict, micro: int, start: tuple[int, int], rank: int, world: int):
        self.rows, self.micro, self.start = rows, micro, start
        self.batch, self.seed, self.epochs = (settings[name] for name in ("batch_size", "seed", "epochs"))
        self.share = slice(rank * self.batch // world, (rank + 1) * self.batch // world)
        self.steps = math.ceil(rows / self.batch)  # in an epoch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first_epoch, first_step = self.start
        for epoch in range(first_epoch, self.epochs):
            order = torch.randperm(
                self.rows, generator=torch.Generator().manual_seed(hash((self.seed, epoch)))
            ).tolist()
            for step in range(first_step if epoch == first_epoch else 0, self.steps):
                numbers = [order[i % self.rows] for i in range(step * self.batch, (step + 1) * self.batch)][self.share]
                for i in range(0, len(numbers), self.micro):
                    yield [(epoch, number) for number in numbers[i : i + self.micro]]


# ------------------------------------------------------------------------------------- the embedded shapes set

COLORS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 80, 200),
    "yellow": (240, 210, 40),
    "purple": (148, 60, 189),
    "orange": (255, 127, 14),
}
SHAPES = ("circle", "ring", "triangle", "cross")
SCENE_SIZE = 96  # pixels
# things in a scene, in training and in val and test; easy scenes in training speed it up a lot
COUNTS = {"shapes": ((1, 2, 3, 4), (3, 4)), "shapes-grec": ((1, 2, 3), (2, 3))}
KINDS = ("attribute", "superlative", "relation")
# superlative -> (what is compared, +1 for the highest or -1 for the lowest value, by how much it must win)
SUPERLATIVES = {
    "leftmost": ("x", -1, 0.08),
    "rightmost": ("x", 1, 0.08),
    "topmost": ("y", -1, 0.08),
    "bottommost": ("y", 1, 0.08),
    "largest": ("side", 1, 0.05),
    "smallest": ("side", -1, 0.05),
}
RELATIONS = {"left of": ("x", -1), "right of": ("x", 1), "above": ("y", -1), "below": ("y", 1)}


class Thing(NamedTuple):
    """One object of a scene: centre and side as parts of the image's side."""

    color: str
    shape: str
    x: float
    y: float
    side: float


def draw_scene(rng: random.Random, counts: Sequence[int]) -> tuple[Image.Image, list[Thing]]:
    """A grey square with some things (as many as one of `counts`) that do not overlap and often look alike."""
    things: list[Thing] = []
    wanted, tries = rng.choice(counts), 0
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
    grey = rng.randint(90, 170)
    image = Image.new("RGB", (fine, fine), (grey, grey, grey))
    pen = ImageDraw.Draw(image)
    for thing in things:
        x, y, r = thing.x * fine, thing.y * fine, thing.side * fine / 2
        color = tuple(max(0, min(255, c + rng.randint(-20, 20))) for c in COLORS[thing.color])
        if thing.shape == "triangle":
            pen.polygon([(x - r, y + r), (x, y - r), (x + r, y + r)], fill=color)
        elif thing.shape == "cross":
            pen.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=color)
            pen.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=color)
        else:
            pen.ellipse((x - r, y - r, x + r, y + r), fill=color)
        if thing.shape == "ring":
            pen.ellipse((x - r / 2, y - r / 2, x + r / 2, y + r / 2), fill=(grey, grey, grey))
    return image.reduce(2), things


def phrases(things: list[Thing], kind: str) -> list[tuple[str, list[int]]]:
    """Every unambiguous expression of one kind about a scene -> (expression, numbers of the things it names).

    attribute: what a thing looks like; superlative: the winner of a group; relation: where it lies from another.
    Groups without any thing are named as well: in gREC they are the expressions without a target.
    """
    groups = []
    for color in (None, *COLORS):
        for shape in (None, *SHAPES):
            words = " ".join(filter(None, (color, shape or "object")))
            members = [i for i, t in enumerate(things) if color in (None, t.color) and shape in (None, t.shape)]
            groups.append((words, members))
    if kind == "attribute":
        return [(f"the {words}", members) for words, members in groups if words != "object"]
    found = []
    if kind == "superlative":
        for words, members in groups:
            for name, (what, sign, margin) in SUPERLATIVES.items():
                order = sorted(members, key=lambda i: -sign * getattr(things[i], what))
                values = [getattr(things[i], what) for i in order[:2]]
                if len(order) != 1 and (not order or abs(values[0] - values[1]) > margin):
                    found.append((f"the {name} {words}", order[:1]))
        return found
    anchors = [(words, members[0]) for words, members in groups if len(members) == 1 and " " in words]
    for anchor_words, anchor in anchors:
        for words, members in groups:
            others = [i for i in members if i != anchor]
            for name, (what, sign) in RELATIONS.items():
                offsets = [sign * (getattr(things[i], what) - getattr(things[anchor], what)) for i in others]
                if len(others) != 1 and all(abs(offset) > 0.06 for offset in offsets):
                    named = [i for i, offset in zip(others, offsets, strict=True) if offset > 0]
                    found.append((f"the {words} {name} the {anchor_words}", named))
    return found


def _shapes_rows(things: list[Thing], image: str, grec: bool, rng: random.Random) -> list[dict]:
    """Up to three rows for a scene, one of each kind; in gREC each draws none, one or several targets first."""
    rows = []
    for kind in KINDS:
        found = phrases(things, kind)
        if grec:  # 2 stands for several; a scene always has phrases for none, so none is drawn less often
            count = rng.choices((0, 1, 2), (1, 2, 2))[0]
            found = [(text, named) for text, named in found if min(len(named), 2) == count]
        else:
            found = [(text, named) for text, named in found if len(named) == 1]
        if not found:
            continue
        named = rng.choice(sorted({tuple(named) for _, named in found}))
        texts = [text for text, same in found if tuple(same) == named]
        boxes = []
        for i in named:
            x, y, side = things[i].x - things[i].side / 2, things[i].y - things[i].side / 2, things[i].side
            boxes.append([round(v * SCENE_SIZE, 2) for v in (x, y, side, side)])
        row = {"image": image, "expressions": rng.sample(texts, min(3, len(texts))), "boxes": boxes}
        rows.append({**row, "width": SCENE_SIZE, "height": SCENE_SIZE, "kind": kind})
    return rows


def _shapes_split(folder: Path, split: str, wanted: int, kind: str, show: bool) -> list[dict]:
    """Draw the images of one split and return its rows: `wanted` scenes of train, expressions of val and test."""
    rows: list[dict] = []
    number = 0
    bar = tqdm(total=wanted, desc=f"drawing {split}", disable=None if show else True, leave=False)
    while (number if split == "train" else len(rows)) < wanted:
        rng = random.Random(f"shapes/{split}/{number}")  # every scene has a seed of its own
        image, things = draw_scene(rng, COUNTS[kind][split != "train"])
        name = f"{split}_{number:05d}.jpg"
        image.save(folder / "images" / name, quality=92, subsampling=0)
        new = _shapes_rows(things, name, kind == "shapes-grec", rng)
        if split != "train":
            new = [{**row, "expressions": row["expressions"][:1]} for row in new]
        rows += new
        number += 1
        bar.update(1 if split == "train" else len(new))
    bar.close()
    return rows if split == "train" else rows[:wanted]


def make_shapes(folder: Path, scenes: int, kind: str, show: bool = True) -> None:
    """Write the set `kind`: train, val and test .jsonl, images/*.jpg and shapes.spm; all of it or nothing.

    `scenes` are those of train; val and test hold 2,000 expressions (fewer with few scenes).
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        part = Path(scratch) / folder.name
        (part / "images").mkdir(parents=True)
        texts: set[str] = set()
        for split in ("train", "val", "test"):
            rows = _shapes_split(part, split, scenes if split == "train" else min(2000, scenes), kind, show)
            (part / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            texts.update(text for row in rows if split == "train" for text in row["expressions"])
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sorted(texts)),
            model_writer=model,
            model_type="bpe",
            vocab_size=160,  # enough for every word of the phrases to be one piece
            hard_vocab_limit=False,
            minloglevel=2,
        )
        (part / "shapes.spm").write_bytes(model.getvalue())
        part.rename(folder)
