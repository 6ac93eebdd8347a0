"""Numbers about predictions. Pure functions: arrays in, numbers and tables out.

Throughout, ``labels`` is an int array [n] of positions in the list of classes, and
``probabilities`` a float array [n, classes] whose rows sum to 1.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import betaincinv
from sklearn import metrics

BINS = 15  # of equal width, as Guo et al. use
_CURVE_POINTS = 60


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Count images by true class (rows) and predicted class (columns); int64 [classes, classes]."""
    return metrics.confusion_matrix(labels, predicted, labels=range(classes))


class PerClass(NamedTuple):
    """Float arrays [classes]; NaN where there is nothing to divide by."""

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray


def per_class(matrix: np.ndarray) -> PerClass:
    """Return precision, recall and F1 of each class from a confusion matrix."""
    true, predicted = np.nonzero(matrix)
    return PerClass(
        *metrics.precision_recall_fscore_support(
            true,
            predicted,
            labels=range(len(matrix)),
            sample_weight=matrix[true, predicted],
            zero_division=np.nan,
        )[:3]
    )


def averages(matrix: np.ndarray) -> dict[str, float]:
    """Return balanced accuracy, and precision, recall and F1 averaged over classes.

    ``macro`` gives each class that occurs (as label or as prediction) the same weight, ``weighted``
    its number of images. What has nothing to divide by counts as 0. Balanced accuracy is the mean
    recall of the classes that have images.
    """
    true, predicted = np.nonzero(matrix)
    values = {"balanced_accuracy": float(np.nanmean(per_class(matrix).recall))}
    for kind in ("macro", "weighted"):
        scores = metrics.precision_recall_fscore_support(
            true,
            predicted,
            sample_weight=matrix[true, predicted],
            average=kind,
            zero_division=0,
        )
        for name, score in zip(PerClass._fields, scores, strict=False):
            values[f"{name}_{kind}"] = float(score)
    return values


def interval(hits: np.ndarray | int, trials: np.ndarray | int) -> tuple:
    """Return lower and upper limit of a share of which `hits` of `trials` were seen.

    It holds the true share in at least 95 % of all cases, whatever share and number are, if
    the trials are independent; so it is rather too wide than too narrow. With no trials: 0 and 1.

    References
    ----------
    Clopper, Pearson: The use of confidence or fiducial limits illustrated in the case of the
    binomial, Biometrika 26, 1934.
    """
    hits, trials, tail = np.asarray(hits), np.asarray(trials), 0.025
    misses = trials - hits
    low = np.where(hits > 0, betaincinv(np.maximum(hits, 1), misses + 1, tail), 0.0)
    high = np.where(misses > 0, betaincinv(hits + 1, np.maximum(misses, 1), 1 - tail), 1.0)
    return low[()], high[()]


def brier_score(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean squared distance to certainty in the true class, from 0 (best) to 2.

    References
    ----------
    Brier: Verification of forecasts expressed in terms of probability, Monthly Weather Review 78,
    1950.
    """
    classes = range(probabilities.shape[1])
    return float(
        metrics.brier_score_loss(labels, _whole(probabilities), labels=classes, scale_by_half=False)
    )


def top_k_accuracy(probabilities: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Return the share of images whose label is among the k most probable, of 3 classes or more."""
    classes = range(probabilities.shape[1])
    return float(metrics.top_k_accuracy_score(labels, probabilities, k=k, labels=classes))


def reliability(probabilities: np.ndarray, labels: np.ndarray) -> pd.DataFrame:
    """Compare confidence (the probability of the predicted class) with how often it is right.

    Returns
    -------
    table : DataFrame
        A row for each of the bins (m - 1)/15 < confidence <= m/15 that holds images: mean
        ``confidence``, ``accuracy``, its 95 % interval ``low`` and ``high``, ``images``.
    """
    confidence = probabilities.max(1).astype(np.float64)
    right = probabilities.argmax(1) == labels
    bin_of = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    images = np.bincount(bin_of, minlength=BINS)
    hits = np.bincount(bin_of, right, minlength=BINS)
    total = np.bincount(bin_of, confidence, minlength=BINS)
    filled = images > 0
    images, hits, total = images[filled], hits[filled], total[filled]
    low, high = interval(hits, images)
    return pd.DataFrame(
        {
            "confidence": total / images,
            "accuracy": hits / images,
            "low": low,
            "high": high,
            "images": images,
        }
    )


def ece(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean gap between confidence and accuracy, over the bins of `reliability`.

    Each bin weighs as much as it holds images. 0 is best. With few images the value is above 0
    even where the confidence is right.

    References
    ----------
    Guo, Pleiss, Sun, Weinberger: On calibration of modern neural networks, ICML 2017, equation 3.
    """
    table = reliability(probabilities, labels)
    gaps = (table["confidence"] - table["accuracy"]).abs()
    return float((gaps * table["images"]).sum() / table["images"].sum())


def precision_recall(scores: np.ndarray, positive: np.ndarray) -> tuple[pd.DataFrame, float]:
    """Return the precision-recall curve of one class, thinned, and its average precision.

    Parameters
    ----------
    scores : float array [n]
    positive : bool array [n]
        At least one is true.

    Returns
    -------
    curve : DataFrame
        ``recall`` (rising) and ``precision`` at about 60 of the thresholds, evenly spread over
        recall; no value is interpolated.
    average_precision : float
        The sum over all thresholds of precision times the gain in recall, as in scikit-learn.
    """
    precision, recall, _ = metrics.precision_recall_curve(positive, scores, drop_intermediate=False)
    precision, recall = precision[-2::-1], recall[-2::-1]  # without the point of no images
    all_found = int(np.searchsorted(recall, 1.0))  # what comes later only loses precision
    steps = np.searchsorted(recall, np.linspace(recall[0], 1.0, _CURVE_POINTS))
    kept = np.unique(np.minimum(steps, all_found))
    average = float(metrics.average_precision_score(positive, scores))
    return pd.DataFrame({"recall": recall[kept], "precision": precision[kept]}), average


def confused_pairs(matrix: np.ndarray) -> np.ndarray:
    """Return (true class, predicted class) of the mistakes that occur, the most frequent first.

    int array [pairs, 2]. Of equal counts, the larger share of the true class comes first.
    """
    wrong = matrix - np.diag(np.diag(matrix))
    true, predicted = np.nonzero(wrong)
    count = wrong[true, predicted]
    share = count / matrix.sum(1)[true]
    return np.stack([true, predicted], axis=1)[np.lexsort((-share, -count))]


def label_suspects(probabilities: np.ndarray, labels: np.ndarray) -> pd.DataFrame:
    """Find images whose label the model doubts, by its self-confidence.

    An image is suspect if its label is less than a fifth as probable as an even share among the
    classes. So the probabilities should be calibrated.

    Parameters
    ----------
    probabilities : float array [n, classes]
        Of images that did not train the model.
    labels : int array [n]

    Returns
    -------
    suspects : DataFrame
        ``row`` (position in the arrays), ``likely`` (the most probable class) and ``score``, the
        probability of the label; the least probable, so the best candidates, first.

    References
    ----------
    Northcutt, Jiang, Chuang: Confident learning: estimating uncertainty in dataset labels, JAIR
    70, 2021. Kuan, Mueller: Model-agnostic label quality scoring to detect real-world label errors,
    ICML DataPerf workshop, 2022. The score is theirs; where to end the list was measured on
    planted errors, where it gave more of them among fewer candidates than the confident joint.
    """
    own = _of_labels(probabilities, labels)
    row = np.flatnonzero(own < 0.2 / probabilities.shape[1])
    row = row[np.argsort(own[row], kind="stable")]
    likely = probabilities[row].argmax(1) if len(row) else np.zeros(0, int)
    return pd.DataFrame({"row": row, "likely": likely, "score": own[row]})


def _of_labels(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return probabilities[np.arange(len(labels)), labels].astype(np.float64)


def _whole(probabilities: np.ndarray) -> np.ndarray:
    """Float32 rows sum to 1 only nearly, which scikit-learn minds."""
    probabilities = probabilities.astype(np.float64)
    return probabilities / probabilities.sum(1, keepdims=True)
