"""Compare two versions: the pure differences, and the command on a repository of made versions."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, Project
from factories import make_prepared
from PIL import Image

from stages import compare as command
from stages.data.arrays import read_index
from stages.report import differences
from stages.utils.cli import UserError
from stages.utils.files import write_csv

CLASSES = ["ant", "bee", "cat, big"]
PIPELINE = """\
stages:
  prepare:
    cmd: python stages/prepare.py
    deps: [stages/prepare.py, dataset.txt]
    params: [prepare]
    outs: [data/prepared/val, data/prepared/test, data/prepared/image_spec.json,
           data/prepared/index.csv]
  train:
    cmd: python stages/train.py
    deps: [stages/train.py, data/prepared/image_spec.json]
    params: [train]
    outs: [data/model.keras]
  evaluate:
    cmd: python stages/evaluate.py
    deps: [data/model.keras, data/prepared/test, data/prepared/index.csv]
    outs: [metrics/predictions.csv]
"""


def index(rows):
    columns = ["path", "class", "split", "digest"]
    table = pd.DataFrame(rows, columns=columns).assign(reason="", row=0)
    return table.astype({"row": "Int64"})


def test_data_changes_are_told_apart():
    before = index(
        [
            ("a/1", "a", "train", "d1"),
            ("a/2", "a", "test", "d2"),
            ("a/3", "a", "val", "d3"),
            ("a/4", "a", "train", "d4"),
            ("a/5", "a", "train", "d5"),
            ("a/5 copy", "a", "", "d5"),
            ("b/6", "b", "", "d6"),
            ("b/7", "b", "val", "d7"),
        ]
    )
    after = index(
        [
            ("a/1 renamed", "a", "train", "d1"),
            ("b/2", "b", "test", "d2"),
            ("a/3", "a", "train", "d3"),
            ("a/4", "a", "", "d4"),
            ("a/5 copy", "a", "train", "d5"),
            ("b/6", "b", "train", "d6"),
            ("b/8", "b", "test", "d8"),
        ]
    )
    changes = differences.data_changes(before, after)
    assert changes.to_numpy().tolist() == [
        ["added", "b/8", "", "b", "", "test"],
        ["removed", "b/7", "b", "", "val", ""],
        ["relabelled", "b/2", "a", "b", "test", "test"],
        ["moved", "a/3", "a", "a", "val", "train"],
        ["left out", "a/4", "a", "a", "train", ""],
        ["taken in", "b/6", "b", "b", "", "train"],
    ]
    counts = differences.per_class(changes)
    assert counts.loc["a"].to_dict() == {
        "added": 0, "removed": 0, "relabelled": 1, "moved": 1, "left out": 1, "taken in": 0,
    }  # fmt: skip
    assert differences.data_changes(before, before).empty


def test_predictions_are_joined_by_content_and_class():
    before = pd.DataFrame(
        {
            "path": ["1", "2", "3", "4", "5"],
            "digest": ["d1", "d2", "d3", "d4", "d5"],
            "class": ["a", "a", "a", "b", "b"],
            "predicted": ["a", "b", "b", "b", "b"],
            "confidence": [0.9, 0.8, 0.7, 0.9, 0.9],
        }
    )
    after = before.iloc[:4].assign(predicted=["b", "a", "b", "b"], path=["x", "y", "z", "w"])
    after.loc[3, "class"] = "a"  # relabelled: its label, not the prediction, has changed
    images = differences.prediction_changes(before, after).set_index("path")
    assert images["change"].to_dict() == {"x": "broke", "y": "fixed", "z": ""}


def test_the_surest_mistakes_come_first():
    """What broke as the later version is sure of it, what was fixed as the earlier one was."""
    names = [f"{kind}{n}" for kind in ("broke", "fixed") for n in range(3)]
    table = pd.DataFrame({"path": names, "digest": names, "class": "a"})
    said = ["a"] * 3 + ["b"] * 3
    images = differences.prediction_changes(
        table.assign(predicted=said, confidence=[0.9, 0.8, 0.7, 0.6, 0.99, 0.7]),
        table.assign(predicted=said[::-1], confidence=[0.6, 0.95, 0.7, 0.9, 0.5, 0.8]),
    )
    order = images.groupby("change", sort=False)["path"].agg(list)
    assert order["broke"] == ["broke1", "broke2", "broke0"]
    assert order["fixed"] == ["fixed1", "fixed2", "fixed0"]


@pytest.mark.parametrize(
    ("fixed", "broke", "words"),
    [(0, 0, "same images"), (30, 5, "is better"), (5, 30, "is worse"), (5, 4, "can well be")],
)
def test_the_verdict_is_in_plain_words(fixed, broke, words):
    assert words in differences.verdict(fixed, broke)[1]


def predictions_of(root: Path, wrong: int) -> pd.DataFrame:
    """Predictions of the test split, right but for `wrong` of them."""
    table = read_index(root / "data/prepared/index.csv")
    table = table[table["split"] == "test"].sort_values("digest")
    predicted = table["class"].to_numpy(object).copy()
    shifted = {name: CLASSES[(number + 1) % 3] for number, name in enumerate(CLASSES)}
    predicted[:wrong] = [shifted[name] for name in predicted[:wrong]]
    result = table[["path", "class"]].assign(predicted=predicted, confidence=0.75)
    return result.assign(**{f"p:{name}": 0.25 for name in CLASSES}).sort_values("path")


def finish(project: Project, tag: str) -> None:
    """Let DVC believe that the stages have run, commit and tag."""
    project.dvc("commit", "--quiet", "--force")
    project.commit(tag)
    project.git("tag", tag)


@pytest.fixture(scope="module")
def versions(tmp_path_factory) -> Project:
    """A repository: `bare` (nothing run), `one`, `two` (more right, a parameter, an image more)."""
    project = Project(tmp_path_factory.mktemp("versions"))
    project.git("init", "--quiet")
    project.dvc("init", "--quiet")
    # DVC asks each commit's own configuration, so a remote helps the commits that name it.
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
    make_prepared(project.root, CLASSES, {"train": 9, "val": 9, "test": 60})
    shutil.rmtree(project / "data/prepared/train")
    (project / "data/model.keras").write_text("one")
    (project / "metrics").mkdir()
    write_csv(project / "metrics/predictions.csv", predictions_of(project.root, 20))
    finish(project, "one")

    for path in ("data/prepared/index.csv", "metrics/predictions.csv", "data/model.keras"):
        (project / path).unlink()  # never in place: it may be a link to the cache
    make_prepared(project.root, CLASSES, {"train": 9, "val": 9, "test": 60})
    shutil.rmtree(project / "data/prepared/train")
    table = read_index(project / "data/prepared/index.csv")
    extra = table.iloc[[0]].assign(path="new.png", digest="f" * 32, split="", row=pd.NA)
    write_csv(project / "data/prepared/index.csv", pd.concat([table, extra]))
    (project / "params.yaml").write_text(
        "prepare: {seed: 1}\ntrain: {epochs: 5, filters: [8], rate: 0.00005}\n"
    )
    (project / "stages/train.py").write_text("raise SystemExit('train ran, otherwise')\n")
    (project / "data/model.keras").write_text("two")
    write_csv(project / "metrics/predictions.csv", predictions_of(project.root, 4))
    finish(project, "two")
    return project


def test_two_revisions(versions):
    result = command.compare("one", "two", root=versions.root)
    assert result["data"]["counts"] == {
        "added": 1, "removed": 0, "relabelled": 0, "moved": 0, "left out": 0, "taken in": 0,
    }  # fmt: skip
    assert result["parameters"] == {
        "train.epochs": {"before": 3, "after": 5},
        "train.rate": {"before": 0.0001, "after": 0.00005},
    }
    assert result["code"] == ["stages/train.py"]
    predictions = result["predictions"]
    assert (predictions["in_both"], predictions["fixed"], predictions["broke"]) == (60, 16, 0)
    assert predictions["p_value"] == pytest.approx(2 * 0.5**16, rel=1e-3)
    assert "better" in predictions["meaning"]
    assert predictions["accuracy_before"]["accuracy"] == round(40 / 60, 4)
    assert {case["change"] for case in predictions["images"]} == {"fixed"}
    assert sum(counts["fixed"] for counts in predictions["per_class"].values()) == 16
    text = command.report(result)
    assert len(text.splitlines()) < 40 and "train.epochs: 3 → 5" in text


def test_what_validation_images_say_is_counted_but_not_tested(versions, monkeypatch):
    evaluated = command._evaluated

    def on_val(version):
        index, predictions, classes = evaluated(version)
        return index, predictions.assign(split="val"), classes

    monkeypatch.setattr(command, "_evaluated", on_val)
    result = command.compare("one", "two", root=versions.root)
    assert result["predictions"]["fixed"] == 16 and result["predictions"]["p_value"] is None
    text = command.report(result)
    assert "16 fixed, 0 broke\n" in text and "chose the epoch, so" in text


def test_the_command_prints_json_and_draws(versions, tmp_path):
    words = ["-m", "stages.compare", "one", "--format", "json", "--picture", tmp_path / "p.png"]
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=versions.root, capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["before"], result["after"]) == ("one", "workspace")
    assert result["predictions"]["fixed"] == 16
    with Image.open(tmp_path / "p.png") as picture:
        assert np.asarray(picture).std() > 20
    command.compare("two", "one", root=versions.root, picture=tmp_path / "q.png")
    assert (tmp_path / "q.png").stat().st_size > 5_000


def test_an_experiment_is_a_version(versions):
    versions.dvc("exp", "save", "--name", "trial", "--quiet")
    assert command.compare("one", "trial", root=versions.root)["predictions"]["fixed"] == 16


def test_what_is_missing_is_told_in_one_line(versions, tmp_path):
    root = tmp_path / "clone"
    shutil.copytree(versions.root, root, symlinks=True)
    digest = {}
    for tag in ("one", "two"):
        with command.opened(root) as repository:
            digest[tag] = command.read_version(repository, tag).outputs["metrics/predictions.csv"]
    with pytest.raises(UserError, match="nonsense: no such commit, branch, tag or experiment"):
        command.compare("nonsense", root=root)
    with pytest.raises(UserError, match="bare: its dvc.lock tells of no evaluation"):
        command.compare("bare", root=root)
    cached = root / ".dvc/cache/files/md5" / digest["one"][:2] / digest["one"][2:]
    cached.unlink()
    with pytest.raises(UserError, match="one: metrics.* `dvc fetch --all-commits "):
        command.compare("one", root=root)
    (root / "metrics/predictions.csv").unlink()
    with pytest.raises(UserError, match="dvc pull .*metrics/predictions.csv"):
        command.compare("two", root=root)
    (root / "params.yaml").write_text("prepare: {seed: 1}\ntrain: {epochs: 6, filters: [8]}\n")
    with pytest.raises(UserError, match=r"edited, but not reproduced \(train: .*dvc repro"):
        command.compare("two", root=root)
    subprocess.run(["git", "clone", "--quiet", root, tmp_path / "bare"], check=True)
    with pytest.raises(UserError, match="workspace; `dvc pull "):
        command.compare("workspace", "two", root=tmp_path / "bare")
    with pytest.raises(UserError, match="not in a DVC repository"):
        command.compare(root=tmp_path)


def test_the_command_that_an_error_names_helps(versions, tmp_path):
    root = tmp_path / "clone"
    shutil.copytree(versions.root, root, symlinks=True)
    project = Project(root)
    project.dvc("push", "--all-commits", "--quiet")
    shutil.rmtree(root / ".dvc/cache/files")
    with pytest.raises(UserError, match="`dvc fetch") as caught:
        command.compare("one", "two", root=root)
    words = str(caught.value).partition("`dvc ")[2].partition("`")[0].split()
    project.dvc(*words)
    assert command.compare("one", "two", root=root)["predictions"]["fixed"] == 16


def test_other_classes_and_another_split_are_told(versions, tmp_path):
    root = tmp_path / "clone"
    shutil.copytree(versions.root, root, symlinks=True)
    project = Project(root)
    (root / "metrics/predictions.csv").unlink()
    table = predictions_of(root, 4)
    table = table.rename(columns={"p:ant": "p:wasp"}).replace({"ant": "wasp"})
    write_csv(root / "metrics/predictions.csv", table)
    finish(project, "three")
    result = command.compare("two", "three", root=root)
    assert result["classes"] == {"added": ["wasp"], "removed": ["ant"]}
    assert "classes     added: wasp" in command.report(result)
