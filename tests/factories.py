"""Prepared arrays and a model for them, made in a moment: for tests of what comes after."""

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd

from stages.data import arrays
from stages.run.files import write_csv


def class_names(number: int) -> list[str]:
    """Sorted names, with what is hard to write and to draw among them."""
    odd = ['a,b "c"', "café noir", "co$t_x^2", "line\nbreak", "and\rback", "NA", "007", "猫", "犬"]
    return sorted([*odd, *(f"class {n:03d}" for n in range(number))][:number])


def make_files(root: Path, *paths: str) -> Path:
    """Make empty files, and folders for paths that end in a slash."""
    for path in paths:
        place = root / path
        if path.endswith("/"):
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(b"")
    return root


def make_prepared(
    root: Path,
    classes: list[str],
    counts: dict[str, int],
    *,
    size: tuple[int, int, int] = (8, 8, 1),
    seed: int = 0,
    wrong_labels: float = 0.0,
) -> dict[str, np.ndarray]:
    """Write data/prepared below `root`: a noisy picture of its class for each image.

    Returns, for each split, which rows have a label other than the picture's.
    """
    rng = np.random.default_rng(seed)
    patterns = _patterns(len(classes), size)
    folder = root / "data" / "prepared"
    shape = arrays.ImageSpec(classes, size, "rgb" if size[2] == 3 else "grayscale", "crop")
    shape.write(folder / "image_spec.json")
    tables, planted = [], {}
    for split in arrays.SPLITS:
        count = counts.get(split, 0)
        labels = rng.permutation(np.arange(count) % len(classes))
        images = np.clip(patterns[labels] + rng.normal(0, 90, (count, *size)), 0, 255)
        images = images.astype(np.uint8)
        digests = np.array([hashlib.sha256(image.tobytes()).hexdigest() for image in images], str)
        order = np.argsort(digests)
        images, labels, digests = images[order], labels[order], digests[order]
        planted[split] = rng.random(count) < wrong_labels
        labels = np.where(planted[split], (labels + 1) % len(classes), labels)
        (folder / split).mkdir(parents=True, exist_ok=True)
        if count:
            np.save(folder / split / "images-0000.npy", images)
            np.save(folder / split / "labels.npy", labels.astype(np.int32))
        names = [classes[label] for label in labels]
        paths = [f"{split} {digest[:12]}.png" for digest in digests]
        tables.append(
            pd.DataFrame({"path": paths, "class": names, "split": split, "digest": digests}).assign(
                exclusion_reason="", array_index=range(count)
            )
        )
    write_csv(folder / "index.csv", pd.concat(tables).sort_values("path"))
    return planted


def make_model(root: Path, classes: list[str], *, size=(8, 8, 1), temperature: float = 1.5) -> None:
    """Write data/model.keras below `root`: it compares an image with each class's pattern."""
    from stages.model import device, model_file

    device.setup()
    import keras

    patterns = _patterns(len(classes), size).reshape(len(classes), -1)
    inputs = keras.Input(size, dtype="uint8")
    flat = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(inputs))
    dense = keras.layers.Dense(len(classes), name="logits")
    model = keras.Model(inputs, keras.layers.Softmax()(dense(flat)))
    kernel = (patterns - patterns.mean(0)).T / 255
    bias = -0.5 * (kernel * (patterns + patterns.mean(0)).T / 255).sum(0)
    dense.set_weights([8 * kernel / temperature, 8 * bias / temperature])
    color_mode = "rgb" if size[2] == 3 else "grayscale"
    spec = arrays.ImageSpec(classes, size, color_mode, "crop", temperature)
    model_file.save(model, root / "data" / "model.keras", spec)


def _patterns(classes: int, size: tuple[int, int, int]) -> np.ndarray:
    return np.random.default_rng(42).uniform(60, 196, (classes, *size))
