"""Matching, set loss and dynamic weight-balance distillation (SimVG Sec. 3.4, Eq. 4 to 7).

Predictions are logits (..., Q, 2) and boxes (..., Q, 4). The truth is padded: targets (B, M, 4) with target_mask
(B, M), True = a real box. An example without a target is a row that is all False. Boxes are cxcywh in 0..1.

Sums are divided by counts of the *global* batch (all ranks, all micro-batches), so that neither changes a run (D6).
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert

from model import Output

CLASS, L1, GIOU = 1.0, 5.0, 2.0  # lambda 1, 2, 3 of Eq. 4, in the loss and in the matching
NO_OBJECT = 0.1  # weight of the class "no object" in the cross entropy, unless the config says another
EPS = 1e-6  # added to denominators, as in the official code: a box of 3 % of the sides has an IoU of 0.999 with itself


def iou_giou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU of cxcywh boxes a (..., 4) and b (..., 4), pair by pair, leading sizes broadcast."""
    a, b = box_convert(a, "cxcywh", "xyxy"), box_convert(b, "cxcywh", "xyxy")
    area_a = (a[..., 2:] - a[..., :2]).prod(-1)
    area_b = (b[..., 2:] - b[..., :2]).prod(-1)
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = area_a + area_b - overlap
    iou = overlap / (union + EPS)
    return iou, iou - (hull - union) / (hull + EPS)


# --------------------------------------------------------------------------------------------------- matching


def assign(cost: Tensor | Sequence[Sequence[float]]) -> tuple[list[int], list[int]]:
    """Exact minimum-cost assignment: cost (N, M) -> min(N, M) pairs as (rows, cols), rows ascending.

    Shortest augmenting paths with potentials (Jonker and Volgenant), O(min(N, M)^2 max(N, M)).
    ValueError if a cost is not finite.
    """
    matrix = cost.tolist() if isinstance(cost, Tensor) else [list(row) for row in cost]
    if not all(math.isfinite(value) for row in matrix for value in row):
        raise ValueError("a matching cost is not finite: some predicted or target box is NaN or infinite")
    if not matrix or not matrix[0]:
        return [], []
    if len(matrix) <= len(matrix[0]):
        pairs = list(enumerate(_assign_rows(matrix)))
    else:  # the search wants the short side as its rows
        columns = [list(column) for column in zip(*matrix, strict=True)]
        pairs = sorted((row, col) for col, row in enumerate(_assign_rows(columns)))
    return [row for row, _ in pairs], [col for _, col in pairs]


def _assign_rows(cost: list[list[float]]) -> list[int]:
    """The column of each row, for at most as many rows as columns."""
    n, m = len(cost), len(cost[0])
    row_potential, col_potential = [0.0] * n, [0.0] * m
    owner = [-1] * m  # the row that holds a column
    for start in range(n):
        distance, reached_from, done = [math.inf] * m, [-1] * m, [False] * m
        row, col, base = start, -1, 0.0
        while row >= 0:  # grow the tree of shortest paths until it reaches a free column
            nearest = -1
            for j in range(m):
                if done[j]:
                    continue
                reach = base + cost[row][j] - row_potential[row] - col_potential[j]
                if reach < distance[j]:
                    distance[j], reached_from[j] = reach, col
                if nearest < 0 or distance[j] < distance[nearest]:
                    nearest = j
            col, base = nearest, distance[nearest]
            done[col] = True
            row = owner[col]  # -1: the column is free
        for j in range(m):  # keep all reduced costs at zero or above
            if done[j]:
                if owner[j] >= 0:
                    row_potential[owner[j]] += base - distance[j]
                col_potential[j] -= base - distance[j]
        row_potential[start] += base
        while col >= 0:  # flip the path: each column on it goes to the row it was reached from
            previous = reached_from[col]
            owner[col] = owner[previous] if previous >= 0 else start
            col = previous
    held = [-1] * n  # the column that a row holds
    for j, row in enumerate(owner):
        if row >= 0:
            held[row] = j
    return held


@torch.no_grad()
def match(logits: Tensor, boxes: Tensor, targets: Tensor, target_mask: Tensor) -> Tensor:
    """Eq. 5: logits (K, B, Q, 2), boxes (K, B, Q, 4), targets (B, M, 4), target_mask (B, M) -> (K, B, Q) int64, the
    number of each query's target, -1 = none. Each of the K predictions is matched by itself.
    """
    (K, B, Q, _), M = boxes.shape, targets.shape[1]
    if Q == M == 1:  # REC: there is nothing to choose, and nothing to wait for on the device
        return torch.where(target_mask, 0, -1).expand(K, B, 1)
    pairs = boxes[:, :, :, None], targets[None, :, None]  # (K, B, Q, 1, 4), (1, B, 1, M, 4)
    l1 = (pairs[0] - pairs[1]).abs().sum(-1)  # (K, B, Q, M)
    score = logits.softmax(-1)[..., :1]  # (K, B, Q, 1)
    cost = L1 * l1 - CLASS * score - GIOU * iou_giou(*pairs)[1]
    # a loss that is not finite is the training loop's to notice
    cost = cost.double().nan_to_num(1e9, 1e9, -1e9).tolist()
    real = [[j for j in range(M) if row[j]] for row in target_mask.tolist()]
    result = [[[-1] * Q for _ in range(B)] for _ in range(K)]
    for k in range(K):
        for b in range(B):
            for q, j in zip(*assign([[row[j] for j in real[b]] for row in cost[k][b]]), strict=True):
                result[k][b][q] = real[b][j]
    return torch.tensor(result, device=boxes.device)


# ------------------------------------------------------------------------------------------------------ losses


def global_sum(counts: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(counts)
    return counts


def normalisers(target_mask: Tensor, queries: int, no_object: float) -> Tensor:
    """(2,): number of targets; sum of the class weights over all queries. Known before any prediction."""
    counts = target_mask.sum(1)  # (B,)
    matched = counts.clamp(max=queries).sum()  # as many queries get a target
    return torch.stack([counts.sum().float(), matched + no_object * (len(target_mask) * queries - matched)])


def global_normalisers(counts: Tensor) -> Tensor:
    """`normalisers` summed over all ranks, as one rank's share, since DDP averages the ranks' gradients. A step
    without any target divides by 1."""
    targets, weights = global_sum(counts)
    return torch.stack([targets.clamp(min=1), weights]) / (dist.get_world_size() if dist.is_initialized() else 1)


def detection_loss(
    logits: Tensor, boxes: Tensor, targets: Tensor, matched: Tensor, norm: Tensor, no_object: float
) -> Tensor:
    """L_det of Eq. 4, summed over K: 1 cross entropy + 5 L1 + 2 (1 - GIoU). A scalar.

    logits (K, B, Q, 2), boxes (K, B, Q, 4), targets (B, M, 4), matched (K, B, Q) as `match` gives it, norm (2,).
    """
    has_target = matched >= 0  # (K, B, Q)
    first = torch.arange(2, device=logits.device) == 0
    weight = torch.where(first, 1.0, no_object).to(logits)  # made on the device: no wait for a copy
    # flattened: cross entropy over a middle dimension has no deterministic CUDA kernel
    label = torch.where(has_target, 0, 1).flatten()
    cross_entropy = F.cross_entropy(logits.flatten(0, 2), label, weight, reduction="sum")
    index = matched.clamp(min=0)[..., None].expand(-1, -1, -1, 4)  # (K, B, Q, 4)
    wanted = targets.expand(len(boxes), -1, -1, -1).gather(2, index)  # (K, B, Q, 4)
    l1 = ((boxes - wanted).abs().sum(-1) * has_target).sum()
    giou = ((1 - iou_giou(boxes, wanted)[1]) * has_target).sum()
    return CLASS * cross_entropy / norm[1] + (L1 * l1 + GIOU * giou) / norm[0]


@torch.no_grad()
def teacher_weight(logits: Tensor, boxes: Tensor, targets: Tensor, matched: Tensor) -> Tensor:
    """W_dt of Eq. 6: the mean over matched pairs of IoU x score of the decoder's boxes; 0 without any pair (D8).

    logits (B, Q, 2), boxes (B, Q, 4), targets (B, M, 4), matched (B, Q). One number for the batch of all ranks.
    """
    has_target = matched >= 0  # (B, Q)
    wanted = targets.gather(1, matched.clamp(min=0)[..., None].expand(-1, -1, 4))  # (B, Q, 4)
    quality = iou_giou(boxes, wanted)[0] * logits.softmax(-1)[..., 0] * has_target  # (B, Q)
    total, count = global_sum(torch.stack([quality.sum(), has_target.sum().float()]))
    return total / count.clamp(min=1)


def simvg_loss(
    output: Output,
    targets: Tensor,
    target_mask: Tensor,
    decoder_factor: float | None = 1.0,
    truth_factor: float | None = 2.0,
    teacher_factor: float | None = 1.0,
    no_object: float = NO_OBJECT,
    norm: Tensor | None = None,
) -> dict[str, Tensor]:
    """The training loss; targets (B, M, 4) and target_mask (B, M) are the truth. Scalars that add up to `total`:

        decoder_factor * L_det(decoder, truth)
        + teacher_factor * W_dt * L_det(token, decoder's boxes) + truth_factor * (1 - W_dt) * L_det(token, truth)

    The second line is DWBD, Eq. 7 (D1). A factor of None leaves its term out, and a branch in no term need not
    have run; without a teacher there is no W_dt, the token branch simply learns from the truth. `norm` is what
    `global_normalisers` gives for the whole step; it is worked out here if this batch is the whole step.
    """
    if norm is None:
        logits = output.decoder_logits if output.token_logits is None else output.token_logits
        norm = global_normalisers(normalisers(target_mask, logits.shape[-2], no_object))
    terms = {}
    if decoder_factor is not None or teacher_factor is not None:
        matched = match(output.decoder_logits, output.decoder_boxes, targets, target_mask)
    if decoder_factor is not None:
        loss = detection_loss(output.decoder_logits, output.decoder_boxes, targets, matched, norm, no_object)
        terms["decoder"] = decoder_factor * loss
    if truth_factor is not None or teacher_factor is not None:
        student = output.token_logits[None], output.token_boxes[None]  # (1, B, Q, .)
    w_dt = None
    if teacher_factor is not None:
        teacher_logits, teacher_boxes = output.decoder_logits[-1].detach(), output.decoder_boxes[-1].detach()
        w_dt = teacher_weight(teacher_logits, teacher_boxes, targets, matched[-1])
        # the student's targets: the teacher's boxes, of those queries that have a target themselves
        rematched = match(*student, teacher_boxes, matched[-1] >= 0)
        loss = detection_loss(*student, teacher_boxes, rematched, norm, no_object)
        terms["token_on_teacher"] = teacher_factor * w_dt * loss
    if truth_factor is not None:
        loss = detection_loss(*student, targets, match(*student, targets, target_mask), norm, no_object)
        terms["token_on_truth"] = truth_factor * loss * (1 if w_dt is None else 1 - w_dt)
    terms["total"] = sum(terms.values())
    return terms if w_dt is None else {**terms, "teacher_weight": w_dt}
