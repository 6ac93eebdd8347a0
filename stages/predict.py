"""Predict the classes of new images with a trained model file, and nothing else."""

import argparse
import json
import sys
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd

from stages.data.arrays import ImageSpec
from stages.data.dataset import is_data_folder
from stages.data.images import ImageError, is_image_name, read_image
from stages.utils import cli
from stages.utils.cli import UserError

_CHUNK = 256  # images in memory at once


def predict(
    paths: str | Path | Iterable[str | Path], model: str | Path = "data/model.keras"
) -> pd.DataFrame:
    """Predict the class of images.

    Parameters
    ----------
    paths : path or iterable of paths
        Image files, and folders in which to look for images at any depth.
    model : path, default="data/model.keras"
        A model file of this pipeline; it knows its classes and how images are read for it.

    Returns
    -------
    predictions : DataFrame
        A row for each image: ``path``, ``predicted`` (class), ``confidence`` (its probability),
        ``p:<class>`` for each class, ``error`` (why an image could not be read, else empty).

    Raises
    ------
    UserError
        If a path is not there, a folder holds no image, or the model can't be used.
    """
    files = _find([paths] if isinstance(paths, str | Path) else paths)
    # TensorFlow takes seconds to import: not for --help, nor for a mistyped path.
    from stages.model import model_file
    from stages.model.inference import make_predict_fn

    network, reading = model_file.load(model)
    run = make_predict_fn(network)
    classes = np.array(reading.classes)
    blocks = []
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor() as readers:
        chunks = [files[start : start + _CHUNK] for start in range(0, len(files), _CHUNK)]
        for chunk in cli.progress(chunks, total=len(chunks), unit="chunk", label="predict"):
            images = list(readers.map(lambda file: _read(file, reading), chunk))
            good = np.array([not isinstance(image, str) for image in images])
            chances = np.full((len(chunk), len(classes)), np.nan)
            if good.any():
                chances[good] = run([np.stack([i for i in images if not isinstance(i, str)])])
            blocks.append((chances, ["" if ok else i for ok, i in zip(good, images, strict=True)]))
    chances = np.concatenate([block for block, _ in blocks])
    errors = [error for _, block in blocks for error in block]
    failed = np.array([bool(error) for error in errors])
    table = pd.DataFrame({"path": [str(file) for file in files]})
    table["predicted"] = np.where(failed, "", classes[np.nan_to_num(chances).argmax(1)])
    table["confidence"] = chances.max(1)
    shares = pd.DataFrame(chances, columns=[f"p:{name}" for name in classes])
    return pd.concat([table, shares], axis=1).assign(error=errors)


def _find(paths: Iterable[str | Path]) -> list[Path]:
    files: list[Path] = []
    mistakes = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(
                file
                for file in path.rglob("*")
                if is_image_name(file.name)
                and all(map(is_data_folder, file.relative_to(path).parts[:-1]))
                and file.is_file()
            )
            files += found
            if not found:
                mistakes.append(f"{path}: no images in this folder")
        elif path.exists():
            files.append(path)
        else:
            mistakes.append(f"{path}: no such file or folder")
    if mistakes or not files:
        raise UserError("\n".join(mistakes) or "no image was named")
    return files


def _read(file: Path, reading: ImageSpec) -> np.ndarray | str:
    """Read an image, or say why that can't be done."""
    try:
        return read_image(file, reading.image_shape[:2], reading.color_mode, reading.resize)
    except ImageError as error:
        return str(error)


def _ranked(table: pd.DataFrame, top: int | None) -> Iterator[tuple[str, str, list]]:
    """Yield path, error and the best classes with their probabilities, of each image."""
    chances = table.filter(regex="^p:")
    names = [name.removeprefix("p:") for name in chances.columns]
    for path, error, row in zip(table["path"], table["error"], chances.to_numpy(), strict=True):
        order = [] if error else np.argsort(-row, kind="stable")[:top]
        yield path, error, [(names[n], round(float(row[n]), 6)) for n in order]


def _print_table(table: pd.DataFrame, top: int | None) -> None:
    rows = [
        (path, error, [(" ".join(label.split()), chance) for label, chance in best])
        for path, error, best in _ranked(table, top or 3)
    ]
    wide = max(len(path) for path, _, _ in rows)
    name = max((len(name) for _, _, best in rows for name, _ in best), default=0)
    for path, error, best in rows:
        shares = "   ".join(f"{label:<{name}} {chance:6.1%}" for label, chance in best)
        print(f"{path:<{wide}}   {f'not read: {error}' if error else shares}")


def _print_csv(table: pd.DataFrame, top: int | None) -> None:
    if top:
        rows = []
        for path, error, best in _ranked(table, top):
            row = {"path": path}
            for place, (label, chance) in enumerate(best, 1):
                row |= {f"class_{place}": label, f"probability_{place}": chance}
            rows.append(row | {"error": error})
        table = pd.DataFrame(rows)
        table["error"] = table.pop("error")
    table.round(6).to_csv(sys.stdout, index=False, lineterminator="\n")


def _print_json(table: pd.DataFrame, top: int | None) -> None:
    entries = []
    for path, error, best in _ranked(table, top):
        entry = {"path": path}
        if error:
            entry["error"] = error
        else:
            entry |= {"predicted": best[0][0], "confidence": best[0][1]}
            entry["probabilities"] = dict(best)
        entries.append(entry)
    print(json.dumps(entries, indent=2, ensure_ascii=False))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, found {text!r}")
    return int(text)


def main() -> int:
    """Print the predictions that the command line asks for; status 1 if an image can't be read."""
    parser = argparse.ArgumentParser(
        prog="python -m stages.predict", description="Predict the classes of images."
    )
    parser.add_argument("paths", nargs="+", metavar="PHOTO_OR_FOLDER")
    parser.add_argument("--model", default="data/model.keras", help="default: %(default)s")
    parser.add_argument("--format", choices=("table", "csv", "json"), default="table")
    parser.add_argument(
        "--top", type=_positive, metavar="K", help="show the K best classes (table: 3, else all)"
    )
    arguments = parser.parse_args()
    table = predict(arguments.paths, arguments.model)
    show = {"table": _print_table, "csv": _print_csv, "json": _print_json}[arguments.format]
    show(table, arguments.top)
    return int((table["error"] != "").any())


if __name__ == "__main__":
    cli.run(main, "nothing was changed")
