"""The programs that the README's figures come from, at tiny size: they run, and measure what they say."""

import argparse
import json
from pathlib import Path

import ablation
import benchmark
import pytest

import train
from conftest import ROOT, SMALL_RUN, TINY, signals_kept


@pytest.fixture
def tiny_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`refcoco` and `refcoco-large` of the benchmark are tiny models."""
    entries = json.loads((ROOT / "configs.json").read_text())
    entries["default"]["model"] |= {**TINY, "patch_size": 32, "vocab_size": 60_001}
    path = tmp_path / "configs.json"
    path.write_text(json.dumps({"default": entries["default"], "refcoco": [], "refcoco-large": []}))
    monkeypatch.setattr(benchmark, "CONFIGS", str(path))


def test_the_benchmark_of_the_model_prints_every_row(tiny_configs, capsys):
    benchmark.model("base", [2], 1)
    printed = capsys.readouterr().out
    assert "outputs equal those of the baseline" in printed
    for title in ("token branch", "decoder branch", "evaluation of JPEGs", "training step"):
        for kind in ("plain fp32", "plain bf16", "fp32", "bf16"):
            assert f"\n{title}, batch 2, {kind} " in printed


def test_the_benchmark_of_the_parts_and_of_the_growth_print_every_row(tiny_configs, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "STEPS", 2)
    benchmark.parts(1)
    benchmark.growth(1)
    benchmark.loader()
    printed = capsys.readouterr().out
    for title in ("freed memory is kept", "last layer", "Adam in one kernel", "queries 50", "workers 2", "with jitter"):
        assert title in printed


def test_the_benchmark_of_the_losses_compares_equal_matchings(capsys):
    benchmark.matching(batch=4, rounds=1)
    assert "the matchings are equal" in capsys.readouterr().out


def test_the_ablation_trains_every_variant_and_draws_its_tables_and_pictures(shapes: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(shapes)
    monkeypatch.setattr(train, "LOG_EVERY", 2)
    small = [setting for setting in SMALL_RUN if "epochs" not in setting]
    monkeypatch.setattr(ablation, "VARIANTS", {name: [*small, *own] for name, own in ablation.VARIANTS.items()})
    args = argparse.Namespace(config=f"{ROOT}/configs.json:shapes-quick", out=tmp_path, epochs=2)
    args.noise, args.seed, args.variant, args.set = [0.3, 0.0], [1, 2], list(ablation.VARIANTS), ["train.lr=1e-3"]
    for noise, variant, seed in (
        *((0.3, variant, seed) for variant in args.variant for seed in (1, 2)),
        *((0.0, variant, 1) for variant in ("token branch alone", "both, no distillation")),
    ):
        with signals_kept():
            ablation.one(args, noise, variant, seed)
    lines = ablation.table(args).splitlines()
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:6]] for line in lines[2:]}
    assert cells.keys() == ablation.VARIANTS.keys()
    assert {name for name, (decoder, *_) in cells.items() if not decoder} == {"token branch alone"}
    assert {name for name, (_, _, token, _) in cells.items() if not token} == {"decoder branch alone"}
    # What was not run yet is left out, and a cell names as many seeds as there are.
    assert {name for name, (*_, token) in cells.items() if token} == {"token branch alone", "both, no distillation"}
    assert [cells["both, no distillation"][i].count(",") for i in (0, 1)] == [1, 0]
    runs = {name: ablation.rows(ablation.folder(tmp_path, 0.3, name, 1), "train") for name in cells}
    weights = {name: {row.get("teacher_weight") for row in logged} for name, logged in runs.items()}
    assert weights["both, plain distillation"] == {0.5} and weights["both, no distillation"] == {None}
    assert weights["both, boxes of the teacher alone"] == {1.0}
    ablation.pictures(args)
    assert (tmp_path / "noise.png").exists() and (tmp_path / "curves.png").exists()
    assert (tmp_path / "noise-0.3" / "SimVG-in-two-stages-1-first" / "best.pt").exists()
