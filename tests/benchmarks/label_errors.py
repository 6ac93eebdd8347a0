"""Plant label errors in val and test, run the pipeline, count how many of them it finds.

    python tests/benchmarks/label_errors.py                          # the digits
    python tests/benchmarks/label_errors.py --dataset data/flowers --set train.epochs=10

Runs on a temporary copy of the prepared data, with the parameters of params.yaml.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from stages.data import arrays
from stages.data.parameters import Prepare
from stages.evaluate import evaluate
from stages.model.parameters import Train
from stages.prepare import prepare
from stages.report.parameters import Evaluate
from stages.run.params import read_section
from stages.train import train


def plant(folder: Path, share: float, seed: int) -> set[str]:
    """Give some images of val and test a wrong label; return their paths."""
    rng = np.random.default_rng(seed)
    classes = len(arrays.ImageSpec.read(folder / "image_spec.json").classes)
    index = arrays.read_index(folder / "index.csv")
    paths: set[str] = set()
    for name in ("val", "test"):
        labels = arrays.read_split(folder / name).labels.copy()
        rows = np.flatnonzero(rng.random(len(labels)) < share)
        labels[rows] = (labels[rows] + rng.integers(1, classes, len(rows))) % classes
        np.save(folder / name / "labels.npy", labels)
        in_split = index[(index["split"] == name) & index["array_index"].notna()]
        paths |= set(in_split.set_index("array_index")["path"].loc[rows])
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", type=Path, default=ROOT / "data/digits")
    parser.add_argument("--share", type=float, default=0.03)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--backbones", type=Path, default=ROOT / "data/backbones")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
        for change in arguments.set:
            name, value = change.split("=", 1)
            section, *keys, last = name.split(".")
            target = values[section]
            for key in keys:
                target = target[key]
            target[last] = yaml.safe_load(value)
        (place / "params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        stage = {
            name: read_section(kind, name, place / "params.yaml")
            for name, kind in (("prepare", Prepare), ("train", Train), ("evaluate", Evaluate))
        }
        prepare(
            dataset=arguments.dataset,
            parameters=stage["prepare"],
            output=place / "clean",
            metrics=place / "metrics",
        )
        for seed in range(arguments.seeds):
            data, model = place / "data", place / "model.keras"
            shutil.rmtree(data, ignore_errors=True)
            shutil.copytree(place / "clean", data)
            planted = plant(data, arguments.share, seed)
            train(stage["train"], data, model, place / "metrics", arguments.backbones)
            numbers = evaluate(stage["evaluate"], data, model, place / "metrics")
            found = pd.read_csv(place / "metrics/label_errors.csv", dtype=str)["path"]
            correct = found.isin(planted)
            index = arrays.read_index(data / "index.csv")
            rows.append(
                {
                    "seed": seed,
                    "planted": len(planted),
                    "found": len(found),
                    "precision": correct.mean(),
                    "recall": correct.sum() / len(planted),
                    "precision of the first": correct[: len(planted)].mean(),
                    "accuracy": numbers["accuracy"],
                    "share of the dataset": (index["split"].isin(["val", "test"])).mean(),
                }
            )
    table = pd.DataFrame(rows).set_index("seed")
    print(table.round(3).to_string())
    mean = table.mean()
    print(f"\nmean\n{mean.round(3).to_string()}")
    print(f"precision {mean['precision']:.2f}, recall {mean['recall']:.2f} (goals: 0.95, 0.9)")


if __name__ == "__main__":
    main()
