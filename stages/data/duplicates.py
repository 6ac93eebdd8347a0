"""Near-duplicate detection: the same picture saved again, mirrored, stretched, cropped or rotated.

Three steps, since a coarse hash alone confuses small, simple pictures:

1. Candidates are found by hashing (stages/data/lsh.py). The descriptor of a picture holds the
   lowest frequencies of its cosine transform (as in pHash: C. Zauner, Implementation and
   Benchmarking of Perceptual Image Hash Functions, 2010), weighted by frequency, since pictures
   hold less energy at higher ones. It is of the central part, without the edges that a border or
   a rotation fills. A picture is looked up among many views of the others: larger and smaller
   parts, parts off the center, rotated ones, and all of these mirrored.
2. A candidate has to lie near the query's tangent plane: the effect of small shifts, stretches and
   turns on its descriptor, to first order (P. Simard, Y. LeCun, J. Denker, NIPS 1992). This takes
   a fiftieth of the third step's time and rejects most pairs that are similar by chance.
3. The rest is verified on thumbnails of 24 x 24 pixels. One is moved onto the other by the affine
   map of least squares (B. Lucas, T. Kanade, IJCAI 1981); then both have to correlate over the
   lowest frequencies, the higher ones weighted more: copies agree in detail, while pictures that
   are merely alike, as two shirts are, agree in outline.

A thumbnail is the whole picture, stretched to a square, so that its shape does not matter.
Pictures without structure are not compared. Recall is measured by
tests/benchmarks/prepare_duplicates.py.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from stages.data import lsh
from stages.data.images import THUMBNAIL_SIDE
from stages.run.cli import progress
from stages.run.parallel import map_unordered

if TYPE_CHECKING:
    from stages.run.cluster import Cluster

SIDE = THUMBNAIL_SIDE  # in pixels
MIN_DEVIATION = 4.0  # lowest standard deviation of gray levels (0 to 255) that counts as structure
MIN_CORRELATION = 0.98  # lowest correlation of the thumbnails of near duplicates

_LENGTH = 40  # values per descriptor
_MIN_TANGENT_COSINE = 0.94  # of a candidate's descriptor and the query's tangent plane
_BLOCK = 1024  # queries that are looked up at once
_MAX_PAIRS = 128  # that are verified at once
# The views of a picture: the side of the part of it, the rotation in degrees, and the part's shift
# down and to the right in pixels. The first one is what a picture is looked up by.
_VIEWS = (
    *((side, turn, 0, 0) for side in (0.885, 1, 0.78) for turn in (0, 5, -5)),
    *((side, 0, down, right) for side in (0.91, 0.8) for down in (-1, 1) for right in (-1, 1)),
)

_MAX_STEPS = 4  # alignment iterations
_MAX_GAIN = 5  # a pair that needs more than this many times the last gain is dropped
_MAX_CHANGE, _MAX_SHIFT = 0.3, 0.15 * SIDE  # of positions: relative to the center, in pixels
_MARGIN = (
    2  # pixels at each edge that the verification leaves out: a rotation or a border fills them
)
_MAX_FREQUENCY = 10  # highest frequency that the verification compares


def _cosine_transform(n: int) -> np.ndarray:
    """Return the orthonormal matrix of the discrete cosine transform (DCT-II), float64 [n, n]."""
    k, x = np.arange(n)[:, None], np.arange(n)[None]
    matrix = np.cos(np.pi * k * (2 * x + 1) / (2 * n)) * np.sqrt(2 / n)
    matrix[0] /= np.sqrt(2)
    return matrix


def _sampling(motion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where thumbnails are sampled that are moved by an affine map (bilinear).

    Parameters
    ----------
    motion : float32 array of shape (n, 6)
        By how much the vertical position changes, in pixels: per pixel below the center, per pixel
        to the right of it, and everywhere; then the same for the horizontal position.

    Returns
    -------
    corners, weights : int32 and float32 arrays of shape (4, n, 576)
        The four pixels from which each one is interpolated.
    """
    moves = (motion.reshape(-1, 3) @ _POSITIONS).reshape(-1, 2, SIDE**2)
    positions = np.clip(_POSITIONS[:2] + moves + (SIDE - 1) / 2, 0, SIDE - 1)
    low = np.minimum(positions.astype(np.int32), SIDE - 2)
    down, right = (positions - low).transpose(1, 0, 2)
    first = low[:, 0] * SIDE + low[:, 1]
    corners = np.stack([first, first + 1, first + SIDE, first + SIDE + 1])
    up, left = 1 - down, 1 - right
    return corners, np.stack([up * left, up * right, down * left, down * right])


_OFFSETS = np.arange(SIDE, dtype=np.float32) - (SIDE - 1) / 2  # of pixels from the center
_POSITIONS = np.stack(
    [*(offsets.ravel() for offsets in np.meshgrid(_OFFSETS, _OFFSETS, indexing="ij")),
     np.ones(SIDE**2, np.float32)]
)  # fmt: skip
_GRADIENT = np.asarray(np.gradient(np.eye(SIDE), axis=0))

_FREQUENCY = np.hypot(*np.mgrid[:SIDE, :SIDE]).ravel()
_LOWEST = np.argsort(_FREQUENCY, kind="stable")[1 : _LENGTH + 1]
_VERTICAL, _HORIZONTAL = (
    _cosine_transform(SIDE)[part] for part in (_LOWEST // SIDE, _LOWEST % SIDE)
)
_WAVES = _FREQUENCY[_LOWEST] * np.einsum("ky,kx->yxk", _VERTICAL, _HORIZONTAL).reshape(-1, _LENGTH)


def _view_matrix(side: float, turn: float, down: float, right: float) -> np.ndarray:
    """Return the matrix from a thumbnail to one of its views, float64 [576, 576]."""
    along, across = side * np.cos(np.radians(turn)) - 1, side * np.sin(np.radians(turn))
    motion = np.array([[along, across, down, -across, along, right]], np.float32)
    matrix, pixels = np.zeros((SIDE**2, SIDE**2)), np.arange(SIDE**2)
    for corner, weight in zip(*_sampling(motion), strict=True):
        matrix[corner[0], pixels] += weight[0]
    return matrix


_MIRRORED = np.arange(SIDE**2).reshape(SIDE, SIDE)[:, ::-1].ravel()
# From a thumbnail to the descriptors of its views, then of those of its mirror image. In whole
# numbers, so that sums are exact in whatever order they are added.
_VIEW_WAVES = np.concatenate([_view_matrix(*view) @ _WAVES for view in _VIEWS], axis=1)
_VIEW_WAVES = np.rint(2**20 * np.concatenate([_VIEW_WAVES, _VIEW_WAVES[_MIRRORED]], axis=1))
_VIEW_COUNT = 2 * len(_VIEWS)


def _tangent_matrix() -> np.ndarray:
    """Return the matrix from a thumbnail to its descriptor and tangents, float32 [576, 240].

    The tangents are the changes of the descriptor by a shift and a stretch, each in two
    directions, and by a rotation.
    """
    waves = _WAVES.T.reshape(_LENGTH, SIDE, SIDE)
    changes = [
        waves,
        _GRADIENT.T @ waves,
        waves @ _GRADIENT,
        _GRADIENT.T @ (_OFFSETS[:, None] * waves),
        (waves * _OFFSETS) @ _GRADIENT,
        _GRADIENT.T @ (waves * _OFFSETS) - (_OFFSETS[:, None] * waves) @ _GRADIENT,
    ]
    center = _view_matrix(*_VIEWS[0])
    return (center @ np.concatenate(changes).reshape(-1, SIDE**2).T).astype(np.float32)


_TANGENTS = _tangent_matrix()
_PLANE = _TANGENTS.shape[1] // _LENGTH  # vectors that span a tangent plane

_INNER = slice(_MARGIN, SIDE - _MARGIN)
_INNER_WAVES = _cosine_transform(SIDE - 2 * _MARGIN)[: _MAX_FREQUENCY + 1].astype(np.float32)
_WEIGHTS = np.square(np.hypot(*np.mgrid[: _MAX_FREQUENCY + 1, : _MAX_FREQUENCY + 1]))
_WEIGHTS = np.where(_WEIGHTS > _MAX_FREQUENCY**2, 0, _WEIGHTS).astype(np.float32)


class Matches(NamedTuple):
    """Pairs of an image and its duplicate.

    Attributes
    ----------
    queries, targets : int arrays of shape (number of matches,)
        Positions of an image and of its duplicate.
    distances : float array of shape (number of matches,)
        From 0 to 0.02: 1 minus the correlation of the aligned thumbnails.
    """

    queries: np.ndarray
    targets: np.ndarray
    distances: np.ndarray


NO_MATCHES = Matches(np.empty(0, int), np.empty(0, int), np.empty(0))


def compute_descriptors(thumbnails: np.ndarray, views: int = 1) -> np.ndarray:
    """Return the descriptors of thumbnails.

    Parameters
    ----------
    thumbnails : uint8 array of shape (n, 24, 24)
    views : int, default=1
        How many views of each, of 34.

    Returns
    -------
    descriptors : int8 array of shape (n * views, 40)
        All zeros for a thumbnail without structure. A descriptor depends neither on the other
        thumbnails nor on the processor.
    """
    pixels = thumbnails.reshape(len(thumbnails), -1).astype(np.float64)
    variance = SIDE**2 * (pixels**2).sum(axis=1) - pixels.sum(axis=1) ** 2
    lowest = np.rint(pixels @ _VIEW_WAVES[:, : views * _LENGTH] / 2**14)
    lowest = lowest.reshape(len(pixels), views, _LENGTH)
    length = np.sqrt((lowest**2).sum(axis=2))
    length[variance < (SIDE**2 * MIN_DEVIATION) ** 2] = np.inf
    return np.rint(127 / length[..., None] * lowest).astype(np.int8).reshape(-1, _LENGTH)


def find_near(
    thumbnails: np.ndarray,
    queries: np.ndarray,
    targets: np.ndarray,
    cluster: "Cluster | None" = None,
    only_earlier: bool = False,
) -> Matches:
    """Find images that have a near duplicate among others, on all cores or on a cluster.

    Parameters
    ----------
    thumbnails : uint8 array of shape (n, 24, 24)
        Possibly memory-mapped.
    queries, targets : int arrays
        Positions in `thumbnails`.
    cluster : Cluster, optional
        Where to look.
    only_earlier : bool, default=False
        Whether to leave out an image itself, and the images after it.

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
    bar = progress(blocks, total=len(blocks), unit="block", label="duplicates: descriptors")
    descriptors = [compute_descriptors(thumbnails[block], _VIEW_COUNT) for block in bar]
    index = lsh.build_index(np.concatenate(descriptors), _VIEW_COUNT)
    starts = range(0, len(queries), _BLOCK)
    tasks = ((start, queries[start : start + _BLOCK]) for start in starts)
    shared = thumbnails, targets, index, only_earlier
    results = map_unordered(_match_block, tasks, len(starts), shared, cluster)
    found = dict(progress(results, total=len(starts), unit="block", label="duplicates"))
    return Matches(*map(np.concatenate, zip(*(found[start] for start in starts), strict=True)))


def find_across_splits(
    contents: np.ndarray,
    splits: np.ndarray,
    thumbnails: np.ndarray | None,
    cluster: "Cluster | None" = None,
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
    cluster : Cluster, optional
        Where to look.

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
            near = find_near(thumbnails, rows[first[~is_exact]], targets, cluster)
            matched = np.searchsorted(query_contents, contents[near.queries])
            target_of[matched], distances[matched] = near.targets, near.distances
        target, distance = target_of[content_of_row], distances[content_of_row]
        hit = target >= 0
        parts.append(Matches(rows[hit], target[hit], distance[hit]))
    matches = Matches(*map(np.concatenate, zip(*parts, strict=True)))
    order = np.argsort(matches.queries, kind="stable")
    return Matches(*(column[order] for column in matches))


def _match_block(
    start: int,
    queries: np.ndarray,
    thumbnails: np.ndarray,
    targets: np.ndarray,
    index: lsh.Index,
    only_earlier: bool,
) -> tuple[int, Matches]:
    """Find the near duplicates of one block of queries; return them with the block's `start`."""
    own = np.asarray(thumbnails[queries])
    query, row = lsh.candidates(index, compute_descriptors(own))
    if only_earlier:
        is_earlier = targets[row // _VIEW_COUNT] < queries[query]
        query, row = query[is_earlier], row[is_earlier]
    rows, place = np.unique(query, return_inverse=True)
    near = _tangent_cosine(own[rows], place, index.descriptors[row]) >= _MIN_TANGENT_COSINE
    query, (target, view) = query[near], np.divmod(row[near], _VIEW_COUNT)
    is_settled = np.zeros(len(queries), bool)
    found = [NO_MATCHES]
    for part in range(0, len(query), _MAX_PAIRS):
        pairs = part + np.flatnonzero(~is_settled[query[part : part + _MAX_PAIRS]])
        if not len(pairs):
            continue
        q, t = query[pairs], target[pairs]
        other = thumbnails[targets[t]]
        is_mirrored = view[pairs] >= len(_VIEWS)
        other = np.where(is_mirrored[:, None, None], other[..., ::-1], other)
        distances = 1 - aligned_correlation(own[q], other)
        hits = np.flatnonzero(distances <= 1 - MIN_CORRELATION)
        hits = hits[np.unique(q[hits], return_index=True)[1]]
        is_settled[q[hits]] = True
        found.append(Matches(q[hits], t[hits], distances[hits]))
    q, t, distances = map(np.concatenate, zip(*found, strict=True))
    order = np.argsort(q)
    return start, Matches(queries[q[order]], targets[t[order]], distances[order])


def _tangent_cosine(own: np.ndarray, query: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the cosine of descriptors and the tangent planes of queries, float32 [pairs]."""
    planes = (own.reshape(-1, SIDE**2).astype(np.float32) @ _TANGENTS).reshape(-1, _PLANE, _LENGTH)
    square = planes @ planes.transpose(0, 2, 1)
    ridge = 1e-3 * square + 1e-6 * square[:, :1, :1]  # stripes vary in one direction only
    inverse = np.linalg.inv(square + np.eye(_PLANE, dtype=np.float32) * ridge)
    others = others.astype(np.float32)
    along = np.einsum("pkj,pj->pk", planes.take(query, axis=0), others)
    within = np.einsum("pk,pkl,pl->p", along, inverse.take(query, axis=0), along)
    return np.sqrt(np.maximum(within, 0) / (others**2).sum(axis=1))


def aligned_correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the correlation of thumbnails once one is moved onto the other by an affine map.

    Parameters
    ----------
    one, other : uint8 arrays of shape (pairs, 24, 24)

    Returns
    -------
    correlation : float32 array of shape (pairs,)
        At most 1, over the lowest frequencies, of the better of both directions. A pair is dropped
        when the last step's gain leaves 0.98 out of reach, as it does for most chance
        resemblances after the first step.
    """
    best = np.full(len(one), -1.0, np.float32)
    active = np.arange(len(one))
    one, other = _standardize(one), _standardize(other)
    moving, fixed = np.concatenate((one, other)), np.concatenate((other, one))
    motion = np.zeros((len(moving), 6), np.float32)
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
    now = moved[:, _INNER, _INNER]
    before, after = slice(_MARGIN - 1, -_MARGIN - 1), slice(_MARGIN + 1, SIDE - _MARGIN + 1)
    down = (moved[:, after, _INNER] - moved[:, before, _INNER]) / 2
    across = (moved[:, _INNER, after] - moved[:, _INNER, before]) / 2
    below, right = _OFFSETS[_INNER, None], _OFFSETS[_INNER]
    columns = [down * below, down * right, down, across * below, across * right, across]
    terms = np.stack([*columns, now, np.ones_like(now)], axis=-1).reshape(len(now), -1, 8)
    transposed = terms.transpose(0, 2, 1)
    square = transposed @ terms
    square += np.eye(8, dtype=np.float32) * (1e-4 * square + 1e-3)  # as in `_tangent_cosine`
    values = fixed[:, _INNER, _INNER].reshape(len(fixed), -1, 1)
    solution = np.linalg.solve(square, transposed @ values)[..., 0]
    step = (solution[:, :6] / np.maximum(solution[:, 6:7], 0.2)).reshape(-1, 2, 3)
    linear = motion.reshape(-1, 2, 3)[:, :, :2] + np.eye(2, dtype=np.float32)
    limits = np.tile(np.array([_MAX_CHANGE, _MAX_CHANGE, _MAX_SHIFT], np.float32), 2)
    return np.clip(motion + (linear @ step).reshape(-1, 6), -limits, limits)


def _warp(thumbnails: np.ndarray, motion: np.ndarray) -> np.ndarray:
    """Move thumbnails, float32 [n, 24, 24]; see `_sampling`."""
    pixels, start = thumbnails.ravel(), np.arange(len(thumbnails))[:, None] * SIDE**2
    samples = zip(*_sampling(motion), strict=True)
    moved = np.sum([pixels.take(start + at) * weight for at, weight in samples], axis=0)
    return moved.reshape(thumbnails.shape)


def _spectrum(thumbnails: np.ndarray) -> np.ndarray:
    inner = thumbnails[:, _INNER, _INNER]
    spectrum = (_INNER_WAVES @ inner @ _INNER_WAVES.T) * _WEIGHTS
    return spectrum / np.maximum(np.sqrt((spectrum**2).sum(axis=(1, 2), keepdims=True)), 1e-9)
