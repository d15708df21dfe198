"""model.py: the branches, and files that survive a round trip or are refused in one line."""

import copy
import errno
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import zipfile

import pytest
import torch

import beit3
import data
import model as models
from conftest import ROOT, TINY, environment, golden, official_model, official_state, tiny_inputs, tiny_model


def test_each_branch_can_be_asked_for_alone_and_answers_the_same():
    model, inputs = tiny_model(queries=3), tiny_inputs()
    with torch.no_grad():
        both = model(*inputs)
        for branch in ("decoder", "token"):
            alone = model(*inputs, branch=branch)
            for name in models.Output._fields:
                if name.startswith(branch):
                    torch.testing.assert_close(getattr(alone, name), getattr(both, name))
                else:
                    assert getattr(alone, name) is None


def test_the_method_works_when_its_three_files_are_copied_into_an_empty_folder(tmp_path):
    for name in ("model.py", "beit3.py", "losses.py"):
        shutil.copy(ROOT / name, tmp_path)
    blocked = "import sys; sys.modules.update(dict.fromkeys(('sentencepiece', 'pycocotools', 'tqdm', 'data')))"
    (tmp_path / "use.py").write_text(f"""{blocked}
import torch, losses, model
net = model.SimVG(**{TINY})
images, tokens = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.ones(2, 6, dtype=torch.int64)
output = net(images, tokens, torch.zeros(2, 6, dtype=torch.bool))
losses.simvg_loss(output, torch.full((2, 1, 4), 0.5), torch.ones(2, 1, dtype=torch.bool))["total"].backward()
""")
    done = subprocess.run([sys.executable, "use.py"], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_shapes_of_the_output_are_those_of_the_contract():
    output = tiny_model(queries=3)(*tiny_inputs())
    assert [tuple(x.shape) for x in output] == [(2, 3, 3, 2), (2, 3, 3, 4), (3, 3, 2), (3, 3, 4)]
    assert all((x >= 0).all() and (x <= 1).all() for x in (output.decoder_boxes, output.token_boxes))


def test_the_token_branch_runs_without_a_decoder():
    model = tiny_model()
    model.decoder_branch = None
    assert model(*tiny_inputs(), branch="token").token_boxes.shape == (3, 1, 4)


def test_padding_never_changes_the_box():
    model = tiny_model()
    images, tokens, pad = tiny_inputs()
    longer = torch.cat([tokens, torch.ones(3, 9, dtype=torch.int64)], dim=1)
    with torch.no_grad():
        together = model(images, longer, longer == 1)
        for i in range(3):  # each phrase alone has no padding at all
            words = tokens[i : i + 1, ~pad[i]]
            alone = model(images[i : i + 1], words, words == 1)
            torch.testing.assert_close(alone.decoder_boxes, together.decoder_boxes[:, i : i + 1])
            torch.testing.assert_close(alone.token_boxes, together.token_boxes[i : i + 1])


def test_uint8_images_are_normalised_inside_the_model():
    model = tiny_model()
    images, tokens, pad = tiny_inputs()
    by_hand = (images.float() - model.mean) / model.std
    with torch.no_grad():
        assert torch.equal(model(images, tokens, pad).token_boxes, model(by_hand, tokens, pad).token_boxes)


@pytest.mark.parametrize("branch", ["both", "decoder", "token"])
def test_every_trained_parameter_gets_a_gradient(branch):
    model = tiny_model().train()
    if branch == "decoder":
        model.token_branch.requires_grad_(False)
    if branch == "token":
        model.decoder_branch.requires_grad_(False)
    output = model(*tiny_inputs(), branch=branch)
    sum(x.sum() for x in output if x is not None).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_under_autocast_everything_that_makes_a_box_stays_in_float32():
    model = tiny_model()
    with torch.no_grad():
        exact, fast = model(*tiny_inputs()), model(*tiny_inputs(), amp=torch.bfloat16)
    assert all(x.dtype == torch.float32 for x in fast)
    assert not torch.equal(exact.token_boxes, fast.token_boxes)
    torch.testing.assert_close(exact.token_boxes, fast.token_boxes, atol=0.05, rtol=0)


def test_a_copy_of_the_model_is_independent():
    model = tiny_model()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert twin(*tiny_inputs()).token_boxes.std() > 0


def checkpoint(model: models.SimVG, **changes) -> dict:
    config = {"model": {**TINY, **changes}, "data": {}, "train": {}}
    return {"model": model.state_dict(), "ema": {}, "config": config}


def test_an_own_checkpoint_gives_the_same_model_back(tmp_path):
    model = tiny_model()
    models.save(tmp_path / "a.pt", checkpoint(model))
    loaded = models.load(tmp_path / "a.pt")
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(model(*tiny_inputs()).token_boxes, loaded(*tiny_inputs()).token_boxes)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_averaged_weights_are_taken_where_a_checkpoint_holds_them(tmp_path):
    model, other = tiny_model(), tiny_model()
    torch.nn.init.zeros_(other.token_branch.mlp.weight)
    models.save(tmp_path / "a.pt", checkpoint(model) | {"ema": dict(other.named_parameters())})
    assert torch.equal(models.load(tmp_path / "a.pt").token_branch.mlp.weight, other.token_branch.mlp.weight)


def test_official_files_load_plain_with_a_module_prefix_and_with_averaged_weights(tmp_path):
    expected = official_model(tmp_path).state_dict()
    state = official_state()
    noise = {name: torch.zeros_like(value) for name, value in state.items()}
    extras = {"head.criterion.empty_weight": torch.tensor([1.0, 0.1])}
    for file in (
        {"state_dict": {f"module.{name}": value for name, value in (state | extras).items()}, "epoch": 3},
        {"state_dict": noise, "ema_state_dict": state},
    ):
        torch.save(file, tmp_path / "b.pth")
        loaded = models.load(tmp_path / "b.pth", encoder_heads=4)
        assert loaded.tqg.as_released
        for name, value in loaded.state_dict().items():
            assert torch.equal(value, expected[name]), name


def test_a_beit3_file_fills_the_encoder_and_resizes_it(tmp_path):
    state = official_state()
    beit3 = {n.removeprefix("vis_enc."): v.half() for n, v in state.items() if n.startswith("vis_enc.")}
    torch.save({"model": beit3}, tmp_path / "beit3_base_patch16_224.zip")
    sizes = golden("golden.json")["config"]
    changes = dict(encoder_width=48, encoder_ffn=96, encoder_layers=3, encoder_heads=4, vocab_size=sizes["vocab"])
    model = tiny_model(image_size=96, patch_size=32, **changes)
    before = model.tqg.query_embed.weight.clone()
    report = models.initialise(model, tmp_path / "beit3_base_patch16_224.zip")
    assert "BEiT-3" in report and "new: everything but the encoder" in report
    assert torch.equal(model.encoder.text_embed.weight, beit3["beit3.text_embed.weight"].float())
    assert model.encoder.image_positions.shape == (10, 48) and model.encoder.patch_embed.weight.shape[-1] == 32
    assert torch.equal(model.tqg.query_embed.weight, before)


def test_initialising_fills_every_parameter_that_the_file_has(tmp_path):
    models.save(tmp_path / "a.pt", checkpoint(tiny_model()))
    model = tiny_model(image_size=64, queries=5)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)
    report = models.initialise(model, tmp_path / "a.pt")
    assert report.endswith("; new: tqg.query_embed.weight")
    assert {name for name, p in model.named_parameters() if p.isnan().any()} == {"tqg.query_embed.weight"}


def test_a_checkpoint_that_cannot_be_written_leaves_the_older_one(tmp_path, monkeypatch):
    models.save(tmp_path / "a.pt", {"step": 1})
    monkeypatch.setattr(models.os, "fsync", no_space)
    with pytest.raises(models.CheckpointError, match="No space left"):
        models.save(tmp_path / "a.pt", {"step": 2})
    assert models.read_checkpoint(tmp_path / "a.pt") == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def no_space(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Bomb:
    def __reduce__(self):
        return print, ("this code ran",)


@pytest.mark.parametrize("kind", ["missing", "empty", "cut", "text", "code", "list", "other", "shape"])
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line_that_names_it(kind, tmp_path, capsys):
    path = tmp_path / "x.pt"
    if kind == "empty":
        path.touch()
    elif kind == "cut":
        models.save(path, checkpoint(tiny_model()))
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "text":
        path.write_text("<html>not found</html>")
    elif kind == "code":
        path.write_bytes(pickle.dumps({"model": Bomb()}))
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "other":
        torch.save({"weights": torch.zeros(3)}, path)
    elif kind == "shape":
        models.save(path, checkpoint(tiny_model(), encoder_width=64))
    with pytest.raises(models.CheckpointError) as error:
        models.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert "this code ran" not in capsys.readouterr().out


# ---- what the weights were made with


def official_file(path, words: int | None = None) -> str:
    """An official SimVG .pth, with a vocabulary of so many words."""
    state, name = official_state(), "vis_enc.beit3.text_embed.weight"
    if words:
        state[name] = torch.zeros(words, state[name].shape[1])
    torch.save({"state_dict": state}, path)
    return str(path)


def official_sized(**changes) -> models.SimVG:
    """A new model of the tiny official one's sizes."""
    found = models.official_sizes(models.from_official(official_state())) | {"encoder_heads": 4}
    return models.SimVG(**(found | changes)).eval()


def test_weights_made_for_the_released_arithmetic_are_trained_with_it_and_that_is_said(tmp_path):
    path, inputs = official_file(tmp_path / "official.pth"), tiny_inputs()
    loaded = models.load(path, encoder_heads=4)
    model = official_sized(as_released=False)
    assert "model.as_released=true from now on" in models.initialise(model, path)
    images = torch.zeros(3, 3, loaded.image_size, loaded.image_size, dtype=torch.uint8)
    tokens = inputs[1].clamp(max=loaded.encoder.text_embed.num_embeddings - 1)
    with torch.no_grad():
        a, b = (each(images, tokens, inputs[2]) for each in (model, loaded))
    assert torch.equal(a.token_boxes, b.token_boxes) and torch.equal(a.decoder_boxes, b.decoder_boxes)


def test_weights_made_for_the_paper_s_arithmetic_are_refused_where_the_released_one_is_set(tmp_path):
    models.save(tmp_path / "a.pt", checkpoint(tiny_model()))
    with pytest.raises(models.CheckpointError, match="not made for model.as_released=true"):
        models.initialise(tiny_model(as_released=True), tmp_path / "a.pt")


def test_official_files_imply_beit3_s_tokenizer_and_own_ones_tell_theirs(tmp_path):
    loaded = models.load(official_file(tmp_path / "a.pth", beit3.WORDS), encoder_heads=4)
    assert (loaded.tokenizer_digest, loaded.max_tokens) == (beit3.TOKENIZER, 20)
    assert models.load(official_file(tmp_path / "b.pth"), encoder_heads=4).tokenizer_digest is None
    own = checkpoint(tiny_model())
    own["config"]["data"]["max_tokens"] = 7
    models.save(tmp_path / "c.pt", own | {"tokenizer": "abc"})
    models.save(tmp_path / "old.pt", checkpoint(tiny_model()))
    found = [models.load(tmp_path / name) for name in ("c.pt", "old.pt")]
    assert [(each.tokenizer_digest, each.max_tokens) for each in found] == [("abc", 7), (None, None)]


def test_the_known_digest_is_that_of_beit3_s_tokenizer():
    path = ROOT / "data" / "beit3.spm"
    if not path.exists():
        pytest.skip("needs data/beit3.spm, which is not part of the project")
    assert data.Tokenizer(path).digest == beit3.TOKENIZER


def test_a_reader_who_makes_the_object_token_two_gets_the_same_answer_from_each_branch_alone(monkeypatch, capsys):
    monkeypatch.setattr(beit3, "OBJECT_TOKENS", 2)
    model, inputs = tiny_model(), tiny_inputs()
    assert model.encoder.object_token.shape == (1, 2, 32)
    torch.nn.init.normal_(model.encoder.object_token)
    with torch.no_grad():
        both, alone = model(*inputs), model(*inputs, branch="token")
        torch.testing.assert_close(both.token_boxes, alone.token_boxes)
        torch.nn.init.normal_(model.encoder.object_token[0, 1])
        assert (model(*inputs, branch="token").token_boxes - alone.token_boxes).abs().max() > 1e-6
    assert model.attention_maps(*inputs).object_token.shape == (2, 3, 16)
    models.main()
    assert re.search(r"encoder\.layers\.0 +\(2, 18, 64\) \(2, 6, 64\)", capsys.readouterr().out)


# ---- files of a wrong inside


JUNK = ("x", None, 3, -1, 0.5, True, [], {}, [1, 2], {"a": 1}, torch.zeros(2), torch.zeros((), dtype=torch.int64))


def mutated(state: dict, rng: random.Random) -> dict:
    """A copy with one value, at any depth, replaced, taken out or put under another name."""
    state = copy.deepcopy(state)
    place = state
    while True:
        key = rng.choice(list(place))
        if not isinstance(place[key], dict) or not place[key] or rng.random() < 0.2:
            break
        place = place[key]
    value, change = place.pop(key), rng.randrange(4)
    if change == 1:
        place[rng.choice(("other", 5, None))] = value
    elif change > 1:
        place[key] = rng.choice(JUNK)
    return state


@pytest.mark.parametrize("kind", ["own", "official", "beit3"])
def test_a_checkpoint_of_a_wrong_inside_is_one_line_whatever_is_wrong(kind, tmp_path):
    rng, path = random.Random(kind), tmp_path / "x.pt"
    whole = {"own": checkpoint(tiny_model()), "official": {"state_dict": official_state()}}.get(kind)
    if kind == "beit3":
        names = {n.removeprefix("vis_enc."): v for n, v in official_state().items() if n.startswith("vis_enc.")}
        whole = {"model": names}
    refused = 0
    for _ in range(100):
        torch.save(mutated(whole, rng), path)
        model = tiny_model() if kind == "own" else official_sized()
        heads = {} if kind == "own" else {"encoder_heads": 4}
        for load in (True, False):
            try:
                models.load(path, **heads) if load else models.initialise(model, path)
            except models.CheckpointError as error:
                refused += 1
                assert str(path) in str(error) and "\n" not in str(error)
    assert refused > 50


def test_weights_that_are_no_tensors_of_floating_point_numbers_are_named(tmp_path):
    for wrong in ("text", torch.zeros(128, 32, dtype=torch.int64), torch.zeros(3, 3).to_sparse()):
        state = checkpoint(tiny_model())
        state["model"]["token_branch.mlp.weight"] = wrong
        torch.save(state, tmp_path / "x.pt")
        named = "token_branch.mlp.weight. is no dense floating point tensor in the file"
        with pytest.raises(models.CheckpointError, match=named):
            models.load(tmp_path / "x.pt")


def test_a_pipe_or_a_device_is_no_checkpoint_and_nothing_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waited for 20 seconds"))
    signal.alarm(20)
    try:
        for path in (tmp_path / "pipe.pt", "/dev/zero"):
            with pytest.raises(models.CheckpointError, match="is not a regular file"):
                models.read_checkpoint(path)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_zip_around_a_checkpoint_is_refused_with_the_advice_to_unpack_it(tmp_path):
    models.save(tmp_path / "beit3.pth", {"model": {}})
    with zipfile.ZipFile(tmp_path / "beit3.zip", "w") as around:
        around.write(tmp_path / "beit3.pth", "beit3.pth")
    with pytest.raises(
        models.CheckpointError, match=r"beit3.zip: is a zip around other files \(beit3.pth\), unpack it"
    ):
        models.read_checkpoint(tmp_path / "beit3.zip")
