"""Recognize a dataset's layout: whether its top folders are classes or splits.

Top folders are splits if the name of each has a usual word for one split, at least one of them for
train: ``train``, ``Training``, ``train_images``; ``val``, ``valid``, ``validation``, ``dev``;
``test``, ``TestSet``. Top folders that hold the same folders, as splits do, are never read as
classes unless `prepare.layout` says so.
"""

import functools
import itertools
import re
import shlex
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
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
# What masks and annotations are called, and what is beside them.
_ANNOTATION = (
    r"(masks?|labels?|annotations?|annotated|anno|segmentations?|seg|ground[ _-]?truth|gt|trimaps?"
    r"|superpixels?|contours?|bbox(es)?)"
)
_HAS_ANNOTATION = re.compile(rf"\b{_ANNOTATION}\b")
_ANNOTATIONS = re.compile(rf"{_ANNOTATION}( {_ANNOTATION})*")  # a name of nothing else
_NO_CLASS = re.compile(r"ground ?truth|annotations|segmentations|trimaps|superpixels")
_OF_IMAGE = re.compile(rf"^{_ANNOTATION}[ _.-]+|[ _.([-]+{_ANNOTATION}[\W\d_]*$")  # in its name
_IMAGES = re.compile(r"images\b|\b(image|imgs?|photos|pictures|originals?|frames|raw|rgb)\b")
# What is called so is not sorted into classes yet, or a part of an archive ("t z": Google Drive's).
_UNSORTED = re.compile(
    r"un(labell?ed|sorted|annotated|sup)|(no|not) ?label(l?ed|s)?|new folder|untitled folder"
    r"|neuer ordner|nouveau dossier|nueva carpeta|nuova cartella|新しいフォルダー?|新建文件夹"
)
_PART = re.compile(
    r"\b(parts?|batch|chunk|shard|fold|archive|subset|dataset|images?|imgs?|photos?|pictures?|pics"
    r"|frames|t z)\b"
)
# The endings of copies, also of those that cloud drives make of a conflict.
_COPY = re.compile(
    r"^copy of |(\W*(\b(copy|kopie|copi[ae])|副本|の?コピー)( \d+)?)?"
    r"( \((\d+|.*(copy|conflict).*)\))?$"
)
_MAX_GROUPS = 20  # of names that look alike, in a message
SET_CLASSES = "set prepare.layout: classes (and `dataset:` to this folder) in params.yaml"
_IF_CLASSES = f"if these folders are classes, {SET_CLASSES}"


class Folder(NamedTuple):
    """The names in one folder, sorted, by kind."""

    images: list[str]
    folders: list[str]
    links: list[str]  # to folders, or to nothing
    others: list[str]  # files without an image extension
    systems: list[str]  # folders that are passed over


Tree: TypeAlias = Mapping[str, Folder]  # by path within the dataset; "" is the dataset itself


class ClassFolder(NamedTuple):
    path: str  # within the dataset
    name: str  # of the class
    split: str  # empty if the dataset has no splits of its own


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
    splits = {} if layout == "classes" else _find_splits(root, tree)
    class_folders = (
        _list_class_folders(root, tree, splits)
        if splits
        else [ClassFolder(name, name, "") for name in tree[""].folders]
    )
    check_names(root, class_folders)
    if layout == "auto":
        _check_are_sorted(root, class_folders)
    return class_folders


def split_folder(path: str, split: str) -> str:
    """Return the folder at the top of a path if it is that of a split, otherwise nothing."""
    top, slash, _ = path.partition("/")
    return top if slash and split_of(top) == split else ""


@functools.cache
def split_of(name: str) -> str | None:
    """Return the split that a folder's name stands for: the name has words for just this one.

    Words end at every character that is not a letter, and between a lower- and an upper-case
    letter: ``train2017``, ``1_train``, ``seg-train`` and ``TrainImages`` stand for train,
    ``train_val`` and ``strain`` for no split.
    """
    splits = {_SPLIT_OF_WORD[word] for word in _words(name) if word in _SPLIT_OF_WORD}
    return splits.pop() if len(splits) == 1 else None


def check_annotations(
    root: str | Path, images: Mapping[str, Sequence[str]], layout: Layout = "auto"
) -> None:
    """Raise a UserError for masks and annotations among the images of a folder.

    Parameters
    ----------
    root : path
        The folder, for the message.
    images : mapping from path to names
        The images in each folder within `root`, also in those without any.
    layout : {"auto", "classes"}
        With "classes", a top folder is a class, whatever its name.
    """
    inner: dict[str, list[str]] = defaultdict(list)  # the names of the folders in each folder
    for path in filter(None, images):
        parent, _, name = path.rpartition("/")
        inner[parent].append(name)
    found: list[str] = []
    for parent, files in sorted(images.items()):
        if f"{parent}/".startswith(tuple(found)):
            continue
        if parent or layout == "auto":
            found += [
                f"{parent}/{name}/".lstrip("/")
                for name in sorted(inner[parent])
                if _holds_annotations(parent, name, inner, images)
            ]
        stems = {name.rpartition(".")[0].casefold(): name for name in files}
        for stem, name in stems.items():
            if (image := _OF_IMAGE.sub("", stem, count=1)) != stem and image in stems:
                found.append(f"{parent}/{name}".lstrip("/"))
    if found:
        raise UserError(
            f"{root} holds masks or annotations beside images: {list_names(found)}; a class is a"
            " folder of its images only: move the others out of the dataset; or, if they are images"
            " of a class, rename them"
        )


def _holds_annotations(
    parent: str, name: str, inner: Mapping[str, list[str]], images: Mapping[str, Sequence[str]]
) -> bool:
    """Return whether a folder holds masks or annotations, by its name and what is beside it."""
    path, words = f"{parent}/{name}".lstrip("/"), " ".join(_words(name))
    if not _HAS_ANNOTATION.search(words):
        return False
    is_class = not parent or split_of(parent)
    if not is_class and not any(images[one] for one in images if f"{one}/".startswith(f"{path}/")):
        return False  # text files
    siblings = {" ".join(_words(one)): one for one in inner[parent] if one != name}
    others = {one: name for one, name in siblings.items() if not _HAS_ANNOTATION.search(one)}
    if _OF_IMAGE.sub("", words, count=1) in others or any(map(_IMAGES.search, others)):
        return True  # cat_masks beside cat, png_masks beside images
    beside = [f"{parent}/{one}".lstrip("/") for one in others.values()]
    names = {*others.values()}.union(*(inner.get(one, ()) for one in beside))
    return bool(
        _ANNOTATIONS.fullmatch(words)
        and (
            _NO_CLASS.fullmatch(words)
            or images.get(parent)
            or any(map(split_of, names))
            or len(names.intersection(inner.get(path, ()))) > 1
        )
    )


def _words(name: str) -> list[str]:
    """Return the words of a name in lower case: a capital letter and what is no letter end one."""
    name = unicodedata.normalize("NFC", name)  # or a word would end at a decomposed accent
    pairs = itertools.pairwise(f" {name}")
    spaced = "".join(f" {b}" if a.islower() and b.isupper() else b for a, b in pairs)
    return re.findall(r"[^\W\d_]+", spaced.lower())


def _find_splits(root: Path, tree: Tree) -> dict[str, str]:
    """Return the split of each top folder, in the order of splits; empty if they are classes."""
    top = tree[""].folders
    splits = {name: split for name in top if (split := split_of(name))}
    # Classes may be called positive_test and negative_test, but then they hold the images.
    one_split = len(top) > 1 and len(set(splits.values())) == 1
    flat = not any(_holds_only_folders(tree, name) for name in top)
    if len(splits) < len(top) or (one_split and flat):
        _check_are_classes(root, tree, splits)
        return {}
    return dict(sorted(splits.items(), key=lambda item: SPLITS.index(item[1])))


def _check_are_classes(root: Path, tree: Tree, splits: Mapping[str, str]) -> None:
    """Raise a UserError if top folders that would be read as classes may be splits or a copy."""
    top = tree[""].folders
    inner = {name: tree[_innermost(tree, name)].folders for name in top}
    counts = Counter(key for names in inner.values() for key in {*map(_comparable, names)})
    shared = {
        name: [one for one in names if counts[_comparable(one)] > 1]
        for name, names in inner.items()
    }
    beside = {*map(_comparable, top)}
    copies = {
        name: [one for one in names if _comparable(one) in beside] for name, names in inner.items()
    }
    train = [
        name
        for name, split in splits.items()
        if split == "train" and len(inner[name]) > 1 and not tree[name].images
    ]
    if train and len(splits) < len(top):
        others = [name for name in top if name not in splits]
        found = f"{list_names(others)} beside {list_names(splits)}"
    elif any(len(shared[name]) >= max(2, len(names) / 2) for name, names in inner.items()):
        holders = [name for name in top if shared[name]]
        names = list(dict.fromkeys(itertools.chain.from_iterable(shared.values())))
        found = f"the same folders ({list_names(names)}) in {list_names(holders)}, as splits do"
    elif copy := next((name for name in top if len(copies[name]) > 1), None):
        found = f"{copy}, a folder with the names of those beside it ({list_names(copies[copy])})"
    else:
        return
    raise UserError(
        f"dataset: {root} holds {found}; expected only train, val and test, each with its class"
        " folders, or only class folders: rename the splits, and move what is neither split nor"
        f" class out of the dataset; {_IF_CLASSES}"
    )


def _list_class_folders(root: Path, tree: Tree, splits: Mapping[str, str]) -> list[ClassFolder]:
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
    for path, split in splits.items():
        visited.append(path)
        while (inner := _only_folder(tree, path)) and split_of(inner.split("/")[-1]) == split:
            path = inner  # train/train
            visited.append(path)
        _check_no_images(root, tree, path, split)
        class_folders += [ClassFolder(f"{path}/{name}", name, split) for name in tree[path].folders]
    _check_links(root, tree, visited)
    return class_folders


def _only_folder(tree: Tree, path: str) -> str | None:
    """Return a folder's only sub-folder, if that has sub-folders itself."""
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
    """Raise a UserError unless the top level holds folders, and not just one that wraps them."""
    top = tree[""]
    if top.images:
        what = (
            "beside its class folders; move them into the folder of their class, or out of the"
            " dataset"
            if top.folders
            else "and no folder; expected a folder of images per class"
        )
        raise UserError(f"dataset: {root} holds {_images(top.images)} {what}")
    if len(top.folders) > 1 or split_of(top.folders[0]):
        return
    parts = _innermost(tree, top.folders[0]).split("/")
    inner = "/".join(itertools.takewhile(lambda part: not split_of(part), parts))
    if len(tree[inner].folders) > 1 or any(map(split_of, tree[inner].folders)):
        raise UserError(
            f"dataset: {root} holds one folder only; its classes seem to be one level below or"
            f" deeper: set `dataset: {root / inner}` (`python -m stages use"
            f" {shlex.quote(str(root / inner))}` does so)"
        )


def _check_no_images(root: Path, tree: Tree, path: str, split: str) -> None:
    """Raise a UserError if a split's folder holds images itself."""
    folder = tree[path]
    if not folder.images:
        return
    advice = (
        f"give unlabeled images to predict (`python -m stages predict {root / path}`) and move"
        " that folder out of the dataset"
        if split != "train" and not folder.folders
        else "move them into the folder of their class"
    )
    beside = "beside its" if folder.folders else "and no"
    raise UserError(
        f"dataset: {root / path} holds {_images(folder.images)} {beside} class folders; {advice};"
        f" or, if {path} is a class, {SET_CLASSES}"
    )


def check_names(root: Path, class_folders: list[ClassFolder]) -> None:
    """Raise a UserError for class names that look the same to a person.

    `root` is what the message names, and the path of a class where it is found there.
    """
    alike: dict[str, dict[str, str]] = defaultdict(dict)  # to each name, its first path
    names = {_comparable(folder.name) for folder in class_folders}
    for folder in class_folders:
        name = _comparable(folder.name)
        original = _COPY.sub("", name, count=1)
        key = original if original in names else name
        alike[key].setdefault(folder.name, folder.path)
    groups = [", ".join(map(ascii, paths.values())) for paths in alike.values() if len(paths) > 1]
    if groups:
        listed = list_names(groups, _MAX_GROUPS, "; ")
        raise UserError(
            f"dataset: {root}: class names that look alike: {listed}; if they are one class, give"
            " it one name, the same in every split; if not, give them names that differ in more"
            " than case, blanks, `_`, `-`, the form of accents and what a copy is called (`- Copy`,"
            " `(1)`)"
        )


def _check_are_sorted(root: Path, class_folders: list[ClassFolder]) -> None:
    """Raise a UserError for folders whose names say that they hold images of any class."""
    words = {folder.path: " ".join(_words(folder.name)) for folder in class_folders}
    found = [path for path, name in words.items() if _UNSORTED.fullmatch(name)]
    if any("label" in words[path] for path in words.keys() - found):
        found = []  # bottles with a label and without
    stems = {re.sub(r"\d+", "", _comparable(folder.name)) for folder in class_folders}
    if len(stems) == 1 and len(words) > 1 and all(map(_PART.search, words.values())):
        found = list(words)
    if found:
        is_split = any(folder.split for folder in class_folders)
        raise UserError(
            f"dataset: {root}: folders that are called like parts of an archive, or like what is"
            f" not sorted yet: {list_names(found)}; move each image into the folder of its class,"
            " or out of the dataset; "
            + ("if they are classes, rename them" if is_split else _IF_CLASSES)
        )


def _comparable(name: str) -> str:
    """Return a name without what is hard to see: case, forms of a letter, kinds of blanks."""
    name = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    visible = "".join(letter for letter in name if unicodedata.category(letter) != "Cf")
    return re.sub(r"[\s_-]+", " ", visible).strip().rstrip(". ")


def _images(names: list[str]) -> str:
    return f"{count(len(names), 'image')} ({list_names(names, 1)})"
