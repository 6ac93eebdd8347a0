"""Near copies: the same picture saved again, resized, slightly cropped or brightened.

Three steps, since a coarse hash alone ties small simple pictures together:

1. Candidates, in much less than quadratic time. A picture's descriptor is the lowest frequencies of
   its cosine transform (as in pHash: C. Zauner, Implementation and Benchmarking of Perceptual Image
   Hash Functions, 2010), weighted by frequency, since pictures hold less the finer they look.
   Pictures meet that agree in the signs of one band of 20 coefficients, up to the six that are
   nearest to zero (multi-probe hashing: Lv et al., VLDB 2007), and whose descriptors correlate.
2. A candidate must lie near the query's tangent plane: what small shifts and stretches make of its
   descriptor, to first order (P. Simard, Y. LeCun and J. Denker, NIPS 1992). This takes a fiftieth
   of the third step's time, and leaves it few pictures that are alike by chance.
3. The rest are verified on 24 x 24 thumbnails: one is moved and stretched onto the other by least
   squares (B. Lucas and T. Kanade, IJCAI 1981), and the two must correlate over the lowest
   frequencies, each weighted alike.

Pictures without structure are not compared. Figures: tests/benchmarks/prepare_copies.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

SIDE = 24  # of a thumbnail
LENGTH = 40  # of a descriptor
FLAT = 4.0  # standard deviation, of 255 grey levels, below which a thumbnail has no structure

_ALIKE = 0.8  # descriptors of candidates correlate at least so much
_NEAR = 0.9  # cosine, at least, of a candidate's descriptor to the query's tangent plane
_SAME = 0.975  # verified thumbnails correlate at least so much
_PROBED = 6  # uncertain signs in a band
_BANDS = [np.arange(0, 40, 2), np.arange(1, 40, 2), np.arange(20), np.arange(20, 40)]
_BITS = 20
_EARLIER = np.tri(8, k=-1, dtype=np.uint8)  # which of eight slots come before each
BLOCK = 1024  # queries looked up at once
_TOGETHER = 8_000  # candidates weighed at once
_PAIRS = 128  # pairs verified at once
_MOST = 64  # targets that one key leads a query to
_VERIFIED = 16  # candidates of a query that are looked at closer, most alike first

_STEPS = 3  # of the alignment
_PATIENCE = 20  # times a step's gain, that what is missing may be for the alignment to go on
_STRETCH, _SHIFT = 0.07, 0.04 * SIDE  # its bounds
_FREQUENCIES = 10  # that verified thumbnails are compared over


def _cosines(n: int) -> np.ndarray:
    """Return the orthonormal matrix of the cosine transform (DCT-II)."""
    k, x = np.arange(n)[:, None], np.arange(n)[None]
    matrix = np.cos(np.pi * k * (2 * x + 1) / (2 * n)) * np.sqrt(2 / n)
    matrix[0] /= np.sqrt(2)
    return matrix


_ROUND = np.hypot(*np.mgrid[:SIDE, :SIDE]).ravel()
_LOWEST = np.argsort(_ROUND, kind="stable")[1 : LENGTH + 1]
_DOWN, _ACROSS = (_cosines(SIDE)[part] for part in np.divmod(_LOWEST, SIDE))
# Whole numbers, and so sums that are exact in whatever order they are added.
_LOWEST_WAVES = np.rint(
    2**20 * _ROUND[_LOWEST] * np.einsum("ky,kx->yxk", _DOWN, _ACROSS).reshape(-1, LENGTH)
)

_OFFSETS = np.arange(SIDE, dtype=np.float32) - (SIDE - 1) / 2  # of pixels, from the middle
_SLOPE = np.gradient(np.eye(SIDE), axis=0)


def _tangents() -> np.ndarray:
    """Return what takes a thumbnail to its descriptor and this one's changes, float32 [576, 200].

    The changes are those by a shift and a stretch, down and across.
    """
    waves = _LOWEST_WAVES.T.reshape(LENGTH, SIDE, SIDE) / 2**20
    moved = [
        waves,
        _SLOPE.T @ waves,
        waves @ _SLOPE,
        _SLOPE.T @ (_OFFSETS[:, None] * waves),
        (waves * _OFFSETS) @ _SLOPE,
    ]
    return np.concatenate(moved).reshape(-1, SIDE**2).T.astype(np.float32)


_TANGENTS = _tangents()

_INSIDE = _cosines(SIDE - 2)[: _FREQUENCIES + 1].astype(np.float32)
_EVEN = np.hypot(*np.mgrid[: _FREQUENCIES + 1, : _FREQUENCIES + 1]).astype(np.float32)
_EVEN[_EVEN > _FREQUENCIES] = 0


def thumbnail(picture: Image.Image) -> np.ndarray:
    """Return a picture in grey, uint8 of shape (24, 24)."""
    return np.asarray(
        picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
    )


def describe(thumbnails: np.ndarray) -> np.ndarray:
    """Return descriptors of thumbnails, int8 of shape (k, 40): zeros for those without structure.

    A descriptor does not depend on the others that are made with it, nor on the processor.
    """
    pixels = thumbnails.reshape(len(thumbnails), -1).astype(np.float64)
    variance = SIDE**2 * (pixels**2).sum(axis=1) - pixels.sum(axis=1) ** 2
    lowest = np.rint(pixels @ _LOWEST_WAVES / 2**14)
    length = np.sqrt((lowest**2).sum(axis=1))
    length[variance < (SIDE**2 * FLAT) ** 2] = np.inf
    return np.rint(127 / length[:, None] * lowest).astype(np.int8)


class Pairs(NamedTuple):
    """Near copies: position of a query, of its copy, and their distance from 0 to 1 - 0.975."""

    queries: np.ndarray
    copies: np.ndarray
    distances: np.ndarray


class Targets:
    """Pictures to be found by their near copies.

    Parameters
    ----------
    descriptors : int8 array of shape (k, 40)
    """

    def __init__(self, descriptors: np.ndarray) -> None:
        self._descriptors = descriptors
        structured = np.flatnonzero(descriptors.any(axis=1)).astype(np.int32)
        self._bits = min(len(structured).bit_length() + 3, _BITS)
        self._tables = []
        for band in _BANDS:
            slots = self._slots(_keys(descriptors[structured][:, band]))
            order = np.argsort(slots, kind="stable")
            # Targets of one slot lie side by side: how many, and where those of eight slots begin.
            taken, first, count = np.unique(slots[order], return_index=True, return_counts=True)
            few = np.arange(len(order)) - np.repeat(first, count) < _MOST
            sizes = np.zeros(2**self._bits, np.uint8)
            sizes[taken] = np.minimum(count, _MOST)
            eights = sizes.reshape(-1, 8).sum(axis=1, dtype=np.int32)
            starts = np.cumsum(eights, dtype=np.int32) - eights
            self._tables.append((band, sizes, starts, structured[order[few]]))

    def _slots(self, keys: np.ndarray) -> np.ndarray:
        """Spread keys over eight slots a target or more (multiplicative: Knuth, TAOCP 6.4)."""
        return (keys * 0x9E379 & 2**_BITS - 1) >> (_BITS - self._bits)

    def find(
        self,
        descriptors: np.ndarray,
        own: Callable[[np.ndarray], np.ndarray],
        others: Callable[[np.ndarray], np.ndarray],
    ) -> Pairs:
        """Find for each of a block of queries whether a near copy is among the targets.

        Parameters
        ----------
        descriptors : int8 array of shape (n, 40)
            Of `BLOCK` queries at most, for which memory is bounded.
        own, others : callable
            Take positions of queries, and of targets; return thumbnails, uint8 of shape
            (m, 24, 24).

        Returns
        -------
        pairs : Pairs
            Positions in the block, ascending, and among the targets. A query with a copy appears
            once, with the first that was found. Time and memory are bounded for each query, so
            among many thousands of almost equal pictures a copy is found, but perhaps not the
            nearest.
        """
        queries, targets = self._candidates(descriptors)
        rows, places = np.unique(queries, return_inverse=True)
        pictures = own(rows)
        near = _nearness(pictures, places, self._descriptors[targets]) >= _NEAR
        queries, targets, places = queries[near], targets[near], places[near]
        settled = np.zeros(len(descriptors), bool)
        found = [Pairs(np.empty(0, int), np.empty(0, int), np.empty(0))]
        for part in range(0, len(queries), _PAIRS):
            open_ = part + np.flatnonzero(~settled[queries[part : part + _PAIRS]])
            if len(open_):
                q, t = queries[open_], targets[open_]
                distances = 1 - _agreement(pictures[places[open_]], others(t))
                hits = np.flatnonzero(distances <= 1 - _SAME)
                hits = hits[np.unique(q[hits], return_index=True)[1]]
                settled[q[hits]] = True
                found.append(Pairs(q[hits], t[hits], distances[hits]))
        pairs = Pairs(*map(np.concatenate, zip(*found, strict=True)))
        order = np.argsort(pairs.queries)
        return Pairs(*(column[order] for column in pairs))

    def _candidates(self, descriptors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return pairs to look at (query, target), the most alike of each query first."""
        own = descriptors.astype(np.float32)
        found = []
        for band, sizes, starts, order in self._tables:
            # Absolute values and, in their last bits, places: the six least, in any order.
            certain = np.abs(descriptors[:, band].astype(np.int16)) * 32 + np.arange(20, dtype="i2")
            unsure = np.partition(certain, _PROBED, axis=1)[:, :_PROBED] & 31
            keys = _keys(descriptors[:, band])[:, None]
            for flip in np.split(np.int32(1) << unsure, _PROBED, axis=1):
                keys = np.concatenate((keys, keys ^ flip), axis=1)
            probes = self._slots(keys).ravel()
            hits = np.flatnonzero(sizes.take(probes))  # `take`: several times as fast as []
            row, slots = hits >> _PROBED, probes[hits]
            eights, places = slots >> 3, slots & 7
            earlier = sizes.reshape(-1, 8).take(eights, axis=0) * _EARLIER.take(places, axis=0)
            first = starts.take(eights) + earlier.sum(axis=1, dtype=np.int32)
            n = sizes.take(slots).astype(int)
            cuts = 1 + np.flatnonzero(np.diff(np.cumsum(n) // _TOGETHER))  # which bounds memory
            for part in np.split(np.arange(len(n)), cuts):
                before = np.cumsum(n[part]) - n[part]
                each = np.repeat(row[part], n[part])
                place = order[np.repeat(first[part] - before, n[part]) + np.arange(len(each))]
                others = self._descriptors.take(place, axis=0).astype(np.float32)
                near = np.einsum("ij,ij->i", own.take(each, axis=0), others)
                good = near >= _ALIKE * 127**2
                found.append((each[good], place[good], near[good]))
        row, place, near = map(np.concatenate, zip(*found, strict=True))
        order = np.lexsort((place, -near, row))
        row, place = row[order], place[order]
        new = np.ones(len(row), bool)  # two bands may lead to one target
        new[1:] = (row[1:] != row[:-1]) | (place[1:] != place[:-1])
        row, place = row[new], place[new]
        rank = np.arange(len(row)) - np.searchsorted(row, row)
        order = np.flatnonzero(rank < _VERIFIED)
        order = order[np.argsort(rank[order], kind="stable")]
        return row[order], place[order]


def _keys(band: np.ndarray) -> np.ndarray:
    """Return the signs of bands, one bit each, int32."""
    signs = np.packbits(band > 0, axis=1, bitorder="little").astype(np.int32)
    return signs[:, 0] | signs[:, 1] << 8 | signs[:, 2] << 16


def _nearness(pictures: np.ndarray, places: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the cosine of descriptors to the tangent planes of pictures (numbered by places)."""
    tangents = (pictures.reshape(-1, SIDE**2).astype(np.float32) @ _TANGENTS).reshape(-1, 5, LENGTH)
    square = tangents @ tangents.transpose(0, 2, 1)
    slack = 1e-3 * square + 1e-6 * square[:, :1, :1]  # stripes vary one way only
    inverse = np.linalg.inv(square + np.eye(5, dtype=np.float32) * slack)
    others = others.astype(np.float32)
    along = np.einsum("pkj,pj->pk", tangents.take(places, axis=0), others)
    within = np.einsum("pk,pkl,pl->p", along, inverse.take(places, axis=0), along)
    return np.sqrt(np.maximum(within, 0) / (others**2).sum(axis=1))


def _agreement(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return how alike thumbnails are, at most 1, once one is moved and stretched onto the other.

    Both ways are tried, and the better one counts. A pair that a step brings hardly nearer to
    `_SAME` is given up: most that are alike by chance, after the first step.
    """
    best = np.full(len(one), -1.0, np.float32)
    open_ = np.arange(len(one))
    one, other = _normal(one), _normal(other)
    moving, fixed = np.concatenate((one, other)), np.concatenate((other, one))
    motion = np.zeros((len(moving), 4), np.float32)  # stretch and shift, down and across
    for step in range(_STEPS + 1):
        moved = _moved(moving, motion) if step else moving
        now = _spectrum(moved) * _spectrum(fixed)
        reached = np.maximum(best[open_], now.sum(axis=(1, 2)).reshape(2, -1).max(axis=0))
        going = _PATIENCE * (reached - best[open_]) >= _SAME - reached
        best[open_] = reached
        if step == _STEPS or not going.any():
            return best
        open_, both = open_[going], np.tile(going, 2)
        moving, fixed = moving[both], fixed[both]
        motion = _nearer(moved[both], fixed, motion[both])
    return best


def _normal(thumbnails: np.ndarray) -> np.ndarray:
    pixels = thumbnails.astype(np.float32)
    pixels -= pixels.mean(axis=(1, 2), keepdims=True)
    return pixels / np.maximum(pixels.std(axis=(1, 2), keepdims=True), 1e-6)


def _nearer(moved: np.ndarray, fixed: np.ndarray, motion: np.ndarray) -> np.ndarray:
    """Return a motion that brings pictures, moved so far, nearer to the fixed ones."""
    inner = slice(1, -1)
    offsets = _OFFSETS[inner]
    now = moved[:, inner, inner]
    down = (moved[:, 2:, inner] - moved[:, :-2, inner]) / 2
    across = (moved[:, inner, 2:] - moved[:, inner, :-2]) / 2
    terms = (down * offsets[:, None], down, across * offsets, across, now, np.ones_like(now))
    terms = np.stack(terms, axis=-1).reshape(len(now), (SIDE - 2) ** 2, 6)
    turned = terms.transpose(0, 2, 1)
    square = turned @ terms
    square += np.eye(6, dtype=np.float32) * (1e-4 * square + 1e-3)  # stripes vary one way only
    values = fixed[:, inner, inner].reshape(len(fixed), (SIDE - 2) ** 2, 1)
    solved = np.linalg.solve(square, turned @ values)[..., 0]
    contrast = np.maximum(solved[:, 4:5], 0.2)
    limits = np.array([_STRETCH, _SHIFT, _STRETCH, _SHIFT], np.float32)
    return np.clip(motion + solved[:, :4] / contrast, -limits, limits)


def _spectrum(pictures: np.ndarray) -> np.ndarray:
    spectrum = (_INSIDE @ pictures[:, 1:-1, 1:-1] @ _INSIDE.T) * _EVEN
    return spectrum / np.maximum(np.sqrt((spectrum**2).sum(axis=(1, 2), keepdims=True)), 1e-9)


def _moved(pictures: np.ndarray, motion: np.ndarray) -> np.ndarray:
    """Sample pictures at moved and stretched places (bilinear)."""
    middle = (SIDE - 1) / 2
    rows = np.arange(len(pictures))[:, None]
    for stretch, shift in (motion[:, :2].T, motion[:, 2:].T):
        places = _OFFSETS * (1 + stretch[:, None]) + shift[:, None] + middle
        places = np.clip(places, 0, SIDE - 1)
        low = np.minimum(np.floor(places), SIDE - 2)
        part, low = (places - low)[..., None], low.astype(int)
        pictures = pictures[rows, low] * (1 - part) + pictures[rows, low + 1] * part
        pictures = pictures.transpose(0, 2, 1)
    return pictures


class Search:
    """Finds the images that have a copy, near or exact, on a side further from training.

    Parameters
    ----------
    contents : int array of shape (n,)
        Equal for images of equal bytes.
    near : callable, optional
        Takes two disjoint arrays of contents, queries and targets, and returns their `Pairs`, a
        query once; without it, exact copies only.
    """

    def __init__(
        self,
        contents: np.ndarray,
        near: Callable[[np.ndarray, np.ndarray], Pairs] | None = None,
    ) -> None:
        self._contents = contents
        self._near = near

    def __call__(self, sides: np.ndarray) -> Pairs:
        """Search once.

        Parameters
        ----------
        sides : int8 array of shape (n,)
            Greater is further from training; -1 for images that do not count.

        Returns
        -------
        pairs : Pairs
            Positions of images. Each image with such a copy is a query once.
        """
        parts = []
        for side in np.unique(sides[sides >= 0])[:-1]:
            rows, others = np.flatnonzero(sides == side), np.flatnonzero(sides > side)
            if not len(rows) or not len(others):
                continue
            # The row that speaks for a content is the one furthest from training.
            others = others[np.lexsort((others, -sides[others], self._contents[others]))]
            targets, first = np.unique(self._contents[others], return_index=True)
            others = others[first]
            queries = np.unique(self._contents[rows])
            exact = np.intersect1d(queries, targets, assume_unique=True)
            pairs = Pairs(exact, exact, np.zeros(len(exact)))
            if self._near:
                near = self._near(np.setdiff1d(queries, exact, assume_unique=True), targets)
                pairs = Pairs(
                    np.concatenate((exact, near.queries)),
                    np.concatenate((exact, near.copies)),
                    np.concatenate((pairs.distances, near.distances)),
                )
            if len(pairs.queries):
                order = np.argsort(pairs.queries, kind="stable")
                known = pairs.queries[order]
                place = np.minimum(np.searchsorted(known, self._contents[rows]), len(known) - 1)
                hit = known[place] == self._contents[rows]
                pair = order[place[hit]]
                copies = others[np.searchsorted(targets, pairs.copies[pair])]
                parts.append(Pairs(rows[hit], copies, pairs.distances[pair]))
        if not parts:
            return Pairs(np.empty(0, int), np.empty(0, int), np.empty(0))
        queries = np.concatenate([part.queries for part in parts])
        order = np.argsort(queries, kind="stable")
        return Pairs(
            queries[order],
            np.concatenate([part.copies for part in parts])[order],
            np.concatenate([part.distances for part in parts])[order],
        )
