"""The model as an ONNX file, which ONNX Runtime runs without TensorFlow."""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.run.cli import UserError, first_line

if TYPE_CHECKING:
    import keras

PredictFn = Callable[[Iterable[np.ndarray]], np.ndarray]

_OPSET = 17  # of ONNX: old enough for ONNX Runtime 1.12 and for browsers


def convert(network: "keras.Model", path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write a model as ONNX.

    Parameters
    ----------
    network : Keras model
        uint8 images of shape (n, height, width, channels) to probabilities, float32 of shape
        (n, classes). The ONNX model takes and returns the same, as ``images`` and
        ``probabilities``, for any n.
    path : path
    metadata : mapping of str to str
        Stored in the file.

    Raises
    ------
    UserError
        If a package is missing.
    """
    try:
        import onnx
        import tensorflow as tf
        import tf2onnx
    except ImportError as error:
        raise UserError(
            f"export needs the package {error.name}, which is not installed: run"
            ' `pip install ".[export]"`'
        ) from None
    inputs = [tf.TensorSpec((None, *network.input_shape[1:]), tf.uint8, "images")]
    infer = tf.function(
        lambda images: {"probabilities": network(images, training=False)}, input_signature=inputs
    )
    with warnings.catch_warnings(action="ignore"):  # of tf2onnx, about NumPy
        model, _ = tf2onnx.convert.from_function(
            infer, inputs, opset=_OPSET, custom_op_handlers={"Erfc": (_erfc, [])}
        )
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def _erfc(graph: Any, node: Any, name: str, _: list[Any]) -> None:
    """Convert TensorFlow's erfc, a part of GELU, to 1 - erf; tf2onnx 1.17 does not know it."""
    erf = graph.make_node("Erf", node.input)
    one = graph.make_const(f"{name}_one", np.float32(1))
    node.type = "Sub"
    graph.replace_inputs(node, [one.output[0], erf.output[0]])


def load(path: str | Path) -> tuple[PredictFn, dict[str, str]]:
    """Open an ONNX model with ONNX Runtime, on the CPU.

    Returns
    -------
    predict_fn : function
        Takes an iterable of uint8 arrays of shape (n, height, width, channels) and returns the
        probabilities of all their images, float32 of shape (total, classes). Each array is run as
        one batch, so its size bounds the memory.
    metadata : dict of str to str

    Raises
    ------
    UserError
        If ONNX Runtime is not installed, or can't read the file.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UserError(
            f'{path}: needs ONNX Runtime, which is not installed: run `pip install ".[export]"`'
        ) from None
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own kinds, which are not exported
        raise UserError(f"{path}: ONNX Runtime can't read it: {first_line(error)}") from None

    def predict_fn(batches: Iterable[np.ndarray]) -> np.ndarray:
        return np.concatenate(
            [session.run(["probabilities"], {"images": images})[0] for images in batches]
        )

    return predict_fn, dict(session.get_modelmeta().custom_metadata_map)


def model_md5(path: str | Path) -> str:
    """Return the MD5 of a model file, by which an export names the model it was made from."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
