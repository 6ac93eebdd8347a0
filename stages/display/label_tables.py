"""Make a labels.csv of a table of another form, such as Kaggle's ``id,label`` beside its images."""

import os
import re
from pathlib import Path

import pandas as pd

from stages.data.csv_table import read_columns, read_csv_table
from stages.data.dataset import find
from stages.data.labels import OPTIONAL, TABLE, check_labels, has_labels, matcher, to_images
from stages.data.layout import Layout
from stages.data.listing import list_images
from stages.run.cli import UserError, list_names
from stages.run.files import write_csv

_LABEL = re.compile(r"label|class|categor|target|species|breed|diagnos", re.IGNORECASE)
_MIN_FOUND = 0.5  # fraction of rows with an image here, below which a column names no images
_MAX_VALUES = 0.5  # number of different labels, at most, as a fraction of the rows


def is_table(path: Path) -> bool:
    """Return whether this is a file with the ending of a table."""
    return path.suffix.lower() in (".csv", ".tsv") and path.is_file()


def make_labels(source: Path, folder: Path, layout: Layout, output: str) -> dict[str, str]:
    """Write the labels.csv of a folder of images, unless it is a dataset as it is.

    `source` is a table of them; or that folder, with tables at its top. The others are as for
    `find`. The result is a line on what was taken for what, ``table``, if labels.csv was written,
    or a warning of a table that was not used.

    Raises
    ------
    UserError
        If no table is understood, or several are, or there is a labels.csv already.
    """
    is_folder = source == folder
    if not (is_folder or folder.is_dir()):
        raise UserError(
            f"{source}: no folder {folder} of its images; put it into that of its images"
        )
    tables = sorted(filter(is_table, folder.glob("*"))) if is_folder else [source]
    if not tables or (source in (folder, folder / TABLE) and has_labels(folder)):
        return {}  # `find` says what is wrong
    problems, understood = [], []
    try:
        if is_folder:
            find(folder, output, layout)
    except UserError as error:
        problems.append(str(error))
    is_dataset = is_folder and not problems
    for path in tables:
        try:
            understood.append((path, *_read(path, folder)))
        except UserError as error:
            problems.append(str(error))
    names = list_names(str(path) for path, _, _ in understood)
    if is_dataset:
        told = f"{names}: lists labels, too; `python -m stages use` with its name takes them"
        return {"WARNING: table": f"{told} in place of the folders"} if understood else {}
    if not understood:
        if len(tables) > 1:
            problems[1:] = [
                "`python -m stages use` with the name of one says what is not clear in it"
            ]
        raise UserError("; ".join(problems))
    if len(understood) > 1:
        raise UserError(f"{names}: several tables list labels; name the right one")
    [(_, table, taken)] = understood
    if (target := folder / TABLE).exists():
        raise UserError(
            f"{target} exists already, and is not overwritten; rename it and run this again"
        )
    write_csv(target, table)
    return {"table": f"{taken}; written to {target}"}


def _read(path: Path, folder: Path) -> tuple[pd.DataFrame, str]:
    """Return the table of labels that another one stands for, and what was taken for what."""
    columns = read_columns(path)
    columns = [name for name in columns if name and columns.count(name) == 1]
    table = read_csv_table(path, (), columns)
    files = [
        one.relative_to(folder).as_posix() for one, reason in list_images(folder)[0] if not reason
    ]
    found = table.map(matcher(files, folder.name))
    column = found.nunique().idxmax() if found.size else ""
    is_here = found[column] != "" if column else pd.Series(dtype=bool)
    if not is_here.mean() > _MIN_FOUND:
        raise UserError(
            f"{path}: none of its columns ({list_names(columns)}) names images in {folder}, most of"
            " them, and each just one"
        )
    own = {name.lower(): name for name in columns if name != column}
    optional = {name: own[name] for name in OPTIONAL if name in own}
    label = _find_label(table.drop(columns=[column, *optional.values()]), path)
    parts = {"path": found[column], "label": table[label]}
    labels = pd.DataFrame(parts | {name: table[one] for name, one in optional.items()})[is_here]
    to_images(check_labels(labels, path, folder, files), path)
    inner = os.path.commonpath([os.path.dirname(one) for one in labels["path"]]) or folder.name
    number = f"{is_here.sum():,} of {len(table):,} found in {inner}/"
    taken = [f"{path.name}: column {column} names the images ({number})", f"{label} is the label"]
    return labels, ", ".join(taken + [f"{one} the {name}" for name, one in optional.items()])


def _find_label(table: pd.DataFrame, path: Path) -> str:
    """Return the column that holds the labels: by its name, or as the only one of few values."""
    names = list(map(str, table))
    few = [name for name in names if 1 < table[name].nunique() <= _MAX_VALUES * len(table)]
    named = [name for name in names if name.lower() == "label"] or list(filter(_LABEL.search, few))
    candidates = named or few
    if len(candidates) != 1:
        could = list_names(candidates or names, 10)
        which = f"{could} could be the label" if candidates else f"no column is the label ({could})"
        raise UserError(
            f"{path}: {which}; call the right one label in the first line and run this again, or"
            f" write {TABLE} (columns path, label) into the folder of the images yourself"
        )
    return candidates[0]
