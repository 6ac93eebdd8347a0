"""Training: one loop over a list of phases; randomness depends only on seed, epoch and step."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from stages.data.arrays import Split
from stages.model.calibration import log_loss
from stages.model.checkpoint import Checkpoint
from stages.model.features import Features
from stages.model.inference import make_predict_fn
from stages.model.optimizer import Optimizer
from stages.model.parameters import Train
from stages.model.phases import Phase
from stages.model.replicas import Replicas
from stages.run.cli import UserError, progress

_MIN_STEPS = 10  # per epoch; a small dataset gets smaller batches to reach it
_MIN_BATCH_SIZE = 8  # lower limit for these smaller batches


def fit(
    phases: Sequence[Phase],
    parameters: Train,
    checkpoint: Checkpoint,
    replicas: Replicas,
    write_history: Callable[[list[dict[str, Any]]], None],
    print_epoch: Callable[[list[dict[str, Any]], int, float, float, int], None],
) -> tuple[list[dict[str, Any]], int]:
    """Train all phases; each starts from the best weights so far (by validation loss).

    The `eval_model` of each phase has the best weights afterwards. After each epoch, the first
    replica writes a checkpoint, from which the next call resumes, and calls `write_history` with
    the history up to there. All call `print_epoch` with that history, the number of the phase's
    last epoch, the seconds that the epoch took, those that the rest of the phase will take, and the
    number of epochs of later phases.

    Returns
    -------
    history : list of dict
        One for each epoch: ``epoch`` (from 1, over all phases), ``phase``, ``loss``, ``accuracy``
        (means over the training steps, with dropout and augmentation), ``val_loss``,
        ``val_accuracy`` (after the epoch), ``learning_rate`` (of the last step). Losses are plain
        cross-entropy, without label smoothing and class weights.
    best_epoch : int
        The epoch with the best weights.

    Raises
    ------
    UserError
        If a loss is not finite.
    """
    history: list[dict[str, Any]] = []
    first_phase = 0
    saved = checkpoint.load()
    if saved:
        arrays, state = saved
        history, first_phase = state["history"], state["phase"]
        print(f"Resuming after epoch {len(history)}.", flush=True)
        if replicas.is_first:
            write_history(history)

    replicas.require_equal("checkpoint", history)
    for number, phase in enumerate(phases[first_phase:], first_phase):
        trainer = Trainer(phase, parameters, number, replicas)
        if saved and number == first_phase:
            trainer.restore(arrays["weights"], arrays["optimizer"])
            best_weights = arrays["best_weights"]
        else:
            best_weights = phase.eval_model.get_weights()
            phase.train_model.set_weights(best_weights)
        final_epoch = sum(earlier.epochs for earlier in phases[: number + 1])
        later_epochs = sum(later.epochs for later in phases[number + 1 :])
        epochs_done = sum(row["phase"] == phase.name for row in history)
        phase_start = len(history) - epochs_done
        for epoch in range(epochs_done, phase.epochs):
            epochs_without_gain = len(history) - max(_best_epoch(history), phase_start)
            if parameters.patience and epochs_without_gain >= parameters.patience:
                break
            started = time.monotonic()
            row: dict[str, Any] = {"epoch": len(history) + 1, "phase": phase.name}
            row |= trainer.run_epoch(epoch)
            _check_finite(row, phase)
            history.append(row)
            if _best_epoch(history) == row["epoch"]:
                best_weights = phase.eval_model.get_weights()
            if replicas.is_first:
                arrays = trainer.state() | {"best_weights": best_weights}
                checkpoint.save(arrays, {"history": history, "phase": number})
                write_history(history)
            seconds = time.monotonic() - started
            seconds_left = (seconds - trainer.startup_seconds) * (phase.epochs - epoch - 1)
            print_epoch(history, final_epoch, seconds, seconds_left, later_epochs)
        phase.eval_model.set_weights(best_weights)
    return history, _best_epoch(history)


def effective_batch_size(batch_size: int, images: int, replicas: int = 1) -> int:
    """Return the batch size: a multiple of `replicas` with which an epoch has at least ten steps.

    It is not reduced to fewer than 8 images for that, nor to fewer than one for each replica. More
    replicas than images are a UserError.
    """
    if images < replicas:
        raise UserError(
            f"params.yaml: train.replicas: {replicas} replicas can't share {images} images;"
            " lower it"
        )
    size = min(batch_size, max(images // _MIN_STEPS, _MIN_BATCH_SIZE), images)
    return max(size // replicas, 1) * replicas


def class_weights(choice: str, labels: np.ndarray, classes: int) -> np.ndarray:
    """Return a weight for each class: 1, or with "balanced" one that gives all equal totals."""
    if choice == "none":
        return np.ones(classes)
    counts = np.bincount(labels, minlength=classes)
    return len(labels) / (classes * np.maximum(counts, 1))


class Trainer:
    """Optimizer, schedule and compiled training step of one phase; its number is part of the seed.

    `step` is one training step: images, labels, augmentation seed and learning rate to loss and
    accuracy. `startup_seconds` is what compilation added to the latest epoch.
    """

    def __init__(self, phase: Phase, parameters: Train, number: int, replicas: Replicas) -> None:
        self.phase, self.parameters, self.number, self.replicas = (
            phase,
            parameters,
            number,
            replicas,
        )
        self.batch_size = effective_batch_size(
            parameters.batch_size, len(phase.train), replicas.count
        )
        self.steps = len(phase.train) // self.batch_size
        self.startup_seconds = 0.0
        self.model = phase.train_model
        classes = self.model.output_shape[-1]
        self.class_weights = class_weights(parameters.class_weight, phase.train.labels, classes)
        kernels = [
            layer.kernel for layer in self.model.layers if isinstance(layer, keras.layers.Conv2D)
        ]
        self.optimizer = Optimizer(kernels, parameters.weight_decay)
        if self.model.layers[-1].compute_dtype == "float16":  # small gradients would underflow
            self.optimizer = keras.optimizers.LossScaleOptimizer(self.optimizer)
        self.optimizer.build(self.model.trainable_variables)
        weights = {id(weight) for weight in self.model.weights}
        # The seeds of dropout layers, and of random layers in a backbone.
        self.seed_states = [v for v in self.model.variables if id(v) not in weights]
        self.step = tf.function(self._step, autograph=False)
        self.predict = make_predict_fn(phase.eval_model)

    def state(self) -> dict[str, list[np.ndarray]]:
        """Return the weights and the optimizer's state, as `restore` takes them."""
        optimizer = [variable.numpy() for variable in self.optimizer.variables]
        return {"weights": self.model.get_weights(), "optimizer": optimizer}

    def restore(self, weights: list[np.ndarray], optimizer: list[np.ndarray]) -> None:
        """Set the weights and the optimizer's state."""
        self.model.set_weights(weights)
        for variable, value in zip(self.optimizer.variables, optimizer, strict=True):
            variable.assign(value)

    def run_epoch(self, epoch: int) -> dict[str, float]:
        """Train for one epoch (from 0) and validate; return its metrics."""
        metrics = self.train_epoch(epoch)
        self._average_moments()
        self.phase.eval_model.set_weights(self.model.get_weights())
        validation = self.validate() if self.replicas.is_first else (0.0, 0.0)
        val_loss, val_accuracy = self.replicas.gather(validation)[0].tolist()
        return metrics | {
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
            "learning_rate": self.learning_rate((epoch + 1) * self.steps - 1),
        }

    def _average_moments(self) -> None:
        """Average the moments of batch normalization, which each replica has of its shares only.

        Those of a backbone are never updated.
        """
        layers = [x for x in self.model.layers if isinstance(x, keras.layers.BatchNormalization)]
        moments = [moment for x in layers for moment in (x.moving_mean, x.moving_variance)]
        means = self.replicas.mean([tf.convert_to_tensor(moment) for moment in moments])
        for moment, mean in zip(moments, means, strict=True):
            moment.assign(mean)

    def validate(self) -> tuple[float, float]:
        """Return loss and accuracy on the validation images."""
        probabilities, labels = self.predict(self.phase.val.batches()), self.phase.val.labels
        return log_loss(probabilities, labels), float(np.mean(probabilities.argmax(1) == labels))

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Train on each image once, in random order, except for the last incomplete batch."""
        train = self.phase.train
        random = np.random.default_rng([self.parameters.seed, self.number, epoch])
        order = random.permutation(len(train))[: self.steps * self.batch_size]
        seeds = random.integers(2**31, size=self.replicas.count).tolist()
        # Augmentation uses the counters 0, 1, ... of the first seed. The seed states of a replica
        # start far beyond, and on a seed of its own.
        for n, state in enumerate(self.seed_states, 1):
            state.assign([seeds[self.replicas.number], n << 20])
        losses, accuracies, times = [], [], [time.monotonic()]
        shares = [self.replicas.share(batch) for batch in np.split(order, self.steps)]
        batches = _prefetch(train, shares)
        for step, (images, labels) in enumerate(
            progress(batches, total=self.steps, unit="step", label=f"epoch {epoch + 1}")
        ):
            rate = self.learning_rate(epoch * self.steps + step)
            loss, accuracy = self.step(*map(tf.constant, (images, labels, [seeds[0], step], rate)))
            losses.append(loss)
            accuracies.append(accuracy)
            times.append(time.monotonic())
        seconds = np.diff(times)
        self.startup_seconds = float(seconds[0] - np.median(seconds))
        return {
            "loss": float(np.mean([loss.numpy() for loss in losses])),
            "accuracy": float(np.mean([accuracy.numpy() for accuracy in accuracies])),
        }

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step: linear warm-up, then linear decay to zero."""
        fraction = (step + 1) / (self.steps * self.phase.epochs + 1)
        warmup = self.parameters.warmup_fraction
        rising = fraction / warmup if warmup else 1.0
        return self.phase.learning_rate * min(rising, (1 - fraction) / (1 - warmup))

    def _step(
        self, images: tf.Tensor, labels: tf.Tensor, seed: tf.Tensor, rate: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Update the weights for one batch; return its loss and accuracy."""
        if self.phase.augment is not None:
            images = self.phase.augment(images, seed)
        with tf.GradientTape() as tape:
            logits = tf.cast(self.model(images, training=True), tf.float32)
            losses = keras.losses.categorical_crossentropy(
                tf.one_hot(labels, logits.shape[-1]),
                logits,
                from_logits=True,
                label_smoothing=self.parameters.label_smoothing,
            )
            weights = tf.gather(tf.constant(self.class_weights, tf.float32), labels)
            objective = self.optimizer.scale_loss(tf.reduce_mean(losses * weights))
        variables = self.model.trainable_variables
        gradients = tape.gradient(objective, variables)
        plain_losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        correct = tf.cast(tf.argmax(logits, 1, labels.dtype) == labels, tf.float32)
        metrics = tf.reduce_mean(plain_losses), tf.reduce_mean(correct)
        *gradients, loss, accuracy = self.replicas.mean([*gradients, *metrics])
        self.optimizer.learning_rate.assign(rate)
        self.optimizer.apply(gradients, variables)
        return loss, accuracy


def _prefetch(
    examples: Split | Features, batches: Sequence[np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield images and labels of each batch, and read the next batch meanwhile."""
    with ThreadPoolExecutor(1) as reader:
        upcoming = reader.submit(examples.gather, batches[0])
        for number, batch in enumerate(batches, 1):
            images = upcoming.result()
            if number < len(batches):
                upcoming = reader.submit(examples.gather, batches[number])
            yield images, examples.labels[batch]


def _best_epoch(history: list[dict[str, Any]]) -> int:
    """Return the first epoch with the lowest validation loss; 0 before the first epoch."""
    return min(history, key=lambda row: row["val_loss"], default={"epoch": 0})["epoch"]


def _check_finite(row: dict[str, Any], phase: Phase) -> None:
    """Raise a UserError if a loss is not finite."""
    for name in ("loss", "val_loss"):
        if not math.isfinite(row[name]):
            raise UserError(
                f"Training diverged: {name} is {row[name]} in epoch {row['epoch']} ({phase.name});"
                f" try a smaller learning rate than {phase.learning_rate:g}, or a longer warm-up"
                " (params.yaml: train)"
            )
