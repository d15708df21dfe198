"""The built-in set: the same on every machine, test scenes of their own, unambiguous phrases."""

import json
from itertools import product

import pytest

import data
import toys as toys_set


def content(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", toys_set.SCENE_SETS)
def test_a_set_is_the_same_byte_for_byte_and_replaces_an_old_one(name, tmp_path):
    toys_set.make(tmp_path / "one", name, 40)
    toys_set.make(tmp_path / "two", name, 45)
    (tmp_path / "two" / "old.txt").write_text("of another set")
    toys_set.make(tmp_path / "two", name, 40)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_the_tokenizer_comes_last_so_that_half_a_set_cannot_be_trained_on(tmp_path, monkeypatch):
    toys_set.make(tmp_path / "toys", "toys", 40)
    monkeypatch.setattr(toys_set, "draw_split", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        toys_set.make(tmp_path / "toys", "toys", 40)
    assert not (tmp_path / "toys" / "toys.spm").exists()


def test_the_tokenizer_knows_words_with_a_letter_that_is_rare(tmp_path, monkeypatch):
    texts = ["".join(letters) for letters in product("lamost", repeat=5)]
    monkeypatch.setattr(toys_set, "draw_split", lambda *_: [{"expressions": [*texts, "topmost"]}])
    toys_set.make(tmp_path / "toys", "toys")
    assert not data.Tokenizer(tmp_path / "toys" / "toys.spm").unknown_words("topmost lamp")


@pytest.mark.parametrize("name", toys_set.SCENE_SETS)
def test_no_picture_is_in_two_splits_and_every_word_is_known(name, toys):
    folder = toys / "data" / name
    of_splits = {}
    for path in (folder / "images").iterdir():
        of_splits.setdefault(path.read_bytes(), set()).add(path.name.partition("_")[0])
    assert {len(splits) for splits in of_splits.values()} == {1}
    tokenizer = data.Tokenizer(folder / "toys.spm")
    numbers = set()
    for split in ("train", "val", "test"):
        for line in (folder / f"{split}.jsonl").read_text().splitlines():
            row = json.loads(line)
            numbers.add(min(len(row["boxes"]), 2))
            assert not any(map(tokenizer.unknown_words, row["expressions"]))
            assert not any(tokenizer.is_cut(text, 10) for text in row["expressions"])
    assert numbers == ({1} if name == "toys" else {0, 1, 2})
