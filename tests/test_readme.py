"""The README's commands run, and its tables say what the code says."""

import re
import shlex
import sys

import pytest

import beit3
import losses
import model as models
from conftest import CONFIGS, ROOT, SMALL_RUN, call, program

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = []
for language, block in BLOCKS:
    if not language:
        COMMANDS += [line.partition("   #")[0].strip() for line in block.splitlines()]
COMMANDS = [line for line in COMMANDS if line.startswith(("python", "pip", "torchrun"))]


def command(start: str) -> list[str]:
    """The words of the only command of the README that starts so."""
    (line,) = [line for line in COMMANDS if line.startswith(start)]
    return shlex.split(line)


def test_ci_runs_the_readme_s_test_command():
    (line,) = [line for line in COMMANDS if "pytest" in line]
    assert line in (ROOT / ".ci" / "run").read_text().splitlines()


def test_every_equation_has_its_function_and_the_deviations_are_numbered_in_order():
    modules = {"beit3": beit3, "losses": losses, "model": models}
    named = re.findall(r"^\| Eq\. (\d).*", README, re.MULTILINE)
    assert named == [str(number) for number in range(1, 9)]
    functions = re.findall(r"^\| Eq\. .*", README, re.MULTILINE)
    for module, names in re.findall(r"`(beit3|losses|model)\.([\w.]+)`", "\n".join(functions)):
        found = modules[module]
        for name in names.split("."):
            found = getattr(found, name)
    deviations = [int(number) for number in re.findall(r"^\| D(\d+)", README, re.MULTILINE)]
    assert deviations == list(range(1, len(deviations) + 1))
    cited = set()
    for name in ("beit3", "model", "losses", "data", "train", "evaluate"):
        source = (ROOT / f"{name}.py").read_text()
        cited |= {int(number) for number in re.findall(r"\bD(\d+)\b", source)}
    assert cited == set(deviations)


def test_every_named_recipe_and_file_exists():
    for recipe in re.findall(r"configs\.json:([\w+-]+)", README):
        assert f'"{recipe}":' in (ROOT / "configs.json").read_text(), recipe
    for name in re.findall(r"(?:^|[ `])((?:tests/)?\w+\.(?:py|md))\b", README, re.MULTILINE):
        assert (ROOT / name).exists(), name


def test_the_modules_import_only_what_is_allowed_and_in_one_direction():
    allowed = {
        "beit3": set(),
        "model": {"beit3"},
        "losses": {"model"},
        "data": set(),
        "evaluate": {"data", "model"},
        "train": {"data", "evaluate", "losses", "model"},
    }
    packages = {"torch", "torchvision", "sentencepiece", "numpy", "PIL", "tqdm", "pycocotools"}
    for name, ours in allowed.items():
        source = (ROOT / f"{name}.py").read_text()
        at_the_head = set(re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE))
        known = packages | set(sys.stdlib_module_names) | ours
        assert at_the_head <= known, name


def test_the_commands_of_the_readme_run_with_small_sizes(toys):
    small = [*SMALL_RUN, "train.epochs=1"]
    for start in ("python train.py --config configs.json:toys-stage1", "python tests/curves.py"):
        command(start)  # they are in the README; `curves` needs matplotlib
    train = [line for line in COMMANDS if line.startswith("pip")][0].rpartition("&& python ")[2]
    done = program(*shlex.split(train), "--set", *small, cwd=toys)
    assert done.status == 0 and (toys / "runs/toys/samples.png").exists(), done.err
    for stage in (
        "python train.py --config configs.json:toys-stage1",
        "python train.py --config configs.json:toys-stage2",
    ):
        _, *words = command(stage)
        assert call(*words, "--set", *small, cwd=toys).status == 0
    for start in (
        "python evaluate.py --ckpt runs/toys/best.pt --image",
        "python evaluate.py --ckpt runs/toys/best.pt --split",
        "python evaluate.py --ckpt runs/toys/best.pt --rows",
    ):
        _, *words = command(start)
        done = call(*words, cwd=toys)
        assert done.status == 0, done.err
    for name in ("found.png", "report.html", "answers.jsonl"):
        assert (toys / name).stat().st_size > 100
    (python,) = [block for language, block in BLOCKS if language == "python" and "ground" in block]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(toys)
        exec(python, {})


def test_own_data_from_the_readme_s_lines_to_a_trained_model(toys, tmp_path):
    from PIL import Image

    (json_lines,) = [block for language, block in BLOCKS if language == "json"]
    mine = tmp_path / "mine"
    (mine / "images").mkdir(parents=True)
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (640, 480), "grey").save(mine / "images" / name)
    for split in ("train", "val"):
        (mine / f"{split}.jsonl").write_text(json_lines)
    (tmp_path / "configs.json").symlink_to(ROOT / "configs.json")
    (csv_to_rows,) = [b for language, b in BLOCKS if language == "python" and "csv" in b]
    (tmp_path / "boxes.csv").write_text("file,phrase,x1,y1,x2,y2\na.jpg,left dog,1,2,30,40\n")
    spm = f"data.tokenizer={toys}/data/toys/toys.spm"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        exec(csv_to_rows, {})
    assert '"boxes": [[1.0, 2.0, 29.0, 38.0]]' in (tmp_path / "train.jsonl").read_text()

    _, *words = command("python data.py --config configs.json:refcoco --images")
    done = call(*words, spm, cwd=tmp_path)
    assert done.status == 0 and "2 without a target" not in done.out, done.err
    assert (tmp_path / "examples.png").exists()
    _, *words = command("python train.py --config configs.json:refcoco --init runs")
    init = words.index("--init")
    del words[init : init + 2]
    settings = [
        *SMALL_RUN,
        "train.init=",
        "model.queries=3",
        "data.workers=0",
        "train.epochs=1",
        spm,
    ]
    assert call(*words, *settings, cwd=tmp_path).status == 0
    _, *words = command("python evaluate.py --ckpt runs/mine/best.pt")
    assert '"n": 4' in call(*words, cwd=tmp_path).out


def test_the_user_s_line_runs_under_torchrun(toys):
    words = command("torchrun --nproc_per_node 8")
    assert words[1:4] == ["--nproc_per_node", "8", "train.py"] and f"{CONFIGS}"
