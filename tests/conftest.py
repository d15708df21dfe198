import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

# The tests compare runs in this process with those of programs, to the bit; so no GPU is seen here before torch is
# imported. Tests marked `gpu` start programs with what was visible before.
GPUS = {name: value for name, value in os.environ.items() if name == "CUDA_VISIBLE_DEVICES"}
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch

import data
import model as models
import train

torch.set_num_threads(1)  # as in the processes that the tests start: the same sums to the last bit
ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
TINY = dict(
    image_size=32,
    patch_size=8,
    vocab_size=162,
    encoder_width=32,
    encoder_layers=2,
    encoder_heads=2,
    encoder_ffn=64,
    drop_path=0.0,
    head_width=32,
    queries=1,
    tqg_layers=1,
    tqg_ffn=32,
    decoder_layers=2,
    decoder_ffn=32,
    dropout=0.0,
    as_released=False,
)
SMALL_RUN = [
    *(f"model.{key}={json.dumps(value)}" for key, value in TINY.items() if key != "queries"),
    *("data.scenes=60", "train.epochs=2", "train.batch_size=16"),
]


def tiny_model(**changes) -> models.SimVG:
    torch.manual_seed(0)
    return models.SimVG(**{**TINY, **changes}).eval()


def tiny_inputs(batch: int = 3, words: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, tokens and padding masks; the texts have 3, 4, 5, ... tokens of `words`."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (batch, 3, 32, 32), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(3, 162, (batch, words), generator=generator)
    pad = torch.arange(words) >= torch.arange(3, 3 + batch)[:, None]
    return images, tokens.masked_fill(pad, 1), pad


def program(*arguments: str, cwd: Path, ranks: int = 1, status: int | None = 0) -> subprocess.CompletedProcess:
    """Run one of the programs as a user would, on one thread a process."""
    command = command_line(*arguments, ranks=ranks)
    done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300)
    assert status is None or done.returncode == status, done.stdout + done.stderr
    return done


def start(shapes: Path, out: str, *more: str, config: str = "shapes", ranks: int = 1, status: int = 0):
    """Run train.py with small sizes, `more` being flags and settings; in this process where that says enough."""
    settings = [*SMALL_RUN, *(m for m in more if "=" in m)]
    flags = [m for m in more if "=" not in m]
    out = out if out.startswith("/") else f"runs/{out}"
    line = ["train.py", "--config", f"{ROOT}/configs.json:{config}", "--out", out, *flags, "--set", *settings]
    if ranks > 1 or status:
        return program(*line, cwd=shapes, ranks=ranks, status=status)
    with pytest.MonkeyPatch.context() as patch, signals_kept():
        patch.chdir(shapes)
        patch.setattr("sys.argv", line)
        try:
            train.main()
        except SystemExit as ended:
            assert ended.code == 0


@contextmanager
def signals_kept():
    """train.py in this process takes SIGTERM and Ctrl-C for itself; afterwards they are pytest's again."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def command_line(*arguments: str, ranks: int = 1) -> list[str]:
    script, *rest = arguments
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return [*launcher, str(ROOT / script), *rest]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds data/shapes and data/shapes-grec with 60 scenes, where the programs can be started."""
    folder = tmp_path_factory.mktemp("shapes")
    (folder / "data").mkdir()
    data.make_shapes(folder / "data" / "shapes", 60, "shapes", show=False)
    data.make_shapes(folder / "data" / "shapes-grec", 60, "shapes-grec", show=False)
    (folder / "configs.json").symlink_to(ROOT / "configs.json")
    return folder


@pytest.fixture(scope="session")
def trained(shapes: Path) -> Path:
    """A small finished run on shapes."""
    program("train.py", "--config", "configs.json:shapes", "--set", *SMALL_RUN, "--out", "runs/trained", cwd=shapes)
    return shapes / "runs" / "trained"


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
