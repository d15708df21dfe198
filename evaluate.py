"""Metrics, evaluation on any number of ranks, grounding one phrase in one image, and pictures.

    python evaluate.py --ckpt runs/shapes/best.pt                             # every split of the checkpoint's config
    python evaluate.py --ckpt best.pt --image photo.jpg --text "the left dog" # box and score, and a picture

REC (one query): Acc@0.5, the share of expressions whose box has an IoU of at least 0.5 with the truth.
gREC (several queries): Precision@(F1=1, IoU>=0.5) over all expressions, and N-acc over those without a target.
Everything is counted per expression and divided once, so that batches and ranks change nothing (D9).
"""

import argparse
import ctypes
import json
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.ops import box_convert, clip_boxes_to_image, generalized_box_iou
from tqdm import tqdm

import data
import model as models
from data import InputError

THRESHOLD = 0.7  # a gREC query is an answer from this score on
BRANCHES = ("decoder", "token")


# ----------------------------------------------------------------------------------------------------- metrics


def rec_correct(boxes_xyxy: Tensor, truth_xyxy: Tensor) -> Tensor:
    """boxes (N, 4) and truth (N, 4) in pixels, pair by pair -> (N,) bool: IoU of at least 0.5."""
    a, b = boxes_xyxy.double(), truth_xyxy.double()
    overlap = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - overlap
    return overlap / union.clamp(min=1e-6) >= 0.5


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
        if giou[row, column] < 0.5:
            return False
        giou[row], giou[:, column] = -1, -1
    return True


class Result(NamedTuple):
    """What one branch answered to one expression."""

    correct: bool
    scores: Tensor  # (n,) of the boxes answered: in REC the best one, in gREC those from the threshold on
    boxes: Tensor  # (n, 4) xyxy in 0..1


def results(logits: Tensor, boxes: Tensor, truth: Tensor, truth_mask: Tensor, size: int) -> list[Result]:
    """logits (B, Q, 2), boxes (B, Q, 4), truth (B, M, 4), truth_mask (B, M) -> B results, compared at `size` pixels."""
    scores = logits.float().softmax(-1)[..., 0]  # (B, Q)
    answers, truth = (box_convert(x.float(), "cxcywh", "xyxy") for x in (boxes, truth))
    answers = answers.clamp(0, 1)
    if boxes.shape[1] == 1:
        # REC has one target; the mixed sets may state several, then the first counts
        correct = rec_correct(answers[:, 0] * size, truth[:, 0] * size) & truth_mask[:, 0]
        return [Result(bool(c), s, b) for c, s, b in zip(correct, scores.cpu(), answers.cpu(), strict=True)]
    found = []
    for s, b, t, mask in zip(scores.cpu(), answers.cpu(), truth.cpu(), truth_mask.cpu(), strict=True):
        solid = (b[:, 2:] > b[:, :2]).all(1)  # boxes clipped away count as not answered
        s, b = s[solid], b[solid]
        correct = grec_correct(s, b * size, t[mask] * size)
        kept = s.double() >= THRESHOLD
        found.append(Result(correct, s[kept], b[kept]))
    return found


# -------------------------------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def evaluate(
    model: models.SimVG,
    dataset: data.Dataset,
    collate: data.Collate,
    branch: str = "both",
    batch_size: int = 64,
    workers: int = 0,
    amp: torch.dtype | None = None,
    title: str = "",
) -> list[dict[str, Result]]:
    """The results of every example, in order, {branch: Result}: on all ranks together, the same list on each.

    Where the GPU's memory does not hold `batch_size` examples, it goes on with half of it.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device, training = model.mean.device, model.training
    model.eval()
    mine = range(rank, len(dataset), world)
    found: dict[int, dict[str, Result]] = {}
    with tqdm(total=len(mine), desc=title, disable=None if title and rank == 0 else True, leave=False) as bar:
        while len(found) < len(mine):
            left = mine[len(found) :]
            keys = [[(0, i) for i in left[s : s + batch_size]] for s in range(0, len(left), batch_size)]
            try:
                for batch in data.batches(dataset, collate, keys, workers, pin=device.type == "cuda"):
                    found |= answered(model, batch.to(device), branch, amp)
                    bar.update(len(batch.index))
            except torch.OutOfMemoryError:
                if batch_size == 1:
                    raise
                batch_size //= 2
    if world > 1:
        parts: list = [None] * world
        dist.all_gather_object(parts, found)
        found = {index: result for part in parts for index, result in part.items()}
    model.train(training)
    assert len(found) == len(dataset), "an expression was counted twice or never"
    return [found[index] for index in range(len(dataset))]


def answered(
    model: models.SimVG, batch: data.Batch, branch: str, amp: torch.dtype | None
) -> dict[int, dict[str, Result]]:
    """{example: {branch: Result}} of one batch."""
    output = model(batch.images, batch.tokens, batch.text_pad, branch, amp)
    answers = {}
    if branch != "token":
        answers["decoder"] = output.decoder_logits[-1], output.decoder_boxes[-1]
    if branch != "decoder":
        answers["token"] = output.token_logits, output.token_boxes
    each = {name: results(*x, batch.boxes, batch.box_mask, model.image_size) for name, x in answers.items()}
    return {index: {name: listed[i] for name, listed in each.items()} for i, index in enumerate(batch.index)}


def summary(found: Sequence[dict[str, Result]], rows: Sequence[data.Row], grec: bool) -> dict[str, float]:
    """The figures of a split: n, {branch}_acc, or n, n_none, {branch}_f1, {branch}_nacc for gREC."""
    none = [not row.choices[0][1] for row in rows]
    figures: dict[str, float] = {"n": len(rows)}
    if grec:
        figures["n_none"] = sum(none)
    for branch in found[0]:
        correct = [result[branch].correct for result in found]
        figures[f"{branch}_{'f1' if grec else 'acc'}"] = sum(correct) / len(rows)
        if grec and any(none):
            figures[f"{branch}_nacc"] = sum(c for c, n in zip(correct, none, strict=True) if n) / sum(none)
    return figures


def by_kind(found: Sequence[dict[str, Result]], rows: Sequence[data.Row]) -> dict[str, dict[str, float]]:
    """kind -> {"n", branch: share of correct answers}, for rows that state a `kind`."""
    kinds: dict[str, list] = {}
    for result, row in zip(found, rows, strict=True):
        count = ("no target", "one target")[len(row.choices[0][1])] if len(row.choices[0][1]) < 2 else "several targets"
        for kind in filter(None, (row.kind, count)):
            kinds.setdefault(kind, []).append(result)
    if len(kinds) < 2:
        return {}
    return {
        kind: {"n": len(group)} | {branch: sum(r[branch].correct for r in group) / len(group) for branch in group[0]}
        for kind, group in sorted(kinds.items())
        if len(group) < len(rows)
    }


def mean_box_accuracy(train: Sequence[data.Row], rows: Sequence[data.Row]) -> float | None:
    """Acc@0.5 of always answering the mean box of the training rows: what a model that ignores its input gets."""

    def boxes(some: Sequence[data.Row]) -> Tensor:  # (n, 4) cxcywh in 0..1
        scaled = [
            [v / s for v, s in zip(box, row.size * 2, strict=True)] for row in some for box in row.choices[0][1][:1]
        ]
        return box_convert(torch.tensor(scaled).reshape(-1, 4), "xywh", "cxcywh")

    if any(row.size is None for row in (*train, *rows)):
        return None
    mean, truth = (box_convert(x, "cxcywh", "xyxy") for x in (boxes(train).mean(0, keepdim=True), boxes(rows)))
    return rec_correct(mean.expand_as(truth) * 1000, truth * 1000).sum().item() / len(rows)


# --------------------------------------------------------------------------------------------------- one image


@torch.inference_mode()
def ground(
    model: models.SimVG,
    image: str | Path | Tensor,
    texts: Sequence[str],
    tokenizer: data.Tokenizer,
    branch: str = "token",
    threshold: float = THRESHOLD,
    max_tokens: int = 20,
    amp: torch.dtype | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Phrases in one image (a path, or (3, H, W) uint8 RGB) -> for each boxes xyxy in pixels (n, 4) and scores (n,).

    A REC model answers one box; a gREC model every box from the threshold on, best first, maybe none.
    """
    picture = image if isinstance(image, Tensor) else data.read_image(str(image))
    for text in texts:
        data.check_expression(text, "--text")
    height, width = picture.shape[1:]
    device = model.mean.device
    tokens, text_pad = (x.to(device) for x in tokenizer(texts, max_tokens))  # (T, L)
    resized = data.resize(picture, model.image_size, model.image_size).to(device)
    output = model(resized.expand(len(texts), -1, -1, -1), tokens, text_pad, branch, amp)
    logits, boxes = output[2:] if branch == "token" else (output[0][-1], output[1][-1])  # (T, Q, 2), (T, Q, 4)
    every_score = logits.softmax(-1)[..., 0].cpu()  # (T, Q)
    scale = torch.tensor([width, height, width, height])
    every_box = clip_boxes_to_image(box_convert(boxes.cpu(), "cxcywh", "xyxy") * scale, (height, width))
    found = []
    for scores, boxes in zip(every_score, every_box, strict=True):
        kept = scores.argsort(descending=True)
        if len(scores) > 1:
            kept = kept[(scores[kept].double() >= threshold) & (boxes[kept, 2:] > boxes[kept, :2]).all(1)]
        found.append((boxes[kept], scores[kept]))
    return found


# ---------------------------------------------------------------------------------------------------- pictures


def draw_page(rows: Sequence[data.Row], found: Sequence[dict[str, Result]], path: Path) -> None:
    """A page of examples: the true boxes and each branch's."""
    tiles = []
    for i, row in enumerate(rows):
        image = data.read_image(row.image, row.size, row.where)
        height, width = image.shape[1:]
        expression, boxes = row.choices[0]
        truth = data.clip_boxes(boxes, width, height) / torch.tensor([width, height, width, height])
        shown = {"truth": truth} | {name: result.boxes for name, result in found[i].items()}
        tiles.append(data.draw(image, shown, expression))
    data.tile(tiles, path, columns=4)


def draw_curves(records: Sequence[dict], path: Path) -> None:
    """A picture of metrics.jsonl over the steps: loss terms above, figures of the first evaluated split below."""
    page = Image.new("RGB", (720, 520), "white")
    pen = ImageDraw.Draw(page)
    train = [row for row in records if row["split"] == "train"]
    evaluated = [row for row in records if row["split"] != "train"]
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
    pen.text((left + width - 70, top + height - 14), f"step {last}", fill="black")
    for i, name in enumerate(names):
        ink = ("black", "royalblue", "darkorange", "seagreen")[i]
        points = [(left + width * r["step"] / last, top + height * (1 - r[name] / high)) for r in rows if name in r]
        pen.line(points, fill=ink, width=2)
        pen.text((left + 20 + 150 * i, top + height + 4), name, fill=ink)


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
    rows = data.expand(data.read_rows(config["data"], split))
    if not dist.is_initialized() or dist.get_rank() == 0:
        data.check_files(rows)
    return data.Dataset(rows, config["model"]["image_size"])


def load_collate(config: dict) -> data.Collate:
    tokenizer = data.Tokenizer(config["data"]["tokenizer"])
    if tokenizer.vocab_size > config["model"]["vocab_size"]:
        raise InputError(
            f"{config['data']['tokenizer']}: has {tokenizer.vocab_size} ids, model.vocab_size is "
            f"{config['model']['vocab_size']}: not the tokenizer of this model"
        )
    return data.Collate(tokenizer, config["data"]["max_tokens"])


def main() -> None:
    args = parse_arguments()
    rank, _, device = join_ranks()
    model, config, kind = models.load_with_config(args.ckpt, device)
    if args.config:
        config = data.load_config(args.config)
        config["model"] |= {"image_size": model.image_size, "queries": model.tqg.query_embed.num_embeddings}
    elif kind.startswith("official"):
        raise InputError(
            f"{args.ckpt}: an official checkpoint holds no config, name one: --config configs.json:refcoco"
        )
    data.override_config(config, args.set)
    if args.amp:
        models.keep_in_16_bits(model, models.AMP[args.amp])
    if rank == 0:
        print(f"{args.ckpt}: {kind}")
    if args.image is None:
        evaluate_splits(args, model, config, rank)
    elif rank == 0:
        ground_one(args, model, config)
    if dist.is_initialized():
        dist.destroy_process_group()


def join_ranks() -> tuple[int, int, torch.device]:
    """(rank, world size, device) of this process; under torchrun it joins the others. Settings for speed, too."""
    keep_freed_memory()
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.enable_cudnn_sdp(False)  # open faults: wrong gradients with masks, NaN for one query
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    return (dist.get_rank() if world > 1 else 0), world, device


def keep_freed_memory() -> None:
    """On Linux: keep for the next tensor what the last one set free. glibc gives large blocks back to the system, and
    each time the next activations cost a page fault every 4 kB: a fourth of a CPU's training step."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def evaluate_splits(args: argparse.Namespace, model: models.SimVG, config: dict, rank: int) -> None:
    """Print one table a split, and the same figures as a line of JSON."""
    branch = chosen_branch(args, config)
    collate = load_collate(config)
    for split in args.split or config["data"]["eval_splits"]:
        dataset = load_split(config, split)
        workers, amp = config["data"]["workers"], models.AMP[args.amp]
        found = evaluate(model, dataset, collate, branch, workers=workers, amp=amp, title=split)
        figures = summary(found, dataset.rows, config["model"]["queries"] > 1)
        if rank == 0:
            print_table(split, figures, by_kind(found, dataset.rows))
            print(json.dumps({"split": split, **figures}))


def ground_one(args: argparse.Namespace, model: models.SimVG, config: dict) -> None:
    """Print every box of every phrase with its score, and save a picture."""
    tokenizer = data.Tokenizer(config["data"]["tokenizer"])
    image = data.read_image(args.image)
    scale = torch.tensor([image.shape[2], image.shape[1]] * 2)
    answers: list[dict[str, Tensor]] = [{} for _ in args.text]
    options = {"max_tokens": config["data"]["max_tokens"], "amp": models.AMP[args.amp]}
    for branch in BRANCHES if chosen_branch(args, config) == "both" else [chosen_branch(args, config)]:
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


def chosen_branch(args: argparse.Namespace, config: dict) -> str:
    trained = trained_branch(config["train"])
    if not args.branch:
        return trained
    for branch in args.branch:
        if trained not in ("both", branch):
            raise InputError(f"--branch {branch}: this checkpoint's {branch} branch was never trained")
    return args.branch[0] if len(set(args.branch)) == 1 else "both"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluate a checkpoint, or ground phrases in one image.")
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="a checkpoint of train.py, or an official .pth")
    parser.add_argument("--config", metavar="FILE:NAME", help="the config of an official .pth, which holds none")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="such as data.images=DIR"
    )
    parser.add_argument("--split", nargs="+", metavar="NAME", help="splits to evaluate (default: all of the config)")
    parser.add_argument("--branch", nargs="+", choices=BRANCHES, help="default: every branch that was trained")
    parser.add_argument("--image", metavar="FILE", help="ground phrases in this image")
    parser.add_argument("--text", nargs="+", metavar="PHRASE", help="the phrases")
    parser.add_argument("--amp", choices=["bf16", "fp16"], default="", help="run the encoder in 16 bits")
    parser.add_argument("--save", metavar="FILE", help="where the picture goes (default: IMAGE_grounded.png)")
    args = parser.parse_args()
    if (args.image is None) != (args.text is None):
        parser.error("--image and --text go together")
    return args


if __name__ == "__main__":
    data.run(main)
