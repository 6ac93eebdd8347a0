"""Overhead of the stages train and evaluate: time and memory beyond the computation itself.

    python tests/benchmarks/train_speed.py [step] [memory] [evaluate]

step      an epoch, against as many of the same steps on one batch (goal: 1.05 times)
memory    training on 10,000 and on 100,000 images of 64×64 (goal: peaks 100 MB apart)
evaluate  the stage without imports, against the forward passes alone, at 128×128 (goal: 1.1 times)
"""

import functools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from stages.run import environment

environment.setup()

import numpy as np

from stages.data import arrays


def make(folder: Path, counts: dict[str, int], size: tuple[int, int, int], classes: int = 10):
    """Write random images as prepare does, one file at a time."""
    rng = np.random.default_rng(0)
    names = [f"class {n}" for n in range(classes)]
    arrays.ImageSpec(names, size, "rgb", "crop").write(folder / "image_spec.json")
    for split, count in counts.items():
        digests = np.sort(rng.integers(0, 2**32, count, dtype=np.uint32)).astype(">u4")
        images = (rng.integers(0, 256, size, dtype=np.uint8) for _ in range(count))
        arrays.write_split(
            folder / split,
            digests.view(np.uint8).reshape(count, 4),
            rng.integers(0, classes, count),
            size,
            images,
        )


def step(folder: Path) -> None:
    from stages.model import device
    from stages.model.augment import augment
    from stages.model.fit import Trainer
    from stages.model.network import build
    from stages.model.parameters import Train
    from stages.model.phases import Phase
    from stages.model.replicas import Replicas

    import tensorflow as tf  # isort: skip

    parameters = Train(augment={"flip": "horizontal"})
    make(folder, {"train": 4096, "val": 64}, (64, 64, 3))
    device.setup(seed=1)
    train, val = (arrays.read_split(folder / name) for name in ("train", "val"))
    network = build((64, 64, 3), 10, parameters, for_training=True)
    change = functools.partial(augment, **parameters.augment.model_dump())
    phase = Phase("train", network.logits, network.classifier, train, val, 20, 0.01, change)
    trainer = Trainer(phase, parameters, 0, Replicas())
    rows = np.arange(trainer.batch_size)
    batch = [tf.constant(train.gather(rows)), tf.constant(train.labels[rows])]
    trainer.train_epoch(0)
    ratios = []
    for repeat in range(5):
        start = time.perf_counter()
        for number in range(trainer.steps):
            result = trainer.step(*batch, tf.constant([1, number]), tf.constant(0.001))
        float(result[0])
        bare = time.perf_counter() - start
        start = time.perf_counter()
        trainer.train_epoch(repeat)
        ratios.append((time.perf_counter() - start) / bare)
        print(f"  one batch {bare:.2f} s, an epoch {ratios[-1]:.3f} times that")
    print(f"step: {np.median(ratios):.3f} times the same steps on one batch (goal: 1.05)")


def _train(folder: Path, parameters: str) -> float:
    """Run the stage in a workspace; return its peak memory in MB."""
    (folder / "params.yaml").write_text(f"dataset: none\ntrain: {{{parameters}}}\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "stages", "train"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return usage.ru_maxrss / 1024


def memory(folder: Path) -> None:
    peaks = {}
    for count in (10_000, 100_000):
        place = folder / str(count)
        make(place / "data" / "prepared", {"train": count, "val": 1000}, (64, 64, 3))
        peaks[count] = _train(place, "epochs: 2, filters: [4], convs_per_block: 1, dense_units: 0")
        print(f"  {count} images: {peaks[count]:.0f} MB at the peak")
    difference = peaks[100_000] - peaks[10_000]
    print(f"memory: {difference:.0f} MB apart (goal: 100)")


def evaluate(folder: Path) -> None:
    from stages import evaluate as ours
    from stages.model import device, model_file
    from stages.model.inference import BATCH_SIZE

    import tensorflow as tf  # isort: skip

    data, count = folder / "data" / "prepared", 24_576
    make(data, {"train": 256, "val": 1024, "test": count - 1024}, (128, 128, 3))
    lines = ["path,class,split,digest,exclusion_reason,array_index"]
    for name, rows in (("val", 1024), ("test", count - 1024)):
        lines += [f"{name}/{row}.png,class 0,{name},,,{row}" for row in range(rows)]
    (data / "index.csv").write_text("\n".join(lines) + "\n")
    _train(folder, "epochs: 1, filters: [32, 64, 128, 256]")

    device.setup()
    network, _ = model_file.load(folder / "data" / "model.keras")
    pass_ = tf.function(lambda images: network(images, training=False))
    batch = tf.zeros((BATCH_SIZE, 128, 128, 3), tf.uint8)
    pass_(batch)
    ratios = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(count // BATCH_SIZE):
            pass_(batch).numpy()
        bare = time.perf_counter() - start
        start = time.perf_counter()
        ours.evaluate(ours.Evaluate(), data, folder / "data" / "model.keras", folder / "metrics")
        ratios.append((time.perf_counter() - start) / bare)
        print(f"  {bare * ratios[-1]:.1f} s, bare {bare:.1f} s, {ratios[-1]:.2f}")
    print(f"evaluate: {np.median(ratios):.2f} times the bare forward passes (goal: 1.1)")


if __name__ == "__main__":
    cases = {case.__name__: case for case in (step, memory, evaluate)}
    for chosen in sys.argv[1:] or cases:
        with tempfile.TemporaryDirectory() as name:
            cases[chosen](Path(name))
