"""The train stage: fit the network, keep the best epoch by validation loss, and calibrate it."""

import argparse
import functools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.data.arrays import ImageSpec, read_split
from stages.display import training
from stages.display.parameters import check_parameters
from stages.model import device, model_file
from stages.model.calibration import fit_temperature, log_loss
from stages.model.checkpoint import Checkpoint
from stages.model.features import Features, extract_features
from stages.model.fit import fit
from stages.model.inference import make_predict_fn
from stages.model.network import Network, accept_floats, build
from stages.model.parameters import CODE as NETWORK_CODE
from stages.model.parameters import Train, find_backbone
from stages.model.phases import Phase, make_phases
from stages.model.replicas import Replicas
from stages.run import cli, launch
from stages.run.files import fingerprint, stage_lock, write_csv, write_json
from stages.run.params import read_dataset, read_section, watch_inputs

CODE = [Path(__file__), *NETWORK_CODE]  # if it changes, no checkpoint is used
_CHUNK = 128  # images read at once


def train(
    parameters: Train,
    prepared: str | Path = "data/prepared",
    model: str | Path = "data/model.keras",
    metrics: str | Path = "metrics",
    backbones: str | Path = "data/backbones",
    check: Callable[[], None] = lambda: None,
    dataset: str | Path = "",
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
    check : callable, optional
        Called at the end. If it raises, the checkpoint is kept.
    dataset : path, default=""
        Where the images are from; it is printed.

    Returns
    -------
    result : dict
        The content of ``train.json``; empty in all replicas but the first.

    Raises
    ------
    UserError
        If training diverges, the backbone can't be used, or a replica fails.
    """
    prepared, model, metrics = Path(prepared), Path(model), Path(metrics)
    environment = device.setup(parameters.deterministic, parameters.seed)
    with Replicas(parameters.replicas) as replicas:
        replicas.require_equal("packages, processor, threads and device", environment)
        spec = ImageSpec.read(prepared / "image_spec.json")
        splits = {name: read_split(prepared / name) for name in ("train", "val")}
        backbone = find_backbone(backbones, parameters.backbone)
        precision = device.precision(parameters.precision, backbone=backbone is not None)
        shape, classes = spec.image_shape, len(spec.classes)
        train_network = build(shape, classes, parameters, backbone, precision, for_training=True)
        eval_network = build(shape, classes, parameters, backbone)
        training.print_start(
            parameters, spec, splits, eval_network, environment, precision, dataset
        )

        features: dict[str, Features] = {}
        if backbone:
            with replicas.first_before_others():  # they load what it has computed
                for name, split in splits.items():
                    folder = prepared / name
                    features[name] = extract_features(
                        eval_network.backbone, split, folder, environment
                    )
        used = [path for name in splits for path in (prepared / name).iterdir()]
        used += [backbone] if backbone else []
        # Only now: cached features do not depend on these two.
        environment |= {"precision": precision, "replicas": replicas.count}
        key = fingerprint(
            [*CODE, *used, prepared / "image_spec.json"],
            parameters=parameters.model_dump(),
            environment=environment,
        )
        replicas.require_equal("files and parameters", key)
        checkpoint = Checkpoint(key)
        phases = make_phases(parameters, train_network, eval_network, splits, features, replicas)
        write_history = functools.partial(_write_history, metrics / "history.csv")
        history, best_epoch = fit(
            phases, parameters, checkpoint, replicas, write_history, training.print_epoch
        )
    if not replicas.is_first:
        return {}

    print("  calibrating, drawing and saving", flush=True)
    temperature, calibrated_loss, probabilities = _calibrate(eval_network, phases[-1])
    best = history[best_epoch - 1]
    result = {
        "epoch": best_epoch,
        "epochs": len(history),
        "train_loss": round(best["loss"], 5),
        "train_accuracy": round(best["accuracy"], 5),
        "val_loss": round(best["val_loss"], 5),
        "val_accuracy": round(best["val_accuracy"], 5),
        "temperature": temperature,
        "val_loss_calibrated": round(calibrated_loss, 5),
        "parameters": eval_network.classifier.count_params(),
    }
    spec = replace(spec, temperature=temperature)
    learned = model_file.read_learned(backbone) if backbone else None
    model_file.save(accept_floats(eval_network.classifier), model, spec, learned)
    write_json(metrics / "environment.json", environment)
    write_json(metrics / "train.json", result)
    write_csv(metrics / "parameters.csv", _parameter_table(parameters))
    advice = training.advise(history, parameters, probabilities, splits["val"].labels, spec.classes)
    train_split, augment = splits["train"], phases[-1].augment
    training.report(result, advice, train_split, spec.classes, augment, model, metrics)
    check()
    checkpoint.delete()
    return result


def _calibrate(network: Network, phase: Phase) -> tuple[float, float, np.ndarray]:
    """Scale the logits by the best temperature.

    Returns it, the log loss that results on the validation images, and the probabilities before.
    A phase on cached features needs no forward pass of the backbone for it.
    """
    predict, val = make_predict_fn(phase.eval_model), phase.val
    bar = functools.partial(cli.progress, total=math.ceil(len(val) / _CHUNK), unit="chunk")
    probabilities = predict(bar(val.batches(_CHUNK), label="calibrate"))
    temperature = fit_temperature(probabilities, val.labels)
    layer = network.logits.get_layer("logits")
    layer.set_weights([weights / temperature for weights in layer.get_weights()])
    calibrated = predict(bar(val.batches(_CHUNK), label="check"))
    return temperature, log_loss(calibrated, val.labels), probabilities


def _write_history(path: Path, history: list[dict[str, Any]]) -> None:
    """Write history.csv, from which the curves are drawn, also while the training goes on."""
    rates = [float(f"{row['learning_rate']:.4g}") for row in history]
    write_csv(path, pd.DataFrame(history).round(6).assign(learning_rate=rates))


def _parameter_table(parameters: Train) -> pd.DataFrame:
    """Return parameters.csv, from which the page of plots shows what was changed."""
    used, default = (
        pd.json_normalize({"train": values.model_dump()}).loc[0] for values in (parameters, Train())
    )
    return pd.DataFrame({"value": used, "default": default}).rename_axis("name").reset_index()


def main(options: argparse.Namespace) -> None:
    """Run the stage with the parameters of params.yaml: in replicas, as one of them, or alone."""
    check = watch_inputs("train")
    check_parameters()
    parameters = read_section(Train, "train")
    if options.replica:
        launch.exit_with_stage()
        train(parameters, check=check, dataset=read_dataset())
        return
    with stage_lock("train"):
        if parameters.replicas > 1:
            words = ["-m", "stages", "train", "--replica"]
            launch.run_replicas(parameters.replicas, words, device.gpu_count())
            check()
        else:
            train(parameters, check=check, dataset=read_dataset())


if __name__ == "__main__":
    raise SystemExit("run it as: python -m stages train")
