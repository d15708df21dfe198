"""SimVG: two light heads on BEiT-3 tokens (arXiv 2409.17531, Sec. 3, Fig. 2).

    image, text -> BEiT-3 -> object token (B, D), image tokens (B, N, D), text tokens (B, L, D)
    text tokens            -> text-guided queries (B, Q, C)                                 Eq. 8
    decoder branch (teacher): queries x image tokens -> 3 decoder layers -> boxes           Eq. 2
    token branch   (student): object token + queries -> linear layer, heads -> boxes        Eq. 3

B batch, N image tokens, L text tokens, Q queries (1 in REC, 10 in gREC), K decoder layers, D encoder width,
C head width, T = 1 + N + L. Boxes are cxcywh in 0..1 of the image; class 0 is "the referred object", class 1
"no object". With `amp` only the encoder runs in 16 bits, since a bf16 box is off by up to 2 pixels.
"""

import math
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import beit3

HEADS = 8  # attention heads of TQG and decoder, in every released model
AMP = {"": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # the values of train.amp
IMAGE_MEAN, IMAGE_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet, RGB, 0..255


class CheckpointError(ValueError):
    """A file of weights is not what it should be. The message is one line that names the file."""


class Output(NamedTuple):
    """None for a branch that was not asked for. The last decoder layer is the decoder branch's answer."""

    decoder_logits: Tensor | None  # (K, B, Q, 2)
    decoder_boxes: Tensor | None  # (K, B, Q, 4) cxcywh
    token_logits: Tensor | None  # (B, Q, 2)
    token_boxes: Tensor | None  # (B, Q, 4) cxcywh

    def answers(self) -> dict[str, tuple[Tensor, Tensor]]:
        """{branch: (logits (B, Q, 2), boxes (B, Q, 4))} of the branches that ran; of the decoder, its last layer's."""
        answers = {}
        if self.decoder_boxes is not None:
            answers["decoder"] = self.decoder_logits[-1], self.decoder_boxes[-1]
        if self.token_boxes is not None:
            answers["token"] = self.token_logits, self.token_boxes
        return answers


class AttentionMaps(NamedTuple):
    """Attention that falls on each patch of the image, for pictures. Each row of `queries` adds up to 1; those of the
    others add up to less, because object token and words also attend to each other."""

    object_token: Tensor  # (layers, B, N) of the encoder
    words: Tensor  # (layers, B, L, N) of the encoder, padding included
    queries: Tensor  # (K, B, Q, N) of the decoder branch
    best_query: Tensor  # (B,) the query with the highest score


class DecoderLayer(nn.Module):
    """A DETR decoder layer (post-norm), without dropout on the attentions' outputs. Positions are added to
    queries and keys, never to values."""

    def __init__(self, width: int, ffn: int, dropout: float):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, HEADS, dropout, batch_first=True)
        self.cross_attn = nn.MultiheadAttention(width, HEADS, dropout, batch_first=True)
        hidden = nn.Linear(width, ffn), nn.ReLU(), nn.Dropout(dropout)
        self.ffn = nn.Sequential(*hidden, nn.Linear(ffn, width), nn.Dropout(dropout))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(
        self, x: Tensor, query_pos: Tensor, memory: Tensor, memory_pos: Tensor, pad: Tensor | None, maps: list | None
    ) -> Tensor:
        """x, query_pos (B, Q, C); memory (B, n, C); memory_pos (n, C); pad (B, n) True = padding -> (B, Q, C). The
        attention of each query to the memory (B, Q, n), the mean over heads, is appended to `maps`."""
        q = x + query_pos
        x = self.norms[0](x + self.self_attn(q, q, x, need_weights=False)[0])
        q, k = x + query_pos, memory + memory_pos
        attended, attention = self.cross_attn(q, k, memory, key_padding_mask=pad, need_weights=maps is not None)
        if maps is not None:
            maps.append(attention)
        x = self.norms[1](x + attended)
        return self.norms[2](x + self.ffn(x))


class TextGuidedQuery(nn.Module):
    """TQG, Eq. 8: Q_tqg = MCA(Q_init, f_text + pos) + MMP(f_text) + Q_init; MCA: the layers, MMP: mask max pool."""

    def __init__(
        self, encoder_width: int, width: int, queries: int, layers: int, ffn: int, dropout: float, as_released: bool
    ):
        super().__init__()
        self.text_proj = nn.Linear(encoder_width, width)
        self.query_embed = nn.Embedding(queries, width)
        # each layer starts by itself, not as a copy of the first (deviation D11)
        self.layers = nn.ModuleList(DecoderLayer(width, ffn, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.as_released = as_released  # compute as the released weights need (D3, D4); `initialise` may set it
        places = torch.arange(beit3.TEXT_POSITIONS)
        paper, released = (beit3.sine_1d(places, width, one_frequency) for one_frequency in (False, True))
        self.register_buffer("positions", torch.stack([paper, released]), persistent=False)

    def forward(self, text: Tensor, text_pad: Tensor) -> Tensor:
        """text (B, L, D), text_pad (B, L) True = padding -> queries (B, Q, C)."""
        text = self.text_proj(text)  # (B, L, C)
        initial = self.query_embed.weight.expand(text.shape[0], -1, -1)  # (B, Q, C)
        paper, released = self.positions[:, : text.shape[1]]  # (L, C) each
        x, positions = torch.zeros_like(initial), released if self.as_released else paper
        for layer in self.layers:
            x = layer(x, initial, text, positions, text_pad, maps=None)
        return self.norm(x) + self.pool(text, text_pad)[:, None] + initial

    def pool(self, text: Tensor, text_pad: Tensor) -> Tensor:
        """Mask max pool, (B, L, C) -> (B, C): the maximum over the words, padding left out (D2)."""
        if self.as_released:
            # The official mask holds integers. Used as an index, ~mask is -1 for a word and -2 for padding. It picks
            # the last row, and the one before it where anything is padded (D3).
            last, before = text[:, -1], text[:, -2]
            return torch.where(text_pad.any(1, keepdim=True), torch.maximum(last, before), last)
        # max, not amax, which would share the gradient between equal maxima
        return text.masked_fill(text_pad[..., None], -torch.inf).max(dim=1).values


def box_head(width: int) -> nn.Sequential:
    """(..., C) -> (..., 4), before the sigmoid."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))


class DecoderBranch(nn.Module):
    """Eq. 2: Q_decoder = MCA(queries, IP(T_img) + pos), IP: image_proj. Every layer predicts, with shared heads."""

    def __init__(self, encoder_width: int, width: int, grid: int, layers: int, ffn: int, dropout: float):
        super().__init__()
        self.image_proj = nn.Linear(encoder_width, width)
        self.layers = nn.ModuleList(DecoderLayer(width, ffn, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.class_head, self.box_head = nn.Linear(width, 2), box_head(width)
        self.register_buffer("positions", beit3.sine_2d(grid, width), persistent=False)

    def forward(self, image: Tensor, queries: Tensor, maps: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """image (B, N, D), queries (B, Q, C) -> logits (K, B, Q, 2), boxes (K, B, Q, 4)."""
        image = self.image_proj(image)  # (B, N, C)
        x, outputs = torch.zeros_like(queries), []
        for layer in self.layers:
            x = layer(x, queries, image, self.positions, pad=None, maps=maps)
            outputs.append(self.norm(x))
        x = torch.stack(outputs)  # (K, B, Q, C)
        return self.class_head(x), self.box_head(x).sigmoid()


class TokenBranch(nn.Module):
    """Eq. 3: Q_token = MLP(OP(T_obj) + queries), OP: object_proj."""

    def __init__(self, encoder_width: int, width: int):
        super().__init__()
        self.object_proj = nn.Linear(encoder_width, width)
        self.mlp = nn.Linear(width, width)  # the paper's MLP; the released weights have one layer
        self.class_head, self.box_head = nn.Linear(width, 2), box_head(width)

    def forward(self, object_token: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """object_token (B, D), queries (B, Q, C) -> logits (B, Q, 2), boxes (B, Q, 4)."""
        x = self.mlp(self.object_proj(object_token)[:, None] + queries)  # (B, Q, C)
        return self.class_head(x), self.box_head(x).sigmoid()


class SimVG(nn.Module):
    """The whole model. Its arguments are the section `model` of a config."""

    def __init__(
        self,
        *,
        image_size: int,  # pixels; images are resized to a square
        patch_size: int,  # pixels of a side of the encoder's patches
        vocab_size: int,  # rows of the word embedding; BEiT-3's tokenizer has 64,010 ids
        encoder_width: int,  # D; base 768, large 1024
        encoder_layers: int,  # base 12, large 24
        encoder_heads: int,  # attention heads of the encoder; base 12, large 16
        encoder_ffn: int,  # hidden width of the encoder's feed-forward networks
        drop_path: float,  # rate of the encoder's last layer; it grows from 0 in the first
        head_width: int,  # C, the width of text-guided queries and of both branches
        queries: int,  # Q; 1 for REC, 10 for gREC
        tqg_layers: int,  # layers of the text-guided query generation
        tqg_ffn: int,  # hidden width of its feed-forward networks
        decoder_layers: int,  # K, layers of the decoder branch
        decoder_ffn: int,  # hidden width of its feed-forward networks
        dropout: float,  # in TQG and decoder branch
        as_released: bool,  # compute what the released weights were trained with, not what the paper says (D3, D4)
    ):
        super().__init__()
        self.image_size = image_size
        # What `load` read, where the file says it: its kind, its config, and how it was trained to read phrases.
        self.origin = self.config = self.max_tokens = self.tokenizer_digest = None
        self.encoder = beit3.BEiT3(
            image_size, patch_size, vocab_size, encoder_width, encoder_layers, encoder_heads, encoder_ffn, drop_path
        )
        self.tqg = TextGuidedQuery(encoder_width, head_width, queries, tqg_layers, tqg_ffn, dropout, as_released)
        grid = self.encoder.grid
        self.decoder_branch = DecoderBranch(encoder_width, head_width, grid, decoder_layers, decoder_ffn, dropout)
        self.token_branch = TokenBranch(encoder_width, head_width)
        # As in the official code, only the decoder's matrices; TQG and heads keep PyTorch's initial weights.
        for weight in self.decoder_branch.layers.parameters():
            if weight.dim() > 1:
                nn.init.xavier_uniform_(weight)
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD).view(3, 1, 1), persistent=False)

    def forward(
        self, images: Tensor, tokens: Tensor, text_pad: Tensor, branch: str = "both", amp: torch.dtype | None = None
    ) -> Output:
        """images (B, 3, S, S): uint8, or float and then already normalised; tokens (B, L) int64; text_pad (B, L) bool,
        True = padding; branch "both", "decoder" or "token"; amp: run the encoder (only) in this precision."""
        assert branch in ("both", "decoder", "token"), branch
        images = self.normalise(images)
        with torch.autocast(images.device.type, amp or torch.bfloat16, enabled=amp is not None):
            encoded = self.encoder(images, tokens, text_pad, object_only=branch == "token")
        object_token, image, text = (x.float() for x in encoded)
        queries = self.tqg(text, text_pad)  # (B, Q, C)
        decoded = self.decoder_branch(image, queries) if branch != "token" else (None, None)
        direct = self.token_branch(object_token, queries) if branch != "decoder" else (None, None)
        return Output(*decoded, *direct)

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def normalise(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std if images.dtype == torch.uint8 else images

    @torch.no_grad()
    def attention_maps(self, images: Tensor, tokens: Tensor, text_pad: Tensor) -> AttentionMaps:
        """Arguments as for `forward`. In float32, with every attention map in memory."""
        encoder_maps, decoder_maps = [], []
        _, image, text = self.encoder(self.normalise(images), tokens, text_pad, maps=encoder_maps)
        logits, _ = self.decoder_branch(image, self.tqg(text, text_pad), decoder_maps)  # (K, B, Q, 2)
        maps, first, N = torch.stack(encoder_maps), beit3.OBJECT_TOKENS, image.shape[1]  # (layers, B, T, T)
        return AttentionMaps(
            object_token=maps[:, :, :first, first : first + N].mean(2),
            words=maps[:, :, first + N :, first : first + N],
            queries=torch.stack(decoder_maps),
            best_query=(logits[-1, ..., 0] - logits[-1, ..., 1]).argmax(1),
        )


# -------------------------------------------------------------------------------------------- checkpoint files


def load(path: str | Path, device: str | torch.device = "cpu", **model_args) -> SimVG:
    """A SimVG in eval mode from this project's checkpoint or an official SimVG .pth, with averaged (EMA) weights where
    there are any. CheckpointError: any misfit.

    From an official file sizes are read off the tensors, with heads 64 wide and `as_released=True`. `model_args`
    replace what the file says, such as `encoder_heads` where heads are not 64 wide.
    """
    state = read_checkpoint(path)
    with unpacking(path):
        origin, weights, args = _simvg_weights(state)
        if not weights:
            raise CheckpointError(f"{path}: is neither a checkpoint of this project nor an official SimVG one")
        model = SimVG(**{**args, **model_args})
        load_strictly(model, weights, path)
        model.origin, model.config = origin, state.get("config")
        model.tokenizer_digest = _tokenizer_digest(state, model)
        model.max_tokens = model.config["data"].get("max_tokens") if model.config else 20
    return model.to(device).eval()


def initialise(model: SimVG, path: str | Path) -> str:
    """Start `model` from a BEiT-3 file, a checkpoint of this project or an official SimVG .pth -> what was taken.

    A BEiT-3 file must fill the whole encoder, a SimVG file everything. Image positions are resized to another grid, and
    another number of queries starts anew. `as_released=True` is taken over. CheckpointError: any other misfit.
    """
    state, fresh, note = read_checkpoint(path), model.state_dict(), ""
    with unpacking(path):
        origin, weights, args = _simvg_weights(state)
        if weights:
            positions, queries = "encoder.image_positions", "tqg.query_embed.weight"
            weights[positions] = beit3.resize_positions(weights[positions], model.encoder.grid, beit3.OBJECT_TOKENS)
            if weights[queries].shape != fresh[queries].shape:
                del weights[queries]
                note = f"; new: {queries}"
            if model.tqg.as_released and not args.get("as_released", True):
                # if last.pt held false, the same command with --resume would be refused
                raise CheckpointError(f"{path}: its weights were not made for model.as_released=true")
            if args.get("as_released") and not model.tqg.as_released:
                model.tqg.as_released = True
                note += "; model.as_released=true from now on, for which these weights were made"
            load_strictly(model, {queries: fresh[queries], **weights}, path)
        else:
            weights, unused = beit3.pretrained_weights(state, model.encoder)
            load_strictly(model.encoder, weights, path)
            origin, note = f"BEiT-3 (not used: {', '.join(unused)})", "; new: everything but the encoder"
    model.tokenizer_digest = _tokenizer_digest(state, model)
    return f"{path}: {origin}, {len(weights)} of {len(fresh)} tensors taken{note}"


def load_strictly(model: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    """Fill every tensor of the model from one of the same name and shape, with none left over, or CheckpointError."""
    want = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name in sorted(want.keys() | weights.keys(), key=str):
        value = weights.get(name)
        usable = isinstance(value, Tensor) and value.is_floating_point() and value.layout == torch.strided
        found = "missing" if value is None else tuple(value.shape) if usable else "no dense floating point tensor"
        if found != want.get(name):
            sizes = f"{found} in the file and {want.get(name, 'missing')} in the model"
            raise CheckpointError(f"{path}: does not fit the model: {name!r} is {sizes}")
    model.load_state_dict(weights)


def _simvg_weights(state: dict) -> tuple[str, dict[str, Tensor], dict]:
    """Description, weights under this project's names and arguments of SimVG of a SimVG checkpoint, ours or official;
    ("", {}, {}) if it is neither."""
    averaged = ", averaged (EMA) weights" if state.get("ema") or state.get("ema_state_dict") else ""
    if {"config", "model", "ema"} <= state.keys():
        return f"SimVG checkpoint{averaged}", {**state["model"], **state["ema"]}, state["config"]["model"]
    weights = from_official(state.get("ema_state_dict") or state.get("state_dict") or {})
    if "tqg.query_embed.weight" not in weights:
        return "", {}, {}
    return f"official SimVG checkpoint{averaged}", weights, official_sizes(weights)


def _tokenizer_digest(state: dict, model: SimVG) -> str | None:
    """The digest of the tokenizer that the weights were trained with, None if unknown. Foreign files with as many words
    as BEiT-3 were trained with BEiT-3's."""
    beit3_words = "config" not in state and model.encoder.text_embed.num_embeddings == beit3.WORDS
    return beit3.TOKENIZER if beit3_words else state.get("tokenizer")


# Names in official files -> names here: regular expressions, applied one after the other.
_NAMES = {
    r"^module\.": "",
    r"^vis_enc\.beit3": "encoder",
    r"head\.text_guided_query_generation_transformer": "tqg",
    r"head\.transformer\.decoder": "decoder_branch",
    r"head\.input_text_proj": "tqg.text_proj",
    r"head\.query_embed": "tqg.query_embed",
    r"head\.input_proj": "decoder_branch.image_proj",
    r"head\.input_cls_proj": "token_branch.object_proj",
    r"head\.mlp\.layers\.0": "token_branch.mlp",
    r"head\.b?(class|box)_embed_(decoder|token)(\.layers)?": r"\2_branch.\1_head",  # class_embed, bbox_embed
    r"post_norm_layer": "norm",
    r"attentions\.0\.attn": "self_attn",
    r"attentions\.1\.attn": "cross_attn",
    r"ffns\.0\.layers\.0\.0": "ffn.0",
    r"ffns\.0\.layers\.1": "ffn.3",
    # the box heads' linear layers 0, 1, 2 are modules 0, 2, 4 here; 2 first, so that none is renamed twice
    r"box_head\.2": "box_head.4",
    r"box_head\.1": "box_head.2",
}


def from_official(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """An official SimVG state dict under this project's names. Names that it does not know stay as they are."""
    ours = beit3.renamed(beit3.from_beit3(official), _NAMES)
    if (name := "decoder_branch.image_proj.weight") in ours:
        ours[name] = ours[name].flatten(1)  # (C, D, 1, 1), a 1 x 1 convolution
    return {name: value for name, value in ours.items() if not name.endswith(".empty_weight")}  # the loss's constants


def official_sizes(weights: dict[str, Tensor]) -> dict:
    """The arguments of SimVG, read off the tensors of an official checkpoint under this project's names."""
    sizes = {"dropout": 0.0, "drop_path": 0.0, "as_released": True}
    sizes["vocab_size"], sizes["encoder_width"] = weights["encoder.text_embed.weight"].shape
    sizes["encoder_heads"] = sizes["encoder_width"] // 64
    sizes["queries"], sizes["head_width"] = weights["tqg.query_embed.weight"].shape
    sizes["patch_size"] = weights["encoder.patch_embed.weight"].shape[-1]
    patches = len(weights["encoder.image_positions"]) - beit3.OBJECT_TOKENS
    sizes["image_size"] = math.isqrt(patches) * sizes["patch_size"]
    for part, linear in ("encoder", "image.fc1"), ("tqg", "ffn.0"), ("decoder", "ffn.0"):
        pattern = rf"{part}(_branch)?\.layers\.\d+\.{linear}\.weight"  # once in each layer
        hidden = [len(value) for name, value in weights.items() if re.fullmatch(pattern, name)]
        sizes[f"{part}_layers"], sizes[f"{part}_ffn"] = len(hidden), hidden[0]
    return sizes


def save(path: str | Path, state: dict) -> None:
    """Write a checkpoint so that at every moment `path` is the old file or the whole new one."""
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # on disk before the old file is replaced
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError when the disk is full
        part.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise CheckpointError(f"{path}: cannot be written (an older file stays as it was): {reason}") from None


def read_checkpoint(path: str | Path) -> dict:
    """A checkpoint file as plain tensors, numbers and strings, on the CPU. CheckpointError if it is anything else."""
    # numpy's numbers, such as the best accuracy, are the only foreign objects in official files
    allowed = [np._core.multiarray.scalar, np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType]
    with unpacking(path), torch.serialization.safe_globals(allowed):
        if os.path.exists(path) and not os.path.isfile(path):  # reading a pipe or a device might never end
            raise CheckpointError(f"{path}: is not a regular file")
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                damaged, names = file.testzip(), file.namelist()  # compares checksums, which torch.load does not
            if damaged:
                raise CheckpointError(f"{path}: is damaged, the checksum of {damaged} is wrong")
            if not any(name.endswith("data.pkl") for name in names):
                raise CheckpointError(f"{path}: is a zip around other files ({', '.join(names):.90}), unpack it")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise CheckpointError(f"{path}: is not a checkpoint: it holds a {type(state).__name__}")
    return state


@contextmanager
def unpacking(path: str | Path, *passing: type[Exception]) -> Iterator[None]:
    """Inside, a checkpoint is read and used. An error that its contents cause becomes one line that names the file,
    unless it is one of `passing`."""
    try:
        yield
    except (CheckpointError, *passing):
        raise
    except Exception as error:  # contents that are wrong can raise anything
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it wants to run code ({code[1]})" if code else getattr(error, "strerror", None) or f"{error!r:.90}"
        raise CheckpointError(f"{path}: is not a checkpoint, or not a whole one: {reason}") from error


def main() -> None:
    """Print what every stage of a tiny model puts out, from pixels and words to boxes: shapes, and its parameters."""
    sizes = dict(image_size=64, patch_size=16, vocab_size=100, head_width=32, queries=1, dropout=0.0, drop_path=0.0)
    sizes |= dict(encoder_width=64, encoder_layers=2, encoder_heads=4, encoder_ffn=128, as_released=False)
    net = SimVG(**sizes, tqg_layers=1, tqg_ffn=64, decoder_layers=2, decoder_ffn=64).eval()

    def show(name: str, module: nn.Module, _, output: Tensor | tuple[Tensor, ...]) -> None:
        shapes = [str(tuple(x.shape)) for x in (output if isinstance(output, tuple) else [output])]
        print(f"{name:26} {' '.join(shapes):48}{sum(p.numel() for p in module.parameters()):>10,}")

    for name, module in net.named_modules():
        if re.fullmatch(r"\w*(\.\w+|\.layers\.\d+)?", name):  # the inside of a layer would be too long
            module.register_forward_hook(partial(show, name or "all"))
    tokens = torch.tensor([[0, 7, 8, 9, 2, 1], [0, 7, 8, 9, 10, 2]])  # <s> the left dog </s> <pad>
    net(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), tokens, tokens == 1)


if __name__ == "__main__":
    main()
