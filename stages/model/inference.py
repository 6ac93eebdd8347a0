"""Inference: the one way to run a network on images, in batches of a fixed shape."""

from collections.abc import Callable, Iterable

import keras
import numpy as np
import tensorflow as tf

BATCH_SIZE = 32  # images; with another batch size the last bits of a result differ


def make_predict_fn(model: keras.Model) -> Callable[[Iterable[np.ndarray]], np.ndarray]:
    """Return a function that runs a model on images.

    Parameters
    ----------
    model : Keras model
        uint8 images [n, height, width, channels] (or vectors [n, d]) to float32 [n, m].

    Returns
    -------
    predict : function
        Takes an iterable of arrays, each any number of images; returns a float32 array [n, m] of
        all images in order. They run in inference mode, in batches of `BATCH_SIZE`, the last of
        each array padded with zeros: an image's result doesn't depend on its neighbors.
    """
    step = tf.function(lambda images: model(images, training=False), autograph=False)

    def predict(chunks: Iterable[np.ndarray]) -> np.ndarray:
        results = [np.zeros((0, model.output_shape[-1]), np.float32)]
        for chunk in chunks:
            for start in range(0, len(chunk), BATCH_SIZE):
                images = chunk[start : start + BATCH_SIZE]
                padding = BATCH_SIZE - len(images)
                if padding:
                    images = np.pad(images, [(0, padding)] + [(0, 0)] * (images.ndim - 1))
                results.append(step(tf.constant(images)).numpy()[: BATCH_SIZE - padding])
        return np.concatenate(results)

    return predict
