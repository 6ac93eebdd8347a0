"""Predict the classes of new images with a trained model file; nothing else is needed."""

import argparse
import functools
import itertools
import json
import sys
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.data.arrays import ImageSpec
from stages.data.dataset import is_data_folder
from stages.data.images import DARK_FRACTION, ImageError, is_image_name, read_image
from stages.utils import cli
from stages.utils.cli import UserError

_IMAGES_IN_MEMORY = 256


def predict(
    paths: str | Path | Iterable[str | Path], model: str | Path = "data/model.keras"
) -> pd.DataFrame:
    """Predict the classes of images.

    Parameters
    ----------
    paths : path or iterable of paths
        Image files, and folders in which to look for images at any depth.
    model : path, default="data/model.keras"
        A model file of this pipeline; its image spec says how images are read.

    Returns
    -------
    predictions : DataFrame
        A row for each image: ``path``, ``predicted`` (class), ``confidence`` (its probability),
        ``p:<class>`` for each class, ``error`` (why the image can't be read, else empty).

    Raises
    ------
    UserError
        If a path does not exist, a folder holds no image, or the model can't be used.
    """
    files = _find_images([paths] if isinstance(paths, str | Path) else paths)
    # Imported late: --help and a mistyped path need not wait seconds for TensorFlow.
    from stages.model import model_file
    from stages.model.inference import make_predict_fn

    network, spec = model_file.load(Path(model).expanduser())
    predict_fn = make_predict_fn(network)
    read = functools.partial(_read, spec=spec)
    chunks = [files[n : n + _IMAGES_IN_MEMORY] for n in range(0, len(files), _IMAGES_IN_MEMORY)]
    blocks, errors = [], []
    dark: list[str] = []
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor() as pool:
        for chunk in cli.progress(chunks, total=len(chunks), unit="chunk", label="predict"):
            images, reasons, is_dark = zip(*pool.map(read, chunk), strict=True)
            readable = [image for image in images if image is not None]
            block = np.full((len(chunk), len(spec.classes)), np.nan)
            if readable:
                block[[image is not None for image in images]] = predict_fn([np.stack(readable)])
            blocks.append(block)
            errors += reasons
            dark += itertools.compress(map(str, chunk), is_dark)
    _warn_of_dark_images(dark, spec.white_level)
    probabilities = np.concatenate(blocks)
    best = np.array(spec.classes)[np.nan_to_num(probabilities).argmax(1)]
    table = pd.DataFrame(
        {
            "path": [str(file) for file in files],
            "predicted": np.where([error != "" for error in errors], "", best),
            "confidence": probabilities.max(1),
        }
    )
    columns = pd.DataFrame(probabilities, columns=[f"p:{name}" for name in spec.classes])
    return pd.concat([table, columns], axis=1).assign(error=errors)


def _find_images(paths: Iterable[str | Path]) -> list[Path]:
    files: list[Path] = []
    mistakes = []
    for path in (Path(path).expanduser() for path in paths):
        if path.is_dir():
            images = sorted(
                file
                for file in path.rglob("*")
                if is_image_name(file.name)
                and all(map(is_data_folder, file.relative_to(path).parts[:-1]))
                and file.is_file()
            )
            files += images
            if not images:
                mistakes.append(f"{path}: no images in this folder")
        elif path.exists():
            files.append(path)
        else:
            mistakes.append(f"{path}: no such file or folder")
    if mistakes or not files:
        raise UserError("\n".join(mistakes) or "no image was named")
    return files


def _read(file: Path, spec: ImageSpec) -> tuple[np.ndarray | None, str, bool]:
    """Return the image, an empty string and whether it is dark, or None and why it can't be read.

    An image of more than 8 bits is dark if it has no value near the model's white level.
    """
    try:
        image, peak = read_image(file, spec)
        return image, "", 0 < peak <= spec.white_level * DARK_FRACTION
    except ImageError as error:
        return None, str(error), False


def _warn_of_dark_images(names: list[str], white_level: int) -> None:
    if names:
        print(
            f"WARNING: {len(names):,} images of more than 8 bits per channel look almost black to"
            f" this model, for which {white_level} is white: all their values are below a quarter"
            f" of it (the first: {names[0]}); save them on the scale of the training images",
            file=sys.stderr,
        )


def _best_classes(
    table: pd.DataFrame, top: int | None
) -> Iterator[tuple[str, str, list[tuple[str, float]]]]:
    """Yield each image's path, error, and classes with probabilities, the most probable first."""
    probabilities = table.filter(regex="^p:")
    names = [name.removeprefix("p:") for name in probabilities.columns]
    rows = probabilities.to_numpy()
    for path, error, row in zip(table["path"], table["error"], rows, strict=True):
        best = np.argsort(-row, kind="stable")[:top]
        yield path, error, [] if error else [(names[n], round(float(row[n]), 6)) for n in best]


def _print_table(table: pd.DataFrame, top: int | None) -> None:
    rows = [
        (path, error, [(" ".join(label.split()), share) for label, share in best])
        for path, error, best in _best_classes(table, top or 3)
    ]
    path_width = max(len(path) for path, _, _ in rows)
    label_width = max((len(label) for _, _, best in rows for label, _ in best), default=0)
    for path, error, best in rows:
        shares = "   ".join(f"{label:<{label_width}} {share:6.1%}" for label, share in best)
        print(f"{path:<{path_width}}   {f'not read: {error}' if error else shares}")


def _print_csv(table: pd.DataFrame, top: int | None) -> None:
    if top:
        rows = []
        for path, error, best in _best_classes(table, top):
            row: dict[str, Any] = {"path": path}
            for rank, (label, share) in enumerate(best, 1):
                row |= {f"class_{rank}": label, f"probability_{rank}": share}
            rows.append(row | {"error": error})
        table = pd.DataFrame(rows)
        table["error"] = table.pop("error")  # the last column, even if the first image has one
    table.round(6).to_csv(sys.stdout, index=False, lineterminator="\n")


def _print_json(table: pd.DataFrame, top: int | None) -> None:
    entries = []
    for path, error, best in _best_classes(table, top):
        entry: dict[str, Any] = {"path": path}
        if error:
            entry["error"] = error
        else:
            entry |= {"predicted": best[0][0], "confidence": best[0][1]}
            entry["probabilities"] = dict(best)
        entries.append(entry)
    print(json.dumps(entries, indent=2, ensure_ascii=False))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, found {text!r}")
    return int(text)


def main() -> int:
    """Print the predictions for the images on the command line; return 1 if one can't be read."""
    parser = argparse.ArgumentParser(
        prog="python -m stages.predict", description="Predict the classes of images."
    )
    parser.add_argument("paths", nargs="+", metavar="IMAGE_OR_FOLDER")
    parser.add_argument("--model", default="data/model.keras", help="default: %(default)s")
    parser.add_argument("--format", choices=("table", "csv", "json"), default="table")
    parser.add_argument(
        "--top", type=_positive, metavar="K", help="top K classes (default: 3 for table, else all)"
    )
    arguments = parser.parse_args()
    table = predict(arguments.paths, arguments.model)
    show = {"table": _print_table, "csv": _print_csv, "json": _print_json}[arguments.format]
    show(table, arguments.top)
    unreadable = int((table["error"] != "").sum())
    if unreadable:
        files = cli.count(len(table), "file")
        print(f"{unreadable:,} of {files} can't be read; the output says why", file=sys.stderr)
    return int(unreadable > 0)


if __name__ == "__main__":
    cli.run(main, on_interrupt="no file was written")
