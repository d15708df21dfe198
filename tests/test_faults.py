"""What must not cost any work: stops, kills, restarts, full disks, damaged files, numbers that are not finite."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
import weakref
from pathlib import Path

import pytest
import torch
from test_model import mutated
from test_train import EXACT, last, rows

import data
import evaluate
import model as models
import train
from conftest import ROOT, SMALL_RUN, TINY, command_line, environment, signals_kept, start, tiny_model

LONG = ["train.epochs=12", "train.batch_size=4", "train.save_minutes=0.005"]


def same_weights(shapes: Path, a: str, b: str) -> bool:
    a, b = last(shapes, a)["model"], last(shapes, b)["model"]
    return all(torch.equal(value, b[name]) for name, value in a.items())


# ---- ranks


def launch(shapes: Path, out: str, *options: str) -> subprocess.Popen:
    command = command_line("train.py", "--config", "configs.json:shapes", "--out", f"runs/{out}", ranks=2)
    command[3:3] = options
    command += ["--set", *SMALL_RUN, *LONG]
    env = {**environment(), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # else restarted ranks look for the dead ones
    return subprocess.Popen(command, cwd=shapes, env=env, stderr=subprocess.PIPE, text=True)


def children(agent: subprocess.Popen, shapes: Path, out: str) -> list[int]:
    """The process numbers of torchrun's ranks, or of a run's loader processes, once training is under way."""
    deadline = time.monotonic() + 60
    while not (shapes / "runs" / out / "last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    found = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    return [int(n) for n in found if b"train.py" in Path(f"/proc/{n}/cmdline").read_bytes()]


@pytest.fixture(scope="module")
def straight(shapes) -> str:
    """A run on two ranks that nothing happened to."""
    start(shapes, "straight2", *LONG, ranks=2)
    return "straight2"


def test_when_one_rank_is_killed_all_end_and_the_state_is_intact(shapes, straight):
    agent = launch(shapes, "onekilled")
    os.kill(children(agent, shapes, "onekilled")[1], signal.SIGKILL)
    errors = agent.communicate(timeout=60)[1]
    assert agent.returncode == 1
    assert "train.py: rank 0: another rank is gone" in errors and "[rank0]: Traceback" not in errors
    start(shapes, "onekilled", *LONG, "--resume", ranks=2)
    assert same_weights(shapes, "onekilled", straight)


def test_after_a_restart_by_torchrun_the_run_goes_on_by_itself(shapes, straight):
    agent = launch(shapes, "restarted", "--max-restarts", "1")
    os.kill(children(agent, shapes, "restarted")[0], signal.SIGKILL)
    errors = agent.communicate(timeout=120)[1]
    assert agent.returncode == 0, errors
    assert same_weights(shapes, "restarted", straight)


def test_when_a_loader_process_is_killed_amid_a_step_the_run_stops_before_the_next_one_and_loses_nothing(shapes):
    command = command_line("train.py", "--config", "configs.json:shapes", "--out", "runs/noloader")
    command += ["--set", *SMALL_RUN, "train.epochs=100", *LONG[1:], "data.workers=2"]
    process = subprocess.Popen(command, cwd=shapes, env=environment(), stderr=subprocess.PIPE, text=True)
    os.kill(children(process, shapes, "noloader")[0], signal.SIGKILL)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and "Traceback" not in errors, errors
    assert "train.py: a loader process was killed" in errors
    assert f"stopped after step {last(shapes, 'noloader')['step']};" in errors


def test_two_nodes_give_the_weights_of_two_ranks_on_one(shapes, straight):
    port = 20000 + os.getpid() % 20000
    agents = []
    for _ in range(2):
        command = command_line("train.py", "--config", "configs.json:shapes", "--out", "runs/nodes", ranks=1)
        where = ["--nnodes", "2", "--nproc_per_node", "1"]
        where += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}"]
        command[1:1] = ["-m", "torch.distributed.run", *where]
        command += ["--set", *SMALL_RUN, *LONG]
        agents.append(subprocess.Popen(command, cwd=shapes, env=environment(), stderr=subprocess.DEVNULL))
    assert [agent.wait(120) for agent in agents] == [0, 0]
    assert same_weights(shapes, "nodes", straight)


THREADS = """
import os, threading
import torch.distributed as dist
import train
def unknown_to_python():
    return {int(n) for n in os.listdir("/proc/self/task")} - {each.native_id for each in threading.enumerate()}
leave, before = dist.destroy_process_group, set()
dist.destroy_process_group = lambda: (before.update(unknown_to_python()), leave())
train.main()
assert before and not unknown_to_python(), (before, unknown_to_python())
"""


def test_no_thread_of_the_process_group_outlives_the_run(shapes, tmp_path):
    """Such a thread may abort its process while Python exits, and the run counts as failed although all was written."""
    (tmp_path / "threads.py").write_text(THREADS)
    line = [tmp_path / "threads.py", "--config", f"{ROOT}/configs.json:shapes", "--out", "runs/threads"]
    command = [*command_line(*line, ranks=2), "--set", *SMALL_RUN]
    env = {**environment(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=shapes, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_run_of_two_ranks_goes_on_with_one_and_with_the_same_data(shapes):
    exact = ["train.batch_size=4", "train.epochs=2", "model.dropout=0.0", "train.eps=1e-6", "train.save_minutes=0"]
    start(shapes, "exact", *exact)
    command = command_line("train.py", "--config", "configs.json:shapes", "--out", "runs/fewer", ranks=2)
    command += ["--set", *SMALL_RUN, *exact]
    agent = subprocess.Popen(command, cwd=shapes, env=environment(), stderr=subprocess.DEVNULL)
    for number in children(agent, shapes, "fewer"):
        os.kill(number, signal.SIGTERM)
    agent.wait(60)
    assert 0 < last(shapes, "fewer")["step"] < last(shapes, "exact")["step"]
    start(shapes, "fewer", *exact, "--resume")
    other = last(shapes, "fewer")["model"]
    for name, value in last(shapes, "exact")["model"].items():
        torch.testing.assert_close(other[name], value, atol=1e-5, rtol=0, msg=name)


# ---- files


def test_a_checkpoint_cut_at_100_lengths_or_with_a_flipped_byte_is_refused_in_one_line(trained, tmp_path):
    whole, rng = (trained / "last.pt").read_bytes(), random.Random(0)
    path = tmp_path / "last.pt"
    for _ in range(100):
        path.write_bytes(whole[: rng.randrange(len(whole))])
        with pytest.raises(models.CheckpointError) as error:
            models.read_checkpoint(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    wanted, refused = models.read_checkpoint(trained / "last.pt"), 0
    for _ in range(100):
        place = rng.randrange(len(whole))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
        try:
            state = models.read_checkpoint(path)
        except (data.InputError, models.CheckpointError) as error:
            refused += 1
            assert "\n" not in str(error) and "last.pt" in str(error)
        else:  # a byte between the entries
            assert all(torch.equal(value, state["model"][name]) for name, value in wanted["model"].items())
    assert refused > 80


def test_on_a_full_disk_the_older_checkpoint_stays_and_training_goes_on(shapes):
    start(shapes, "full", *EXACT, "train.batch_size=4")
    size = (shapes / "runs" / "full" / "last.pt").stat().st_size
    best = (shapes / "runs" / "full" / "best.pt").stat().st_size
    assert best < size  # so that a limit between the two refuses last.pt alone
    before = (shapes / "runs" / "full" / "last.pt").read_bytes()
    longer = [*EXACT, "train.batch_size=4", "train.epochs=2"]
    command = command_line("train.py", "--config", "configs.json:shapes", "--out", "runs/fullest")
    limit = (best + size) // 2
    done = subprocess.run(
        [*command, "--set", *SMALL_RUN, *longer],
        **{"cwd": shapes, "env": environment(), "capture_output": True, "text": True, "timeout": 300},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 0 and done.stderr.count("last.pt: cannot be written (an older file stays as it was)") == 2
    assert not (shapes / "runs" / "fullest" / "last.pt").exists() and not list(
        (shapes / "runs" / "fullest").glob("*.part")
    )
    assert (shapes / "runs" / "full" / "last.pt").read_bytes() == before


# ---- numbers that are not finite


class Planted:
    """The batches of a run, one of which gets a number that is not finite."""

    def __init__(self, real, where: str, step: int = 3):
        self.real, self.where, self.step = real, where, step

    def __call__(self, *arguments, **options):
        for i, batch in enumerate(self.real(*arguments, **options)):
            if i == self.step and self.where == "box":
                batch.boxes[1, 0, 2] = torch.inf
            if i == self.step and self.where == "image":
                batch = batch._replace(images=(batch.images / 255).index_fill(0, torch.tensor([1]), torch.nan))
            yield batch


@pytest.mark.parametrize("config", ["shapes", "shapes-grec"])
@pytest.mark.parametrize("where", ["image", "box"])
def test_a_step_that_is_not_finite_is_skipped_with_its_rows_named(where, config, shapes, monkeypatch, capfd):
    monkeypatch.setattr(data, "batches", Planted(data.batches, where))
    out = f"nan-{where}-{config}"
    start(shapes, out, "train.epochs=1", "train.batch_size=4", "train.ema=true", config=config)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "skipped" in line]
    numbers = list(
        data.MicroBatchSampler(
            train_rows(shapes, config), {"batch_size": 4, "seed": 6666, "epochs": 1}, 4, (0, 0), 0, 1
        )
    )
    assert line.startswith("step 4 skipped, rank 0: ") and "nan" in line
    rows_of_step = [f"data/{config}/train.jsonl:{row + 1}" for _, row in numbers[3]]
    assert line.endswith(f"; rows {', '.join(rows_of_step)}")
    state = last(shapes, out)
    assert all(value.isfinite().all() for part in ("model", "ema") for value in state[part].values())
    assert state["skipped"] == 1 and all(r["total"] == r["total"] for r in rows(shapes, out) if "total" in r)


def train_rows(shapes: Path, config: str) -> int:
    return len((shapes / "data" / config / "train.jsonl").read_text().splitlines())


def test_a_weight_that_is_not_finite_ends_the_run_and_leaves_the_last_checkpoint_alone(shapes, tmp_path):
    broken = tiny_model()
    torch.nn.init.constant_(broken.encoder.text_embed.weight, torch.nan)
    models.save(tmp_path / "nan.pt", {"model": broken.state_dict(), "ema": {}, "config": {"model": {}}})
    with pytest.raises(data.InputError, match="20 steps in a row were not finite"):
        settings = ("train.epochs=3", "train.batch_size=4", "train.save_minutes=10")
        start(shapes, "nan-weight", "--init", str(tmp_path / "nan.pt"), *settings)
    assert not (shapes / "runs" / "nan-weight" / "last.pt").exists()


def test_when_memory_runs_out_the_settings_that_help_are_named(shapes, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(train, "train_step", full)
    with pytest.raises(data.InputError, match="with 16 examples at a time: lower train.micro_batch"):
        start(shapes, "memory")


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_image_that_is_damaged_behind_its_header_stops_all_ranks_with_the_state_saved(ranks, shapes, tmp_path):
    images = shapes / "data" / "shapes" / "images"
    row = json.loads((shapes / "data" / "shapes" / "train.jsonl").read_text().splitlines()[40])
    whole = (images / row["image"]).read_bytes()
    (images / row["image"]).write_bytes(whole[:-200])
    try:
        done = start(shapes, f"damaged{ranks}", "train.epochs=1", "train.batch_size=4", ranks=ranks, status=3 - ranks)
    finally:
        (images / row["image"]).write_bytes(whole)
    assert (
        "cannot read the image" in done.stderr
        and row["image"] in done.stderr
        and (ranks > 1 or "Traceback" not in done.stderr)
    )
    assert 0 < last(shapes, f"damaged{ranks}")["step"] == int(done.stderr.split("stopped after step ")[1].split(";")[0])
    again = ["train.epochs=1", "train.batch_size=4", "--resume"]
    start(shapes, f"damaged{ranks}", *again, ranks=ranks)
    start(shapes, f"undamaged{ranks}", *again, ranks=ranks)
    other = last(shapes, f"damaged{ranks}")["model"]
    for name, value in last(shapes, f"undamaged{ranks}")["model"].items():
        assert torch.equal(other[name], value), name


# ---- what only a GPU meets


@pytest.mark.parametrize("words", ["Pin memory thread exited unexpectedly", "DataLoader worker (pid 7) is killed"])
def test_a_loader_process_that_was_killed_is_one_line_where_memory_is_pinned_too(words, monkeypatch):
    def killed(*_, **__) -> None:
        raise RuntimeError(words)

    monkeypatch.setattr(data.DataLoader, "__iter__", killed)
    with pytest.raises(data.InputError, match="a loader process was killed"):
        next(data.batches(data.Dataset([], 32), None, [], workers=1, pin=True))


@pytest.mark.parametrize("error", [torch.distributed.DistBackendError("NCCL error"), RuntimeError("reset by peer")])
def test_a_lost_peer_is_one_line_with_either_backend(error, monkeypatch, capsys):
    def main() -> None:
        raise error

    with signals_kept(), pytest.raises(SystemExit) as ended:
        data.run(main)
    assert ended.value.code == 1 and "another rank is gone" in capsys.readouterr().err


def test_more_ranks_than_gpus_are_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(data.InputError, match="2 GPU"):
        evaluate.join_ranks()


def test_a_resumed_run_does_not_keep_the_state_that_it_read(shapes, monkeypatch):
    start(shapes, "lean", "train.epochs=1")
    alive = []

    def read(path: Path) -> dict:
        state = usual(path)
        alive.append(weakref.ref(next(iter(state["model"].values()))))
        return state

    usual = models.read_checkpoint
    monkeypatch.setattr(models, "read_checkpoint", read)
    monkeypatch.setattr(train, "report_best", lambda *_: alive.append(alive[0]()))
    start(shapes, "lean", "--resume", "train.epochs=1")
    assert alive[-1] is None


# ---- one folder, one run


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "last.pt", "best.pt"])
def test_a_folder_that_holds_any_file_of_a_run_is_a_run_and_nothing_in_it_is_replaced(name, shapes, trained):
    out = shapes / "runs" / f"only-{name}"
    out.mkdir()
    shutil.copy(trained / name, out / name)
    before = (out / name).read_bytes()
    with pytest.raises(data.InputError, match=f"holds a run already .{name}."):
        start(shapes, out.name)
    with pytest.raises(data.InputError, match="holds a run already"):
        start(shapes, out.name, "--init", str(trained / "best.pt"))
    assert [path.name for path in out.iterdir()] == [name] and (out / name).read_bytes() == before


def test_where_last_pt_is_gone_a_resumed_run_does_not_replace_best_pt(shapes, trained):
    out = shapes / "runs" / "nolast"
    shutil.copytree(trained, out)
    (out / "last.pt").unlink()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(data.InputError, match="holds best.pt but no last.pt"):
        start(shapes, "nolast", "--resume")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_run_whose_config_json_is_gone_goes_on(shapes, trained):
    shutil.copytree(trained, shapes / "runs" / "noconfig")
    (shapes / "runs" / "noconfig" / "config.json").unlink()
    start(shapes, "noconfig", "--resume")
    assert (shapes / "runs" / "noconfig" / "config.json").read_bytes() == (trained / "config.json").read_bytes()


def test_a_second_run_in_one_folder_is_refused_and_a_killed_one_leaves_it_free_at_once(shapes):
    line = ["train.py", "--config", "configs.json:shapes", "--out", "runs/twice", "--resume", "--set", *SMALL_RUN]
    command = command_line(*line, "train.epochs=1000", *LONG[1:], "data.workers=2")
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    first = subprocess.Popen(command, cwd=shapes, env=environment(), **streams)
    children(first, shapes, "twice")  # so that it is under way
    second = subprocess.Popen(command, cwd=shapes, env=environment(), **streams)
    errors = second.communicate(timeout=120)[1]
    assert first.poll() is None and second.returncode == 2
    assert errors == "train.py: runs/twice: another process is training in this folder\n"
    first.kill()
    first.wait(60)
    third = subprocess.Popen(command, cwd=shapes, env=environment(), **streams)
    before = last(shapes, "twice")["step"]
    deadline = time.monotonic() + 60
    while last(shapes, "twice")["step"] == before and third.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    third.terminate()
    assert "--resume goes on" in third.communicate(timeout=60)[1]


def test_cut_and_joined_lines_of_metrics_are_left_out_and_the_run_goes_on(shapes):
    short = ["train.batch_size=4", "train.epochs=1"]
    start(shapes, "cut", *short)
    path = shapes / "runs" / "cut" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    assert len(lines) > 2
    path.write_text(lines[0] + "\n" + lines[1][:30] + lines[1] + "\n\0\0\n" + lines[2][:20])
    start(shapes, "cut", *short, "--resume")
    assert rows(shapes, "cut")[0] == json.loads(lines[0])  # every line is whole
    assert [row["split"] for row in rows(shapes, "cut")][-2:] == ["val", "test"]


def test_a_line_that_a_full_disk_cuts_is_taken_back(shapes):
    command = command_line("train.py", "--config", "configs.json:shapes", "--out", "runs/fulllog")
    limit = 2300  # bytes: config.json and some lines of metrics.jsonl
    done = subprocess.run(
        [*command, "--set", *SMALL_RUN, "train.batch_size=2", "train.epochs=4"],
        **{"cwd": shapes, "env": environment(), "capture_output": True, "text": True, "timeout": 300},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert "metrics.jsonl: File too large" in done.stderr
    assert len(rows(shapes, "fulllog")) > 1  # each of them whole


def test_training_rows_and_evaluations_count_epochs_alike_from_1(shapes):
    start(shapes, "epochs", "train.batch_size=4", "train.epochs=2")
    found = rows(shapes, "epochs")
    assert {row["epoch"] for row in found if row["split"] == "train"} == {1, 2}
    assert [row["epoch"] for row in found if row.get("weights") == "last"] == [1, 2]


# ---- checkpoints, rows and ranks that do not belong together


def test_a_best_pt_under_the_name_of_last_pt_is_one_line(shapes, trained):
    shutil.copytree(trained, shapes / "runs" / "nolonger")
    shutil.copy(trained / "best.pt", shapes / "runs" / "nolonger" / "last.pt")
    with pytest.raises(
        models.CheckpointError, match=r"last.pt: is not a checkpoint, or not a whole one: .*'optimizer'"
    ):
        start(shapes, "nolonger", "--resume")


def test_a_last_pt_of_a_wrong_inside_is_one_line_whatever_is_wrong(shapes, trained, tmp_path):
    whole, rng, refused = models.read_checkpoint(trained / "last.pt"), random.Random(1), 0
    for _ in range(100):
        models.save(tmp_path / "last.pt", mutated(whole, rng))
        config = data.load_config(f"{ROOT}/configs.json:shapes", SMALL_RUN)
        state = train.build(config, tmp_path, 0, 1, torch.device("cpu"))
        state.digests["rows"] = whole["rows"]
        try:
            train.restore(state, train.read_saved(tmp_path, config, True))
            for p in state.model.parameters():
                p.grad = torch.zeros_like(p)
            state.optimizer.step()
        except (data.InputError, models.CheckpointError) as error:
            refused += 1
            assert str(tmp_path) in str(error) or "other rows" in str(error)
    assert refused > 50


def own_rows(shapes: Path, folder: Path, first: int, count: int) -> list[str]:
    """Rows of the shapes set as one's own in a folder, and the settings for them."""
    folder.mkdir(exist_ok=True)
    lines = (shapes / "data/shapes/train.jsonl").read_text().splitlines()
    for split in ("train", "val"):
        (folder / f"mine-{split}.jsonl").write_text("\n".join(lines[first : first + count]))
    data_folder = f"{shapes}/data/shapes"
    return [
        *("data.annotations=mine-{split}.jsonl", 'data.eval_splits=["val"]', "train.epochs=1"),
        *(f"data.images={data_folder}/images", f"data.tokenizer={data_folder}/shapes.spm"),
    ]


def test_a_run_goes_on_with_moved_files_but_not_with_other_rows(shapes):
    settings = own_rows(shapes, shapes, 0, 32)
    start(shapes, "minerows", *settings)
    (shapes / "elsewhere").symlink_to(shapes / "data" / "shapes")  # as after a move of the pictures and the tokenizer
    moved = ["data.images=elsewhere/images", "data.tokenizer=elsewhere/shapes.spm"]
    start(shapes, "minerows", *settings, *moved, "--resume")
    own_rows(shapes, shapes, 1, 32)
    with pytest.raises(data.InputError, match="runs/minerows: was started with other rows than"):
        start(shapes, "minerows", *settings, "--resume")


@pytest.mark.parametrize("count", [32, 60])
def test_ranks_that_read_other_rows_end_at_once_with_a_line_each(count, shapes, tmp_path):
    ranks, port = [], 20000 + (os.getpid() + count) % 20000
    for rank in range(2):
        settings = own_rows(shapes, tmp_path / str(rank), rank, count if rank else 32)
        variables = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = command_line("train.py", "--config", f"{ROOT}/configs.json:shapes", "--out", f"{tmp_path}/run")
        command += ["--set", *SMALL_RUN, *settings]
        where = {"cwd": tmp_path / str(rank), "env": {**environment(), **variables, "LOCAL_RANK": str(rank)}}
        ranks.append(subprocess.Popen(command, **where, stderr=subprocess.PIPE, text=True))
    try:
        for process in ranks:
            errors = process.communicate(timeout=60)[1]
            assert process.returncode == 2 and "the ranks differ in their rows" in errors, errors
            assert "Traceback" not in errors
    finally:
        for process in ranks:
            process.kill()
    assert not (tmp_path / "run").exists()


def test_weights_of_another_tokenizer_are_neither_a_start_nor_gone_on_with(shapes, trained):
    other = shapes / "data" / "other.spm"
    shutil.copy(shapes / "data/shapes-grec/shapes.spm", other)
    with pytest.raises(data.InputError, match="other.spm: is not the tokenizer that this model was trained with"):
        start(shapes, "othertokens", "--init", str(trained / "best.pt"), f"data.tokenizer={other}")
    assert not (shapes / "runs" / "othertokens").exists()
    start(shapes, "othertokens", f"data.tokenizer={other}", "train.epochs=1")
    shutil.copy(shapes / "data/shapes/shapes.spm", other)
    with pytest.raises(data.InputError, match="is not the tokenizer"):
        start(shapes, "othertokens", f"data.tokenizer={other}", "train.epochs=1", "--resume")


def test_a_run_from_weights_made_for_the_released_arithmetic_computes_so_to_its_end(shapes, tmp_path, capsys):
    config = {"model": {**TINY, "as_released": True}, "data": {}, "train": {}}
    released = {"model": tiny_model(as_released=True).state_dict(), "ema": {}, "config": config}
    models.save(tmp_path / "released.pt", released)
    again = ["--init", str(tmp_path / "released.pt"), "train.epochs=1"]
    start(shapes, "released", *again)
    assert "tensors taken; model.as_released=true" in capsys.readouterr().out
    assert models.load(shapes / "runs" / "released" / "best.pt").tqg.as_released
    assert json.loads((shapes / "runs" / "released" / "config.json").read_text())["model"]["as_released"]
    start(shapes, "released", *again, "--resume")
    assert last(shapes, "released")["config"]["model"]["as_released"]


def test_a_checkpoint_from_before_it_told_its_rows_and_tokenizer_goes_on(shapes, trained):
    shutil.copytree(trained, shapes / "runs" / "old")
    state = last(shapes, "old")
    models.save(shapes / "runs" / "old" / "last.pt", {k: v for k, v in state.items() if k not in ("tokenizer", "rows")})
    start(shapes, "old", "--resume")
    assert same_weights(shapes, "old", "trained") and last(shapes, "old").keys() >= {"model", "optimizer"}
