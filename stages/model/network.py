"""The network: convolutional blocks or a pre-trained backbone, and a dense head."""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from stages.model.parameters import Train
from stages.run.cli import UserError, first_line

SCALING = "scaling"  # a backbone's layer that rescales raw pixels; never trained
FLIP_AVERAGE = "both_ways"  # the layer that averages over an image and its mirror image
_STEM_SIZE = 64  # pixels; the first convolution downsamples larger images to about this size


@dataclass(frozen=True)
class Network:
    """A classifier and the models that share its layers.

    Images are uint8 [n, height, width, channels], features float32 [n, d], logits and probabilities
    float32 [n, classes]. Only with a backbone there are features.
    """

    classifier: keras.Model  # images to probabilities
    logits: keras.Model  # images to logits, without test-time augmentation: for training
    backbone: keras.Model | None = None  # images to features
    head: keras.Model | None = None  # features to probabilities
    head_logits: keras.Model | None = None  # features to logits: trained with a frozen backbone


def build(
    image_shape: tuple[int, int, int],
    classes: int,
    parameters: Train,
    backbone: Path | None = None,
    precision: str = "float32",
    for_training: bool = False,
) -> Network:
    """Build a network; only a backbone has trained weights.

    Each convolutional block halves height and width by max pooling after its first convolution, as
    long as both are at least two pixels. Where training images are flipped, the classifier of a
    network without a backbone has test-time augmentation: it averages the logits of an image and
    of its left-right mirror image, which is more accurate, at twice the inference time and no
    training time (Simonyan, Zisserman: Very deep convolutional networks for large-scale image
    recognition, 2014).

    Parameters
    ----------
    image_shape : (height, width, channels)
    classes : int
        The number of classes.
    parameters : Train
        Of these, the ones of the network and `augment.flip`.
    backbone : path, default=None
        A saved Keras model. Input: raw pixels 0 to 255 [n, h, w, 3] (grayscale is repeated).
        Output: a feature map [n, h, w, d], which is averaged over four quarters, or a vector
        [n, d]. Its batch normalization always runs in inference mode, even during fine-tuning.
    precision : str, default="float32"
        A Keras dtype policy.
    for_training : bool, default=False
        Whether the blocks have the faster `FusedBatchNormalization`, without which plain Keras can
        load the network. The weights are the same.

    Raises
    ------
    UserError
        If the file is not a usable backbone.
    """
    images = keras.Input(image_shape, dtype="uint8", name="images")
    keras.config.set_dtype_policy(precision)
    try:
        layers_of_head = _head_layers(classes, parameters.dense_units, parameters.dropout)
        if backbone is None:
            x = _convolutional_blocks(images, parameters, for_training)
            is_flipped = parameters.augment.flip != "none"
            classifier, logits = _apply_head(layers_of_head, images, x, is_flipped)
            return Network(classifier, logits)
        x = _apply_backbone(images, backbone, precision)
        classifier, logits = _apply_head(layers_of_head, images, x)
        features = keras.Input(x.shape[1:], name="features")
        head, head_logits = _apply_head(layers_of_head, features, features)
        return Network(classifier, logits, keras.Model(images, x), head, head_logits)
    finally:
        keras.config.set_dtype_policy("float32")


class FusedBatchNormalization(layers.BatchNormalization):
    """Keras's batch normalization, computed in training by one operation of TensorFlow.

    Keras computes it by a dozen elementwise operations, with which a training step takes 3 % longer
    on a CPU with AVX2. Here the moving variance is that of unbiased variances, as in PyTorch.
    """

    def call(
        self, inputs: tf.Tensor, training: bool | None = None, mask: tf.Tensor | None = None
    ) -> tf.Tensor:
        one_value = inputs.shape[:-1].num_elements() == 1  # of which cuDNN can't tell the variance
        if one_value or not (training and self.trainable):
            return super().call(inputs, training, mask)
        outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=inputs,
            scale=self.gamma,
            offset=self.beta,
            mean=self.moving_mean,
            variance=self.moving_variance,
            epsilon=self.epsilon,
            exponential_avg_factor=1 - self.momentum,
            is_training=True,
        )
        self.moving_mean.assign(mean)
        self.moving_variance.assign(variance)
        return outputs


def accept_floats(classifier: keras.Model) -> keras.Model:
    """Return a classifier that also takes images as floats, and refuses what are not pixels.

    Keras casts whatever it is given to the type of a model's input: with a uint8 input, pixels
    that were divided by 255 would all become 0 without a word. So the input is float32, and:

    - values from 0 to 255, of any type, are rounded; uint8 pixels give the same result as before;
    - an image of values from 0 to 1, some of them not whole, was divided by 255: it is multiplied;
    - an image with other values (below 0, above 255, NaN) gets NaN for all its probabilities.

    Parameters
    ----------
    classifier : Keras model
        uint8 images [n, height, width, channels] to probabilities [n, classes].

    Returns
    -------
    model : Keras model
        Images of any type to probabilities.
    """
    images = keras.Input(classifier.input_shape[1:], dtype="float32", name="images")
    in_range = keras.ops.logical_and(images >= 0, images <= 255)  # of pixels; False for NaN
    has_fractions = keras.ops.any(images != keras.ops.round(images), (1, 2, 3), keepdims=True)
    is_small = keras.ops.all(images <= 1, (1, 2, 3), keepdims=True)
    is_divided = keras.ops.logical_and(has_fractions, is_small)
    pixels = keras.ops.round(keras.ops.where(is_divided, images * 255, images))
    probabilities = classifier(keras.ops.cast(keras.ops.clip(pixels, 0, 255), "uint8"))
    is_valid = keras.ops.expand_dims(keras.ops.all(in_range, (1, 2, 3)), -1)
    return keras.Model(images, keras.ops.where(is_valid, probabilities, np.nan), name="classifier")


def flatten_layers(model: keras.Model) -> list[layers.Layer]:
    """Return a model's layers in order, with nested models replaced by their layers."""
    flat: list[layers.Layer] = []
    for layer in model.layers:
        flat += flatten_layers(layer) if isinstance(layer, keras.Model) else [layer]
    return list(dict.fromkeys(flat))  # a shared layer counts once


def _apply_head(
    head: list[layers.Layer],
    inputs: keras.KerasTensor,
    x: keras.KerasTensor,
    test_time_augmentation: bool = False,
) -> tuple[keras.Model, keras.Model]:
    """Return a model from `inputs` to probabilities and one to logits; `x` enters the head."""
    for layer in head[:-1]:
        x = layer(x)
    logits = keras.Model(inputs, x, name="network")
    if test_time_augmentation:
        mirrored = keras.ops.flip(inputs, axis=2)
        x = layers.Average(name=FLIP_AVERAGE)([logits(inputs), logits(mirrored)])
    return keras.Model(inputs, head[-1](x)), logits


def _convolutional_blocks(
    images: keras.KerasTensor, parameters: Train, for_training: bool
) -> keras.KerasTensor:
    """Apply the stem and the blocks to images: features [n, d]."""
    x = layers.Rescaling(1 / 64, -2, name="rescale")(images)  # about zero mean, unit variance
    height, width, channels = images.shape[1:]
    stride = max(1, min(height, width) // _STEM_SIZE)
    stem = layers.Conv2D(8 * channels, 2 * stride, stride, padding="same", name="stem")
    x = layers.Activation("relu", name="stem_relu")(stem(x))
    stem.set_weights([_stem_kernel(2 * stride, channels), np.zeros(8 * channels)])
    normalization = FusedBatchNormalization if for_training else layers.BatchNormalization
    for block, filters in enumerate(parameters.filters, 1):
        for number in range(1, parameters.convs_per_block + 1):
            name = f"block{block}_convolution{number}"
            x = layers.Conv2D(
                filters,
                3,
                padding="same",
                use_bias=not parameters.batch_normalization,
                kernel_initializer="he_normal",
                name=name,
            )(x)
            # After the first: at full size, the others would take 4 times as long.
            if number == 1 and min(x.shape[1:3]) >= 2:
                x = layers.MaxPooling2D(name=f"block{block}_pooling")(x)
            if parameters.batch_normalization:
                x = normalization(momentum=0.9, name=f"{name}_normalization")(x)
            x = layers.Activation("relu", name=f"{name}_relu")(x)
    x = layers.MaxPooling2D(x.shape[1:3], name="last_pooling")(x)  # keeps the head small
    return layers.Flatten(name="flatten")(x)


def _stem_kernel(size: int, channels: int) -> np.ndarray:
    """Return the stem's initial kernel [size, size, channels, 8 * channels].

    The 2×2 Haar wavelets, stretched to `size`, of brightness and of the two opponent colors. Each
    is divided by its usual standard deviation in photographs, so that the blocks start with inputs
    of equal scale: a stand-in for whitening by the data's covariance (Coates, Ng: Learning feature
    representations with k-means, 2012). Each filter also occurs negated, because ReLU drops
    negative responses.
    """
    pair = np.array([[1, 1], [1, -1]]) / np.sqrt(2)
    wavelets = np.einsum("ai,bj->abij", pair, pair).reshape(4, 2, 2)
    cell = size // 2
    wavelets = wavelets.repeat(cell, 1).repeat(cell, 2) / cell**2
    if channels == 3:
        colors = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
        deviations = [[3.1, 1, 0.5], [0.6, 0.12, 0.11], [0.6, 0.12, 0.11], [0.25, 0.1, 0.1]]
    else:
        colors, deviations = np.eye(1), [[1.8], [0.4], [0.4], [0.2]]
    kernel = np.einsum("phw,dc,pd->hwcpd", wavelets, colors, 1 / np.array(deviations))
    kernel = kernel.reshape(size, size, channels, -1)
    return np.concatenate([kernel, -kernel], axis=-1)


def _apply_backbone(images: keras.KerasTensor, path: Path, precision: str) -> keras.KerasTensor:
    """Apply a backbone to images: features [n, d]."""
    backbone = _load_backbone(path)
    backbone.name = "backbone"
    for layer in flatten_layers(backbone):
        layer.dtype_policy = precision  # instead of the saved one
        # Frozen batch normalization runs in inference mode. Calling the backbone with
        # `training=False` would not do: the outer model's `training=True` overrides it.
        frozen = isinstance(layer, layers.BatchNormalization) or layer.name == SCALING
        layer.trainable = not frozen
    x = layers.Rescaling(1.0, name="to_float")(images)
    if images.shape[-1] == 1:
        x = layers.Concatenate(name="gray_to_color")([x, x, x])
    try:
        x = backbone(x)
    except ValueError:
        raise UserError(
            f"{path}: train.backbone: expected images of shape {backbone.input_shape}, found"
            f" {(None, *images.shape[1:3], 3)}; set prepare.image_size to the backbone's size"
        ) from None
    if len(x.shape) == 4:  # average four overlapping quarters: keeps rough positions
        strides = [max(1, side // 2) for side in x.shape[1:3]]
        window = [side - side // 2 for side in x.shape[1:3]]
        x = layers.AveragePooling2D(window, strides, name="quarters")(x)
        x = layers.Flatten(name="flatten")(x)
    return x


def _load_backbone(path: Path) -> keras.Model:
    """Load a backbone and check its input, output and weights."""
    hint = "`python -m stages backbone NAME` writes one"
    try:
        backbone = keras.saving.load_model(path, compile=False, safe_mode=True)
    except (ValueError, TypeError, KeyError, OSError, zipfile.BadZipFile) as error:
        if getattr(error, "strerror", None):  # of the system: Keras extracts the weights to a file
            raise
        reason = first_line(error) if zipfile.is_zipfile(path) else "not a complete .keras file"
        raise UserError(f"{path}: train.backbone: Keras can't load it: {reason}; {hint}") from None
    inputs, outputs = backbone.input_shape, backbone.output_shape
    dtypes = {weight.dtype for weight in backbone.weights if "float" in weight.dtype}
    has_features = isinstance(outputs, tuple) and len(outputs) in (2, 4)  # a list: several outputs
    for valid, expected, found in (
        (len(inputs) == 4 and inputs[-1] == 3, "input (None, height, width, 3)", inputs),
        (has_features, "output (None, height, width, d) or (None, d)", outputs),
        (dtypes <= {"float32"}, "float32 weights", sorted(dtypes)),
    ):
        if not valid:
            raise UserError(
                f"{path}: train.backbone: expected a model with {expected}, found {found}; {hint}"
            )
    return backbone


def _head_layers(classes: int, dense_units: int, dropout: float) -> list[layers.Layer]:
    """Return the head's layers, to be applied to images' features and to cached ones."""
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
