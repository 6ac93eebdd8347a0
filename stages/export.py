"""Export the model to data/export/: files that answer as the model does, without TensorFlow."""

import argparse
import importlib.metadata
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stages.data import color, depth, formats, images, listing, repair
from stages.data.arrays import ImageSpec, Split, read_split
from stages.data.corrections import FILE
from stages.deploy import onnx_model
from stages.deploy.card import model_card
from stages.deploy.onnx_model import PredictFn
from stages.deploy.page import RUNTIME, write_page
from stages.display.status import git
from stages.run import cli, environment, files
from stages.run.cli import UserError
from stages.run.params import load_yaml

_WEB_FOLDER = ".dvc/tmp/web"
_PROGRAM = Path(__file__).parent / "deploy" / "classify.py"
_BATCH_SIZE = 32  # images
_FORMATS = {"saved_model": "saved_model", "tflite": "model.tflite"}  # names of files
# What the exported program needs: packages, and modules of this one.
_PACKAGES = ("numpy", "onnxruntime", "pillow", "pillow-heif")
_MODULES = (images, color, depth, formats, listing, repair)


def export(
    model: str | Path = "data/model.keras",
    prepared: str | Path = "data/prepared",
    metrics: str | Path = "metrics",
    output: str | Path = "data/export",
    formats: Sequence[str] = (),
) -> dict[str, float]:
    """Export a model, and compare its answers with the model's own on all validation images.

    Parameters
    ----------
    model : path, default="data/model.keras"
        A model file of this pipeline.
    prepared : path, default="data/prepared"
        The output of prepare, for the validation images.
    metrics : path, default="metrics"
        The output of evaluate, for the model card.
    output : path, default="data/export"
        A folder, which is replaced: ``model.onnx``, ``labels.txt``, ``classify.py`` with what it
        needs (``stages``, ``requirements.txt``), ``MODEL_CARD.md`` if dvc.lock says that this model
        was evaluated, and ``index.html`` if ONNX Runtime Web is installed in .dvc/tmp/web.
    formats : sequence of {"saved_model", "tflite"}
        Formats to write beside ONNX; those that are in the folder already are written anew.

    Returns
    -------
    differences : dict of str to float
        For each format, the largest difference of a probability from the model's.

    Raises
    ------
    UserError
        If an exported model gives another class than the model for a validation image, if there
        are no validation images for this model, or if a package is missing. Nothing is written
        then.
    """
    environment.load_tensorflow()
    from stages.model import model_file
    from stages.model.inference import make_predict_fn

    network, spec = model_file.load(model)
    val = _read_validation(Path(prepared), spec, model)
    expected = make_predict_fn(network)(val.batches())
    network = _for_export(network)
    lock = _read_lock()
    version = _version(Path(model), lock)
    written = {name for name, file in _FORMATS.items() if Path(output, file).exists()}
    with files.atomic_write(output) as folder:
        folder.mkdir()
        metadata = {"image_spec": spec.to_json()} | version
        onnx_model.convert(network, folder / "model.onnx", metadata)
        predict_fns = {"onnx": onnx_model.load(folder / "model.onnx")[0]}
        for name, write in (("saved_model", _write_saved_model), ("tflite", _write_tflite)):
            if name in {*formats, *written}:
                predict_fns[name] = write(network, folder / _FORMATS[name])
        differences = {
            name: _largest_difference(name, predict_fn(val.batches(_BATCH_SIZE)), expected)
            for name, predict_fn in predict_fns.items()
        }
        _write_program(folder, spec)
        threshold = 0.0
        if version["model_md5"] in _md5s(lock, "evaluate", "deps").values():
            details = json.loads(Path(metrics, "evaluate_details.json").read_text("utf-8"))
            threshold = details.get("threshold", 0.0) % 1  # 1: no confidence is high enough
            card = model_card(metrics, spec, version, git("config", "user.name"))
            (folder / "MODEL_CARD.md").write_text(card, encoding="utf-8", newline="\n")
        runtime = Path(_WEB_FOLDER) / "node_modules" / "onnxruntime-web"
        if runtime.exists():
            write_page(folder / "index.html", folder / "model.onnx", spec, runtime, threshold)
    return differences


def _for_export(network: Any) -> Any:
    """Return a copy of a model that takes uint8 images only, with names that TensorFlow accepts."""
    import keras

    def copy(layer: Any) -> Any:
        config = layer.get_config()
        # A SavedModel can't have variables whose names begin with an underscore.
        return type(layer).from_config(config | {"name": config["name"].lstrip("_")})

    renamed = keras.models.clone_model(network, clone_function=copy, recursive=True)
    renamed.set_weights(network.get_weights())
    images = keras.Input(network.input_shape[1:], dtype="uint8", name="images")
    return keras.Model(images, renamed(images))


def _read_validation(prepared: Path, spec: ImageSpec, model: str | Path) -> Split:
    try:
        prepared_spec = ImageSpec.read(prepared / "image_spec.json")
        val = read_split(prepared / "val")
    except FileNotFoundError:
        raise UserError(
            f"{prepared}: no validation images to compare answers on; run `dvc repro` first"
        ) from None
    if (prepared_spec.classes, prepared_spec.image_shape) != (spec.classes, spec.image_shape):
        raise UserError(f"{model}: not trained on the images in {prepared}; run `dvc repro` first")
    return val


def _read_lock() -> dict[str, Any]:
    """Return the stages in dvc.lock; empty outside the pipeline."""
    path = Path("dvc.lock")
    return load_yaml(path)["stages"] if path.exists() else {}


def _version(model: Path, lock: dict[str, Any]) -> dict[str, str]:
    """Return what identifies the model; if dvc.lock knows it, also its data and its commit."""
    digest = onnx_model.model_md5(model)
    if digest not in _md5s(lock, "train", "outs").values():
        return {"model_md5": digest}
    inputs = _md5s(lock, "prepare", "deps").items()
    path, md5 = next(one for one in inputs if one[0] != FILE and not one[0].startswith("stages/"))
    version = {"model_md5": digest, "dataset": path, "dataset_md5": md5}
    commit = git("rev-list", "-1", "HEAD", "--", "dvc.lock")  # no user's setting changes it
    if commit and not git("status", "--porcelain", "--", "dvc.lock"):
        version["commit"] = commit
        version["date"] = git("log", "-1", "--format=%cs", commit)
    return version


def _md5s(stages: dict[str, Any], stage: str, kind: str) -> dict[str, str]:
    """Return the MD5 of each output or dependency of a stage in dvc.lock, by path."""
    return {entry["path"]: entry["md5"] for entry in stages.get(stage, {}).get(kind, [])}


def _write_saved_model(network: Any, folder: Path) -> PredictFn:
    """Write a SavedModel; return the function that runs it, read again from the file."""
    import tensorflow as tf

    network.export(folder, format="tf_saved_model", verbose=False)
    loaded = tf.saved_model.load(folder)
    return lambda chunks: np.concatenate([loaded.serve(chunk).numpy() for chunk in chunks])


def _write_tflite(network: Any, path: Path) -> PredictFn:
    """Write a LiteRT model; return the function that runs it, read again from the file."""
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        raise UserError(
            "export needs LiteRT to check the tflite model, which is not installed: run"
            ' `pip install ".[tflite]"`'
        ) from None
    network.export(path, format="litert", verbose=False)
    interpreter = Interpreter(str(path))
    given, returned = interpreter.get_input_details()[0], interpreter.get_output_details()[0]

    def run(images: np.ndarray) -> np.ndarray:
        interpreter.resize_tensor_input(given["index"], images.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(given["index"], images)
        interpreter.invoke()
        return interpreter.get_tensor(returned["index"]).copy()

    return lambda chunks: np.concatenate([run(chunk) for chunk in chunks])


def _largest_difference(name: str, found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference of a probability; raise a UserError if a class differs."""
    changed = int((found.argmax(1) != expected.argmax(1)).sum())
    difference = float(np.abs(found - expected).max())
    if changed:
        raise UserError(
            f"export: the {name} model gives another class than the model for {changed} of"
            f" {len(expected)} validation images (largest difference of a probability"
            f" {difference:.2g}); nothing was exported"
        )
    return difference


def _write_program(folder: Path, spec: ImageSpec) -> None:
    lines = "".join(" ".join(name.split()) + "\n" for name in spec.classes)
    (folder / "labels.txt").write_text(lines, encoding="utf-8", newline="\n")
    shutil.copyfile(_PROGRAM, folder / _PROGRAM.name)
    (folder / "stages/data").mkdir(parents=True)
    for module in _MODULES:
        shutil.copyfile(str(module.__file__), folder / (module.__name__.replace(".", "/") + ".py"))
    pins = "".join(f"{name}=={importlib.metadata.version(name)}\n" for name in _PACKAGES)
    (folder / "requirements.txt").write_text(pins, encoding="utf-8", newline="\n")


def main(options: argparse.Namespace) -> None:
    """Export data/model.keras and print how far the answers differ."""
    output = Path("data/export")
    differences = export(output=output, formats=options.format)
    lines = {
        name: f"same class for every validation image, probabilities within {difference:.1g}"
        for name, difference in differences.items()
    }
    lines["try it"] = f"python {output}/classify.py PHOTO"
    if (output / "index.html").exists():
        lines["page"] = f"{output}/index.html: open it in a browser and drop photographs on it"
    else:
        lines["page"] = f"not written: run `npm install --prefix {_WEB_FOLDER} {RUNTIME}` first"
    cli.summary(f"export: {output}", lines)


if __name__ == "__main__":
    raise SystemExit("run it as: python -m stages export")
