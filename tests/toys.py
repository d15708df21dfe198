"""Draw the built-in set into data/: scenes of coloured toys, phrases about them and a tokenizer.

python tests/toys.py toys          one target per phrase (REC)
python tests/toys.py toys-grec     none, one or several (gREC)

A scene is a wall with 3 x 3 places, of which one to four hold a toy, a small or a large one. A
place is as large as a patch of the encoder, so that a patch shows one toy at most.
"""

import io
import json
import random
import shutil
import sys
from itertools import product
from pathlib import Path
from typing import NamedTuple

import sentencepiece
from PIL import Image, ImageDraw
from tqdm import tqdm

COLORS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 80, 200),
    "yellow": (235, 210, 40),
}
# The parts of each toy, drawn one over the other: form, centre (x, y) and half of width and height,
# ink. The unit is half of the toy's side, and (0, 0) is the toy's centre. The toys differ in what a
# patch shows: neither white nor black, white, black at the top, black at the bottom.
TOYS = {
    "ball": [("ellipse", 0, 0, 1, 1, "color")],
    "dice": [
        ("rectangle", 0, 0, 1, 1, "color"),
        ("ellipse", -0.5, -0.5, 0.25, 0.25, "white"),
        ("ellipse", 0.5, -0.5, 0.25, 0.25, "white"),
        ("ellipse", 0, 0, 0.25, 0.25, "white"),
        ("ellipse", -0.5, 0.5, 0.25, 0.25, "white"),
        ("ellipse", 0.5, 0.5, 0.25, 0.25, "white"),
    ],
    "bug": [
        ("ellipse", 0, 0, 1, 1, "color"),
        ("ellipse", 0, -0.6, 0.65, 0.4, "black"),  # head
        ("rectangle", 0, 0.4, 0.07, 0.6, "black"),  # between the wings
        ("ellipse", -0.5, 0.15, 0.22, 0.22, "black"),
        ("ellipse", 0.5, 0.15, 0.22, 0.22, "black"),
        ("ellipse", -0.4, 0.65, 0.22, 0.22, "black"),
        ("ellipse", 0.4, 0.65, 0.22, 0.22, "black"),
    ],
    "car": [
        ("rectangle", 0, -0.4, 0.6, 0.6, "color"),  # cabin
        ("rectangle", 0, -0.45, 0.35, 0.3, "white"),  # window
        ("rectangle", 0, 0.2, 1, 0.4, "color"),
        ("ellipse", -0.5, 0.6, 0.4, 0.4, "black"),  # wheels
        ("ellipse", 0.5, 0.6, 0.4, 0.4, "black"),
    ],
}
PLACE = 16  # pixels of a side of a place
SIZE = 3 * PLACE  # pixels of a side of a picture
SIDES = (10.5, 15.5)  # pixels of a small and of a large toy
FINE = 4  # a picture is drawn so many times larger and then shrunk, which gives smooth edges
# The numbers of toys in a scene of training, and in one of val and test. Easy scenes in training
# speed it up a lot.
SCENE_SETS = {"toys": ((1, 2, 3, 4), (3, 4)), "toys-grec": ((1, 2, 3), (2, 3))}
KINDS = ("attribute", "superlative", "relation")
# What is compared, and whether the lowest (-1) or the highest (1) value is meant.
SUPERLATIVES = {
    "leftmost": ("column", -1),
    "rightmost": ("column", 1),
    "topmost": ("row", -1),
    "bottommost": ("row", 1),
    "smallest": ("side", -1),
    "largest": ("side", 1),
}
RELATIONS = {
    "left of": ("column", -1),
    "right of": ("column", 1),
    "above": ("row", -1),
    "below": ("row", 1),
}


Phrase = tuple[str, tuple[int, ...]]  # an expression, and the numbers of the toys that it names


class Toy(NamedTuple):
    color: str
    name: str
    column: int  # of its place
    row: int
    side: float  # all lengths are pixels
    x: float  # of its centre
    y: float


def make(folder: Path, set_name: str, scenes: int = 16000) -> None:
    """Write train, val and test .jsonl, images/*.jpg and toys.spm, in place of an old set.

    `scenes` are those of train. val and test hold 2,000 expressions each, or as many as train has
    scenes if fewer. The tokenizer comes last, so that a half-drawn set cannot be trained on.
    """
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    texts = set()
    for split in ("val", "test", "train"):
        rows = draw_split(folder / "images", set_name, split, scenes)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines)
        if split == "train":
            texts.update(text for row in rows for text in row["expressions"])
    # 160 pieces are enough for every word of the phrases to be one piece.
    options = {"model_type": "bpe", "vocab_size": 160, "hard_vocab_limit": False, "minloglevel": 2}
    options["character_coverage"] = 1.0  # else rare letters, as the p of "topmost", are unknown
    model = io.BytesIO()
    sentences = iter(sorted(texts))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_writer=model, **options
    )
    (folder / "toys.spm").write_bytes(model.getvalue())


def draw_split(images: Path, set_name: str, split: str, scenes: int) -> list[dict]:
    """Draw the pictures of a split into the folder `images`. Returns its rows."""
    is_train = split == "train"
    numbers = SCENE_SETS[set_name][0 if is_train else 1]
    wanted = scenes if is_train else min(2000, scenes)  # scenes, or expressions
    rows = []
    number = 0  # of the scene
    with tqdm(total=wanted, desc=split) as bar:
        while bar.n < wanted:
            rng = random.Random(f"toys/{split}/{number}")  # every scene has a seed of its own
            image = f"{split}_{number:05d}.jpg"
            scene = draw_scene(rng, rng.choice(numbers))
            paint(rng, scene).save(images / image, quality=95, subsampling=0)
            new = rows_of(rng, scene, image, set_name == "toys-grec")
            if not is_train:  # one expression of each row
                new = new[: wanted - len(rows)]
                for row in new:
                    del row["expressions"][1:]
            rows += new
            number += 1
            bar.update(1 if is_train else len(new))
    return rows


def draw_scene(rng: random.Random, number: int) -> list[Toy]:
    """Some toys in places of their own. They often look alike, so that all words are needed."""
    scene: list[Toy] = []
    for place in rng.sample(range(9), number):
        row, column = divmod(place, 3)
        side = rng.choice(SIDES)
        room = (PLACE - side) / 2
        x = PLACE * (column + 0.5) + rng.uniform(-room, room)
        y = PLACE * (row + 0.5) + rng.uniform(-room, room)
        color = rng.choice(list(COLORS))
        name = rng.choice(list(TOYS))
        if scene and rng.random() < 0.3:
            color = rng.choice(scene).color
        if scene and rng.random() < 0.3:
            name = rng.choice(scene).name
        scene.append(Toy(color, name, column, row, side, x, y))
    return scene


def paint(rng: random.Random, scene: list[Toy]) -> Image.Image:
    """The toys on a grey wall. Every toy has a tint of its color."""
    grey = rng.randint(90, 170)
    image = Image.new("RGB", (FINE * SIZE, FINE * SIZE), (grey, grey, grey))
    pen = ImageDraw.Draw(image)
    for toy in scene:
        tint = tuple(value + rng.randint(-20, 20) for value in COLORS[toy.color])
        half = toy.side / 2
        for form, dx, dy, width, height, ink in TOYS[toy.name]:
            x = toy.x + dx * half
            y = toy.y + dy * half
            left_top = FINE * (x - width * half), FINE * (y - height * half)
            right_bottom = FINE * (x + width * half), FINE * (y + height * half)
            draw = pen.ellipse if form == "ellipse" else pen.rectangle
            draw((left_top, right_bottom), fill=tint if ink == "color" else ink)
    return image.reduce(FINE)


def rows_of(rng: random.Random, scene: list[Toy], image: str, grec: bool) -> list[dict]:
    """Up to three rows for a scene, one of each kind; in gREC each draws none, one or several
    targets first."""
    groups = groups_of(scene)
    if not grec:
        groups = {words: members for words, members in groups.items() if members}
    rows = []
    for kind in KINDS:
        # 2 stands for several; a scene always has phrases for none, so none is drawn less often
        count = rng.choices((0, 1, 2), (1, 2, 2))[0] if grec else 1
        every = phrases(scene, groups, kind)
        found = [(text, named) for text, named in every if min(len(named), 2) == count]
        if not found:
            continue
        chosen = rng.choice(sorted({named for _, named in found}))
        texts = [text for text, named in found if named == chosen]
        boxes = []
        for i in chosen:
            toy = scene[i]
            left = toy.x - toy.side / 2
            top = toy.y - toy.side / 2
            boxes.append([round(left, 2), round(top, 2), toy.side, toy.side])
        row = {"image": image, "width": SIZE, "height": SIZE, "boxes": boxes, "kind": kind}
        rows.append(row | {"expressions": rng.sample(texts, min(3, len(texts)))})
    return rows


def groups_of(scene: list[Toy]) -> dict[str, list[int]]:
    """Names such as "red ball", "red object" and "ball" -> the numbers of the toys that have them,
    which may be none."""
    groups = {}
    for color, name in product((None, *COLORS), (None, *TOYS)):
        words = " ".join(filter(None, (color, name or "object")))
        groups[words] = [
            i
            for i, toy in enumerate(scene)
            if color in (None, toy.color) and name in (None, toy.name)
        ]
    return groups


def phrases(scene: list[Toy], groups: dict[str, list[int]], kind: str) -> list[Phrase]:
    """Every unambiguous expression of one kind about groups of a scene.

    attribute: what a toy looks like; superlative: the winner of a group; relation: where a toy is,
    seen from another one. An expression about a group without any toy names none.
    """
    found = []
    if kind == "attribute":
        for words, members in groups.items():
            if words != "object":
                found.append((f"the {words}", tuple(members)))
    elif kind == "superlative":
        for (words, members), name in product(groups.items(), SUPERLATIVES):
            if len(members) == 1:  # it is named without a superlative
                continue
            what, sign = SUPERLATIVES[name]
            values = {i: sign * getattr(scene[i], what) for i in members}
            winners = tuple(i for i in members if values[i] == max(values.values()))
            if len(winners) <= 1:
                found.append((f"the {name} {words}", winners))
    else:
        anchors = [words for words, members in groups.items() if len(members) == 1 and " " in words]
        for anchor_words, (words, members) in product(anchors, groups.items()):
            anchor = groups[anchor_words][0]
            others = [i for i in members if i != anchor]
            if len(others) == 1:  # it is named without a relation
                continue
            for name, (what, sign) in RELATIONS.items():
                start = getattr(scene[anchor], what)
                offsets = {i: sign * (getattr(scene[i], what) - start) for i in others}
                if 0 not in offsets.values():
                    named = tuple(i for i in others if offsets[i] > 0)
                    found.append((f"the {words} {name} the {anchor_words}", named))
    return found


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else "toys"
    if name not in SCENE_SETS:
        sys.exit(f"{name}: expected one of {', '.join(SCENE_SETS)}")
    make(Path("data") / name, name, *map(int, sys.argv[2:]))
