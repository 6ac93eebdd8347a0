"""Terminal output of evaluate."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from stages.data.arrays import ImageSpec, read_index
from stages.data.checks import list_unreadable
from stages.data.corrections import FILE
from stages.data.dataset import describe_skipped
from stages.data.labeled import NO_CLASS
from stages.data.splits import DUPLICATE, LABEL_CONFLICT, NEAR_DUPLICATE
from stages.display.notes import note_lines
from stages.display.status import git
from stages.run import cli


def print_result(
    sentences: Mapping[str, str],
    values: Mapping[str, Any],
    index: pd.DataFrame,
    dataset: str,
    folder: Path,
) -> None:
    """Print the result of evaluate in a few lines.

    Parameters
    ----------
    sentences : mapping
        As `stages.report.verdict.verdict` returns them.
    values : mapping
        The metrics, as evaluate.json and evaluate_details.json have them.
    index : DataFrame
        As `stages.data.arrays.read_index` returns it.
    dataset : str
        The folder of the images; may be empty.
    folder : path
        Where the results are.
    """
    rows = dict(sentences)
    repeats = index["exclusion_reason"].isin([DUPLICATE, NEAR_DUPLICATE]).sum()
    is_training = (index["split"] == "train").any()
    if repeats and not is_training:  # of a labeled folder
        rows["result"] += f"; {cli.count(int(repeats), 'duplicate')} of these do not count"
    if "accuracy_old_labels" in values:
        rows["old labels"] = (
            f"{100 * values['accuracy_old_labels']:.1f} % right before corrections, which relabeled"
            f" {values['relabeled_images']:,} of these images and dropped"
            f" {values['dropped_images']:,}: corrections that a model proposed favor it"
        )
    if is_training and 0 < (threshold := values.get("threshold", 1.0)) < 1:
        value = math.ceil(100 * threshold) / 100
        rows["unsure"] = (
            f"at a confidence of {value:.2f} or more, 99 % of the val images are right;"
            f" `python -m stages predict --threshold {value:.2f}` marks the others"
        )
    tracked = [dataset, f"{dataset}.dvc"] if dataset else []
    if tracked and (date := git("log", "-1", "--format=%cs", "--", *tracked)):
        status = git("status", "--porcelain", "--no-renames", "-z", "--", *tracked, FILE)
        edited = [entry.strip().partition(" ")[2].strip() for entry in status.split("\0")]
        rows["data"] = f"{dataset}, of {date}"
        if any(edited):
            rows["data"] += f", and changed since: {cli.list_names(filter(None, edited))}"
    rows["see"] = f"{folder / 'plots'}, {folder / 'mistakes.csv'}, {folder / 'label_errors.csv'}"
    if is_training:
        rows["see"] = f"`dvc plots show --open` (a page); {folder}/ (tables and figures)"
    cli.summary("evaluate: done", rows)


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
