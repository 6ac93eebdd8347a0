"""Shortcuts: classes that can be told from what has nothing to do with what is in the picture."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

# Facts that belong together, by what a person calls them.
_GROUPS = {
    "size and shape": ("width", "height", "aspect"),
    "file type and camera": ("format", "mode", "quantization", "camera"),
    "color and brightness": ("red", "green", "blue", "saturation", "darkest", "brightest"),
    "color of the border": ("border_red", "border_green", "border_blue"),
}
_FOLDS, _SHUFFLES = 5, 20
_MARGIN = 0.5
_MAX_IMAGES, _MIN_CLASS_IMAGES = 20_000, 20  # of a dataset that is thinned out, and of its classes
_LEAF_IMAGES, _LEAF_SHARE = 5, 0.05  # a leaf has at least so many, with this share of a class


def shortcuts(facts: pd.DataFrame, labels: np.ndarray, classes: Sequence[str]) -> pd.DataFrame:
    """Find classes that can be told from size, file, color or border alone.

    For each group of facts, a small tree that gives all classes the same weight predicts each image
    from the other four fifths of the images. A class counts as told where the share of its images
    that are predicted as such (recall), minus the mean share of other classes' images that are
    mistaken for it, is more than 0.5 above that of any of twenty shuffles of the labels. So a class
    of two needs more than one of ten, and a kind of file that all classes share tells none.

    Parameters
    ----------
    facts : DataFrame
        As `read_facts` returns them.
    labels : int array of shape (n,)
        Positions in `classes`. Classes of fewer than five images are left out.
    classes : sequence of str

    Returns
    -------
    found : DataFrame
        Columns ``class``, ``facts`` (the name of the group), ``recall`` and ``recall_shuffled``
        (mean of the shuffles), the highest recall first.

    Notes
    -----
    Datasets of more than 20,000 images are thinned out to about that number, with a fixed seed.
    """
    rows = _thinned(np.asarray(labels))
    names, codes = np.unique(np.asarray(labels)[rows], return_inverse=True)
    found = []
    if len(names) > 1:
        table = facts.iloc[rows]
        table = table.assign(aspect=table["width"] / table["height"])
        for group, columns in _GROUPS.items():
            values = _numbers(table[list(columns)])
            recall, gain = _scores(values, codes)
            if not (gain > _MARGIN).any():
                continue
            rng = np.random.default_rng(0)
            shuffled = np.array([_scores(values, rng.permutation(codes)) for _ in range(_SHUFFLES)])
            for k in np.flatnonzero(gain > shuffled[:, 1].max(axis=0) + _MARGIN):
                found.append((classes[names[k]], group, recall[k], shuffled[:, 0, k].mean()))
    table = pd.DataFrame(found, columns=["class", "facts", "recall", "recall_shuffled"])
    return table.sort_values("recall", ascending=False, kind="stable", ignore_index=True)


def describe(shortcut: pd.Series) -> str:
    """Return a row of `shortcuts` as a sentence for a person."""
    percent = int(100 * shortcut["recall"])  # 100 % only if it is all of them
    return (
        f"{shortcut['class']} can be told by {shortcut['facts']} alone (recall {percent} %): make"
        " sure that it isn't the camera or the source that is learned"
    )


def _thinned(labels: np.ndarray) -> np.ndarray:
    """Return the rows of classes with enough images; of a large dataset equally many of each."""
    order = np.random.default_rng(0).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    place = np.arange(len(order)) - np.repeat(starts, counts)  # in its class
    most = max(_MIN_CLASS_IMAGES, _MAX_IMAGES // max(1, len(counts)))
    is_kept = (place < most) | (len(order) <= _MAX_IMAGES)
    return np.sort(order[is_kept & np.repeat(counts >= _FOLDS, counts)])


def _numbers(table: pd.DataFrame) -> np.ndarray:
    """Return facts as numbers: for texts, their places in sorted order, so like names are near."""
    columns = [
        column if pd.api.types.is_numeric_dtype(column) else pd.factorize(column, sort=True)[0]
        for _, column in table.items()
    ]
    return np.stack(columns, axis=1).astype(np.float32)


def _scores(values: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each class's recall, and the same minus the share of others mistaken for it."""
    from sklearn.metrics import confusion_matrix
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.tree import DecisionTreeClassifier

    tree = DecisionTreeClassifier(
        min_samples_leaf=_LEAF_IMAGES,
        min_weight_fraction_leaf=_LEAF_SHARE / (codes.max() + 1),
        class_weight="balanced",
        random_state=0,
    )
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=0)
    predicted = cross_val_predict(tree, values, codes, cv=folds)
    shares = confusion_matrix(codes, predicted, normalize="true")
    recall = np.diag(shares)
    return recall, recall - (shares.sum(axis=0) - recall) / (len(shares) - 1)
