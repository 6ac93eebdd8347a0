"""Differences between two versions of the dataset and of the predictions: tables in, tables out.

An image is identified by its content (its digest), so that a renamed file is the same image.
"""

import numpy as np
import pandas as pd

from stages.data.corrections import DROPPED
from stages.report.binomial import mcnemar

CHANGES = ("added", "removed", "relabeled", "moved", "excluded", "included")


def data_changes(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """Compare the images of two versions.

    Parameters
    ----------
    before, after : DataFrame
        As `stages.data.arrays.read_index` returns them.

    Returns
    -------
    changes : DataFrame
        A row per changed image: ``change`` ("added", "removed", "relabeled", "moved" from one
        split to another, "excluded" from its split or "included" in one), ``path``,
        ``class_before``, ``class_after``, ``split_before``, ``split_after`` (empty where there is
        none), ``copy``: whether it was added or removed beside an identical file, ``correction``:
        whether it was relabeled, excluded or included by data/corrections.csv. Other changes count
        several copies of an image in one class once.
    """
    old, new = _distinct(before).add_suffix("_before"), _distinct(after).add_suffix("_after")
    both = old.join(new, how="inner")
    split, new_split = both["split_before"], both["split_after"]
    both["change"] = np.select(
        [split == new_split, split == "", new_split == ""], ["", "included", "excluded"], "moved"
    )
    old, new = old.drop(both.index), new.drop(both.index)
    relabeled = old.merge(new, on="digest")
    relabeled = relabeled[~relabeled.index.duplicated()].assign(change="relabeled")
    removed = old.drop(relabeled.index, level="digest").assign(change="removed")
    added = new.drop(relabeled.index, level="digest").assign(change="added")
    removed["copy"] = removed.index.get_level_values("digest").isin(after["digest"])
    added["copy"] = added.index.get_level_values("digest").isin(before["digest"])
    changes = pd.concat(
        [
            *(added, removed, relabeled, both[both["change"] != ""]),
            _copies(after, before).add_suffix("_after").assign(change="added", copy=True),
            _copies(before, after).add_suffix("_before").assign(change="removed", copy=True),
        ]
    )
    changes["copy"] = changes["copy"].eq(True)
    changes["path"] = changes["path_after"].fillna(changes["path_before"])
    changes["correction"] = changes["change"].isin(["relabeled", "excluded", "included"])
    is_corrected = changes[["correction_before", "correction_after"]].eq(True)
    changes["correction"] &= is_corrected.any(axis=1)
    changes["order"] = changes["change"].map(CHANGES.index)
    changes = changes.sort_values(["order", "path"], kind="stable", ignore_index=True)
    columns = ["change", "path", "class_before", "class_after", "split_before", "split_after"]
    return changes[[*columns, "copy", "correction"]].fillna("")


def _distinct(index: pd.DataFrame) -> pd.DataFrame:
    """Return one row per content and class: one that is in a split, if there is one."""
    known = index[index["digest"] != ""]
    order = (known["split"] == "").sort_values(kind="stable").index
    rows = known.loc[order].drop_duplicates(["digest", "class"])
    is_dropped = rows["exclusion_reason"].str.startswith(DROPPED)
    rows = rows.assign(correction=is_dropped | (rows["was"] != ""))
    rows = rows.set_index(["digest", "class"], drop=False)
    return rows[["class", "split", "path", "correction"]]


def _copies(index: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Return the files of a content and class beyond the first, and beyond those in `other`."""
    known = index[index["digest"] != ""]
    is_new = ~known["path"].isin(other["path"])
    known = known.loc[is_new.sort_values(kind="stable").index]
    keys = known.set_index(["digest", "class"]).index
    in_other = other.groupby(["digest", "class"]).size().reindex(keys, fill_value=0).to_numpy()
    number = known.groupby(["digest", "class"]).cumcount().to_numpy()
    return known.loc[number >= np.maximum(in_other, 1), ["class", "split", "path"]]


def count_by_class(changes: pd.DataFrame) -> pd.DataFrame:
    """Count the changes of each class; a relabeled image counts for the class that it left.

    The index has the classes with a change, sorted; there is a column for each kind of change that
    occurs.
    """
    owner = changes["class_before"].where(changes["class_before"] != "", changes["class_after"])
    counts = pd.crosstab(owner.rename("class"), changes["change"].rename(None))
    return counts[[change for change in CHANGES if change in counts]]


def prediction_changes(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """Join the predictions of two versions for the images that both evaluated with the same label.

    Parameters
    ----------
    before, after : DataFrame
        Columns ``digest``, ``path``, ``class``, ``predicted``, ``confidence``; `after` may have
        more.

    Returns
    -------
    images : DataFrame
        A row per image: the columns of `after`, ``predicted_before``, ``confidence_before`` and
        ``change``: "fixed", "broke" or empty. The most confident mistakes come first.
    """
    old = before.drop_duplicates(["digest", "class"])
    old = old[["digest", "class", "predicted", "confidence"]]
    new = after.drop_duplicates(["digest", "class"])
    images = new.merge(old, on=["digest", "class"], suffixes=("", "_before"))
    was_correct = images["predicted_before"] == images["class"]
    is_correct = images["predicted"] == images["class"]
    images["change"] = np.select(
        [is_correct & ~was_correct, was_correct & ~is_correct], ["fixed", "broke"], ""
    )
    is_fixed = images["change"] == "fixed"
    images["order"] = -images["confidence_before"].where(is_fixed, images["confidence"])
    return images.sort_values(["order", "path"], ignore_index=True).drop(columns="order")


def verdict(fixed: int, broke: int) -> tuple[float, str]:
    """Return the p-value of McNemar's exact test, and its meaning in plain words."""
    p = mcnemar(broke, fixed)
    if fixed + broke == 0:
        return p, "Both versions are correct on the same images."
    if p < 0.001:
        odds = "in fewer than 1 of 1,000 comparisons"
    elif p >= 0.995:
        odds = "always" if p == 1 else "nearly always"
    else:
        odds = f"{1000 * p:.0f} of 1,000" if p < 0.0095 else f"{100 * p:.0f} of 100"
        odds = f"in {odds} comparisons"
    chance = f"equally good models would differ at least this much {odds}."
    if p >= 0.05:
        return p, f"Not significant, it may be chance: two {chance}"
    better = "better" if fixed > broke else "worse"
    return p, f"Statistically significant: the later version is {better}. Two {chance}"
