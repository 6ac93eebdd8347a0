"""Evaluate the model on the test split, or on a labelled folder: metrics, tables and figures.

Without a test split, the validation images are used. They served to choose epoch and temperature,
so the metrics are then marked ``in_sample`` and have no intervals.
"""

import argparse
import dataclasses
import itertools
import math
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pydantic import Field

from stages.data.arrays import ImageSpec, Split, read_index, read_split
from stages.data.labelled import NO_CLASS, read_folder
from stages.model import device, model_file
from stages.model.calibration import apply_temperature, log_loss
from stages.model.inference import make_predict_fn
from stages.report import tables
from stages.report.figures import class_labels, confusion_figure
from stages.report.grids import draw_mistakes, draw_samples, draw_suspects
from stages.report.heatmaps import heatmaps
from stages.report.metrics import (
    accuracy_by_coverage,
    averages,
    brier_score,
    clopper_pearson,
    confidence_threshold,
    confused_pairs,
    confusion_matrix,
    ece,
    label_suspects,
    reliability,
    top_k_accuracy,
)
from stages.report.page import write_scripts
from stages.run import cli
from stages.run.files import scratch_dir, stage_lock, write_csv, write_json
from stages.run.params import Parameters, read_dataset, read_section

if TYPE_CHECKING:
    import keras  # by itself it would import TensorFlow with all its log lines

_MAX_CURVES = 9  # precision-recall curves; more can't be told apart
_CHUNK = 128  # images read at once
_COMPARED = (  # in evaluate.json, which `dvc metrics` shows; the rest is in evaluate_details.json
    "in_sample", "accuracy", "accuracy_low", "accuracy_high", "balanced_accuracy", "f1_macro",
    "log_loss",
)  # fmt: skip


class Evaluate(Parameters):
    """The section `evaluate` of params.yaml, where each key is explained."""

    top_k: int = Field(5, ge=2)
    grid_images: int = Field(24, ge=1, le=200)


def evaluate(
    parameters: Evaluate,
    prepared: str | Path = "data/prepared",
    model: str | Path = "data/model.keras",
    metrics: str | Path = "metrics",
    dataset: str | Path = "",
) -> dict[str, Any]:
    """Evaluate a model on the val and test images; write metrics, tables and figures.

    Parameters
    ----------
    parameters : Evaluate
    prepared : path, default="data/prepared"
        The output of the prepare stage. Its training images are not read.
    model : path, default="data/model.keras"
        The output of the train stage.
    metrics : path, default="metrics"
        The folder to write to.
    dataset : path, default=""
        Where the images are from; ``summary.csv`` names it.

    Returns
    -------
    values : dict
        The content of ``evaluate.json`` and ``evaluate_details.json``.

    Raises
    ------
    UserError
        If there is no prepared data or no model, or the model was trained for other classes or
        for images of another form.
    """
    prepared, metrics, plots = Path(prepared), Path(metrics), Path(metrics, "plots")
    device.setup()
    spec, splits = _read_prepared(prepared)
    network, model_spec = model_file.load(model)
    _check_spec(model_spec, spec, model, prepared / "image_spec.json")
    classes = spec.classes

    all_probabilities = _predict(network, splits)
    index = read_index(prepared / "index.csv")
    all_images = tables.image_table(index, splits, all_probabilities)
    suspects = all_images.iloc[label_suspects(all_probabilities, all_images["label"].to_numpy())]
    evaluated = "test" if len(splits["test"]) else "val"
    is_evaluated = (all_images["split"] == evaluated).to_numpy()
    images, probabilities = all_images[is_evaluated], all_probabilities[is_evaluated]
    labels = images["label"].to_numpy()

    matrix = confusion_matrix(labels, probabilities.argmax(1), len(classes))
    uncalibrated = apply_temperature(probabilities, 1 / model_spec.temperature)
    values = _compute_metrics(probabilities, uncalibrated, labels, evaluated, parameters.top_k)
    coverage = accuracy_by_coverage(probabilities, labels)
    is_val = (all_images["split"] == "val").to_numpy()
    validation = all_probabilities[is_val], all_images["label"].to_numpy()[is_val]
    values |= _rejection(coverage, probabilities, labels, validation)
    per_class = tables.per_class(probabilities, labels, classes)
    hardest = per_class["average_precision"].dropna().sort_values(kind="stable").index.tolist()
    curves = tables.precision_recall(probabilities, labels, classes, hardest[:_MAX_CURVES])
    bins = reliability(probabilities, labels)
    if "in_sample" in values:
        per_class = per_class.drop(columns=["recall_low", "recall_high"])
        bins = bins.drop(columns=["low", "high"])
    summary = tables.summary(values, index, spec, str(dataset), network.count_params())

    compared = {key: value for key, value in values.items() if key in _COMPARED}
    details = {key: value for key, value in values.items() if key not in _COMPARED}
    square = pd.DataFrame(matrix, index=classes, columns=classes).rename_axis("true class")
    write_json(metrics / "evaluate.json", compared)
    write_json(metrics / "evaluate_details.json", details)
    write_csv(metrics / "summary.csv", summary)
    write_csv(metrics / "confusion_matrix.csv", square, index=True)
    write_csv(metrics / "per_class.csv", per_class.round(4))
    write_csv(metrics / "precision_recall.csv", curves.round(4))
    write_csv(metrics / "reliability.csv", bins.round(4))
    write_csv(metrics / "coverage.csv", coverage.round(4))
    write_csv(metrics / "predictions.csv", tables.predictions(images, probabilities, classes))
    write_csv(metrics / "mistakes.csv", tables.mistakes(images, classes))
    write_csv(metrics / "label_suspects.csv", tables.label_suspects(suspects, classes))

    pairs, names, count = confused_pairs(matrix), class_labels(classes), parameters.grid_images
    confusion_figure(matrix, pairs, names, tables.IMAGES_OF[evaluated], plots / "confusion.png")
    draw_samples(images, splits, names, count, plots / "samples.png")
    draw_mistakes(images, splits, names, count, partial(heatmaps, network), plots / "mistakes.png")
    draw_suspects(suspects, splits, names, count, plots / "suspects.png")
    _print_summary(values, per_class, matrix, _count_suspects(suspects, index), metrics)
    return values


def evaluate_folder(
    parameters: Evaluate,
    folder: str | Path,
    output: str | Path,
    prepared: str | Path = "data/prepared",
    model: str | Path = "data/model.keras",
) -> dict[str, Any]:
    """Evaluate a model on a folder with one sub-folder of images per class.

    Parameters
    ----------
    parameters : Evaluate
    folder : path
        Its images are read as the model needs them. Those that can't be used are left out and
        counted: unreadable ones, and those outside of a folder named like a class of the model.
    output : path
        The folder for what `evaluate` writes.
    prepared : path, default="data/prepared"
        If it is there, images that the model was trained with are counted, with a warning.
    model : path, default="data/model.keras"

    Returns
    -------
    values : dict
        As `evaluate` returns them.

    Raises
    ------
    UserError
        If there is no such folder or no image to evaluate, the output can't be written there, or
        the model can't be used.
    """
    folder, output = Path(folder), Path(output)
    _check_output(output, folder)
    _, spec = model_file.load(model)
    with tempfile.TemporaryDirectory(dir=scratch_dir("evaluate")) as temporary:
        index = read_folder(folder, spec, Path(temporary))
        values = evaluate(parameters, temporary, model, output, folder)
    if remarks := _remarks(index, spec.classes, Path(prepared) / "index.csv"):
        cli.summary(f"images of {folder}", remarks)
    return values


def _check_output(output: Path, folder: Path) -> None:
    """Raise a UserError if the results would mix with other files."""
    place = output.resolve()
    if place == Path("metrics").resolve() or place.is_relative_to(folder.resolve()):
        what = "the pipeline's own results" if place.name == "metrics" else "the images themselves"
        raise cli.UserError(f"{output}: this folder is for {what}; choose another one (--output)")
    if output.is_dir() and any(output.iterdir()) and not (output / "summary.csv").exists():
        raise cli.UserError(
            f"{output}: holds other files; expected a new folder, or one with earlier results of"
            " --on (--output)"
        )


def _remarks(index: pd.DataFrame, classes: list[str], trained: Path) -> dict[str, str]:
    """Return a line for each thing to know about a folder: what is missing, what was left out."""
    lines = {}
    reason = index["exclusion_reason"]
    if missing := sorted(set(classes) - set(index["class"][reason == ""])):
        lines["missing"] = (
            f"no images of {len(missing)} of {len(classes)} classes: {cli.list_names(missing)}"
        )
    if (unknown := reason == NO_CLASS).any():
        folders = sorted({path.partition("/")[0] for path in index["path"][unknown]})
        lines["left out"] = (
            f"{unknown.sum():,} outside of the model's classes: {cli.list_names(folders)}"
        )
    if (unread := (reason != "") & ~unknown).any():
        named = (index["path"] + " (" + reason + ")")[unread].tolist()
        lines["unreadable"] = f"{unread.sum():,}, left out: {cli.list_names(named)}"
    if trained.is_file():
        known = read_index(trained)
        digests = known["digest"][known["split"].isin(["train", "val"])]
        if seen := int(index["digest"][reason == ""].isin(digests).sum()):
            lines["WARNING"] = (
                f"{seen:,} of {(reason == '').sum():,} were seen in training or validation"
                f" ({trained}): the numbers are better than those on new images"
            )
    return lines


def _read_prepared(folder: Path) -> tuple[ImageSpec, dict[str, Split]]:
    try:
        spec = ImageSpec.read(folder / "image_spec.json")
        return spec, {name: read_split(folder / name) for name in ("val", "test")}
    except FileNotFoundError as error:
        advice = "no prepared data here yet; `dvc repro` runs the whole pipeline"
        raise cli.UserError(f"{error.filename}: {advice}") from None


def _check_spec(trained: ImageSpec, prepared: ImageSpec, model: str | Path, source: Path) -> None:
    """Raise a UserError if the model was trained for other classes or preprocessing."""
    for key, new in dataclasses.asdict(prepared).items():
        old = getattr(trained, key)
        difference = f"{key} {old}, not for {new} of {source}"
        if key == "classes":
            added, gone = _list_names(set(new) - set(old)), _list_names(set(old) - set(new))
            difference = f"{len(old)} classes, not for the {len(new)} of {source}"
            difference += f" (new: {added}; gone: {gone})"
        if old != new and key != "temperature":
            advice = "`dvc repro` trains one for these"
            raise cli.UserError(f"{model}: trained for {difference}; {advice}")


def _list_names(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:5]) or "none"
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _predict(network: "keras.Model", splits: Mapping[str, Split]) -> np.ndarray:
    """Return the probabilities of the images of all splits, one split after the other."""
    chunks = itertools.chain.from_iterable(split.batches(_CHUNK) for split in splits.values())
    total = sum(math.ceil(len(split) / _CHUNK) for split in splits.values())
    bar = cli.progress(chunks, total=total, unit="batch", label="evaluate")
    return make_predict_fn(network)(bar)


def _compute_metrics(
    probabilities: np.ndarray, uncalibrated: np.ndarray, labels: np.ndarray, split: str, top_k: int
) -> dict[str, Any]:
    """Return all metrics: flat, always in this order, to four decimals."""
    matrix = confusion_matrix(labels, probabilities.argmax(1), probabilities.shape[1])
    images, correct = len(labels), int(np.trace(matrix))
    values: dict[str, float] = {"accuracy": correct / images}
    if split == "test":
        values["accuracy_low"], values["accuracy_high"] = clopper_pearson(correct, images)
    values |= averages(matrix)
    if probabilities.shape[1] > top_k:
        values[f"top_{top_k}_accuracy"] = top_k_accuracy(probabilities, labels, top_k)
    values |= {
        "log_loss": log_loss(probabilities, labels),
        "log_loss_uncalibrated": log_loss(uncalibrated, labels),
        "brier_score": brier_score(probabilities, labels),
        "ece": ece(probabilities, labels),
        "ece_uncalibrated": ece(uncalibrated, labels),
    }
    rounded = {name: round(float(value), 4) for name, value in values.items()}
    in_sample = {} if split == "test" else {"in_sample": True}
    return {"split": split, "images": images, **in_sample, **rounded}


def _rejection(
    coverage: pd.DataFrame,
    probabilities: np.ndarray,
    labels: np.ndarray,
    validation: tuple[np.ndarray, np.ndarray],
) -> dict[str, float]:
    """Return what becomes of the accuracy if predictions of low confidence are not accepted.

    The threshold is chosen by `validation`: probabilities and labels of the validation images.
    """
    at_90 = coverage["accuracy"][coverage["coverage"] >= 0.9].iloc[0]
    values = {"accuracy_at_90_coverage": at_90}
    if len(validation[0]):
        threshold = confidence_threshold(*validation)
        accepted = probabilities.max(1) >= threshold
        right = (probabilities.argmax(1) == labels)[accepted]
        values |= {"threshold": threshold, "coverage": accepted.mean(), "accepted": len(right)}
        values |= {"accepted_accuracy": right.mean()} if len(right) else {}
    return {name: v if isinstance(v, int) else round(float(v), 4) for name, v in values.items()}


def _count_suspects(suspects: pd.DataFrame, index: pd.DataFrame) -> str:
    splits = index["split"][index["array_index"].notna()]
    training = splits == "train"
    text = f"{len(suspects):,} of {(~training).sum():,} held-out images"
    if not training.any():
        return text
    return f"{text}; the {training.sum():,} training images are not checked"


def _print_summary(
    values: Mapping[str, Any], per_class: pd.DataFrame, matrix: np.ndarray, suspects: str, out: Path
) -> None:
    images = f"{values['images']:,} {tables.IMAGES_OF[values['split']]}"
    note = f"{images}; optimistic: used to choose the epoch, since there is no test split"
    if "in_sample" not in values:
        low, high = values["accuracy_low"], values["accuracy_high"]
        note = f"95 % interval {low:.4f} to {high:.4f}, {images}"
    names = per_class["class"]
    confusions = [
        f"{names[true]!r} as {names[other]!r} ({matrix[true, other]} of {matrix[true].sum()})"
        for true, other in confused_pairs(matrix)[:3]
    ]
    worst = per_class.iloc[int(np.nanargmin(per_class["recall"]))]
    rows = {
        "accuracy": f"{values['accuracy']:.4f} ({note})",
        "confused most": ", ".join(confusions) or "none",
        "lowest recall": f"{worst['class']!r}: {worst['recall']:.1%} of {worst['support']}",
        "label suspects": suspects,
        "see": f"{out / 'plots'}, {out / 'mistakes.csv'}, {out / 'label_suspects.csv'}",
    }
    if "threshold" in values:
        rows["unsure"] = _describe_threshold(values)
    cli.summary("evaluate: done", rows)


def _describe_threshold(values: Mapping[str, Any]) -> str:
    """Say how many predictions a threshold accepts, and how many of these are right."""
    if values["threshold"] == 0:
        return "none: 99 % of the validation images are right, whatever the confidence"
    if "accepted_accuracy" not in values:
        return "all: no confidence is high enough for 99 % accuracy on validation"
    accepted = cli.count(values["accepted"], "prediction")
    return (
        f"{1 - values['coverage']:.1%} below a confidence of {values['threshold']}; the others:"
        f" {accepted}, {values['accepted_accuracy']:.1%} right (see predict --threshold)"
    )


def main(options: argparse.Namespace) -> None:
    """Run the stage as params.yaml says, or evaluate the model on another folder."""
    if options.output and options.on is None:
        raise cli.UserError("--output needs --on: dvc.yaml says what the stage itself writes")
    parameters = read_section(Evaluate, "evaluate")
    if options.on is not None:
        folder = cli.expand_home(options.on)
        output = options.output or Path("metrics", "on", folder.resolve().name)
        evaluate_folder(parameters, folder, cli.expand_home(output))
        return
    with stage_lock("evaluate"):
        evaluate(parameters, dataset=read_dataset())
        write_scripts("metrics/page/vega.js")
    page, other = "`dvc plots show --open`", "`python -m stages compare REVISION`"
    cli.summary("next steps", {"the plots, as a page": page, "compare with a version": other})
