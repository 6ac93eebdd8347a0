"""CPU seconds for the features of 1,000 images: the column of stages/display/backbones.py.

    python tests/benchmarks/backbones.py [NAME ...]

Random weights, which take as long as any; nothing is downloaded. The time is that of the processor
(user and system, all cores), which other programs change less than the time that passes.
"""

import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from stages.run import environment

environment.setup()

import numpy as np

from stages.backbone import backbone
from stages.display.backbones import BACKBONES
from stages.model.inference import BATCH_SIZE, make_predict_fn
from stages.model.network import build
from stages.model.parameters import Train

SECONDS = 12.0  # at least, for each


def seconds(name: str) -> tuple[float, float]:
    """Return the CPU seconds for 1,000 images and the million weights."""
    size = BACKBONES[name].size
    with tempfile.TemporaryDirectory() as folder:
        path = backbone(name, folder, weights=None)
        network = build((size, size, 3), 10, Train(), path).backbone
    assert network is not None
    images = np.random.default_rng(0).integers(0, 256, (BATCH_SIZE, size, size, 3), np.uint8)
    predict = make_predict_fn(network)
    predict([images])  # traces
    start, batches = time.process_time(), 0
    while time.process_time() - start < SECONDS:
        predict([images])
        batches += 1
    spent = (time.process_time() - start) / batches / BATCH_SIZE * 1000
    return spent, network.count_params() / 1e6


if __name__ == "__main__":
    for name in sys.argv[1:] or BACKBONES:
        spent, weights = seconds(name)
        print(f"{name:<28} {spent:6.0f} CPU seconds for 1,000 images  {weights:6.1f} M", flush=True)
