"""evaluate.py --report and --attention: the page holds the answers, opens in a browser and shows text as text."""

import json
import re
import shutil
import time

import pytest
import torch
from PIL import Image

import data
import evaluate
from conftest import ROOT, program, tiny_inputs, tiny_model

NASTY = '<script>window.hacked = 1</script><img src=x onerror="window.hacked = 1"> "left" & </dog>'


def example(folder, i: int, grec: bool) -> tuple[data.Example, dict]:
    """Row i: right in the decoder unless i % 4 is 0, in the token branch unless i % 3 is 0."""
    expression = NASTY if i == 1 else f"the {'very ' * (i % 12)}small thing number {i}"
    boxes = ((10.0, 10.0, 20.0 + i % 50, 20.0),) * (i % 3 if grec else 1)
    row = data.Example(str(folder / f"{i % 4}.png"), expression, boxes, (100, 80), "ab"[i % 2], f"rows:{i}")
    truth = (data.clip_boxes(boxes, 100, 80) / torch.tensor([100, 80] * 2)).float()
    found = {}
    for branch, step in (("decoder", 4), ("token", 3)):
        right = i % step > 0
        answer = truth if right else torch.tensor([[0.8, 0.8, 0.9, 0.9]])
        scores = torch.linspace(0.95, 0.75, len(answer))
        found[branch] = scores, answer
    line = {"image": row.name, "expression": expression} | evaluate.record(row, found, (100, 80), grec)
    return row, line


def write(folder, count: int, grec: bool = False) -> dict:
    for i in range(4):
        Image.new("RGB", (100, 80), (60 * i, 90, 120)).save(folder / f"{i}.png")
    rows, found = zip(*(example(folder, i, grec) for i in range(count)), strict=True)
    evaluate.report(str(folder / "report.html"), "best.pt", {"val": (rows, found)})
    text = (folder / "report.html").read_text()
    return json.loads(re.search(r'type="application/json">(.*?)</script>', text, re.S)[1])


def test_the_page_needs_no_network_and_no_expression_can_end_its_script(tmp_path):
    content = write(tmp_path, 300)
    text = (tmp_path / "report.html").read_text()
    assert content["rows"][1]["expression"] == NASTY and NASTY not in text
    assert set(re.findall(r"https?://[^\s\"'`]+", text)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"(src|href)\s*=\s*[\"']", text) and "@import" not in text and "url(" not in text
    assert len(content["pictures"]) == 4 and len(content["rows"]) == 300
    assert content["title"] == "best.pt: 300 of 300 answers, to 4 images"


def test_with_too_many_images_the_page_holds_only_answers_with_a_picture_and_says_how_many(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "PICTURES", 3)
    content = write(tmp_path, 300)
    assert len(content["pictures"]) == 3 and len(content["rows"]) == 225
    assert all(row["image"] in content["pictures"] for row in content["rows"])
    assert content["title"] == "best.pt: 225 of 300 answers, to 3 images"


def test_the_boxes_and_the_iou_of_the_page_are_those_of_the_answers(tmp_path):
    *_, right, wrong = write(tmp_path, 13)["rows"]
    assert right["truth"] == [[10.0, 10.0, 41.0, 30.0]] == right["token"]["boxes"]
    assert all(right[branch]["correct"] and right[branch]["iou"] == 1 for branch in ("decoder", "token"))
    assert wrong["token"]["boxes"] == [[80.0, 64.0, 90.0, 72.0]]
    assert not any(wrong[branch]["correct"] or wrong[branch]["iou"] for branch in ("decoder", "token"))
    assert wrong["decoder"]["scores"] == [0.95]


def test_a_trained_checkpoint_gets_a_report_and_pictures_of_its_attention(shapes, trained, tmp_path):
    out = tmp_path / "report.html"
    done = program("evaluate.py", "--ckpt", str(trained / "best.pt"), "--report", str(out), cwd=shapes)
    assert f"report: {out}" in done.stdout
    content = json.loads(re.search(r'type="application/json">(.*?)</script>', out.read_text(), re.S)[1])
    assert content["splits"] == ["val", "test"] and len(content["rows"]) == sum(
        len((shapes / "data" / "shapes" / f"{split}.jsonl").read_text().splitlines()) for split in ("val", "test")
    )
    picture = str(shapes / "data" / "shapes" / "images" / "test_00004.jpg")
    line = ["--ckpt", str(trained / "best.pt"), "--attention"]
    done = program(
        *("evaluate.py", *line, "--image", picture, "--text", "the red circle", "the ring"),
        *("--save", str(tmp_path / "found.png")),
        cwd=shapes,
    )
    assert Image.open(tmp_path / "found_attention.png").width > 3 * 280
    done = program("evaluate.py", *line, "--split", "test", cwd=shapes)
    (said,) = re.findall(r"covers ([\d.]+) % of the image", done.stdout)
    assert 5 < float(said) < 40 and "object token" in done.stdout and "decoder query" in done.stdout


def test_attention_maps_are_those_of_the_usual_path():
    model, (images, tokens, pad) = tiny_model(queries=3), tiny_inputs()
    with torch.inference_mode():
        maps = []
        model.encoder(model.normalise(images), tokens, pad, maps=maps)
        maps = torch.stack(maps)  # (layers, B, T, T)
        assert torch.allclose(maps.sum(-1), torch.ones(()), atol=1e-5)
        assert (maps[..., 17:][pad[None, :, None].expand(2, -1, 23, -1)] == 0).all()
        # one head, values that are the identity of a token: what attention puts out is its own map
        layer = model.encoder.layers[0]
        layer.heads = 1
        image, text, attn_mask = model.encoder.embed(model.normalise(images), tokens, pad)
        seen = {}
        usual = torch.nn.functional.scaled_dot_product_attention

        def spy(q, k, v, attn_mask):
            seen["map"] = usual(q, k, torch.eye(k.shape[2]).expand(len(k), 1, -1, -1), attn_mask=attn_mask)[:, 0]
            return usual(q, k, v, attn_mask=attn_mask)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
            layer(image, text, attn_mask, maps=(found := []))
        assert torch.allclose(found[0], seen["map"], atol=1e-6)
        shares = model.attention_maps(images, tokens, pad)
    assert shares.object_token.shape == (2, 3, 16) and shares.words.shape == (2, 3, 6, 16)
    assert shares.queries.shape == (2, 3, 3, 16)
    assert torch.allclose(shares.queries.sum(-1), torch.ones(()), atol=1e-5)


def test_coverage_counts_parts_of_patches():
    boxes = torch.tensor([[0.0, 0.0, 0.5, 0.375], [0.75, 0.75, 1.0, 1.0]])
    found = evaluate.coverage(boxes, 4).view(4, 4)
    assert found.tolist() == [[1, 1, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
    if not shutil.which("chromium"):
        pytest.skip("there is no /usr/bin/chromium (apt-get install chromium)")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        yield chromium
        chromium.close()


def opened(browser, folder):
    page, faults = browser.new_page(viewport={"width": 1200, "height": 900}), []
    page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: faults.append(request.url) if request.url.startswith("http") else None)
    began = time.monotonic()
    page.goto(f"file://{folder}/report.html")
    page.wait_for_selector(".card")
    print(f"opened in {time.monotonic() - began:.2f} s")
    return page, faults


def test_ten_thousand_rows_can_be_filtered_sorted_searched_and_paged_through(browser, tmp_path):
    write(tmp_path, 10_000)
    page, faults = opened(browser, tmp_path)
    said, first = page.locator("#shown").inner_text, page.locator(".card").first.inner_text
    assert page.locator(".card").count() == 48 and said() == "10000 answers, page 1 of 209"
    assert page.locator("#table td").all_inner_texts()[:4] == [
        "all",
        "10000",
        "decoder 75.00 % right",
        "token 66.66 % right",
    ]
    page.select_option("#answers", "token wrong")
    assert said().startswith("3334 answers") and page.locator(".card.wrong").count() == 48
    page.select_option("#answers", "one right, one wrong")  # i % 4 == 0 or i % 3 == 0, not both
    assert said().startswith("4166 answers")
    page.select_option("#answers", "all answers")
    page.select_option("#group", "b")
    assert said().startswith("5000 answers")
    page.select_option("#order", "lowest IoU first")
    assert "IoU 0.00" in first()
    page.select_option("#order", "highest IoU first")
    assert first().count("IoU 1.00") == 2
    page.click("#next")
    assert said().endswith("page 2 of 105")
    page.click("#back")
    page.click("#back")
    assert said().endswith("page 1 of 105")
    page.fill("#search", "number 77")
    assert said().startswith("56 answers")  # 77, 77x and 77xx that are odd
    page.fill("#search", "no such text")
    assert said() == "0 answers, page 1 of 1" and page.locator(".card").count() == 0
    assert not faults


def test_the_first_screen_shows_wrong_answers_first_and_every_card_has_its_picture(browser, tmp_path):
    write(tmp_path, 300)
    page, faults = opened(browser, tmp_path)
    both_wrong = [f"number {i}" for i in range(0, 300, 12)]
    cards = page.locator(".card").all_inner_texts()
    assert all(text in card for text, card in zip(both_wrong, cards[: len(both_wrong)], strict=True))
    assert page.locator(".card.wrong").count() == 48 and page.locator(".card image").count() == 48
    assert "decoder wrong: IoU 0.00, score 0.95" in cards[0] and "token wrong: IoU 0.00, score 0.95" in cards[0]
    sizes = page.evaluate(
        "Promise.all([...document.querySelectorAll('image')].map(async shown => {"
        "const image = new Image(); image.src = shown.getAttribute('href'); await image.decode(); return image.width}))"
    )
    assert sizes == [100] * 48 and page.locator(".card").first.bounding_box()["y"] < 400
    page.screenshot(path=tmp_path / "report.png")
    assert not faults


def test_answers_can_be_sorted_by_agreement_and_a_curve_shows_the_accuracy_of_the_most_agreed(browser, tmp_path):
    write(tmp_path, 24)
    page, faults = opened(browser, tmp_path)
    page.select_option("#order", "lowest agreement first")
    said = page.locator(".card small").all_inner_texts()
    values = [float(text.split("agreement ")[1].split(",")[0]) for text in said]
    assert values == sorted(values) and values[0] == 0 and values[-1] == 1
    assert page.locator("#curve polyline").count() == 2
    for branch, right in (("decoder", 18), ("token", 16)):
        points = page.locator(f"#curve polyline.{branch}").get_attribute("points").split()
        last = [float(number) for number in points[-1].split(",")]
        assert len(points) == 2  # one for each value of the agreement
        assert last == pytest.approx([200, (100 - 100 * right / 24) / 0.4])  # from 60 % up
    page.screenshot(path=tmp_path / "report.png")
    assert not faults


def test_an_expression_with_a_script_shows_as_text(browser, tmp_path):
    write(tmp_path, 30)
    page, faults = opened(browser, tmp_path)
    page.fill("#search", "script")
    assert page.locator(".card div").first.inner_text() == NASTY
    assert page.evaluate("window.hacked") is None and not faults


def test_a_grec_report_groups_by_the_number_of_targets(browser, tmp_path):
    write(tmp_path, 90, grec=True)
    page, faults = opened(browser, tmp_path)
    page.select_option("#group", "no target")
    assert page.locator("#shown").inner_text().startswith("30 answers")
    page.select_option("#group", "several targets")
    assert page.locator(".card").first.locator("rect.truth").count() == 2
    assert not faults


def test_the_walk_through_a_tiny_model_prints_every_stage_down_to_the_boxes():
    done = program("model.py", cwd=ROOT)
    rows = re.findall(r"^(\S+) +(\(.*\)) +([\d,]+)$", done.stdout, re.M)
    assert len(rows) == len(done.stdout.splitlines())
    shapes = {name: shape.strip() for name, shape, _ in rows}
    assert shapes["encoder.layers.1"] == "(2, 17, 64) (2, 6, 64)" and shapes["tqg"] == "(2, 1, 32)"
    assert shapes["token_branch"] == "(2, 1, 2) (2, 1, 4)"
    *parts, (_, total) = [(name, int(count.replace(",", ""))) for name, _, count in rows]
    assert sum(count for name, count in parts if "." not in name) == total, "some parameters belong to no stage"
