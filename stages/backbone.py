"""Write a network of `keras.applications`, with its ImageNet weights, to data/backbones/."""

import argparse
import difflib
import inspect
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from stages.run import cli, environment
from stages.run.cli import UserError, first_line


def backbone(
    name: str, folder: str | Path = "data/backbones", weights: str | None = "imagenet"
) -> Path:
    """Write a network of `keras.applications` without its classification head.

    Parameters
    ----------
    name : str
        As in `keras.applications`, for instance ``"MobileNetV3Small"``.
    folder : path, default="data/backbones"
    weights : {"imagenet", None}, default="imagenet"
        None gives random weights, for tests.

    Returns
    -------
    path : Path
        A Keras model file. The model takes raw pixels (0 to 255) of shape (n, height, width, 3) and
        returns a feature map; the network's own `preprocess_input` is part of it.

    Raises
    ------
    UserError
        If there is no such network, or its weights can't be downloaded.

    Notes
    -----
    The weights are downloaded to Keras's own folder, ``~/.keras`` or ``KERAS_HOME``; the command
    uses a temporary folder.
    """
    environment.load_tensorflow()
    import keras

    from stages.model import model_file
    from stages.model.network import SCALING

    network = _network(keras.applications, name)
    try:
        with warnings.catch_warnings(action="ignore"):  # about weights made for another size
            body = network(include_top=False, weights=weights, input_shape=(None, None, 3))
    except Exception as error:  # any error of the download, in Keras or below it
        raise UserError(
            f"{name}: can't download the ImageNet weights: {first_line(error)}. The first download"
            " needs internet access; or `dvc pull` a backbone that a teammate has pushed"
        ) from None
    matrix, offset = _scaling(sys.modules[network.__module__].preprocess_input)
    if not (np.array_equal(matrix, np.eye(3)) and not offset.any()):
        scaling = keras.layers.Conv2D(3, 1, name=SCALING, trainable=False)
        images = keras.Input((None, None, 3), name="pixels")
        body = keras.Model(images, body(scaling(images)), name=name)
        scaling.set_weights([matrix[None, None], offset])
    path = Path(folder) / f"{name}.keras"
    model_file.save(body, path)
    return path


def _network(applications: ModuleType, name: str) -> Callable[..., Any]:
    """Return the function of `keras.applications` that builds a network."""
    networks = dict(inspect.getmembers(applications, inspect.isfunction))
    if name not in networks:
        near = difflib.get_close_matches(name, networks, 3, 0.5) or sorted(networks)
        raise UserError(
            f"{name}: no such network in keras.applications; similar names: {', '.join(near)}"
        )
    return networks[name]


def _scaling(preprocess: Callable[[np.ndarray], Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return the matrix [3, 3] and offset [3] of an input scaling, which acts on each pixel."""
    probes = np.concatenate([np.zeros((1, 3)), np.eye(3)])[:, None, None].astype(np.float32)
    results = np.asarray(preprocess(probes.copy()))[:, 0, 0]
    return results[1:] - results[0], results[0]


def main(options: argparse.Namespace) -> None:
    """Write the backbone that the command line names."""
    with tempfile.TemporaryDirectory() as downloads:
        os.environ["KERAS_HOME"] = downloads  # Keras reads it on its import, in backbone()
        path = backbone(options.backbone)
    cli.summary(
        "backbone",
        {
            "file": f"{path} ({path.stat().st_size / 1e6:.0f} MB)",
            "use it": "python -m stages use FOLDER (sets params.yaml, lets DVC track this file)",
        },
    )


if __name__ == "__main__":
    raise SystemExit("run it as: python -m stages backbone")
