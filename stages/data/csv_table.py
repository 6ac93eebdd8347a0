"""Read a table that people write or edit: the labels of a dataset, or corrections of them."""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from stages.run.cli import UserError, list_names, no_such

_DELIMITERS = ",;\t"  # spreadsheet programs write one of these, depending on the country
MAX_PROBLEMS = 20  # in a message


def read_csv_table(
    path: str | Path, required: Sequence[str], optional: Sequence[str] = ()
) -> pd.DataFrame:
    """Read a CSV file whose first line names its columns.

    Parameters
    ----------
    path : path
        UTF-8, with or without a byte order mark; separated by commas, semicolons or tabs.
    required, optional : sequence of str
        The columns to read, in any order; others are passed over.

    Returns
    -------
    table : DataFrame
        A row for each line that is not blank. The columns are those required, then those of the
        optional ones that the file has, all str without blanks at either end. The index is the
        number of the line in the file, for messages.

    Raises
    ------
    UserError
        If the file can't be read, lacks a column or names one twice, or a line has more or fewer
        fields than the first.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")  # line breaks as they are
    except FileNotFoundError:
        raise UserError(no_such("file", path)) from None
    except (OSError, UnicodeDecodeError) as error:
        why = "not UTF-8 text; save it as CSV UTF-8" if isinstance(error, ValueError) else error
        raise UserError(f"{path}: {why}") from None
    if re.search(r"^<{7} ", text, re.MULTILINE):
        raise UserError(
            f"{path}: in conflict since a merge; keep the right lines, then `git add` it"
        )
    delimiter = max(_DELIMITERS, key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows, numbers, last = [], [], 0
    try:
        for fields in reader:
            if any(map(str.strip, fields)):
                rows.append([field.strip() for field in fields])
                numbers.append(last + 1)
            last = reader.line_num
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not valid CSV: {error}") from None
    names = rows[0] if rows else []
    missing = [name for name in required if names.count(name) != 1]
    missing += [name for name in optional if names.count(name) > 1]
    if missing:
        raise UserError(
            f"{path}: expected a first line with the columns {', '.join(required)}, each once;"
            f" found {list_names(names, 10) or 'an empty file'}"
        )
    sizes = zip(numbers, map(len, rows), strict=True)
    uneven = [f"line {number}" for number, size in sizes if size != len(names)]
    if uneven:
        raise UserError(
            f"{path}: {list_names(uneven, MAX_PROBLEMS)}: more or fewer than the"
            f" {len(names)} fields of the first line; put double quotes around a value with a comma"
        )
    table = pd.DataFrame(rows[1:], index=numbers[1:], columns=names, dtype=str)
    return table[[*required, *(name for name in optional if name in names)]]


def read_columns(path: Path) -> list[str]:
    """Return the names in the first line of what may be a CSV file, whatever follows."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        line = file.readline()
    reader = csv.reader([line], delimiter=max(_DELIMITERS, key=line.count))
    return [name.strip() for name in next(reader, [])]
