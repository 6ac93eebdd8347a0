"""Near duplicates: how many are found, how many of planted ones, and a figure to judge by.

    python tests/benchmarks/prepare_duplicates.py FOLDER [PICTURE.png]

Takes up to 20,000 images of a dataset, draws 30 % of them as val and test, and searches. Then it
plants changed copies of 300 images and counts how many are found, looked up among the images or
the other way round, and how many lead to another picture. The figure shows pairs that were found
among the dataset's own images: those that are not the same picture are false. Goal, for
photographs: 91 % of the copies are found, and as many from the other side.
"""

import io
import random
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from stages.data import dataset, duplicates, images
from stages.data.images import THUMBNAIL_SIDE as SIDE


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


def captioned(picture: Image.Image) -> Image.Image:
    changed, size = picture.copy(), max(6, picture.height // 12)
    place = picture.width * 0.05, picture.height - 1.5 * size
    font = ImageFont.load_default(size)
    ImageDraw.Draw(changed).text(place, "© photo.example", fill="white", font=font)
    return changed


def bordered(picture: Image.Image, by: float) -> Image.Image:
    width, height = round(picture.width * by), round(picture.height * by)
    return ImageOps.expand(picture, (width, height), "white")


def changes(picture: Image.Image, chance: random.Random) -> dict[str, Image.Image]:
    return {
        **{f"saved at {quality}": saved(picture, quality) for quality in (50, 70, 90)},
        **{f"resized to {by:.0%}": resized(picture, by) for by in (0.5, 0.75, 1.5, 2)},
        **{f"cropped by {by:.0%}": cropped(picture, by, chance) for by in (0.02, 0.05, 0.1, 0.2)},
        "mirrored": ImageOps.mirror(picture),
        "mirrored, cropped by 10%": ImageOps.mirror(cropped(picture, 0.1, chance)),
        **{f"squeezed by {by}": picture.resize((round(picture.width * by), picture.height))
           for by in (1.1, 1.3, 1.5)},
        **{f"turned by {by}": picture.rotate(by * chance.choice((-1, 1)), Image.Resampling.BICUBIC)
           for by in (2, 5, 10)},
        "text added": captioned(picture),
        **{f"border of {by:.0%}": bordered(picture, by) for by in (0.05, 0.1)},
        **{f"brightness {by:.0%}": ImageEnhance.Brightness(picture).enhance(by)
           for by in (0.85, 1.15)},
    }  # fmt: skip


def thumbnail(picture: Image.Image) -> np.ndarray:
    return np.asarray(images.thumbnail(picture))


def main() -> None:
    chance = random.Random(0)
    folder = Path(sys.argv[1])
    files = [folder / path for path in dataset.find(folder)[0]["path"]]
    chance.shuffle(files)
    files = files[:20_000]
    thumbnails, planted = [], {}
    size = images.Preprocessing((128, 128), "crop")
    for number, file in enumerate(files):
        decoded = images.decode(file.read_bytes(), size, with_thumbnail=True)
        thumbnails.append(np.frombuffer(decoded.thumbnail, np.uint8).reshape(SIDE, SIDE))
        if number < 300:
            whole = Image.open(file).convert("RGB")
            for name, changed in changes(whole, chance).items():
                planted.setdefault(name, []).append(thumbnail(changed))
    own = np.array(thumbnails)
    aside = np.arange(len(own)) < 0.3 * len(own)
    queries, targets = np.flatnonzero(~aside), np.flatnonzero(aside)
    begun = time.perf_counter()
    pairs = duplicates.find_near(own, queries, targets)
    print(
        f"{folder.name}: {len(own):,} images; {len(pairs.queries)} of {len(queries):,} in"
        f" train have a near duplicate in val or test ({time.perf_counter() - begun:.2f} s)"
    )
    shares, others = [], 0
    for name, changed in planted.items():
        both = np.concatenate((own, changed))
        rows = np.arange(len(own), len(both))
        hits = duplicates.find_near(both, rows, np.arange(len(own)))
        back = duplicates.find_near(both, np.arange(len(changed)), rows)
        reverse = (back.queries == back.targets - len(own)).sum()
        right = (hits.targets == hits.queries - len(own)).sum()
        shares.append((right / len(changed), reverse / len(changed)))
        others += len(hits.queries) - right
        print(
            f"  {name:24} found {shares[-1][0]:6.1%}, from the other side {shares[-1][1]:6.1%};"
            f" another picture {len(hits.queries) - right}"
        )
    if len(sys.argv) > 2:
        page = Image.new("RGB", (8 * 210, 8 * 105), "white")
        for place, (one, other) in enumerate(
            zip(pairs.queries[:64], pairs.targets[:64], strict=True)
        ):
            for side, row in enumerate((one, other)):
                tile = Image.open(files[row]).convert("RGB").resize((100, 100))
                page.paste(tile, (place % 8 * 210 + side * 102, place // 8 * 105))
        page.save(sys.argv[2])
    found, reverse = np.mean(shares, axis=0)
    print(
        f"of all copies {found:.1%} are found, from the other side {reverse:.1%} (goal: 91 %);"
        f" {others} lead to another picture"
    )


if __name__ == "__main__":
    main()
