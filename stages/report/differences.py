"""What changed between two versions: of the dataset, of the parameters, of the predictions.

Pure functions: tables and dicts in, tables and dicts out. An image is known by its content, so
renaming it changes nothing, and its position in a split neither.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import bdtr

CHANGES = ("added", "removed", "relabelled", "moved", "left out", "taken in")


def data_changes(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """Compare the images of two versions.

    Parameters
    ----------
    before, after : DataFrame
        As `stages.data.arrays.read_index` gives them.

    Returns
    -------
    changes : DataFrame
        A row per changed image: ``change`` ("added", "removed", "relabelled", "moved" from one
        split to another, "left out" of its split or "taken in" to one), ``path``, ``class_before``,
        ``class_after``, ``split_before``, ``split_after`` (empty where there is none). An image
        that is there several times under one class counts once.
    """
    old, new = _distinct(before), _distinct(after)
    both = old.merge(new, on=["digest", "class"], suffixes=("_before", "_after"))
    kept = both["split_before"], both["split_after"]
    both["change"] = np.select(
        [kept[0] == kept[1], kept[0] == "", kept[1] == ""], ["", "taken in", "left out"], "moved"
    )
    both = both.assign(
        path=both["path_after"], class_before=both["class"], class_after=both["class"]
    )

    shared = both[["digest", "class"]]
    old, new = _without(old, shared), _without(new, shared)
    relabelled = old.merge(new, on="digest", suffixes=("_before", "_after"))
    relabelled = relabelled.drop_duplicates("digest")
    relabelled = relabelled.assign(path=relabelled["path_after"], change="relabelled")
    removed = old[~old["digest"].isin(relabelled["digest"])]
    removed = removed.rename(columns={"class": "class_before", "split": "split_before"})
    added = new[~new["digest"].isin(relabelled["digest"])]
    added = added.rename(columns={"class": "class_after", "split": "split_after"})

    parts = [added.assign(change="added"), removed.assign(change="removed"), relabelled]
    changes = pd.concat([*parts, both[both["change"] != ""]]).fillna("")
    order = changes["change"].map({change: rank for rank, change in enumerate(CHANGES)})
    changes = changes.assign(order=order).sort_values(["order", "path"], kind="stable")
    columns = ["change", "path", "class_before", "class_after", "split_before", "split_after"]
    return changes.reindex(columns=columns).reset_index(drop=True)


def per_class(changes: pd.DataFrame) -> pd.DataFrame:
    """Count the changes of each class; a relabelled image counts for the class that it left.

    Returns
    -------
    counts : DataFrame
        Index: classes with a change, sorted. A column per kind of change that occurs.
    """
    owner = changes["class_before"].where(changes["class_before"] != "", changes["class_after"])
    counts = pd.crosstab(owner.rename("class"), changes["change"].rename(None))
    return counts[[change for change in CHANGES if change in counts]]


def mapping_changes(
    before: Mapping[str, Any], after: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Return the keys whose values differ, with both values; None where there is none."""
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    }


def prediction_changes(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """Join what two versions say of the images that both evaluated under the same class.

    Parameters
    ----------
    before, after : DataFrame
        Columns ``digest``, ``path``, ``class``, ``predicted``, ``confidence``; further ones of
        `after` are kept.

    Returns
    -------
    images : DataFrame
        A row per image: the columns of `after`, ``predicted_before``, ``confidence_before`` and
        ``change``: "fixed", "broke" or empty. The most surely wrong come first.
    """
    old = before.drop_duplicates(["digest", "class"])
    old = old[["digest", "class", "predicted", "confidence"]]
    new = after.drop_duplicates(["digest", "class"])
    images = new.merge(old, on=["digest", "class"], suffixes=("", "_before"))
    was, is_now = (images[name] == images["class"] for name in ("predicted_before", "predicted"))
    images["change"] = np.select([is_now & ~was, was & ~is_now], ["fixed", "broke"], "")
    sure = images["confidence"].where(images["change"] != "fixed", images["confidence_before"])
    order = pd.DataFrame({"sure": -sure, "path": images["path"]}).sort_values(["sure", "path"])
    return images.loc[order.index].reset_index(drop=True)


def verdict(fixed: int, broke: int) -> tuple[float, str]:
    """Return McNemar's exact p-value, and what it means in plain words."""
    p = mcnemar(broke, fixed)
    if fixed + broke == 0:
        return p, "Both versions are right on the same images."
    if p < 0.05:
        better = "better" if fixed > broke else "worse"
        return p, (
            f"More than chance: the later version is {better}. Two equally good models would"
            f" differ by as much in {_odds(p)}."
        )
    return p, (
        f"This can well be chance: two equally good models would differ by as much in {_odds(p)}."
    )


def _odds(p: float) -> str:
    if p < 0.001:
        return "less than 1 of 1,000 comparisons"
    if p < 0.01:
        return f"{1000 * p:.0f} of 1,000 comparisons"
    return f"{100 * p:.0f} of 100 comparisons"


def _distinct(index: pd.DataFrame) -> pd.DataFrame:
    """One row per content and class: the one that is in a split, if any is."""
    known = index[index["digest"] != ""]
    order = (known["split"] == "").sort_values(kind="stable").index
    rows = known.loc[order].drop_duplicates(["digest", "class"])
    return rows[["digest", "class", "split", "path"]]


def _without(rows: pd.DataFrame, known: pd.DataFrame) -> pd.DataFrame:
    keys = pd.MultiIndex.from_frame(rows[["digest", "class"]])
    return rows[~keys.isin(pd.MultiIndex.from_frame(known))]


def mcnemar(broke: int, fixed: int) -> float:
    """Return how often chance alone gives as uneven a pair of counts as this: the exact p-value.

    Parameters
    ----------
    broke, fixed : int
        Images that only the first, or only the second, of two models gets right.

    References
    ----------
    McNemar: Note on the sampling error of the difference between correlated proportions or
    percentages, Psychometrika 12, 1947; the exact form, two-sided, from the binomial distribution.
    """
    return float(min(1.0, 2 * bdtr(min(broke, fixed), broke + fixed, 0.5)))
