"""Stage train: fit the network, keep what validation calls best, and calibrate it."""

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from stages.data.arrays import ImageSpec, Split, read_split
from stages.model import device, model_file
from stages.model.augment import augment
from stages.model.calibration import fit_temperature, log_loss
from stages.model.checkpoint import Checkpoint, identity
from stages.model.features import Features, features
from stages.model.fit import Phase, Recipe, batch_size, fit
from stages.model.inference import make_predict_fn
from stages.model.network import Network, build, leaves
from stages.utils import cli, files
from stages.utils.cli import UserError
from stages.utils.files import write_csv, write_json
from stages.utils.params import Parameters, read_section


class Augment(Parameters):
    """Random changes of each training image, anew in each epoch."""

    flip: Literal["none", "horizontal", "both"] = "none"
    translation: float = Field(0.08, ge=0, le=1)
    rotation: float = Field(8, ge=0, le=180)
    zoom: float = Field(0.1, ge=0, lt=1)
    contrast: float = Field(0.1, ge=0, lt=1)


class Train(Parameters):
    """The section `train` of params.yaml, where each key is explained."""

    seed: int = Field(1, ge=0, lt=2**32)
    epochs: int = Field(20, ge=1)
    patience: int = Field(0, ge=0)
    batch_size: int = Field(64, ge=1)
    learning_rate: float = Field(0.01, gt=0, le=10)
    warmup_fraction: float = Field(0.2, ge=0, lt=1)
    weight_decay: float = Field(0.05, ge=0)
    label_smoothing: float = Field(0.0, ge=0, le=0.5)
    class_weight: Literal["none", "balanced"] = "none"
    precision: Literal["auto", "float32", "mixed_float16", "mixed_bfloat16"] = "auto"
    deterministic: bool = True
    filters: list[Annotated[int, Field(ge=1)]] = Field([32, 64, 128], min_length=1)
    convs_per_block: int = Field(2, ge=1, le=10)
    batch_normalization: bool = True
    dense_units: int = Field(128, ge=0)
    dropout: float = Field(0.3, ge=0, lt=1)
    augment: Augment = Augment()
    backbone: str = "none"
    fine_tune_fraction: float = Field(0.0, ge=0, le=1)
    fine_tune_epochs: int = Field(5, ge=1)
    fine_tune_learning_rate: float = Field(0.0001, gt=0, le=10)


def train(
    parameters: Train,
    prepared: str | Path = "data/prepared",
    model: str | Path = "data/model.keras",
    metrics: str | Path = "metrics",
    backbones: str | Path = "data/backbones",
) -> dict[str, Any]:
    """Fit a network on the prepared images.

    Parameters
    ----------
    parameters : Train
    prepared : path, default="data/prepared"
        What the stage prepare wrote; its test split is not read.
    model : path, default="data/model.keras"
        The file to write.
    metrics : path, default="metrics"
        The folder of ``train.json``, ``history.csv`` and ``environment.json``.
    backbones : path, default="data/backbones"
        The folder in which `parameters.backbone` names a file.

    Returns
    -------
    metrics : dict
        The content of ``train.json``.

    Raises
    ------
    UserError
        If the training diverges, or the backbone can't be used.
    """
    prepared, metrics = Path(prepared), Path(metrics)
    environment = device.setup(parameters.seed, parameters.deterministic)
    reading = ImageSpec.read(prepared / "image_spec.json")
    splits = {name: read_split(prepared / name) for name in ("train", "val")}
    backbone = _backbone_file(Path(backbones), parameters.backbone)
    precision = device.precision(parameters.precision, backbone=backbone is not None)

    learned = _network(reading, parameters, backbone, precision)
    kept = _network(reading, parameters, backbone, "float32")
    files = [path for name in splits for path in (prepared / name).iterdir()]
    files += [prepared / "image_spec.json"] + ([backbone] if backbone else [])
    surroundings = environment | {"precision": precision}
    checkpoint = Checkpoint(identity(files, parameters=parameters.model_dump(), **surroundings))

    if backbone:
        vectors = {
            name: features(
                kept.backbone,
                split,
                identity([*(prepared / name).iterdir(), backbone], **surroundings),
                f"features of {name}",
            )
            for name, split in splits.items()
        }
        phases = _backbone_phases(learned, kept, splits, vectors, parameters)
    else:
        phases = [_whole("train", learned, kept, splits, parameters)]
    _tell(reading, splits, kept, parameters, environment, precision)
    history, best = fit(phases, _recipe(parameters, splits["train"].labels, reading), checkpoint)

    val = splits["val"]
    run = make_predict_fn(kept.model)
    temperature = fit_temperature(run(val.batches()), val.labels)
    layer = kept.logits.get_layer("logits")
    layer.set_weights([weights / temperature for weights in layer.get_weights()])
    calibrated = log_loss(run(val.batches()), val.labels)

    row = history[best - 1]
    result = {
        "epoch": best,
        "epochs": len(history),
        "loss": round(row["loss"], 5),
        "accuracy": round(row["accuracy"], 5),
        "val_loss": round(row["val_loss"], 5),
        "val_accuracy": round(row["val_accuracy"], 5),
        "temperature": temperature,
        "val_loss_calibrated": round(calibrated, 5),
        "parameters": kept.model.count_params(),
    }
    model_file.save(kept.model, model, dataclasses.asdict(reading) | {"temperature": temperature})
    curves = pd.DataFrame(history)
    rates = [float(f"{rate:.4g}") for rate in curves["learning_rate"]]
    write_csv(metrics / "history.csv", curves.round(6).assign(learning_rate=rates))
    write_json(metrics / "environment.json", surroundings)
    write_json(metrics / "train.json", result)
    checkpoint.delete()
    return result


def _backbone_file(folder: Path, name: str) -> Path | None:
    if name == "none":
        return None
    path = folder / name
    if not path.is_file():
        known = sorted(path.name for path in folder.glob("*.keras"))
        raise UserError(
            f"params.yaml: train.backbone: {path} is not there; found"
            f" {', '.join(known) or 'no backbone'} in {folder};"
            " `python -m stages.backbone NAME` writes one, `dvc pull` fetches a versioned one"
        )
    return path


def _network(reading, parameters: Train, backbone: Path | None, precision: str) -> Network:
    return build(
        reading.image_shape,
        len(reading.classes),
        backbone=backbone,
        mirrored=parameters.augment.flip != "none",
        precision=precision,
        **parameters.model_dump(
            include={"filters", "convs_per_block", "batch_normalization", "dense_units", "dropout"}
        ),
    )


def _whole(
    name: str, learned: Network, kept: Network, splits: dict[str, Split], parameters: Train
) -> Phase:
    """The phase that learns from images."""
    changes = parameters.augment.model_dump()
    fine = name == "fine_tune"
    return Phase(
        name,
        learned.logits,
        kept.model,
        splits["train"],
        splits["val"],
        parameters.fine_tune_epochs if fine else parameters.epochs,
        parameters.fine_tune_learning_rate if fine else parameters.learning_rate,
        functools.partial(augment, **changes),
    )


def _backbone_phases(
    learned: Network,
    kept: Network,
    splits: dict[str, Split],
    vectors: dict[str, Features],
    parameters: Train,
) -> list[Phase]:
    """The head on frozen vectors; then, where asked for, the backbone's last layers with it."""
    phases = [
        Phase(
            "head",
            learned.head_logits,
            kept.head,
            vectors["train"],
            vectors["val"],
            parameters.epochs,
            parameters.learning_rate,
        )
    ]
    if parameters.fine_tune_fraction:
        body = leaves(learned.model.get_layer("backbone"))
        for layer in body[: round(len(body) * (1 - parameters.fine_tune_fraction))]:
            layer.trainable = False
        phases.append(_whole("fine_tune", learned, kept, splits, parameters))
    return phases


def _recipe(parameters: Train, labels: np.ndarray, reading) -> Recipe:
    counts = np.bincount(labels, minlength=len(reading.classes))
    weights = np.ones(len(counts))
    if parameters.class_weight == "balanced":
        weights = len(labels) / (len(counts) * np.maximum(counts, 1))
    return Recipe(
        parameters.seed,
        parameters.batch_size,
        parameters.warmup_fraction,
        parameters.weight_decay,
        parameters.label_smoothing,
        parameters.patience,
        weights,
    )


def _tell(reading, splits, network: Network, parameters: Train, environment, precision) -> None:
    height, width, channels = reading.image_shape
    rows = {
        "images": f"{len(splits['train']):,} to learn from, {len(splits['val']):,} to validate,"
        f" {height}×{width}×{channels}, {len(reading.classes)} classes",
        "network": f"{network.model.count_params():,} weights"
        + ("" if parameters.backbone == "none" else f", on {parameters.backbone}"),
        "device": f"{environment['device']}, {environment['threads']} threads, {precision}",
    }
    batch = batch_size(parameters.batch_size, len(splits["train"]))
    if batch < parameters.batch_size:
        rows["batches"] = f"of {batch}, not {parameters.batch_size}: more steps for few images"
    idle = _without_effect(parameters)
    if idle:
        rows["no effect"] = ", ".join(idle)
    cli.summary("train", rows)
    print(flush=True)


def _without_effect(parameters: Train) -> list[str]:
    """Keys that were changed from their defaults, but that this training does not use."""
    unused = ["fine_tune_fraction", "fine_tune_epochs", "fine_tune_learning_rate"]
    if parameters.backbone != "none":
        unused = ["filters", "convs_per_block", "batch_normalization"]
        if not parameters.fine_tune_fraction:
            unused += ["augment", "fine_tune_epochs", "fine_tune_learning_rate"]
    default = Train()
    return [f"train.{key}" for key in unused if getattr(parameters, key) != getattr(default, key)]


def main() -> None:
    """Run the stage as params.yaml says."""
    parameters = read_section(Train, "train")
    with files.stage_lock("train"):
        result = train(parameters)
    calibrated = f"{result['val_loss_calibrated']:.4f} after calibration"
    if result["temperature"] == 1:
        calibrated = "not calibrated: too few validation images, or none of them wrong"
    cli.summary(
        "train: done",
        {
            "kept": f"epoch {result['epoch']} of {result['epochs']}",
            "accuracy": f"{result['val_accuracy']:.4f} on validation"
            f" ({result['accuracy']:.4f} while learning)",
            "log loss": f"{result['val_loss']:.4f} on validation, {calibrated}",
            "model": "data/model.keras",
            "curves": "metrics/history.csv",
        },
    )


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m stages.train", description=__doc__).parse_args()
    cli.run(main, "finished epochs are kept, and `dvc repro` goes on from there")
