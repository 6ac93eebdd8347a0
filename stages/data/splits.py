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

TRAIN, VAL, TEST = 0, 1, 2  # positions in prepared.SPLITS; greater is further from training
LEFT_OUT = -1
KEPT, COPY, NEAR_COPY, CONFLICT = range(4)  # why an image is left out


def ranks(names: Iterable[bytes], seed: int) -> np.ndarray:
    """Return each name's place from 0 to 1 (float64): a hash of seed and name (BLAKE2b)."""
    key = str(seed).encode()
    values = [hashlib.blake2b(name, digest_size=8, key=key).digest() for name in names]
    return np.frombuffer(b"".join(values), ">u8").astype(np.float64) / 2.0**64


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
    reasons : int8 array of shape (n,)
        KEPT, COPY, NEAR_COPY or CONFLICT.
    lent : bool array of shape (n,)
        Images that a class lent to a split that its own images left empty.
    """

    splits: np.ndarray
    reasons: np.ndarray
    lent: np.ndarray


def decide(
    contents: np.ndarray,
    labels: np.ndarray,
    given: np.ndarray,
    units: np.ndarray,
    unit_ranks: np.ndarray,
    val_fraction: float,
    test_fraction: float,
    near: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Decision:
    """Decide each image's split, and what is left out.

    Splits that the dataset brings are kept as they are. What train lacks beside it is cut from it;
    in what is cut, images of equal bytes within a class count once, the same picture under two
    classes is left out of train and val, and a picture on two sides stays on the side further
    from training. A class whose own images leave a split empty lends it the image of lowest rank
    (for val the highest, for train the one nearest to it), if the split it comes from keeps one.

    Parameters
    ----------
    contents : int array of shape (n,)
        Equal for images of equal bytes.
    labels : int array of shape (n,)
    given : int8 array of shape (n,)
        The split that the dataset gives, or -1.
    units : int array of shape (n,)
        What stays together: positions in `unit_ranks`.
    unit_ranks : float array
    val_fraction, test_fraction : float
    near : callable, optional
        Takes the side of each image (int8, -1 for none) and returns whether a near copy lies on a
        side further from training (bool).

    Returns
    -------
    decision : Decision
    """
    wanted = [split for split in (TEST, VAL) if not (given == split).any()]
    wanted = [s for s in wanted if (test_fraction if s == TEST else val_fraction) > 0]
    drawn = (given < 0) | ((given == TRAIN) & bool(wanted))
    sides = given.astype(np.int8)
    fractions = val_fraction * (VAL in wanted), test_fraction * (TEST in wanted)
    sides[drawn] = draw(unit_ranks[units[drawn]], *fractions)
    reasons = _reasons(contents, labels, sides, drawn, near)
    lent = np.zeros(len(sides), bool)
    if wanted:
        own = drawn & (reasons == KEPT) & ~_conflicts(contents, labels, drawn)
        moved = _lend(sides, labels, units, unit_ranks, own, [*wanted, TRAIN], fractions)
        lent = drawn & (moved != sides)
        if lent.any():
            sides = moved
            reasons = _reasons(contents, labels, sides, drawn, near)
    splits = np.where(reasons == KEPT, sides, LEFT_OUT).astype(np.int8)
    return Decision(splits, reasons, lent)


def _conflicts(contents: np.ndarray, labels: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Tell the drawn images whose bytes another class holds too."""
    low = np.full(contents.max(initial=-1) + 1, np.iinfo(np.int64).max)
    high = np.full(len(low), -1)
    np.minimum.at(low, contents[drawn], labels[drawn])
    np.maximum.at(high, contents[drawn], labels[drawn])
    return drawn & (low != high)[contents]


def _reasons(
    contents: np.ndarray,
    labels: np.ndarray,
    sides: np.ndarray,
    drawn: np.ndarray,
    near: Callable[[np.ndarray], np.ndarray] | None,
) -> np.ndarray:
    reasons = np.zeros(len(sides), np.int8)
    if not drawn.any():
        return reasons
    if near is not None:
        reasons[near(np.where(drawn, sides, np.int8(-1)))] = NEAR_COPY
    # Of equal images of a class, the one furthest from training counts.
    rows = np.flatnonzero(drawn)
    order = rows[np.lexsort((rows, -sides[rows], labels[rows], contents[rows]))]
    again = (np.diff(contents[order]) == 0) & (np.diff(labels[order]) == 0)
    reasons[order[1:][again]] = COPY
    conflicts = _conflicts(contents, labels, drawn)
    reasons[conflicts & (sides != TEST)] = CONFLICT
    return reasons


def _lend(
    sides: np.ndarray,
    labels: np.ndarray,
    units: np.ndarray,
    unit_ranks: np.ndarray,
    own: np.ndarray,
    wanted: list[int],
    fractions: tuple[float, float],
) -> np.ndarray:
    """Return the sides after each class lent what its own images left empty."""
    rows = np.flatnonzero(own)
    pairs, firsts = np.unique(
        np.column_stack((labels[rows], units[rows])), axis=0, return_index=True
    )
    counts = np.zeros((labels.max() + 1, 3), int)
    np.add.at(counts, (pairs[:, 0], sides[rows[firsts]]), 1)
    sides = sides.copy()
    moved: set[int] = set()
    for label, split in itertools.product(np.unique(labels), wanted):
        if counts[label, split]:
            continue
        candidates = [unit for unit in pairs[pairs[:, 0] == label, 1] if unit not in moved]
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
