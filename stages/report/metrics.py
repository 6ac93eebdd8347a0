"""Metrics of predictions. Pure functions: arrays in, numbers and tables out.

Throughout, ``labels`` is an int array [n] of positions in the list of classes, and
``probabilities`` a float array [n, classes] whose rows sum to 1.
"""

import numpy as np
import pandas as pd
from sklearn import metrics

from stages.report.binomial import clopper_pearson

BINS = 15  # of equal width, as in Guo et al.
_CURVE_POINTS = 60


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Count images by true class (rows) and predicted class (columns); int64 [classes, classes]."""
    return metrics.confusion_matrix(labels, predicted, labels=range(classes))


def class_scores(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return precision, recall and F1 of each class of a confusion matrix; NaN if undefined."""
    true, predicted = np.nonzero(matrix)
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        true,
        predicted,
        labels=range(len(matrix)),
        sample_weight=matrix[true, predicted],
        zero_division=np.nan,
    )
    return precision, recall, f1


def averages(matrix: np.ndarray) -> dict[str, float]:
    """Return balanced accuracy, and macro and weighted averages of precision, recall and F1.

    ``macro`` weighs the classes that occur (as label or as prediction) equally, ``weighted`` by
    their support. A score whose denominator is 0 counts as 0. Balanced accuracy is the mean recall
    of the classes that have images.
    """
    true, predicted = np.nonzero(matrix)
    values = {"balanced_accuracy": float(np.nanmean(class_scores(matrix)[1]))}
    for average in ("macro", "weighted"):
        precision, recall, f1, _ = metrics.precision_recall_fscore_support(
            true,
            predicted,
            sample_weight=matrix[true, predicted],
            average=average,
            zero_division=0,
        )
        values[f"precision_{average}"] = float(precision)
        values[f"recall_{average}"] = float(recall)
        values[f"f1_{average}"] = float(f1)
    return values


def brier_score(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean squared distance to the one-hot encoded label, from 0 (best) to 2.

    Brier: Verification of forecasts expressed in terms of probability, Monthly Weather Review 78,
    1950.
    """
    classes = range(probabilities.shape[1])
    probabilities = probabilities.astype(np.float64)  # float32 sums to 1 not well enough
    normalized = probabilities / probabilities.sum(1, keepdims=True)
    return float(metrics.brier_score_loss(labels, normalized, labels=classes, scale_by_half=False))


def top_k_accuracy(probabilities: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Return the share of images whose label is among the k most probable; 3 classes or more."""
    classes = range(probabilities.shape[1])
    return float(metrics.top_k_accuracy_score(labels, probabilities, k=k, labels=classes))


def reliability(probabilities: np.ndarray, labels: np.ndarray) -> pd.DataFrame:
    """Return the reliability diagram: accuracy against confidence, in bins of equal width.

    The table has a row for each of the bins (m - 1)/15 < confidence <= m/15 that contains images:
    mean ``confidence`` (probability of the predicted class), ``accuracy``, its 95 % interval
    ``low`` and ``high``, ``images``.
    """
    confidence = probabilities.max(1).astype(np.float64)
    is_correct = probabilities.argmax(1) == labels
    bin_of = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    images = np.bincount(bin_of, minlength=BINS)
    correct = np.bincount(bin_of, is_correct, minlength=BINS)
    total = np.bincount(bin_of, confidence, minlength=BINS)
    filled = images > 0
    images, correct, total = images[filled], correct[filled], total[filled]
    low, high = clopper_pearson(correct, images)
    return pd.DataFrame(
        {
            "confidence": total / images,
            "accuracy": correct / images,
            "low": low,
            "high": high,
            "images": images,
        }
    )


def accuracy_by_coverage(probabilities: np.ndarray, labels: np.ndarray) -> pd.DataFrame:
    """Return the accuracy-coverage curve: accuracy if only the most confident are accepted.

    The table has a row for each percent of the images, the most confident first: ``coverage`` (the
    share that is accepted), ``accuracy`` of these, and the lowest ``confidence`` among them.

    El-Yaniv, Wiener: On the foundations of noise-free selective classification, JMLR 2010.
    """
    confidence = probabilities.max(1).astype(np.float64)
    order = np.argsort(-confidence, kind="stable")
    accuracy = (probabilities.argmax(1) == labels)[order].cumsum() / np.arange(1, len(order) + 1)
    last = np.unique(np.ceil(np.linspace(0.01, 1, 100) * len(order)).astype(int)) - 1
    return pd.DataFrame(
        {
            "coverage": (last + 1) / len(order),
            "accuracy": accuracy[last],
            "confidence": confidence[order[last]],
        }
    )


def confidence_threshold(
    probabilities: np.ndarray, labels: np.ndarray, accuracy: float = 0.99
) -> float:
    """Return the lowest confidence threshold that reaches a given accuracy.

    Among the images whose confidence is the threshold or more, this share is classified correctly.
    It is rounded down to four decimals; 0 if all images can be accepted, 1 if not even the most
    confident. The images should be others than those that the network was trained on, and those
    whose result is reported.
    """
    confidence = np.floor(probabilities.max(1).astype(np.float64) * 1e4) / 1e4
    order = np.argsort(-confidence, kind="stable")
    accuracies = (probabilities.argmax(1) == labels)[order].cumsum() / np.arange(1, len(order) + 1)
    is_last = np.diff(confidence[order], append=-1) != 0  # of those with the same confidence
    possible = np.flatnonzero(is_last & (accuracies >= accuracy))
    if not len(possible):
        return 1.0
    return 0.0 if possible[-1] == len(order) - 1 else float(confidence[order[possible[-1]]])


def ece(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the expected calibration error, from 0 (best) to 1.

    It is the mean absolute difference between confidence and accuracy over the bins of
    `reliability`, weighted by their numbers of images. With few images it is above 0 even for a
    perfectly calibrated model.

    Guo, Pleiss, Sun, Weinberger: On calibration of modern neural networks, ICML 2017, equation 3.
    """
    table = reliability(probabilities, labels)
    gaps = (table["confidence"] - table["accuracy"]).abs()
    return float((gaps * table["images"]).sum() / table["images"].sum())


def precision_recall(scores: np.ndarray, positive: np.ndarray) -> tuple[pd.DataFrame, float]:
    """Return the precision-recall curve of one class, thinned, and its average precision.

    The curve has ``recall`` (rising) and ``precision`` at about 60 of the thresholds, evenly spread
    over recall; no value is interpolated. The average precision is the sum over all thresholds of
    precision times the gain in recall, as in scikit-learn. At least one of `positive` is true.
    """
    precision, recall, _ = metrics.precision_recall_curve(positive, scores, drop_intermediate=False)
    precision, recall = precision[-2::-1], recall[-2::-1]  # without the end point at recall 0
    last = int(np.searchsorted(recall, 1.0))  # lower thresholds only lose precision
    steps = np.searchsorted(recall, np.linspace(recall[0], 1.0, _CURVE_POINTS))
    points = np.unique(np.minimum(steps, last))
    average = float(metrics.average_precision_score(positive, scores))
    return pd.DataFrame({"recall": recall[points], "precision": precision[points]}), average


def confused_pairs(matrix: np.ndarray) -> np.ndarray:
    """Return the pairs (true class, predicted class) that were confused, most frequent first.

    An int array [pairs, 2]; ties are ordered by the share of the true class, largest first.
    """
    wrong = matrix - np.diag(np.diag(matrix))
    true, predicted = np.nonzero(wrong)
    count = wrong[true, predicted]
    share = count / matrix.sum(1)[true]
    return np.stack([true, predicted], axis=1)[np.lexsort((-share, -count))]
