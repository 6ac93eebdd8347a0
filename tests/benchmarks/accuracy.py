"""Measure the README's accuracies: prepare once, then train and evaluate with several seeds.

    python tests/benchmarks/accuracy.py digits
    python tests/benchmarks/accuracy.py mnist --dataset FOLDER
    python tests/benchmarks/accuracy.py cifar10 --dataset FOLDER
    python tests/benchmarks/accuracy.py clothing --dataset FOLDER
    python tests/benchmarks/accuracy.py frozen --dataset FOLDER --backbone FILE
    python tests/benchmarks/accuracy.py fine_tuned --dataset FOLDER --backbone FILE

Times are those of the whole stage train, with imports and saving; the features of a frozen backbone
are computed again for each seed. CPU time doesn't depend on the machine's other load.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parents[2]
PHOTOGRAPHS = {
    "flip": "horizontal", "translation": 0.1, "rotation": 10, "zoom": 0.2, "contrast": 0.3,
}  # fmt: skip
CASES: dict[str, dict] = {
    "digits": {},
    "mnist": {
        "prepare": {"image_size": [28, 28], "drop_near_duplicates": False},
        "train": {"epochs": 3},
    },
    "cifar10": {
        "prepare": {"val_fraction": 0.05},
        "train": {
            "epochs": 12, "batch_size": 256, "weight_decay": 0.2, "label_smoothing": 0.1,
            "filters": [64, 256, 256], "dense_units": 0, "dropout": 0.0,
            "augment": {
                "flip": "horizontal", "translation": 0.1, "rotation": 0, "zoom": 0, "contrast": 0,
            },
        },
    },
    "clothing": {
        "prepare": {"image_size": [128, 128]},
        "train": {
            "epochs": 20, "label_smoothing": 0.1, "filters": [32, 64, 128, 256],
            "augment": PHOTOGRAPHS,
        },
    },
    "frozen": {
        "prepare": {"image_size": [224, 224]},
        "train": {
            "epochs": 20, "label_smoothing": 0.1, "learning_rate": 0.001, "dropout": 0.5,
        },
    },
    "fine_tuned": {
        "prepare": {"image_size": [224, 224]},
        "train": {
            "epochs": 20, "label_smoothing": 0.1, "learning_rate": 0.001, "dropout": 0.5,
            "batch_size": 32,
            "fine_tune_fraction": 0.7, "fine_tune_epochs": 6, "fine_tune_learning_rate": 0.0007,
            "augment": PHOTOGRAPHS | {"translation": 0.06, "zoom": 0.12, "rotation": 8,
                                      "contrast": 0.2},
        },
    },
}  # fmt: skip


def stage(name: str, folder: Path) -> tuple[float, float]:
    """Run a stage in a workspace; return its wall-clock and CPU seconds."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "stages", name],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{name} failed")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--dataset", default=ROOT / "data" / "digits", type=Path)
    parser.add_argument("--backbone", type=Path)
    parser.add_argument("--seeds", default=[1, 2, 3], type=int, nargs="+")
    arguments = parser.parse_args()
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    values["dataset"] = str(arguments.dataset.resolve())
    for section, changes in CASES[arguments.case].items():
        for key, value in changes.items():
            values[section][key] = values[section][key] | value if key == "augment" else value
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data" / "backbones").mkdir(parents=True)
        shutil.copy(ROOT / "data" / "corrections.csv", folder / "data")
        if arguments.backbone:
            shutil.copy(arguments.backbone, folder / "data" / "backbones")
            values["train"]["backbone"] = arguments.backbone.name
        for seed in arguments.seeds:
            values["train"]["seed"] = seed
            (folder / "params.yaml").write_text(yaml.safe_dump(values))
            if seed == arguments.seeds[0]:
                stage("prepare", folder)
            shutil.rmtree(folder / ".dvc" / "tmp" / "scratch" / "features", ignore_errors=True)
            seconds, cpu = stage("train", folder)
            stage("evaluate", folder)
            train, test = (
                json.loads((folder / "metrics" / f"{what}.json").read_text())
                for what in ("train", "evaluate")
            )
            results.append((test["accuracy"], train["val_accuracy"], seconds / 60, cpu / 60))
            print(
                f"\nseed {seed}: test {test['accuracy']:.4f}, validation"
                f" {train['val_accuracy']:.4f}, {seconds / 60:.1f} min, CPU {cpu / 60:.1f} min\n",
                flush=True,
            )
    mean, spread = np.mean(results, 0), np.std(results, 0, ddof=min(1, len(results) - 1))
    print(
        f"{arguments.case}: test {mean[0]:.4f} ± {spread[0]:.4f}, validation {mean[1]:.4f} ±"
        f" {spread[1]:.4f}, train {mean[2]:.1f} min, CPU {mean[3]:.1f} min"
        f" (mean and standard deviation of {len(results)} seeds)"
    )


if __name__ == "__main__":
    main()
