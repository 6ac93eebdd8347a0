"""Layouts of datasets, and what is said of folders that are none."""

import os
from pathlib import Path

import numpy as np
import pytest

from stages.data import dataset
from stages.utils.cli import UserError


def make(root: Path, *paths: str) -> Path:
    for path in paths:
        place = root / path
        if path.endswith("/"):
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(b"")
    return root


def test_a_folder_per_class(tmp_path):
    make(tmp_path, "b c/2.JPG", "b c/deep/er/1.png", "a/é, \"x\"\n.gif", "a/Thumbs.db", "a/n.txt",
         "a/.hidden.png", ".git/x/1.png", "__MACOSX/a/1.png", "readme.md")  # fmt: skip
    found = dataset.find(tmp_path)
    assert list(found.paths) == ['a/é, "x"\n.gif', "b c/2.JPG", "b c/deep/er/1.png"]
    assert found.classes == ["a", "b c"]
    assert found.labels.tolist() == [0, 1, 1] and found.given.tolist() == [-1, -1, -1]
    assert found.splits == [] and found.ignored == 4


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Validation"])
def test_given_splits(tmp_path, val):
    make(tmp_path, "train/a/1.png", "train/b/2.png", f"{val}/a/3.png", "test/b/x/4.png", "x.csv")
    found = dataset.find(tmp_path)
    given = {path.split("/")[0]: code for path, code in zip(found.paths, found.given, strict=True)}
    assert given == {"train": 0, val: 1, "test": 2}
    assert found.splits == ["train", "val", "test"] and found.classes == ["a", "b"]


def test_train_alone_is_a_given_split(tmp_path):
    found = dataset.find(make(tmp_path, "train/a/1.png", "train/b/2.png"))
    assert found.splits == ["train"] and found.classes == ["a", "b"]


def test_a_class_called_train(tmp_path):
    found = dataset.find(make(tmp_path, "train/1.png", "bus/2.png"))
    assert found.classes == ["bus", "train"] and found.splits == []


def test_links(tmp_path):
    """Links to files are followed, links to folders are not, as DVC does."""
    make(tmp_path, "data/a/1.png", "data/b/2.png", "else/3.png")
    (tmp_path / "data/a/3.png").symlink_to(tmp_path / "else/3.png")
    (tmp_path / "data/a/more").symlink_to(tmp_path / "else")
    (tmp_path / "data/c").symlink_to(tmp_path / "else")
    found = dataset.find(tmp_path / "data")
    assert list(found.paths) == ["a/1.png", "a/3.png", "b/2.png"] and found.links == 2


@pytest.mark.parametrize(
    "paths, message",
    [
        ([], "is empty; expected a folder of images per class"),
        (["a/", "b/"], "holds no images"),
        (["a/1.txt"], "holds no images (1 other files)"),
        (["1.png"], "holds 1 image (1.png) and no folder"),
        (["1.png", "a/1.png", "b/2.png"], "holds 1 image (1.png) beside its class folders"),
        (["a/1.png", "b/", "c/1.txt", "d/1.png"], "class folders without an image: b, c; add"),
        (["a/1.png"], "holds one class only (a); a classifier needs two"),
        (["flowers/a/1.png", "flowers/b/1.png"], "one level below: set `dataset: {root}/flowers`"),
        (["flowers/train/a/1.png", "flowers/test/b/1.png"], "set `dataset: {root}/flowers`"),
        (["train/a/1.png", "train/b/1.png", "test/1.png", "test/2.png"],
         "{root}/test holds 2 images (1.png and 1 more) and no class folders; give unlabelled"
         " images to predict (`python -m stages.predict {root}/test`)"),
        (["train/a/1.png", "train/b/1.png", "train/1.png"], "beside its class folders; move them"),
        (["train/a/1.png", "train/b/1.png", "test/all/1.png"], "train does not have: test/all"),
        (["train/1.png", "test/2.png"], "{root}/train holds 1 image (1.png) and no class folders"),
        (["train/a/1.png", "train/b/1.png", "val/a/1.png", "valid/a/1.png"], "under two names"),
        (["test/a/1.png", "val/b/1.png"], "no train"),
        (["train/a/1.png", "train/b/1.png", "test/a/1.png", "test/b/1.png", "x/1.png"],
         "holds train, test beside x; expected only train, val and test"),
    ],
)  # fmt: skip
def test_mistakes(tmp_path, paths, message):
    make(tmp_path, *paths)
    with pytest.raises(UserError) as caught:
        dataset.find(tmp_path)
    assert message.replace("{root}", str(tmp_path)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_folder_a_file_and_the_pipelines_own_folder(tmp_path):
    make(tmp_path, "file.zip", "data/digits/a/1.png", "data/prepared/")
    for path, message in (
        ("nowhere", "no such folder"),
        ("file.zip", "is a file; expected a folder"),
        ("data", "contains the pipeline's own output"),
    ):
        with pytest.raises(UserError, match=message):
            dataset.find(tmp_path / path, tmp_path / "data/prepared")


def test_names_that_are_not_utf8(tmp_path):
    make(tmp_path, "a/1.png", "b/2.png")
    for name in (b"a/\xff.png", b"b/\xe9t\xe9.txt"):
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_bytes(b"")
    with pytest.raises(UserError) as caught:
        dataset.find(tmp_path)
    assert r"a/\xff.png" in str(caught.value) and r"b/\xe9t\xe9.txt" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_that_may_not_be_read_are_all_named(tmp_path, monkeypatch):
    make(tmp_path, "a/1.png", "b/2.png", "lost+found/", "a/closed/", "secret/")
    scandir = os.scandir

    def guarded(path):
        if os.fsdecode(path).endswith(("closed", "secret", "lost+found")):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(UserError) as caught:
        dataset.find(tmp_path)
    assert "no permission to read" in str(caught.value)
    assert "a/closed" in str(caught.value) and "secret" in str(caught.value)
    assert "lost+found" not in str(caught.value) and "\n" not in str(caught.value)


def test_arrays_are_small(tmp_path):
    found = dataset.find(make(tmp_path, "a/1.png", "b/2.png"))
    assert found.labels.dtype == np.int32 and found.given.dtype == np.int8
