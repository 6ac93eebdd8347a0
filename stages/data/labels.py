"""Read labels.csv: which images of a folder belong to a dataset, and to which class each.

It lies in the folder of its images, so that one dependency versions both. Its columns are ``path``
(within the folder, with slashes) and ``label``, and, if wanted, ``group`` (the images of a group
share a split) and ``split`` (the dataset's own, by the usual words: train, valid, Testing).
"""

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from os.path import basename, splitext
from pathlib import Path

import numpy as np
import pandas as pd

from stages.data.arrays import SPLITS
from stages.data.csv_table import MAX_PROBLEMS, read_columns, read_csv_table
from stages.data.images import is_image_name
from stages.data.layout import ClassFolder, check_names, split_of
from stages.run.cli import UserError, count, list_names

TABLE = "labels.csv"
COLUMNS, OPTIONAL = ("path", "label"), ("group", "split")
# Why an image is passed over; where labels come from.
NOT_NAMED = f"not named by {TABLE}"
READ = f"from {TABLE}"
NOT_READ = (
    f"from the folders; {TABLE} is not read, as it lacks the columns {' and '.join(COLUMNS)}, or"
    " prepare.layout is classes"
)


def has_labels(folder: Path) -> bool:
    """Return whether a folder has a labels.csv with the columns of one."""
    table = folder / TABLE
    return table.is_file() and set(COLUMNS) <= set(read_columns(table))


def read_labels(folder: Path, files: Sequence[str]) -> pd.DataFrame:
    """Read the labels.csv of a folder; the result and the errors are those of `check_labels`."""
    source = folder / TABLE
    return check_labels(read_csv_table(source, COLUMNS, OPTIONAL), source, folder, files)


def check_labels(
    table: pd.DataFrame, source: Path, folder: Path, files: Sequence[str]
) -> pd.DataFrame:
    """Check a table of labels row by row, and complete it.

    Parameters
    ----------
    table : DataFrame
        With the columns of labels.csv, all str; the index is the number of the line.
    source, folder : Path
        The file of the table and the folder of the images, for messages.
    files : sequence of str
        The paths of all files in the folder.

    Returns
    -------
    table : DataFrame
        Each path once, as on the disk, in their order. ``split``, if not empty, as in `SPLITS`.

    Raises
    ------
    UserError
        For all rows of one kind that can't be meant: of no file, without a label, and so on.
    """

    def refuse(is_wrong: pd.Series, column: str, problem: str, advice: str) -> None:
        if is_wrong.any():
            found = table[column][is_wrong].items()
            rows = [f"{value} (line {line})" if value else f"line {line}" for line, value in found]
            raise UserError(
                f"dataset: {source}: {problem}: {list_names(rows, MAX_PROBLEMS)}; {advice}"
            )

    # macOS may store a name as other code points than those typed (NFD and NFC).
    names = {_normal(path): path for path in files} | {path: path for path in files}
    paths = table["path"].map(lambda path: names.get(path) or names.get(_normal(path), ""))
    missing = table["path"][paths == ""]
    if len(missing):
        advice = f"expected paths within {folder}, with slashes and extensions"
        meant = missing.map(matcher(files, folder.name)).items()
        if guesses := [f"line {line}: {path}" for line, path in meant if path]:
            advice += f"; {len(guesses):,} of these probably mean {list_names(guesses, 1)}"
        refuse(paths == "", "path", f"{count(len(missing), 'path')} of no file", advice)
    refuse(table["label"] == "", "path", "no label", "fill it in, or remove the row")
    if "split" in table and (table["split"] == "").all():
        table = table.drop(columns="split")
    if "split" in table:
        refuse(table["split"] == "", "path", "no split", "fill it in, or empty the whole column")
        splits = table["split"].map({name: split_of(name) for name in table["split"].unique()})
        refuse(splits.isna(), "split", "unknown splits", f"expected {', '.join(SPLITS)}")
        table = table.assign(split=splits)
    table = table.assign(path=paths).drop_duplicates()
    repeated = table["path"].duplicated(keep=False)
    refuse(repeated, "path", "several rows that differ for one image", "keep one of them")
    return table.sort_values("path")


def to_images(table: pd.DataFrame, source: Path) -> pd.DataFrame:
    """Return the images of a checked table as `stages.data.dataset.find` does.

    Raises
    ------
    UserError
        If the names of classes look alike, or these are fewer than two, or train lacks one.
    """
    table = table[np.array([is_image_name(basename(path)) for path in table["path"]], bool)]
    lines = table["label"].sort_index().drop_duplicates().items()
    check_names(source, [ClassFolder(f"{name} (line {line})", name, "") for line, name in lines])
    splits = table["split"] if "split" in table else pd.Series("", table.index)
    trained = set(table["label"][splits.isin(["", "train"])])
    unknown = sorted({*table["label"]} - trained)
    if unknown:
        raise UserError(
            f"dataset: {source}: labels that train does not have: {list_names(unknown)}; add images"
            " to train, or remove these rows"
        )
    if len(trained) < 2:
        raise UserError(
            f"dataset: {source}: a label of one kind only ({list_names(trained) or 'no image'}); a"
            " classifier needs two or more"
        )
    images = pd.DataFrame(
        {
            "path": table["path"].tolist(),
            "class": pd.Categorical(table["label"], sorted(trained)),
            "own_split": pd.Categorical(splits.where(splits != ""), SPLITS),
        }
    )
    if "group" in table:
        images["group"] = pd.Series([name or None for name in table["group"]], dtype=object)
    return images


def matcher(paths: Iterable[str], folder: str) -> Callable[[str], str]:
    """Return a function that returns the path a value stands for: nothing if for none or several.

    A value may lack the extension and the folders of an image, or be its path elsewhere, such as
    ``/kaggle/input/x/train/1.jpg`` for ``train/1.jpg``. `folder` is the name of that of all paths.
    """
    exact: dict[str, str] = {}
    named: dict[str, str] = {}
    for path in paths:
        for whole, known in ((path, exact), (f"{folder}/{path}", exact), (basename(path), named)):
            for key in (whole, splitext(whole)[0]):
                known[key] = path if known.get(key, path) == path else ""

    def find(value: str) -> str:
        parts = value.replace("\\", "/").removeprefix("./").split("/")
        if len(parts) == 1:
            return exact.get(value) or named.get(value, "")
        tails = ("/".join(parts[start:]) for start in range(len(parts) - 1))
        return next((exact[tail] for tail in tails if exact.get(tail)), "")

    return find


def _normal(path: str) -> str:
    return unicodedata.normalize("NFC", path)
