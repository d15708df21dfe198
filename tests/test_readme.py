"""README.md: what it claims of the code is true."""

import ast
import re

import pytest

import data
from conftest import ROOT, program

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


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "data.py"])
def test_every_flag_in_a_command_is_one_the_program_knows(script):
    jobs = [["convert"], ["check"], ["show"]] if script == "data.py" else [[]]
    help_text = "".join(program(script, *job, "--help", cwd=ROOT).stdout for job in jobs)
    for command in re.findall(rf"python {script}((?:[^\n`]|\\\n)*)", TEXT):
        for flag in re.findall(r"(?<!\S)--[\w-]+", command):
            assert flag in help_text


def test_the_readme_fits_in_300_lines():
    assert len(TEXT.splitlines()) <= 300


def test_imports_go_one_way():
    allowed = {
        "beit3": set(),
        "data": set(),
        "model": {"beit3", "data"},
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
