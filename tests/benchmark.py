"""Speed, always as a ratio to a plain baseline in the same run: python tests/benchmark.py loader

loader: images per second and worker process, from a JPEG of 640 x 480 to a training batch.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

import data


def photos(folder: Path, count: int = 32) -> list[dict]:
    """Pictures whose spectrum falls off like that of photographs, as JPEG of some 160 kB, and their rows."""
    rng, rows = np.random.default_rng(0), []
    for i in range(count):
        picture = np.zeros((480, 640, 3))
        for step in (1, 2, 4, 8, 16, 32, 64):
            noise = rng.normal(size=(480 // step + 1, 640 // step + 1, 3))
            picture += step**0.5 * np.kron(noise, np.ones((step, step, 1)))[:480, :640]
        picture = np.clip(128 + 60 * picture / picture.std(), 0, 255).astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{i}.jpg", quality=92)
        row = {"image": f"{i}.jpg", "expressions": ["the left one"], "boxes": [[50, 60, 200, 300]]}
        rows.append({**row, "width": 640, "height": 480})
    return rows


class PlainLoader:
    """The usual way: Pillow decodes and resizes, the worker normalises in float and sends floats."""

    def __init__(self, rows: list[data.Row], size: int):
        self.rows, self.size = rows, size
        self.mean, self.std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def __getitem__(self, keys: list[tuple[int, int]]) -> torch.Tensor:
        images = []
        for _, index in keys:
            with Image.open(self.rows[index].image) as file:
                image = file.convert("RGB").resize((self.size, self.size), Image.Resampling.BILINEAR)
            images.append((torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 - self.mean) / self.std)
        return torch.stack(images)


def rate(loader, images: int) -> float:
    """Images per second after the first batch."""
    iterator = iter(loader)
    next(iterator)
    began, batches = time.perf_counter(), 0
    for _ in iterator:
        batches += 1
    return batches * images / (time.perf_counter() - began)


def loader(size: int = 640, batch: int = 16, steps: int = 24) -> None:
    """The main process only receives; so this is what one worker process can feed."""
    with tempfile.TemporaryDirectory() as folder:
        rows = photos(Path(folder))
        kilobytes = sum(path.stat().st_size for path in Path(folder).iterdir()) / len(rows) / 1000
        (Path(folder) / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
        section = {"annotations": f"{folder}/{{split}}.jsonl", "images": folder, "sources": {}}
        rows = data.read_rows(section, "train")
        keys = [[(0, (s * batch + i) % len(rows)) for i in range(batch)] for s in range(steps)]

        def collate(examples: list) -> data.Batch:
            return data.Batch(torch.stack([e[0] for e in examples]), *[torch.zeros(1)] * 4, [e[3] for e in examples])

        def ours(jitter: tuple | None) -> float:
            return rate(data.batches(data.Dataset(rows, size, jitter=jitter), collate, keys, workers=1), batch)

        def plain() -> float:
            options = {"sampler": keys, "batch_size": None, "num_workers": 1, "prefetch_factor": 4}
            return rate(torch.utils.data.DataLoader(PlainLoader(rows, size), **options), batch)

        print(f"JPEG 640 x 480, {kilobytes:.0f} kB each, to batches of {batch} at {size} px, one worker process")
        rounds = [(plain(), ours(None), ours((0.3, 1.4))) for _ in range(3)]
    base, whole, jittered = np.median(rounds, axis=0)
    for name, value in (("plain, float32", base), ("here", whole), ("here, with jitter", jittered)):
        print(
            f"{name:20} {value:8.0f} images/s {value / base:8.2f} x    1,000 images/s need {1000 / value:.1f} workers"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["loader"])
    {"loader": loader}[parser.parse_args().what]()
