"""The command compare, on a repository whose versions were never run."""

import json
import os
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, Project, options
from history import finish, make_history, predictions_of
from PIL import Image

from stages import compare as command
from stages.compare import compare, format_text
from stages.data.arrays import read_index
from stages.run.files import write_csv, write_json


@pytest.fixture(scope="module")
def versions(tmp_path_factory) -> Project:
    return make_history(tmp_path_factory.mktemp("versions"))


@pytest.fixture
def clone(versions, tmp_path) -> Project:
    """A copy of the repository, its cache included, to be changed at will."""
    shutil.copytree(versions.root, tmp_path / "clone", symlinks=True)
    return Project(tmp_path / "clone")


def test_two_revisions(versions):
    result = compare("one", "two", root=versions.root)
    assert result["data"]["counts"] == {
        "added": 1, "removed": 0, "relabeled": 0, "moved": 0, "excluded": 0, "included": 0,
    }  # fmt: skip
    predictions = result["predictions"]
    assert (predictions["in_both"], predictions["fixed"], predictions["broke"]) == (60, 16, 0)
    assert predictions["p_value"] == pytest.approx(2 * 0.5**16, rel=1e-3)
    assert "better" in predictions["meaning"]
    assert predictions["accuracy_before"]["accuracy"] == round(40 / 60, 4)
    assert {case["change"] for case in predictions["images"]} == {"fixed"}
    assert sum(counts["fixed"] for counts in predictions["per_class"].values()) == 16
    text = format_text(result)
    assert len(text.splitlines()) < 40 and "parameters  dvc params diff one two\n" in text
    assert "data        78 → 78 images, 0 → 1 left out: 1 added\n" in text
    assert "val_loss 0.5000 → 0.2500, val_accuracy 0.7500 → 0.8750; choose by val_loss" in text
    assert "(exact McNemar test, p < 0.001)" in text
    result["data"]["copies"]["added"] = 1
    assert "left out: 1 added (of which exact copies: 1 added)\n" in format_text(result)


@pytest.mark.parametrize(
    ("before", "after"),
    [("one", "two"), ("workspace", "one"), ("one", "trial")],
)
def test_the_commands_that_it_names_show_parameters_and_code(versions, before, after):
    if after == "trial":
        versions.dvc("exp", "save", "--name", "trial", "--quiet")
    result = compare(before, after, root=versions.root)
    assert result["predictions"]["fixed" if before == "one" else "broke"] == 16
    commands = result["commands"]
    parameters = versions.run(*shlex.split(commands["parameters"])).stdout.split()
    row = parameters.index("train.epochs")
    assert parameters[row + 1 : row + 3] == (["3", "5"] if before == "one" else ["5", "3"])
    code = versions.run(*shlex.split(commands["code"].replace("--stat", ""))).stdout
    sign = "+" if before == "one" else "-"
    assert f"\n{sign}raise SystemExit('train ran, otherwise')" in code


def test_validation_images_are_compared_but_not_tested(clone):
    for tag, wrong in (("three", 5), ("four", 2)):
        (clone / "metrics/predictions.csv").unlink()
        write_csv(clone / "metrics/predictions.csv", predictions_of(clone.root, wrong, "val"))
        finish(clone, tag)
    result = compare("three", "four", root=clone.root)
    assert result["predictions"]["fixed"] == 3 and result["predictions"]["p_value"] is None
    text = format_text(result)
    assert "3 fixed, 0 broke\n" in text and "to choose the epoch" in text
    other = compare("two", "four", root=clone.root)["predictions"]
    assert other["in_both"] == 0 and "No image was evaluated by both" in other["meaning"]


def test_the_command_prints_json_and_draws(versions, tmp_path, monkeypatch, capsys):
    words = ["-m", "stages", "compare", "one", "--format", "json", "--picture", tmp_path / "p.png"]
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=versions.root, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert (result["before"], result["after"]) == ("one", "workspace")
    assert result["predictions"]["fixed"] == 16
    with Image.open(tmp_path / "p.png") as picture:
        assert np.asarray(picture).std() > 20
    monkeypatch.chdir(versions.root)
    command.main(options("compare", "two", "one", "--picture", str(tmp_path / "q.png")))
    assert capsys.readouterr().out.endswith(f"\npicture     {tmp_path / 'q.png'}\n")
    assert (tmp_path / "q.png").stat().st_size > 5_000


def test_other_classes_are_reported(clone):
    (clone / "metrics/predictions.csv").unlink()
    table = predictions_of(clone.root, 4)
    table = table.rename(columns={"p:ant": "p:wasp"}).replace({"ant": "wasp"})
    write_csv(clone / "metrics/predictions.csv", table)
    finish(clone, "three")
    result = compare("two", "three", root=clone.root)
    assert result["classes"] == {"added": ["wasp"], "removed": ["ant"]}
    assert "classes     added: wasp" in format_text(result)


def test_losses_of_other_validation_images_are_told_apart(clone):
    """And without the metrics, as in a version whose metrics Git has not, nothing is told."""
    table = read_index(clone / "data/prepared/index.csv")
    row = (table["split"] == "val").idxmax()
    table.loc[row, "class"] = "bee" if table.loc[row, "class"] == "ant" else "ant"  # relabeled
    (clone / "data/prepared/index.csv").unlink()
    write_csv(clone / "data/prepared/index.csv", table)
    finish(clone, "three")
    result = compare("two", "three", root=clone.root)
    assert result["validation"] == {
        "val_loss_before": 0.25, "val_loss_after": 0.25,
        "val_accuracy_before": 0.875, "val_accuracy_after": 0.875, "same_images": False,
    }  # fmt: skip
    assert "the validation images differ, so that small differences mean" in format_text(result)
    write_json(clone / "metrics/train.json", {})
    finish(clone, "four")
    assert "validation  " not in format_text(compare("three", "four", root=clone.root))


def test_without_changes_it_says_so(versions):
    result = compare("two", "workspace", root=versions.root)
    assert result["predictions"]["p_value"] == 1
    assert "correct on the same images" in format_text(result)
    assert ": the same" in format_text(result)
