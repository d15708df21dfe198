"""model.py: the branches, and files that survive a round trip or are refused in one line."""

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import model as models
from conftest import TINY, official_model, official_state, tiny_inputs, tiny_model


def test_each_branch_alone_answers_the_same_and_the_token_branch_does_without_a_decoder():
    model = tiny_model(queries=4)
    both = model(*tiny_inputs())
    assert [tuple(x.shape) for x in both] == [(2, 3, 4, 2), (2, 3, 4, 4), (3, 4, 2), (3, 4, 4)]
    for branch in ("decoder", "token"):
        alone = model(*tiny_inputs(), branch=branch)
        torch.testing.assert_close(alone.answers(), {branch: both.answers()[branch]})
    assert all(0 <= boxes.min() and boxes.max() <= 1 for boxes in both[1::2])
    model.decoder_branch = None
    assert torch.equal(model(*tiny_inputs(), branch="token").token_boxes, alone.token_boxes)


def test_the_answers_are_those_of_the_last_decoder_layer_and_of_the_token_branch():
    output = tiny_model()(*tiny_inputs())
    decoder = output.decoder_logits[1], output.decoder_boxes[1]
    token = output.token_logits, output.token_boxes
    torch.testing.assert_close(output.answers(), {"decoder": decoder, "token": token})
    assert list(models.Output(*output[:2]).answers()) == ["decoder"]
    assert list(models.Output(None, None, *output[2:]).answers()) == ["token"]


def test_padding_never_changes_the_box():
    model = tiny_model()
    images, tokens, pad = tiny_inputs()
    longer = torch.cat([tokens, torch.ones(3, 9, dtype=torch.int64)], dim=1)
    together = model(images, longer, longer == 1)
    for i in range(3):  # each phrase alone has no padding at all
        words = tokens[i : i + 1, ~pad[i]]
        alone = model(images[i : i + 1], words, words == 1)
        torch.testing.assert_close(alone.decoder_boxes, together.decoder_boxes[:, i : i + 1])
        torch.testing.assert_close(alone.token_boxes, together.token_boxes[i : i + 1])


def test_the_maximum_over_the_words_leaves_padding_out_and_the_released_one_takes_the_last_rows():
    text = torch.tensor([-3.0, -1.0, -2.0, -4.0]).view(1, 4, 1)
    pad = torch.tensor([[False, False, False, True]])
    for as_released, padded, full in ((False, -1, -1), (True, -2, -4)):
        tqg = tiny_model(as_released=as_released).tqg
        assert tqg.pool(text, pad).tolist() == [[padded]]
        assert tqg.pool(text, pad & False).tolist() == [[full]]


def test_the_positions_of_the_words_have_all_frequencies_and_the_released_ones_the_first_alone():
    for as_released, frequencies in ((False, (1, 0.1, 0.01, 0.001)), (True, (1, 0, 0, 0))):
        positions = tiny_model(head_width=8, as_released=as_released).tqg.positions
        for place in (0, 1, 30):
            expected = [(math.sin(place * each), math.cos(place * each)) for each in frequencies]
            torch.testing.assert_close(positions[place], torch.tensor(expected).flatten())


def test_uint8_images_are_normalised_inside_the_model():
    model = tiny_model()
    images, tokens, pad = tiny_inputs()
    expected = model((images - model.mean) / model.std, tokens, pad).token_boxes
    assert torch.equal(model(images, tokens, pad).token_boxes, expected)


@pytest.mark.parametrize("branch", ["both", "decoder", "token"])
def test_every_trained_parameter_gets_a_gradient(branch):
    model = tiny_model().train()
    model.token_branch.requires_grad_(branch != "decoder")
    model.decoder_branch.requires_grad_(branch != "token")
    output = model(*tiny_inputs(), branch=branch)
    sum(x.sum() for x in output if x is not None).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_under_autocast_the_encoder_alone_runs_in_16_bits():
    model = tiny_model()
    exact = model(*tiny_inputs())
    inside = []
    for part in model.children():
        part.register_forward_pre_hook(lambda *_: inside.append(torch.is_autocast_enabled("cpu")))
    fast = model(*tiny_inputs(), amp=torch.bfloat16)
    assert inside == [True, False, False, False]  # encoder, queries and both branches
    assert all(x.dtype == torch.float32 for x in fast)
    assert 0 < (exact.token_boxes - fast.token_boxes).abs().max() < 0.05


def write(path: Path, model=None, ema=None, **changes) -> None:
    """Save a model (a tiny one if none is given) as train.py does, with changes in its config."""
    weights = (model or tiny_model()).state_dict()
    config = {"model": TINY | changes, "data": {"max_tokens": 7}}
    models.save(path, {"model": weights, "ema": ema or {}, "config": config, "branch": "token"})


def test_an_own_checkpoint_gives_the_same_model_back_averaged_where_that_is_kept(tmp_path):
    model = tiny_model(as_released=True)
    write(tmp_path / "a.pt", model, as_released=True)
    loaded = models.load(tmp_path / "a.pt")
    assert loaded.config == model.config and not loaded.training
    assert (loaded.trained_branch, loaded.max_tokens) == ("token", 7)
    assert torch.equal(model(*tiny_inputs()).token_boxes, loaded(*tiny_inputs()).token_boxes)
    averaged = model.state_dict() | {"token_branch.mlp.bias": torch.full((32,), 7.0)}
    write(tmp_path / "a.pt", model, ema=averaged)
    assert (models.load(tmp_path / "a.pt").token_branch.mlp.bias == 7).all()
    assert os.listdir(tmp_path) == ["a.pt"]


def test_official_files_load_plain_with_a_module_prefix_and_with_averaged_weights(tmp_path):
    expected = official_model(tmp_path).state_dict()
    state = official_state()
    prefixed = {f"module.{name}": value for name, value in state.items()}
    prefixed["module.head.criterion.empty_weight"] = torch.tensor([1.0, 0.1])
    for file in (
        {"state_dict": prefixed, "epoch": 3, "best": np.float64(0.87), "loss": np.float32(1.5)},
        {"state_dict": dict.fromkeys(state, torch.zeros(1)), "ema_state_dict": state},
    ):
        torch.save(file, tmp_path / "b.pth")
        loaded = models.load(tmp_path / "b.pth", encoder_heads=4)
        assert loaded.config.as_released
        assert (loaded.trained_branch, loaded.max_tokens) == ("both", 20)
        for name, value in loaded.state_dict().items():
            assert torch.equal(value, expected[name]), name


def test_a_beit3_file_fills_the_encoder_alone_and_is_resized(tmp_path):
    state = {n.removeprefix("vis_enc."): v.half() for n, v in official_state().items()}
    torch.save({"model": state}, tmp_path / "beit3.zip")
    model = models.SimVG(replace(official_model(tmp_path).config, image_size=96, patch_size=32))
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    new = models.initialise(model, models.read(tmp_path / "beit3.zip"))
    filled = {name for name, p in model.named_parameters() if not p.isnan().any()}
    assert filled == {f"encoder.{name}" for name, _ in model.encoder.named_parameters()}
    assert new == {name for name in model.state_dict() if not name.startswith("encoder.")}
    assert torch.equal(model.encoder.text_embed.weight, state["beit3.text_embed.weight"].float())


def test_another_image_size_resizes_positions_and_another_number_of_queries_starts_anew(tmp_path):
    model = tiny_model()
    torch.nn.init.constant_(model.encoder.image_positions, 3)
    write(tmp_path / "a.pt", model)
    loaded = models.load(tmp_path / "a.pt", image_size=64, queries=5)
    torch.testing.assert_close(loaded.encoder.image_positions, torch.full((65, 32), 3.0))
    assert loaded.tqg.query_embed.weight.shape == (5, 32)
    for name, value in model.state_dict().items():
        if name not in ("encoder.image_positions", "tqg.query_embed.weight"):
            assert torch.equal(loaded.state_dict()[name], value), name


def test_a_checkpoint_that_cannot_be_written_leaves_the_older_one(tmp_path, monkeypatch):
    write(tmp_path / "a.pt")
    monkeypatch.setattr(os, "fsync", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        models.save(tmp_path / "a.pt", {})
    assert models.load(tmp_path / "a.pt")


class Bomb:
    def __reduce__(self):
        return print, ("this code ran",)


def flip(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)


WRONG = {
    "missing": ("No such file", Path.unlink),
    "empty": ("", lambda path: path.write_bytes(b"")),
    "cut": ("", lambda path: path.write_bytes(path.read_bytes()[:100_000])),
    "flipped": ("checksum of .* is wrong", flip),
    "text": ("no checkpoint", lambda path: path.write_text("<html>not found</html>")),
    "code": ("no checkpoint", lambda path: torch.save({"model": Bomb()}, path)),
    "other": ("no SimVG", lambda path: torch.save({"weights": torch.zeros(3)}, path)),
    "shape": ("size mismatch for tqg", lambda path: write(path, head_width=64)),
    "lacking": ('Missing key.* "tqg.layers.1', lambda path: write(path, tqg_layers=2)),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line_that_names_it(kind, tmp_path, capsys):
    message, spoil = WRONG[kind]
    path = tmp_path / "x.pt"
    write(path)
    spoil(path)
    with pytest.raises(data.InputError, match=message or "x.pt") as error, data.located(path):
        models.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert "this code ran" not in capsys.readouterr().out
