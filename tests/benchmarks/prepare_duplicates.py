"""Near duplicates: how many are found, how many of planted ones, and a figure to judge by.

    python tests/benchmarks/prepare_duplicates.py FOLDER [PICTURE.png]

Takes up to 20,000 images of a dataset, draws 30 % of them as val and test, and searches. Then it
plants changed copies of 300 images and counts how many are found and how many of these are the
right picture. The figure shows pairs that were found among the dataset's own images: those that
are not the same picture are false.
"""

import io
import random
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from stages.data import dataset, duplicates, images

SIZE = (64, 64)


def saved(picture: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue()))


def resized(picture: Image.Image, by: float) -> Image.Image:
    size = max(1, round(picture.width * by)), max(1, round(picture.height * by))
    return picture.resize(size, Image.Resampling.BICUBIC)


def cropped(picture: Image.Image, by: float, chance: random.Random) -> Image.Image:
    across, down = max(1, round(picture.width * by)), max(1, round(picture.height * by))
    left, top = chance.randint(0, across), chance.randint(0, down)
    return picture.crop((left, top, picture.width - across + left, picture.height - down + top))


def changes(picture: Image.Image, chance: random.Random) -> dict[str, Image.Image]:
    return {
        **{f"saved at {quality}": saved(picture, quality) for quality in (50, 70, 90)},
        **{f"resized to {by:.0%}": resized(picture, by) for by in (0.5, 0.75, 1.5, 2)},
        **{f"cropped by {by:.0%}": cropped(picture, by, chance) for by in (0.02, 0.05)},
        **{f"brightness {by:.0%}": ImageEnhance.Brightness(picture).enhance(by)
           for by in (0.85, 1.15)},
    }  # fmt: skip


def thumbnail(picture: Image.Image) -> np.ndarray:
    return duplicates.thumbnail(images.resize_image(picture.convert("RGB"), SIZE, "crop"))


def main() -> None:
    chance = random.Random(0)
    found = dataset.find(sys.argv[1])
    files = [found.folder / path for path in found.paths]
    chance.shuffle(files)
    files = files[:20_000]
    thumbnails, planted = [], {}
    for number, file in enumerate(files):
        fitted = images.decode(file.read_bytes(), images.Preprocessing(SIZE, "crop")).fitted
        thumbnails.append(duplicates.thumbnail(fitted))
        if number < 300:
            whole = Image.open(file).convert("RGB")
            for name, changed in changes(whole, chance).items():
                planted.setdefault(name, []).append(thumbnail(changed))
    own = np.array(thumbnails)
    aside = np.arange(len(own)) < 0.3 * len(own)
    queries, targets = np.flatnonzero(~aside), np.flatnonzero(aside)
    begun = time.perf_counter()
    pairs = duplicates.find(own, queries, targets)
    print(
        f"{found.folder.name}: {len(own):,} images; {len(pairs.queries)} of {len(queries):,} in"
        f" train have a near duplicate in val or test ({time.perf_counter() - begun:.2f} s)"
    )
    for name, changed in planted.items():
        both = np.concatenate((own, changed))
        rows = np.arange(len(own), len(both))
        hits = duplicates.find(both, rows, np.arange(len(own)))
        right = (hits.targets == hits.queries - len(own)).sum()
        n = len(changed)
        print(f"  {name:16} found {len(hits.queries) / n:6.1%}, the right one {right / n:6.1%}")
    if len(sys.argv) > 2:
        page = Image.new("RGB", (8 * 210, 8 * 105), "white")
        for place, (one, other) in enumerate(
            zip(pairs.queries[:64], pairs.targets[:64], strict=True)
        ):
            for side, row in enumerate((one, other)):
                tile = Image.open(files[row]).convert("RGB").resize((100, 100))
                page.paste(tile, (place % 8 * 210 + side * 102, place // 8 * 105))
        page.save(sys.argv[2])


if __name__ == "__main__":
    main()
