"""Tables of labels of other forms, such as Kaggle's: what the command use makes of them."""

import os
from pathlib import Path

import pytest
from factories import make_files

from stages.data import dataset
from stages.display.label_tables import make_labels
from stages.run.cli import UserError

NAMES = ["a1.png", "a2.png", "a3.png", "a4.png"]


def fill(folder: Path, images: list[str], table: str, text: str) -> Path:
    make_files(folder, *images)
    (folder / table).write_text(text, encoding="utf-8")
    return folder


def make(source: Path, folder: Path | None = None) -> dict[str, str]:
    return make_labels(source, folder or source, "auto", "data/prepared")


def rows(first: str, *values: str) -> str:
    return "\n".join([first, *values, ""])


KAGGLE = {
    "ids": ("train", rows("id,label", "a1,0", "a2,1", "a3,0", "a4,1"), "id", "label"),
    "APTOS": ("train_images", rows("id_code,diagnosis", "a1,0", "a2,1", "a3,0", "a4,1"),
              "id_code", "diagnosis"),
    "dogs": ("train", rows("id,breed", "a1,0", "a2,1", "a3,0", "a4,1"), "id", "breed"),
    "names": ("pics", rows("filename;class", "a1.png;0", "a2.png;1", "a3.png;0", "a4.png;1"),
              "filename", "class"),
    "few": ("deep/er", rows("image,x", "a1.png,0", "a2.png,1", "a3.png,0", "a4.png,1"),
            "image", "x"),
    "GTSRB": ("Train/0", rows("Width,Height,ClassId,Path", "5,3,0,Train/0/a1.png",
              "5,4,1,Train/0/a2.png", "4,4,0,Train/0/a3.png", "5,3,1,Train/0/a4.png"),
              "Path", "ClassId"),
    "elsewhere": ("x", rows(",file_name,species", *(rf"{n},C:\me\x\a{n + 1}.png,{n % 2}"
                  for n in range(4))), "file_name", "species"),
    "exact": ("x", rows("id,class,Label", "a1,9,0", "a2,8,1", "a3,9,0", "a4,8,1"), "id", "Label"),
    "numbers": ("x", rows("row,id,label", "1,a1,0", "2,a2,1", "3,a3,0", "4,a4,1"), "id", "label"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KAGGLE)
@pytest.mark.parametrize("named", [True, False])
def test_a_table_beside_a_folder_of_images(tmp_path, kind, named):
    inner, text, column, label = KAGGLE[kind]
    paths = [f"{inner}/{name}" for name in NAMES]
    fill(tmp_path, paths, "train.csv", text)
    made = make(tmp_path / "train.csv" if named else tmp_path, tmp_path)
    assert made["table"] == (
        f"train.csv: column {column} names the images (4 of 4 found in {inner}/), {label} is the"
        f" label; written to {tmp_path / 'labels.csv'}"
    )
    images, _ = dataset.find(tmp_path)
    assert images["path"].tolist() == paths and images["class"].tolist() == ["0", "1", "0", "1"]
    assert (tmp_path / "labels.csv").read_text().splitlines()[:2] == ["path,label", f"{paths[0]},0"]


def test_images_beside_their_table_in_several_folders_with_groups_and_splits(tmp_path):
    """Rows whose image is not here are counted, and left out."""
    lines = ["a1,p1,train,x", "a2,p1,train,y", "a3,,test,x", "a4,p2,test,y", "b5,p3,train,x"]
    images = ["part_1/a1.png", "part_1/a2.png", "part_2/a3.png", "a4.png"]
    fill(tmp_path, images, "meta.csv", rows("image,Group,split,dx", *lines))
    made = make(tmp_path)["table"]
    assert "column image names the images (4 of 5 found in " in made
    assert "dx is the label, Group the group, split the split; written to" in made
    found, _ = dataset.find(tmp_path)
    assert found["own_split"].tolist() == ["test", "train", "train", "test"]
    assert found["group"].tolist() == ["p2", "p1", "p1", None]


def test_labels_that_are_numbers_of_images_too(tmp_path):
    """The column that names more of them is that of the images."""
    fill(tmp_path, [f"x/{n}.png" for n in range(8)], "t.csv",
         rows("digit,id", *(f"{n % 2},{n}" for n in range(8))))  # fmt: skip
    assert make(tmp_path)["table"].startswith("t.csv: column id names the images (8 of 8 found in")


REFUSED = {
    "several": (rows("id,sex,site", "a1,m,x", "a2,f,y", "a3,m,y", "a4,f,x"),
                "sex, site could be the label; call the right one label in the first line and"),
    "one-hot": (rows("id,rust,scab", "a1,0,1", "a2,1,0", "a3,0,0", "a4,1,0"), "rust, scab could"),
    "none": (rows("id,name", "a1,q", "a2,r", "a3,s", "a4,t"), "no column is the label (name)"),
    "alone": (rows("id", "a1", "a2", "a3", "a4"), "no column is the label ()"),
    "no images": (rows("id,label", "c1,0", "c2,1", "c3,0"), "none of its columns (id, label) n"),
    "few images": (rows("id,label", "a1,0", "a2,1", "c3,0", "c4,0"), "none of its columns (id, l"),
    "two labels": (rows("id,label", "a1,0", "a1,1", "a2,0", "a3,0"), "that differ for one image: "),
    "no label": (rows("id,label", "a1,0", "a2,", "a3,1", "a4,1"), "train.csv: no label: "),
    "one class": (rows("id,label", "a1,0", "a2,0", "a3,0", "a4,0"), "a label of one kind only (0)"),
    "empty": ("", "none of its columns ()"),
    "first line": (rows("id,label"), "none of its columns (id, label)"),
    "uneven": (rows("id,label", "a1,0", "a2"), "train.csv: line 3: more or fewer"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("named", [True, False])
def test_a_table_that_is_not_clear_changes_nothing(tmp_path, kind, named):
    text, message = REFUSED[kind]
    fill(tmp_path, [f"x/{name}" for name in NAMES], "train.csv", text)
    with pytest.raises(UserError) as caught:
        make(tmp_path / "train.csv" if named else tmp_path, tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["train.csv", "x"]


def test_of_several_tables_that_are_not_clear_one_is_to_be_named(tmp_path):
    fill(tmp_path, [f"x/{name}" for name in NAMES], "train.csv", REFUSED["one-hot"][0])
    (tmp_path / "test.csv").write_text("id\nb1\n")
    with pytest.raises(
        UserError, match=r"\(test.csv, train.csv\), .*; `python -m stages use` with"
    ):
        make(tmp_path)


def test_a_value_that_names_several_images_names_none(tmp_path):
    """Of train/1.png and test/1.png, none is guessed."""
    images = [f"{split}/{name}" for split in ("train", "test") for name in NAMES]
    fill(tmp_path, images, "train.csv", rows("id,label", "a1,0", "a2,1", "a3,0", "a4,1"))
    with pytest.raises(UserError, match="each just one"):
        make(tmp_path)


def test_kaggles_other_tables_are_no_labels(tmp_path):
    text = rows("id,label", "a1,0", "a2,1", "a3,0", "a4,1")
    fill(
        tmp_path,
        [*(f"train/{name}" for name in NAMES), "test/b1.png", "test/b2.png"],
        "train.csv",
        text,
    )
    (tmp_path / "test.csv").write_text("id\nb1\nb2\n")
    (tmp_path / "sample_submission.csv").write_text("id,label\nb1,0\nb2,0\n")
    assert make(tmp_path)["table"].startswith("train.csv: column id names")
    (tmp_path / "labels.csv").unlink()
    (tmp_path / "again.csv").write_text(text)
    with pytest.raises(UserError, match=r"again.csv, .*train.csv: several tables list labels"):
        make(tmp_path)


@pytest.mark.parametrize("text", ["id,breed\na1,0\na2,1\na3,0\na4,0\n", "path,label\n"])
def test_a_labels_csv_is_never_overwritten(tmp_path, text):
    fill(tmp_path, [f"x/{name}" for name in NAMES], "labels.csv", text)
    (tmp_path / "t.csv").write_text("id,breed\na1,0\na2,1\na3,0\na4,0\n")
    with pytest.raises(UserError, match=r"labels.csv exists already, and is not overwritten"):
        make(tmp_path / "t.csv", tmp_path)
    assert (tmp_path / "labels.csv").read_text() == text


@pytest.mark.parametrize("named", [True, False])
def test_what_is_a_dataset_already_stays_as_it_is(tmp_path, named):
    fill(tmp_path, ["a/1.png", "b/2.png"], "labels.csv", "path,label\na/1.png,x\nb/2.png,y\n")
    assert make(tmp_path / "labels.csv" if named else tmp_path, tmp_path) == {}
    (tmp_path / "labels.csv").rename(tmp_path / "facts.csv")
    (tmp_path / "facts.csv").write_text("path,size\na/1.png,2\nb/2.png,2\n")
    assert make(tmp_path) == {}


def test_folders_that_may_be_none_of_classes_are_told(tmp_path):
    """A table in the folder lists other labels: naming it takes these."""
    paths = [f"pics/{name}" for name in NAMES]
    fill(tmp_path, [*paths, "test/b1.png"], "t.csv", rows("id,x", "a1,0", "a2,1", "a3,0", "a4,1"))
    assert make(tmp_path) == {
        "WARNING: table": f"{tmp_path / 't.csv'}: lists labels, too; `python -m stages use` with"
        " its name takes them in place of the folders"
    }
    assert list(make(tmp_path / "t.csv", tmp_path)) == ["table"]
    assert dataset.find(tmp_path)[0]["path"].tolist() == paths
