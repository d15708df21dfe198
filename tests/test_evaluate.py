"""evaluate.py: each expression counts once, and boxes lie in pixels of the picture asked about."""

import json
from dataclasses import asdict
from html.parser import HTMLParser
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

import data
import evaluate
import model as models
from conftest import call, metrics, official_model, program, tiny_model

A, HALF, LESS = [0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 5.0], [0.0, 0.0, 10.0, 4.99]
FAR, ACROSS = [50.0, 50.0, 60.0, 60.0], [1.65, 1.65, 11.65, 11.65]  # GIoU of A and ACROSS: 0.495
NASTY = """</figcaption><script>alert(1)</script><img src="x"> the "left" & 'right' dog"""
PHOTOS = ("a.jpg", "cut.jpg", "\u5de6 hand.jpg", "gone.jpg")  # the Chinese word for left
PHRASES = ("the red circle", "the \u5de6 ring")


def picture(path: Path, **options) -> str:
    noise = np.random.default_rng(0).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((200, 80)).save(path, **options)
    return str(path)


def answering(score: float = 0.9, **changes) -> models.SimVG:
    """A model that always finds (60, 16, 140, 64) and (80, 16, 120, 64) in such a picture."""
    model = tiny_model(**changes)
    for branch, width in ((model.decoder_branch, 0.4), (model.token_branch, 0.2)):
        branch.box_head[-1].weight.data.zero_()
        branch.box_head[-1].bias.data = torch.tensor([0.5, 0.5, width, 0.6]).logit()
        branch.class_head.weight.data.zero_()
        branch.class_head.bias.data = torch.tensor([score, 1 - score]).log()
    return model


def keep(path: Path, model: models.SimVG, trained: Path, *settings: str, branch="both") -> Path:
    """Write a model as if it came from the run in the folder `trained`, with other settings."""
    state = models.read(trained / "best.pt").state
    state["config"]["model"] = asdict(model.config)
    data.override(state["config"], settings)
    models.save(path, state | {"model": model.state_dict(), "branch": branch})
    return path


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def collate(toys) -> data.Collate:
    return data.Collate(data.Tokenizer(toys / "data/toys/toys.spm"), 10)


@pytest.fixture
def photos(tmp_path, trained) -> Path:
    """Two pictures, one that is cut off behind its header, and rows without boxes about them."""
    for name in PHOTOS[:3]:
        picture(tmp_path / name)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:700])
    rows = [json.dumps({"image": name, "expressions": PHRASES}) for name in PHOTOS]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    return tmp_path


@pytest.mark.parametrize(
    ("grec", "boxes", "truth", "correct", "iou"),
    [
        (False, [HALF], [A], True, 0.5),
        (False, [LESS], [A], False, 0.499),
        (False, [A], [FAR, ACROSS], True, 0.5352),  # any of several true boxes will do
        (True, [A, FAR], [FAR, A], True, 1.0),  # their scores of 0.3 were high enough before
        (True, [A], [A, FAR], False, 0.5),
        (True, [A, FAR], [A], False, 1.0),
        (True, [A, A], [A, FAR], False, 0.5),  # one true box is not found twice
        (True, [A, FAR], [A, A], False, 1.0),
        (True, [A], [ACROSS], False, 0.5352),  # the generalised IoU counts
        (True, [], [], True, 1.0),
        (True, [A], [], False, 0.0),
    ],
)
def test_an_answer_is_held_against_the_true_boxes(grec, boxes, truth, correct, iou):
    found, true = (torch.tensor(some).double().reshape(-1, 4) for some in (boxes, truth))
    answer = evaluate.judge(torch.full((len(boxes),), 0.3), found, true, grec)
    assert answer == dict(boxes=boxes, scores=[0.3] * len(boxes), correct=correct, iou=iou)


def test_rec_answers_with_its_one_box_and_grec_with_all_from_the_threshold_on_the_best_first():
    logits = torch.tensor([[[5.0, -5.0]], [[-5.0, 5.0]]])
    boxes = torch.tensor([0.05, 0.5, 0.4, 0.4])
    (first, box), (second, _) = evaluate.pick_answers(logits, boxes.expand(2, 1, 4))
    assert first.item() > 0.99 and second.item() < 0.01, "class 0 is the referred object"
    assert box[0, 0] == 0 and box[0, 1:].tolist() == pytest.approx([0.3, 0.25, 0.7])
    scores = torch.tensor([0.8, 0.95, 0.9, 0.3, 0.99, 0.99])
    logits = torch.stack([scores, 1 - scores], -1).log()[None]
    boxes = torch.tensor([[0.1 * i, 0.5, 0.1, 0.1] for i in range(1, 7)])
    boxes[4, 2], boxes[5, 0] = 0, -0.5  # no answers: without a width, and outside of the image
    for threshold, order in ((0.7, [1, 2, 0]), (0.2, [1, 2, 0, 3]), (1.0, [])):
        ((found, their_boxes),) = evaluate.pick_answers(logits, boxes[None], threshold)
        torch.testing.assert_close(found, scores[order])
        torch.testing.assert_close(their_boxes[:, 2], boxes[order, 0] + 0.05)


def test_a_score_just_below_the_threshold_is_no_answer_although_float32_cannot_tell():
    below, box = torch.tensor([0.7]), torch.tensor([A])  # 0.69999999
    assert evaluate.grec_correct(below, box, box[:0])
    logits = torch.zeros(80, 2, 2)
    logits[:, 0, 0] = torch.tensor(7 / 3).log() + torch.arange(-40, 40) * 1e-7
    logits = logits[logits.softmax(-1)[:, 0, 0] == below]
    answers = evaluate.pick_answers(logits, torch.full((len(logits), 2, 4), 0.5))
    assert answers and not any(len(scores) for scores, _ in answers)


def test_each_branch_gives_its_own_answer_and_the_decoder_that_of_its_last_layer():
    parts = torch.rand(4, 2, 3)
    answers = models.Output(*parts).answers()
    assert all(map(torch.equal, answers["decoder"] + answers["token"], [*parts[:2, 1], *parts[2:]]))


def test_accuracy_is_that_of_all_with_a_known_truth_of_no_targets_and_of_each_kind():
    targets = {"one target": 1, "b": 1, "all": 0, "c": 0, "d": 3, "unknown": None}
    examples, some = [], []
    for kind, count in targets.items():  # kinds like names of groups get lines of their own
        examples.append(data.Example("a.jpg", "x", kind=kind))
        some.append({"decoder": {"correct": kind != "c"}, "token": {"correct": kind == "c"}})
        some[-1] |= {} if count is None else {"truth": [A] * count}
    shares = {"decoder_f1": 0.8, "decoder_nacc": 0.5, "token_f1": 0.2, "token_nacc": 0.5}
    assert evaluate.summary(some, grec=True) == {"n": 5, "n_none": 2} | shares
    assert evaluate.summary(some[:2], grec=True).keys() == {"n", "n_none", "decoder_f1", "token_f1"}
    assert evaluate.summary(some, grec=False) == dict(n=3, decoder_acc=1.0, token_acc=0.0)
    _, *lines = evaluate.table("val", some, examples, grec=True).splitlines()
    assert [f"{line[:18].strip()}: {' '.join(line[18:].split())}" for line in lines] == [
        *("all: 5 80.00 20.00", "no target: 2 50.00 50.00", "one target: 2 100.00 0.00"),
        *("several targets: 1 100.00 0.00", "- one target: 1 100.00 0.00", "- b: 1 100.00 0.00"),
        *("- all: 1 100.00 0.00", "- c: 1 0.00 100.00", "- d: 1 100.00 0.00"),
    ]


def test_boxes_and_truth_are_in_pixels_of_a_picture_that_is_not_square(collate, tmp_path):
    boxes = [(60.0, 16.0, 80.0, 48.0), (150.0, 40.0, 50.0, 40.0)]  # the second reaches the edge
    example = data.Example(picture(tmp_path / "a.png"), "a ring", boxes, name="a.png")
    truth = [[60.0, 16.0, 140.0, 64.0], [150.0, 40.0, 199.0, 79.0]]
    line = dict(image="a.png", expression="a ring", truth=truth)
    line["decoder"] = dict(boxes=truth[:1], scores=[0.9], correct=True, iou=1.0)
    line["token"] = dict(boxes=[[80.0, 16.0, 120.0, 64.0]], scores=[0.9], correct=True, iou=0.5)
    line["agreement"] = 0.5
    found = evaluate.evaluate_examples(answering(), [example], collate)
    assert json.dumps(found) == json.dumps([line]), "the keys are in this order, too"


@pytest.mark.parametrize("mode", [True, False])
def test_evaluation_drops_nothing_out_and_restores_the_mode(mode, collate, tmp_path):
    examples = [data.Example(picture(tmp_path / "a.png"), "a ring", [(1, 2, 30, 40)])] * 4
    model = tiny_model(dropout=0.5, drop_path=0.5)
    expected = evaluate.evaluate_examples(model, examples, collate)
    found = evaluate.evaluate_examples(model.train(mode), examples, collate)
    assert found == expected and model.training is mode


def test_every_kind_of_picture_is_read_and_only_a_file_is_turned_by_its_exif(collate, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned by 90 degrees
    path = picture(tmp_path / "a.png", exif=exif)
    stored = Image.open(path)
    upright = ImageOps.exif_transpose(stored)
    array = np.array(upright)
    mirrored = array[:, ::-1].copy()[:, ::-1]
    kinds = [path, Path(path), data.read_image(path), array, np.asfortranarray(array), mirrored]
    edited = [stored, stored.crop((0, 0, 90, 50)), stored.rotate(90, expand=True)]  # with EXIF
    for given, meant in [*product(kinds, [upright]), *zip(edited, edited, strict=True)]:
        pixels = torch.tensor(np.array(meant)).permute(2, 0, 1)
        ((found, _),) = evaluate.ground(tiny_model(), given, ["a ring"], collate.tokenizer)
        ((wanted, _),) = evaluate.ground(tiny_model(), pixels, ["a ring"], collate.tokenizer)
        assert torch.equal(found, wanted), given


def test_many_phrases_are_answered_in_batches_about_one_picture(collate, tmp_path, monkeypatch):
    ask, whole = (tiny_model(queries=2), picture(tmp_path / "a.png")), models.SimVG.forward
    texts, seen = [f"the {'red ' * (i % 5)}ring" for i in range(130)], []
    alone = [evaluate.ground(*ask, [text], collate.tokenizer, None, 0)[0][0] for text in texts[:5]]
    spy = lambda *given: seen.append(given) or whole(*given)  # noqa: E731
    monkeypatch.setattr(models.SimVG, "forward", spy)
    found = evaluate.ground(*ask, texts, collate.tokenizer, threshold=0)
    assert [len(each[1]) for each in seen] == [64, 64, 2] and seen[0][1].stride(0) == 0
    boxes = torch.cat([box for box, _ in found])
    torch.testing.assert_close(boxes, torch.cat(alone * 26), atol=1e-3, rtol=0)
    ((none, _),) = evaluate.ground(*ask, ["a"], collate.tokenizer, "token", 1, torch.bfloat16)
    assert len(none) == 0 < len(boxes) and seen[3][4:] == ("token", torch.bfloat16)


@pytest.mark.parametrize("known", ["both", "token", "decoder"])
def test_an_untrained_branch_neither_answers_nor_can_be_asked(known, trained, collate, tmp_path):
    model = models.load(keep(tmp_path / "a.pt", answering(), trained, branch=known))
    ask = (model, torch.zeros(3, 80, 200).byte(), ["a ring"], collate.tokenizer)
    lefts = {"decoder": 60, "token": 80, None: 60 if known == "decoder" else 80}
    for branch, left in lefts.items():
        if branch and known not in ("both", branch):
            with pytest.raises(data.InputError, match=f"decoder or token; trained: {known}$"):
                evaluate.ground(*ask, branch)
        else:
            ((box, _),) = evaluate.ground(*ask, branch)
            assert box[0].tolist() == pytest.approx([left, 16, 200 - left, 64])


def test_a_checkpoint_brings_its_tokenizer_and_the_length_of_phrases(toys, trained, monkeypatch):
    monkeypatch.chdir(toys)
    own, other = "data/toys/toys.spm", "data/toys-grec/toys.spm"
    with pytest.raises(data.InputError, match="is not the tokenizer that the weights were trained"):
        evaluate.load(trained / "best.pt", other)
    assert evaluate.load(trained / "best.pt", own)[1].path == own
    model, tokenizer = evaluate.load(trained / "best.pt")
    ask = (model, torch.zeros(3, 8, 8).byte(), ["the ring left of the ring left of the ring left"])
    with pytest.warns(UserWarning, match="the ring left' is cut") as said:
        ((box, _),) = evaluate.ground(*ask, tokenizer)
        model.max_tokens = 30
        ((of_all, _),) = evaluate.ground(*ask, tokenizer)
    assert [each.filename for each in said] == [__file__] and not torch.equal(box, of_all)


def test_what_is_no_picture_or_no_list_of_phrases_is_refused(collate):
    array, pixels = np.zeros((8, 8, 3), np.uint8), torch.zeros(3, 8, 8).byte()
    wrong = (array / 2, array.T, array[0], pixels / 2, pixels[None], pixels.movedim(0, 2))
    for image in (*wrong, None, b"a photo"):
        with pytest.raises(data.InputError, match=r"\(H, W, 3\) uint8 or a tensor \(3, H, W\)"):
            evaluate.ground(tiny_model(), image, ["a ring"], collate.tokenizer)
    with pytest.raises(data.InputError, match="expected decoder or token; trained: both$"):
        evaluate.ground(tiny_model(), pixels, ["a ring"], collate.tokenizer, "both")
    with pytest.raises(data.InputError, match="a list of phrases, not 'a ring'"):
        evaluate.ground(tiny_model(), pixels, "a ring", collate.tokenizer)


def test_the_report_is_a_static_page_of_the_worst_answers_with_text_as_text(collate, tmp_path):
    path, widths = picture(tmp_path / "a.png"), {"good": 80, "half": 40, NASTY: 20, "fair": 70}
    examples = [data.Example(path, each, [(60, 16, width, 48)]) for each, width in widths.items()]
    examples.append(data.Example(path, "no target", []))
    results = evaluate.evaluate_examples(answering(), examples, collate)
    evaluate.report(f"{tmp_path}/a.html", {"v": (examples, results, "1 < 2")}, grec=False, most=3)
    parts, page = [], HTMLParser()
    page.handle_starttag = lambda tag, its: parts.append(f"{tag} {dict(its).get('src', '')[:16]}")
    page.handle_endtag = lambda tag: parts.append(f"/{tag}")
    page.handle_data = lambda text: parts.append(text.partition(": decoder IoU")[0].strip())
    page.feed((tmp_path / "a.html").read_text(encoding="utf-8"))
    parts = [part.strip() for part in parts if part]
    before, after = ["figure", "img data:image/jpeg;", "figcaption"], ["/figcaption", "/figure"]
    figures = [[*before, text, *after] for text in (NASTY, "half", "fair")]
    assert parts[-21:] == sum(figures, ["pre", "1 < 2", "/pre"]) and "script" not in parts


def test_the_figures_are_those_of_training_and_of_the_lines(toys, trained, tmp_path):
    files = ("--answers", tmp_path / "a.jsonl", "--report", tmp_path / "a.html")
    done = call("evaluate.py", "--ckpt", "runs/trained/best.pt", *files, cwd=toys)
    printed = [json.loads(line) for line in done.out.splitlines() if line.startswith("{")]
    logged = [row for row in metrics(toys, "trained") if row.get("weights") == "best"]
    lines, asked = lines_of(tmp_path / "a.jsonl"), []
    for figures, row in zip(printed, logged, strict=True):
        assert figures.items() <= row.items() and "n" in figures
        right = [each["token"]["correct"] for each in lines if each["split"] == row["split"]]
        assert row["token_acc"] == np.mean(right)
        rows = lines_of(toys / f"data/toys/{row['split']}.jsonl")
        asked += [(row["image"], text) for row in rows for text in row["expressions"]]
    assert [(each["image"], each["expression"]) for each in lines] == asked
    assert f"\n{done.out.splitlines()[1]}\n" in (tmp_path / "a.html").read_text()


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_gives_the_same_lines_and_figures(ranks, toys, trained, tmp_path):
    rows = lines_of(toys / "data/toys/train.jsonl")
    rows.insert(70, {"image": "gone.jpg", "expressions": ["a ring", "a cross"]})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = ("--split", "train", "val") if ranks == 3 else ("--rows", tmp_path / "rows.jsonl")
    line = ("evaluate.py", "--ckpt", "runs/trained/best.pt", *asked, "--answers")
    one = call(*line, tmp_path / "one.jsonl", cwd=toys)
    many = program(*line, tmp_path / "many.jsonl", cwd=toys, ranks=ranks)
    assert many.status == 0 and many.out == one.out, many.err
    assert (tmp_path / "many.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert len(lines_of(tmp_path / "one.jsonl")) > 4 * evaluate.BATCH


@pytest.mark.parametrize("use", ["rows", "rows and --set", "photos"])
def test_each_picture_is_answered_or_named_as_unreadable(use, toys, trained, photos):
    folder, out, names = f"data.images={photos}", photos / "out.jsonl", PHOTOS
    ckpt = keep(photos / "a.pt", answering(), trained, *([folder] if use == "rows" else []))
    ask = ["--rows", photos / "rows.jsonl"] + (["--set", folder] if "set" in use else [])
    if use == "photos":
        names = [str(photos / name) for name in PHOTOS]
        ask = ["--image", *names, "--text", *PHRASES, "--save", photos / "all.png"]
    done = call("evaluate.py", "--ckpt", ckpt, *ask, "--answers", out, cwd=toys)
    assert done.status == 0 and "score" not in done.out, "it says nothing in REC"
    assert done.out.count("\n") == (9 if use == "photos" else 0)  # 8 boxes, a picture
    assert done.err.count("cannot read the image") == 2
    asked = [(each["image"], each["expression"]) for each in lines_of(out)]
    assert asked == list(product(names, PHRASES))
    answer = {"boxes": [[80.0, 16.0, 120.0, 64.0]], "scores": [0.9]}
    for i, each in enumerate(lines_of(out)):
        if i in (0, 1, 4, 5):
            assert list(each)[2:] == ["decoder", "token", "agreement"] and each["token"] == answer
        else:
            assert list(each)[2:] == ["error"]
            assert f"cannot read the image {photos / PHOTOS[i // 2]}: " in each["error"]


def test_branch_threshold_and_precision_can_be_chosen(toys, trained, tmp_path, monkeypatch):
    whole, seen = models.SimVG.forward, []
    spy = lambda *given: seen.append((len(given[2][0]), *given[4:])) or whole(*given)  # noqa: E731
    monkeypatch.setattr(models.SimVG, "forward", spy)
    line = ("evaluate.py", "--ckpt", keep(tmp_path / "a.pt", answering(0.5, queries=3), trained))
    photo = ("--image", "data/toys/images/val_00000.jpg", "--text", "a ring")
    assert call(*line, *photo, cwd=toys).out.count("scores [], boxes []") == 2
    options = ("--branch", "token", "--amp", "bf16", "--threshold", "0.4")
    assert "token: 'a ring', scores [0.5" in call(*line, *photo, *options, cwd=toys).out
    assert seen == [(10, "both", None), (10, "token", torch.bfloat16)]
    assert '"n_none": 0, "decoder_f1": 0.0' in call(*line, "--split", "val", cwd=toys).out


def test_a_split_ends_at_a_broken_picture_for_good(toys, trained, photos, monkeypatch):
    monkeypatch.setattr(evaluate, "BATCH", 3)
    row = '{"image": "%s", "expressions": ["a ring"], "boxes": [[9, 9, 20, 20]]}\n'
    (photos / "val.jsonl").write_text(row % "a.jpg" * 7 + row % "cut.jpg")
    settings = [f"data.annotations={photos}/{{split}}.jsonl", f"data.images={photos}"]
    ckpt = keep(photos / "a.pt", answering(), trained, *settings, "data.workers=2")
    line = ("--ckpt", ckpt, "--split", "val", "--answers", photos / "out.jsonl")
    for expected in (f"{photos}/val.jsonl:8: cannot read the image", "--answers", "--answers"):
        done = call("evaluate.py", *line, cwd=toys)
        assert done.status == 2 and not done.out and len(lines_of(photos / "out.jsonl")) == 6
        assert done.err.splitlines()[-1].startswith(f"evaluate.py: {expected}")


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--ckpt gone.pt", "gone.pt: No such file"),
        ("--ckpt {0}/decoder.pt --branch token", "only the decoder branch was trained"),
        ("--ckpt {0}/official.pth", "name one: --config configs.json:refcoco"),
        ("--ckpt {0}/official.pth --config configs.json:toys", "161 ids, the model 64 words"),
        ("--split tset", "tset"),
        ("--set model.queries=10", "--set model.queries=10: only keys of data"),
        ("--image a.jpg --text ?!", "at least one word"),
        ("--ckpt gone.pt --answers a.json", "a.json: expected a name that ends in .jsonl"),
        ("--ckpt gone.pt --report gone/a.html", "gone/a.html: expected a name that ends in .html"),
        ("--ckpt gone.pt --image a.jpg --text b --save a.xyz", "a.xyz: expected a name"),
    ],
)
def test_bad_input_is_one_line_and_status_2(option, expected, toys, trained, tmp_path):
    keep(tmp_path / "decoder.pt", tiny_model(), trained, branch="decoder")
    official_model(tmp_path)
    before, options = sorted(toys.iterdir()), option.format(tmp_path).split()
    done = call("evaluate.py", "--ckpt", "runs/trained/best.pt", *options, cwd=toys)
    assert done.status == 2 and not done.out and sorted(toys.iterdir()) == before
    assert done.err.splitlines()[-1].startswith("evaluate.py: ") and expected in done.err
