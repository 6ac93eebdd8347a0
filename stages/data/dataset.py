"""Find the images of a dataset.

A dataset is a folder with one sub-folder per class (images may be deeper), or a folder that holds
only folders for train, val and test, at least train, each a folder of class folders
(stages/data/layout.py). Files without an image extension are skipped. Links to folders are not
followed, as DVC does not follow them.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from stages.data.arrays import SPLITS
from stages.data.images import is_image_name
from stages.data.layout import ClassFolder, Folder, Layout, Tree, find_class_folders
from stages.run.cli import UserError, count, list_names

NO_IMAGE, NOT_FOLLOWED = "no image extension", "a link to a folder, or to nothing"

_SYSTEM_FOLDERS = ("__MACOSX", "lost+found")  # of macOS's archives, and of a disk's file system
_MAX_PROBLEMS = 20  # names in a message on names


def is_data_folder(name: str) -> bool:
    """Return whether a folder may hold images: it is neither hidden nor one of the system's."""
    return not name.startswith(".") and name not in _SYSTEM_FOLDERS


def find(
    folder: str | Path, output: str | Path | None = None, layout: Layout = "auto"
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Find the images of a dataset.

    Parameters
    ----------
    folder : path
    output : path, optional
        Where the pipeline writes; a dataset can't contain it.
    layout : {"auto", "classes"}, default="auto"
        What the folders in `folder` are. With ``"auto"`` their names decide.

    Returns
    -------
    images : DataFrame
        A row per image, in the order of paths: ``path`` (str, within the folder, with slashes),
        ``class`` (categorical over the sorted names), ``own_split`` (categorical over `SPLITS`;
        missing in a dataset without splits of its own).
    skipped : DataFrame
        What else is in the folder: ``path``, and as ``reason`` `NO_IMAGE` or `NOT_FOLLOWED`.

    Raises
    ------
    UserError
        If this is not a dataset: what was found, what was expected, and what to do.
    """
    folder = Path(folder)
    _check_folder(folder, output)
    tree = _read_tree(folder)
    class_folders = find_class_folders(folder, tree, layout)
    class_folders.sort(key=lambda one: one.path + "/")  # in the order of all paths
    paths = [_list_images(tree, one.path) for one in class_folders]
    counts = [len(found) for found in paths]
    _check_classes(folder, tree, class_folders, counts)

    names = pd.Series([one.name for one in class_folders]).repeat(counts)
    own_splits = pd.Series([one.split for one in class_folders]).repeat(counts)
    images = pd.DataFrame(
        {
            "path": [path for found in paths for path in found],
            "class": pd.Categorical(names, sorted(set(names))),
            "own_split": pd.Categorical(own_splits.where(own_splits != ""), SPLITS),
        }
    )
    others = [(_join(path, name), NO_IMAGE) for path, one in tree.items() for name in one.others]
    links = [(_join(path, name), NOT_FOLLOWED) for path, one in tree.items() for name in one.links]
    return images, pd.DataFrame(sorted(others + links), columns=["path", "reason"])


def list_images(folder: Path) -> list[tuple[Path, str]]:
    """List the images in a folder at any depth, and what is not looked into with the reason.

    Returns
    -------
    found : list of (path, reason)
        Sorted. The reason is empty for an image; otherwise the path is a folder without permission
        or a link to a folder.
    """
    skipped: list[tuple[Path, str]] = []
    images: list[tuple[Path, str]] = []

    def skip(error: OSError) -> None:
        skipped.append((Path(error.filename), "no permission to look into this folder"))

    for top, folders, names in os.walk(folder, onerror=skip):
        folders[:] = filter(is_data_folder, folders)
        links = [Path(top, name) for name in folders if os.path.islink(os.path.join(top, name))]
        skipped += [(link, "a link to a folder, which is not followed") for link in links]
        images += [(Path(top, name), "") for name in names if is_image_name(name)]
    return sorted(images + skipped)


def _read_tree(root: Path) -> Tree:
    """List all folders of a dataset. Names are decoded as UTF-8, whatever the locale says.

    Raises
    ------
    UserError
        For unreadable folders, and for names that DVC can't track: all of them.
    """
    tree: dict[str, Folder] = {}
    unreadable: list[str] = []
    non_utf8: list[bytes] = []
    waiting = [""]
    while waiting:
        path = waiting.pop()
        place = os.path.join(os.fsencode(root), path.encode())
        try:
            with os.scandir(place) as entries:
                tree[path] = _sort_entries(entries, non_utf8)
        except PermissionError:
            unreadable.append(os.fsdecode(place))
            continue
        waiting += [_join(path, name) for name in tree[path].folders]
    if unreadable:
        raise UserError(
            f"dataset: no permission to read {list_names(sorted(unreadable), _MAX_PROBLEMS)};"
            " change it, or move it out of the dataset"
        )
    if non_utf8:
        names = [path.decode("utf-8", "backslashreplace") for path in sorted(non_utf8)]
        raise UserError(
            "dataset: names that are not valid UTF-8, which DVC can't track:"
            f" {list_names(names, _MAX_PROBLEMS)}; rename them"
        )
    return tree


def _sort_entries(entries: Iterator["os.DirEntry[bytes]"], non_utf8: list[bytes]) -> Folder:
    """Sort the entries of one folder by kind and name; add the paths that are not UTF-8."""
    folder = Folder([], [], [], [])
    for entry in entries:
        try:
            name = entry.name.decode("utf-8")
        except UnicodeDecodeError:
            non_utf8.append(entry.path)
            continue
        if entry.is_dir(follow_symlinks=False):
            if is_data_folder(name):
                folder.folders.append(name)
        elif entry.is_symlink() and _is_not_followed(entry.path, name):
            if is_data_folder(name):
                folder.links.append(name)
        elif is_image_name(name):
            folder.images.append(name)
        else:
            folder.others.append(name)
    for names in folder:
        names.sort()
    return folder


def _is_not_followed(link: bytes, name: str) -> bool:
    """Return whether a link leads to a folder, or to nothing (also where links form a loop)."""
    # A broken link that is named like an image is listed with the images that can't be read.
    return os.path.isdir(link) or not (os.path.exists(link) or is_image_name(name))


def _list_images(tree: Tree, start: str) -> list[str]:
    """Return the sorted paths of the images in a folder, at any depth."""
    images, waiting = [], [start]
    while waiting:
        path = waiting.pop()
        waiting += [f"{path}/{name}" for name in tree[path].folders]
        images += [f"{path}/{name}" for name in tree[path].images]
    return sorted(images)


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def _check_folder(folder: Path, output: str | Path | None) -> None:
    """Raise a UserError unless this is a folder that does not contain the pipeline's output."""
    if not folder.exists():
        advice = "create it, or name another one"
        if ":/" in str(folder):  # an address; pathlib has made one slash of two
            advice = "`dvc import-url ADDRESS data/NAME` downloads it; then name that folder"
        raise UserError(f"dataset: {folder}: no such folder; {advice}")
    if not folder.is_dir():
        raise UserError(
            f"dataset: {folder} is a file; expected a folder with a folder of images per class"
            " (unpack an archive first)"
        )
    if output is not None and Path(output).resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"dataset: {folder} contains the pipeline's own output ({output}); name the folder of"
            " one dataset, for instance data/digits"
        )


def _check_classes(
    folder: Path, tree: Tree, class_folders: list[ClassFolder], counts: list[int]
) -> None:
    """Raise a UserError for an empty class, one that train lacks, or fewer than two classes."""
    if not any(counts):
        others = sum(len(one.others) for one in tree.values())
        raise UserError(
            f"dataset: {folder} holds no images ({count(others, 'other file')}); expected a folder"
            " of images per class"
        )
    for_training = ("", "train")
    sizes = list(zip(class_folders, counts, strict=True))
    empty = [one.path for one, n in sizes if not n and one.split in for_training]
    if empty:
        links = [_join(path, name) for path in empty for name in tree[path].links]
        hint = f" (links to folders are not followed: {list_names(links)})" if links else ""
        raise UserError(
            f"dataset: {folder}: class folders without an image: {list_names(empty)}{hint}; add"
            " images, or remove the folders"
        )
    trained = {one.name: one.path for one in class_folders if one.split in for_training}
    unknown = [one.path for one, n in sizes if n and one.name not in trained]
    if unknown:
        raise UserError(
            f"dataset: {folder}: classes that train does not have: {list_names(unknown)}; add them"
            " to train; or, if these images are unlabeled, move them out of the dataset and run"
            " `python -m stages predict FOLDER`; or, if the folders at the top are classes, set"
            " prepare.layout: classes"
        )
    if len(trained) == 1:
        [(name, path)] = trained.items()
        inner = tree[path].folders
        hint = f"; if {list_names(inner)} are classes, move them up" if len(inner) > 1 else ""
        raise UserError(
            f"dataset: {folder} holds one class only ({name}); a classifier needs two folders of"
            f" images or more{hint}"
        )
