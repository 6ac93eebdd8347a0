"""Data augmentation: random changes to a whole batch of images at once."""

import functools
import math

import tensorflow as tf

from stages.model.device import XLA

_compiled = functools.partial(tf.function, jit_compile=XLA, autograph=False)


def augment(
    images: tf.Tensor,
    seed: tf.Tensor,
    *,
    flip: str = "none",
    translation: float = 0.0,
    rotation: float = 0.0,
    zoom: float = 0.0,
    contrast: float = 0.0,
    replica: int = 0,
    replicas: int = 1,
) -> tf.Tensor:
    """Augment the images of a batch, or a replica's share of them, at random.

    Parameters
    ----------
    images : uint8 tensor [n, height, width, channels]
    seed : int32 tensor [2]
        Fully determines the changes.
    flip : {"none", "horizontal", "both"}, default="none"
        Mirror left to right, or also upside down, each with probability 0.5.
    translation : float in [0, 1], default=0.0
        Largest shift, by whole pixels, as a fraction of height and of width.
    rotation : float in [0, 180], default=0.0
        Largest angle in degrees, in both directions.
    zoom : float in [0, 1), default=0.0
        Scale by a factor from 1 - zoom to 1 + zoom.
    contrast : float in [0, 1), default=0.0
        Scale the differences from the image's mean by a factor from 1 - contrast to 1 + contrast.
    replica, replicas : int, default=0, 1
        The images are share number `replica` of a batch of `replicas` equal shares: each image is
        changed as it would be in the whole batch.

    Returns
    -------
    images : uint8 tensor [n, height, width, channels]
        Interpolated bilinearly; what is outside of the original image is filled by reflection.
    """
    count = images.shape[0]
    draws = tf.random.stateless_uniform([7, count * replicas], seed, -1.0, 1.0)
    draws = draws[:, count * replica : count * (replica + 1)]
    halves = []
    for half in (slice(count // 2), slice(count // 2, count)):  # in parallel: XLA uses one core
        x, numbers = images[half], draws[:, half]
        if rotation or zoom:
            pixels, down, right = _source_positions(
                numbers, tuple(images.shape[1:3]), flip, translation, rotation, zoom
            )
            x = _interpolate(_take(_pack_neighbors(x), pixels), down, right)
        elif flip != "none" or translation:
            x = _flip_and_translate(x, numbers, flip, translation)
        halves.append(_change_contrast(x, numbers, contrast) if contrast else x)
    return tf.concat(halves, axis=0)


# Each step is compiled on its own: as one program, XLA would compute a pixel's position again for
# each channel and neighbor, which takes twice as long.


@_compiled
def _source_positions(
    draws: tf.Tensor,
    size: tuple[int, int],
    flip: str,
    translation: float,
    rotation: float,
    zoom: float,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Return the source pixel to the upper left, int32 [n, h, w], and distances down and right."""
    height, width = size
    rows, columns = _centered_coordinates(draws, height, width, flip, translation)
    angle, scale = draws[2] * math.radians(rotation), 1 / (1 + draws[3] * zoom)
    cosine = (tf.cos(angle) * scale)[:, None, None]
    sine = (tf.sin(angle) * scale)[:, None, None]
    rows, columns = rows[:, :, None], columns[:, None, :]
    y = _reflect(cosine * rows + sine * columns + (height - 1) / 2, height)
    x = _reflect(cosine * columns - sine * rows + (width - 1) / 2, width)
    top, left = tf.floor(y), tf.floor(x)
    return tf.cast(top * width + left, tf.int32), y - top, x - left


@_compiled
def _flip_and_translate(
    images: tf.Tensor, draws: tf.Tensor, flip: str, translation: float
) -> tf.Tensor:
    """Flip and translate by whole pixels, without interpolation."""
    height, width = images.shape[1:3]
    rows, columns = _centered_coordinates(draws, height, width, flip, translation)
    rows = tf.cast(tf.round(_reflect(rows + (height - 1) / 2, height)), tf.int32)
    columns = tf.cast(tf.round(_reflect(columns + (width - 1) / 2, width)), tf.int32)
    images = tf.gather(images, rows, axis=1, batch_dims=1)
    return tf.gather(images, columns, axis=2, batch_dims=1)


@_compiled
def _pack_neighbors(images: tf.Tensor) -> tf.Tensor:
    """Pack each pixel and its right, lower and lower right neighbors into one int32."""
    count, height, width, channels = images.shape
    pixels = tf.cast(images, tf.int32)
    pairs = pixels + 256 * tf.concat([pixels[:, :, 1:], pixels[:, :, -1:]], axis=2)
    below = tf.concat([pairs[:, 1:], pairs[:, -1:]], axis=1)
    squares = tf.bitwise.bitwise_or(pairs, tf.bitwise.left_shift(below, 16))
    return tf.reshape(squares, [count, height * width, channels])


@_compiled
def _take(squares: tf.Tensor, pixels: tf.Tensor) -> tf.Tensor:
    return tf.gather(squares, pixels, batch_dims=1)


@_compiled
def _interpolate(squares: tf.Tensor, down: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    """Interpolate bilinearly between the four packed pixels."""
    down, right = down[..., None], right[..., None]

    def pixel(number: int) -> tf.Tensor:
        byte = tf.bitwise.right_shift(squares, 8 * number)
        return tf.cast(tf.bitwise.bitwise_and(byte, 255), tf.float32)

    upper = pixel(0) + (pixel(1) - pixel(0)) * right
    lower = pixel(2) + (pixel(3) - pixel(2)) * right
    return tf.cast(tf.round(upper + (lower - upper) * down), tf.uint8)


@_compiled
def _change_contrast(images: tf.Tensor, draws: tf.Tensor, contrast: float) -> tf.Tensor:
    """Scale the differences from each image's mean."""
    pixels = tf.cast(images, tf.float32)
    mean = tf.reduce_mean(pixels, axis=[1, 2, 3], keepdims=True)
    pixels = mean + (pixels - mean) * (1 + draws[4, :, None, None, None] * contrast)
    return tf.cast(tf.round(tf.clip_by_value(pixels, 0.0, 255.0)), tf.uint8)


def _centered_coordinates(
    draws: tf.Tensor, height: int, width: int, flip: str, translation: float
) -> tuple[tf.Tensor, tf.Tensor]:
    """Return rows [n, height] and columns [n, width] from the center, translated and flipped."""
    rows = tf.range(height, dtype=tf.float32) - (height - 1) / 2
    rows -= tf.round(draws[0] * (translation * height))[:, None]
    columns = tf.range(width, dtype=tf.float32) - (width - 1) / 2
    columns -= tf.round(draws[1] * (translation * width))[:, None]
    if flip in ("horizontal", "both"):
        columns *= tf.where(draws[5] < 0, -1.0, 1.0)[:, None]
    if flip == "both":
        rows *= tf.where(draws[6] < 0, -1.0, 1.0)[:, None]
    return rows, columns


def _reflect(positions: tf.Tensor, size: int) -> tf.Tensor:
    """Reflect positions at the image's border into [0, size - 1]."""
    if size == 1:
        return tf.zeros_like(positions)
    period = 2.0 * (size - 1)
    positions -= period * tf.floor(positions / period)  # `%` is not vectorized
    return (size - 1) - tf.abs((size - 1) - positions)
