"""SimVG: two light heads on BEiT-3 tokens (arXiv 2409.17531, Sec. 3, Fig. 2).

    image, text -> BEiT-3 -> object token (B, D), image tokens (B, N, D), text tokens (B, L, D)
    text tokens            -> text-guided queries (B, Q, C)                                 Eq. 8
    decoder branch (teacher): queries x image tokens -> 3 decoder layers -> boxes           Eq. 2
    token branch   (student): object token + queries -> linear layer, heads -> boxes        Eq. 3

B batch, N image tokens, L text tokens, Q queries (1 in REC, 10 in gREC), K decoder layers, D encoder width,
C head width, T = 1 + N + L. Boxes are cxcywh in 0..1 of the image; class 0 is "the referred object", class 1
"no object". With `amp` only the encoder runs in 16 bits; whatever makes a box stays in float32, since a bf16 box is
off by up to 2 pixels.

This file also builds, saves and loads models.
"""

import os
import re
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import beit3

HEADS = 8  # attention heads of TQG and decoder, in every released model
AMP = {"": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # the values of train.amp
# `data.Tokenizer.digest` of beit3.spm (the file's own sha256 is 6f5e2fef...), for files that imply BEiT-3's words
BEIT3_WORDS, BEIT3_TOKENIZER = 64010, "33a8c42624e4c1e48442905d5473f333b86adf81ac151fa426b755400b3df8b0"
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
        self.ffn = nn.Sequential(
            nn.Linear(width, ffn), nn.ReLU(), nn.Dropout(dropout), nn.Linear(ffn, width), nn.Dropout(dropout)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(
        self,
        x: Tensor,
        query_pos: Tensor,
        memory: Tensor,
        memory_pos: Tensor,
        pad: Tensor | None = None,
        maps: list[Tensor] | None = None,
    ) -> Tensor:
        """x, query_pos (B, Q, C); memory (B, n, C); memory_pos (n, C); pad (B, n) True = padding -> (B, Q, C). The
        attention of each query to the memory (B, Q, n), the mean over heads, is appended to `maps`."""
        q = x + query_pos
        x = self.norms[0](x + self.self_attn(q, q, x, need_weights=False)[0])
        attended, attention = self.cross_attn(
            x + query_pos, memory + memory_pos, memory, key_padding_mask=pad, need_weights=maps is not None
        )
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
        self.layers = nn.ModuleList(
            DecoderLayer(width, ffn, dropout) for _ in range(layers)
        )  # not copies (deviation D11)
        self.norm = nn.LayerNorm(width)
        self.register_buffer("positions", torch.empty(beit3.TEXT_POSITIONS, width), persistent=False)
        self.compute_as_released(as_released)

    def compute_as_released(self, as_released: bool) -> None:
        """Choose the arithmetic of the released weights or that of the paper (deviations D3 and D4 of README.md)."""
        self.as_released = as_released
        self.positions.copy_(beit3.sine_1d(*self.positions.shape, one_frequency=as_released))

    def forward(self, text: Tensor, text_pad: Tensor) -> Tensor:
        """text (B, L, D), text_pad (B, L) True = padding -> queries (B, Q, C)."""
        text = self.text_proj(text)  # (B, L, C)
        initial = self.query_embed.weight.expand(text.shape[0], -1, -1)  # (B, Q, C)
        x = torch.zeros_like(initial)
        for layer in self.layers:
            x = layer(x, initial, text, self.positions[: text.shape[1]], text_pad)
        return self.norm(x) + self.pool(text, text_pad)[:, None] + initial

    def pool(self, text: Tensor, text_pad: Tensor) -> Tensor:
        """Mask max pool, (B, L, C) -> (B, C): the maximum over the words, padding left out (D2)."""
        if self.as_released:
            return self._pool_as_released(text, text_pad)
        # max, not amax, which would share the gradient between equal maxima
        return text.masked_fill(text_pad[..., None], -torch.inf).max(dim=1).values

    def _pool_as_released(self, text: Tensor, text_pad: Tensor) -> Tensor:
        """The official mask holds integers. Used as an index, ~mask is -1 for a word and -2 for padding. It picks the
        last row, and the one before it where anything is padded (D3)."""
        last, before = text[:, -1], text[:, -2]
        return torch.where(text_pad.any(1, keepdim=True), torch.maximum(last, before), last)


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
            x = layer(x, queries, image, self.positions, maps=maps)
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
        self.decoder_branch = DecoderBranch(
            encoder_width, head_width, self.encoder.grid, decoder_layers, decoder_ffn, dropout
        )
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
        """Boxes for phrases.

        images (B, 3, S, S): uint8, or float and then already normalised; tokens (B, L) int64; text_pad (B, L) bool,
        True = padding; branch "both", "decoder" or "token"; amp: run the encoder (only) in this precision.
        """
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


def keep_in_16_bits(model: SimVG, amp: torch.dtype) -> None:
    """Store the encoder's matrices in the precision that autocast would cast them to in every call. For inference with
    this `amp`; the answers stay the same."""
    for module in model.encoder.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(amp)


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
    state, fresh, new, note = read_checkpoint(path), model.state_dict(), set(), ""
    with unpacking(path):
        origin, weights, args = _simvg_weights(state)
        if weights:
            positions, queries = "encoder.image_positions", "tqg.query_embed.weight"
            weights[positions] = beit3.resize_positions(weights[positions], model.encoder.grid, beit3.OBJECT_TOKENS)
            if weights[queries].shape != fresh[queries].shape:
                new, note = {queries}, f"; new: {queries}"
            as_released = args.get("as_released", model.tqg.as_released)
            if as_released != model.tqg.as_released:
                if not as_released:  # set by the user, whose --resume would not find it in last.pt
                    raise CheckpointError(f"{path}: its weights were not made for model.as_released=true")
                model.tqg.compute_as_released(True)
                note += "; model.as_released=true from now on, for which these weights were made"
        else:
            patch = model.encoder.patch_embed.kernel_size[0]
            encoder, unused = beit3.pretrained_weights(state, model.encoder.grid, patch)
            weights = {f"encoder.{name}": value for name, value in encoder.items()}
            new = {name for name in fresh if not name.startswith("encoder.")}
            note = "; new: everything but the encoder"
            origin = f"BEiT-3 (not used: {', '.join(unused)})"
        taken = {name: value for name, value in weights.items() if name not in new}
        load_strictly(model, {**{name: fresh[name] for name in new}, **taken}, path)
    model.tokenizer_digest = _tokenizer_digest(state, model)
    return f"{path}: {origin}, {len(taken)} of {len(fresh)} tensors taken{note}"


def load_strictly(model: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    """Fill every tensor of the model from one of the same name and shape, with none left over, or CheckpointError."""
    for name, value in weights.items():
        if not (isinstance(value, Tensor) and value.is_floating_point() and value.layout == torch.strided):
            kind = f"{value.layout} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise CheckpointError(f"{path}: {name!r} must be a dense tensor of floating point numbers, not {kind}")
    have = {name: tuple(value.shape) for name, value in weights.items()}
    want = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if have != want:
        name = min((name for name in have.keys() | want.keys() if have.get(name) != want.get(name)), key=str)
        sizes = f"{have.get(name, 'missing')} in the file and {want.get(name, 'missing')} in the model"
        raise CheckpointError(f"{path}: does not fit the model: {name!r} is {sizes}")
    model.load_state_dict(weights)


def _simvg_weights(state: dict) -> tuple[str, dict[str, Tensor], dict]:
    """Description, weights under this project's names and arguments of SimVG of a SimVG checkpoint, ours or official;
    ("", {}, {}) if it is neither."""
    if {"config", "model", "ema"} <= state.keys():
        averaged = ", averaged weights" if state["ema"] else ""
        return f"SimVG checkpoint{averaged}", {**state["model"], **state["ema"]}, state["config"]["model"]
    official = state.get("ema_state_dict") or state.get("state_dict") or {}
    official = {name.removeprefix("module."): value for name, value in official.items()}
    if "head.query_embed.weight" not in official:
        return "", {}, {}
    averaged = ", averaged (EMA) weights" if state.get("ema_state_dict") else ""
    return f"official SimVG checkpoint{averaged}", convert(official), _official_sizes(official)


def _tokenizer_digest(state: dict, model: SimVG) -> str | None:
    """The digest of the tokenizer that the weights were trained with, None if unknown. Foreign files with as many words
    as BEiT-3 were trained with BEiT-3's."""
    beit3_words = "config" not in state and model.encoder.text_embed.num_embeddings == BEIT3_WORDS
    return BEIT3_TOKENIZER if beit3_words else state.get("tokenizer")


# Official names -> names here, as regular expressions, applied one after the other.
_HEAD_NAMES = {
    r"head\.text_guided_query_generation_transformer\.": "tqg.",
    r"head\.transformer\.decoder\.": "decoder_branch.",
    r"head\.input_text_proj\.": "tqg.text_proj.",
    r"head\.query_embed\.": "tqg.query_embed.",
    r"head\.input_proj\.": "decoder_branch.image_proj.",
    r"head\.input_cls_proj\.": "token_branch.object_proj.",
    r"head\.mlp\.layers\.0\.": "token_branch.mlp.",
    r"head\.class_embed_(decoder|token)\.": r"\1_branch.class_head.",
    r"head\.bbox_embed_(decoder|token)\.layers\.": r"\1_branch.box_head.",
    r"post_norm_layer": "norm",
    r"attentions\.0\.attn": "self_attn",
    r"attentions\.1\.attn": "cross_attn",
    r"ffns\.0\.layers\.0\.0": "ffn.0",
    r"ffns\.0\.layers\.1": "ffn.3",
    # the box heads' linear layers 0, 1, 2 are modules 0, 2, 4 here; 2 first, so that none is renamed twice
    r"(box_head)\.2\.": r"\1.4.",
    r"(box_head)\.1\.": r"\1.2.",
}


def convert(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """An official SimVG state dict under this project's names; KeyError on an unknown encoder name."""
    prefix = "vis_enc.beit3."
    encoder = {name.removeprefix(prefix): value for name, value in official.items() if name.startswith(prefix)}
    ours = {f"encoder.{name}": value for name, value in beit3.convert(encoder).items()}
    for name, value in official.items():
        if name.startswith(prefix) or re.fullmatch(r"head\.criterion\w*\.empty_weight", name):
            continue  # empty_weight: constants of the loss
        if name == "head.input_proj.weight":
            value = value.flatten(1)  # (C, D, 1, 1), a 1 x 1 convolution
        for pattern, replacement in _HEAD_NAMES.items():
            name = re.sub(pattern, replacement, name)
        ours[name] = value
    return ours


def _official_sizes(official: dict[str, Tensor]) -> dict:
    """The arguments of SimVG, read off an official checkpoint's tensors."""
    shape = {name: value.shape for name, value in official.items()}
    encoder, decoder = "vis_enc.beit3.encoder.layers", "head.transformer.decoder.layers"
    tqg = "head.text_guided_query_generation_transformer.layers"
    vocab, width = shape["vis_enc.beit3.text_embed.weight"]
    patch = shape["vis_enc.beit3.vision_embed.proj.weight"][-1]
    # 3: two rows that are never read, and the object token's
    grid = int((shape["vis_enc.beit3.encoder.embed_positions.A.weight"][0] - 3) ** 0.5)

    def layers(prefix: str) -> int:
        return len({name[len(prefix) + 1 :].split(".")[0] for name in shape if name.startswith(f"{prefix}.")})

    return dict(
        **dict(image_size=grid * patch, patch_size=patch, vocab_size=vocab),
        **dict(encoder_width=width, encoder_layers=layers(encoder), encoder_heads=width // 64, drop_path=0.0),
        encoder_ffn=shape[f"{encoder}.0.ffn.A.fc1.weight"][0],
        head_width=shape["head.query_embed.weight"][1],
        queries=shape["head.query_embed.weight"][0],
        **dict(tqg_layers=layers(tqg), tqg_ffn=shape[f"{tqg}.0.ffns.0.layers.0.0.weight"][0]),
        **dict(decoder_layers=layers(decoder), decoder_ffn=shape[f"{decoder}.0.ffns.0.layers.0.0.weight"][0]),
        **dict(dropout=0.0, as_released=True),
    )


def save(path: str | Path, state: dict) -> None:
    """Write a checkpoint so that at every moment `path` is the old file or the whole new one."""
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
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
                if damaged := file.testzip():  # compares checksums, which torch.load does not
                    raise CheckpointError(f"{path}: is damaged, the checksum of {damaged} is wrong")
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


# ------------------------------------------------------------------------------------------------ a first look


def main() -> None:
    """Print every stage of a tiny model, from pixels and words to boxes: shapes and parameters."""
    net = SimVG(
        **dict(image_size=64, patch_size=16, vocab_size=100, head_width=32, queries=1, as_released=False),
        **dict(encoder_width=64, encoder_layers=2, encoder_heads=4, encoder_ffn=128, drop_path=0.0),
        **dict(tqg_layers=1, tqg_ffn=64, decoder_layers=2, decoder_ffn=64, dropout=0.0),
    ).eval()
    stages = {"patches": net.encoder.patch_embed, "words": net.encoder.text_embed}
    stages |= {f"encoder layer {i}: image, text": layer for i, layer in enumerate(net.encoder.layers, 1)}
    stages |= {"object token and patches": net.encoder.image_norm, "text tokens": net.encoder.text_norm}
    stages |= {"text-guided queries, Eq. 8": net.tqg, "decoder branch, Eq. 2: logits, boxes": net.decoder_branch}
    stages |= {"token branch, Eq. 3: logits, boxes": net.token_branch}

    def show(title: str, output: Tensor | tuple[Tensor, ...], parameters: Iterable[Tensor]) -> None:
        shapes = " ".join(str(tuple(x.shape)) for x in (output if isinstance(output, tuple) else (output,)))
        print(f"{title:38} {shapes:30}{sum(p.numel() for p in parameters):>10,}")

    for title, module in stages.items():
        module.register_forward_hook(lambda module, _, output, title=title: show(title, output, module.parameters()))
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    tokens = torch.tensor([[0, 7, 8, 9, 2, 1], [0, 7, 8, 9, 10, 2]])  # <s> the left dog </s> <pad>
    net(images, tokens, tokens == 1)
    show("object token and positions, Eq. 1", net.encoder.object_token, net.encoder.parameters(recurse=False))
    show("all", (), net.parameters())


if __name__ == "__main__":
    main()
