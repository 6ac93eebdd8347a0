"""Corrections of labels: data/corrections.csv, which people decide and Git keeps.

A line is a decision on an image: another label, the label that it has (it was checked, and the
audit does not ask again), or none, which drops it. An image is known by the digest of its content,
so that a renamed file keeps its decision. The images on the disk stay untouched.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from stages.data.csv_table import MAX_PROBLEMS, read_csv_table
from stages.run.cli import UserError, list_names
from stages.run.files import write_csv

FILE = "data/corrections.csv"
COLUMNS = ("digest", "label", "was", "path", "comment")
DROPPED = "dropped from"  # begins the exclusion reason of a dropped image; its split follows
_DIGEST_BYTES = 16
NONE = pd.DataFrame(columns=["line", *COLUMNS], dtype=str)


def read(path: str | Path) -> pd.DataFrame:
    """Read a file of corrections.

    Parameters
    ----------
    path : path
        A CSV file with the columns ``digest`` (of index.csv), ``label`` (a class; empty to drop the
        image), ``was`` (the class in the dataset), ``path`` and ``comment``, which are for people.

    Returns
    -------
    corrections : DataFrame
        A row for each image, with ``line``, its number in the file, and these columns.

    Raises
    ------
    UserError
        If the file can't be read, a digest is none, or two lines disagree on an image.
    """
    table = read_csv_table(path, COLUMNS).reset_index(names="line")
    table["digest"] = table["digest"].str.lower()
    invalid = ~table["digest"].str.fullmatch(f"[0-9a-f]{{{2 * _DIGEST_BYTES}}}")
    problems = [
        f"line {row['line']}: {row['digest']!r:.50} is no digest; expected the one that"
        f" data/prepared/index.csv has for {row['path']}"
        for _, row in table[invalid].iterrows()
    ]
    labels = table.groupby("digest")["label"].transform("nunique")
    for _, rows in table[~invalid & (labels > 1)].groupby("digest", sort=False):
        found = [f"{row['label'] or 'drop it'} (line {row['line']})" for _, row in rows.iterrows()]
        problems.append(
            f"{rows['path'].iloc[0]}: the decisions differ: {list_names(found)}; keep one of these"
        )
    _refuse(path, problems)
    return table[~table["digest"].duplicated()]


def apply(images: pd.DataFrame, corrections: pd.DataFrame, path: str | Path) -> pd.DataFrame:
    """Apply corrections to a table of images.

    Parameters
    ----------
    images : DataFrame
        With ``class`` (categorical, as the dataset has it) and ``digest`` (bytes).
    corrections : DataFrame
        As `read` returns them. Those of images that are not in the table have no effect.
    path : path
        Their file, for messages.

    Returns
    -------
    images : DataFrame
        With the corrected ``class``, and more columns: ``was`` (str: the class in the dataset
        if that was corrected, else empty), ``is_dropped``.

    Raises
    ------
    UserError
        If a label is not a class, or an image is not in the class that it was in.
    """
    row_of = {bytes.fromhex(digest): row for row, digest in enumerate(corrections["digest"])}
    found = images["digest"].map(row_of)
    rows = np.flatnonzero(found.notna())
    decided = corrections.iloc[found.iloc[rows].astype(int)]
    classes = images["class"].cat.categories
    given = images["class"].astype(str).to_numpy()[rows]
    _check(decided.assign(given=given, at=images["path"].to_numpy()[rows]), classes, path)
    is_dropped = np.zeros(len(images), bool)
    is_dropped[rows] = decided["label"] == ""
    codes = images["class"].cat.codes.to_numpy().copy()
    kept = rows[~is_dropped[rows]]
    codes[kept] = pd.Categorical(decided["label"][decided["label"] != ""], classes).codes
    was = images["class"].astype(str).where(codes != images["class"].cat.codes, "")
    images = images.assign(was=was, is_dropped=is_dropped)
    images["class"] = pd.Categorical.from_codes(codes, pd.Index(classes))
    return images


def merge(
    new: pd.DataFrame, source: str | Path, path: str | Path, index: pd.DataFrame
) -> pd.DataFrame:
    """Add decisions to a file of corrections, which is sorted by path; return those that are new.

    Parameters
    ----------
    new : DataFrame
        As `read` returns them.
    source : path
        Their file, for messages.
    path : path
        The file to add them to.
    index : DataFrame
        As `stages.data.arrays.read_index` returns it.

    Raises
    ------
    UserError
        If an image is not in the index, a label or what it was is wrong, or a decision
        differs from an earlier one; nothing is then written.
    """
    unknown = new[~new["digest"].isin(index["digest"])]
    if len(unknown):
        lines = [f"{row['path']} (line {row['line']})" for _, row in unknown.iterrows()]
        raise UserError(
            f"{source}: no image in data/prepared/index.csv has the content of"
            f" {list_names(lines, 3)}; run `dvc repro` with the dataset that these are from first"
        )
    images = index[index["digest"].isin(new["digest"])]
    given = images["class"].where(images["was"] == "", images["was"])
    images = images.assign(given=given, at=images["path"])
    decided = new.merge(images[["digest", "given", "at"]], on="digest")
    _check(decided, sorted({*index["class"], *given}), source)
    old = read(path)
    both = new.merge(old, on="digest", suffixes=("", "_old"))
    differ = both[both["label"] != both["label_old"]]
    _refuse(
        source,
        [
            f"line {row['line']}: {row['path']}: {row['label'] or 'drop it'}, but {path}, line"
            f" {row['line_old']}, says {row['label_old'] or 'drop it'}; keep one: edit that line,"
            " or delete this one"
            for _, row in differ.iterrows()
        ],
    )
    added = new[~new["digest"].isin(old["digest"])]
    table = pd.concat([old, added]).sort_values(["path", "digest"], kind="stable")
    write_csv(path, table[[*COLUMNS]])
    return added


def _check(decided: pd.DataFrame, classes: Iterable[str], path: str | Path) -> None:
    """Raise a UserError for labels that are no class, and images of another class than they were.

    `decided` has a row for each image that is decided on, with the class that the dataset gives it
    (``given``) and its path (``at``). If that is the decision already, nothing is wrong.
    """
    is_known = decided["label"].isin(classes) | (decided["label"] == "")
    problems = [
        f"line {row['line']}: {row['at']}: label {row['label']!r} is no class of the dataset;"
        f" expected one of {list_names(classes)}, or nothing to drop the image"
        for _, row in decided[~is_known].drop_duplicates("digest").iterrows()
    ]
    # Identical files may be in several classes: one of them has to be as it was.
    classes_of = decided.groupby("digest")["given"]
    is_there = (decided["was"] == decided["given"]).groupby(decided["digest"]).transform("any")
    is_done = (classes_of.transform("nunique") == 1) & (decided["given"] == decided["label"])
    problems += [
        f"line {row['line']}: {row['at']}: was {row['was']!r}, but is {row['given']!r} in the"
        " dataset now; correct `was` if the decision still holds, or delete the line"
        for _, row in decided[~is_there & ~is_done].drop_duplicates("digest").iterrows()
    ]
    _refuse(path, problems)


def _refuse(path: str | Path, problems: list[str]) -> None:
    """Raise a UserError with a line for each problem, if there is any."""
    if problems:
        more = len(problems) - MAX_PROBLEMS
        lines = [f"{path}: {problem}" for problem in problems[:MAX_PROBLEMS]]
        raise UserError("\n".join(lines + [f"{path}: and {more:,} more of these"] * (more > 0)))
