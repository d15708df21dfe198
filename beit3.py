"""The BEiT-3 multiway encoder: one transformer, two sets of weights (arXiv 2208.10442; SimVG Sec. 3.1, Eq. 1).

    images (B, 3, S, S) float, tokens (B, L) int64, text_pad (B, L) bool, True = padding
      -> object token (B, D), image tokens (B, N, D), text tokens (B, L, D)

B batch, N = (S / patch)^2 patches, L words, T = 1 + N + L, D width, H heads.

Every layer holds an image expert (object token and patches) and a text expert (words). The two meet only in
the attention, where every token sees every token. The residual streams of image and text therefore stay two
tensors, and no split position has to be passed around.

Differences from torchscale's code: two streams instead of one that is cut in 8 places; scaled_dot_product_attention;
without the unused mask token and the two unused rows of each position table.
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

OBJECT_TOKENS = 1  # BEiT-3's [CLS]; if there were more, their mean would be the object token
TEXT_POSITIONS = 1022  # of every released BEiT-3, without the two rows of its table that are never read
# The number of words of its tokenizer beit3.spm, and `data.Tokenizer.digest` of it (the file's sha256 is 6f5e2fef...).
WORDS, TOKENIZER = 64010, "33a8c42624e4c1e48442905d5473f333b86adf81ac151fa426b755400b3df8b0"


class Expert(nn.Module):
    """All the weights that one modality owns in one layer; D = width, every shape (B, n, D) -> (B, n, D)."""

    def __init__(self, width: int, ffn: int):
        super().__init__()
        self.attn_norm = nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.inner_norm = nn.LayerNorm(width)  # sub-LN: a second norm inside each half of the layer
        self.out = nn.Linear(width, width)
        self.ffn_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, ffn)
        self.hidden_norm = nn.LayerNorm(ffn)
        self.fc2 = nn.Linear(ffn, width)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.hidden_norm(F.gelu(self.fc1(self.ffn_norm(x)))))


class MultiwayLayer(nn.Module):
    """Joint attention over image and text, then each modality's own feed-forward network."""

    def __init__(self, width: int, heads: int, ffn: int):
        super().__init__()
        self.image, self.text = Expert(width, ffn), Expert(width, ffn)
        self.heads = heads

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        attn_mask: Tensor,
        path_scale: Tensor | None = None,
        object_only: bool = False,
        maps: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """image (B, 1+N, D), text (B, L, D), attn_mask (B, 1, 1, T) bool -> the updated image and text.

        `path_scale` (2, B, 1, 1) scales what attention and feed-forward add, see `BEiT3.path_scales`. With
        `object_only` the patches are still read, but of the image only the object token is updated: (B, 1, D). The
        attention of every token to every token (B, T, T), the mean over heads, is appended to `maps`.
        """
        h_image, h_text = self.image.attn_norm(image), self.text.attn_norm(text)
        k = self._join(self.image.k(h_image), self.text.k(h_text))  # (B, H, T, D/H)
        v = self._join(self.image.v(h_image), self.text.v(h_text))
        if object_only:
            image, h_image = image[:, :OBJECT_TOKENS], h_image[:, :OBJECT_TOKENS]  # (B, 1, D)
        q = self._join(self.image.q(h_image), self.text.q(h_text))
        if maps is not None:  # the fused kernel below never holds them
            scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5  # (B, H, T, T)
            maps.append(scores.masked_fill(~attn_mask, -torch.inf).softmax(-1).mean(1))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        attended = attended.transpose(1, 2).flatten(2)  # (B, T, D); with object_only (B, 1+L, D)
        a_image, a_text = attended.split([image.shape[1], text.shape[1]], dim=1)

        image = _add(image, self.image.out(self.image.inner_norm(a_image)), path_scale, 0)
        text = _add(text, self.text.out(self.text.inner_norm(a_text)), path_scale, 0)
        image = _add(image, self.image.feed_forward(image), path_scale, 1)
        text = _add(text, self.text.feed_forward(text), path_scale, 1)
        return image, text

    def _join(self, image: Tensor, text: Tensor) -> Tensor:
        joined = torch.cat([image, text], dim=1)  # (B, T, D)
        return joined.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, H, T, D/H)


def _add(x: Tensor, change: Tensor, path_scale: Tensor | None, half: int) -> Tensor:
    return x + change if path_scale is None else x + path_scale[half] * change


class BEiT3(nn.Module):
    """See the head of this file; `drop_path` is the rate of the last layer."""

    def __init__(
        self, image_size: int, patch: int, vocab: int, width: int, layers: int, heads: int, ffn: int, drop_path: float
    ):
        super().__init__()
        assert not image_size % patch and not width % heads, "the patch must divide the image, the heads the width"
        self.grid = image_size // patch
        self.patch_embed = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.text_embed = nn.Embedding(vocab, width)
        self.object_token = nn.Parameter(torch.zeros(1, OBJECT_TOKENS, width))  # BEiT-3's [CLS]
        self.image_positions = nn.Parameter(torch.empty(OBJECT_TOKENS + self.grid**2, width))
        self.text_positions = nn.Parameter(torch.empty(TEXT_POSITIONS, width))
        self.layers = nn.ModuleList(MultiwayLayer(width, heads, ffn) for _ in range(layers))
        # grows from 0 in the first layer to its full rate in the last; for `large` that is 0 (D10)
        rates = torch.tensor([drop_path * i / max(layers - 1, 1) for i in range(layers)])
        self.register_buffer("drop_rates", rates, persistent=False)
        self.drops = drop_path > 0  # a Python bool, because reading the buffer would wait for the device
        self.image_norm, self.text_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.checkpointing = False  # recompute each layer in the backward pass
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights to train from scratch with (deviation D7); otherwise a small model stays at the mean box for long."""
        for name, layer in self.layers.named_modules():
            if isinstance(layer, nn.Linear):
                # Small residual outputs: at the start each layer is close to the identity.
                nn.init.xavier_uniform_(layer.weight, gain=0.2 if name.endswith(("out", "fc2")) else 1.0)
                nn.init.zeros_(layer.bias)
        width = self.text_embed.embedding_dim
        nn.init.normal_(self.text_embed.weight, std=1.0)
        with torch.no_grad():
            self.image_positions[:OBJECT_TOKENS].zero_()
            self.image_positions[OBJECT_TOKENS:] = sine_2d(self.grid, width)
            self.text_positions.copy_(sine_1d(torch.arange(TEXT_POSITIONS), width))

    def forward(
        self, images: Tensor, tokens: Tensor, text_pad: Tensor, object_only: bool = False, maps: list | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See the head of this file. With `object_only` the image tokens come back empty, (B, 0, D). Each layer appends
        its attention to `maps`, see `MultiwayLayer`."""
        image, text, attn_mask = self.embed(images, tokens, text_pad)
        path_scales = self.path_scales(images.shape[0])
        recompute = self.checkpointing and torch.is_grad_enabled()
        for i, layer in enumerate(self.layers):
            last = i == len(self.layers) - 1
            scale = None if path_scales is None else path_scales[i]
            inputs = image, text, attn_mask, scale, object_only and last, maps
            image, text = checkpoint(layer, *inputs, use_reentrant=False) if recompute else layer(*inputs)
        image, text = self.image_norm(image), self.text_norm(text)
        return image[:, :OBJECT_TOKENS].mean(1), image[:, OBJECT_TOKENS:], text

    def embed(self, images: Tensor, tokens: Tensor, text_pad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Eq. 1: image (B, 1+N, D), text (B, L, D), and attn_mask (B, 1, 1, T), which is False for padding."""
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)  # (B, N, D)
        # flattened: for one example DDP would warn of its gradient's strides
        object_token = self.object_token.flatten().view(OBJECT_TOKENS, -1).expand(images.shape[0], -1, -1)  # (B, 1, D)
        image = torch.cat([object_token, patches], dim=1) + self.image_positions
        text = self.text_embed(tokens) + self.text_positions[: tokens.shape[1]]  # (B, L, D)
        text = text.masked_fill(text_pad[..., None], 0)
        attn_mask = F.pad(~text_pad, (image.shape[1], 0), value=True)[:, None, None]  # (B, 1, 1, T)
        return image, text, attn_mask

    def path_scales(self, batch: int) -> Tensor | None:
        """Drop path. In training (layers, 2, B, 1, 1): 0 for the samples whose residual branch is skipped, else
        1 / the probability of keeping it. The layers do not draw them, because torch.compile would compile each layer
        anew for its own rate."""
        if not self.training or not self.drops:
            return None
        keep = 1 - self.drop_rates[:, None, None, None, None]  # (layers, 1, 1, 1, 1)
        return torch.bernoulli(keep.expand(-1, 2, batch, 1, 1)) / keep

    def keep_in_16_bits(self, amp: torch.dtype) -> None:
        """Store the matrices in the precision that autocast would cast them to in every call. For inference with this
        `amp`; the answers stay the same."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(amp)


def sine_1d(places: Tensor, width: int, one_frequency: bool = False) -> Tensor:
    """1-D absolute sine positions of places (n,) -> (n, width): sin on even, cos on odd columns, temperature 10000.

    `one_frequency` (D4) is what the official code computes: all frequencies but the first are cut to zero.
    """
    frequency = 10000 ** (-torch.arange(0, width, 2) / width)  # (width/2,)
    if one_frequency:
        frequency = frequency.long().float()
    angle = places[:, None] * frequency  # (n, width/2)
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)


def sine_2d(grid: int, width: int) -> Tensor:
    """2-D absolute sine positions (grid*grid, width) of DETR: first half y, second half x, each over (0, 2 pi]."""
    places = torch.arange(1, grid + 1) / (grid + 1e-6) * 2 * math.pi  # (grid,)
    axis = sine_1d(places, width // 2)  # (grid, width/2)
    y, x = axis[:, None].expand(-1, grid, -1), axis[None].expand(grid, -1, -1)
    return torch.cat([y, x], dim=2).flatten(0, 1)


# ---------------------------------------------------------------------------------- BEiT-3 checkpoint files

# Names in BEiT-3's files -> names here: regular expressions, applied one after the other. What stands before stays.
_NAMES = {
    r"vision_embed\.cls_token": "object_token",
    r"vision_embed\.proj": "patch_embed",
    r"encoder\.embed_positions\.A\.weight": "image_positions",
    r"encoder\.embed_positions\.B\.weight": "text_positions",
    r"encoder\.layer_norm\.A": "image_norm",
    r"encoder\.layer_norm\.B": "text_norm",
    # A marks the image expert and B the text expert, as in self_attn.q_proj.A.weight and ffn.A.fc1.weight
    r"encoder\.(layers\.\d+)\.(.+)\.A\b": r"\1.image.\2",
    r"encoder\.(layers\.\d+)\.(.+)\.B\b": r"\1.text.\2",
    r"self_attn_layer_norm": "attn_norm",
    r"self_attn\.([qkv])_proj": r"\1",
    r"self_attn\.inner_attn_ln": "inner_norm",
    r"self_attn\.out_proj": "out",
    r"final_layer_norm": "ffn_norm",  # in spite of its name the norm *before* the feed-forward network
    r"ffn\.ffn_layernorm": "hidden_norm",
    r"ffn\.(fc[12])": r"\1",
}
UNUSED = "vision_embed.mask_token"  # the only tensor of a BEiT-3 encoder that grounding never reads


def from_beit3(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with BEiT-3's tensors under this file's names. Other tensors, and prefixes, stay as they are."""
    ours = renamed({name: value for name, value in official.items() if not name.endswith(UNUSED)}, _NAMES)
    # fairseq starts to count positions at 2: the first two rows are never read
    return {name: value[2:] if name.endswith("_positions") else value for name, value in ours.items()}


def renamed(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """In every name each regular expression of `names` is replaced, one after the other."""
    for pattern, replacement in names.items():
        weights = {re.sub(pattern, replacement, name): value for name, value in weights.items()}
    return weights


def pretrained_weights(state: dict, encoder: BEiT3) -> tuple[dict[str, Tensor], list[str]]:
    """A BEiT-3 checkpoint -> the tensors of `encoder`, fitted to its grid and patch, and the names that are not used:
    the mask token, and whatever lies outside, such as pre-training heads. ValueError if it holds no encoder."""
    found = state.get("model") or state.get("module") or state
    official = {name.removeprefix("beit3."): value for name, value in found.items() if name.startswith("beit3.")}
    if not official:
        raise ValueError("it holds neither SimVG nor BEiT-3 weights")
    unused = sorted(name for name in found if not name.startswith("beit3.") or name == f"beit3.{UNUSED}")
    return from_beit3(resize_pretrained(official, encoder.grid, encoder.patch_embed.kernel_size[0])), unused


def resize_positions(table: Tensor, grid: int, extra: int) -> Tensor:
    """(extra + g*g, D) -> (extra + grid*grid, D): the first `extra` rows are kept, the rest is a picture g x g."""
    old = math.isqrt(len(table) - extra)
    if old == grid:
        return table
    picture = table[extra:].float().T.reshape(1, -1, old, old)  # (1, D, g, g)
    picture = F.interpolate(picture, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([table[:extra].float(), picture.flatten(2)[0].T])


def resize_pretrained(state_dict: dict[str, Tensor], grid: int, patch: int) -> dict[str, Tensor]:
    """BEiT-3 tensors under BEiT-3's names, fitted to grid x grid patches of patch x patch pixels.

    Bicubic without antialias, in float32. The patch kernel is not rescaled, so going from 16 to 32 pixels makes
    patch embeddings about 4 times larger, as in the official code.
    """
    fitted = dict(state_dict)
    for name, value in state_dict.items():
        if name.endswith("encoder.embed_positions.A.weight"):
            fitted[name] = resize_positions(value, grid, extra=3)  # two rows never read, and the object token's
        elif name.endswith("vision_embed.proj.weight") and value.shape[-1] != patch:
            fitted[name] = F.interpolate(value.float(), size=(patch, patch), mode="bicubic", align_corners=False)
    return fitted
