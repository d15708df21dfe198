"""SimVG: two light heads on BEiT-3 tokens (arXiv 2409.17531, Sec. 3, Fig. 2).

    image, text -> BEiT-3 -> object token (B, D), image tokens (B, N, D), text tokens (B, L, D)
    text tokens            -> text-guided queries (B, Q, C)                              Eq. 8
    decoder branch (teacher): queries x image tokens -> 3 decoder layers -> boxes        Eq. 2
    token branch   (student): object token + queries -> linear layer, heads -> boxes     Eq. 3

B batch, N image tokens, L text tokens, Q queries (1 in REC, 10 in gREC), K decoder layers,
D encoder width, C head width. Boxes are cxcywh in 0..1 of the image; class 0 is "the referred
object", class 1 "no object".

Why two branches: the decoder branch looks at all image tokens through cross-attention and learns
accurate boxes. The token branch reads the box from one token, BEiT-3's [CLS], which has attended to
all patches and words in every layer since pre-training. Trained side by side, the decoder teaches
the token branch, and both train the encoder. At test time the decoder can be left out: the head is
then simpler, but not much faster, because the encoder takes about 98 % of the time.

Why text-guided queries: DETR's queries are the same for every image. Here a query must look for
what the text names, so it starts from the words: cross-attention over them, plus their maximum,
plus a learnt vector. In gREC that vector alone tells the ten queries apart.
"""

import ctypes
import math
import os
import pickle
import sys
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import beit3

HEADS = 8  # attention heads of text-guided queries and decoder, in every released model
IMAGE_MEAN = (123.675, 116.28, 103.53)  # of ImageNet, RGB, 0..255
IMAGE_STD = (58.395, 57.12, 57.375)
PRECISIONS = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # of train.amp


@dataclass(frozen=True)
class ModelConfig:
    image_size: int = 640  # pixels; images are stretched to a square
    patch_size: int = 32  # pixels of a side of the encoder's patches
    vocab_size: int = 64010  # rows of the word embedding; BEiT-3's tokenizer has as many ids
    encoder_width: int = 768  # D; large 1024
    encoder_layers: int = 12  # large 24
    encoder_heads: int = 12  # large 16
    encoder_ffn: int = 3072  # hidden width of the encoder's feed-forward networks; large 4096
    drop_path: float = 0.1  # rate of the encoder's last layer; it grows from 0 in the first
    head_width: int = 256  # C, the width of text-guided queries and of both branches
    queries: int = 1  # Q; 1 for REC, 10 for gREC
    tqg_layers: int = 2  # layers of the text-guided query generation
    tqg_ffn: int = 512  # hidden width of its feed-forward networks
    decoder_layers: int = 3  # K, layers of the decoder branch
    decoder_ffn: int = 2048  # hidden width of its feed-forward networks
    dropout: float = 0.1  # in text-guided queries and decoder branch
    # The official code has two bugs in its text-guided queries (D3, D4), and its weights were
    # trained with them. True repeats the bugs, for these weights.
    as_released: bool = False

    def __post_init__(self):
        factors = {
            "image_size": self.patch_size,
            "encoder_width": math.lcm(4, self.encoder_heads),  # 4: sine and cosine of x and y
            "head_width": HEADS,
        }
        for name, factor in factors.items():
            if getattr(self, name) % factor:
                raise ValueError(f"model.{name} must be a multiple of {factor}")


class Output(NamedTuple):
    """None for a branch that was not asked for. The last decoder layer is its branch's answer."""

    decoder_logits: Tensor | None = None  # (K, B, Q, 2)
    decoder_boxes: Tensor | None = None  # (K, B, Q, 4) cxcywh
    token_logits: Tensor | None = None  # (B, Q, 2)
    token_boxes: Tensor | None = None  # (B, Q, 4) cxcywh

    def answers(self) -> dict[str, tuple[Tensor, Tensor]]:
        """{branch: (logits (B, Q, 2), boxes (B, Q, 4))} of the branches that ran."""
        answers = {}
        if self.decoder_boxes is not None:
            answers["decoder"] = self.decoder_logits[-1], self.decoder_boxes[-1]
        if self.token_boxes is not None:
            answers["token"] = self.token_logits, self.token_boxes
        return answers


class DecoderLayer(nn.Module):
    """A DETR decoder layer: each norm comes behind a residual connection (post-norm).

    Positions are added to queries and keys, never to values.
    """

    def __init__(self, width: int, ffn: int, dropout: float):
        super().__init__()
        # Unlike in torch's TransformerDecoderLayer, no dropout follows the attention, as in the
        # official code.
        self.self_attn = nn.MultiheadAttention(width, HEADS, dropout, batch_first=True)
        self.cross_attn = nn.MultiheadAttention(width, HEADS, dropout, batch_first=True)
        self.ffn = nn.Sequential(
            nn.Linear(width, ffn),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(ffn, width),
            nn.Dropout(dropout),
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(
        self,
        x: Tensor,
        query_pos: Tensor,
        memory: Tensor,
        memory_pos: Tensor,
        memory_pad: Tensor | None = None,
    ) -> Tensor:
        """x, query_pos (B, Q, C); memory (B, n, C); memory_pos (n, C) -> (B, Q, C).

        memory_pad (B, n) is True for padding.
        """
        q = x + query_pos
        attended, _ = self.self_attn(q, q, x, need_weights=False)
        x = self.norms[0](x + attended)
        q = x + query_pos
        k = memory + memory_pos
        attended, _ = self.cross_attn(q, k, memory, key_padding_mask=memory_pad, need_weights=False)
        x = self.norms[1](x + attended)
        return self.norms[2](x + self.ffn(x))


class TextGuidedQuery(nn.Module):
    """TQG, Eq. 8: Q_tqg = MCA(Q_init, f_text + pos) + MMP(f_text) + Q_init.

    MCA (multi-head cross attention) stands for the layers, MMP is the mask max pool.
    """

    one_frequency = False  # see `beit3.sine_1d`

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.head_width
        self.text_proj = nn.Linear(config.encoder_width, width)
        self.query_embed = nn.Embedding(config.queries, width)
        # Each layer has its own initial weights. The official code copies one layer (D11).
        self.layers = nn.ModuleList(
            DecoderLayer(width, config.tqg_ffn, config.dropout) for _ in range(config.tqg_layers)
        )
        self.norm = nn.LayerNorm(width)
        places = torch.arange(beit3.TEXT_POSITIONS)
        positions = beit3.sine_1d(places, width, self.one_frequency)
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, text: Tensor, text_pad: Tensor) -> Tensor:
        """text (B, L, D), text_pad (B, L) True = padding -> queries (B, Q, C)."""
        text = self.text_proj(text)  # (B, L, C)
        initial = self.query_embed.weight.expand(text.shape[0], -1, -1)  # (B, Q, C)
        positions = self.positions[: text.shape[1]]  # (L, C)
        # As in DETR, the content starts at zero, and Q_init is added to the queries of every layer.
        x = torch.zeros_like(initial)
        for layer in self.layers:
            x = layer(x, initial, text, positions, text_pad)
        return self.norm(x) + self.pool(text, text_pad)[:, None] + initial

    def pool(self, text: Tensor, text_pad: Tensor) -> Tensor:
        """Mask max pool, (B, L, C) -> (B, C): the maximum over the words, without padding (D2)."""
        # max, not amax, which would share the gradient between equal maxima
        return text.masked_fill(text_pad[..., None], -torch.inf).max(dim=1).values


class ReleasedTextGuidedQuery(TextGuidedQuery):
    """What the official code computes and the released weights were trained with (D3, D4)."""

    one_frequency = True

    def pool(self, text: Tensor, text_pad: Tensor) -> Tensor:
        # The official code means text[~mask].max(), but its mask holds integers: ~0 = -1 and
        # ~1 = -2 are taken as row numbers. So it takes the maximum over the last row and, if the
        # text is padded, the last but one.
        last = text[:, -1]  # (B, C)
        both = torch.maximum(last, text[:, -2])
        return torch.where(text_pad.any(1, keepdim=True), both, last)


def box_head(width: int) -> nn.Sequential:
    """(..., C) -> (..., 4), before the sigmoid."""
    return nn.Sequential(
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 4),
    )


class DecoderBranch(nn.Module):
    """Eq. 2: Q_decoder = MCA(queries, IP(T_img) + pos), where IP is image_proj.

    Every layer predicts, with shared heads. The text-guided queries are the *positions* of the
    queries; their content starts at zero, as in DETR.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.head_width
        self.image_proj = nn.Linear(config.encoder_width, width)
        self.layers = nn.ModuleList(
            DecoderLayer(width, config.decoder_ffn, config.dropout)
            for _ in range(config.decoder_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.class_head = nn.Linear(width, 2)
        self.box_head = box_head(width)
        positions = beit3.sine_2d(config.image_size // config.patch_size, width)
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, image: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """image (B, N, D), queries (B, Q, C) -> logits (K, B, Q, 2), boxes (K, B, Q, 4)."""
        image = self.image_proj(image)  # (B, N, C)
        x = torch.zeros_like(queries)
        outputs = []
        for layer in self.layers:
            x = layer(x, queries, image, self.positions)
            outputs.append(self.norm(x))  # for the heads; the next layer gets x itself
        x = torch.stack(outputs)  # (K, B, Q, C)
        return self.class_head(x), self.box_head(x).sigmoid()


class TokenBranch(nn.Module):
    """Eq. 3: Q_token = MLP(OP(T_obj) + queries), where OP is object_proj.

    Up to the logits all layers are linear. So the order of the queries by their scores depends on
    the queries alone, not on the object token, and only the text in the queries can change it.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.head_width
        self.object_proj = nn.Linear(config.encoder_width, width)
        self.mlp = nn.Linear(width, width)  # the paper calls it MLP and finds one layer enough
        self.class_head = nn.Linear(width, 2)
        self.box_head = box_head(width)

    def forward(self, object_token: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """object_token (B, D), queries (B, Q, C) -> logits (B, Q, 2), boxes (B, Q, 4)."""
        object_token = self.object_proj(object_token)[:, None]  # (B, 1, C)
        x = self.mlp(object_token + queries)  # (B, Q, C)
        return self.class_head(x), self.box_head(x).sigmoid()


class SimVG(nn.Module):
    """The whole model."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        # what `build` reads from a checkpoint
        self.trained_branch = "both"
        self.max_tokens = 20
        self.encoder = beit3.BEiT3(
            image_size=config.image_size,
            patch=config.patch_size,
            vocab=config.vocab_size,
            width=config.encoder_width,
            layers=config.encoder_layers,
            heads=config.encoder_heads,
            ffn=config.encoder_ffn,
            drop_path=config.drop_path,
        )
        query_class = ReleasedTextGuidedQuery if config.as_released else TextGuidedQuery
        self.tqg = query_class(config)
        self.decoder_branch = DecoderBranch(config)
        self.token_branch = TokenBranch(config)
        # Xavier for the decoder's matrices only, as in the official code; queries and heads keep
        # PyTorch's. (Perhaps this was not meant so; kept, so that trainings can be compared.)
        for weight in self.decoder_branch.layers.parameters():
            if weight.dim() > 1:
                nn.init.xavier_uniform_(weight)
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD).view(3, 1, 1), persistent=False)

    def forward(
        self,
        images: Tensor,
        tokens: Tensor,
        text_pad: Tensor,
        branch: str = "both",
        amp: torch.dtype | None = None,
    ) -> Output:
        """images (B, 3, S, S) uint8, or float and then taken as normalised; tokens (B, L) int64;
        text_pad (B, L) bool, True = padding; branch "both", "decoder" or "token".

        `amp` runs the encoder in this precision. The rest stays in float32 (TF32 on a GPU), because
        a box in bf16 is off by up to 2 pixels.
        """
        if images.dtype == torch.uint8:
            images = (images - self.mean) / self.std
        # the second argument is not read where autocast is not enabled
        with torch.autocast(images.device.type, amp or torch.bfloat16, enabled=amp is not None):
            object_token, image, text = self.encoder(
                images, tokens, text_pad, object_only=branch == "token"
            )
        queries = self.tqg(text.float(), text_pad)  # (B, Q, C)
        decoder = (None, None)  # logits, boxes
        token = (None, None)
        if branch != "token":
            decoder = self.decoder_branch(image.float(), queries)
        if branch != "decoder":
            token = self.token_branch(object_token.float(), queries)
        return Output(*decoder, *token)


# ------------------------------------------------------------------------------- checkpoint files


class Checkpoint(NamedTuple):
    """What a file of weights holds, under this project's names."""

    kind: str  # for messages: "SimVG", "official SimVG" or "BEiT-3"
    tensors: dict[str, Tensor]
    config: ModelConfig | None  # None for BEiT-3
    state: dict  # a checkpoint of this project as it is; {} for the others


def load(path: str | Path, device: str | torch.device = "cpu", **changes) -> SimVG:
    """A SimVG in eval mode from this project's checkpoint or an official SimVG .pth.

    Averaged (EMA) weights are taken where there are any. `changes` replace fields of ModelConfig,
    such as `image_size`, or `encoder_heads` where the heads of an official file are not 64 wide.
    """
    return build(read(path), device, **changes)


def build(checkpoint: Checkpoint, device: str | torch.device = "cpu", **changes) -> SimVG:
    """`load` for what `read` gave. The model knows `trained_branch` and `max_tokens`."""
    if checkpoint.config is None:
        raise ValueError("it holds no SimVG weights")
    model = SimVG(replace(checkpoint.config, **changes))
    initialise(model, checkpoint)
    if checkpoint.state:  # an official file says neither
        model.trained_branch = checkpoint.state["branch"]
        model.max_tokens = checkpoint.state["config"]["data"]["max_tokens"]
    return model.to(device).eval()


def read(path: str | Path) -> Checkpoint:
    """A checkpoint of this project, an official SimVG .pth or a BEiT-3 file, told by its keys.

    Tensors are on the CPU, and nothing in the file can run code. ValueError: it is damaged, or none
    of these.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # torch.load compares no checksums
            names = file.namelist()
        if not any(name.endswith("data.pkl") for name in names):
            raise ValueError(f"is a zip of other files ({', '.join(names):.80}); unpack it")
        if damaged:
            raise ValueError(f"is damaged: the checksum of {damaged} is wrong")
    # torch.load refuses all classes that are not listed here. Official files hold numpy's numbers,
    # such as the best accuracy.
    numbers = [
        np._core.multiarray.scalar,
        np.dtype,
        np.dtypes.Float64DType,
        np.dtypes.Float32DType,
    ]
    with open(path, "rb") as file:
        try:
            with torch.serialization.safe_globals(numbers):
                state = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, EOFError, RuntimeError, OSError):
            state = None
    if not isinstance(state, dict):
        raise ValueError("is cut, damaged or no checkpoint of tensors, numbers and strings alone")

    if {"config", "model", "branch"} <= state.keys():
        config = ModelConfig(**state["config"]["model"])
        return Checkpoint("SimVG", state.get("ema") or state["model"], config, state)
    official = state.get("ema_state_dict") or state.get("state_dict")
    if official:
        tensors = from_official(official)
        return Checkpoint("official SimVG", tensors, official_config(tensors), {})
    return Checkpoint("BEiT-3", state.get("model") or state, None, {})


def initialise(model: SimVG, checkpoint: Checkpoint) -> set[str]:
    """Start `model` from a file's weights; returns the names of its tensors that stay new.

    A BEiT-3 file must fill the whole encoder, a SimVG file everything. Image positions are resized
    to another grid, and another number of queries starts anew. RuntimeError (of torch): any other
    misfit.
    """
    if checkpoint.config is None:
        model.encoder.load_state_dict(beit3.pretrained_weights(checkpoint.tensors, model.encoder))
        return {name for name in model.state_dict() if not name.startswith("encoder.")}
    tensors = dict(checkpoint.tensors)
    positions = "encoder.image_positions"
    queries = "tqg.query_embed.weight"
    tensors[positions] = beit3.resize_positions(tensors[positions], model.encoder.grid, extra=1)
    new = set()
    if checkpoint.config.queries != model.config.queries:
        tensors[queries] = model.tqg.query_embed.weight
        new.add(queries)
    model.load_state_dict(tensors)
    return new


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
    r"head\.class_embed_(decoder|token)": r"\1_branch.class_head",
    r"head\.bbox_embed_(decoder|token)\.layers": r"\1_branch.box_head",
    r"post_norm_layer": "norm",
    r"attentions\.0\.attn": "self_attn",
    r"attentions\.1\.attn": "cross_attn",
    r"ffns\.0\.layers\.0\.0": "ffn.0",
    r"ffns\.0\.layers\.1": "ffn.3",
    # The box heads' linear layers 0, 1, 2 are modules 0, 2, 4 here. 2 is first, so that 1 -> 2 -> 4
    # cannot happen.
    r"box_head\.2": "box_head.4",
    r"box_head\.1": "box_head.2",
}


def from_official(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """An official SimVG state dict under this project's names. Unknown names stay as they are."""
    ours = {}
    for name, value in beit3.renamed(beit3.from_beit3(official), _NAMES).items():
        if name == "decoder_branch.image_proj.weight":
            ours[name] = value.flatten(1)  # (C, D, 1, 1), a 1 x 1 convolution
        elif not name.endswith(".empty_weight"):  # constants of the loss
            ours[name] = value
    return ours


def official_config(weights: dict[str, Tensor]) -> ModelConfig:
    """The sizes of a model, read off official tensors under this project's names."""

    def layers(part: str) -> int:
        # encoder.layers.11.image.q.weight -> "11"
        numbers = {name.split(".")[2] for name in weights if name.startswith(f"{part}.layers.")}
        return len(numbers)

    vocab_size, width = weights["encoder.text_embed.weight"].shape
    queries, head_width = weights["tqg.query_embed.weight"].shape
    patch = weights["encoder.patch_embed.weight"].shape[-1]
    grid = math.isqrt(len(weights["encoder.image_positions"]) - 1)
    return ModelConfig(
        image_size=grid * patch,
        patch_size=patch,
        vocab_size=vocab_size,
        encoder_width=width,
        encoder_layers=layers("encoder"),
        encoder_heads=max(width // 64, 1),
        encoder_ffn=len(weights["encoder.layers.0.image.fc1.weight"]),
        head_width=head_width,
        queries=queries,
        tqg_layers=layers("tqg"),
        tqg_ffn=len(weights["tqg.layers.0.ffn.0.weight"]),
        decoder_layers=layers("decoder_branch"),
        decoder_ffn=len(weights["decoder_branch.layers.0.ffn.0.weight"]),
        as_released=True,
    )


def save(path: str | Path, state: dict) -> None:
    """Write a checkpoint so that at every moment `path` is the old file or the whole new one."""
    part = f"{path}.{os.getpid()}.part"
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # on disk before the old file is replaced
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)  # it is there only if something failed


# --------------------------------------------------------------- where it runs: ranks, precision


def join_ranks() -> tuple[int, int, torch.device]:
    """(rank, number of ranks, device) of this process, which joins the others under torchrun.

    The programs for training and evaluation start with it.
    """
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    keep_freed_memory()
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32: float32 with 10 bits of mantissa
        # cuDNN's attention gave wrong gradients with masks and NaN for a single query (cuDNN 9.25)
        torch.backends.cuda.enable_cudnn_sdp(False)
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def keep_freed_memory() -> None:
    """Linux: keep the memory that a tensor sets free for the next one.

    glibc would give large blocks back to the system, and each page of the next activations would
    cost a page fault: a tenth of a training step on a CPU.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD; the most that every glibc takes
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def encoder_precision(amp: str, device: torch.device) -> torch.dtype | None:
    """What train.amp means on this device. "auto": bf16 on a GPU that has it, else fp16."""
    if amp != "auto":
        return PRECISIONS[amp]
    if device.type != "cuda":
        return None
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16


def leave_ranks() -> None:
    """Leave together, because torchrun may end the others when one rank ends."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
