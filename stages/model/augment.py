"""Random changes of training images, on a whole batch at once."""

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
) -> tf.Tensor:
    """Change every image of a batch at random: an image in, an image out.

    Parameters
    ----------
    images : uint8 tensor [n, height, width, channels]
    seed : int32 tensor [2]
        The changes follow from it alone.
    flip : {"none", "horizontal", "both"}, default="none"
        Mirrored left to right (and upside down) in half of the cases.
    translation : float in [0, 1], default=0.0
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
    count = images.shape[0]
    draws = tf.random.stateless_uniform([7, count], seed, -1.0, 1.0)
    halves = []
    for half in (slice(count // 2), slice(count // 2, count)):  # at once: each keeps one core busy
        some, its = images[half], draws[:, half]
        if rotation or zoom:
            corners, down, right = _positions(
                its, tuple(images.shape[1:3]), flip, translation, rotation, zoom
            )
            some = _between(_pick(_squares(some), corners), down, right)
        elif flip != "none" or translation:
            some = _moved(some, its, flip, translation)
        halves.append(_contrasted(some, its, contrast) if contrast else some)
    return tf.concat(halves, axis=0)


# Each of these is a program of its own: as one, XLA would compute each pixel's position anew for
# each channel and corner, which takes twice as long.


@_compiled
def _positions(
    draws: tf.Tensor,
    size: tuple[int, int],
    flip: str,
    translation: float,
    rotation: float,
    zoom: float,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Say where each pixel of the result is read.

    Returns the number of the pixel to its upper left, int32 [n, height, width], and how far below
    and to the right of that one it lies, from 0 to 1.
    """
    height, width = size
    rows, columns = _coordinates(draws, height, width, flip, translation)
    angle, scale = draws[2] * math.radians(rotation), 1 / (1 + draws[3] * zoom)
    cosine = (tf.cos(angle) * scale)[:, None, None]
    sine = (tf.sin(angle) * scale)[:, None, None]
    rows, columns = rows[:, :, None], columns[:, None, :]
    y = _reflect(cosine * rows + sine * columns + (height - 1) / 2, height)
    x = _reflect(cosine * columns - sine * rows + (width - 1) / 2, width)
    top, left = tf.floor(y), tf.floor(x)
    return tf.cast(top * width + left, tf.int32), y - top, x - left


@_compiled
def _moved(images: tf.Tensor, draws: tf.Tensor, flip: str, translation: float) -> tf.Tensor:
    """Move and mirror images, by whole pixels."""
    height, width = images.shape[1:3]
    rows, columns = _coordinates(draws, height, width, flip, translation)
    rows = tf.cast(tf.round(_reflect(rows + (height - 1) / 2, height)), tf.int32)
    columns = tf.cast(tf.round(_reflect(columns + (width - 1) / 2, width)), tf.int32)
    images = tf.gather(images, rows, axis=1, batch_dims=1)
    return tf.gather(images, columns, axis=2, batch_dims=1)


@_compiled
def _squares(images: tf.Tensor) -> tf.Tensor:
    """Put each pixel, its right, lower and lower right neighbour into the bytes of one int32."""
    count, height, width, channels = images.shape
    pixels = tf.cast(images, tf.int32)
    pairs = pixels + 256 * tf.concat([pixels[:, :, 1:], pixels[:, :, -1:]], axis=2)
    below = tf.concat([pairs[:, 1:], pairs[:, -1:]], axis=1)
    squares = tf.bitwise.bitwise_or(pairs, tf.bitwise.left_shift(below, 16))
    return tf.reshape(squares, [count, height * width, channels])


@_compiled
def _pick(squares: tf.Tensor, corners: tf.Tensor) -> tf.Tensor:
    return tf.gather(squares, corners, batch_dims=1)


@_compiled
def _between(squares: tf.Tensor, down: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    """Read between the four pixels of squares, bilinearly."""
    down, right = down[..., None], right[..., None]

    def corner(number: int) -> tf.Tensor:
        byte = tf.bitwise.right_shift(squares, 8 * number)
        return tf.cast(tf.bitwise.bitwise_and(byte, 255), tf.float32)

    upper = corner(0) + (corner(1) - corner(0)) * right
    lower = corner(2) + (corner(3) - corner(2)) * right
    return tf.cast(tf.round(upper + (lower - upper) * down), tf.uint8)


@_compiled
def _contrasted(images: tf.Tensor, draws: tf.Tensor, contrast: float) -> tf.Tensor:
    """Scale the distances from each image's mean."""
    pixels = tf.cast(images, tf.float32)
    mean = tf.reduce_mean(pixels, axis=[1, 2, 3], keepdims=True)
    pixels = mean + (pixels - mean) * (1 + draws[4, :, None, None, None] * contrast)
    return tf.cast(tf.round(tf.clip_by_value(pixels, 0.0, 255.0)), tf.uint8)


def _coordinates(
    draws: tf.Tensor, height: int, width: int, flip: str, translation: float
) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the rows [n, height] and columns [n, width] about the centre, moved and mirrored."""
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
    """Fold positions back into [0, size - 1], as often as it takes."""
    if size == 1:
        return tf.zeros_like(positions)
    period = 2.0 * (size - 1)
    positions -= period * tf.floor(positions / period)  # `%` is not vectorised
    return (size - 1) - tf.abs((size - 1) - positions)
