"""Plant label errors, and count how many of them the audit finds, beside cleanlab's default.

    python tests/benchmarks/audit.py                                  # the digits, by their pixels
    python tests/benchmarks/audit.py --dataset data/clothing --backbone NAME.keras --size 224
    python tests/benchmarks/audit.py --dataset ... --backbone ... --gain    # what corrections bring

cleanlab is only used if it can be imported; it gets the same out-of-fold probabilities. The vectors
of a backbone are kept in the scratch folder. Goal: never less precise than cleanlab.
"""

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from stages.run import environment

KINDS = (("random", 0.03), ("random", 0.08), ("confusable", 0.05))


def read(dataset: Path, backbone: Path | None, size: int) -> dict[str, np.ndarray]:
    """Return features (pixels without a backbone), labels and splits of a dataset's images."""
    from stages.auditing.features import backbone_features, pixels
    from stages.data.arrays import SPLITS, ImageSpec, read_split
    from stages.data.parameters import Prepare
    from stages.model.parameters import Train
    from stages.prepare import prepare
    from stages.run.files import fingerprint, scratch_dir

    known = sorted(str(path) for path in dataset.rglob("*"))
    key = fingerprint([backbone] if backbone else [], images=known, size=size)
    cache = scratch_dir("benchmark") / f"{key}.npz"
    if cache.exists():
        return dict(np.load(cache))
    with tempfile.TemporaryDirectory() as folder:
        parameters = Prepare(image_size=[size, size], drop_near_duplicates=False)
        prepare(parameters, dataset, Path(folder, "prepared"), Path(folder, "metrics"))
        spec = ImageSpec.read(Path(folder, "prepared/image_spec.json"))
        splits = {name: read_split(Path(folder, "prepared", name)) for name in SPLITS}
        splits = {name: split for name, split in splits.items() if len(split)}
        if backbone:
            chosen = Train(backbone=backbone.name)
            where = Path(folder, "prepared")
            features = backbone_features(splits, spec, chosen, where, backbone.parent)
        else:
            features = pixels(splits.values(), sum(map(len, splits.values())), spec)
        data = {
            "features": features,
            "labels": np.concatenate([split.labels for split in splits.values()]),
            "split": np.repeat([*splits], [len(split) for split in splits.values()]),
        }
    np.savez(cache, **data)
    return data


def plant(
    features: np.ndarray, labels: np.ndarray, kind: str, share: float, seed: int
) -> np.ndarray:
    """Return labels of which a share is wrong: any other class, or that of the nearest mean."""
    rng = np.random.default_rng(seed)
    classes = labels.max() + 1
    rows = rng.choice(len(labels), round(share * len(labels)), replace=False)
    given = labels.copy()
    if kind == "random":
        given[rows] = (labels[rows] + rng.integers(1, classes, len(rows))) % classes
    else:
        means = np.stack([features[labels == label].mean(0) for label in range(classes)])
        distances = np.linalg.norm(means[:, None] - means, axis=2)
        np.fill_diagonal(distances, np.inf)
        given[rows] = distances.argmin(1)[labels[rows]]
    return given


def scores(found: np.ndarray, is_wrong: np.ndarray) -> tuple[float, float]:
    """Return precision and recall of rows."""
    return float(is_wrong[found].mean()) if len(found) else 1.0, is_wrong[
        found
    ].sum() / is_wrong.sum()


def find(data: dict[str, np.ndarray], seeds: int) -> None:
    """Print a row for each kind of planted errors: means over seeds."""
    from stages.report.label_errors import cross_validate, find_label_errors, find_neighbors

    try:
        from cleanlab.filter import find_label_issues
    except ImportError:
        find_label_issues = None
    features, labels = data["features"], data["labels"]
    units, classes = np.arange(len(labels)), int(labels.max()) + 1
    table = []
    for kind, share in KINDS:
        for seed in range(seeds):
            given = plant(features, labels, kind, share, seed)
            is_wrong = given != labels
            start, clock = time.process_time(), time.monotonic()
            probabilities = cross_validate(features, given, units, classes)
            errors = find_label_errors(probabilities, find_neighbors(features, units), given)
            row = {"errors": f"{kind} {share:.0%}", "seed": seed}
            row["CPU s"] = time.process_time() - start
            row["s"] = time.monotonic() - clock
            row["precision"], row["recall"] = scores(errors["row"].to_numpy(), is_wrong)
            if find_label_issues:
                found = np.flatnonzero(find_label_issues(given, probabilities, n_jobs=1))
                row["cleanlab precision"], row["cleanlab recall"] = scores(found, is_wrong)
            table.append(row)
    means = pd.DataFrame(table).drop(columns="seed").groupby("errors", sort=False).mean()
    print(means.round(3).to_string())
    if find_label_issues:
        ratio = (means["precision"] / means["cleanlab precision"]).min()
        print(f"precision: {ratio:.2f} times cleanlab's or more (goal: 1)")


def gain(data: dict[str, np.ndarray], seeds: int, share: float = 0.08) -> None:
    """Print the accuracy of a regression on features: with errors, corrected, without errors.

    Each image is classified by a regression on four fifths of the images, without it; its true
    label counts. Corrected are the planted errors among the findings, as a person would.
    """
    import warnings

    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import KFold, cross_val_predict
    from sklearn.preprocessing import StandardScaler

    from stages.report.label_errors import cross_validate, find_label_errors, find_neighbors

    features, labels = data["features"], data["labels"]
    units, classes = np.arange(len(labels)), int(labels.max()) + 1
    vectors = StandardScaler().fit_transform(features) / features.shape[1] ** 0.5
    neighbors, rows = find_neighbors(features, units), []
    for seed in range(seeds):
        given = plant(features, labels, "random", share, seed)
        probabilities = cross_validate(features, given, units, classes)
        found = find_label_errors(probabilities, neighbors, given)["row"].to_numpy()
        corrected = given.copy()
        corrected[found] = labels[found]
        row = {}
        for name, used in (("as is", given), ("corrected", corrected), ("no errors", labels)):
            with warnings.catch_warnings(action="ignore"):
                folds = KFold(5, shuffle=True, random_state=seed)
                predicted = cross_val_predict(LogisticRegression(C=20), vectors, used, cv=folds)
            row[name] = (predicted == labels).mean()
        rows.append(row)
    table = pd.DataFrame(rows)
    print(table.round(4).to_string() + "\n\nmean\n" + table.mean().round(4).to_string())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", type=Path, default=ROOT / "data/digits")
    parser.add_argument("--backbone", help="of data/backbones/; without one, pixels are used")
    parser.add_argument("--size", type=int, default=32, help="of the images, in pixels")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--gain", action="store_true")
    arguments = parser.parse_args()
    backbone = ROOT / "data/backbones" / arguments.backbone if arguments.backbone else None
    data = read(arguments.dataset, backbone, arguments.size)
    print(f"\n{arguments.dataset}: {' x '.join(map(str, data['features'].shape))}")
    (gain if arguments.gain else find)(data, arguments.seeds)
    print(f"memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    environment.setup()
    main()
