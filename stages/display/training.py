"""What train prints, and its figure of augmented images."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from stages.data.arrays import ImageSpec, Split
from stages.model.calibration import LIMITS
from stages.model.fit import effective_batch_size
from stages.model.network import Network
from stages.model.parameters import Train
from stages.report import figures
from stages.run import cli

_CLASSES, _VARIANTS = 6, 5  # of the figure: rows, and augmented images in each


def print_start(
    parameters: Train,
    spec: ImageSpec,
    splits: Mapping[str, Split],
    network: Network,
    environment: Mapping[str, Any],
    precision: str,
    dataset: str | Path = "",
) -> None:
    """Print what is trained on which images, and which parameters have no effect."""
    lines = {"dataset": str(dataset)} if str(dataset) else {}
    lines |= {
        "images": f"{len(splits['train']):,} for training, {len(splits['val']):,} for validation,"
        f" {'×'.join(map(str, spec.image_shape))}, {len(spec.classes)} classes",
        "network": f"{network.classifier.count_params():,} weights"
        + ("" if parameters.backbone == "none" else f", on {parameters.backbone}"),
        "device": f"{environment['device']}, {cli.count(environment['threads'], 'thread')},"
        f" {precision}",
    }
    replicas = parameters.replicas
    if replicas > 1:
        lines["device"] += f"; {replicas} replicas, one process each"
    batch_size = effective_batch_size(parameters.batch_size, len(splits["train"]), replicas)
    if batch_size != parameters.batch_size:
        alone = effective_batch_size(parameters.batch_size, len(splits["train"]))
        reasons = ["for more steps per epoch"] if alone != parameters.batch_size else []
        reasons += ["for equal shares"] if batch_size != alone else []
        reason = " and ".join(reasons)
        lines["batch size"] = f"{batch_size}, not {parameters.batch_size}: {reason}"
    default = Train()
    unused = [k for k in parameters.unused() if getattr(parameters, k) != getattr(default, k)]
    if unused:
        lines["no effect"] = ", ".join(f"train.{key}" for key in unused)
    cli.summary("train", lines)
    print(flush=True)


def print_epoch(
    history: Sequence[Mapping[str, Any]], final_epoch: int, seconds: float, seconds_left: float
) -> None:
    """Print the line of the epoch that has just ended."""
    row = history[-1]
    is_best = all(row["val_loss"] < earlier["val_loss"] for earlier in history[:-1])
    left = f"{seconds_left / 60:.0f} min" if seconds_left > 90 else f"{seconds_left:.0f} s"
    print(
        f"  epoch {row['epoch']:>{len(str(final_epoch))}}/{final_epoch}"
        f"  loss {row['loss']:.4f}  accuracy {row['accuracy']:.4f}"
        f"  val_loss {row['val_loss']:.4f}  val_accuracy {row['val_accuracy']:.4f}"
        f"  {seconds:.1f} s, {left} left{'  best' if is_best else ''}",
        flush=True,
    )


def report(
    result: Mapping[str, Any],
    split: Split,
    classes: Sequence[str],
    augment: Callable[[tf.Tensor, tf.Tensor], tf.Tensor] | None,
    model: Path,
    metrics: Path,
) -> None:
    """Draw augmented training images, and print what train.json says."""
    draw_augmented(split, classes, augment, metrics / "plots" / "augmented.png")
    print_result(result, model, metrics)


def print_result(result: Mapping[str, Any], model: Path, metrics: Path) -> None:
    """Print what train.json says, and whether the calibration can be relied on."""
    calibrated = f"{result['val_loss_calibrated']:.4f} after calibration"
    if result["temperature"] == 1:
        calibrated = "not calibrated: too few validation images, or no errors in them"
    elif result["temperature"] in LIMITS:
        calibrated += f" with the temperature at its limit, {result['temperature']}: don't rely on"
        calibrated += " confidences; try fewer epochs, or add validation images"
    lines = {
        "best epoch": f"{result['epoch']} of {result['epochs']}",
        "accuracy": f"{result['val_accuracy']:.4f} on validation"
        f" ({result['train_accuracy']:.4f} in training)",
        "log loss": f"{result['val_loss']:.4f} on validation, {calibrated}",
        "model": model,
        "curves": metrics / "history.csv",
    }
    cli.summary("train: done", lines)


def draw_augmented(
    split: Split,
    classes: Sequence[str],
    augment: Callable[[tf.Tensor, tf.Tensor], tf.Tensor] | None,
    path: Path,
) -> None:
    """Draw an image of each of the first classes, with augmented variants to its right."""
    labels, rows = np.unique(split.labels, return_index=True)
    tiles = split.gather(rows[:_CLASSES])[:, None]
    heading = "Training images\nThe backbone is frozen: they are not augmented."
    columns: tuple[int, ...] = (_CLASSES,)
    if augment:
        variants = _uncompiled(augment, np.repeat(tiles[:, 0], _VARIANTS, axis=0))
        variants = variants.reshape(-1, _VARIANTS, *split.image_shape)
        tiles = np.concatenate([tiles, variants], axis=1)
        heading = (
            "Augmented images\nLeft: a training image of a class. Right: what train.augment makes"
            " of it. A person should still recognize the class."
        )
        columns = (1, _VARIANTS)
    names = figures.class_labels(classes)
    titles = [[names[label]] + [""] * (tiles.shape[1] - 1) for label in labels[:_CLASSES]]
    images = [*tiles.reshape(-1, *split.image_shape)]
    figures.image_grid(images, np.ravel(titles).tolist(), heading, path, columns=columns)


def _uncompiled(
    augment: Callable[[tf.Tensor, tf.Tensor], tf.Tensor], images: np.ndarray
) -> np.ndarray:
    """Augment operation by operation: to compile for a single call would take a second."""
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        return np.asarray(augment(tf.constant(images), tf.zeros(2, tf.int32)))
    finally:
        tf.config.run_functions_eagerly(before)
