"""The BEiT-3 multiway encoder: one transformer with two sets of weights (arXiv 2208.10442).

    images (B, 3, S, S) float, tokens (B, L) int64, text_pad (B, L) bool, True = padding
      -> object token (B, D), image tokens (B, N, D), text tokens (B, L, D)

B batch, N = (S / patch)^2 patches, L words, T = 1 + N + L, D width, H heads.

Why BEiT-3: its pre-training has already taught it to fuse image and text, so that SimVG needs no
fusion module of its own (SimVG Sec. 3.1). "Multiway" means that every layer holds an image expert
(for the object token and the patches) and a text expert (for the words). The two meet only in the
attention, where every token sees every token. The residual streams of image and text therefore stay
two tensors, and no split position has to be passed around.

Differences from torchscale's code: two streams instead of one that is cut where the experts part;
scaled_dot_product_attention; no mask token and no unused rows in the position tables.
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Every released BEiT-3 has 1,024 rows. fairseq starts to count at 2, so the first two are not used.
TEXT_POSITIONS = 1022


class Expert(nn.Module):
    """All the weights that one modality owns in one layer; shapes are (B, n, D) -> (B, n, D)."""

    def __init__(self, width: int, ffn: int):
        super().__init__()
        self.attn_norm = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        # Sub-LN, from Magneto: a second norm inside each half keeps deep training stable.
        self.inner_norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, width)
        self.ffn_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, ffn)
        self.hidden_norm = nn.LayerNorm(ffn)
        self.fc2 = nn.Linear(ffn, width)

    def feed_forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.fc1(self.ffn_norm(x)))  # (B, n, ffn)
        return self.fc2(self.hidden_norm(hidden))


class MultiwayLayer(nn.Module):
    """Joint attention over image and text, then each modality's own feed-forward network."""

    def __init__(self, width: int, heads: int, ffn: int):
        super().__init__()
        self.image = Expert(width, ffn)
        self.text = Expert(width, ffn)
        self.heads = heads

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        attn_mask: Tensor,
        attn_scale: Tensor | None = None,
        ffn_scale: Tensor | None = None,
        object_only: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """image (B, 1+N, D), text (B, L, D), attn_mask (B, 1, 1, T) bool -> the updated two.

        `attn_scale` and `ffn_scale` (B, 1, 1) are the drop path of the two halves (`path_scales`).
        `object_only` saves work in the last layer, if nobody reads the patches: they still serve as
        keys and values, but only object token and words are updated, so that image becomes (B, 1,
        D).
        """
        h_image = self.image.attn_norm(image)
        h_text = self.text.attn_norm(text)
        k = self._join(self.image.k(h_image), self.text.k(h_text))  # (B, H, T, D/H)
        v = self._join(self.image.v(h_image), self.text.v(h_text))
        if object_only:
            image = image[:, :1]  # (B, 1, D)
            h_image = h_image[:, :1]
        q = self._join(self.image.q(h_image), self.text.q(h_text))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        attended = attended.transpose(1, 2).flatten(2)  # (B, T, D), or (B, 1+L, D) with object_only
        a_image, a_text = attended.split([image.shape[1], text.shape[1]], dim=1)

        image = add(image, self.image.out(self.image.inner_norm(a_image)), attn_scale)
        text = add(text, self.text.out(self.text.inner_norm(a_text)), attn_scale)
        image = add(image, self.image.feed_forward(image), ffn_scale)
        text = add(text, self.text.feed_forward(text), ffn_scale)
        return image, text

    def _join(self, image: Tensor, text: Tensor) -> Tensor:
        joined = torch.cat([image, text], dim=1)  # (B, T, D)
        return joined.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, H, T, D/H)


def add(x: Tensor, change: Tensor, scale: Tensor | None) -> Tensor:
    """x + scale * change, (B, n, D); None is 1, and saves the time of multiplying by it."""
    return x + change if scale is None else x + scale * change


class BEiT3(nn.Module):
    """The encoder at the head of this file. `drop_path` is the rate of the last layer."""

    def __init__(
        self,
        image_size: int,
        patch: int,
        vocab: int,
        width: int,
        layers: int,
        heads: int,
        ffn: int,
        drop_path: float,
    ):
        super().__init__()
        self.grid = image_size // patch
        self.patch_embed = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.text_embed = nn.Embedding(vocab, width)
        self.object_token = nn.Parameter(torch.zeros(width))  # BEiT-3's [CLS]
        self.image_positions = nn.Parameter(torch.empty(1 + self.grid**2, width))
        self.text_positions = nn.Parameter(torch.empty(TEXT_POSITIONS, width))
        self.layers = nn.ModuleList(MultiwayLayer(width, heads, ffn) for _ in range(layers))
        self.image_norm = nn.LayerNorm(width)
        self.text_norm = nn.LayerNorm(width)
        # The rate grows from 0 in the first layer. (In the official code a typo makes it 0 in every
        # layer of `large`; its recipes here say 0, see D10.)
        self.drop_path = drop_path
        rates = torch.tensor([drop_path * i / max(layers - 1, 1) for i in range(layers)])
        self.register_buffer("drop_rates", rates, persistent=False)
        self.checkpointing = False  # to save memory, compute each layer again in the backward pass
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights from which a small model trains from scratch (D7).

        With those of the official code it would answer the mean box for a long time.
        """
        for name, layer in self.layers.named_modules():
            if isinstance(layer, nn.Linear):
                # What a layer adds is small at the start, so that it is close to the identity.
                adds_to_residual = name.endswith(("out", "fc2"))
                nn.init.xavier_uniform_(layer.weight, gain=0.2 if adds_to_residual else 1.0)
                nn.init.zeros_(layer.bias)
        width = self.text_embed.embedding_dim
        nn.init.normal_(self.text_embed.weight, std=1.0)
        with torch.no_grad():
            self.image_positions[0].zero_()
            self.image_positions[1:] = sine_2d(self.grid, width)
            self.text_positions.copy_(sine_1d(torch.arange(TEXT_POSITIONS), width))

    def forward(
        self, images: Tensor, tokens: Tensor, text_pad: Tensor, object_only: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See the head of this file. With `object_only` the image tokens are empty, (B, 0, D)."""
        image, text, attn_mask = self.embed(images, tokens, text_pad)
        path_scales = self.path_scales(images.shape[0])
        for layer, (attn_scale, ffn_scale) in zip(self.layers, path_scales, strict=True):
            is_last = layer is self.layers[-1]
            inputs = (image, text, attn_mask, attn_scale, ffn_scale, object_only and is_last)
            if self.checkpointing and torch.is_grad_enabled():
                image, text = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                image, text = layer(*inputs)
        image = self.image_norm(image)
        text = self.text_norm(text)
        return image[:, 0], image[:, 1:], text

    def embed(
        self, images: Tensor, tokens: Tensor, text_pad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Eq. 1: image (B, 1+N, D), text (B, L, D), attn_mask (B, 1, 1, T), False for padding."""
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)  # (B, N, D)
        object_token = self.object_token.expand(images.shape[0], 1, -1)  # (B, 1, D)
        image = torch.cat([object_token, patches], dim=1) + self.image_positions
        text = self.text_embed(tokens) + self.text_positions[: tokens.shape[1]]  # (B, L, D)
        text = text.masked_fill(text_pad[..., None], 0)
        image_pad = torch.zeros(image.shape[:2], dtype=torch.bool, device=image.device)  # (B, 1+N)
        attn_mask = ~torch.cat([image_pad, text_pad], dim=1)  # (B, T)
        return image, text, attn_mask[:, None, None]

    def path_scales(self, batch: int) -> Tensor | list[tuple[None, None]]:
        """Drop path, (layers, 2, B, 1, 1): the factors of attention and feed-forward.

        In training a factor is 0 for a sample whose half of the layer is skipped, else 1 / the
        probability of keeping it; otherwise all are None. They are drawn here for all layers,
        because torch.compile would compile each layer anew for its own rate.
        """
        if not self.training or self.drop_path == 0:
            return [(None, None)] * len(self.layers)
        keep = 1 - self.drop_rates[:, None, None, None, None]  # (layers, 1, 1, 1, 1)
        return torch.bernoulli(keep.expand(-1, 2, batch, 1, 1)) / keep


def sine_1d(places: Tensor, width: int, one_frequency: bool = False) -> Tensor:
    """1-D sine positions of places (n,) -> (n, width): sin on even, cos on odd columns.

    The temperature is 10000. `one_frequency` is what the official code computes, which cuts all
    frequencies but the first to zero (D4).
    """
    frequency = 10000 ** (-torch.arange(0, width, 2) / width)  # (width/2,)
    if one_frequency:
        frequency = frequency.long().float()
    angle = places[:, None] * frequency  # (n, width/2)
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)


def sine_2d(grid: int, width: int) -> Tensor:
    """DETR's 2-D sine positions (grid*grid, width): y in the first half, x in the second.

    Rows and columns are spread over (0, 2 pi].
    """
    places = torch.arange(1, grid + 1) / (grid + 1e-6) * 2 * math.pi  # (grid,)
    axis = sine_1d(places, width // 2)  # (grid, width/2)
    y = axis[:, None].expand(-1, grid, -1)  # (grid, grid, width/2)
    x = axis[None].expand(grid, -1, -1)
    return torch.cat([y, x], dim=2).flatten(0, 1)


# ------------------------------------------------------------------------ BEiT-3 checkpoint files

# Names in BEiT-3's files -> names here: regular expressions, applied one after the other.
# A prefix, such as the `vis_enc.` of SimVG's files, is kept.
_NAMES = {
    r"vision_embed\.cls_token": "object_token",
    r"vision_embed\.proj": "patch_embed",
    r"encoder\.embed_positions\.A\.weight": "image_positions",
    r"encoder\.embed_positions\.B\.weight": "text_positions",
    r"encoder\.layer_norm\.A": "image_norm",
    r"encoder\.layer_norm\.B": "text_norm",
    # A marks the image expert, B the text expert: self_attn.q_proj.A.weight, ffn.A.fc1.weight
    r"encoder\.(layers\.\d+)\.(.+)\.A\b": r"\1.image.\2",
    r"encoder\.(layers\.\d+)\.(.+)\.B\b": r"\1.text.\2",
    r"self_attn_layer_norm": "attn_norm",
    r"self_attn\.([qkv])_proj": r"\1",
    r"self_attn\.inner_attn_ln": "inner_norm",
    r"self_attn\.out_proj": "out",
    r"final_layer_norm": "ffn_norm",  # in spite of its name, *before* the feed-forward network
    r"ffn\.ffn_layernorm": "hidden_norm",
    r"ffn\.(fc[12])": r"\1",
}
UNUSED = "vision_embed.mask_token"  # grounding never reads this tensor of BEiT-3's pre-training


def from_beit3(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with BEiT-3's tensors under this file's names; others stay as they are."""
    ours = {}
    for name, value in renamed(official, _NAMES).items():
        if name.endswith("_positions"):
            ours[name] = value[2:]  # see TEXT_POSITIONS; image positions start at 2 as well
        elif name.endswith("object_token"):
            ours[name] = value.flatten()  # (1, 1, D)
        elif not name.endswith(UNUSED):
            ours[name] = value
    return ours


def renamed(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Replace each regular expression of `names` in every name, one after the other."""
    for pattern, replacement in names.items():
        weights = {re.sub(pattern, replacement, name): value for name, value in weights.items()}
    return weights


def pretrained_weights(state: dict[str, Tensor], encoder: BEiT3) -> dict[str, Tensor]:
    """A BEiT-3 checkpoint -> the tensors of `encoder`, fitted to its grid and patch.

    What lies outside of the encoder, such as pre-training heads, is left out. ValueError if nothing
    is left.
    """
    official = {}
    for name, value in state.items():
        if name.startswith("beit3."):
            official[name.removeprefix("beit3.")] = value
    if not official:
        raise ValueError("it holds neither SimVG nor BEiT-3 weights")
    patch = encoder.patch_embed.kernel_size[0]
    return from_beit3(resize_pretrained(official, encoder.grid, patch))


def bicubic(x: Tensor, side: int) -> Tensor:
    """(n, c, h, w) -> (n, c, side, side), without antialias, in float32."""
    size = (side, side)
    return F.interpolate(x.float(), size=size, mode="bicubic", align_corners=False)


def resize_positions(table: Tensor, grid: int, extra: int) -> Tensor:
    """(extra + g*g, D) -> (extra + grid*grid, D), by interpolation of the last g*g rows."""
    old = math.isqrt(len(table) - extra)
    if old == grid:
        return table
    picture = table[extra:].T.reshape(1, -1, old, old)  # (1, D, g, g)
    resized = bicubic(picture, grid).flatten(2)[0].T  # (grid*grid, D)
    return torch.cat([table[:extra].float(), resized])


def resize_pretrained(state_dict: dict[str, Tensor], grid: int, patch: int) -> dict[str, Tensor]:
    """BEiT-3 tensors under BEiT-3's names, fitted to grid x grid patches of patch x patch pixels.

    The values of the patch kernel are not rescaled, so that going from 16 to 32 pixels makes patch
    embeddings about 4 times larger. The official training starts from these embeddings, and so does
    ours.
    """
    fitted = dict(state_dict)
    for name, value in state_dict.items():
        if name.endswith("encoder.embed_positions.A.weight"):
            # the two rows that are not used, and the object token's
            fitted[name] = resize_positions(value, grid, extra=3)
        elif name.endswith("vision_embed.proj.weight") and value.shape[-1] != patch:
            fitted[name] = bicubic(value, patch)
    return fitted
