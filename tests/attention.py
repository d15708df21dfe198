"""Draw where a model looks: its object token, its decoder's best query, and each word.

python tests/attention.py runs/toys/best.pt data/toys/images/test_00004.jpg "the red ball"

A picture shows the attention of one token to the patches in the last layer of encoder or decoder,
as the mean over the heads; the percentage is its sum. (The rest falls on object token and text.)
It is recorded from outside: all attention is one function of torch, and another takes its place.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import evaluate

ATTEND = F.scaled_dot_product_attention


def record(maps: list[Tensor], q: Tensor, k: Tensor, v: Tensor, *mask, **options) -> Tensor:
    """In place of ATTEND. With the unit matrix as values it returns its weights (B, H, n, keys)."""
    unit = torch.eye(k.shape[2]).expand(*k.shape[:3], -1)  # (B, H, keys, keys)
    maps.append(ATTEND(q, k, unit, *mask, **options).mean(1))
    return ATTEND(q, k, v, *mask, **options)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description="Draw where a model looks for a phrase.")
    for name in ("ckpt", "image", "phrase"):
        parser.add_argument(name)
    parser.add_argument("--save", default="attention.png", help="(default: attention.png)")
    args = parser.parse_args()
    model, tokenizer = evaluate.load(args.ckpt)
    image = data.read_image(args.image)  # (3, H, W)
    resized = data.resize(image, model.config.image_size, model.config.image_size)
    maps: list[Tensor] = []
    with patch.object(F, "scaled_dot_product_attention", partial(record, maps)):
        output = model(resized[None], *tokenizer([args.phrase], model.max_tokens))
    encoder = maps[model.config.encoder_layers - 1][0]  # (1 + N + L, 1 + N + L)
    first = 1 + model.encoder.grid**2  # the row of the first token of the text, <s>
    looks = {"object token": encoder[0, 1:first]}  # (N,) each
    boxes = {}  # in pixels
    for branch in evaluate.BRANCHES:
        if model.trained_branch in ("both", branch):
            boxes[branch] = evaluate.ground(model, image, [args.phrase], tokenizer, branch)[0][0]
    if "decoder" in boxes:
        looks["decoder"] = maps[-1][0, output.decoder_logits[-1, 0].softmax(-1)[:, 0].argmax()]
    words = tokenizer.model.encode(data.clean(args.phrase), out_type=str)
    for i, word in enumerate(words[: model.max_tokens - 2], 1):
        looks[f"{i}: {word.strip('▁')}"] = encoder[first + i, 1:first]
    pictures = [data.draw(image, boxes, args.phrase)]
    for name, look in looks.items():
        heat = data.resize(look.view(1, model.encoder.grid, -1) / look.max(), *image.shape[1:])
        red = torch.tensor([255, 40, 0])[:, None, None] * heat  # (3, H, W)
        picture = (0.6 * image.float().mean(0) + red).clamp(max=255).byte()
        pictures.append(data.draw(picture, {}, f"{name}, {look.sum():.0%}"))
    data.tile(pictures, args.save)


if __name__ == "__main__":
    data.run(main)
