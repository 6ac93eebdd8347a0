"""Write a backbone of `keras.applications`, with its ImageNet weights, to data/backbones/."""

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

from stages.utils import cli
from stages.utils.cli import UserError, first_line


def backbone(
    name: str, folder: str | Path = "data/backbones", weights: str | None = "imagenet"
) -> Path:
    """Write one network of `keras.applications` without its top.

    Parameters
    ----------
    name : str
        As in `keras.applications`, for instance ``"MobileNetV3Small"``.
    folder : path, default="data/backbones"
    weights : {"imagenet", None}, default="imagenet"
        None leaves them random, which serves tests only.

    Returns
    -------
    path : Path
        A Keras model: raw pixels 0 to 255 [n, h, w, 3] in, feature map out. The input scaling that
        the network documents (`preprocess_input`) is inside.

    Raises
    ------
    UserError
        If there is no such network, or its weights can't be downloaded.
    """
    with tempfile.TemporaryDirectory() as downloads:
        os.environ["KERAS_HOME"] = downloads  # read when Keras is imported
        from stages.model import model_file
        from stages.model.network import SCALING

        import keras  # isort: skip

        network = _network(keras.applications, name)
        try:
            with warnings.catch_warnings(action="ignore"):  # of weights made for another size
                body = network(include_top=False, weights=weights, input_shape=(None, None, 3))
        except Exception as error:  # whatever the network raises, in Keras or below it
            reason = first_line(error)
            raise UserError(
                f"{name}: its ImageNet weights can't be had: {reason}; this needs the network once,"
                " or a file that someone else wrote here and versioned with `dvc add`"
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
        raise UserError(f"{name}: no network of keras.applications; near it: {', '.join(near)}")
    return networks[name]


def _scaling(preprocess: Callable[[np.ndarray], Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return the matrix [3, 3] and offset [3] of an input scaling, which acts on each pixel."""
    probes = np.concatenate([np.zeros((1, 3)), np.eye(3)])[:, None, None].astype(np.float32)
    results = np.asarray(preprocess(probes.copy()))[:, 0, 0]
    return results[1:] - results[0], results[0]


def main() -> None:
    """Write the backbone that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m stages.backbone",
        description="Write a pre-trained backbone to data/backbones/.",
    )
    parser.add_argument("name", help="as in keras.applications, for instance MobileNetV3Small")
    path = backbone(parser.parse_args().name)
    cli.summary(
        "backbone",
        {
            "file": f"{path} ({path.stat().st_size / 1e6:.0f} MB)",
            "use it": f"params.yaml: train.backbone: {path.name}",
            "version it": f"dvc add {path}",
        },
    )


if __name__ == "__main__":
    cli.run(main, "no backbone was written")
