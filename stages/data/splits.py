"""Split assignment: an image's split depends only on its content (or group) and the seed.

The rule: a hash of the seed and the image's content (or the name of its group) gives a number from
0 to 1, here called its rank. Below ``test_fraction`` the image belongs to test, at or above
``1 - val_fraction`` to val, otherwise to train. So an image stays in its split as the dataset
grows, and of n images of a class, ``n * fraction`` are expected in a split, with a standard
deviation of ``sqrt(n * fraction * (1 - fraction))``.

Pure functions: arrays in, arrays out, whatever the order of the images.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from stages.data.duplicates import Matches, find_across_splits
from stages.run.cluster import Cluster

TRAIN, VAL, TEST = 0, 1, 2  # positions in arrays.SPLITS; a "later" split has a greater one
EXCLUDED = -1
INCLUDED, DUPLICATE, NEAR_DUPLICATE, LABEL_CONFLICT = range(4)  # why an image is excluded


class Images(NamedTuple):
    """What split assignment needs to know of n images.

    Attributes
    ----------
    contents : int array of shape (n,)
        An ID of each distinct file content; -1 for an image that can't be read.
    labels : int array of shape (n,)
    own_splits : int8 array of shape (n,)
        The split that the dataset itself gives an image, or -1.
    groups : int array of shape (n,)
        Images of one group stay together: positions in `group_ranks`.
    group_ranks : float array
        The rank of each group, from 0 to 1.
    """

    contents: np.ndarray
    labels: np.ndarray
    own_splits: np.ndarray
    groups: np.ndarray
    group_ranks: np.ndarray

    @property
    def ranks(self) -> np.ndarray:
        """The rank of each image."""
        return self.group_ranks[self.groups]


@dataclasses.dataclass(frozen=True)
class Assignment:
    """The splits of n images.

    Attributes
    ----------
    splits : int8 array of shape (n,)
        TRAIN, VAL, TEST, or EXCLUDED.
    tentative : int8 array of shape (n,)
        The same before exclusions; EXCLUDED for an image that can't be read.
    reasons : int8 array of shape (n,)
        INCLUDED, DUPLICATE, NEAR_DUPLICATE or LABEL_CONFLICT.
    reassigned : bool array of shape (n,)
        Images that were moved to a split that their class would otherwise lack.
    required : list of int
        The splits that hold an image of each class, unless a class has too few images.
    cut : list of int
        The splits that are made here, from train or the whole dataset, and not predefined.
    matches : Matches
        The images that have a duplicate in a later split.
    """

    splits: np.ndarray
    tentative: np.ndarray
    reasons: np.ndarray
    reassigned: np.ndarray
    required: list[int]
    cut: list[int]
    matches: Matches


def rank_names(names: Iterable[bytes], seed: int) -> np.ndarray:
    """Return the rank of each name, float64 from 0 to 1: a hash of seed and name (BLAKE2b)."""
    key = str(seed).encode()
    values = bytearray()
    for name in names:
        values += hashlib.blake2b(name, digest_size=8, key=key).digest()
    return np.frombuffer(values, ">u8").astype(np.float64) / 2.0**64


def split_by_rank(ranks: np.ndarray, val_fraction: float, test_fraction: float) -> np.ndarray:
    """Return the split (int8) of each rank."""
    splits = np.full(len(ranks), TRAIN, np.int8)
    splits[ranks >= 1 - val_fraction] = VAL
    splits[ranks < test_fraction] = TEST
    return splits


def assign(
    images: Images,
    val_fraction: float,
    test_fraction: float,
    thumbnails: np.ndarray | None = None,
    cluster: Cluster | None = None,
) -> Assignment:
    """Assign each image to a split, or exclude it.

    Predefined splits are kept as they are; missing ones are split off from train. Of the images
    assigned here, one of several identical ones in a class is kept; identical images in two
    classes are excluded from train and val; and an image with a duplicate in a later split is
    excluded, even if that duplicate is excluded itself. If a split would have no image of a
    class, images of that class are moved to it (see `_fill_empty_splits`).

    Parameters
    ----------
    images : Images
    val_fraction, test_fraction : float
    thumbnails : uint8 array of shape (n, 24, 24), optional
        Without them, near duplicates are not looked for.

    Returns
    -------
    assignment : Assignment
    """
    fractions = {TEST: test_fraction, VAL: val_fraction}
    own_splits = images.own_splits
    cut = [split for split in (TEST, VAL) if fractions[split] > 0 and split not in own_splits]
    is_readable = images.contents >= 0
    is_cut = is_readable & ((own_splits < 0) | ((own_splits == TRAIN) & bool(cut)))
    shares = val_fraction * (VAL in cut), test_fraction * (TEST in cut)
    tentative = np.where(is_readable, own_splits, EXCLUDED).astype(np.int8)
    tentative[is_cut] = split_by_rank(images.ranks[is_cut], *shares)
    before = tentative
    reasons, matches = _exclude(images, tentative, is_cut, thumbnails, cluster)
    tentative, reasons, matches = _fill_empty_splits(
        images, (tentative, reasons, matches), is_cut, [*cut, TRAIN], shares, thumbnails
    )
    splits = np.where(reasons == INCLUDED, tentative, EXCLUDED).astype(np.int8)
    reassigned = tentative != before
    return Assignment(
        splits, tentative, reasons, reassigned, sorted([TRAIN, *cut]), sorted(cut), matches
    )


def label_conflicts(contents: np.ndarray, labels: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Return a mask of the images in `among` that are identical to one of another class."""
    low = np.full(contents.max(initial=-1) + 1, np.iinfo(np.int64).max)
    high = np.full(len(low), -1)
    np.minimum.at(low, contents[among], labels[among])
    np.maximum.at(high, contents[among], labels[among])
    return among & (low != high)[contents]


def _exclude(
    images: Images,
    tentative: np.ndarray,
    is_cut: np.ndarray,
    thumbnails: np.ndarray | None,
    cluster: Cluster | None = None,
) -> tuple[np.ndarray, Matches]:
    """Return why images are excluded from the splits made here, and the duplicates found."""
    contents, labels, ranks = images.contents, images.labels, images.ranks
    reasons = np.zeros(len(tentative), np.int8)
    matches = find_across_splits(
        contents, np.where(is_cut, tentative, np.int8(EXCLUDED)), thumbnails, cluster
    )
    reasons[matches.queries] = NEAR_DUPLICATE
    # Of identical images of a class, keep the one in the latest split, then that of lowest rank.
    rows = np.flatnonzero(is_cut)
    order = rows[np.lexsort((rows, ranks[rows], -tentative[rows], labels[rows], contents[rows]))]
    repeats = (np.diff(contents[order]) == 0) & (np.diff(labels[order]) == 0)
    reasons[order[1:][repeats]] = DUPLICATE
    reasons[label_conflicts(contents, labels, is_cut) & (tentative != TEST)] = LABEL_CONFLICT
    return reasons, matches


def _fill_empty_splits(
    images: Images,
    state: tuple[np.ndarray, np.ndarray, Matches],
    is_cut: np.ndarray,
    required: list[int],
    fractions: tuple[float, float],
    thumbnails: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray, Matches]:
    """Move images so that every class has an image in every required split, where possible.

    For each split that a class lacks, one of its groups moves there: to test that of lowest rank,
    to val that of highest, to train the nearest; and only if the class keeps another group where it
    was. Near duplicates of moved images are then excluded from earlier splits. A move by which some
    class loses its last image in a split is undone, and its group blocked. This repeats until no
    move is undone; each round blocks a group, so the loop terminates.

    Parameters
    ----------
    state : tuple
        Tentative splits, reasons and matches before; returned as they are after.
    """
    tentative, reasons, matches = state
    labels, groups = images.labels, images.groups
    usable = is_cut & ~label_conflicts(images.contents, labels, is_cut)
    included = usable & (reasons == INCLUDED)
    blocked = np.zeros(len(images.group_ranks), bool)
    while True:
        moved = _reassign(images, tentative, included, required, fractions, blocked)
        is_moved = moved != tentative
        if not is_moved.any():
            return tentative, reasons, matches
        new_reasons, new_matches = _exclude(images, moved, is_cut, thumbnails)
        expected = _count(moved, labels, included)
        left = _count(moved, labels, usable & (new_reasons == INCLUDED))
        loses = ((expected > 0) & (left == 0)).any(axis=1)  # by class
        failed = is_moved & loses[labels]
        responsible = new_matches.targets[loses[labels[new_matches.queries]]]
        failed[responsible] |= is_moved[responsible]
        if not failed.any():
            return moved, new_reasons, new_matches
        blocked[groups[failed]] = True
        blocked[groups[new_matches.queries[failed[new_matches.targets]]]] = True


def _count(splits: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Count some rows by class and split; int array of shape (classes, 3)."""
    counts = np.zeros((labels.max() + 1, 3), int)
    np.add.at(counts, (labels[rows], splits[rows]), 1)
    return counts


def _reassign(
    images: Images,
    tentative: np.ndarray,
    included: np.ndarray,
    required: list[int],
    fractions: tuple[float, float],
    blocked: np.ndarray,
) -> np.ndarray:
    """Return the splits after each class moved one unblocked group to each empty split."""
    groups, group_ranks = images.groups, images.group_ranks
    rows = np.flatnonzero(included)
    codes = images.labels[rows] * np.int64(len(group_ranks)) + groups[rows]
    codes, first = np.unique(codes, return_index=True)
    class_groups = np.column_stack(np.divmod(codes, len(group_ranks)))
    counts = _count(tentative, images.labels, rows[first])
    splits = tentative.copy()
    moved: set[int] = set()
    for label, split in itertools.product(np.unique(images.labels), required):
        if counts[label, split]:
            continue
        candidates = [
            group
            for group in class_groups[class_groups[:, 0] == label, 1]
            if group not in moved and not blocked[group]
        ]
        candidates.sort(key=lambda group: _distance(float(group_ranks[group]), split, fractions))
        for group in candidates:
            source = splits[included & (groups == group)][0]
            classes = class_groups[class_groups[:, 1] == group, 0]
            if source != split and (counts[classes, source] > 1).all():
                counts[classes, source] -= 1
                counts[classes, split] += 1
                splits[(groups == group) & (splits == source)] = split
                moved.add(group)
                break
    return splits


def _distance(rank: float, split: int, fractions: tuple[float, float]) -> float:
    """Return how far a rank is from a split."""
    val_fraction, test_fraction = fractions
    if split == TEST:
        return rank
    if split == VAL:
        return -rank
    return max(test_fraction - rank, rank - (1 - val_fraction))
