"""The network: a convolutional trunk or a pre-trained backbone, and dense layers on top."""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
from keras import layers

from stages.utils.cli import UserError, first_line

SCALING = "scaling"  # the layer of a backbone that only brings pixels to its range
_STEM_MAP = 64  # the first convolution shrinks larger images towards this many pixels a side


@dataclass(frozen=True)
class Network:
    """A classifier and its parts, which share their layers.

    Attributes
    ----------
    model : Keras model
        uint8 images [n, height, width, channels] to probabilities [n, classes].
    logits : Keras model
        Without softmax, and without the mirror image: what learns.
    backbone : Keras model or None
        uint8 images to vectors [n, d]: what is computed once while it is frozen.
    head, head_logits : Keras model or None
        Those vectors to probabilities, and to logits.
    """

    model: keras.Model
    logits: keras.Model
    backbone: keras.Model | None = None
    head: keras.Model | None = None
    head_logits: keras.Model | None = None


def build(
    image_shape: tuple[int, int, int],
    classes: int,
    *,
    backbone: Path | None = None,
    filters: Sequence[int] = (),
    convs_per_block: int = 2,
    batch_normalization: bool = True,
    dense_units: int = 0,
    dropout: float = 0.0,
    mirrored: bool = False,
    precision: str = "float32",
) -> Network:
    """Build a network with new weights in its dense part, and in its trunk if it has no backbone.

    Parameters
    ----------
    image_shape : (height, width, channels)
    classes : int
    backbone : path, default=None
        A saved Keras model: raw pixels 0 to 255 [n, h, w, 3] in (grey images are repeated), a
        feature map [n, h, w, d] (averaged over its quarters here) or a vector [n, d] out. Its
        batch normalisation is frozen: it runs as in prediction, also while other weights are
        fine-tuned.
    filters : sequence of int
        Without a backbone, channels of each block's convolutions. Max pooling halves the map in
        each block for as long as it has two pixels a side.
    convolutions : int, default=2
        In each block; pooling comes after the first.
    batch_normalization : bool, default=True
    dense_units : int, default=0
        Of the layer before the softmax; 0 leaves it out.
    dropout : float in [0, 1), default=0.0
        Before each dense layer.
    mirrored : bool, default=False
        Average the logits of an image and of its mirror image, left to right, where both are known
        to be of one class: fewer mistakes, at twice the time of a prediction and none of learning
        (K. Simonyan, A. Zisserman, Very deep convolutional networks for large-scale image
        recognition, 2014). Unused with a backbone.
    precision : str, default="float32"
        A Keras dtype policy.

    Returns
    -------
    network : Network

    Raises
    ------
    UserError
        If the backbone's file is no such model.
    """
    images = keras.Input(image_shape, dtype="uint8", name="images")
    keras.config.set_dtype_policy(precision)
    try:
        head = _head(classes, dense_units, dropout)
        if backbone is None:
            x = _convolutions(images, filters, convs_per_block, batch_normalization)
            return Network(*_models(images, x, head, mirrored))
        x = _backbone(images, backbone, precision)
        vectors = keras.Input(x.shape[1:], name="vectors")
        return Network(
            *_models(images, x, head), keras.Model(images, x), *_models(vectors, vectors, head)
        )
    finally:
        keras.config.set_dtype_policy("float32")


def leaves(model: layers.Layer) -> list[layers.Layer]:
    """Return the layers of a model that hold no other layers, each once, in their order."""
    if not model._layers:
        return [model]
    return list(dict.fromkeys(leaf for layer in model._layers for leaf in leaves(layer)))


def _models(
    inputs: keras.KerasTensor,
    x: keras.KerasTensor,
    head: list[layers.Layer],
    mirrored: bool = False,
) -> tuple[keras.Model, keras.Model]:
    """Apply the head's layers to `x`: a model to probabilities and one to logits."""
    for layer in head[:-1]:
        x = layer(x)
    logits = keras.Model(inputs, x, name="network")
    if mirrored:
        mirror = keras.ops.flip(inputs, axis=2)
        x = layers.Average(name="both_ways")([logits(inputs), logits(mirror)])
    return keras.Model(inputs, head[-1](x)), logits


def _convolutions(
    images: keras.KerasTensor,
    filters: Sequence[int],
    convs_per_block: int,
    batch_normalization: bool,
) -> keras.KerasTensor:
    x = layers.Rescaling(1 / 64, -2, name="rescale")(images)  # about mean 0 and deviation 1
    height, width, channels = images.shape[1:]
    stride = max(1, min(height, width) // _STEM_MAP)
    stem = layers.Conv2D(8 * channels, 2 * stride, stride, padding="same", name="stem")
    x = layers.Activation("relu", name="stem_relu")(stem(x))
    stem.set_weights([_opponents(2 * stride, channels), np.zeros(8 * channels)])
    for block, channels in enumerate(filters, 1):
        for number in range(1, convs_per_block + 1):
            name = f"block{block}_convolution{number}"
            x = layers.Conv2D(
                channels,
                3,
                padding="same",
                use_bias=not batch_normalization,
                kernel_initializer="he_normal",
                name=name,
            )(x)
            if number == 1 and min(x.shape[1:3]) >= 2:  # further ones cost a quarter
                x = layers.MaxPooling2D(name=f"block{block}_pooling")(x)
            if batch_normalization:
                x = layers.BatchNormalization(momentum=0.9, name=f"{name}_normalization")(x)
            x = layers.Activation("relu", name=f"{name}_relu")(x)
    x = layers.MaxPooling2D(x.shape[1:3], name="last_pooling")(x)  # the dense part stays small
    return layers.Flatten(name="flatten")(x)


def _opponents(size: int, channels: int) -> np.ndarray:
    """First kernel [size, size, channels, 8 channels]: even inputs for the blocks from the start.

    The 2×2 Haar wavelets (stretched over a larger kernel) of brightness and of the two opponent
    colours, each divided by its usual deviation in photographs, and their negatives, since what
    follows drops negative values. Stands in for whitening by the covariance of the data
    (Coates, Ng: Learning Feature Representations with K-means, 2012).
    """
    pair = np.array([[1, 1], [1, -1]]) / np.sqrt(2)
    wavelets = np.einsum("ai,bj->abij", pair, pair).reshape(4, 2, 2)
    cell = size // 2
    wavelets = wavelets.repeat(cell, 1).repeat(cell, 2) / cell**2
    if channels == 3:
        colours = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
        deviations = [[3.1, 1, 0.5], [0.6, 0.12, 0.11], [0.6, 0.12, 0.11], [0.25, 0.1, 0.1]]
    else:
        colours, deviations = np.eye(1), [[1.8], [0.4], [0.4], [0.2]]
    kernel = np.einsum("phw,dc,pd->hwcpd", wavelets, colours, 1 / np.array(deviations))
    kernel = kernel.reshape(size, size, channels, -1)
    return np.concatenate([kernel, -kernel], axis=-1)


def _backbone(images: keras.KerasTensor, path: Path, precision: str) -> keras.KerasTensor:
    body = _load(path)
    body.name = "backbone"
    for layer in leaves(body):
        layer.dtype_policy = precision  # it was saved with its own
        # A frozen one runs as in prediction; `training=False` would not hold within a model.
        fixed = isinstance(layer, layers.BatchNormalization) or layer.name == SCALING
        layer.trainable = not fixed
    x = layers.Rescaling(1.0, name="to_float")(images)
    if images.shape[-1] == 1:
        x = layers.Concatenate(name="grey_to_colour")([x, x, x])
    try:
        x = body(x)
    except ValueError:
        raise UserError(
            f"{path}: train.backbone: takes {body.input_shape}, and the images are"
            f" {(None, *images.shape[1:3], 3)}; set prepare.image_size to what it takes"
        ) from None
    if len(x.shape) == 4:  # four overlapping quarters: roughly where things are helps the head
        strides = [max(1, side // 2) for side in x.shape[1:3]]
        window = [side - side // 2 for side in x.shape[1:3]]
        x = layers.AveragePooling2D(window, strides, name="quarters")(x)
        x = layers.Flatten(name="flatten")(x)
    return x


def _load(path: Path) -> keras.Model:
    """Load a backbone, and refuse what is none."""
    try:
        body = keras.saving.load_model(path, compile=False, safe_mode=True)
    except (ValueError, TypeError, KeyError, OSError, zipfile.BadZipFile) as error:
        reason = first_line(error) if zipfile.is_zipfile(path) else "no .keras file, or cut short"
        raise UserError(
            f"{path}: train.backbone: Keras can't load it: {reason};"
            " `python -m stages.backbone NAME` writes one"
        ) from None
    takes, gives = body.input_shape, body.output_shape
    kinds = {weight.dtype for weight in body.weights if "float" in weight.dtype}
    one = isinstance(gives, tuple)  # and no list of several outputs
    for good, expected, found in (
        (len(takes) == 4 and takes[-1] == 3, "takes (None, height, width, 3)", takes),
        (one and len(gives) in (2, 4), "gives (None, height, width, d) or (None, d)", gives),
        (kinds <= {"float32"}, "holds float32 weights", sorted(kinds)),
    ):
        if not good:
            raise UserError(
                f"{path}: train.backbone: expected a model that {expected}, found {found};"
                " `python -m stages.backbone NAME` writes one"
            )
    return body


def _head(classes: int, dense_units: int, dropout: float) -> list[layers.Layer]:
    """The dense part, as layers, so that one head serves images and stored vectors."""
    hidden = []
    if dense_units:
        hidden = [
            layers.Dropout(dropout, name="dense_dropout"),
            layers.Dense(
                dense_units, activation="relu", kernel_initializer="he_normal", name="dense"
            ),
        ]
    return [
        *hidden,
        layers.Dropout(dropout, name="dropout"),
        layers.Dense(classes, name="logits"),
        layers.Softmax(dtype="float32", name="probabilities"),
    ]
