"""Heatmaps: attribution of a class to the parts of an image, by integrated gradients."""

from collections.abc import Callable
from functools import partial

import keras
import numpy as np
import tensorflow as tf
from scipy.ndimage import gaussian_filter

from stages.model.network import FLIP_AVERAGE, flatten_layers
from stages.run import cli

_STEPS = 8  # from the image's mean color to the image
_BLUR = 1 / 24  # of the side: single pixels of a gradient are noise


def make_heatmap_fn(classifier: keras.Model) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Return a function that attributes classes to the parts of images.

    Parameters
    ----------
    classifier : Keras model
        A model that `stages.model.network` built, also one read from a file.

    Returns
    -------
    heatmaps : function
        Takes uint8 images [n, height, width, channels] and the class to explain for each of them,
        int [n]. Returns a float array [n, height, width], scaled so that each maximum is 1; all 0
        if no part is evidence for the class, or if no gradient reaches the image because the
        backbone takes whole numbers. A terminal shows a progress bar.

    Notes
    -----
    A heatmap says where the evidence is, not why it counts. It can't show the evidence of a color
    that fills the image, since the image is compared with its own mean color. Evidence is relative
    to the other classes: a network that answers red where it sees neither green nor blue may find
    some of it in a yellow part, too.

    References
    ----------
    Sundararajan, Taly, Yan: Axiomatic attribution for deep networks, ICML 2017. On planted evidence
    (a small square decides the class) its maximum was on the square for 97 to 100 % of the images,
    with networks from scratch and with a frozen backbone; that of Grad-CAM for 43 to 82 % and 3 %,
    of HiResCAM for 17 to 57 % and 0 %, of occlusion for 98 to 100 % and 23 to 33 %.
    """
    network = _inner_network(classifier)
    # Not from the input: gradients end where it is cast to integers.
    first = next(layer for layer in network.layers if isinstance(layer, keras.layers.Rescaling))
    logits = keras.Model(first.output, network.get_layer("logits").output)
    gradients = tf.function(partial(_gradients, logits), autograph=False)
    averages_flips = any(layer.name == FLIP_AVERAGE for layer in flatten_layers(classifier))

    def heatmaps(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        maps = []
        pairs = zip(images, labels, strict=True)
        # One by one: a larger batch is no faster, and one of another size would be traced anew.
        for image, label in cli.progress(pairs, total=len(images), unit="image", label="heatmaps"):
            heat = _attribution(first, gradients, image, label)
            if averages_flips:
                heat += _attribution(first, gradients, image[:, ::-1], label)[:, ::-1]
            blur = [side * _BLUR for side in heat.shape]
            heat = gaussian_filter(np.maximum(heat, 0), blur, mode="constant")
            maps.append(heat / max(heat.max(), np.finfo(np.float32).tiny))
        return np.array(maps)

    return heatmaps


def _inner_network(model: keras.Model) -> keras.Model:
    """Return the model inside a classifier that has its logits, without casts and flips."""
    if any(layer.name == "logits" for layer in model.layers):
        return model
    return next(_inner_network(layer) for layer in model.layers if isinstance(layer, keras.Model))


def _gradients(logits: keras.Model, inputs: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Return the gradients of the logits of these classes, less the mean logit."""
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = logits(inputs, training=False)
        score = tf.gather(outputs, labels, batch_dims=1)
        score = tf.reduce_sum(score - tf.reduce_mean(outputs, axis=1))
    return tape.gradient(score, inputs, unconnected_gradients="zero")


def _attribution(
    first: keras.layers.Layer,
    gradients: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    image: np.ndarray,
    label: int,
) -> np.ndarray:
    """Return what each pixel adds to the class's logit, less the mean logit: [height, width]."""
    image = image.astype(np.float32)
    mean = image.mean((0, 1))
    shares = ((np.arange(_STEPS) + 0.5) / _STEPS).astype(np.float32).reshape(-1, 1, 1, 1)
    path = first(tf.constant(mean + shares * (image - mean)))
    slopes = gradients(path, tf.constant(np.full(_STEPS, label))).numpy()
    return ((image - mean) * slopes.mean(0)).sum(-1)
