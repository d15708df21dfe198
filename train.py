"""Train SimVG in one process, or under torchrun in one process (rank) per GPU.

    python train.py --config configs.json:shapes
    torchrun --nproc_per_node 8 train.py --config configs.json:refcoco --init beit3_base_patch16_224.pth

A run writes config.json, metrics.jsonl, last.pt (for --resume), best.pt, curves.png and samples.png. On one CPU process
a resumed run is the same to the bit, because random choices depend on (seed, epoch, step) alone. Keys of `train`:

    seed                  of initial weights, row order, choice of expressions, jitter, dropout and wrong boxes
    epochs                passes over the rows of the training split; a pass takes one expression of each row
    batch_size            examples per optimiser step, of all ranks together
    micro_batch           most examples that a rank computes at once; a step accumulates the gradients of several
    lr, lr_encoder        learning rates of the heads and of the pre-trained encoder, after the warm-up
    freeze_encoder        train the heads alone: the encoder keeps its weights, without gradients and without drop path
    betas, eps, amsgrad, weight_decay    arguments of torch.optim.Adam
    clip_norm             a gradient with a larger L2 norm, over all weights, is scaled down to this one
    warmup_epochs         linear warm-up in stairs: epoch e (1, 2, ...) has the rates times e / (warmup_epochs + 1)
    decay_epochs, decay_factor    from each of these epochs on, the rates are times the factor; null: linear fall to 0
    ema, ema_decay        whether to evaluate and keep averaged weights; the part of the average that a step keeps
    loss_decoder, loss_token_on_truth, loss_token_on_teacher    factors of the loss terms (losses.py); null: left out
    no_object_weight      weight of the class "no object" in the cross entropy
    amp                   precision of the encoder: "" (float32), "bf16" or "fp16"; the heads stay in float32
    checkpointing         save memory: recompute each encoder layer in the backward pass (activation checkpointing)
    compile               compile the encoder's layers with torch.compile
    evaluate_every, evaluate_from    evaluate data.eval_splits[0] every so many epochs, from this one on, and at the end
    save_minutes          minutes between two saves of last.pt within an epoch; one more comes after every epoch
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import evaluate
import losses
import model as models
from data import InputError

LOG_EVERY = 20  # steps between two training rows of metrics.jsonl
PATIENCE = 20  # the run ends after so many steps in a row whose gradient is not finite
LESS_MEMORY = "lower train.micro_batch, or set train.checkpointing=true or train.amp=bf16"


@dataclass
class TrainState:
    """Everything that one rank of a run works with."""

    config: dict
    out: Path  # the run's folder
    rank: int
    world: int
    model: models.SimVG  # this one is evaluated and saved
    wrapped: nn.Module  # the same model, inside DDP if there are several ranks: this one is trained
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # scales the loss in fp16, otherwise does nothing
    branch: str  # "both", "decoder" or "token": what the loss terms need
    amp: torch.dtype | None
    ema: dict[str, Tensor] = field(default_factory=dict)  # averaged weights; empty without train.ema
    rows: Sequence[data.Row] = ()  # of the training split
    splits: dict[str, data.Dataset] = field(default_factory=dict)  # those to evaluate
    collate: data.Collate | None = None
    micro: int = 1  # examples that this rank computes at once
    digests: dict[str, str] = field(default_factory=dict)  # of "rows" and "tokenizer"; checkpoints name theirs
    # Epochs done, steps done in the current epoch and in all, steps skipped, the best accuracy: saved in checkpoints.
    progress: dict = field(default_factory=lambda: dict(epoch=0, step_in_epoch=0, step=0, skipped=0, best=-1.0))
    skipped_in_a_row: int = 0
    saved_at: float = field(default_factory=time.monotonic)  # when last.pt was written
    signals: list[int] = field(default_factory=list)  # received so far
    lock: object = None  # config.json, open and locked while this process lives
    recent: list[tuple] = field(default_factory=list)  # what `log_step` got since the last training row
    report_from: int = 0  # the step from which on it reports on stderr again
    lines: list[str] = field(default_factory=list)  # of metrics.jsonl, which checkpoints hold, too


def main() -> None:
    # 1. Read and check all input, build the model, take the folder.
    state = set_up(parse_arguments())
    config, settings, progress = state.config, state.config["train"], state.progress
    rank, world, device = state.rank, state.world, state.model.device
    # 2. The stream of micro-batches, from the first step still to do. Each rank gets its share of every step.
    train_set = data.Dataset(state.rows, config["model"]["image_size"], settings["seed"], config["data"]["jitter"])
    start = progress["epoch"], progress["step_in_epoch"]
    sampler = data.MicroBatchSampler(len(state.rows), settings, state.micro, start, rank, world)
    stream = data.batches(train_set, state.collate, sampler, config["data"]["workers"], pin=device.type == "cuda")
    per_step = settings["batch_size"] // world // state.micro  # micro-batches
    # 3. From now on a signal only leaves a mark, which is looked at between steps and evaluation batches.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: state.signals.append(received))
    if rank == 0:
        note = f", label noise {config['data']['label_noise']}" if config["data"]["label_noise"] else ""
        print(f"{state.out}: {world} rank(s) on {device.type}, micro-batches of {state.micro}{note}", file=sys.stderr)

    # 4. The loop.
    for epoch in range(progress["epoch"], settings["epochs"]):
        state.model.train()
        steps = range(progress["step_in_epoch"], sampler.steps)
        for step in tqdm(steps, f"epoch {epoch + 1}", disable=rank > 0 or None):  # None: no bar in a file
            began = time.monotonic()
            micro_batches = next_micro_batches(state, stream, per_step)  # or the end, after a signal
            waited = time.monotonic() - began
            set_learning_rate(state.optimizer, settings, epoch + step / sampler.steps)
            torch.manual_seed(hash((settings["seed"], progress["step"], rank)))  # dropout, drop path
            try:
                terms = train_step(state, micro_batches)
            except RuntimeError as error:
                if "allocate" not in str(error):  # what torch says when a GPU or the host has no memory left
                    raise
                raise InputError(f"out of memory with {state.micro} examples at a time: {LESS_MEMORY}") from None
            progress.update(step_in_epoch=step + 1, step=progress["step"] + 1)  # counts skipped steps, too
            update_ema(state.ema, state.model, settings["ema_decay"], progress["step"])
            if terms["grad_norm"].isfinite():  # waits for the device; in REC, only log_step does so again
                state.skipped_in_a_row = 0
                log_step(state, terms, waited, time.monotonic() - began, settings["epochs"] * sampler.steps)
            else:
                report_skipped(state, terms, micro_batches)
            if time.monotonic() - state.saved_at > 60 * settings["save_minutes"] and not state.skipped_in_a_row:
                save(state, "last.pt")
        save(state, "last.pt")  # before the evaluation, which may fail, and which a resumed run repeats
        progress.update(epoch=epoch + 1, step_in_epoch=0)
        regular = epoch + 1 >= settings["evaluate_from"] and (epoch + 1) % settings["evaluate_every"] == 0
        if regular or epoch + 1 == settings["epochs"]:
            validate(state)

    # 5. Evaluate the best weights on every split.
    evaluate.wait_for_all()  # until rank 0 has written best.pt
    report_best(state)
    del state.wrapped  # DDP, which holds the process group
    evaluate.wait_for_all(leave=True)


def train_step(state: TrainState, micro_batches: list[data.Batch]) -> dict[str, Tensor]:
    """One optimiser step. Returns scalars: the loss terms, summed over this rank's micro-batches, and `grad_norm`, the
    norm over all ranks before clipping. If that is not finite, no weight changes."""
    settings, optimizer, scaler = state.config["train"], state.optimizer, state.scaler
    factors = {name: settings[f"loss_{name}"] for name in ("decoder", "token_on_truth", "token_on_teacher")}
    queries, no_object = state.model.tqg.query_embed.num_embeddings, settings["no_object_weight"]
    # The loss of each micro-batch is divided by counts of the whole step on all ranks (D6), so count first.
    norm = losses.step_normalisers(sum(losses.count_targets(b.box_mask, queries, no_object) for b in micro_batches))
    optimizer.zero_grad(set_to_none=True)
    sums: dict[str, Tensor] = {}
    for i, batch in enumerate(micro_batches):
        # Gradients add up over the micro-batches. DDP averages them over the ranks only once, with the last one.
        state.wrapped.require_backward_grad_sync = i == len(micro_batches) - 1
        output = state.wrapped(batch.images, batch.tokens, batch.text_pad, state.branch, state.amp)
        terms = losses.simvg_loss(output, batch.boxes, batch.box_mask, **factors, no_object=no_object, norm=norm)
        scaler.scale(terms["total"]).backward()
        for name, value in terms.items():
            share = len(micro_batches) if name == "teacher_weight" else 1  # W_dt is a weight: its mean is reported
            sums[name] = sums.get(name, 0) + value.detach() / share
    scaler.unscale_(optimizer)  # clip_norm is meant for the gradients as they are
    sums["grad_norm"] = nn.utils.clip_grad_norm_(state.model.parameters(), settings["clip_norm"])
    # Where found_inf is 1, fused Adam skips the step without a wait of the host. In fp16 the GradScaler sees to that.
    if not scaler.is_enabled():
        optimizer.found_inf = (~sums["grad_norm"].isfinite()).float()
    scaler.step(optimizer)
    scaler.update()
    return sums


def make_optimizer(model: models.SimVG, settings: dict) -> torch.optim.Optimizer:
    """Adam with two groups of parameters, because the pre-trained encoder has a learning rate of its own."""
    named = [(name.startswith("encoder."), p) for name, p in model.named_parameters() if p.requires_grad]
    encoder, heads = ([p for in_encoder, p in named if in_encoder == wanted] for wanted in (True, False))
    groups = [{"params": encoder, "lr": settings["lr_encoder"]}, {"params": heads, "lr": settings["lr"]}]
    options = {name: settings[name] for name in ("betas", "eps", "weight_decay", "amsgrad")}
    return torch.optim.Adam(groups, fused=True, **options)


def lr_factor(epoch: float, warmup_epochs: float, decay_epochs: list | None, decay_factor: float, epochs: int) -> float:
    """What the learning rates are multiplied by. Epoch 1.5 is the middle of the second epoch."""
    if int(epoch) < warmup_epochs:
        return (int(epoch) + 1) / (warmup_epochs + 1)
    if decay_epochs is None:
        return (epochs - epoch) / (epochs - warmup_epochs)
    return decay_factor ** sum(int(epoch) + 1 >= decay for decay in decay_epochs)  # as in the official code


def set_learning_rate(optimizer: torch.optim.Optimizer, settings: dict, epoch: float) -> None:
    factor = lr_factor(epoch, *(settings[key] for key in ("warmup_epochs", "decay_epochs", "decay_factor", "epochs")))
    for group, key in zip(optimizer.param_groups, ("lr_encoder", "lr"), strict=True):
        group["lr"] = settings[key] * factor


@torch.no_grad()
def update_ema(ema: dict[str, Tensor], model: nn.Module, decay: float, step: int) -> None:
    """Move the averaged weights, if there are any, after `step` (counted from 1) steps."""
    if ema:
        decay = min(decay, step / (step + 9))  # a young average forgets faster, because it began with untrained weights
        torch._foreach_lerp_(list(ema.values()), [p for p in model.parameters() if p.requires_grad], 1 - decay)


def validate(state: TrainState) -> None:
    """Evaluate the first split, with the averaged weights if there are any, and keep the best weights as best.pt."""
    trained = {name: p.detach().clone() for name, p in state.model.named_parameters() if name in state.ema}
    state.model.load_state_dict(state.ema, strict=False)
    metrics, _ = evaluate_split(state, state.model, next(iter(state.splits)))
    # As in the official code, the mean of the trained branches' accuracies decides which weights are the best.
    accuracies = [value for name, value in metrics.items() if name.endswith(("_acc", "_f1"))]
    value = sum(accuracies) / len(accuracies)
    # The model holds the averages here, so best.pt needs them no second time.
    if value > state.progress["best"] and save(state, "best.pt", ema={}, best=value):
        state.progress["best"] = value
    state.model.load_state_dict(trained, strict=False)


def report_best(state: TrainState) -> None:
    """Evaluate best.pt on every split. Draw the curves of the run and the first answers of the last split."""
    model = models.load(state.out / "best.pt", state.model.device)
    for split in state.splits:
        _, results = evaluate_split(state, model, split, weights="best")
    if state.rank == 0:
        pairs = zip(state.splits[split].examples[:16], results[:16], strict=True)
        pictures = [evaluate.draw_line(data.read_image(e.image, e.size, e.where), line) for e, line in pairs]
        data.tile(pictures, state.out / "samples.png", columns=4)
        evaluate.draw_curves([state.out], state.out / "curves.png")
        print(f"weights: {state.out}/best.pt   pictures: {state.out}/samples.png {state.out}/curves.png")


def evaluate_split(state: TrainState, model: models.SimVG, split: str, weights: str = "last") -> tuple[dict, list]:
    """The metrics of a split, also as a printed table and as a row of metrics.jsonl, and its results."""
    dataset, rec, progress = state.splits[split], state.config["model"]["queries"] == 1, state.progress
    options = {"workers": state.config["data"]["workers"], "amp": state.amp, "title": split}
    options["after_batch"] = lambda: stop_after_signal(state)
    results = evaluate.evaluate_dataset(model, dataset, state.collate, state.branch, **options)
    metrics = evaluate.summary(results, dataset.examples, grec=not rec)
    row = {"split": split, "weights": weights, "epoch": progress["epoch"], "step": progress["step"]}
    write_row(state, row | {name: round(value, 6) for name, value in metrics.items()})
    if state.rank == 0:
        groups, first = evaluate.by_kind(results, dataset.examples), [examples[0] for examples in state.rows]
        mean_box = evaluate.mean_box_accuracy(first, dataset.examples) if rec else None
        evaluate.print_table(f"{split} ({weights})", metrics, groups, mean_box)
    return metrics, results


def log_step(state: TrainState, terms: dict[str, Tensor], waited: float, seconds: float, steps: int) -> None:
    """Keep the terms of a step and the seconds that it took and `waited` for data; every LOG_EVERY steps, write the
    means. At first, and then after every 25 rows, say how long all the `steps` of the run take."""
    progress, recent = state.progress, state.recent
    recent.append((terms, waited, seconds))
    if progress["step"] % LOG_EVERY:
        return
    sums = torch.stack([sum(each[name] for each, _, _ in recent).float() for name in terms])
    means = losses.global_sum(sums) / len(recent) / state.world  # on every rank, although only rank 0 writes them
    waits, times = sum(each for _, each, _ in recent), sum(each for _, _, each in recent)
    row = {"split": "train", "epoch": progress["epoch"] + 1, "step": progress["step"], "skipped": progress["skipped"]}
    row |= {name: round(value, 6) for name, value in zip(terms, means.tolist(), strict=True)}
    row |= {"lr_encoder": state.optimizer.param_groups[0]["lr"], "lr": state.optimizer.param_groups[1]["lr"]}
    row |= {"samples_per_s": round(len(recent) * state.config["train"]["batch_size"] / times, 1)}
    row |= {"data_wait": round(waits / times, 4), "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)}
    write_row(state, row)
    if progress["step"] >= state.report_from and len(recent) > LOG_EVERY // 2 and state.rank == 0:
        state.report_from = progress["step"] + 25 * LOG_EVERY
        median = sorted(each for _, _, each in recent)[len(recent) // 2]  # the first step takes much longer
        took = f"a step takes {median:.3g} s, all {steps:,} about {steps * median / 60:,.1f} min without evaluations"
        tqdm.write(f"step {progress['step']}: loss {row['total']:.3f}; {took}", file=sys.stderr)
    recent.clear()


def write_row(state: TrainState, row: dict) -> None:
    """Append a row to metrics.jsonl, on rank 0. A full disk costs the row, not the run."""
    state.lines.append(json.dumps(row) + "\n")
    if state.rank:
        return
    path = state.out / "metrics.jsonl"
    end = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a") as file:
            file.write(state.lines[-1])
    except OSError as error:
        tqdm.write(f"train.py: {path}: {error.strerror}", file=sys.stderr)
        with suppress(OSError):
            os.truncate(path, end)  # take half a line back, or the next row would continue it


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train SimVG by a recipe of configs.json; under torchrun on each GPU.")
    parser.add_argument("--config", required=True, metavar="FILE:NAME", help="such as configs.json:refcoco")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="as train.lr=1e-4")
    parser.add_argument("--out", metavar="FOLDER", help="the run's folder (default: runs/NAME)")
    parser.add_argument("--init", metavar="FILE", help="start from BEiT-3, SimVG or official SimVG weights")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    return parser.parse_args()


def set_up(args: argparse.Namespace) -> TrainState:
    """Read and check all input, then build the state: a new one, with the weights of --init, or that of last.pt."""
    config = data.load_config(args.config, args.set)
    rank, world, device = evaluate.join_ranks()
    if config["train"]["freeze_encoder"] and not (args.init or args.resume):
        raise InputError("train.freeze_encoder=true: name weights with --init, or the encoder keeps its random ones")
    micro = micro_batch(config["train"]["batch_size"], config["train"]["micro_batch"], world)
    out = Path(args.out or f"runs/{args.config.rpartition(':')[2]}")
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # torchrun --max-restarts repeats the command
    saved = read_saved(out, config, args.resume or restarted)
    if rank == 0:
        data.make_embedded_set(config["data"])
    evaluate.wait_for_all()
    # Every rank reads all annotations. Rank 0 alone looks whether the images are there.
    rows = data.read_rows(config["data"], "train")
    if rank == 0:
        data.check_files(rows)
    rows = data.with_wrong_boxes(rows, config["data"]["label_noise"], config["train"]["seed"])
    splits = {split: evaluate.load_split(config, split) for split in config["data"]["eval_splits"]}
    digest = data.fingerprint([rows, *(split.rows for split in splits.values())])
    mine = config["train"], digest, saved and saved.get("step")
    everyone = [mine] * world
    if world > 1:
        dist.all_gather_object(everyone, mine)
    if any(other != mine for other in everyone):
        evaluate.wait_for_all(leave=True)  # a rank whose peer just vanishes may be aborted before it can say why
        raise InputError("the ranks differ in their rows, last.pt or section train: all must read the same files")
    state = build(config, out, rank, world, device)
    state.micro, state.rows, state.splits, state.digests["rows"] = micro, rows, splits, digest
    if saved:
        restore(state, saved)
    elif args.init:
        report = models.initialise(state.model, args.init)
        config["model"]["as_released"] = state.model.tqg.as_released  # a file may ask for the released arithmetic
        if rank == 0:
            print(report)
    state.collate = evaluate.load_collate(config, state.model)  # after the weights, which know their tokenizer
    state.digests["tokenizer"] = state.collate.tokenizer.digest
    if config["train"]["ema"] and not state.ema:
        state.ema |= {name: p.detach().clone() for name, p in state.model.named_parameters() if p.requires_grad}
    if rank == 0:
        # From here on the folder holds a run. Its config.json stays locked while this process lives.
        out.mkdir(parents=True, exist_ok=True)
        state.lock = open(out / "config.json", "a")
        with suppress(ImportError, OSError):  # Windows and some file systems have no such locks
            import fcntl

            try:
                fcntl.lockf(state.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: loaders would keep it after a kill
            except BlockingIOError:
                raise InputError(f"{out}: another process is training in this folder") from None
        state.lock.truncate(0)
        print(json.dumps(config, indent=1), file=state.lock, end="", flush=True)
        if state.lines or not saved:  # checkpoints of older versions hold no lines
            (out / "metrics.jsonl").write_text("".join(state.lines))  # without those after the checkpoint
    return state


def build(config: dict, out: Path, rank: int, world: int, device: torch.device) -> TrainState:
    """A new model, inside DDP if there are several ranks, and its optimiser."""
    settings = config["train"]
    amp, branch = models.AMP[settings["amp"]], evaluate.trained_branch(settings)
    torch.manual_seed(settings["seed"])
    model = models.SimVG(**config["model"]).to(device)
    model.encoder.checkpointing = settings["checkpointing"]
    if settings["compile"]:
        torch._dynamo.config.optimize_ddp = False  # otherwise DDP's buckets would cut the graph of a layer
        for layer in model.encoder.layers:
            layer.compile()  # before DDP; all layers share their graphs
    if settings["freeze_encoder"]:
        model.encoder.requires_grad_(False)
        model.encoder.drops = False  # no drop path: the heads learn from the features that evaluation sees
    # DDP waits for the gradient of every parameter that requires one, so a branch without a loss term must not.
    model.token_branch.requires_grad_(branch != "decoder")
    model.decoder_branch.requires_grad_(settings["loss_decoder"] is not None)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model
    wrapped.broadcast_buffers = False  # they are constants (newer versions of torch warn of it as an argument)
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
    return TrainState(config, out, rank, world, model, wrapped, make_optimizer(model, settings), scaler, branch, amp)


def micro_batch(batch: int, most: int, world: int) -> int:
    """The largest micro-batch of at most `most` examples that divides a rank's share of the global batch evenly."""
    if batch % world:
        raise InputError(f"train.batch_size {batch} (of all ranks together) cannot be shared by {world} ranks")
    return max(size for size in range(1, min(most, batch // world) + 1) if batch // world % size == 0)


def save(state: TrainState, name: str, **more: object) -> bool:
    """Write a checkpoint on rank 0. False if that fails (a full disk): the older file stays, and training goes on."""
    content = {"model": state.model.state_dict(), "config": state.config, **state.digests, **state.progress, **more}
    if name == "last.pt":  # all that --resume needs
        content |= {"ema": state.ema, "optimizer": state.optimizer.state_dict(), "scaler": state.scaler.state_dict()}
        content["metrics"] = "".join(state.lines)
        state.saved_at = time.monotonic()
    try:
        if state.rank == 0:
            models.save(state.out / name, content)
    except models.CheckpointError as error:
        tqdm.write(f"train.py: {error}", file=sys.stderr)
        return False
    return True


def read_saved(out: Path, config: dict, resume: bool) -> dict | None:
    """The content of last.pt, None before the first save. InputError if the folder holds another run."""
    found = [name for name in ("last.pt", "best.pt", "metrics.jsonl", "config.json") if (out / name).exists()]
    if found and not resume:
        raise InputError(f"{out}: holds a run already ({found[0]}); go on with --resume or choose another --out")
    if found[:1] == ["best.pt"]:
        raise InputError(f"{out}: holds best.pt but no last.pt to go on from; choose another --out")
    if found[:1] != ["last.pt"]:
        return None
    saved = models.read_checkpoint(out / "last.pt")
    with models.unpacking(out / "last.pt", InputError):
        if saved["config"]["model"]["as_released"]:
            config["model"]["as_released"] = True  # --init may have set it
        may_change = "workers micro_batch save_minutes annotations images sources tokenizer".split()
        for section, keys in config.items():
            for key, value in keys.items():
                old = saved["config"][section].get(key, False)  # what an older version did not know yet was off
                if old != value and key not in may_change:  # paths may, since rows and tokenizer have digests
                    raise InputError(f"{out}: was started with {section}.{key}={old}, cannot go on with {value}")
    return saved


def restore(state: TrainState, saved: dict) -> None:
    """Fill the new state from last.pt. InputError if that was trained on other rows."""
    if saved.get("rows", state.digests["rows"]) != state.digests["rows"]:
        raise InputError(f"{state.out}: was started with other rows than {state.config['data']['annotations']} holds")
    with models.unpacking(state.out / "last.pt"):
        state.model.tokenizer_digest = saved.get("tokenizer")
        models.load_strictly(state.model, saved["model"], state.out / "last.pt")
        # The optimiser's moments come from the file, its numbers from the config. torch compares no shapes here.
        state.optimizer.load_state_dict({**state.optimizer.state_dict(), "state": saved["optimizer"]["state"]})
        names = ["exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * state.config["train"]["amsgrad"]]
        for p, kept in state.optimizer.state.items():
            assert kept["step"].dim() == 0 and all(kept[name].shape == p.shape for name in names), "a moment's shape"
        state.scaler.load_state_dict(saved["scaler"])
        if state.config["train"]["ema"]:
            named = [(name, p) for name, p in state.model.named_parameters() if p.requires_grad]
            state.ema |= {name: saved["ema"][name].to(p).view_as(p) for name, p in named}
        state.progress |= {name: type(value)(saved[name]) for name, value in state.progress.items()}
        state.lines += saved.get("metrics", "").splitlines(keepends=True)


# ----------------------------------------------------------------------------------- when something goes wrong


def next_micro_batches(state: TrainState, stream: Iterator[data.Batch], count: int) -> list[data.Batch]:
    """The micro-batches of the next step, on the device. Or the end of the run, with its state saved: all ranks stop
    here, before the same step, when one of them got a signal or cannot read its data."""
    micro_batches, fault = [], None
    try:
        micro_batches = [next(stream) for _ in range(count)]
    except InputError as error:  # a damaged image, or a loader process that was killed
        fault = error
    if losses.global_sum(torch.tensor(len(state.signals) + (fault is not None))) == 0:  # on the host: no GPU waits
        return [batch.to(state.model.device) for batch in micro_batches]
    if fault:
        tqdm.write(f"train.py: {fault}", file=sys.stderr)
    stop(state, f"after step {state.progress['step']}", saved=save(state, "last.pt"))


def stop(state: TrainState, where: str, saved: bool = True) -> None:
    """End this process early, after a signal with the exit status that a shell would report, otherwise with 2."""
    del state.wrapped  # DDP, which holds the process group
    evaluate.wait_for_all(leave=True)  # when one rank leaves, torchrun ends the others, and rank 0 may still be writing
    if state.rank == 0 and saved:
        tqdm.write(f"stopped {where}; the same command with --resume goes on", file=sys.stderr)
    sys.exit(128 + state.signals[0] if state.signals and saved else 2)


def stop_after_signal(state: TrainState) -> None:
    """Between two batches of an evaluation: all ranks stop together. last.pt is from just before."""
    if losses.global_sum(torch.tensor(len(state.signals))):
        stop(state, "in an evaluation")


def report_skipped(state: TrainState, terms: dict[str, Tensor], micro_batches: list[data.Batch]) -> None:
    """Report a step that changed no weight, because its gradient is not finite; InputError after PATIENCE of them."""
    state.progress["skipped"] += 1
    state.skipped_in_a_row += 1
    # In fp16 some first steps overflow, until the scaler has halved its factor often enough. Their loss is finite.
    if not (state.scaler.is_enabled() and terms["total"].isfinite()):
        values = ", ".join(f"{name} {value:.3g}" for name, value in terms.items())
        rows = ", ".join(state.rows[i][0].where for batch in micro_batches for i in batch.index)
        tqdm.write(f"step {state.progress['step']} skipped, rank {state.rank}: {values}; rows {rows}", file=sys.stderr)
    if state.skipped_in_a_row == PATIENCE:
        raise InputError(f"{PATIENCE} steps in a row were not finite: lower train.lr, or use another train.amp")


if __name__ == "__main__":
    data.run(main, models.CheckpointError)
