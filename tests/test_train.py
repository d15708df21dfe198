"""train.py: what a run leaves; ranks, micro-batches, stops and restarts change no number."""

import json
import os
import signal
from itertools import count, pairwise, product
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import data
import evaluate
import losses
import model as models
import train
from conftest import ROOT, last, metrics, program, start, tiny_inputs, tiny_model

STEADY = "train.eps=1e-6"  # else Adam blows up rounding noise, the gradient of the keys' biases
LIVELY = ["model.dropout=0.1", "model.drop_path=0.3", "train.ema=true", "data.jitter=[0.5,1.5]"]
TERMS = ("decoder", "token_on_truth", "token_on_teacher")
NO_TEACHER = "train.loss_token_on_teacher=null"  # W_dt is one number for each micro-batch
RANKS = {"toys": [STEADY], "toys-grec": [STEADY, NO_TEACHER, "train.micro_batch=2"]}
FACTORS = list(product((None, 1.0), repeat=3))[1:]  # of the three terms
STOPS = [("backward", 2, 2, 0), ("backward", 3, 3, 0), ("backward", 4, 4, 1), ("answer", 3, 6, 2)]
CHAINS = [
    "refcocog-umd-stage1, refcocog-umd-stage2",
    "pretrain-mixed, refcoco-finetune-mixed, refcoco-distill-mixed",
    "grefcoco-stage1, grefcoco-stage2",
]


@pytest.fixture(scope="module")
def few(toys: Path) -> Path:
    """The folder of `toys` with few rows of each set, and a run that nothing happened to."""
    for name, (split, rows) in product(RANKS, (("train", 22), ("val", 10))):
        lines = (toys / f"data/{name}/{split}.jsonl").read_text().splitlines()[:rows]
        (toys / f"few-{name}-{split}.jsonl").write_text("\n".join(lines))
    (toys / "runs/straight").mkdir(parents=True)
    for name in ("metrics.jsonl", "config.json"):  # without last.pt, --resume writes them anew
        (toys / "runs/straight" / name).write_text('{"split": "train", "step": 1}\n{"spl')
    short(toys, "straight", *LIVELY, "--resume")
    return toys


def short(folder: Path, out: str, *more: str, config: str = "toys", log: int = 1, status=0):
    """`start` with few rows: 2 epochs of 3 steps, each with its row in metrics.jsonl."""
    rows = [f"data.annotations=few-{config}-{{split}}.jsonl", 'data.eval_splits=["val"]']
    with mock.patch.object(train, "LOG_EVERY", log):
        more = [*rows, "train.batch_size=8", *more]
        return start(folder, out, *more, config=config, status=status)


def rows_of(folder: Path, out: str) -> list[dict]:
    """The rows of metrics.jsonl without what a clock says."""
    clock = ("seconds", "data_wait")
    return [{k: v for k, v in row.items() if k not in clock} for row in metrics(folder, out)]


def same(folder: Path, one: str, other: str, rounding: float = 0.0) -> None:
    """Two runs have the same weights and the same losses, gradient norms, rates and accuracies."""
    a, b = last(folder, one), last(folder, other)
    assert a["step"] == b["step"] > 0
    for part in ("model", "ema"):
        torch.testing.assert_close(a[part], b[part], atol=rounding, rtol=0)
    for row, theirs in zip(rows_of(folder, one), rows_of(folder, other), strict=True):
        assert row.pop("split") == theirs.pop("split")
        assert row.pop("weights", "") == theirs.pop("weights", "")
        # above all grad_norm, since clipping and Adam hide a factor on the whole gradient
        assert row == pytest.approx(theirs, abs=2 * rounding, rel=100 * rounding)


def watched(module, name: str, look):
    """Inside, `look` gets the arguments of each call of a module's function before it does."""
    usual = getattr(module, name)
    return mock.patch.object(module, name, lambda *a, **more: (look(*a), usual(*a, **more))[1])


def stopped(folder: Path, out: str, *more: str, at=("backward", 2), by=signal.SIGTERM):
    """A short run that sends itself a signal before the given call, counted from 1."""
    numbers, module = count(1), train if at[0] == "backward" else evaluate
    with watched(module, at[0], lambda *_: next(numbers) == at[1] and os.kill(os.getpid(), by)):
        return short(folder, out, *more, status=128 + by)


def test_a_training_row_holds_means_of_the_steps_since_the_last_row(few, monkeypatch):
    seen, usual = [], train.backward
    monkeypatch.setattr(train, "backward", lambda *a: seen.append(usual(*a)) or dict(seen[-1]))
    short(few, "rows", "train.lr_encoder=3e-5", log=2)
    rows = [row for row in metrics(few, "rows") if row["split"] == "train"]
    others = {"split", "epoch", "step", "grad_norm", "lr", "lr_encoder", "peak_memory_gb"}
    for i, row in enumerate(rows):
        assert row.keys() == seen[0].keys() | others | {"seconds", "data_wait"}
        for name in (*TERMS, "teacher_weight", "total"):
            mean = float(seen[2 * i][name] + seen[2 * i + 1][name]) / 2
            assert row[name] == pytest.approx(mean, abs=2e-6)
        assert row["total"] == pytest.approx(sum(row[name] for name in TERMS), abs=1e-5)
        assert row["grad_norm"] > 0 and row["seconds"] >= row["data_wait"] > 0
    # epochs and steps count from 1; the rates are those of the schedule, 1/2 in the warm-up
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 2), (2, 4), (2, 6)]
    assert [row["lr"] for row in rows] == pytest.approx([2.5e-4, 5e-4, 5e-4 / 3])
    assert [row["lr_encoder"] for row in rows] == pytest.approx([1.5e-5, 3e-5, 1e-5])


def test_a_run_leaves_its_best_epoch_and_final_rows_of_it(few, monkeypatch):
    figures = iter([{"decoder_acc": v, "token_acc": v + 0.1} for v in (0.2, 0.6, 0.6, 0.6, 0.5)])
    monkeypatch.setattr(evaluate, "summary", lambda *_: next(figures))
    more = ["train.epochs=7", "train.evaluate_every=2", "train.evaluate_from=3"]
    short(few, "best", *more, "train.batch_size=22", 'data.eval_splits=["val", "train"]')
    names = {"config.json", "metrics.jsonl", "last.pt", "best.pt", "samples.png"}
    assert {path.name for path in (few / "runs/best").iterdir()} == names
    best, end = last(few, "best", "best.pt"), last(few, "best")
    assert (best["epoch"], best["step"], best["branch"]) == (6, 6, "both")
    assert best["accuracy"] == end["best"] == pytest.approx(0.65)
    assert best["tokenizer"] == data.Tokenizer(few / "data/toys/toys.spm").digest
    config = json.loads((few / "runs/best/config.json").read_text())
    assert config == json.loads(json.dumps(best["config"])) and config["train"]["epochs"] == 7
    rows = [list(row.values())[:4] for row in rows_of(few, "best") if "weights" in row]
    lasts = [["val", "last", epoch, epoch] for epoch in (4, 6, 7)]  # one step each
    assert rows == [*lasts, ["val", "best", 6, 6], ["train", "best", 6, 6]]


def test_every_step_trains_with_dropout_drawn_anew_and_on_the_data_of_the_config(few):
    seeds = []

    def look(model, parts, config, branch, amp, scaler):
        seeds.append(torch.initial_seed())
        assert all(module.training for module in model.modules())  # also behind an evaluation
        assert [len(part.images) for part in parts] == [2] * 4 and branch == "both"
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        assert not norms or torch.stack(norms).norm() < 0.0101  # of the clipped gradient

    with (
        watched(train, "backward", look),
        mock.patch.object(data, "Dataset", wraps=data.Dataset) as sets,
        mock.patch.object(data, "MicroBatchSampler", wraps=data.MicroBatchSampler) as sampler,
    ):
        more = ["train.seed=7", "train.micro_batch=3", "train.clip_norm=0.01"]
        short(few, "wired", *LIVELY, "train.ema=false", *more)
    assert len(set(seeds)) == len(seeds) == 6
    # without jitter, thrice an evaluation
    assert [call.args[1:] for call in sets.call_args_list] == [(32, 7, (0.5, 1.5)), *[(32,)] * 3]
    sampler.assert_called_once_with(22, 8, 2, 7, range(6), 0, 1)  # 2 is below 3 and divides 8


def test_the_average_is_evaluated_and_kept_while_the_trained_weights_go_on(few):
    name, weights, evaluated, averages = "token_branch.mlp.weight", [], [], []
    more = ["train.lr=0.01", "train.ema_decay=0.3"]

    def note(seen: list):
        return lambda model, *_: seen.append(model.state_dict()[name].clone())

    with watched(train, "backward", note(weights)):
        with watched(evaluate, "evaluate_examples", note(evaluated)):
            short(few, "averaged", "train.ema=true", *more)
    short(few, "plain", *more)
    end, best = last(few, "averaged"), last(few, "averaged", "best.pt")
    torch.testing.assert_close(end["model"], last(few, "plain")["model"], atol=0, rtol=0)
    average = weights[0]
    for step, weight in enumerate([*weights[1:], end["model"][name]], 1):
        average = torch.lerp(weight, average, min(0.3, step / (step + 9)))
        averages.append(average)
    of_best = averages[best["step"] - 1]
    found = [*evaluated, end["ema"][name], best["model"][name]]
    wanted = [averages[2], averages[5], of_best, averages[5], of_best]
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    assert (averages[5] - end["model"][name]).abs().max() > 1e-3


def test_a_frozen_encoder_keeps_its_weights_without_drop_path_gradients_or_moments(few):
    def look(model, parts, *_):
        inputs = (parts[0].images.float(), parts[0].tokens, parts[0].text_pad)
        for one, other in zip(model.encoder(*inputs), model.encoder(*inputs), strict=True):
            assert torch.equal(one, other) and not one.requires_grad  # no drop path
        assert all(p.grad is None for p in model.encoder.parameters())

    more = [*LIVELY, "train.freeze_encoder=true", "--init", "runs/straight/best.pt"]
    with watched(train, "backward", look):
        short(few, "frozen", *more)
    ours, theirs = last(few, "frozen"), last(few, "straight", "best.pt")["model"]
    for part in ("model", "ema"):
        changed = {name for name in theirs if not torch.equal(ours[part][name], theirs[name])}
        assert {"tqg.query_embed.weight", "token_branch.mlp.weight"} < changed
        assert not any(name.startswith("encoder.") for name in changed)
    assert ours["optimizer"]["param_groups"][0]["params"] == []
    stopped(few, "refrozen", *more)
    short(few, "refrozen", *LIVELY, "train.freeze_encoder=true", "--resume")
    same(few, "frozen", "refrozen")


def test_a_step_divides_its_micro_batches_by_the_counts_of_all_and_passes_the_config_on():
    model, parts = tiny_model(queries=3), []
    for counts in ([3, 2, 1], [0, 0, 1]):
        mask = torch.arange(3) < torch.tensor(counts)[:, None]
        boxes = torch.rand(3, 3, 4) / 2 + 0.2
        parts.append(data.Batch(*tiny_inputs(seed=counts[1]), boxes, mask, torch.ones(3, 2), [0]))
    factors = dict(zip(TERMS, (0.5, 3.0, 0.7), strict=True))
    config = train.TrainConfig(no_object_weight=0.8, **{f"loss_{k}": v for k, v in factors.items()})
    for _ in range(2):  # twice, because gradients must not pile up
        found = train.backward(model, parts, config, "both", None, torch.amp.GradScaler("cpu", 1.0))
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    options = {"no_object": 0.8, "by": losses.Divisors(torch.tensor(7.0), torch.tensor(15.8))}
    wanted = dict.fromkeys(found, 0.0)
    for part in parts:
        output = model(part.images, part.tokens, part.text_pad)
        terms = losses.simvg_loss(output, part.boxes, part.box_mask, **factors, **options)
        terms["total"].backward()
        for name, value in terms.items():
            wanted[name] += value.item() / (2 if name == "teacher_weight" else 1)
    assert {name: value.item() for name, value in found.items()} == pytest.approx(wanted)
    theirs = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(gradients, theirs, atol=1e-6, rtol=1e-5)


def test_micro_batches_give_the_losses_gradients_and_weights_of_the_whole_batch(few):
    for size in (8, 2):
        more = [STEADY, NO_TEACHER, f"train.micro_batch={size}"]
        short(few, f"micro-{size}", *more, config="toys-grec")
    same(few, "micro-8", "micro-2", 1e-6)


def test_a_loss_scaler_changes_no_gradient_norm_and_no_weight(few, monkeypatch):
    scaler = torch.amp.GradScaler("cpu", 1024.0)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: scaler)
    short(few, "scaled", *LIVELY)
    assert last(few, "scaled")["scaler"]["scale"] == 1024 and not last(few, "straight")["scaler"]
    same(few, "straight", "scaled", 1e-6)


def test_gradient_checkpointing_changes_no_weight_by_a_bit_nor_does_it_in_16_bits(few):
    again, bf16 = "train.checkpointing=true", "train.amp=bf16"
    for out, more in {"again": [again], "bf16": [bf16], "both": [again, bf16]}.items():
        short(few, out, *LIVELY, *more)
    same(few, "straight", "again")
    same(few, "bf16", "both")
    weights, plain = last(few, "both")["model"], last(few, "again")["model"]
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert not all(torch.equal(weights[name], plain[name]) for name in plain)


def test_the_scale_of_16_bit_losses_is_kept(few):
    more = [*LIVELY, "train.amp=fp16"]
    short(few, "halves", *more)
    stopped(few, "broken-halves", *more, at=("backward", 5))
    assert last(few, "broken-halves")["scaler"]["_growth_tracker"] > 0
    short(few, "broken-halves", *more, "--resume")
    same(few, "halves", "broken-halves")
    assert last(few, "halves")["scaler"] == last(few, "broken-halves")["scaler"]


def as_rank(folder: Path) -> None:
    """Many runs in one pair of processes, because starting a pair for each would take minutes."""
    rank, numbers, join = int(os.environ["RANK"]), count(1), dist.init_process_group
    store = dist.TCPStore("localhost", int(os.environ["MASTER_PORT"]), is_master=False)

    def run(out: str, *more: str, **options) -> None:
        # its own place in torchrun's store, as if torchrun had started it
        own = {"store": dist.PrefixStore(f"{out}{more}", store), "rank": rank, "world_size": 2}
        dist.init_process_group = lambda backend: join(backend, **own)
        assert "Warning" not in short(folder, out, *more, **options).err

    def look(*_):
        (folder / f"seed{rank}").write_text(f"{torch.initial_seed()}")
        if next(numbers) == 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with watched(train, "backward", look):
        run("stopped", STEADY, status=143 if rank else 1)
        run("stopped", STEADY, "--resume")
    run("from-one-to-two", STEADY, "--resume")
    for config, more in RANKS.items():
        run(f"two-{config}", *more, config=config)
    for i, factors in enumerate(FACTORS):
        more = [f"train.loss_{k}={json.dumps(v)}" for k, v in zip(TERMS, factors, strict=True)]
        run(f"choice{i}", *more, "train.epochs=1", config="toys-grec")
        more += ["train.freeze_encoder=true", "--init", "runs/two-toys-grec/best.pt"]
        run(f"choice{i}-frozen", *more, "train.epochs=1", config="toys-grec")


@pytest.fixture(scope="module")
def pair(few: Path) -> None:
    stopped(few, "from-one-to-two", STEADY)
    with mock.patch.dict(os.environ, PYTHONPATH=str(ROOT)):
        done = program("tests/test_train.py", cwd=few, ranks=2)
    assert done.status == 0, done.err


@pytest.mark.parametrize("config", RANKS)
def test_two_ranks_give_the_losses_gradients_and_weights_of_one(config, few, pair):
    short(few, f"one-{config}", *RANKS[config], config=config)
    same(few, f"one-{config}", f"two-{config}", 1e-6)


def test_a_run_of_one_rank_goes_on_with_two_on_the_same_data_and_rates(few, pair):
    """mmdetection#3800"""
    short(few, "one-rank", STEADY)
    same(few, "one-rank", "from-one-to-two", 1e-6)


def test_a_signal_to_one_rank_stops_both_and_they_go_on_to_the_same_bits(few, pair):
    same(few, "two-toys", "stopped")
    assert (few / "seed0").read_text() != (few / "seed1").read_text()  # that of dropout


def test_every_choice_of_loss_terms_trains_on_two_ranks_and_with_a_frozen_encoder(few, pair):
    for i, suffix in product(range(len(FACTORS)), ("", "-frozen")):
        *rows, _, figures = rows_of(few, f"choice{i}{suffix}")
        assert len(rows) == 3 and all(0 < row["grad_norm"] < 1e4 for row in rows)
        decoder, on_truth, on_teacher = (factor is not None for factor in FACTORS[i])
        assert ("decoder_f1" in figures) == (decoder or on_teacher)
        assert ("token_f1" in figures) == (on_truth or on_teacher)


@pytest.mark.parametrize(("name", "call", "step", "evaluated"), STOPS)
def test_a_stopped_run_goes_on_to_the_same_bits_and_rows(name, call, step, evaluated, few):
    out = f"stopped-at-{name}{call}"
    done = stopped(few, out, *LIVELY, at=(name, call), by=signal.SIGINT)
    assert f"stopped after step {step}; the same command with --resume" in done.err
    assert (last(few, out)["step"], last(few, out)["evaluated"]) == (step, evaluated)
    # as if it had been killed later: rows behind the checkpoint, and half a row
    path = few / f"runs/{out}/metrics.jsonl"
    path.write_text((few / "runs/straight/metrics.jsonl").read_text() + '{"split": "tr')
    short(few, out, *LIVELY, "--resume")
    same(few, "straight", out)


def test_a_full_disk_ends_the_run_but_leaves_the_checkpoint_before(few):
    def look(path, state):
        if path.name == "last.pt" and state["step"] > 3:
            raise OSError(28, "No space left on device")

    with watched(models, "save", look), pytest.raises(OSError, match="No space left on device"):
        short(few, "full", *LIVELY, "train.save_minutes=0")  # saves behind each step
    assert last(few, "full")["step"] == 3  # the old file stays
    short(few, "full", *LIVELY, "--resume")
    same(few, "straight", "full")


def test_resume_takes_moved_files_and_what_changes_no_number(few):
    stopped(few, "moved", *LIVELY)
    written = (few / "runs/moved/config.json").read_bytes()
    (few / "elsewhere").symlink_to(few)
    more = ["data.annotations=elsewhere/few-toys-{split}.jsonl", "train.checkpointing=true"]
    more += ["data.images=elsewhere/data/toys/images", "data.workers=1", "train.save_minutes=0"]
    more += ["data.tokenizer=elsewhere/data/toys/toys.spm", "--resume"]
    short(few, "moved", *LIVELY, *more)
    same(few, "straight", "moved")
    assert (few / "runs/moved/config.json").read_bytes() == written
    short(few, "moved", *LIVELY, "train.micro_batch=4", "train.amp=fp16", "--resume")


def test_a_run_from_released_weights_computes_as_released_to_its_end(few, tmp_path):
    model, init = tiny_model(as_released=True), tmp_path / "released.pt"
    config = {"model": vars(model.config), "data": {"max_tokens": 10}}
    models.save(init, {"model": model.state_dict(), "branch": "both", "config": config})
    stopped(few, "released", "--init", f"{init}")
    init.unlink()  # --resume neither needs nor reads it
    short(few, "released", "--resume")
    assert models.load(few / "runs/released/best.pt").config.as_released


@pytest.mark.parametrize(("where", "config"), [("images", "toys"), ("boxes", "toys-grec")])
def test_a_step_that_is_not_finite_is_skipped_and_its_rows_are_named(where, config, few):
    numbers, names = count(1), []

    def look(model, parts, *_):
        if next(numbers) == 4:
            broken = getattr(parts[0], where).float()
            broken[1] = torch.nan
            parts[0] = parts[0]._replace(**{where: broken})
            names.extend(f"few-{config}-train.jsonl:{row + 1}" for row in parts[0].index)

    with watched(train, "backward", look):
        done = short(few, f"nan-{config}", "train.ema=true", config=config)
    message = f"step 4 skipped, its gradient is not finite; {', '.join(names)}"
    assert [line for line in done.err.splitlines() if "skipped" in line] == [message]
    state, rows = last(few, f"nan-{config}"), rows_of(few, f"nan-{config}")
    assert all(x.isfinite().all() for part in ("model", "ema") for x in state[part].values())
    assert [row["step"] for row in rows if "lr" in row] == [1, 2, 3, 5, 6]


def test_a_picture_that_breaks_during_training_is_named_and_costs_no_step(few):
    (_, row), *_ = next(iter(data.MicroBatchSampler(22, 8, 8, 6666, range(1, 2), 0, 1)))
    line = (few / "few-toys-train.jsonl").read_text().splitlines()[row]
    path = few / "data/toys/images" / json.loads(line)["image"]
    whole = path.read_bytes()
    with watched(train, "backward", lambda *_: path.write_bytes(whole[:-200])):  # in step 1
        done = short(few, "picture", *LIVELY, status=2)
    path.write_bytes(whole)
    assert f"train.py: few-toys-train.jsonl:{row + 1}: cannot read the image" in done.err
    assert last(few, "picture")["step"] == 1
    short(few, "picture", *LIVELY, "--resume")
    same(few, "straight", "picture")


@pytest.mark.parametrize("names", CHAINS)
def test_the_regimes_of_the_paper_are_chains_of_commands(names, few):
    """Each recipe as it is but for sizes and paths; the pre-training at a smaller image size."""
    chain, name = names.split(", "), "toys-grec" if "grefcoco" in names else "toys"
    more = [f"data.annotations=few-{name}-{{split}}.jsonl", f"data.images=data/{name}/images"]
    more += ["data.tokenizer=data/toys/toys.spm", "data.workers=0", "train.micro_batch=4"]
    for init, recipe in pairwise(["", *chain]):
        own = [] if init else ["train.init="]  # else the recipe names the step before
        own += ["model.image_size=24"] if "pretrain" in recipe else []
        done = short(few, recipe, *more, *own, config=recipe)
        assert ("SimVG, " in done.err and "tensors taken" in done.err) == bool(init)
        branch = "both" if init and "finetune" not in recipe else "decoder"
        assert last(few, recipe, "best.pt")["branch"] == branch


def test_a_small_model_learns_a_few_expressions_by_heart(few):
    lines = (few / "few-toys-train.jsonl").read_text().splitlines()[:4]
    rows = [row | {"expressions": row["expressions"][:1]} for row in map(json.loads, lines)]
    (few / "heart-train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    more = ["data.annotations=heart-{split}.jsonl", 'data.eval_splits=["train"]']
    more += ["model.encoder_layers=1", "model.decoder_layers=1", "train.evaluate_from=300"]
    more += ["train.lr=3e-3", "train.lr_encoder=3e-3", "train.epochs=300", "train.batch_size=4"]
    short(few, "heart", *more)
    found = metrics(few, "heart")[-1]
    assert (found["n"], found["decoder_acc"], found["token_acc"]) == (4, 1.0, 1.0)


if __name__ == "__main__":
    as_rank(Path.cwd())
