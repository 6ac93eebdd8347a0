"""Write a network with pre-trained weights to data/backbones/, or list those to choose from."""

import argparse
import difflib
import functools
import hashlib
import inspect
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.display.backbones import BACKBONES, table
from stages.display.status import changed_since_run
from stages.run import cli, environment
from stages.run.cli import UserError, first_line

if TYPE_CHECKING:
    import keras

_SIZE = 224  # pixels; the default of a vision transformer


def backbone(
    name: str,
    folder: str | Path = "data/backbones",
    weights: str | Path | None = "imagenet",
    size: int | None = None,
) -> Path:
    """Write a pre-trained network without its classification head.

    Parameters
    ----------
    name : str
        As in `keras.applications`, for instance ``"MobileNetV3Small"``; or one of DINOv2, for
        instance ``"dinov2-small"``.
    folder : path, default="data/backbones"
    weights : path, "imagenet" or None, default="imagenet"
        A file of the published weights: the .h5 file of `keras.applications` without top, or
        ``model.safetensors``. ``"imagenet"`` downloads it, and checks its digest; None gives random
        weights, for tests.
    size : int, default=None
        Height and width of the images, of DINOv2 only, by default 224: a multiple of 14. The other
        networks take any size.

    Returns
    -------
    path : Path
        A Keras model file. The model takes raw pixels (0 to 255) of shape (n, height, width, 3) and
        returns a feature map (of DINOv2: a vector); the scaling of its inputs is part of it.

    Raises
    ------
    UserError
        If there is no such network, or its weights can't be downloaded or are not its own.

    Notes
    -----
    The weights are downloaded to Keras's own folder, ``~/.keras`` or ``KERAS_HOME``; the command
    uses a temporary folder.
    """
    environment.load_tensorflow()
    import keras

    from stages.model import model_file
    from stages.model.network import SCALING

    if weights not in ("imagenet", None):
        weights = cli.expand_home(weights)
        if not weights.is_file():
            raise UserError(f"--weights: {cli.no_such('file', weights)}")
    body, preprocess = _network(name, weights, size)
    matrix, offset = _scaling(preprocess)
    if not (np.array_equal(matrix, np.eye(3)) and not offset.any()):
        scaling = keras.layers.Conv2D(3, 1, name=SCALING, trainable=False)
        images = keras.Input(body.input_shape[1:], name="pixels")
        body = keras.Model(images, body(scaling(images)), name=name)
        scaling.set_weights([matrix[None, None], offset])
    path = Path(folder) / f"{name}.keras"
    model_file.save(body, path)
    return path


def from_model(
    name: str,
    model: str | Path = "data/model.keras",
    prepared: str | Path = "data/prepared",
    folder: str | Path = "data/backbones",
) -> Path:
    """Write the network of a trained model, without its dense layers, as a backbone.

    Parameters
    ----------
    name : str
        Of the file, without its ending.
    model : path, default="data/model.keras"
        A model file of this pipeline, as dvc.lock knows it.
    prepared : path, default="data/prepared"
        The output of prepare for this model, whose train and val images the file remembers, so that
        evaluate can leave them out, with those that the model's own backbone has learned from.
    folder : path, default="data/backbones"

    Returns
    -------
    path : Path
        A Keras model file as of `backbone`; it takes images of the model's size.

    Raises
    ------
    UserError
        If the model is not that of `prepared`, or takes gray images.
    """
    environment.load_tensorflow()
    import keras

    from stages.data.arrays import read_index
    from stages.model import model_file
    from stages.report.outputs import feature_network

    classifier, spec = model_file.load(model)
    if spec.image_shape[2] != 3:
        raise UserError(f"{model}: takes gray images, and a backbone color; set prepare.color_mode")
    path = Path(folder) / f"{name}.keras"
    if path.exists():
        raise UserError(f"{path} exists; give another name")
    if changed := changed_since_run(Path(), "prepare", "train"):
        raise UserError(
            f"{model}: not of the present data ({', '.join(changed[:3])}); `dvc repro` first"
        )
    index = read_index(Path(prepared) / "index.csv")
    none = np.zeros(0, np.uint64)
    before = model_file.read_learned(model) or (none, none)
    learned = model_file.Learned(
        *(
            np.union1d(keys, model_file.image_keys(index["digest"][index["split"] == split]))
            for split, keys in zip(("train", "val"), before, strict=True)
        )
    )
    features = feature_network(classifier)
    pixels = keras.Input(spec.image_shape, name="pixels")  # not uint8: augmented ones are between
    body = keras.models.clone_model(features, input_tensors=pixels)
    body.set_weights(features.get_weights())
    model_file.save(body, path, learned=learned)
    return path


def _network(
    name: str, weights: str | Path | None, size: int | None
) -> tuple["keras.Model", Callable[[np.ndarray], Any]]:
    """Return a network and the scaling of its inputs."""
    import keras

    from stages.pretrained import dinov2

    networks = dict(inspect.getmembers(keras.applications, inspect.isfunction))
    if name in dinov2.VARIANTS:
        scaling = keras.applications.imagenet_utils.preprocess_input
        return _transformer(name, weights, size or _SIZE), functools.partial(scaling, mode="torch")
    if name not in networks:
        names = [*BACKBONES, *networks]
        near = difflib.get_close_matches(name, names, 3, 0.5) or sorted(BACKBONES)
        raise UserError(
            f"{name}: no such network in keras.applications, and none of DINOv2; similar names:"
            f" {', '.join(near)}"
        )
    if size:
        raise UserError(f"--size: {name} takes images of any size; set prepare.image_size")
    try:
        with warnings.catch_warnings(action="ignore"):  # about weights made for another size
            body = networks[name](include_top=False, weights=weights, input_shape=(None, None, 3))
    except Exception as error:  # any error of the download, in Keras or below it
        if weights != "imagenet":
            raise UserError(
                f"{weights}: not the weights of {name} without top, an .h5 file:"
                f" {first_line(error)}"
            ) from None
        raise _download_failed(name, error) from None
    return body, sys.modules[networks[name].__module__].preprocess_input


def _transformer(name: str, weights: str | Path | None, size: int) -> "keras.Model":
    """Return a vision transformer."""
    import keras

    from stages.pretrained import dinov2

    variant = dinov2.VARIANTS[name]
    if size % dinov2.PATCH or size < dinov2.PATCH:
        below = max(1, size // dinov2.PATCH) * dinov2.PATCH
        raise UserError(
            f"--size: {size} is no multiple of {dinov2.PATCH} pixels, the size of a patch; next to"
            f" it are {below} and {below + dinov2.PATCH}"
        )
    if weights is None:
        return dinov2.build(variant, size)
    if weights == "imagenet":
        url = dinov2.SOURCE.format(name=name, revision=variant.revision)
        try:
            weights = keras.utils.get_file(f"{name}.safetensors", url, file_hash=variant.sha256)
        except Exception as error:  # any error of the download, in Keras or below it
            raise _download_failed(name, error) from None
    with open(weights, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != variant.sha256:  # of a file that the user names
        known = f"the published file has {variant.sha256}"
        print(f"{weights}: SHA-256 {digest} ({known})", file=sys.stderr)
    return dinov2.load(variant, size, Path(weights))


def _download_failed(name: str, error: Exception) -> UserError:
    """Return what to do after a failed download; Keras prints its address."""
    return UserError(
        f"{name}: can't download the weights: {first_line(error)}. Without internet access, get"
        f" this file on another computer, then `python -m stages backbone {name} --weights FILE`;"
        " or `dvc pull` a backbone that a teammate has pushed"
    )


def _scaling(preprocess: Callable[[np.ndarray], Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return the matrix [3, 3] and offset [3] of an input scaling, which acts on each pixel."""
    probes = np.concatenate([np.zeros((1, 3)), np.eye(3)])[:, None, None].astype(np.float32)
    results = np.asarray(preprocess(probes.copy()))[:, 0, 0]
    return results[1:] - results[0], results[0]


def main(options: argparse.Namespace) -> None:
    """Write the backbone that the command line names; without a name, list some."""
    if options.model:
        if options.backbone is None or options.weights or options.size:
            raise UserError("--from needs a name for the new backbone, and no --weights or --size")
        _print(from_model(options.backbone, cli.expand_home(options.model)))
        return
    if options.backbone is None:
        if options.weights or options.size:
            raise UserError(
                "name a backbone, for instance dinov2-small: --weights and --size are of one"
            )
        print(table())
        return
    with tempfile.TemporaryDirectory() as downloads:
        os.environ["KERAS_HOME"] = downloads  # Keras reads it on its import, in backbone()
        path = backbone(options.backbone, weights=options.weights or "imagenet", size=options.size)
    _print(path)


def _print(path: Path) -> None:
    cli.summary(
        "backbone",
        {
            "file": f"{path} ({path.stat().st_size / 1e6:.0f} MB)",
            "use it": f"python -m stages use FOLDER --backbone {path.stem} (sets params.yaml, lets"
            " DVC track this file)",
        },
    )


if __name__ == "__main__":
    raise SystemExit("run it as: python -m stages backbone")
