"""Refuse a dataset from which nothing can be learned, and say what to do about it."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from stages.data.arrays import SPLITS
from stages.data.images import DARK_FRACTION, Note
from stages.data.splits import NEAR_DUPLICATE, TRAIN
from stages.run.cli import UserError, count, list_names

_MANY_PLAIN = 0.5  # fraction of the images of one plain shade above which nothing is learned
_MAX_REASONS = 3  # in a message
_MAX_LISTED = 20  # classes in a message


def check_readable(images: pd.DataFrame, max_fraction: float) -> None:
    """Raise a UserError if too many images can't be read."""
    unreadable = images["content"] < 0
    bad = images[unreadable]
    names = list_unreadable(bad["path"], bad["unreadable"])
    if len(bad) == len(images):
        raise UserError(f"prepare: none of {len(images):,} images can be read: {names}")
    if len(bad) > max_fraction * len(images):
        raise UserError(
            f"prepare: {len(bad):,} of {len(images):,} images can't be read, more than"
            f" prepare.max_unreadable_fraction ({max_fraction:g}) allows; fix or remove them, or"
            f" raise that limit: {names}"
        )
    for split, own in unreadable.groupby(images["own_split"], observed=True):
        if own.all():
            names = list_unreadable(images["path"][own.index], images["unreadable"][own.index])
            raise UserError(
                f"prepare: none of the {len(own)} images of the dataset's own {split} can be read;"
                f" fix them, or remove all of {split}: {names}"
            )


def list_unreadable(paths: Iterable[str], reasons: Iterable[str]) -> str:
    """Name images that can't be read, by reason, the most frequent one first.

    Returns
    -------
    text : str
        For instance ``"a.jpg and 2 more (empty file); b.jpg (truncated)"``.
    """
    groups: dict[str, list[str]] = {}
    for path, reason in zip(paths, reasons, strict=True):
        groups.setdefault(reason, []).append(path)
    ranked = sorted(groups.items(), key=lambda group: -len(group[1]))
    parts = [f"{list_names(own, 1)} ({reason})" for reason, own in ranked[:_MAX_REASONS]]
    if others := sum(len(own) for _, own in ranked[_MAX_REASONS:]):
        parts.append(f"and {others:,} more for other reasons")
    return "; ".join(parts)


def check_white_level(images: pd.DataFrame, white_level: int) -> None:
    """Raise a UserError if all images of more than 8 bits per channel would be almost black."""
    peak = int(images["peak"].max())
    if 0 < peak <= white_level * DARK_FRACTION:
        bits = peak.bit_length()
        raise UserError(
            f"prepare: {np.count_nonzero(images['peak']):,} images have more than 8 bits per"
            f" channel but no value above {peak}, so that they would be almost black; set"
            f" prepare.white_level in params.yaml to the value that is white, for instance"
            f" {2**bits - 1} for {bits} bits (now: {white_level})"
        )


def check_plain(images: pd.DataFrame, thumbnails: np.ndarray) -> None:
    """Raise a UserError if most images are one and the same plain shade."""
    rows = np.flatnonzero(images["notes"].to_numpy() & Note.PLAIN)
    shades = pd.Series(thumbnails[rows].mean(axis=(1, 2)).round(), rows).value_counts()
    if len(shades) and shades.iloc[0] > _MANY_PLAIN * (images["content"] >= 0).sum():
        raise UserError(
            f"prepare: {shades.iloc[0]:,} of {len(images):,} images are one plain shade (level"
            f" {shades.index[0]:.0f} of 255), such as {images['path'].iloc[rows[0]]}, so that"
            " nothing can be learned from them; check how they were saved (if they have more than 8"
            " bits per channel, also prepare.white_level in params.yaml)"
        )


def advise_on_near_duplicates(figure: Path) -> str:
    """Return advice for near duplicates that are really different pictures."""
    return (
        f"Look at the near duplicates in {figure}: if they are different pictures (of a fixed"
        " camera, or simple drawings), set prepare.drop_near_duplicates: false"
    )


def describe_short_classes(images: pd.DataFrame, to_make: list[int], figure: Path) -> str:
    """Say which classes have no image in a split that is made here, and what to do.

    Parameters
    ----------
    images : DataFrame
        With their splits.
    to_make : list of int
        The splits that are made here, as `splits_to_make` returns them.
    figure : Path
        The figure of duplicates.

    Returns
    -------
    problem : str
        Empty if each class has an image in each of these splits.
    """
    required = _required(to_make)
    counts = pd.crosstab(images["class"], images["split"], dropna=False)
    counts = counts.reindex(images["class"].cat.categories, columns=required, fill_value=0)
    short = counts.index[(counts == 0).any(axis=1)]
    if not len(short):
        return ""
    lines, differ, advice = [], "", ""
    for name in short[:_MAX_LISTED]:
        own = images[images["class"] == name]
        usable = own[own["split"].notna()]
        reasons = own["exclusion_reason"].where(own["content"] >= 0, "unreadable")
        excluded = reasons[reasons != ""].value_counts().sort_index()
        groups = usable["group"].where(usable["group"].notna(), usable["digest"]).nunique()
        # Enough images, or groups, that can't be in different splits are near duplicates.
        if NEAR_DUPLICATE in excluded or groups >= len(required):
            advice = f". {advise_on_near_duplicates(figure)}"
        line = f"class {name} has {len(usable)} usable image{'s' * (len(usable) != 1)}"
        if groups < len(usable):
            differ = ", in different groups"
            line += f" in {count(groups, 'group')}"
        why = ", ".join(f"{number} {reason}" for reason, number in excluded.items())
        lines.append(line + (f" (excluded: {why})" if why else ""))
    return f"prepare: {_too_few(lines, len(short), required, differ)}{advice}"


def check_class_sizes(images: pd.DataFrame, to_make: list[int]) -> None:
    """Raise a UserError for classes that can't be in all splits, whatever their images are.

    It is what `describe_short_classes` says for certain before an image is read; `images` are as
    `stages.data.splits.add_groups` returns them.
    """
    required = _required(to_make)
    own = images[images["own_split"].isna() | (images["own_split"] == SPLITS[TRAIN])]
    parts = own["group"].where(own["group"].notna(), own["path"])
    table = parts.groupby(own["class"], observed=False).agg(["size", "nunique"])
    short = table[table["nunique"] < len(required)]
    if len(short):
        is_grouped = bool((short["nunique"] < short["size"]).any())
        lines = [
            f"class {name} has {count(size, 'image')}"
            + f" in {count(groups, 'group')}" * (groups < size)
            for name, size, groups in short.head(_MAX_LISTED).itertuples()
        ]
        differ = ", in different groups" * is_grouped
        raise UserError(f"dataset: {_too_few(lines, len(short), required, differ)}")


def _required(to_make: list[int]) -> list[str]:
    """Return the splits in which each class needs an image of those that are split here."""
    return [SPLITS[split] for split in sorted([TRAIN, *to_make])]


def _too_few(lines: list[str], number: int, required: list[str], differ: str) -> str:
    more = f"; and {number - len(lines)} more classes" * (number > len(lines))
    return (
        f"too few images: {'; '.join(lines)}{more}; each class needs {len(required)} or"
        f" more different images{differ}, one for each of {', '.join(required)}: add images or"
        " remove the class"
    )
