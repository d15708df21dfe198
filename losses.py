"""The training loss of SimVG: set loss, matching, dynamic weight-balance distillation (Sec. 3.4).

    total = decoder * L_det(decoder, targets)                                          Eq. 4
          + token_on_teacher * W_dt * L_det(token, decoder's boxes)                    Eq. 7
          + token_on_truth * (1 - W_dt) * L_det(token, targets)

Without the second term W_dt is 0. The three factors are 1, 1 and 2, as in the released configs of
the base model; the paper prints 1, 2 and 1 (D1).

Why W_dt: at first the decoder's boxes are poor, so the student learns from the truth. W_dt is how
good they are, IoU with the truth times score, and moves the weight from the truth to the teacher as
the teacher improves. In REC the only query always is an object, so that its score is soon 1 and
W_dt is the teacher's mean IoU.

K decoder layers, B examples, Q queries, M targets. The token branch is passed as if it were a
decoder with K = 1. Boxes are cxcywh in 0..1; class 0 is the referred object, class 1 "no object".
Targets are padded: target_mask (B, M) is True for a real box, and a row that is all False is an
example without a target.

Why sums are divided by counts of the *global* batch (D6): a mean per micro-batch would count an
object more where it shares its micro-batch with fewer objects. Divided by the counts of the whole
step, gradients do not depend on ranks and micro-batches. One exception: W_dt needs the decoder's
boxes, so it is computed for each micro-batch, over all ranks; another `train.micro_batch` therefore
changes it slightly.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert

from model import Output

# lambda 1, 2, 3 of Eq. 4, in the loss and in the matching
CLASS = 1.0
L1 = 5.0
GIOU = 2.0
# Added to denominators, as in the official code. It lowers the IoU of small boxes a little: a box
# of 3 % x 3 % of the image has 0.999 with itself.
EPS = 1e-6


def area(sides: Tensor) -> Tensor:
    """(..., 2) widths and heights -> (...)."""
    # width * height, not sides.prod(-1), whose backward pass makes the GPU wait
    width, height = sides.clamp(min=0).unbind(-1)
    return width * height


def iou_giou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU of cxcywh boxes a (..., 4) and b (..., 4), pair by pair.

    Leading sizes broadcast.
    """
    a = box_convert(a, "cxcywh", "xyxy")
    b = box_convert(b, "cxcywh", "xyxy")
    overlap = area(torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2]))
    hull = area(torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2]))
    union = area(a[..., 2:] - a[..., :2]) + area(b[..., 2:] - b[..., :2]) - overlap
    iou = overlap / (union + EPS)
    giou = iou - (hull - union) / (hull + EPS)
    return iou, giou


@torch.no_grad()
def match(logits: Tensor, boxes: Tensor, targets: Tensor, target_mask: Tensor) -> Tensor:
    """Eq. 5: the target of each query, (K, B, Q) int64, -1 for none. Each layer is matched alone.

    logits (K, B, Q, 2), boxes (K, B, Q, 4), targets (B, M, 4), target_mask (B, M).
    """
    K, B, Q, _ = boxes.shape
    if Q == 1 and targets.shape[1] == 1:
        # REC: the only query gets the only target. The general code gives the same, but copies the
        # costs to the CPU.
        return torch.where(target_mask, 0, -1).expand(K, B, Q)
    predicted = boxes[:, :, :, None]  # (K, B, Q, 1, 4)
    wanted = targets[None, :, None]  # (1, B, 1, M, 4)
    l1 = (predicted - wanted).abs().sum(-1)  # (K, B, Q, M)
    _, giou = iou_giou(predicted, wanted)  # (K, B, Q, M)
    score = logits.softmax(-1)[..., :1]  # (K, B, Q, 1)
    cost = L1 * l1 - CLASS * score - GIOU * giou  # (K, B, Q, M)
    # If a prediction is NaN, so is the loss, and train.py skips the step.
    return assign_targets(cost, target_mask).to(boxes.device)


def assign_targets(cost: Tensor, target_mask: Tensor) -> Tensor:
    """cost (K, B, Q, M), target_mask (B, M) -> what `match` returns, on the CPU."""
    costs = cost.cpu().numpy()  # small pieces are taken out of it much faster than of a tensor
    masks = target_mask.cpu().numpy()
    matched = np.full(costs.shape[:3], -1)  # (K, B, Q)
    for b, mask in enumerate(masks):
        real = np.flatnonzero(mask)  # the numbers of the targets that are no padding
        for k, of_layer in enumerate(costs):
            queries, columns = assign(of_layer[b][:, real].tolist())
            matched[k, b, queries] = real[columns]
    return torch.from_numpy(matched)


def targets_of(matched: Tensor, targets: Tensor) -> Tensor:
    """matched (K, B, Q), targets (B, M, 4) -> (K, B, Q, 4), the target of each query.

    A query without a target gets the first one; callers mask it out.
    """
    index = matched.clamp(min=0)[..., None].expand(-1, -1, -1, 4)  # (K, B, Q, 4)
    return targets.expand(len(matched), -1, -1, -1).gather(2, index)


class Divisors(NamedTuple):
    """What the sums of `detection_loss` are divided by: counts of the whole step (`divisors`)."""

    targets: Tensor  # the number of targets
    class_weights: Tensor  # the sum of the weights of all queries in the cross entropy


def detection_loss(
    logits: Tensor,
    boxes: Tensor,
    targets: Tensor,
    matched: Tensor,
    by: Divisors,
    no_object: float,
) -> Tensor:
    """L_det of Eq. 4, summed over K layers: cross entropy + 5 L1 + 2 (1 - GIoU). A scalar.

    logits (K, B, Q, 2), boxes (K, B, Q, 4), targets (B, M, 4), matched (K, B, Q) of `match`.
    `no_object` is the weight of queries without a target in the cross entropy: most queries have
    none, and with weight 1 the loss would be about them (DETR).
    """
    has_target = matched >= 0  # (K, B, Q)
    label = torch.where(has_target, 0, 1)
    weight = torch.where(has_target, 1.0, no_object)
    # flattened, because cross entropy over a middle dimension has no deterministic CUDA kernel
    entropies = F.cross_entropy(logits.flatten(0, 2), label.flatten(), reduction="none")
    cross_entropy = (weight.flatten() * entropies).sum()

    wanted = targets_of(matched, targets)  # (K, B, Q, 4)
    _, giou = iou_giou(boxes, wanted)  # (K, B, Q)
    l1 = ((boxes - wanted).abs().sum(-1) * has_target).sum()
    giou_loss = ((1 - giou) * has_target).sum()
    return CLASS * cross_entropy / by.class_weights + (L1 * l1 + GIOU * giou_loss) / by.targets


@torch.no_grad()
def teacher_weight(logits: Tensor, boxes: Tensor, targets: Tensor, matched: Tensor) -> Tensor:
    """W_dt of Eq. 6: the mean over matched pairs of IoU x score; 0 without any pair (D8).

    The arguments are those of the last decoder layer alone (K = 1). A scalar, the same on all
    ranks.
    """
    iou, _ = iou_giou(boxes, targets_of(matched, targets))  # (1, B, Q)
    score = logits.softmax(-1)[..., 0]  # (1, B, Q)
    has_target = matched >= 0  # (1, B, Q)
    quality = (iou * score * has_target).sum()
    total, count = global_sum(torch.stack([quality, has_target.sum().float()]))
    return total / count.clamp(min=1)


def simvg_loss(
    output: Output,
    targets: Tensor,
    target_mask: Tensor,
    decoder: float | None = 1.0,
    token_on_truth: float | None = 2.0,
    token_on_teacher: float | None = 1.0,
    no_object: float = 0.1,
    by: Divisors | None = None,
) -> dict[str, Tensor]:
    """The total loss at the head of this file, with targets (B, M, 4) and target_mask (B, M).

    Returns scalars: `total`, its terms by their factors' names and, with a teacher, W_dt as
    `teacher_weight`. A factor of None leaves its term out, and a branch that no term needs may be
    None in `output`; a factor of 0 only silences the term. `by` is what `divisors` gives for the
    whole step; without it this batch is the whole step.
    """
    if by is None:
        logits, _ = next(iter(output.answers().values()))
        by = divisors(count_targets(target_mask, logits.shape[1], no_object))
    terms = {}
    w_dt = 0.0
    if decoder is not None or token_on_teacher is not None:
        teacher = (output.decoder_logits, output.decoder_boxes)  # (K, B, Q, 2), (K, B, Q, 4)
        matched = match(*teacher, targets, target_mask)  # (K, B, Q)
    if decoder is not None:
        loss = detection_loss(*teacher, targets, matched, by, no_object)
        terms["decoder"] = decoder * loss
    if token_on_truth is not None or token_on_teacher is not None:
        student = output.token_logits[None], output.token_boxes[None]  # (1, B, Q, 2 or 4)
    if token_on_teacher is not None:
        w_dt = teacher_weight(
            output.decoder_logits[-1:], output.decoder_boxes[-1:], targets, matched[-1:]
        )
        terms["teacher_weight"] = w_dt
        # The student's truth: the last decoder layer's boxes, where a query has a target. As in the
        # official code it is matched to them anew, though query j of both starts from one vector.
        boxes = output.decoder_boxes[-1].detach()  # (B, Q, 4)
        is_taught = matched[-1] >= 0  # (B, Q)
        matched_to_teacher = match(*student, boxes, is_taught)  # (1, B, Q)
        loss = detection_loss(*student, boxes, matched_to_teacher, by, no_object)
        terms["token_on_teacher"] = token_on_teacher * w_dt * loss
    if token_on_truth is not None:
        matched_to_truth = match(*student, targets, target_mask)  # (1, B, Q)
        loss = detection_loss(*student, targets, matched_to_truth, by, no_object)
        terms["token_on_truth"] = token_on_truth * (1 - w_dt) * loss
    terms["total"] = sum(value for name, value in terms.items() if name != "teacher_weight")
    return terms


def global_sum(counts: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(counts)
    return counts


def count_targets(target_mask: Tensor, queries: int, no_object: float) -> Tensor:
    """target_mask (B, M) -> (2,): the number of targets, the sum of the class weights.

    No prediction is needed, so the batches of a step can be counted before they are computed.
    """
    counts = target_mask.sum(1)  # (B,)
    matched = counts.clamp(max=queries).sum()  # a query is matched to one target only
    unmatched = len(target_mask) * queries - matched
    return torch.stack([counts.sum().float(), matched + no_object * unmatched])


def divisors(counts: Tensor) -> Divisors:
    """The sum of `count_targets` over a rank's batches of a step -> the divisors of its loss.

    Each rank divides by count / world: DDP then averages over the ranks, which multiplies by
    1 / world, and the sum over all ranks has been divided by count. The teacher's term has the same
    divisors; the official code counts the teacher's boxes there, which are fewer only where an
    example has more targets than queries.
    """
    targets, class_weights = global_sum(counts)
    world = dist.get_world_size() if dist.is_initialized() else 1
    # without any target the sums are 0, and so is the loss
    return Divisors(targets.clamp(min=1) / world, class_weights.clamp(min=EPS) / world)


def assign(cost: Tensor | Sequence[Sequence[float]]) -> tuple[list[int], list[int]]:
    """The cheapest assignment: cost (N, M) -> min(N, M) pairs as (rows, cols), rows ascending.

    The same as scipy's linear_sum_assignment, which would be one more package. The method is that
    of shortest augmenting paths (Jonker and Volgenant), O(min(N, M)^2 max(N, M)). Every row and
    column has a price such that cost - row price - column price >= 0, with equality for pairs that
    are assigned. A new row looks for the cheapest chain of swaps that ends at a free column, as
    Dijkstra would; then the prices are moved so that the chain costs nothing, and its pairs are
    swapped.
    """
    if isinstance(cost, Tensor):
        cost = cost.tolist()
    if not cost or not cost[0]:
        return [], []
    n = len(cost)
    m = len(cost[0])
    if n > m:  # the search wants the short side as its rows
        transposed = [list(column) for column in zip(*cost, strict=True)]
        cols, rows = assign(transposed)
        pairs = sorted(zip(rows, cols, strict=True))
        rows = [row for row, _ in pairs]
        cols = [col for _, col in pairs]
        return rows, cols

    row_price = [0.0] * n
    col_price = [0.0] * (m + 1)
    owner = [-1] * (m + 1)  # the row that holds a column, -1: none; column m holds the new row
    for start in range(n):
        owner[m] = start
        # Grow the tree of shortest paths from column m until it reaches a free column.
        distance = [math.inf] * m + [0.0]
        previous = [m] * (m + 1)  # the column before this one on the path
        done = [False] * (m + 1)
        col = m
        while owner[col] >= 0:
            done[col] = True
            row = owner[col]
            for j in range(m):
                reach = distance[col] + cost[row][j] - row_price[row] - col_price[j]
                if not done[j] and reach < distance[j]:
                    distance[j] = reach
                    previous[j] = col
            col = min((j for j in range(m) if not done[j]), key=distance.__getitem__)
        # Move the prices.
        for j in range(m + 1):
            if done[j]:
                row_price[owner[j]] += distance[col] - distance[j]
                col_price[j] -= distance[col] - distance[j]
        # Swap along the path: each column gets the row of the column before it.
        while col != m:
            owner[col] = owner[previous[col]]
            col = previous[col]
    return list(range(n)), [owner.index(row) for row in range(n)]
