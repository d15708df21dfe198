"""README.md: what it claims of the code is true."""

import ast
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_annotations import NAME, write_refer, write_seqtr

import data
from conftest import ROOT, TINY, environment, official_state, signals_kept

TEXT = (ROOT / "README.md").read_text()
MODULES = ("beit3", "data", "evaluate", "losses", "model", "train")


def names(path) -> set[str]:
    """Functions, classes and methods of a file as a, A, A.b."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
    return found


def test_the_map_of_the_code_states_each_file_s_length_within_a_tenth():
    stated = dict(re.findall(r"^\| `([\w.]+)` \| (\d+) \|", TEXT, re.M))
    assert stated.keys() == {"configs.json", *(f"{m}.py" for m in MODULES)}
    for name, lines in stated.items():
        real = len((ROOT / name).read_text().splitlines())
        assert abs(real - int(lines)) <= 0.1 * real, f"{name} has {real} lines"


def test_the_equation_table_points_at_real_functions_and_tests():
    tests = set().union(*(names(path) for path in (ROOT / "tests").glob("test_*.py")))
    rows = re.findall(r"^\| Eq\. \d.*?\| (.*?) \| (.*?) \|$", TEXT, re.M)
    assert len(rows) == 8
    for functions, test in rows:
        for module, name in re.findall(r"`(\w+)\.([\w.]+)`", functions):
            assert name in names(ROOT / f"{module}.py")
        assert re.fullmatch(r"`(\w+)`", test)[1] in tests


def test_every_deviation_cited_in_the_code_is_in_the_table_and_numbered_without_gaps():
    listed = [int(n) for n in re.findall(r"^\| D(\d+) \|", TEXT, re.M)]
    assert listed == list(range(1, len(listed) + 1))
    for module in MODULES:
        for number in re.findall(r"\bD(\d+)\b", (ROOT / f"{module}.py").read_text()):
            assert int(number) in listed


def test_every_named_recipe_and_key_exists():
    for name in re.findall(r"configs\.json:([\w+-]+)", TEXT):
        data.load_config(f"{ROOT}/configs.json:{name}")
    config = data.load_config(f"{ROOT}/configs.json:default")
    for section, key in re.findall(
        r"`?\b(model|data|train)\.(?!jsonl)(\w+)=?", re.sub(r"(model|data|train)\.py", "", TEXT)
    ):
        known = config[section].keys() | names(ROOT / f"{section}.py")
        assert key in known, f"{section}.{key}"


@pytest.mark.parametrize("section", ["model", "data", "train"])
def test_every_key_of_the_default_recipe_is_explained_in_its_module(section):
    """Either in a table of the module's docstring or in a comment beside the key."""
    source = (ROOT / f"{section}.py").read_text()
    head = ast.get_docstring(ast.parse(source), clean=False)
    table = [name for names in re.findall(r"^ {4}(\w+(?:, \w+)*) {2,}\S", head, re.M) for name in names.split(", ")]
    beside = re.findall(rf'^\s+"?(?:{section}\.)?(\w+)"?: .*  # \S', source, re.M)
    default = json.loads((ROOT / "configs.json").read_text())["default"]
    assert default[section].keys() <= {*table, *beside}
    assert len(table) == len(set(table))


def test_the_readme_fits_in_320_lines_and_3000_words():
    assert len(TEXT.splitlines()) <= 320 and len(TEXT.split()) <= 3000


def test_imports_go_one_way():
    allowed = {
        "beit3": set(),
        "data": set(),
        "model": {"beit3"},
        "losses": {"model"},
        "evaluate": {"data", "model"},
        "train": {"data", "evaluate", "losses", "model"},
    }
    for module, others in allowed.items():
        tree = ast.parse((ROOT / f"{module}.py").read_text())
        used = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        used |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert used & set(MODULES) <= others, module


def test_no_function_is_longer_than_a_screen():
    for module in MODULES:
        for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{module}.{node.name}"


# ---- the commands themselves


def blocks(language: str = "") -> list[str]:
    return [text for name, text in re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.M | re.S) if name == language]


def commands() -> list[str]:
    """Every line of the README that starts a program."""
    lines = "".join(blocks()).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith(("python", "pip", "torchrun"))]


VOCABULARY = 162  # of the shapes' tokenizer


def small_recipes() -> dict:
    """configs.json with the same names and every model and run tiny."""
    entries = json.loads((ROOT / "configs.json").read_text())
    for name, fragment in entries.items():
        if name not in ("default", "published-sizes") and isinstance(fragment, dict):
            kept = ("queries", "annotations", "images", "tokenizer", "generate", "loss_")
            for section, keys in fragment.items():
                fragment[section] = {key: value for key, value in keys.items() if key.startswith(kept)}
    sizes = {"encoder_width": 48, "encoder_ffn": 96, "encoder_layers": 3, "encoder_heads": 4}
    default = entries["default"]
    default["model"] |= {**TINY, **sizes, "vocab_size": VOCABULARY}
    default["train"] |= {"epochs": 1, "warmup_epochs": 0, "batch_size": 8}
    default["data"] |= {"scenes": 60, "eval_splits": ["val", "test"], "workers": 0}
    return entries


@pytest.fixture
def workplace(tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone as the README's reader has it after the downloads: everything under the names that the commands use."""
    for path in ROOT.glob("*.py"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "configs.json").write_text(json.dumps(small_recipes()))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "beit3.spm").symlink_to(shapes / "data" / "shapes" / "shapes.spm")
    encoder = {n.removeprefix("vis_enc."): v for n, v in official_state().items() if n.startswith("vis_enc.")}
    words = torch.zeros(VOCABULARY, encoder["beit3.text_embed.weight"].shape[1])
    torch.save({"model": {**encoder, "beit3.text_embed.weight": words}}, tmp_path / "beit3_base_patch16_224.pth")
    for name in ("refcoco-unc", "refcocoplus-unc", "refcocog-umd"):
        folder = tmp_path / "data" / "annotations" / name
        folder.mkdir(parents=True)
        write_seqtr(folder)
        splits = json.loads((folder / "instances.json").read_text())
        (folder / "instances.json").write_text(json.dumps({**splits, "test": splits["testA"]}))
    (tmp_path / "refer" / "refcoco").mkdir(parents=True)
    write_refer(tmp_path / "refer" / "refcoco")
    photos = tmp_path / "data" / "images" / "mscoco" / "train2014"
    (tmp_path / "mine" / "images").mkdir(parents=True)
    photos.mkdir(parents=True)
    sizes = {photos / NAME.format(image): (64, 48) for image in (154, 309, 605)}
    sizes |= {tmp_path / "mine" / "images" / name: (640, 480) for name in ("a.jpg", "b.jpg")}
    for path, size in sizes.items():
        Image.new("RGB", size, (90, 120, 150)).save(path)
    (rows,) = blocks("json")
    for split in ("train", "val"):
        (tmp_path / "mine" / f"{split}.jsonl").write_text(rows)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_here(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command line as it stands, in this process where it starts one of the modules."""
    words = shlex.split(command)
    if words[0] == "torchrun":
        line = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
        done = subprocess.run(line, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
        return
    monkeypatch.setattr("sys.argv", words[1:])
    with signals_kept():
        try:
            importlib.import_module(Path(words[1]).stem).main()
        except SystemExit as ended:
            assert ended.code in (None, 0)


def test_every_command_runs_as_it_stands(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    for command in commands():
        if command.startswith("pip") and "pytest" in command:
            continue  # .ci/run
        if command.startswith("torchrun"):
            shutil.rmtree("runs/refcoco")  # of the line before, which is for one GPU
        run_here(command.removeprefix("pip install -r requirements.txt && "), monkeypatch)
        if Path("runs/shapes/best.pt").exists():
            shutil.copy("runs/shapes/best.pt", "best.pt")  # a recipe's, from which own data is trained
    for made in ("report.html", "page.png", "runs/mine/best.pt", "data/annotations/coco-all/train.jsonl"):
        assert Path(made).exists()
    pytest.importorskip("onnxscript")
    exec("".join(blocks("python")), scope := {})
    assert scope["boxes"].shape == (1, 4) and Path("simvg.onnx").exists()
