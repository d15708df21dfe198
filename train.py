"""Train SimVG in one process, or under torchrun in one process (rank) per GPU.

    python train.py --config configs.json:toys
    torchrun --nproc_per_node 8 train.py --config configs.json:refcoco

A run writes config.json, metrics.jsonl, last.pt (for --resume), best.pt and samples.png. What a run
needs to go on is the content of last.pt: the number of steps done, the weights, their average,
Adam's moments and the loss scale. Everything random is a function of (seed, step), so that on one
CPU process a resumed run is the same to the bit.
"""

import argparse
import copy
import hashlib
import json
import math
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

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
# what may differ when a run is resumed; rows and tokenizer are compared by their contents
MAY_CHANGE = """init annotations images sources tokenizer workers micro_batch checkpointing compile
amp save_minutes""".split()
BEIT3 = "https://github.com/addf400/files/releases/download/beit3/"
PATIENCE = 20  # the run ends after so many steps in a row whose gradient is not finite


@dataclass(frozen=True)
class TrainConfig:
    seed: int = 6666  # of initial weights, row order, choice of expressions, jitter and dropout
    # the weights to start from: BEiT-3's, or a checkpoint of this project or of the official code;
    # "": random numbers
    init: str = "pretrain_weights/beit3_base_patch16_224.pth"
    epochs: int = 30  # passes over the training rows; each takes one expression of every row
    batch_size: int = 32  # examples of an optimiser step, of all ranks together
    # A rank computes at most so many examples at once. If its share of the batch is larger, the
    # gradients of several micro-batches are added up. (W_dt is one number for each of them.)
    micro_batch: int = 32
    lr: float = 5e-4  # of the heads, after the warm-up
    lr_encoder: float = 5e-5  # of the pre-trained encoder
    freeze_encoder: bool = False  # train the heads alone
    betas: tuple[float, float] = (0.9, 0.98)  # these four are arguments of torch.optim.Adam
    eps: float = 1e-9
    amsgrad: bool = True
    weight_decay: float = 0.0
    clip_norm: float = 0.15  # a gradient with a larger L2 norm, over all weights, is scaled to this
    warmup_epochs: int = 3  # with 3, epochs 1, 2 and 3 have 1/4, 2/4 and 3/4 of the rates
    # each of these epochs multiplies the rates by decay_factor; null: they fall linearly to 0
    decay_epochs: tuple[int, ...] | None = (25,)
    decay_factor: float = 0.1
    ema: bool = False  # evaluate and keep averaged weights
    ema_decay: float = 0.999  # the part of the average that a step keeps
    loss_decoder: float | None = 1.0  # factors of the loss terms (losses.py); null: left out
    loss_token_on_truth: float | None = 2.0
    loss_token_on_teacher: float | None = 1.0
    # weight of the class "no object" in the cross entropy; the nearer it is to 1, the nearer a
    # score of 0.7 is to a probability of 0.7
    no_object_weight: float = 0.1
    # precision of the encoder; none: float32 (TF32 on a GPU); auto: bf16 where the GPU has it, fp16
    # on an older GPU, float32 on a CPU
    amp: Literal["auto", "none", "bf16", "fp16"] = "auto"
    checkpointing: bool = False  # save memory: recompute each encoder layer in the backward pass
    compile: bool = False  # compile the encoder's layers with torch.compile
    evaluate_every: int = 1  # epochs between two evaluations of data.eval_splits[0]
    evaluate_from: int = 0  # the first epoch that is evaluated; the last one always is
    save_minutes: float = 10.0  # minutes between two saves of last.pt within an epoch

    def __post_init__(self):
        for name in ("epochs", "batch_size", "micro_batch", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 1")
        trained_branch(self)


def read_config(spec: str, overrides: Sequence[str]) -> list:
    """A ModelConfig, a DataConfig and a TrainConfig, of a recipe such as configs.json:refcoco."""
    return data.read_config(
        spec, overrides, model=models.ModelConfig, data=data.DataConfig, train=TrainConfig
    )


def trained_branch(config: TrainConfig) -> str:
    """What runs in training and evaluation by the loss factors: "decoder", "token" or "both"."""
    decoder = config.loss_decoder is not None
    token = config.loss_token_on_truth is not None
    if config.loss_token_on_teacher is not None or decoder and token:
        return "both"  # the decoder branch teaches the token branch
    if decoder:
        return "decoder"
    if token:
        return "token"
    raise ValueError("train.loss_*: every factor is null, there is nothing to learn")


def main() -> None:  # noqa: C901
    # 1. What to run: the config, the ranks, the folder.
    args = parse_arguments()
    init = [f"train.init={json.dumps(args.init)}"] if args.init is not None else []
    model_config, data_config, config = read_config(args.config, [*args.set, *init])
    rank, world, device = models.join_ranks()
    out = Path(args.out or f"runs/{args.config.rpartition(':')[2]}")
    last = find_run(out, args.resume)  # the content of last.pt, None for a new run
    if config.freeze_encoder and not config.init and not last:
        raise InputError(
            "train.freeze_encoder: name its weights in train.init, else they are random"
        )

    # 2. The data. Every rank reads all rows and gets its share of every step, in micro-batches.
    grec = model_config.queries > 1
    rows = data.without_evaluated(data_config, data.read_rows(data_config, "train"))
    examples = data.all_examples(rows)
    evaluate.check_targets("train", examples, model_config.queries)
    splits = {}
    for split in data_config.eval_splits:
        splits[split] = data.all_examples(data.read_rows(data_config, split))
        evaluate.check_targets(split, splits[split], model_config.queries)
        examples += splits[split]
    if rank == 0:
        data.check_images(examples)
    tokenizer = data.Tokenizer(data_config.tokenizer)
    collate = data.Collate(tokenizer, data_config.max_tokens)
    if config.batch_size % world:
        raise InputError(
            f"train.batch_size={config.batch_size} (of all ranks) is no multiple of {world} ranks"
        )
    share = config.batch_size // world
    micro = min(config.micro_batch, share)
    while share % micro:
        micro -= 1  # the largest micro-batch that divides the share evenly
    per_epoch = math.ceil(len(rows) / config.batch_size)  # steps
    total = config.epochs * per_epoch

    # 3. The model: from random weights, from train.init or from the last checkpoint.
    torch.manual_seed(config.seed)
    checkpoint = None
    if last:
        model_config = replace(model_config, as_released=last["config"]["model"]["as_released"])
    elif config.init:
        init_file = find_init(config.init)
        with data.located(init_file):
            checkpoint = models.read(init_file)
        if checkpoint.config:
            model_config = replace(model_config, as_released=checkpoint.config.as_released)
    else:
        data.say('train.init="": training starts from random weights')
    model = models.SimVG(model_config)
    evaluate.check_tokenizer(tokenizer, model, checkpoint)
    if checkpoint:
        with data.located(init_file):
            new = models.initialise(model, checkpoint)
        taken = len(model.state_dict()) - len(new)
        parts = sorted({name.partition(".")[0] for name in new}) or ["nothing"]
        data.say(f"{init_file}: {checkpoint.kind}, {taken} tensors taken; new: {', '.join(parts)}")
    model.to(device)
    model.encoder.checkpointing = config.checkpointing
    if config.freeze_encoder:
        model.encoder.requires_grad_(False)
        model.encoder.drop_path = 0.0  # the heads learn from the features that evaluation sees
    # DDP waits for the gradient of every parameter that requires one, so those of a branch that no
    # loss term reaches must not.
    branch = trained_branch(config)
    model.token_branch.requires_grad_(branch != "decoder")
    model.decoder_branch.requires_grad_(config.loss_decoder is not None)
    optimizer = make_optimizer(model, config)
    amp = models.encoder_precision(config.amp, device)
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
    averaged = copy.deepcopy(model) if config.ema else model  # it is evaluated and kept as best.pt

    # 4. Where the run stands: steps done, the last epoch that was evaluated, the best accuracy.
    settings = {"model": asdict(model_config), "data": asdict(data_config), "train": asdict(config)}
    about = {
        "config": settings,
        "branch": branch,
        "tokenizer": tokenizer.digest,
        "rows": digest([*rows, *splits.values()]),
    }
    step = 0
    evaluated = 0
    best = -1.0
    if last:
        check_same(out, last, about)
        with data.located(out / "last.pt"):
            model.load_state_dict(last["model"])
            averaged.load_state_dict(last["ema"] or last["model"])
            optimizer.load_state_dict(last["optimizer"])
            if last["scaler"] and scaler.is_enabled():
                scaler.load_state_dict(last["scaler"])
            step = last["step"]
            evaluated = last["evaluated"]
            best = last["best"]
    if rank == 0:
        begin_folder(out, settings, last)
    del last, checkpoint  # a run that goes on would keep these weights in memory twice

    def save_last() -> None:
        state = {
            "model": model.state_dict(),
            "ema": averaged.state_dict() if config.ema else {},
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "epoch": step // per_epoch,
            "step": step,
            "evaluated": evaluated,
            "best": best,
        }
        if rank == 0:
            models.save(out / "last.pt", state | about)

    # A signal only leaves a mark, which all ranks look at together between two steps or batches.
    signals = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: signals.append(received))

    def stop_after_signal(*_: object) -> None:
        if losses.global_sum(torch.tensor(len(signals))):
            models.leave_ranks()
            data.say(f"stopped after step {step}; the same command with --resume goes on")
            sys.exit(128 + signals[0] if signals else 1)

    metric = "f1" if grec else "acc"

    def evaluate_split(
        net: models.SimVG, split: str, about_weights: dict
    ) -> tuple[float, list[evaluate.Result]]:
        """Mean accuracy of the trained branches, and all results. A row gets `about_weights`."""
        results = evaluate.evaluate_examples(
            net,
            splits[split],
            collate,
            branch,
            amp,
            data_config.workers,
            title=split,
            after_batch=stop_after_signal,
        )
        figures = evaluate.summary(results, grec)
        if rank == 0:
            title = f"{split} ({about_weights['weights']})"
            tqdm.write(evaluate.table(title, results, splits[split], grec))
            write_row(out, {"split": split} | about_weights | figures)
        accuracies = [figures[f"{name}_{metric}"] for name in evaluate.branches_of(results)]
        return sum(accuracies) / len(accuracies), results

    # 5. The loop.
    if config.compile:
        torch._dynamo.config.optimize_ddp = False  # else DDP's buckets would cut a layer's graph
        for layer in model.encoder.layers:
            layer.compile()  # all layers share their graphs
    wrapped = model
    if world > 1:
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
        wrapped.broadcast_buffers = False  # they are constants; as an argument torch 2.14 warns
    dataset = data.Dataset(rows, model_config.image_size, config.seed, data_config.jitter)
    sampler = data.MicroBatchSampler(
        len(rows), config.batch_size, micro, config.seed, range(step, total), rank, world
    )
    stream = iter(
        data.loader(dataset, sampler, collate, data_config.workers, device.type == "cuda")
    )
    precision = amp or torch.float32
    data.say(f"{out}: {world} rank(s) on {device.type}, {precision}, micro-batches of {micro}")
    bar = tqdm(total=total, initial=step, desc="steps", disable=rank > 0 or None)
    recent = []  # loss terms and times of the steps since the last row of metrics.jsonl
    saved_at = time.monotonic()
    skipped = 0  # steps in a row
    while True:
        epoch, place = divmod(step, per_epoch)  # epochs done, and steps in the current one
        is_due = epoch >= config.evaluate_from and epoch % config.evaluate_every == 0
        if place == 0 and epoch > evaluated and (is_due or epoch == config.epochs):
            save_last()
            about_weights = {"weights": "last", "epoch": epoch, "step": step}
            value, _ = evaluate_split(averaged, data_config.eval_splits[0], about_weights)
            if value > best:
                best = value
                state = {"model": averaged.state_dict(), "epoch": epoch, "step": step}
                if rank == 0:
                    models.save(out / "best.pt", state | about | {"accuracy": value})
            evaluated = epoch
            save_last()
        if step == total:
            break

        began = time.monotonic()
        micro_batches = [next(stream) for _ in range(share // micro)]
        waited = time.monotonic() - began
        faults = [fault for batch in micro_batches for fault in batch.faults.values()]
        if losses.global_sum(torch.tensor(len(faults) + len(signals))):
            save_last()  # all ranks stop here, before the same step
            stop_after_signal()
            fault = faults[0] if faults else "another rank met an unreadable image"
            raise InputError(f"{fault}; once it is replaced, --resume goes on")
        set_learning_rate(optimizer, config, epoch + place / per_epoch)
        # seeded anew in every step, so that a resumed run draws the same dropout and drop path
        torch.manual_seed(hash((config.seed, step, rank)))
        model.train()
        micro_batches = [batch.to(device) for batch in micro_batches]
        try:
            terms = backward(wrapped, micro_batches, config, branch, amp, scaler)
        except torch.OutOfMemoryError:
            less = "lower train.micro_batch, or set train.checkpointing=true or train.amp=bf16"
            raise InputError(f"out of memory with {micro} examples at a time: {less}") from None
        scaler.unscale_(optimizer)  # clip the gradients as they are, without the scaler's factor
        terms["grad_norm"] = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        if terms["grad_norm"].isfinite():
            scaler.step(optimizer)
            skipped = 0
            recent.append(terms | {"seconds": time.monotonic() - began, "data_wait": waited})
        else:
            # In fp16 some first steps overflow, until the scaler has halved its factor often
            # enough; in bf16 and float32 it is a fault.
            skipped += 1
            names = [rows[i][0].where for batch in micro_batches for i in batch.index]
            text = f"step {step + 1} skipped, its gradient is not finite; {', '.join(names)}"
            tqdm.write(text, file=sys.stderr)  # every rank names its own rows
            if skipped == min(PATIENCE, total):
                raise InputError(f"{skipped} steps in a row were not finite: lower train.lr?")
        scaler.update()
        step += 1
        update_ema(averaged, model, config.ema_decay, step)
        bar.update()
        if step % LOG_EVERY == 0 and recent:
            row = {"split": "train", "epoch": epoch + 1, "step": step}
            row |= means(recent, world)
            row["lr_encoder"] = optimizer.param_groups[0]["lr"]
            row["lr"] = optimizer.param_groups[1]["lr"]
            row["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
            if rank == 0:
                write_row(out, row)
            recent = []
        if time.monotonic() - saved_at > 60 * config.save_minutes and not skipped:
            save_last()
            saved_at = time.monotonic()
    bar.close()

    # 6. Evaluate the best weights on every split, and draw the first answers of the last one.
    if world > 1:
        dist.barrier()  # until rank 0 has written best.pt
    with data.located(out / "best.pt"):
        checkpoint = models.read(out / "best.pt")
        model = models.build(checkpoint, device)
    state = checkpoint.state
    about_weights = {"weights": "best", "epoch": state["epoch"], "step": state["step"]}
    for split in splits:
        _, results = evaluate_split(model, split, about_weights)
    del wrapped  # DDP, which holds the process group
    models.leave_ranks()
    if rank == 0:
        pairs = zip(splits[split], results, strict=True)
        with_box = [pair for pair in pairs if pair[1]["truth"]]
        pictures = [evaluate.draw_result(*pair) for pair in with_box[:16]]
        written = f"weights: {out}/best.pt"
        if pictures:
            data.tile(pictures, out / "samples.png")
            written += f"   pictures: {out}/samples.png"
        print(written)


def backward(
    wrapped: nn.Module,
    micro_batches: Sequence[data.Batch],
    config: TrainConfig,
    branch: str,
    amp: torch.dtype | None,
    scaler: torch.amp.GradScaler,
) -> dict[str, Tensor]:
    """The backward passes of one step; returns the loss terms, summed over the micro-batches."""
    model = wrapped.module if isinstance(wrapped, DistributedDataParallel) else wrapped
    # The loss of each micro-batch is divided by counts of the whole step (D6), so count first.
    queries = model.config.queries
    no_object = config.no_object_weight
    counts = [losses.count_targets(batch.box_mask, queries, no_object) for batch in micro_batches]
    by = losses.divisors(sum(counts))
    wrapped.zero_grad(set_to_none=True)
    sums = {}
    for i, batch in enumerate(micro_batches):
        # Gradients add up over the micro-batches; DDP averages them over the ranks with the last
        # one only. (`no_sync` does the same, but is a context manager; nanoGPT sets this as well.)
        wrapped.require_backward_grad_sync = i == len(micro_batches) - 1
        output = wrapped(batch.images, batch.tokens, batch.text_pad, branch, amp)
        terms = losses.simvg_loss(
            output,
            batch.boxes,
            batch.box_mask,
            decoder=config.loss_decoder,
            token_on_truth=config.loss_token_on_truth,
            token_on_teacher=config.loss_token_on_teacher,
            no_object=no_object,
            by=by,
        )
        scaler.scale(terms["total"]).backward()
        for name, value in terms.items():
            sums[name] = sums.get(name, 0) + value.detach()
    if "teacher_weight" in sums:
        sums["teacher_weight"] /= len(micro_batches)  # a weight, so its mean is reported
    return sums


def make_optimizer(model: models.SimVG, config: TrainConfig) -> torch.optim.Optimizer:
    """Adam with two groups of parameters: the pre-trained encoder has its own learning rate."""
    heads = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.startswith("encoder."):
            heads.append(parameter)
    encoder = [p for p in model.encoder.parameters() if p.requires_grad]
    return torch.optim.Adam(
        [{"params": encoder, "lr": config.lr_encoder}, {"params": heads, "lr": config.lr}],
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        amsgrad=config.amsgrad,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, config: TrainConfig, epoch: float) -> None:
    factor = lr_factor(
        epoch, config.warmup_epochs, config.decay_epochs, config.decay_factor, config.epochs
    )
    encoder, heads = optimizer.param_groups  # of `make_optimizer`
    encoder["lr"] = config.lr_encoder * factor
    heads["lr"] = config.lr * factor


def lr_factor(
    epoch: float,
    warmup_epochs: int,
    decay_epochs: Sequence[int] | None,
    decay_factor: float,
    epochs: int,
) -> float:
    """What the learning rates are multiplied by. Epoch 1.5 is the middle of the second epoch."""
    if int(epoch) < warmup_epochs:
        return (int(epoch) + 1) / (warmup_epochs + 1)
    if decay_epochs is None:
        return (epochs - epoch) / (epochs - warmup_epochs)
    # decay_epochs count from 1, as in the official code: the 25th epoch has the lower rate already
    decays = sum(int(epoch) + 1 >= decay for decay in decay_epochs)
    return decay_factor**decays


@torch.no_grad()
def update_ema(averaged: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move the averaged weights, if there are any, after `step` (counted from 1) steps."""
    if averaged is model:
        return
    decay = min(decay, step / (step + 9))  # a young average forgets its untrained weights faster
    for average, parameter in zip(averaged.parameters(), model.parameters(), strict=True):
        average.lerp_(parameter, 1 - decay)


def means(recent: Sequence[dict], world: int) -> dict[str, float]:
    """The means of each value over some steps and all ranks.

    Each rank divides its loss by count / world, so the mean over ranks is that of the whole batch.
    """
    row = {}
    for name in recent[0]:
        total = torch.as_tensor(sum(values[name] for values in recent))
        row[name] = round(losses.global_sum(total).item() / len(recent) / world, 6)
    return row


# ------------------------------------------------------------------------------------- the folder


def find_run(out: Path, resume: bool) -> dict | None:
    """The content of last.pt to go on from, or None. InputError: another run is there."""
    if not (out / "last.pt").exists() and not (out / "best.pt").exists():
        return None
    if not resume:
        raise InputError(f"{out}: holds a run already; go on with --resume or choose another --out")
    with data.located(out / "last.pt"):
        state = models.read(out / "last.pt").state
        if "optimizer" not in state:  # best.pt has none
            raise InputError("is no checkpoint that a run can go on from")
    return state


def find_init(name: str) -> str:
    """The file of train.init, or the same name with .zip. InputError says where it comes from."""
    path = Path(name)
    if path.exists():
        return name
    # The published download named .zip is the checkpoint itself.
    if path.with_suffix(".zip").exists():
        return str(path.with_suffix(".zip"))
    source = ""
    if path.name.startswith("beit3_"):
        source = f"download it from {BEIT3}{path.name}, or "
    elif path.name == "best.pt":
        source = f"train the recipe {path.parent.name} first, or "
    raise InputError(f"{name}: there is no such file: {source}start at random: --set train.init=")


def digest(rows: Sequence[data.Row]) -> str:
    """A digest of rows and their order that is the same wherever the images lie."""
    sha = hashlib.sha256()
    for row in rows:
        known = [(Path(each.image).name, each.expression, each.boxes, each.size) for each in row]
        sha.update(repr(known).encode())
    return sha.hexdigest()


def check_same(out: Path, last: dict, about: dict) -> None:
    """InputError if a run would go on with other settings, rows or words than before."""
    for section, keys in about["config"].items():
        for key, value in keys.items():
            was = last["config"][section].get(key, value)  # a newer key has no old value
            if value != was and key not in MAY_CHANGE:
                way = f"start another run: --init {out}/best.pt (or last.pt) and another --out"
                raise InputError(f"--resume: the run has {section}.{key}={was}; {way}")
    for name in ("rows", "tokenizer"):
        if last[name] != about[name]:
            raise InputError(f"--resume: the run was started with other data ({name})")


def begin_folder(out: Path, settings: dict, last: dict | None) -> None:
    """Write config.json for a new run; for an old one, cut off the rows behind its last.pt."""
    path = out / "metrics.jsonl"
    if not last:
        with data.located(f"--out {out}"):
            out.mkdir(parents=True, exist_ok=True)
            (out / "config.json").write_text(json.dumps(settings, indent=1))
            path.write_text("")
        return
    kept = []
    with data.located(path):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):  # the last line may be cut
                row = json.loads(line)
                is_done = row["step"] <= last["step"]
                if row["split"] != "train":
                    is_done = row["weights"] == "last" and row["epoch"] <= last["evaluated"]
                if is_done:
                    kept.append(line)
        path.write_text("".join(kept))


def write_row(out: Path, row: dict) -> None:
    with open(out / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train SimVG by a recipe; under torchrun on each GPU."
    )
    data.add_config(parser)
    parser.add_argument("--out", help="the run's folder (default: runs/RECIPE)")
    parser.add_argument("--init", help="the same as train.init: the weights to start from")
    parser.add_argument("--resume", action="store_true", help="go on with the run and its weights")
    return parser.parse_args()


if __name__ == "__main__":
    data.run(main)
