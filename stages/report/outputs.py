"""What a classifier makes of images: probabilities, and the vectors of its last hidden layer."""

from collections.abc import Iterable

import keras
import numpy as np

from stages.model.inference import make_predict_fn
from stages.model.network import FLIP_AVERAGE


def predict_both(
    classifier: keras.Model, chunks: Iterable[np.ndarray], *, from_features: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return probabilities and last hidden layer of images, which the network sees once.

    Parameters
    ----------
    classifier : Keras model
        A model that `stages.model.network` built, also one read from a file.
    chunks : iterable of uint8 arrays [any number, height, width, channels]
    from_features : bool, default=False
        Whether the chunks are what `feature_network` makes of images; the result is the same.

    Returns
    -------
    probabilities : float32 array [n, classes]
        Those of the classifier itself, to the last bit.
    vectors : float32 array [n, d]
        What enters the layer of the logits; of the image itself where its mirror image counts, too.
    """
    model = _inner_network(classifier)
    images, probabilities = model.input, model.output
    if from_features:
        images = _first_of_head(model).input
    if any(layer.name == FLIP_AVERAGE for layer in model.layers):
        network = model.get_layer("network")
        hidden = network.get_layer("logits").input
        both = keras.Model(network.input, [network.output, hidden])
        logits, hidden = both(images)
        mirrored, _ = both(keras.ops.flip(images, axis=2))
        average = keras.layers.Average()([logits, mirrored])
        probabilities = model.layers[-1](average)
    else:
        hidden = model.get_layer("logits").input
    joined = keras.layers.Concatenate()([probabilities, hidden])
    outputs = make_predict_fn(keras.Model(images, joined))(chunks)
    classes = probabilities.shape[-1]
    return outputs[:, :classes], outputs[:, classes:]


def feature_network(classifier: keras.Model) -> keras.Model:
    """Return the part of a classifier from uint8 pixels to features, which the dense layers get."""
    model = _inner_network(classifier)
    if any(layer.name == FLIP_AVERAGE for layer in model.layers):
        model = model.get_layer("network")
    return keras.Model(model.input, _first_of_head(model).input)


def has_backbone(classifier: keras.Model) -> bool:
    """Return whether a classifier has a backbone, whose features are worth keeping."""
    return any(layer.name == "backbone" for layer in _inner_network(classifier).layers)


def _first_of_head(model: keras.Model) -> keras.layers.Layer:
    """Return the layer that the features enter."""
    return next(layer for layer in model.layers if isinstance(layer, keras.layers.Dropout))


def _inner_network(model: keras.Model) -> keras.Model:
    """Return the model inside a classifier that has the logits, or averages them."""
    while not {"logits", FLIP_AVERAGE} & {layer.name for layer in model.layers}:
        # The layers around it change nothing in uint8 pixels.
        model = next(layer for layer in model.layers if isinstance(layer, keras.Model))
    return model
