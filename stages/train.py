"""The train stage: fit the network, keep the best epoch by validation loss, and calibrate it."""

import argparse
import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, ImageOps

from stages.data.arrays import ImageSpec, Split, read_split
from stages.model import device, model_file
from stages.model.augment import augment, uncompiled
from stages.model.calibration import LIMITS, fit_temperature, log_loss
from stages.model.checkpoint import Checkpoint
from stages.model.features import Features, extract_features
from stages.model.fit import Phase, Recipe, effective_batch_size, fit
from stages.model.inference import make_predict_fn
from stages.model.network import Network, accept_floats, build, flatten_layers
from stages.model.parameters import Train
from stages.model.replicas import Replicas
from stages.run import cli, launch
from stages.run.files import atomic_write, fingerprint, stage_lock, write_csv, write_json
from stages.run.params import read_section

_ROOT = Path(__file__).parent
# Checkpoints and cached features are reused only while all of this code is unchanged.
CODE = [_ROOT / "train.py", _ROOT / "data" / "arrays.py", *_ROOT.glob("model/*.py")]

_ROWS, _VARIANTS, _SIDE = 6, 5, 96  # of the figure of augmented images; _SIDE in pixels
_GREY = 208  # between its images: white ones would run into each other on white


def train(
    parameters: Train,
    prepared: str | Path = "data/prepared",
    model: str | Path = "data/model.keras",
    metrics: str | Path = "metrics",
    backbones: str | Path = "data/backbones",
) -> dict[str, Any]:
    """Train a network on the prepared images and write the model file.

    With several replicas, this process is one of them, and TF_CONFIG has to say which; only the
    first writes files. `main` starts such processes.

    Parameters
    ----------
    parameters : Train
    prepared : path, default="data/prepared"
        The outputs of the prepare stage; the test split is not read.
    model : path, default="data/model.keras"
        The model file to write.
    metrics : path, default="metrics"
        The folder for ``train.json``, ``history.csv``, ``parameters.csv``, ``environment.json``
        and ``plots/augmented.png``.
    backbones : path, default="data/backbones"
        The folder with the file that `parameters.backbone` names.

    Returns
    -------
    result : dict
        The content of ``train.json``; empty in all replicas but the first.

    Raises
    ------
    UserError
        If training diverges, the backbone can't be used, or a replica fails.
    """
    prepared, metrics = Path(prepared), Path(metrics)
    environment = device.setup(parameters.deterministic, parameters.seed)
    with Replicas(parameters.replicas) as replicas:
        replicas.require_equal("packages, processor, threads and device", environment)
        spec = ImageSpec.read(prepared / "image_spec.json")
        splits = {name: read_split(prepared / name) for name in ("train", "val")}
        backbone = _backbone_path(Path(backbones), parameters.backbone)
        precision = device.precision(parameters.precision, backbone=backbone is not None)
        train_network = _build_network(spec, parameters, backbone, precision, for_training=True)
        eval_network = _build_network(spec, parameters, backbone)
        _print_start(spec, splits, eval_network, parameters, environment, precision)

        inputs = {name: [*(prepared / name).iterdir()] for name in splits}
        common = CODE + ([backbone] if backbone else [])
        features: dict[str, Features] = {}
        if backbone:
            with replicas.first_before_others():  # they load what it has computed
                for name, split in splits.items():
                    key = fingerprint(inputs[name] + common, environment=environment)
                    features[name] = extract_features(eval_network.backbone, split, key, name)
        # Only now: cached features do not depend on these two.
        environment |= {"precision": precision, "replicas": replicas.count}
        key = fingerprint(
            [prepared / "image_spec.json", *inputs["train"], *inputs["val"], *common],
            parameters=parameters.model_dump(),
            environment=environment,
        )
        replicas.require_equal("files and parameters", key)
        checkpoint = Checkpoint(key)
        phases = _phases(train_network, eval_network, splits, features, parameters, replicas)
        recipe = _recipe(parameters, spec, splits["train"])
        write_history = functools.partial(_write_history, metrics)
        history, best_epoch = fit(phases, recipe, checkpoint, replicas, write_history)
    if not replicas.is_first:
        return {}

    temperature, calibrated_loss = _calibrate(eval_network, splits["val"])
    result = _result(history, best_epoch) | {
        "temperature": temperature,
        "val_loss_calibrated": round(calibrated_loss, 5),
        "parameters": eval_network.classifier.count_params(),
    }
    spec = replace(spec, temperature=temperature)
    model_file.save(accept_floats(eval_network.classifier), model, spec)
    write_json(metrics / "environment.json", environment)
    write_json(metrics / "train.json", result)
    write_csv(metrics / "parameters.csv", _parameter_table(parameters))
    _draw_augmented(splits["train"], phases[-1], metrics / "plots" / "augmented.png")
    checkpoint.delete()
    return result


def _result(history: list[dict[str, Any]], best_epoch: int) -> dict[str, Any]:
    best = history[best_epoch - 1]
    return {
        "epoch": best_epoch,
        "epochs": len(history),
        "train_loss": round(best["loss"], 5),
        "train_accuracy": round(best["accuracy"], 5),
        "val_loss": round(best["val_loss"], 5),
        "val_accuracy": round(best["val_accuracy"], 5),
    }


def _backbone_path(folder: Path, name: str) -> Path | None:
    if name == "none":
        return None
    path = folder / name
    if not path.is_file():
        known = ", ".join(sorted(path.name for path in folder.glob("*.keras"))) or "no backbone"
        raise cli.UserError(
            f"params.yaml: train.backbone: no such file: {path}; {folder} has {known};"
            " `python -m stages backbone NAME` writes one, `dvc pull` fetches a versioned one"
        )
    return path


def _build_network(
    spec: ImageSpec,
    parameters: Train,
    backbone: Path | None,
    precision: str = "float32",
    for_training: bool = False,
) -> Network:
    keys = {"filters", "convs_per_block", "batch_normalization", "dense_units", "dropout"}
    return build(
        spec.image_shape,
        len(spec.classes),
        backbone=backbone,
        mirrored=parameters.augment.flip != "none",
        precision=precision,
        for_training=for_training,
        **parameters.model_dump(include=keys),
    )


def _phases(
    train_network: Network,
    eval_network: Network,
    splits: dict[str, Split],
    features: dict[str, Features],
    parameters: Train,
    replicas: Replicas,
) -> list[Phase]:
    """Return the phases: the whole network, or the head and then the backbone's last layers."""
    change = functools.partial(
        augment,
        **parameters.augment.model_dump(),
        replica=replicas.number,
        replicas=replicas.count,
    )

    def on_images(name: str, epochs: int, learning_rate: float) -> Phase:
        models = train_network.logits, eval_network.classifier
        return Phase(name, *models, splits["train"], splits["val"], epochs, learning_rate, change)

    epochs, learning_rate = parameters.epochs, parameters.learning_rate
    if not features:
        return [on_images("train", epochs, learning_rate)]
    models = train_network.head_logits, eval_network.head
    head = Phase("head", *models, features["train"], features["val"], epochs, learning_rate)
    if not parameters.fine_tune_fraction:
        return [head]
    layers = flatten_layers(train_network.classifier.get_layer("backbone"))
    for layer in layers[: round(len(layers) * (1 - parameters.fine_tune_fraction))]:
        layer.trainable = False
    epochs, learning_rate = parameters.fine_tune_epochs, parameters.fine_tune_learning_rate
    return [head, on_images("fine_tune", epochs, learning_rate)]


def _recipe(parameters: Train, spec: ImageSpec, split: Split) -> Recipe:
    class_weights = np.ones(len(spec.classes))
    if parameters.class_weight == "balanced":
        counts = np.bincount(split.labels, minlength=len(spec.classes))
        class_weights = len(split) / (len(counts) * np.maximum(counts, 1))
    keys = {"seed", "batch_size", "warmup_fraction", "weight_decay", "label_smoothing", "patience"}
    return Recipe(**parameters.model_dump(include=keys), class_weights=class_weights)


def _calibrate(network: Network, val: Split) -> tuple[float, float]:
    """Scale the logits by the best temperature; return it and the log loss that results."""
    predict = make_predict_fn(network.classifier)
    temperature = fit_temperature(predict(val.batches()), val.labels)
    layer = network.logits.get_layer("logits")
    layer.set_weights([weights / temperature for weights in layer.get_weights()])
    return temperature, log_loss(predict(val.batches()), val.labels)


def _write_history(metrics: Path, history: list[dict[str, Any]]) -> None:
    """Write history.csv, from which the curves are drawn, also while the training goes on."""
    rates = [float(f"{row['learning_rate']:.4g}") for row in history]
    table = pd.DataFrame(history).round(6).assign(learning_rate=rates)
    write_csv(metrics / "history.csv", table)


def _parameter_table(parameters: Train) -> pd.DataFrame:
    """Return parameters.csv, from which the page of plots shows what was changed."""
    used = pd.json_normalize({"train": parameters.model_dump()})
    default = pd.json_normalize({"train": Train.model_validate(Train().model_dump()).model_dump()})
    rows = zip(used.columns, used.loc[0], default.loc[0], strict=True)
    return pd.DataFrame(rows, columns=["name", "value", "default"])


def _draw_augmented(split: Split, phase: Phase, path: Path) -> None:
    """Draw training images, one of each of the first classes, with augmented variants to the right.

    A phase that trains on features has no augmentation: there, only the images are drawn.
    """
    _, rows = np.unique(split.labels, return_index=True)
    images = split.gather(rows[:_ROWS])
    tiles = images[:, None]
    if phase.augment:
        variants = np.repeat(images, _VARIANTS, axis=0)
        with uncompiled():  # to compile for a single call would take a second
            variants = np.asarray(phase.augment(variants, np.zeros(2, np.int32)))
        tiles = np.concatenate([tiles, variants.reshape(-1, _VARIANTS, *images.shape[1:])], 1)
    height, width, _ = split.image_shape
    gap = math.ceil(max(height, width) / 32)
    edges = (0, 0), (0, 0), (0, gap), (0, gap), (0, 0)
    tiles = np.pad(tiles, edges, constant_values=_GREY).swapaxes(1, 2)
    page = tiles.reshape(len(images) * (height + gap), -1, tiles.shape[-1])
    page = np.pad(page, ((gap, 0), (gap, 0), (0, 0)), constant_values=_GREY)
    drawn = Image.fromarray(np.broadcast_to(page, (*page.shape[:2], 3)))
    side = max(height, width)
    resample = Image.Resampling.NEAREST if side <= _SIDE else Image.Resampling.LANCZOS
    with atomic_write(path) as tmp:
        ImageOps.scale(drawn, _SIDE // side or _SIDE / side, resample).save(tmp, format="PNG")


def _print_start(
    spec: ImageSpec,
    splits: dict[str, Split],
    network: Network,
    parameters: Train,
    environment: dict[str, Any],
    precision: str,
) -> None:
    lines = {
        "images": f"{len(splits['train']):,} for training, {len(splits['val']):,} for validation,"
        f" {'×'.join(map(str, spec.image_shape))}, {len(spec.classes)} classes",
        "network": f"{network.classifier.count_params():,} weights"
        + ("" if parameters.backbone == "none" else f", on {parameters.backbone}"),
        "device": f"{environment['device']}, {environment['threads']} threads, {precision}",
    }
    replicas = parameters.replicas
    if replicas > 1:
        lines["device"] += f"; {replicas} replicas, one process each"
    batch_size = effective_batch_size(parameters.batch_size, len(splits["train"]), replicas)
    if batch_size != parameters.batch_size:
        alone = effective_batch_size(parameters.batch_size, len(splits["train"]))
        reasons = ["for more steps per epoch"] if alone != parameters.batch_size else []
        reasons += ["for equal shares"] if batch_size != alone else []
        reason = " and ".join(reasons)
        lines["batch size"] = f"{batch_size}, not {parameters.batch_size}: {reason}"
    default = Train()
    set_in_vain = [k for k in parameters.unused() if getattr(parameters, k) != getattr(default, k)]
    if set_in_vain:
        lines["no effect"] = ", ".join(f"train.{key}" for key in set_in_vain)
    cli.summary("train", lines)
    print(flush=True)


def main(options: argparse.Namespace) -> None:
    """Run the stage with the parameters of params.yaml: in replicas, as one of them, or alone."""
    parameters = read_section(Train, "train")
    if options.replica:
        launch.exit_with_stage()
        result = train(parameters)
    else:
        with stage_lock("train"):
            if parameters.replicas > 1:
                words = ["-m", "stages", "train", "--replica"]
                launch.run_replicas(parameters.replicas, words, device.gpu_count())
                return  # the first of them has said the rest
            result = train(parameters)
    if not result:  # of a replica that is not the first
        return
    calibrated = f"{result['val_loss_calibrated']:.4f} after calibration"
    if result["temperature"] == 1:
        calibrated = "not calibrated: too few validation images, or no errors in them"
    elif result["temperature"] in LIMITS:
        calibrated += f" with the temperature at its limit, {result['temperature']}: don't rely on"
        calibrated += " confidences; try fewer epochs, or add validation images"
    cli.summary(
        "train: done",
        {
            "best epoch": f"{result['epoch']} of {result['epochs']}",
            "accuracy": f"{result['val_accuracy']:.4f} on validation"
            f" ({result['train_accuracy']:.4f} in training)",
            "log loss": f"{result['val_loss']:.4f} on validation, {calibrated}",
            "model": "data/model.keras",
            "curves": "metrics/history.csv",
        },
    )
