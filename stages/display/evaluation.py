"""Terminal output of evaluate."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.data.arrays import ImageSpec, read_index
from stages.data.checks import list_unreadable
from stages.data.dataset import describe_skipped
from stages.data.labeled import NO_CLASS
from stages.data.splits import DUPLICATE, LABEL_CONFLICT, NEAR_DUPLICATE
from stages.display.notes import note_lines
from stages.report.tables import IMAGES_OF
from stages.run import cli


def print_result(
    values: Mapping[str, Any],
    scores: pd.DataFrame,
    matrix: np.ndarray,
    pairs: np.ndarray,
    index: pd.DataFrame,
    label_errors: int | None,
    folder: Path,
) -> None:
    """Print the result of evaluate in a few lines.

    Parameters
    ----------
    values : mapping
        The metrics, as evaluate.json and evaluate_details.json have them.
    scores : DataFrame
        Of each class, as per_class.csv has them.
    matrix : int array [classes, classes]
        The confusion matrix.
    pairs : int array [pairs, 2]
        True and predicted class of all confusions, the most frequent first.
    index : DataFrame
        As `stages.data.arrays.read_index` returns it.
    label_errors : int, optional
        How many were found; None for a model near chance, of which nothing is believed.
    folder : path
        Where the results are.
    """
    images = f"{values['images']:,} {IMAGES_OF[values['split']]}"
    if values.get("in_sample"):
        note = f"{images}; optimistic: used to choose the epoch, since there is no test split"
    else:
        low, high = values["accuracy_low"], values["accuracy_high"]
        note = f"95 % interval {low:.4f} to {high:.4f}, {images}"
    names = scores["class"]
    confusions = [
        f"{names[true]!r} as {names[other]!r} ({matrix[true, other]} of {matrix[true].sum()})"
        for true, other in pairs[:3]
    ]
    worst = scores.iloc[int(np.nanargmin(scores["recall"]))]
    splits = index["split"][index["array_index"].notna()]
    training = int((splits == "train").sum())
    repeats = index["exclusion_reason"].isin([DUPLICATE, NEAR_DUPLICATE]).sum()
    if repeats and not training:  # of a labeled folder
        note += f"; {cli.count(int(repeats), 'duplicate')} of these do not count"
    checked = f"{label_errors or 0:,} of {len(splits) - training:,} held-out images"
    if training:
        checked += "; `python -m stages audit` checks all images"
    if label_errors is None:
        checked = (
            "none listed: this model may be no better than one that always names the most frequent"
            " class"
        )
    rows = {
        "accuracy": f"{values['accuracy']:.4f} ({note})",
        "top confusions": ", ".join(confusions) or "none",
        "lowest recall": f"{worst['class']!r}: {worst['recall']:.1%} of {worst['support']}",
        "label errors": checked,
        "see": f"{folder / 'plots'}, {folder / 'mistakes.csv'}, {folder / 'label_errors.csv'}",
    }
    if "accuracy_old_labels" in values:
        rows["old labels"] = (
            f"{values['accuracy_old_labels']:.4f} with the labels before corrections"
            f" ({values['relabeled_images']:,} of these images relabeled, and"
            f" {values['dropped_images']:,} dropped); where a model's doubts chose what to correct,"
            " the accuracy above is optimistic"
        )
    if "threshold" in values:
        rows["unsure"] = _explain_threshold(values)
    cli.summary("evaluate: done", rows)


def _explain_threshold(values: Mapping[str, Any]) -> str:
    """Say how many predictions a threshold accepts, and how many of these are right."""
    if values["threshold"] == 0:
        return "none: 99 % of the validation images are right, whatever the confidence"
    if "accepted_accuracy" not in values:
        return "all: no confidence is high enough for 99 % accuracy on validation"
    accepted = cli.count(values["accepted"], "prediction")
    return (
        f"{1 - values['coverage']:.1%} below a confidence of {values['threshold']}; the others:"
        f" {accepted}, {values['accepted_accuracy']:.1%} right (see predict --threshold)"
    )


def print_remarks(
    folder: Path, index: pd.DataFrame, skipped: pd.DataFrame, spec: ImageSpec, trained: Path
) -> None:
    """Print what to know about a labeled folder, if anything: what is missing or was left out.

    `index` and `skipped` are the folder's, as `read_folder` returns them; `spec` is the model's,
    and `trained` the path of the index of the images that the model was trained with, which need
    not exist.
    """
    lines = {}
    reason = index["exclusion_reason"]
    if missing := sorted(set(spec.classes) - set(index["class"][reason == ""])):
        names = cli.list_names(missing)
        lines["missing"] = f"no images of {len(missing)} of {len(spec.classes)} classes: {names}"
    if (unknown := reason == NO_CLASS).any():
        folders = sorted({path.partition("/")[0] for path in index["path"][unknown]})
        lines["left out"] = (
            f"{unknown.sum():,} outside of the model's classes: {cli.list_names(folders)}"
        )
    if (conflicts := reason == LABEL_CONFLICT).any():
        lines["two labels"] = (
            f"{conflicts.sum():,} images, left out: identical to one of another class:"
            f" {cli.list_names(index['path'][conflicts])}"
        )
    is_repeat = reason.isin([DUPLICATE, NEAR_DUPLICATE])
    if (unread := (reason != "") & ~unknown & ~conflicts & ~is_repeat).any():
        named = list_unreadable(index["path"][unread], reason[unread])
        lines["unreadable"] = f"{unread.sum():,}, left out: {named}"
    lines |= describe_skipped(skipped, index)
    lines |= note_lines(index["notes"].to_numpy(), index["path"].tolist(), spec.white_level)
    if trained.is_file():
        known = read_index(trained)
        digests = known["digest"][known["split"].isin(["train", "val"])]
        if seen := int(index["digest"][reason == ""].isin(digests).sum()):
            lines["WARNING"] = (
                f"{seen:,} of {(reason == '').sum():,} were seen in training or validation"
                f" ({trained}): the numbers are better than those on new images"
            )
    if lines:
        cli.summary(f"images of {folder}", lines)
