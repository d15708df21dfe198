"""Metrics, evaluation, grounding, pictures, attention maps and the report.

    python evaluate.py --ckpt runs/shapes/best.pt                              # accuracy on every split of its config
    python evaluate.py --ckpt best.pt --image photo.jpg --text "the left dog"  # boxes with scores, and a picture
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
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
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
Answers = dict[str, "Result"]  # {branch: its answer} to one expression


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
    giou = generalized_box_iou(answers, truth_xyxy.to(answers))  # (n, n)
    for _ in range(len(truth_xyxy)):
        row, column = divmod(int(giou.argmax()), len(truth_xyxy))
        if giou[row, column] < MIN_IOU:
            return False
        giou[row], giou[:, column] = -1, -1  # both boxes of this pair are taken
    return True


class Result(NamedTuple):
    """The answer of one branch to one expression."""

    correct: bool
    scores: Tensor  # (n,) the highest first; in REC n is 1
    boxes: Tensor  # (n, 4) xyxy in 0..1


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


def score_answers(logits: Tensor, boxes: Tensor, truth: Tensor, truth_mask: Tensor, size: int) -> list[Result]:
    """logits (B, Q, 2), boxes (B, Q, 4), truth (B, M, 4), truth_mask (B, M) -> B results, compared at `size` pixels."""
    answers = pick_answers(logits, boxes)
    truth, truth_mask = box_convert(truth.float().cpu(), "cxcywh", "xyxy") * size, truth_mask.cpu()
    if logits.shape[1] == 1:
        # REC has one target; rows of the mixed sets may state several, then the first one counts.
        first = torch.cat([b for _, b in answers]) * size  # (B, 4)
        correct = (rec_correct(first, truth[:, 0]) & truth_mask[:, 0]).tolist()
    else:
        each = zip(answers, truth, truth_mask, strict=True)
        correct = [grec_correct(s, b * size, t[mask]) for (s, b), t, mask in each]
    # Clones, because a view would be sent to the other ranks with its whole batch.
    return [Result(right, s.clone(), b.clone()) for right, (s, b) in zip(correct, answers, strict=True)]


def share_correct(results: Sequence[Answers], branch: str) -> float:
    return sum(result[branch].correct for result in results) / len(results)


def summary(results: Sequence[Answers], examples: Sequence[data.Example], grec: bool) -> dict[str, float]:
    """The figures of a split: n and {branch}_acc in REC; n, n_none, {branch}_f1 and {branch}_nacc in gREC."""
    none = [result for result, example in zip(results, examples, strict=True) if not example.boxes]
    figures = {"n": len(results), "n_none": len(none)} if grec else {"n": len(results)}
    for branch in results[0]:
        figures[f"{branch}_f1" if grec else f"{branch}_acc"] = share_correct(results, branch)
        if grec and none:
            figures[f"{branch}_nacc"] = share_correct(none, branch)
    return figures


def groups_of(example: data.Example) -> list[str]:
    """The groups that accuracy is reported for: the number of targets and, where it has one, the example's kind."""
    kind = repr(example.kind) if example.kind in ("all", *TARGET_GROUPS) else example.kind  # so that no two groups mix
    return [TARGET_GROUPS[min(len(example.boxes), 2)], *([kind] if kind else [])]


def by_kind(results: Sequence[Answers], examples: Sequence[data.Example]) -> dict[str, dict[str, float]]:
    """{group: {"n": its size, branch: share of correct answers}} for each group but one that holds all examples."""
    groups: dict[str, list] = {}
    for result, example in zip(results, examples, strict=True):
        for name in groups_of(example):
            groups.setdefault(name, []).append(result)
    return {
        name: {"n": len(group)} | {branch: share_correct(group, branch) for branch in group[0]}
        for name, group in sorted(groups.items())
        if len(group) < len(examples)
    }


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


@torch.inference_mode()
def evaluate_dataset(
    model: models.SimVG,
    dataset: data.Dataset,
    collate: data.Collate,
    branch: str = "both",
    batch_size: int = 64,
    workers: int = 0,
    amp: torch.dtype | None = None,
    title: str = "",
    after_batch: Callable[[], None] = lambda: None,
) -> list[Answers]:
    """The answers to the examples of `load_split`, in order, on every rank. `after_batch` may raise to end early."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    was_training = model.training
    model.eval()
    mine = range(rank, len(dataset), world)  # each example belongs to exactly one rank
    results: dict[int, Answers] = {}
    while len(results) < len(mine):
        starts = range(len(results), len(mine), batch_size)
        keys = [[(0, index) for index in mine[start : start + batch_size]] for start in starts]  # (epoch, index)
        stream = data.batches(dataset, collate, keys, workers, pin=model.device.type == "cuda")
        try:
            for batch in tqdm(stream, title, len(keys), disable=None if title and rank == 0 else True, leave=False):
                results |= evaluate_batch(model, batch.to(model.device), branch, amp)
                after_batch()
        except torch.OutOfMemoryError:  # go on from here with batches of half the size
            if batch_size == 1:
                raise
            batch_size //= 2
    if world > 1:  # every rank gets the results of all
        parts: list = [None] * world
        dist.all_gather_object(parts, results)
        results = {index: result for part in parts for index, result in part.items()}
    model.train(was_training)
    assert len(results) == len(dataset), "an expression was counted twice or never"
    return [results[index] for index in range(len(dataset))]


def evaluate_batch(model: models.SimVG, batch: data.Batch, branch: str, amp: torch.dtype | None) -> dict[int, Answers]:
    """{number of the example: the answers to it} of one batch."""
    output = model(batch.images, batch.tokens, batch.text_pad, branch, amp)
    scored = {}
    for name, answer in output.answers().items():
        scored[name] = score_answers(*answer, batch.boxes, batch.box_mask, model.image_size)
    return {index: {name: results[i] for name, results in scored.items()} for i, index in enumerate(batch.index)}


@torch.inference_mode()
def ground(
    model: models.SimVG,
    image: str | Path | Tensor,
    texts: Sequence[str],
    tokenizer: data.Tokenizer,
    branch: str = "token",
    threshold: float = THRESHOLD,
    max_tokens: int | None = None,
    amp: torch.dtype | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Find phrases in one image (a path, or (3, H, W) uint8 RGB): for each, boxes (n, 4) xyxy in pixels, scores (n,).

    A model for REC answers one box; a model for gREC every box whose score reaches the threshold, best first, maybe
    none. `max_tokens` is what the model was trained with, unless given; a warning tells which phrase was cut there.
    """
    picture = image if isinstance(image, Tensor) else data.read_image(str(image))
    if picture.dtype != torch.uint8 or picture.shape[:-2] != (3,) or isinstance(texts, str):
        given = f"{tuple(picture.shape)} {picture.dtype} and {texts!r:.60}"
        raise InputError(f"expected an image (3, H, W) uint8 and a list of phrases, not {given}")
    check_tokenizer(model, tokenizer)
    max_tokens = max_tokens or model.max_tokens or 20  # a model that was not loaded from a file knows no number
    for text in texts:
        data.check_expression(text, "a phrase (--text)")
        seen, was_cut = tokenizer.seen(text, max_tokens)
        if was_cut:
            warnings.warn(f"{text!r} was cut, the model reads {seen!r}", stacklevel=2)
    resized = data.resize(picture, model.image_size, model.image_size)  # (3, S, S)
    inputs = (resized.expand(len(texts), -1, -1, -1), *tokenizer(texts, max_tokens))  # (B, 3, S, S), 2 of (B, L)
    output = model(*(x.to(model.device) for x in inputs), branch, amp)
    scale = torch.tensor([picture.shape[2], picture.shape[1]] * 2)
    return [(boxes * scale, scores) for scores, boxes in pick_answers(*output.answers()[branch], threshold)]


def check_tokenizer(model: models.SimVG, tokenizer: data.Tokenizer) -> None:
    """InputError unless the model was trained with this tokenizer, as far as its checkpoint tells."""
    is_larger = tokenizer.vocab_size > model.encoder.text_embed.num_embeddings
    if is_larger or model.tokenizer_digest not in (None, tokenizer.digest):
        raise InputError(f"{tokenizer.path}: is not the tokenizer that this model was trained with")


# ----------------------------------------------------------------------- pictures, curves, attention, the report


def draw_page(examples: Sequence[data.Example], results: Sequence[Answers], path: Path) -> None:
    """Save a page of examples, each with its true boxes and the answer of each branch."""
    tiles = []
    for example, result in zip(examples, results, strict=True):
        image = data.read_image(example.image, example.size, example.where)  # (3, H, W)
        size = image.shape[2], image.shape[1]  # width, height
        truth = data.clip_boxes(example.boxes, *size) / torch.tensor([*size, *size])  # (m, 4) xyxy in 0..1
        boxes = {"truth": truth} | {branch: answer.boxes for branch, answer in result.items()}
        tiles.append(data.draw(image, boxes, example.expression))
    data.tile(tiles, path, columns=4)


def draw_curves(folders: Sequence[str | Path], path: str | Path) -> None:
    """Draw metrics.jsonl of runs: the loss terms, W_dt, and the metrics of the split that chooses the best weights. Of
    several runs each of these names has a panel, with a line for each run. A half-written last row is left out."""
    kinds = dict.fromkeys(("decoder", "token_on_truth", "token_on_teacher"), "loss") | {"teacher_weight": "W_dt"}
    kinds |= {f"{branch}_{metric}": "metric" for metric in ("acc", "f1", "nacc") for branch in BRANCHES}
    panels: dict[str, dict[str, list]] = {}
    for folder in folders:
        rows = [json.loads(each) for _, each in data.json_lines(Path(folder, "metrics.jsonl")) if each.endswith(b"}\n")]
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
        low, last = low if low <= 0 or high / 2 < low < high else 0, max(x for x, _, _ in points)
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
    """Three to seven round numbers from low to high; one where these are equal."""
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
def draw_attention(model: models.SimVG, image: Tensor, texts: Sequence[str], collate: data.Collate, path: str) -> None:
    """Save a row of pictures for each phrase: where the object token, the decoder's best query and each word look."""
    resized = data.resize(image, model.image_size, model.image_size).expand(len(texts), -1, -1, -1)  # (B, 3, S, S)
    inputs = (resized, *collate.tokenizer(texts, collate.max_tokens))  # (B, 3, S, S), 2 of (B, L)
    maps = model.attention_maps(*(x.to(model.device) for x in inputs))  # of the decoder even if it was never trained
    grey, red = image.float().mean(0, keepdim=True) * 0.6, torch.tensor([255.0, 40.0, 0.0])[:, None, None]
    words = [collate.tokenizer.pieces(text, collate.max_tokens) for text in texts]
    tiles, columns = [], 3 + max(map(len, words))
    for i, text in enumerate(texts):  # maps of the last layers
        looks = {"object token": maps.object_token[-1, i], "decoder query": maps.queries[-1, i, maps.best_query[i]]}
        looks |= {f"{j}: {word}": maps.words[-1, i, j + 1] for j, word in enumerate(words[i])}  # + 1: <s> comes first
        tiles.append(data.draw(image, {}, text))
        for name, look in looks.items():  # (N,)
            patches = look.cpu().view(1, 1, model.encoder.grid, -1)
            heat = F.interpolate(patches, image.shape[1:], mode="bilinear")[0] / look.max().item()  # (1, H, W)
            tiles.append(data.draw((grey + heat * red).clamp(max=255).byte(), {}, f"{name} ({text})"))
        tiles += [Image.new("RGB", (1, 1))] * (-len(tiles) % columns)  # fill up the row
    data.tile(tiles, path, columns)


def report(path: str, title: str, splits: dict[str, tuple[list, list]], grec: bool) -> None:
    """Write the answers as one HTML file that needs nothing else. `splits`: {name: (its examples, their answers)}."""
    # 1. Every answer in the report has its picture; of too many images, it holds the answers to an even spread of them.
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
    # 2. What the page shows of each answer, with boxes in pixels of the image.
    rows = []
    for split, example, result in (each for each in answers if each[1].image in pictures):
        size = pictures[example.image]["size"]
        truth = data.clip_boxes(example.boxes, *size)[: None if grec else 1]  # (m, 4); in REC the first one counts
        row = {"split": split, "text": example.expression, "image": example.image, "where": example.where}
        row |= {"groups": ["all", *groups_of(example)], "truth": truth.round(decimals=1).tolist()}
        row |= {"branches": {}, "errors": 0, "iou": 0.0}  # the last two are sums over the branches, to sort by
        for branch, answer in result.items():
            boxes = answer.boxes.double().nan_to_num(0) * torch.tensor([*size, *size])  # (n, 4)
            iou = float(len(truth) == len(boxes))  # where nothing is to be found or nothing was answered
            if len(truth) and len(boxes):
                iou = box_iou(truth, boxes).nan_to_num(0).amax(1).mean().item()  # of each true box, its best answer
            scores = " ".join(f"{score:.2f}" for score in answer.scores.tolist()) or "none"
            says = f"{branch} {'right' if answer.correct else 'wrong'}: IoU {iou:.2f}, score {scores}"
            row["branches"][branch] = {"right": answer.correct, "says": says, "boxes": boxes.round(decimals=1).tolist()}
            row |= {"errors": row["errors"] + (not answer.correct), "iou": row["iou"] + iou}
        rows.append(row)
    # 3. The file.
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
    rank, _, device = join_ranks()
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
    if args.image is None:
        evaluate_splits(args, model, config, args.branch or trained, rank)
    elif rank == 0:
        ground_phrases(args, model, config, args.branch or trained)
    if dist.is_initialized():
        dist.destroy_process_group()


def evaluate_splits(args: argparse.Namespace, model: models.SimVG, config: dict, branch: str, rank: int) -> None:
    """Print a table for each split, and the same figures as a line of JSON; write the report."""
    collate, grec = load_collate(config, model), config["model"]["queries"] > 1
    options = {"workers": config["data"]["workers"], "amp": models.AMP[args.amp]}
    everything = {}
    for split in args.split or config["data"]["eval_splits"]:  # eval_splits: what train.py evaluates, too
        dataset = load_split(config, split)
        if args.attention:
            if rank == 0:
                print_attention(split, model, dataset, collate, branch)
            continue
        results = evaluate_dataset(model, dataset, collate, branch, title=split, **options)
        everything[split] = dataset.examples, results
        if rank == 0:
            figures = summary(results, dataset.examples, grec)
            print_table(split, figures, by_kind(results, dataset.examples))
            print(json.dumps({"split": split, **figures}))
    if args.report and rank == 0:
        report(args.report, args.ckpt, everything, grec)
        print(f"report: {args.report}")


def load_split(config: dict, split: str) -> data.Dataset:
    """Every expression of a split, once. InputError if an image is missing or does not fit what its row says."""
    rows = [(example,) for example in data.expand(data.read_rows(config["data"], split))]
    if not dist.is_initialized() or dist.get_rank() == 0:
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
    """Print one split in percent: all expressions, each group of `by_kind`, and the accuracy of the mean box."""
    metric, key = ("F1=1", "f1") if "n_none" in figures else ("Acc@0.5", "acc")
    branches = [branch for branch in BRANCHES if f"{branch}_{key}" in figures]
    rows = {"all": {"n": figures["n"], **{branch: figures[f"{branch}_{key}"] for branch in branches}}, **kinds}
    if baseline is not None:
        rows["mean box"] = {"n": figures["n"], **dict.fromkeys(branches, baseline)}
    print(f"{split:<18} {'n':>7}" + "".join(f"{f'{branch} {metric}':>18}" for branch in branches))
    for name, row in rows.items():
        name = "no target (N-acc)" if name == "no target" else name
        print(f"{name:<18} {row['n']:>7}" + "".join(f"{100 * row[branch]:>18.2f}" for branch in branches))


def ground_phrases(args: argparse.Namespace, model: models.SimVG, config: dict, branch: str) -> None:
    """Print every box of every phrase with its score, and save a picture."""
    collate, image = load_collate(config, model), data.read_image(args.image)  # (3, H, W)
    amp, scale = models.AMP[args.amp], torch.tensor([image.shape[2], image.shape[1]] * 2)
    warnings.formatwarning = lambda message, *_: f"evaluate.py: {message}\n"  # without the line of code
    drawn: list[dict[str, Tensor]] = [{} for _ in args.text]
    for name in BRANCHES if branch == "both" else [branch]:
        found = ground(model, image, args.text, collate.tokenizer, name, THRESHOLD, collate.max_tokens, amp)
        for text, boxes_of, (boxes, scores) in zip(args.text, drawn, found, strict=True):
            boxes_of[name] = boxes / scale
            if not len(boxes):
                print(f"{name}: nothing in the image fits {text!r}")
            for box, score in zip(boxes.tolist(), scores.tolist(), strict=True):
                corners = " ".join(f"{value:.1f}" for value in box)
                print(f"{name}: {text!r} box {corners} (x1 y1 x2 y2, pixels), score {score:.3f}")
    path = args.save or f"{Path(args.image).with_suffix('')}_grounded.png"
    side = max(280, min(1000, max(image.shape[1:])))
    pictures = [data.draw(image, boxes_of, text, side) for text, boxes_of in zip(args.text, drawn, strict=True)]
    data.tile(pictures, path, columns=min(3, len(pictures)))
    print(f"picture: {path}")
    if args.attention:
        path = f"{Path(path).with_suffix('')}_attention.png"
        draw_attention(model, image, args.text, collate, path)
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
    add("--image", metavar="FILE", help="find phrases in this image")
    add("--text", nargs="+", metavar="PHRASE", help="the phrases")
    add("--amp", choices=["bf16", "fp16"], default="", help="run the encoder in 16 bits")
    add("--attention", action="store_true", help="show where tokens look: a picture, or a table")
    add("--report", metavar="FILE.html", help="also write a page to browse the answers")
    add("--save", metavar="FILE.png", help="where the picture goes (default: IMAGE_grounded.png, curves.png)")
    args = parser.parse_args()
    if (args.image is None) != (args.text is None):
        parser.error("--image and --text go together")
    if args.report and (args.image is not None or args.attention):
        parser.error("--report goes with the evaluation of splits")
    if args.save and args.image is None and not args.curves:
        parser.error("--save goes with --image or --curves")
    for option, name, endings in (("report", args.report, (".html",)), ("save", args.save, (".png", ".jpg", ".jpeg"))):
        if name and not (name.lower().endswith(endings) and Path(name).absolute().parent.is_dir()):
            parser.error(f"--{option} {name}: expected a file name that ends in {' or '.join(endings)}, in a folder")
    return args


# ----------------------------------------------------------------------------------- ranks and memory settings


def join_ranks() -> tuple[int, int, torch.device]:
    """(rank, number of ranks, device) of this process. Under torchrun it joins the other ranks."""
    keep_freed_memory()
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise InputError(f"more ranks than GPUs: rank {local} of a machine with {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.enable_cudnn_sdp(False)  # bugs of PyTorch: wrong gradients with masks, NaN for one query
    if world > 1:
        if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise InputError(f"WORLD_SIZE is {world}, but there is no {', '.join(missing)}: start with torchrun")
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    return (dist.get_rank() if world > 1 else 0), world, device


def keep_freed_memory() -> None:
    """Linux: keep the memory that a tensor sets free for the next one. glibc gives large blocks back to the system, and
    then each page of the next activations costs a page fault: a fourth of a training step on a CPU."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 1 << 30) or libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD; before glibc 2.35 at most 32 MB
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


# The page: the accuracy of what is selected, and a card for each answer. Data is only ever set as text, never as HTML.
PAGE = r"""<!doctype html><meta charset="utf-8"><title>SimVG report</title>
<style>
  body { font: 14px system-ui, sans-serif; margin: 1rem 1.5rem; color-scheme: dark; color: #ddd; background: #181a1b; }
  td { padding: .1rem .7rem; text-align: right; border-bottom: 1px solid #333; }
  #bar { position: sticky; top: 0; padding: .6rem 0; background: #181a1b; }
  #cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: .8rem; }
  .card { background: #222526; border-top: 3px solid #2a7; padding: .4rem; } .wrong { border-color: #c33; }
  rect { fill: none; stroke: currentcolor; stroke-width: 2px; vector-effect: non-scaling-stroke; }
  .truth { color: lime; stroke-dasharray: 7 5; } .decoder { color: orange; } .token { color: deepskyblue; }
</style><p id="title"></p><table id="table"></table>
<div id="bar">
  <select id="split"></select> <select id="answers"></select> <select id="group"></select> <select id="order"></select>
  <input id="search" type="search" placeholder="search the text">
  <button id="back">previous page</button> <button id="next">next page</button> <span id="shown"></span>
  boxes: <span class="truth">truth</span> <span class="decoder">decoder</span> <span class="token">token</span>
</div><div id="cards"></div>
<script id="content" type="application/json">CONTENT</script><script>
const byId = id => document.getElementById(id), data = JSON.parse(byId("content").textContent), perPage = 48;
const branches = Object.keys(data.rows[0].branches), groups = [...new Set(data.rows.flatMap(row => row.groups))];
const filters = {"all answers": row => true, "a branch is wrong": row => row.errors, "all right": row => !row.errors};
for (const b of branches) filters[`${b} wrong`] = row => !row.branches[b].right;
if (branches.length > 1) filters["one right, one wrong"] = row => row.errors === 1;
const orders = {"wrong first": (a, b) => b.errors - a.errors, "as in the file": () => 0,
  "lowest IoU first": (a, b) => a.iou - b.iou, "highest IoU first": (a, b) => b.iou - a.iou};
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
  found = data.rows.filter(row => fits(row) && row.text.toLowerCase().includes(text)).sort(orders[order]);
  byId("table").replaceChildren();
  for (const name of groups) {
    const rows = found.filter(row => row.groups.includes(name)), line = make(byId("table"), "tr");
    const percent = b => (100 * rows.filter(row => row.branches[b].right).length / rows.length).toFixed(2);
    const cells = rows.length ? [name, rows.length, ...branches.map(b => `${b} ${percent(b)} % right`)] : [];
    for (const cell of cells) make(line, "td", cell);
  }
  show(0);
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
    for (const [name, {boxes}] of [...Object.entries(row.branches), ["truth", {boxes: row.truth}]])
      for (const [x, y, right, bottom] of boxes)
        make(svg, "rect", "", {class: name, x, y, width: right - x, height: bottom - y});
    make(card, "div", row.text);
    for (const b of branches) make(card, "div", row.branches[b].says, {class: b});
    make(card, "small", [...row.groups.slice(1), row.where].join(", "));
  }
}
for (const [id, names] of Object.entries(choices)) {
  for (const name of names) make(byId(id), "option", name);
  byId(id).onchange = select;
}
byId("title").textContent = data.title;
byId("search").oninput = select;
byId("back").onclick = () => show(page - 1);
byId("next").onclick = () => show(page + 1);
select();
</script>
"""


if __name__ == "__main__":
    data.run(main, models.CheckpointError)
