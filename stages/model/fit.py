"""Fit a network: one loop over a short list of phases, each epoch a function of seed and epoch."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf

from stages.model.calibration import log_loss
from stages.model.checkpoint import Checkpoint
from stages.model.inference import make_predict_fn
from stages.model.optimizer import Optimizer
from stages.utils.cli import UserError, progress

_STEPS = 10  # in an epoch, at least, for which a small dataset's batches shrink,
_BATCH = 8  # though not below this


class Rows(Protocol):
    """Images or vectors with labels: what `stages.data.arrays.Split` is."""

    labels: np.ndarray

    def __len__(self) -> int: ...

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows at these positions, in their order."""

    def batches(self) -> Iterator[np.ndarray]:
        """Yield all rows in order, some at a time."""


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one set of trainable weights.

    Attributes
    ----------
    name : str
    learned : Keras model
        To logits: what learns, possibly in a mixed precision.
    kept : Keras model
        The same network in float32, to probabilities: it validates, and holds the best weights
        at the end.
    train, val : Rows
    epochs : int
    learning_rate : float
        Its peak.
    augment : callable or None
        From a batch of images and a seed to a batch of images.
    """

    name: str
    learned: keras.Model
    kept: keras.Model
    train: Rows
    val: Rows
    epochs: int
    learning_rate: float
    augment: Callable[[tf.Tensor, tf.Tensor], tf.Tensor] | None = None


@dataclass(frozen=True)
class Recipe:
    """What all phases share; the names are those of params.yaml."""

    seed: int
    batch_size: int
    warmup_fraction: float
    weight_decay: float
    label_smoothing: float
    patience: int
    class_weights: np.ndarray = field(repr=False)


def fit(
    phases: Sequence[Phase], recipe: Recipe, checkpoint: Checkpoint
) -> tuple[list[dict[str, Any]], int]:
    """Run the phases, each from the best weights so far, and keep the best by validation loss.

    Parameters
    ----------
    phases : sequence of Phase
        Each one's `kept` holds its best weights afterwards.
    recipe : Recipe
    checkpoint : Checkpoint
        An interrupted run of the same identity is gone on with after its last finished epoch.

    Returns
    -------
    history : list of dict
        One for each epoch run: ``epoch`` (from 1, over all phases), ``phase``, ``loss``,
        ``accuracy`` (while learning: with dropout and augmentation), ``val_loss``,
        ``val_accuracy`` (of the weights at the epoch's end), ``learning_rate`` (the epoch's last).
        Losses are plain cross-entropy, without label smoothing and class weights.
    best : int
        The epoch whose weights are kept.

    Raises
    ------
    UserError
        If a loss is not a finite number.
    """
    history: list[dict[str, Any]] = []
    best = {"epoch": 0, "val_loss": math.inf}
    current, arrays = 0, None
    saved = checkpoint.load()
    if saved:
        arrays, state = saved
        history, best, current = state["history"], state["best"], state["phase"]
        print(f"Going on after epoch {len(history)} of an interrupted run.", flush=True)

    for number, phase in enumerate(phases[current:], current):
        before = sum(earlier.epochs for earlier in phases[:number])
        if arrays is None:
            phase.learned.set_weights(phase.kept.get_weights())
        learner = _Learner(phase, recipe, number)
        validate = make_predict_fn(phase.kept)
        kept = phase.kept.get_weights()
        if arrays is not None:
            learner.restore(arrays["weights"], arrays["optimizer"])
            kept, arrays = arrays["kept"], None
        for epoch in range(_done(history, phase.name), phase.epochs):
            if _stops(history, best, phase.name, recipe.patience):
                break
            started = time.monotonic()
            row = {"epoch": len(history) + 1, "phase": phase.name} | learner.epoch(epoch)
            phase.kept.set_weights(phase.learned.get_weights())
            chances = validate(phase.val.batches())
            row["val_loss"] = log_loss(chances, phase.val.labels)
            row["val_accuracy"] = float(np.mean(chances.argmax(1) == phase.val.labels))
            row["learning_rate"] = row.pop("learning_rate")
            _check_finite(row, phase)
            better = row["val_loss"] < best["val_loss"]
            if better:
                best = {"epoch": row["epoch"], "val_loss": row["val_loss"]}
                kept = phase.kept.get_weights()
            history.append(row)
            checkpoint.save(
                {
                    "weights": phase.learned.get_weights(),
                    "optimizer": [v.numpy() for v in learner.optimizer.variables],
                    "kept": kept,
                },
                {"history": history, "best": best, "phase": number},
            )
            seconds = time.monotonic() - started
            left = (seconds - learner.startup) * (phase.epochs - epoch - 1)
            _tell(row, before + phase.epochs, better, seconds, left)
        phase.kept.set_weights(kept)
    return history, best["epoch"]


def batch_size(wanted: int, images: int) -> int:
    """Return the images per step: fewer than wanted where an epoch would have under ten steps."""
    return min(wanted, max(images // _STEPS, _BATCH), images)


class _Learner:
    """One phase's optimizer and compiled step."""

    def __init__(self, phase: Phase, recipe: Recipe, number: int) -> None:
        self.phase, self.recipe, self.number = phase, recipe, number
        self.batch = batch_size(recipe.batch_size, len(phase.train))
        self.steps = len(phase.train) // self.batch
        self.network = phase.learned
        kernels = [
            layer.kernel for layer in self.network.layers if isinstance(layer, keras.layers.Conv2D)
        ]
        self.optimizer = Optimizer(kernels, recipe.weight_decay)
        if self.network.layers[-1].compute_dtype == "float16":  # its small gradients would be 0
            self.optimizer = keras.optimizers.LossScaleOptimizer(self.optimizer)
        self.optimizer.build(self.network.trainable_variables)
        self.generators = [  # of dropout, and of what a backbone may hold
            generator
            for layer in self.network._flatten_layers(include_self=False, recursive=True)
            for generator in layer._seed_generators
        ]
        self.step = tf.function(self._step, autograph=False)

    def restore(self, weights: list[np.ndarray], optimizer: list[np.ndarray]) -> None:
        self.phase.learned.set_weights(weights)
        for variable, value in zip(self.optimizer.variables, optimizer, strict=True):
            variable.assign(value)

    def epoch(self, epoch: int) -> dict[str, float]:
        """Learn from each training image once, but for a rest that fills no batch.

        The order, and so the rest, is the epoch's own.
        """
        train = self.phase.train
        random = np.random.default_rng([self.recipe.seed, self.number, epoch])
        order = random.permutation(len(train))[: self.steps * self.batch]
        seed = int(random.integers(2**31))
        # Augmentation counts its steps from 0, and a generator what it draws: they must not meet.
        for n, generator in enumerate(self.generators, 1):
            generator.state.assign([seed, n << 20])
        losses, hits, started = [], [], [time.monotonic()]
        batches = _read_ahead(train, np.split(order, self.steps))
        for step, (images, labels) in enumerate(
            progress(batches, total=self.steps, unit="step", label=f"epoch {epoch + 1}")
        ):
            rate = self._rate(epoch * self.steps + step)
            values = images, labels, [seed, step], rate
            loss, hit = self.step(*map(tf.constant, values))
            losses.append(loss)
            hits.append(hit)
            started.append(time.monotonic())
        steps = np.diff(started)
        self.startup = float(steps[0] - np.median(steps))  # of the first step: its compilation
        return {
            "loss": float(np.mean([loss.numpy() for loss in losses])),
            "accuracy": float(np.mean([hit.numpy() for hit in hits])),
            "learning_rate": rate,
        }

    def _rate(self, step: int) -> float:
        """Straight up over the warm-up, then straight down to zero."""
        share = (step + 1) / (self.steps * self.phase.epochs + 1)
        warm = self.recipe.warmup_fraction
        rise = share / warm if warm else 1.0
        return self.phase.learning_rate * min(rise, (1 - share) / (1 - warm))

    def _step(
        self, images: tf.Tensor, labels: tf.Tensor, seed: tf.Tensor, rate: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        if self.phase.augment is not None:
            images = self.phase.augment(images, seed)
        with tf.GradientTape() as tape:
            outputs = tf.cast(self.network(images, training=True), tf.float32)
            count = outputs.shape[-1]
            smoothed = keras.losses.categorical_crossentropy(
                tf.one_hot(labels, count),
                outputs,
                from_logits=True,
                label_smoothing=self.recipe.label_smoothing,
            )
            weights = tf.gather(tf.constant(self.recipe.class_weights, tf.float32), labels)
            objective = self.optimizer.scale_loss(tf.reduce_mean(smoothed * weights))
        variables = self.network.trainable_variables
        self.optimizer.learning_rate.assign(rate)
        self.optimizer.apply(tape.gradient(objective, variables), variables)
        loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, outputs)
        hits = tf.cast(tf.argmax(outputs, 1, labels.dtype) == labels, tf.float32)
        return tf.reduce_mean(loss), tf.reduce_mean(hits)


def _read_ahead(
    rows: Rows, batches: Sequence[np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield images and labels of each batch; the next one is read while this one is used."""
    with ThreadPoolExecutor(1) as reader:
        upcoming = reader.submit(rows.gather, batches[0])
        for number, batch in enumerate(batches, 1):
            images = upcoming.result()
            if number < len(batches):
                upcoming = reader.submit(rows.gather, batches[number])
            yield images, rows.labels[batch]


def _done(history: list[dict[str, Any]], phase: str) -> int:
    return sum(row["phase"] == phase for row in history)


def _stops(history: list[dict[str, Any]], best: dict[str, Any], phase: str, patience: int) -> bool:
    """Whether this phase has gone `patience` epochs without a better validation loss."""
    first = len(history) - _done(history, phase)
    return bool(patience) and len(history) - max(best["epoch"], first) >= patience


def _check_finite(row: dict[str, Any], phase: Phase) -> None:
    for name in ("loss", "val_loss"):
        if not math.isfinite(row[name]):
            raise UserError(
                f"Training diverged: {name} is {row[name]} in epoch {row['epoch']} ({phase.name});"
                f" try a smaller learning rate than {phase.learning_rate:g}, or a longer warm-up"
                " (params.yaml: train)"
            )


def _tell(row: dict[str, Any], total: int, better: bool, seconds: float, rest: float) -> None:
    """Print an epoch's line; the time left is this phase's."""
    left = f"{rest / 60:.0f} min" if rest > 90 else f"{rest:.0f} s"
    print(
        f"  epoch {row['epoch']:>{len(str(total))}}/{total}"
        f"   loss {row['loss']:.4f}   accuracy {row['accuracy']:.4f}"
        f"   val_loss {row['val_loss']:.4f}   val_accuracy {row['val_accuracy']:.4f}"
        f"   {seconds:.1f} s, {left} left{'   best' if better else ''}",
        flush=True,
    )
