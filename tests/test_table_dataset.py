"""A dataset whose labels are in a table: labels.csv in the folder of its images."""

import unicodedata
from pathlib import Path

import pandas as pd
import pytest
from factories import make_files
from hypothesis import given
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal

from stages.data import dataset, splits
from stages.run.cli import UserError

ROWS = ["path,label", "a/1.jpg,cat", "a/2.jpg,dog", "3.png,cat"]


def fill(folder: Path, *rows: str, files: tuple[str, ...] = ()) -> Path:
    """Make a folder of images, and its table."""
    make_files(folder, "a/1.jpg", "a/2.jpg", "3.png", "deep/er/4.png", *files)
    (folder / "labels.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def lines_on(folder: Path, layout: str = "auto") -> dict[str, str]:
    images, skipped = dataset.find(folder, layout=layout)
    return dataset.describe_skipped(skipped, images)


def test_the_table_names_the_images_and_their_classes(tmp_path):
    images, _ = dataset.find(fill(tmp_path, *ROWS, files=("a/notes.txt", ".git/9.jpg")))
    assert images["path"].tolist() == ["3.png", "a/1.jpg", "a/2.jpg"]
    assert images["class"].tolist() == ["cat", "cat", "dog"]
    assert images["own_split"].isna().all() and "group" not in images
    assert lines_on(tmp_path) == {
        "labels": "from labels.csv",
        "unlabeled": "1 image that labels.csv does not name passed over: deep/er/4.png",
        "passed over": "1 image in hidden folders or a system's, as of thumbnails or a recycle bin:"
        " .git",
        "ignored": "1 file without an image extension (1 .txt): a/notes.txt",
    }


@given(
    st.dictionaries(
        st.text("ab é_-'\"\n", min_size=1, max_size=6).map(lambda name: f"{name}x.png"),
        st.sampled_from(["train", "val", "test"]),
        min_size=4,
    ),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_a_table_gives_what_folders_with_its_labels_give(
    tmp_path_factory, names, has_splits, random
):
    """The same images in the same order, whatever the order of the rows."""
    root = tmp_path_factory.mktemp("both")
    order = list(names)
    wanted = pd.DataFrame(
        {
            "split": ["train", "train", *(names[name] for name in order[2:])],
            "label": ["A", "B", *random.choices("AB", k=len(order) - 2)],
            "name": order,
        }
    )
    parts = ["split", "label", "name"] if has_splits else ["label", "name"]
    wanted["path"] = wanted[parts].agg("/".join, axis=1)
    make_files(root, *wanted["path"])
    expected, _ = dataset.find(root)
    table = wanted.sample(frac=1, random_state=random.randrange(99))
    columns = ["label", "path", *(["split"] if has_splits else [])]
    table[columns].to_csv(root / "labels.csv", index=False)
    found, skipped = dataset.find(root)
    assert_frame_equal(found, expected)
    assert skipped["path"].tolist() == ["labels.csv"]


@pytest.mark.parametrize("words", [("train", "val", "test"), ("Training", "valid", "TestSet")])
def test_splits_of_the_table_are_the_datasets_own(tmp_path, words):
    rows = [f"{row},{word}" for row, word in zip(ROWS, ["split", *words], strict=True)]
    fill(tmp_path, *rows, "deep/er/4.png,dog,train")
    with pytest.raises(UserError, match="train"):  # of cat, it has one; of dog, only the fourth
        dataset.find(fill(tmp_path / "without", *rows))
    images, _ = dataset.find(tmp_path)
    assert images["own_split"].tolist() == ["test", "train", "val", "train"]


def test_an_empty_column_of_splits_or_groups_is_as_good_as_none(tmp_path):
    rows = [f"{row},{end}" for row, end in zip(ROWS, ["split,group", *3 * [","]], strict=True)]
    images, _ = dataset.find(fill(tmp_path, *rows))
    assert images["own_split"].isna().all() and images["group"].isna().all()


def test_groups_of_the_table_replace_the_pattern(tmp_path):
    rows = [f"{row},{group}" for row, group in zip(ROWS, ["group", "x", "", "x"], strict=True)]
    images, _ = dataset.find(fill(tmp_path, *rows))
    assert images["group"].tolist() == ["x", "x", None]
    assert_frame_equal(splits.add_groups(images, None), images)
    with pytest.raises(UserError, match="groups are in the column group of labels.csv already"):
        splits.add_groups(images, r"\d+")


REFUSED = {
    "no such file": (["b/9.jpg,cat"], "1 path of no file: b/9.jpg (line 5); expected paths"),
    "without extension": (["deep/er/4,cat"], "4 (line 5); expected paths within {root}, with"
                          " slashes and extensions; 1 of these probably mean line 5: deep/er/4.pn"),
    "without folder": (["4.png,cat", "4,cat"],
                       "2 of these probably mean line 5: deep/er/4.png and 1 more"),
    "with another folder": (["data/{root.name}/deep/er/4.png,dog"], "line 5: deep/er/4.png"),
    "absolute": (["{root}/deep/er/4.png,dog"], "line 5: deep/er/4.png"),
    "of Windows": ([r"C:\pics\deep\er\4.png,dog"], "line 5: deep/er/4.png"),
    "above": (["../{root.name}/3.png,dog", "a/../3.png,dog"], "2 paths of no file: ../"),
    "no path": ([",dog"], "1 path of no file: line 5; expected"),
    "a folder": (["deep,dog", "a/,dog"], "2 paths of no file: deep (line 5), a/ (line 6);"),
    "two labels": (["3.png,dog"], "several rows that differ for one image: 3.png (line 4), 3.png"
                   " (line 5); keep one of them"),
    "no label": (["deep/er/4.png,"], "no label: deep/er/4.png (line 5); fill it in"),
    "alike": (["deep/er/4.png,Cat"], "labels.csv: class names that look alike: 'cat (line 2)',"
              " 'Cat (line 5)'"),
    "fields": (["deep/er/4.png"], "labels.csv: line 5: more or fewer than the 2 fields"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_row_that_can_not_be_meant_is_refused(tmp_path, kind):
    rows, message = REFUSED[kind]
    fill(tmp_path, *ROWS, *(row.format(root=tmp_path) for row in rows))
    with pytest.raises(UserError) as caught:
        dataset.find(tmp_path)
    assert message.format(root=tmp_path) in str(caught.value) and "\n" not in str(caught.value)


SPLITS = {
    "unknown": (["train", "train", "fold2"], "unknown splits: fold2 (line 4); expected train, val"),
    "some": (["train", "", ""], "no split: a/2.jpg (line 3), 3.png (line 4); fill it in"),
    "no train": (["val", "test", "val"], "labels that train does not have: cat, dog; add im"),
    "a class": (["train", "test", "train"], "labels that train does not have: dog; add images"),
}


@pytest.mark.parametrize("kind", SPLITS)
def test_splits_that_can_not_be_meant_are_refused(tmp_path, kind):
    words, message = SPLITS[kind]
    rows = [f"{row},{word}" for row, word in zip(ROWS, ["split", *words], strict=True)]
    with pytest.raises(UserError) as caught:
        dataset.find(fill(tmp_path, *rows))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "end"), [(["split"], "val"), (["group"], "y"), (["group", "split"], "x,val")]
)
def test_rows_of_one_image_may_be_equal_but_not_differ(tmp_path, columns, end):
    first = {"split": "train", "group": "x"}
    rest = ",".join(first[name] for name in columns)
    rows = [",".join((ROWS[0], *columns)), *(f"{row},{rest}" for row in ROWS[1:])]
    assert len(dataset.find(fill(tmp_path, *rows, rows[-1]))[0]) == 3
    with pytest.raises(UserError, match=r"differ for one image: 3.png \(line 4\), 3.png \(line 5"):
        dataset.find(fill(tmp_path, *rows, f"{ROWS[3]},{end}"))


@pytest.mark.parametrize(
    ("rows", "found"), [(["path,label"], "no image"), (ROWS[:2], "cat"), (ROWS[::2], "dog")]
)
def test_one_class_is_none(tmp_path, rows, found):
    rows = [ROWS[0], *rows[1:]]
    with pytest.raises(UserError, match=rf"a label of one kind only \({found}\)"):
        dataset.find(fill(tmp_path, *rows))


def test_files_that_are_no_images_are_told(tmp_path):
    """As in class folders: a warning where they are many of a class."""
    rows = ["a/n.dcm,dog", "a/m.dcm,dog", "x,cat"]
    fill(tmp_path, *ROWS, *rows, files=("a/n.dcm", "a/m.dcm", "x"))
    lines = lines_on(tmp_path)
    assert lines["WARNING: files"].startswith(
        "passed over for their extension: 2 of 3 in dog (2 .dcm)"
    )
    assert lines["ignored"].startswith("3 files without an image extension (2 .dcm, 1 without any)")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_name_that_a_mac_stores_in_another_form(tmp_path, form):
    name = unicodedata.normalize(form, "é.png")
    other = unicodedata.normalize({"NFC": "NFD", "NFD": "NFC"}[form], name)
    images, _ = dataset.find(fill(tmp_path, *ROWS, f"{other},dog", files=(name,)))
    assert name in images["path"].tolist()


@pytest.mark.parametrize("header", ["ClassId,Name", "path,class", "", "Path,Label"])
def test_a_table_of_other_columns_beside_class_folders_is_told(tmp_path, header):
    make_files(tmp_path, "cat/1.jpg", "dog/2.jpg")
    (tmp_path / "labels.csv").write_text(f"{header}\n1,cat,more\n")
    assert lines_on(tmp_path) == {
        "labels": "from the folders; labels.csv is not read, as it lacks the columns path and"
        " label, or prepare.layout is classes"
    }


def test_layout_classes_says_that_the_folders_are_the_classes(tmp_path):
    make_files(tmp_path, "cat/1.jpg", "dog/2.jpg")
    (tmp_path / "labels.csv").write_text("path,label\ncat/1.jpg,dog\ndog/2.jpg,cat\n")
    assert dataset.find(tmp_path, layout="classes")[0]["class"].tolist() == ["cat", "dog"]
    assert lines_on(tmp_path, "classes")["labels"].startswith("from the folders; labels.csv is not")
    assert dataset.find(tmp_path)[0]["class"].tolist() == ["dog", "cat"]


@pytest.mark.parametrize(
    "paths",
    [
        ["1.jpg", "2.jpg"],
        ["images/1.jpg"],
        ["train/1.jpg", "test/2.jpg"],
        ["part1/1.jpg", "part2/2.jpg"],
    ],
)
@pytest.mark.parametrize("name", ["train.csv", "labels.csv", "Labels.TSV"])
def test_folders_that_are_no_classes_beside_a_table_say_what_to_do_with_it(tmp_path, paths, name):
    make_files(tmp_path, *paths)
    (tmp_path / name).write_text("id,breed\n1,cat\n2,dog\n")
    with pytest.raises(UserError) as caught:
        dataset.find(tmp_path)
    assert str(caught.value).endswith(
        f"; or, if a table in it lists the labels ({name}), name its columns path and label and the"
        " file labels.csv (`python -m stages use` does so where it can)"
    )


def test_a_table_in_place_of_a_folder_is_told_where_it_belongs(tmp_path):
    (tmp_path / "photos.csv").write_text("path,label\n")
    with pytest.raises(
        UserError, match="is a file; put it into the folder of its images as labels"
    ):
        dataset.find(tmp_path / "photos.csv")
