"""Speed and size of a model, and the speed of the loader: medians, also as ratios to a baseline.

    python tests/benchmark.py model                                  # base, 640 pixels
    python tests/benchmark.py model --config configs.json:refcoco-large --set model.image_size=512
    python tests/benchmark.py loader

`model`: the baseline of each row is the same call in float32 with attention step by step (scores,
softmax, product); a speed-up of 2 is twice as fast. On a GPU float32 is TF32, as in the programs.
`loader`: pictures a second, from JPEG files to training batches, without the tokenizer. The
baseline is decoding and resizing alone, by Pillow in one process.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import model as models
import train


def medians(calls: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median seconds of each call, taken in turns, so that a busy moment meets all of them."""
    taken = {name: [] for name in calls}
    for round in tqdm(range(1 + rounds), "rounds", disable=None, leave=False):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round > 0:  # the first one reserves memory and chooses kernels
                taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in taken.items()}


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, *_
) -> Tensor:
    """F.scaled_dot_product_attention step by step, (B, H, n, D/H) each."""
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5  # (B, H, queries, keys)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return F.dropout(scores.softmax(-1), dropout_p) @ v


def plainly(call: Callable) -> None:
    with patch.object(F, "scaled_dot_product_attention", plain_attention):
        call()


def example(config: models.ModelConfig, batch: int, words: int = 20) -> data.Batch:
    """Random pictures, tokens and boxes; a quarter of the tokens is padding."""
    images = torch.randint(0, 256, (batch, 3, config.image_size, config.image_size))
    tokens = torch.randint(3, config.vocab_size, (batch, words))
    text_pad = (torch.arange(words) >= 0.75 * words).expand(batch, -1)
    boxes = 0.3 + 0.3 * torch.rand(batch, 1, 4)
    box_mask = torch.ones(batch, 1, dtype=torch.bool)
    sizes = torch.full((batch, 2), config.image_size)
    return data.Batch(images.byte(), tokens, text_pad, boxes, box_mask, sizes, [])


def print_sizes(net: models.SimVG, config: train.TrainConfig) -> None:
    encoder = sum(parameter.numel() for parameter in net.encoder.parameters()) / 1e6
    every = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    print(f"parameters, millions: encoder {encoder:.2f}, heads {every - encoder:.2f}")
    weights = 4 * every / 1e3  # of 4 bytes each
    adam = weights * (3 if config.amsgrad else 2)
    print(f"memory, GB: weights {weights:.2f}, gradients {weights:.2f}, Adam {adam:.2f}")


def model(args: argparse.Namespace, device: torch.device) -> None:
    config, _, train_config = train.read_config(args.config, args.set)
    net = models.SimVG(config).to(device)
    optimizer = train.make_optimizer(net, train_config)
    scaler = torch.amp.GradScaler(enabled=False)
    print_sizes(net, train_config)

    def forward(branch: str, batch: data.Batch, amp: torch.dtype | None) -> None:
        net(batch.images, batch.tokens, batch.text_pad, branch, amp)

    def step(batch: data.Batch, amp: torch.dtype | None) -> None:  # as in train.py
        train.backward(net, [batch], train_config, "both", amp, scaler)
        nn.utils.clip_grad_norm_(net.parameters(), train_config.clip_norm)
        optimizer.step()

    works = {branch: partial(forward, branch) for branch in ("token", "decoder", "both")}
    works["training step"] = step
    print(f"{'GFLOP per image':>52}{'ms':>10}{'images/s':>10}{'speed-up':>10}")
    for name, work in works.items():
        net.train(work is step).requires_grad_(work is step)
        for batch in args.batch:
            inputs = example(config, batch).to(device)
            # the counter knows products, but not the CPU's kernel of attention
            with FlopCounterMode(display=False) as counter:
                plainly(partial(work, inputs, None))
            giga = counter.get_total_flops() / batch / 1e9
            calls = {"fp32 step by step": partial(plainly, partial(work, inputs, None))}
            calls["fp32"] = partial(work, inputs, None)
            calls["bf16"] = partial(work, inputs, torch.bfloat16)
            taken = medians(calls, args.rounds)
            for precision, seconds in taken.items():
                title = f"{name}, batch {batch}, {precision}"
                ratio = taken["fp32 step by step"] / seconds
                speed = f"{1000 * seconds:>10.1f}{batch / seconds:>10.2f}{ratio:>10.2f}"
                print(f"{title:42}{giga:>10.2f}{speed}")


def photo() -> Image.Image:
    """Noise whose spectrum falls off like that of photographs, so that its JPEG is as large."""
    picture = torch.zeros(1, 3, 480, 640)
    for size in (1, 2, 4, 8, 16, 32, 64):
        noise = torch.randn(1, 3, 480 // size + 1, 640 // size + 1)
        picture += size**0.5 * F.interpolate(noise, size=(480, 640))
    picture = 128 + 60 * picture / picture.std()
    return to_pil_image(picture[0].clamp(0, 255).byte())


def no_words(texts: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
    """In place of a Tokenizer."""
    tokens = torch.zeros(len(texts), max_tokens, dtype=torch.int64)
    return tokens, tokens == 1


def with_pillow(rows: Sequence[data.Row], side: int) -> None:
    for row in rows:
        with Image.open(row[0].image) as image:
            image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)


def walk(dataset: data.Dataset, workers: int) -> None:
    keys = [(0, index) for index in range(len(dataset.rows))]
    batches = [keys[start : start + 16] for start in range(0, len(keys), 16)]
    for _ in data.loader(dataset, batches, data.Collate(no_words, 20), workers):
        pass


def loader(args: argparse.Namespace, device: torch.device) -> None:
    config, data_config, _ = train.read_config(args.config, args.set)
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for number in range(32):
            path = Path(folder, f"{number}.jpg")
            photo().save(path, quality=90)
            rows.append([data.Example(str(path), "a dog", [(50, 60, 200, 300)], (640, 480))])
        print(f"JPEGs of 640 x 480, the last of {path.stat().st_size:,} bytes")
        rows *= 16
        dataset = data.Dataset(rows, config.image_size, jitter=data_config.jitter)
        calls = {"Pillow": partial(with_pillow, rows, config.image_size)}
        for workers in (0, 2):
            calls[f"loader, {workers} workers"] = partial(walk, dataset, workers)
        taken = medians(calls, args.rounds)
    for name, seconds in taken.items():
        ratio = taken["Pillow"] / seconds
        print(f"{name:20}{len(rows) / seconds:>10.1f} images/s, speed-up {ratio:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a model or the loader.")
    add = parser.add_argument
    add("what", choices=["model", "loader"])
    add("--config", default="configs.json:refcoco", metavar="FILE:NAME")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    add("--batch", nargs="+", type=int, default=[1, 8], help="(default: 1 8)")
    add("--rounds", type=int, default=3, help="of which the median is taken (default: 3)")
    args = parser.parse_args()
    _, _, device = models.join_ranks()  # for the settings of the programs
    avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, AVX-512: {avx512}")
    if device.type == "cuda":
        print(torch.cuda.get_device_name(device))
    measures = {"model": model, "loader": loader}
    measures[args.what](args, device)


if __name__ == "__main__":
    data.run(main)
