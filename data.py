"""Everything that is read from the user's disk: configs, annotations, images, text; and the embedded shapes set.

    row  {"image", "expressions", "boxes"} of a JSON Lines file, or an official instances.json
      -> Row -> an example (uint8 image, expression, boxes) -> augment, resize -> Batch (padded tensors)

    python data.py check --config configs.json:refcoco --images     count what is there, name what is wrong
    python data.py show --config configs.json:refcoco               a page of examples
    python data.py convert FILE ... --to PATTERN                    other annotation layouts to JSON Lines

Whatever is drawn at random is a function of (seed, epoch, index), so that ranks, workers and restarts change nothing.
"""

import argparse
import difflib
import fcntl
import hashlib
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from reprlib import repr as brief  # of whatever length and depth
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.ops import box_convert, clip_boxes_to_image
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes
from tqdm import tqdm

MAX_PIXELS = 50_000_000  # a larger image is refused before it is decoded
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "MPO")  # of data sets; others open in ways that the checks do not fit
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit, which would warn from 89 million on, gives way to ours
ORIENTATION = 0x0112  # the EXIF tag
Box = tuple[float, float, float, float]  # x, y, w, h in pixels of the original image


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line that says what, where, and what was expected."""

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))  # names hold anything


def run(main: Callable[[], None], *others: type[Exception]) -> None:
    """Run a program's main: one line and exit status 2 for bad input (InputError and `others`), no traceback on Ctrl-C
    or for a lost rank."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        main()
    except (InputError, *others) as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(2)  # ranks mostly fail alike: the first one says it, and torchrun ends the others meanwhile
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # a full disk, a folder that may not be written, ...
        print(f"{Path(sys.argv[0]).name}: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        if sys.stdout:  # where it cannot be written to, Python would try again at its end, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2)
    except RuntimeError as error:  # NCCL's are DistErrors, gloo's are told by their words
        if not isinstance(error, torch.distributed.DistError) and not re.search("(closed|reset) by peer", str(error)):
            raise
        print(f"{Path(sys.argv[0]).name}: rank {os.environ.get('RANK')}: another rank is gone", file=sys.stderr)
        sys.exit(1)


def parse(
    parser: argparse.ArgumentParser, jobs: Mapping[str, argparse.ArgumentParser] | None = None
) -> argparse.Namespace:
    """The command line; a mistyped option is met with the nearest right one. `jobs`: the subparsers by name."""
    asked = parser if jobs is None else jobs.get("".join(sys.argv[1:2]))
    if asked is None:
        return parser.parse_args()  # which says what is wrong with the job
    known = set(re.findall(r"--[\w-]+", asked.format_help()))
    for word in sys.argv[1:]:
        if word == "--":
            break
        name = word.partition("=")[0]
        if name.startswith("--") and not any(option.startswith(name) for option in known):
            asked.error(f"there is no {name}, {nearest(name, list(known))}")
    return parser.parse_args()


def nearest(word: str, words: Sequence[str]) -> str:
    longer = sorted((other for other in words if other.startswith(word)), key=len)[:3]
    close = longer or difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"there are: {', '.join(sorted(words))}"


# ----------------------------------------------------------------------------------------------------- configs

# keys that may also be null, which leaves that loss term, decay or augmentation out
OPTIONAL = ("loss_decoder", "loss_token_on_truth", "loss_token_on_teacher", "decay_epochs", "jitter")
# what a key may hold: a type (lists and objects hold strings), or a number from the first to the second given, or, with
# a third, a list of so many such numbers (0: of any length)
KEYS = {
    key: allowed
    for allowed, keys in (
        ((1, 1_000_000), "image_size patch_size vocab_size encoder_width encoder_layers encoder_heads encoder_ffn"),
        ((1, 1_000_000), "head_width queries tqg_layers tqg_ffn decoder_layers decoder_ffn"),
        ((1, 1_000_000), "epochs batch_size micro_batch evaluate_every"),
        ((0, 2**63 - 1), "seed workers scenes warmup_epochs evaluate_from"),
        ((3, 1022), "max_tokens"),  # <s>, a piece, </s>; BEiT-3's positions
        ((0.0, 1.0), "lr lr_encoder eps weight_decay decay_factor ema_decay"),
        ((0.0, 0.999999), "drop_path dropout"),
        ((1e-9, 1e9), "clip_norm no_object_weight"),
        ((0.0, 1e9), "loss_decoder loss_token_on_truth loss_token_on_teacher save_minutes"),
        ((0.0, 0.999999, 2), "betas"),
        ((0.01, 100.0, 2), "jitter"),
        ((1, 1_000_000, 0), "decay_epochs"),
        (bool, "as_released amsgrad ema checkpointing compile"),
        (str, "annotations images tokenizer generate amp"),
        (list, "eval_splits"),
        (dict, "sources"),
    )
    for key in keys.split()
}


def load_config(spec: str, overrides: Sequence[str] = ()) -> dict:
    """`configs.json:refcoco` and `["train.lr=1e-4"]` -> {"model": {...}, "data": {...}, "train": {...}}.

    A config is the fragment `default`, then the fragments its name stands for, then the overrides, whose values
    are JSON or else a string. InputError: unknown name or key, or a value that `KEYS` does not allow.
    """
    path, _, name = spec.rpartition(":")
    if not path:
        raise InputError(f"--config {spec}: expected FILE:NAME, such as configs.json:shapes")
    entries = read_json(Path(path))
    if not isinstance(entries, dict) or not isinstance(entries.get("default"), dict):
        raise InputError(f'{path}: expected an object of recipes and fragments, "default" among them')
    if isinstance(entries.get(name), dict) and name != "default":
        raise InputError(f"{path}: {name!r} is a fragment of recipes, not a recipe")
    if name not in entries:
        raise InputError(f"{path}: there is no config {name!r}; {nearest(name, list(entries))}")
    fragments = [*_fragments(entries, "default", path), *_fragments(entries, name, path)]
    config = {section: dict(keys) for section, keys in entries["default"].items()}
    check_config(config, path)
    for fragment in fragments:
        for section, keys in entries[fragment].items():
            for key, value in keys.items():
                _set(config, f"{path}:{fragment}", f"{section}.{key}", value)
    override_config(config, overrides)
    check_config(config, path)
    return config


def check_config(config: dict, where: str) -> None:
    """InputError unless a config, of a file or a checkpoint, has every key with a value that fits `KEYS` and others."""
    if missing := KEYS.keys() - {key for keys in config.values() for key in keys}:
        raise InputError(f"{where}: the config lacks {min(missing)}")
    for section, keys in config.items():
        for key, value in keys.items():
            _set(config, where, f"{section}.{key}", value)
    model = config["model"]
    divisors = {"image_size": model["patch_size"], "encoder_width": model["encoder_heads"], "head_width": 8}
    for key, divisor in divisors.items():
        if model[key] % divisor:
            raise InputError(f"model.{key}={model[key]}: expected a multiple of {divisor}")


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
    annotations, generate = config["data"]["annotations"], config["data"]["generate"]
    if "{split}" not in annotations and not annotations.endswith(".json"):
        raise InputError(f"data.annotations={brief(annotations)}: expected {{split}} in the name, or an official .json")
    if generate not in ("", *COUNTS):
        raise InputError(f"data.generate={brief(generate)}: there are: {', '.join(COUNTS)}")


def _fragments(entries: dict, name: object, path: str, inside: tuple = ()) -> Iterator[str]:
    parts = entries.get(name) if isinstance(name, str) else None
    if isinstance(parts, dict) and all(isinstance(keys, dict) for keys in parts.values()):
        yield name
    elif isinstance(parts, list) and name not in inside:
        for part in parts:
            yield from _fragments(entries, part, path, (*inside, name))
    else:
        raise InputError(f"{path}: {brief(name)} must be a fragment {{section: {{key: value}}}} or a list of others")


def _set(config: dict, where: str, key: str, value: object) -> None:
    section, _, leaf = key.partition(".")
    known = [f"{s}.{k}" for s, keys in config.items() for k in keys if k in KEYS]
    if key not in known:
        raise InputError(f"{where}: unknown key {brief(key)}; {nearest(key, known)}")
    fits, wanted = _check(value, KEYS[leaf])
    if not fits and not (value is None and leaf in OPTIONAL):
        raise InputError(f"{where}: {key} must be {wanted}, not {brief(value)}")
    config[section][leaf] = float(value) if wanted.startswith("a number") and value is not None else value


def _check(value: object, allowed: type | tuple) -> tuple[bool, str]:
    """Whether a value is one of those allowed, and which these are."""
    if isinstance(allowed, tuple):
        low, high, *length = allowed
        wanted = f"{'an integer' if type(low) is int else 'a number'} from {low:,} to {high:,}"
        if not length:
            return type(value) in (int, type(low)) and low <= value <= high, wanted
        fits = (
            isinstance(value, list) and length[0] in (0, len(value)) and all(_check(v, (low, high))[0] for v in value)
        )
        return fits, f"a list of {length[0] or 'any length'}, each {wanted}"
    texts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [str(value)]
    fits = isinstance(value, allowed) and value != [] and all(isinstance(v, str) and v.isprintable() for v in texts)
    return fits, {bool: "true or false", str: "a string", list: "a list of strings", dict: "an object"}[allowed]


# ------------------------------------------------------------------------------------------------- annotations


@dataclass(frozen=True, slots=True)
class Example:
    """One expression and what it means in one image."""

    image: str  # path of the file
    expression: str
    boxes: tuple[Box, ...]  # none = no target
    size: tuple[int, int] | None  # width, height, where the annotation states them
    kind: str  # a label to report accuracy by, may be empty
    where: str  # "file:line", for messages


# One referred object (or set of objects) of one image, with every expression that names it. A training epoch draws one.
Row = tuple[Example, ...]


def read_rows(settings: dict, split: str) -> list[Row]:
    """The rows of one split. `settings` is the section `data` of a config; its `annotations` names either a JSON Lines
    file with {split} in its name or an official instances.json, which holds every split.

    InputError names file and line of the first malformed row.
    """
    rows = []
    for row in scan_rows(settings, split):
        if isinstance(row, InputError):
            raise row
        rows.append(row)
    return rows


def scan_rows(settings: dict, split: str) -> Iterator[Row | InputError]:
    """Every row of a split, or what is wrong with it. InputError is raised where the file itself is wrong."""
    path = Path(settings["annotations"].replace("{split}", split))
    found = False
    if path.suffix == ".json":
        splits = read_json(path)
        if not isinstance(splits, dict) or not isinstance(splits.get(split), list):
            have = ", ".join(splits) if isinstance(splits, dict) else "no splits"
            raise InputError(f"{path}: there is no split {split!r}, it holds: {have:.200}")
        numbered = ((f"{path}: {split}[{i}]", row) for i, row in enumerate(splits[split]))
    else:
        numbered = json_lines(path)
    for where, row in numbered:
        found = True
        if isinstance(row, InputError):
            yield row
            continue
        try:
            yield _row(row, where, settings)
        except InputError as error:
            yield error
    if not found:
        raise InputError(f"{path}: holds no row of split {split!r}")


def read_json(path: Path) -> object:
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON: {error}") from None


def json_lines(path: Path) -> Iterator[tuple[str, object]]:
    """("file:line", what the line holds) of every line that is not blank; an InputError for a line that is no JSON."""
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{path}:{number}"
                try:
                    text = line.decode("utf-8-sig").strip()
                    if text:
                        yield where, json.loads(text)
                except (ValueError, RecursionError) as error:
                    yield where, InputError(f"{where}: is not JSON: {error}")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _row(row: object, where: str, settings: dict) -> Row:
    """A row of either form -> Row; InputError says what is wrong with it."""
    if not isinstance(row, dict) or not ({"image", "boxes"} <= row.keys() or {"image_id", "bbox"} <= row.keys()):
        has = f", not {brief(list(row))}" if isinstance(row, dict) else ""
        raise InputError(f'{where}: expected an object with "image", "expressions" and "boxes"{has}')
    image, source, expressions = row.get("image", row.get("image_id")), row.get("source"), row.get("expressions")
    if not isinstance(expressions, list) or not expressions or not isinstance(kind := row.get("kind", ""), str | int):
        raise InputError(f'{where}: "expressions" must be a list of one or more strings, and "kind" a label')
    if "boxes" in row:
        boxes = _boxes_of_each(row["boxes"], len(expressions), where)
    else:
        source, boxes = row.get("data_source"), _official_boxes(row, where)
    size = row.get("width"), row.get("height")
    if size == (None, None):
        size = None
    check_size(size, where)
    path, examples = _image_path(image, source, settings, where), []
    for expression, own in zip(expressions, boxes, strict=True):
        check_expression(expression, where)
        for box in own:
            check_box(box, size, where)
        boxes_xywh = tuple(tuple(map(float, box)) for box in own)
        examples.append(Example(path, expression, boxes_xywh, size, str(kind), where))
    return tuple(examples)


def _boxes_of_each(boxes: object, expressions: int, where: str) -> list:
    """`boxes` of a JSON Lines row is one list of boxes for all expressions, or such a list for each of them."""
    if not isinstance(boxes, list) or not all(isinstance(box, list) for box in boxes):
        raise InputError(f'{where}: "boxes" must be a list of [x, y, w, h], not {brief(boxes)}')
    if not any(not box or isinstance(box[0], list) for box in boxes):
        return [boxes] * expressions
    if len(boxes) != expressions or not all(not each or isinstance(each[0], list) for each in boxes):
        raise InputError(f'{where}: "boxes" must be one list of boxes, or one such list for each expression')
    return boxes


def _official_boxes(row: dict, where: str) -> list:
    """Of SeqTR's and SimVG's instances.json: one box a row; in gRefCOCO's bbox[i] are those of expressions[i], and a
    no-target expression has the category -1."""
    if "annotations" not in row:
        return [[row["bbox"]]] * len(row["expressions"])
    try:
        return [
            [box for box, target in zip(each, targets, strict=True) if target["category_id"] != -1]
            for _, each, targets in zip(row["expressions"], row["bbox"], row["annotations"], strict=True)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where}: is not a gRefCOCO row of instances.json: {error!r}") from None


def _image_path(image: object, source: object, settings: dict, where: str) -> str:
    """A file name in a folder, or a number in a pattern such as `folder/COCO_train2014_{:012d}.jpg`."""
    if source is not None and (not isinstance(source, str) or source not in settings["sources"]):
        raise InputError(f"{where}: source {brief(source)} has no folder in data.sources")
    pattern = settings["images"] if source is None else settings["sources"][source]
    if isinstance(image, str) and image.isprintable() and image:
        return os.path.join(os.path.dirname(pattern) if "{" in pattern else pattern, image)
    if type(image) is not int:
        raise InputError(f"{where}: the image must be a file name or a number, not {brief(image)}")
    if not re.fullmatch(r"[^{}]*\{(:0?\d{0,2}d)?\}[^{}]*", pattern):  # str.format() can do much more than names need
        raise InputError(f"{where}: the image is a number, so {pattern!r:.200} should be a pattern: .../{{:012d}}.jpg")
    return pattern.format(image)


def check_expression(expression: object, where: str) -> None:
    """InputError unless the text holds a letter or a digit (and can be written as UTF-8)."""
    if not isinstance(expression, str) or not any(map(str.isalnum, expression)):
        raise InputError(f"{where}: an expression must be a text with at least one word, not {brief(expression)}")
    if re.search("[\ud800-\udfff]", expression):
        raise InputError(f"{where}: the expression {brief(expression)} holds a character that UTF-8 cannot write")


def check_size(size: tuple | None, where: str) -> None:
    if size and not all(type(side) is int and side > 0 for side in size):
        raise InputError(f"{where}: width and height must be positive integers, not {brief(size)}")


def check_box(box: object, size: tuple[int, int] | None, where: str) -> None:
    """InputError unless box is [x, y, w, h] with an area, of which at least half lies in the image.

    What reaches out is clipped later, as in the official loader; some published sets (Visual Genome) have such boxes.
    """
    four = isinstance(box, (list, tuple)) and len(box) == 4
    if not four or not all(type(v) in (int, float) and abs(v) < 1e9 for v in box):
        raise InputError(f"{where}: a box must be [x, y, w, h] in pixels, not {brief(box)}")
    x, y, w, h = box
    if w <= 0 or h <= 0:
        raise InputError(f"{where}: box {list(box)} has no area (expected [x, y, w, h] in pixels)")
    if max(box) < 1:
        raise InputError(f"{where}: box {list(box)} lies in one pixel (expected [x, y, w, h] in pixels, not in 0..1)")
    if size:
        inside = [
            max(0, min(at + side, most) - max(at, 0)) for at, side, most in zip((x, y), (w, h), size, strict=True)
        ]
        if inside[0] * inside[1] < w * h / 2:
            of = f"the image of {size[0]} x {size[1]} pixels"
            raise InputError(f"{where}: box {list(box)}: more than half lies outside {of} (expected [x, y, w, h])")
        if x >= size[0] - 1 or y >= size[1] - 1:
            raise InputError(f"{where}: box {list(box)} lies in the last column or row of pixels, which is clipped off")


def check_files(rows: Sequence[Row]) -> None:
    """InputError unless every image is there, opens, has the size that its rows state and holds their boxes.

    Only headers are read: a picture that is damaged further on is found when used, or by `data.py check --images`.
    """
    faults = image_faults(rows, "headers")
    if faults:
        more = f" (and {len(faults) - 1:,} more images are at fault)" if len(faults) > 1 else ""
        raise InputError(f"{faults[0]}{more}")


def image_faults(rows: Sequence[Row], depth: str) -> list[InputError]:
    """What is wrong with images, one fault each at most, looking at "names", at "headers" or at all "pixels"."""
    by_image: dict[str, list[Example]] = {}
    for example in expand(rows):
        by_image.setdefault(example.image, []).append(example)

    def fault(group: list[Example]) -> InputError | None:
        try:
            if not os.path.isfile(group[0].image):
                return InputError(f"{group[0].where}: there is no image {group[0].image}")
            if depth == "names":
                return None
            for each in {each.size: each for each in reversed(group)}.values():  # the first of each size that is stated
                with open_image(each.image, each.size, each.where) as file:
                    upright = upright_size(file)
                if depth == "pixels":
                    read_image(each.image, each.size, each.where)
            for each in group:
                if each.size is None:  # else its boxes were checked when it was read
                    for box in each.boxes:
                        check_box(box, upright, each.where)
        except InputError as error:
            return error
        return None

    with ThreadPoolExecutor() as pool:  # reading and decoding release Python's lock
        found = tqdm(pool.map(fault, by_image.values()), "images", len(by_image), disable=None, leave=False)
        return [error for error in found if error]


def expand(rows: Sequence[Row]) -> list[Example]:
    """Every expression, in order: what evaluation walks through."""
    return list(chain.from_iterable(rows))


def fingerprint(splits: Sequence[Sequence[Row]]) -> str:
    """The same for the same rows in the same order, on every machine and wherever the images lie."""
    digest = hashlib.sha256()
    for row in chain(*splits):
        for each in row:
            digest.update(repr((os.path.basename(each.image), each.expression, each.boxes, each.size)).encode())
        digest.update(b"\n")
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------------- text


def clean(text: str) -> str:
    """The official cleaning: lower case, punctuation dropped, - and / as blanks."""
    return re.sub(r"[.,'!?\"()*#:;]", "", text.lower()).replace("-", " ").replace("/", " ")


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
        # of the pieces and not of the file, whose bytes differ between versions of sentencepiece
        self.digest = hashlib.sha256("\n".join(pieces).encode()).hexdigest()

    def __call__(self, texts: Sequence[str], max_tokens: int = 20) -> tuple[Tensor, Tensor]:
        """Texts -> tokens (B, L) int64, text_pad (B, L) bool, True = padding; L = max_tokens. Longer texts are cut."""
        tokens = torch.ones(len(texts), max_tokens, dtype=torch.int64)
        for row, text in zip(tokens, texts, strict=True):
            pieces = self.model.encode(clean(text))[: max_tokens - 2]
            ids = [0, *(piece + 1 if piece else 3 for piece in pieces), 2]
            row[: len(ids)] = torch.tensor(ids)
        return tokens, tokens == 1

    def seen(self, text: str, max_tokens: int) -> tuple[str, bool]:
        """What the model gets of a text, and whether the text was cut there."""
        pieces = self.model.encode(clean(text))
        return self.model.decode(pieces[: max_tokens - 2]), len(pieces) > max_tokens - 2

    def pieces(self, text: str, max_tokens: int = 20) -> list[str]:
        """What stands between <s> and </s>, as text."""
        pieces = self.model.encode(clean(text), out_type=str)[: max_tokens - 2]
        return [piece.replace("\u2581", " ").strip() for piece in pieces]


# ------------------------------------------------------------------------------------------------------ images


def open_image(path: str, size: tuple[int, int] | None = None, where: str = "") -> Image.Image:
    """An image file with its header read and checked; `size` is what the row says, (width, height)."""
    where = where or path
    if not os.path.isfile(path):  # a pipe or a device might never end
        raise InputError(f"{where}: there is no image {path}")
    try:
        file = Image.open(path, formats=FORMATS)
        too_large = file.width * file.height > MAX_PIXELS
        upright = file.size if too_large else upright_size(file)
    except Exception as error:  # Pillow's readers raise whatever a damaged header makes them stumble over
        raise InputError(f"{where}: cannot read the image {path}: {_fault(error)}") from None
    if too_large:
        raise InputError(f"{where}: image {path} has {file.width} x {file.height} pixels, more than {MAX_PIXELS:,}")
    if size and size not in (upright, file.size):
        raise InputError(f"{where}: image {path} is {upright[0]} x {upright[1]}, the row says {size[0]} x {size[1]}")
    return file


def upright_size(file: Image.Image) -> tuple[int, int]:
    """(width, height) once EXIF has turned the picture."""
    if file.format == "PNG":  # its EXIF may lie behind the pixels, which would all be decoded to find it
        return file.size
    quarter_turn = file.getexif().get(ORIENTATION, 1) >= 5
    return file.size[::-1] if quarter_turn else file.size


def _fault(error: Exception) -> str:
    return getattr(error, "strerror", None) or f"damaged, cut off or none of {', '.join(FORMATS)}"


def read_image(path: str, size: tuple[int, int] | None = None, where: str = "") -> Tensor:
    """An image file -> (3, H, W) uint8 RGB, turned upright as EXIF says unless the row states the size of the file as
    it lies on disk: then its boxes were drawn there (D13). Half turns change no size and are always made."""
    with open_image(path, size, where) as file:
        try:
            if file.format != "PNG" and (not size or size == upright_size(file)):
                ImageOps.exif_transpose(file, in_place=True)
            image = file
            if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip to 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode == "P":  # a palette may hold transparent colours, which convert() warns of
                image = image.convert("RGBA")
            pixels = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))  # (H, W, 3)
        except Exception as error:  # as above
            raise InputError(f"{where or path}: cannot read the image {path}: {_fault(error)}") from None
    return torch.tensor(pixels).permute(2, 0, 1)  # (3, H, W)


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """(3, H, W) uint8 -> (3, height, width), bilinear without antialias, as OpenCV does it, up to 1 grey level."""
    return F.interpolate(image[None], size=(height, width), mode="bilinear", align_corners=False)[0]


def large_scale_jitter(
    image: Tensor, boxes: Tensor, limits: Sequence[float], long_side: int, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """image (3, H, W), boxes (n, 4) xyxy pixels -> both after the jitter, the image of another size.

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
            kept = clip_boxes_to_image(kept, (crop_height, crop_width))
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

    @property
    def examples(self) -> list[Example]:
        return expand(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, str, Tensor, int]:
        """(image (3, S, S) uint8, expression, boxes (n, 4) cxcywh in 0..1, index)."""
        epoch, index = key
        rng = random.Random(f"{self.seed}/{epoch}/{index}")
        row = self.rows[index]
        example = row[rng.randrange(len(row))]
        image = read_image(example.image, example.size, example.where)
        height, width = image.shape[1:]
        boxes = clip_boxes(example.boxes, width, height)  # (n, 4) xyxy
        if self.jitter:
            image, boxes = large_scale_jitter(image, boxes, self.jitter, self.image_size, rng)
            height, width = image.shape[1:]
        boxes = box_convert(boxes, "xyxy", "cxcywh") / torch.tensor([width, height, width, height])
        return resize(image, self.image_size, self.image_size), example.expression, boxes.float(), index


def clip_boxes(xywh: Sequence[Box], width: int, height: int) -> Tensor:
    """xywh pixels -> (n, 4) xyxy float64, clipped to [0, width-1] x [0, height-1] as the official loader does."""
    boxes = box_convert(torch.tensor(xywh, dtype=torch.float64).reshape(-1, 4), "xywh", "xyxy")
    return clip_boxes_to_image(boxes, (height - 1, width - 1))


class Collate:
    """A list of examples -> Batch."""

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
    """Fetches whole batches; an InputError in a worker process travels as a value and so keeps its one line."""

    def __init__(self, dataset: Dataset, collate: Collate):
        self.dataset, self.collate = dataset, collate

    def __getitem__(self, keys: list[tuple[int, int]]) -> Batch | InputError:
        try:
            return self.collate([self.dataset[key] for key in keys])
        except InputError as error:
            return error


def _leave_the_end_to_main(worker: int) -> None:
    """In a worker: what a signal leads to is the main process's to decide, and to say."""
    os.setpgid(0, 0)  # Ctrl-C in a terminal and torchrun signal the whole process group
    # Called by the thread that hands tensors over, where the main process left amid a hand-over.
    sys.excepthook = lambda *_: None


def batches(dataset: Dataset, collate: Collate, keys: Sequence, workers: int, pin: bool = False) -> Iterator[Batch]:
    """Batches of the examples `keys`, an iterable of lists of (epoch, index), with at most a worker per core.
    InputError where an example cannot be read, or a worker was killed."""
    workers = min(workers, os.cpu_count() or 1)
    loader = DataLoader(
        _Guarded(dataset, collate),
        sampler=keys,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_leave_the_end_to_main,
        generator=torch.Generator(),  # else the loader would draw from the global generator
    )
    try:
        before = signal.getsignal(signal.SIGCHLD)
        iterator = iter(loader)
        # torch's handler would raise amid whatever is being done when a worker dies; the wait for a batch notices, too.
        with suppress(ValueError):  # outside the main thread, where torch sets none
            signal.signal(signal.SIGCHLD, before)
        for batch in iterator:
            if isinstance(batch, InputError):
                raise batch
            yield batch
    except RuntimeError as error:
        if not re.search("DataLoader worker|[Pp]in memory thread", str(error)):
            raise
        raise InputError("a loader process was killed: out of memory or of /dev/shm? lower data.workers") from None


class MicroBatchSampler:
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
            generator = torch.Generator().manual_seed(hash((self.seed, epoch)))  # not salted: the same everywhere
            order = torch.randperm(self.rows, generator=generator).tolist()
            for step in range(first_step if epoch == first_epoch else 0, self.steps):
                numbers = [order[i % self.rows] for i in range(step * self.batch, (step + 1) * self.batch)][self.share]
                for i in range(0, len(numbers), self.micro):
                    yield [(epoch, number) for number in numbers[i : i + self.micro]]


# ---------------------------------------------------------------------------------------------- check and show

INK = {"truth": "lime", "decoder": "orange", "token": "deepskyblue"}


def draw(image: Tensor, boxes: dict[str, Tensor], caption: str, side: int = 280) -> Image.Image:
    """image (3, H, W) uint8 and {"truth" | "decoder" | "token": (n, 4) xyxy in 0..1} -> a captioned picture."""
    scale = side / max(image.shape[1:])
    height, width = (max(1, round(scale * length)) for length in image.shape[1:])
    canvas = resize(image, height, width)
    for name, each in boxes.items():
        if len(each):
            scaled = each * torch.tensor([width, height, width, height])
            canvas = draw_bounding_boxes(canvas, scaled, colors=INK[name], width=2)
    page = Image.new("RGB", (side, height + 32))
    page.paste(to_pil_image(canvas))
    pen = ImageDraw.Draw(page)
    pen.text((3, height + 2), caption[: side // 6], fill="white")
    for i, name in enumerate(boxes):
        pen.text((3 + 60 * i, height + 17), name, fill=INK[name])
    return page


def tile(pictures: Sequence[Image.Image], path: str | Path, columns: int) -> None:
    """Save pictures side by side as one page."""
    width, height = max(p.width for p in pictures) + 4, max(p.height for p in pictures) + 4
    page = Image.new("RGB", (columns * width, math.ceil(len(pictures) / columns) * height))
    for i, picture in enumerate(pictures):
        page.paste(picture, (i % columns * width, i // columns * height))
    page.save(path)


def check_picture(path: str) -> None:
    """InputError unless a picture can be saved under this name."""
    file = Path(path)
    if file.suffix not in (".png", ".jpg") or file.is_dir() or not file.absolute().parent.is_dir():
        raise InputError(f"--save {path}: expected a file that ends in .png or .jpg, in a folder that is there")


def show(config: dict, split: str, number: int, path: str) -> None:
    """A page of examples of a split: each as it is on disk, then as training (train) or evaluation gets it."""
    tokenizer = Tokenizer(config["data"]["tokenizer"])
    rows = [(example,) for example in expand(read_rows(config["data"], split))]
    rows = [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), min(number, len(rows))))]
    check_files(rows)
    dataset = Dataset(
        rows, config["model"]["image_size"], jitter=config["data"]["jitter"] if split == "train" else None
    )
    pictures = []
    for i, (row,) in enumerate(tqdm(rows, desc="drawing", disable=None, leave=False)):
        image = read_image(row.image, row.size, row.where)
        height, width = image.shape[1:]
        boxes = clip_boxes(row.boxes, width, height) / torch.tensor([width, height, width, height])
        seen, _, moved, _ = dataset[0, i]
        pictures.append(draw(image, {"truth": boxes}, row.expression))
        text, cut = tokenizer.seen(row.expression, config["data"]["max_tokens"])
        if cut:
            tqdm.write(f"{row.where}: {row.expression!r} is cut after {text!r} (data.max_tokens)")
        caption = f"...{text[-36:]} [cut]" if cut else text
        pictures.append(draw(seen, {"truth": box_convert(moved, "cxcywh", "xyxy")}, caption))
    tile(pictures, path, columns=6)
    print(f"{path}: {len(rows)} examples of {split}, each before and after augmentation and resizing")


CHECKED = (
    *("rows", "images", "expressions", "- without a target", "- with one", "- with several"),
    *("- repeated for the same boxes", "- too long, so cut", "- with a box over the image's edge", "faults"),
)


def check(config: dict, splits: Sequence[str], decode: bool) -> None:
    """Print what the splits hold and up to 20 faults, by row; InputError where there is one. With `decode`
    every image is decoded."""
    settings, faults, table = config["data"], [], {}
    tokenizer = Tokenizer(settings["tokenizer"])
    for split in splits:
        rows, seen, before = [], set(), len(faults)
        for row in scan_rows(settings, split):
            if isinstance(row, InputError):
                faults.append(row)
            else:
                rows.append(row)
        faults += image_faults(rows, "pixels" if decode else "names")
        count = table[split] = dict.fromkeys(CHECKED, 0)
        count |= {"rows": len(rows), "images": len({row[0].image for row in rows}), "faults": len(faults) - before}
        for each in expand(rows):
            count["expressions"] += 1
            count[("- without a target", "- with one", "- with several")[min(len(each.boxes), 2)]] += 1
            count["- repeated for the same boxes"] += (each.image, each.expression, each.boxes) in seen
            count["- too long, so cut"] += tokenizer.seen(each.expression, settings["max_tokens"])[1]
            count["- with a box over the image's edge"] += any(_over_the_edge(box, each.size) for box in each.boxes)
            seen.add((each.image, each.expression, each.boxes))
    print(f"{'':36}" + "".join(f"{split:>12}" for split in splits))
    for name in CHECKED:
        print(f"{name:36}" + "".join(f"{table[split][name]:>12,}" for split in splits))
    several = sum(counts["- without a target"] + counts["- with several"] for counts in table.values())
    if several and config["model"]["queries"] == 1:
        fit = "a recipe with one query, as this one, answers one box; grefcoco has ten"
        print(f"note: {several:,} expressions without or with several targets: {fit}", file=sys.stderr)
    for fault in faults[:20]:
        print(fault)
    if faults:
        raise InputError(f"{len(faults):,} faults" + (", the first 20 are above" if len(faults) > 20 else ""))


def _over_the_edge(box: Box, size: tuple[int, int] | None) -> bool:
    """By more than 2 pixels? Such boxes are clipped."""
    x, y, w, h = box
    return size is not None and (min(x, y) < -2 or x + w > size[0] + 2 or y + h > size[1] + 2)


# ------------------------------------------------------------------------------------- other annotation layouts


class ForeignExpression(NamedTuple):
    """One expression of a foreign file."""

    split: str
    key: Hashable  # those of the same key share a row of the training split
    image: str | int
    expression: str
    boxes: list  # xywh, pixels
    size: tuple[int, int] | None
    source: str | None = None


# what a row of the flat layouts is known by: image, expression, box or boxes, and how these are written
FLAT = (
    ("image", "sent", "bbox", "xyxy"),  # Qwen-VL, InternVL
    ("image", "normal_caption", "solution", "xyxy"),  # VLM-R1; null = no target
    ("img_path", "expression", "bbox", "xyxy"),  # Shikra, ASM
    ("file_name", "expression", "bbox", "xywh"),
    ("file_name", "expression", "bbox_xyxy", "xyxy"),
    ("file_name", "expression", "boxes_xyxy", "xyxy"),
)
# expressions, images, and of gRefCOCO the expressions with no, one and several targets, as the authors' files have them
PUBLISHED = {
    "refcoco": {"train": (120624, 16994), "val": (10834, 1500), "testA": (5657, 750), "testB": (5095, 750)},
    "refcoco+": {"train": (120191, 16992), "val": (10758, 1500), "testA": (5726, 750), "testB": (4889, 750)},
    "refcocog-umd": {"train": (80512, 21899), "val": (4896, 1300), "test": (9602, 2600)},
    "refcocog-google": {"train": (85474, 24698), "val": (9536, 4650)},
    "referit": {"train": (54127, 9000), "val": (5842, 1000), "test": (60103, 10000)},
    "flickr30k": {"train": (427193, 29783), "val": (14433, 1000), "test": (14481, 999)},
    "grefcoco": {
        "train": (209344, 16994, 19140, 120624, 69580),
        "val": (14229, 1501, 8905, 0, 5324),
        "testA": (19200, 750, 4448, 5917, 8835),
        "testB": (16063, 750, 4673, 5646, 5744),
    },
}


def convert(sources: Sequence[str], to: str, published: str | None) -> None:
    """Write foreign annotation files as JSON Lines, a file a split, all of them or none; print what came out.

    In the training split the expressions of one object (in gRefCOCO: of one image) share a row, since a training
    epoch draws one of them; in the others every expression has its own row. None is dropped, not even repeats.
    """
    folder = Path(to).parent
    if "{split}" not in Path(to).name:
        raise InputError(f"--to {to}: expected {{split}} in the name, such as data/annotations/refcoco/{{split}}.jsonl")
    splits: dict[str, dict[Hashable, list[ForeignExpression]]] = {}  # the expressions of each row of each split
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for named in chain.from_iterable(map(read_foreign, map(Path, sources))):
            rows = splits.setdefault(named.split, {})
            rows.setdefault(named.key if named.split == "train" else len(rows), []).append(named)
        if not splits:
            raise InputError(f"{', '.join(sources)}: no expression in there")
        every = {split: list(chain.from_iterable(rows.values())) for split, rows in splits.items()}
        paths = [named.image for each in every.values() for named in each if isinstance(named.image, str)]
        folders = {os.path.dirname(path) for path in paths}
        shared = os.path.commonpath(folders) if len({path[:1] == "/" for path in paths}) == 1 else ""
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            for split, rows in splits.items():
                target = Path(to.replace("{split}", split))
                if target.exists():
                    raise InputError(f"{target}: is there already, nothing was written")
                with open(Path(scratch) / target.name, "w", encoding="utf-8") as file:
                    for row in rows.values():
                        file.write(json.dumps(_own_row(row, shared), ensure_ascii=False) + "\n")
            for written in Path(scratch).iterdir():
                written.replace(folder / written.name)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror}") from None
    counts = {}
    for split, each in every.items():
        counts[split] = Counter(("none", "one", "many")[min(len(named.boxes), 2)] for named in each)
        images = len({named.image for named in each})
        counts[split] |= {"expressions": len(each), "images": images, "rows": len(splits[split])}
    _print_counts(counts, PUBLISHED.get(published or "", {}), to)
    if shared:
        print(f"image names start inside {shared}, the folder that all share")


def _own_row(together: Sequence[ForeignExpression], shared: str = "") -> dict:
    """A JSON Lines row. The name of its image starts inside the folder `shared`."""
    first = together[0]
    boxes = [named.boxes for named in together]
    image = os.path.relpath(first.image, shared) if shared and isinstance(first.image, str) else first.image
    row = {"image": image, "expressions": [named.expression for named in together]}
    row["boxes"] = first.boxes if all(own == first.boxes for own in boxes) else boxes
    if first.size:
        row |= {"width": first.size[0], "height": first.size[1]}
    if first.source:
        row["source"] = first.source
    return row


def _print_counts(counts: dict[str, Counter], published: dict[str, tuple], to: str) -> None:
    names = ("expressions", "images", "none", "one", "many")
    print(f"{'':12}{'rows':>12}" + "".join(f"{name:>12}" for name in names))
    for split, count in counts.items():
        print(f"{split:12}{count['rows']:>12,}" + "".join(f"{count[name]:>12,}" for name in names))
        wanted = dict(zip(names, published.get(split, ()), strict=False))
        differ = [f"{name} {count[name] - value:+,}" for name, value in wanted.items() if count[name] != value]
        if wanted:
            print(f"{'  published':24}" + "".join(f"{value:>12,}" for value in wanted.values()), end="  ")
            print("differs: " + ", ".join(differ) if differ else "equal")
    for split in counts:
        print(to.replace("{split}", split))


def read_foreign(path: Path) -> Iterator[ForeignExpression]:
    """Every expression of a file of any known layout, checked; the layout is told by name and content.

    refer's refs(*).p and gRefCOCO's grefs(*).json (with instances.json beside them), MDETR's finetune_*.json, TransVG's
    *.pth, SeqTR's instances.json, and the flat ones of `FLAT`, in lines or as a list. InputError names file and row.
    """
    items, understand = _layout(path)
    for where, item in tqdm(items, desc=path.name, disable=None, leave=False):
        if isinstance(item, InputError):
            raise item
        try:
            for named in understand(where, item):
                image, split, source = named.image, named.split, named.source
                if not isinstance(image, str | int) or not isinstance(split, str) or not re.fullmatch(r"\w+", split):
                    raise InputError(f"{where}: expected image and split, not {brief(image)} and {brief(split)}")
                settings = {"images": "{}", "sources": {s: "{}" for s in [source] if str(s).isprintable()}}
                _row({**_own_row([named]), "boxes": [named.boxes]}, where, settings)  # or training could not read it
                yield named._replace(key=(path, image, named.size, source, str(named.key)))
        except InputError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
            raise InputError(f"{where}: is no row of this layout: {error!r:.150}") from None


def _layout(path: Path) -> tuple[Sequence | Iterator, Callable[[str, Any], list[ForeignExpression]]]:
    """((where, item) pairs, what makes ForeignExpression of one) of a foreign file."""
    if path.suffix == ".jsonl":
        return json_lines(path), partial(_flat, _split_of(path))
    content = _load_pickle(path) if path.suffix in (".p", ".pth") else read_json(path)
    if isinstance(content, dict) and "images" in content:
        coco = _coco(path, content)
        return [(f"{path}: image {i}", coco.imgs[i]) for i in coco.imgs], partial(_mdetr, coco, _split_of(path))
    if isinstance(content, dict) and all(isinstance(rows, list) for rows in content.values()):
        splits = content.items()
        return [(f"{path}: {split}[{i}]", (split, row)) for split, rows in splits for i, row in enumerate(rows)], _seqtr
    if not isinstance(content, list) or not content:
        raise InputError(f"{path}: holds no rows of a known layout")
    rows = [(f"{path}: row {i}", row) for i, row in enumerate(content)]
    if path.suffix == ".pth":
        return rows, partial(_transvg, _split_of(path))
    if isinstance(content[0], dict) and "ref_id" in content[0]:
        beside = path.parent / "instances.json"
        return rows, partial(_refer, _coco(beside, read_json(beside)), set())
    return rows, partial(_flat, _split_of(path))


def _split_of(path: Path) -> str:
    """finetune_refcoco_testA.json -> testA"""
    word = re.split(r"[^A-Za-z]", path.stem)[-1].lower()
    for split in ("train", "val", "test", "testA", "testB", "trainval"):
        if word == split.lower():
            return split
    raise InputError(f"{path}: expected a name that ends in the split, such as refcoco_testA{path.suffix}")


NUMBERS = {"<i4": np.int32, "<i8": np.int64, "<f4": np.float32, "<f8": np.float64}


class _Numpy:
    """A pickled array or dtype. numpy itself would take any state for it, and a forged one crashes the process."""

    def __init__(self, *made: object):
        self.made = made

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def __iter__(self) -> Iterator[float]:
        _, _, dtype, _, content = self.state
        return iter(np.frombuffer(content, NUMBERS[dtype.state[1] + dtype.made[0]]).tolist())


class _PlainUnpickler(pickle._Unpickler):  # the one in C takes as much memory as a forged number says
    """Reads containers, numbers and strings, and numpy arrays. Whatever else a pickle wants to call is refused."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("_codecs", "encode"):
            return str.encode
        if module.startswith("numpy") and name in ("ndarray", "dtype", "_reconstruct"):
            return _Numpy
        raise pickle.UnpicklingError(f"it would call {module}.{name}")


def _load_pickle(path: Path) -> object:
    """What a refer pickle (Python 2's, too) holds, or a .pth of torch before 1.6: the fourth of its pickles."""
    try:
        with open(path, "rb") as file:
            for _ in range(4 if path.suffix == ".pth" else 1):
                content = _PlainUnpickler(file, encoding="latin1").load()
    except Exception as error:  # a damaged pickle can raise anything
        fault = getattr(error, "strerror", None) or f"not a pickle of plain data: {error!r:.150}"
        raise InputError(f"{path}: cannot be read: {fault}") from None
    return content


def _coco(path: Path, content: object) -> COCO:
    """The contents of a COCO file, indexed by pycocotools. Ids must not repeat: it would keep only the last of them."""
    coco = COCO()
    coco.dataset = content
    try:
        with redirect_stdout(io.StringIO()):
            coco.createIndex()
        for kind, by_id in {"images": coco.imgs, "annotations": coco.anns}.items():
            if len(by_id) != len(content[kind]):
                raise InputError(f"{path}: ids of {kind} repeat")
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: is not a COCO annotation file: {error!r:.150}") from None
    unknown = coco.imgToAnns.keys() - coco.imgs.keys()
    if unknown:
        raise InputError(f"{path}: has annotations of an image {brief(list(unknown)[0])} that it does not list")
    return coco


def _refer(coco: COCO, seen: set, where: str, ref: dict) -> list[ForeignExpression]:
    """refer's refs and gRefCOCO's, with the images and boxes of the instances.json in the same folder."""
    if ref["ref_id"] in seen:
        raise InputError(f"{where}: ref_id {brief(ref['ref_id'])} repeats")
    seen.add(ref["ref_id"])
    image = coco.imgs[ref["image_id"]]
    numbers = ref["ann_id"] if isinstance(ref["ann_id"], list) else [ref["ann_id"]]
    boxes = [coco.anns[number]["bbox"] for number in numbers if number != -1]
    key = ref["image_id"] if "no_target" in ref else ref["ref_id"]  # gRefCOCO trains image by image
    letters = re.fullmatch("test([A-C]{2,})", ref["split"])  # in refclef a ref can be in several splits
    return [
        ForeignExpression(split, key, image["file_name"], sentence["sent"], boxes, (image["width"], image["height"]))
        for split in ([f"test{letter}" for letter in letters[1]] if letters else [ref["split"]])
        for sentence in ref["sentences"]
    ]


def _mdetr(coco: COCO, split: str, where: str, image: dict) -> list[ForeignExpression]:
    """MDETR's finetune_*.json, one image entry per expression; gRefCOCO's marks the empty ones and trains by image."""
    targets = coco.imgToAnns[image["id"]]
    if not targets:
        raise InputError(f"{where}: has no annotation")
    boxes = [target["bbox"] for target in targets if target["category_id"] != -1]
    key = image.get("original_id", image["id"])
    if "empty" not in targets[0]:
        key = key, targets[0].get("original_id", targets[0]["id"])
    size = image["width"], image["height"]
    texts = image.get("expressions") or [image["caption"]]
    return [ForeignExpression(split, key, image["file_name"], text, boxes, size) for text in texts]


def _transvg(split: str, where: str, row: tuple) -> list[ForeignExpression]:
    """TransVG's tuples: file, [object,] box, phrase, ...; boxes are xywh for COCO's images, xyxy for the others."""
    key, box, text = row[1:4] if len(row) > 3 else (where, *row[1:])
    box = [float(v) for v in box]
    return [ForeignExpression(split, key, row[0], text, [box if row[0].startswith("COCO") else _xywh(box)], None)]


def _seqtr(where: str, item: tuple) -> list[ForeignExpression]:
    """SeqTR's instances.json, which also loads as it is; its images are numbers, as in the patterns of data.images."""
    split, row = item
    size, source = (row["width"], row["height"]), row.get("data_source")
    return [
        ForeignExpression(split, where, row["image_id"], text, boxes, size, source)
        for text, boxes in zip(row["expressions"], _official_boxes(row, where), strict=True)
    ]


def _flat(split: str, where: str, row: dict) -> list[ForeignExpression]:
    """One box and one expression a row (ReCLIP: one object and its sentences)."""
    size = (row["width"], row["height"]) if "width" in row else None
    if {"anns", "sentences"} <= row.keys():
        by_id = {target["id"]: target["bbox"] for target in row["anns"]}
        boxes = [by_id[i] for i in (row["ann_id"] if isinstance(row["ann_id"], list) else [row["ann_id"]])]
        return [ForeignExpression(split, where, row["file_name"], s["sent"], boxes, size) for s in row["sentences"]]
    layout = next((layout for layout in FLAT if row.keys() >= set(layout[:3])), None)
    if layout is None:
        raise InputError(f"{where}: has the keys {', '.join(row):.200}, which is no known layout")
    image_key, text_key, boxes_key, form = layout
    image, text, boxes = row[image_key], row[text_key], row[boxes_key]
    boxes = [] if boxes is None else boxes if boxes_key == "boxes_xyxy" else [boxes]
    if form == "xyxy":
        boxes = [_xywh(box) for box in boxes]
    return [ForeignExpression(split, (image, str(boxes)), image, text, boxes, size)]


def _xywh(box: Sequence[float]) -> list[float]:
    x1, y1, x2, y2 = box
    return [x1, y1, round(x2 - x1, 6), round(y2 - y1, 6)]  # 596.87 - 303.58 is 293.29, not 293.28999999999996


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


def _shapes_split(folder: Path, split: str, wanted: int, set_name: str, show: bool) -> list[dict]:
    """Draw the images of one split and return its rows: `wanted` scenes of train, expressions of val and test."""
    rows: list[dict] = []
    number, (train_counts, test_counts) = 0, COUNTS[set_name]
    bar = tqdm(total=wanted, desc=f"drawing {split}", disable=None if show else True, leave=False)
    while (number if split == "train" else len(rows)) < wanted:
        rng = random.Random(f"shapes/{split}/{number}")  # every scene has a seed of its own
        image, things = draw_scene(rng, train_counts if split == "train" else test_counts)
        name = f"{split}_{number:05d}.jpg"
        image.save(folder / "images" / name, quality=92, subsampling=0)
        new = _shapes_rows(things, name, set_name == "shapes-grec", rng)
        if split != "train":
            new = [{**row, "expressions": row["expressions"][:1]} for row in new]
        rows += new
        number += 1
        bar.update(1 if split == "train" else len(new))
    bar.close()
    return rows if split == "train" else rows[:wanted]


def make_shapes(folder: Path, scenes: int, set_name: str, show: bool = True) -> None:
    """Write the set `set_name`: train, val and test .jsonl, images/*.jpg and shapes.spm; all of it or nothing.

    `scenes` are those of train; val and test hold 2,000 expressions (fewer with few scenes).
    """
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.part") as scratch:
        part = Path(scratch) / folder.name
        (part / "images").mkdir(parents=True)
        texts: set[str] = set()
        for split in ("train", "val", "test"):
            rows = _shapes_split(part, split, scenes if split == "train" else min(2000, scenes), set_name, show)
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


def make_embedded_set(settings: dict) -> None:
    """Write the shapes set on first use, where the section `data` of a config asks for it and not for other files."""
    folder, wanted = Path(settings["annotations"]).parent, settings["scenes"]
    if not settings["generate"] or folder != Path(settings["tokenizer"]).parent:
        return
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_name(f".{folder.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of two first starts at once the second waits, and finds the set
            for left in folder.parent.glob(f"{folder.name}.part*"):  # by a killed run
                shutil.rmtree(left)
            if not folder.exists():
                make_shapes(folder, wanted, settings["generate"])
    if (scenes := len(list((folder / "images").glob("train_*.jpg")))) != wanted:
        raise InputError(f"{folder}: holds a set of {scenes} scenes, not data.scenes={wanted}; remove it first")


# -------------------------------------------------------------------------------------------------- the program


def main() -> None:
    args = parse_arguments()
    if args.job == "convert":
        convert(args.sources, args.to, args.published)
        return
    if args.job == "show":
        check_picture(args.save)
        if not 1 <= args.n <= 600:
            raise InputError(f"-n {args.n}: expected 1 to 600 examples")
    config = load_config(args.config, args.set)
    make_embedded_set(config["data"])
    if args.job == "check":
        check(config, args.split or ["train", *config["data"]["eval_splits"]], args.images)
    else:
        show(config, args.split, args.n, args.save)


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
    job.add_argument(
        "--published",
        choices=PUBLISHED,
        metavar="SET",
        help=f"compare sizes with those published: {', '.join(PUBLISHED)}",
    )
    with_config = argparse.ArgumentParser(add_help=False)
    with_config.add_argument("--config", required=True, metavar="FILE:NAME", help="such as configs.json:refcoco")
    with_config.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="such as data.images=DIR"
    )
    job = jobs.add_parser("check", parents=[with_config], help="count what is there and name what is wrong")
    job.add_argument("--split", nargs="+", metavar="NAME", help="default: train and those the config evaluates")
    job.add_argument("--images", action="store_true", help="also decode every image")
    job = jobs.add_parser("show", parents=[with_config], help="a page of examples before and after augmentation")
    job.add_argument("--split", default="train", metavar="NAME", help="default: train")
    job.add_argument("-n", type=int, default=16, help="number of examples (default: 16)")
    job.add_argument("--save", default="examples.png", metavar="FILE", help="default: examples.png")
    return parse(parser, jobs.choices)


if __name__ == "__main__":
    run(main)
