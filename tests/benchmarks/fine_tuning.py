"""Recipes for a backbone, compared out of fold: each image is judged by a network without it.

    python tests/benchmarks/fine_tuning.py OUT --dataset FOLDER --backbone FILE --recipe NAME ...
    python tests/benchmarks/fine_tuning.py OUT --against NAME-224-frozen     # only the table

All images are one pool, in the audit's five folds: near duplicates share one. The last epoch
counts, so that the held-out fold decides nothing. Each training is judged four times, with its last
weights and with their moving average over the steps, without and with the mirror image. OUT keeps
the logits and results.jsonl, a line per fold; a fold that is there is not trained again. CPU time
is that of training, without the features of the frozen backbone.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from stages.run import environment

environment.setup()

import keras
import numpy as np

from stages import audit
from stages.auditing.facts import read_facts
from stages.data.arrays import SPLITS, ImageSpec, read_split
from stages.data.parameters import Prepare
from stages.display.first_look import image_size
from stages.model import device
from stages.model.features import Features
from stages.model.fit import Trainer
from stages.model.inference import make_predict_fn
from stages.model.network import Network, build, flatten_layers
from stages.model.optimizer import Optimizer
from stages.model.parameters import Train
from stages.model.phases import make_phases
from stages.model.replicas import Replicas
from stages.prepare import prepare
from stages.report.binomial import mcnemar
from stages.report.label_errors import folds_of
from stages.tuning.space import replace
from stages.use import FINE_TUNED, ON_BACKBONE


class Recipe(NamedTuple):
    """What is other than in `use`."""

    changes: Mapping[str, Any] = MappingProxyType({})  # of params.yaml's section train
    decay: float = 1.0  # of the learning rate, from a block of three convolutions to the one before
    mirrored: bool = False  # the head learns from the features of mirror images, too
    averaged: bool = False  # its features are the means of an image and its mirror image


_ALL = {"fine_tune_fraction": 1.0}
RECIPES = {
    "frozen": Recipe(),
    "frozen_mirrored": Recipe(mirrored=True),
    "frozen_averaged": Recipe(averaged=True),
    "frozen_linear": Recipe({"dense_units": 0}),
    "frozen_linear_fast": Recipe({"dense_units": 0, "learning_rate": 0.003}),
    "frozen_linear_40": Recipe({"dense_units": 0, "epochs": 40}),
    "frozen_40": Recipe({"epochs": 40}),
    "frozen_fast": Recipe({"learning_rate": 0.003}),
    "fine_tuned": Recipe(),
    "fine_tuned_decay_0.8": Recipe(_ALL, decay=0.8),
    "fine_tuned_decay_0.7": Recipe(_ALL, decay=0.7),
}
# Which weights (the last, their average) judge which images (as they are, mirrored).
VARIANTS = {"": (0, [0]), "mirror": (0, [0, 1]), "average": (1, [0]), "both": (1, [0, 1])}
STEPS = 100  # over which weights are averaged, about


class Rated(Optimizer):
    """The project's optimizer, with a factor of the learning rate for each variable."""

    rates: Mapping[str, float] = {}

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        path = self._trainable_variables[self._get_variable_index(variable)].path
        super().update_step(gradient, variable, learning_rate * self.rates.get(path, 1.0))


def layer_rates(backbone: keras.Model, decay: float) -> dict[str, float]:
    """Return a factor of the learning rate for each of the backbone's variables."""
    layers = [one for one in flatten_layers(backbone) if one.trainable_variables][::-1]
    return {
        variable.path: decay ** (1 + number // 3)
        for number, layer in enumerate(layers)
        for variable in layer.trainable_variables
    }


class Pool:
    """All images of a dataset, prepared once for a size."""

    def __init__(self, dataset: Path, out: Path, side: int) -> None:
        self.prepared, metrics = out / f"prepared-{side}", out / f"metrics-{side}"
        parameters = Prepare(image_size=[side, side])
        if not (metrics / "units.npy").exists():
            prepare(parameters, dataset, self.prepared, metrics, out / "cache")
            images = audit._read_images(self.prepared)
            pairs = audit._find_pairs(images, read_facts(images, dataset), near=True)
            units = audit._units(images, pairs, dataset, parameters)
            np.save(metrics / "units.npy", units[images["array_index"].notna()])
        self.spec = ImageSpec.read(self.prepared / "image_spec.json")
        splits = [read_split(self.prepared / name) for name in SPLITS]
        splits = [split for split in splits if len(split)]
        self.images = np.concatenate([batch for split in splits for batch in split.batches()])
        self.labels = np.concatenate([split.labels for split in splits])
        self.folds = folds_of(np.load(metrics / "units.npy"))

    def features(self, network: Network, path: Path) -> np.ndarray:
        """Return the features of all images and of their mirror images, float32 [2, n, d]."""
        if not path.exists():
            predict, starts = make_predict_fn(network.backbone), range(0, len(self.labels), 256)
            found = [
                predict(self.images[start : start + 256, :, ::way] for start in starts)
                for way in (1, -1)
            ]
            np.save(path, found)
        return np.load(path)


def train_fold(
    parameters: Train,
    recipe: Recipe,
    backbone: Path,
    pool: Pool,
    fold: int,
    features: Path,
) -> tuple[np.ndarray, float]:
    """Return logits [2 (last weights, average), 2 (plain, mirrored), n, classes]; CPU seconds."""
    device.setup(parameters.deterministic, parameters.seed)
    shape, classes = pool.spec.image_shape, len(pool.spec.classes)
    train_network = build(shape, classes, parameters, backbone, for_training=True)
    eval_network = build(shape, classes, parameters, backbone)
    vectors = pool.features(eval_network, features)
    if recipe.averaged:
        vectors = np.stack([vectors.mean(0)] * 2)
    train, held_out = np.flatnonzero(pool.folds != fold), np.flatnonzero(pool.folds == fold)
    ways = 1 + recipe.mirrored
    vectors_of_train = Features(
        np.concatenate([*vectors[:ways, train]]), np.tile(pool.labels[train], ways)
    )
    seen = train if parameters.fine_tune_fraction else train[:1]
    images = Features(pool.images[seen], pool.labels[seen])
    replicas, start = Replicas(), time.process_time()
    phases = make_phases(
        parameters,
        train_network,
        eval_network,
        dict.fromkeys(("train", "val"), images),
        dict.fromkeys(("train", "val"), vectors_of_train),
        replicas,
    )
    for number, phase in enumerate(phases):
        phase.train_model.set_weights(phase.eval_model.get_weights())
        trainer = Trainer(phase, parameters, number, replicas)
        trainer.optimizer = Rated([], parameters.weight_decay)  # with what the benchmark varies
        trainer.optimizer.use_ema, trainer.optimizer.ema_momentum = True, 1 - 1 / STEPS
        if number:
            trained = train_network.logits.get_layer("backbone")
            trainer.optimizer.rates = layer_rates(trained, recipe.decay)
        trainer.optimizer.build(trainer.model.trainable_variables)
        for epoch in range(phase.epochs):
            trainer.train_epoch(epoch)
        phase.eval_model.set_weights(trainer.model.get_weights())
    seconds = time.process_time() - start

    model = eval_network.logits if len(phases) > 1 else eval_network.head_logits
    predict = make_predict_fn(model)
    if len(phases) > 1:
        shown = [pool.images[held_out], pool.images[held_out][:, :, ::-1]]
    else:
        shown = [*vectors[:, held_out]]
    logits = [[predict([one]) for one in shown]]
    trainer.optimizer.finalize_variable_values(trainer.model.trainable_variables)
    phases[-1].eval_model.set_weights(trainer.model.get_weights())
    logits.append([predict([one]) for one in shown])
    return np.array(logits), seconds


def table(out: Path, against: str) -> None:
    """Print the accuracy of each recipe and variant, and McNemar's p on the images of both."""
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for line in (out / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.setdefault(row["name"], {})[row["fold"]] = row
    correct: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    for name, folds in rows.items():
        for fold in folds:
            saved = np.load(out / f"{name}-{fold}.npz")
            for variant, (weights, ways) in VARIANTS.items():
                logits = saved["logits"][weights][ways].mean(0)
                right = logits.argmax(1) == saved["labels"]
                correct.setdefault((name, variant), {})[fold] = right
    for (name, variant), found in correct.items():
        base = correct[against, ""]
        common = sorted(found.keys() & base.keys())
        ours, theirs = (np.concatenate([one[f] for f in common]) for one in (found, base))
        p = mcnemar(int((theirs & ~ours).sum()), int((ours & ~theirs).sum()))
        cpu = np.mean([row["cpu_seconds"] for row in rows[name].values()]) / 60
        print(
            f"{name + ' ' + variant:<48} {len(common)} folds {len(ours):5} images"
            f" {100 * ours.mean():6.2f} % ({100 * (ours.mean() - theirs.mean()):+.2f}, p = {p:.3f})"
            f" {cpu:6.2f} CPU min per fold"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--dataset", type=Path)
    parser.add_argument("--backbone", type=Path)
    parser.add_argument("--side", type=int, help="default: that of the backbone")
    parser.add_argument("--recipe", choices=RECIPES, nargs="+", default=[])
    parser.add_argument("--folds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--against", help="the run that others are compared with")
    arguments = parser.parse_args()
    if arguments.recipe:
        backbone = arguments.backbone.resolve()
        side = arguments.side or image_size(backbone)[0]
        arguments.out.mkdir(parents=True, exist_ok=True)
        pool = Pool(arguments.dataset, arguments.out, side)
    for fold in arguments.folds:
        for recipe in arguments.recipe:
            name = f"{backbone.stem}-{side}-{recipe}"
            path = arguments.out / f"{name}-{fold}.npz"
            if path.exists():
                continue
            settings = FINE_TUNED if recipe.startswith("fine_tuned") else ON_BACKBONE
            values = {key: value for key, (value, _) in settings.items() if "prepare" not in key}
            changes = {"epochs": 20, **RECIPES[recipe].changes}  # as `use` sets
            values |= {f"train.{key}": new for key, new in changes.items()}
            logits, seconds = train_fold(
                replace(Train(), values),
                RECIPES[recipe],
                backbone,
                pool,
                fold,
                arguments.out / f"features-{backbone.stem}-{side}.npy",
            )
            labels = pool.labels[pool.folds == fold]
            np.savez(path, logits=logits, labels=labels)
            row = {"name": name, "fold": fold, "cpu_seconds": round(seconds, 1)}
            row |= {
                variant or "accuracy": round(
                    float((logits[weights][ways].mean(0).argmax(1) == labels).mean()), 4
                )
                for variant, (weights, ways) in VARIANTS.items()
            }
            with open(arguments.out / "results.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)
    if arguments.against:
        table(arguments.out, arguments.against)


if __name__ == "__main__":
    main()
