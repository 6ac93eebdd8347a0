"""Find the images of a dataset, and recognise its layout.

A dataset is a folder with one sub-folder per class (images may lie deeper), or a folder that holds
only ``train``, ``val`` (or ``valid``, ``validation``) and ``test``, at least train, each a folder
of class folders. Files whose names are not an image's are passed over, and so are links to folders,
which DVC does not follow.
"""

import contextlib
import dataclasses
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from stages.data.arrays import SPLITS
from stages.data.images import is_image_name
from stages.utils.cli import UserError

_GIVEN = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_NO_DATA = ("__MACOSX", "lost+found")  # of macOS's archives, and of a disk's file system
_SHOWN = 5  # names that a message lists


def is_data_folder(name: str) -> bool:
    """Tell a folder that may hold images from hidden ones and those of the system."""
    return not name.startswith(".") and name not in _NO_DATA


class Paths(Sequence):
    """A list of many paths in little memory: their bytes, one after the other."""

    def __init__(self) -> None:
        self._bytes, self._ends = bytearray(), array("Q", [0])

    def extend(self, paths: Iterable[str]) -> None:
        """Add paths at the end."""
        for path in paths:
            self._bytes += path.encode()
            self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self._path(number) for number in range(*place.indices(len(self)))]
        return self._path(range(len(self))[place])

    def __iter__(self) -> Iterator[str]:
        return map(self._path, range(len(self)))

    def _path(self, number: int) -> str:
        return self._bytes[self._ends[number] : self._ends[number + 1]].decode()


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The images of a dataset, in the order of their paths.

    Attributes
    ----------
    folder : Path
    paths : sequence of str, n of them
        Within the folder, with slashes.
    classes : list of str
        Sorted.
    labels : int32 array of shape (n,)
        Positions in `classes`.
    given : int8 array of shape (n,)
        Positions in `SPLITS`, or -1 in a dataset without splits of its own.
    ignored : int
        Files that are no images by their names.
    linked : int
        Links to folders, which are not followed.
    """

    folder: Path
    paths: Paths
    classes: list[str]
    labels: np.ndarray
    given: np.ndarray
    ignored: int
    linked: int

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def splits(self) -> list[str]:
        """The splits that the dataset brings, in the order train, val, test; often none."""
        return [name for code, name in enumerate(SPLITS) if (self.given == code).any()]


class _Folder:
    """One folder's entries by kind, names decoded as UTF-8 whatever the locale says."""

    def __init__(self, path: bytes, strange: list[bytes], closed: list[bytes]) -> None:
        self.images: list[str] = []
        self.folders: list[str] = []
        self.ignored = self.linked = 0
        with contextlib.ExitStack() as stack:
            try:
                entries = stack.enter_context(os.scandir(path))
            except PermissionError:
                closed.append(path)
                return
            for entry in entries:
                try:
                    name = entry.name.decode("utf-8")
                except UnicodeDecodeError:
                    strange.append(entry.path)
                    continue
                if entry.is_dir(follow_symlinks=False):
                    if is_data_folder(name):
                        self.folders.append(name)
                elif entry.is_dir():
                    self.linked += 1
                elif is_image_name(name):
                    self.images.append(name)
                else:
                    self.ignored += 1
        self.images.sort()
        self.folders.sort()


class _Walk:
    """Reads folders below a root, counting what is passed over."""

    def __init__(self, root: Path) -> None:
        self._root = os.fsencode(root)
        self._strange: list[bytes] = []
        self._closed: list[bytes] = []
        self.ignored = self.linked = 0

    def look(self, *parts: str) -> _Folder:
        """Return one folder's entries."""
        path = os.path.join(self._root, *(part.encode() for part in parts))
        return _Folder(path, self._strange, self._closed)

    def images(self, start: str) -> Iterable[str]:
        """Yield the paths of the images below a folder, and count."""
        waiting = [start]
        while waiting:
            place = waiting.pop()
            folder = self.look(place)
            self.ignored += folder.ignored
            self.linked += folder.linked
            waiting += [f"{place}/{name}" for name in folder.folders]
            yield from (f"{place}/{name}" for name in folder.images)

    def check(self) -> None:
        """Refuse folders that can't be read, and names that DVC could not track."""
        if self._closed:
            names = [os.fsdecode(path) for path in sorted(set(self._closed))]
            raise UserError(
                f"dataset: no permission to read {_list(names, 20)}; change it, or move it out of"
                " the dataset"
            )
        if self._strange:
            names = [path.decode("utf-8", "backslashreplace") for path in sorted(self._strange)]
            raise UserError(
                "dataset: names that are not valid UTF-8, which DVC can't track:"
                f" {_list(names, 20)}; rename them"
            )


def find(folder: str | Path, output: str | Path | None = None) -> Dataset:
    """Find the images of a dataset.

    Parameters
    ----------
    folder : path
    output : path, optional
        Where the pipeline writes; a dataset can't hold it.

    Raises
    ------
    UserError
        If this is no dataset: what was found, what was expected, and what to do.
    """
    folder = Path(folder)
    if not folder.exists():
        raise UserError(f"dataset: {folder}: no such folder; put one there, or name another")
    if not folder.is_dir():
        raise UserError(
            f"dataset: {folder} is a file; expected a folder with a folder of images per class"
            " (unpack an archive first)"
        )
    if output is not None and Path(output).resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"dataset: {folder} holds the pipeline's own output ({output}); name the folder of one"
            " dataset, for instance data/digits"
        )
    walk = _Walk(folder)
    top = walk.look()
    walk.check()
    walk.ignored += top.ignored
    walk.linked += top.linked
    splits = {name: _GIVEN[name.lower()] for name in top.folders if name.lower() in _GIVEN}
    splits = dict(sorted(splits.items(), key=lambda item: SPLITS.index(item[1])))
    _check_top(folder, walk, top, splits)
    if len(splits) == len(top.folders):
        places = _given_places(folder, walk, splits)
    else:
        places = [(name, name, -1) for name in top.folders]
    found = _Found(walk, places)
    walk.check()
    _check_classes(folder, walk, found)
    return found.as_dataset(folder, walk)


def _check_top(folder: Path, walk: _Walk, top: _Folder, splits: dict[str, str]) -> None:
    if top.images and not top.folders:
        raise UserError(
            f"dataset: {folder} holds {_count(top.images)} and no folder; expected a folder of"
            " images per class"
        )
    if top.images:
        raise UserError(
            f"dataset: {folder} holds {_count(top.images)} beside its class folders; move them into"
            " the folder of their class, or out of the dataset"
        )
    if not top.folders:
        walk.check()
        raise UserError(
            f"dataset: {folder} is empty; expected a folder of images per class"
            + (", and links to folders are not followed" if top.linked else "")
        )
    nested = [name for name in splits if not (inner := walk.look(name)).images and inner.folders]
    if len(splits) < len(top.folders) and "train" in splits.values() and len(nested) > 1:
        others = sorted(set(top.folders) - set(splits))
        raise UserError(
            f"dataset: {folder} holds {_list(nested)} beside {_list(others)}; expected only train,"
            " val and test, each with its class folders, or only class folders"
        )
    if len(top.folders) == 1 and not splits:
        only = top.folders[0]
        inner = walk.look(only)
        if len(inner.folders) > 1 or set(map(str.lower, inner.folders)) & set(_GIVEN):
            raise UserError(
                f"dataset: {folder} holds one folder only; its classes seem to lie one level below:"
                f" set `dataset: {folder / only}`"
            )


def _given_places(folder: Path, walk: _Walk, splits: dict[str, str]) -> list[tuple[str, str, int]]:
    """Return (path of a class folder, class, code of its split) for each class folder."""
    if len(set(splits.values())) < len(splits):
        raise UserError(
            f"dataset: {folder} holds one split under two names ({_list(splits)}); keep one"
        )
    if "train" not in splits.values():
        raise UserError(
            f"dataset: {folder} holds {_list(splits)} but no train; add train/, or rename them if"
            " they are classes"
        )
    places = []
    for name, split in splits.items():
        inner = walk.look(name)
        walk.ignored += inner.ignored
        walk.linked += inner.linked
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
        places += [(f"{name}/{kind}", kind, SPLITS.index(split)) for kind in inner.folders]
    return places


class _Found:
    """The images of class folders, and how many each folder holds."""

    def __init__(self, walk: _Walk, places: list[tuple[str, str, int]]) -> None:
        self.places = sorted(places, key=lambda place: place[0] + "/")  # the order of all paths
        self.paths = Paths()
        self.counts: list[int] = []
        for place, _, _ in self.places:
            below = sorted(walk.images(place))
            self.paths.extend(below)
            self.counts.append(len(below))
        named = zip(self.places, self.counts, strict=True)
        self.classes = sorted({name for (_, name, _), count in named if count})

    def as_dataset(self, folder: Path, walk: _Walk) -> Dataset:
        codes = {name: code for code, name in enumerate(self.classes)}
        labels = [codes.get(name, -1) for _, name, _ in self.places]
        given = [split for _, _, split in self.places]
        return Dataset(
            folder,
            self.paths,
            self.classes,
            np.repeat(np.array(labels, np.int32), self.counts),
            np.repeat(np.array(given, np.int8), self.counts),
            walk.ignored,
            walk.linked,
        )


def _check_classes(folder: Path, walk: _Walk, found: _Found) -> None:
    if not found.paths:
        raise UserError(
            f"dataset: {folder} holds no images ({walk.ignored} other files); expected a folder of"
            " images per class"
        )
    train = SPLITS.index("train")
    empty = [
        place
        for (place, _, split), count in zip(found.places, found.counts, strict=True)
        if not count and split in (-1, train)
    ]
    if empty:
        raise UserError(
            f"dataset: {folder}: class folders without an image: {_list(empty)}; add images, or"
            " remove the folders"
        )
    trained = {name for _, name, split in found.places if split in (-1, train)}
    unknown = [
        place
        for (place, name, _), count in zip(found.places, found.counts, strict=True)
        if count and name not in trained
    ]
    if unknown:
        raise UserError(
            f"dataset: {folder}: classes that train does not have: {_list(unknown)}; add them to"
            " train, or give unlabelled images to predict (`python -m stages.predict FOLDER`) and"
            " move them out of the dataset"
        )
    if len(found.classes) == 1:
        raise UserError(
            f"dataset: {folder} holds one class only ({found.classes[0]}); a classifier needs two"
            " folders of images or more"
        )


def _count(names: list[str]) -> str:
    return f"{len(names)} {'image' if len(names) == 1 else 'images'} ({_list(names, 1)})"


def _list(names: Iterable[str], shown: int = _SHOWN) -> str:
    names = [
        "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in name)
        for name in names
    ]
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
