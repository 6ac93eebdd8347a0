"""Files whose names say that they show the same: found where they are in several splits."""

import re

import numpy as np
import pandas as pd
import pytest

from stages.data.arrays import SPLITS
from stages.data.splits import add_groups
from stages.display.look_alikes import describe_look_alikes


def table(*names: str, others: int = 40, own: bool = False) -> pd.DataFrame:
    """Images of two classes, numbered, among them these; by turns in each split."""
    paths = [*names, *(f"{name}/IMG_{n:03d}.jpg" for name in "ab" for n in range(others))]
    split = pd.Categorical(np.take(SPLITS, np.arange(len(paths)) % 3), SPLITS)
    nothing = pd.Categorical([None] * len(paths), SPLITS)
    if own:
        paths = [f"{one}/{path}" for one, path in zip(split, paths, strict=True)]
    classes = [path.split("/")[-2].split(" ")[0] for path in paths]
    return pd.DataFrame(
        {"path": paths, "class": classes, "split": split, "own_split": split if own else nothing}
    )


SETS = [
    ["img7.jpg", "img7_rot90.jpg"],
    ["img7.jpg", "img7 copy.jpg", "img7 copy 2.jpg"],
    ["img7.jpg", "img7 - Copy.jpg", "img7 - Copy (2).jpg"],
    ["IMG_501.jpg", "IMG_501(2).jpg"],
    ["IMG_501.jpg", "IMG_501 (2).jpg", "IMG_501 (3).png"],
    ["IMG_501.jpg", "IMG_501 2.jpg"],
    ["img7.jpg", "img7_1.jpg", "img7_2.jpg"],
    ["rose.jpg", "rose_flipped.jpg", "rose_FLIP_rot180.jpg"],
    ["x_jpg.rf.0a1b2c3d.jpg", "x_jpg.rf.99aabb.jpg"],  # Roboflow
    ["img7_aug_0.png", "img7_aug_1.png"],  # the original is elsewhere
    ["IMG_501.jpg", "IMG_501-edited.jpg"],
    ["FAM_B 28.JPG", "FAM_B 28_90deg.JPG", "FAM_B 28_new30degFlipLR.JPG", "FAM_B 28_flipTB.JPG"],
    ["FAM_B 28_270deg.JPG", "FAM_B 28_newPixel25.JPG"],  # the original is elsewhere
    ["a_original_rose.jpg_0a1b-2c.jpg", "a_original_rose.jpg_3d4e-5f.jpg"],  # Augmentor
    ["10_left.jpeg", "10_right.jpeg"],  # a patient's eyes
    ["PXL_20240501_120000510.jpg", "PXL_20240501_120000510~2.jpg"],
    ["IMG_1636.jpg", "IMG_1636.0.jpg", "IMG_1636.1.jpg"],
    ["rose.jpg", "rose.sync-conflict-20240501-120000-ABCDEFG.jpg"],
    ["rose.jpg", "rose (copy).jpg", "rose (another copy).jpg"],
    ["rose.jpg", "rose_conflict-20240501-120000.jpg", "rose (conflicted copy 2024-05-01 1200).jpg"],
    ["IMG_20240501_120000_BURST001.jpg", "IMG_20240501_120000_BURST002.jpg"],
    ["rose_hue.jpg", "rose_clahe.jpg"],
    ["a.b_rot5/7.jpg", "a.b_rot5/7_hflip.jpg"],
]


@pytest.mark.parametrize("names", SETS)
def test_look_alikes_in_several_splits_get_a_pattern_that_works(names):
    images = table(*(f"a/{name}" for name in names)).assign(**{"class": "a"})
    images.loc[images["path"].str.startswith("b"), "class"] = "b"
    line = describe_look_alikes(images)["WARNING: names"]
    assert f"a/{names[0]}" in line or f"a/{names[1]}" in line
    pattern = re.search(r"prepare\.group_by: '(.*)'$", line)[1]
    groups = add_groups(images, pattern)["group"]
    assert groups[: len(names)].nunique() == 1
    assert groups[len(names) - 1 :].nunique() == len(images) - len(names) + 1


@pytest.mark.parametrize("names", SETS)
def test_look_alikes_in_one_split_are_no_reason_for_a_line(names):
    images = table(*(f"a/{name}" for name in names))
    assert describe_look_alikes(images.assign(split="train")) == {}


@pytest.mark.parametrize(
    "form",
    [
        "IMG_{:03d}.jpg", "IMG_2024_{:02d}.jpg", "{}.png", "photo ({}).jpg", "2024 ({}).jpg",
        "cat.{}.jpg", "cat_rot_{}.jpg", "leaf dark {}.jpg", "frame-{:05d}.png",
        "2024-05-{:02d}.jpg", "20240501_1200{:02d}.jpg", "{}_left.jpg", "benign ({}).png",
        "rotten_{}.jpg", "crop_{}.jpg",
        "n0123_{}.JPEG", "2024-05-01 10.22.{:02d}.jpg", "{}_2.jpg", "copy {}.jpg",
    ],
)  # fmt: skip
@pytest.mark.parametrize("first", ["", "a/photo.jpg", "a/IMG.jpg", "a/IMG_2024.jpg"])
def test_ordinary_numbered_photographs_do_not_get_a_line(form, first):
    names = [f"{name}/{form.format(n)}" for name in "ab" for n in range(1, 31)]
    images = table(*([first] * bool(first)), *names, others=0)
    assert describe_look_alikes(images) == {}
    few = [f"{name}/{form.format(n)}" for name in "ab" for n in range(1, 6)]
    assert describe_look_alikes(table(*few, others=0)) == {}


@pytest.mark.parametrize(
    "form", ["202405{:02d}_12{:02d}00.jpg", "person {} ({}).jpg", "2024-05-{:02d} {:02d}.jpg"]
)
def test_photographs_of_several_days_or_series_do_not_get_a_line(form):
    names = [f"{name}/{form.format(n, m)}" for name in "ab" for n in range(1, 9) for m in range(5)]
    assert describe_look_alikes(table(*names, others=0)) == {}


def test_look_alikes_in_own_splits_are_to_be_moved():
    line = describe_look_alikes(table("a/x7.jpg", "a/x7_rot90.jpg", own=True))["WARNING: names"]
    assert "train/a/x7.jpg, val/a/x7_rot90.jpg" in line and "group_by" not in line
    assert line.endswith("are: move each set into one of the dataset's own splits")


@pytest.mark.parametrize("folder", ["", "pics/", "test/"])
def test_look_alikes_in_splits_of_a_table_are_named_whole(folder):
    """Their paths begin with no folder of a split, or with that of another."""
    images = table("a/x7.jpg", "a/x7_rot90.jpg", own=True)
    paths = [folder + path.partition("/")[2].replace("/", " ") for path in images["path"]]
    line = describe_look_alikes(images.assign(path=paths))["WARNING: names"]
    assert f"{folder}a x7.jpg, {folder}a x7_rot90.jpg; if so" in line


def test_own_splits_that_are_numbered_alike_hold_no_look_alikes():
    names = [f"{name}/{n}{end}.jpg" for name in "ab" for n in range(9) for end in ("", "_rot90")]
    parts = [table(*names, others=0).assign(path=[f"{s}/{n}" for n in names], split=s, own_split=s)
             for s in ("train", "test")]  # fmt: skip
    images = pd.concat(parts, ignore_index=True)
    assert describe_look_alikes(images) == {}
