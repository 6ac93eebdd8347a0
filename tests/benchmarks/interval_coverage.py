"""Measure how often the 95 % interval of the accuracy contains the true accuracy.

Simulates models of known accuracy on test splits of several sizes. Expected: never below 95 %.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from stages.report.binomial import clopper_pearson

RUNS = 20_000


def main() -> None:
    rng = np.random.default_rng(0)
    print("images   accuracy   covered   mean width")
    worst = 1.0
    for images in (20, 100, 270, 1_000, 10_000):
        for accuracy in (0.5, 0.8, 0.9, 0.95, 0.99, 0.999):
            correct = rng.binomial(images, accuracy, RUNS)
            low, high = clopper_pearson(correct, np.full(RUNS, images))
            covered = float(((low <= accuracy) & (accuracy <= high)).mean())
            worst = min(worst, covered)
            print(f"{images:6,}   {accuracy:8.3f}   {covered:7.4f}   {(high - low).mean():10.4f}")
    print(f"least: {worst:.4f} of {RUNS:,} simulated test splits")


if __name__ == "__main__":
    main()
