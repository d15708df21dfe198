"""losses.py: matching is exact, the loss is the paper's, and no batch breaks it."""

import itertools
import math
import random

import pytest
import torch
from torchvision.ops import box_convert, generalized_box_iou

import losses
from model import Output


def random_boxes(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = torch.rand(*shape, 2, generator=generator) * 0.4 + 0.05
    centre = size / 2 + torch.rand(*shape, 2, generator=generator) * (1 - size)
    return torch.cat([centre, size], dim=-1)


def random_output(K: int, B: int, Q: int, seed: int = 0) -> Output:
    generator = torch.Generator().manual_seed(seed)
    return Output(
        torch.randn(K, B, Q, 2, generator=generator).requires_grad_(),
        random_boxes(K, B, Q, seed=seed).requires_grad_(),
        torch.randn(B, Q, 2, generator=generator).requires_grad_(),
        random_boxes(B, Q, seed=seed + 1).requires_grad_(),
    )


def test_assignment_is_the_cheapest_of_all_on_1000_random_matrices_with_ties_and_of_any_shape():
    rng = random.Random(0)
    for case in range(1000):
        n, m = rng.randint(1, 5), rng.randint(1, 5)
        tied = case % 2
        cost = [[rng.randint(0, 3) if tied else rng.uniform(-3, 9) for _ in range(m)] for _ in range(n)]
        rows, cols = losses.assign(torch.tensor(cost, dtype=torch.float64))
        assert len(rows) == min(n, m) and len(set(rows)) == len(rows) and len(set(cols)) == len(cols)
        assert rows == sorted(rows)
        total = sum(cost[r][c] for r, c in zip(rows, cols, strict=True))
        if n <= m:
            ways = (sum(cost[r][c] for r, c in enumerate(p)) for p in itertools.permutations(range(m), n))
        else:
            ways = (sum(cost[r][c] for c, r in enumerate(p)) for p in itertools.permutations(range(n), m))
        assert total == pytest.approx(min(ways), abs=1e-9)


def test_assignment_refuses_a_cost_that_is_not_finite():
    with pytest.raises(ValueError, match="not finite"):
        losses.assign(torch.tensor([[1.0, math.nan]]))


def test_assignment_of_nothing_is_empty():
    assert losses.assign(torch.empty(3, 0)) == ([], [])


def test_paired_giou_equals_the_diagonal_of_the_pairwise_one_up_to_the_official_epsilon():
    a, b = random_boxes(50), random_boxes(50, seed=1)
    pairwise = generalized_box_iou(box_convert(a, "cxcywh", "xyxy"), box_convert(b, "cxcywh", "xyxy"))
    torch.testing.assert_close(losses.iou_giou(a, b)[1], pairwise.diag(), atol=1e-3, rtol=0)


def test_every_target_is_matched_to_a_query_of_its_own():
    output = random_output(3, 4, 10)
    mask = torch.arange(5) < torch.tensor([0, 1, 3, 5])[:, None]
    matched = losses.match(output.decoder_logits, output.decoder_boxes, random_boxes(4, 5, seed=7), mask)
    for k, b in itertools.product(range(3), range(4)):
        used = [j for j in matched[k, b].tolist() if j >= 0]
        assert sorted(used) == list(range(int(mask[b].sum())))


def test_with_more_targets_than_queries_every_query_is_matched():
    output = random_output(1, 2, 3)
    matched = losses.match(
        output.decoder_logits, output.decoder_boxes, random_boxes(2, 7), torch.ones(2, 7, dtype=torch.bool)
    )
    assert (matched >= 0).all()


def test_one_query_is_matched_without_a_search_and_only_where_there_is_a_target():
    output = random_output(2, 2, 1)
    mask = torch.tensor([[True], [False]])
    matched = losses.match(output.decoder_logits, output.decoder_boxes, random_boxes(2, 1), mask)
    assert matched.tolist() == [[[0], [-1]]] * 2


# ---- Eq. 4 to 7, written as loops over single boxes in float64


def corners(box):
    x, y, w, h = (float(v) for v in box)
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


def loop_iou_giou(a, b):
    a, b = corners(a), corners(b)
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    iou = overlap / (union + 1e-6)
    return iou, iou - (hull - union) / (hull + 1e-6)


def softmax(logits):
    top = [math.exp(float(v)) for v in logits]
    return [v / sum(top) for v in top]


def loop_match(logits, boxes, targets):
    """Eq. 5 by trying every permutation -> {query: target}."""
    best, best_cost = {}, math.inf
    for queries in itertools.permutations(range(len(boxes)), len(targets)):
        cost = 0.0
        for target, q in enumerate(queries):
            l1 = sum(abs(float(p) - float(t)) for p, t in zip(boxes[q], targets[target], strict=True))
            cost += 5 * l1 - softmax(logits[q])[0] - 2 * loop_iou_giou(boxes[q], targets[target])[1]
        if cost < best_cost:
            best, best_cost = {q: t for t, q in enumerate(queries)}, cost
    return best


def loop_detection_loss(logits, boxes, targets):
    """Eq. 4 for one layer: logits[b][q], boxes[b][q], targets[b] a list of boxes."""
    entropy = weights = l1 = giou = 0.0
    for b in range(len(boxes)):
        matched = loop_match(logits[b], boxes[b], targets[b])
        for q in range(len(boxes[b])):
            label, weight = (0, 1.0) if q in matched else (1, 0.1)
            entropy, weights = entropy - weight * math.log(softmax(logits[b][q])[label]), weights + weight
        for q, t in matched.items():
            l1 += sum(abs(float(p) - float(v)) for p, v in zip(boxes[b][q], targets[b][t], strict=True))
            giou += 1 - loop_iou_giou(boxes[b][q], targets[b][t])[1]
    count = max(1, sum(len(t) for t in targets))
    return entropy / weights + 5 * l1 / count + 2 * giou / count


def test_dwbd_equals_a_loop_over_boxes_written_from_the_equations_in_float64():
    B, Q, K = 3, 4, 2
    output = Output(*(x.detach().double() for x in random_output(K, B, Q)))
    boxes = random_boxes(B, 3, seed=5).double()
    counts = [2, 0, 3]
    mask = torch.arange(3) < torch.tensor(counts)[:, None]
    truth = [boxes[b, : counts[b]].tolist() for b in range(B)]
    layers = [(output.decoder_logits[k].tolist(), output.decoder_boxes[k].tolist()) for k in range(K)]
    decoder = sum(loop_detection_loss(*layer, truth) for layer in layers)
    quality, teacher = [], []
    for b in range(B):
        matched = loop_match(layers[-1][0][b], layers[-1][1][b], truth[b])
        for q, t in matched.items():
            quality.append(loop_iou_giou(layers[-1][1][b][q], truth[b][t])[0] * softmax(layers[-1][0][b][q])[0])
        teacher.append([layers[-1][1][b][q] for q in matched])
    w = sum(quality) / len(quality)
    student = output.token_logits.tolist(), output.token_boxes.tolist()
    on_teacher, on_truth = loop_detection_loss(*student, teacher), loop_detection_loss(*student, truth)

    terms = losses.simvg_loss(output, boxes, mask, 1.0, 2.0, 0.4)
    assert float(terms["teacher_weight"]) == pytest.approx(w, rel=1e-6)
    assert float(terms["decoder"]) == pytest.approx(decoder, rel=1e-6)
    assert float(terms["token_on_teacher"]) == pytest.approx(0.4 * w * on_teacher, rel=1e-6)
    assert float(terms["token_on_truth"]) == pytest.approx(2 * (1 - w) * on_truth, rel=1e-6)
    assert float(terms["total"]) == pytest.approx(decoder + 0.4 * w * on_teacher + 2 * (1 - w) * on_truth, rel=1e-6)


def test_no_gradient_reaches_the_teacher_through_the_distillation():
    output = random_output(2, 3, 4)
    mask = torch.ones(3, 2, dtype=torch.bool)
    losses.simvg_loss(output, random_boxes(3, 2), mask, decoder=None)["total"].backward()
    assert output.decoder_boxes.grad is None and output.decoder_logits.grad is None
    assert output.token_boxes.grad.abs().sum() > 0


def test_a_batch_without_any_target_is_finite_and_has_finite_gradients():
    output = random_output(2, 3, 4)
    terms = losses.simvg_loss(output, torch.zeros(3, 1, 4), torch.zeros(3, 1, dtype=torch.bool))
    terms["total"].backward()
    assert all(value.isfinite() for value in terms.values()) and terms["teacher_weight"] == 0
    assert all(x.grad.isfinite().all() for x in output)


def test_a_term_that_is_left_out_needs_no_output_of_its_branch():
    full, mask = random_output(2, 3, 1), torch.ones(3, 1, dtype=torch.bool)
    boxes = random_boxes(3, 1)
    decoder = losses.simvg_loss(full._replace(token_logits=None, token_boxes=None), boxes, mask, 1.0, None, None)
    assert set(decoder) == {"decoder", "total"}
    token = losses.simvg_loss(full._replace(decoder_logits=None, decoder_boxes=None), boxes, mask, None, 1.0, None)
    assert set(token) == {"token_on_truth", "total"}


def test_padding_of_the_targets_changes_nothing():
    output, boxes = random_output(2, 3, 4), random_boxes(3, 2)
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    wider = torch.cat([boxes, torch.rand(3, 5, 4)], dim=1), torch.cat([mask, torch.zeros(3, 5, dtype=torch.bool)], dim=1)
    a, b = losses.simvg_loss(output, boxes, mask), losses.simvg_loss(output, *wider)
    torch.testing.assert_close(a["total"], b["total"])
