"""DINOv2 in layers of Keras: vision transformers, trained on 142 million images without labels.

M. Oquab et al.: DINOv2: Learning robust visual features without supervision, 2023. T. Darcet et
al.: Vision transformers need registers, 2023.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
from keras import layers

from stages.pretrained.safetensors import read_tensors
from stages.run.cli import UserError, list_names

PATCH = 14  # pixels, height and width; the size of an image is a multiple of it
SOURCE = "https://huggingface.co/facebook/{name}/resolve/{revision}/model.safetensors"
_EPSILON = 1e-6  # of the layer normalization


class Variant(NamedTuple):
    """One of the published networks."""

    width: int
    registers: int  # additional tokens, without which a few patches lose their content
    revision: str  # of the repository on Hugging Face
    sha256: str  # of its file
    blocks: int = 12
    grid: int = 37  # patches of its positions in the file, in height and in width

    @property
    def heads(self) -> int:
        """The number of attention heads."""
        return self.width // 64


VARIANTS = {
    "dinov2-small": Variant(
        384,
        0,
        "ed25f3a31f01632728cabb09d1542f84ab7b0056",
        "ae1e99fcefd534ed978cdeb8326f08030c96e28b7a81ffcbc98a857c84d14be1",
    ),
    "dinov2-base": Variant(
        768,
        0,
        "f9e44c814b77203eaa57a6bdbbd535f21ede1415",
        "d73036b56966966d07975d696bde331762f37297e2f095de8cea0040c3aa0841",
    ),
    "dinov2-with-registers-base": Variant(
        768,
        4,
        "a1d738ccfa7ae170945f210395d99dde8adb1805",
        "7a6f7b3b9fa4b8732e707476a03cd6cdce210048582f21aafb7991c17d98e362",
    ),
}


def build(variant: Variant, size: int) -> keras.Model:
    """Build a network with random weights.

    It takes images [n, size, size, 3], normalized by the mean and deviation of ImageNet, and
    returns vectors [n, 2 * width]: the class token and the mean of the patches' tokens, which are
    the features of DINOv2's own linear classifiers.
    """
    side, prefix, width = size // PATCH, 1 + variant.registers, variant.width
    images = keras.Input((size, size, 3), name="pixels")
    x = layers.Reshape((side, PATCH, side, PATCH * 3))(images)
    x = layers.Permute((1, 3, 2, 4))(x)
    x = layers.Reshape((side**2, PATCH**2 * 3))(x)
    # The projection's bias has the class token, the registers and all positions.
    x = layers.ZeroPadding1D((prefix, 0))(x)
    x = layers.EinsumDense(
        "ntp,pd->ntd", (prefix + side**2, width), bias_axes="td", name="patches"
    )(x)
    for block in range(variant.blocks):
        y = layers.LayerNormalization(epsilon=_EPSILON, name=f"block{block}_norm1")(x)
        attention = layers.MultiHeadAttention(
            variant.heads, width // variant.heads, name=f"block{block}_attention"
        )
        x = layers.Add()([x, attention(y, y)])
        y = layers.LayerNormalization(epsilon=_EPSILON, name=f"block{block}_norm2")(x)
        y = layers.Dense(4 * width, activation="gelu", name=f"block{block}_mlp1")(y)
        y = layers.Dense(width, name=f"block{block}_mlp2")(y)
        x = layers.Add()([x, y])
    x = layers.LayerNormalization(epsilon=_EPSILON, name="norm")(x)
    token = layers.Flatten()(layers.Cropping1D((0, prefix + side**2 - 1))(x))
    mean = layers.GlobalAveragePooling1D()(layers.Cropping1D((prefix, 0))(x))
    return keras.Model(images, layers.Concatenate()([token, mean]))


def load(variant: Variant, size: int, path: Path) -> keras.Model:
    """Build a network with the weights of a published file, tensors as in Hugging Face's classes.

    Raises
    ------
    UserError
        If it is no such file, or one of another network.
    """
    tensors = read_tensors(path)
    _check(variant, tensors, path)
    network = build(variant, size)
    for name, weights in _weights(variant, size // PATCH, tensors):
        network.get_layer(name).set_weights(weights)
    return network


def tensor_shapes(variant: Variant) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors of a published file."""
    width = variant.width
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.mask_token": (1, width),  # for pre-training only
        "embeddings.position_embeddings": (1, 1 + variant.grid**2, width),
        "embeddings.patch_embeddings.projection.weight": (width, 3, PATCH, PATCH),
        "embeddings.patch_embeddings.projection.bias": (width,),
    }
    if variant.registers:
        shapes["embeddings.register_tokens"] = (1, variant.registers, width)
    for start in (f"encoder.layer.{block}" for block in range(variant.blocks)):
        for name, inputs, outputs in (
            *((f"attention.attention.{part}", width, width) for part in ("query", "key", "value")),
            ("attention.output.dense", width, width),
            ("mlp.fc1", width, 4 * width),
            ("mlp.fc2", 4 * width, width),
        ):
            shapes[f"{start}.{name}.weight"] = (outputs, inputs)
            shapes[f"{start}.{name}.bias"] = (outputs,)
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[f"{start}.{name}"] = (width,)
        for name in ("layer_scale1", "layer_scale2"):
            shapes[f"{start}.{name}.lambda1"] = (width,)
    return shapes | {"layernorm.weight": (width,), "layernorm.bias": (width,)}


def _check(variant: Variant, tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """Refuse the tensors of another network."""
    expected = tensor_shapes(variant)
    found = {name: values.shape for name, values in tensors.items()}
    wrong = [
        f"{name} {found.get(name, 'is missing')}, expected {expected.get(name, 'none')}"
        for name in expected | found
        if found.get(name) != expected.get(name)
    ]
    if wrong:
        raise UserError(f"{path}: the weights of another network: {list_names(wrong, 3, '; ')}")


def _weights(
    variant: Variant, side: int, tensors: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Yield the name of each layer and its weights."""
    heads, width = variant.heads, variant.width
    positions = tensors["embeddings.position_embeddings"][0]
    bias = [tensors["embeddings.cls_token"][0] + positions[:1]]
    if variant.registers:
        bias.append(tensors["embeddings.register_tokens"][0])
    patches = _interpolate(positions[1:], side, antialias=variant.registers > 0)
    bias.append(patches + tensors["embeddings.patch_embeddings.projection.bias"])
    kernel = tensors["embeddings.patch_embeddings.projection.weight"].transpose(2, 3, 1, 0)
    yield "patches", [kernel.reshape(-1, width), np.concatenate(bias)]
    yield "norm", [tensors["layernorm.weight"], tensors["layernorm.bias"]]
    for block in range(variant.blocks):
        start = f"encoder.layer.{block}."
        # The scale of a residual branch becomes a part of its last layer.
        scale1, scale2 = (tensors[f"{start}layer_scale{number}.lambda1"] for number in (1, 2))

        def pair(name: str, start: str = start) -> tuple[np.ndarray, np.ndarray]:
            return tensors[f"{start}{name}.weight"].T, tensors[f"{start}{name}.bias"]

        attention = []
        for name in ("query", "key", "value"):
            kernel, shift = pair(f"attention.attention.{name}")
            attention += [kernel.reshape(width, heads, -1), shift.reshape(heads, -1)]
        kernel, shift = pair("attention.output.dense")
        attention += [(kernel * scale1).reshape(heads, -1, width), shift * scale1]
        yield f"block{block}_attention", attention
        yield f"block{block}_norm1", [*pair("norm1")]
        yield f"block{block}_norm2", [*pair("norm2")]
        yield f"block{block}_mlp1", [*pair("mlp.fc1")]
        yield f"block{block}_mlp2", [values * scale2 for values in pair("mlp.fc2")]


def _interpolate(positions: np.ndarray, side: int, antialias: bool) -> np.ndarray:
    """Resize the positions of a square of patches [n * n, width] to [side * side, width].

    As in DINOv2: bicubic, with antialiasing only in the networks with registers.
    """
    source, width = round(len(positions) ** 0.5), positions.shape[1]
    scale = source / side
    centers = scale * (np.arange(side) + 0.5) - 0.5
    taps = np.arange(-2, source + 2)  # two beyond each border
    stretch, a = (max(scale, 1.0), -0.5) if antialias else (1.0, -0.75)  # as in PyTorch
    d = np.abs(taps - centers[:, None]) / stretch
    near, far = ((a + 2) * d - a - 3) * d**2 + 1, a * (((d - 5) * d + 8) * d - 4)
    weights = np.where(d < 1, near, np.where(d < 2, far, 0))
    if antialias:  # nothing is beyond the border
        weights *= (taps >= 0) & (taps < source)
        weights /= weights.sum(1, keepdims=True)
    matrix = np.zeros((side, source))  # else the border is repeated
    np.add.at(matrix.T, np.clip(taps, 0, source - 1), weights.T)
    square = positions.reshape(source, source, width).astype(np.float64)
    resized = np.einsum("yi,xj,ijd->yxd", matrix, matrix, square, optimize=True)
    return resized.reshape(-1, width).astype(np.float32)
