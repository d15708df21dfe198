"""The same numbers as the official code: weights in, features, losses, gradients and trained weights out."""

import re

import numpy as np
import pytest
import torch

import data
import evaluate
import losses
import model as models
import train
from conftest import ROOT, golden, official_model, official_state, tiny_model

CASES = ("rec", "grec")


def inputs(case: str, forward: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        forward[f"{case}/image"],
        forward[f"{case}/token_ids"],
        forward[f"{case}/text_padding_mask_int64"].bool(),
    )


def targets(case: str, tensors: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded targets of a case of losses.npz."""
    each = []
    while (name := f"{case}/target_gt/{len(each)}/boxes_cxcywh") in tensors:
        each.append(tensors[name].reshape(-1, 4))
    boxes = torch.zeros(len(each), max(1, *(len(b) for b in each), 1), 4)
    mask = torch.zeros(boxes.shape[:2], dtype=torch.bool)
    for row, flags, some in zip(boxes, mask, each, strict=True):
        row[: len(some)], flags[: len(some)] = some, True
    return boxes, mask


@pytest.mark.parametrize("case", CASES)
def test_forward_of_both_branches_and_every_decoder_layer(case, tmp_path):
    forward, model = golden("forward.npz"), official_model(tmp_path, case == "grec")
    with torch.no_grad():
        output = model(*inputs(case, forward))
        object_token, image, text = model.encoder(*inputs(case, forward))
    for ours, name in ((object_token, "cls_feat"), (image, "img_feat"), (text, "text_feat")):
        torch.testing.assert_close(ours, forward[f"{case}/{name}"], atol=1e-4, rtol=0)
    for name, tolerance in (("logits", 1e-4), ("boxes", 1e-5)):
        for branch in ("decoder", "token"):
            theirs = forward[f"{case}/{branch}_{name}"]
            theirs = theirs if branch == "decoder" else theirs[0]
            torch.testing.assert_close(getattr(output, f"{branch}_{name}"), theirs, atol=tolerance, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_the_token_branch_alone_gives_the_same_boxes(case, tmp_path):
    forward, model = golden("forward.npz"), official_model(tmp_path, case == "grec")
    with torch.no_grad():
        output = model(*inputs(case, forward), branch="token")
    torch.testing.assert_close(output.token_boxes, forward[f"{case}/token_boxes"][0], atol=1e-5, rtol=0)


def test_the_paper_s_arithmetic_differs_from_the_released_one(tmp_path):
    forward, model = golden("forward.npz"), official_model(tmp_path, as_released=False)
    with torch.no_grad():
        output = model(*inputs("rec", forward))
    assert (output.decoder_logits - forward["rec/decoder_logits"]).abs().max() > 1e-3


FACTORS = {
    "decoder_only": (1.0, None, None),
    "balanced": (1.0, 2.0, 1.0),
    "balanced_1_04": (1.0, 1.0, 0.4),
    "decoder_token": (1.0, 1.0, None),
}


@pytest.mark.parametrize("kind", FACTORS)
@pytest.mark.parametrize("case", CASES)
def test_losses_matching_and_gradients(case, kind, tmp_path):
    about, tensors = golden("losses.json")[f"{case}_{kind}"], golden("losses.npz")
    forward, model = golden("forward.npz"), official_model(tmp_path, case == "grec")
    boxes, mask = targets(f"{case}_{kind}", tensors)
    output = model(*inputs(case, forward), branch="decoder" if kind == "decoder_only" else "both")
    terms = losses.simvg_loss(output, boxes, mask, *FACTORS[kind])
    assert terms["total"].item() == pytest.approx(about["losses"]["loss_total"], rel=1e-5)
    if "loss_distill_w" in about["losses"]:
        assert float(terms["teacher_weight"]) == pytest.approx(about["losses"]["loss_distill_w"], rel=1e-5)

    matched = losses.match(output.decoder_logits, output.decoder_boxes, boxes, mask)
    official_order = [len(matched) - 1, *range(len(matched) - 1)]  # the last layer comes first there
    for k, call in zip(official_order, about["criterion_calls"][0]["matcher_calls"], strict=True):
        for b, (queries, chosen) in enumerate(call):
            assert [(q, t) for q, t in enumerate(matched[k, b].tolist()) if t >= 0] == sorted(
                zip(queries, chosen, strict=True)
            )

    terms["total"].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    assert float(norm) == pytest.approx(about["grad_total_norm"], rel=1e-4)
    for name, theirs in our_names(about["grad_norm"]).items():
        ours = gradients.get(name)
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            assert float(ours.norm()) == pytest.approx(theirs, rel=1e-4), name
    prefix = f"{case}_{kind}/grad/"
    full = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    for name, theirs in our_names(full).items():
        torch.testing.assert_close(gradients[name], theirs, rtol=1e-4, atol=1e-5)


def our_names(official: dict) -> dict:
    """Values under official names -> under ours, by converting each name with its own tensor."""
    state = official_state()
    renamed = {}
    for name, value in official.items():
        if isinstance(value, torch.Tensor):
            renamed |= models.from_official({name: value})
        else:
            renamed[next(iter(models.from_official({name: state[name]})))] = value
    return renamed


def test_a_batch_of_no_target_samples_is_finite_where_the_official_loss_is_nan(tmp_path):
    case, tensors = "grec_all_notarget", golden("losses.npz")
    assert np.isnan(golden("losses.json")[f"{case}_balanced"]["losses"]["loss_total"])
    boxes, mask = targets(f"{case}_decoder_only", tensors)
    forward, model = golden("forward.npz"), official_model(tmp_path, grec=True)
    output = model(*(x[:1] for x in inputs("grec", forward)))
    terms = losses.simvg_loss(output, boxes[:1], mask[:1])
    terms["total"].backward()
    assert terms["total"].isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    decoder = losses.simvg_loss(output, boxes[:1], mask[:1], 1.0, None, None)["total"]
    theirs = golden("losses.json")[f"{case}_decoder_only"]["losses"]["loss_total"]
    assert decoder.item() == pytest.approx(theirs, rel=1e-5)


def test_six_training_steps_end_at_the_official_weights(tmp_path):
    forward, log = golden("forward.npz"), golden("golden.json")["train_steps"]["log"]
    model = official_model(tmp_path)
    config = data.load_config(f"{ROOT}/configs.json:refcoco")
    settings, optimizer = config["train"], train.make_optimizer(model, config["train"])
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = train.TrainState(config, tmp_path, 0, 1, model, model, optimizer, scaler, "both", None)
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    boxes, mask = targets("rec_balanced", golden("losses.npz"))
    batch = data.Batch(*inputs("rec", forward), boxes, mask, [0, 1, 2, 3])
    for step, row in enumerate(log):
        train.set_learning_rate(optimizer, settings, row["epoch"] + step % 2 / 2)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([row["lr"][0], row["lr"][-1]])
        terms = train.train_step(state, [batch])
        assert float(terms["total"]) == pytest.approx(row["losses"]["loss_total"], abs=2e-4)
        assert float(terms["grad_norm"]) == pytest.approx(row["grad_norm_before_clip"], rel=1e-4)
        train.update_ema(ema, model, 0.999, step + 1)
    theirs = golden("train_steps.npz")
    for start, ours in (("after/", dict(model.named_parameters())), ("ema_after/", ema)):
        some = {name.removeprefix(start): value for name, value in theirs.items() if name.startswith(start)}
        for name, value in our_names(some).items():
            torch.testing.assert_close(ours[name].detach(), value, atol=1e-5, rtol=0)


def test_the_learning_rate_follows_the_official_schedules():
    for name, about in golden("golden.json")["schedule"].items():
        ours = [
            train.lr_factor(e, about["warmup_epochs"], about["decay_steps"], about["decay_ratio"], about["max_epoch"])
            for e in range(about["max_epoch"])
        ]
        assert ours == pytest.approx(about["factor_per_epoch_0based"]), name


def test_the_averaged_weights_follow_the_official_ones():
    about = golden("golden.json")["ema"]
    model = torch.nn.ParameterDict({"p": torch.nn.Parameter(torch.tensor(about["initial_shadow"]["p"]))})
    ema = {"p": model["p"].detach().clone()}
    steps = zip(about["values_set_before_each_update"], about["shadow_after_each_update"], strict=True)
    for step, (value, shadow) in enumerate(steps, 1):
        model["p"].data = torch.tensor(value["p"])
        train.update_ema(ema, model, about["alpha"], step)
        torch.testing.assert_close(ema["p"], torch.tensor(shadow["p"]), atol=1e-6, rtol=1e-6)


def test_the_encoder_s_parameters_have_their_own_learning_rate_as_in_the_official_groups(tmp_path):
    model = official_model(tmp_path)
    settings = data.load_config(f"{ROOT}/configs.json:refcoco")["train"]
    encoder, rest = train.make_optimizer(model, settings).param_groups
    groups = golden("golden.json")["param_groups"]["groups"]
    assert len(encoder["params"]) == groups[0]["n"] - 1  # without the mask token
    assert len(rest["params"]) == groups[2]["n"]
    assert encoder["lr"] * 10 == pytest.approx(rest["lr"])


def test_grec_metrics_equal_those_of_the_official_evaluator():
    about = golden("metrics.json")["grec"]
    for case in about["cases"]:
        truth = torch.tensor([b for b, c in zip(case["gt"], case["category_id"], strict=True) if c != -1]).reshape(
            -1, 4
        )
        correct = evaluate.grec_correct(
            torch.tensor(case["scores"]), torch.tensor(case["boxes"]).reshape(-1, 4), truth, about["thresh_score"]
        )
        assert correct == bool(case["gref_correct"])


def test_the_full_models_have_the_official_sizes_less_the_tensors_that_nothing_reads():
    for name, official, width in (("refcoco", 230_155_276, 768), ("refcoco-large", 682_709_004, 1024)):
        config = data.load_config(f"{ROOT}/configs.json:{name}")
        with torch.device("meta"):
            model = models.SimVG(**config["model"])
        unread = width + 2 * 2 * width  # mask token; two rows of each position table
        assert sum(p.numel() for p in model.parameters()) == official - unread


def test_box_terms_equal_the_official_ones():
    about = golden("golden.json")["box_ops"]
    a, b = torch.tensor(about["a_cxcywh"]), torch.tensor(about["b_cxcywh"])
    iou, giou = losses.iou_giou(a, b)
    torch.testing.assert_close(iou, torch.tensor(about["iou_pairwise_diag"]), atol=1e-6, rtol=0)
    torch.testing.assert_close(giou, torch.tensor(about["giou_diag"]), atol=1e-6, rtol=0)


def test_evaluation_images_and_boxes_equal_the_official_pipeline():
    tensors, about = golden("pipeline.npz"), golden("golden.json")["pipeline"]
    model = tiny_model()
    for i, case in enumerate(about["val"]):
        original = tensors[f"val/{i}/input_rgb_uint8"].permute(2, 0, 1)
        resized = data.resize(original, about["S"], about["S"])
        theirs = tensors[f"val/{i}/resized_bgr_uint8"].flip(2).permute(2, 0, 1)
        assert (resized.int() - theirs.int()).abs().max() <= 1
        normalised = (theirs - model.mean) / model.std
        torch.testing.assert_close(normalised, tensors[f"val/{i}/tensor"], atol=1e-5, rtol=0)
        _, height, width = original.shape
        boxes = data.clip_boxes([tuple(case["xywh"])], width, height)
        boxes = boxes / torch.tensor([width, height, width, height]) * about["S"]
        torch.testing.assert_close(boxes[0], torch.tensor(case["gt_final"]).double(), atol=1e-3, rtol=0)


def test_rec_accuracy_counts_like_the_official_one():
    for case in golden("metrics.json")["accuracy"]["cases"]:
        correct = evaluate.rec_correct(torch.tensor(case["pred"]), torch.tensor(case["gt"]))
        assert 100 * correct.double().mean().item() == pytest.approx(case["det_acc"], abs=1e-4)


def test_a_grec_batch_of_targets_only_has_the_official_balanced_loss(tmp_path):
    about, tensors = golden("losses.json")["grecpos_balanced"], golden("losses.npz")
    rows = golden("golden.json")["grec_pos_only_rows_of_grec_batch"]
    boxes, mask = targets("grecpos_balanced", tensors)
    output = official_model(tmp_path, grec=True)(*(x[rows] for x in inputs("grec", golden("forward.npz"))))
    terms = losses.simvg_loss(output, boxes, mask, 1.0, 2.0, 1.0)
    assert terms["total"].item() == pytest.approx(about["losses"]["loss_total"], rel=1e-5)


def test_all_53_recipes_hold_the_official_numbers():
    recipes = golden("recipes.json")
    assert len(recipes) == 53
    for name, official in recipes.items():
        config = data.load_config(f"{ROOT}/configs.json:{name}")
        net, text, run = config["model"], config["data"], config["train"]
        large = official["encoder"] == "large"
        assert (net["encoder_width"], net["encoder_layers"]) == ((1024, 24) if large else (768, 12)), name
        assert run["batch_size"] == official["batch_per_gpu"] * (8 if name.startswith("pretrain") else 1), name
        jitter = official["large_scale_jitter"]
        assert text["jitter"] == (jitter and [jitter["jitter_min"], jitter["jitter_max"]]), name
        assert official["token_mlp_layers"] == 1 and official["optimizer"] == "Adam"
        pairs = [(net, ours, theirs) for ours, theirs in MODEL_KEYS.items()]
        pairs += [(run, ours, theirs) for ours, theirs in TRAIN_KEYS.items()]
        for section, ours, theirs in [*pairs, (text, "max_tokens", "max_tokens")]:
            assert section[ours] == official[theirs], f"{name}: {ours}"


MODEL_KEYS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "queries": "num_queries",
    "decoder_layers": "decoder_layers",
    "tqg_layers": "tqg_layers",
    "tqg_ffn": "tqg_ffn_dim",
    "drop_path": "drop_path_effective",
}
TRAIN_KEYS = {
    **{name: name for name in ("loss_decoder", "loss_token_on_truth", "loss_token_on_teacher", "amsgrad", "betas")},
    **{name: name for name in ("eps", "weight_decay", "lr", "lr_encoder", "warmup_epochs", "decay_epochs")},
    **{name: name for name in ("decay_factor", "epochs", "ema", "ema_decay", "evaluate_every", "seed")},
    "clip_norm": "grad_norm_clip",
    "evaluate_from": "evaluate_from_epoch",
}


def test_initial_weights_have_the_official_spread_but_for_the_stated_deviations():
    """D7: the encoder's linear layers, words and positions."""
    torch.manual_seed(0)
    model = models.SimVG(**data.load_config(f"{ROOT}/configs.json:refcoco")["model"])
    ours = dict(model.named_parameters())
    groups: dict[str, list[torch.Tensor]] = {}
    for name, value in official_state().items():
        renamed = models.from_official({name: value})
        for own in renamed:
            groups.setdefault(re.sub(r"\.\d+(?=\.)", ".N", name), []).append(ours[own].detach())
    stats = golden("init_stats_base.json")
    deviating = r"layers\.N\.(self_attn\.\w_proj|self_attn\.out_proj|ffn)\.[AB]\.?(fc\d)?\.weight|text_embed|embed_pos"
    for name, tensors in groups.items():
        values = torch.cat([t.flatten() for t in tensors])
        if re.search(deviating, name) or len(values) < 250:
            continue
        assert values.mean().item() == pytest.approx(stats[name]["mean"], abs=0.15 * stats[name]["std"] + 1e-6), name
        assert values.std().item() == pytest.approx(stats[name]["std"], rel=0.1, abs=1e-6), name
