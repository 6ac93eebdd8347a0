"""A repository with a history of versions whose stages were never run."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
from conftest import Project
from factories import make_prepared

from stages.data.arrays import read_index
from stages.run.files import write_csv, write_json

CLASSES = ["ant", "bee", "cat, big"]
COUNTS = {"train": 9, "val": 9, "test": 60}
PIPELINE = """\
stages:
  prepare:
    cmd: python stages/prepare.py
    deps: [stages/prepare.py, dataset.txt]
    params: [prepare]
    outs: [{data/prepared/val: {push: false}}, {data/prepared/test: {push: false}},
           data/prepared/image_spec.json, data/prepared/index.csv]
  train:
    cmd: python stages/train.py
    deps: [stages/train.py, data/prepared/image_spec.json]
    params: [train]
    outs: [data/model.keras]
    metrics: [{metrics/train.json: {cache: false}}]
  evaluate:
    cmd: python stages/evaluate.py
    deps: [data/model.keras, data/prepared/test, data/prepared/index.csv]
    outs: [metrics/predictions.csv]
"""


def predictions_of(root: Path, wrong: int, split: str = "test") -> pd.DataFrame:
    """Predictions of a split, correct but for `wrong` of them."""
    table = read_index(root / "data/prepared/index.csv")
    table = table[table["split"] == split].sort_values("digest")
    predicted = table["class"].to_numpy(object).copy()
    shifted = {name: CLASSES[(number + 1) % 3] for number, name in enumerate(CLASSES)}
    predicted[:wrong] = [shifted[name] for name in predicted[:wrong]]
    result = table[["path", "class"]].assign(predicted=predicted, confidence=0.75)
    return result.assign(**{f"p:{name}": 0.25 for name in CLASSES}).sort_values("path")


def finish(project: Project, tag: str) -> None:
    """Make DVC take the stages as run, commit and tag."""
    project.dvc("commit", "--quiet", "--force")
    project.commit(tag)
    project.git("tag", tag)


def make_arrays(project: Project) -> None:
    """Write prepared arrays; the test split has two files of images."""
    make_prepared(project.root, CLASSES, COUNTS)
    shutil.rmtree(project / "data/prepared/train")
    first = project / "data/prepared/test/images-0000.npy"
    images = np.load(first)
    np.save(first, images[:25])
    np.save(first.with_name("images-0001.npy"), images[25:])


def make_history(root: Path) -> Project:
    """Make a repository with the tags `bare`, `one` and `two`.

    In `bare`, nothing was run. From `one` to `two`, a parameter and a module change, there is an
    image more, and 16 predictions become correct.
    """
    project = Project(root)
    project.git("init", "--quiet")
    project.dvc("init", "--quiet")
    # DVC reads the configuration of each commit, so the remote has to be in the first one.
    project.dvc("remote", "add", "--default", "here", project / ".git/remote")
    (project / "dvc.yaml").write_text(PIPELINE)
    (project / "params.yaml").write_text(
        "prepare: {seed: 1}\ntrain: {epochs: 3, filters: [8], rate: 0.0001}\n"
    )
    (project / "stages").mkdir()
    for stage in ("prepare", "train", "evaluate"):
        (project / "stages" / f"{stage}.py").write_text(f"raise SystemExit('{stage} ran')\n")
    project.commit("bare")
    project.git("tag", "bare")

    (project / "dataset.txt").write_text("one")
    make_arrays(project)
    (project / "data/model.keras").write_text("one")
    (project / "metrics").mkdir()
    write_json(project / "metrics/train.json", {"val_loss": 0.5, "val_accuracy": 0.75})
    write_csv(project / "metrics/predictions.csv", predictions_of(project.root, 20))
    finish(project, "one")

    for path in ("data/prepared/index.csv", "metrics/predictions.csv", "data/model.keras"):
        (project / path).unlink()  # never in place: it may be a link to the cache
    shutil.rmtree(project / "data/prepared/test")
    make_arrays(project)
    table = read_index(project / "data/prepared/index.csv")
    extra = table.iloc[[0]].assign(path="new.png", digest="f" * 32, split="", array_index=pd.NA)
    write_csv(project / "data/prepared/index.csv", pd.concat([table, extra]))
    (project / "params.yaml").write_text(
        "prepare: {seed: 1}\ntrain: {epochs: 5, filters: [8], rate: 0.00005}\n"
    )
    (project / "stages/train.py").write_text("raise SystemExit('train ran, otherwise')\n")
    (project / "data/model.keras").write_text("two")
    write_json(project / "metrics/train.json", {"val_loss": 0.25, "val_accuracy": 0.875})
    write_csv(project / "metrics/predictions.csv", predictions_of(project.root, 4))
    finish(project, "two")
    return project
