"""Find the images of a dataset.

A dataset is a folder with one sub-folder per class (images may be deeper), or a folder that holds
only folders for train, val and test, at least train, each a folder of class folders
(stages/data/layout.py). With a table of labels at its top, labels.csv, it is the images that the
table names, at any depth (stages/data/labels.py). Files without an image extension and systems'
folders are passed over (stages/data/listing.py). Links to folders are not followed, as DVC does not
follow them.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import pandas as pd

from stages.data import labels
from stages.data.arrays import SPLITS
from stages.data.images import is_image_name
from stages.data.layout import (
    SET_CLASSES,
    ClassFolder,
    Folder,
    Layout,
    Tree,
    check_annotations,
    find_class_folders,
)
from stages.data.listing import (
    ELSEWHERE,
    NO_IMAGE,
    NOT_FOLLOWED,
    OF_SYSTEM,
    Skipped,
    count_images,
    is_data_folder,
    why_skipped,
)
from stages.run.cli import UserError, count, list_names, no_such

_TABLES = (".csv", ".tsv")
_MAX_PROBLEMS = 20  # names in a message on names
_MANY_SKIPPED = 0.1  # fraction of a class's files without an image extension that is warned of
OTHER_FORMATS = (
    "unpack archives, give images without an extension theirs, save those of other formats (DICOM,"
    " raw, JPEG XL) as PNG, and download what is elsewhere (.dvc: `dvc pull`)"
)


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
        What the folders in `folder` are. With ``"auto"`` labels.csv or their names decide.

    Returns
    -------
    images : DataFrame
        A row per image, in the order of paths: ``path`` (str, within the folder, with slashes),
        ``class`` (categorical over the sorted names), ``own_split`` (categorical over `SPLITS`;
        missing in a dataset without splits of its own), and, if labels.csv has it, ``group`` (str
        or missing).
    skipped : DataFrame
        What else is in the folder, as `Skipped`: ``path``, as ``reason`` `NO_IMAGE`, `ELSEWHERE`,
        `NOT_FOLLOWED` or `OF_SYSTEM`, or `NOT_NAMED` (an image, by labels.csv), `READ` or
        `NOT_READ` (labels.csv itself), ``files``; and ``class``, empty for what is of none.

    Raises
    ------
    UserError
        If this is not a dataset: what was found, what was expected, and what to do.
    """
    folder = Path(folder)
    _check_folder(folder, output)
    tree = _read_tree(folder)
    _check_projects(folder, tree)
    _check_pulled(folder, tree)
    _check_images(folder, tree)
    is_table = layout == "auto" and labels.has_labels(folder)
    images, class_of = _find_labeled(folder, tree) if is_table else _find(folder, tree, layout)
    named = set(images["path"])
    skipped = []
    for path, content in tree.items():
        found = [*_list_skipped(folder, path, content)]
        names = (_join(path, name) for name in content.images)
        found += [Skipped(name, labels.NOT_NAMED) for name in names if name not in named]
        for one in found:
            if one.path == labels.TABLE:
                one = one._replace(reason=labels.READ if is_table else labels.NOT_READ)
            skipped.append((*one, class_of.get(one.path, class_of.get(path, ""))))
    return images, pd.DataFrame(sorted(skipped), columns=[*Skipped._fields, "class"])


def _find(folder: Path, tree: Tree, layout: Layout) -> tuple[pd.DataFrame, dict[str, str]]:
    """Return the images of class folders, and the class of each folder in one."""
    try:
        check_annotations(
            f"dataset: {folder}", {path: one.images for path, one in tree.items()}, layout
        )
        class_folders = find_class_folders(folder, tree, layout)
        class_folders.sort(key=lambda one: one.path + "/")  # in the order of all paths
        inner = {one.path: _list_folders(tree, one.path) for one in class_folders}
        paths = [
            sorted(_join(path, name) for path in inner[one.path] for name in tree[path].images)
            for one in class_folders
        ]
        counts = [len(found) for found in paths]
        _check_classes(folder, tree, class_folders, counts)
    except UserError as error:
        tables = [name for name in tree[""].others if name.lower().endswith(_TABLES)]
        hint = (
            f"; or, if a table in it lists the labels ({list_names(tables)}), name its columns"
            f" {' and '.join(labels.COLUMNS)} and the file {labels.TABLE} (`python -m stages use`"
            " does so where it can)"
        )
        raise UserError(f"{error}{hint if tables else ''}") from None
    names = pd.Series([one.name for one in class_folders]).repeat(counts)
    own_splits = pd.Series([one.split for one in class_folders]).repeat(counts)
    images = pd.DataFrame(
        {
            "path": [path for found in paths for path in found],
            "class": pd.Categorical(names, sorted(set(names))),
            "own_split": pd.Categorical(own_splits.where(own_splits != ""), SPLITS),
        }
    )
    return images, {path: one.name for one in class_folders for path in inner[one.path]}


def _find_labeled(folder: Path, tree: Tree) -> tuple[pd.DataFrame, dict[str, str]]:
    """Return the images that labels.csv names, and the label of each file in it."""
    files = [_join(path, name) for path, one in tree.items() for name in one.images + one.others]
    table = labels.read_labels(folder, files)
    class_of = dict(zip(table["path"], table["label"], strict=True))
    return labels.to_images(table, folder / labels.TABLE), class_of


def describe_skipped(skipped: pd.DataFrame, images: pd.DataFrame) -> dict[str, str]:
    """Return a line for each reason why files are passed over, and a warning if these are many.

    Parameters
    ----------
    skipped : DataFrame
        As `find` returns it.
    images : DataFrame
        With ``path`` and ``class``.
    """
    lines = {}
    others, links, folders, absent, unnamed = (
        skipped[skipped["reason"] == why]
        for why in (NO_IMAGE, NOT_FOLLOWED, OF_SYSTEM, ELSEWHERE, labels.NOT_NAMED)
    )
    for reason in skipped["reason"][skipped["reason"].isin([labels.READ, labels.NOT_READ])]:
        lines["labels"] = reason
    if len(unnamed):
        lines["unlabeled"] = (
            f"{count(len(unnamed), 'image')} that {labels.TABLE} does not name passed over:"
            f" {list_names(unnamed['path'], 3)}"
        )
    if len(absent):
        lines["WARNING: missing"] = (
            f"{count(len(absent), 'file')} in place of images or folders that are not here:"
            f" {list_names(absent['path'])}; download these (.dvc: `dvc pull`)"
        )
    if len(folders):
        lines["passed over"] = (
            f"{count(int(folders['files'].sum()), 'image')} in hidden folders or a system's, as of"
            f" thumbnails or a recycle bin: {list_names(folders['path'])}"
        )
    if len(others):
        lines["ignored"] = (
            f"{count(len(others), 'file')} without an image extension"
            f" ({list_kinds(others['path'])}): {list_names(others['path'], 3)}"
        )
    if len(links):
        lines["links"] = (
            f"{count(len(links), 'link')} to a folder or to nothing left out, as DVC does not"
            f" follow them ({list_names(links['path'])})"
        )
    # What accompanies an image, as a.json, a.jpg.xml and a.cr2 do a.jpg, is none that is missed.
    stems = {*images["path"], *(os.path.splitext(path)[0] for path in images["path"])}
    missed = defaultdict(list)
    for path, name in zip(others["path"], others["class"], strict=True):
        if name and not _is_hidden(path) and os.path.splitext(path)[0] not in stems:
            missed[name].append(path)
    sizes, shares = images["class"].value_counts(), []
    for name, paths in missed.items():
        total = len(paths) + int(sizes.get(name, 0))
        if len(paths) > max(1, _MANY_SKIPPED * total):
            shares.append(f"{len(paths):,} of {total:,} in {name} ({list_kinds(paths)})")
    if shares:
        lines["WARNING: files"] = (
            f"passed over for their extension: {list_names(shares)}; {OTHER_FORMATS}"
        )
    return lines


def _is_hidden(path: str) -> bool:
    """Tell whether this is a file that phones, Macs and programs put beside images."""
    return os.path.basename(path).startswith(".")


def list_kinds(paths: Iterable[str]) -> str:
    """List the extensions of files, the most frequent first: ``"28 .dng, 2 .txt, 1 hidden"``."""
    kinds = Counter(
        "hidden" if _is_hidden(path) else os.path.splitext(path)[1].lower() or "without any"
        for path in paths
    )
    return list_names([f"{number:,} {kind}" for kind, number in kinds.most_common()])


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
    folder = Folder([], [], [], [], [])
    for entry in entries:
        try:
            name = entry.name.decode("utf-8")
        except UnicodeDecodeError:
            non_utf8.append(entry.path)
            continue
        if entry.is_dir(follow_symlinks=False):
            (folder.folders if is_data_folder(name) else folder.systems).append(name)
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


def _list_folders(tree: Tree, start: str) -> list[str]:
    """Return the path of a folder and those of all folders in it, at any depth."""
    paths = [start]
    for path in paths:  # which grows
        paths += [f"{path}/{name}" for name in tree[path].folders]
    return paths


def _list_skipped(root: Path, path: str, folder: Folder) -> Iterator[Skipped]:
    """Yield what is passed over in one folder; systems' folders only if they hold images."""
    beside = {*folder.images, *folder.folders, *folder.links, *folder.others}
    yield from (Skipped(_join(path, name), why_skipped(name, beside)) for name in folder.others)
    yield from (Skipped(_join(path, name), NOT_FOLLOWED) for name in folder.links)
    for name in folder.systems:
        place = _join(path, name)
        if images := count_images(os.path.join(root, os.fsdecode(place.encode()))):
            yield Skipped(place, OF_SYSTEM, images)


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def _check_folder(folder: Path, output: str | Path | None) -> None:
    """Raise a UserError unless this is a folder that does not contain the pipeline's output."""
    if not folder.exists():
        advice = "create it, or name another one"
        if ":/" in str(folder):  # an address; pathlib has made one slash of two
            advice = "`dvc import-url ADDRESS data/NAME` downloads it; then name that folder"
        raise UserError(f"dataset: {no_such('folder', folder, advice)}")
    if not folder.is_dir():
        advice = "expected a folder with a folder of images per class (unpack an archive first)"
        if folder.suffix.lower() in _TABLES:
            advice = (
                f"put it into the folder of its images as {labels.TABLE} (columns"
                f" {', '.join(labels.COLUMNS)}), and name that folder"
            )
        raise UserError(f"dataset: {folder} is a file; {advice}")
    if output is not None and Path(output).resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"dataset: {folder} contains the pipeline's own output ({output}); name the folder of"
            " one dataset, for instance data/digits"
        )


def _check_projects(folder: Path, tree: Tree) -> None:
    """Raise a UserError for a DVC project in the dataset: DVC would version none of its files."""
    projects = [str(folder / path) for path, one in tree.items() if ".dvc" in one.systems]
    if projects:
        raise UserError(
            f"dataset: {list_names(sorted(projects))}: a DVC project of its own, into which DVC"
            " does not look, so that it would version nothing of it; delete .dvc and .dvcignore"
            " there, or set `dataset:` to a folder of images in it"
        )


def _check_pulled(folder: Path, tree: Tree) -> None:
    """Raise a UserError if DVC tracks a part of the dataset that is not here."""
    pointers = [_join(path, name) for path, one in tree.items() for name in one.others]
    parts = [name.removesuffix(".dvc") for name in pointers if name.endswith(".dvc")]
    if missing := [name for name in parts if not (folder / name).exists()]:
        raise UserError(
            f"dataset: {folder}: a part of it is not here: {list_names(missing)}; fetch it with"
            " `dvc pull`, or remove its .dvc file"
        )


def _check_images(folder: Path, tree: Tree) -> None:
    """Raise a UserError if there is no image at all."""
    if tree[""].links or any(one.images for one in tree.values()):
        return
    kinds = list_kinds(name for one in tree.values() for name in one.others)
    found = f"no images but other files ({kinds}): {OTHER_FORMATS}" if kinds else "no images"
    raise UserError(f"dataset: {folder} holds {found}; expected a folder of images per class")


def _check_classes(
    folder: Path, tree: Tree, class_folders: list[ClassFolder], counts: list[int]
) -> None:
    """Raise a UserError for an empty class, one that train lacks, or fewer than two classes."""
    for_training = ("", "train")
    sizes = list(zip(class_folders, counts, strict=True))
    empty = [one.path for one, n in sizes if not n and one.split in for_training]
    if empty:
        links = [_join(path, name) for path in empty for name in tree[path].links]
        hint = f" (links to folders are not followed: {list_names(links)})" if links else ""
        inner = [path for start in empty for path in _list_folders(tree, start)]
        kinds = list_kinds(name for path in inner for name in tree[path].others)
        hint += f"; they hold other files ({kinds}): {OTHER_FORMATS}" if kinds else ""
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
            " `python -m stages predict FOLDER`; or, if the folders at the top are classes,"
            f" {SET_CLASSES}"
        )
    if len(trained) == 1:
        [(name, path)] = trained.items()
        inner = tree[path].folders
        hint = f"; if {list_names(inner)} are classes, move them up" if len(inner) > 1 else ""
        raise UserError(
            f"dataset: {folder} holds one class only ({name}); a classifier needs two folders of"
            f" images or more{hint}"
        )
