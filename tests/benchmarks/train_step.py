"""One training step of three cases of accuracy.py: how much of the processor it uses.

    python tests/benchmarks/train_step.py [--case CASE ...] [--torch PYTHON]

Prints milliseconds and GFLOP/s, counting the multiplications and additions of convolutions and
dense layers only, and their share of the peak: the fastest product of two matrices of 4096 x 4096
in the precision of the training.

With --torch, an interpreter that has PyTorch (pip install torch), its step on the same network is
timed in turns with ours, both with AdamW for all weights and without augmentation. Goals: 55 % of
the peak, and PyTorch's time.
"""

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from stages.run import environment

environment.setup()

import keras
import numpy as np
import tensorflow as tf
from accuracy import CASES
from train_speed import make

from stages.data import arrays
from stages.model import device
from stages.model.augment import augment
from stages.model.fit import Trainer
from stages.model.network import build
from stages.model.optimizer import Optimizer
from stages.model.parameters import Train
from stages.model.phases import Phase
from stages.model.replicas import Replicas

SHAPES = {"digits": (32, 32, 1), "cifar10": (32, 32, 3), "clothing": (128, 128, 3)}
CLASSES, ROUNDS, SECONDS = 10, 9, 2.0

TORCH = """\
import json, sys, time
import torch
from torch import nn

case = json.loads(sys.argv[1])
torch.set_num_threads(case["threads"])
torch.manual_seed(1)
height, width, channels = case["shape"]


class Stem(nn.Module):
    def forward(self, images):
        return images.permute(0, 3, 1, 2).float() / 64 - 2


stride = max(1, min(height, width) // 64)
side, before = height // stride, 8 * channels
layers = [Stem(), nn.ZeroPad2d((0, 1, 0, 1)) if stride == 1 else nn.ZeroPad2d(stride // 2),
          nn.Conv2d(channels, before, 2 * stride, stride), nn.ReLU()]
for filters in case["filters"]:
    for number in range(case["convs_per_block"]):
        layers.append(nn.Conv2d(before, filters, 3, padding=1, bias=False))
        if number == 0 and side >= 2:
            layers.append(nn.MaxPool2d(2))
            side //= 2
        layers += [nn.BatchNorm2d(filters), nn.ReLU()]
        before = filters
layers += [nn.MaxPool2d(side), nn.Flatten()]
if case["dense_units"]:
    layers += [nn.Dropout(case["dropout"]), nn.Linear(before, case["dense_units"]), nn.ReLU()]
    before = case["dense_units"]
layers += [nn.Dropout(case["dropout"]), nn.Linear(before, case["classes"])]
network = nn.Sequential(*layers).to(memory_format=torch.channels_last).train()
optimizer = torch.optim.AdamW(network.parameters(), fused=True)
images = torch.randint(0, 256, (case["batch_size"], *case["shape"]), dtype=torch.uint8)
labels = torch.randint(0, case["classes"], (case["batch_size"],))
print(sum(weights.numel() for weights in network.parameters()), flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    for _ in range(int(line)):
        with torch.autocast("cpu", torch.bfloat16, enabled=case["bfloat16"]):
            loss = nn.functional.cross_entropy(network(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(time.perf_counter() - start, flush=True)
"""


def flops(model: keras.Model) -> int:
    """Return the floating-point operations of a training step for one image.

    The gradients of inputs and those of kernels each take as many as the forward pass; those of the
    images are not computed.
    """
    total, first = 0, True
    for layer in model.layers:
        if isinstance(layer, keras.layers.Conv2D | keras.layers.Dense):
            places = int(np.prod(layer.output.shape[1:-1]))
            total += (2 if first else 3) * 2 * places * layer.kernel.shape.num_elements()
            first = False
    return total


def make_trainer(case: str, folder: Path, *, alone: bool = False) -> tuple[Trainer, list[Any]]:
    """Return a trainer and a batch; `alone` is without augmentation, and by AdamW."""
    changes = CASES[case].get("train", {})
    parameters = Train.model_validate(changes)
    shape = SHAPES[case]
    precision = device.precision("auto")
    make(folder, {"train": 10 * parameters.batch_size, "val": 64}, shape, CLASSES)
    train, val = (arrays.read_split(folder / name) for name in ("train", "val"))
    network = build(shape, CLASSES, parameters, precision=precision, for_training=True)
    change = functools.partial(augment, **parameters.augment.model_dump())
    chosen = None if alone else change
    phase = Phase("train", network.logits, network.classifier, train, val, 20, 0.001, chosen)
    trainer = Trainer(phase, parameters, 0, Replicas())
    if alone:
        trainer.optimizer = Optimizer([], 0.05)
        trainer.optimizer.build(trainer.model.trainable_variables)
    rows = np.arange(parameters.batch_size)
    return trainer, [tf.constant(train.gather(rows)), tf.constant(train.labels[rows])]


class Ours:
    """Steps of a trainer on one batch."""

    def __init__(self, trainer: Trainer, batch: list[Any]) -> None:
        self.trainer, self.batch = trainer, batch

    def seconds(self, count: int) -> float:
        start = time.perf_counter()
        for number in range(count):
            result = self.trainer.step(*self.batch, tf.constant([1, number]), tf.constant(0.001))
        float(result[0])
        return time.perf_counter() - start


class Torch:
    """Steps of PyTorch in a process of its own."""

    def __init__(self, python: str, case: str, trainer: Trainer) -> None:
        parameters = Train.model_validate(CASES[case].get("train", {}))
        keys = {"filters", "convs_per_block", "dense_units", "dropout", "batch_size"}
        values = parameters.model_dump(include=keys) | {
            "shape": SHAPES[case],
            "classes": CLASSES,
            "bfloat16": device.precision("auto") == "mixed_bfloat16",
            "threads": tf.config.threading.get_intra_op_parallelism_threads(),
        }
        self.process = subprocess.Popen(
            [python, "-c", TORCH, json.dumps(values)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        weights = sum(weights.shape.num_elements() for weights in trainer.model.trainable_variables)
        found = int(self._answer())
        assert found == weights, f"PyTorch's network has {found} weights, ours {weights}"

    def _answer(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline()

    def seconds(self, count: int) -> float:
        assert self.process.stdin
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


class Product:
    """Products of two matrices."""

    def __init__(self) -> None:
        dtype = tf.bfloat16 if device.precision("auto") == "mixed_bfloat16" else tf.float32
        self.matrix = tf.cast(tf.random.stateless_normal((4096, 4096), (1, 1)), dtype)
        self.product = tf.function(lambda: tf.matmul(self.matrix, self.matrix))

    def seconds(self, count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            result = self.product()
        float(result[0, 0])
        return time.perf_counter() - start


def measure(timed: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return the seconds of one step of each, in rounds of about two seconds, taken in turns."""
    counts = {}
    for name, steps in timed.items():
        steps.seconds(2)
        counts[name] = max(1, round(SECONDS / steps.seconds(1)))
    found: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(ROUNDS):
        for name, count in counts.items():
            found[name].append(timed[name].seconds(count) / count)
    return {name: np.array(seconds) for name, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", choices=SHAPES, nargs="+", default=[*SHAPES])
    parser.add_argument("--torch", help="an interpreter that has PyTorch")
    arguments = parser.parse_args()
    device.setup(seed=1)
    print(f"{device.precision('auto')}, median of {ROUNDS} rounds (fastest and slowest)")
    for case in arguments.case:
        with tempfile.TemporaryDirectory() as name:
            timed: dict[str, Any] = {"product": Product()}
            timed["step"] = Ours(*make_trainer(case, Path(name) / "step"))
            if arguments.torch:
                timed["alone"] = Ours(*make_trainer(case, Path(name) / "alone", alone=True))
                timed["torch"] = Torch(arguments.torch, case, timed["alone"].trainer)
            found = measure(timed)
            if arguments.torch:
                timed["torch"].close()
        trainer = timed["step"].trainer
        work = flops(trainer.model) * trainer.batch_size / 1e9
        peak = 2 * 4096**3 / 1e9 / found["product"].min()
        for label in [name for name in timed if name != "product"]:
            seconds = found[label]
            middle = np.median(seconds)
            print(
                f"{case:<9} {label:<6} {1000 * middle:7.1f} ms ({1000 * seconds.min():.1f} to"
                f" {1000 * seconds.max():.1f}) {work / middle:6.1f} GFLOP/s,"
                f" {100 * work / middle / peak:.0f} % of {peak:.0f}"
            )
        if arguments.torch:
            ratio = np.median(found["alone"] / found["torch"])
            print(f"{case:<9} {ratio:.2f} of PyTorch's step (goal: 1)")


if __name__ == "__main__":
    main()
