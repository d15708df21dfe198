"""The shapes of what every stage of a tiny model puts out, from pixels and words to boxes, and the
number of its parameters.

python tests/stages.py

B = 3 examples, K = 2 decoder layers, Q = 5 queries, N = 16 image tokens, L = 6 words, D = 64 (the
encoder's width), C = 32 (the heads' width). The inside of a layer is left out.
"""

import re
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import model as models

CONFIG = models.ModelConfig(
    image_size=64,
    patch_size=16,
    vocab_size=100,
    encoder_width=64,
    encoder_layers=2,
    encoder_heads=4,
    encoder_ffn=128,
    head_width=32,
    queries=5,
    tqg_layers=1,
    tqg_ffn=64,
    decoder_layers=2,
    decoder_ffn=64,
)


def show(name: str, module: nn.Module, inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
    outputs = [output] if isinstance(output, Tensor) else output
    shapes = " ".join(str(tuple(each.shape)) for each in outputs)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    print(f"{name:28}{shapes:56}{parameters:>10,}")


def main() -> None:
    net = models.SimVG(CONFIG).eval()
    for name, module in net.named_modules():
        # such as tqg, tqg.text_proj and tqg.layers.0; "" is the whole model
        if re.fullmatch(r"\w*(\.\w+|\.layers\.\d+)?", name):
            module.register_forward_hook(partial(show, name or "all"))
    tokens = torch.tensor([[0, 7, 8, 9, 2, 1], [0, 7, 8, 9, 10, 2], [0, 7, 2, 1, 1, 1]])
    print(f"{'stage':28}{'shapes of what it puts out':56}{'parameters':>10}")
    net(torch.zeros(3, 3, 64, 64, dtype=torch.uint8), tokens, text_pad=tokens == 1)


if __name__ == "__main__":
    main()
