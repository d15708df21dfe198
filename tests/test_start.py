"""What a run starts from: weights, precision, and training rows without an evaluation image."""

import json
import shutil

import pytest
import torch
from PIL import Image

import data
import model as models
import train
from conftest import CONFIGS, SMALL_RUN, call, last, metrics, official_state, program, start

OFFICIAL = models.official_config(models.from_official(official_state()))
SIZES = [
    f"model.{name}={getattr(OFFICIAL, name)}"
    for name in ("image_size", "patch_size", "encoder_width", "encoder_layers", "encoder_ffn")
]


def beit3_state() -> dict[str, torch.Tensor]:
    """A made-up BEiT-3 file: official names, the sizes of the golden files, our vocabulary."""
    state = {"beit3.vision_embed.mask_token": torch.zeros(1, 1, OFFICIAL.encoder_width)}
    for name, value in official_state().items():
        if name.startswith("vis_enc."):
            state[name.removeprefix("vis_enc.")] = value
    words = torch.randn(162, OFFICIAL.encoder_width)
    return state | {"beit3.text_embed.weight": words, "mlm_head.weight": torch.zeros(2)}


@pytest.fixture
def settings(toys, tmp_path) -> list[str]:
    """Small sizes and 16 rows in place of those of RefCOCO, in a folder to start programs in."""
    for split in ("train", "val"):
        lines = (toys / f"data/toys/{split}.jsonl").read_text().splitlines()[:16]
        (tmp_path / f"few-{split}.jsonl").write_text("\n".join(lines))
    (tmp_path / "configs.json").symlink_to(CONFIGS)
    (tmp_path / "pretrain_weights").mkdir()
    shutil.copy(toys / "data/toys/toys.spm", tmp_path / "pretrain_weights/beit3.spm")
    rows = ["data.annotations=few-{split}.jsonl", f"data.images={toys}/data/toys/images"]
    more = ['data.eval_splits=["val"]', "data.workers=0", "train.epochs=1", "model.encoder_heads=4"]
    return [*SMALL_RUN, *SIZES, *rows, *more, "train.batch_size=8", "train.evaluate_from=0"]


@pytest.mark.parametrize("ending", [".pth", ".zip"])
def test_the_recipe_as_typed_starts_from_beit3_and_goes_on_without_the_file(
    ending, settings, tmp_path
):
    file = tmp_path / f"pretrain_weights/beit3_base_patch16_224{ending}"
    torch.save({"model": beit3_state()}, file)
    line = ("--config", "configs.json:refcoco", "--set", *settings)
    done = program("train.py", *line, cwd=tmp_path, ranks=2 if ending == ".pth" else 1)
    assert done.status == 0, done.err
    taken = len([name for name in beit3_state() if name.startswith("beit3.")]) - 1
    new = "new: decoder_branch, token_branch, tqg"
    assert f"{file.relative_to(tmp_path)}: BEiT-3, {taken} tensors taken; {new}" in done.err
    assert "torch.float32, micro-batches of" in done.err
    named = "pretrain_weights/beit3_base_patch16_224.pth"
    assert last(tmp_path, "refcoco", "best.pt")["config"]["train"]["init"] == named
    assert json.loads((tmp_path / "runs/refcoco/config.json").read_text())["train"]["init"] == named
    file.unlink()
    assert call("train.py", *line, "train.init=", "--resume", cwd=tmp_path).status == 0


def test_without_the_file_rank_0_says_one_line_and_random_weights_must_be_asked_for(
    settings, tmp_path
):
    line = ("--config", "configs.json:refcoco", "--set", *settings)
    done = program("train.py", *line, cwd=tmp_path, ranks=2)
    said = [text for text in done.err.splitlines() if text.startswith("train.py: ")]
    assert done.status == 1 and len(said) == 1
    assert "beit3_base_patch16_224.pth: there is no such file: download it from https" in said[0]
    assert said[0].endswith("start at random: --set train.init=")
    done = call("train.py", *line, "train.init=", cwd=tmp_path)
    assert done.status == 0 and 'train.init="": training starts from random weights' in done.err


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("refcoco-large", "pretrain_weights/beit3_large_patch16_224.pth: there is no such file"),
        (
            "refcoco+-stage2",
            "runs/refcoco+-stage1/best.pt: there is no such file: train the recipe",
        ),
        ("refcoco-finetune-mixed", "train the recipe pretrain-mixed first"),
        ("refcoco-distill-cocoall", "train the recipe refcoco-finetune-cocoall first"),
    ],
)
def test_a_step_of_a_chain_names_the_step_before(recipe, expected, settings, tmp_path):
    line = ("--config", f"configs.json:{recipe}", "--set", *settings)
    assert expected in call("train.py", *line, cwd=tmp_path).err


def test_auto_is_bf16_where_the_gpu_has_it_else_fp16_and_float32_on_a_cpu(monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for has_it, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_it)  # noqa: B023
        assert models.encoder_precision("auto", gpu) is expected
    assert models.encoder_precision("auto", cpu) is None
    assert models.encoder_precision("none", gpu) is None
    assert models.encoder_precision("fp16", cpu) is torch.float16
    assert train.TrainConfig().amp == "auto"


def test_evaluation_prints_the_figures_of_training_in_bf16_as_well(toys):
    start(toys, "half", "train.amp=bf16", "train.epochs=1")
    done = call("evaluate.py", "--ckpt", "runs/half/best.pt", cwd=toys)
    assert "torch.bfloat16" in done.err
    printed = [json.loads(line) for line in done.out.splitlines() if line.startswith("{")]
    assert printed == [row for row in metrics(toys, "half") if row.get("weights") == "best"]
    photo = ("--image", "data/toys/images/val_00000.jpg", "--text", "the red ball")
    assert call("evaluate.py", "--ckpt", "runs/half/best.pt", *photo, cwd=toys).status == 0
    done = call("evaluate.py", "--ckpt", "runs/half/best.pt", "--amp", "none", cwd=toys)
    assert "torch.float32" in done.err


def test_of_joined_files_training_leaves_out_the_images_that_any_of_them_evaluates(
    tmp_path, capsys
):
    """Photo 2 is evaluated by b, photo 3 by own rows; 4 is in a split that nobody evaluates."""
    for number in range(1, 6):
        Image.new("RGB", (64, 48)).save(tmp_path / f"{number}.jpg")

    def row(number: int) -> dict:
        about = {"image_id": number, "bbox": [1, 1, 20, 20], "expressions": [f"dog {number}"]}
        return about | {"width": 64, "height": 48}

    for name, splits in {
        "a": {"train": [row(1), row(2), row(3)], "val": [row(4)]},
        "b": {"train": [row(1), row(4), row(5)], "testA": [row(2)]},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "instances.json").write_text(json.dumps(splits))
    own = {"image": "3.jpg", "expressions": ["own"], "boxes": [[1, 1, 20, 20]]}
    (tmp_path / "val.jsonl").write_text(json.dumps(own))
    names = (f"{tmp_path}/a/instances.json", f"{tmp_path}/b/instances.json")
    images = f"{tmp_path}/{{}}.jpg"
    for files, kept in (
        (names, [1, 3, 1, 5]),
        ((*names, f"{tmp_path}/{{split}}.jsonl"), [1, 1, 5]),
    ):
        config = data.DataConfig(files, images, eval_splits=("val",))
        rows = data.without_evaluated(config, data.read_rows(config, "train"))
        assert [row[0].expression for row in rows] == [f"dog {number}" for number in kept]
        said = f"{6 - len(kept)} of 6 training rows are left out: their images are evaluated"
        assert said in capsys.readouterr().err
    for single in (names[0], names[:1]):
        config = data.DataConfig(single, images)
        rows = data.read_rows(config, "train")
        assert data.without_evaluated(config, rows) == rows
    assert not capsys.readouterr().err
