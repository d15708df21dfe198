"""beit3.py: two experts and one attention."""

import pytest
import torch

import beit3
import model as models
from conftest import golden, official_state, tiny_inputs, tiny_model


def encode(model, images, tokens, pad, **options):
    with torch.no_grad():
        return model.encoder((images - model.mean) / model.std, tokens, pad, **options)


def test_padding_never_changes_what_is_seen_of_image_and_words():
    model = tiny_model()
    images, tokens, pad = tiny_inputs()
    longer = torch.cat([tokens, torch.ones(3, 4, dtype=torch.int64)], dim=1)
    short, long = encode(model, images, tokens, pad), encode(model, images, longer, longer == 1)
    torch.testing.assert_close(short[0], long[0])
    torch.testing.assert_close(short[1], long[1])
    torch.testing.assert_close(short[2][~pad], long[2][:, :6][~pad])


def test_all_padding_rows_of_a_sample_are_equal():
    text = encode(tiny_model(), *tiny_inputs())[2]
    torch.testing.assert_close(text[0, 3], text[0, 5])


def test_the_token_branch_path_gives_the_same_object_and_words_without_the_image_rows():
    model, inputs = tiny_model(), tiny_inputs()
    full, short = encode(model, *inputs), encode(model, *inputs, object_only=True)
    torch.testing.assert_close(full[0], short[0])
    torch.testing.assert_close(full[2], short[2])
    assert short[1].shape == (3, 0, 32)


def test_image_tokens_use_the_image_expert_and_words_the_text_expert():
    model, inputs = tiny_model(), tiny_inputs()
    before = encode(model, *inputs)
    with torch.no_grad():
        model.encoder.layers[-1].text.fc2.bias += torch.arange(32.0)
    after = encode(model, *inputs)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert not torch.allclose(before[2], after[2])


def test_every_word_reaches_the_object_token_through_the_attention():
    model = tiny_model()
    images, tokens, pad = tiny_inputs()
    other = tokens.clone()
    other[0, 1] = 150 if tokens[0, 1] != 150 else 151
    a, b = encode(model, images, tokens, pad), encode(model, images, other, pad)
    assert not torch.allclose(a[0][0], b[0][0]) and torch.equal(a[0][1], b[0][1])


def test_drop_path_skips_whole_samples_and_only_in_training():
    model = tiny_model(drop_path=0.9)
    inputs = tiny_inputs()
    assert torch.equal(encode(model, *inputs)[0], encode(model, *inputs)[0])
    model.train()
    assert not torch.equal(encode(model, *inputs)[0], encode(model, *inputs)[0])
    assert torch.equal(model.encoder.drop_rates, torch.tensor([0, 0.9]))


def test_compiled_layers_share_one_graph_whatever_their_drop_path():
    model, inputs = tiny_model(encoder_layers=12, drop_path=0.1).train(), tiny_inputs()
    torch.manual_seed(0)
    expected = encode(model, *inputs)[0]
    torch._dynamo.utils.counters.clear()
    for layer in model.encoder.layers:
        layer.compile(backend="eager")
    torch.manual_seed(0)
    torch.testing.assert_close(encode(model, *inputs)[0], expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_positions_of_the_same_grid_stay_untouched():
    table = torch.randn(3 + 196, 8)
    assert beit3.resize_positions(table, 14, extra=3) is table


def test_resize_equals_the_official_code_in_four_cases():
    tensors, cases = golden("interpolation.npz"), golden("golden.json")["interpolation"]["cases"]
    names = {"beit3.encoder.embed_positions.A.weight": "pos_A", "beit3.vision_embed.proj.weight": "patch_proj"}
    checkpoint = {name: tensors[f"ckpt/{short}"] for name, short in names.items()}
    for case, about in cases.items():
        fitted = beit3.resize_pretrained(checkpoint, about["img_size"] // about["patch"], about["patch"])
        for name in about["changed_keys"]:
            stored = case if f"{case}/{names[name]}" in tensors else "a"  # the kernel of case d is that of case a
            torch.testing.assert_close(fitted[name], tensors[f"{stored}/{names[name]}"], atol=1e-5, rtol=0)
        for name in checkpoint.keys() - set(about["changed_keys"]):
            assert torch.equal(fitted[name], checkpoint[name])


def test_half_precision_checkpoints_are_resized_in_float32():
    positions = {"beit3.encoder.embed_positions.A.weight": torch.randn(199, 8).half()}
    assert beit3.resize_pretrained(positions, 20, 32).popitem()[1].dtype == torch.float32


def test_the_released_text_positions_have_one_frequency():
    about = golden("golden.json")["sine1d"]
    table = beit3.sine_1d(*about["shape"], one_frequency=True)
    torch.testing.assert_close(table[:, 0], torch.tensor(about["col0"]))
    torch.testing.assert_close(table[:, 1], torch.tensor(about["col1"]))
    assert (table[:, 2::2] == 0).all() and (table[:, 3::2] == 1).all()
    assert not torch.equal(table, beit3.sine_1d(*about["shape"]))


def test_a_tensor_of_an_unknown_layer_part_is_refused_by_its_name(tmp_path):
    state = {n.removeprefix("vis_enc."): v for n, v in official_state().items() if n.startswith("vis_enc.")}
    sizes = models.official_sizes(models.from_official(official_state())) | {"encoder_heads": 4}
    unknown = {
        "encoder.layers.0.self_attn.foo.A.weight": "layers.0.image.self_attn.foo.weight",
        "encoder.layers.0.self_attn.q_proj.weight": "encoder.layers.0.q.weight",
        "encoder.something.weight": "encoder.something.weight",
    }
    for name, shown in unknown.items():
        torch.save({"model": {**state, f"beit3.{name}": torch.zeros(1)}}, tmp_path / "b.zip")
        with pytest.raises(models.CheckpointError, match=f"'{shown}' is .1,. in the file and missing in the model"):
            models.initialise(models.SimVG(**sizes), tmp_path / "b.zip")
