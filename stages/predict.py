"""Predict the classes of new images with a trained model file; nothing else is needed."""

import argparse
import csv
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from stages.data.arrays import ImageSpec
from stages.data.dataset import list_images
from stages.data.images import DARK_FRACTION, ImageError, read_image
from stages.deploy import onnx_model
from stages.report.figures import class_labels, explanation_figure, path_label
from stages.run import cli, environment
from stages.run.cli import UserError

if TYPE_CHECKING:
    import pandas as pd  # half a second to import, which the command does without

_IMAGES_IN_MEMORY = 256
_EXPLAINED_AT_ONCE = 32
_EXPORTED = "export/model.onnx"  # in the folder of the model file

PredictFn = Callable[[Iterable[np.ndarray]], np.ndarray]


class Predictions(NamedTuple):
    """The predictions for n images.

    Attributes
    ----------
    paths : list of str
    classes : list of str
    probabilities : float array of shape (n, classes)
        NaN for an image that can't be read.
    errors : list of str
        Why an image can't be read; empty if it can.
    """

    paths: list[str]
    classes: list[str]
    probabilities: np.ndarray
    errors: list[str]


def predict(
    paths: str | Path | Iterable[str | Path], model: str | Path = "data/model.keras"
) -> "pd.DataFrame":
    """Predict the classes of images.

    Parameters
    ----------
    paths : path or iterable of paths
        Image files, and folders in which to look for images at any depth.
    model : path, default="data/model.keras"
        A model file of this pipeline, or a model.onnx that `stages.export` wrote; its image spec
        says how images are read. If ONNX Runtime is installed and ``export/model.onnx`` beside the
        model file was made from it, that is used: it answers the same and starts faster.

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
    import pandas as pd

    found = _find_images([paths] if isinstance(paths, str | Path) else paths)
    header, *rows = _rows(_predict(found, *_load(cli.expand_home(model))))
    return pd.DataFrame(rows, columns=header)


def _predict(found: list[tuple[Path, str]], predict_fn: PredictFn, spec: ImageSpec) -> Predictions:
    read = functools.partial(_read, spec=spec)
    chunks = [found[n : n + _IMAGES_IN_MEMORY] for n in range(0, len(found), _IMAGES_IN_MEMORY)]
    blocks = []
    errors: list[str] = []
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
            dark += itertools.compress((str(path) for path, _ in chunk), is_dark)
    _warn_of_dark_images(dark, spec.white_level)
    names = [str(path) for path, _ in found]
    return Predictions(names, spec.classes, np.concatenate(blocks), errors)


def _explain(predictions: Predictions, model: Path, folder: Path) -> None:
    """Write a picture for each image that was read: the image beside its heatmap."""
    environment.load_tensorflow()
    from stages.model import model_file
    from stages.report.heatmaps import heatmaps

    network, spec = model_file.load(model)
    names, labels = _picture_names(predictions.paths), class_labels(predictions.classes)
    best, confidences = predictions.probabilities.argmax(1), predictions.probabilities.max(1)
    rows = np.flatnonzero([not error for error in predictions.errors])
    chunks = [rows[n : n + _EXPLAINED_AT_ONCE] for n in range(0, len(rows), _EXPLAINED_AT_ONCE)]
    for chunk in cli.progress(chunks, total=len(chunks), unit="chunk", label="explain"):
        with warnings.catch_warnings(action="ignore"):
            images = [read_image(Path(predictions.paths[row]), spec)[0] for row in chunk]
        maps = heatmaps(network, np.stack(images), best[chunk])
        for row, image, heatmap in zip(chunk, images, maps, strict=True):
            heading = (
                f"{labels[best[row]]} {confidences[row]:.1%}\n{path_label(predictions.paths[row])},"
                " as the network sees it. Orange: the parts that speak for this class."
            )
            explanation_figure(image, heatmap, heading, folder / names[row])
    print(f"{cli.count(len(rows), 'picture')} in {folder}", file=sys.stderr)


def _picture_names(paths: Iterable[str]) -> list[str]:
    """Return a name for the picture of each path: ``a.jpg.png``, of a second a.jpg ``a.jpg 2.png``.

    They differ in more than upper and lower case, which some file systems do not tell apart.
    """
    names: dict[str, str] = {}
    for path in paths:
        suffixes = itertools.chain([""], (f" {number}" for number in itertools.count(2)))
        choices = (f"{Path(path).name}{suffix}.png" for suffix in suffixes)
        name = next(name for name in choices if name.casefold() not in names)
        names[name.casefold()] = name
    return list(names.values())


def _check_explain(folder: Path, paths: Iterable[str], model: Path) -> None:
    """Make the folder for pictures, or raise a UserError if they can't be made or written there."""
    if model.suffix == ".onnx":
        raise UserError(f"{model}: --explain needs the Keras model that this was exported from")
    for path in map(cli.expand_home, paths):
        place = path if path.is_dir() else path.parent
        if folder.resolve() == place.resolve() or (
            path.is_dir() and folder.resolve().is_relative_to(place.resolve())
        ):
            raise UserError(
                f"{folder}: holds images to predict; choose another folder for --explain, or its"
                " pictures would be predicted next time"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"{folder}: can't write pictures there: {error.strerror}; --explain needs a folder"
        ) from None


def _load(path: Path) -> tuple[PredictFn, ImageSpec]:
    """Open a model with ONNX Runtime if it was exported, else with TensorFlow."""
    exported = path.parent / _EXPORTED
    if path.suffix == ".onnx" or _is_fresh(exported, path):
        used = path if path.suffix == ".onnx" else exported
        predict_fn, metadata = onnx_model.load(used)
        if path == used or metadata.get("model_md5") == _md5(path):
            source = f"{used}: image_spec"
            return predict_fn, ImageSpec.from_json(metadata.get("image_spec", ""), source)
    environment.load_tensorflow()  # only now: an export and a mistyped path don't need it
    from stages.model import model_file
    from stages.model.inference import make_predict_fn

    network, spec = model_file.load(path)
    return make_predict_fn(network), spec


def _is_fresh(exported: Path, model: Path) -> bool:
    return exported.exists() and model.exists() and bool(importlib.util.find_spec("onnxruntime"))


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def _find_images(paths: Iterable[str | Path]) -> list[tuple[Path, str]]:
    """Return files, each with an empty string or the reason why it will not be read."""
    found: list[tuple[Path, str]] = []
    mistakes = []
    for path in map(cli.expand_home, paths):
        if path.is_dir():
            images = list_images(path)
            found += images
            if not images:
                mistakes.append(f"{path}: no images in this folder")
        elif path.exists():
            found.append((path, ""))
        else:
            mistakes.append(f"{path}: no such file or folder")
    if mistakes or not found:
        raise UserError("\n".join(mistakes) or "no image was named")
    return found


def _read(found: tuple[Path, str], spec: ImageSpec) -> tuple[np.ndarray | None, str, bool]:
    """Return the image, an empty string and whether it is dark, or None and why it is not read.

    An image of more than 8 bits is dark if it has no value near the model's white level.
    """
    path, reason = found
    if reason:
        return None, reason, False
    try:
        image, peak = read_image(path, spec)
        return image, "", 0 < peak <= spec.white_level * DARK_FRACTION
    except ImageError as error:
        return None, str(error), False


def _warn_of_dark_images(names: list[str], white_level: int) -> None:
    if names:
        print(
            f"WARNING: almost black to this model, for which {white_level} is white:"
            f" {cli.count(len(names), 'image')} of more than 8 bits per channel with no value above"
            f" a quarter of it (the first: {names[0]}); save them on the scale of the training"
            " images",
            file=sys.stderr,
        )


def _rows(predictions: Predictions) -> Iterator[list[Any]]:
    """Yield the header and a row for each image, as `predict` returns them."""
    yield [
        "path",
        "predicted",
        "confidence",
        *(f"p:{name}" for name in predictions.classes),
        "error",
    ]
    for path, row, error in zip(
        predictions.paths, predictions.probabilities.tolist(), predictions.errors, strict=True
    ):
        best = "" if error else predictions.classes[int(np.argmax(row))]
        yield [path, best, max(row), *row, error]


def _best_classes(
    predictions: Predictions, top: int | None
) -> Iterator[tuple[str, str, list[tuple[str, float]]]]:
    """Yield each image's path, error, and classes with probabilities, the most probable first."""
    names = predictions.classes
    for path, row, error in zip(
        predictions.paths, predictions.probabilities, predictions.errors, strict=True
    ):
        best = np.argsort(-row, kind="stable")[:top]
        yield path, error, [] if error else [(names[n], round(float(row[n]), 6)) for n in best]


def _print_table(predictions: Predictions, top: int | None, threshold: float) -> None:
    rows = [
        (path, error, [(" ".join(label.split()), share) for label, share in best])
        for path, error, best in _best_classes(predictions, top or 3)
    ]
    path_width = max(len(path) for path, _, _ in rows)
    label_width = max((len(label) for _, _, best in rows for label, _ in best), default=0)
    for path, error, best in rows:
        shares = "   ".join(f"{label:<{label_width}} {share:6.1%}" for label, share in best)
        unsure = f"{'unsure' * (not error and best[0][1] < threshold):<6}   " if threshold else ""
        print(f"{path:<{path_width}}   {f'not read: {error}' if error else unsure + shares}")


def _print_csv(predictions: Predictions, top: int | None, threshold: float) -> None:
    rows = _rows(predictions)
    if top:
        number = min(top, len(predictions.classes))
        ranks = [(f"class_{rank}", f"probability_{rank}") for rank in range(1, number + 1)]
        table = [["path", *itertools.chain(*ranks), "error"]]
        for path, error, best in _best_classes(predictions, top):
            cells = itertools.chain(*best) if best else [""] * 2 * number
            table.append([path, *cells, error])
        rows = iter(table)
    output = csv.writer(sys.stdout, lineterminator="\n")
    confidences = predictions.probabilities.max(axis=1)
    for number, row in enumerate(rows):
        if threshold:
            row.insert(-1, bool(confidences[number - 1] < threshold) if number else "unsure")
        rounded = [round(cell, 6) if isinstance(cell, float) else cell for cell in row]
        output.writerow(["" if cell != cell else cell for cell in rounded])  # NaN


def _print_json(predictions: Predictions, top: int | None, threshold: float) -> None:
    entries = []
    for path, error, best in _best_classes(predictions, top):
        entry: dict[str, Any] = {"path": path}
        if error:
            entry["error"] = error
        else:
            entry |= {"predicted": best[0][0], "confidence": best[0][1]}
            if threshold:
                entry["unsure"] = best[0][1] < threshold
            entry["probabilities"] = dict(best)
        entries.append(entry)
    print(json.dumps(entries, indent=2, ensure_ascii=False))


def _by_uncertainty(predictions: Predictions) -> Predictions:
    """Put the images with the lowest confidence first, and those that can't be read last."""
    order = np.argsort(predictions.probabilities.max(axis=1), kind="stable")
    return predictions._replace(
        paths=[predictions.paths[n] for n in order],
        probabilities=predictions.probabilities[order],
        errors=[predictions.errors[n] for n in order],
    )


def main(options: argparse.Namespace) -> int:
    """Print the predictions for the images on the command line; return 1 if one can't be read."""
    found = _find_images(options.paths)
    folder = None if options.explain is None else cli.expand_home(options.explain)
    model = cli.expand_home(options.model)
    if folder:
        _check_explain(folder, options.paths, model)
    predictions = _predict(found, *_load(model))
    if folder:
        _explain(predictions, model, folder)
    if options.sort:
        predictions = _by_uncertainty(predictions)
    if options.format != "table" and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names that are not UTF-8 as they are
    show = {"table": _print_table, "csv": _print_csv, "json": _print_json}[options.format]
    show(predictions, options.top, options.threshold)
    unreadable = sum(map(bool, predictions.errors))
    if unreadable:
        files = cli.count(len(predictions.paths), "file")
        print(f"{unreadable:,} of {files} can't be read; the output says why", file=sys.stderr)
    return int(unreadable > 0)
