"""Evaluate the model on the test split, or on a labeled folder: metrics, tables and figures.

Without a test split, the validation images are used. They served to choose epoch and temperature,
so the metrics are then marked ``in_sample`` and have no intervals.
"""

import argparse
import dataclasses
import itertools
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stages.data.arrays import ImageSpec, Split, read_index, read_split
from stages.data.corrections import DROPPED
from stages.data.labeled import read_folder
from stages.display import evaluation
from stages.display.parameters import check_parameters
from stages.model import device, model_file
from stages.model.calibration import apply_temperature, log_loss
from stages.model.features import Features, extract_features
from stages.model.parameters import Train
from stages.report import tables
from stages.report.binomial import clopper_pearson
from stages.report.figures import class_labels, confusion_figure
from stages.report.grids import label_error_gallery, mistake_gallery, sample_figure
from stages.report.heatmaps import make_heatmap_fn
from stages.report.label_errors import find_label_errors, find_neighbors, is_near_chance
from stages.report.metrics import (
    accuracy_by_coverage,
    averages,
    brier_score,
    confidence_threshold,
    confused_pairs,
    confusion_matrix,
    ece,
    reliability,
    top_k_accuracy,
)
from stages.report.outputs import feature_network, has_backbone, predict_both
from stages.report.page import write_scripts
from stages.report.parameters import Evaluate
from stages.report.verdict import next_step, verdict
from stages.run import cli
from stages.run.files import scratch_dir, stage_lock, write_csv, write_json
from stages.run.params import read_dataset, read_section, watch_inputs

if TYPE_CHECKING:
    import keras  # by itself it would import TensorFlow with all its log lines

_MAX_CURVES = 9  # precision-recall curves; more can't be told apart
_CHUNK = 128  # images read at once
_LABEL_ODDS = 50.0  # surer than for the audit, which judges with more images and by folds
_COMPARED = (  # in evaluate.json, which `dvc metrics` shows; the rest is in evaluate_details.json
    "in_sample", "accuracy", "accuracy_low", "accuracy_high", "accuracy_old_labels",
    "balanced_accuracy", "f1_macro", "log_loss",
)  # fmt: skip


def evaluate(
    parameters: Evaluate,
    prepared: str | Path = "data/prepared",
    model: str | Path = "data/model.keras",
    metrics: str | Path = "metrics",
    dataset: str | Path = "",
    train: Train | None = None,
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
    train : Train, optional
        The parameters of training, for a proposal of what to do next; by default there is none.

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
    environment = device.setup()
    spec, splits = _read_prepared(prepared)
    network, model_spec = model_file.load(model)
    _check_spec(model_spec, spec, model, prepared / "image_spec.json")
    index, classes = read_index(prepared / "index.csv"), spec.classes

    all_probabilities, vectors = _predict_splits(network, splits, prepared, environment)
    all_images = tables.image_table(index, splits, all_probabilities, classes)
    is_learned = _find_learned(all_images, index, prepared, model)
    if is_learned.any():
        index.loc[index["path"].isin(all_images["path"][is_learned]), "array_index"] = pd.NA
        all_images = all_images[~is_learned].reset_index(drop=True)
        all_probabilities, vectors = all_probabilities[~is_learned], vectors[~is_learned]
    all_labels = all_images["label"].to_numpy()
    is_unsure = is_near_chance(all_probabilities, all_labels)
    neighbors = find_neighbors(vectors)
    found = find_label_errors(all_probabilities, neighbors, all_labels, _LABEL_ODDS)
    errors = tables.label_errors(all_images, found)
    is_val = (all_images["split"] == "val").to_numpy()
    threshold = None
    if is_val.any():
        threshold = confidence_threshold(all_probabilities[is_val], all_labels[is_val])

    in_sample = not len(splits["test"])
    chosen = is_val if in_sample else ~is_val
    images, labels = all_images[chosen], all_labels[chosen]
    probabilities = all_probabilities[chosen]
    matrix = confusion_matrix(labels, probabilities.argmax(1), len(classes))
    uncalibrated = apply_temperature(probabilities, 1 / model_spec.temperature)
    coverage = accuracy_by_coverage(probabilities, labels)
    bins = reliability(probabilities, labels)
    scores = tables.class_table(matrix, probabilities, labels, classes)
    hardest = scores["average_precision"].dropna().sort_values(kind="stable").index.tolist()
    curves = tables.curve_table(probabilities, labels, classes, hardest[:_MAX_CURVES])
    values: dict[str, Any] = {
        "split": "val" if in_sample else "test",
        "images": len(labels),
        **({"in_sample": True} if in_sample else {}),
        **_compute_metrics(matrix, probabilities, uncalibrated, labels, parameters.top_k),
        **_correction_metrics(images, index),
        **_selective_metrics(coverage, probabilities, labels, threshold),
    }
    if in_sample:  # no interval holds for images that served to choose the epoch
        del values["accuracy_low"], values["accuracy_high"]
        scores = scores.drop(columns=["recall_low", "recall_high"])
        bins = bins.drop(columns=["low", "high"])
    summary = tables.summary_table(values, index, spec, str(dataset), network.count_params())
    listed = None if is_unsure else len(errors)
    sentences = verdict(values, scores, coverage, index, listed)
    if is_learned.any():
        sentences["left out"] = (
            f"{is_learned.sum():,} images of val and test that the backbone has learned from, or"
            " from a near duplicate of which"
        )
    if train:
        side = min(spec.image_shape[:2])
        sentences["next"] = next_step(values, scores, index, listed, train, side, str(dataset))

    compared = {key: value for key, value in values.items() if key in _COMPARED}
    details = {key: value for key, value in values.items() if key not in _COMPARED}
    square = pd.DataFrame(matrix, index=classes, columns=classes).rename_axis("true class")
    write_json(metrics / "evaluate.json", compared)
    write_json(metrics / "evaluate_details.json", details)
    write_csv(metrics / "verdict.csv", pd.DataFrame(sentences.items(), columns=["name", "value"]))
    write_csv(metrics / "summary.csv", summary)
    write_csv(metrics / "confusion_matrix.csv", square, index=True)
    write_csv(metrics / "per_class.csv", scores.round(4))
    write_csv(metrics / "precision_recall.csv", curves.round(4))
    write_csv(metrics / "reliability.csv", bins.round(4))
    write_csv(metrics / "coverage.csv", coverage.round(4))
    write_csv(metrics / "predictions.csv", tables.prediction_table(images, probabilities, classes))
    write_csv(metrics / "mistakes.csv", tables.mistake_table(images))
    write_csv(metrics / "label_errors.csv", tables.label_error_table(errors, classes))

    pairs, names, count = confused_pairs(matrix), class_labels(classes), parameters.grid_images
    explain = make_heatmap_fn(network)
    which = tables.IMAGES_OF[values["split"]]
    confusion_figure(matrix, pairs, names, which, plots / "confusion.png")
    sample_figure(images, splits, names, count, plots / "samples.png")
    mistakes = mistake_gallery(images, splits, count, explain)
    write_csv(plots / "mistakes.csv", mistakes)
    write_csv(plots / "label_errors.csv", label_error_gallery(errors, splits, classes, count))
    evaluation.print_result(sentences, values, index, str(dataset), metrics)
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
        counted: unreadable ones, those outside of a folder named like a class of the model, and
        duplicates and near duplicates, so that a picture counts once.
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
        index, skipped = read_folder(folder, spec, Path(temporary))
        values = evaluate(parameters, temporary, model, output, folder)
    evaluation.print_remarks(folder, index, skipped, spec, Path(prepared, "index.csv"))
    return values


def _check_output(output: Path, folder: Path) -> None:
    """Raise a UserError if the results would mix with other files."""
    own = "the pipeline's own results" if output.resolve() == Path("metrics").resolve() else ""
    if output.resolve().is_relative_to(folder.resolve()):
        own = "the images themselves"
    if own:
        raise cli.UserError(f"{output}: this folder is for {own}; choose another one (--output)")
    if output.is_dir() and any(output.iterdir()) and not (output / "summary.csv").exists():
        raise cli.UserError(
            f"{output}: holds other files; expected a new folder, or one with earlier results of"
            " --on (--output)"
        )


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
            added = cli.list_names(sorted(set(new) - set(old))) or "none"
            gone = cli.list_names(sorted(set(old) - set(new))) or "none"
            difference = f"{len(old)} classes, not for the {len(new)} of {source}"
            difference += f" (new: {added}; gone: {gone})"
        if old != new and key != "temperature":
            advice = "`dvc repro` trains one for these"
            raise cli.UserError(f"{model}: trained for {difference}; {advice}")


def _predict_splits(
    network: "keras.Model", splits: Mapping[str, Split], prepared: Path, environment: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Return probabilities and last hidden layer of all splits, one split after the other."""
    inputs: dict[str, Split | Features] = dict(splits)
    if from_features := has_backbone(network):  # its features may be in the cache
        backbone = feature_network(network)
        for name, split in splits.items():
            if len(split):
                inputs[name] = extract_features(backbone, split, prepared / name, environment)
    chunks = itertools.chain.from_iterable(one.batches(_CHUNK) for one in inputs.values())
    total = sum(math.ceil(len(split) / _CHUNK) for split in splits.values())
    bar = cli.progress(chunks, total=total, unit="batch", label="evaluate")
    return predict_both(network, bar, from_features=from_features)


def _find_learned(
    images: pd.DataFrame, index: pd.DataFrame, prepared: Path, model: str | Path
) -> np.ndarray:
    """Return which val and test images the model's backbone has learned from: bool [n]."""
    learned = model_file.read_learned(model)
    if learned is None:
        return np.zeros(len(images), bool)
    table = prepared / "duplicates.csv"
    columns = ["path", "other_path"]
    duplicates = pd.DataFrame(columns=columns)
    if table.exists():  # not of a labeled folder
        duplicates = pd.read_csv(table, dtype=str, keep_default_na=False, lineterminator="\n")
    is_learned = tables.is_learned(images, index, duplicates, learned)
    is_test = (images["split"] == "test").to_numpy()
    if is_test.any() and is_learned[is_test].all():
        raise cli.UserError(
            f"{model}: its backbone has learned from all test images, so that nothing can be said"
            " of it; were the splits changed since (prepare.seed, prepare.group_by)?"
        )
    return is_learned


def _compute_metrics(
    matrix: np.ndarray,
    probabilities: np.ndarray,
    uncalibrated: np.ndarray,
    labels: np.ndarray,
    top_k: int,
) -> dict[str, float]:
    """Return the metrics of all predictions, to four decimals."""
    correct = int(np.trace(matrix))
    low, high = clopper_pearson(correct, len(labels))
    values = {"accuracy": correct / len(labels), "accuracy_low": low, "accuracy_high": high}
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
    return {name: round(float(value), 4) for name, value in values.items()}


def _correction_metrics(images: pd.DataFrame, index: pd.DataFrame) -> dict[str, float]:
    """Return the accuracy with the labels before corrections, and how many were corrected.

    Where a model's doubts chose which labels to look at, corrections raise accuracy by selection.
    """
    reason = f"{DROPPED} {images['split'].iloc[0]}"
    dropped = int((index["exclusion_reason"] == reason).sum())
    is_corrected = images["was"] != ""
    if not dropped and not is_corrected.any():
        return {}
    old = images["was"].where(is_corrected, images["class"])
    return {
        "accuracy_old_labels": round(float((images["predicted"] == old).mean()), 4),
        "relabeled_images": int(is_corrected.sum()),
        "dropped_images": dropped,
    }


def _selective_metrics(
    coverage: pd.DataFrame, probabilities: np.ndarray, labels: np.ndarray, threshold: float | None
) -> dict[str, float]:
    """Return the metrics of the predictions that are accepted by their confidence."""
    at_90 = coverage["accuracy"][coverage["coverage"] >= 0.9].iloc[0]
    values = {"accuracy_at_90_coverage": round(float(at_90), 4)}
    if threshold is not None:
        accepted = probabilities.max(1) >= threshold
        right = (probabilities.argmax(1) == labels)[accepted]
        values["threshold"] = threshold
        values["coverage"] = round(float(accepted.mean()), 4)
        values["accepted"] = len(right)
        if len(right):
            values["accepted_accuracy"] = round(float(right.mean()), 4)
    return values


def main(options: argparse.Namespace) -> None:
    """Run the stage as params.yaml says, or evaluate the model on another folder."""
    if options.output and options.on is None:
        raise cli.UserError("--output needs --on: dvc.yaml says what the stage itself writes")
    if options.on is not None:
        parameters = read_section(Evaluate, "evaluate")
        folder = cli.expand_home(options.on)
        output = options.output or Path("metrics", "on", folder.resolve().name)
        evaluate_folder(parameters, folder, cli.expand_home(output))
        return
    check = watch_inputs("evaluate")
    check_parameters()
    parameters = read_section(Evaluate, "evaluate")
    training = read_section(Train, "train")  # a change of what is used of it changes the model
    with stage_lock("evaluate"):
        evaluate(parameters, dataset=read_dataset(), train=training)
        write_scripts("metrics/page/vega.js")
        check()


if __name__ == "__main__":
    raise SystemExit("run it as: python -m stages evaluate")
