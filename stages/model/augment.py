"""Random changes of training images, on a whole batch at once."""

import math

import tensorflow as tf


def augment(
    images: tf.Tensor,
    seed: tf.Tensor,
    *,
    flip: str = "none",
    shift: float = 0.0,
    rotation: float = 0.0,
    zoom: float = 0.0,
    contrast: float = 0.0,
) -> tf.Tensor:
    """Change every image of a batch at random: an image in, an image out.

    Parameters
    ----------
    images : uint8 tensor [n, height, width, channels]
    seed : int32 tensor [2]
        The changes follow from it alone.
    flip : {"none", "horizontal", "both"}, default="none"
        Mirrored left to right (and upside down) in half of the cases.
    shift : float in [0, 1], default=0.0
        Moved by up to this share of height and width, by whole pixels.
    rotation : float in [0, 180], default=0.0
        Turned by up to so many degrees, either way.
    zoom : float in [0, 1), default=0.0
        Scaled by a factor from 1 - zoom to 1 + zoom.
    contrast : float in [0, 1), default=0.0
        Distances from the image's mean scaled by a factor from 1 - contrast to 1 + contrast.

    Returns
    -------
    images : uint8 tensor [n, height, width, channels]
        What a change uncovers is filled by reflection.
    """
    count, height, width, _ = images.shape
    draws = tf.random.stateless_uniform([7, count], seed, -1.0, 1.0)
    y, x = (height - 1) / 2, (width - 1) / 2
    # Coordinates of the result's pixels about the centre, moved and mirrored.
    rows = tf.range(height, dtype=tf.float32) - y - tf.round(draws[0] * (shift * height))[:, None]
    columns = tf.range(width, dtype=tf.float32) - x - tf.round(draws[1] * (shift * width))[:, None]
    if flip in ("horizontal", "both"):
        columns *= tf.where(draws[5] < 0, -1.0, 1.0)[:, None]
    if flip == "both":
        rows *= tf.where(draws[6] < 0, -1.0, 1.0)[:, None]
    if rotation or zoom:
        angle = draws[2] * math.radians(rotation)
        scale = 1 / (1 + draws[3] * zoom)
        cosine = (tf.cos(angle) * scale)[:, None, None]
        sine = (tf.sin(angle) * scale)[:, None, None]
        rows, columns = rows[:, :, None], columns[:, None, :]
        images = _sample(
            images,
            _reflect(cosine * rows + sine * columns + y, height),
            _reflect(cosine * columns - sine * rows + x, width),
        )
    elif flip != "none" or shift:
        images = tf.gather(images, _whole(rows + y, height), axis=1, batch_dims=1)
        images = tf.gather(images, _whole(columns + x, width), axis=2, batch_dims=1)
    if contrast:
        pixels = tf.cast(images, tf.float32)
        mean = tf.reduce_mean(pixels, axis=[1, 2, 3], keepdims=True)
        pixels = mean + (pixels - mean) * (1 + draws[4, :, None, None, None] * contrast)
        images = tf.cast(tf.round(tf.clip_by_value(pixels, 0.0, 255.0)), tf.uint8)
    return images


def _reflect(positions: tf.Tensor, size: int) -> tf.Tensor:
    """Fold positions back into [0, size - 1], as often as it takes."""
    if size == 1:
        return tf.zeros_like(positions)
    positions = tf.abs(positions) % (2 * (size - 1))
    return (size - 1) - tf.abs((size - 1) - positions)


def _whole(positions: tf.Tensor, size: int) -> tf.Tensor:
    return tf.cast(tf.round(_reflect(positions, size)), tf.int32)


def _sample(images: tf.Tensor, rows: tf.Tensor, columns: tf.Tensor) -> tf.Tensor:
    """Read images between their pixels, bilinearly, at positions [n, height, width]."""
    count, height, width, channels = images.shape
    pixels = tf.cast(tf.reshape(images, [count, height * width, channels]), tf.float32)
    top = tf.clip_by_value(tf.floor(rows), 0.0, max(height - 2.0, 0.0))
    left = tf.clip_by_value(tf.floor(columns), 0.0, max(width - 2.0, 0.0))
    corner = tf.cast(top * width + left, tf.int32)
    down, right = min(height - 1, 1) * width, min(width - 1, 1)
    lower, later = (rows - top)[..., None], (columns - left)[..., None]

    def row(first: int) -> tf.Tensor:
        here = tf.gather(pixels, corner + first, batch_dims=1)
        return here + (tf.gather(pixels, corner + first + right, batch_dims=1) - here) * later

    upper = row(0)
    return tf.cast(tf.round(upper + (row(down) - upper) * lower), tf.uint8)
