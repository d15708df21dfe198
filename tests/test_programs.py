"""The three command lines: help, mistyped options, Ctrl-C."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

import data
import evaluate
import train
from conftest import command_line, environment

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
        ("evaluate --chpt best.pt", "the following arguments are required: --ckpt"),
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


@pytest.mark.parametrize(("program", "seconds"), [("evaluate.py", 0), ("evaluate.py", 1.2), ("model.py", 0)])
def test_ctrl_c_leaves_no_traceback_while_torch_is_imported_nor_later(program, seconds, trained, shapes):
    line = command_line(program, *(["--ckpt", str(trained / "best.pt")] if program == "evaluate.py" else []))
    process = subprocess.Popen(line, cwd=shapes, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None and "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == b"" and process.returncode in (130, -signal.SIGINT)
