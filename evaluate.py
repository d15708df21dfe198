"""Metrics, evaluation on any number of ranks, grounding phrases in one image, pictures, attention maps, reports.

    python evaluate.py --ckpt runs/shapes/best.pt                             # every split of the checkpoint's config
    python evaluate.py --ckpt best.pt --image photo.jpg --text "the left dog" # box and score, and a picture
    python evaluate.py --ckpt best.pt --report report.html                    # and a page to browse the answers
    python evaluate.py --ckpt best.pt --attention --split test                # where tokens look

REC (one query): Acc@0.5, the share of expressions whose box has an IoU of at least 0.5 with the truth.
gREC (several queries): Precision@(F1=1, IoU>=0.5) over all expressions, and N-acc over those without a target.
Everything is counted per expression and divided once, so that batches and ranks change nothing (D9).
"""

import argparse
import base64
import ctypes
import functools
import io
import json
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
from torchvision.ops import box_convert, box_iou, clip_boxes_to_image, generalized_box_iou
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

import data
import model as models
from data import InputError

MIN_IOU = 0.5  # a box is right from this IoU on; in gREC from this generalised IoU
THRESHOLD = 0.7  # a gREC query is an answer from this score on
BRANCHES = ("decoder", "token")
COUNTS = ("no target", "one target", "several targets")


# ----------------------------------------------------------------------------------------------------- metrics


def rec_correct(boxes_xyxy: Tensor, truth_xyxy: Tensor) -> Tensor:
    """boxes (N, 4) and truth (N, 4) in pixels, pair by pair -> (N,) bool: IoU of at least 0.5."""
    a, b = boxes_xyxy.double(), truth_xyxy.double()
    overlap = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - overlap
    return overlap / union.clamp(min=1e-6) >= MIN_IOU


def grec_correct(scores: Tensor, boxes_xyxy: Tensor, truth_xyxy: Tensor, threshold: float = THRESHOLD) -> bool:
    """F1 = 1 of one expression: scores (Q,), boxes (Q, 4), truth (n, 4) -> are exactly the true boxes answered?

    Answers pair greedily with the truth, best first, from a *generalised* IoU of 0.5 on, as gRefCOCO's evaluator does.
    """
    answers = boxes_xyxy[scores.double() >= threshold]  # in float32, 0.7 would round down and let 0.69999999 in
    if len(answers) != len(truth_xyxy):
        return False
    giou = generalized_box_iou(answers, truth_xyxy.to(answers))  # (n, n)
    for _ in range(len(truth_xyxy)):
        row, column = divmod(int(giou.argmax()), len(truth_xyxy))
        if giou[row, column] < MIN_IOU:
            return False
        giou[row], giou[:, column] = -1, -1
    return True


class Result(NamedTuple):
    """What one branch answered to one expression."""

    correct: bool
    answered: int  # how many boxes, from the first, are the answer: in REC one, in gREC those from the threshold on
    scores: Tensor  # (n,) best first
    boxes: Tensor  # (n, 4) xyxy in 0..1


def score_answers(logits: Tensor, boxes: Tensor, truth: Tensor, truth_mask: Tensor, size: int) -> list[Result]:
    """logits (B, Q, 2), boxes (B, Q, 4), truth (B, M, 4), truth_mask (B, M) -> B results, compared at `size` pixels."""
    logits, boxes, truth, truth_mask = (x.cpu() for x in (logits, boxes, truth, truth_mask))  # all at once
    scores = logits.float().softmax(-1)[..., 0]  # (B, Q)
    answers, truth = (box_convert(x.float(), "cxcywh", "xyxy") for x in (boxes, truth))
    answers = answers.clamp(0, 1)
    if boxes.shape[1] == 1:
        # REC has one target; the mixed sets may state several, then the first counts
        correct = rec_correct(answers[:, 0] * size, truth[:, 0] * size) & truth_mask[:, 0]
        found = zip(correct.tolist(), scores, answers, strict=True)
        return [Result(c, 1, s.clone(), b.clone()) for c, s, b in found]  # a view would be sent with its whole batch
    results = []
    for s, b, t, mask in zip(scores, answers, truth, truth_mask, strict=True):
        solid = (b[:, 2:] > b[:, :2]).all(1)  # boxes clipped away count as not answered
        s, order = s[solid].sort(descending=True)
        b = b[solid][order]
        correct = grec_correct(s, b * size, t[mask] * size)
        results.append(Result(correct, int((s.double() >= THRESHOLD).sum()), s, b))
    return results


# -------------------------------------------------------------------------------------------------- evaluation


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
) -> list[dict[str, Result]]:
    """The results of every example, in order, {branch: Result}: on all ranks together, the same list on each.

    Where the GPU's memory does not hold `batch_size` examples, it goes on with half of it. `after_batch` may raise.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device, training = model.device, model.training
    model.eval()
    mine = range(rank, len(dataset), world)
    results: dict[int, dict[str, Result]] = {}
    with tqdm(total=len(mine), desc=title, disable=None if title and rank == 0 else True, leave=False) as bar:
        while len(results) < len(mine):
            left = mine[len(results) :]
            try:
                for batch in data.batches(
                    dataset, collate, in_batches(left, batch_size), workers, pin=device.type == "cuda"
                ):
                    results |= evaluate_batch(model, batch.to(device), branch, amp)
                    bar.update(len(batch.index))
                    after_batch()
            except torch.OutOfMemoryError:
                if batch_size == 1:
                    raise
                batch_size //= 2
    if world > 1:
        parts: list = [None] * world
        dist.all_gather_object(parts, results)
        results = {index: result for part in parts for index, result in part.items()}
    model.train(training)
    assert len(results) == len(dataset), "an expression was counted twice or never"
    return [results[index] for index in range(len(dataset))]


def in_batches(examples: Sequence[int], size: int) -> list[list[tuple[int, int]]]:
    """The keys of `data.batches`, in order."""
    return [[(0, i) for i in examples[start : start + size]] for start in range(0, len(examples), size)]


def evaluate_batch(
    model: models.SimVG, batch: data.Batch, branch: str, amp: torch.dtype | None
) -> dict[int, dict[str, Result]]:
    """{example: {branch: Result}} of one batch."""
    output = model(batch.images, batch.tokens, batch.text_pad, branch, amp)
    branches = {
        name: score_answers(*answer, batch.boxes, batch.box_mask, model.image_size)
        for name, answer in output.answers().items()
    }
    return {index: {name: results[i] for name, results in branches.items()} for i, index in enumerate(batch.index)}


def summary(results: Sequence[dict[str, Result]], examples: Sequence[data.Example], grec: bool) -> dict[str, float]:
    """The figures of a split: n, {branch}_acc, or n, n_none, {branch}_f1, {branch}_nacc for gREC."""
    none = [not example.boxes for example in examples]
    figures: dict[str, float] = {"n": len(examples)}
    if grec:
        figures["n_none"] = sum(none)
    for branch in results[0]:
        correct = [result[branch].correct for result in results]
        figures[f"{branch}_{'f1' if grec else 'acc'}"] = sum(correct) / len(examples)
        if grec and any(none):
            figures[f"{branch}_nacc"] = sum(c for c, n in zip(correct, none, strict=True) if n) / sum(none)
    return figures


def by_kind(results: Sequence[dict[str, Result]], examples: Sequence[data.Example]) -> dict[str, dict[str, float]]:
    """kind -> {"n", branch: share of correct answers}: by their `kind` and by their number of targets."""
    kinds: dict[str, list] = {}
    for result, example in zip(results, examples, strict=True):
        own = repr(example.kind) if example.kind in COUNTS else example.kind  # quoted, so that two groups stay two
        for kind in filter(None, (own, COUNTS[min(len(example.boxes), 2)])):
            kinds.setdefault(kind, []).append(result)
    if len(kinds) < 2:
        return {}
    return {
        kind: {"n": len(group)} | {branch: sum(r[branch].correct for r in group) / len(group) for branch in group[0]}
        for kind, group in sorted(kinds.items())
        if len(group) < len(examples)
    }


def mean_box_accuracy(train: Sequence[data.Example], examples: Sequence[data.Example]) -> float | None:
    """Acc@0.5 of always answering the mean box of the training examples: what a model that ignores its input gets."""

    def boxes(some: Sequence[data.Example]) -> Tensor:  # (n, 4) cxcywh in 0..1
        sized = [(box, each.size) for each in some for box in each.boxes[:1]]
        scaled = [[x / width, y / height, w / width, h / height] for (x, y, w, h), (width, height) in sized]
        return box_convert(torch.tensor(scaled).reshape(-1, 4), "xywh", "cxcywh")

    if any(each.size is None for each in (*train, *examples)):
        return None
    # as if all images were 1000 pixels wide and high
    mean, truth = (box_convert(x, "cxcywh", "xyxy") for x in (boxes(train).mean(0, keepdim=True), boxes(examples)))
    return rec_correct(mean.expand_as(truth) * 1000, truth * 1000).sum().item() / len(examples)


# --------------------------------------------------------------------------------------------------- one image


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
    """Phrases in one image (a path, or (3, H, W) uint8 RGB) -> for each boxes xyxy in pixels (n, 4) and scores (n,).

    A REC model answers one box; a gREC model every box from the threshold on, best first, maybe none. `max_tokens` is
    the model's own unless given; a warning tells where a phrase was cut.
    """
    picture = image if isinstance(image, Tensor) else data.read_image(str(image))
    if picture.dtype != torch.uint8 or picture.shape[:-2] != (3,):
        raise InputError(f"an image must be (3, H, W) uint8, not {tuple(picture.shape)} {picture.dtype}")
    if isinstance(texts, str):
        raise InputError(f"expected a list of phrases, not the text {texts!r:.60}")
    check_tokenizer(model, tokenizer)
    max_tokens = max_tokens or model.max_tokens or 20
    for text in texts:
        data.check_expression(text, "--text")
        seen, was_cut = tokenizer.seen(text, max_tokens)
        if was_cut:
            warnings.warn(f"{text!r} was cut, the model reads {seen!r}", stacklevel=2)
    height, width = picture.shape[1:]
    device = model.device
    tokens, text_pad = (x.to(device) for x in tokenizer(texts, max_tokens))  # (B, L), B phrases
    resized = data.resize(picture, model.image_size, model.image_size).to(device)
    output = model(resized.expand(len(texts), -1, -1, -1), tokens, text_pad, branch, amp)
    logits, boxes = output.answers()[branch]  # (B, Q, 2), (B, Q, 4)
    every_score = logits.softmax(-1)[..., 0].cpu()  # (B, Q)
    scale = torch.tensor([width, height, width, height])
    every_box = clip_boxes_to_image(box_convert(boxes.cpu(), "cxcywh", "xyxy") * scale, (height, width))
    answers = []
    for scores, boxes in zip(every_score, every_box, strict=True):  # (Q,), (Q, 4) xyxy pixels
        kept = scores.argsort(descending=True)
        if len(scores) > 1:
            kept = kept[(scores[kept].double() >= threshold) & (boxes[kept, 2:] > boxes[kept, :2]).all(1)]
        answers.append((boxes[kept], scores[kept]))
    return answers


# ---------------------------------------------------------------------------------------------------- pictures


def true_boxes(example: data.Example, size: tuple[int, int]) -> Tensor:
    """(m, 4) xyxy in 0..1; `size` (width, height) of the image."""
    return (data.clip_boxes(example.boxes, *size) / torch.tensor([*size, *size])).float()


def draw_page(examples: Sequence[data.Example], results: Sequence[dict[str, Result]], path: Path) -> None:
    """A page of examples: the true boxes and each branch's answer."""
    tiles = []
    for example, result in zip(examples, results, strict=True):
        image = data.read_image(example.image, example.size, example.where)
        shown = {"truth": true_boxes(example, (image.shape[2], image.shape[1]))}
        shown |= {branch: answer.boxes[: answer.answered] for branch, answer in result.items()}
        tiles.append(data.draw(image, shown, example.expression))
    data.tile(tiles, path, columns=4)


def draw_curves(records: Sequence[dict], path: Path) -> None:
    """A picture of metrics.jsonl over the steps: loss terms above, figures of the first evaluated split below."""
    page = Image.new("RGB", (720, 520), "white")
    pen = ImageDraw.Draw(page)
    train = [row for row in records if row["split"] == "train"]
    evaluated = [row for row in records if row.get("weights") == "last"]
    evaluated = [row for row in evaluated if row["split"] == evaluated[0]["split"]]
    draw_panel(pen, 10, train, ("decoder", "token_on_truth", "token_on_teacher", "teacher_weight"))
    draw_panel(pen, 270, evaluated, [name for name in evaluated[0] if name.endswith(("_acc", "_f1", "_nacc"))])
    page.save(path)


def draw_panel(pen: ImageDraw.ImageDraw, top: int, rows: Sequence[dict], names: Sequence[str]) -> None:
    """One chart, from 0 to its highest value; names that the rows do not have are left out."""
    left, width, height = 50, 650, 220
    pen.rectangle((left, top, left + width, top + height), outline="grey")
    names = [name for name in names if rows and name in rows[-1]]
    if not names:
        return
    last, high = rows[-1]["step"], max(row.get(name, 0) for row in rows for name in names) or 1
    pen.text((5, top), f"{high:.3g}", fill="black")
    pen.text((5, top + height - 12), "0", fill="black")
    pen.text((left + width - 70, top + height + 4), f"step {last}", fill="black")
    for i, name in enumerate(names):
        ink = ("black", "royalblue", "darkorange", "seagreen")[i]
        points = [(left + width * r["step"] / last, top + height * (1 - r[name] / high)) for r in rows if name in r]
        pen.line(points, fill=ink, width=2)
        pen.text((left + 20 + 150 * i, top + height + 4), name, fill=ink)


# --------------------------------------------------------------------------------------------------- attention


SHARES_OF = 500  # examples that `attention_shares` looks at


class Shares(NamedTuple):
    """Of the attention that falls on patches, the part inside the true box, layer by layer: means over examples."""

    examples: int
    area: float  # share of the image that the box covers: what a look at random would get
    object_token: Tensor  # (layers,) of the encoder
    query: Tensor  # (K,) of the decoder branch


def coverage(boxes: Tensor, grid: int) -> Tensor:
    """boxes (n, 4) xyxy in 0..1 -> (grid * grid,): the share of each patch that lies in a box."""
    low = (torch.arange(grid) / grid)[:, None]  # (grid, 1)
    first, last = boxes[:, None, :2], boxes[:, None, 2:]  # (n, 1, 2)
    inside = (torch.minimum(last, low + 1 / grid) - torch.maximum(first, low)).clamp(min=0) * grid  # (n, grid, 2)
    return (inside[:, :, None, 1] * inside[:, None, :, 0]).amax(0).flatten()


@torch.inference_mode()
def attention_shares(model: models.SimVG, dataset: data.Dataset, collate: data.Collate) -> Shares:
    """Over the first SHARES_OF examples that have a target; in gREC the query with the best score is looked at.
    InputError if there is none."""
    device, sums = model.device, []
    having = [i for i, example in enumerate(dataset.examples) if example.boxes][:SHARES_OF]
    if not having:
        raise InputError("--attention: no expression of this split has a target")
    for batch in data.batches(dataset, collate, in_batches(having, 50), workers=0):
        batch = batch.to(device)
        maps = model.attention_maps(batch.images, batch.tokens, batch.text_pad)
        for i in range(len(batch.index)):
            truth = box_convert(batch.boxes[i, batch.box_mask[i]], "cxcywh", "xyxy")
            inside = coverage(truth.cpu(), model.encoder.grid)  # (N,)
            looks = torch.cat(
                [maps.object_token[:, i], maps.queries[:, i, maps.best_query[i]]]
            ).cpu()  # (layers + K, N)
            sums.append(torch.cat([inside.mean()[None], (looks * inside).sum(1) / looks.sum(1)]))
    area, *shares = torch.stack(sums).mean(0).split([1, len(maps.object_token), len(maps.queries)])
    return Shares(len(having), area.item(), *shares)


@torch.inference_mode()
def draw_attention(
    model: models.SimVG, image: Tensor, texts: Sequence[str], tokenizer: data.Tokenizer, max_tokens: int, path: str
) -> None:
    """A row of pictures for each phrase: where the object token, the decoder's best query and each word look in the
    last layers (the decoder's means nothing in a checkpoint whose decoder was never trained)."""
    resized = data.resize(image, model.image_size, model.image_size).expand(len(texts), -1, -1, -1)
    maps = model.attention_maps(*(x.to(model.device) for x in (resized, *tokenizer(texts, max_tokens))))
    tiles = []
    for i, text in enumerate(texts):
        words = tokenizer.pieces(text, max_tokens)
        looks = {"object token": maps.object_token[-1, i], "decoder query": maps.queries[-1, i, maps.best_query[i]]}
        looks |= {f"{j}: {word}": maps.words[-1, i, j + 1] for j, word in enumerate(words)}  # + 1: after <s>
        heats = [draw_heat(image, look.cpu(), f"{name} ({text})") for name, look in looks.items()]
        tiles.append([data.draw(image, {}, text), *heats])
    width = max(map(len, tiles))
    empty = Image.new("RGB", tiles[0][0].size)
    data.tile([tile for row in tiles for tile in row + [empty] * (width - len(row))], path, columns=width)


def draw_heat(image: Tensor, look: Tensor, caption: str) -> Image.Image:
    """image (3, H, W) uint8 and a map (N,) of patches -> the image in grey, and in red where the map is high."""
    grid = round(len(look) ** 0.5)
    heat = F.interpolate(look.view(1, 1, grid, grid), image.shape[1:], mode="bilinear")[0] / look.max()  # (1, H, W)
    grey = image.float().mean(0, keepdim=True) * 0.6
    red = grey + heat * torch.tensor([255.0, 40.0, 0.0])[:, None, None]
    return data.draw(red.clamp(max=255).byte(), {}, caption)


# ------------------------------------------------------------------------------------------------------ report

PICTURES = 250  # so many wrong and so many right answers come with a picture in a report
STEPS = 20  # thresholds of a gREC curve


def report(
    path: str, title: str, splits: dict[str, tuple[Sequence[data.Row], Sequence[dict[str, Result]]]], grec: bool
) -> None:
    """One HTML file that needs nothing else. `splits`: name -> its examples and their results."""
    content = {"title": title, "splits": list(splits), "rows": [], "pictures": {}, "curves": {}}
    for number, (split, (examples, results)) in enumerate(splits.items()):
        sizes = [example.size or size_on_disk(example.image) for example in examples]
        truths = [true_boxes(example, size) for example, size in zip(examples, sizes, strict=True)]
        for i in tqdm(pictured(results), desc="pictures of the report", disable=None, leave=False):
            content["pictures"][examples[i].image] = thumbnail(examples[i])
        for example, result, (width, height), truth in zip(examples, results, sizes, truths, strict=True):
            shown = report_row(example, result, truth if grec else truth[:1])  # in REC the first one counts
            content["rows"].append({"split": number, "aspect": round(width / height, 4), **shown})
        if grec:
            branches = {branch: [result[branch] for result in results] for branch in results[0]}
            content["curves"][split] = {branch: curve(truths, each) for branch, each in branches.items()}
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    text = text.replace("<", "\\u003c")  # no expression can end the script
    part = Path(f"{path}.part")
    part.write_text(PAGE.replace("CONTENT", text))
    part.replace(path)


PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>SimVG report</title>
<style>
  body { font: 14px system-ui, sans-serif; margin: 1rem 1.5rem; color: #ddd; background: #181a1b; }
  h1 { font-size: 1.2rem; } table { border-collapse: collapse; margin: .3rem 2rem .8rem 0; }
  td, th { padding: .1rem .7rem; text-align: right; border-bottom: 1px solid #333; font-weight: normal; }
  td:first-child, th:first-child { text-align: left; } th { color: #999; }
  #tables { display: flex; flex-wrap: wrap; align-items: start; }
  #bar { position: sticky; top: 0; background: #181a1b; padding: .6rem 0; display: flex; gap: .6rem; flex-wrap: wrap; }
  select, input, button { font: inherit; color: inherit; background: #26292b; border: 1px solid #444; padding: .2rem; }
  #cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: .8rem; }
  .card { background: #222526; border-top: 3px solid #2a7; padding: .4rem; overflow-wrap: anywhere; }
  .card { scroll-margin-top: 5rem; }
  .wrong { border-color: #c33; } .card.current { outline: 2px solid #eee; } small { color: #999; }
  svg { width: 100%; display: block; background: #444; }
  rect, polyline { fill: none; stroke-width: 2px; vector-effect: non-scaling-stroke; }
  .truth { stroke: lime; color: lime; stroke-dasharray: 7 5; } .decoder { stroke: orange; color: orange; }
  .token { stroke: deepskyblue; color: deepskyblue; }
</style>
<h1></h1>
<div id="tables"></div>
<div id="bar">
  <select id="split" title="split"></select>
  <select id="wrong" title="answers">
    <option value="">all answers</option><option value="any">a branch is wrong</option>
    <option value="decoder">decoder wrong</option><option value="token">token wrong</option>
    <option value="differ">one right, one wrong</option><option value="right">all right</option>
  </select>
  <select id="kind" title="kind"></select>
  <select id="count" title="true boxes"></select>
  <input id="search" type="search" placeholder="text (/)">
  <select id="sort" title="order">
    <option value="file">as in the file</option><option value="iou">IoU</option><option value="score">score</option>
    <option value="words">words</option><option value="area">size of the box</option>
  </select>
  <button id="turn" title="r">reverse</button><span id="shown"></span>
  <small><span class="truth">truth</span> <span class="decoder">decoder</span> <span class="token">token</span> &middot;
  keys: &larr; &rarr; page, j k card, w answers, s order, r reverse, / text, Esc</small>
</div>
<div id="cards"></div>
<script id="content" type="application/json">CONTENT</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("content").textContent), perPage = 48;
const branches = Object.keys(data.rows.length ? data.rows[0].branches : {}), byId = id => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
let page = 0, card = -1, reversed = false, found = [], whole = 0;

function make(parent, name, text, classes) {  // texts only ever come in as text
  const e = parent.appendChild(document.createElement(name));
  if (text !== undefined) e.textContent = text;
  if (classes) e.className = classes;
  return e;
}
function draw(parent, name, attributes) {
  const e = parent.appendChild(document.createElementNS(SVG, name));
  for (const [key, value] of Object.entries(attributes)) e.setAttribute(key, value);
  return e;
}
const mean = (rows, value) => rows.reduce((sum, row) => sum + value(row), 0) / rows.length;
for (const row of data.rows) {
  row.words = row.text.trim().split(/\s+/).length;
  row.area = row.truth.length ? mean(row.truth, b => (b[2] - b[0]) * (b[3] - b[1]) / 1e6) : 0;
  row.right = branches.map(b => row.branches[b].right);
  row.iou = mean(branches, b => row.branches[b].iou);
  row.score = mean(branches, b => Math.max(0, ...row.branches[b].scores));
  row.low = row.text.toLowerCase();
  row.label = row.kind || "none";
}
const groups = {
  "": row => "all",
  "words": row => row.words < 3 ? "1 to 2" : row.words < 6 ? "3 to 5" : row.words < 10 ? "6 to 9" : "10 and more",
  "box, of the image": row => !row.truth.length ? "none" : row.area < .02 ? "0 to 2 %" : row.area < .1 ?
    "2 to 10 %" : row.area < .3 ? "10 to 30 %" : "30 % and more",
  "true boxes": row => row.truth.length < 3 ? String(row.truth.length) : "3 and more",
  "kind": row => row.label,
};
function tables() {
  byId("tables").replaceChildren();
  for (const [title, group] of Object.entries(groups)) {
    const parts = new Map();
    for (const row of found) {
      const name = group(row);
      if (!parts.has(name)) parts.set(name, []);
      parts.get(name).push(row);
    }
    if (title && parts.size < 2) continue;
    const table = make(byId("tables"), "table"), head = make(table, "tr");
    for (const text of [title || "right, %", "n", ...branches]) make(head, "th", text);
    for (const [name, rows] of [...parts].sort((a, b) => a[0].localeCompare(b[0], "en", {numeric: true}))) {
      const line = make(table, "tr");
      for (const text of [name, rows.length]) make(line, "td", text);
      for (const b of branches) make(line, "td", (100 * mean(rows, row => row.branches[b].right)).toFixed(2));
    }
  }
  const curves = data.curves[data.splits[byId("split").value]];
  if (curves) plot(curves);
}
function plot(curves) {
  const box = make(byId("tables"), "div"), svg = draw(box, "svg", {viewBox: "-4 -4 208 108", style: "width: 420px"});
  for (const [b, curve] of Object.entries(curves)) for (const i of [1, 2]) {
    const points = curve.map(p => [200 * p[0], 100 - 100 * p[i]]).join(" "), dashes = i === 2 ? "4 3" : "";
    if (curve[0][i] !== null) draw(svg, "polyline", {class: b, points, "stroke-dasharray": dashes});
  }
  make(box, "small", "whole split: F1=1 (line) and N-acc (dashes), 0 to 100 %, over the score threshold, 0 to 1");
}
const tests = {
  "": right => true, any: right => right.includes(false), right: right => !right.includes(false),
  differ: right => right.includes(false) && right.includes(true),
};
for (const [i, b] of branches.entries()) tests[b] = right => !right[i];
function select() {
  const [split, wrong, kind, count, order] = ["split", "wrong", "kind", "count", "sort"].map(id => byId(id).value);
  const text = byId("search").value.toLowerCase();
  const rows = data.rows.filter(row => row.split == split);
  whole = rows.length;
  found = rows.filter(row => tests[wrong](row.right) && (!kind || row.label === kind)
    && (!count || String(row.truth.length) === count) && row.low.includes(text));
  if (order !== "file") found.sort((a, b) => a[order] - b[order]);
  if (reversed) found.reverse();
  page = 0; card = -1;
  tables(); show();
}
function show() {
  const pages = Math.max(1, Math.ceil(found.length / perPage));
  page = Math.min(Math.max(page, 0), pages - 1);
  byId("shown").textContent = `${found.length} of ${whole}, page ${page + 1} of ${pages}`;
  byId("cards").replaceChildren();
  for (const row of found.slice(page * perPage, (page + 1) * perPage)) {
    const c = make(byId("cards"), "div", undefined, row.right.includes(false) ? "card wrong" : "card");
    const svg = draw(c, "svg", {viewBox: `0 0 ${1000 * row.aspect} 1000`}), address = data.pictures[row.image];
    const filling = {width: 1000 * row.aspect, height: 1000, preserveAspectRatio: "none"};
    if (address) draw(svg, "image", {href: address, ...filling});
    const boxes = [...branches.map(b => [b, row.branches[b].boxes]), ["truth", row.truth]];
    for (const [name, list] of boxes) for (const [x1, y1, x2, y2] of list)
      draw(svg, "rect", {class: name, x: x1 * row.aspect, y: y1, width: (x2 - x1) * row.aspect, height: y2 - y1});
    make(c, "div", row.text);
    for (const b of branches) {
      const {right, iou, scores} = row.branches[b];
      const sure = scores.map(score => score.toFixed(2)).join(" ") || "none";
      make(c, "div", `${right ? "\u2713" : "\u2717"} ${b}: IoU ${iou.toFixed(2)}, score ${sure}`, b);
    }
    make(c, "small", `${row.kind ? row.kind + ", " : ""}${row.where}${address ? "" : ", picture not in the report"}`);
  }
}
function choices(id, values, all) {
  if (all) make(byId(id), "option", all).value = "";
  for (const [value, text] of values) make(byId(id), "option", text).value = value;
  byId(id).hidden = values.length < 2;
}
function turn(step) { page += step; card = -1; show(); scrollTo(0, byId("bar").offsetTop); }
function walk(step) {
  const cards = byId("cards").children;
  if (card >= 0 && cards[card]) cards[card].classList.remove("current");
  card = Math.min(Math.max(card + step, 0), cards.length - 1);
  if (cards[card]) { cards[card].classList.add("current"); cards[card].scrollIntoView({block: "nearest"}); }
}
function next(id) { byId(id).selectedIndex = (byId(id).selectedIndex + 1) % byId(id).length; select(); }
const keys = {
  ArrowLeft: () => turn(-1), ArrowRight: () => turn(1),
  j: () => walk(1), k: () => walk(-1), w: () => next("wrong"), s: () => next("sort"),
  r: () => byId("turn").click(), "/": () => byId("search").focus(),
};
document.addEventListener("keydown", event => {
  if (event.key === "Escape") { event.preventDefault(); document.activeElement.blur(); }
  const typing = ["INPUT", "SELECT"].includes(document.activeElement.tagName);
  if (typing || event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
  event.preventDefault();
  keys[event.key]();
});
document.querySelector("h1").textContent = document.title = data.title;
choices("split", data.splits.map((name, i) => [i, name]));
const distinct = value => [...new Set(data.rows.map(value))];
choices("kind", distinct(row => row.label).sort().map(kind => [kind, kind]), "every kind");
const counts = distinct(row => row.truth.length).sort((a, b) => a - b);
choices("count", counts.map(n => [n, n === 1 ? "1 true box" : `${n} true boxes`]), "any number");
for (const b of ["decoder", "token"]) if (!branches.includes(b)) byId("wrong").querySelector(`[value=${b}]`).remove();
if (branches.length < 2) byId("wrong").querySelector("[value=differ]").remove();
for (const id of ["split", "wrong", "kind", "count", "sort"])
  byId(id).onchange = event => { event.target.blur(); select(); };
byId("search").oninput = select;
byId("turn").onclick = () => { byId("turn").blur(); reversed = !reversed; select(); };
select();
</script>
</html>
"""


def pictured(results: Sequence[dict[str, Result]]) -> set[int]:
    """Wrong and right answers, spread evenly over the split."""
    wrong = [i for i, result in enumerate(results) if not all(answer.correct for answer in result.values())]
    right = sorted(set(range(len(results))) - set(wrong))
    return {group[k * len(group) // PICTURES] for group in (wrong, right) if group for k in range(PICTURES)}


def thumbnail(example: data.Example) -> str:
    """The image as a small JPEG in a data address."""
    picture, file = to_pil_image(data.read_image(example.image, example.size, example.where)), io.BytesIO()
    picture.thumbnail((256, 256))
    picture.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


@functools.lru_cache
def size_on_disk(path: str) -> tuple[int, int]:
    """Width and height as `read_image` gives it."""
    with data.open_image(path) as file:
        return data.upright_size(file)


def report_row(example: data.Example, result: dict[str, Result], truth: Tensor) -> dict:
    """What the page shows of one expression with the true boxes (m, 4); boxes in thousandths of the image."""
    branches = {}
    for branch, answer in result.items():
        boxes, scores = (x[: answer.answered].nan_to_num(0) for x in (answer.boxes, answer.scores))
        if len(truth) and len(boxes):
            iou = box_iou(truth, boxes).nan_to_num(0).amax(1).mean().item()
        else:
            iou = float(len(truth) == len(boxes))
        branches[branch] = {
            "right": answer.correct,
            "iou": round(iou, 3),
            "scores": [round(score, 3) for score in scores.tolist()],
            "boxes": (1000 * boxes).round().int().tolist(),
        }
    return {
        "text": example.expression,
        "kind": example.kind,
        "image": example.image,
        "where": example.where,
        "truth": (1000 * truth).round().int().tolist(),
        "branches": branches,
    }


def curve(truths: Sequence[Tensor], results: Sequence[Result]) -> list[list[float | None]]:
    """[threshold, F1=1, N-acc] of one branch in gREC for thresholds between 0 and 1; truths (m, 4) xyxy. N-acc is
    None where every expression has a target."""
    points, without = [], sum(not len(truth) for truth in truths)
    for threshold in (step / STEPS for step in range(1, STEPS)):
        correct = [
            grec_correct(result.scores, result.boxes, truth, threshold)
            for truth, result in zip(truths, results, strict=True)
        ]
        none = sum(right for right, truth in zip(correct, truths, strict=True) if not len(truth))
        points.append([threshold, sum(correct) / len(truths), none / without if without else None])
    return points


# -------------------------------------------------------------------------------------------------- the program


def print_table(
    split: str, figures: dict[str, float], kinds: dict[str, dict[str, float]], baseline: float | None = None
) -> None:
    """One split as a small table, in percent."""
    grec = any(name.endswith("_f1") for name in figures)
    shown = [b for b in BRANCHES if any(name.startswith(b) for name in figures)]
    metric = "F1=1" if grec else "Acc@0.5"
    print(f"{split:<18} {'n':>7}" + "".join(f"{b + ' ' + metric:>18}" for b in shown))
    print(
        f"{'all':<18} {figures['n']:>7}"
        + "".join(f"{100 * figures[b + ('_f1' if grec else '_acc')]:>18.2f}" for b in shown)
    )
    for kind, row in kinds.items():
        name = f"{kind} (N-acc)" if kind == "no target" else kind
        print(f"{name:<18} {row['n']:>7}" + "".join(f"{100 * row[b]:>18.2f}" for b in shown))
    if baseline is not None:
        print(f"{'mean box':<18} {figures['n']:>7}" + f"{100 * baseline:>18.2f}" * len(shown))


def trained_branch(settings: dict) -> str:
    """The branches that the loss factors ask for."""
    token = settings["loss_token_on_truth"] is not None or settings["loss_token_on_teacher"] is not None
    decoder = settings["loss_decoder"] is not None or settings["loss_token_on_teacher"] is not None
    if not token and not decoder:
        raise InputError("train: every loss factor is null, there is nothing to learn")
    return "both" if token and decoder else "token" if token else "decoder"


def load_split(config: dict, split: str) -> data.Dataset:
    rows = [(example,) for example in data.expand(data.read_rows(config["data"], split))]
    if not dist.is_initialized() or dist.get_rank() == 0:
        data.check_files(rows)
    return data.Dataset(rows, config["model"]["image_size"])


def load_collate(config: dict, model: models.SimVG) -> data.Collate:
    tokenizer = data.Tokenizer(config["data"]["tokenizer"])
    check_tokenizer(model, tokenizer)
    return data.Collate(tokenizer, config["data"]["max_tokens"])


def check_tokenizer(model: models.SimVG, tokenizer: data.Tokenizer) -> None:
    """InputError unless it has the words that the model was trained with, as far as that is known."""
    words = model.encoder.text_embed.num_embeddings
    if tokenizer.vocab_size > words or model.tokenizer_digest not in (None, tokenizer.digest):
        have = f"it has {tokenizer.vocab_size} ids, the model {words}"
        raise InputError(f"{tokenizer.path}: is not the tokenizer that this model was trained with ({have})")


def main() -> None:
    args = parse_arguments()
    rank, _, device = join_ranks()
    model, config, kind = models.load_with_config(args.ckpt, device)
    if args.config:
        config = data.load_config(args.config)
        config["model"] |= {"image_size": model.image_size, "queries": model.tqg.query_embed.num_embeddings}
    elif config is None:
        raise InputError(
            f"{args.ckpt}: an official checkpoint holds no config, name one: --config configs.json:refcoco"
        )
    else:
        with models.unpacking(args.ckpt):
            data.check_config(config, args.ckpt)
    if fixed := [pair for pair in args.set if pair.startswith("model.")]:
        raise InputError(f"--set {fixed[0]}: the checkpoint says what the model is")
    data.override_config(config, args.set)
    if args.amp and not args.attention:  # maps are drawn in float32
        models.keep_in_16_bits(model, models.AMP[args.amp])
    if rank == 0:
        print(f"{args.ckpt}: {kind}")
    if args.image is not None:
        if rank == 0:
            ground_one(args, model, config)
    elif args.attention:
        if rank == 0:
            print_attention(args, model, config)
    else:
        evaluate_splits(args, model, config, rank)
    if dist.is_initialized():
        dist.destroy_process_group()


def join_ranks() -> tuple[int, int, torch.device]:
    """(rank, world size, device) of this process; under torchrun it joins the others. Settings for speed, too."""
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
    """On Linux: keep for the next tensor what the last one set free. glibc gives large blocks back to the system, and
    each time the next activations cost a page fault every 4 kB: a fourth of a CPU's training step."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 1 << 30) or libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD; before glibc 2.35 at most 32 MB
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def evaluate_splits(args: argparse.Namespace, model: models.SimVG, config: dict, rank: int) -> None:
    """Print one table per split, and the same figures as a line of JSON."""
    branch = chosen_branch(args, config)
    collate, everything = load_collate(config, model), {}
    for split in args.split or config["data"]["eval_splits"]:
        dataset = load_split(config, split)
        workers, amp = config["data"]["workers"], models.AMP[args.amp]
        results = evaluate_dataset(model, dataset, collate, branch, workers=workers, amp=amp, title=split)
        figures = summary(results, dataset.examples, config["model"]["queries"] > 1)
        if rank == 0:
            print_table(split, figures, by_kind(results, dataset.examples))
            print(json.dumps({"split": split, **figures}))
            everything[split] = dataset.examples, results
    if args.report and rank == 0:
        report(args.report, args.ckpt, everything, config["model"]["queries"] > 1)
        print(f"report: {args.report}")


def print_attention(args: argparse.Namespace, model: models.SimVG, config: dict) -> None:
    """The `Shares` of every split as a table, in percent."""
    decodes, collate = trained_branch(config["train"]) != "token", load_collate(config, model)
    for split in args.split or config["data"]["eval_splits"]:
        dataset = load_split(config, split)
        shares = attention_shares(model, dataset, collate)
        print(f"{split}, {shares.examples} expressions: the true box covers {100 * shares.area:.1f} % of the image")
        print("of the attention that falls on patches, % inside the true box, layer by layer:")
        shown = {"object token": shares.object_token} | ({"decoder query": shares.query} if decodes else {})
        for name, values in shown.items():
            print(f"{name:<18}" + "".join(f"{100 * value:>8.1f}" for value in values.tolist()))


def ground_one(args: argparse.Namespace, model: models.SimVG, config: dict) -> None:
    """Print every box of every phrase with its score, and save a picture."""
    tokenizer = data.Tokenizer(config["data"]["tokenizer"])
    warnings.formatwarning = lambda message, *_: f"evaluate.py: {message}\n"
    image = data.read_image(args.image)
    scale = torch.tensor([image.shape[2], image.shape[1]] * 2)
    answers: list[dict[str, Tensor]] = [{} for _ in args.text]
    options = {"max_tokens": config["data"]["max_tokens"], "amp": models.AMP[args.amp]}
    chosen = chosen_branch(args, config)
    for branch in BRANCHES if chosen == "both" else [chosen]:
        found = ground(model, image, args.text, tokenizer, branch, **options)
        for text, answer, (boxes, scores) in zip(args.text, answers, found, strict=True):
            answer[branch] = boxes / scale
            if not len(boxes):
                print(f"{branch}: nothing in the image fits {text!r}")
            for box, score in zip(boxes.tolist(), scores.tolist(), strict=True):
                where = " ".join(f"{v:.1f}" for v in box)
                print(f"{branch}: {text!r} box {where} (x1 y1 x2 y2, pixels), score {score:.3f}")
    path = args.save or str(Path(args.image).with_suffix("")) + "_grounded.png"
    side = max(280, min(1000, max(image.shape[1:])))
    pictures = [data.draw(image, answer, text, side) for text, answer in zip(args.text, answers, strict=True)]
    data.tile(pictures, path, columns=min(3, len(pictures)))
    print(f"picture: {path}")
    if args.attention:
        path = f"{Path(path).with_suffix('')}_attention.png"
        draw_attention(model, image, args.text, tokenizer, config["data"]["max_tokens"], path)
        print(f"attention: {path}")


def chosen_branch(args: argparse.Namespace, config: dict) -> str:
    trained = trained_branch(config["train"])
    if not args.branch:
        return trained
    for branch in args.branch:
        if trained not in ("both", branch):
            raise InputError(f"--branch {branch}: this checkpoint's {branch} branch was never trained")
    return args.branch[0] if len(set(args.branch)) == 1 else "both"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Evaluate a checkpoint on its splits; or, with --image and --text, find boxes."
    )
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="a checkpoint of train.py, or an official .pth")
    parser.add_argument("--config", metavar="FILE:NAME", help="instead of the checkpoint's (an official .pth has none)")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="such as data.images=DIR"
    )
    parser.add_argument("--split", nargs="+", metavar="NAME", help="splits to evaluate (default: all of the config)")
    parser.add_argument("--branch", nargs="+", choices=BRANCHES, help="default: every branch that was trained")
    parser.add_argument("--image", metavar="FILE", help="ground phrases in this image")
    parser.add_argument("--text", nargs="+", metavar="PHRASE", help="the phrases")
    parser.add_argument("--amp", choices=["bf16", "fp16"], default="", help="run the encoder in 16 bits")
    parser.add_argument("--attention", action="store_true", help="show where tokens look: a picture, or a table")
    parser.add_argument("--report", metavar="FILE", help="also write a page to browse the answers, such as report.html")
    parser.add_argument("--save", metavar="FILE", help="where the picture goes (default: IMAGE_grounded.png)")
    args = parser.parse_args()
    if (args.image is None) != (args.text is None):
        parser.error("--image and --text go together")
    if args.report and (args.image is not None or args.attention):
        parser.error("--report goes with the evaluation of splits")
    if args.save and args.image is None:
        parser.error("--save goes with --image")
    for option, file, endings in (("report", args.report, [".html"]), ("save", args.save, [".png", ".jpg", ".jpeg"])):
        path = Path(file or f"a{endings[0]}").absolute()
        if path.suffix.lower() not in endings or path.is_dir() or not path.parent.is_dir():
            parser.error(f"--{option} {file}: expected a file name that ends in {' or '.join(endings)}, in a folder")
    return args


if __name__ == "__main__":
    data.run(main, models.CheckpointError)
