"""What each part of SimVG is worth: runs without it, with right and with wrong boxes.

    python tests/ablation.py --noise 0 0.3                       # after python tests/toys.py
    python tests/ablation.py --config configs.json:toys-grec --variants DWBD fixed-weight-of-half

A run is a recipe with other factors of the loss, or with a piece of the code replaced. All have the
same number of steps: two stages share the epochs, the second without warm-up, so that the rates
of the recipe should fall linearly (train.decay_epochs=null). --noise gives a share of the training
rows a wrong box, in other rows for each seed; the rows that are evaluated stay right.

runs/ablation-NAME/ gets the runs, table.md (means and standard deviations over the seeds, percent)
and seeds.md. Both give the accuracies of the best weights on the last of data.eval_splits, and how
much the accuracy on the first rose in the last epoch ("rise"). The runs share the cores, a thread
each. Started again, it goes on with what has not ended; other settings or code need another --out.

The weights of DWBD-without-TQG answer rightly in this script alone, which replaces that piece. In
evaluate.py the text-guided queries, which were never trained, would act again.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from functools import cache, partial
from itertools import pairwise, product
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import losses
import model as models
import train

END = "samples.png"  # train.py writes it last
NO_TEACHER = "train.loss_token_on_teacher=null"
NO_TOKEN = ["train.loss_token_on_truth=null", NO_TEACHER]
VARIANTS = {  # name -> settings
    "decoder-alone": NO_TOKEN,
    "token-alone": ["train.loss_decoder=null", NO_TEACHER],
    "no-distillation": [NO_TEACHER],
    "fixed-weight-of-half": [],
    "DWBD": [],  # as released: the factors are 1 on the teacher, 2 on the truth
    "DWBD-of-Eq-7": ["train.loss_token_on_teacher=2", "train.loss_token_on_truth=1"],
    "DWBD-in-two-stages": [],
    "DWBD-without-TQG": [],
}


def one_half(logits: Tensor, *_: Tensor) -> Tensor:
    """In place of `losses.teacher_weight`: the teacher is trusted by half, however good it is."""
    return logits.new_tensor(0.5)


def without_text(tqg: models.TextGuidedQuery, text: Tensor, text_pad: Tensor) -> Tensor:
    """In place of text-guided queries: the learnt ones. The words act in the encoder alone."""
    return tqg.query_embed.weight.expand(len(text), -1, -1)  # (B, Q, C)


PIECES = {  # name -> what is replaced
    "fixed-weight-of-half": patch.object(losses, "teacher_weight", one_half),
    "DWBD-without-TQG": patch.object(models.TextGuidedQuery, "forward", without_text),
}


def write_noisy(pattern: str, splits: Sequence[str], folder: Path, share: float, seed: int) -> None:
    """Copy files of our own rows; about this share of those to train on gets a wrong box.

    It is that of another row of the image or, without one, the first of the row moved and scaled.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split in splits:
        shutil.copy(pattern.replace("{split}", split), folder / f"{split}.jsonl")
    lines = Path(pattern.replace("{split}", "train")).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    of_image: dict[str, set[data.Box]] = {}
    for row in rows:
        of_image.setdefault(row["image"], set()).update(map(tuple, row["boxes"]))
    for index, row in enumerate(rows):
        rng = random.Random(f"noise/{seed}/{index}")
        if row["boxes"] and rng.random() < share:
            scale = rng.uniform(0.6, 1.4)
            width = min(row["width"], row["boxes"][0][2] * scale)
            height = min(row["height"], row["boxes"][0][3] * scale)
            x = rng.uniform(0, row["width"] - width)
            y = rng.uniform(0, row["height"] - height)
            others = of_image[row["image"]].difference(map(tuple, row["boxes"]))
            row["boxes"] = [rng.choice(sorted(others) or [(x, y, width, height)])]
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "train.jsonl").write_text("".join(lines))


def in_own_process(args: argparse.Namespace, *job) -> None:
    process = get_context("spawn").Process(target=data.run, args=[partial(run, args, *job)])
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(process.exitcode)


def run(args: argparse.Namespace, seed: int, noise: float, variant: str) -> None:
    """One run, or the two of two stages."""
    _, config, recipe = train.read_config(args.config, args.set)
    out = args.out / f"noise-{noise:g}" / f"{variant}-{seed}"
    settings = [f"train.seed={seed}", *VARIANTS[variant]]
    if noise:
        write_noisy(config.annotations, config.eval_splits, out / "rows", noise, seed)
        settings.append(f"data.annotations={out}/rows/{{split}}.jsonl")
    init = []
    if variant == "DWBD-in-two-stages":
        first = recipe.epochs - recipe.epochs // 2
        start(args, out / "stage1", [*settings, *NO_TOKEN, f"train.epochs={first}"])
        settings += [f"train.epochs={recipe.epochs // 2}", "train.warmup_epochs=0"]
        init = ["--init", f"{out}/stage1/best.pt"]
    with PIECES.get(variant, nullcontext()):
        start(args, out, settings, *init)


def start(args: argparse.Namespace, out: Path, settings: Sequence[str], *options: str) -> None:
    """The program train.py in this process, so that a replaced piece stays replaced."""
    if (out / END).exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    sys.argv = ["train.py", "--config", args.config, "--out", str(out), "--resume", *options]
    sys.argv += ["--set", *args.set, *settings]
    # keeping the decoded pictures in memory saves a quarter of the time
    in_memory = patch.object(data, "read_image", cache(data.read_image))
    with open(out / "log.txt", "a") as log, redirect_stdout(log), redirect_stderr(log), in_memory:
        train.main()


def figures(out: Path) -> dict[str, float]:
    """Columns of the table in percent: the accuracies, and their rise in the last epoch."""
    if not (out / END).exists():
        return {}
    lines = (out / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    evaluated = [row for row in rows if row.get("weights") == "last"]
    found = {}
    for name, value in rows[-1].items():
        if name.endswith(("_acc", "_f1", "_nacc")):
            found[name] = 100 * value
            for before, last in pairwise(evaluated[-2:]):  # one pair or none
                found[f"{name} rise"] = 100 * (last[name] - before[name])
    return found


def table(args: argparse.Namespace, seeds: Sequence[int]) -> str:
    """Means and standard deviations over these seeds, in Markdown."""
    of_seeds = {}
    columns = set()
    for noise, variant in product(args.noise, args.variants):
        folder = args.out / f"noise-{noise:g}"
        found = [figures(folder / f"{variant}-{seed}") for seed in seeds]
        of_seeds[f"| {100 * noise:g} % | {variant} |"] = found
        columns = columns.union(*found)
    lines = [f"| wrong boxes | variant | {' | '.join(sorted(columns))} |"]
    lines.append("|---" * (2 + len(columns)) + "|")
    for line, found in of_seeds.items():
        for column in sorted(columns):
            values = [each[column] for each in found if column in each]
            if values:
                line += f" {statistics.mean(values):.1f}"
            if len(values) > 1:
                line += f" ± {statistics.stdev(values):.1f}"
            line += " |"
        lines.append(line)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Train variants of SimVG and compare them.")
    add = parser.add_argument
    add("--config", default="configs.json:toys", metavar="FILE:NAME")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="for every run")
    add("--noise", type=float, nargs="+", default=[0], help="shares of wrong boxes (default: 0)")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="(default: all)")
    add("--seeds", type=int, nargs="+", default=[6666, 1, 2], help="(default: 6666 1 2)")
    add("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: one a core)")
    add("--out", type=Path, help="the folder of the runs (default: runs/ablation-NAME)")
    args = parser.parse_args()
    args.out = args.out or Path(f"runs/ablation-{args.config.rpartition(':')[2]}")
    _, _, recipe = train.read_config(args.config, args.set)
    if "DWBD-in-two-stages" in args.variants and recipe.epochs < 2:
        parser.error("DWBD-in-two-stages needs at least two epochs")
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes of the runs
    jobs = list(product(args.seeds, args.noise, args.variants))
    with ThreadPoolExecutor(args.jobs) as pool:
        done = pool.map(partial(in_own_process, args), *zip(*jobs, strict=True))
        for _ in tqdm(done, "runs", len(jobs)):
            (args.out / "table.md").write_text(table(args, args.seeds))
    each = [f"seed {seed}\n\n{table(args, [seed])}" for seed in args.seeds]
    (args.out / "seeds.md").write_text("\n".join(each))
    print(table(args, args.seeds))


if __name__ == "__main__":
    data.run(main)
