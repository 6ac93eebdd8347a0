"""Recognise a dataset's layout: whether its top folders are classes or splits.

Top folders are splits if the name of each has a usual word for one split, at least one of them for
train: ``train``, ``Training``, ``train_images``; ``val``, ``valid``, ``validation``, ``dev``;
``test``, ``TestSet``. Top folders that hold the same folders as splits do, under other names, are
refused: they are never read as classes unless `prepare.layout` says so.
"""

import itertools
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from stages.data.arrays import SPLITS
from stages.run.cli import UserError, count, list_names

Layout = Literal["auto", "classes"]

_WORDS = {
    "train": ("train", "training", "trn", "trainset"),
    "val": ("val", "valid", "validation", "dev", "valset"),
    "test": ("test", "testing", "tst", "testset"),
}
_SPLIT_OF_WORD = {word: split for split, words in _WORDS.items() for word in words}
_MAX_GROUPS = 20  # of names that look alike, in a message
_IF_CLASSES = "if these folders are classes, set prepare.layout: classes"


class Folder(NamedTuple):
    """The names in one folder, sorted, by kind."""

    images: list[str]
    folders: list[str]
    links: list[str]  # to folders, or to nothing
    ignored: list[str]  # files without an image extension


Tree: TypeAlias = Mapping[str, Folder]  # by path within the dataset; "" is the dataset itself


class ClassFolder(NamedTuple):
    path: str  # within the dataset
    name: str  # of the class
    split: int  # position in SPLITS, or -1


def find_class_folders(root: Path, tree: Tree, layout: Layout) -> list[ClassFolder]:
    """Find the class folders of a dataset.

    Parameters
    ----------
    root : Path
        The dataset, for messages.
    tree : mapping from path to Folder
        All folders of the dataset.
    layout : {"auto", "classes"}
        What the top folders are; auto: splits if their names say so, else classes.

    Returns
    -------
    class_folders : list of ClassFolder
        In a dataset with splits of its own, a class has a folder in each of several splits.

    Raises
    ------
    UserError
        If the layout is unclear or not one of a dataset, if a link stands where a class or split
        is expected, or if the names of two classes look alike.
    """
    _check_links(root, tree, [""])
    _check_top(root, tree)
    splits = _find_splits(root, tree, layout)
    class_folders = (
        _list_class_folders(root, tree, splits)
        if splits
        else [ClassFolder(name, name, -1) for name in tree[""].folders]
    )
    _check_look_alikes(root, class_folders)
    return class_folders


def split_of(name: str) -> str | None:
    """Return the split that a folder's name stands for: the name has words for just this one.

    Words end at every character that is not a letter, and between a lower- and an upper-case
    letter: ``train2017``, ``1_train``, ``seg-train`` and ``TrainImages`` stand for train,
    ``train_val`` and ``strain`` for no split.
    """
    splits = {_SPLIT_OF_WORD[word] for word in _words(name) if word in _SPLIT_OF_WORD}
    return splits.pop() if len(splits) == 1 else None


def _words(name: str) -> list[str]:
    name = unicodedata.normalize("NFC", name)  # or a word would end at a decomposed accent
    pairs = itertools.pairwise(f" {name}")
    spaced = "".join(f" {b}" if a.islower() and b.isupper() else b for a, b in pairs)
    return re.findall(r"[^\W\d_]+", spaced.lower())


def _find_splits(root: Path, tree: Tree, layout: Layout) -> dict[str, str]:
    """Return the split of each top folder, in the order of splits; empty if they are classes."""
    top = tree[""].folders
    recognised = {name: split for name in top if (split := split_of(name))}
    splits = dict(sorted(recognised.items(), key=lambda item: SPLITS.index(item[1])))
    others = [name for name in top if name not in splits]
    if layout == "classes":
        return {}
    # Classes may be called positive_test and negative_test, but then they hold the images.
    one_split = len(top) > 1 and len(set(splits.values())) == 1
    flat = not any(_holds_only_folders(tree, name) for name in top)
    if not (others or (one_split and flat)):
        return splits
    _check_unrecognised(root, tree, splits, others)
    return {}


def _check_unrecognised(root: Path, tree: Tree, splits: dict[str, str], others: list[str]) -> None:
    """Raise a UserError if top folders that would be read as classes may be splits or a copy."""
    below = {name: tree[_innermost(tree, name)].folders for name in tree[""].folders}
    repeated = _repeated(below)
    alike = any(len(repeated[name]) >= max(2, len(names) / 2) for name, names in below.items())
    holders = [name for name, names in repeated.items() if names]
    shared = list(dict.fromkeys(itertools.chain.from_iterable(repeated.values())))
    if alike and all(map(split_of, shared)):
        raise UserError(
            f"dataset: {root}: {list_names(holders)} hold {list_names(shared)}; expected the splits"
            f" at the top ({shared[0]}/{holders[0]}): move them there, or set prepare.layout:"
            " classes, which ignores these splits and makes new ones"
        )
    nested = [name for name in splits if len(below[name]) > 1 and not tree[name].images]
    may_be_splits = [name for name in others if below[name]]
    free = [split for split in SPLITS if split not in splits.values()]
    if others and "train" in map(splits.get, nested):
        same = f", which share {list_names(shared)}" if {*holders} & {*others} else ""
        raise UserError(
            f"dataset: {root} holds {list_names(splits)} beside {list_names(others)}{same};"
            " expected only train, val and test, each with its class folders, or only class"
            f" folders: {_remedy(others, free if may_be_splits else [])}; {_IF_CLASSES}"
        )
    if alike:
        unclear = [name for name in holders if name in others] or holders
        raise UserError(
            f"dataset: {root}: {list_names(holders)} hold the same folders ({list_names(shared)}),"
            f" as splits do, but are not called train, val and test: {_remedy(unclear, free)};"
            f" {_IF_CLASSES}"
        )
    beside = {*map(_look, tree[""].folders)}
    for name, names in below.items():
        copied = [inner for inner in names if _look(inner) in beside]
        if len(copied) > 1:
            raise UserError(
                f"dataset: {root / name} holds folders with the names of those beside it"
                f" ({list_names(copied)}); if it is a copy, move it out of the dataset;"
                f" {_IF_CLASSES}"
            )


def _repeated(below: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return, of the names in each folder, those that are in another one, too."""
    counts = Counter(look for names in below.values() for look in {*map(_look, names)})
    return {
        folder: [name for name in names if counts[_look(name)] > 1]
        for folder, names in below.items()
    }


def _remedy(names: list[str], free: list[str]) -> str:
    """Say what to do with folders that are none of the splits yet, given those that are left."""
    if not free:
        return f"move {list_names(names)} out of the dataset"
    unclear = [name for name in names if {"eval", "evaluation"} & {*_words(name)}]
    hint = f" ({list_names(unclear)} may mean either val or test)" if unclear else ""
    new = " or ".join(", ".join(free).rsplit(", ", 1))
    return (
        f"rename {list_names(names)} to {new}{hint}, or move what is not a split out of the dataset"
    )


def _list_class_folders(root: Path, tree: Tree, splits: dict[str, str]) -> list[ClassFolder]:
    """Return the class folders of a dataset with splits of its own, given their folders' names."""
    if len(set(splits.values())) < len(splits):
        raise UserError(
            f"dataset: {root} has one split under two names ({list_names(splits)}); keep one of"
            f" them, or merge them; {_IF_CLASSES}"
        )
    if "train" not in splits.values():
        raise UserError(
            f"dataset: {root} holds {list_names(splits)} but no train; add train/, or {_IF_CLASSES}"
        )
    class_folders, visited = [], []
    for name, split in splits.items():
        path = name
        visited.append(path)
        while (inner := _only_folder(tree, path)) and split_of(inner.split("/")[-1]) == split:
            path = inner  # train/train
            visited.append(path)
        _check_no_images(root, tree, path, split)
        class_folders += [
            ClassFolder(f"{path}/{kind}", kind, SPLITS.index(split)) for kind in tree[path].folders
        ]
    _check_links(root, tree, visited)
    return class_folders


def _only_folder(tree: Tree, path: str) -> str | None:
    """Return the folder that is all a folder holds, if it holds folders in its turn."""
    folder = tree[path]
    if len(folder.folders) != 1 or folder.images:
        return None
    inner = f"{path}/{folder.folders[0]}"
    return inner if _holds_only_folders(tree, inner) else None


def _innermost(tree: Tree, path: str) -> str:
    """Follow folders that hold nothing but one folder of folders: ``pets/pets``."""
    while (inner := _only_folder(tree, path)) is not None:
        path = inner
    return path


def _holds_only_folders(tree: Tree, path: str) -> bool:
    return bool(tree[path].folders) and not tree[path].images


def _check_links(root: Path, tree: Tree, paths: list[str]) -> None:
    """Raise a UserError for links in folders whose folders are classes or splits."""
    links = [f"{path}/{name}".lstrip("/") for path in paths for name in tree[path].links]
    if links:
        raise UserError(
            f"dataset: {root} holds links to folders (or to nothing), which DVC does not follow:"
            f" {list_names(links)}; put a copy of each folder in place of its link (`cp -rL {root}"
            " NEW` copies all), or set `dataset:` to the folder that holds the real ones"
        )


def _check_top(root: Path, tree: Tree) -> None:
    """Raise a UserError unless the top level holds folders, and not just one around the dataset."""
    top = tree[""]
    if top.images:
        what = (
            "beside its class folders; move them into the folder of their class, or out of the"
            " dataset"
            if top.folders
            else "and no folder; expected a folder of images per class"
        )
        raise UserError(f"dataset: {root} holds {_images(top.images)} {what}")
    if not top.folders:
        raise UserError(f"dataset: {root} is empty; expected a folder of images per class")
    if len(top.folders) > 1 or split_of(top.folders[0]):
        return
    parts = _innermost(tree, top.folders[0]).split("/")
    inner = "/".join(itertools.takewhile(lambda part: not split_of(part), parts))
    if len(tree[inner].folders) > 1 or any(map(split_of, tree[inner].folders)):
        raise UserError(
            f"dataset: {root} holds one folder only; its classes seem to be one level below or"
            f" deeper: set `dataset: {root / inner}`"
        )


def _check_no_images(root: Path, tree: Tree, path: str, split: str) -> None:
    """Raise a UserError if a split's folder holds images itself."""
    folder = tree[path]
    if not folder.images:
        return
    advice = (
        f"give unlabelled images to predict (`python -m stages predict {root / path}`) and move"
        " that folder out of the dataset"
        if split != "train" and not folder.folders
        else "move them into the folder of their class"
    )
    beside = "beside its" if folder.folders else "and no"
    raise UserError(
        f"dataset: {root / path} holds {_images(folder.images)} {beside} class folders; {advice};"
        f" or, if {path} is a class, set prepare.layout: classes"
    )


def _check_look_alikes(root: Path, class_folders: list[ClassFolder]) -> None:
    """Raise a UserError for class names that differ only in what can't be seen, or in case."""
    looks: dict[str, dict[str, str]] = defaultdict(dict)  # to each name, its first path
    for folder in class_folders:
        looks[_look(folder.name)].setdefault(folder.name, folder.path)
    groups = [paths for paths in looks.values() if len(paths) > 1]
    if not groups:
        return
    composed = [{unicodedata.normalize("NFC", name) for name in paths} for paths in groups]
    remark = (
        " (macOS may write é as e + U+0301 (NFD), where Linux and Git have U+00E9 (NFC))"
        if any(len(names) < len(paths) for names, paths in zip(composed, groups, strict=True))
        else ""
    )
    told = [", ".join(_spell(paths)) for paths in groups]
    raise UserError(
        f"dataset: {root}: class names that look alike: {list_names(told, _MAX_GROUPS, '; ')}."
        f" If they are one class, give it one name, the same in every split{remark}; if not, give"
        " them names that differ in more than case, spaces and invisible characters"
    )


def _look(name: str) -> str:
    """Return what is left of a name without case, invisible characters and repeated spaces."""
    seen = [
        letter
        for letter in unicodedata.normalize("NFD", name).casefold()
        if letter.isspace() or not _is_invisible(letter)
    ]
    return unicodedata.normalize("NFC", " ".join("".join(seen).split()))


def _is_invisible(letter: str) -> bool:
    """Return whether this is a control or format character, or a variation selector."""
    return unicodedata.category(letter) in ("Cc", "Cf") or "\ufe00" <= letter <= "\ufe0f"


def _spell(paths: dict[str, str]) -> list[str]:
    """Quote the path of each name, and spell where the names differ: ``e + U+0301``."""
    start = _common_length(list(paths))
    ends = [name[start:][::-1] for name in paths]
    same = _common_length(ends)
    spelt = []
    for path, end in zip(paths.values(), ends, strict=True):
        parts = re.findall(r"[ -~]+|[^ -~]", end[same:][::-1])
        codes = [part if " " <= part[0] <= "~" else f"U+{ord(part):04X}" for part in parts]
        hidden = "" if codes == parts else f" ({' + '.join(codes)})"
        spelt.append(f"'{path}'{hidden}")
    return spelt


def _common_length(names: list[str]) -> int:
    """Return at how many of their first letters all names are the same."""
    columns = zip(*names, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda letters: len({*letters}) == 1, columns))


def _images(names: list[str]) -> str:
    return f"{count(len(names), 'image')} ({list_names(names, 1)})"
