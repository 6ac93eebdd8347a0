"""The tables and counts that prepare writes about its images. Pure functions."""

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stages.data import splits
from stages.data.arrays import SPLITS
from stages.data.dataset import Dataset
from stages.data.duplicates import Matches
from stages.data.scan import NO_DIGEST, Scan
from stages.data.splits import EXCLUDED, TEST, TRAIN, VAL, Assignment
from stages.run import files

# Why an image is excluded, by its code in splits.
REASONS = ("", "duplicate", "near duplicate", "label conflict")


class Duplicate(NamedTuple):
    """A row of duplicates.csv: an image and one that it duplicates, by their positions.

    Attributes
    ----------
    image, other : int
    distance : float
    kind : {"exact", "near", "conflict", "cross-split"}
        Identical files in a class; near duplicates; identical files in two classes; duplicates
        across predefined splits.
    """

    image: int
    other: int
    distance: float
    kind: str

    def has_two_labels(self, dataset: Dataset) -> bool:
        """Return whether the two are in different classes."""
        return bool(dataset.labels[self.image] != dataset.labels[self.other])


def list_duplicates(
    dataset: Dataset, contents: np.ndarray, assignment: Assignment, cross_split: Matches
) -> list[Duplicate]:
    """List the duplicates, each image once for each kind at most."""
    rows = []
    for image, other, distance in zip(*assignment.matches, strict=True):
        if assignment.reasons[image] == splits.NEAR_DUPLICATE:
            rows.append(Duplicate(image, other, distance, "near"))
    # In this order, identical images are adjacent, and of a class the one that is kept is first.
    repeats = assignment.reasons == splits.DUPLICATE
    order = np.lexsort((repeats, dataset.labels, contents))
    same_content = np.diff(contents[order], prepend=-1) == 0
    same_class = same_content & (np.diff(dataset.labels[order], prepend=-1) == 0)
    first = np.maximum.accumulate(np.where(same_class, 0, np.arange(len(order))))
    for place in np.flatnonzero(repeats[order]):
        rows.append(Duplicate(order[place], order[first[place]], 0.0, "exact"))
    conflicts = splits.label_conflicts(contents, dataset.labels, contents >= 0)
    sorted_contents = contents[order]
    for place in np.flatnonzero(conflicts[order]):
        content = sorted_contents[place]
        equal = order[slice(*np.searchsorted(sorted_contents, [content, content + 1]))]
        other = equal[dataset.labels[equal] != dataset.labels[order[place]]][0]
        rows.append(Duplicate(order[place], other, 0.0, "conflict"))
    rows += [Duplicate(*match, "cross-split") for match in zip(*cross_split, strict=True)]
    return sorted(rows)


def pairs_to_check(dataset: Dataset, duplicates: Iterable[Duplicate]) -> list[Duplicate]:
    """Return the pairs that a person may want to see, each once.

    Pairs with two labels come first, the others from the closest to the least alike. Identical
    files in a class are left out: there is nothing to see.
    """
    pairs: dict[frozenset[int], Duplicate] = {}
    for row in duplicates:
        if row.kind != "exact":
            pairs.setdefault(frozenset((row.image, row.other)), row)
    rank = {"conflict": 0, "near": 1, "cross-split": 2}
    return sorted(
        pairs.values(),
        key=lambda row: (not row.has_two_labels(dataset), row.distance, rank[row.kind], row),
    )


def duplicates_table(
    dataset: Dataset, assignment: Assignment, duplicates: Iterable[Duplicate]
) -> Iterator[list[Any]]:
    """Yield the rows of duplicates.csv."""
    yield ["path", "split", "other_path", "other_split", "distance", "kind", "excluded_path"]
    for image, other, distance, kind in duplicates:
        yield [
            dataset.paths[image],
            split_name(assignment.tentative[image]),
            dataset.paths[other],
            split_name(assignment.tentative[other]),
            f"{max(distance, 0):.3f}",
            kind,
            dataset.paths[image] if assignment.splits[image] == EXCLUDED else "",
        ]


def index_table(
    dataset: Dataset, scan: Scan, assignment: Assignment, rows: Iterable[np.ndarray]
) -> Iterator[list[Any]]:
    """Yield the rows of index.csv; `rows` holds each split's images in the order of its arrays."""
    array_index = np.full(len(dataset), -1, np.int32)
    for images in rows:
        array_index[images] = np.arange(len(images))
    yield ["path", "class", "split", "digest", "exclusion_reason", "array_index"]
    for image, path in enumerate(dataset.paths):
        digest = scan.digests[image].tobytes()
        yield [
            path,
            dataset.classes[dataset.labels[image]],
            split_name(assignment.splits[image]),
            "" if digest == NO_DIGEST else digest.hex(),
            scan.reasons.get(image) or REASONS[assignment.reasons[image]],
            "" if array_index[image] < 0 else array_index[image],
        ]


def classes_table(dataset: Dataset, assignment: Assignment) -> Iterator[list[Any]]:
    """Yield the rows of prepare_classes.csv."""
    counts = np.zeros((len(dataset.classes), len(SPLITS) + 1), int)
    np.add.at(counts, (dataset.labels, assignment.splits), 1)  # the last column: excluded
    yield ["class", *SPLITS, "excluded"]
    for name, numbers in zip(dataset.classes, counts.tolist(), strict=True):
        yield [name, *numbers]


def count(
    dataset: Dataset, scan: Scan, assignment: Assignment, duplicates: Iterable[Duplicate]
) -> dict[str, int]:
    """Return the counts of prepare.json."""
    images = np.bincount(assignment.splits + 1, minlength=len(SPLITS) + 1).tolist()
    reasons = np.bincount(assignment.reasons, minlength=len(REASONS)).tolist()
    return {
        "classes": len(dataset.classes),
        "train": images[TRAIN + 1],
        "val": images[VAL + 1],
        "test": images[TEST + 1],
        "excluded": images[EXCLUDED + 1],
        "duplicates": reasons[splits.DUPLICATE],
        "near_duplicates": reasons[splits.NEAR_DUPLICATE],
        "label_conflicts": reasons[splits.LABEL_CONFLICT],
        "unreadable": len(scan.reasons),
        "cross_split_duplicates": sum(row.kind == "cross-split" for row in duplicates),
    }


def write(path: Path, rows: Iterable[list[Any]]) -> None:
    """Write one table as CSV."""
    with files.atomic_write(path) as tmp, open(tmp, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def split_name(code: int) -> str:
    """Return the name of a split; empty for an image in none."""
    return "" if code == EXCLUDED else SPLITS[code]
