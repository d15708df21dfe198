"""The three command lines: help, mistyped options, Ctrl-C, systems other than Linux."""

import signal
import subprocess
import sys

import pytest

import data
import evaluate
import train
from conftest import ROOT, SMALL_RUN, command_line, environment

PROGRAMS = {"train": train, "evaluate": evaluate, "data": data}


def said(line: str, monkeypatch, capsys) -> str:
    """What a program prints when its command line ends it."""
    name, *words = line.split()
    monkeypatch.setattr("sys.argv", [f"{name}.py", *words])
    with pytest.raises(SystemExit):
        PROGRAMS[name].parse_arguments()
    printed = capsys.readouterr()
    return printed.out + printed.err


@pytest.mark.parametrize("line", ["train", "evaluate", "data", "data check", "data convert", "data show"])
def test_help_fits_a_terminal_of_80_columns_and_explains_every_option(line, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    text = said(f"{line} --help", monkeypatch, capsys)
    assert max(map(len, text.splitlines())) <= 80
    options = text.partition("options:")[2].split("\n  -")
    assert len(options) > 1 and all(len(option.split()) > 3 for option in options[1:])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("train --confg configs.json:shapes", "required: --config"),
        ("train --config configs.json:shapes --reusme", "unrecognized arguments: --reusme"),
        ("evaluate --chpt best.pt", "one of the arguments --ckpt --curves is required"),
        ("evaluate --ckpt best.pt --atention", "unrecognized arguments: --atention"),
        ("evaluate --ckpt=best.pt --repotr=a.html", "unrecognized arguments: --repotr=a.html"),
        ("data check --config configs.json:shapes --imgaes", "unrecognized arguments: --imgaes"),
        ("data show --config configs.json:shapes --nmuber 4", "unrecognized arguments: --nmuber"),
        ("data covnert a.json --to b", "'covnert'"),
        ("evaluate --ckpt best.pt --text a", "--image and --text go together"),
    ],
)
def test_the_error_for_a_wrong_command_line_names_the_wrong_or_missing_option(line, expected, monkeypatch, capsys):
    text = said(line, monkeypatch, capsys)
    assert expected in text and "Traceback" not in text


def test_ctrl_c_leaves_no_traceback(trained, shapes):
    line = command_line("evaluate.py", "--ckpt", str(trained / "best.pt"))
    environ = {**environment(), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(line, cwd=shapes, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "SimVG checkpoint" in process.stdout.readline()  # torch is imported, the work begins
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "" and process.returncode in (0, 130)


# What neither Windows nor, in part, macOS has is taken away; then one of the programs starts.
OTHER_SYSTEM = """
import ctypes, os, runpy, signal, sys, numpy, torch, torchvision, torch._dynamo, sentencepiece, pycocotools.coco
sys.modules |= {"fcntl": None, "resource": None}
del os.setpgid, os.killpg, os.mkfifo, signal.SIGCHLD, signal.SIGALRM, signal.SIGHUP, ctypes.CDLL
sys.platform, sys.argv = "win32", sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    "line",
    [
        ["train.py", "--config", "configs.json:shapes", "--out", "runs/elsewhere", "--set", *SMALL_RUN],
        ["evaluate.py", "--ckpt", "runs/trained/best.pt"],
        ["evaluate.py", "--ckpt", "runs/trained/best.pt", "--split", "test", "--answers", "elsewhere.jsonl"],
        ["data.py", "check", "--config", "configs.json:shapes", "--set", "data.scenes=60"],
    ],
)
def test_programs_of_one_process_need_nothing_that_windows_does_not_have(line, trained, shapes):
    command = [sys.executable, "-c", OTHER_SYSTEM, str(ROOT / line[0]), *line[1:]]
    done = subprocess.run(command, cwd=shapes, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
