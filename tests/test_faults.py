"""Bad input is one line and costs nothing; a run survives a broken picture, Ctrl-C and kill -9."""

import json
import os
import shutil
import signal
import subprocess
import time
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import torch

import data
from conftest import SMALL_RUN, call, command_line, environment, last, start

ROW = {"image": "train_00000.jpg", "expressions": ["the cross"], "boxes": [[1, 1, 30, 30]]}
CASES = """
--config configs.json:toyss | there is no recipe 'toyss'; did you mean 'toys'?
--config nowhere.json:toys | nowhere.json: No such file or directory
--config toys | --config toys: expected FILE:NAME
--config cut.pt:toys | cut.pt: 'utf-8' codec can't decode
--set train.epochs=0 | train.epochs must be at least 1
--set train.micro_batch=0 | train.micro_batch must be at least 1
--set train.epoch=1 | unknown key train.epoch; did you mean 'epochs'?
--set train.epochs=many | train.epochs must be int (JSON, >= 0), not 'many'
--set train.evaluate_every=0 | train.evaluate_every must be at least 1
--set train.freeze_encoder=true | name its weights in train.init
--set data.annotations=no-{split}.jsonl | no-train.jsonl: there is no such file (data.annotations)
--set data.annotations=data/toys/toys.spm | data/toys/toys.spm: 'utf-8' codec can't decode
row {"boxes": null} | bad-train.jsonl:2: expected "image", "expressions" and a list "boxes"
row {"boxes": [[90, 90, 20, 20]]} | bad-train.jsonl:2: box (90, 90, 20, 20), expected
row {"expressions": ["?!"]} | bad-train.jsonl:2: an expression must be a text
row {"image": "nowhere.jpg"} | bad-train.jsonl:2: cannot read the image
row {"image": "../toys.spm"} | bad-train.jsonl:2: cannot read the image
row {"width": 40, "height": 48} | it has (48, 48) pixels, the row says (40, 48)
--set data.tokenizer=nowhere.spm | nowhere.spm: there is no sentencepiece model (data.tokenizer)
--set data.tokenizer=GREC/toys.spm --init runs/kept/best.pt | is not the tokenizer
--init nowhere.pt | nowhere.pt: there is no such file: start at random: --set train.init=
--set train.init=runs/x/best.pt | train the recipe x first, or start at random: --set train.init=
--init other.pt | other.pt: it holds neither SimVG nor BEiT-3 weights
--init cut.pt | cut.pt: is cut, damaged or no checkpoint
--init files.zip | files.zip: is a zip of other files (a.txt); unpack it
--init flipped.pt | flipped.pt: is damaged: the checksum of
--init evil.pt | evil.pt: is cut, damaged or no checkpoint of tensors
--init lacking.pt | lacking.pt: RuntimeError: Error(s) in loading state_dict
--init shaped.pt | shaped.pt: RuntimeError: Error(s) in loading state_dict
--out runs/nan --init nan.pt --set train.batch_size=4 | 20 steps in a row were not finite
--out nan.pt/run | --out nan.pt/run: Not a directory
--out runs/kept --init runs/kept/best.pt | runs/kept: holds a run already
--out runs/kept --resume --set train.lr=0.5 | train.lr=0.0005; start another run: --init
--out runs/kept --resume --set data.annotations=GREC/{split}.jsonl data.images=GREC/images | (rows)
--out runs/kept --resume --set data.tokenizer=GREC/toys.spm | other data (tokenizer)
--out runs/headless --resume | runs/headless/last.pt: No such file or directory
--out runs/other --resume | runs/other/last.pt
--set train.batch_size=16 | train.batch_size=16 (of all ranks) is no multiple of 3 ranks
--out runs/memory --set train.micro_batch=4 | out of memory with 4 examples at a time: lower train.
"""


@pytest.fixture(scope="module")
def folder(toys: Path, trained: Path) -> Path:
    """The folder of `toys` with damaged checkpoints and earlier runs."""
    whole = bytearray((trained / "best.pt").read_bytes())
    (toys / "cut.pt").write_bytes(whole[:-9])
    whole[len(whole) // 2] ^= 1
    (toys / "flipped.pt").write_bytes(whole)
    state, name = last(toys, "trained", "best.pt"), "token_branch.mlp.weight"
    value = state["model"].pop(name)
    wrong = {"shaped": {name: value[:3]}, "nan": {name: value * torch.nan}, "lacking": {}}
    states = {k: state | {"model": state["model"] | tensors} for k, tensors in wrong.items()}
    states |= {"other": {"weights": torch.ones(3)}, "evil": {"model": os.system}}
    for file, content in states.items():
        torch.save(content, toys / f"{file}.pt")
    with zipfile.ZipFile(toys / "files.zip", "w") as file:
        file.writestr("a.txt", "a")
    for out in ("kept", "headless", "other"):
        shutil.copytree(trained, toys / "runs" / out)
    (toys / "runs/headless/last.pt").unlink()
    shutil.copy(toys / "other.pt", toys / "runs/other/last.pt")
    return toys


@pytest.mark.parametrize("case", CASES.replace("GREC", "data/toys-grec").strip().split("\n"))
def test_bad_input_is_one_line_and_changes_no_file_of_a_run(case, folder, monkeypatch):
    line, expected = case.split(" | ")
    if line.startswith("row"):
        row = json.dumps(ROW | json.loads(line[4:]))
        (folder / "bad-train.jsonl").write_text(f"{json.dumps(ROW)}\n{row}")
        line = '--set data.annotations=bad-{split}.jsonl data.eval_splits=["train"]'
    recipe = ["--config", "configs.json:toys", "--out", "runs/new", "--set", *SMALL_RUN]
    if "ranks" in expected:
        monkeypatch.setattr("model.join_ranks", lambda: (0, 3, torch.device("cpu")))
    if "steps" not in expected:  # else it is found before the first step is done
        full = torch.OutOfMemoryError("CUDA out of memory")
        monkeypatch.setattr("train.backward", mock.Mock(side_effect=full))
    before = {path: path.read_bytes() for path in folder.glob("runs/*/*")}
    done = call("train.py", *recipe, *line.split(), cwd=folder)
    *notes, message = done.err.splitlines()
    assert done.status == 2 and message.startswith("train.py: ") and expected in message
    said = {"20 steps": 22, "out of m": 2, "other da": 1, "(rows)": 4}  # lines before the last one
    assert len(notes) <= said.get(expected[:8], 1), notes
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_run_survives_a_broken_picture_on_two_ranks_ctrl_c_and_a_kill(folder):
    lines = (folder / "data/toys/train.jsonl").read_text().splitlines()
    rows = {json.loads(line)["image"]: line for line in lines}  # one row of each picture
    (folder / "own-train.jsonl").write_text("\n".join(rows.values()))
    more = ["data.annotations=own-{split}.jsonl", 'data.eval_splits=["train"]', "data.workers=1"]
    more += ["train.eps=1e-6", "train.epochs=4", "train.evaluate_from=4", "train.save_minutes=0"]
    start(folder, "quiet", *more)
    # the first row of the second rank in the third step
    (_, row), *_ = next(iter(data.MicroBatchSampler(60, 16, 8, 6666, range(2, 3), 1, 2)))
    picture = folder / "data/toys/images" / list(rows)[row]
    whole = picture.read_bytes()
    picture.write_bytes(whole[:-200])
    done = start(folder, "hard", *more, ranks=2, status=1)
    picture.write_bytes(whole)
    assert done.err.count(f"train.py: own-train.jsonl:{row + 1}: cannot read the image") == 1
    assert last(folder, "hard")["step"] == 2 and "[rank" not in done.err, done.err
    line = "--config configs.json:toys --out runs/hard --resume --set"
    command = command_line("train.py", *line.split(), *SMALL_RUN, *more)
    options = {"cwd": folder, "env": environment(), "stderr": subprocess.PIPE, "text": True}
    path = folder / "runs/hard/last.pt"
    for number, status in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        written = path.stat().st_mtime_ns
        process = subprocess.Popen(command, **options, start_new_session=True)
        while path.stat().st_mtime_ns == written and process.poll() is None:
            time.sleep(0.02)
        for _ in range(2):  # as a terminal does, to the loader process as well, in impatience twice
            os.killpg(process.pid, number)
        errors = process.communicate()[1]
        assert process.returncode == status and "Traceback" not in errors, errors
        assert errors.count("--resume goes on") == (status == 130)
    start(folder, "hard", *more, "--resume")
    quiet, hard = (last(folder, out)["model"] for out in ("quiet", "hard"))
    torch.testing.assert_close(quiet, hard, atol=1e-6, rtol=0)
