"""Overhead of the stages train and evaluate: time and memory beyond the computation itself.

    python tests/benchmarks/train_speed.py [step] [determinism] [reader] [memory] [stage] [evaluate]

step         images per second of an epoch, against the same step repeated on one batch
determinism  images per second with `train.deterministic` on and off
reader       images per second of the array reader, against Keras's ImageDataGenerator reading
             photographs of 400×533, at 128 pixels
memory       peak memory of training on 10,000 and on 100,000 images of 64×64
stage        seconds of a whole `python -m stages train` that are not training
evaluate     the stage evaluate without imports, against the forward passes alone, at 128×128
"""

import functools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

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


def _trainer(folder: Path, deterministic: bool = True):
    """Return a trainer of the default network, on images of 64×64, and a batch for it."""
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
    device.setup(deterministic, seed=1)
    train, val = (arrays.read_split(folder / name) for name in ("train", "val"))
    network = build((64, 64, 3), 10, parameters, for_training=True)
    change = functools.partial(augment, **parameters.augment.model_dump())
    phase = Phase("train", network.logits, network.classifier, train, val, 20, 0.01, change)
    trainer = Trainer(phase, parameters, 0, Replicas())
    rows = np.arange(trainer.batch_size)
    batch = [tf.constant(train.gather(rows)), tf.constant(train.labels[rows])]
    trainer.train_epoch(0)
    return trainer, batch


def _seconds(trainer, batch) -> float:
    """Return the seconds of an epoch's number of steps on one batch."""
    import tensorflow as tf

    start = time.perf_counter()
    for number in range(trainer.steps):
        result = trainer.step(*batch, tf.constant([1, number]), tf.constant(0.001))
    float(result[0])
    return time.perf_counter() - start


def step(folder: Path) -> None:
    trainer, batch = _trainer(folder)
    ratios = []
    for repeat in range(5):
        bare = _seconds(trainer, batch)
        start = time.perf_counter()
        trainer.train_epoch(repeat)
        ours = time.perf_counter() - start
        ratios.append(bare / ours)
        print(f"  epoch {4096 / ours:.0f} images/s, one batch {4096 / bare:.0f}, {bare / ours:.3f}")
    print(f"step: {np.median(ratios):.3f} of the same step on one constant batch (at least 0.95)")


def determinism(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import train_speed as t;"
        "pair = t._trainer(Path(sys.argv[1]), sys.argv[2] == 'True');"
        "print(min(t._seconds(*pair) for _ in range(2)))"
    )
    seconds = {True: [], False: []}
    for repeat in range(3):
        for deterministic, found in seconds.items():
            place = folder / f"{deterministic}{repeat}"
            done = subprocess.run(
                [sys.executable, "-c", code, place, str(deterministic)],
                cwd=Path(__file__).parent,
                capture_output=True,
                text=True,
                check=True,
            )
            found.append(float(done.stdout))
    ratio = np.median(np.array(seconds[True]) / np.array(seconds[False]))
    print(f"determinism: {ratio:.2f} times the seconds of a step without it")


def reader(folder: Path) -> None:
    from PIL import Image

    from stages.model import device
    from stages.model.augment import augment

    import keras  # isort: skip
    import tensorflow as tf  # isort: skip

    device.setup()
    count, batch = 2048, 64
    make(folder, {"train": count}, (128, 128, 3))
    split = arrays.read_split(folder / "train")
    noise = split.gather(np.arange(count))
    for n in range(count):  # as large as photographs
        path = folder / "jpeg" / "a" / f"{n}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise[n]).resize((400, 533)).save(path, quality=85)
    changes = {
        "flip": "horizontal",
        "translation": 0.08,
        "rotation": 8,
        "zoom": 0.1,
        "contrast": 0.1,
    }
    change = tf.function(functools.partial(augment, **changes))
    generators = {
        False: keras.src.legacy.preprocessing.image.ImageDataGenerator(),
        True: keras.src.legacy.preprocessing.image.ImageDataGenerator(
            horizontal_flip=True,
            height_shift_range=0.08,
            width_shift_range=0.08,
            rotation_range=8,
            zoom_range=0.1,
            brightness_range=(0.9, 1.1),
            fill_mode="reflect",
        ),
    }
    for augmented, wanted in ((False, 40), (True, 20)):
        flow = generators[augmented].flow_from_directory(
            folder / "jpeg", (128, 128), batch_size=batch, shuffle=True
        )
        ratios = []
        for repeat in range(5):
            start = time.perf_counter()
            for number in range(4):
                flow[number]
            peer = 4 * batch / (time.perf_counter() - start)
            order = np.random.default_rng(repeat).permutation(count)
            start = time.perf_counter()
            for number, rows in enumerate(np.split(order, count // batch)):
                images = split.gather(rows)
                if augmented:
                    images = change(tf.constant(images), tf.constant([repeat, number]))
            if augmented:
                np.asarray(images)
            ours = count / (time.perf_counter() - start)
            ratios.append(ours / peer)
            print(f"  {ours:.0f} images/s, ImageDataGenerator {peer:.0f}, {ours / peer:.0f} times")
        kind = "augmented" if augmented else "plain"
        print(f"reader, {kind}: {np.median(ratios):.0f} times (at least {wanted})")


def _train(folder: Path, parameters: str) -> tuple[float, float]:
    """Run the stage in a workspace; return its seconds and peak memory in MB."""
    (folder / "params.yaml").write_text(f"dataset: none\ntrain: {{{parameters}}}\n")
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "stages", "train"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def memory(folder: Path) -> None:
    peaks = {}
    for count in (10_000, 100_000):
        place = folder / str(count)
        make(place / "data" / "prepared", {"train": count, "val": 1000}, (64, 64, 3))
        seconds, peaks[count] = _train(
            place, "epochs: 2, filters: [4], convs_per_block: 1, dense_units: 0"
        )
        print(f"  {count} images: {peaks[count]:.0f} MB at the peak, {seconds:.0f} s")
    difference = peaks[100_000] - peaks[10_000]
    print(f"memory: {difference:.0f} MB apart (at most 100)")


def stage(folder: Path) -> None:
    make(folder / "data" / "prepared", {"train": 1024, "val": 256}, (64, 64, 3))
    seconds = {
        epochs: min(_train(folder, f"epochs: {epochs}")[0] for _ in range(3)) for epochs in (1, 3)
    }
    epoch = (seconds[3] - seconds[1]) / 2
    print(f"stage: {seconds[1] - epoch:.1f} s besides its epochs ({epoch:.2f} s each), of which")
    code = (
        "import time; t = time.perf_counter(); import stages.model; print(time.perf_counter() - t)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    print(f"  {float(done.stdout):.1f} s are TensorFlow's import")
    code = (
        "import cProfile, pstats, sys; from stages.train import *; profile = cProfile.Profile();"
        "profile.runcall(train, Train(epochs=1));"
        "pstats.Stats(profile).sort_stats('cumulative').print_stats("
        r"r'\b(setup|build|train_epoch|save|load|fit|fit_temperature|fingerprint|make_predict_fn|run|_head|write_csv)\b'"
        ", 16)"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )


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
    print(f"evaluate: {np.median(ratios):.2f} times the bare forward passes (at most 1.1)")


if __name__ == "__main__":
    cases = {case.__name__: case for case in (step, determinism, reader, memory, stage, evaluate)}
    for chosen in sys.argv[1:] or cases:
        with tempfile.TemporaryDirectory() as name:
            cases[chosen](Path(name))
