"""What the tests share: tiny models, golden files of the official code, ways to run programs."""

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

# Runs in this process are compared with those of programs, to the bit; so no GPU is seen here
# before torch is imported. Tests marked `gpu` start programs with what was visible before.
GPUS = {name: value for name, value in os.environ.items() if name == "CUDA_VISIBLE_DEVICES"}
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch

import data
import evaluate
import model as models
import toys as toys_set
import train

torch.set_num_threads(1)  # as in the processes that the tests start: the same sums to the last bit
ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
CONFIGS = f"{ROOT}/configs.json"
PROGRAMS = {"train.py": train, "evaluate.py": evaluate, "data.py": data}
TINY = {
    "image_size": 32,
    "patch_size": 8,
    "vocab_size": 162,
    "encoder_width": 32,
    "encoder_layers": 2,
    "encoder_heads": 2,
    "encoder_ffn": 64,
    "drop_path": 0.0,
    "head_width": 32,
    "tqg_layers": 1,
    "tqg_ffn": 32,
    "decoder_layers": 2,
    "decoder_ffn": 32,
    "dropout": 0.0,
}
SMALL_RUN = [f"model.{key}={json.dumps(value)}" for key, value in TINY.items()]
SMALL_RUN += ["train.epochs=2", "train.batch_size=16"]


def tiny_model(**changes) -> models.SimVG:
    torch.manual_seed(0)
    return models.SimVG(models.ModelConfig(**TINY | changes)).eval()


def tiny_inputs(
    batch: int = 3, words: int = 6, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, tokens and padding masks; the texts have 3, 4, 5, ... tokens of `words`."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (batch, 3, 32, 32), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(3, 162, (batch, words), generator=generator)
    pad = torch.arange(words) >= torch.arange(3, 3 + batch)[:, None]
    return images, tokens.masked_fill(pad, 1), pad


class Done(NamedTuple):
    """What a program left: its exit status and what it wrote to stdout and stderr."""

    status: int
    out: str
    err: str


def call(program: str, *arguments: str, cwd: Path) -> Done:
    """Run a program in this process, as a command line in the folder `cwd` would."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.chdir(cwd)
            patch.setattr("sys.argv", [program, *map(str, arguments)])
            try:
                data.run(PROGRAMS[program].main)
            except SystemExit as ended:
                status = ended.code or 0
    finally:
        for number, handler in kept.items():  # train.py takes SIGTERM and Ctrl-C for itself
            signal.signal(number, handler)
    return Done(status, out.getvalue(), err.getvalue())


def start(
    folder: Path, out: str, *more: str, config: str = "toys", status: int = 0, ranks: int = 1
) -> Done:
    """Run train.py with tiny sizes; `more` are settings (with a "=") and options."""
    settings = [*SMALL_RUN, *(each for each in more if "=" in each)]
    options = [each for each in more if "=" not in each]
    recipe = ["--config", f"{CONFIGS}:{config}", "--out", f"{folder}/runs/{out}"]
    line = [*recipe, *options, "--set", *settings]
    if ranks > 1:
        done = program("train.py", *line, cwd=folder, ranks=ranks)
    else:
        done = call("train.py", *line, cwd=folder)
    assert done.status == status, done.out + done.err
    return done


def command_line(script: str, *arguments: str, ranks: int = 1) -> list[str]:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return [*launcher, str(ROOT / script), *map(str, arguments)]


def environment() -> dict[str, str]:
    """One thread a process, and no GPU."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def program(script: str, *arguments: str, cwd: Path, ranks: int = 1) -> Done:
    """Run a program in processes of its own, as a user would. (Slow: each imports torch.)"""
    command = command_line(script, *arguments, ranks=ranks)
    done = subprocess.run(
        command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300
    )
    return Done(done.returncode, done.stdout, done.stderr)


def last(folder: Path, out: str, name: str = "last.pt") -> dict:
    """The content of a run's checkpoint."""
    return models.read(folder / "runs" / out / name).state


def metrics(folder: Path, out: str) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    lines = (folder / "runs" / out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/toys and data/toys-grec of 60 scenes, to start programs in."""
    folder = tmp_path_factory.mktemp("toys")
    for name in ("toys", "toys-grec"):
        toys_set.make(folder / "data" / name, name, 60)
    (folder / "configs.json").symlink_to(ROOT / "configs.json")
    return folder


@pytest.fixture(scope="session")
def trained(toys: Path) -> Path:
    """The folder of a small finished run on toys."""
    start(toys, "trained")
    return toys / "runs" / "trained"


def pytest_sessionfinish() -> None:
    """Loader processes ignore signals, so those of a failed test would be waited for at exit."""
    for process in multiprocessing.active_children():
        process.kill()


def golden(name: str) -> dict:
    """A golden file: outputs of the official code at commit 29df6a4 on random weights."""
    if name.endswith(".json"):
        return json.loads((GOLDEN / name).read_text())
    with np.load(GOLDEN / name) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def official_state(grec: bool = False) -> dict[str, torch.Tensor]:
    """The tiny official model's weights."""
    weights = golden("weights.npz")
    query = weights.pop("__grec__/head.query_embed.weight")
    return {**weights, "head.query_embed.weight": query} if grec else weights


def official_model(folder: Path, grec: bool = False, **changes) -> models.SimVG:
    torch.save({"state_dict": official_state(grec)}, folder / "official.pth")
    return models.load(folder / "official.pth", encoder_heads=4, **changes)
