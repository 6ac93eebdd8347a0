"""The prepare stage: turn a folder of images into arrays for the network.

An image's split depends only on its content and the seed (stages/data/splits.py), near duplicates
of val and test images are kept out of training (duplicates.py), and an image is decoded once
(cache.py).
"""

import argparse
import contextlib
import hashlib
import itertools
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from stages.data import arrays, splits, tables
from stages.data.arrays import SPLITS, ImageSpec
from stages.data.cache import Cache
from stages.data.dataset import Dataset, find
from stages.data.duplicates import NO_MATCHES, SIDE, Matches, find_across_splits
from stages.data.images import DARK_FRACTION, Preprocessing
from stages.data.layout import Layout
from stages.data.scan import Scan, read_images, scan
from stages.data.splits import EXCLUDED, TRAIN, Assignment
from stages.data.tables import Duplicate
from stages.report import figures
from stages.utils import cli, files
from stages.utils.cli import UserError
from stages.utils.params import Parameters, read_dataset, read_section

Pixels = Annotated[int, Field(ge=1, le=4096)]


class Prepare(Parameters):
    """The section `prepare` of params.yaml, where each key is explained."""

    layout: Layout = "auto"
    image_size: list[Pixels] = Field([32, 32])
    color_mode: Literal["auto", "rgb", "grayscale"] = "auto"
    resize: Literal["crop", "pad", "stretch"] = "crop"
    white_level: Annotated[int, Field(ge=1, le=65535)] = 65535
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.15
    seed: int = Field(1, ge=0, lt=2**32)
    drop_near_duplicates: bool = True
    group_by: str | None = None
    max_unreadable_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01

    @field_validator("image_size", mode="before")
    @classmethod
    def _is_pair(cls, value: object) -> object:
        if not isinstance(value, list) or len(value) != 2:
            raise ValueError("expected [height, width], for instance [128, 128]")
        return value

    @field_validator("group_by")
    @classmethod
    def _is_pattern(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"expected a regular expression ({error})") from None
        return value

    @model_validator(mode="after")
    def _leaves_training(self) -> "Prepare":
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError(
                "val_fraction and test_fraction leave nothing to train on: expected a sum below 1"
            )
        return self


_MAX_LISTED = 20  # names in a message
_SMALL_CROP, _LARGE_CROP = 0.01, 1 / 3  # cropped fraction: mentioned, warned of
_MANY_DARK = 0.1  # fraction of dark images, of those of more than 8 bits, that is warned of
_SMALL_SCALE = 4  # shrink factor at which the summary gives advice
_MANY_UNMATCHED = 0.05  # fraction of all paths above which the summary warns of group_by
_MANY_NEAR_DUPLICATES = 0.02  # fraction of all images above which the summary gives advice
_MAX_PAIRS = 24  # in the figure of duplicates
_MAX_CONFLICTS = 5  # pairs with two labels that the summary names
_GRID_CLASSES, _GRID_COLUMNS = 20, 6  # classes in the figure, images per class


def prepare(
    parameters: Prepare,
    dataset: str | Path,
    output: str | Path,
    metrics: str | Path,
    cache_dir: str | Path | None = None,
) -> int:
    """Turn a folder of images into arrays for the network.

    Parameters
    ----------
    parameters : Prepare
    dataset : path
        A folder as described in `stages.data.dataset`.
    output : path
        The folder for train/, val/, test/, image_spec.json, index.csv and duplicates.csv.
    metrics : path
        The folder for prepare.json, prepare_classes.csv and plots/, the figures prepared.png
        and duplicates.png.
    cache_dir : path, optional
        The folder of the cache of decoded images; by default one in the scratch folder.

    Returns
    -------
    decoded : int
        How many images were decoded; the others were in the cache.

    Raises
    ------
    UserError
        If the dataset can't be used as it is.
    """
    output, metrics = Path(output), Path(metrics)
    cache_dir = Path(cache_dir) if cache_dir else files.scratch_dir("images")
    preprocessing = Preprocessing(parameters.image_size, parameters.resize, parameters.white_level)
    found = find(dataset, output, parameters.layout)
    group_names = _group_names(found.paths, parameters.group_by)
    with (
        warnings.catch_warnings(action="ignore"),  # about damaged images: they are listed
        Cache(cache_dir, preprocessing) as cache,
        _thumbnail_array(cache_dir, output, len(found)) as thumbnails,
    ):
        scanned = scan(found, cache, thumbnails, preprocessing)
        _check_readable(found, scanned, parameters.max_unreadable_fraction)
        _check_white_level(scanned, parameters.white_level)

        compared = thumbnails if parameters.drop_near_duplicates else None
        images = _group_images(found, scanned, group_names, parameters.seed)
        assignment = splits.assign(
            images, parameters.val_fraction, parameters.test_fraction, compared
        )
        cross_split = _compare_own_splits(found, scanned, assignment, compared)
        duplicates = tables.list_duplicates(found, scanned.contents, assignment, cross_split)

        spec = _image_spec(found, scanned, parameters)
        pairs = tables.pairs_to_check(found, duplicates)
        chosen = _choose_pairs(pairs)
        drawn = np.array([(pair.image, pair.other) for pair in chosen], int).reshape(-1)
        grid = list(read_images(found, scanned, drawn, cache, spec))
        note = _pairs_note(len(chosen), len(pairs), parameters.drop_near_duplicates)
        pair_figure = metrics / "plots" / "duplicates.png"
        _draw_pairs(found, assignment, chosen, grid, note, pair_figure)
        _check_classes(found, images, assignment, pair_figure)

        rows = _array_rows(found, scanned, assignment)
        _write_arrays(found, scanned, rows, cache, spec, output)
        shown = _grid_images(found, rows[TRAIN])
        grid = list(read_images(found, scanned, shown, cache, spec))
        cache.evict(used=scanned.content_digests())

    spec.write(output / "image_spec.json")
    tables.write(output / "index.csv", tables.index_table(found, scanned, assignment, rows))
    table = tables.duplicates_table(found, assignment, duplicates)
    tables.write(output / "duplicates.csv", table)
    counts = tables.count(found, scanned, assignment, duplicates)
    size = dict(zip(("image_height", "image_width", "channels"), spec.image_shape, strict=True))
    cropped = _cropped_fraction(scanned, preprocessing)
    files.write_json(metrics / "prepare.json", size | counts | {"cropped_fraction": cropped})
    tables.write(metrics / "prepare_classes.csv", tables.classes_table(found, assignment))
    figure = metrics / "plots" / "prepared.png"
    _draw_grid(found, shown, grid, figure)

    lines = _summary(found, scanned, assignment, counts, spec)
    lines |= _duplicate_hints(found, pairs, counts, pair_figure)
    lines |= _hints(found, scanned)
    lines |= _image_hints(scanned, preprocessing, cropped)
    if parameters.group_by is not None:
        lines["groups"] = _groups_line(found.paths, group_names)
    lines["see"] = f"{output / 'index.csv'} (every image), {figure}, {pair_figure}"
    cli.summary("prepare: done", lines)
    return scanned.decoded


@contextlib.contextmanager
def _thumbnail_array(folder: Path, output: Path, count: int) -> Iterator[np.ndarray]:
    """Yield a temporary memory-mapped uint8 array of shape (count, 24, 24)."""
    run = hashlib.blake2b(os.fsencode(output.resolve()), digest_size=8).hexdigest()
    path = folder / f"thumbnails-{run}.npy"
    black = np.zeros((SIDE, SIDE), np.uint8)
    try:
        # Written in full: with a sparse file, a full disk would kill the process (SIGBUS).
        arrays.write_images(path, count, black.shape, itertools.repeat(black, count))
        yield np.load(path, mmap_mode="r+")
    finally:
        path.unlink(missing_ok=True)


def _check_readable(dataset: Dataset, scanned: Scan, max_fraction: float) -> None:
    unreadable = len(scanned.reasons)
    names = "; ".join(_list_unreadable(dataset, scanned))
    if unreadable > max_fraction * len(dataset) or unreadable == len(dataset):
        raise UserError(
            f"prepare: {unreadable} of {len(dataset)} images can't be read; expected a share of"
            f" {max_fraction:g} at most (prepare.max_unreadable_fraction), and not all; fix or"
            f" remove them, or raise it: {names}"
        )
    for code, split in enumerate(SPLITS):
        own = scanned.contents[dataset.given == code]
        if len(own) and (own < 0).all():
            raise UserError(
                f"prepare: none of the {len(own)} images of the dataset's own {split} can be read;"
                f" fix them, or remove that folder: {names}"
            )


def _check_white_level(scanned: Scan, white_level: int) -> None:
    """Raise a UserError if all images of more than 8 bits per channel would be almost black."""
    peak = int(scanned.peaks.max())
    if 0 < peak <= white_level * DARK_FRACTION:
        bits = peak.bit_length()
        raise UserError(
            f"prepare: {np.count_nonzero(scanned.peaks):,} images have more than 8 bits per channel"
            f" but no value above {peak}, so that they would be almost black; set"
            f" prepare.white_level in params.yaml to the value that is white, for instance"
            f" {2**bits - 1} for {bits} bits (now: {white_level})"
        )


def _cropped_fraction(scanned: Scan, preprocessing: Preprocessing) -> float:
    """Return the fraction of its area that the average image loses by cropping."""
    if preprocessing.resize != "crop":
        return 0.0
    height, width = preprocessing.image_size
    scales = scanned.sizes[scanned.channels > 0] / (width, height)
    return round(float((1 - scales.min(axis=1) / scales.max(axis=1)).mean()), 4)


def _list_unreadable(dataset: Dataset, scanned: Scan) -> list[str]:
    """Name the files that can't be read, with the reason, up to twenty of them."""
    rows = sorted(scanned.reasons)
    listed = [f"{dataset.paths[row]} ({scanned.reasons[row]})" for row in rows[:_MAX_LISTED]]
    return listed + ([f"and {len(rows) - _MAX_LISTED} more"] if len(rows) > _MAX_LISTED else [])


def _group_names(paths: np.ndarray, group_by: str | None) -> list[str | None]:
    """Return the match of group_by in each path, or None."""
    if group_by is None:
        return [None] * len(paths)
    names = _matches(paths, group_by)
    if all(name is None for name in names):
        ignoring_case = any(name is not None for name in _matches(paths, group_by, re.IGNORECASE))
        hint = "; it matches if case is ignored: put (?i) at its start" if ignoring_case else ""
        raise UserError(
            f"prepare.group_by: {group_by} matches none of the {len(paths):,} paths within the"
            f" dataset, for instance {cli.list_names(paths[:3])}{hint}"
        )
    return names


def _matches(paths: np.ndarray, group_by: str, flags: int = 0) -> list[str | None]:
    pattern = re.compile(group_by, flags)
    found = map(pattern.search, paths)
    return [match and match.group(1 if pattern.groups else 0) for match in found]


def _groups_line(paths: np.ndarray, group_names: list[str | None]) -> str:
    """Return the summary's line on groups: a warning where many paths have none."""
    groups = cli.count(len(set(group_names) - {None}), "group")
    unmatched = [path for path, name in zip(paths, group_names, strict=True) if name is None]
    if not unmatched:
        return groups
    if len(unmatched) > _MANY_UNMATCHED * len(paths):
        return (
            f"WARNING: {groups}, but {len(unmatched):,} of {len(paths):,} paths do not match"
            " prepare.group_by, so that images which belong together may be in several splits:"
            f" {cli.list_names(unmatched, 3)}"
        )
    paths_do = "1 path does" if len(unmatched) == 1 else f"{len(unmatched):,} paths do"
    return f"{groups}; {paths_do} not match group_by: each is its own group ({unmatched[0]})"


def _group_images(
    dataset: Dataset, scanned: Scan, group_names: list[str | None], seed: int
) -> splits.Images:
    """Return what split assignment needs.

    Images with the same group name form a group; without one, identical images do.
    """
    ranks = splits.rank_names(scanned.content_digests(), seed)
    groups = scanned.contents.copy()
    names: dict[str, int] = {}
    for row, name in enumerate(group_names):
        if name is not None and groups[row] >= 0:
            groups[row] = len(ranks) + names.setdefault(name, len(names))
    group_ranks = splits.rank_names((b"group " + name.encode() for name in names), seed)
    ranks = np.concatenate((ranks, group_ranks))
    return splits.Images(scanned.contents, dataset.labels, dataset.given, groups, ranks)


def _check_classes(
    dataset: Dataset, images: splits.Images, assignment: Assignment, figure: Path
) -> None:
    """Raise a UserError if a class has no image in a split that is made here."""
    counts = np.zeros((len(dataset.classes), len(SPLITS)), int)
    in_split = assignment.splits >= 0
    np.add.at(counts, (dataset.labels[in_split], assignment.splits[in_split]), 1)
    short = np.flatnonzero((counts[:, assignment.required] == 0).any(axis=1))
    if not len(short):
        return
    lines, differ, advice = [], "", ""
    for label in short[:_MAX_LISTED]:
        own = dataset.labels == label
        reasons = assignment.reasons[own & (images.contents >= 0)]
        excluded = Counter(tables.REASONS[reason] for reason in reasons if reason)
        excluded["unreadable"] = int((own & (images.contents < 0)).sum())
        if excluded[tables.REASONS[splits.NEAR_DUPLICATE]]:
            advice = f". {_different_pictures(figure)}"
        why = ", ".join(f"{n} {reason}" for reason, n in sorted(excluded.items()) if n)
        usable = int(counts[label].sum())
        groups = len(np.unique(images.groups[own & in_split]))
        line = f"class {dataset.classes[label]} has {usable} usable image{'s' * (usable != 1)}"
        if groups < usable:
            differ = ", in different groups"
            line += f", groups by prepare.group_by: {groups}"
        lines.append(line + (f" (excluded: {why})" if why else ""))
    more = f"; and {len(short) - _MAX_LISTED} more classes" if len(short) > _MAX_LISTED else ""
    needed = [SPLITS[split] for split in assignment.required]
    raise UserError(
        f"prepare: too few images: {'; '.join(lines)}{more}; each class needs {len(needed)} or more"
        f" different images{differ}, one for each of {', '.join(needed)}: add images or remove the"
        f" class{advice}"
    )


def _compare_own_splits(
    dataset: Dataset, scanned: Scan, assignment: Assignment, thumbnails: np.ndarray | None
) -> Matches:
    """Find duplicates across the dataset's own splits: they are reported, but not excluded."""
    if len(dataset.splits) < 2:
        return NO_MATCHES
    own = np.where(assignment.splits == EXCLUDED, EXCLUDED, dataset.given)
    return find_across_splits(scanned.contents, own, thumbnails)


def _write_arrays(
    dataset: Dataset,
    scanned: Scan,
    rows: list[np.ndarray],
    cache: Cache,
    spec: ImageSpec,
    output: Path,
) -> None:
    """Write the arrays of all splits; at the end, either all or none replace the old ones."""
    with contextlib.ExitStack() as stack:
        for name, split in zip(SPLITS, rows, strict=True):
            folder = stack.enter_context(files.atomic_write(output / name))
            images = read_images(dataset, scanned, split, cache, spec)
            bar = cli.progress(images, total=len(split), unit="image", label=name)
            labels = dataset.labels[split]
            arrays.write_split(folder, scanned.digests[split], labels, spec.image_shape, bar)


def _image_spec(dataset: Dataset, scanned: Scan, parameters: Prepare) -> ImageSpec:
    color_mode: str = parameters.color_mode
    if color_mode == "auto":
        color_mode = "rgb" if (scanned.channels == 3).any() else "grayscale"
    height, width = parameters.image_size
    shape = height, width, 3 if color_mode == "rgb" else 1
    return ImageSpec(
        dataset.classes, shape, color_mode, parameters.resize, white_level=parameters.white_level
    )


def _array_rows(dataset: Dataset, scanned: Scan, assignment: Assignment) -> list[np.ndarray]:
    """Return each split's images (positions in the dataset) in the order of its arrays."""
    rows = []
    for code in range(len(SPLITS)):
        own = np.flatnonzero(assignment.splits == code)
        rows.append(own[np.lexsort((own, dataset.labels[own], scanned.contents[own]))])
    return rows


def _grid_images(dataset: Dataset, train: np.ndarray) -> np.ndarray:
    """Choose training images for the figure: the first six of each class, up to 20 classes."""
    labels = dataset.labels[train]
    shown = range(min(len(dataset.classes), _GRID_CLASSES))
    return np.concatenate([train[labels == label][:_GRID_COLUMNS] for label in shown])


def _draw_grid(dataset: Dataset, shown: np.ndarray, grid: list[np.ndarray], path: Path) -> None:
    """Draw prepared images, a row for each class."""
    names = figures.class_labels(dataset.classes)
    labels = dataset.labels[shown]
    is_first = np.diff(labels, prepend=-1) != 0
    titles = [names[label] if new else "" for label, new in zip(labels, is_first, strict=True)]
    classes = len(names)
    which = f", {_GRID_CLASSES} of {classes} classes" if classes > _GRID_CLASSES else ""
    figures.image_grid(grid, titles, f"Prepared images{which}", path, columns=_GRID_COLUMNS)


def _choose_pairs(pairs: Sequence[Duplicate]) -> list[Duplicate]:
    """Return the first pairs, or some from the first to the last if they are too many to draw."""
    if len(pairs) <= _MAX_PAIRS:
        return list(pairs)
    half = _MAX_PAIRS // 2
    places = np.linspace(half, len(pairs) - 1, _MAX_PAIRS - half).round().astype(int)
    return [*pairs[:half], *(pairs[place] for place in places)]


def _pairs_note(drawn: int, total: int, near: bool) -> str:
    """Explain the figure of duplicates."""
    note = "None was found, apart from identical files in a class."
    if total:
        note = (
            f"{drawn} of {total:,} pairs, side by side: path, class and split of each. Those in an"
            " orange frame come first: the same picture in two classes, so that one label is"
            " probably wrong. The others follow, from the closest to the least alike."
        )
    if near:
        return note
    return f"{note} Near duplicates were not looked for (prepare.drop_near_duplicates: false)."


def _draw_pairs(
    dataset: Dataset,
    assignment: Assignment,
    pairs: Sequence[Duplicate],
    images: Sequence[np.ndarray],
    note: str,
    path: Path,
) -> None:
    """Draw duplicates side by side, in an orange frame if their labels differ."""
    titles, marked = [], []
    for pair in pairs:
        for image in (pair.image, pair.other):
            split = tables.split_name(assignment.tentative[image])
            text = dataset.paths[image], dataset.classes[dataset.labels[image]], split
            titles.append("\n".join(figures.class_labels(text)))
        marked += [pair.has_two_labels(dataset)] * 2
    figures.image_grid(images, titles, f"Duplicates\n{note}", path, marked=marked)


def _summary(
    dataset: Dataset,
    scanned: Scan,
    assignment: Assignment,
    counts: dict[str, int],
    spec: ImageSpec,
) -> dict[str, str]:
    """Return the lines on images and splits."""
    height, width, channels = spec.image_shape
    images = f"{len(dataset):,} of {len(dataset.classes)} classes, {scanned.decoded:,} decoded now"
    size = f"{height} × {width} pixels, {'colour' if channels == 3 else 'grey'}"
    lines = {"images": images, "size": size}
    for code, split in enumerate(SPLITS):
        origin = ""
        if split in dataset.splits and code not in assignment.cut:
            name = dataset.paths[dataset.given == code][0].split("/")[0]
            origin = "the dataset's own" + (f", from {name}/" if name != split else "")
            is_cut = split == "train" and assignment.cut
            origin = f" ({origin}{', minus what was split off' * bool(is_cut)})"
        elif dataset.splits and counts[split]:
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


def _different_pictures(figure: Path) -> str:
    """Say what to do about near duplicates that are none."""
    return (
        f"Look at the near duplicates in {figure}: if they are different pictures (of a fixed"
        " camera, or simple drawings), set prepare.drop_near_duplicates: false"
    )


def _duplicate_hints(
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
        lines["near duplicates"] = f"{share}. {_different_pictures(figure)}"
    if counts["cross_split_duplicates"]:
        lines["WARNING"] = (
            f"{counts['cross_split_duplicates']:,} images have a duplicate in another of the"
            f" dataset's own splits: scores will look better than they are; see {figure}"
        )
    return lines


def _hints(dataset: Dataset, scanned: Scan) -> dict[str, str]:
    """Return the lines on what else deserves attention."""
    lines = {}
    if scanned.reasons:
        lines["unreadable"] = "; ".join(_list_unreadable(dataset, scanned))
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
        lines["crop"] = f"cuts off {cropped:.0%} of the average image (prepare.resize)"
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


def main() -> None:
    """Run the stage as params.yaml says."""
    parameters, dataset = read_section(Prepare, "prepare"), read_dataset()
    with files.stage_lock("prepare"):
        prepare(parameters, dataset, "data/prepared", "metrics")


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m stages.prepare", description=__doc__).parse_args()
    cli.run(main, on_interrupt="decoded images are kept; run `dvc repro` to continue")
