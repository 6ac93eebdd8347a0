"""The model as an ONNX file, which ONNX Runtime runs without TensorFlow."""

import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stages.run.cli import UserError, first_line

if TYPE_CHECKING:
    import keras
    import onnx

PACKAGES = "onnx==1.23.2 onnxruntime==1.32.0 tf2onnx==1.17.0"
_OPSET = 17  # of ONNX: old enough for ONNX Runtime 1.12 and for browsers
_BATCH_SIZE = 32  # images


def convert(network: "keras.Model", path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write a model as ONNX; equal models give byte-identical files.

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
            f" `pip install {PACKAGES}`"
        ) from None
    inputs = [tf.TensorSpec((None, *network.input_shape[1:]), tf.uint8, "images")]
    infer = tf.function(lambda images: network(images, training=False), input_signature=inputs)
    with warnings.catch_warnings(action="ignore"):  # of tf2onnx, about NumPy
        model, _ = tf2onnx.convert.from_function(infer, inputs, opset=_OPSET)
    _rename_in_order(model.graph)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def load(
    path: str | Path,
) -> tuple[Callable[[Iterable[np.ndarray]], np.ndarray], dict[str, str]]:
    """Open an ONNX model with ONNX Runtime, on the CPU.

    Returns
    -------
    predict : function
        Takes an iterable of uint8 arrays of shape (n, height, width, channels) and returns the
        probabilities of all their images, float32 of shape (total, classes).
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
            f"{path}: needs ONNX Runtime, which is not installed: run `pip install"
            f" {PACKAGES.split()[1]}`"
        ) from None
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own kinds, which are not exported
        raise UserError(f"{path}: ONNX Runtime can't read it: {first_line(error)}") from None
    classes = session.get_outputs()[0].shape[1]

    def predict(chunks: Iterable[np.ndarray]) -> np.ndarray:
        results = [np.zeros((0, classes), np.float32)]
        for chunk in chunks:
            for start in range(0, len(chunk), _BATCH_SIZE):
                images = chunk[start : start + _BATCH_SIZE]
                results += session.run(["probabilities"], {"images": images})
        return np.concatenate(results)

    return predict, dict(session.get_modelmeta().custom_metadata_map)


def _rename_in_order(graph: "onnx.GraphProto") -> None:
    """Name tensors and nodes by their order of use: the converter's names differ in each run."""
    names = {"": "", graph.input[0].name: "images", graph.output[0].name: "probabilities"}
    numbers = itertools.count()
    for position, node in enumerate(graph.node):
        node.name = f"{node.op_type}_{position}"
        for tensors in (node.input, node.output):
            for place, name in enumerate(tensors):
                if name not in names:
                    names[name] = f"tensor_{next(numbers)}"
                tensors[place] = names[name]
    for value in (*graph.initializer, *graph.input, *graph.output):
        value.name = names[value.name]
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "n"
    graph.initializer.sort(key=lambda tensor: int(tensor.name.removeprefix("tensor_")))
    graph.name, graph.doc_string = "classifier", ""
    del graph.value_info[:]
