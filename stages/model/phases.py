"""The phases of a training: the whole network, or a head and then its backbone's last layers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import keras
import tensorflow as tf

from stages.data.arrays import Split
from stages.model.augment import augment
from stages.model.features import Features
from stages.model.network import Network, flatten_layers
from stages.model.parameters import Train
from stages.model.replicas import Replicas


@dataclass(frozen=True)
class Phase:
    """A part of the training with its own trainable weights and learning rate schedule."""

    name: str
    train_model: keras.Model  # images or features to logits, possibly in mixed precision
    # The same in float32, to probabilities; it has the best weights at the end.
    eval_model: keras.Model
    train: Split | Features
    val: Split | Features
    epochs: int
    learning_rate: float  # the peak, reached after warm-up
    # From a batch of images and a seed, int32 [2], to a batch of images.
    augment: Callable[[tf.Tensor, tf.Tensor], tf.Tensor] | None = None


def make_phases(
    parameters: Train,
    train_network: Network,
    eval_network: Network,
    splits: Mapping[str, Split],
    features: Mapping[str, Features],
    replicas: Replicas,
) -> list[Phase]:
    """Return the phases, and freeze what the last of them does not train.

    `splits` and `features` have the keys train and val; there are features with a backbone only.
    """
    whole = Phase(
        name="train",
        train_model=train_network.logits,
        eval_model=eval_network.classifier,
        train=splits["train"],
        val=splits["val"],
        epochs=parameters.epochs,
        learning_rate=parameters.learning_rate,
        augment=partial(
            augment,
            **parameters.augment.model_dump(),
            replica=replicas.number,
            replicas=replicas.count,
        ),
    )
    if not features:
        return [whole]
    head = Phase(
        name="head",
        train_model=train_network.head_logits,
        eval_model=eval_network.head,
        train=features["train"],
        val=features["val"],
        epochs=parameters.epochs,
        learning_rate=parameters.learning_rate,
    )
    if not parameters.fine_tune_fraction:
        return [head]
    layers = flatten_layers(train_network.classifier.get_layer("backbone"))
    for layer in layers[: round(len(layers) * (1 - parameters.fine_tune_fraction))]:
        layer.trainable = False
    fine_tune = replace(
        whole,
        name="fine_tune",
        epochs=parameters.fine_tune_epochs,
        learning_rate=parameters.fine_tune_learning_rate,
    )
    return [head, fine_tune]
