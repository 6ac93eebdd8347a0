"""The command use: from a folder of images to params.yaml."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Project, clone_working_tree
from PIL import Image

from stages.data.parameters import Prepare
from stages.run import cli
from stages.run.cli import UserError
from stages.run.params import list_changes, read_dataset, read_section, set_values
from stages.use import FINE_TUNED, ON_BACKBONE, PHOTOGRAPHS, SMALL_IMAGES, use


def draw_folder(folder: Path, side: int, counts: dict[str, int]) -> Path:
    rng = np.random.default_rng(side)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (side + number % 3, side, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Project:
    """A clone with small images, photographs, and small images that Git tracks."""
    project = clone_working_tree(tmp_path_factory.mktemp("use") / "clone")
    draw_folder(project / "data" / "small", 28, {"a": 3, "b": 3})
    draw_folder(project / "data" / "my photos", 150, {"a": 3, "b": 30})
    draw_folder(project / "data" / "in git", 8, {"a": 3, "b": 3})
    project.git("add", "data/in git")
    project.git("commit", "--quiet", "--message", "Images in Git")
    return project


@pytest.fixture
def place(clone, monkeypatch):
    """The clone, with params.yaml as committed, as the current folder."""
    clone.git("checkout", "--quiet", "params.yaml")
    shutil.rmtree(clone / "data" / "backbones")
    clone.git("checkout", "--quiet", "data/backbones")
    monkeypatch.chdir(clone.root)
    return clone


def params(project: Project) -> str:
    return (project / "params.yaml").read_text(encoding="utf-8")


def test_a_folder_of_photographs_is_one_command(place, capfd):
    before = params(place)
    changes = use("data/my photos/")
    out = capfd.readouterr().out
    assert "33 in 2 classes: 3 (a) to 30 (b)" in out
    assert "short side  150 to 150 pixels" in out
    assert "fewer than 50 of a, b" in out and "class_weight: balanced" in out
    for key, (old, new) in changes.items():
        (line,) = [line for line in out.splitlines() if line.startswith(f"  {key} ")]
        assert f"{old} → {new}  " in line and not line.endswith("  ")
    assert read_dataset() == "data/my photos"
    assert read_section(Prepare, "prepare").image_size == [128, 128]
    assert "running `dvc add 'data/my photos'` ..." in out and "git add" not in out
    assert "my photos.dvc" in os.listdir("data")
    assert "my photos/" not in place.git("status", "--porcelain", "--untracked-files=all")
    # Lines and comments stay; only values differ, of which lists have a line for each.
    old_lines, new_lines = (
        [line for line in text.splitlines() if not line.startswith("  - ")]
        for text in (before, params(place))
    )
    differing = [old for old, new in zip(old_lines, new_lines, strict=True) if old != new]
    assert len(differing) == sum(not isinstance(new, list) for _, new in changes.values())
    for old, new in zip(old_lines, new_lines, strict=True):
        assert old.partition("#")[2] == new.partition("#")[2]

    text = params(place)
    assert use(place / "data" / "my photos") == {}
    out = capfd.readouterr().out
    assert params(place) == text
    assert "set up for this dataset already" in out and "is tracked by DVC" in out
    assert "running" not in out


def test_another_dataset_leaves_nothing_of_the_first(place):
    from stages.train import Train

    before = params(place)
    backbone = place / "data" / "backbones" / "net.keras"
    backbone.write_bytes(b"a model")
    use("data/my photos")
    assert read_section(Train, "train").backbone == "net.keras"
    values = place.parameters["train"]
    assert values["learning_rate"] == 0.001
    assert values["augment"]["flip"] == "none"  # no effect, and no line on that in each run
    assert (place / "data/backbones/net.keras.dvc").is_file()
    place.git("check-ignore", "data/backbones/net.keras")
    backbone.unlink()
    use("data/my photos")
    assert read_section(Train, "train").augment.flip == "horizontal"
    use("data/in git")
    place.configure({"dataset": "data/digits", "train.epochs": 10})
    after = place.parameters
    (place / "params.yaml").write_text(before)
    assert after == place.parameters


SET_FOR_ANOTHER = {
    "prepare.layout": "classes", "prepare.color_mode": "grayscale", "prepare.resize": "pad",
    "prepare.white_level": 4095, "prepare.drop_near_duplicates": False,
    "prepare.group_by": r"^\w+/(\d+)", "prepare.max_unreadable_fraction": 0.5,
    "train.class_weight": "balanced",
}  # fmt: skip


def test_what_an_earlier_dataset_needed_is_not_left(place, capfd, monkeypatch):
    """It is listed before it is written, and kept if this is the dataset that it was set for."""
    set_values({"dataset": "data/small"} | SET_FOR_ANOTHER)
    use("data/small")
    out = capfd.readouterr().out
    assert "kept " in out and "prepare.layout: classes, prepare.color_mode: grayscale" in out
    assert list_changes(SET_FOR_ANOTHER) == {}
    changes = use("data/in git")
    out = capfd.readouterr().out
    for key, value in SET_FOR_ANOTHER.items():
        assert changes[key][0] == value and f"  {key} " in out
        assert f"{value} → {changes[key][1]}  " in out
    assert read_section(Prepare, "prepare") == Prepare()
    set_values({"dataset": "data/small"} | SET_FOR_ANOTHER)
    before, summary = params(place), cli.summary
    told = []
    monkeypatch.setattr(
        cli, "summary", lambda *words: told.append(params(place)) or summary(*words)
    )
    use("data/in git")
    assert set(told) == {before} and params(place) != before


def test_layout_of_another_dataset_does_not_hide_splits_and_can_be_set(place, tmp_path):
    own = tmp_path / "own"
    for split in ("train", "test"):
        draw_folder(own / split, 8, {"a": 2, "b": 2})
    set_values({"dataset": "data/small", "prepare.layout": "classes"})
    use(own)
    assert read_section(Prepare, "prepare").layout == "auto"
    set_values({"dataset": "data/small", "prepare.layout": "classes"})
    (own / "test").rename(own / "eval")
    with pytest.raises(
        UserError, match=r"set prepare.layout: classes \(and `dataset:` to this folder"
    ):
        use(own)
    set_values({"dataset": str(own), "prepare.layout": "classes"})  # as it says
    use(own)
    assert read_section(Prepare, "prepare").layout == "classes"


def test_a_table_and_the_folder_of_its_name_are_one_command(place, capfd):
    """What is wrong later leaves no labels.csv; a folder that is tracked needs another dvc add."""
    folder = draw_folder(place / "data", 8, {"sheep": 8})  # which holds the pipeline's output
    table, labels = folder / "sheep.csv", folder / "sheep" / "labels.csv"
    table.write_text("image,breed\n" + "".join(f"sheep/{n},{'xy'[n % 2]}\n" for n in range(8)))
    text = params(place)
    (place / "params.yaml").write_text("prepare:\ntrain: 3\n")
    with pytest.raises(UserError, match="train: expected a section"):
        use("data/sheep.csv")
    assert not labels.exists()
    (place / "params.yaml").write_text(text)
    place.dvc("add", "data/sheep")
    capfd.readouterr()
    use("data/sheep.csv")
    out = capfd.readouterr().out
    assert read_dataset() == "data/sheep" and "8 in 2 classes: 4 each" in out
    assert "sheep.csv: column image names the images (8 of 8 found in sheep/), breed is the" in out
    assert "data/sheep is tracked by DVC; `dvc add data/sheep` adds labels.csv" in out
    assert labels.read_text().startswith("path,label\n0.png,x\n1.png,y\n")
    for name in ("data/sheep", labels):
        assert use(name) == {}
        out = capfd.readouterr().out
        assert "from labels.csv" in out and "adds" not in out
    with pytest.raises(UserError, match="data/sheep/labels.csv exists already"):
        use(table)
    table.rename(folder / "goats.csv")
    with pytest.raises(UserError, match="goats.csv: no folder data/goats of its images; put it"):
        use("data/goats.csv")


def test_small_images_keep_settings_for_small_images(place, capfd):
    assert set(use("data/small")) == {"dataset", "train.epochs"}
    assert place.parameters["train"]["augment"]["flip"] == "none"
    for name, text in (("in git", "tracked by Git"), ("small", "tracked by DVC")):
        use(f"data/{name}")
        assert text in capfd.readouterr().out


def test_a_dataset_elsewhere_is_used_but_not_added(place, tmp_path, monkeypatch, capfd):
    draw_folder(tmp_path / "there", 8, {"a": 3, "b": 3})
    monkeypatch.setenv("HOME", str(tmp_path))
    (place / "data" / "link").unlink(missing_ok=True)
    (place / "data" / "link").symlink_to(tmp_path / "there")
    for name in ("~/there", tmp_path / "there", "data/link"):
        use(name)
        assert read_dataset() == str((tmp_path / "there").resolve())
        out = capfd.readouterr().out
        assert "copy it to data/" in out and "running" not in out
    assert not list(tmp_path.glob("*.dvc"))


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("nowhere", "nowhere: no such folder"),
        ("s3://bucket/photos", "photos: no such folder; `dvc import-url ADDRESS data/NAME`"),
        ("stages", "holds no images|beside its class folders|is empty"),
        (".", "contains the pipeline's own output"),
    ],
)
def test_what_is_no_dataset_changes_nothing(place, folder, message):
    before, status = params(place), place.git("status", "--porcelain")
    with pytest.raises(UserError, match=message):
        use(folder)
    assert params(place) == before and place.git("status", "--porcelain") == status


def test_images_of_which_none_can_be_read(place, tmp_path):
    for name in "ab":
        (tmp_path / "broken" / name).mkdir(parents=True)
        (tmp_path / "broken" / name / "x.jpg").write_text(
            "version https://git-lfs.github.com/spec/v1"
        )
    before = params(place)
    with pytest.raises(
        UserError, match="none of 2 images can be read: a/x.jpg and 1 more .*lfs pull"
    ):
        use(tmp_path / "broken")
    assert params(place) == before


def test_a_params_yaml_of_another_form(place):
    """Missing keys and sections are added, `null` is kept, a wrong section is one clear line."""
    (place / "params.yaml").write_text("dataset: x\nprepare:\n  group_by: null  # why\ntrain:\n")
    use("data/small")
    assert set(place.parameters["train"]) >= {"filters", "augment"}
    assert place.parameters["prepare"]["group_by"] is None and "# why" in params(place)
    # As `dvc exp run -S` leaves a list.
    text = "dataset: x\nprepare:\n  image_size:   # pixels\n  - 8\n  - 8\n  seed: 3\n"
    (place / "params.yaml").write_text(text)
    use("data/small")
    assert "image_size:   # pixels\n  - 32\n  - 32\n  seed: 3\n" in params(place)
    (place / "params.yaml").write_text("prepare:\ntrain: 3\n")
    with pytest.raises(UserError, match="train: expected a section of keys, found 3"):
        use("data/small")
    assert params(place) == "prepare:\ntrain: 3\n"


def test_a_failing_dvc_add_is_one_clear_line(place, tmp_path):
    """For instance in a downloaded zip, which has no history."""
    (place / ".git").rename(tmp_path / "git")
    draw_folder(place / "data" / "late", 8, {"a": 3, "b": 3})
    try:
        done = subprocess.run(
            [sys.executable, "-m", "stages", "use", "data/late"], capture_output=True, text=True
        )
    finally:
        (tmp_path / "git").rename(place / ".git")
        shutil.rmtree(place / "data" / "late")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "`dvc add data/late` failed, for the reason above" in done.stderr


def test_a_dataset_that_git_does_not_ignore_is_not_said_to_be_ready(place):
    """DVC does not escape a blank at the end of a name in .gitignore: Git would get the images."""
    draw_folder(place / "data" / "pets ", 8, {"a": 3, "b": 3})
    with pytest.raises(UserError, match=r"Git does not ignore it, .*`dvc remove 'data/pets .dvc'`"):
        use("data/pets ")
    shutil.rmtree(place / "data" / "pets ")


def test_a_dataset_whose_name_is_a_pattern_of_one_in_git(place):
    draw_folder(place / "data" / "in gi[t]", 8, {"a": 3, "b": 3})
    use("data/in gi[t]")
    assert (place / "data" / "in gi[t].dvc").is_file()


def test_it_does_not_wait_for_tensorflow():
    code = "import stages.use, sys; print({'tensorflow', 'dvc'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"


def test_every_kind_of_dataset_sets_the_same_keys():
    """Otherwise one would leave something of another."""
    assert SMALL_IMAGES.keys() == PHOTOGRAPHS.keys() == ON_BACKBONE.keys() == FINE_TUNED.keys()


def test_a_backbone_is_advised_and_lines_without_effect_are_not_printed(place, capfd):
    use("data/small")
    capfd.readouterr()
    for _ in range(2):  # whether a key changes or not
        use("data/my photos")
        assert re.search(
            r"one would help most: `python -m stages backbone [\w-]+` \(\d+ MB to download, then",
            capfd.readouterr().out,
        )
    (place / "data/backbones/net.keras").write_bytes(b"a model")
    use("data/my photos")
    out = capfd.readouterr().out
    assert "would help" not in out and "train.augment" not in out and "train.filters" not in out
    assert "  others " in out and "keys without effect now: set to the default" in out


def test_the_best_quality_is_the_recipe_that_was_measured(place, capfd):
    spec = importlib.util.spec_from_file_location("accuracy", ROOT / "tests/benchmarks/accuracy.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    with pytest.raises(UserError, match="--quality best fine-tunes a backbone, and there is none"):
        use("data/my photos", quality="best")
    with pytest.raises(UserError, match="the images are small"):
        use("data/small", quality="best")
    for name in ("net", "other"):
        (place / f"data/backbones/{name}.keras").write_bytes(b"a model")
    with pytest.raises(
        UserError, match="lost.keras: no such file, but net.keras, other.keras; `py"
    ):
        use("data/my photos", "lost")
    use("data/my photos", "other", "best")
    assert "0.0 → 0.7 " in (out := capfd.readouterr().out) and "nine times the CPU time" in out
    for section, values in benchmark.CASES["fine_tuned"].items():
        assert place.parameters[section] == place.parameters[section] | values
    assert place.parameters["train"]["backbone"] == "other.keras"
    use("data/my photos")
    assert "0.7 → 0.0 " in (out := capfd.readouterr().out) and "frozen" in out
    assert place.parameters["train"]["backbone"] == "other.keras"
    assert place.parameters["train"]["batch_size"] == 64
    use("data/my photos", "none")
    assert place.parameters["train"]["backbone"] == "none"
    assert "would help" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("counts", "own", "message"),
    [
        ({"a": 3, "b": 2}, "", "class b has 2 images; each class needs 3 or more"),
        ({"a": 3, "b": 1}, "train", "class b has 1 image; each class needs 2 or more"),
        ({"a": 3, "b": 2}, "train", ""),
    ],
)
def test_a_class_that_prepare_would_refuse_is_refused(place, tmp_path, counts, own, message):
    """Of a dataset with splits of its own (here train and test), fewer images may do."""
    folder = tmp_path / "dataset"
    draw_folder(folder / own, 8, counts)
    if own:
        draw_folder(folder / "test", 8, {"a": 1, "b": 1})
    text = params(place)
    if not message:
        use(folder)
        return
    with pytest.raises(UserError, match=message):
        use(folder)
    assert params(place) == text


def test_images_in_git_come_with_the_cure(place, capfd):
    """The command that it names works, and DVC then tracks them."""
    draw_folder(place / "data" / "late", 8, {"a": 3, "b": 3})
    place.commit()
    use("data/late")
    out = capfd.readouterr().out
    assert "all its versions stay in Git's history" in out
    place.run("sh", "-c", re.search("`(git rm.*?)`", out)[1])
    use("data/late")
    assert "data/late is now tracked by DVC" in capfd.readouterr().out


def test_a_folder_that_is_one_too_deep_comes_with_the_command(place):
    draw_folder(place / "data" / "two words" / "photos", 8, {"a": 3, "b": 3})
    with pytest.raises(UserError, match="`python -m stages use 'data/two words/photos'`"):
        use("data/two words")


def test_params_yaml_comes_as_the_command_would_set_it(place):
    """The built-in digits are small images."""
    place.configure({"dataset": "data/in git"})
    assert use("data/in git") == {}
