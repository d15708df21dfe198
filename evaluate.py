"""Metrics, evaluation, grounding, pictures, and a page of the worst answers.

    python evaluate.py --ckpt runs/toys/best.pt               accuracy on the splits of its config
    python evaluate.py --ckpt best.pt --report report.html    and a page of the worst answers
    python evaluate.py --ckpt best.pt --image a.jpg --text "the left dog" --save found.png
    python evaluate.py --ckpt best.pt --rows rows.jsonl --answers answers.jsonl

REC (referring expression comprehension): every expression has one target; the model has one query.
The metric is Acc@0.5, the share of expressions whose box has an IoU of 0.5 or more with the truth.
gREC (generalised REC): any number of targets, or none; several queries. The metrics are
Precision@(F1=1, IoU>=0.5), the share of expressions for which exactly the true boxes are found, and
N-acc, the same for those without a target.
Correct answers are counted per expression and divided once, so that batch size and number of ranks
change no figure (D9 in README.md).
"""

import argparse
import base64
import io
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torchvision.ops import box_convert, box_iou, generalized_box_iou
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

import data
import model as models
from data import InputError

MIN_IOU = 0.5  # a box is correct from this IoU on; in gREC, from this generalised IoU on
THRESHOLD = 0.7  # the box of a gREC query is part of the answer from this score on
BATCH = 64  # expressions that are computed at once
BRANCHES = ("decoder", "token")

# All about one expression, a line of --answers: image, expression; then `error`, or `truth` if it
# is known, {"boxes", "scores", "correct", "iou"} of each branch and, in REC, their `agreement`.
# Boxes are xyxy in pixels.
Result = dict[str, Any]

# ---------------------------------------------------------------------------------------- metrics


def rec_correct(boxes_xyxy: Tensor, truth_xyxy: Tensor) -> Tensor:
    """Pairs of boxes in pixels, (N, 4) and (N, 4) -> (N,) bool: whether their IoU is at least 0.5.

    In float64 and without an epsilon, as the official metric; so `losses.iou_giou` cannot be used.
    """
    iou = box_iou(boxes_xyxy.double(), truth_xyxy.double())  # (N, N); NaN for two empty boxes
    return iou.diagonal() >= MIN_IOU


def grec_correct(
    scores: Tensor, boxes_xyxy: Tensor, truth_xyxy: Tensor, threshold: float = THRESHOLD
) -> bool:
    """Whether F1 = 1: boxes (Q, 4) whose scores (Q,) reach the threshold are the true ones (n, 4).

    They pair greedily, best first, from a *generalised* IoU of 0.5 on, as gRefCOCO's own code does.
    """
    # in float64, because 0.7 is 0.69999999 in float32, and such a score would pass
    answers = boxes_xyxy[scores.double() >= threshold]
    n = len(truth_xyxy)
    if len(answers) != n:
        return False
    giou = generalized_box_iou(answers, truth_xyxy.to(answers))  # (n, n), above -1
    for _ in range(n):
        row, column = divmod(int(giou.argmax()), n)
        if giou[row, column] < MIN_IOU:
            return False
        giou[row] = -1  # both boxes of this pair are taken
        giou[:, column] = -1
    return True


def pick_answers(
    logits: Tensor, boxes: Tensor, threshold: float = THRESHOLD
) -> list[tuple[Tensor, Tensor]]:
    """logits (B, Q, 2), boxes (B, Q, 4) cxcywh -> B pairs: scores (n,), boxes (n, 4) xyxy in 0..1.

    In REC the answer is the one box; in gREC, every box whose score reaches the threshold, which
    may be none, the best first.
    """
    scores = logits.float().softmax(-1)[..., 0].cpu()  # (B, Q)
    boxes = box_convert(boxes.float().cpu(), "cxcywh", "xyxy").clamp(0, 1)  # (B, Q, 4)
    if scores.shape[1] == 1:
        return list(zip(scores, boxes, strict=True))
    answers = []
    for of_queries, their_boxes in zip(scores, boxes, strict=True):  # (Q,), (Q, 4)
        # empty boxes are no answers, as in detectron2's post-processing
        has_area = (their_boxes[:, 2:] > their_boxes[:, :2]).all(1)
        kept = (of_queries.double() >= threshold) & has_area
        best, order = of_queries[kept].sort(descending=True)
        answers.append((best, their_boxes[kept][order]))
    return answers


def judge(scores: Tensor, boxes: Tensor, truth: Tensor | None, grec: bool) -> dict[str, Any]:
    """A branch's answer, scores (n,) and boxes (n, 4), held against the truth (m, 4); xyxy pixels.

    `iou` is the IoU of the best answer for each true box; of several true boxes the mean in gREC
    and the best in REC, where one box is to be found. Without a true box it is 1 if nothing was
    answered.
    """
    answer = {
        "boxes": boxes.round(decimals=2).tolist(),
        "scores": [round(score, 4) for score in scores.tolist()],
    }
    if truth is None:
        return answer
    iou = float(len(truth) == len(boxes))  # where nothing is to be found or nothing was answered
    if len(truth) and len(boxes):
        best = box_iou(truth, boxes).nan_to_num(0).amax(1)  # (m,)
        iou = float(best.mean() if grec else best.max())
    if grec:
        correct = grec_correct(scores, boxes, truth, threshold=0)  # they were picked before
    else:
        correct = bool(rec_correct(boxes.expand_as(truth), truth).any())
    return answer | {"correct": correct, "iou": round(iou, 4)}


def judged(results: Sequence[Result], grec: bool) -> list[Result]:
    """The results that count: the truth is known and, in REC, holds a box."""
    return [result for result in results if result.get("truth") or grec and "truth" in result]


def summary(results: Sequence[Result], grec: bool) -> dict[str, float]:
    """The figures of a split. REC: n, {branch}_acc. gREC: n, n_none, {branch}_f1 and {branch}_nacc.

    The last one is left out where every expression has a target.
    """
    results = judged(results, grec)
    none = [result for result in results if not result["truth"]]
    figures = {"n": len(results)}
    if grec:
        figures["n_none"] = len(none)
    metric = "f1" if grec else "acc"
    for branch in branches_of(results):
        figures[f"{branch}_{metric}"] = share_correct(results, branch)
        if none:
            figures[f"{branch}_nacc"] = share_correct(none, branch)
    return figures


def branches_of(results: Sequence[Result]) -> list[str]:
    return [branch for branch in BRANCHES if branch in results[0]]


def share_correct(results: Sequence[Result], branch: str) -> float:
    return sum(result[branch]["correct"] for result in results) / len(results)


def table(
    title: str, results: Sequence[Result], examples: Sequence[data.Example], grec: bool
) -> str:
    """Accuracy in percent: of all, of those with the same number of targets, of the same kind."""
    numbers = ("no target", "one target", "several targets")
    groups = {name: [] for name in ("all", *numbers)}
    for result, example in zip(results, examples, strict=True):
        if judged([result], grec):
            number = numbers[min(len(result["truth"]), 2)]
            for name in ("all", number, f"- {example.kind or 'other'}"):
                groups.setdefault(name, []).append(result)
    total = len(groups["all"])
    branches = branches_of(results)
    metric = "F1=1" if grec else "Acc@0.5"
    header = "".join(f"{branch + ' ' + metric:>18}" for branch in branches)
    lines = [f"{title:<18} {'n':>7}{header}"]
    for name, group in groups.items():
        if group and (name == "all" or len(group) < total):
            shares = "".join(f"{100 * share_correct(group, branch):>18.2f}" for branch in branches)
            lines.append(f"{name:<18} {len(group):>7}{shares}")
    return "\n".join(lines)


# ----------------------------------------------------------------------- evaluation and grounding


@torch.inference_mode()
def evaluate_examples(
    model: models.SimVG,
    examples: list[data.Example],
    collate: data.Collate,
    branch: str = "both",
    amp: torch.dtype | None = None,
    workers: int = 0,
    threshold: float = THRESHOLD,
    title: str = "answers",
    after_batch: Callable[[list[Result]], None] = lambda new: None,
    keep_errors: bool = False,
) -> list[Result]:
    """A Result for each example, in order, on every rank.

    A batch is computed whole by one rank, so that no answer depends on the number of ranks. After
    each round of batches `after_batch` gets the new results, in order. An image that cannot be read
    is an InputError, or with `keep_errors` a result with `error`.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    keys = [(0, number) for number in range(len(examples))]
    batches = [keys[i : i + BATCH] for i in range(0, len(keys), BATCH)]
    dataset = data.Dataset([[example] for example in examples], model.config.image_size)
    mine = iter(data.loader(dataset, batches[rank::world], collate, workers))
    was_training = model.training
    model.eval()
    results = []
    rounds = range(0, len(batches), world)
    for _ in tqdm(rounds, title, disable=rank > 0 or None, leave=False):  # None: no bar in a file
        batch = next(mine, None)  # some ranks have none in the last round
        part = [] if batch is None else answer(model, batch, examples, branch, amp, threshold)
        parts = [part]
        if world > 1:
            parts = [None] * world
            dist.all_gather_object(parts, part)
        new = [result for part in parts for result in part]
        errors = [result["error"] for result in new if "error" in result]
        if errors and not keep_errors:
            raise InputError(errors[0])
        results += new
        after_batch(new)
    model.train(was_training)
    return results


def answer(
    model: models.SimVG,
    batch: data.Batch,
    examples: list[data.Example],
    branch: str,
    amp: torch.dtype | None,
    threshold: float,
) -> list[Result]:
    """The results of one batch, whose `index` are the numbers of its examples."""
    results = {}
    for number in sorted([*batch.index, *batch.faults]):
        example = examples[number]
        results[number] = {"image": example.name, "expression": example.expression}
    for number, error in batch.faults.items():
        results[number]["error"] = str(error)
    if not batch.index:
        return list(results.values())
    grec = model.config.queries > 1
    inputs = batch.to(model.mean.device)
    output = model(inputs.images, inputs.tokens, inputs.text_pad, branch, amp)
    answers = {}
    for name, (logits, boxes) in output.answers().items():
        answers[name] = pick_answers(logits, boxes, threshold)
    for i, number in enumerate(batch.index):
        result = results[number]
        width, height = batch.sizes[i].tolist()
        truth = None
        if examples[number].boxes is not None:
            truth = data.clip_boxes(examples[number].boxes, width, height)  # (m, 4)
            result["truth"] = truth.round(decimals=2).tolist()
        in_pixels = []
        for name, found in answers.items():
            scores, boxes = found[i]
            boxes = boxes.double() * batch.sizes[i].repeat(2)  # (n, 4)
            in_pixels.append(boxes)
            result[name] = judge(scores, boxes, truth, grec)
        if len(in_pixels) == 2 and not grec:
            iou = box_iou(*in_pixels).nan_to_num(0)  # NaN for two boxes without an area
            result["agreement"] = round(iou.item(), 4)
    return list(results.values())


@torch.no_grad()
def ground(
    model: models.SimVG,
    image: str | Path | Image.Image | np.ndarray | Tensor,
    texts: Sequence[str],
    tokenizer: data.Tokenizer,
    branch: str | None = None,
    threshold: float = THRESHOLD,
    amp: torch.dtype | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """(boxes (n, 4) xyxy in pixels, scores (n,)), the best first, for each phrase about an image.

    The image is a path, a PIL image, an RGB array (H, W, 3) uint8 or a tensor (3, H, W) uint8;
    boxes are in pixels of what was given. A file is turned as its EXIF says, a PIL image is not
    (`ImageOps.exif_transpose` does it). The default branch is the token branch where it was
    trained. InputError: a branch that was not, or another kind of image.
    """
    trained = model.trained_branch
    branch = branch or ("decoder" if trained == "decoder" else "token")
    if branch not in BRANCHES or trained not in ("both", branch):
        raise InputError(f"branch={branch!r}: expected decoder or token; trained: {trained}")
    if model.tqg.norm.weight.dtype != torch.float32:
        raise InputError("weights must be float32; amp=torch.float16 runs the encoder in 16 bits")
    if isinstance(texts, str):
        raise InputError(f"expected a list of phrases, not {texts!r:.60}")
    for text in texts:
        data.check_expression(text)
        if tokenizer.is_cut(text, model.max_tokens):
            warnings.warn(f"{text!r} is cut to {model.max_tokens} tokens", stacklevel=3)
        for word in tokenizer.unknown_words(text):
            warnings.warn(f"{text!r}: the tokenizer does not know {word!r}", stacklevel=3)
    picture = to_tensor(image)  # (3, H, W)
    height, width = picture.shape[1:]
    side = model.config.image_size
    device = model.mean.device
    resized = data.resize(picture, side, side).to(device)  # (3, S, S)
    found = []
    for start in range(0, len(texts), BATCH):
        some = texts[start : start + BATCH]
        tokens, text_pad = tokenizer(some, model.max_tokens)
        images = resized.expand(len(some), -1, -1, -1)  # (B, 3, S, S), in the memory of one
        output = model(images, tokens.to(device), text_pad.to(device), branch, amp)
        for scores, boxes in pick_answers(*output.answers()[branch], threshold):
            found.append((boxes * torch.tensor([width, height, width, height]), scores))
    return found


def to_tensor(image: str | Path | Image.Image | np.ndarray | Tensor) -> Tensor:
    """What `ground` takes for an image -> (3, H, W) uint8."""
    if isinstance(image, str | Path):
        return data.read_image(image, where="ground")
    wanted = "a path, a PIL image, an array (H, W, 3) uint8 or a tensor (3, H, W) uint8"
    with data.located(f"ground: expected {wanted}"):
        if isinstance(image, Image.Image):
            data.check_size(image, None)
            return pil_to_tensor(image.convert("RGB"))
        if isinstance(image, np.ndarray):
            image = torch.from_numpy(np.ascontiguousarray(image)).movedim(-1, 0)
        if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3:
            raise InputError(f"as a tensor it is {tuple(image.shape)} {image.dtype}")
        return image.cpu()


def load(
    path: str | Path, tokenizer: str | Path | None = None, device: str | torch.device = "cpu"
) -> tuple[models.SimVG, data.Tokenizer]:
    """A checkpoint and its tokenizer, by default the one that its config names.

    An official file names none and gets that of DataConfig. InputError: any misfit.
    """
    with data.located(path):
        checkpoint = models.read(path)
        model = models.build(checkpoint, device)
        named = data.DataConfig.tokenizer
        if checkpoint.state:
            named = checkpoint.state["config"]["data"]["tokenizer"]
    found = data.Tokenizer(tokenizer or named)
    check_tokenizer(found, model, checkpoint)
    return model, found


def check_tokenizer(
    tokenizer: data.Tokenizer, model: models.SimVG, checkpoint: models.Checkpoint | None
) -> None:
    """InputError unless the weights were trained with this tokenizer, as far as is known."""
    path = tokenizer.path
    words = model.config.vocab_size
    if tokenizer.vocab_size > words:
        raise InputError(f"{path}: has {tokenizer.vocab_size} ids, the model {words} words")
    known = checkpoint.state.get("tokenizer") if checkpoint else None
    if known not in (None, tokenizer.digest):
        raise InputError(f"{path}: is not the tokenizer that the weights were trained with")


# -------------------------------------------------------------------------- pictures, the report


def draw_result(example: data.Example, result: Result, side: int = 280) -> Image.Image:
    """The example's image with its true boxes and those of each branch; wrong ones are named."""
    boxes = {"truth": result["truth"]} if "truth" in result else {}
    wrong = []
    for branch in branches_of([result]):
        boxes[branch] = result[branch]["boxes"]
        if not result[branch].get("correct", True):
            wrong.append(branch)
    note = f" [wrong: {', '.join(wrong)}]" if wrong else ""
    caption = example.expression[: side // 6 - len(note)] + note
    image = data.read_image(example.image, example.size, example.where)  # (3, H, W)
    return data.draw(image, boxes, caption, side)


def quality(result: Result) -> float:
    """For the order of a report: the IoUs of the branches, and 1 more for each that is correct."""
    return sum(result[name]["iou"] + result[name]["correct"] for name in branches_of([result]))


STYLE = "figure { display: inline-block; margin: 4px; width: 280px; vertical-align: top }"


def report(path: str, splits: dict[str, tuple], grec: bool, most: int = 300) -> None:
    """A page of {split: (examples, results, table)}: each table, and the worst answers."""
    head = f"<!doctype html><meta charset='utf-8'><title>{escape(path)}</title>"
    parts = [head, f"<style>{STYLE}</style>"]
    for examples, results, printed in splits.values():
        parts.append(f"<pre>{escape(printed)}</pre>")
        branches = branches_of(results)
        pairs = [pair for pair in zip(examples, results, strict=True) if judged([pair[1]], grec)]
        pairs.sort(key=lambda pair: quality(pair[1]))
        for example, result in tqdm(pairs[:most], "pictures", disable=None, leave=False):
            file = io.BytesIO()
            draw_result(example, result).save(file, "JPEG", quality=80)
            picture = base64.b64encode(file.getvalue()).decode()
            ious = ", ".join(f"{branch} IoU {result[branch]['iou']}" for branch in branches)
            text = f"{example.expression}: {ious} ({example.where})"
            parts.append(f"<figure><img src='data:image/jpeg;base64,{picture}'>")
            parts.append(f"<figcaption>{escape(text)}</figcaption></figure>")
    Path(path).write_text("\n".join(parts), encoding="utf-8")


# ------------------------------------------------------------------------------------ the program


def main() -> None:
    args = parse_arguments()
    rank, _, device = models.join_ranks()
    data.check_output(args.answers, ".jsonl")
    data.check_output(args.report, ".html")
    data.check_output(args.save, ".png")
    # rank 0 may have begun the file when another rank comes here
    if args.answers and rank == 0 and Path(args.answers).exists():
        raise InputError(f"--answers {args.answers}: there is such a file already")
    with data.located(args.ckpt):
        checkpoint = models.read(args.ckpt)
        model = models.build(checkpoint, device)
    config, trained, amp = read_settings(args, checkpoint)
    precision = models.encoder_precision(args.amp or amp, device)
    if args.branch and trained not in ("both", args.branch):
        raise InputError(f"--branch {args.branch}: only the {trained} branch was trained")
    tokenizer = data.Tokenizer(config.tokenizer)
    check_tokenizer(tokenizer, model, checkpoint)
    data.say(f"{args.ckpt}: {checkpoint.kind}, on {device.type}, {precision or torch.float32}")

    state = checkpoint.state
    kind = "last" if "optimizer" in state else "best"
    about_weights = {"weights": kind, "epoch": state.get("epoch", 0), "step": state.get("step", 0)}
    collate = data.Collate(tokenizer, config.max_tokens)
    grec = model.config.queries > 1
    of_splits = {}
    questions = read_questions(args, config)
    say_unknown_words(tokenizer, questions.values())
    for split, examples in questions.items():
        if split:
            check_targets(split, examples, model.config.queries)
        results = evaluate_examples(
            model,
            examples,
            collate,
            args.branch or trained,
            precision,
            config.workers,
            args.threshold,
            split or "answers",
            partial(write_answers, args.answers, split),
            keep_errors=not split,
        )
        if rank == 0 and split:
            printed = table(split, results, examples, grec)
            of_splits[split] = (examples, results, printed)
            print(printed)
            print(json.dumps({"split": split} | about_weights | summary(results, grec)))
        errors = {result["error"] for result in results if "error" in result}
        for error in sorted(errors)[:20]:
            data.say(error)
        if rank == 0 and args.image:
            show(examples, results, grec, args.save)
    models.leave_ranks()  # what follows is for rank 0 alone and may take long
    if rank == 0 and args.report:
        report(args.report, of_splits, grec)
        print(f"report: {args.report}")


def read_settings(
    args: argparse.Namespace, checkpoint: models.Checkpoint
) -> tuple[data.DataConfig, str, str]:
    """Section data, the trained branch and train.amp, of --config or of the checkpoint."""
    import train  # only for the class of its section

    for each in args.set:
        if not each.startswith("data."):
            raise InputError(f"--set {each}: only keys of data can be set, the file says the rest")
    if args.config:
        _, config, train_config = train.read_config(args.config, args.set)
        branch = checkpoint.state.get("branch") or train.trained_branch(train_config)
        return config, branch, train_config.amp
    if not checkpoint.state:
        raise InputError(f"{args.ckpt}: has no config, name one: --config configs.json:refcoco")
    sections = checkpoint.state["config"]
    data.override(sections, args.set)
    config = data.fill(data.DataConfig, sections["data"], "data")
    return config, checkpoint.state["branch"], sections["train"]["amp"]


def read_questions(
    args: argparse.Namespace, config: data.DataConfig
) -> dict[str, list[data.Example]]:
    """Examples of each split; under the name "" phrases about images, or the rows of a file."""
    if args.image:
        examples = []
        for path in args.image:
            for text in args.text:
                data.check_expression(text)
                examples.append(data.Example(path, text, name=path, where="--image"))
        return {"": examples}
    if args.rows:
        rows = data.own_rows(config, Path(args.rows), need_boxes=False)
        return {"": data.all_examples(rows)}
    questions = {}
    for split in args.split or config.eval_splits:
        questions[split] = data.all_examples(data.read_rows(config, split))
        if data.IS_FIRST_RANK:
            data.check_images(questions[split])
    return questions


def say_unknown_words(tokenizer: data.Tokenizer, splits: Iterable[list[data.Example]]) -> None:
    """Name up to 5 words that the model reads as "unknown"."""
    words = {}
    for example in data.all_examples(splits):
        for word in tokenizer.unknown_words(example.expression):
            words.setdefault(word, example.where)
    for word in list(words)[:5]:
        data.say(f"{words[word]}: the tokenizer does not know {word!r}")


def check_targets(name: str, examples: Sequence[data.Example], queries: int) -> None:
    """Say how many expressions need a recipe with more queries; InputError if none has a box."""
    none = [example for example in examples if queries == 1 and not example.boxes]
    many = [example for example in examples if len(example.boxes or []) > queries]
    if not none and not many:
        return
    counts = f"{len(none):,} expressions without a target, {len(many):,} with more than {queries}"
    data.say(f"{name}: {counts}: they need a recipe with more queries, such as grefcoco")
    if len(none) == len(examples):
        raise InputError(f"{name}: no expression has a box")


def write_answers(path: str | None, split: str, results: Sequence[Result]) -> None:
    """Append the results to the file of --answers, on rank 0."""
    if path and data.IS_FIRST_RANK:
        with open(path, "a", encoding="utf-8") as file:
            for result in results:
                line = {"split": split} | result if split else result
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def show(
    examples: Sequence[data.Example], results: Sequence[Result], grec: bool, save: str | None
) -> None:
    """Print every box, and draw them if `save` names a picture."""
    pictures = []
    for example, result in zip(examples, results, strict=True):
        if "error" in result:
            continue
        for branch in branches_of([result]):
            found = result[branch]
            about = f"{example.image}: {branch}: {example.expression!r}"
            if grec:  # in REC one box must be found, so its score says nothing
                about += f", scores {found['scores']}"
            print(f"{about}, boxes {found['boxes']} (x1, y1, x2, y2 in pixels)")
        if save:
            pictures.append(draw_result(example, result, 560))
    if pictures:
        data.tile(pictures, save, columns=2)
        print(f"picture: {save}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Evaluate a checkpoint; or find boxes, with --image and --text or with --rows."
    )
    add = parser.add_argument
    add("--ckpt", required=True, help="a checkpoint of train.py, or an official .pth")
    data.add_config(parser, required=False)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--split", nargs="+", help="splits to evaluate (default: all of the config)")
    what.add_argument("--image", nargs="+", help="find the phrases of --text in these images")
    what.add_argument("--rows", help="answer the rows of this .jsonl, which need no boxes")
    add("--text", nargs="+", help="the phrases for --image")
    add("--branch", choices=BRANCHES, help="the one that answers (default: all that were trained)")
    add("--threshold", type=float, default=THRESHOLD, help="lowest score of a gREC box")
    add("--amp", choices=["auto", *models.PRECISIONS], help="(default: train.amp)")
    add("--answers", help="write every answer as a line of JSON to this .jsonl")
    add("--report", help="write the worst answers of the splits to this .html")
    add("--save", help="draw what was found in --image into this .png")
    args = parser.parse_args()
    if bool(args.image) != bool(args.text):
        parser.error("--image and --text go together")
    if args.rows and not args.answers:
        parser.error("--rows needs --answers")
    if args.report and (args.image or args.rows) or args.save and not args.image:
        parser.error("--report goes with splits, --save with --image")
    return args


if __name__ == "__main__":
    data.run(main)
