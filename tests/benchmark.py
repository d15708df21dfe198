"""Speed, always as a ratio to a plain baseline in the same process and run.

    python tests/benchmark.py loader    images per second and worker process, from JPEG to a training batch
    python tests/benchmark.py model     forward and training step against the official code's way of writing them
    python tests/benchmark.py losses    matching and losses with 10 queries against the usual loop over samples
    python tests/benchmark.py growth    how the cost grows with batch, image, text and queries

The baseline is the same model and weights: separate modules for each modality around every product, explicit softmax,
every row in every layer, all in fp32, default Adam, averages in a Python loop. It is checked equal first.
"""

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

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

# ------------------------------------------------------------------------------------------------ the baseline


def plain_layer(layer: beit3.MultiwayLayer, x: Tensor, cut: int, pad: Tensor, keep: Tensor | tuple) -> Tensor:
    """x (B, T, D), the first `cut` rows being the image's; split and joined around every module, as torchscale does."""

    def each(image: Callable, text: Callable, x: Tensor) -> Tensor:
        return torch.cat([image(x[:, :cut]), text(x[:, cut:])], dim=1)

    a, b = layer.image, layer.text
    h = each(a.attn_norm, b.attn_norm, x)
    q, k, v = (each(getattr(a, n), getattr(b, n), h) for n in "qkv")
    q, k, v = (t.unflatten(2, (layer.heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)  # (B, H, T, T)
    scores = scores.masked_fill(pad[:, None, None], -torch.inf)
    attended = (F.softmax(scores, dim=-1, dtype=torch.float32).type_as(scores) @ v).transpose(1, 2).flatten(2)
    x = x + keep[0] * each(a.out, b.out, each(a.inner_norm, b.inner_norm, attended))
    h = each(a.fc1, b.fc1, each(a.ffn_norm, b.ffn_norm, x))
    h = F.gelu(h.float()).type_as(h)
    return x + keep[1] * each(a.fc2, b.fc2, each(a.hidden_norm, b.hidden_norm, h))


def plain_encoder(encoder: beit3.BEiT3, images: Tensor, tokens: Tensor, text_pad: Tensor) -> tuple[Tensor, ...]:
    patches = encoder.patch_embed(images).flatten(2).transpose(1, 2)
    image = torch.cat([encoder.object_token.expand(len(images), -1, -1), patches], dim=1) + encoder.image_positions
    text = encoder.text_embed(tokens) + encoder.text_positions[: tokens.shape[1]]
    x = torch.cat([image, text * (1 - text_pad[..., None].float())], dim=1)
    cut, pad = image.shape[1], F.pad(text_pad, (image.shape[1], 0))
    keep = encoder.drop_path(images)
    for i, layer in enumerate(encoder.layers):
        x = plain_layer(layer, x, cut, pad, (1.0, 1.0) if keep is None else keep[i])
    image, text = encoder.image_norm(x[:, :cut]), encoder.text_norm(x[:, cut:])
    return image[:, 0], image[:, 1:], text


def plain_forward(model: models.SimVG, images: Tensor, tokens: Tensor, text_pad: Tensor, branch: str) -> models.Output:
    object_token, image, text = plain_encoder(model.encoder, (images - model.mean) / model.std, tokens, text_pad)
    queries = model.tqg(text, text_pad)
    decoded = model.decoder_branch(image, queries) if branch != "token" else (None, None)
    direct = model.token_branch(object_token, queries) if branch != "decoder" else (None, None)
    return models.Output(*decoded, *direct)


def plain_step(run: train.Run, batch: data.Batch) -> None:
    output = plain_forward(run.model, *batch[:3], "both")
    terms = losses.simvg_loss(output, batch.boxes, batch.box_mask)
    run.optimizer.zero_grad()
    terms["total"].backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 0.15)
    run.optimizer.step()
    with torch.no_grad():
        for name, p in run.model.named_parameters():
            run.ema[name].copy_(0.999 * run.ema[name] + 0.001 * p)


# -------------------------------------------------------------------------------------------------- measuring


def seconds(call: Callable) -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def medians(calls: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median seconds of each, taken in turns, so that a change of the machine's mood meets all of them."""
    for call in calls.values():
        call()
    taken = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            taken[name].append(seconds(call))
    return {name: statistics.median(times) for name, times in taken.items()}


def product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of one large matrix product: the ceiling."""
    n = 8192 if DEVICE.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in range(2))
    return 2 * n**3 / medians({"": lambda: a @ b}, 5)[""]


def flops(settings: dict, words: int) -> float:
    """Of one forward pass of the encoder, products only; a training step is three times that."""
    width, ffn, layers = (settings[f"encoder_{name}"] for name in ("width", "ffn", "layers"))
    patches = (settings["image_size"] // settings["patch_size"]) ** 2
    tokens = 1 + patches + words
    products = 2 * tokens * (4 * width**2 + 2 * width * ffn) + 4 * tokens**2 * width
    return layers * products + 2 * patches * 3 * settings["patch_size"] ** 2 * width


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


def check_equal(model: models.SimVG, batch: data.Batch) -> None:
    with torch.inference_mode():
        for branch in ("both", "token"):
            ours, plain = model(*batch[:3], branch), plain_forward(model, *batch[:3], branch)
            worst = max((a - b).abs().max().item() for a, b in zip(ours, plain, strict=True) if a is not None)
            assert worst < 1e-4, worst
    print(f"outputs equal those of the baseline, largest difference {worst:.1e}")


# -------------------------------------------------------------------------------------------------- the tables


def model(size: str, batches: list[int], rounds: int) -> None:
    config = data.load_config(f"{CONFIGS}:refcoco{'-large' if size == 'large' else ''}")
    settings = config["model"]
    torch.manual_seed(0)
    net = models.SimVG(**settings).to(DEVICE).eval()
    rates = {name: product_rate(amp or torch.float32) for name, amp in PRECISIONS.items()}
    print(f"{size}, {settings['image_size']} px, {DEVICE}, {torch.get_num_threads()} threads")
    print("largest product: " + ", ".join(f"{name} {rate / 1e12:.2f} TFLOP/s" for name, rate in rates.items()))
    check_equal(net, example(settings, 2))
    print(f"{'':40}{'ms':>10}{'samples/s':>12}{'x plain':>9}{'of ceiling':>12}")
    for batch in batches:
        inputs = example(settings, batch)[:3]
        for branch in ("token", "decoder"):
            calls = {"plain fp32": partial(plain_forward, net, *inputs, branch)}
            calls |= {name: partial(net, *inputs, branch, amp) for name, amp in PRECISIONS.items()}
            with torch.inference_mode():
                report(f"{branch} branch, batch {batch}", medians(calls, rounds), batch, flops(settings, 20), rates)
    del net, calls
    for batch in batches:
        steps(config, batch, rounds, rates)


def steps(config: dict, batch: int, rounds: int, rates: dict[str, float]) -> None:
    """Training steps with averaged weights; one kind after the other, since three optimisers need much memory."""
    inputs, config, taken = example(config["model"], batch), copy.deepcopy(config), {}
    config["train"] |= {"batch_size": batch, "micro_batch": batch, "ema": True}
    for name in ("plain fp32", *PRECISIONS):
        config["train"]["amp"] = "bf16" if name == "bf16" else ""
        run = train.build(config, Path("."), 0, 1, DEVICE)
        run.ema |= {n: p.detach().clone() for n, p in run.model.named_parameters()}
        run.model.train()
        if name == "plain fp32":
            run.optimizer = torch.optim.Adam(run.model.parameters(), 1e-5, (0.9, 0.98), 1e-9, amsgrad=True)
        step = partial(plain_step if name == "plain fp32" else our_step, run, inputs)
        taken |= medians({name: step}, rounds)
        del run, step
    report(f"training step, batch {batch}", taken, batch, 3 * flops(config["model"], 20), rates)


def our_step(run: train.Run, batch: data.Batch) -> None:
    train.train_step(run, [batch])
    train.update_ema(run.ema, run.model, 0.999, 100_000)


def report(title: str, taken: dict[str, float], batch: int, work: float, rates: dict[str, float]) -> None:
    for name, time_taken in taken.items():
        ceiling = batch * work / time_taken / rates[name.removeprefix("plain ")]
        figures = f"{1000 * time_taken:10.1f}{batch / time_taken:12.2f}{taken['plain fp32'] / time_taken:9.2f}"
        print(f"{title + ', ' + name:40}{figures}{ceiling:12.0%}")


# ---- losses


def usual_match(logits: Tensor, boxes: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Layer by layer and sample by sample, with a cost tensor for each, as DETR-like code does."""
    result = torch.full(boxes.shape[:3], -1)
    for k in range(len(boxes)):
        for b in range(len(targets)):
            own = targets[b][mask[b]]
            cost = losses.L1 * torch.cdist(boxes[k, b], own, p=1) - losses.CLASS * logits[k, b].softmax(-1)[:, :1]
            cost = cost - losses.GIOU * losses.iou_giou(boxes[k, b][:, None], own[None])[1]
            rows, columns = losses.assign(cost)
            result[k, b, rows] = mask[b].nonzero()[:, 0].cpu()[columns]
    return result.to(boxes.device)


def matching(batch: int = 32, queries: int = 10, layers: int = 3, rounds: int = 15) -> None:
    inputs = example({"image_size": 32}, batch, targets=4)
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(layers, batch, queries, 2, generator=g).to(DEVICE).requires_grad_()
    raw = torch.randn(layers, batch, queries, 4, generator=g).to(DEVICE).requires_grad_()
    kept = losses.match

    def step() -> None:
        output = models.Output(logits, raw.sigmoid(), logits[-1], raw[-1].sigmoid())
        losses.simvg_loss(output, inputs.boxes, inputs.box_mask)["total"].backward()

    def usual() -> None:
        losses.match = usual_match
        try:
            step()
        finally:
            losses.match = kept

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


def growth(rounds: int = 3) -> None:
    """The token branch of base in fp32, one thing changed at a time."""
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
            taken = medians({"": call}, rounds)[""] / batch
        time_0, work_0 = first.setdefault(name, (taken, flops(own, words)))
        more, work = taken / time_0, flops(own, words) / work_0
        print(f"{name + ' ' + str(value):16}{1000 * taken:14.1f}{more:14.2f}{more / work:16.2f}")


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


class PlainLoader:
    """The usual way: Pillow decodes and resizes, the worker normalises in float and sends floats."""

    def __init__(self, rows: list[data.Row], size: int):
        self.rows, self.size = rows, size
        self.mean, self.std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def __getitem__(self, keys: list[tuple[int, int]]) -> Tensor:
        images = []
        for _, index in keys:
            with Image.open(self.rows[index].image) as file:
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


def loader(size: int = 640, batch: int = 16, steps: int = 24) -> None:
    """The main process only receives; so this is what one worker process can feed."""
    with tempfile.TemporaryDirectory() as folder:
        rows = photos(Path(folder))
        kilobytes = sum(path.stat().st_size for path in Path(folder).iterdir()) / len(rows) / 1000
        (Path(folder) / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
        section = {"annotations": f"{folder}/{{split}}.jsonl", "images": folder, "sources": {}}
        rows = data.read_rows(section, "train")
        keys = [[(0, (s * batch + i) % len(rows)) for i in range(batch)] for s in range(steps)]

        def collate(examples: list) -> data.Batch:
            return data.Batch(torch.stack([e[0] for e in examples]), *[torch.zeros(1)] * 4, [e[3] for e in examples])

        def ours(jitter: tuple | None) -> float:
            return rate(data.batches(data.Dataset(rows, size, jitter=jitter), collate, keys, workers=1), batch)

        def plain() -> float:
            options = {"sampler": keys, "batch_size": None, "num_workers": 1, "prefetch_factor": 4}
            return rate(torch.utils.data.DataLoader(PlainLoader(rows, size), **options), batch)

        print(f"JPEG 640 x 480, {kilobytes:.0f} kB each, to batches of {batch} at {size} px, one worker process")
        rounds = [(plain(), ours(None), ours((0.3, 1.4))) for _ in range(3)]
    base, whole, jittered = np.median(rounds, axis=0)
    for name, value in (("plain, float32", base), ("here", whole), ("here, with jitter", jittered)):
        print(f"{name:20} {value:6.0f} images/s {value / base:6.2f} x, 1,000 images/s need {1000 / value:.1f} workers")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["loader", "model", "losses", "growth"])
    parser.add_argument("--size", choices=["base", "large"], default="base")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8] if DEVICE.type == "cpu" else [1, 32])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.what == "model":
        evaluate.join_ranks()  # the settings of the programs
        model(args.size, args.batch, args.rounds)
    else:
        {"loader": loader, "losses": matching, "growth": growth}[args.what]()
