"""Who goes where: an image's split follows from its content (or group) and the seed alone.

The rule in a sentence: an image's rank is a hash of the seed and its content (or its group's name),
spread evenly from 0 to 1; it belongs to test below ``test_fraction``, to val from
``1 - val_fraction`` on, to train between. So an image stays where it is as the dataset grows, and
of n images of a class, ``n * fraction`` are expected in a split, with a standard deviation of
``sqrt(n * fraction * (1 - fraction))``.

Pure functions: arrays in, arrays out, whatever the order of rows.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable

import numpy as np

from stages.data.duplicates import Pairs

TRAIN, VAL, TEST = 0, 1, 2  # positions in arrays.SPLITS; greater is further from training
LEFT_OUT = -1
KEPT, COPY, NEAR_COPY, CONFLICT = range(4)  # why an image is left out


def ranks(names: Iterable[bytes], seed: int) -> np.ndarray:
    """Return each name's place from 0 to 1 (float64): a hash of seed and name (BLAKE2b)."""
    key = str(seed).encode()
    values = bytearray()
    for name in names:
        values += hashlib.blake2b(name, digest_size=8, key=key).digest()
    return np.frombuffer(values, ">u8").astype(np.float64) / 2.0**64


def draw(ranks: np.ndarray, val_fraction: float, test_fraction: float) -> np.ndarray:
    """Return the split (int8) of each rank."""
    sides = np.full(len(ranks), TRAIN, np.int8)
    sides[ranks >= 1 - val_fraction] = VAL
    sides[ranks < test_fraction] = TEST
    return sides


@dataclasses.dataclass(frozen=True)
class Decision:
    """Where each image goes.

    Attributes
    ----------
    splits : int8 array of shape (n,)
        TRAIN, VAL, TEST, or LEFT_OUT.
    sides : int8 array of shape (n,)
        The same before anything is left out; LEFT_OUT for an image that can't be read.
    reasons : int8 array of shape (n,)
        KEPT, COPY, NEAR_COPY or CONFLICT.
    lent : bool array of shape (n,)
        Images that a class lent to a split that its own images left empty.
    needed : list of int
        The splits that hold an image of each class, unless there are too few.
    drawn : list of int
        The splits that are cut from others, and not the dataset's own.
    copies : Pairs
        What `search` found at last.
    """

    splits: np.ndarray
    sides: np.ndarray
    reasons: np.ndarray
    lent: np.ndarray
    needed: list[int]
    drawn: list[int]
    copies: Pairs


def decide(
    contents: np.ndarray,
    labels: np.ndarray,
    given: np.ndarray,
    units: np.ndarray,
    unit_ranks: np.ndarray,
    val_fraction: float,
    test_fraction: float,
    search: Callable[[np.ndarray], Pairs],
) -> Decision:
    """Decide each image's split, and what is left out.

    Splits that the dataset brings are kept as they are. What it lacks beside train is cut from
    train. In what is cut, images of equal bytes within a class count once; the same picture under
    two classes is left out of train and val; and an image with a copy on a side further from
    training is left out, whether or not that copy is. A class whose own images leave a split empty
    lends it the image of lowest rank (to val the highest, to train the one nearest to it), from a
    split that keeps another, and whose near copies leave no split empty.

    Parameters
    ----------
    contents : int array of shape (n,)
        Equal for images of equal bytes; -1 for an image that can't be read.
    labels : int array of shape (n,)
    given : int8 array of shape (n,)
        The split that the dataset gives, or -1.
    units : int array of shape (n,)
        What stays together: positions in `unit_ranks`.
    unit_ranks : float array
    val_fraction, test_fraction : float
    search : callable
        Takes the side of each image (int8, -1 for none) and returns the images that have a copy on
        a side further from training, as `stages.data.duplicates.Search` does.

    Returns
    -------
    decision : Decision
    """
    fractions = {TEST: test_fraction, VAL: val_fraction}
    cut = [split for split in (TEST, VAL) if fractions[split] > 0 and split not in given]
    drawn = (contents >= 0) & ((given < 0) | ((given == TRAIN) & bool(cut)))
    shares = val_fraction * (VAL in cut), test_fraction * (TEST in cut)
    sides = np.where(contents >= 0, given, LEFT_OUT).astype(np.int8)
    sides[drawn] = draw(unit_ranks[units[drawn]], *shares)
    reasons, copies = _reasons(contents, labels, unit_ranks[units], sides, drawn, search)
    sound = drawn & ~conflicts(contents, labels, drawn)
    own, barred = sound & (reasons == KEPT), np.zeros(len(unit_ranks), bool)
    while True:
        moved = _lend(sides, labels, units, unit_ranks, own, [*cut, TRAIN], shares, barred)
        lent = moved != sides
        if not lent.any():
            break
        again, found = _reasons(contents, labels, unit_ranks[units], moved, drawn, search)
        # What is left out for a loan, its near copies, must not leave a split empty.
        hoped, left = (_counts(moved, labels, rows) for rows in (own, sound & (again == KEPT)))
        short = ((hoped > 0) & (left == 0)).any(axis=1)
        failed = lent & short[labels]
        blamed = found.copies[short[labels[found.queries]]]
        failed[blamed] |= lent[blamed]
        if not failed.any():
            sides, reasons, copies = moved, again, found
            break
        barred[units[failed]] = barred[units[found.queries[failed[found.copies]]]] = True
    splits = np.where(reasons == KEPT, sides, LEFT_OUT).astype(np.int8)
    return Decision(splits, sides, reasons, lent, sorted([TRAIN, *cut]), sorted(cut), copies)


def conflicts(contents: np.ndarray, labels: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Tell the images (of those that a mask names) whose bytes another class holds too."""
    low = np.full(contents.max(initial=-1) + 1, np.iinfo(np.int64).max)
    high = np.full(len(low), -1)
    np.minimum.at(low, contents[among], labels[among])
    np.maximum.at(high, contents[among], labels[among])
    return among & (low != high)[contents]


def _reasons(
    contents: np.ndarray,
    labels: np.ndarray,
    ranks: np.ndarray,
    sides: np.ndarray,
    drawn: np.ndarray,
    search: Callable[[np.ndarray], Pairs],
) -> tuple[np.ndarray, Pairs]:
    """Return why images are left out of the sides that are drawn, and what the search found."""
    reasons = np.zeros(len(sides), np.int8)
    copies = search(np.where(drawn, sides, np.int8(LEFT_OUT)))
    reasons[copies.queries] = NEAR_COPY
    # Of equal images of a class, the one furthest from training counts, then that of lowest rank.
    rows = np.flatnonzero(drawn)
    order = rows[np.lexsort((rows, ranks[rows], -sides[rows], labels[rows], contents[rows]))]
    again = (np.diff(contents[order]) == 0) & (np.diff(labels[order]) == 0)
    reasons[order[1:][again]] = COPY
    reasons[conflicts(contents, labels, drawn) & (sides != TEST)] = CONFLICT
    return reasons, copies


def _counts(sides: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return how many of some rows each class has on each side, int of shape (classes, 3)."""
    counts = np.zeros((labels.max() + 1, 3), int)
    np.add.at(counts, (labels[rows], sides[rows]), 1)
    return counts


def _lend(
    sides: np.ndarray,
    labels: np.ndarray,
    units: np.ndarray,
    unit_ranks: np.ndarray,
    own: np.ndarray,
    wanted: list[int],
    fractions: tuple[float, float],
    barred: np.ndarray,
) -> np.ndarray:
    """Return the sides after each class lent what its own images left empty, but no barred unit."""
    rows = np.flatnonzero(own)
    codes = labels[rows] * np.int64(len(unit_ranks)) + units[rows]
    codes, firsts = np.unique(codes, return_index=True)
    pairs = np.column_stack(np.divmod(codes, len(unit_ranks)))
    counts = _counts(sides, labels, rows[firsts])
    sides = sides.copy()
    moved: set[int] = set()
    for label, split in itertools.product(np.unique(labels), wanted):
        if counts[label, split]:
            continue
        candidates = [
            unit
            for unit in pairs[pairs[:, 0] == label, 1]
            if unit not in moved and not barred[unit]
        ]
        candidates.sort(key=lambda unit: _distance(unit_ranks[unit], split, fractions))
        for unit in candidates:
            side = sides[own & (units == unit)][0]
            classes = pairs[pairs[:, 1] == unit, 0]
            if side != split and (counts[classes, side] > 1).all():
                counts[classes, side] -= 1
                counts[classes, split] += 1
                sides[(units == unit) & (sides == side)] = split
                moved.add(unit)
                break
    return sides


def _distance(rank: float, split: int, fractions: tuple[float, float]) -> float:
    val_fraction, test_fraction = fractions
    if split == TEST:
        return rank
    if split == VAL:
        return -rank
    return max(test_fraction - rank, rank - (1 - val_fraction))
