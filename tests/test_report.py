"""evaluate.py --report and --attention: the page holds what was evaluated, opens in a browser, shows text as text."""

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


def example(folder, i: int, grec: bool) -> tuple[data.Example, dict[str, evaluate.Result]]:
    """Row i: right in the decoder unless i % 4 is 0, in the token branch unless i % 3 is 0."""
    expression = NASTY if i == 1 else f"the {'very ' * (i % 12)}small thing number {i}"
    boxes = ((10.0, 10.0, 20.0 + i % 50, 20.0),) * (i % 3 if grec else 1)
    row = data.Example(str(folder / f"{i % 4}.png"), expression, boxes, (100, 80), "ab"[i % 2], f"rows:{i}")
    truth = evaluate.true_boxes(row, (100, 80))
    results = {}
    for branch, step in (("decoder", 4), ("token", 3)):
        right = i % step > 0
        answer = truth if right else torch.tensor([[0.8, 0.8, 0.9, 0.9]])
        scores = torch.linspace(0.95, 0.75, len(answer))
        more = torch.tensor([[0.0, 0.0, 0.5, 0.5]] if grec else []).reshape(-1, 4)  # below the threshold
        boxes_and_more = torch.cat([answer, more])
        scores = torch.cat([scores, torch.full((len(more),), 0.1)])
        results[branch] = evaluate.Result(right, len(answer), scores, boxes_and_more)
    return row, results


def write(folder, count: int, grec: bool = False) -> dict:
    for i in range(4):
        Image.new("RGB", (100, 80), (60 * i, 90, 120)).save(folder / f"{i}.png")
    rows, found = zip(*(example(folder, i, grec) for i in range(count)), strict=True)
    evaluate.report(str(folder / "report.html"), "best.pt", {"val": (rows, found)}, grec)
    text = (folder / "report.html").read_text()
    return json.loads(re.search(r'type="application/json">(.*?)</script>', text, re.S)[1])


def test_the_page_asks_nothing_of_the_network_and_no_text_ends_its_script(tmp_path):
    content = write(tmp_path, 300)
    text = (tmp_path / "report.html").read_text()
    assert content["rows"][1]["text"] == NASTY and NASTY not in text
    assert set(re.findall(r"https?://[^\s\"'`]+", text)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"(src|href)\s*=\s*[\"']", text) and "@import" not in text and "url(" not in text
    assert len(content["pictures"]) == 4 and len(content["rows"]) == 300
    assert not list(tmp_path.glob("*.part"))


def test_the_curve_at_the_threshold_of_the_table_has_the_table_s_figures():
    g = torch.Generator().manual_seed(0)
    truth, mask = torch.rand(200, 3, 4, generator=g) * 0.3 + 0.2, torch.rand(200, 3, generator=g) > 0.6
    boxes = torch.cat([truth, torch.rand(200, 2, 4, generator=g) * 0.3 + 0.2], 1)
    certain = torch.cat([mask.float() * 4 - 2 + 2 * torch.randn(200, 3, generator=g), -3 * torch.ones(200, 2)], 1)
    found = evaluate.score_answers(torch.stack([certain, -certain], -1), boxes, truth, mask, 640)
    truths = [evaluate.box_convert(t[m], "cxcywh", "xyxy") for t, m in zip(truth, mask, strict=True)]
    points = {round(threshold, 3): rest for threshold, *rest in evaluate.curve(truths, found)}
    none = [each.correct for each, m in zip(found, mask, strict=True) if not m.any()]
    assert points[0.7] == [sum(each.correct for each in found) / 200, sum(none) / len(none)]
    assert len({tuple(point) for point in points.values()}) > 3


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


def test_ten_thousand_rows_can_be_filtered_sorted_and_walked_through(browser, tmp_path):
    write(tmp_path, 10_000)
    page, faults = opened(browser, tmp_path)
    said = page.locator("#shown").inner_text
    assert page.locator(".card").count() == 48 and said() == "10000 of 10000, page 1 of 209"
    cells = page.locator("#tables table").first.locator("td").all_inner_texts()
    assert cells == ["all", "10000", "75.00", "66.66"]
    page.select_option("#wrong", "token")
    assert said().startswith("3334 of 10000") and page.locator(".card.wrong").count() == 48
    page.select_option("#wrong", "differ")  # wrong in just one: i % 4 == 0 or i % 3 == 0, not both
    assert said().startswith("4166 of 10000")
    page.select_option("#wrong", "")
    page.select_option("#kind", "b")
    assert said().startswith("5000 of 10000")
    page.select_option("#sort", "iou")
    assert "IoU 0.00" in page.locator(".card").first.inner_text()
    page.keyboard.press("Escape")
    page.keyboard.press("r")
    assert page.locator(".card").first.inner_text().count("IoU 1.00") == 2
    page.keyboard.press("ArrowRight")
    assert said().endswith("page 2 of 105")
    page.keyboard.press("/")
    page.keyboard.type("number 77")
    assert said().startswith("56 of 10000")  # 77, 77x and 77xx that are odd
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    assert page.locator(".card.current").count() == 1
    page.screenshot(path=tmp_path / "report.png")
    assert not faults


def test_an_expression_with_a_script_shows_as_text(browser, tmp_path):
    write(tmp_path, 30)
    page, faults = opened(browser, tmp_path)
    assert page.locator(".card").nth(1).locator("div").first.inner_text() == NASTY
    assert page.evaluate("window.hacked") is None and not faults


def test_a_grec_report_draws_its_curve(browser, tmp_path):
    content = write(tmp_path, 90, grec=True)
    page, faults = opened(browser, tmp_path)
    assert page.locator("polyline").count() == 4 and len(content["curves"]["val"]["token"]) == evaluate.STEPS - 1
    page.select_option("#count", "0")
    assert page.locator("#shown").inner_text().startswith("30 of 90")
    assert not faults


def test_the_walk_through_a_tiny_model_prints_every_stage_down_to_the_boxes():
    done = program("model.py", cwd=ROOT)
    assert re.search(r"^text-guided queries, Eq. 8 +\(2, 1, 32\) +[\d,]+$", done.stdout, re.M)
    assert re.search(r"^token branch, Eq. 3: logits, boxes +\(2, 1, 2\) \(2, 1, 4\) +[\d,]+$", done.stdout, re.M)
    parts = [int(n.replace(",", "")) for n in re.findall(r" ([\d,]+)$", done.stdout, re.M)]
    assert sum(parts[:-1]) == parts[-1], "some parameters belong to no stage"
