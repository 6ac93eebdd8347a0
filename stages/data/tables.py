"""What prepare tells of its images: index.csv, copies.csv, prepare_classes.csv and the counts."""

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stages.data import duplicates, scan, splits
from stages.data.arrays import SPLITS
from stages.data.dataset import Dataset
from stages.data.splits import LEFT_OUT, TEST, TRAIN, VAL
from stages.utils import files

REASONS = ("", "exact copy", "near copy", "conflict")  # why an image is left out, by its code


class Pair(NamedTuple):
    """An image and one that it is a copy of.

    Attributes
    ----------
    row, other : int
        Their positions in the dataset.
    distance : float
    kind : {"near", "group", "exact", "conflict", "shared"}
        Shared: between splits that the dataset brings.
    """

    row: int
    other: int
    distance: float
    kind: str


def pairs(
    found: Dataset, read: scan.Reading, decision: splits.Decision, search: duplicates.Search
) -> list[Pair]:
    """List the copies, each image once for each kind at most."""
    found_pairs = []
    near = decision.copies
    for row, other, distance in zip(near.queries, near.copies, near.distances, strict=True):
        if decision.reasons[row] == splits.NEAR_COPY:
            same = read.contents[row] == read.contents[other]  # and yet kept apart: by their groups
            found_pairs.append(Pair(row, other, distance, "group" if same else "near"))
    # What holds the same bytes lies side by side; the one of a class that counts comes first.
    again = decision.reasons == splits.COPY
    order = np.lexsort((again, found.labels, read.contents))
    same = np.diff(read.contents[order], prepend=-1) == 0
    own = same & (np.diff(found.labels[order], prepend=-1) == 0)
    first = np.maximum.accumulate(np.where(own, 0, np.arange(len(order))))
    for place in np.flatnonzero(again[order]):
        found_pairs.append(Pair(order[place], order[first[place]], 0.0, "exact"))
    conflicts = splits.conflicts(read.contents, found.labels, read.contents >= 0)
    contents = read.contents[order]
    for place in np.flatnonzero(conflicts[order]):
        others = order[slice(*np.searchsorted(contents, [contents[place], contents[place] + 1]))]
        other = others[found.labels[others] != found.labels[order[place]]][0]
        found_pairs.append(Pair(order[place], other, 0.0, "conflict"))
    if len(found.splits) > 1:
        # Nothing is removed from splits that the dataset brings; what they share is told.
        near = search(np.where(decision.splits == LEFT_OUT, LEFT_OUT, found.given))
        for row, other, distance in zip(near.queries, near.copies, near.distances, strict=True):
            found_pairs.append(Pair(row, other, distance, "shared"))
    return sorted(found_pairs)


def copies_table(
    found: Dataset, decision: splits.Decision, pairs: Iterable[Pair]
) -> Iterator[list[Any]]:
    """Yield the lines of copies.csv."""
    yield ["path", "split", "other_path", "other_split", "distance", "kind", "left_out"]
    for row, other, distance, kind in pairs:
        yield [
            found.paths[row],
            _split(decision.sides[row]),
            found.paths[other],
            _split(decision.sides[other]),
            f"{max(distance, 0):.3f}",
            kind,
            found.paths[row] if decision.splits[row] == LEFT_OUT else "",
        ]


def index_table(
    found: Dataset,
    read: scan.Reading,
    decision: splits.Decision,
    orders: Iterable[np.ndarray],
) -> Iterator[list[Any]]:
    """Yield the lines of index.csv; `orders` are each split's images in the order of rows."""
    places = np.full(len(found), -1, np.int32)
    for order in orders:
        places[order] = np.arange(len(order))
    yield ["path", "class", "split", "digest", "exclusion_reason", "array_index"]
    for row, path in enumerate(found.paths):
        digest = read.digests[row].tobytes()
        yield [
            path,
            found.classes[found.labels[row]],
            _split(decision.splits[row]),
            "" if digest == scan.NO_DIGEST else digest.hex(),
            read.reasons.get(row) or REASONS[decision.reasons[row]],
            "" if places[row] < 0 else places[row],
        ]


def classes_table(found: Dataset, decision: splits.Decision) -> Iterator[list[Any]]:
    """Yield the lines of prepare_classes.csv."""
    counts = np.zeros((len(found.classes), len(SPLITS) + 1), int)
    np.add.at(counts, (found.labels, decision.splits), 1)  # the last column: left out
    yield ["class", *SPLITS, "left_out"]
    for name, numbers in zip(found.classes, counts.tolist(), strict=True):
        yield [name, *numbers]


def counts(
    found: Dataset, read: scan.Reading, decision: splits.Decision, pairs: Iterable[Pair]
) -> dict[str, int]:
    """Return the counts of prepare.json."""
    splits_ = np.bincount(decision.splits + 1, minlength=len(SPLITS) + 1).tolist()
    reasons = np.bincount(decision.reasons, minlength=len(REASONS)).tolist()
    return {
        "classes": len(found.classes),
        "train": splits_[TRAIN + 1],
        "val": splits_[VAL + 1],
        "test": splits_[TEST + 1],
        "left_out": splits_[0],
        "exact_copies": reasons[splits.COPY],
        "near_copies": reasons[splits.NEAR_COPY],
        "conflicts": reasons[splits.CONFLICT],
        "unreadable": len(read.reasons),
        "shared": sum(pair.kind == "shared" for pair in pairs),
    }


def write(path: Path, lines: Iterable[list[Any]]) -> None:
    """Write one table."""
    with files.atomic_write(path) as tmp, open(tmp, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)


def _split(code: int) -> str:
    return "" if code == LEFT_OUT else SPLITS[code]
