"""The training loss of SimVG: set loss, matching, dynamic weight-balance distillation (Sec. 3.4, Eq. 4 to 7).

    total = decoder * L_det(decoder, targets)                                                      Eq. 4
          + token_on_teacher * W_dt * L_det(token, decoder's boxes)                                Eq. 7
          + token_on_truth * (1 - W_dt) * L_det(token, targets)             1 - W_dt is 1 without a teacher

P predictions, such as the K decoder layers, of B examples with Q queries are logits (P, B, Q, 2) and boxes
(P, B, Q, 4), cxcywh in 0..1; class 0 is the referred object, class 1 "no object". The truth is padded: targets
(B, M, 4) and target_mask (B, M), True = a real box; a row that is all False is an example without a target. Queries are
matched to `candidates` (B, M [+ Q], 4): the targets, for distillation also the last decoder layer's boxes. Sums are
divided by counts of the *global* batch (D6 in README.md). W_dt alone is one number per micro-batch, of all ranks.
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
NO_OBJECT = 0.1  # weight of the class "no object" in the cross entropy; a config says it in train.no_object_weight
EPS = 1e-6  # added to denominators as in the official code; a box of 3 % x 3 % of the image has IoU 0.999 with itself


def area(sides: Tensor) -> Tensor:
    """(..., 2) widths and heights -> (...). Not `prod`: its gradient waits for the device to look for zeros."""
    width, height = sides.clamp(min=0).unbind(-1)
    return width * height


def iou_giou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU of cxcywh boxes a (..., 4) and b (..., 4), pair by pair; leading sizes broadcast."""
    a, b = box_convert(a, "cxcywh", "xyxy"), box_convert(b, "cxcywh", "xyxy")
    overlap = area(torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2]))
    enclosing = area(torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2]))
    union = area(a[..., 2:] - a[..., :2]) + area(b[..., 2:] - b[..., :2]) - overlap
    iou = overlap / (union + EPS)
    return iou, iou - (enclosing - union) / (enclosing + EPS)


def detection_loss(
    logits: Tensor, boxes: Tensor, candidates: Tensor, matched: Tensor, norm: Tensor, no_object: float
) -> Tensor:
    """L_det of Eq. 4, summed over the P predictions: 1 cross entropy + 5 L1 + 2 (1 - GIoU). A scalar. logits
    (P, B, Q, 2), boxes (P, B, Q, 4), candidates (B, M [+ Q], 4), matched (P, B, Q), norm (2,) of `step_normalisers`."""
    has_target = matched >= 0  # (P, B, Q)
    # flattened, because cross entropy over a middle dimension has no deterministic CUDA kernel
    label, weight = (~has_target).long().flatten(), torch.where(has_target, 1.0, no_object).flatten()
    cross_entropy = (weight * F.cross_entropy(logits.flatten(0, 2), label, reduction="none")).sum()
    index = matched.clamp(min=0)[..., None].expand(-1, -1, -1, 4)  # (P, B, Q, 4)
    wanted = candidates.expand(len(boxes), -1, -1, -1).gather(2, index)  # (P, B, Q, 4)
    l1 = ((boxes - wanted).abs().sum(-1) * has_target).sum()
    giou = ((1 - iou_giou(boxes, wanted)[1]) * has_target).sum()
    targets_of_step, weights_of_step = norm
    return CLASS * cross_entropy / weights_of_step + (L1 * l1 + GIOU * giou) / targets_of_step


@torch.no_grad()
def match(logits: Tensor, boxes: Tensor, candidates: Tensor, target_mask: Tensor) -> Tensor:
    """Eq. 5: logits (P, B, Q, 2), boxes (P, B, Q, 4), candidates (B, M [+ Q], 4), target_mask (B, M) -> (P, B, Q)
    int64, the candidate of each query, -1 = none. Each of the P predictions is matched to the targets on its own. In
    distillation one more row, (P + 1, B, Q), matches the token branch, the last prediction, to the boxes of those
    decoder queries that got a target."""
    (P, B, Q, _), M = boxes.shape, target_mask.shape[1]
    distil = candidates.shape[1] > M
    if Q == M == 1:  # REC: there is nothing to choose
        matched = torch.where(target_mask, 0, -1).expand(P, B, 1)
        return torch.cat([matched, torch.where(target_mask, 1, -1)[None]]) if distil else matched
    pairs = boxes[:, :, :, None], candidates[None, :, None]  # (P, B, Q, 1, 4), (1, B, 1, M [+ Q], 4)
    l1 = (pairs[0] - pairs[1]).abs().sum(-1)  # (P, B, Q, M [+ Q])
    score = logits.softmax(-1)[..., :1]  # (P, B, Q, 1)
    cost = L1 * l1 - CLASS * score - GIOU * iou_giou(*pairs)[1]
    cost = cost.nan_to_num(1e9, 1e9, -1e9)  # train.py handles losses that are not finite
    cost[..., :M].masked_fill_(~target_mask[:, None], math.inf)  # infinite = padding
    return torch.tensor(match_on_host(cost, M), device=boxes.device)


def match_on_host(cost: Tensor, M: int) -> list[list[list[int]]]:
    """cost (P, B, Q, M), or (P, B, Q, M + Q) for distillation -> what `match` returns, as lists."""

    def matched(costs: list[list[float]], columns: list[int]) -> list[int]:
        """The column of each query, -1 = none."""
        pairs = zip(*assign([[values[j] for j in columns] for values in costs]), strict=True)
        column = {query: columns[j] for query, j in pairs}
        return [column.get(query, -1) for query in range(len(costs))]

    every_cost = cost.tolist()  # all at once, because each trip to the host waits for the device
    result = [[matched(c, [j for j in range(M) if c[0][j] < math.inf]) for c in costs] for costs in every_cost]
    if cost.shape[3] > M:  # distillation: the predictions are the decoder layers, then the token branch
        students = zip(every_cost[-1], result[-2], strict=True)  # its costs, the last decoder layer's matches
        result.append([matched(c, [M + q for q, j in enumerate(teacher) if j >= 0]) for c, teacher in students])
    return result


@torch.no_grad()
def teacher_weight(logits: Tensor, boxes: Tensor, candidates: Tensor, matched: Tensor) -> Tensor:
    """W_dt of Eq. 6: the mean over matched pairs of IoU x score of the decoder's boxes; 0 without any pair (D8). logits
    (B, Q, 2), boxes (B, Q, 4), candidates (B, M [+ Q], 4), matched (B, Q). A scalar, the same on all ranks."""
    has_target = matched >= 0  # (B, Q)
    wanted = candidates.gather(1, matched.clamp(min=0)[..., None].expand(-1, -1, 4))  # (B, Q, 4)
    quality = iou_giou(boxes, wanted)[0] * logits.softmax(-1)[..., 0] * has_target  # (B, Q)
    total, count = global_sum(torch.stack([quality.sum(), has_target.sum().float()]))
    return total / count.clamp(min=1)


def simvg_loss(
    output: Output,
    targets: Tensor,
    target_mask: Tensor,
    decoder: float | None = 1.0,
    token_on_truth: float | None = 2.0,
    token_on_teacher: float | None = 1.0,
    no_object: float = NO_OBJECT,
    norm: Tensor | None = None,
) -> dict[str, Tensor]:
    """The total loss at the head of this file (D1), with targets (B, M, 4) and target_mask (B, M).

    Returns scalars: `total`, its terms by their factors' names and, with a teacher, W_dt as `teacher_weight`. A factor
    of None leaves its term out, and a branch that no term needs may be None in `output`. `norm` is what
    `step_normalisers` gives for the whole step; without it this batch is the whole step. To add a term, name its factor
    here, in train_step, data.KEYS, `default` of configs.json and draw_curves; explain it at the head of train.py.
    """
    branches = {"decoder": (output.decoder_logits, output.decoder_boxes)} if output.decoder_logits is not None else {}
    if output.token_logits is not None:
        branches["token"] = output.token_logits[None], output.token_boxes[None]  # (1, B, Q, 2), (1, B, Q, 4)
    logits, boxes = (torch.cat(each) for each in zip(*branches.values(), strict=True))  # (P, B, Q, 2), (P, B, Q, 4)
    if norm is None:
        norm = step_normalisers(count_targets(target_mask, logits.shape[2], no_object))
    teacher = [] if token_on_teacher is None else [output.decoder_boxes[-1].detach()]
    candidates = torch.cat([targets, *teacher], dim=1)  # (B, M [+ Q], 4)
    matched = match(logits, boxes, candidates, target_mask)  # (P, B, Q), for distillation (P + 1, B, Q)
    # Decoder layers matched to targets (K, B, Q), token branch to targets (1, B, Q) and to the teacher (1, B, Q).
    P, K = len(logits), 0 if output.decoder_logits is None else len(output.decoder_logits)
    decoder_truth, token_truth, token_teacher = matched.split([K, P - K, len(matched) - P])

    terms, share_of_truth, rest = {}, 1.0, (norm, no_object)
    if decoder is not None:
        terms["decoder"] = decoder * detection_loss(*branches["decoder"], candidates, decoder_truth, *rest)
    if token_on_teacher is not None:
        w_dt = teacher_weight(output.decoder_logits[-1], output.decoder_boxes[-1], candidates, decoder_truth[-1])
        loss = detection_loss(*branches["token"], candidates, token_teacher, *rest)
        terms["token_on_teacher"], share_of_truth = token_on_teacher * w_dt * loss, 1 - w_dt
    if token_on_truth is not None:
        loss = detection_loss(*branches["token"], candidates, token_truth, *rest)
        terms["token_on_truth"] = token_on_truth * share_of_truth * loss
    terms["total"] = sum(terms.values())
    return terms if token_on_teacher is None else {**terms, "teacher_weight": w_dt}


def global_sum(counts: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(counts)
    return counts


def count_targets(target_mask: Tensor, queries: int, no_object: float) -> Tensor:
    """(2,): the number of targets, and the sum of the class weights over all queries. No prediction is needed."""
    counts = target_mask.sum(1)  # (B,)
    matched = counts.clamp(max=queries).sum()  # as many queries get a target
    return torch.stack([counts.sum().float(), matched + no_object * (len(target_mask) * queries - matched)])


def step_normalisers(counts: Tensor) -> Tensor:
    """`count_targets` of all ranks, at least one target, divided by the world size, because DDP averages gradients."""
    targets, weights = global_sum(counts)
    return torch.stack([targets.clamp(min=1), weights]) / (dist.get_world_size() if dist.is_initialized() else 1)


# -------------------------------------------------------------- scipy's linear_sum_assignment, without scipy


def assign(cost: Tensor | Sequence[Sequence[float]]) -> tuple[list[int], list[int]]:
    """Exact minimum-cost assignment: cost (N, M) -> min(N, M) pairs as (rows, cols), rows ascending. ValueError if a
    cost is not finite. Shortest augmenting paths (Jonker and Volgenant), O(min(N, M)^2 max(N, M))."""
    matrix = cost.tolist() if isinstance(cost, Tensor) else [list(row) for row in cost]
    if not all(math.isfinite(value) for row in matrix for value in row):
        raise ValueError("a matching cost is not finite: some predicted or target box is NaN or infinite")
    if not matrix or not matrix[0]:
        return [], []
    rows_are_fewer = len(matrix) <= len(matrix[0])  # the search wants the short side as its rows
    short = matrix if rows_are_fewer else [list(column) for column in zip(*matrix, strict=True)]
    pairs = [(i, j) if rows_are_fewer else (j, i) for i, j in enumerate(_assign_rows(short))]
    return [row for row, _ in sorted(pairs)], [col for _, col in sorted(pairs)]


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
            for j in (j for j in range(m) if not done[j]):
                reach = base + cost[row][j] - row_potential[row] - col_potential[j]
                if reach < distance[j]:
                    distance[j], reached_from[j] = reach, col
                if nearest < 0 or distance[j] < distance[nearest]:
                    nearest = j
            col, base = nearest, distance[nearest]
            done[col] = True
            row = owner[col]  # -1: the column is free
        for j in (j for j in range(m) if done[j]):  # keep all reduced costs at zero or above
            if owner[j] >= 0:
                row_potential[owner[j]] += base - distance[j]
            col_potential[j] -= base - distance[j]
        row_potential[start] += base
        while col >= 0:  # flip the path: each column on it goes to the row it was reached from
            previous = reached_from[col]
            owner[col] = owner[previous] if previous >= 0 else start
            col = previous
    return [owner.index(row) for row in range(n)]
