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

_MIN_IMAGES = 3  # validation images of a class that is never predicted, to be named
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
    history: Sequence[Mapping[str, Any]],
    final_epoch: int,
    seconds: float,
    seconds_left: float,
    later_epochs: int,
) -> None:
    """Print the line of the epoch that has just ended.

    `final_epoch` and `seconds_left` are of the phase; how long the `later_epochs` of fine-tuning
    take is not known before the first of them.
    """
    row = history[-1]
    is_best = all(row["val_loss"] < earlier["val_loss"] for earlier in history[:-1])
    left = f"{seconds_left / 60:.0f} min" if seconds_left > 90 else f"{seconds_left:.0f} s"
    left += " left"
    if later_epochs:
        left = f"{left}, then " if row["epoch"] < final_epoch else "then "
        left += f"{cli.count(later_epochs, 'epoch')} of fine-tuning"
    print(
        f"  epoch {row['epoch']:>{len(str(final_epoch))}}/{final_epoch}"
        f"  loss {row['loss']:.4f}  accuracy {row['accuracy']:.4f}"
        f"  val_loss {row['val_loss']:.4f}  val_accuracy {row['val_accuracy']:.4f}"
        f"  {seconds:.1f} s, {left}{'  best' if is_best else ''}",
        flush=True,
    )


def advise(
    history: Sequence[Mapping[str, Any]],
    parameters: Train,
    probabilities: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
) -> dict[str, str]:
    """Say what to do next: a name and a line for each finding, at most two; none in most cases.

    A fall of val_loss counts if it is more than 5 % and more than what one image that becomes
    confidently wrong adds (5 / n); a rise, since the best epoch is the luckiest one, from twice as
    much on. The last epochs are a quarter of the phase: single ones are noisy.

    Parameters
    ----------
    history : sequence
        Of all epochs, as `stages.model.fit.fit` returns it.
    parameters : Train
    probabilities : float array [n, classes]
        Of the validation images, by the best epoch.
    labels : int array [n]
    classes : sequence of str
    """
    advice = {}
    counts = np.bincount(labels, minlength=len(classes))
    predicted = probabilities.argmax(1)
    most = int(counts.argmax())
    share, accuracy = counts[most] / len(labels), float(np.mean(predicted == labels))
    has_learned = accuracy > share
    if not has_learned:
        advice["learned nothing"] = (
            f"{accuracy:.1%} right on validation, no better than always {classes[most]!r}"
            f" ({share:.1%}): try another learning rate, such as"
            f" {_command('learning_rate', f'{parameters.learning_rate / 3:.1g}')}"
        )
    is_missed = (counts >= _MIN_IMAGES) & (np.bincount(predicted, minlength=len(classes)) == 0)
    if is_missed.any():
        names = cli.list_names(repr(classes[label]) for label in np.flatnonzero(is_missed).tolist())
        is_plain = parameters.class_weight == "none"
        advice["never predicted"] = f"{names}, on validation: add such images" + (
            f", or try {_command('class_weight', 'balanced')}" if is_plain else ""
        )
    losses = [row["val_loss"] for row in history]
    best = int(np.argmin(losses))
    kept, final = history[best], history[-1]
    start = [row["phase"] for row in history].index(kept["phase"])
    size = max(1, len(history[start:]) // 4)
    last = _means(history[-size:])
    unit = max(0.05 * kept["val_loss"], 5 / len(labels))
    key = "fine_tune_epochs" if kept["phase"] == "fine_tune" else "epochs"
    if kept is final and best > start and has_learned:
        before = _means(history[-2 * size : -size])["val_loss"]
        if before - last["val_loss"] > unit:
            advice["still improving"] = (
                f"val_loss fell until the end, from {before:.3f} to {last['val_loss']:.3f} in the"
                f" last {2 * size} epochs: try {_command(key, 2 * getattr(parameters, key))}"
            )
    elif (
        len(history) - 1 - best >= max(2, size)
        and last["val_loss"] - kept["val_loss"] > 2 * unit
        and last["loss"] < 0.9 * kept["loss"]
    ):
        augments = "augment" not in parameters.unused()
        instead = _command(key, best - start + 1)
        if kept["phase"] != final["phase"]:  # all of fine-tuning
            rate = parameters.fine_tune_learning_rate / 3
            instead = _command("fine_tune_learning_rate", f"{rate:.1g}")
        advice["overfits"] = (
            f"after epoch {best + 1}, which is kept, val_loss rose from {kept['val_loss']:.3f} to"
            f" {last['val_loss']:.3f} while the loss in training fell: add images, raise"
            f" train.dropout{' or train.augment' if augments else ''}, or try {instead}"
        )
    return dict(list(advice.items())[:2])


def _command(key: str, value: object) -> str:
    """Return the command that tries another value of a key."""
    return f"`dvc exp run -S train.{key}={value}`"


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean losses of some epochs."""
    return {name: float(np.mean([row[name] for row in rows])) for name in ("loss", "val_loss")}


def report(
    result: Mapping[str, Any],
    advice: Mapping[str, str],
    split: Split,
    classes: Sequence[str],
    augment: Callable[[tf.Tensor, tf.Tensor], tf.Tensor] | None,
    model: Path,
    metrics: Path,
) -> None:
    """Draw augmented training images; print what train.json says, and `advise`."""
    draw_augmented(split, classes, augment, metrics / "plots" / "augmented.png")
    print_result(result, advice, model, metrics)


def print_result(
    result: Mapping[str, Any], advice: Mapping[str, str], model: Path, metrics: Path
) -> None:
    """Print what train.json says, what to do next, and whether the calibration can be relied on."""
    calibrated = f"{result['val_loss_calibrated']:.4f} after calibration"
    if result["temperature"] == 1:
        calibrated = "not calibrated: too few validation images, or no errors in them"
    elif result["temperature"] in LIMITS:
        calibrated += f" with the temperature at its limit, {result['temperature']}: don't rely on"
        calibrated += " confidences; more validation images would help"
    lines = {
        "best epoch": f"{result['epoch']} of {result['epochs']}",
        "accuracy": f"{result['val_accuracy']:.4f} on validation"
        f" ({result['train_accuracy']:.4f} in training)",
        "log loss": f"{result['val_loss']:.4f} on validation, {calibrated}",
        "model": model,
        "curves": metrics / "history.csv",
    }
    cli.summary("train: done", {**lines, **advice})


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
