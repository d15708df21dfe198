"""What each part of SimVG is worth: runs without it on an embedded set, with right and with wrong boxes.

    python tests/ablation.py --set train.lr=3e-4 train.lr_encoder=3e-4
    python tests/ablation.py --config configs.json:shapes-grec --epochs 3 --noise 0

It writes runs/ablation-NAME/: the runs, log.txt, table.md, noise.png and curves.png.

Each run is a recipe with changed loss factors, or with one piece of the code replaced (`PIECES`), for as many epochs;
`two stages` takes half of them, rounded up, for the decoder branch alone. A share of the training rows, --noise, has a
wrong box (data.label_noise); `val` and `test` have none. The runs share the cores, a thread each. A run that was
stopped goes on, and a finished one is not repeated: after other changes of settings or code give another --out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import evaluate
import losses
import model as models
import train

ROOT = Path(__file__).parent.parent
SEEDS = (6666, 1, 2)
SIMVG = "both, DWBD: SimVG"
NO_TOKEN = ["train.loss_token_on_truth=null", "train.loss_token_on_teacher=null"]
NO_TEACHER = ["train.loss_token_on_teacher=null"]
VARIANTS = {  # name -> changed settings
    "decoder branch alone": NO_TOKEN,
    "token branch alone": ["train.loss_decoder=null", *NO_TEACHER],
    "both, no distillation": NO_TEACHER,
    "both, plain distillation": [],
    SIMVG: [],
    "both, DWBD with the factors of Eq. 7": ["train.loss_token_on_teacher=2", "train.loss_token_on_truth=1"],
    "both, boxes of the teacher alone": [],
    "SimVG in two stages": [],
    "SimVG without TQG": [],
}


def fixed(weight: float) -> Callable[..., Tensor]:
    """In place of `losses.teacher_weight`: the teacher is trusted by this share, however good it is."""
    return lambda logits, *_: logits.new_tensor(weight)


def queries_without_text(tqg: models.TextGuidedQuery, text: Tensor, text_pad: Tensor) -> Tensor:
    """The learnt queries as they are; the words reach the heads only through the tokens of image and object."""
    return tqg.query_embed.weight.expand(len(text), -1, -1)


PIECES = {
    "both, plain distillation": patch.object(losses, "teacher_weight", fixed(0.5)),
    "both, boxes of the teacher alone": patch.object(losses, "teacher_weight", fixed(1.0)),
    "SimVG without TQG": patch.object(models.TextGuidedQuery, "forward", queries_without_text),
}


def folder(out: Path, noise: float, variant: str, seed: int) -> Path:
    return out / f"noise-{noise:g}" / f"{variant.replace(', ', '-').replace(': ', '-').replace(' ', '-')}-{seed}"


def start(config: str, out: Path, settings: Sequence[str], init: Path | None = None) -> None:
    """train.py in this process, so that a replaced piece stays replaced; a finished run stays as it is."""
    if (out / "curves.png").exists():
        return
    going_on = ["--resume"] if out.exists() else []
    line = ["train.py", "--config", config, "--out", str(out), *going_on, "--set", *settings]
    with patch.object(sys, "argv", [*line, *(["--init", str(init)] if init else [])]):
        try:
            train.main()
        except SystemExit as ended:
            if ended.code:
                raise


def one(args: argparse.Namespace, noise: float, variant: str, seed: int) -> None:
    """One run, in a process of its own."""
    out = folder(args.out, noise, variant, seed)
    settings = [f"train.seed={seed}", f"train.epochs={args.epochs}", f"data.label_noise={noise}"]
    settings += [*args.set, *VARIANTS[variant]]
    init = None
    if variant == "SimVG in two stages":
        second = args.epochs // 2
        init = out.with_name(f"{out.name}-first") / "best.pt"
        start(args.config, init.parent, [*settings, *NO_TOKEN, f"train.epochs={args.epochs - second}"])
        settings += [f"train.epochs={second}", "train.warmup_epochs=0"]
    with PIECES.get(variant, nullcontext()):
        start(args.config, out, settings, init)


def rows(run: Path, split: str, weights: str | None = None) -> list[dict]:
    """The rows of a run's metrics.jsonl that are about this split (and these weights)."""
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    return [row for row in map(json.loads, lines) if row["split"] == split and row.get("weights") == weights]


def accuracy(row: dict, branch: str) -> float | None:
    """In percent, if that branch was trained."""
    return next((100 * row[name] for name in (f"{branch}_acc", f"{branch}_f1") if name in row), None)


def on_test(args: argparse.Namespace, noise: float, variant: str, branch: str) -> list[float]:
    """The accuracy of the best weights on `test`, of each seed whose run has ended."""
    runs = (rows(folder(args.out, noise, variant, seed), "test", "best")[-1:] for seed in args.seed)
    return [value for run in runs for row in run if (value := accuracy(row, branch)) is not None]


def spread(values: Sequence[float]) -> float:
    """The standard deviation over the seeds."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def table(args: argparse.Namespace) -> str:
    """Accuracy on `test` for each branch and share of wrong boxes: mean, spread and each seed."""
    columns = [(branch, noise) for branch in evaluate.BRANCHES for noise in args.noise]
    names = " | ".join(f"{branch}, {100 * noise:g} % wrong boxes" for branch, noise in columns)
    lines = [f"| `test`, mean ± spread (each seed) | {names} |", "|---" * (len(columns) + 1) + "|"]
    for variant in args.variant:
        cells = []
        for branch, noise in columns:
            values = on_test(args, noise, variant, branch)
            each = ", ".join(f"{value:.1f}" for value in values)
            cell = f"{statistics.mean(values):.1f} ± {spread(values):.1f} ({each})" if len(values) > 1 else each
            cells.append(cell)
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def pictures(args: argparse.Namespace) -> None:
    """noise.png: accuracy on `test` over the share of wrong boxes. curves.png: with the most wrong boxes, W_dt of each
    seed, and the token branch's accuracy on `val`. Error bars are standard deviations over the seeds."""
    panels = {}
    for branch in evaluate.BRANCHES:
        lines = panels[f"accuracy of the {branch} branch, %"] = {}
        for i, variant in enumerate(args.variant):  # side by side, or the error bars would hide each other
            cells = [(100 * noise + i / 4, on_test(args, noise, variant, branch)) for noise in sorted(args.noise)]
            lines[variant] = [(x, statistics.mean(values), spread(values)) for x, values in cells if values]
    evaluate.draw_panels(panels, args.out / "noise.png", "training rows with a wrong box, %, side by side")
    most, weights = max(args.noise), {}
    for seed in args.seed:
        logged = rows(folder(args.out, most, SIMVG, seed), "train")
        weights[f"seed {seed}"] = [(row["step"], row["teacher_weight"], 0) for row in logged]
    shown: dict[str, list] = {}
    for variant in args.variant:
        shown[variant] = []  # a variant without a token branch keeps its colour, too
        runs = [rows(folder(args.out, most, variant, seed), "val", "last") for seed in args.seed]
        for each in zip(*filter(None, runs), strict=False):
            if values := [value for row in each if (value := accuracy(row, "token")) is not None]:
                point = each[0]["step"], statistics.mean(values), spread(values)
                shown[variant].append(point)
    evaluate.draw_panels({"W_dt": weights, "accuracy of the token branch, %": shown}, args.out / "curves.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=f"{ROOT}/configs.json:shapes-quick", metavar="FILE:NAME")
    parser.add_argument("--epochs", type=int, default=4, help="at least 2 (default: 4)")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="for every run")
    parser.add_argument("--noise", type=float, nargs="+", default=[0, 0.15, 0.3], help="shares of wrong boxes")
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    parser.add_argument("--seed", type=int, nargs="+", default=SEEDS, help="default: 6666 1 2")
    parser.add_argument("--out", type=Path, help="default: runs/ablation-NAME")
    parser.add_argument("--here", action="store_true", help="one run, in this process; used by the program itself")
    args = parser.parse_args()
    args.out = args.out or Path(f"runs/ablation-{args.config.rpartition(':')[2]}")
    if args.here:
        return one(args, args.noise[0], args.variant[0], args.seed[0])
    data.make_embedded_set(data.load_config(args.config)["data"])
    again = [sys.executable, __file__, "--config", args.config, "--epochs", str(args.epochs), "--out", str(args.out)]
    again += ["--set", *args.set] if args.set else []
    args.out.mkdir(parents=True, exist_ok=True)

    def run(seed: int, noise: float, variant: str) -> None:
        which = ["--here", "--noise", str(noise), "--variant", variant, "--seed", str(seed)]
        with open(args.out / "log.txt", "a") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run([*again, *which], check=True, env=environment, stdout=log, stderr=log)

    jobs = [(seed, noise, variant) for seed in args.seed for noise in args.noise for variant in args.variant]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in tqdm(pool.map(run, *zip(*jobs, strict=True)), "runs", len(jobs)):  # says how long they all take
            (args.out / "table.md").write_text(table(args) + "\n")
    print(table(args))
    pictures(args)


if __name__ == "__main__":
    data.run(main, subprocess.CalledProcessError)
