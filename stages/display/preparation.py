"""The summary and the figures of prepare."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stages.data import tables
from stages.data.arrays import SPLITS, ImageSpec
from stages.data.dataset import Dataset
from stages.data.images import DARK_FRACTION, Preprocessing
from stages.data.scan import Scan
from stages.data.splits import EXCLUDED, Assignment
from stages.data.tables import Duplicate
from stages.report import figures
from stages.run import cli

_MAX_LISTED = 20  # names in a message
_SMALL_CROP, _LARGE_CROP = 0.01, 1 / 3  # cropped fraction: mentioned, warned of
_MANY_DARK = 0.1  # fraction of dark images, of those of more than 8 bits, that is warned of
_SMALL_SCALE = 4  # shrink factor at which the summary gives advice
_MAX_UNMATCHED = 0.05  # fraction of all paths above which the summary warns of group_by
_MANY_NEAR_DUPLICATES = 0.02  # fraction of all images above which the summary gives advice
_MAX_PAIRS = 24  # in the figure of duplicates
_MAX_CONFLICTS = 5  # pairs with two labels that the summary names
_GRID_CLASSES, _GRID_COLUMNS = 20, 6  # classes in the figure, images per class


def choose_pairs(pairs: Sequence[Duplicate]) -> list[Duplicate]:
    """Return the first pairs, or some from the first to the last if they are too many to draw."""
    if len(pairs) <= _MAX_PAIRS:
        return list(pairs)
    half = _MAX_PAIRS // 2
    places = np.linspace(half, len(pairs) - 1, _MAX_PAIRS - half).round().astype(int)
    return [*pairs[:half], *(pairs[place] for place in places)]


def choose_samples(dataset: Dataset, train: np.ndarray) -> np.ndarray:
    """Choose training images for the figure: the first six of each class, up to 20 classes."""
    labels = dataset.labels[train]
    shown = range(min(len(dataset.classes), _GRID_CLASSES))
    return np.concatenate([train[labels == label][:_GRID_COLUMNS] for label in shown])


def draw_samples(dataset: Dataset, shown: np.ndarray, grid: list[np.ndarray], path: Path) -> None:
    """Draw prepared images, a row for each class."""
    names = figures.class_labels(dataset.classes)
    labels = dataset.labels[shown]
    is_first = np.diff(labels, prepend=-1) != 0
    titles = [names[label] if new else "" for label, new in zip(labels, is_first, strict=True)]
    classes = len(names)
    which = f", {_GRID_CLASSES} of {classes} classes" if classes > _GRID_CLASSES else ""
    figures.image_grid(grid, titles, f"Prepared images{which}", path, columns=(_GRID_COLUMNS,))


def draw_pairs(
    dataset: Dataset,
    assignment: Assignment,
    pairs: Sequence[Duplicate],
    images: Sequence[np.ndarray],
    note: str,
    path: Path,
) -> None:
    """Draw duplicates side by side, in an orange frame if their labels differ."""
    names = figures.class_labels(dataset.classes)
    titles, marked = [], []
    for pair in pairs:
        for image in (pair.image, pair.other):
            lines = [figures.path_label(dataset.paths[image])]
            if pair.has_two_labels(dataset):
                lines.append(names[dataset.labels[image]])
            left_out = ", left out" if assignment.splits[image] == EXCLUDED else ""
            lines.append(tables.split_name(assignment.tentative[image]) + left_out)
            titles.append("\n".join(lines))
        marked += [pair.has_two_labels(dataset)] * 2
    heading = f"Duplicates\n{note}"
    figures.image_grid(images, titles, heading, path, columns=(2, 2, 2, 2), marked=marked)


def pairs_note(dataset: Dataset, drawn: Sequence[Duplicate], total: int, near: bool) -> str:
    """Explain the figure of duplicates."""
    note = "None was found, apart from identical files in a class."
    if drawn:
        note = (
            f"{len(drawn)} of {total:,} pairs, side by side: path and split of each image, and"
            " whether it is left out. "
        )
        if any(pair.has_two_labels(dataset) for pair in drawn):
            note += (
                "Those in an orange frame come first: the same picture in two classes, so that one"
                " label is probably wrong. The others follow, from the closest to the least alike."
            )
        else:
            note += "They go from the closest to the least alike."
    if near:
        return note
    return f"{note} Near duplicates were not looked for (prepare.drop_near_duplicates: false)."


def summary(
    dataset: Dataset,
    scanned: Scan,
    assignment: Assignment,
    counts: dict[str, int],
    spec: ImageSpec,
) -> dict[str, str]:
    """Return the lines on images and splits."""
    height, width, channels = spec.image_shape
    images = f"{len(dataset):,} of {len(dataset.classes)} classes"
    images += f", {scanned.decoded:,} decoded now{scanned.place}"
    size = f"{height} × {width} pixels, {'colour' if channels == 3 else 'grey'}"
    lines = {"images": images, "size": size}
    for code, split in enumerate(SPLITS):
        origin = ""
        if split in dataset.own_split_names and code not in assignment.cut:
            name = dataset.paths[dataset.own_splits == code][0].split("/")[0]
            origin = "the dataset's own" + (f", from {name}/" if name != split else "")
            is_cut = split == "train" and assignment.cut
            origin = f" ({origin}{', minus what was split off' * bool(is_cut)})"
        elif dataset.own_split_names and counts[split]:
            origin = " (split off from train)"
        lines[split] = f"{counts[split]:,}{origin}"
    if assignment.reassigned.any():
        moved = assignment.reassigned.sum()
        lines["reassigned"] = f"{cli.count(moved, 'image')}, so that every class is in every split"
    if counts["excluded"]:
        names = ("duplicates", "near_duplicates", "label_conflicts", "unreadable")
        parts = [f"{counts[name]:,} {name.replace('_', ' ')}" for name in names if counts[name]]
        lines["excluded"] = f"{counts['excluded']:,} ({', '.join(parts)})"
    return lines


def duplicate_hints(
    dataset: Dataset, pairs: Sequence[Duplicate], counts: dict[str, int], figure: Path
) -> dict[str, str]:
    """Return the lines on duplicates that deserve attention."""
    lines = {}
    conflicts = [pair for pair in pairs if pair.has_two_labels(dataset)]
    if conflicts:
        names = [
            f"{dataset.paths[pair.image]} {'=' if pair.kind == 'conflict' else '≈'}"
            f" {dataset.paths[pair.other]}"
            for pair in conflicts[:_MAX_CONFLICTS]
        ]
        more = len(conflicts) - len(names)
        lines["two labels"] = (
            "the same picture in two classes (=: identical files, so one label is wrong; ≈: near"
            f" duplicates): {'; '.join(names)}{f'; and {more:,} more pairs' if more else ''}; see"
            f" {figure}"
        )
    near = counts["near_duplicates"]
    if near > _MANY_NEAR_DUPLICATES * len(dataset):
        share = f"{near:,} of {len(dataset):,} images ({near / len(dataset):.0%}) are left out"
        lines["near duplicates"] = f"{share}. {different_pictures(figure)}"
    if counts["cross_split_duplicates"]:
        lines["WARNING"] = (
            f"{counts['cross_split_duplicates']:,} images have a duplicate in another of the"
            f" dataset's own splits: scores will look better than they are; see {figure}"
        )
    return lines


def different_pictures(figure: Path) -> str:
    """Say what to do about near duplicates that are none."""
    return (
        f"Look at the near duplicates in {figure}: if they are different pictures (of a fixed"
        " camera, or simple drawings), set prepare.drop_near_duplicates: false"
    )


def hints(
    dataset: Dataset, scanned: Scan, preprocessing: Preprocessing, cropped: float
) -> dict[str, str]:
    """Return the lines on files that are left out, and on what is lost of the others.

    `cropped` is the fraction of its area that the average image loses by cropping.
    """
    lines = _image_hints(scanned, preprocessing, cropped)
    if scanned.reasons:
        lines["unreadable"] = "; ".join(list_unreadable(dataset, scanned))
    if dataset.ignored:
        number, names = len(dataset.ignored), cli.list_names(dataset.ignored, 3)
        lines["ignored"] = f"{cli.count(number, 'file')} without an image extension ({names})"
    if dataset.links:
        number, names = len(dataset.links), cli.list_names(dataset.links)
        lines["links"] = (
            f"{cli.count(number, 'link')} to a folder or to nothing left out, as DVC does not"
            f" follow them ({names})"
        )
    return lines


def _image_hints(scanned: Scan, preprocessing: Preprocessing, cropped: float) -> dict[str, str]:
    """Return the lines on what resizing and scaling to 8 bits leave of the images."""
    lines = {}
    if cropped >= _LARGE_CROP:
        lines["WARNING: crop"] = (
            f"cuts off {cropped:.0%} of the average image; set prepare.resize in params.yaml to pad"
            " or stretch, which keep all of it"
        )
    elif cropped >= _SMALL_CROP:
        lines["crop"] = f"cuts off {cropped:.0%} of the average image; prepare.resize: pad keeps it"
    shortest = scanned.sizes[scanned.channels > 0].min(axis=1)
    scale = int(np.median(shortest // min(preprocessing.image_size)))
    if scale >= _SMALL_SCALE:
        lines["scale"] = (
            f"half of the originals are at least {scale} times as large; for more detail, raise"
            " prepare.image_size in params.yaml"
        )
    white, peaks = preprocessing.white_level, scanned.peaks[scanned.peaks > 0]
    dark, clipped = int((peaks <= white * DARK_FRACTION).sum()), int((peaks > white).sum())
    of_all = f"of {len(peaks):,} images of more than 8 bits per channel"
    if dark > _MANY_DARK * len(peaks):
        lines["WARNING: dark"] = (
            f"{dark:,} {of_all} use less than a quarter of the values up to prepare.white_level"
            f" ({white}); make sure that all images have the same scale"
        )
    if clipped:
        lines["clipped"] = (
            f"{clipped:,} {of_all} have values above prepare.white_level ({white}), up to"
            f" {peaks.max()}; they become white"
        )
    return lines


def split_hints(dataset: Dataset, assignment: Assignment) -> dict[str, str]:
    """Return a warning if a class is missing in val or test of the dataset's own splits."""
    missing = []
    for code, split in enumerate(SPLITS):
        labels = dataset.labels[assignment.splits == code]
        absent = np.setdiff1d(np.arange(len(dataset.classes)), labels)
        if split in dataset.own_split_names and len(absent):
            names = cli.list_names([dataset.classes[label] for label in absent])
            missing.append(f"{split} has no image of {names}")
    return {"WARNING: classes": "; ".join(missing)} if missing else {}


def group_hints(dataset: Dataset, group_names: list[str | None]) -> dict[str, str]:
    """Return the lines on groups: warnings where many paths have none, or splits share groups."""
    paths, names = dataset.paths, set(group_names) - {None}
    if not names:
        return {}
    lines = {}
    pairs = {pair for pair in zip(group_names, dataset.own_splits.tolist(), strict=True) if pair[0]}
    shared = sum(number > 1 for number in Counter(name for name, _ in pairs).values())
    if shared:
        lines["WARNING: groups"] = (
            f"{shared:,} of {len(names):,} are in several of the dataset's own splits: scores will"
            " look better than they are"
        )
    groups = cli.count(len(names), "group")
    unmatched = [path for path, name in zip(paths, group_names, strict=True) if name is None]
    if not unmatched:
        line = groups
    elif len(unmatched) > _MAX_UNMATCHED * len(paths):
        line = (
            f"WARNING: {groups}, but {len(unmatched):,} of {len(paths):,} paths do not match"
            " prepare.group_by, so that images which belong together may be in several splits:"
            f" {cli.list_names(unmatched, 3)}"
        )
    else:
        paths_do = "1 path does" if len(unmatched) == 1 else f"{len(unmatched):,} paths do"
        line = f"{groups}; {paths_do} not match group_by: each is its own group ({unmatched[0]})"
    return {"groups": line} | lines


def list_unreadable(dataset: Dataset, scanned: Scan) -> list[str]:
    """Name the files that can't be read, with the reason, up to twenty of them."""
    rows = sorted(scanned.reasons)
    listed = [f"{dataset.paths[row]} ({scanned.reasons[row]})" for row in rows[:_MAX_LISTED]]
    return listed + ([f"and {len(rows) - _MAX_LISTED} more"] if len(rows) > _MAX_LISTED else [])
