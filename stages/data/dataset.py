"""Find the images of a dataset, and recognise its layout.

A dataset is a folder with one sub-folder per class (images may be deeper), or a folder that holds
only ``train``, ``val`` (or ``valid``, ``validation``) and ``test``, at least train, each a folder
of class folders. Files without an image extension are ignored, and so are links to folders, which
DVC does not follow.
"""

import dataclasses
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stages.data.arrays import SPLITS
from stages.data.images import is_image_name
from stages.utils.cli import UserError

_SPLIT_NAMES = {
    "train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
}  # fmt: skip
_SYSTEM_FOLDERS = ("__MACOSX", "lost+found")  # of macOS's archives, and of a disk's file system
_MAX_LISTED = 5  # names in a message
_MAX_PROBLEMS = 20


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The n images of a dataset, in the order of their paths.

    Attributes
    ----------
    folder : Path
    paths : StringDType array of shape (n,)
        Within the folder, with slashes.
    classes : list of str
        Sorted.
    labels : int32 array of shape (n,)
        Positions in `classes`.
    given : int8 array of shape (n,)
        The dataset's own splits: positions in `SPLITS`, or -1 in a dataset without splits.
    ignored : int
        Files without an image extension.
    links : int
        Links to folders, which are not followed.
    """

    folder: Path
    paths: np.ndarray
    classes: list[str]
    labels: np.ndarray
    given: np.ndarray
    ignored: int
    links: int

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def splits(self) -> list[str]:
        """The splits that the dataset itself has, in the order train, val, test; often none."""
        return [name for code, name in enumerate(SPLITS) if (self.given == code).any()]


class _Folder(NamedTuple):
    """The entries of one folder, sorted, by kind."""

    images: list[str]
    folders: list[str]


class _ClassFolder(NamedTuple):
    path: str  # within the dataset
    name: str  # of the class
    split: int  # position in SPLITS, or -1


@dataclasses.dataclass
class _Skipped:
    """What was skipped while folders were listed."""

    ignored: int = 0
    links: int = 0
    non_utf8: set[bytes] = dataclasses.field(default_factory=set)
    unreadable: set[bytes] = dataclasses.field(default_factory=set)


def is_data_folder(name: str) -> bool:
    """Return whether a folder may hold images: it is neither hidden nor one of the system's."""
    return not name.startswith(".") and name not in _SYSTEM_FOLDERS


def find(folder: str | Path, output: str | Path | None = None) -> Dataset:
    """Find the images of a dataset.

    Parameters
    ----------
    folder : path
    output : path, optional
        Where the pipeline writes; a dataset can't contain it.

    Returns
    -------
    dataset : Dataset

    Raises
    ------
    UserError
        If this is not a dataset: what was found, what was expected, and what to do.
    """
    folder = Path(folder)
    _check_folder(folder, output)
    skipped = _Skipped()
    top = _list_folder(folder, "", skipped)
    _check_skipped(skipped)
    splits = {name: _SPLIT_NAMES[name.lower()] for name in top.folders if _is_split_name(name)}
    splits = dict(sorted(splits.items(), key=lambda item: SPLITS.index(item[1])))
    _check_top(folder, top, splits, skipped)
    if len(splits) == len(top.folders):
        class_folders = _list_class_folders(folder, splits, skipped)
    else:
        class_folders = [_ClassFolder(name, name, -1) for name in top.folders]
    class_folders.sort(key=lambda one: one.path + "/")  # in the order of all paths
    paths = [sorted(_walk(folder, one.path, skipped)) for one in class_folders]
    _check_skipped(skipped)
    counts = [len(images) for images in paths]
    _check_classes(folder, class_folders, counts, skipped)

    classes = sorted({one.name for one, n in zip(class_folders, counts, strict=True) if n})
    codes = {name: code for code, name in enumerate(classes)}
    labels = np.array([codes.get(one.name, -1) for one in class_folders], np.int32)
    given = np.array([one.split for one in class_folders], np.int8)
    return Dataset(
        folder,
        np.array([path for images in paths for path in images], np.dtypes.StringDType()),
        classes,
        np.repeat(labels, counts),
        np.repeat(given, counts),
        skipped.ignored,
        skipped.links,
    )


def _list_folder(root: Path, path: str, skipped: _Skipped) -> _Folder:
    """List one folder. Names are decoded as UTF-8, whatever the locale says."""
    folder = _Folder([], [])
    place = os.path.join(os.fsencode(root), path.encode())
    try:
        entries = os.scandir(place)
    except PermissionError:
        skipped.unreadable.add(place)
        return folder
    with entries:
        for entry in entries:
            try:
                name = entry.name.decode("utf-8")
            except UnicodeDecodeError:
                skipped.non_utf8.add(entry.path)
                continue
            if entry.is_dir(follow_symlinks=False):
                if is_data_folder(name):
                    folder.folders.append(name)
            elif entry.is_symlink() and os.path.isdir(entry.path):  # False where links form a loop
                skipped.links += 1
            elif is_image_name(name):
                folder.images.append(name)
            else:
                skipped.ignored += 1
    folder.images.sort()
    folder.folders.sort()
    return folder


def _walk(root: Path, start: str, skipped: _Skipped) -> Iterator[str]:
    """Yield the paths of the images in a folder, at any depth."""
    waiting = [start]
    while waiting:
        path = waiting.pop()
        folder = _list_folder(root, path, skipped)
        waiting += [f"{path}/{name}" for name in folder.folders]
        yield from (f"{path}/{name}" for name in folder.images)


def _list_class_folders(
    folder: Path, splits: dict[str, str], skipped: _Skipped
) -> list[_ClassFolder]:
    """Return the class folders of a dataset with splits of its own, given their folders' names."""
    if len(set(splits.values())) < len(splits):
        raise UserError(
            f"dataset: {folder} has one split under two names ({_list(splits)}); keep one of them"
        )
    if "train" not in splits.values():
        raise UserError(
            f"dataset: {folder} holds {_list(splits)} but no train; add train/, or rename them if"
            " they are classes"
        )
    class_folders = []
    for name, split in splits.items():
        inner = _list_folder(folder, name, skipped)
        if inner.images:
            advice = (
                "give unlabelled images to predict (`python -m stages.predict"
                f" {folder / name}`) and move that folder out of the dataset"
                if split != "train" and not inner.folders
                else "move them into the folder of their class"
            )
            raise UserError(
                f"dataset: {folder / name} holds {_count(inner.images)}"
                f" {'beside its' if inner.folders else 'and no'} class folders; {advice}"
            )
        class_folders += [
            _ClassFolder(f"{name}/{kind}", kind, SPLITS.index(split)) for kind in inner.folders
        ]
    return class_folders


def _check_folder(folder: Path, output: str | Path | None) -> None:
    """Raise a UserError unless this is a folder that does not contain the pipeline's output."""
    if not folder.exists():
        raise UserError(f"dataset: {folder}: no such folder; create it, or change `dataset:`")
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


def _check_skipped(skipped: _Skipped) -> None:
    """Raise a UserError for unreadable folders, and for names that DVC can't track."""
    if skipped.unreadable:
        names = [os.fsdecode(path) for path in sorted(skipped.unreadable)]
        raise UserError(
            f"dataset: no permission to read {_list(names, _MAX_PROBLEMS)}; change it, or move it"
            " out of the dataset"
        )
    if skipped.non_utf8:
        names = [path.decode("utf-8", "backslashreplace") for path in sorted(skipped.non_utf8)]
        raise UserError(
            "dataset: names that are not valid UTF-8, which DVC can't track:"
            f" {_list(names, _MAX_PROBLEMS)}; rename them"
        )


def _check_top(folder: Path, top: _Folder, splits: dict[str, str], skipped: _Skipped) -> None:
    """Raise a UserError unless the top level holds either class folders or splits."""
    if top.images:
        what = (
            f"dataset: {folder} holds {_count(top.images)} beside its class folders; move them into"
            " the folder of their class, or out of the dataset"
            if top.folders
            else f"dataset: {folder} holds {_count(top.images)} and no folder; expected a folder of"
            " images per class"
        )
        raise UserError(what)
    if not top.folders:
        hint = ", and links to folders are not followed" if skipped.links else ""
        raise UserError(f"dataset: {folder} is empty; expected a folder of images per class{hint}")
    inner = {name: _list_folder(folder, name, _Skipped()) for name in splits}
    nested = [name for name, one in inner.items() if one.folders and not one.images]
    if len(splits) < len(top.folders) and "train" in splits.values() and len(nested) > 1:
        others = sorted(set(top.folders) - set(splits))
        raise UserError(
            f"dataset: {folder} holds {_list(nested)} beside {_list(others)}; expected only train,"
            " val and test, each with its class folders, or only class folders"
        )
    if len(top.folders) == 1 and not splits:
        only = top.folders[0]
        below = _list_folder(folder, only, _Skipped()).folders
        if len(below) > 1 or any(map(_is_split_name, below)):
            raise UserError(
                f"dataset: {folder} holds one folder only; its classes seem to be one level below:"
                f" set `dataset: {folder / only}`"
            )


def _check_classes(
    folder: Path, class_folders: list[_ClassFolder], counts: list[int], skipped: _Skipped
) -> None:
    """Raise a UserError for an empty class, one that train lacks, or fewer than two classes."""
    if not any(counts):
        raise UserError(
            f"dataset: {folder} holds no images ({skipped.ignored} other files); expected a folder"
            " of images per class"
        )
    for_training = (-1, SPLITS.index("train"))
    sizes = list(zip(class_folders, counts, strict=True))
    empty = [one.path for one, n in sizes if not n and one.split in for_training]
    if empty:
        raise UserError(
            f"dataset: {folder}: class folders without an image: {_list(empty)}; add images, or"
            " remove the folders"
        )
    trained = {one.name for one in class_folders if one.split in for_training}
    unknown = [one.path for one, n in sizes if n and one.name not in trained]
    if unknown:
        raise UserError(
            f"dataset: {folder}: classes that train does not have: {_list(unknown)}; add them to"
            " train, or give unlabelled images to predict (`python -m stages.predict FOLDER`) and"
            " move them out of the dataset"
        )
    if len(trained) == 1:
        raise UserError(
            f"dataset: {folder} holds one class only ({trained.pop()}); a classifier needs two"
            " folders of images or more"
        )


def _is_split_name(name: str) -> bool:
    return name.lower() in _SPLIT_NAMES


def _count(names: Collection[str]) -> str:
    return f"{len(names)} {'image' if len(names) == 1 else 'images'} ({_list(names, 1)})"


def _list(names: Iterable[str], max_listed: int = _MAX_LISTED) -> str:
    names = [
        "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in name)
        for name in names
    ]
    more = f" and {len(names) - max_listed} more" if len(names) > max_listed else ""
    return ", ".join(names[:max_listed]) + more
