"""Plant defects and shortcuts in a dataset; count what `python -m stages audit` finds of them.

    python tests/benchmarks/audit_images.py                                 # the digits
    python tests/benchmarks/audit_images.py --dataset data/flowers --images 3000 --seeds 3

Copies images, by seed, to a temporary folder, and spoils 20 of them with each of 12 defects. Then
it gives one class of a clean copy a shortcut: a pixel more of width, 30 % less brightness, another
file type or a border. What is found in the images as they are is told too: each is a false alarm or
a true finding, so look at them. CleanVision is run beside it where it is installed.

Goals, for photographs: recall of at least 0.9 at precision of at least 0.95, over all defects; each
shortcut found, and none in the images as they are; at most 5 CPU seconds for 1,000 photographs of
400 x 533 pixels. No defect and no shortcut is found in the digits as they are.
"""

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from stages.auditing import facts, quality, shortcuts
from stages.data import dataset
from stages.data.images import hash_bytes

PER_DEFECT = 20
THEIRS = {
    "low_information": ("blank", "low contrast"), "dark": ("dark", "blank"), "light": ("bright",),
    "blurry": ("blurred",), "odd_size": ("tiny",), "odd_aspect_ratio": ("odd shape",),
}  # fmt: skip
Change = Callable[[Image.Image, np.random.Generator], Image.Image]


def levels(change: Callable[[np.ndarray, np.random.Generator], np.ndarray]) -> Change:
    """Return a defect of an image from one of its levels."""

    def changed(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        values = change(np.asarray(image, float), rng)
        return Image.fromarray(values.clip(0, 255).round().astype(np.uint8))

    return changed


def plain(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(60, 200, 3) + rng.normal(0, 3, (*values.shape[:2], 1)) + 0 * values


def scaled(image: Image.Image, pixels: float, least: float) -> float:
    """Return a length given for an image of 400 pixels."""
    return max(least, pixels * min(image.size) / 400)


def blurred(radius: float) -> Change:
    return lambda image, _: image.filter(
        ImageFilter.GaussianBlur(scaled(image, radius, radius / 2))
    )


def moved(image: Image.Image, _: np.random.Generator) -> Image.Image:
    steps = range(round(scaled(image, 15, 4)))
    mean = np.mean([np.roll(np.asarray(image), step, 1) for step in steps], axis=0)
    return Image.fromarray(mean.round().astype(np.uint8))


def enlarged(image: Image.Image, _: np.random.Generator) -> Image.Image:
    small = image.resize((max(6, image.width // 8), max(6, image.height // 8)))
    return small.resize(image.size, Image.Resampling.BICUBIC)


def shrunk(image: Image.Image, _: np.random.Generator) -> Image.Image:
    side = min(28, max(image.size) // 5)
    return ImageOps.contain(image, (side, side))


def strip(image: Image.Image, _: np.random.Generator) -> Image.Image:
    top, height = image.height // 2, max(2, image.width // 8)
    return image.crop((0, top, image.width, top + height))


DEFECTS: dict[str, tuple[str, Change]] = {
    "one color, with noise": ("blank", levels(plain)),
    "black": ("blank", lambda image, _: Image.new("RGB", image.size)),
    "12 % of the light": ("dark", lambda image, _: ImageEnhance.Brightness(image).enhance(0.12)),
    "25 % of the light": ("dark", lambda image, _: ImageEnhance.Brightness(image).enhance(0.25)),
    "overexposed": ("bright", levels(lambda values, _: 255 - (255 - values) * 0.2)),
    "8 % of the contrast": (
        "low contrast",
        levels(lambda values, _: 128 + (values - values.mean()) * 0.08),
    ),
    "out of focus by 2 px": ("blurred", blurred(2)),
    "out of focus by 4 px": ("blurred", blurred(4)),
    "moved by 15 px": ("blurred", moved),
    "enlarged 8 times": ("blurred", enlarged),
    "28 px": ("tiny", shrunk),
    "strip 8:1": ("odd shape", strip),
}


def wider(image: Image.Image, _: np.random.Generator) -> Image.Image:
    return image.resize((image.width + 1, image.height), Image.Resampling.BICUBIC)


def framed(image: Image.Image, _: np.random.Generator) -> Image.Image:
    width = max(1, min(image.size) // 50)
    return ImageOps.expand(ImageOps.crop(image, width), width, (200, 30, 40))


SHORTCUTS: dict[str, tuple[str, Change | None]] = {
    "a pixel wider": ("size and shape", wider),
    "PNG among JPEG": ("file type and camera", None),
    "30 % darker": (
        "color and brightness",
        lambda image, _: ImageEnhance.Brightness(image).enhance(0.7),
    ),
    "a red border": ("color of the border", framed),
}


def opened(path: Path) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(path)).convert("RGB")


def listed(folder: Path, files: list[Path]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "path": [str(file.relative_to(folder)) for file in files],
            "digest": [hash_bytes(file.read_bytes()).hex() for file in files],
        }
    )


def spoil(files: list[Path], folder: Path, seed: int) -> pd.DataFrame:
    """Write the images as JPEG, the first ones spoiled; return path, digest and defect of each."""
    rng = np.random.default_rng(seed)
    defects = [name for name in DEFECTS for _ in range(PER_DEFECT)]
    defects += [""] * (len(files) - len(defects))
    written = []
    for number, (file, defect) in enumerate(zip(files, defects, strict=True)):
        image = opened(file)
        written.append(folder / f"{number:05d}.jpg")
        if defect:
            image = DEFECTS[defect][1](image, rng)
        image.save(written[-1], quality=92)
    return listed(folder, written).assign(defect=defects)


def found_by_cleanvision(folder: Path, table: pd.DataFrame) -> pd.DataFrame | None:
    """Return a column for each kind of CleanVision, by its defaults; None if not installed."""
    try:
        from cleanvision import Imagelab
    except ImportError:
        return None
    lab = Imagelab(data_path=str(folder))
    lab.find_issues({kind: {} for kind in THEIRS}, n_jobs=1, verbose=False)
    issues = lab.issues.set_index(lab.issues.index.map(lambda path: Path(path).name))
    return issues.loc[table["path"], [f"is_{kind}_issue" for kind in THEIRS]].set_axis(
        list(THEIRS), axis=1
    )


def score(table: pd.DataFrame, flagged: np.ndarray, wanted: tuple[str, ...]) -> dict:
    """Return how many are found, recall of the kinds and precision: the others are sound."""
    kind = table["defect"].map(lambda defect: DEFECTS[defect][0] if defect else "")
    is_wanted = kind.isin(wanted).to_numpy()
    return {
        "found": int(flagged.sum()),
        "recall": flagged[is_wanted].mean(),
        "precision": is_wanted[flagged].mean() if flagged.any() else np.nan,
    }


def plant_defects(files: list[Path], seed: int) -> dict:
    """Print what is found of each kind; return the score over all."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = spoil(files, folder, seed)
        found = quality.quality(facts.read_facts(table, folder))
        theirs = found_by_cleanvision(folder, table)
    kinds = np.full(len(table), "", object)
    kinds[found["row"]] = found["kind"]
    rows = {kind: score(table, kinds == kind, (kind,)) for kind in quality.KINDS}
    rows["all"] = score(table, kinds != "", quality.KINDS)
    if theirs is not None:
        for kind, wanted in THEIRS.items():
            rows[f"CleanVision: {kind}"] = score(table, theirs[kind].to_numpy(), wanted)
        flagged = theirs.any(axis=1).to_numpy()
        rows["CleanVision: all"] = score(table, flagged, quality.KINDS)
    print(pd.DataFrame(rows).T.round(3).to_string())
    right = kinds == table["defect"].map(lambda defect: DEFECTS[defect][0] if defect else "")
    recall = right[table["defect"] != ""].groupby(table["defect"]).mean()
    print(
        "found as its kind: " + ", ".join(f"{name} {share:.2f}" for name, share in recall.items())
    )
    return rows["all"]


def plant_shortcuts(files: list[Path], labels: np.ndarray, classes: list[str], seed: int) -> None:
    rng = np.random.default_rng(seed)
    chosen = int(rng.integers(len(classes)))
    for name, (group, change) in SHORTCUTS.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder, written = Path(temporary), []
            for number, (file, label) in enumerate(zip(files, labels, strict=True)):
                image, is_chosen = opened(file), label == chosen
                if is_chosen and change:
                    image = change(image, rng)
                kind = "png" if is_chosen and not change else "jpg"
                written.append(folder / f"{number:05d}.{kind}")
                image.save(written[-1], quality=92)
            found = shortcuts.shortcuts(
                facts.read_facts(listed(folder, written), folder), labels, classes
            )
        told = found[(found["class"] == classes[chosen]) & (found["facts"] == group)]
        text = f"found, recall {told['recall'].item():.2f}" if len(told) else "NOT FOUND"
        others = found.drop(told.index)
        text += f"; besides: {others.to_dict('records')}" if len(others) else ""
        print(f"shortcut of {classes[chosen]}, {name}: {text}")


def as_it_is(folder: Path, files: list[Path], labels: np.ndarray, classes: list[str]) -> None:
    table, start = listed(folder, files), time.process_time()
    read = facts.read_facts(table, folder)
    seconds, start = time.process_time() - start, time.process_time()
    found = quality.quality(read)
    told = shortcuts.shortcuts(read, labels, classes)
    rest = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"as they are: {len(found)} of poor quality, {len(told)} shortcuts; facts of 1,000 images"
        f" {1000 * seconds / len(table):.1f} CPU s, the rest {rest:.1f} CPU s; {peak >> 10} MB"
    )
    for row, kind in zip(found["row"], found["kind"], strict=True):
        print(f"  {kind}: {table['path'][row]}")
    for _, row in told.iterrows():
        print(f"  {shortcuts.describe(row)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", type=Path, default=Path("data/digits"))
    parser.add_argument("--images", type=int, default=3000, help="drawn from the dataset")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    os.environ["PREPARE_WORKERS"] = "1"  # so that time and memory are those of this process
    every = dataset.find(options.dataset)[0]
    classes = sorted(every["class"].unique())
    scores = []
    for seed in range(options.seeds):
        rows = np.random.default_rng(seed).permutation(len(every))[: options.images]
        files = [options.dataset / path for path in every["path"].iloc[rows]]
        labels = every["class"].iloc[rows].map(classes.index).to_numpy(int)
        print(f"\n{options.dataset}, {len(files):,} images, seed {seed}", flush=True)
        as_it_is(options.dataset, files, labels, classes)
        scores.append(plant_defects(files, seed))
        plant_shortcuts(files, labels, classes, seed)
    mean = pd.DataFrame(scores).mean()
    print(
        f"\nover all defects: recall {mean['recall']:.3f} (goal: 0.9 for photographs),"
        f" precision {mean['precision']:.3f} (goal: 0.95)"
    )


if __name__ == "__main__":
    main()
