"""Random changes of training images, on a whole batch at once."""

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
    if flip in ("horizontal", "both"):
        images = tf.where(draws[5, :, None, None, None] < 0, images[:, :, ::-1], images)
    if flip == "both":
        images = tf.where(draws[6, :, None, None, None] < 0, images[:, ::-1], images)
    if shift or rotation or zoom:
        down = tf.round(draws[0] * (shift * height))
        right = tf.round(draws[1] * (shift * width))
        angle = draws[2] * (rotation * 3.141592653589793 / 180)
        scale = 1 / (1 + draws[3] * zoom)
        cosine, sine = tf.cos(angle) * scale, tf.sin(angle) * scale
        y, x = (height - 1) / 2, (width - 1) / 2
        zero = tf.zeros_like(angle)
        # Where each pixel of the result comes from, turned and scaled about the centre.
        transform = tf.stack(
            [cosine, -sine, x - cosine * (x + right) + sine * (y + down),
             sine, cosine, y - sine * (x + right) - cosine * (y + down), zero, zero],
            axis=1,
        )  # fmt: skip
        images = tf.raw_ops.ImageProjectiveTransformV3(
            images=images,
            transforms=transform,
            output_shape=[height, width],
            fill_value=0.0,
            interpolation="BILINEAR" if rotation or zoom else "NEAREST",
            fill_mode="REFLECT",
        )
    if contrast:
        pixels = tf.cast(images, tf.float32)
        mean = tf.reduce_mean(pixels, axis=[1, 2, 3], keepdims=True)
        pixels = mean + (pixels - mean) * (1 + draws[4, :, None, None, None] * contrast)
        images = tf.cast(tf.round(tf.clip_by_value(pixels, 0.0, 255.0)), tf.uint8)
    return images
