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
from stages.model.model_file import Learned
from stages.report import metrics
from stages.report.binomial import clopper_pearson

IMAGES_OF = {"test": "test images", "val": "validation images"}


def image_table(
    index: pd.DataFrame,
    splits: Mapping[str, Split],
    probabilities: np.ndarray,
    classes: Sequence[str],
) -> pd.DataFrame:
    """Return the table of images.

    `index` is as `stages.data.arrays.read_index` returns it, and `probabilities` are those of all
    splits, one split after the other. Columns: ``path``, ``was`` (as in the index), ``split``,
    ``array_index`` (position in the split), ``class`` and ``predicted`` (names), ``label`` and
    ``predicted_label`` (positions in the list of classes), ``confidence`` (probability of the
    predicted class), ``label_probability``.
    """
    index = index[index["array_index"].notna()].sort_values("array_index")
    rows = [index[index["split"] == name] for name in splits]
    images = pd.concat(rows, ignore_index=True)[["path", "was", "split", "array_index"]]
    names = np.array(classes, object)
    labels = np.concatenate([split.labels for split in splits.values()])
    predicted = probabilities.argmax(1)
    images["array_index"] = images["array_index"].astype(int)
    images["class"] = names[labels]
    images["predicted"] = names[predicted]
    images["label"] = labels
    images["predicted_label"] = predicted
    images["confidence"] = probabilities.max(1)
    images["label_probability"] = probabilities[np.arange(len(labels)), labels]
    return images


def is_learned(
    images: pd.DataFrame, index: pd.DataFrame, duplicates: pd.DataFrame, learned: Learned
) -> np.ndarray:
    """Return which rows of the image table a backbone has learned from: bool [n].

    That is, from the image itself, or from one that is its near duplicate, which is excluded today.
    Of images in val, those do not count that were in val before. `duplicates` is duplicates.csv.
    """
    known = np.array([int(digest[:16] or "0", 16) for digest in index["digest"]], np.uint64)
    found = []
    for keys in learned:
        paths = set(index["path"][np.isin(known, keys)])
        for one, other in (("path", "other_path"), ("other_path", "path")):
            paths |= set(duplicates[other][duplicates[one].isin(paths)])
        found.append(images["path"].isin(paths).to_numpy())
    trained, validated = found
    return trained | (validated & (images["split"] == "test").to_numpy())


def worst_mistakes(images: pd.DataFrame) -> pd.DataFrame:
    """Return the wrong ones among rows of the image table, the least probable label first."""
    wrong = images[images["predicted_label"] != images["label"]]
    return wrong.sort_values("label_probability", kind="stable")


def mistake_table(images: pd.DataFrame) -> pd.DataFrame:
    """Return mistakes.csv for rows of the image table."""
    columns = ["path", "class", "predicted", "confidence", "label_probability"]
    return _round_probabilities(worst_mistakes(images)[columns])


def label_errors(images: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the image table that `find_label_errors` found, with score, suggestion."""
    errors = images.iloc[found["row"]].reset_index(drop=True)
    return errors.join(found[["score", "suggestion"]])


def label_error_table(errors: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    """Return label_errors.csv for what `label_errors` returned."""
    suggestion = np.array(classes, object)[errors["suggestion"]]
    table = errors[["path", "split", "class"]].assign(suggestion=suggestion)
    return table.assign(score=errors["score"].round(1))


def _round_probabilities(table: pd.DataFrame) -> pd.DataFrame:
    """Round to three significant digits: most are close to 0."""
    return table.assign(label_probability=[float(f"{p:.3g}") for p in table["label_probability"]])


def prediction_table(
    images: pd.DataFrame, probabilities: np.ndarray, classes: Sequence[str]
) -> pd.DataFrame:
    """Return predictions.csv: in the order of paths, with the probability of each class."""
    columns = [f"p:{name}" for name in classes]
    table = images[["path", "class", "predicted", "confidence"]]
    table = table.join(pd.DataFrame(probabilities, columns=columns, index=table.index))
    return table.sort_values("path", kind="stable")


def class_table(
    matrix: np.ndarray, probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str]
) -> pd.DataFrame:
    """Return the scores of each class as per_class.csv has them; NaN where they are undefined.

    `matrix` is the confusion matrix.
    """
    precision, recall, f1 = metrics.class_scores(matrix)
    support = matrix.sum(1)
    low, high = clopper_pearson(np.diag(matrix), support)
    wrong = matrix - np.diag(np.diag(matrix))
    average_precision = np.full(len(classes), np.nan)
    for label in np.flatnonzero(support):
        curve = metrics.precision_recall(probabilities[:, label], labels == label)
        average_precision[label] = curve[1]
    return pd.DataFrame(
        {
            "class": classes,
            "support": support,
            "precision": precision,
            "recall": recall,
            "recall_low": low,
            "recall_high": high,
            "f1": f1,
            "average_precision": average_precision,
            "top_confusion": np.where(wrong.any(1), np.array(classes, object)[wrong.argmax(1)], ""),
            "top_confusion_count": wrong.max(1),
        }
    )


def curve_table(
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


def summary_table(
    values: Mapping[str, Any], index: pd.DataFrame, spec: ImageSpec, dataset: str, weights: int
) -> pd.DataFrame:
    """Return summary.csv, the top of the page of plots: what was evaluated, and the result.

    `values` are the metrics, `dataset` is its name (if it is empty, there is no line for it), and
    `weights` the number of weights of the network. Columns ``name`` and ``value`` are text. The
    version of the dataset is a hash of the contents and classes of its images, whatever their
    names.
    """
    interval = "none: these images were used to choose the epoch"
    if "accuracy_low" in values:
        low, high = values["accuracy_low"], values["accuracy_high"]
        interval = f"{100 * low:.2f} to {100 * high:.2f} %"
    old = ""
    if "accuracy_old_labels" in values:
        old = f"{100 * values['accuracy_old_labels']:.2f} % with the labels before corrections"
    images = values["images"]
    wrong = round((1 - values["accuracy"]) * images)
    counts = index["split"].where(index["array_index"].notna(), "excluded").value_counts()
    kinds = [f"{counts[kind]:,} {kind}" for kind in (*SPLITS, "excluded") if kind in counts]
    contents = sorted(index["digest"] + " " + index["class"])
    version = hashlib.sha256("\n".join(contents).encode()).hexdigest()[:8]
    rows = {
        "accuracy": f"{100 * values['accuracy']:.2f} %",
        "95 % interval": interval,
        "with old labels": old,
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
