"""What each part of SimVG is worth: an embedded set without it, over three seeds, mean and spread.

    python tests/ablation.py --epochs 3          writes runs/ablation-shapes/: a run each, table.md and curves.png

Each run is the recipe `shapes` (or --config configs.json:shapes-grec) with changed loss factors, or with one piece of
the code replaced (`PIECES`), for as many epochs; `two stages` takes half of them, rounded up, for the decoder branch
alone. The runs share the cores, a thread each. A run that is already there is not run again.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

from torch import Tensor

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
    "SimVG without TQG": [],
    "SimVG in two stages": [],
}


def half(logits: Tensor, *_) -> Tensor:
    """Plain distillation: the teacher is trusted by half, however good it is."""
    return logits.new_tensor(0.5)


def queries_without_text(tqg: models.TextGuidedQuery, text: Tensor, text_pad: Tensor) -> Tensor:
    """The learnt queries as they are; the words reach the heads only through the tokens of image and object."""
    return tqg.query_embed.weight.expand(len(text), -1, -1)


PIECES = {
    "both, plain distillation": patch.object(losses, "teacher_weight", half),
    "SimVG without TQG": patch.object(models.TextGuidedQuery, "forward", queries_without_text),
}


def folder(out: Path, variant: str, seed: int) -> Path:
    return out / f"{variant.replace(', ', '-').replace(': ', '-').replace(' ', '-')}-{seed}"


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


def one(args: argparse.Namespace) -> None:
    """One run, in a process of its own."""
    out = folder(args.out, args.variant, args.seed)
    settings = [f"train.seed={args.seed}", f"train.epochs={args.epochs}", *VARIANTS[args.variant]]
    init = None
    if args.variant == "SimVG in two stages":
        second = args.epochs // 2
        init = out.with_name(f"{out.name}-first") / "best.pt"
        start(args.config, init.parent, [*settings, *NO_TOKEN, f"train.epochs={args.epochs - second}"])
        settings += [f"train.epochs={second}", "train.warmup_epochs=0"]
    with PIECES.get(args.variant, nullcontext()):
        start(args.config, out, settings, init)


def rows(out: Path, variant: str, seed: int, split: str, weights: str | None = None) -> list[dict]:
    lines = (folder(out, variant, seed) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split and row.get("weights") == weights]


def accuracy(row: dict, branch: str) -> float | None:
    """In percent, if that branch was trained."""
    return next((100 * row[name] for name in (f"{branch}_acc", f"{branch}_f1") if name in row), None)


def table(out: Path, variants: Sequence[str]) -> str:
    """Accuracy on `test`: mean, spread (standard deviation over the seeds) and each seed."""
    lines = ["| `test`, mean ± spread (each seed) | decoder branch | token branch |", "|---|---|---|"]
    for variant in variants:
        cells = []
        for branch in evaluate.BRANCHES:
            values = [accuracy(rows(out, variant, seed, "test", "best")[-1], branch) for seed in SEEDS]
            if None in values:
                cells.append("")
                continue
            seeds = ", ".join(f"{value:.1f}" for value in values)
            cells.append(f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} ({seeds})")
        lines.append(f"| {variant} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def curves(out: Path, path: Path) -> None:
    """W_dt of each seed, and the token branch's accuracy on `val`: mean and standard deviation over the seeds."""
    weights = {}
    for seed in SEEDS:
        weights[f"seed {seed}"] = [(row["step"], row["teacher_weight"], 0) for row in rows(out, SIMVG, seed, "train")]
    shown: dict[str, list] = {}
    for variant in ("token branch alone", "both, no distillation", "both, plain distillation", SIMVG):
        for each in zip(*(rows(out, variant, seed, "val", "last") for seed in SEEDS), strict=True):
            values = [accuracy(row, "token") for row in each]
            shown.setdefault(variant, []).append((each[0]["step"], statistics.mean(values), statistics.stdev(values)))
    evaluate.draw_panels({"W_dt": weights, "accuracy of the token branch, %": shown}, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=f"{ROOT}/configs.json:shapes")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", type=Path, help="default: runs/ablation-NAME")
    parser.add_argument("--variant", choices=VARIANTS, help="only this one")
    parser.add_argument("--seed", type=int, help="and only this seed, in this process")
    args = parser.parse_args()
    args.out = args.out or Path(f"runs/ablation-{args.config.rpartition(':')[2]}")
    if args.seed is not None:
        return one(args)
    data.make_embedded_set(data.load_config(args.config)["data"])
    variants = [args.variant] if args.variant else list(VARIANTS)
    again = [sys.executable, __file__, "--config", args.config, "--epochs", str(args.epochs), "--out", str(args.out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(variant: str, seed: int) -> None:
        subprocess.run([*again, "--variant", variant, "--seed", str(seed)], check=True, env=environment)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, *zip(*((v, s) for s in SEEDS for v in variants), strict=True)))
    text = table(args.out, variants)
    (args.out / "table.md").write_text(text + "\n")
    print(text)
    if variants == list(VARIANTS):
        curves(args.out, args.out / "curves.png")


if __name__ == "__main__":
    data.run(main)
