"""CPU seconds of prepare: against a bare loop of Pillow, and after one per cent of new images.

    python tests/benchmarks/prepare_speed.py FOLDER [SIZE]

The folder is a dataset, the size 128 if it isn't given. A bare loop only reads, decodes (a JPEG at
a reduced scale) and resizes each image; the ratio tells what else prepare does: imports,
thumbnails, damage, the cache, near duplicates, arrays, figures. New images are some of the old
ones, rotated. All run in one process, three times, in turns; the medians of the ratios count.
"""

import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from stages.data import dataset
from stages.run import environment

BARE = """
import io, sys
from PIL import Image
size = int(sys.argv[1])
for path in sys.stdin.read().split("\\0"):
    with open(path, "rb") as file:
        picture = Image.open(io.BytesIO(file.read()))
    picture.draft(None, (3 * size // 2, 3 * size // 2))
    picture = picture.convert("RGB")
    short = min(picture.size)
    left, top = (picture.width - short) / 2, (picture.height - short) / 2
    box = left, top, picture.width - left, picture.height - top
    picture.resize((size, size), Image.Resampling.BICUBIC, box).tobytes()
"""
PREPARE = """
import sys
from stages.data.parameters import Prepare
from stages.prepare import prepare
size, data, out = int(sys.argv[1]), *sys.argv[2:]
prepare(Prepare(image_size=[size, size]), data, out + "/out", out + "/metrics", out + "/cache")
"""


def seconds(code: str, *words: object, given: str = "") -> float:
    """Return the CPU seconds of a program, by user and system."""
    before = os.times()
    subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        input=given,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PREPARE_WORKERS": "1"},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    after = os.times()
    return sum(after[2:4]) - sum(before[2:4])


def add_rotated(paths: list[str], folder: Path, seed: int) -> None:
    for path in random.Random(seed).sample(paths, len(paths) // 100):
        with Image.open(folder / path) as picture:
            place = (folder / path).with_name(f"new {seed} {Path(path).name}")
            picture.rotate(90 * (seed + 1)).save(place, picture.format)


def main() -> None:
    environment.setup()
    data, size = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 128
    paths = dataset.find(data)[0]["path"].tolist()
    files = "\0".join(str(data / path) for path in paths)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        out, grown = Path(name, "out"), Path(name, "grown")
        for seed in range(3):
            shutil.rmtree(grown, ignore_errors=True)
            shutil.copytree(data, grown)
            shutil.rmtree(out / "cache", ignore_errors=True)
            (out / "cache").mkdir(parents=True)
            bare = seconds(BARE, size, given=files)
            cold = seconds(PREPARE, size, grown, out)
            add_rotated(paths, grown, seed)
            more = seconds(PREPARE, size, grown, out)
            rows.append((cold / bare, more / cold))
            print(f"  bare loop {bare:.2f} s, prepare {cold:.2f} s, with 1 % more {more:.2f} s")
    cold, more = np.median(rows, axis=0)
    print(
        f"{len(paths):,} images at {size} x {size}: prepare takes {cold:.2f} times a bare loop"
        f" (goal: 1.5), and {more:.2f} of that with 1 % more (goal: 0.25)"
    )


if __name__ == "__main__":
    main()
