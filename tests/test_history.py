"""`python -m stages compare --history`, of a repository with written results."""

import hashlib
import json

import pytest
import yaml
from conftest import Project

from stages.data.corrections import COLUMNS, FILE
from stages.display.history import format_history, read_history
from stages.run.cli import UserError

DATASET = "data/pets"


@pytest.fixture
def pets(tmp_path, monkeypatch):
    project = Project(tmp_path)
    project.git("init", "--quiet", "--initial-branch=main")
    (project / "metrics").mkdir()
    (project / "data").mkdir()
    (project / "params.yaml").write_text(f"dataset: {DATASET}\n")
    monkeypatch.chdir(tmp_path)
    return project


def add_images(project, md5, corrections=""):
    (project / f"{DATASET}.dvc").write_text(
        yaml.safe_dump({"outs": [{"md5": md5, "path": "pets"}]})
    )
    (project / FILE).write_text(",".join(COLUMNS) + "\n" + corrections)


def run(project, cats, accuracy):
    """As if `dvc repro` had run: the lock file and the metrics are of the images that are here."""
    md5 = yaml.safe_load((project / f"{DATASET}.dvc").read_text())["outs"][0]["md5"]
    content = hashlib.md5((project / FILE).read_bytes()).hexdigest()
    deps = [{"path": DATASET, "md5": md5}, {"path": FILE, "md5": content}]
    (project / "dvc.lock").write_text(yaml.safe_dump({"stages": {"prepare": {"deps": deps}}}))
    for name, values in {
        "train": {"val_loss": 1 - accuracy, "val_accuracy": 0.7},
        "prepare": {
            "classes": 2, "train": cats, "val": 20, "test": 20, "excluded": 1, "label_conflicts": 2,
        },
        "evaluate": {"accuracy": accuracy, "accuracy_low": accuracy - 0.1, "accuracy_high": 0.99},
        "evaluate_details": {"split": "test", "images": 20},
    }.items():  # fmt: skip
        (project / f"metrics/{name}.json").write_text(json.dumps(values))
    table = f"class,train,val,test,excluded\ncat,{cats},10,10,0\ndog,0,10,10,1\n"
    (project / "metrics/prepare_classes.csv").write_text(table)


def test_a_row_for_each_state_of_the_images_and_each_tag(pets):
    add_images(pets, "a.dir")
    pets.commit("images")
    run(pets, 100, 0.8)
    pets.commit("first run")
    run(pets, 100, 0.85)
    pets.commit("other parameters: the same images, so that only this one counts")
    pets.git("tag", "v1")
    add_images(pets, "b.dir")
    pets.commit("more images, and no run")
    run(pets, 140, 0.9)
    pets.commit("second run")
    (pets / "README.md").write_text("words")
    pets.commit("words, tagged")
    pets.git("tag", "v2")
    add_images(pets, "b.dir", "0,cat,dog,a.png,\n")  # corrected, and not run yet
    versions = read_history()
    assert [version["name"] for version in versions] == ["v1", "v2", "workspace"]
    assert [version.get("images") for version in versions] == [140, 180, None]
    text = format_history(versions)
    lines = text.splitlines()
    assert lines[0].split()[-2:] == ["val_loss", "accuracy"]
    assert "  0.1500  85.0 % (75.0 to 99.0) of 20 test" in lines[1]
    assert (versions[1]["val_loss"], versions[1]["val_accuracy"]) == (1 - 0.9, 0.7)
    assert lines[2].endswith("+40 cat") and "90.0 %" in lines[2]
    assert lines[3].endswith("not evaluated")
    assert "compare REV REV" in text


def test_a_number_of_other_images_is_never_shown(pets):
    add_images(pets, "a.dir")
    run(pets, 100, 0.8)
    add_images(pets, "b.dir")
    pets.commit("images were added after the run")
    (version,) = read_history()
    assert version.keys() == {"name", "date", "dataset"}


def test_without_a_commit_or_with_other_options_it_says_so(pets):
    with pytest.raises(UserError, match="no commit here yet"):
        read_history()
