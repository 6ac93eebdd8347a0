"""Tables of predictions. Pure functions: arrays in, tables out.

The central one is the table of images: a row for each image of validation and test, in the order
of their arrays, so that row i belongs to row i of ``probabilities``, float [n, classes].
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from stages.data.arrays import SPLITS, ImageSpec, Split
from stages.report import metrics

IMAGES_OF = {"test": "test images", "val": "validation images"}


def image_table(
    index: pd.DataFrame, splits: Mapping[str, Split], probabilities: np.ndarray
) -> pd.DataFrame:
    """Return the table of images.

    Parameters
    ----------
    index : DataFrame
        As `stages.data.arrays.read_index` returns it.
    splits : mapping of str to Split
    probabilities : float array [n, classes]
        Of the images of all splits, one split after the other.

    Returns
    -------
    images : DataFrame
        Columns ``path``, ``split``, ``array_index`` (position in the split), ``label`` and
        ``predicted`` (positions in the list of classes), ``confidence`` (probability of the
        predicted class), ``label_probability``.
    """
    index = index[index["array_index"].notna()].sort_values("array_index")
    rows = [index[index["split"] == name] for name in splits]
    images = pd.concat(rows, ignore_index=True)[["path", "split", "array_index"]]
    labels = np.concatenate([split.labels for split in splits.values()])
    return images.assign(
        array_index=images["array_index"].astype(int),
        label=labels,
        predicted=probabilities.argmax(1),
        confidence=probabilities.max(1),
        label_probability=probabilities[np.arange(len(labels)), labels],
    )


def summary(
    values: Mapping[str, Any], index: pd.DataFrame, spec: ImageSpec, dataset: str, weights: int
) -> pd.DataFrame:
    """Return summary.csv, the top of the page of plots: what was evaluated, and the result.

    Parameters
    ----------
    values : mapping
        The metrics of the evaluate stage.
    index : DataFrame
        As `stages.data.arrays.read_index` returns it.
    spec : ImageSpec
    dataset : str
        Its name; if it is empty, there is no line for it.
    weights : int
        The number of weights of the network.

    Returns
    -------
    summary : DataFrame
        Columns ``name`` and ``value``, both text. The version of the dataset is a hash of the
        contents and classes of its images, whatever their names.
    """
    interval = "none: these images were used to choose the epoch"
    if "accuracy_low" in values:
        low, high = values["accuracy_low"], values["accuracy_high"]
        interval = f"{100 * low:.2f} to {100 * high:.2f} %"
    images = values["images"]
    wrong = round((1 - values["accuracy"]) * images)
    counts = index["split"].where(index["array_index"].notna(), "excluded").value_counts()
    kinds = [f"{counts[kind]:,} {kind}" for kind in (*SPLITS, "excluded") if kind in counts]
    contents = sorted(index["digest"] + " " + index["class"])
    version = hashlib.sha256("\n".join(contents).encode()).hexdigest()[:8]
    rows = {
        "accuracy": f"{100 * values['accuracy']:.2f} %",
        "95 % interval": interval,
        "mistakes": f"{wrong:,} of {images:,} {IMAGES_OF[values['split']]}",
        "balanced accuracy": f"{100 * values['balanced_accuracy']:.2f} %",
        "log loss": f"{values['log_loss']:.4f}",
        "dataset": dataset,
        "dataset version": version,
        "classes": f"{len(spec.classes):,}",
        "images": ", ".join(kinds),
        "image size": f"{' × '.join(map(str, spec.image_shape[:2]))}, {spec.color_mode}",
        "network": f"{weights:,} weights",
    }
    return pd.DataFrame([row for row in rows.items() if row[1]], columns=["name", "value"])


def per_class(
    probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str]
) -> pd.DataFrame:
    """Return the scores of each class, one row per class, as per_class.csv holds them.

    Undefined scores, such as those of a class without images, are NaN.
    """
    matrix = metrics.confusion_matrix(labels, probabilities.argmax(1), len(classes))
    scores, support = metrics.per_class(matrix), matrix.sum(1)
    low, high = metrics.clopper_pearson(np.diag(matrix), support)
    wrong = matrix - np.diag(np.diag(matrix))
    average_precision = np.full(len(classes), np.nan)
    for label in np.flatnonzero(support):
        curve = metrics.precision_recall(probabilities[:, label], labels == label)
        average_precision[label] = curve[1]
    return pd.DataFrame(
        {
            "class": classes,
            "support": support,
            "precision": scores.precision,
            "recall": scores.recall,
            "recall_low": low,
            "recall_high": high,
            "f1": scores.f1,
            "average_precision": average_precision,
            "top_confusion": np.where(wrong.any(1), np.array(classes, object)[wrong.argmax(1)], ""),
            "top_confusion_count": wrong.max(1),
        }
    )


def precision_recall(
    probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str], chosen: Sequence[int]
) -> pd.DataFrame:
    """Return the precision-recall curves of the chosen classes: class, rank, recall, precision."""
    curves = []
    for rank, label in enumerate(chosen, 1):
        curve, _ = metrics.precision_recall(probabilities[:, label], labels == label)
        curve.insert(0, "class", classes[label])
        curve.insert(1, "rank", rank)
        curves.append(curve)
    return pd.concat(curves)


def predictions(
    images: pd.DataFrame, probabilities: np.ndarray, classes: Sequence[str]
) -> pd.DataFrame:
    """Return a row per image in the order of paths, with the probability of each class."""
    names = np.array(classes, object)
    table = images[["path"]].assign(
        **{"class": names[images["label"]]},
        predicted=names[images["predicted"]],
        confidence=images["confidence"],
    )
    columns = [f"p:{name}" for name in classes]
    table = table.join(pd.DataFrame(probabilities, columns=columns, index=table.index))
    return table.sort_values("path", kind="stable")


def mistakes(images: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    """Return mistakes.csv as a table, given rows of the image table: those that are wrong."""
    names = np.array(classes, object)
    wrong = worst_mistakes(images)
    return wrong[["path"]].assign(
        **{"class": names[wrong["label"]]},
        predicted=names[wrong["predicted"]],
        confidence=wrong["confidence"],
        label_probability=[float(f"{p:.3g}") for p in wrong["label_probability"]],
    )


def worst_mistakes(images: pd.DataFrame) -> pd.DataFrame:
    """Return the wrong ones among rows of the image table, the least probable label first."""
    wrong = images[images["predicted"] != images["label"]]
    return wrong.sort_values("label_probability", kind="stable")


def label_suspects(suspects: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    """Return label_suspects.csv as a table, given the suspects' rows of the image table."""
    names = np.array(classes, object)
    return suspects[["path", "split"]].assign(
        **{"class": names[suspects["label"]]},
        suggested_label=names[suspects["predicted"]],
        label_probability=[float(f"{p:.3g}") for p in suspects["label_probability"]],
    )
