"""Layouts of datasets, and what is said of folders that are none."""

import os
from pathlib import Path

import pytest
from factories import make_files

from stages.data import dataset, listing
from stages.run.cli import UserError


def test_a_folder_per_class(tmp_path):
    make_files(
        tmp_path, "b c/2.JPG", "b c/deep/er/1.png", "a/é, \"x\"\n.gif", "a/Thumbs.db", "a/n.txt",
        "a/.hidden.png", ".git/x/1.png", "__MACOSX/a/1.png", "readme.md",
    )  # fmt: skip
    found, skipped = dataset.find(tmp_path)
    assert list(found["path"]) == ['a/é, "x"\n.gif', "b c/2.JPG", "b c/deep/er/1.png"]
    assert list(found["class"]) == ["a", "b c", "b c"] and found["own_split"].isna().all()
    skipped = skipped.set_index("path")
    assert list(skipped.index[skipped["reason"] == listing.NO_IMAGE]) == [
        "a/.hidden.png", "a/Thumbs.db", "a/n.txt", "readme.md",
    ]  # fmt: skip
    assert list(skipped.index[skipped["reason"] == listing.OF_SYSTEM]) == [".git", "__MACOSX"]


SYSTEM_FOLDERS = [
    "@eaDir", "#recycle", "#Recycle", "#snapshot", "@Recycle", "@Recently-Snapshot", "@tmp",
    "@__thumb", ".@__thumb", "~snapshot", ".snapshot", ".zfs", "$RECYCLE.BIN", "$Recycle.Bin",
    "RECYCLER", "System Volume Information", "FOUND.000", "lost+found", "__MACOSX", ".Trashes",
    ".Trash-1000", "Network Trash Folder", "Temporary Items", ".ipynb_checkpoints",
]  # fmt: skip


@pytest.mark.parametrize("name", SYSTEM_FOLDERS)
def test_systems_folders_are_passed_over_and_told(tmp_path, name):
    make_files(
        tmp_path, "a/1.png", "b/2.png", f"{name}/3.png", f"a/{name}/1.png/THUMB_XL.jpg",
        f"a/{name}/4.png", f"a/deeper/{name}/notes.txt",
    )  # fmt: skip
    images, skipped = dataset.find(tmp_path)
    assert list(images["path"]) == ["a/1.png", "b/2.png"]
    assert list(skipped["path"]) == sorted([name, f"a/{name}"])  # not where no image is
    line = dataset.describe_skipped(skipped, images)["passed over"]
    assert line.startswith("3 images in hidden folders or a system's") and f"a/{name}" in line
    found, skipped = listing.list_images(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path, _ in found] == list(images["path"])
    assert sum(one.files for one in skipped) == 3


@pytest.mark.parametrize(
    "name", ["recycle", "recycler", "recycled", "@", "#", "$", "~", "@home", "#1", "found", "trash"]
)
def test_classes_that_are_called_almost_like_systems_folders(tmp_path, name):
    make_files(tmp_path, f"{name}/1.png", "other/2.png")
    assert set(dataset.find(tmp_path)[0]["class"]) == {name, "other"}


def test_files_that_are_passed_over_for_their_extension_are_told(tmp_path):
    """Those that accompany an image are no images that are missed."""
    make_files(tmp_path, *(f"cat/{n}.png" for n in range(14)), "dog/1.jpg", "dog/2.jpg", "a.md")
    make_files(tmp_path, *(f"cat/deep/{n}.DNG" for n in range(28)), "cat/x", "cat/y.zip", "b.md")
    make_files(tmp_path, "dog/1.json", "dog/1.jpg.xml", "dog/2.cr2", "dog/2.txt", "c.md", "d.md")
    images, skipped = dataset.find(tmp_path)
    lines = dataset.describe_skipped(skipped, images)
    assert lines["WARNING: files"].startswith(
        "passed over for their extension: 30 of 44 in cat (28 .dng, 1 without any, 1 .zip); unpack"
    )
    assert "dog" not in lines["WARNING: files"]
    assert lines["ignored"].startswith("38 files without an image extension (28 .dng, 4 .md,")


def test_hidden_files_are_no_loss(tmp_path):
    """Phones, Macs and programs put them beside images: of what is deleted, or in transfer."""
    hidden = (
        "._1.png", ".trashed-1700000000-1.png", ".pending-1-2.png", ".syncthing.2.png.tmp",
        ".DS_Store", ".picasa.ini", ".1.png.Xa8f2K",
    )  # fmt: skip
    make_files(tmp_path, "a/1.png", "b/1.png", *(f"a/{name}" for name in hidden))
    found, skipped = dataset.find(tmp_path)
    assert list(found["path"]) == ["a/1.png", "b/1.png"]
    lines = dataset.describe_skipped(skipped, found)
    assert list(lines) == ["ignored"] and "(7 hidden)" in lines["ignored"]
    assert [path.name for path, _ in listing.list_images(tmp_path)[0]] == ["1.png", "1.png"]


@pytest.mark.parametrize(
    "name", [".cow.icloud", "cat/.2.jpg.icloud", "cat/2.jpg.nextcloud", "cat/2.jpg.owncloud",
             "cat/2.jpg.crdownload", "cat/2.jpg.part", "cat/2.jpg.PARTIAL"]
)  # fmt: skip
def test_files_in_place_of_what_is_elsewhere_are_told(tmp_path, name):
    """A .dvc file beside its folder or image stands for nothing that is missing."""
    make_files(tmp_path, "cat/1.jpg", "dog/1.jpg", "cat.dvc", "dog.dvc", "dog/1.jpg.dvc", name)
    images, skipped = dataset.find(tmp_path)
    lines = dataset.describe_skipped(skipped, images)
    assert lines["WARNING: missing"] == (
        f"1 file in place of images or folders that are not here: {name}; download these (.dvc:"
        " `dvc pull`)"
    )
    assert lines["ignored"].startswith("3 files without an image extension (3 .dvc)")
    assert "WARNING: files" not in lines
    found, skipped = listing.list_images(tmp_path)
    assert len(found) == 2
    (missing,) = [one for one in skipped if one.reason == listing.ELSEWHERE]
    assert missing.path == str(tmp_path / name)


@pytest.mark.parametrize("name, inner", [("", ""), ("cat/", "/cat"), ("cat/new/", "/cat/new")])
def test_a_dvc_project_in_the_dataset_is_refused(tmp_path, name, inner):
    """DVC sees no file of it, and says that it is tracked."""
    make_files(tmp_path, "cat/1.jpg", "dog/1.jpg", f"{name}.dvc/config")
    with pytest.raises(UserError) as caught:
        dataset.find(tmp_path)
    assert str(caught.value).startswith(
        f"dataset: {tmp_path}{inner}: a DVC project of its own, int"
    )


@pytest.mark.parametrize("name", ["1.dcm", "1.zip", "IM0001", "1.jxl"])
def test_folders_of_other_files_are_refused_with_what_to_do(tmp_path, name):
    make_files(tmp_path, f"a/{name}", f"b/deep/{name}")
    kind = f"2 {Path(name).suffix or 'without any'}"
    advice = "unpack archives, give images without an extension theirs, save those of other form"
    with pytest.raises(UserError, match=rf"no images but other files \({kind}\): {advice}"):
        dataset.find(tmp_path)
    make_files(tmp_path, "a/1.png", "c/2.png")
    with pytest.raises(UserError, match=rf"an image: b; they hold other files .*: {advice}"):
        dataset.find(tmp_path)


def test_links(tmp_path):
    """Links to files are followed; links to folders are not, as DVC does not follow them."""
    make_files(tmp_path, "data/a/1.png", "data/b/2.png", "else/3.png", "else/notes.txt")
    for link, target in (
        ("a/3.png", "../../else/3.png"),
        ("a/broken.png", "nowhere"),  # an image that can't be read
        ("a/notes.txt", "../../else/notes.txt"),
        ("a/.hidden", "../../else"),
        ("a/more", "../../else"),
        ("b/folder.png", "../../else"),
        ("b/loop", "loop"),
        ("b/up", ".."),
        ("b/nowhere", "../../nowhere"),
    ):
        (tmp_path / "data" / link).symlink_to(target)
    found, skipped = dataset.find(tmp_path / "data")
    assert list(found["path"]) == ["a/1.png", "a/3.png", "a/broken.png", "b/2.png"]
    links = skipped[skipped["reason"] == listing.NOT_FOLLOWED]
    assert list(links["path"]) == ["a/more", "b/folder.png", "b/loop", "b/nowhere", "b/up"]
    assert list(skipped["path"].drop(links.index)) == ["a/notes.txt"]


@pytest.mark.parametrize(
    "links, named",
    [
        (["c"], "c"),
        (["test"], "test"),
        (["a", "c.png"], "a, c.png"),
        (["loop"], "loop"),
        (["nowhere"], "nowhere"),
        (["train/c", "val/a"], "train/c, val/a"),
        (["train/train/c"], "train/train/c"),
        (["train/loop"], "train/loop"),
    ],
)
def test_a_link_in_place_of_a_class_or_split_is_refused(tmp_path, links, named):
    make_files(tmp_path, "else/a/3.png", "else/b/3.png")
    if "/" in links[0]:
        train = Path(links[0]).parent
        make_files(tmp_path / "data", f"{train}/a/1.png", f"{train}/b/2.png", "val/b/3.png")
    else:
        make_files(tmp_path / "data", "x/1.png", "y/2.png")
    targets = {"loop": "loop", "nowhere": "./nothing"}
    for link in links:
        place = tmp_path / "data" / link
        place.symlink_to(targets.get(place.name, tmp_path / "else"))
    with pytest.raises(UserError) as caught:
        dataset.find(tmp_path / "data")
    assert f"which DVC does not follow: {named}; put a copy" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_class_of_links_only(tmp_path):
    make_files(tmp_path, "data/a/1.png", "data/b/", "else/3.png")
    (tmp_path / "data/b/all").symlink_to(tmp_path / "else")
    with pytest.raises(UserError, match=r"without an image: b \(links .* not followed: b/all\)"):
        dataset.find(tmp_path / "data")


@pytest.mark.parametrize(
    "paths, message",
    [
        ([], "holds no images; expected a folder of images per class"),
        (["a.zip", "b.ZIP"], "holds no images but other files (2 .zip): unpack archives, give "),
        (["a/", "b/"], "holds no images"),
        (["a/1.txt"], "holds no images but other files (1 .txt): unpack archives"),
        (["1.png"], "holds 1 image (1.png) and no folder"),
        (["1.png", "a/1.png", "b/2.png"], "holds 1 image (1.png) beside its class folders"),
        (["a/1.png", "b/", "c/1.txt", "d/1.png"],
         "class folders without an image: b, c; they hold other files (1 .txt): unpack"),
        (["train/data/1.png", "train/labels.json"],
         "one class only (data); a classifier needs two folders of images or more"),
        (["a/1.png"], "holds one class only (a); a classifier needs two"),
        (["train/images/a/1.png", "train/images/b/1.png", "train/images/c/1.png"],
         "one class only (images); a classifier needs two folders of images or more; if a, b, c are"
         " classes, move them up"),
        (["flowers/a/1.png", "flowers/b/1.png"],
         "one level below or deeper: set `dataset: {root}/flowers`"),
        (["flowers/train/a/1.png", "flowers/test/b/1.png"], "set `dataset: {root}/flowers`"),
        (["train/a/1.png", "train/b/1.png", "test/1.png", "test/2.png"],
         "{root}/test holds 2 images (1.png and 1 more) and no class folders; give unlabeled"
         " images to predict (`python -m stages predict {root}/test`)"),
        (["train/a/1.png", "train/b/1.png", "train/1.png"], "beside its class folders; move them"),
        (["train/a/1.png", "train/b/1.png", "test/all/1.png"], "train does not have: test/all"),
    ],
)  # fmt: skip
def test_mistakes(tmp_path, paths, message):
    make_files(tmp_path, *paths)
    with pytest.raises(UserError) as caught:
        dataset.find(tmp_path)
    assert message.replace("{root}", str(tmp_path)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_folder_a_file_and_the_pipelines_own_folder(tmp_path):
    make_files(tmp_path, "file.zip", "data/digits/a/1.png", "data/prepared/")
    for path, message in (
        ("nowhere", "no such folder; create it, or name another one"),
        ("file.zip", "is a file; expected a folder"),
        ("data", "contains the pipeline's own output"),
    ):
        with pytest.raises(UserError, match=message):
            dataset.find(tmp_path / path, tmp_path / "data/prepared")


def test_names_that_are_not_utf8(tmp_path):
    make_files(tmp_path, "a/1.png", "b/2.png")
    for name in (b"a/\xff.png", b"b/\xe9t\xe9.txt"):
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_bytes(b"")
    with pytest.raises(UserError) as caught:
        dataset.find(tmp_path)
    assert r"a/\xff.png" in str(caught.value) and r"b/\xe9t\xe9.txt" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_that_may_not_be_read_are_all_named(tmp_path, monkeypatch):
    make_files(tmp_path, "a/1.png", "b/2.png", "lost+found/", "a/closed/", "secret/")
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


@pytest.mark.parametrize(
    ("pointers", "missing"),
    [
        (["c.dvc"], "c"),
        (["train/c.dvc"], "train/c"),
        (["a/1.png.dvc", "a/2.png.dvc", "a/deep/3.png.dvc"], "a/2.png, a/deep/3.png"),
        (["a.dvc", "b.dvc", "a/1.png.dvc"], ""),
    ],
)
def test_a_part_that_dvc_tracks_and_nobody_pulled_is_missed(tmp_path, pointers, missing):
    make_files(tmp_path, "a/1.png", "b/2.png", *pointers)
    if missing:
        with pytest.raises(UserError, match=f"a part of it is not here: {missing}; .*`dvc pull`"):
            dataset.find(tmp_path)
    else:
        assert len(dataset.find(tmp_path)[0]) == 2
