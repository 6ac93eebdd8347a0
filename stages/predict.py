"""Predict the classes of new images with a trained model file; nothing else is needed."""

import argparse
import importlib.util
import io
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.data.arrays import ImageSpec
from stages.data.dataset import describe_skipped
from stages.data.listing import Skipped, list_images
from stages.data.reading import read_batches
from stages.deploy import onnx_model
from stages.deploy.onnx_model import PredictFn
from stages.display.notes import note_lines
from stages.report.figures import class_labels, explanation_figure, path_label
from stages.run import cli, environment
from stages.run.cli import UserError

_EXPORTED = "export/model.onnx"  # in the folder of the model file
_MAX_MISSING = 5  # paths that are named
_MAX_NAME = 200  # bytes of an image's name in that of its heatmap


def predict(
    paths: str | Path | Iterable[str | Path], model: str | Path = "data/model.keras"
) -> pd.DataFrame:
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
    found = _find_images([paths] if isinstance(paths, str | Path) else paths)
    return _predict(found, *_open_model(cli.expand_home(model)))


def _find_images(paths: Iterable[str | Path]) -> list[tuple[Path, str]]:
    """Return files, each with an empty string or the reason why it will not be read."""
    found: list[tuple[Path, str]] = []
    passed_over, in_folders, mistakes, missing = [], [], [], []
    for path in map(cli.expand_home, paths):
        if path.is_dir():
            images, skipped = list_images(path)
            found += images
            in_folders += [(str(image), str(path)) for image, _ in images]
            passed_over += [(*one, str(path)) for one in skipped]
            if not images:
                mistakes.append(f"{path}: no images in this folder")
        elif path.exists():
            found.append((path, ""))
        else:
            missing.append(path)
    mistakes += [cli.no_such("file or folder", path) for path in missing[:_MAX_MISSING]]
    if len(missing) > _MAX_MISSING:
        mistakes.append(f"and {len(missing) - _MAX_MISSING:,} more that are not there")
    lines = describe_skipped(
        pd.DataFrame(passed_over, columns=[*Skipped._fields, "class"]),
        pd.DataFrame(in_folders, columns=["path", "class"]),
    )
    told = [f"{name}: {line}" for name, line in lines.items()]
    if mistakes or not found:
        raise UserError("\n".join([*mistakes, *told]) or "no image was named")
    for line in told:
        print(line, file=sys.stderr)
    return found


def _open_model(path: Path) -> tuple[PredictFn, ImageSpec]:
    """Open a model with ONNX Runtime if it was exported, else with TensorFlow."""
    exported = path if path.suffix == ".onnx" else path.parent / _EXPORTED
    if exported == path or (
        exported.exists() and path.exists() and importlib.util.find_spec("onnxruntime")
    ):
        predict_fn, metadata = onnx_model.load(exported)
        if exported == path or metadata.get("model_md5") == onnx_model.model_md5(path):
            source = f"{exported}: image_spec"
            return predict_fn, ImageSpec.from_json(metadata.get("image_spec", ""), source)
        names = [cli.printable(name) for name in (exported, path)]
        print(
            f"{names[0]}: not used, since it was made from another model than {names[1]}, which is"
            " run by TensorFlow; `python -m stages export` renews it",
            file=sys.stderr,
        )
    environment.load_tensorflow()  # only now: an export and a mistyped path don't need it
    from stages.model import model_file
    from stages.model.inference import make_predict_fn

    network, spec = model_file.load(path)
    return make_predict_fn(network), spec


def _predict(found: list[tuple[Path, str]], predict_fn: PredictFn, spec: ImageSpec) -> pd.DataFrame:
    readings = []
    blocks = []
    for batch, images in read_batches(found, spec, "predict"):
        readings += batch
        block = np.full((len(batch), len(spec.classes)), np.nan)
        if len(images):
            block[[not reading.error for reading in batch]] = predict_fn([images])
        blocks.append(block)
    paths = [str(path) for path, _ in found]
    notes = np.array([reading.notes for reading in readings])
    for name, line in note_lines(notes, paths, spec.white_level).items():
        print(f"{name}: {line}", file=sys.stderr)
    probabilities = np.concatenate(blocks)
    errors = [reading.error for reading in readings]
    best = np.array(spec.classes, object)[probabilities.argmax(1)]
    columns = {
        "path": pd.Series(paths, dtype=object),  # names may be no valid UTF-8
        "predicted": np.where([not error for error in errors], best, ""),
        "confidence": probabilities.max(1),
    }
    columns |= {f"p:{name}": probabilities[:, n] for n, name in enumerate(spec.classes)}
    return pd.DataFrame(columns | {"error": errors})


def _check_explain(folder: Path, paths: Iterable[str], model: Path) -> None:
    """Make the folder for heatmaps, or raise a UserError if they can't be written there."""
    if model.suffix == ".onnx":
        raise UserError(f"{model}: --explain needs the Keras model that this was exported from")
    for path in map(cli.expand_home, paths):
        place = path if path.is_dir() else path.parent
        if folder.resolve() == place.resolve() or (
            path.is_dir() and folder.resolve().is_relative_to(place.resolve())
        ):
            raise UserError(
                f"{folder}: holds images to predict; choose another folder for --explain, or its"
                " heatmaps would be predicted next time"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"{folder}: can't write heatmaps there: {error.strerror}; --explain needs a folder"
        ) from None


def _explain(table: pd.DataFrame, model: Path, folder: Path) -> None:
    """Write each image that was read beside its heatmap."""
    environment.load_tensorflow()
    from stages.model import model_file
    from stages.report.heatmaps import make_heatmap_fn

    network, spec = model_file.load(model)
    heatmaps = make_heatmap_fn(network)
    labels = class_labels(spec.classes)
    read = table.assign(heatmap=_heatmap_names(table["path"]))[table["error"] == ""]
    paths, names, confidences = (list(read[key]) for key in ("path", "heatmap", "confidence"))
    best = read["predicted"].map(spec.classes.index).to_numpy()
    done = 0
    failed = []
    for batch, images in read_batches([(Path(path), "") for path in paths], spec, "explain"):
        pairs = list(enumerate(batch, done))
        failed += [f"{paths[row]} ({reading.error})" for row, reading in pairs if reading.error]
        rows = [row for row, reading in pairs if not reading.error]
        done += len(batch)
        maps = heatmaps(images, best[rows]) if rows else ()
        for row, image, heatmap in zip(rows, images, maps, strict=True):
            heading = (
                f"{labels[best[row]]} {confidences[row]:.1%}\n{path_label(paths[row])}, as the"
                " network sees it. Orange: evidence for this class (integrated gradients)."
            )
            try:
                explanation_figure(image, heatmap, heading, folder / names[row])
            except OSError as error:
                failed.append(f"{paths[row]} ({error.strerror})")
    written = cli.count(len(read) - len(failed), "heatmap")
    print(f"{written} in {cli.printable(folder)}", file=sys.stderr)
    if failed:
        raise UserError(f"{cli.count(len(failed), 'heatmap')} failed: {cli.list_names(failed)}")


def _heatmap_names(paths: Iterable[str]) -> list[str]:
    """Name the heatmaps ``a.jpg.png``, of a second a.jpg ``a.jpg 2.png``, whatever its case.

    File systems take names of 255 bytes, and less is left for one that is being written.
    """
    names: dict[str, str] = {}
    for path in paths:
        suffixes = itertools.chain([""], (f" {number}" for number in itertools.count(2)))
        stem = Path(path).name
        if len(os.fsencode(stem)) > _MAX_NAME:
            stem = os.fsencode(stem)[:_MAX_NAME].decode("utf-8", "ignore")
        choices = (f"{stem}{suffix}.png" for suffix in suffixes)
        name = next(name for name in choices if name.casefold() not in names)
        names[name.casefold()] = name
    return list(names.values())


def _best_classes(table: pd.DataFrame, top: int | None) -> list[dict[str, float]]:
    """Return the classes and probabilities of each image, the best first; none if unreadable."""
    shares = table.filter(regex="^p:")
    classes = [str(name).removeprefix("p:") for name in shares]
    values = shares.to_numpy()
    order = np.argsort(-values, axis=1, kind="stable")[:, :top]
    return [
        {} if error else {classes[n]: round(float(row[n]), 6) for n in best}
        for row, best, error in zip(values, order, table["error"], strict=True)
    ]


def _print_text(table: pd.DataFrame, top: int | None) -> None:
    best = [
        {cli.list_names([" ".join(name.split())]): share for name, share in shares.items()}
        for shares in _best_classes(table, top or 3)
    ]
    width = max((len(name) for shares in best for name in shares), default=0)
    answers = pd.Series(
        ["   ".join(f"{name:<{width}} {share:6.1%}" for name, share in one.items()) for one in best]
    )
    if "unsure" in table:
        answers = table["unsure"].map({True: "unsure   ", False: "         "}) + answers
    answers = answers.where(table["error"] == "", "not read: " + table["error"])
    paths = table["path"].map(lambda path: cli.list_names([path]))  # which escapes
    print(*paths.str.ljust(paths.str.len().max()) + "   " + answers, sep="\n")


def _print_csv(table: pd.DataFrame, top: int | None) -> None:
    if top:
        best = _best_classes(table, top)
        columns: dict[str, Any] = {"path": table["path"]}
        for rank in range(min(top, table.filter(regex="^p:").shape[1])):
            pairs = [list(shares.items())[rank] if shares else ("", np.nan) for shares in best]
            columns[f"class_{rank + 1}"] = [name for name, _ in pairs]
            columns[f"probability_{rank + 1}"] = [share for _, share in pairs]
        table = pd.DataFrame(columns | dict(table.filter(["unsure", "error"])))
    table.round(6).to_csv(sys.stdout, index=False, lineterminator="\n")


def _print_json(table: pd.DataFrame, top: int | None) -> None:
    """Print JSON with `json`: pandas fails over a path that is no valid UTF-8."""
    columns = ["predicted", "confidence", "unsure"]
    answers = table.filter(columns).round(6).to_dict("records")
    entries = [
        {"path": path} | ({"error": error} if error else answer | {"probabilities": shares})
        for path, error, answer, shares in zip(
            table["path"], table["error"], answers, _best_classes(table, top), strict=True
        )
    ]
    print(json.dumps(entries, indent=2, ensure_ascii=False))


def main(options: argparse.Namespace) -> int:
    """Print the predictions for the images on the command line; return 1 if one can't be read."""
    found = _find_images(options.paths)
    folder = None if options.explain is None else cli.expand_home(options.explain)
    model = cli.expand_home(options.model)
    if folder:
        _check_explain(folder, options.paths, model)
    predicted = table = _predict(found, *_open_model(model))
    if options.sort:  # the images that can't be read are last
        table = table.sort_values("confidence", kind="stable", ignore_index=True)
    if options.threshold:
        table.insert(len(table.columns) - 1, "unsure", table["confidence"] < options.threshold)
    if options.format != "table" and isinstance(sys.stdout, io.TextIOWrapper):
        # Whatever the locale says; names that are not UTF-8 stay as they are.
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    show = {"table": _print_text, "csv": _print_csv, "json": _print_json}[options.format]
    show(table, options.top)
    sys.stdout.flush()  # before the pictures, one of which may fail
    unreadable = int((table["error"] != "").sum())
    if unreadable:
        files = cli.count(len(table), "file")
        print(f"{unreadable:,} of {files} can't be read; the output says why", file=sys.stderr)
    if folder:
        _explain(predicted, model, folder)
    return int(unreadable > 0)


if __name__ == "__main__":
    raise SystemExit("run it as: python -m stages predict")
