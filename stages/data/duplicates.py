"""Near-duplicate detection: the same picture saved again, resized, slightly cropped or brightened.

Three steps, since a coarse hash alone confuses small, simple pictures:

1. Candidates are found by hashing (stages/data/lsh.py). The descriptor of a picture holds the
   lowest frequencies of its cosine transform (as in pHash: C. Zauner, Implementation and
   Benchmarking of Perceptual Image Hash Functions, 2010), weighted by frequency, since pictures
   hold less energy at higher ones.
2. A candidate has to lie near the query's tangent plane: the effect of small shifts and stretches
   on its descriptor, to first order (P. Simard, Y. LeCun, J. Denker, NIPS 1992). This takes
   a fiftieth of the third step's time and rejects most pairs that are similar by chance.
3. The rest is verified on thumbnails of 24 x 24 pixels. One is shifted and stretched onto the other
   by least squares (B. Lucas, T. Kanade, IJCAI 1981); then both have to correlate over the lowest
   frequencies, all weighted equally.

Pictures without structure are not compared. Recall is measured by
tests/benchmarks/prepare_duplicates.py.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image

from stages.data import lsh
from stages.data.parallel import map_unordered
from stages.utils.cli import progress

SIDE = 24  # thumbnail side in pixels
MIN_DEVIATION = 4.0  # lowest standard deviation of grey levels (0 to 255) that counts as structure
MIN_CORRELATION = 0.975  # lowest correlation of the thumbnails of near duplicates

_LENGTH = 40  # values per descriptor
_MIN_TANGENT_COSINE = 0.9  # of a candidate's descriptor and the query's tangent plane
_BLOCK = 1024  # queries that are looked up at once
_MAX_PAIRS = 128  # that are verified at once

_MAX_STEPS = 3  # alignment iterations
_MAX_GAIN = 20  # a pair that needs more than this many times the last gain is dropped
_MAX_STRETCH, _MAX_SHIFT = 0.07, 0.04 * SIDE
_MAX_FREQUENCY = 10  # highest frequency that the verification compares


def _cosine_transform(n: int) -> np.ndarray:
    """Return the orthonormal matrix of the discrete cosine transform (DCT-II), float64 [n, n]."""
    k, x = np.arange(n)[:, None], np.arange(n)[None]
    matrix = np.cos(np.pi * k * (2 * x + 1) / (2 * n)) * np.sqrt(2 / n)
    matrix[0] /= np.sqrt(2)
    return matrix


_FREQUENCY = np.hypot(*np.mgrid[:SIDE, :SIDE]).ravel()
_LOWEST = np.argsort(_FREQUENCY, kind="stable")[1 : _LENGTH + 1]
_VERTICAL, _HORIZONTAL = (
    _cosine_transform(SIDE)[part] for part in (_LOWEST // SIDE, _LOWEST % SIDE)
)
# Whole numbers, so that sums are exact in whatever order they are added.
_WAVES = np.rint(
    2**20
    * _FREQUENCY[_LOWEST]
    * np.einsum("ky,kx->yxk", _VERTICAL, _HORIZONTAL).reshape(-1, _LENGTH)
)

_OFFSETS = np.arange(SIDE, dtype=np.float32) - (SIDE - 1) / 2  # of pixels from the centre
_GRADIENT = np.asarray(np.gradient(np.eye(SIDE), axis=0))


def _tangent_matrix() -> np.ndarray:
    """Return the matrix from a thumbnail to its descriptor and tangents, float32 [576, 200].

    The tangents are the changes of the descriptor by a shift and a stretch, each in two directions.
    """
    waves = _WAVES.T.reshape(_LENGTH, SIDE, SIDE) / 2**20
    changes = [
        waves,
        _GRADIENT.T @ waves,
        waves @ _GRADIENT,
        _GRADIENT.T @ (_OFFSETS[:, None] * waves),
        (waves * _OFFSETS) @ _GRADIENT,
    ]
    return np.concatenate(changes).reshape(-1, SIDE**2).T.astype(np.float32)


_TANGENTS = _tangent_matrix()

_INNER_WAVES = _cosine_transform(SIDE - 2)[: _MAX_FREQUENCY + 1].astype(np.float32)
_WEIGHTS = np.hypot(*np.mgrid[: _MAX_FREQUENCY + 1, : _MAX_FREQUENCY + 1]).astype(np.float32)
_WEIGHTS[_WEIGHTS > _MAX_FREQUENCY] = 0


class Matches(NamedTuple):
    """Pairs of an image and its duplicate.

    Attributes
    ----------
    queries, targets : int arrays of shape (number of matches,)
        Positions of an image and of its duplicate.
    distances : float array of shape (number of matches,)
        From 0 to 0.025: 1 minus the correlation of the aligned thumbnails.
    """

    queries: np.ndarray
    targets: np.ndarray
    distances: np.ndarray


NO_MATCHES = Matches(np.empty(0, int), np.empty(0, int), np.empty(0))


def thumbnail(image: Image.Image) -> np.ndarray:
    """Return an image in grey, uint8 of shape (24, 24)."""
    return np.asarray(
        image.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
    )


def describe(thumbnails: np.ndarray) -> np.ndarray:
    """Return the descriptors of thumbnails.

    Parameters
    ----------
    thumbnails : uint8 array of shape (n, 24, 24)

    Returns
    -------
    descriptors : int8 array of shape (n, 40)
        All zeros for a thumbnail without structure. A descriptor depends neither on the other
        thumbnails nor on the processor.
    """
    pixels = thumbnails.reshape(len(thumbnails), -1).astype(np.float64)
    variance = SIDE**2 * (pixels**2).sum(axis=1) - pixels.sum(axis=1) ** 2
    lowest = np.rint(pixels @ _WAVES / 2**14)
    length = np.sqrt((lowest**2).sum(axis=1))
    length[variance < (SIDE**2 * MIN_DEVIATION) ** 2] = np.inf
    return np.rint(127 / length[:, None] * lowest).astype(np.int8)


def find(thumbnails: np.ndarray, queries: np.ndarray, targets: np.ndarray) -> Matches:
    """Find images that have a near duplicate among others, on all cores.

    Parameters
    ----------
    thumbnails : uint8 array of shape (n, 24, 24)
        Possibly memory-mapped.
    queries, targets : int arrays
        Positions in `thumbnails`.

    Returns
    -------
    matches : Matches
        In the order of `queries`, each query once at most, with the first near duplicate that was
        found. Time and memory are bounded for each query, so among many thousands of almost equal
        pictures a near duplicate is found, but perhaps not the nearest one.
    """
    if not len(queries) or not len(targets):
        return NO_MATCHES
    blocks = [targets[start : start + _BLOCK] for start in range(0, len(targets), _BLOCK)]
    index = lsh.build_index(np.concatenate([describe(thumbnails[block]) for block in blocks]))
    starts = range(0, len(queries), _BLOCK)
    tasks = (
        (start, thumbnails, queries[start : start + _BLOCK], targets, index) for start in starts
    )
    results = map_unordered(_match_block, tasks, len(starts))
    found = dict(progress(results, total=len(starts), unit="block", label="duplicates"))
    return Matches(*map(np.concatenate, zip(*(found[start] for start in starts), strict=True)))


def find_across_splits(
    contents: np.ndarray, splits: np.ndarray, thumbnails: np.ndarray | None
) -> Matches:
    """Find the images that have a duplicate in a later split (train < val < test).

    Parameters
    ----------
    contents : int array of shape (n,)
        An ID of each distinct file content.
    splits : int array of shape (n,)
        The split of each image, a position in `SPLITS`; -1 for an image that is
        not compared.
    thumbnails : uint8 array of shape (n, 24, 24) or None
        Without them, only byte-identical images are found.

    Returns
    -------
    matches : Matches
        Positions of images, sorted by `queries`, each image with a duplicate once.
    """
    parts = [NO_MATCHES]
    for split in np.unique(splits[splits >= 0])[:-1]:
        rows, others = np.flatnonzero(splits == split), np.flatnonzero(splits > split)
        # Of byte-identical images, the one in the latest split is the target.
        others = others[np.lexsort((others, -splits[others], contents[others]))]
        target_contents, first = np.unique(contents[others], return_index=True)
        targets = others[first]
        query_contents, first, content_of_row = np.unique(
            contents[rows], return_index=True, return_inverse=True
        )
        target_of = np.full(len(query_contents), -1)
        distances = np.zeros(len(query_contents))
        place = np.searchsorted(target_contents, query_contents)
        place = np.minimum(place, len(targets) - 1)
        is_exact = target_contents[place] == query_contents
        target_of[is_exact] = targets[place[is_exact]]
        if thumbnails is not None:
            near = find(thumbnails, rows[first[~is_exact]], targets)
            matched = np.searchsorted(query_contents, contents[near.queries])
            target_of[matched], distances[matched] = near.targets, near.distances
        target, distance = target_of[content_of_row], distances[content_of_row]
        hit = target >= 0
        parts.append(Matches(rows[hit], target[hit], distance[hit]))
    matches = Matches(*map(np.concatenate, zip(*parts, strict=True)))
    order = np.argsort(matches.queries, kind="stable")
    return Matches(*(column[order] for column in matches))


def _match_block(
    start: int, thumbnails: np.ndarray, queries: np.ndarray, targets: np.ndarray, index: lsh.Index
) -> tuple[int, Matches]:
    """Find the near duplicates of one block of queries; return them with the block's `start`."""
    own = np.asarray(thumbnails[queries])
    query, target = lsh.candidates(index, describe(own))
    rows, place = np.unique(query, return_inverse=True)
    near = _tangent_cosine(own[rows], place, index.descriptors[target]) >= _MIN_TANGENT_COSINE
    query, target = query[near], target[near]
    is_settled = np.zeros(len(queries), bool)
    found = [NO_MATCHES]
    for part in range(0, len(query), _MAX_PAIRS):
        pairs = part + np.flatnonzero(~is_settled[query[part : part + _MAX_PAIRS]])
        if not len(pairs):
            continue
        q, t = query[pairs], target[pairs]
        distances = 1 - aligned_correlation(own[q], thumbnails[targets[t]])
        hits = np.flatnonzero(distances <= 1 - MIN_CORRELATION)
        hits = hits[np.unique(q[hits], return_index=True)[1]]
        is_settled[q[hits]] = True
        found.append(Matches(q[hits], t[hits], distances[hits]))
    q, t, distances = map(np.concatenate, zip(*found, strict=True))
    order = np.argsort(q)
    return start, Matches(queries[q[order]], targets[t[order]], distances[order])


def _tangent_cosine(own: np.ndarray, query: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the cosine of descriptors and the tangent planes of queries, float32 [pairs]."""
    planes = (own.reshape(-1, SIDE**2).astype(np.float32) @ _TANGENTS).reshape(-1, 5, _LENGTH)
    square = planes @ planes.transpose(0, 2, 1)
    ridge = 1e-3 * square + 1e-6 * square[:, :1, :1]  # stripes vary in one direction only
    inverse = np.linalg.inv(square + np.eye(5, dtype=np.float32) * ridge)
    others = others.astype(np.float32)
    along = np.einsum("pkj,pj->pk", planes.take(query, axis=0), others)
    within = np.einsum("pk,pkl,pl->p", along, inverse.take(query, axis=0), along)
    return np.sqrt(np.maximum(within, 0) / (others**2).sum(axis=1))


def aligned_correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the correlation of thumbnails once one is shifted and stretched onto the other.

    Parameters
    ----------
    one, other : uint8 arrays of shape (pairs, 24, 24)

    Returns
    -------
    correlation : float32 array of shape (pairs,)
        At most 1, over the lowest frequencies, of the better of both directions. A pair is dropped
        when the last step's gain leaves 0.975 out of reach, as it does for most chance
        resemblances after the first step.
    """
    best = np.full(len(one), -1.0, np.float32)
    active = np.arange(len(one))
    one, other = _standardize(one), _standardize(other)
    moving, fixed = np.concatenate((one, other)), np.concatenate((other, one))
    motion = np.zeros((len(moving), 4), np.float32)  # stretch and shift, vertical and horizontal
    for step in range(_MAX_STEPS + 1):
        moved = _warp(moving, motion) if step else moving
        product = _spectrum(moved) * _spectrum(fixed)
        reached = np.maximum(best[active], product.sum(axis=(1, 2)).reshape(2, -1).max(axis=0))
        promising = _MAX_GAIN * (reached - best[active]) >= MIN_CORRELATION - reached
        best[active] = reached
        if step == _MAX_STEPS or not promising.any():
            break
        active, both = active[promising], np.tile(promising, 2)
        moving, fixed = moving[both], fixed[both]
        motion = _improve(moved[both], fixed, motion[both])
    return best


def _standardize(thumbnails: np.ndarray) -> np.ndarray:
    pixels = thumbnails.astype(np.float32)
    pixels -= pixels.mean(axis=(1, 2), keepdims=True)
    return pixels / np.maximum(pixels.std(axis=(1, 2), keepdims=True), 1e-6)


def _improve(moved: np.ndarray, fixed: np.ndarray, motion: np.ndarray) -> np.ndarray:
    """Return the motion after one step of least squares from thumbnails warped by `motion`."""
    inner = slice(1, -1)
    offsets = _OFFSETS[inner]
    now = moved[:, inner, inner]
    down = (moved[:, 2:, inner] - moved[:, :-2, inner]) / 2
    across = (moved[:, inner, 2:] - moved[:, inner, :-2]) / 2
    columns = [down * offsets[:, None], down, across * offsets, across, now, np.ones_like(now)]
    terms = np.stack(columns, axis=-1).reshape(len(now), (SIDE - 2) ** 2, 6)
    transposed = terms.transpose(0, 2, 1)
    square = transposed @ terms
    square += np.eye(6, dtype=np.float32) * (1e-4 * square + 1e-3)  # as in `_tangent_cosine`
    values = fixed[:, inner, inner].reshape(len(fixed), (SIDE - 2) ** 2, 1)
    solution = np.linalg.solve(square, transposed @ values)[..., 0]
    contrast = np.maximum(solution[:, 4:5], 0.2)
    limits = np.array([_MAX_STRETCH, _MAX_SHIFT, _MAX_STRETCH, _MAX_SHIFT], np.float32)
    return np.clip(motion + solution[:, :4] / contrast, -limits, limits)


def _spectrum(thumbnails: np.ndarray) -> np.ndarray:
    spectrum = (_INNER_WAVES @ thumbnails[:, 1:-1, 1:-1] @ _INNER_WAVES.T) * _WEIGHTS
    return spectrum / np.maximum(np.sqrt((spectrum**2).sum(axis=(1, 2), keepdims=True)), 1e-9)


def _warp(thumbnails: np.ndarray, motion: np.ndarray) -> np.ndarray:
    """Sample thumbnails at shifted and stretched positions (bilinear)."""
    centre = (SIDE - 1) / 2
    rows = np.arange(len(thumbnails))[:, None]
    for stretch, shift in (motion[:, :2].T, motion[:, 2:].T):
        positions = _OFFSETS * (1 + stretch[:, None]) + shift[:, None] + centre
        positions = np.clip(positions, 0, SIDE - 1)
        low = np.minimum(np.floor(positions), SIDE - 2)
        weight, low = (positions - low)[..., None], low.astype(int)
        thumbnails = thumbnails[rows, low] * (1 - weight) + thumbnails[rows, low + 1] * weight
        thumbnails = thumbnails.transpose(0, 2, 1)
    return thumbnails
