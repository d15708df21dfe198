"""Speed, always as a ratio to a plain baseline in the same process and run.

    python tests/benchmark.py model     forward, training step and evaluation against the official code's way of writing
    python tests/benchmark.py parts     what each optimisation gains: the program against itself without it
    python tests/benchmark.py losses    matching and losses with 10 queries against the usual loop over samples
    python tests/benchmark.py growth    how the cost grows with batch, image, text, queries and loader processes
    python tests/benchmark.py loader    images per second and worker process, from JPEG to a training batch

The baseline is the same model and weights: separate modules for each modality around every product, explicit softmax,
every row in every layer, default Adam, averages in a Python loop, glibc's own memory limits. It is checked equal first.
"""

import argparse
import copy
import ctypes
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent.parent))

import beit3
import data
import evaluate
import losses
import model as models
import train

CONFIGS = str(Path(__file__).parent.parent / "configs.json")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}
KINDS = ["plain fp32", "plain bf16", "fp32", "bf16"] + ["bf16 compiled"] * (DEVICE.type == "cuda")

# ------------------------------------------------------------------------------------------------ the baseline


def plain_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)  # (B, H, T, T)
    scores = scores.masked_fill(~attn_mask, -torch.inf)
    return F.softmax(scores, dim=-1, dtype=torch.float32).type_as(scores) @ v


def plain_gelu(x: Tensor) -> Tensor:
    return F.gelu(x.float()).type_as(x)


def plain_layer(
    layer: beit3.MultiwayLayer,
    x: Tensor,
    cut: int,
    attn_mask: Tensor,
    keep: Tensor | tuple,
    attention: Callable,
    gelu: Callable,
) -> Tensor:
    """x (B, T, D), the first `cut` rows being the image's; split and joined around every module, as torchscale does."""

    def each(image: Callable, text: Callable, x: Tensor) -> Tensor:
        return torch.cat([image(x[:, :cut]), text(x[:, cut:])], dim=1)

    a, b = layer.image, layer.text
    h = each(a.attn_norm, b.attn_norm, x)
    q, k, v = (each(getattr(a, n), getattr(b, n), h) for n in "qkv")
    q, k, v = (t.unflatten(2, (layer.heads, -1)).transpose(1, 2) for t in (q, k, v))
    attended = attention(q, k, v, attn_mask=attn_mask).transpose(1, 2).flatten(2)
    x = x + keep[0] * each(a.out, b.out, each(a.inner_norm, b.inner_norm, attended))
    h = each(a.fc1, b.fc1, each(a.ffn_norm, b.ffn_norm, x))
    return x + keep[1] * each(a.fc2, b.fc2, each(a.hidden_norm, b.hidden_norm, gelu(h)))


def plain_encoder(
    encoder: beit3.BEiT3,
    images: Tensor,
    tokens: Tensor,
    text_pad: Tensor,
    object_only: bool = False,  # never
    attention: Callable = plain_attention,
    gelu: Callable = plain_gelu,
) -> tuple[Tensor, Tensor, Tensor]:
    patches = encoder.patch_embed(images).flatten(2).transpose(1, 2)
    image = torch.cat([encoder.object_token.expand(len(images), -1, -1), patches], dim=1) + encoder.image_positions
    text = encoder.text_embed(tokens) + encoder.text_positions[: tokens.shape[1]]
    x = torch.cat([image, text * (1 - text_pad[..., None].float())], dim=1)
    cut, attn_mask = image.shape[1], F.pad(~text_pad, (image.shape[1], 0), value=True)[:, None, None]
    keep = encoder.path_scales(len(images))
    for i, layer in enumerate(encoder.layers):
        x = plain_layer(layer, x, cut, attn_mask, (1.0, 1.0) if keep is None else keep[i], attention, gelu)
    image, text = encoder.image_norm(x[:, :cut]), encoder.text_norm(x[:, cut:])
    return image[:, 0], image[:, 1:], text


def with_encoder(model: models.SimVG, encoder: Callable, *inputs) -> models.Output:
    with patch.object(model.encoder, "forward", encoder):
        return model(*inputs)


def plain_forward(model: models.SimVG, *inputs) -> models.Output:
    with glibc_limits():
        return with_encoder(model, partial(plain_encoder, model.encoder), *inputs)


def plain_step(state: train.TrainState, batch: data.Batch, encoder: Callable | None = None) -> None:
    with nullcontext() if encoder else glibc_limits():
        encoder = encoder or partial(plain_encoder, state.model.encoder)
        output = with_encoder(state.model, encoder, *batch[:3], "both", state.amp)
        terms = losses.simvg_loss(output, batch.boxes, batch.box_mask)
        state.optimizer.zero_grad()
        terms["total"].backward()
        torch.nn.utils.clip_grad_norm_(state.model.parameters(), 0.15)
        state.optimizer.step()
        plain_average(state)


@torch.no_grad()
def plain_average(state: train.TrainState) -> None:
    for name, p in state.model.named_parameters():
        state.ema[name].copy_(0.999 * state.ema[name] + 0.001 * p)


@contextmanager
def glibc_limits() -> Iterator[None]:
    """What glibc does by itself, at the largest sizes that it learns to keep."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 32 << 20)
    libc.mallopt(-1, 64 << 20)
    yield
    evaluate.keep_freed_memory()


# -------------------------------------------------------------------------------------------------- measuring


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable) -> float:
    """Of the second of two calls: the first may have to get back the memory that the call before gave away."""
    call()
    wait()
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began


def medians(calls: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median seconds of each, taken in turns, so that a change of the machine's mood meets all of them. A call that
    does not fit into the GPU's memory takes NaN."""
    taken = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            try:
                taken[name].append(seconds(call))
            except torch.OutOfMemoryError:
                taken[name].append(float("nan"))
    return {name: statistics.median(times) for name, times in taken.items()}


def product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of one large matrix product, what MFU is measured against."""
    n = 8192 if DEVICE.type == "cuda" else 2048
    a, b, c = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in range(3))
    return 2 * n**3 / medians({"": lambda: torch.mm(a, b, out=c)}, 5)[""]


@torch.inference_mode()
def products(net: models.SimVG, batch: int, words: int, branch: str, dtype: torch.dtype) -> Callable:
    """A call that does the products of the encoder's layers and nothing else: they leave no forward pass shorter."""
    layers, heads = net.encoder.layers, net.encoder.layers[0].heads
    patches, width = 1 + net.encoder.grid**2, net.encoder.text_embed.embedding_dim
    todo, made = [], {}

    def buffer(*shape: int) -> Tensor:
        return made.setdefault(shape, torch.randn(*shape, device=DEVICE).to(dtype))

    for layer in layers:
        asked = 1 if branch == "token" and layer is layers[-1] else patches  # image rows that somebody reads
        for expert, rows, read in ((layer.image, patches, asked), (layer.text, words, words)):
            for name, n in {"k": rows, "v": rows, "q": read, "out": read, "fc1": read, "fc2": read}.items():
                weight = getattr(expert, name).weight.detach().to(dtype)
                x, y = (buffer(batch * n, size) for size in weight.shape[::-1])
                todo.append(partial(torch.mm, x, weight.T, out=y))
        (each, rows), size = (batch * heads, asked + words), width // heads
        scores, k = buffer(each, rows, patches + words), buffer(each, size, patches + words)
        todo.append(partial(torch.bmm, buffer(each, rows, size), k, out=scores))
        todo.append(partial(torch.bmm, scores, k.transpose(1, 2), out=buffer(each, rows, size)))
    return lambda: [one() for one in todo]


def flops(settings: dict, words: int, branch: str = "both") -> float:
    """Of one forward pass of the encoder, products only, without rows that nobody reads; a training step takes three
    times as many."""
    width, ffn, layers = (settings[f"encoder_{name}"] for name in ("width", "ffn", "layers"))
    patches = (settings["image_size"] // settings["patch_size"]) ** 2
    tokens = 1 + patches + words
    a_row = 2 * (2 * width**2 + 2 * width * ffn) + 4 * tokens * width  # q, out, fc1, fc2; attention to all tokens
    products = layers * tokens * (a_row + 4 * width**2)  # k and v
    if branch == "token":
        products -= patches * a_row
    return products + 2 * patches * 3 * settings["patch_size"] ** 2 * width


def example(settings: dict, batch: int, words: int = 20, targets: int = 1) -> data.Batch:
    """Random pictures, words and boxes; texts of 4 words and more."""
    g = torch.Generator().manual_seed(0)
    size = settings["image_size"]
    images = torch.randint(0, 256, (batch, 3, size, size), generator=g, dtype=torch.uint8)
    tokens = torch.randint(3, 60_000, (batch, words), generator=g)
    pad = torch.arange(words) >= 4 + torch.arange(batch)[:, None] % max(1, words - 4)
    boxes = 0.3 + 0.3 * torch.rand(batch, targets, 4, generator=g)
    count = torch.arange(batch) % (targets + 1) if targets > 1 else torch.ones(batch)  # none, one, ... of several
    mask = torch.arange(targets) < count[:, None]
    return data.Batch(images, tokens.masked_fill(pad, 1), pad, boxes, mask, list(range(batch))).to(DEVICE)


def check_equal(net: models.SimVG, batch: data.Batch) -> None:
    usual = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # else a GPU rounds to TF32, in another order each
    with torch.inference_mode():
        for branch in ("both", "token"):
            ours, plain = net(*batch[:3], branch), plain_forward(net, *batch[:3], branch)
            worst = max((a - b).abs().max().item() for a, b in zip(ours, plain, strict=True) if a is not None)
            assert worst < 1e-4, worst
    torch.set_float32_matmul_precision(usual)
    print(f"outputs equal those of the baseline, largest difference {worst:.1e}")


# -------------------------------------------------------------------------------------------------- the tables


class Table:
    """Prints a row for each kind: against both baselines, the largest product and the products alone."""

    def __init__(self, settings: dict):
        self.settings = settings
        self.rates = {name: product_rate(amp or torch.float32) for name, amp in PRECISIONS.items()}
        print("one large product: " + ", ".join(f"{k} {v / 1e12:.2f} TFLOP/s" for k, v in self.rates.items()))
        print(f"{'':46}{'ms':>9}{'samples/s':>11}{'x plain':>9}{'x bf16':>8}{'MFU':>6}{'products':>10}{'GB':>7}")

    def rows(self, title: str, taken: dict, batch: int, work: float, alone: dict, peaks: dict) -> None:
        """`work` FLOP a sample; `alone` seconds of the products in each precision, if known; `peaks` bytes."""
        for name, time_taken in taken.items():
            if time_taken != time_taken:
                print(f"{title + ', ' + name:46} does not fit")
                continue
            precision = "bf16" if "bf16" in name else "fp32"
            ratios = "".join(f"{taken[k] / time_taken:{n}.2f}" for k, n in (("plain fp32", 9), ("plain bf16", 8)))
            share = f"{alone[precision] / time_taken:10.0%}" if alone else " " * 10
            mfu = f"{batch * work / time_taken / self.rates[precision]:6.0%}"
            memory = f"{peaks[name] / 1e9:7.1f}" if peaks else ""
            speed = f"{1000 * time_taken:9.1f}{batch / time_taken:11.2f}"
            print(f"{title + ', ' + name:46}{speed}{ratios}{mfu}{share}{memory}")


def peak(call: Callable, before: int) -> float:
    """Bytes of tensors at most on a GPU, without those that were there `before`."""
    torch.cuda.reset_peak_memory_stats()
    try:
        call()
    except torch.OutOfMemoryError:
        pass
    return torch.cuda.max_memory_allocated() - before


def model(size: str, batches: list[int], rounds: int) -> None:
    config = data.load_config(f"{CONFIGS}:refcoco{'-large' if size == 'large' else ''}")
    settings = config["model"]
    torch.manual_seed(0)
    net = models.SimVG(**settings).to(DEVICE).eval()
    print(f"\n{size}, {settings['image_size']} px, {DEVICE}, {torch.get_num_threads()} threads")
    check_equal(net, example(settings, 2))
    table = Table(settings)
    for batch in batches:
        for branch in ("token", "decoder"):
            forward(table, net, batch, branch, rounds)
        end_to_end(table, net, batch, rounds)
    del net
    for batch in batches:
        steps(table, config, batch, rounds)


@torch.inference_mode()
def forward(table: Table, net: models.SimVG, batch: int, branch: str, rounds: int) -> None:
    inputs, halved = (*example(table.settings, batch)[:3], branch), in_16_bits(net)
    calls = {f"plain {name}": partial(plain_forward, net, *inputs, amp) for name, amp in PRECISIONS.items()}
    calls |= {"fp32": partial(net, *inputs), "bf16": partial(halved, *inputs, torch.bfloat16)}
    peaks = {}
    if DEVICE.type == "cuda":
        calls["bf16 compiled"] = partial(compiled(copy.deepcopy(halved)), *inputs, torch.bfloat16)
        for name, call in calls.items():
            weights = sum(p.nbytes for p in (halved if name.startswith("bf16") else net).parameters())
            peaks[name] = peak(call, torch.cuda.memory_allocated() - weights)
    alone = {n: products(net, batch, 20, branch, amp or torch.float32) for n, amp in PRECISIONS.items()}
    taken, work = medians(calls, rounds), flops(table.settings, 20, branch)
    table.rows(f"{branch} branch, batch {batch}", taken, batch, work, medians(alone, rounds), peaks)


def in_16_bits(net: models.SimVG) -> models.SimVG:
    net = copy.deepcopy(net)
    net.encoder.keep_in_16_bits(torch.bfloat16)
    return net


def compiled(net: models.SimVG) -> models.SimVG:
    for layer in net.encoder.layers:
        layer.compile()
    return net


def steps(table: Table, config: dict, batch: int, rounds: int) -> None:
    """Training steps with averaged weights; one kind after the other, since several optimisers need much memory."""
    inputs, taken, peaks = example(config["model"], batch), {}, {}
    before = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
    for kind in KINDS:
        state = build(config, "bf16" if "bf16" in kind else "", "compiled" in kind)
        if kind.startswith("plain"):
            state.optimizer = plain_adam(state.model)
        step = partial(plain_step if kind.startswith("plain") else our_step, state, inputs)
        if DEVICE.type == "cuda":
            peaks[kind] = peak(step, before)
        taken |= medians({kind: step}, rounds)
        del state, step
    table.rows(f"training step, batch {batch}", taken, batch, 3 * flops(config["model"], 20, "both"), {}, peaks)


def build(config: dict, amp: str, compiled: bool = False) -> train.TrainState:
    config = copy.deepcopy(config)
    config["train"] |= {"amp": amp, "compile": compiled}
    state = train.build(config, Path("."), 0, 1, DEVICE)
    state.ema |= {name: p.detach().clone() for name, p in state.model.named_parameters()}
    state.model.train()
    return state


def plain_adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), 1e-5, (0.9, 0.98), 1e-9, amsgrad=True)


def our_step(state: train.TrainState, batch: data.Batch) -> None:
    train.train_step(state, [batch])
    train.update_ema(state.ema, state.model, 0.999, 100_000)


def end_to_end(table: Table, net: models.SimVG, batch: int, rounds: int) -> None:
    """From JPEGs to counted answers of the token branch, as `evaluate.py` does it and in the usual way."""
    size, workers = table.settings["image_size"], 0 if DEVICE.type == "cpu" else 8
    with tempfile.TemporaryDirectory() as folder:
        rows = photo_rows(folder)[:16] if DEVICE.type == "cpu" else photo_rows(folder) * max(1, batch // 8)
        dataset = data.Dataset(rows, size)

        def collate(examples: list) -> data.Batch:
            random = example(table.settings, len(examples)).to(torch.device("cpu"))
            return random._replace(images=torch.stack([e[0] for e in examples]), index=[e[3] for e in examples])

        def plain(amp: torch.dtype | None) -> None:
            keys = [[(0, i) for i in range(len(rows))[start : start + batch]] for start in range(0, len(rows), batch)]
            random = example(table.settings, batch)
            for images in torch.utils.data.DataLoader(PlainLoader(rows, size), None, sampler=keys, num_workers=workers):
                x = random._replace(images=images.to(DEVICE))
                output = plain_forward(net, *(each[: len(images)] for each in x[:3]), "both", amp)
                for i in range(len(images)):
                    ((_, box),) = evaluate.pick_answers(output[2][i : i + 1], output[3][i : i + 1])
                    evaluate.rec_correct(box * size, x.boxes[0, :1].cpu())

        nets = {None: net, torch.bfloat16: in_16_bits(net)}
        calls = {f"plain {name}": partial(plain, amp) for name, amp in PRECISIONS.items()}
        for name, amp in PRECISIONS.items():
            calls[name] = partial(evaluate.evaluate_dataset, nets[amp], dataset, collate, "token", batch, workers, amp)
        with torch.inference_mode():
            taken = medians(calls, max(1, rounds // 2))
        work = flops(table.settings, 20, "token")
        table.rows(f"evaluation of JPEGs, batch {batch}", taken, len(rows), work, {}, {})


def kernels(size: str, batch: int) -> None:
    """The five operations that a training step in bf16 spends most time in."""
    config = data.load_config(f"{CONFIGS}:refcoco{'-large' if size == 'large' else ''}")
    state, inputs = build(config, "bf16"), example(config["model"], batch)
    our_step(state, inputs)
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (DEVICE.type == "cuda")
    with profile(activities=kinds) as seen:
        our_step(state, inputs)
        wait()
    order = "self_cpu_time_total" if DEVICE.type == "cpu" else "self_device_time_total"
    print(seen.key_averages().table(sort_by=order, row_limit=5, max_name_column_width=60))


# ---- parts


def ladder(net: models.SimVG) -> dict[str, Callable]:
    """The encoder from the plain one to ours, an optimisation a rung; all without glibc's own limits."""
    plain, ours = partial(plain_encoder, net.encoder), net.encoder.forward
    fused = {"attention": F.scaled_dot_product_attention}
    return {
        "freed memory is kept": plain,
        "attention in one kernel": partial(plain, **fused),
        "GELU in the precision it comes in": partial(plain, **fused, gelu=F.gelu),
        "split and joined once a layer": lambda *x, object_only: ours(*x),
        "last layer: only rows that are read": ours,
    }


def parts(rounds: int) -> None:
    """What each optimisation gains over the one before."""
    config = data.load_config(f"{CONFIGS}:refcoco")
    torch.manual_seed(0)
    net = models.SimVG(**config["model"]).to(DEVICE).eval()
    with torch.inference_mode():
        for batch in (1, 8) if DEVICE.type == "cpu" else (1, 32):
            inputs = *example(config["model"], batch)[:3], "token"
            for name, amp in PRECISIONS.items():
                calls = {"plain": partial(plain_forward, net, *inputs, amp)}
                calls |= {n: partial(with_encoder, net, e, *inputs, amp) for n, e in ladder(net).items()}
                if amp:
                    calls["weights kept in 16 bits"] = partial(in_16_bits(net), *inputs, amp)
                gains(f"token branch, batch {batch}, {name}", medians(calls, rounds))
    del net, calls
    inputs = example(config["model"], 2 if DEVICE.type == "cpu" else 32)
    for name in PRECISIONS:
        state = build(config, name.removeprefix("fp32"))
        state.optimizer, ours = plain_adam(state.model), state.optimizer
        encoders = {"plain": None} | ladder(state.model)
        del encoders["last layer: only rows that are read"]  # in training all are
        taken = medians({n: partial(plain_step, state, inputs, e) for n, e in encoders.items()}, rounds)
        state.optimizer = ours
        taken |= medians({"Adam in one kernel, averages in another": partial(our_step, state, inputs)}, rounds)
        gains(f"training step, batch {len(inputs.index)}, {name}", taken)
        del state, ours, encoders


def gains(title: str, taken: dict[str, float]) -> None:
    print(f"\n{title:46}{'ms':>9}{'gain':>8}")
    before = next(iter(taken.values()))
    for name, now in taken.items():
        print(f"{name:46}{1000 * now:9.1f}" + (f"{before / now - 1:8.1%}" if before != now else ""))
        before = now


# ---- losses


def usual_match(logits: Tensor, boxes: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Layer by layer and sample by sample, with a cost tensor for each, as DETR-like code does."""
    result = torch.full(boxes.shape[:3], -1)
    M = mask.shape[1]
    for k in range(len(boxes)):
        for b in range(len(targets)):
            own = targets[b, :M][mask[b]]
            cost = losses.L1 * torch.cdist(boxes[k, b], own, p=1) - losses.CLASS * logits[k, b].softmax(-1)[:, :1]
            cost = cost - losses.GIOU * losses.iou_giou(boxes[k, b][:, None], own[None])[1]
            rows, columns = losses.assign(cost)
            result[k, b, rows] = mask[b].nonzero()[:, 0].cpu()[columns]
    result = result.to(boxes.device)
    if targets.shape[1] == M:
        return result
    again = usual_match(logits[-1:], boxes[-1:], targets[:, M:], result[-2] >= 0)  # the student and the teacher's boxes
    return torch.cat([result, torch.where(again >= 0, again + M, -1)])


def matching(batch: int = 32, queries: int = 10, layers: int = 3, rounds: int = 15) -> None:
    inputs = example({"image_size": 32}, batch, targets=4)
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(layers, batch, queries, 2, generator=g).to(DEVICE).requires_grad_()
    raw = torch.randn(layers, batch, queries, 4, generator=g).to(DEVICE).requires_grad_()

    def step() -> None:
        output = models.Output(logits, raw.sigmoid(), logits[-1], raw[-1].sigmoid())
        losses.simvg_loss(output, inputs.boxes, inputs.box_mask)["total"].backward()

    def usual() -> None:
        with patch.object(losses, "match", usual_match):
            step()

    with torch.no_grad():
        arguments = logits, raw.sigmoid(), inputs.boxes, inputs.box_mask
        assert torch.equal(losses.match(*arguments), usual_match(*arguments))
        both = medians({"usual": lambda: usual_match(*arguments), "here": lambda: losses.match(*arguments)}, rounds)
    print(f"batch {batch}, {queries} queries, {layers} layers, 0 to 4 targets; the matchings are equal")
    whole = medians({"usual": usual, "here": step}, rounds)
    for title, taken in {"matching": both, "matching, losses, gradients": whole}.items():
        usual_time, time_here = 1000 * taken["usual"], 1000 * taken["here"]
        ratio = usual_time / time_here
        print(f"{title:30} usual loop {usual_time:7.1f} ms, here {time_here:6.1f} ms: {ratio:.1f} x")


# ---- growth


def growth(rounds: int) -> None:
    """The decoder branch of base in fp32, one thing changed at a time; then the loader."""
    settings = data.load_config(f"{CONFIGS}:refcoco")["model"]
    changes = [("batch", b) for b in (1, 2, 4, 8, 16, 32, 64)] + [("image", s) for s in (320, 448, 640, 832, 1024)]
    changes += [("text", n) for n in (20, 40, 64)] + [("queries", q) for q in (1, 10, 50)]
    print(f"{'':16}{'ms a sample':>14}{'x the first':>14}{'x its products':>16}")
    first: dict[str, tuple[float, float]] = {}
    for name, value in changes:
        key = {"image": "image_size", "queries": "queries"}.get(name)
        own = {**settings, **({key: value} if key else {})}
        batch, words = value if name == "batch" else 1, value if name == "text" else 20
        net = models.SimVG(**own).to(DEVICE).eval()
        with torch.inference_mode():
            call = partial(net, *example(own, batch, words)[:3], "decoder")
            taken = medians({"": call}, 1 if batch > 8 else rounds)[""] / batch
        time_0, work_0 = first.setdefault(name, (taken, flops(own, words)))
        more, work = taken / time_0, flops(own, words) / work_0
        print(f"{name + ' ' + str(value):16}{1000 * taken:14.1f}{more:14.2f}{more / work:16.2f}")
    with tempfile.TemporaryDirectory() as folder:
        rows = photo_rows(folder)
        for workers in (0, 1, 2):
            each = 1000 / rate(our_batches(rows, None, workers), LOADED)
            print(f"{f'workers {workers}':16}{each:14.1f}{each / first.setdefault('workers', (each, 1))[0]:14.2f}")


# ---- loader


def photos(folder: Path, count: int = 32) -> list[dict]:
    """Pictures whose spectrum falls off like that of photographs, as JPEG of some 140 kB, and their rows."""
    rng, rows = np.random.default_rng(0), []
    for i in range(count):
        picture = np.zeros((480, 640, 3))
        for step in (1, 2, 4, 8, 16, 32, 64):
            noise = rng.normal(size=(480 // step + 1, 640 // step + 1, 3))
            picture += step**0.5 * np.kron(noise, np.ones((step, step, 1)))[:480, :640]
        picture = np.clip(128 + 60 * picture / picture.std(), 0, 255).astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{i}.jpg", quality=92)
        row = {"image": f"{i}.jpg", "expressions": ["the left one"], "boxes": [[50, 60, 200, 300]]}
        rows.append({**row, "width": 640, "height": 480})
    return rows


def photo_rows(folder: str) -> list[data.Row]:
    (Path(folder) / "train.jsonl").write_text("\n".join(map(json.dumps, photos(Path(folder)))))
    section = {"annotations": f"{folder}/{{split}}.jsonl", "images": folder, "sources": {}}
    return data.read_rows(section, "train")


class PlainLoader:
    """The usual way: Pillow decodes and resizes, the worker normalises in float and sends floats."""

    def __init__(self, rows: list[data.Row], size: int):
        self.rows, self.size = rows, size
        self.mean, self.std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def __getitem__(self, keys: list[tuple[int, int]]) -> Tensor:
        images = []
        for _, index in keys:
            with Image.open(self.rows[index][0].image) as file:
                image = file.convert("RGB").resize((self.size, self.size), Image.Resampling.BILINEAR)
            images.append((torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 - self.mean) / self.std)
        return torch.stack(images)


def rate(loader, images: int) -> float:
    """Images per second after the first batch."""
    iterator = iter(loader)
    next(iterator)
    began, batches = time.perf_counter(), 0
    for _ in iterator:
        batches += 1
    return batches * images / (time.perf_counter() - began)


LOADED, STEPS, SIZE = 16, 24, 640  # pictures a batch, batches, pixels


def loader_keys(rows: list) -> list:
    return [[(0, (s * LOADED + i) % len(rows)) for i in range(LOADED)] for s in range(STEPS)]


def our_batches(rows: list, jitter: tuple | None, workers: int = 1) -> Iterator:
    def collate(examples: list) -> data.Batch:
        return data.Batch(torch.stack([e[0] for e in examples]), *[torch.zeros(1)] * 4, [e[3] for e in examples])

    return data.batches(data.Dataset(rows, SIZE, jitter=jitter), collate, loader_keys(rows), workers)


def loader() -> None:
    """The main process only receives; so this is what one worker process can feed."""
    with tempfile.TemporaryDirectory() as folder:
        rows = photo_rows(folder)
        kilobytes = sum(path.stat().st_size for path in Path(folder).glob("*.jpg")) / len(rows) / 1000
        options = {"sampler": loader_keys(rows), "batch_size": None, "num_workers": 1, "prefetch_factor": 4}

        def plain() -> float:
            return rate(torch.utils.data.DataLoader(PlainLoader(rows, SIZE), **options), LOADED)

        print(f"JPEG 640 x 480, {kilobytes:.0f} kB each, to batches of {LOADED} at {SIZE} px, one worker process")
        ours = partial(our_batches, rows)
        in_a_row = partial(our_batches, [row for row in rows for _ in range(7)], None)  # as RefCOCO's are evaluated
        rounds = [
            (plain(), rate(ours(None), LOADED), rate(ours((0.3, 1.4)), LOADED), rate(in_a_row(), LOADED))
            for _ in range(3)
        ]
    names = ("plain, float32", "here", "here, with jitter", "here, 7 expressions of each image in a row")
    base = np.median(rounds, axis=0)[0]
    for name, value in zip(names, np.median(rounds, axis=0), strict=True):
        print(f"{name:42} {value:6.0f} images/s {value / base:6.2f} x, 1,000 images/s need {1000 / value:.1f} workers")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["model", "parts", "losses", "growth", "loader"])
    parser.add_argument("--size", nargs="+", choices=["base", "large"], default=["base", "large"])
    parser.add_argument("--batch", nargs="+", type=int, help="default: 1 8; large on a CPU 1; on a GPU 1 32 ... 512")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    evaluate.join_ranks()  # the settings of the programs
    if args.what == "model":
        for size in args.size:
            usual = [1, 32, 64, 128, 256, 512] if DEVICE.type == "cuda" else [1, 8] if size == "base" else [1]
            model(size, args.batch or usual, args.rounds)
            kernels(size, min(args.batch or usual, key=lambda b: abs(b - 32)) if DEVICE.type == "cuda" else 1)
    elif args.what == "losses":
        matching()
    elif args.what == "loader":
        loader()
    else:
        {"parts": parts, "growth": growth}[args.what](args.rounds)
