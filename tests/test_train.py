"""train.py: ranks, stops and restarts change nothing; every regime is one command."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import evaluate
import losses
import model as models
import train
from conftest import ROOT, SMALL_RUN, TINY, command_line, environment, program, start, tiny_inputs, tiny_model

EXACT = ["model.dropout=0.0", "train.epochs=1"]
# The bias of an attention's keys has no effect, so its gradient is rounding noise, which Adam blows up to whole steps
# unless eps is above the noise. Where sums are taken in another order that alone can exceed 1e-6.
STEADY = [*EXACT, "train.eps=1e-6"]


def last(shapes: Path, out: str) -> dict:
    return models.read_checkpoint(shapes / "runs" / out / "last.pt")


def rows(shapes: Path, out: str) -> list[dict]:
    return [json.loads(line) for line in (shapes / "runs" / out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_weights_figures_and_pictures(trained):
    assert {p.name for p in trained.iterdir()} == {
        *("config.json", "metrics.jsonl", "last.pt", "best.pt", "curves.png", "samples.png")
    }
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [r["split"] for r in records if r["split"] != "train"] == ["val", "val", "val", "test"]
    assert {"n", "decoder_acc", "token_acc", "epoch", "step"} <= records[-1].keys()
    assert json.loads((trained / "config.json").read_text())["train"]["epochs"] == 2


def test_a_training_row_holds_losses_weight_rates_norm_and_speed_and_the_first_says_how_long_it_takes(shapes, capsys):
    start(shapes, "rows", "train.batch_size=4", "train.epochs=1")
    steps = last(shapes, "rows")["step"]
    assert capsys.readouterr().err.count(f" s, all {steps} about ") == 1 and steps >= train.LOG_EVERY
    row = next(r for r in rows(shapes, "rows") if r["split"] == "train")
    names = {"decoder", "token_on_truth", "token_on_teacher", "teacher_weight", "total", "grad_norm"}
    assert names | {"lr", "lr_encoder", "samples_per_s", "data_wait"} <= row.keys()
    assert row["total"] == pytest.approx(row["decoder"] + row["token_on_truth"] + row["token_on_teacher"], rel=1e-4)


def test_a_folder_that_holds_a_run_is_refused_in_one_line(shapes, trained):
    done = start(shapes, "trained", status=2)
    assert "holds a run already" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("grec", [False, True])
def test_two_ranks_with_half_the_batch_give_the_weights_of_one(shapes, grec):
    config = "shapes-grec" if grec else "shapes"
    short = [*(STEADY if grec else EXACT), "train.batch_size=24"]
    start(shapes, f"one{grec}", *short, config=config)
    start(shapes, f"two{grec}", *short, config=config, ranks=2)
    one, two = last(shapes, f"one{grec}"), last(shapes, f"two{grec}")
    assert one["step"] == two["step"] >= 5
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, atol=1e-6, rtol=0, msg=name)


FACTORS = list(itertools.product((None, 1.0), repeat=3))[1:]  # of the decoder, of the token branch on truth, on teacher


@pytest.mark.parametrize("grec", [False, True])
def test_two_ranks_train_with_every_choice_of_loss_terms_and_with_a_frozen_encoder(grec, shapes, tmp_path):
    """In one pair of processes, because starting one for each choice would take minutes."""
    script = tmp_path / "choices.py"
    script.write_text(CHOICES)
    recipe = f"{ROOT}/configs.json:shapes{'-grec' if grec else ''}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(
        [*command, recipe, json.dumps(FACTORS), *SMALL_RUN],
        cwd=shapes,
        env={**environment(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("three finite steps") == 2 * len(FACTORS)


CHOICES = """
import itertools, json, sys, torch
from pathlib import Path
import data, evaluate, train

recipe, choices, *settings = sys.argv[1:]
rank, world, device = evaluate.join_ranks()
config = data.load_config(recipe, settings)
rows = data.read_rows(config["data"], "train")
collate = data.Collate(data.Tokenizer(config["data"]["tokenizer"]), config["data"]["max_tokens"])
batch = collate([data.Dataset(rows, 32)[0, 8 * rank + i] for i in range(8)])
for factors, frozen in itertools.product(json.loads(choices), (False, True)):
    names = "loss_decoder", "loss_token_on_truth", "loss_token_on_teacher"
    config["train"] |= {**dict(zip(names, factors)), "freeze_encoder": frozen}
    state = train.build(config, Path(), rank, world, device)
    state.model.train()
    steps = [train.train_step(state, [batch, batch]) for _ in range(3)]
    assert all(value.isfinite() for step in steps for value in step.values())
    if rank == 0:
        print("three finite steps", factors)
del state.wrapped
evaluate.wait_for_all(leave=True)
"""


def test_micro_batches_give_the_weights_of_the_whole_batch(shapes):
    short = [*STEADY, "train.loss_token_on_teacher=null"]  # the weight W_dt is one number a micro-batch
    start(shapes, "whole", *short)
    start(shapes, "parts", *short, "train.micro_batch=4")
    other = last(shapes, "parts")["model"]
    for name, value in last(shapes, "whole")["model"].items():
        torch.testing.assert_close(other[name], value, atol=1e-6, rtol=0, msg=name)


def interrupted(shapes: Path, out: str, number: int, after: float) -> int:
    """Start or go on with the run, send it a signal some seconds after its first step, return its exit status."""
    line = ["train.py", "--config", "configs.json:shapes", "--out", f"runs/{out}", "--resume", "--set", *SMALL_RUN]
    command, metrics = command_line(*line, *LONGER), shapes / "runs" / out / "metrics.jsonl"
    began = metrics.stat().st_mtime if metrics.exists() else 0
    process = subprocess.Popen(command, cwd=shapes, env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_mtime > began) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(after)
    process.send_signal(number)
    return process.wait(60)


LONGER = ["train.epochs=6", "train.batch_size=4", "model.dropout=0.1", "train.ema=true", "train.save_minutes=0.005"]


def test_a_run_that_was_stopped_and_killed_ends_with_bitwise_the_same_weights(shapes):
    start(shapes, "straight", *LONGER)
    rng = random.Random(0)
    assert interrupted(shapes, "broken", signal.SIGTERM, 0.1) == 128 + signal.SIGTERM
    assert 0 < last(shapes, "broken")["step"] < last(shapes, "straight")["step"]
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        interrupted(shapes, "broken", number, rng.uniform(0.1, 0.9))
        last(shapes, "broken")  # never a half-written file
    start(shapes, "broken", *LONGER, "--resume")
    a, b = last(shapes, "straight"), last(shapes, "broken")
    assert a["step"] == b["step"] and a["best"] == b["best"]
    for part in ("model", "ema"):
        assert all(torch.equal(value, b[part][name]) for name, value in a[part].items())
    clean = [{k: v for k, v in r.items() if k not in ("samples_per_s", "data_wait")} for r in rows(shapes, "straight")]
    steps = [(r["split"], r["step"]) for r in clean]
    assert steps == [(r["split"], r["step"]) for r in rows(shapes, "broken")]


def test_a_signal_in_an_evaluation_ends_the_run_at_once_and_that_evaluation_comes_again(
    shapes, trained, monkeypatch, capsys
):
    def killed(*_, after_batch: Callable[[], None], **__) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        after_batch()
        raise AssertionError("went on after the signal")

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "evaluate_dataset", killed)
        with pytest.raises(AssertionError, match="130"):  # the status that `start` did not expect
            start(shapes, "impatient")
    assert "stopped in an evaluation; the same command with --resume goes on" in capsys.readouterr().err
    assert last(shapes, "impatient")["step"] < last(shapes, "trained")["step"]
    start(shapes, "impatient", "--resume")
    steps = [[(row["split"], row["step"]) for row in rows(shapes, out)] for out in ("impatient", "trained")]
    assert steps[0] == steps[1]
    a, b = last(shapes, "impatient")["model"], last(shapes, "trained")["model"]
    assert all(torch.equal(value, b[name]) for name, value in a.items())


def test_ctrl_c_in_a_terminal_amid_an_evaluation_with_loader_processes_is_said_once(shapes):
    lines = (shapes / "data/shapes/train.jsonl").read_text().splitlines()
    (shapes / "much-train.jsonl").write_text("\n".join(lines[:16]))
    (shapes / "much-val.jsonl").write_text("\n".join(lines * 20))
    settings = ["data.annotations=much-{split}.jsonl", 'data.eval_splits=["val"]', "data.workers=2"]
    command = command_line("train.py", "--config", "configs.json:shapes", "--out", "runs/much")
    command += ["--set", *SMALL_RUN, *settings]
    process = subprocess.Popen(
        command, cwd=shapes, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not (shapes / "runs/much/last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)
    for _ in range(2):  # as a terminal does; the impatient press it twice
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.02)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and errors.count("--resume goes on") == 1 and "Traceback" not in errors, errors


def test_own_rows_under_the_recipe_of_the_embedded_set_draw_nothing_and_touch_nothing(shapes):
    good = (shapes / "data/shapes/train.jsonl").read_text().splitlines()[:16]
    for split in ("train", "val", "test"):
        (shapes / f"own-{split}.jsonl").write_text("\n".join(good))
    start(shapes, "own", "data.annotations=own-{split}.jsonl", "data.scenes=20000")
    assert rows(shapes, "own")[-1]["n"] == sum(len(json.loads(line)["expressions"]) for line in good)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config", "configs.json:shaps"], "'shapes'"),
        (["--config", "configs.json:shapes", "--set", "train.lrate=1"], "train.lr"),
        (["--config", "configs.json:shapes", "--set", "train.epochs=many"], "train.epochs must be an integer"),
        (["--config", "configs.json:shapes", "--set", "data.tokenizer=no.spm"], "no.spm"),
        (["--config", "configs.json:shapes", "--set", "data.images=data/shapes/nowhere"], "there is no image"),
        (["--config", "configs.json:shapes", "--set", "data.annotations=bad-{split}.jsonl"], "bad-train.jsonl:2: box"),
        (["--config", "configs.json:shapes", "--init", "configs.json"], "configs.json: is not a checkpoint"),
    ],
)
def test_bad_input_is_one_line_and_status_2_and_leaves_no_run_behind(arguments, expected, shapes):
    good = (shapes / "data/shapes/train.jsonl").read_text().splitlines()[0]
    (shapes / "bad-train.jsonl").write_text(good + "\n" + json.dumps({**json.loads(good), "boxes": [[90, 90, 20, 20]]}))
    sets = [] if "--set" in arguments else ["--set"]
    done = program("train.py", *arguments, *sets, "data.scenes=60", "--out", "runs/bad", cwd=shapes, status=2)
    assert expected in done.stderr and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert not (shapes / "runs" / "bad").exists()


def test_an_embedded_set_of_another_size_is_not_taken_for_the_one_asked_for(shapes):
    done = start(shapes, "other", "data.scenes=61", status=2)
    assert "60 scenes" in done.stderr and not (shapes / "runs" / "other").exists()


def test_an_embedded_set_of_no_scenes_is_not_drawn(tmp_path):
    line = ["train.py", "--config", f"{ROOT}/configs.json:shapes", "--set", "data.scenes=0"]
    done = program(*line, cwd=tmp_path, status=2)
    assert "data/shapes/train.jsonl: cannot be read" in done.stderr and done.stderr.count("\n") == 1


def test_a_resumed_run_may_not_change_its_settings(shapes, trained):
    done = start(shapes, "trained", "--resume", "train.lr=0.5", status=2)
    assert "train.lr" in done.stderr and done.stderr.count("\n") == 1


CHAINS = [
    ["refcoco"],
    ["refcocog-umd-stage1", "refcocog-umd-stage2"],
    ["pretrain-mixed", "refcoco-finetune-mixed", "refcoco-distill-mixed"],
    ["pretrain-cocoall", "refcoco+-finetune-cocoall", "refcoco+-distill-cocoall"],
    ["grefcoco-stage1", "grefcoco-stage2"],
    ["flickr30k-large-stage1", "flickr30k-large-stage2"],
]


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain[-1])
def test_every_regime_of_the_paper_is_a_chain_of_commands(chain, shapes, tmp_path, capfd):
    """Each recipe as it is but for sizes and paths; the pre-training at a smaller image size, as COCO-all's."""
    grec, own = chain[0].startswith("grefcoco"), tmp_path / "rows"
    own.mkdir()
    for split in ("train", "val"):
        lines = (shapes / "data" / "shapes" / f"{split}.jsonl").read_text().splitlines()[:12]
        found = [json.loads(line) | ({"source": "coco"} if chain[0] == "pretrain-mixed" else {}) for line in lines]
        found[0] |= {"boxes": [] if grec else found[0]["boxes"]}
        (own / f"{split}.jsonl").write_text("\n".join(map(json.dumps, found)))
    images = f"{shapes}/data/shapes/images"
    settings = [
        *(
            f"data.annotations={own}/{{split}}.jsonl",
            f"data.tokenizer={shapes}/data/shapes/shapes.spm",
            "data.workers=0",
        ),
        *(f"data.images={images}", f'data.sources={{"coco": "{images}"}}', 'data.eval_splits=["val"]'),
        *("train.epochs=1", "train.batch_size=8", "train.micro_batch=4", "train.evaluate_from=0"),
    ]
    before: list[str] = []
    for recipe in chain:
        small = ["model.image_size=24"] if recipe.startswith("pretrain") else []
        out = f"{tmp_path}/{recipe}"
        start(shapes, out, *before, *settings, *small, config=recipe)
        said = capfd.readouterr()
        assert not before or "tensors taken" in said.out
        assert all(value.isfinite().all() for value in models.read_checkpoint(f"{out}/best.pt")["model"].values())
        before = ["--init", f"{out}/best.pt"]


FROZEN = ["train.freeze_encoder=true", "train.ema=true", "model.drop_path=0.3", "model.dropout=0.1"]


def test_a_frozen_encoder_has_no_drop_path_no_graph_no_gradients_and_no_moments():
    config = data.load_config(f"{ROOT}/configs.json:shapes", FROZEN)
    config["model"] |= {**TINY, "drop_path": 0.3}
    state, encoded = train.build(config, Path(), 0, 1, torch.device("cpu")), []
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    state.model.train().encoder.register_forward_hook(lambda _, __, output: encoded.extend(output))
    batch = data.Batch(*tiny_inputs(), torch.full((3, 1, 4), 0.5), torch.ones(3, 1, dtype=torch.bool), [0, 1, 2])
    for step in range(2):
        train.set_learning_rate(state.optimizer, config["train"], step)
        train.train_step(state, [batch, batch])
    assert not any(tensor.requires_grad for tensor in encoded)
    assert all(torch.equal(one, other) for one, other in zip(encoded[:3], encoded[3:6], strict=True))
    changed = {name for name, p in state.model.named_parameters() if not torch.equal(p, before[name])}
    assert {"tqg.query_embed.weight", "decoder_branch.class_head.weight", "token_branch.mlp.weight"} <= changed
    for name, p in state.model.named_parameters():
        if name.startswith("encoder."):
            assert name not in changed and p.grad is None and p not in state.optimizer.state


def test_an_interrupted_run_with_a_frozen_encoder_ends_with_bitwise_the_same_weights(shapes, trained, monkeypatch):
    def interrupt(state: train.TrainState) -> None:
        raise KeyboardInterrupt

    assert "name weights with --init" in start(shapes, "frozen", *FROZEN, status=2).stderr
    given = [*FROZEN, "--init", str(trained / "best.pt")]
    start(shapes, "frozen", *given)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "validate", interrupt)  # after the first epoch, which last.pt holds
        start(shapes, "refrozen", *given)
    assert last(shapes, "refrozen")["step"] < last(shapes, "frozen")["step"]
    start(shapes, "refrozen", *FROZEN, "--resume")
    a, b = last(shapes, "frozen"), last(shapes, "refrozen")
    for part in ("model", "ema"):
        assert all(torch.equal(value, b[part][name]) for name, value in a[part].items())
    assert not any(name.startswith("encoder.") for name in a["ema"])


def test_a_checkpoint_of_an_older_version_goes_on_and_is_evaluated(shapes, trained):
    shutil.copytree(trained, shapes / "runs" / "unfrozen")
    for name in ("last.pt", "best.pt"):
        state = models.read_checkpoint(trained / name)
        del state["config"]["train"]["freeze_encoder"], state["config"]["data"]["label_noise"]
        models.save(shapes / "runs" / "unfrozen" / name, state)
    program("evaluate.py", "--ckpt", "runs/unfrozen/best.pt", cwd=shapes)
    assert "train.freeze_encoder=False" in start(shapes, "unfrozen", "--resume", FROZEN[0], status=2).stderr
    start(shapes, "unfrozen", "--resume")


def test_label_noise_is_stated_changes_the_training_alone_and_stays_the_same_for_resume(shapes, trained, capsys):
    noise = "data.label_noise=0.5"
    start(shapes, "noisy", noise)
    assert "label noise 0.5" in capsys.readouterr().err
    assert last(shapes, "noisy")["rows"] != last(shapes, "trained")["rows"]
    found = [row for row in rows(shapes, "noisy") if row.get("weights") == "best"]
    printed = program("evaluate.py", "--ckpt", "runs/noisy/best.pt", cwd=shapes).stdout  # of the files as they are
    figures = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert len(figures) == 2
    for row, evaluated in zip(found, figures, strict=True):
        assert all(round(value, 6) == row[name] for name, value in evaluated.items() if name != "split")
    assert "data.label_noise=0.5" in start(shapes, "noisy", "--resume", status=2).stderr
    start(shapes, "noisy", "--resume", noise)
    line = ["data.py", "check", "--config", "configs.json:shapes", "--set", "data.scenes=60", noise]
    assert "note: 50 % of the rows get a wrong box in training" in program(*line, cwd=shapes).stderr


def test_curves_of_several_runs_are_one_picture_and_a_folder_without_a_run_is_one_line(shapes):
    start(shapes, "curve", "train.batch_size=4", "train.epochs=1")
    start(shapes, "undistilled", "train.batch_size=4", "train.epochs=1", "train.loss_token_on_teacher=null")
    with open(shapes / "runs" / "undistilled" / "metrics.jsonl", "a") as file:
        file.write('{"split": "tr')  # as if it was still training
    program("evaluate.py", "--curves", "runs/curve", "runs/undistilled", cwd=shapes)
    with Image.open(shapes / "curves.png") as page:
        assert page.height == 6 * 260  # three loss terms, W_dt, two accuracies
        panels = [page.crop((0, 260 * i, page.width, 260 * i + 260)).getcolors(1 << 20) for i in range(6)]
    second_run = [(65, 105, 225) in {color for _, color in colors} for colors in panels]  # "royalblue"
    assert second_run == [True, True, False, False, True, True]
    done = program("evaluate.py", "--curves", "runs/curve", "data/shapes", cwd=shapes, status=2)
    assert done.stderr.startswith("evaluate.py: data/shapes/metrics.jsonl: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 8827, [0, 2000, 4000, 6000, 8000]),
        (0.46, 0.89, [0.5, 0.6, 0.7, 0.8]),
        (0, 0.6, [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
        (-3, 1e6, [0, 200_000, 400_000, 600_000, 800_000, 1_000_000]),
        *((0.5, 0.5, [0.5]), (0, 0, [0])),
    ],
)
def test_ticks_are_round_numbers(low, high, expected):
    assert evaluate.ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("amp", ["", "bf16"])
def test_gradient_checkpointing_changes_no_weight_by_a_bit(amp, shapes):
    settings = (f"train.amp={amp}", "train.epochs=1", "model.drop_path=0.3", "model.dropout=0.1")
    for out, checkpointing in (("kept", "false"), ("again", "true")):
        start(shapes, out + amp, *settings, f"train.checkpointing={checkpointing}")
    other = last(shapes, f"again{amp}")["model"]
    for name, value in last(shapes, f"kept{amp}")["model"].items():
        assert torch.equal(other[name], value), name


def test_two_stages_train_the_decoder_first_and_then_both(shapes, capfd):
    start(shapes, "stage1", "train.epochs=1", config="shapes-stage1")
    figures = rows(shapes, "stage1")[-1]
    assert "decoder_acc" in figures and "token_acc" not in figures
    start(shapes, "stage2", "train.epochs=1", "--init", "runs/stage1/best.pt", config="shapes-stage2")
    assert "SimVG checkpoint" in capfd.readouterr().out and "token_acc" in rows(shapes, "stage2")[-1]
    refused = program("evaluate.py", "--ckpt", "runs/stage1/best.pt", "--branch", "token", cwd=shapes, status=2)
    assert "never trained" in refused.stderr


def test_the_encoder_can_train_in_bfloat16(shapes):
    start(shapes, "bf16", "train.epochs=1", "train.amp=bf16")
    assert last(shapes, "bf16")["model"]["encoder.layers.0.image.q.weight"].dtype == torch.float32


def test_the_grec_set_trains_and_reports_f1_and_n_acc(shapes):
    start(shapes, "grec", "train.epochs=1", config="shapes-grec")
    assert {"n_none", "decoder_f1", "decoder_nacc", "token_f1", "token_nacc"} <= rows(shapes, "grec")[-1].keys()


def test_evaluation_on_1_2_and_3_ranks_prints_the_same_numbers(shapes, trained):
    runs = [program("evaluate.py", "--ckpt", "runs/trained/best.pt", cwd=shapes, ranks=n) for n in (1, 2, 3)]
    printed = [run.stdout.splitlines() for run in runs]
    assert printed[0] == printed[1] == printed[2]
    assert json.loads(printed[0][-1])["n"] == 60


def test_a_small_model_learns_a_few_expressions_by_heart(shapes):
    config = data.load_config(f"{ROOT}/configs.json:shapes")
    config["data"] |= {"annotations": f"{shapes}/data/shapes/{{split}}.jsonl", "images": f"{shapes}/data/shapes/images"}
    tokenizer = data.Tokenizer(shapes / "data/shapes/shapes.spm")
    dataset = data.Dataset([(each,) for each in data.expand(data.read_rows(config["data"], "train"))[:8]], 32)
    collate = data.Collate(tokenizer, 10)
    batch = collate([dataset[0, i] for i in range(8)])
    model = tiny_model().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(250):
        loss = losses.simvg_loss(model(batch.images, batch.tokens, batch.text_pad), batch.boxes, batch.box_mask)[
            "total"
        ]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = evaluate.evaluate_dataset(model, dataset, collate)
    assert evaluate.summary(found, dataset.examples, grec=False) == {"n": 8, "decoder_acc": 1.0, "token_acc": 1.0}


def test_a_batch_that_the_ranks_cannot_share_is_one_line():
    with pytest.raises(data.InputError, match="cannot be shared"):
        train.micro_batch(32, 32, 3)
    assert [train.micro_batch(32, 8, 1), train.micro_batch(12, 8, 1), train.micro_batch(32, 64, 2)] == [8, 6, 16]


def test_every_epoch_walks_through_all_rows_whatever_the_ranks_and_micro_batches():
    settings = {"batch_size": 8, "seed": 1, "epochs": 2}
    whole = [sorted(sum(data.MicroBatchSampler(20, settings, 8, (e, 0), 0, 1), [])) for e in (0, 1)]
    assert {i for _, i in whole[1]} == set(range(20))
    per_rank = [list(data.MicroBatchSampler(20, settings, 2, (1, 0), rank, 2)) for rank in (0, 1)]
    assert sorted(sum(sum(per_rank, []), [])) == whole[1]
    resumed = list(data.MicroBatchSampler(20, settings, 8, (0, 2), 0, 1))
    assert resumed == list(data.MicroBatchSampler(20, settings, 8, (0, 0), 0, 1))[2:]
