"""Train SimVG on any number of ranks.

    python train.py --config configs.json:shapes
    torchrun --nproc_per_node 8 train.py --config configs.json:refcoco --init beit3_base_patch16_224.zip

Writes into --out (runs/NAME): config.json, metrics.jsonl, last.pt (everything needed to go on), best.pt (weights),
curves.png and samples.png. `--resume` goes on after a kill, bit for bit on one process of a CPU: all randomness is a
function of (seed, epoch, step), nothing random is stored.
"""

import argparse
import fcntl
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

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
PATIENCE = 20  # so many steps in a row may be not finite; in fp16 the first ones are, until the loss scale fits


@dataclass
class Run:
    """Everything one process of a training run works with."""

    config: dict
    out: Path
    rank: int
    world: int
    model: models.SimVG  # what is saved and evaluated
    wrapped: nn.Module  # the same model, in DDP where there are several ranks: what is trained
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: dict[str, Tensor]  # averaged weights; empty without train.ema
    branch: str  # "both", "decoder" or "token"
    amp: torch.dtype | None
    made_with: dict = field(default_factory=dict)  # digests of "tokenizer" and "rows", kept in checkpoints
    held: TextIO | None = None  # see `hold`
    stopped: list[int] = field(default_factory=list)  # signals received
    skipped_in_a_row: int = 0  # steps that were not finite
    progress: dict = field(
        default_factory=lambda: {"epoch": 0, "step_in_epoch": 0, "step": 0, "skipped": 0, "best": -1.0}
    )


def main() -> None:
    # 1. what to run, and who we are
    args = parse_arguments()
    config = data.load_config(args.config, args.set)
    settings, data_settings = config["train"], config["data"]
    out = Path(args.out or f"runs/{args.config.rpartition(':')[2]}")
    rank, world, device = evaluate.join_ranks()
    micro = micro_batch(settings["batch_size"], settings["micro_batch"], world)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun --max-restarts
    state = found_run(out, config, args.resume or restarted)
    if rank == 0:
        data.make_embedded_set(data_settings)
    wait_for_all()

    # 2. data, model, optimiser
    rows = data.read_rows(data_settings, "train")
    if rank == 0:
        data.check_files(rows)
    train_set = data.Dataset(rows, config["model"]["image_size"], settings["seed"], data_settings["jitter"])
    splits = {split: evaluate.load_split(config, split) for split in data_settings["eval_splits"]}
    digest = data.fingerprint([rows, *(split.rows for split in splits.values())])
    agree(world, (settings, digest, state and state.get("step")))
    run = build(config, out, rank, world, device)
    if state:
        restore(run, state, digest)
        del state  # a copy of the weights and of the optimiser, on every rank
    elif args.init:
        report = models.initialise(run.model, args.init)
        config["model"]["as_released"] = run.model.tqg.as_released
        if rank == 0:
            print(report)
    collate = evaluate.load_collate(config, run.model)
    run.made_with = {"tokenizer": collate.tokenizer.digest, "rows": digest}
    if settings["ema"] and not run.ema:
        run.ema |= {name: p.detach().clone() for name, p in run.model.named_parameters()}

    # 3. the loop
    start = run.progress["epoch"], run.progress["step_in_epoch"]
    keys = data.MicroBatchSampler(len(rows), settings, micro, start, rank, world)
    stream = data.batches(train_set, collate, keys, data_settings["workers"], pin=device.type == "cuda")
    per_step = settings["batch_size"] // world // micro  # micro-batches of one rank
    if rank == 0:
        run.held = hold(out, json.dumps(config, indent=1))  # from here on the folder holds a run
        announce(run, keys.steps, micro)
    log = Log(run, keys.steps)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: run.stopped.append(received))
    while run.progress["epoch"] < settings["epochs"]:
        train_epoch(run, stream, per_step, keys.steps, log, rows)
        if on_any_rank(bool(run.stopped)):
            stop(run, log, None)
        save_last(run)  # first, so that a failing evaluation cannot cost the epoch; a resumed run evaluates again
        run.progress |= {"epoch": run.progress["epoch"] + 1, "step_in_epoch": 0}
        if is_due(run.progress["epoch"], settings):
            validate(run, *next(iter(splits.items())), collate, log)

    # 4. what came out
    log.bar.close()
    wait_for_all()  # until best.pt is written
    report_best(run, rows, splits, collate, log)
    leave(0)


def build(config: dict, out: Path, rank: int, world: int, device: torch.device) -> Run:
    """A new run: model, DDP, optimiser."""
    settings = config["train"]
    if settings["amp"] not in models.AMP:
        raise InputError(f'train.amp must be "" (float32), "bf16" or "fp16", not {settings["amp"]!r}')
    amp, branch = models.AMP[settings["amp"]], evaluate.trained_branch(settings)
    torch.manual_seed(settings["seed"])
    model = models.SimVG(**config["model"]).to(device)
    model.encoder.checkpointing = settings["checkpointing"]
    if settings["compile"]:
        torch._dynamo.config.optimize_ddp = False  # else a layer's graph would be cut at the bounds of DDP's buckets
        for layer in model.encoder.layers:
            layer.compile()  # before DDP; all layers share their graphs
    # DDP waits for every gradient it was promised, so a branch without a loss term of its own must not promise any.
    model.token_branch.requires_grad_(branch != "decoder")
    model.decoder_branch.requires_grad_(settings["loss_decoder"] is not None)
    wrapped = model
    if world > 1:
        ids = [device.index] if device.type == "cuda" else None
        wrapped = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        wrapped.broadcast_buffers = False  # they are constants (as an argument, newer versions of torch warn of it)
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
    return Run(config, out, rank, world, model, wrapped, make_optimizer(model, settings), scaler, {}, branch, amp)


def announce(run: Run, steps: int, micro: int) -> None:
    """One line that says what will happen."""
    settings, model = run.config["train"], run.model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(
        f"{run.out}: steps {run.progress['step']} to {settings['epochs'] * steps} of {settings['batch_size']} examples "
        f"({micro} at a time), {run.world} rank(s) on {model.device.type}, {settings['amp'] or 'fp32'}, "
        f"{trained:,} parameters, branch {run.branch}, about {expected_memory(run, micro) / 1e9:.1f} GB of tensors",
        file=sys.stderr,
    )


def expected_memory(run: Run, micro: int) -> float:
    """Bytes at the peak of a step: weights, what the optimiser keeps, and what the encoder keeps for its gradients."""
    settings, encoder = run.config["train"], run.model.encoder
    layers, width, ffn = len(encoder.layers), encoder.text_embed.embedding_dim, encoder.layers[0].image.fc1.out_features
    tokens = micro * (1 + encoder.grid**2 + run.config["data"]["max_tokens"])
    kept = 4 * layers * tokens * (10 * width + 3 * ffn)  # what its products, norms and GELU keep
    if settings["checkpointing"]:
        kept = kept / layers + 4 * layers * tokens * width
    trained = sum(p.nbytes for p in run.model.parameters() if p.requires_grad)
    states = sum(p.nbytes for p in run.model.parameters()) * (1 + settings["ema"])
    states += trained * (3 if settings["amsgrad"] else 2)
    if run.amp:  # 16 bits where products are concerned, and a copy of the weights for them
        kept, states = 0.7 * kept, states + sum(p.nbytes for p in encoder.layers.parameters()) / 2
    if run.world > 1 or micro * run.world < settings["batch_size"]:  # the gradients are there from the start
        return states + trained + kept
    return states + max(trained, kept)  # they take the place of what is set free


def train_epoch(run: Run, stream: Iterator, per_step: int, steps: int, log: "Log", rows: Sequence[data.Row]) -> None:
    """From the current step to the end of the epoch, or to a signal."""
    settings, progress, device = run.config["train"], run.progress, run.model.device
    saved = time.monotonic()
    run.model.train()
    while progress["step_in_epoch"] < steps:
        began = time.monotonic()
        micro_batches, fault = fetch(stream, per_step)
        if on_any_rank(bool(run.stopped or fault)):
            stop(run, log, fault)
        micro_batches = [batch.to(device) for batch in micro_batches]
        waited = time.monotonic() - began
        set_learning_rate(run.optimizer, settings, progress, steps)
        torch.manual_seed(hash((settings["seed"], progress["step"], run.rank)))  # dropout, drop path
        try:
            terms = train_step(run, micro_batches)
        except RuntimeError as error:
            raise out_of_memory(error, len(micro_batches[0].index)) from None
        progress["step"] += 1
        progress["step_in_epoch"] += 1
        update_ema(run.ema, run.model, settings["ema_decay"], progress["step"])
        if terms["grad_norm"].isfinite():  # the only wait for the device (in REC), with all its work handed over
            run.skipped_in_a_row = 0
            log.step(terms, waited, time.monotonic() - began)
        else:
            report_skipped(run, micro_batches, terms, rows)
        if time.monotonic() - saved > 60 * settings["save_minutes"] and not run.skipped_in_a_row:
            save_last(run)
            saved = time.monotonic()


def fetch(stream: Iterator, count: int) -> tuple[list[data.Batch], InputError | None]:
    """The next micro-batches, or why there are none: an image turns out to be damaged, a loader process is gone."""
    try:
        return [next(stream) for _ in range(count)], None
    except InputError as error:
        return [], error


def on_any_rank(flag: bool) -> bool:
    """Asked by every rank before every step, so that all leave at the same one. On the host: no GPU has to wait."""
    flags = torch.tensor(float(flag))
    if dist.is_initialized():
        dist.all_reduce(flags)
    return flags.item() > 0


def stop(run: Run, log: "Log", fault: InputError | None) -> None:
    """Save and leave: after a signal, or because some rank cannot go on."""
    saved = save_last(run)
    log.bar.close()
    if fault:
        print(f"train.py: {fault}", file=sys.stderr)
    if run.rank == 0 and saved:
        print(f"stopped after step {run.progress['step']}; the same command with --resume goes on", file=sys.stderr)
    status = 128 + run.stopped[0] if run.stopped else 2  # as a shell tells of a signal
    leave(status if saved else 2)


def report_skipped(
    run: Run, micro_batches: list[data.Batch], terms: dict[str, Tensor], rows: Sequence[data.Row]
) -> None:
    """Say what was not finite in a step that changed no weight. InputError after PATIENCE of them.

    The gradient norm is that of all ranks, so all come here together; the rows are each rank's own.
    """
    run.progress["skipped"] += 1
    run.skipped_in_a_row += 1
    if run.scaler.is_enabled() and terms["total"].isfinite() and run.skipped_in_a_row < PATIENCE:
        return  # the loss scale of fp16 was too high and is being halved
    faulty = [rows[i][0].where for batch in micro_batches for i in not_finite(run, batch)]
    largest = sorted(terms.items(), key=lambda item: item[1].abs().nan_to_num(torch.inf, torch.inf), reverse=True)
    said = f"step {run.progress['step']} skipped, rank {run.rank}: " + ", ".join(f"{n} {v:.3g}" for n, v in largest[:3])
    if faulty:
        said += f"; rows {', '.join(faulty[:3])}"
    if len(faulty) > 3:
        said += f" and {len(faulty) - 3} more"
    if run.rank == 0 or faulty:
        tqdm.write(said, file=sys.stderr)
    if run.skipped_in_a_row >= PATIENCE:
        raise InputError(f"{PATIENCE} steps in a row were not finite; the last checkpoint is from before them")


def out_of_memory(error: RuntimeError, micro: int) -> Exception:
    """The same error, or, where memory ran out, which settings would help."""
    if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
        return error
    return InputError(
        f"out of memory with {micro} examples at a time: lower train.micro_batch, "
        "or set train.checkpointing=true or train.amp=bf16"
    )


@torch.no_grad()
def not_finite(run: Run, batch: data.Batch) -> list[int]:
    """The numbers of those examples whose own boxes or answers are not finite."""
    output = run.model(batch.images, batch.tokens, batch.text_pad, run.branch, run.amp)
    boxes = [batch.boxes, *(answer for _, answer in output.answers().values())]
    fine = torch.stack([x.flatten(1).isfinite().all(1) for x in boxes]).all(0)  # (B,)
    return [index for index, ok in zip(batch.index, fine.tolist(), strict=True) if not ok]


@contextmanager
def averaged(model: nn.Module, ema: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the model holds the averaged weights (where there are any)."""
    if not ema:
        yield
        return
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.load_state_dict({**model.state_dict(), **ema})
    yield
    model.load_state_dict({**model.state_dict(), **kept})


def selection(figures: dict[str, float]) -> float:
    """What best.pt is chosen by: the mean of the branches' accuracies, as in the official code."""
    main = [value for name, value in figures.items() if name.endswith(("_acc", "_f1"))]
    return sum(main) / len(main)


def is_due(epoch: int, settings: dict) -> bool:
    """Whether to evaluate after this many epochs; always after the last one."""
    regular = epoch >= settings["evaluate_from"] and epoch % settings["evaluate_every"] == 0
    return regular or epoch == settings["epochs"]


def validate(run: Run, split: str, dataset: data.Dataset, collate: data.Collate, log: "Log") -> None:
    """Evaluate (the averaged weights, where there are any) and keep the best as best.pt."""
    with averaged(run.model, run.ema):
        _, figures = evaluate_split(run, run.model, split, dataset, collate)
        if (value := selection(figures)) > run.progress["best"]:
            best = {"model": run.model.state_dict(), "ema": {}, "config": run.config, "figures": figures}
            if save(run, "best.pt", {**best, **run.made_with, **run.progress, "best": value}):
                run.progress["best"] = value
    log.figures(split, figures)


def report_best(run: Run, rows: Sequence[data.Row], splits: dict, collate: data.Collate, log: "Log") -> None:
    """Evaluate best.pt on every split: a table each, and pictures of the last split."""
    model = models.load(run.out / "best.pt", run.model.device)
    for split, dataset in splits.items():
        results, figures = evaluate_split(run, model, split, dataset, collate)
        log.figures(split, figures, weights="best")
        if run.rank == 0:
            grec = run.config["model"]["queries"] > 1
            baseline = None if grec else evaluate.mean_box_accuracy([row[0] for row in rows], dataset.examples)
            evaluate.print_table(split, figures, evaluate.by_kind(results, dataset.examples), baseline)
    if run.rank == 0:
        evaluate.draw_page(dataset.examples[:16], results[:16], run.out / "samples.png")  # of the last split
        evaluate.draw_curves(log.records, run.out / "curves.png")
        print(f"weights: {run.out}/best.pt   pictures: {run.out}/samples.png {run.out}/curves.png")


def evaluate_split(
    run: Run, model: models.SimVG, split: str, dataset: data.Dataset, collate: data.Collate
) -> tuple[list[dict[str, evaluate.Result]], dict[str, float]]:
    """The results of a split and their summary. A signal ends the run after a batch: last.pt is from just before."""

    def leave_if_stopped() -> None:
        if run.stopped:
            if run.rank == 0:
                print("stopped in an evaluation; the same command with --resume goes on", file=sys.stderr)
            sys.exit(128 + run.stopped[0])

    options = {"workers": run.config["data"]["workers"], "amp": run.amp, "after_batch": leave_if_stopped}
    results = evaluate.evaluate_dataset(model, dataset, collate, run.branch, title=split, **options)
    return results, evaluate.summary(results, dataset.examples, run.config["model"]["queries"] > 1)


# ----------------------------------------------------------------------------------------------------- a step


def train_step(run: Run, micro_batches: list[data.Batch]) -> dict[str, Tensor]:
    """One optimiser step on the micro-batches of this rank -> its loss terms and the gradient norm before clipping.

    Where that norm is not finite the weights stay as they are.
    """
    settings, optimizer, scaler = run.config["train"], run.optimizer, run.scaler
    factors = [settings[name] for name in ("loss_decoder", "loss_token_on_truth", "loss_token_on_teacher")]
    queries, no_object = run.model.tqg.query_embed.num_embeddings, settings["no_object_weight"]
    counts = sum(losses.count_targets(batch.box_mask, queries, no_object) for batch in micro_batches)
    norm = losses.step_normalisers(counts)
    optimizer.zero_grad(set_to_none=True)
    sums: dict[str, Tensor] = {}
    for i, batch in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        with nullcontext() if last or run.world == 1 else run.wrapped.no_sync():
            output = run.wrapped(batch.images, batch.tokens, batch.text_pad, run.branch, run.amp)
            terms = losses.simvg_loss(output, batch.boxes, batch.box_mask, *factors, no_object, norm)
            scaler.scale(terms["total"]).backward()
        for name, value in terms.items():
            share = len(micro_batches) if name == "teacher_weight" else 1  # a mean, where the others are parts of a sum
            sums[name] = sums.get(name, 0) + value.detach() / share
    scaler.unscale_(optimizer)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    sums["grad_norm"] = nn.utils.clip_grad_norm_(trained, settings["clip_norm"])
    if not scaler.is_enabled():  # as a GradScaler does: fused Adam leaves the step out where this is 1, without a wait
        optimizer.found_inf = (~sums["grad_norm"].isfinite()).float()
    scaler.step(optimizer)
    scaler.update()
    return sums


def make_optimizer(model: models.SimVG, settings: dict) -> torch.optim.Optimizer:
    """Adam with two learning rates, one for the pre-trained encoder and one for the rest."""
    encoder = [p for name, p in model.named_parameters() if name.startswith("encoder.") and p.requires_grad]
    rest = [p for name, p in model.named_parameters() if not name.startswith("encoder.") and p.requires_grad]
    return torch.optim.Adam(
        [{"params": encoder, "lr": settings["lr_encoder"]}, {"params": rest, "lr": settings["lr"]}],
        betas=tuple(settings["betas"]),
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
        amsgrad=settings["amsgrad"],
        fused=True,
    )


def lr_factor(
    epoch: float, warmup_epochs: float, decay_epochs: Sequence[int] | None, decay_factor: float, epochs: int
) -> float:
    """What the learning rate is multiplied by in an epoch (from 0): a staircase of warm-up, then steps down.

    The warm-up is (epoch + 1) / (warmup_epochs + 1); a decay at epoch s is already felt in the s-th epoch (number
    s - 1). Without decay_epochs the rate falls linearly after the warm-up and would be zero in epoch `epochs`.
    """
    if epoch < warmup_epochs:
        return (epoch + 1) / (warmup_epochs + 1)
    if decay_epochs is None:
        return (epochs - epoch) / (epochs - warmup_epochs)
    return decay_factor ** sum(epoch + 1 >= decay for decay in decay_epochs)


def set_learning_rate(optimizer: torch.optim.Optimizer, settings: dict, progress: dict, steps: int) -> None:
    """Stairs move once an epoch, as in the official code; the linear decay moves every step."""
    epoch = progress["epoch"]
    if settings["decay_epochs"] is None and epoch >= settings["warmup_epochs"]:
        epoch += progress["step_in_epoch"] / steps
    schedule = (settings[name] for name in ("warmup_epochs", "decay_epochs", "decay_factor", "epochs"))
    factor = lr_factor(epoch, *schedule)
    for group, name in zip(optimizer.param_groups, ("lr_encoder", "lr"), strict=True):
        group["lr"] = settings[name] * factor


@torch.no_grad()
def update_ema(ema: dict[str, Tensor], model: nn.Module, decay: float, step: int) -> None:
    """The averaged weights after `step` (from 1) optimiser steps; young averages forget faster."""
    if ema:
        decay = min(decay, step / (step + 9))
        torch._foreach_lerp_(list(ema.values()), list(model.parameters()), 1 - decay)


# ------------------------------------------------------------------------------------------- options, ranks, folders


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train SimVG; under torchrun on every rank. A recipe is a name in configs.json, such as shapes."
    )
    parser.add_argument("--config", required=True, metavar="FILE:NAME", help="such as configs.json:refcoco")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="as train.lr=1e-4")
    parser.add_argument("--out", metavar="FOLDER", help="the run's folder (default: runs/NAME)")
    parser.add_argument("--init", metavar="FILE", help="start from BEiT-3, SimVG or official SimVG weights")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    return parser.parse_args()


def peak_memory() -> int:
    """Bytes: the most tensors of the GPU at once, or without one the most of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def leave(status: int) -> None:
    wait_for_all()
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(status)


def micro_batch(batch: int, most: int, world: int) -> int:
    """The largest micro-batch of at most `most` examples that cuts a rank's share of the global batch evenly."""
    if batch % world:
        raise InputError(f"train.batch_size {batch} (of all ranks together) cannot be shared by {world} ranks")
    share = batch // world
    return next(size for size in range(min(most, share), 0, -1) if share % size == 0)


def found_run(out: Path, config: dict, resume: bool) -> dict | None:
    """The state to go on from. InputError if the folder holds any file of a run that would be replaced."""
    found = [name for name in ("last.pt", "best.pt", "metrics.jsonl", "config.json") if (out / name).exists()]
    if found and not resume:
        raise InputError(f"{out}: holds a run already ({found[0]}); go on with --resume or choose another --out")
    if found[:1] == ["best.pt"]:
        raise InputError(f"{out}: holds best.pt but no last.pt to go on from; choose another --out")
    if found[:1] != ["last.pt"]:
        return None  # killed before its first checkpoint: the same start again
    state = models.read_checkpoint(out / "last.pt")
    with models.unpacking(out / "last.pt"):
        config["model"]["as_released"] |= state["config"]["model"]["as_released"]  # taken over at the start
        for section, keys in config.items():
            for key, value in keys.items():
                old = state["config"][section].get(key)
                if old != value and key not in ("workers", "micro_batch", "save_minutes"):  # these may change
                    raise InputError(f"{out}: was started with {section}.{key}={old}, cannot go on with {value}")
    return state


def hold(out: Path, config: str) -> TextIO:
    """Write config.json and keep it locked for as long as it stays open: a second run in this folder is refused."""
    out.mkdir(parents=True, exist_ok=True)
    file = open(out / "config.json", "a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which loader processes would keep after a kill
    except OSError as error:
        if isinstance(error, BlockingIOError):  # else it is a file system without locks
            raise InputError(f"{out}: another process is training in this folder") from None
    file.truncate(0)
    print(config, file=file, end="", flush=True)
    return file


def agree(world: int, mine: object) -> None:
    """InputError on every rank unless all of them have the same."""
    ranks = [mine] * world
    if world > 1:
        dist.all_gather_object(ranks, mine)
    if any(theirs != ranks[0] for theirs in ranks):
        raise InputError("the ranks differ in their rows, last.pt or section train: all must read the same files")


def restore(run: Run, state: dict, rows: str) -> None:
    """Fill everything from last.pt. InputError unless `rows`, a fingerprint, are those it was trained with."""
    if state.get("rows", rows) != rows:
        raise InputError(f"{run.config['data']['annotations']}: other rows than those that {run.out} was started with")
    with models.unpacking(run.out / "last.pt"):
        run.model.tokenizer_digest = state.get("tokenizer")
        models.load_strictly(run.model, state["model"], run.out / "last.pt")
        groups = run.optimizer.state_dict()["param_groups"]  # their numbers are those of the config
        run.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        for p, (_, *moments) in ((p, kept.values()) for p, kept in run.optimizer.state.items()):
            assert all(moment.shape == p.shape for moment in moments), "a moment of Adam has another shape"
        run.scaler.load_state_dict(state["scaler"])
        if run.config["train"]["ema"]:
            run.ema |= {name: state["ema"][name].to(p).view_as(p) for name, p in run.model.named_parameters()}
        run.progress |= {name: type(value)(state[name]) for name, value in run.progress.items()}


def save_last(run: Run) -> bool:
    parts = {"model": run.model.state_dict(), "ema": run.ema, "optimizer": run.optimizer.state_dict()}
    parts |= {"scaler": run.scaler.state_dict(), "config": run.config}
    return save(run, "last.pt", {**parts, **run.made_with, **run.progress})


def save(run: Run, name: str, state: dict) -> bool:
    """Rank 0 writes. Where that fails (a full disk) the older file stays, and training goes on to the next time."""
    try:
        if run.rank == 0:
            models.save(run.out / name, state)
    except models.CheckpointError as error:
        tqdm.write(f"train.py: {error}", file=sys.stderr)
        return False
    return True


class Log:
    """metrics.jsonl: one JSON object a line, the training rows as means over LOG_EVERY steps and over the ranks."""

    def __init__(self, run: Run, steps: int):
        self.run, self.path, self.records = run, run.out / "metrics.jsonl", []
        self.sums: dict[str, Tensor] = {}
        self.steps, self.waited, self.seconds = 0, 0.0, 0.0
        quiet = None if run.rank == 0 else True  # None: no bar where stderr is no terminal
        total, done = run.config["train"]["epochs"] * steps, run.progress["step"]
        self.bar = tqdm(total=total, initial=done, disable=quiet, unit="step", dynamic_ncols=True)
        if run.rank:
            return
        if self.path.exists():  # a killed run may have written rows that its checkpoint knows nothing of
            rows = []
            for line in self.path.read_text(errors="replace").splitlines():
                with suppress(ValueError):  # a line that a kill or a full disk cut
                    rows.append(json.loads(line))
            again = run.progress["step_in_epoch"] == steps  # the evaluation of the epoch that just ended comes again
            evaluated = done - 1 if again else done
            self.records = [row for row in rows if row["step"] <= (done if row["split"] == "train" else evaluated)]
        part = Path(f"{self.path}.part")
        part.write_text("".join(json.dumps(row) + "\n" for row in self.records))
        part.replace(self.path)

    def step(self, terms: dict[str, Tensor], waited: float, seconds: float) -> None:
        run, progress = self.run, self.run.progress
        self.bar.update()
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.steps, self.waited, self.seconds = self.steps + 1, self.waited + waited, self.seconds + seconds
        if progress["step"] % LOG_EVERY:
            return
        means = losses.global_sum(torch.stack([value.float() for value in self.sums.values()])) / self.steps / run.world
        row = {"split": "train", "epoch": progress["epoch"] + 1, "step": progress["step"]}
        row |= {name: round(value, 6) for name, value in zip(self.sums, means.tolist(), strict=True)}
        row |= {"lr_encoder": run.optimizer.param_groups[0]["lr"], "lr": run.optimizer.param_groups[1]["lr"]}
        row |= {"samples_per_s": round(self.steps * run.config["train"]["batch_size"] / self.seconds, 1)}
        row |= {"data_wait": round(self.waited / self.seconds, 4), "peak_memory_gb": round(peak_memory() / 1e9, 2)}
        row |= {"skipped": progress["skipped"]}
        self.write(row)
        self.bar.set_postfix(loss=f"{row['total']:.3f}")
        if run.rank == 0 and self.bar.disable and progress["step"] % (25 * LOG_EVERY) == 0:  # no terminal: plain lines
            print(f"step {progress['step']}/{self.bar.total}  loss {row['total']:.3f}", file=sys.stderr, flush=True)
        self.sums, self.steps, self.waited, self.seconds = {}, 0, 0.0, 0.0

    def figures(self, split: str, figures: dict[str, float], weights: str = "last") -> None:
        progress = self.run.progress
        row = {"split": split, "weights": weights, "epoch": progress["epoch"], "step": progress["step"]}
        self.write(row | {name: round(value, 6) for name, value in figures.items()})
        if self.run.rank == 0:
            shown = "  ".join(f"{k} {100 * v:.1f}" for k, v in figures.items() if k not in ("n", "n_none"))
            title = "best.pt" if weights == "best" else f"epoch {row['epoch']}"
            tqdm.write(f"{title}  {split}: {shown}", file=sys.stderr)

    def write(self, row: dict) -> None:
        if self.run.rank == 0:
            self.records.append(row)
            end = self.path.stat().st_size if self.path.exists() else 0
            try:
                with open(self.path, "a") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                tqdm.write(f"train.py: {self.path}: {error.strerror}", file=sys.stderr)
                with suppress(OSError):
                    os.truncate(self.path, end)  # no half line, which the next one would join


if __name__ == "__main__":
    data.run(main, models.CheckpointError)
