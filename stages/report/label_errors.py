"""Label errors and outliers, from features of the images and a model's probabilities.

Throughout, ``features`` is a float array [n, d], ``labels`` an int array [n] of positions in the
list of classes, and ``probabilities`` a float array [n, classes] whose rows sum to 1. ``units`` is
an int array [n]: images with the same number (duplicates, or images of one thing) are one unit, and
none of them says anything about the label of another. Results do not depend on the order of the
images, except for the last digits.
"""

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from stages.report.binomial import clopper_pearson
from stages.run.cli import progress
from stages.run.processes import cpu_count

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

FOLDS = 5
_DOUBT = 0.5  # a label that another class exceeds by this probability teaches nothing
_NEIGHBORS = 10  # that vote
_FAR_NEIGHBOR = 50  # whose distance is that from a class: outliers of one kind have near neighbors
_FAR = 3.0  # robust standard deviations of the logarithm of that distance
_SMOOTHING = 0.02  # the share of all votes that each class gets besides
_LEAST = 1e-6  # probability; below it, models say no more
_INVERSE_PENALTY = 20.0  # of the regression, on vectors of mean square length 1
_ITERATIONS = 100
_CHUNK = 2**23  # numbers that a thread computes at once


class Neighbors(NamedTuple):
    """The images of other units that are most like each image, by the cosine of their features.

    Attributes
    ----------
    rows : int array [n, k]
        Their positions, the nearest first.
    cosines : float32 array [n, k]
        At least 0; a place for which there is no image has 0.
    """

    rows: np.ndarray
    cosines: np.ndarray


def find_neighbors(
    features: np.ndarray, units: np.ndarray | None = None, count: int = _FAR_NEIGHBOR
) -> Neighbors:
    """Find the nearest images of other units, all of them against all.

    Parameters
    ----------
    features : float array [n, d]
    units : int array [n], optional
        By default, each image is a unit.
    count : int, default=50
        How many; fewer where there are fewer images.
    """
    units = np.arange(len(features)) if units is None else units
    vectors = np.array(features, np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors /= np.maximum(lengths, np.finfo(np.float32).tiny)
    count = min(count, len(vectors))

    def search(rows: slice) -> tuple[np.ndarray, np.ndarray]:
        distances = -(vectors[rows] @ vectors.T)
        distances[units[rows, None] == units] = 1  # farther than any that votes
        nearest = np.argpartition(distances, count - 1, axis=1)[:, :count]
        distances = np.take_along_axis(distances, nearest, axis=1)
        order = np.argsort(distances, axis=1, kind="stable")
        nearest = np.take_along_axis(nearest, order, axis=1)
        return nearest, np.take_along_axis(distances, order, axis=1)

    found = _in_threads(search, list(_chunks(len(vectors), len(vectors))), "neighbors")
    rows, distances = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Neighbors(rows, np.maximum(-distances, 0))


def find_label_errors(
    probabilities: np.ndarray, neighbors: Neighbors, labels: np.ndarray, odds: float = 20.0
) -> pd.DataFrame:
    """Find images whose label is probably wrong.

    The ten nearest images of other units vote for their labels, weighted by their cosines; those
    whose own label is doubtful vote for the class that beats it. A label is an error if another
    class has more than `odds` times its probability, in the geometric mean of probabilities and
    votes.
    Of a model near chance, nothing is believed.

    Parameters
    ----------
    probabilities : float array [n, classes]
        Of a model that did not learn from these images.
    neighbors : Neighbors
    labels : int array [n]
    odds : float, default=20

    Returns
    -------
    errors : DataFrame
        ``row`` (position in the arrays), ``score`` (the probability of the suggestion divided by
        that of the label) and ``suggestion`` (a class), the highest score first.

    Notes
    -----
    Precision and recall on planted errors, beside those of cleanlab: `tests/benchmarks/audit.py`.
    """
    if is_near_chance(probabilities, labels):
        return pd.DataFrame({"row": [0], "score": [0.0], "suggestion": [0]})[:0]
    nearest, cosines = (part[:, :_NEIGHBORS] for part in neighbors)
    votes = labels
    for _ in range(2):  # the second time, with corrected votes
        own, best, other = _judge(probabilities, labels, votes[nearest], cosines)
        votes = np.where(best - own > _DOUBT, other, labels)
    score = best / own
    rows = np.flatnonzero(score > odds)
    errors = pd.DataFrame({"row": rows, "score": score[rows], "suggestion": other[rows]})
    return errors.sort_values("score", ascending=False, kind="stable", ignore_index=True)


def is_near_chance(probabilities: np.ndarray, labels: np.ndarray) -> bool:
    """Tell whether a model may be no better than to name the most frequent class each time.

    It is so if the 95 % interval of its accuracy is not above the share of that class: what it says
    against a label then comes from the frequencies of the classes, or from noise.
    """
    correct = (probabilities.argmax(1) == labels).sum()
    low, _ = clopper_pearson(correct, len(labels))
    return bool(low <= np.bincount(labels).max() / len(labels))


def find_outliers(neighbors: Neighbors, labels: np.ndarray) -> pd.DataFrame:
    """Find images that are far from every class.

    The distance of an image is 1 minus the cosine to its 50th nearest of other units; in a class of
    fewer than 100 images, to as many as half of them, so that no rare class is far from itself. An
    outlier is one whose logarithm exceeds the median of its class by 3 robust standard deviations
    (1.4826 times the median absolute deviation).

    Parameters
    ----------
    neighbors : Neighbors
        Fifty of each image, or as many as there are.
    labels : int array [n]

    Returns
    -------
    outliers : DataFrame
        ``row`` (position in the arrays) and ``score`` (the robust standard deviations), the highest
        score first.

    References
    ----------
    Sun, Ming, Zhu, Li: Out-of-distribution detection with deep nearest neighbors, ICML 2022.
    """
    cosines = neighbors.cosines
    half = np.bincount(labels)[labels] // 2
    place = np.clip(half, 1, cosines.shape[1]) - 1
    distances = np.log(np.maximum(1 - cosines[np.arange(len(labels)), place], _LEAST))
    middle = pd.Series(distances).groupby(labels).transform("median").to_numpy()
    excess = distances - middle
    deviation = 1.4826 * np.median(np.abs(excess))
    score = excess / max(deviation, _LEAST)
    rows = np.flatnonzero((score > _FAR) & (deviation > _LEAST))
    outliers = pd.DataFrame({"row": rows, "score": score[rows]})
    return outliers.sort_values("score", ascending=False, kind="stable", ignore_index=True)


def _judge(
    probabilities: np.ndarray, labels: np.ndarray, votes: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the probability of the label, that of the best other class, and this class: [n] each.

    `votes` are the classes that neighbors vote for, int [n, k], and `weights` those of the votes.
    """
    classes = probabilities.shape[1]
    judged = []
    for rows in _chunks(len(labels), classes):
        shape = len(labels[rows]), classes
        place = np.arange(shape[0])
        cells = place[:, None] * classes + votes[rows]
        counted = np.bincount(cells.ravel(), weights[rows].ravel(), shape[0] * classes)
        counted = counted.reshape(shape)
        counted += _SMOOTHING * np.maximum(counted.sum(1, keepdims=True), _LEAST)
        both = np.sqrt(np.clip(probabilities[rows], _LEAST, 1) * counted)
        both /= both.sum(1, keepdims=True)
        judged.append(_compare(both, labels[rows]))
    own, best, other = (np.concatenate(parts) for parts in zip(*judged, strict=True))
    return own, best, other


def _compare(
    probabilities: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the probability of the label, that of the best other class, and this class."""
    rows = np.arange(len(labels))
    others = probabilities.copy()
    others[rows, labels] = -1
    other = others.argmax(1)
    return probabilities[rows, labels], others[rows, other], other


def cross_validate(
    features: np.ndarray, labels: np.ndarray, units: np.ndarray, classes: int
) -> np.ndarray:
    """Return out-of-fold probabilities of a logistic regression: float32 [n, classes].

    The fold of an image follows from its unit's number alone. After a first fit, labels that other
    classes exceed by far are left out, and the regression is fitted once more. A class that a fold
    has for itself can't be learned: there, it gets the highest probability of the others, so that
    no label of it is taken for an error.

    Parameters
    ----------
    features : float array [n, d]
    labels : int array [n]
    units : int array [n]
    classes : int
        The number of classes, some of which may have no image.
    """
    from sklearn.exceptions import ConvergenceWarning  # a second, which `audit --apply` saves
    from sklearn.linear_model import LogisticRegression

    vectors, folds = _standardize(features), folds_of(units)
    models = {
        fold: LogisticRegression(
            C=_INVERSE_PENALTY, max_iter=_ITERATIONS, tol=1e-3, warm_start=True
        )
        for fold in np.unique(folds)
    }
    probabilities = np.empty((len(labels), classes), np.float32)

    def judge(fold: int, is_doubtful: np.ndarray) -> None:
        held_out, train = folds == fold, folds != fold
        trusted = train & ~is_doubtful
        # A class of which nothing would be left keeps all.
        trusted |= train & ~np.isin(labels, labels[trusted])
        probabilities[held_out] = _fit_and_predict(
            models[fold], vectors, labels, trusted, held_out, classes
        )

    is_doubtful = np.zeros(len(labels), bool)
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        for words in ("first fit", "second fit"):
            _in_threads(partial(judge, is_doubtful=is_doubtful), [*models], words)
            own, best, _ = _compare(probabilities, labels)
            is_doubtful = best - own > _DOUBT
    return probabilities


def _fit_and_predict(
    model: "LogisticRegression",
    vectors: np.ndarray,
    labels: np.ndarray,
    train: np.ndarray,
    held_out: np.ndarray,
    classes: int,
) -> np.ndarray:
    """Return the probabilities of the images held out, float32 [images, classes]."""
    known = np.unique(labels[train])
    if len(known) < 2:  # nothing to tell apart
        return np.full((held_out.sum(), classes), 1 / classes, np.float32)
    model.fit(vectors[train], labels[train])
    learned = model.predict_proba(vectors[held_out])
    probabilities = np.repeat(learned.max(1, keepdims=True), classes, axis=1)
    probabilities[:, known] = learned
    return probabilities / probabilities.sum(1, keepdims=True)


def _standardize(features: np.ndarray) -> np.ndarray:
    """Return float32 features of mean 0 and equal variance, as vectors of mean square length 1."""
    vectors = np.array(features, np.float32)
    vectors -= vectors.mean(0)
    deviations = vectors.std(0)
    is_constant = deviations <= 1e-6 * deviations.max()
    vectors /= np.where(is_constant, np.inf, deviations * vectors.shape[1] ** 0.5)
    return vectors


def folds_of(units: np.ndarray) -> np.ndarray:
    """Return the fold of each unit, by a multiplicative hash of its number (Knuth): int [n]."""
    mixed = units.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed >> np.uint64(32)).astype(np.int64) % FOLDS


def _in_threads(function: Callable[[Any], Any], tasks: list[Any], label: str) -> list[Any]:
    """Return the results of tasks, in order; NumPy does their work without Python's lock."""
    with ThreadPoolExecutor(cpu_count()) as pool:
        results = pool.map(function, tasks)
        return list(progress(results, total=len(tasks), unit="part", label=label))


def _chunks(rows: int, width: int) -> Iterator[slice]:
    """Yield slices of rows that have as many numbers as are computed at once."""
    size = max(_CHUNK // width, 1)
    for start in range(0, rows, size):
        yield slice(start, start + size)
