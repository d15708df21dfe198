"""Structures that are almost right, as many as asked for: what reads them must accept them or refuse them in one line.

    python tests/mutate.py --cases 5000 --kinds rows layouts configs settings checkpoints

A case is a function of (kind, number): `--first N` starts with the one that failed. No traceback, no hang (a time limit
a case), no crash of the process (Python then prints where it was).
"""

import argparse
import copy
import faulthandler
import json
import math
import pickle
import random
import signal
import sys
import tempfile
from collections import Counter
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import test_annotations as layouts
import torch

import data
import model as models
import train
from conftest import ROOT, TINY, official_state, tiny_model

SECONDS = 10  # for a case; most take milliseconds
DEEP = "deep"  # stands for lists in lists, deeper than JSON can be written from here
ODD = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 0.5, -0.0, 1e-300, 1e308, math.inf, -math.inf, math.nan, 10**400, 2**63),
    *("", " ", "a", "val", "train", "../x", "/", "a/", "a\n", "\ud800", "\u200b", "\u2581", "\0", "x" * 5000, DEEP),
    *("{}", "{:012d}", "{.a}", "{:c}", "{0[0]}", "{:999999999d}", "{", "12", "nan", "default", "shapes"),
    *([], {}, [[]], [None], [1, 2, 3, 4], [[1, 2, 3, 4]], [0, 0, 0, 0], [63, 2, 1, 40], {"a": 1}, {"id": 1}, ["a"]),
]


class Hang(BaseException):
    """Not an Exception, so that nothing catches it by the way."""


def places(tree: object) -> list[tuple]:
    """(container, key) of everything in a tree of lists, tuples and dicts."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, value in items for place in ((tree, key), *places(value))]


def mutated(tree: object, rng: random.Random, odd: list = ODD) -> object:
    """A copy of a tree with one to three changes."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = places(tree)
        if not found or rng.random() < 0.02:
            return copy.deepcopy(rng.choice(odd))
        container, key = rng.choice(found)
        other = copy.deepcopy(rng.choice(odd) if rng.random() < 0.7 else (lambda c, k: c[k])(*rng.choice(found)))
        change = rng.randrange(8)
        if change == 0:
            del container[key]
        elif change == 1 and isinstance(container, list):
            container.insert(key, other)
        elif change == 1:
            container[rng.choice(("a", "", "id", "boxes", "image", "kind", "source", "\n"))] = other
        elif change == 2:
            container[key] = [container[key]]
        elif change == 3 and type(container[key]) in (int, float) and abs(container[key]) < 1e300:
            container[key] = container[key] * rng.choice((-1, 0, 0.1, 2, 1000)) + rng.choice((-1, 0, 0.5, 1))
        else:
            container[key] = other
    return tree


def as_json(tree: object, rng: random.Random) -> str:
    depth = rng.choice((50, 300, 900, 940, 960, 980, 100_000))
    return json.dumps(tree).replace(f'"{DEEP}"', "[" * depth + "]" * depth)


# ---- the kinds: each takes a folder and a random generator, and reads what it has made


def rows(folder: Path, rng: random.Random) -> None:
    """Rows of JSON Lines and of official files."""
    row = {"image": "a.jpg", "expressions": ["the dog", "a dog"], "boxes": [[1, 2, 30, 40]], "width": 64, "height": 48}
    official = {"image_id": 3, "expressions": ["the dog"], "bbox": [1, 2, 30, 40], "width": 64, "height": 48}
    target = {"category_id": 1}
    grec = {**official, "bbox": [[[1, 2, 30, 40]]], "annotations": [[target]], "data_source": "vg"}
    lines = [row, {**row, "boxes": [[[1, 2, 3, 4]], []], "kind": "a", "source": "vg"}, official, grec]
    settings = {"images": str(folder / "{:012d}.jpg"), "sources": {"vg": f"{folder}/vg/{{}}.jpg"}}
    if rng.random() < 0.2:
        settings["images"] = f"{folder}/{rng.choice([odd for odd in ODD if isinstance(odd, str)])}"
    if rng.random() < 0.5:
        name = "train.jsonl"
        text = "\n".join(as_json(mutated(line, rng) if rng.random() < 0.5 else line, rng) for line in lines)
    else:
        name, text = "instances.json", as_json(mutated({"train": lines, "val": [official]}, rng), rng)
    (folder / name).write_text(text)
    for each in data.expand(data.read_rows({**settings, "annotations": str(folder / name)}, "train")):
        for box in each.boxes:
            if each.size and max(each.size) < 1e9:
                clipped = data.clip_boxes([box], *each.size)
                assert (clipped[:, 2:] > clipped[:, :2]).all(), (box, each.size)


def write_transvg(folder: Path) -> list[str]:
    lines = [[line[1], f"{line[2]}.pth", *line[3:], []] for line in layouts.lines()]
    layouts.write_legacy_pth(folder / "unc_val.pth", lines)
    layouts.write_legacy_pth(folder / "flickr_test.pth", [["5.jpg", [1, 2, 31, 42], "bride"]])
    return ["unc_val.pth", "flickr_test.pth"]


def write_reclip(folder: Path) -> list[str]:
    row = {"file_name": "a.jpg", "ann_id": 3, "anns": [{"id": 3, "bbox": [1, 2, 3, 4]}], "sentences": [{"sent": "x"}]}
    (folder / "reclip_val.jsonl").write_text(json.dumps(row))
    return ["reclip_val.jsonl"]


WRITERS = [
    *(*layouts.LAYOUTS, layouts.write_grefs, layouts.write_mdetr_grec, layouts.write_simvg_grec),
    *(write_transvg, write_reclip),
]


def foreign(folder: Path, rng: random.Random) -> None:
    """Files of every layout that `data.py convert` reads; what it writes must be read by training."""
    names = rng.choice(WRITERS)(folder)
    path = folder / rng.choice([*names, "instances.json"] if (folder / "instances.json").exists() else names)
    content = path.read_bytes()
    if path.suffix in (".p", ".pth") and rng.random() < 0.5:  # a pickle's own bytes
        content = bytearray(content)
        for _ in range(rng.choice((1, 2, 5))):
            content[rng.randrange(len(content))] = rng.choice((rng.randrange(256), *b"0123456789NRo}]()tq.rj"))
        path.write_bytes(content)
    elif path.suffix == ".p":
        path.write_bytes(pickle.dumps(mutated(pickle.loads(content), rng), protocol=rng.choice((0, 2))))
    elif path.suffix == ".pth":
        with open(path, "rb") as file:
            parts = [pickle.load(file) for _ in range(4)]
        layouts.write_legacy_pth(path, mutated(parts[3], rng))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(as_json(mutated(json.loads(line), rng), rng) for line in content.splitlines()))
    else:
        path.write_text(as_json(mutated(json.loads(content), rng), rng))
    with redirect_stdout(StringIO()):
        data.convert([str(folder / name) for name in names], str(folder / "out" / "{split}.jsonl"), None)
    for written in (folder / "out").iterdir():
        settings = {"annotations": str(written), "images": "{}.jpg", "sources": {}}
        for line in written.read_text().splitlines():
            if source := json.loads(line).get("source"):
                settings["sources"][source] = "{}.jpg"
        try:
            data.read_rows(settings, written.stem)
        except (data.InputError, models.CheckpointError) as error:
            raise AssertionError(f"convert wrote what training refuses: {error}") from None


@cache
def recipes() -> dict:
    entries = json.loads((ROOT / "configs.json").read_text())
    names = ("default", "data-shapes", "data-shapes-grec", "shapes", "shapes-grec", "shapes-stage2-steps")
    return {name: entries[name] for name in (*names, "shapes-grec-stage2", "decoder-only", "shapes-stage1")} | {
        "shapes-stage1-steps": entries["shapes-stage1-steps"]
    }


def configs(folder: Path, rng: random.Random) -> None:
    """configs.json files."""
    part = mutated(recipes(), rng)
    if rng.random() < 0.5:  # else most changes would fall on `default`
        part = recipes() | {"shapes-grec": mutated(recipes()["shapes-grec"], rng)}
        part["data-shapes"] = mutated(part["data-shapes"], rng)
    (folder / "configs.json").write_text(as_json(part, rng))
    check_config(data.load_config(f"{folder}/configs.json:{rng.choice(('shapes', 'shapes-grec-stage2', 'default'))}"))


def settings(folder: Path, rng: random.Random) -> None:
    """Values of --set."""
    del folder
    config = data.load_config(f"{ROOT}/configs.json:default")
    section = rng.choice(list(config))
    key = rng.choice(list(config[section]))
    value = mutated([config[section][key]], rng)
    value = value[0] if isinstance(value, list) and value else value
    text = value if isinstance(value, str) and rng.random() < 0.5 and value != DEEP else as_json(value, rng)
    texts = [f"{section}.{key}={text}", f"{section}.{key}{text}", f"{section}.{key}.{text}=1", text]
    text = rng.choices(texts, (20, 1, 1, 1))[0]
    check_config(data.load_config(f"{ROOT}/configs.json:{rng.choice(('refcoco', 'shapes-grec'))}", [text]))


def check_config(config: dict) -> None:
    """What was accepted can be used: the schedule, the micro-batches, the file names of annotations."""
    train_settings, default = config["train"], data.load_config(f"{ROOT}/configs.json:default")
    assert all(keys.keys() <= config[section].keys() for section, keys in default.items())
    json.dumps(config, allow_nan=False)
    schedule = [train_settings[name] for name in ("warmup_epochs", "decay_epochs", "decay_factor", "epochs")]
    for epoch in (0, train_settings["epochs"] - 1):
        assert 0 <= train.lr_factor(epoch, *schedule) <= 1
    train.micro_batch(train_settings["batch_size"], train_settings["micro_batch"], 1)
    for split in config["data"]["eval_splits"]:
        config["data"]["annotations"].replace("{split}", split)
    if max(config["model"].values()) <= 1000:
        with torch.device("meta"):
            models.SimVG(**config["model"])


TENSORS = [torch.zeros(0), torch.zeros(3), torch.zeros(3, dtype=torch.int64), torch.tensor(math.nan), torch.zeros(2, 2)]
TENSORS += [torch.zeros(2, 2, 2).to_sparse(), torch.zeros(5, dtype=torch.complex64), torch.empty(3, device="meta")]
FAR_LAYERS = [f"head.transformer.decoder.layers.{n}.norms.0.weight" for n in (7, 10**9)]


@cache
def made() -> dict[str, dict]:
    """A checkpoint of each kind, small, and the run that wrote `last.pt`."""
    config = data.load_config(f"{ROOT}/configs.json:shapes") | {"model": TINY}
    state = train.build(config, Path("runs/mutate"), 0, 1, torch.device("cpu"))
    parts = {"model": state.model.state_dict(), "ema": {}, "config": config}
    last = {**parts, "optimizer": state.optimizer.state_dict(), "scaler": state.scaler.state_dict()}
    last |= {**state.progress, "metrics": '{"split": "train"}\n'}
    encoder = {
        f"beit3.{name.removeprefix('vis_enc.beit3.')}": value
        for name, value in official_state().items()
        if name.startswith("vis_enc.beit3.")
    }
    return {
        "last": last,
        "best": {**parts, **state.progress},
        "official": {"state_dict": official_state(), "meta": {"epoch": 1}},
        "averaged": {"state_dict": {}, "ema_state_dict": {f"module.{k}": v for k, v in official_state().items()}},
        "beit3": {"model": encoder},
    }


def checkpoints(folder: Path, rng: random.Random) -> None:
    """Checkpoints of this project, official ones and BEiT-3's, in every place that takes one."""
    kind = rng.choice(list(made()))
    state = mutated(made()[kind], rng, [odd for odd in ODD if odd != DEEP] + 4 * TENSORS)
    if isinstance(state, dict) and rng.random() < 0.1:
        weights = state.get("state_dict")
        if isinstance(weights, dict):
            weights[rng.choice(FAR_LAYERS)] = torch.zeros(3)
    path = folder / "last.pt"
    torch.save(state, path)
    use = rng.choice(("load", "initialise", "resume" if kind in ("last", "best") else "load"))
    if use == "load":
        models.load(path, **({} if kind in ("last", "best") else {"encoder_heads": 4}))
    elif use == "initialise":
        sizes = {**models.official_sizes(models.from_official(official_state())), "encoder_heads": 4}
        models.initialise(tiny_model() if kind in ("last", "best") else models.SimVG(**sizes), path)
    else:
        config = data.load_config(f"{ROOT}/configs.json:shapes") | {"model": TINY}
        state = train.build(config, folder, 0, 1, torch.device("cpu"))
        state.digests |= {"tokenizer": "", "rows": ""}
        if saved := train.read_saved(folder, config, True):
            train.restore(state, saved)


KINDS = {each.__name__: each for each in (rows, foreign, configs, settings, checkpoints)}


# ---- running them


def is_refusal(error: Exception) -> bool:
    """One line, of a class of the project's own."""
    ours = isinstance(error, ValueError) and type(error).__module__ in ("data", "model", "train", "evaluate", "beit3")
    return ours and str(error).isprintable() and 10 < len(str(error)) < 2000


def run(kind: str, cases: int, first: int = 0) -> Counter:
    """How many cases were accepted and refused. AssertionError for any other end, which names the case."""

    def too_long(*_):
        raise Hang

    ends, before = Counter(), signal.signal(signal.SIGALRM, too_long)
    try:
        for number in range(first, first + cases):
            signal.alarm(SECONDS)
            faulthandler.dump_traceback_later(3 * SECONDS, exit=True)  # where C code never returns
            try:
                with tempfile.TemporaryDirectory() as folder:
                    KINDS[kind](Path(folder), random.Random(f"{kind}/{number}"))
                ends["accepted"] += 1
            except (Exception, Hang) as error:
                if not is_refusal(error):
                    raise AssertionError(f"{kind}, case {number}: {type(error).__name__}: {error!s:.300}") from error
                ends["refused"] += 1
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)
    return ends


def main() -> None:
    parser = argparse.ArgumentParser(description="Mutated structures: accepted, or refused in one line.")
    parser.add_argument("--cases", type=int, default=200, help="of each kind (default: 200)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case (default: 0)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="default: all")
    parser.add_argument("--count", action="store_true", help="go on after a failure and count them by their errors")
    args = parser.parse_args()
    faulthandler.enable()
    torch.set_num_threads(1)
    failed = Counter()
    for kind in args.kinds:
        ends: Counter = Counter()
        for number in range(args.first, args.first + args.cases):
            try:
                ends += run(kind, 1, number)
            except AssertionError as error:
                if not args.count:
                    raise
                ends["failed"] += 1
                print(f"{error!s:.200}", flush=True)
                failed[f"{kind}: {str(error).partition(': ')[2]:.100}"] += 1
        print(
            f"{kind}: {args.cases:,} cases, " + ", ".join(f"{count:,} {end}" for end, count in ends.items()), flush=True
        )
    for message, count in failed.most_common(40):
        print(f"{count:5} {message}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
