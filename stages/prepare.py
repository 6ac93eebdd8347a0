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
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from stages.data import arrays, splits, tables
from stages.data.arrays import SPLITS, ImageSpec
from stages.data.cache import Cache
from stages.data.dataset import Dataset, find
from stages.data.duplicates import NO_MATCHES, SIDE, Matches, find_across_splits
from stages.data.images import DARK_FRACTION, Preprocessing
from stages.data.parameters import Prepare
from stages.data.scan import Scan, read_images, scan
from stages.data.splits import EXCLUDED, TRAIN, Assignment
from stages.display import preparation
from stages.run import cli, files
from stages.run.cli import UserError
from stages.run.cluster import Cluster, connect
from stages.run.params import read_dataset, read_section

_MAX_LISTED = 20  # classes in a message
_PACKAGES = ("numpy", "pillow", "pillow-heif")  # which decide what workers return


def prepare(
    parameters: Prepare,
    dataset: str | Path,
    output: str | Path,
    metrics: str | Path,
    cache_dir: str | Path | None = None,
) -> int:
    """Turn a folder of images into arrays for the network.

    A Dask cluster does the work if DASK_SCHEDULER_ADDRESS names one; otherwise all cores do.

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
    output, metrics, plots = Path(output), Path(metrics), Path(metrics, "plots")
    cache_dir = Path(cache_dir) if cache_dir else files.scratch_dir("images")
    preprocessing = Preprocessing(parameters.image_size, parameters.resize, parameters.white_level)
    found = find(dataset, output, parameters.layout)
    group_names = _group_names(found.paths, parameters.group_by)
    with (
        connect(_PACKAGES) as cluster,
        warnings.catch_warnings(action="ignore"),  # about damaged images: they are listed
        Cache(cache_dir, preprocessing) as cache,
        _thumbnail_array(cache_dir, output, len(found)) as thumbnails,
    ):
        scanned = scan(found, cache, thumbnails, preprocessing, cluster)
        _check_readable(found, scanned, parameters.max_unreadable_fraction)
        _check_white_level(scanned, parameters.white_level)

        compared = thumbnails if parameters.drop_near_duplicates else None
        images = _group_images(found, scanned, group_names, parameters.seed)
        assignment = splits.assign(
            images, parameters.val_fraction, parameters.test_fraction, compared, cluster
        )
        cross_split = _compare_own_splits(found, scanned, assignment, compared, cluster)
        duplicates = tables.list_duplicates(found, scanned.contents, assignment, cross_split)

        spec = _image_spec(found, scanned, parameters)
        pairs = tables.pairs_to_check(found, duplicates)
        chosen = preparation.choose_pairs(pairs)
        drawn = np.array([(pair.image, pair.other) for pair in chosen], int).reshape(-1)
        grid = list(read_images(found, scanned, drawn, cache, spec))
        note = preparation.pairs_note(found, chosen, len(pairs), compared is not None)
        preparation.draw_pairs(found, assignment, chosen, grid, note, plots / "duplicates.png")
        _check_classes(found, images, assignment, plots / "duplicates.png")

        rows = _array_rows(found, scanned, assignment)
        _write_arrays(found, scanned, rows, cache, spec, output)
        shown = preparation.choose_samples(found, rows[TRAIN])
        grid = list(read_images(found, scanned, shown, cache, spec))
        cache.evict(used=scanned.content_digests())

    spec.write(output / "image_spec.json")
    tables.write(output / "index.csv", tables.index_table(found, scanned, assignment, rows))
    tables.write(output / "duplicates.csv", tables.duplicates_table(found, assignment, duplicates))
    size = dict(zip(("image_height", "image_width", "channels"), spec.image_shape, strict=True))
    counts = tables.count(found, scanned, assignment, duplicates)
    cropped = _cropped_fraction(scanned, preprocessing)
    files.write_json(metrics / "prepare.json", size | counts | {"cropped_fraction": cropped})
    tables.write(metrics / "prepare_classes.csv", tables.classes_table(found, assignment))
    preparation.draw_samples(found, shown, grid, plots / "prepared.png")

    lines = preparation.summary(found, scanned, assignment, counts, spec)
    lines |= preparation.duplicate_hints(found, pairs, counts, plots / "duplicates.png")
    lines |= preparation.hints(found, scanned, preprocessing, cropped)
    lines |= preparation.split_hints(found, assignment)
    lines |= preparation.group_hints(found, group_names)
    lines["see"] = f"{output / 'index.csv'} (every image), {plots} (figures)"
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
    names = "; ".join(preparation.list_unreadable(dataset, scanned))
    if unreadable > max_fraction * len(dataset) or unreadable == len(dataset):
        raise UserError(
            f"prepare: {unreadable} of {len(dataset)} images can't be read; expected a share of"
            f" {max_fraction:g} at most (prepare.max_unreadable_fraction), and not all; fix or"
            f" remove them, or raise it: {names}"
        )
    for code, split in enumerate(SPLITS):
        own = scanned.contents[dataset.own_splits == code]
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
    return splits.Images(scanned.contents, dataset.labels, dataset.own_splits, groups, ranks)


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
        why = ", ".join(f"{n} {reason}" for reason, n in sorted(excluded.items()) if n)
        usable = int(counts[label].sum())
        groups = len(np.unique(images.groups[own & in_split]))
        # Enough images, or groups, that can't be in different splits are near duplicates.
        if excluded[tables.REASONS[splits.NEAR_DUPLICATE]] or groups >= len(assignment.required):
            advice = f". {preparation.different_pictures(figure)}"
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
    dataset: Dataset,
    scanned: Scan,
    assignment: Assignment,
    thumbnails: np.ndarray | None,
    cluster: Cluster | None,
) -> Matches:
    """Find duplicates across the dataset's own splits: they are reported, but not excluded."""
    if len(dataset.own_split_names) < 2:
        return NO_MATCHES
    own = np.where(assignment.splits == EXCLUDED, EXCLUDED, dataset.own_splits)
    return find_across_splits(scanned.contents, own, thumbnails, cluster)


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


def main(_: argparse.Namespace) -> None:
    """Run the stage as params.yaml says."""
    parameters, dataset = read_section(Prepare, "prepare"), read_dataset()
    with files.stage_lock("prepare"):
        prepare(parameters, dataset, "data/prepared", "metrics")
