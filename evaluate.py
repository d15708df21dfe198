"""Metrics, evaluation, grounding, pictures, attention maps and the report.

    python evaluate.py --ckpt runs/shapes/best.pt                              # accuracy on every split of its config
    python evaluate.py --ckpt best.pt --image photo.jpg --text "the left dog"  # boxes with scores, and a picture
    python evaluate.py --ckpt best.pt --answers answers.jsonl                  # accuracy, and a file with every answer
    python evaluate.py --ckpt best.pt --report report.html                     # accuracy, and a page with every answer
    python evaluate.py --ckpt best.pt --attention --split test                 # how much attention the true box gets
    python evaluate.py --curves runs/a runs/b --save curves.png                # losses and accuracy of several runs

REC (referring expression comprehension): every expression has one target; the model has one query. The metric is
Acc@0.5, the share of expressions whose box has an IoU of at least 0.5 with the true box.
gREC (generalised REC): any number of targets, or none; several queries. The metrics are Precision@(F1=1, IoU>=0.5), the
share of expressions for which exactly the true boxes are found, and N-acc, the same for those without a target.
Correct answers are counted per expression and divided once, so batch size and number of ranks change no figure (D9 in
README.md). train.py starts its ranks, loads its splits and tokenizer, evaluates and draws with functions of this file.
"""

import argparse
import base64
import ctypes
import io
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import chain, islice
from pathlib import Path
from threading import Semaphore
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.ops import box_convert, box_iou, generalized_box_iou
from tqdm import tqdm

import data
import model as models
from data import InputError

MIN_IOU = 0.5  # a box is correct from this IoU on; in gREC, from this generalised IoU on
THRESHOLD = 0.7  # the box of a gREC query is part of the answer from this score on
BRANCHES = ("decoder", "token")
TARGET_GROUPS = ("no target", "one target", "several targets")
INKS = ("black", "royalblue", "darkorange", "seagreen", "crimson", "purple", "saddlebrown", "deeppink", "olive", "teal")
PICTURES = 3000  # images in a report at most, some 9 kB each; the three evaluation splits of RefCOCO have as many
ANSWER_BATCH = 16  # expressions; fixed, since the last bits depend on it and --resume starts at a multiple of it
Found = dict[str, tuple[Tensor, Tensor]]  # {branch: scores (n,), the highest first, and boxes (n, 4) xyxy in 0..1}
# All about one expression: image, expression; then error, or truth if known, agreement, and of each branch boxes,
# scores, correct and iou: the best of each true box, averaged. Boxes are xyxy in pixels of the image.
Line = dict[str, Any]


# ----------------------------------------------------------------------------------------------------- metrics


def rec_correct(boxes_xyxy: Tensor, truth_xyxy: Tensor) -> Tensor:
    """Pairs of boxes, (N, 4) and (N, 4) in pixels -> (N,) bool: whether their IoU is at least 0.5."""
    a, b = boxes_xyxy.double(), truth_xyxy.double()
    overlap = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)  # (N,)
    union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - overlap
    return overlap / union.clamp(min=1e-6) >= MIN_IOU


def grec_correct(scores: Tensor, boxes_xyxy: Tensor, truth_xyxy: Tensor, threshold: float = THRESHOLD) -> bool:
    """Whether F1 = 1: the boxes (Q, 4) whose scores (Q,) reach the threshold are exactly the true boxes (n, 4).

    The two pair greedily, best first, from a *generalised* IoU of 0.5 on, as in gRefCOCO's evaluator.
    """
    answers = boxes_xyxy[scores.double() >= threshold]  # in float32, 0.7 is rounded down and 0.69999999 would pass
    if len(answers) != len(truth_xyxy):
        return False
    return all(giou >= MIN_IOU for giou in pair(generalized_box_iou(answers, truth_xyxy.to(answers))))


def pair(overlap: Tensor) -> list[float]:
    """Overlaps (n, m) of boxes -> those of min(n, m) pairs: the best pair first, then the best of the boxes left."""
    overlap, pairs = overlap.clone(), []
    for _ in range(min(overlap.shape)):
        row, column = divmod(int(overlap.argmax()), overlap.shape[1])
        pairs.append(overlap[row, column].item())
        overlap[row], overlap[:, column] = -1, -1  # both boxes of this pair are taken
    return pairs


def agreement(found: Found) -> float | None:
    """How far the boxes of both branches agree, 0..1: in REC their IoU; in gREC the sum of the IoUs of greedy pairs
    over the larger number of boxes, 1 where there are none. None where only one branch answered."""
    if len(found) == 1:
        return None
    boxes = [boxes.double() for _, boxes in found.values()]  # (n, 4) and (m, 4)
    most = max(map(len, boxes))
    return sum(pair(box_iou(*boxes).nan_to_num(0))) / most if most else 1.0


def pick_answers(logits: Tensor, boxes: Tensor, threshold: float = THRESHOLD) -> list[tuple[Tensor, Tensor]]:
    """logits (B, Q, 2), boxes (B, Q, 4) cxcywh -> B answers: scores (n,), best first, and boxes (n, 4) xyxy in 0..1.
    In REC the answer is the one box; in gREC, every box whose score reaches the threshold, which may be none."""
    scores = logits.float().softmax(-1)[..., 0].cpu()  # (B, Q)
    boxes = box_convert(boxes.float().cpu(), "cxcywh", "xyxy").clamp(0, 1)
    if scores.shape[1] == 1:
        return list(zip(scores, boxes, strict=True))
    answers = []
    for s, b in zip(scores, boxes, strict=True):  # (Q,), (Q, 4)
        kept = (s.double() >= threshold) & (b[:, 2:] > b[:, :2]).all(1)  # a box that was clipped away is no answer
        s, order = s[kept].sort(descending=True)
        answers.append((s, b[kept][order]))
    return answers


def record(example: data.Example, found: Found, size: tuple[int, int], grec: bool) -> Line:
    """What was found for an example: boxes in pixels of its image of this (width, height), and how right they are."""
    line: Line = {}
    if example.boxes is not None:
        truth = data.clip_boxes(example.boxes, *size)[: None if grec else 1]  # (m, 4); in REC the first one counts
        line["truth"] = truth.round(decimals=2).tolist()
    for branch, (scores, boxes) in found.items():
        boxes = boxes.double().nan_to_num(0) * torch.tensor([*size, *size])  # (n, 4)
        line[branch] = {"boxes": boxes.round(decimals=2).tolist()}
        line[branch]["scores"] = [round(score, 4) for score in scores.nan_to_num(0).tolist()]
        if example.boxes is not None:
            iou = float(len(truth) == len(boxes))  # where nothing is to be found or nothing was answered
            if len(truth) and len(boxes):
                iou = box_iou(truth, boxes).nan_to_num(0).amax(1).mean().item()  # of each true box, its best answer
            right = grec_correct(scores, boxes, truth, 0) if grec else bool(rec_correct(boxes, truth).any())
            line[branch] |= {"iou": round(iou, 4), "correct": right}
    value = agreement(found)
    return line | {"agreement": value if value is None else round(value, 4)}


def shares(results: Sequence[Line]) -> dict[str, float]:
    """{branch: share of correct answers}."""
    count = len(results)
    return {name: sum(line[name]["correct"] for line in results) / count for name in BRANCHES if name in results[0]}


def summary(results: Sequence[Line], examples: Sequence[data.Example], grec: bool) -> dict[str, float]:
    """The figures of a split: n and {branch}_acc in REC; n, n_none, {branch}_f1 and {branch}_nacc in gREC."""
    none = [result for result, example in zip(results, examples, strict=True) if not example.boxes]
    figures = {"n": len(results), "n_none": len(none)} if grec else {"n": len(results)}
    figures |= {f"{branch}_f1" if grec else f"{branch}_acc": share for branch, share in shares(results).items()}
    return figures | ({f"{branch}_nacc": share for branch, share in shares(none).items()} if grec and none else {})


def groups_of(example: data.Example) -> list[str]:
    """The groups that accuracy is reported for: the number of targets and, where it has one, the example's kind."""
    kind = repr(example.kind) if example.kind in ("all", *TARGET_GROUPS) else example.kind  # so that no two groups mix
    return [TARGET_GROUPS[min(len(example.boxes), 2)], *([kind] if kind else [])]


def by_kind(results: Sequence[Line], examples: Sequence[data.Example]) -> dict[str, dict[str, float]]:
    """{group: {"n": its size, branch: share of correct answers}} for each group but one that holds all examples."""
    groups: dict[str, list] = {}
    for result, example in zip(results, examples, strict=True):
        for name in groups_of(example):
            groups.setdefault(name, []).append(result)
    parts = {name: group for name, group in sorted(groups.items()) if len(group) < len(examples)}
    return {name: {"n": len(group), **shares(group)} for name, group in parts.items()}


def by_agreement(results: Sequence[Line]) -> dict[str, dict[str, float]]:
    """More lines like those of `by_kind`, where both branches answered: accuracy where they agree well, partly, hardly;
    and AUROC, the share of pairs of a right and a wrong answer in which they agree more on the right one."""
    values = [line["agreement"] for line in results]
    if None in values:
        return {}
    rows, values = {}, torch.tensor(values)
    for name, low, high in (("agree >= 0.9", 0.9, 2), ("agree 0.5-0.9", 0.5, 0.9), ("agree < 0.5", -1, 0.5)):
        if group := [line for line in results if low <= line["agreement"] < high]:
            rows[f"{name:<13}{len(group) / len(results):>5.0%}"] = {"n": len(group), **shares(group)}
    auroc: dict[str, float] = {"n": len(results)}
    for branch in shares(results):
        is_right = torch.tensor([line[branch]["correct"] for line in results])
        right, wrong = values[is_right], values[~is_right].sort().values
        # A pair in the right order counts 2, a tie 1.
        won = sum(torch.searchsorted(wrong, right, right=ties).sum().item() for ties in (False, True))
        auroc[branch] = won / (2 * len(right) * len(wrong) or float("nan"))
    return rows | {"AUROC of agreement": auroc}


def mean_box_accuracy(train: Sequence[data.Example], examples: Sequence[data.Example]) -> float | None:
    """Acc@0.5 of always answering the mean box of the training set; None where annotations state no image sizes."""
    if any(each.size is None for each in (*train, *examples)):
        return None
    boxes = []  # of both sets, (n, 4) xyxy, as if every image were 1000 pixels wide and high
    for some in (train, examples):
        rows = torch.tensor([(*each.boxes[0], *each.size, *each.size) for each in some if each.boxes])
        xywh, sizes = rows.double().reshape(-1, 8).split(4, dim=1)
        boxes.append(1000 * box_convert(xywh / sizes, "xywh", "xyxy"))
    return rec_correct(boxes[0].mean(0).expand_as(boxes[1]), boxes[1]).sum().item() / len(examples)


# ------------------------------------------------------------------------------------ evaluation and grounding


def evaluate_dataset(
    model: models.SimVG,
    dataset: data.Dataset,
    collate: data.Collate,
    branch: str = "both",
    batch_size: int = 64,
    workers: int = 0,
    amp: torch.dtype | None = None,
    title: str = "answers",
    after_batch: Callable[[], None] = lambda: None,
    threshold: float = THRESHOLD,
    answers_file: str | None = None,
    at_once: int = 1,
) -> list[Line]:
    """A Line for each row of `dataset`, whose rows hold one example each, in order, on every rank.

    A batch is computed whole by one rank, so no answer depends on the number of ranks. `workers` threads read images;
    at most `at_once` of them are in the model. With `answers_file`, rank 0 appends the lines to it, and an image that
    cannot be read gives a line with "error" in place of an InputError. `after_batch` may raise to end early.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batches = [range(i, min(i + batch_size, len(dataset))) for i in range(0, len(dataset), batch_size)]
    in_model, pool = Semaphore(at_once), ThreadPoolExecutor(max(1, workers))

    def lines_of(numbers: range) -> list[Line]:
        examples, items = [dataset.rows[number][0] for number in numbers], []
        lines = [{"image": example.name, "expression": example.expression} for example in examples]
        for number, line in zip(numbers, lines, strict=True):
            try:
                items.append(dataset[0, number])
            except InputError as error:
                if not answers_file:
                    raise
                line["error"] = str(error)
        with in_model:
            found = find(model, items, collate, branch, amp, threshold) if items else []
        for (*_, number, size), each in zip(items, found, strict=True):
            i = number - numbers[0]
            lines[i] |= record(examples[i], each, size, model.tqg.query_embed.num_embeddings > 1)
        return lines

    was_training, lines = model.training, []
    model.eval()  # before the first thread starts
    mine = (pool.map if workers > 1 else map)(lines_of, batches[rank::world])
    try:
        for _ in tqdm(batches[::world], title, disable=None if title and rank == 0 else True, leave=False):
            parts = [next(mine, [])] * world  # a batch of each rank, in order
            if world > 1:
                dist.all_gather_object(parts, parts[rank])
            lines += (new := list(chain(*parts)))
            if answers_file and rank == 0:
                with open(answers_file, "a") as file:
                    file.writelines(json.dumps(line) + "\n" for line in new)
            after_batch()
    finally:
        pool.shutdown(cancel_futures=True)
        model.train(was_training)
    return lines


@torch.inference_mode()
def find(
    model: models.SimVG, items: list, collate: data.Collate, branch: str, amp: torch.dtype | None, threshold: float
) -> list[Found]:
    """What the model finds for items of a Dataset; in halves where the memory does not suffice for all."""
    try:
        batch = collate(items).to(model.device)
        answers = model(batch.images, batch.tokens, batch.text_pad, branch, amp).answers()
        picked = [pick_answers(*each, threshold) for each in answers.values()]
        return [dict(zip(answers, each, strict=True)) for each in zip(*picked, strict=True)]
    except torch.OutOfMemoryError:
        if len(items) == 1:
            raise
    # Outside the `except`, whose traceback keeps the memory of the batch that failed.
    halves = items[: len(items) // 2], items[len(items) // 2 :]
    return sum((find(model, half, collate, branch, amp, threshold) for half in halves), [])


class Answer(NamedTuple):
    """What `ground` finds for a phrase: in REC one box, in gREC all whose score reaches the threshold, maybe none."""

    boxes: Tensor  # (n, 4) xyxy in pixels of the image, the best first
    scores: Tensor  # (n,)
    agreement: float | None  # of both branches; None unless the checkpoint's config says that both were trained


def ground(
    model: models.SimVG,
    image: str | Path | Image.Image | np.ndarray | Tensor | list,
    texts: Sequence[str],
    tokenizer: data.Tokenizer,
    branch: str = "token",
    threshold: float = THRESHOLD,
    max_tokens: int | None = None,
    amp: torch.dtype | None = None,
) -> list[Answer] | list[list[Answer]]:
    """An Answer for each phrase about an image: a path, a PIL image, an RGB array (H, W, 3) uint8 or a tensor (3, H, W)
    uint8; for a list of images, a list of such lists. Where both branches were trained, both run, for `agreement`.

    `max_tokens` is what the model was trained with, unless given; a warning tells which phrase was cut there.
    """
    if isinstance(image, list | tuple):
        return [ground(model, each, texts, tokenizer, branch, threshold, max_tokens, amp) for each in image]
    picture = to_tensor(image)  # (3, H, W)
    if isinstance(texts, str):
        raise InputError(f"expected a list of phrases, not {texts!r:.60}")
    check_tokenizer(model, tokenizer)
    max_tokens = max_tokens or model.max_tokens or 20  # a model that was not loaded from a file knows no number
    check_phrases(texts, tokenizer, max_tokens)
    trained = trained_branch(model.config["train"]) if model.config else branch
    if trained not in ("both", branch):
        raise InputError(f"branch={branch!r}: of this checkpoint only the {trained} branch was trained")
    resized = data.resize(picture, model.image_size, model.image_size)  # (3, S, S)
    items = [(resized, text, torch.empty(0, 4), 0, None) for text in texts]
    found = find(model, items, data.Collate(tokenizer, max_tokens), trained, amp, threshold)
    scale = torch.tensor([picture.shape[2], picture.shape[1]] * 2)
    return [Answer(each[branch][1] * scale, each[branch][0], agreement(each)) for each in found]


def to_tensor(image: str | Path | Image.Image | np.ndarray | Tensor) -> Tensor:
    """What `ground` takes for an image -> (3, H, W) uint8."""
    if isinstance(image, str | Path | Image.Image):
        return data.pixels(image) if isinstance(image, Image.Image) else data.read_image(str(image))
    kind, shape = str(getattr(image, "dtype", type(image).__name__)), tuple(getattr(image, "shape", ()))
    is_array = isinstance(image, np.ndarray)
    if not kind.endswith("uint8") or len(shape) != 3 or 0 in shape or shape[2 if is_array else 0] != 3:
        wanted = "a path, a PIL image, an array (H, W, 3) uint8 or a tensor (3, H, W) uint8"
        raise InputError(f"expected as an image {wanted}, not {kind} {shape or ''}")
    return torch.tensor(np.ascontiguousarray(image)).permute(2, 0, 1) if is_array else image


def check_phrases(texts: Sequence[str], tokenizer: data.Tokenizer, max_tokens: int) -> None:
    """InputError for a phrase without a word, a warning for one that is too long."""
    for text in texts:
        data.check_expression(text, "a phrase (--text)")
        seen, was_cut = tokenizer.seen(text, max_tokens)
        if was_cut:
            warnings.warn(f"{text!r} was cut, the model reads {seen!r}", stacklevel=3)


def load(path: str | Path, device: str | torch.device = "cpu") -> tuple[models.SimVG, data.Tokenizer]:
    """A checkpoint of train.py and the tokenizer that its config names. CheckpointError, InputError: any misfit."""
    model = models.load(path, device)
    if model.config is None:
        raise InputError(f"{path}: an official checkpoint names no tokenizer: use model.load and data.Tokenizer")
    return model, load_collate(model.config, model).tokenizer


def check_tokenizer(model: models.SimVG, tokenizer: data.Tokenizer) -> None:
    """InputError unless the model was trained with this tokenizer, as far as its checkpoint tells."""
    is_larger = tokenizer.vocab_size > model.encoder.text_embed.num_embeddings
    if is_larger or model.tokenizer_digest not in (None, tokenizer.digest):
        raise InputError(f"{tokenizer.path}: is not the tokenizer that this model was trained with")


# ----------------------------------------------------------------------- pictures, curves, attention, the report


def draw_line(image: Tensor, line: Line, side: int = 280) -> Image.Image:
    """image (3, H, W) with the boxes of a `record`."""
    boxes = {"truth": line["truth"]} if "truth" in line else {}
    boxes |= {name: line[name]["boxes"] for name in BRANCHES if name in line}
    size = torch.tensor([image.shape[2], image.shape[1]] * 2)
    boxes = {name: torch.tensor(each).reshape(-1, 4) / size for name, each in boxes.items()}
    text = agreement_text(line)
    return data.draw(image, boxes, line["expression"][: side // 6 - len(text)] + text, side)


def agreement_text(line: Line) -> str:
    return "" if line["agreement"] is None else f", agreement {line['agreement']:.2f}"


def draw_curves(folders: Sequence[str | Path], path: str | Path) -> None:
    """Draw metrics.jsonl of runs: the loss terms, W_dt, and the metrics of the split that chooses the best weights. Of
    several runs each of these names has a panel, with a line for each run. A half-written last row is left out."""
    kinds = dict.fromkeys(("decoder", "token_on_truth", "token_on_teacher"), "loss") | {"teacher_weight": "W_dt"}
    kinds |= {f"{branch}_{metric}": "metric" for metric in ("acc", "f1", "nacc") for branch in BRANCHES}
    panels: dict[str, dict[str, list]] = {}
    for folder in folders:
        rows = []
        for where, line in data.json_lines(Path(folder, "metrics.jsonl")):
            if line.endswith(b"}\n"):
                with data.located(where):
                    rows.append(json.loads(line))
        for name, kind in kinds.items():
            title, label = (f"{kind}: {name}", str(folder)) if len(folders) > 1 else (kind, name)
            points = [(row["step"], row[name], 0) for row in rows if name in row and row.get("weights") != "best"]
            panels.setdefault(title, {})[label] = points
    draw_panels(panels, path)


def draw_panels(panels: dict[str, dict[str, list]], path: str | Path, x_label: str = "step") -> None:
    """Save charts one below the other. panels: {title: {name of a line: its points (x, y, half of an error bar)}}."""
    panels = {title: lines for title, lines in panels.items() if any(lines.values())}
    if not panels:
        raise InputError(f"{path}: there is nothing to draw yet")
    longest = max(len(name) for lines in panels.values() for name in lines)
    page = Image.new("RGB", (660 + 6 * longest, 260 * len(panels)), "white")
    pen, left, right = ImageDraw.Draw(page), 60, 630
    for number, (title, lines) in enumerate(panels.items()):
        top, bottom = 260 * number + 25, 260 * number + 215
        points = [point for line in lines.values() for point in line]
        low, high = min(y - error for _, y, error in points), max(y + error for _, y, error in points)
        last = max(x for x, _, _ in points)
        if 0 < low and not high / 2 < low < high:  # else most of the chart would be empty
            low = 0
        x_scale, y_scale = (right - left) / (last or 1), (bottom - top) / (high - low or 1)
        pen.rectangle((left, top, right, bottom), outline="lightgrey")
        pen.text((left, top - 18), title, "black")
        pen.text((right, bottom + 20), x_label, "black", anchor="rt")
        for tick in ticks(0, last):
            x = left + x_scale * tick
            pen.line((x, top, x, bottom), "lightgrey")
            pen.text((x, bottom + 6), f"{tick:,.6g}", "black", anchor="mt")
        for tick in ticks(low, high):
            y = bottom - y_scale * (tick - low)
            pen.line((left, y, right, y), "lightgrey")
            pen.text((left - 6, y), f"{tick:,.6g}", "black", anchor="rm")
        for i, (name, line) in enumerate(lines.items()):
            ink, dot = INKS[i % len(INKS)], 2 * (len(line) < 40)
            pen.text((right + 10, top + 14 * i), name if line else "", ink)
            placed = [(left + x_scale * x, bottom - y_scale * (y - low), y_scale * error) for x, y, error in line]
            pen.line([(x, y) for x, y, _ in placed], ink, width=2)
            for x, y, error in placed:
                pen.line((x, y - error, x, y + error), ink)
                pen.rectangle((x - dot, y - dot, x + dot, y + dot), ink)
    page.save(path)


def ticks(low: float, high: float) -> list[float]:
    """Two to seven round numbers from low to high; one where these are equal."""
    least = (high - low or abs(high) or 1) / 6
    step = next(s for p in range(-9, 39) for s in (10.0**p, 2 * 10.0**p, 5 * 10.0**p) if s >= least)
    return [step * i for i in range(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1)]


def coverage(boxes: Tensor, grid: int) -> Tensor:
    """boxes (n, 4) xyxy in 0..1 -> (grid * grid,): the share of each patch that lies in a box."""
    low = (torch.arange(grid) / grid)[:, None]  # (grid, 1): where each row or column of patches begins
    first, last = boxes[:, None, :2], boxes[:, None, 2:]  # (n, 1, 2)
    inside = (torch.minimum(last, low + 1 / grid) - torch.maximum(first, low)).clamp(min=0) * grid  # (n, grid, 2)
    return (inside[:, :, None, 1] * inside[:, None, :, 0]).amax(0).flatten()  # rows times columns


@torch.inference_mode()
def print_attention(title: str, model: models.SimVG, dataset: data.Dataset, collate: data.Collate, branch: str) -> None:
    """Print which share of the attention that falls on patches lies in the true boxes, in percent for each layer: means
    over the first 500 expressions that have a target. Of several queries, the one with the best score counts."""
    having, shares = [i for i, example in enumerate(dataset.examples) if example.boxes][:500], []
    if not having:
        raise InputError("--attention: no expression of this split has a target")
    for i in having:
        batch = collate([dataset[0, i]]).to(model.device)  # one example, so no box is padding
        inside = coverage(box_convert(batch.boxes[0], "cxcywh", "xyxy").cpu(), model.encoder.grid)  # (N,)
        maps = model.attention_maps(batch.images, batch.tokens, batch.text_pad)
        looks = torch.cat([maps.object_token[:, 0], maps.queries[:, 0, maps.best_query[0]]]).cpu()  # (layers + K, N)
        shares.append(torch.cat([inside.mean()[None], (looks * inside).sum(1) / looks.sum(1)]))
    area, *layers = (100 * torch.stack(shares).mean(0)).tolist()
    print(f"{title}, {len(having)} expressions: the true box covers {area:.1f} % of the image")
    print("of the attention that falls on patches, % inside the true box, layer by layer:")
    print(f"{'object token':<18}" + "".join(f"{share:>8.1f}" for share in layers[: len(maps.object_token)]))
    if branch != "token":  # the decoder was trained, and is asked for
        print(f"{'decoder query':<18}" + "".join(f"{share:>8.1f}" for share in layers[len(maps.object_token) :]))


@torch.inference_mode()
def draw_attention(
    model: models.SimVG, image: Tensor, texts: Sequence[str], collate: data.Collate, branch: str, path: str
) -> None:
    """Save a row of pictures for each phrase: where the object token, the decoder's best query and each word look."""
    resized = data.resize(image, model.image_size, model.image_size).expand(len(texts), -1, -1, -1)  # (B, 3, S, S)
    inputs = (resized, *collate.tokenizer(texts, collate.max_tokens))  # (B, 3, S, S), 2 of (B, L)
    maps = model.attention_maps(*(x.to(model.device) for x in inputs))
    grey, red = image.float().mean(0, keepdim=True) * 0.6, torch.tensor([255.0, 40.0, 0.0])[:, None, None]
    words = [collate.tokenizer.pieces(text, collate.max_tokens) for text in texts]
    tiles, columns = [], 2 + (branch != "token") + max(map(len, words))
    for i, text in enumerate(texts):  # maps of the last layers
        looks = {"object token": maps.object_token[-1, i]}
        if branch != "token":  # the decoder was trained, and is asked for
            looks["decoder query"] = maps.queries[-1, i, maps.best_query[i]]
        looks |= {f"{j}: {word}": maps.words[-1, i, j + 1] for j, word in enumerate(words[i])}  # + 1: <s> comes first
        tiles.append(data.draw(image, {}, text))
        for name, look in looks.items():  # (N,)
            patches = look.cpu().view(1, model.encoder.grid, -1)
            heat = data.resize(patches, *image.shape[1:]) / look.max().item()  # (1, H, W)
            tiles.append(data.draw((grey + heat * red).clamp(max=255).byte(), {}, f"{name} ({text})"))
        tiles += [Image.new("RGB", (1, 1))] * (-len(tiles) % columns)  # fill up the row
    data.tile(tiles, path, columns)


def report(path: str, title: str, splits: dict[str, tuple[list, list]]) -> None:
    """Write the answers as one HTML file that needs nothing else. `splits`: {name: (its examples, their `record`s)}."""
    # Every answer in the report has its picture; of too many images, it holds the answers to an even spread of them.
    answers = [(split, *pair) for split, pairs in splits.items() for pair in zip(*pairs, strict=True)]
    images = list({example.image: example for _, example, _ in answers}.values())  # one example of each image
    if len(images) > PICTURES:
        images = [images[i * len(images) // PICTURES] for i in range(PICTURES)]
    pictures = {}
    for example in tqdm(images, "pictures", disable=None, leave=False):
        image = data.read_image(example.image, example.size, example.where)  # (3, H, W)
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        pictures[example.image] = {"size": picture.size}  # (width, height)
        picture.thumbnail((192, 192))
        picture.save(file := io.BytesIO(), "JPEG", quality=75)
        pictures[example.image]["jpeg"] = base64.b64encode(file.getvalue()).decode()
    rows = []
    for split, example, line in (each for each in answers if each[1].image in pictures):
        about = {"split": split, "where": example.where, "groups": ["all", *groups_of(example)]}
        rows.append({**line, **about, "image": example.image})
    title = f"{title}: {len(rows)} of {len(answers)} answers, to {len(images)} images"
    content = {"title": title, "splits": list(splits), "rows": rows, "pictures": pictures}
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    Path(path).write_text(PAGE.replace("CONTENT", text.replace("<", "\\u003c")))  # no text can end the script


# ------------------------------------------------------------------------------------------------- the program


def main() -> None:
    args = parse_arguments()
    if args.curves:
        draw_curves(args.curves, args.save or "curves.png")
        return print(f"picture: {args.save or 'curves.png'}")
    rank, _, device = join_ranks(args.device)
    warnings.formatwarning = lambda message, *_: f"evaluate.py: {message}\n"  # without the line of code
    model = models.load(args.ckpt, device)
    config = model.config
    if args.config:
        config = data.load_config(args.config)
        config["model"] |= {"image_size": model.image_size, "queries": model.tqg.query_embed.num_embeddings}
    elif config is None:
        raise InputError(f"{args.ckpt}: an official checkpoint has no config, name one: --config configs.json:refcoco")
    else:
        with models.unpacking(args.ckpt, InputError):
            data.check_config(config, args.ckpt)
    if fixed := [pair for pair in args.set if pair.startswith("model.")]:
        raise InputError(f"--set {fixed[0]}: the checkpoint says what the model is")
    data.override_config(config, args.set)
    trained = trained_branch(config["train"])
    if args.branch and trained not in ("both", args.branch):
        raise InputError(f"--branch {args.branch}: this checkpoint's {args.branch} branch was never trained")
    if args.amp and not args.attention:  # attention maps are computed in float32
        model.encoder.keep_in_16_bits(models.AMP[args.amp])
    if rank == 0:
        print(f"{args.ckpt}: {model.origin}")
    collate = load_collate(config, model)
    if args.attention and not args.image:
        wait_for_all(leave=True)
        if rank == 0:
            for split in args.split or config["data"]["eval_splits"]:
                print_attention(split, model, load_split(config, split), collate, args.branch or trained)
    else:
        answer_questions(args, model, config, collate, args.branch or trained, rank)


def answer_questions(
    args: argparse.Namespace, model: models.SimVG, config: dict, collate: data.Collate, branch: str, rank: int
) -> None:
    """Answer everything, in the file of --answers if one is given; print boxes, or tables where the truth is known."""
    check_phrases(args.text or (), collate.tokenizer, collate.max_tokens)
    questions = read_questions(args, config)
    examples, done = list(chain(*questions.values())), [[]]
    if args.resume and rank == 0 and Path(args.answers).exists():
        done = [resume_answers(args.answers, examples, branch)]
    if dist.is_initialized():
        dist.broadcast_object_list(done)  # the file may be on the first rank's machine only
    done, workers, at_once = done[0], config["data"]["workers"], 1
    if args.answers and model.device.type == "cpu":
        workers = at_once = torch.get_num_threads()
        torch.set_num_threads(1)  # the last bits of a sum depend on the number of threads that share it
    dataset = data.Dataset([(each,) for each in examples[len(done) :]], model.image_size)
    options = {"amp": models.AMP[args.amp], "threshold": args.threshold, "answers_file": args.answers}
    lines = done + evaluate_dataset(model, dataset, collate, branch, ANSWER_BATCH, workers, at_once=at_once, **options)
    wait_for_all(leave=True)  # what follows is for rank 0 alone and may take long
    if rank == 0 and args.image and not args.answers:
        show_boxes(args, lines, model, collate, branch)
    elif rank == 0:
        print_accuracy(args, questions, lines, config["model"]["queries"] > 1)


def print_accuracy(args: argparse.Namespace, questions: dict[str, list], lines: list[Line], grec: bool) -> None:
    """Print the table of each split and its figures as a line of JSON; write the report."""
    if faults := [line["error"] for line in lines if "error" in line]:
        print(f"{len(faults):,} of {len(lines):,} expressions have no answer: {faults[0]}", file=sys.stderr)
    rest, known = iter(lines), {}
    for split, examples in questions.items():
        if pairs := [each for each in zip(examples, islice(rest, len(examples)), strict=True) if "truth" in each[1]]:
            asked, results = zip(*pairs, strict=True)
            known[split] = asked, results
            figures = summary(results, asked, grec)
            print_table(split, figures, by_kind(results, asked) | by_agreement(results))
            print(json.dumps({"split": split, **figures}))
    if args.report:
        report(args.report, args.ckpt, known)
        print(f"report: {args.report}")


def read_questions(args: argparse.Namespace, config: dict) -> dict[str, list[data.Example]]:
    """{name: examples} of what is to be answered: phrases about images, the rows of a file, or splits."""
    if args.image:
        endings = {ending for ending, name in Image.registered_extensions().items() if name in data.FORMATS}
        paths: list[Path] = []
        for path in map(Path, args.image):
            inside = sorted(path.iterdir()) if path.is_dir() else ()
            paths += [each for each in inside if each.suffix.lower() in endings] or [path]
        if len(paths) > 1 and (args.save or args.attention):
            raise InputError(f"--save and --attention are for one image, not for {len(paths)}")
        return {"": [data.Example(str(p), text, None, None, "", "", str(p)) for p in paths for text in args.text]}
    if args.rows:
        settings = {**config["data"], "annotations": args.rows}
        return {args.rows: data.expand(data.read_rows(settings, "", need_boxes=False))}
    splits = args.split or config["data"]["eval_splits"]  # eval_splits: what train.py evaluates, too
    return {split: load_split(config, split, check=not args.answers).examples for split in splits}


def resume_answers(path: str, examples: Sequence[data.Example], branch: str) -> list[Line]:
    """The whole batches of lines of a stopped run; the file is cut behind them. InputError if others were asked."""
    with data.located(path), open(path, "rb+") as file:
        lines = file.read().split(b"\n")[:-1]  # whole ones
        answered = [json.loads(line) for line in lines]
        asked = [(example.name, example.expression) for example in examples]
        wanted = {*BRANCHES} if branch == "both" else {branch}
        for i, line in enumerate(answered):
            same = asked[i : i + 1] == [(line["image"], line["expression"])]
            if not same or "error" not in line and line.keys() & {*BRANCHES} != wanted:
                raise InputError(f"line {i + 1} answers something else; --resume goes on with the same input only")
        whole = len(lines) // ANSWER_BATCH * ANSWER_BATCH
        file.truncate(sum(len(line) + 1 for line in lines[:whole]))
        return answered[:whole]


def load_split(config: dict, split: str, check: bool = True) -> data.Dataset:
    """Every expression of a split, once. If `check`, InputError where an image is missing or misfits its row."""
    rows = [(example,) for example in data.expand(data.read_rows(config["data"], split))]
    if check and (not dist.is_initialized() or dist.get_rank() == 0):
        data.check_files(rows)
    return data.Dataset(rows, config["model"]["image_size"])


def load_collate(config: dict, model: models.SimVG) -> data.Collate:
    tokenizer = data.Tokenizer(config["data"]["tokenizer"])
    check_tokenizer(model, tokenizer)
    return data.Collate(tokenizer, config["data"]["max_tokens"])


def trained_branch(settings: dict) -> str:
    """The branch that the loss factors of a config train: "decoder", "token" or "both"."""
    if settings["loss_token_on_teacher"] is not None:
        return "both"  # the decoder branch teaches the token branch
    decoder, token = settings["loss_decoder"] is not None, settings["loss_token_on_truth"] is not None
    if not decoder and not token:
        raise InputError("train: every loss factor is null, there is nothing to learn")
    return "both" if decoder and token else "decoder" if decoder else "token"


def print_table(split: str, figures: dict, kinds: dict[str, dict], baseline: float | None = None) -> None:
    """Print one split in percent: all expressions, each group of `by_kind` and `by_agreement`, and the mean box."""
    metric, key = ("F1=1", "f1") if "n_none" in figures else ("Acc@0.5", "acc")
    branches = [branch for branch in BRANCHES if f"{branch}_{key}" in figures]
    rows = {"all": {"n": figures["n"], **{branch: figures[f"{branch}_{key}"] for branch in branches}}, **kinds}
    if baseline is not None:
        rows["mean box"] = {"n": figures["n"], **dict.fromkeys(branches, baseline)}
    print(f"{split:<18} {'n':>7}" + "".join(f"{f'{branch} {metric}':>18}" for branch in branches))
    for name, row in rows.items():
        name = "no target (N-acc)" if name == "no target" else name
        print(f"{name:<18} {row['n']:>7}" + "".join(f"{100 * row[branch]:>18.2f}" for branch in branches))


def show_boxes(
    args: argparse.Namespace, lines: Sequence[Line], model: models.SimVG, collate: data.Collate, branch: str
) -> None:
    """Print every box with its score, and save a picture if all is about one image."""
    several = len({line["image"] for line in lines}) > 1
    for line in lines:
        for name in (name for name in BRANCHES if name in line):
            about = f"{line['image']}: {name}" if several else name
            if not line[name]["boxes"]:
                print(f"{about}: nothing in the image fits {line['expression']!r}{agreement_text(line)}")
            for box, score in zip(line[name]["boxes"], line[name]["scores"], strict=True):
                corners = " ".join(f"{value:.1f}" for value in box) + " (x1 y1 x2 y2, pixels)"
                print(f"{about}: {line['expression']!r} box {corners}, score {score:.3f}{agreement_text(line)}")
    if several:
        return
    image = data.read_image(lines[0]["image"])  # (3, H, W)
    path = args.save or f"{Path(lines[0]['image']).with_suffix('')}_grounded.png"
    pictures = [draw_line(image, line, max(280, min(1000, max(image.shape[1:])))) for line in lines]
    data.tile(pictures, path, columns=min(3, len(pictures)))
    print(f"picture: {path}")
    if args.attention:
        path = f"{Path(path).with_suffix('')}_attention.png"
        draw_attention(model, image, args.text, collate, branch, path)
        print(f"attention: {path}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluate a checkpoint; or, with --image and --text, find boxes.")
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--ckpt", metavar="FILE", help="a checkpoint of train.py, or an official .pth")
    what.add_argument("--curves", nargs="+", metavar="RUN", help="only draw the curves of these runs' folders")
    add("--config", metavar="FILE:NAME", help="instead of the checkpoint's (an official .pth has none)")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="such as data.images=DIR")
    add("--split", nargs="+", metavar="NAME", help="splits to evaluate (default: all of the config)")
    add("--branch", choices=BRANCHES, help="the branch that answers (default: all that were trained)")
    add("--rows", metavar="FILE.jsonl", help="with --answers: rows to answer, which need no boxes")
    add("--image", nargs="+", metavar="FILE", help="find phrases in these images or folders of images")
    add("--text", nargs="+", metavar="PHRASE", help="the phrases")
    add("--threshold", type=float, default=THRESHOLD, metavar="SCORE", help="gREC: boxes from here on (default: 0.7)")
    add("--amp", choices=["bf16", "fp16"], default="", help="run the encoder in 16 bits")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1 or mps (default: a GPU if there is one)")
    add("--attention", action="store_true", help="show where tokens look: a picture, or a table")
    add("--answers", metavar="FILE.jsonl", help="write every answer to this file, a line of JSON each")
    add("--resume", action="store_true", help="go on with the file of --answers, with the same options")
    add("--report", metavar="FILE.html", help="also write a page to browse the answers")
    add("--save", metavar="FILE.png", help="where the picture goes (default: IMAGE_grounded.png, curves.png)")
    args = parser.parse_args()
    answers, others = args.answers, sum(map(bool, (args.image, args.rows, args.split)))
    # Another rank than the first may see the file that the first one has just made.
    is_there = answers and os.environ.get("RANK", "0") == "0" and Path(answers).exists()
    for is_wrong, message in (
        ((args.image is None) != (args.text is None), "--image and --text go together"),
        (args.report and (args.image or args.attention), "--report goes with the evaluation of splits"),
        (args.save and not (args.image or args.curves), "--save goes with --image or --curves"),
        ((args.rows or args.resume) and not answers, "--rows and --resume go with --answers"),
        (answers and (args.attention or args.report or args.save), "--answers goes without other files"),
        (others > 1, "only one of --image, --rows and --split can be answered"),
        (is_there and not args.resume, f"--answers {answers}: exists (--resume goes on)"),
        (not 0 <= args.threshold <= 1, "--threshold: expected a score from 0 to 1"),
    ):
        if is_wrong:
            parser.error(message)
    for option, allowed in {"answers": (".jsonl",), "report": (".html",), "save": (".png", ".jpg", ".jpeg")}.items():
        name, endings = getattr(args, option), " or ".join(allowed)
        if name and not (name.lower().endswith(allowed) and Path(name).absolute().parent.is_dir()):
            parser.error(f"--{option} {name}: expected a file name that ends in {endings}, in a folder that exists")
    return args


# ----------------------------------------------------------------------------------- ranks and memory settings


def join_ranks(name: str | None = None) -> tuple[int, int, torch.device]:
    """(rank, number of ranks, device) of this process. Under torchrun it joins the other ranks."""
    keep_freed_memory()
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    name, gpus = name or ("cuda" if torch.cuda.is_available() else "cpu"), torch.cuda.device_count()
    chosen = f"cuda:{local}" if name == "cuda" else name
    devices = ["cpu"] + ["mps"] * torch.backends.mps.is_available() + [f"cuda:{i}" for i in range(gpus)]
    if chosen not in devices or world > 1 and name not in ("cpu", "cuda"):
        raise InputError(f"rank {local} of {world}: no device {chosen}; there are {', '.join(devices)} ({gpus} GPUs)")
    device = torch.device(chosen)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.enable_cudnn_sdp(False)  # bugs of PyTorch: wrong gradients with masks, NaN for one query
    if world > 1:
        if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise InputError(f"WORLD_SIZE is {world}, but there is no {', '.join(missing)}: start with torchrun")
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    return (dist.get_rank() if world > 1 else 0), world, device


def wait_for_all(leave: bool = False) -> None:
    """Wait until every rank is here, then maybe leave the process group. Before that, delete DDP, which holds it."""
    if dist.is_initialized():
        dist.barrier()
        if leave:
            backend = dist.group.WORLD._get_backend(torch.device("cpu"))  # kept, or torch 2.6 may hang in the next line
            dist.destroy_process_group()
            del backend  # ends the threads of gloo, which could abort Python while it exits


def keep_freed_memory() -> None:
    """Linux: keep the memory that a tensor sets free for the next one. glibc gives large blocks back to the system, and
    then each page of the next activations costs a page fault: a fourth of a training step on a CPU."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        if not libc.mallopt(-3, 1 << 30):  # M_MMAP_THRESHOLD
            libc.mallopt(-3, 32 << 20)  # the most that glibc takes before 2.35
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


# The page: the accuracy of what is selected, and a card for each answer. Data is only ever set as text, never as HTML.
PAGE = r"""<!doctype html><meta charset="utf-8"><title>SimVG report</title>
<style>
  body { font: 14px system-ui, sans-serif; margin: 1rem 1.5rem; color-scheme: dark; color: #ddd; background: #181a1b; }
  td { padding: .1rem .7rem; text-align: right; border-bottom: 1px solid #333; }
  #bar { clear: both; position: sticky; top: 0; padding: .6rem 0; background: #181a1b; }
  #cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: .8rem; }
  .card { background: #222526; border-top: 3px solid #2a7; padding: .4rem; } .wrong { border-color: #c33; }
  rect, polyline { fill: none; stroke: currentcolor; stroke-width: 2px; vector-effect: non-scaling-stroke; }
  text { fill: #999; font-size: 9px; } #curve { width: 340px; float: right; color: #666; }
  .truth { color: lime; stroke-dasharray: 7 5; } .decoder { color: orange; } .token { color: deepskyblue; }
</style><svg id="curve" viewBox="-30 -8 240 124"></svg><p id="title"></p><table id="table"></table>
<div id="bar">
  <select id="split"></select> <select id="answers"></select> <select id="group"></select> <select id="order"></select>
  <input id="search" type="search" placeholder="search the text">
  <button id="back">previous page</button> <button id="next">next page</button> <span id="shown"></span>
  boxes: <span class="truth">truth</span> <span class="decoder">decoder</span> <span class="token">token</span>
</div><div id="cards"></div>
<script id="content" type="application/json">CONTENT</script><script>
const byId = id => document.getElementById(id), data = JSON.parse(byId("content").textContent), perPage = 48;
const branches = ["decoder", "token"].filter(b => b in data.rows[0]);
const groups = [...new Set(data.rows.flatMap(row => row.groups))];
for (const row of data.rows) {
  row.errors = branches.filter(b => !row[b].correct).length;
  row.iou = branches.reduce((sum, b) => sum + row[b].iou, 0);
}
const filters = {"all answers": row => true, "a branch is wrong": row => row.errors, "all right": row => !row.errors};
for (const b of branches) filters[`${b} wrong`] = row => !row[b].correct;
if (branches.length > 1) filters["one right, one wrong"] = row => row.errors === 1;
const orders = {"wrong first": (a, b) => b.errors - a.errors, "as in the file": () => 0,
  "lowest IoU first": (a, b) => a.iou - b.iou, "highest IoU first": (a, b) => b.iou - a.iou};
if (branches.length > 1) orders["lowest agreement first"] = (a, b) => a.agreement - b.agreement;
const choices = {split: data.splits, answers: Object.keys(filters), group: groups, order: Object.keys(orders)};
let page = 0, found = [];
function make(parent, name, text = "", attributes = {}) {
  const space = name === "svg" ? "http://www.w3.org/2000/svg" : parent.namespaceURI;
  const element = parent.appendChild(document.createElementNS(space, name));
  element.textContent = text;
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}
function select() {
  const [split, answers, group, order] = Object.keys(choices).map(id => byId(id).value);
  const text = byId("search").value.toLowerCase();
  const fits = row => row.split === split && filters[answers](row) && row.groups.includes(group);
  found = data.rows.filter(row => fits(row) && row.expression.toLowerCase().includes(text)).sort(orders[order]);
  byId("table").replaceChildren();
  for (const name of groups) {
    const rows = found.filter(row => row.groups.includes(name)), line = make(byId("table"), "tr");
    const percent = b => (100 * rows.filter(row => row[b].correct).length / rows.length).toFixed(2);
    const cells = rows.length ? [name, rows.length, ...branches.map(b => `${b} ${percent(b)} % right`)] : [];
    for (const cell of cells) make(line, "td", cell);
  }
  if (branches.length > 1) curve();
  show(0);
}
function curve() {  // the accuracy of the answers that the branches agree most on, over their share
  const svg = byId("curve"), sorted = [...found].sort((a, b) => b.agreement - a.agreement), count = sorted.length;
  svg.replaceChildren();
  if (!count) return;
  const rights = b => { let right = 0; return sorted.map((row, i) => 100 * (right += row[b].correct) / (i + 1)); };
  const low = Math.min(90, ...branches.map(b => 10 * Math.floor(rights(b).at(-1) / 10)));
  make(svg, "rect", "", {width: 200, height: 100});
  for (const [x, y, text] of [[-28, 8, "100 %"], [-28, 100, `${low} %`], [0, 112, "right, of the most agreed 0-100 %"]])
    make(svg, "text", text, {x, y});
  for (const b of branches) {
    const isEnd = (_, i) => i === count - 1 || sorted[i].agreement !== sorted[i + 1].agreement;  // of a group of ties
    const points = rights(b).map((y, i) => [200 * (i + 1) / count, Math.min(100, 100 * (100 - y) / (100 - low))]);
    const ends = points.filter(isEnd), step = Math.ceil(ends.length / 400);
    const some = ends.filter((_, i) => i % step === 0 || i === ends.length - 1);
    make(svg, "polyline", "", {class: b, points: some.join(" ")});
  }
}
function show(number) {
  const pages = Math.ceil(found.length / perPage) || 1;
  page = Math.min(Math.max(number, 0), pages - 1);
  byId("shown").textContent = `${found.length} answers, page ${page + 1} of ${pages}`;
  byId("cards").replaceChildren();
  for (const row of found.slice(page * perPage, (page + 1) * perPage)) {
    const card = make(byId("cards"), "div", "", {class: row.errors ? "card wrong" : "card"});
    const {size: [width, height], jpeg} = data.pictures[row.image];
    const svg = make(card, "svg", "", {viewBox: `0 0 ${width} ${height}`});
    make(svg, "image", "", {href: "data:image/jpeg;base64," + jpeg, width, height});
    for (const [name, boxes] of [...branches.map(b => [b, row[b].boxes]), ["truth", row.truth]])
      for (const [x, y, right, bottom] of boxes)
        make(svg, "rect", "", {class: name, x, y, width: right - x, height: bottom - y});
    make(card, "div", row.expression);
    for (const b of branches) {
      const {correct, iou, scores} = row[b], said = scores.map(score => score.toFixed(2)).join(" ") || "none";
      make(card, "div", `${b} ${correct ? "right" : "wrong"}: IoU ${iou.toFixed(2)}, score ${said}`, {class: b});
    }
    const agreed = branches.length > 1 ? ["agreement " + row.agreement.toFixed(2)] : [];
    make(card, "small", [...agreed, ...row.groups.slice(1), row.where].join(", "));
  }
}
for (const [id, names] of Object.entries(choices))
  for (const name of names) make(byId(id), "option", name);
byId("title").textContent = data.title;
byId("bar").oninput = select;  // of every list and of the search field
byId("back").onclick = () => show(page - 1);
byId("next").onclick = () => show(page + 1);
select();
</script>
"""


if __name__ == "__main__":
    data.run(main, models.CheckpointError)
