"""Run a network on images: the one way, for validation, evaluation, prediction and features."""

from collections.abc import Callable, Iterable

import keras
import numpy as np
import tensorflow as tf

BATCH_SIZE = 32  # images per step; a batch of another size would give other last bits


def make_predict_fn(model: keras.Model) -> Callable[[Iterable[np.ndarray]], np.ndarray]:
    """Return a function that runs a model on images.

    Parameters
    ----------
    model : Keras model
        Takes uint8 [n, height, width, channels]; gives float32 [n, d].

    Returns
    -------
    run : function
        Takes an iterable of uint8 arrays [any number, height, width, channels]; gives a float32
        array [n, d] of all rows in order. Rows run in batches of one fixed shape, the last one
        filled with black images, and dropout and the like are off.
    """
    step = tf.function(lambda images: model(images, training=False), autograph=False)

    def run(chunks: Iterable[np.ndarray]) -> np.ndarray:
        results = [np.zeros((0, model.output_shape[-1]), np.float32)]
        for chunk in chunks:
            for start in range(0, len(chunk), BATCH_SIZE):
                images = chunk[start : start + BATCH_SIZE]
                missing = BATCH_SIZE - len(images)
                if missing:
                    images = np.pad(images, [(0, missing)] + [(0, 0)] * (images.ndim - 1))
                results.append(step(tf.constant(images)).numpy()[: BATCH_SIZE - missing])
        return np.concatenate(results)

    return run
