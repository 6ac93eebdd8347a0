"""The result in words: what evaluate prints, and what stands on top of the page of plots."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from stages.data.splits import LABEL_CONFLICT
from stages.model.parameters import Train
from stages.report.tables import IMAGES_OF
from stages.run import cli

_TARGETS = (0.9, 0.95, 0.99)  # accuracies
_SMALL_SIDE = 64  # pixels: a backbone helps with larger images
_FEW_ERRORS = 0.03, 0.15  # of the labels, of the mistakes: more are what to look at first
_TRAINED = "try what `train: done` advises, or"  # it sees the curves, this does not
_FEW_IMAGES = 50  # of a class in training


def verdict(
    values: Mapping[str, Any],
    scores: pd.DataFrame,
    coverage: pd.DataFrame,
    index: pd.DataFrame,
    label_errors: int | None,
) -> dict[str, str]:
    """Say in a few sentences how good a model is, and where it is weak.

    Parameters
    ----------
    values : mapping
        The metrics, as evaluate.json and evaluate_details.json have them.
    scores : DataFrame
        Of each class, as `stages.report.tables.class_table` returns them.
    coverage : DataFrame
        As `stages.report.metrics.accuracy_by_coverage` returns it.
    index : DataFrame
        As `stages.data.arrays.read_index` returns it.
    label_errors : int, optional
        How many were found; None for a model near chance, of which nothing is believed.

    Returns
    -------
    sentences : dict of str to str
        By a word that says what they are about.
    """
    images = f"{values['images']:,} {IMAGES_OF[values['split']]}"
    accuracy = f"{_percent(values['accuracy'])} right"
    if values.get("in_sample"):
        accuracy += f" of {images}; optimistic: these also chose the epoch (there is no test split)"
    else:
        low, high = values["accuracy_low"], values["accuracy_high"]
        accuracy += f" (95 % interval: {100 * low:.1f} to {_percent(high)}) of {images}"
    common = scores.iloc[int(scores["support"].argmax())]
    share = common["support"] / values["images"]
    sentences = {
        "result": f"{accuracy}; {common['class']!r} for every image would be {_percent(share)}",
        "weak": _describe_weak(scores, values["accuracy"]),
        "labels": _describe_labels(index, label_errors),
    }
    if by_hand := _describe_coverage(coverage, values):
        sentences["by hand"] = by_hand
    return sentences


def next_step(
    values: Mapping[str, Any],
    scores: pd.DataFrame,
    index: pd.DataFrame,
    label_errors: int | None,
    train: Train,
    image_side: int,
    dataset: str,
) -> str:
    """Say what would help a model most; arguments as for `verdict`.

    `train` are the parameters of training, `image_side` is the shorter side of the network's images
    in pixels, and `dataset` the folder of the images.
    """
    used = index[index["array_index"].notna()]
    if label_errors is None:
        return f"it has learned next to nothing: {_TRAINED} look at the images"
    held_out = (used["split"] != "train").sum()
    mistakes = (1 - values["accuracy"]) * held_out
    few = max(2, _FEW_ERRORS[0] * held_out, _FEW_ERRORS[1] * mistakes)
    if label_errors > few or _count_conflicts(index):
        return "look at the labels: `python -m stages audit`"
    if train.backbone == "none" and image_side > _SMALL_SIDE:
        return "start from a backbone: `python -m stages backbone` lists them"
    if train.backbone != "none" and not train.fine_tune_fraction:
        command = f"python -m stages use {dataset} --quality best"
        return f"fine-tune the backbone: `{command}`, commit, then `dvc repro`"
    weakest = scores["class"].iloc[int(np.nanargmin(scores["recall"]))]
    found = int(((used["split"] == "train") & (used["class"] == weakest)).sum())
    if found < _FEW_IMAGES:
        return f"add images of {weakest!r}: it has {found} for training"
    return f"{_TRAINED} search for better parameters: `python -m stages search --time 2h`"


def _describe_weak(scores: pd.DataFrame, accuracy: float) -> str:
    """Name the classes whose recall is surely below the accuracy; else the one with the lowest."""
    known = scores[scores["support"] > 0].sort_values("recall", kind="stable")
    weak, words = known.iloc[:1], "no class for certain; the lowest is "
    if "recall_high" in known and (is_weak := known["recall_high"] < accuracy).any():
        weak, words = known[is_weak], ""
    texts = []
    for row in weak.to_dict("records"):
        texts.append(
            f"{row['class']!r}, {100 * row['recall']:.0f} % of {row['support']} recognized"
        )
        if row["top_confusion"]:
            texts[-1] += f" (most often taken for {row['top_confusion']!r})"
    return words + cli.list_names(texts)


def _describe_labels(index: pd.DataFrame, label_errors: int | None) -> str:
    """Say how many labels are doubtful or surely wrong."""
    if label_errors is None:
        return "not judged: this model may be no better than the same class for every image"
    used = index[index["array_index"].notna()]
    held_out = (used["split"] != "train").sum()
    text = f"this model doubts {label_errors:,} of {held_out:,} held-out labels"
    if conflicts := _count_conflicts(index):
        text += f"; {cli.count(conflicts, 'picture')} with two labels (identical files), left out"
    return text


def _count_conflicts(index: pd.DataFrame) -> int:
    """Return how many pictures have two labels."""
    return index["digest"][index["exclusion_reason"] == LABEL_CONFLICT].nunique()


def _describe_coverage(coverage: pd.DataFrame, values: Mapping[str, Any]) -> str:
    """Say how many of 100 images a person would have to look at for a higher accuracy."""
    steps = []
    for target in _TARGETS:
        # By the rule of three, of fewer images without a mistake one can't tell.
        is_known = coverage["coverage"] * values["images"] >= 3 / (1 - target)
        reached = coverage["coverage"][is_known & (coverage["accuracy"] >= target)]
        if values["accuracy"] < target - 0.01 and len(reached):  # else it says nothing
            steps.append((math.ceil(round(100 - 100 * reached.max(), 6)), f"{100 * target:.0f} %"))
    if not steps:
        return ""
    (checked, share), *others = steps
    text = f"if a person checks the least confident {checked} of 100 images, {share} of the rest"
    return f"{text} are right" + "".join(f"; of {more}, {share}" for more, share in others)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
