"""Write files whole or not at all."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a path beside `path`; what is written there takes its place when the block ends well.

    The block may write a file or make a folder. On an error `path` stays as it was. A file lies on
    the disk by then, whatever happens to the power; what a folder holds may take a while longer.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    _remove(beside)
    try:
        yield beside
        if beside.is_file():
            _sync(beside)
        if path.is_dir() or beside.is_dir():
            _remove(path)
        os.replace(beside, path)
        _sync(path.parent)
    finally:
        _remove(beside)


def write_json(path: str | Path, values: Mapping[str, Any]) -> None:
    """Write flat values, in their order, a line each."""
    with replacing(path) as beside:
        text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
        beside.write_text(text + "\n", encoding="utf-8", newline="\n")


def write_csv(path: str | Path, table: "pd.DataFrame", *, index: bool = False) -> None:
    """Write a table with a header line."""
    with replacing(path) as beside:
        table.to_csv(beside, index=index, lineterminator="\n", encoding="utf-8")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
