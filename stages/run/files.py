"""Atomic writes, the scratch folder, locks and fingerprints."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from stages.run.cli import UserError

if TYPE_CHECKING:
    import pandas as pd

_BUSY = (errno.EACCES, errno.EAGAIN)  # another process holds the lock; POSIX allows both


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Write to a temporary path beside `path`, and rename it to `path` on success.

    The temporary path is yielded: write a file there, or make a folder. If the block raises, `path`
    stays as it was. A file is synced to the disk before the rename; the content of a folder is not.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.part")
    _remove(tmp)
    try:
        yield tmp
        if tmp.is_file():
            _sync(tmp)
        if path.is_dir() or tmp.is_dir():
            _remove(path)
        os.replace(tmp, path)
        _sync(path.parent)
    finally:
        _remove(tmp)


def write_json(path: str | Path, values: Mapping[str, Any]) -> None:
    """Write a flat mapping as JSON, one key per line, in insertion order."""
    with atomic_write(path) as tmp:
        text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
        tmp.write_text(text + "\n", encoding="utf-8", newline="\n")


def write_csv(path: str | Path, table: "pd.DataFrame", *, index: bool = False) -> None:
    """Write a table as CSV with a header line."""
    with atomic_write(path) as tmp:
        table.to_csv(tmp, index=index, lineterminator="\n", encoding="utf-8")


def scratch_dir(name: str) -> Path:
    """Return (and create) ``.dvc/tmp/scratch/NAME``: a cache that is safe to delete at any time.

    An experiment in a temporary workspace (``dvc exp run --temp``) shares the scratch folder of the
    main checkout, whose path DVC puts into ``DVC_ROOT``.
    """
    root = Path(os.environ.get("DVC_ROOT") or os.getcwd())
    folder = root / ".dvc" / "tmp" / "scratch" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def exclusive(folder: str | Path) -> Iterator[bool]:
    """Hold an exclusive lock on a scratch folder; other processes wait for it.

    Yields whether the folder is locked: False on a file system without locks.
    """
    with open(Path(folder, ".lock"), "w", encoding="utf-8") as file:
        yield _lock(file, fcntl.LOCK_EX)


def keep_newest(folder: Path, pattern: str, count: int) -> None:
    """Delete all but the `count` newest matching files; other runs may do so at the same time."""
    with contextlib.suppress(FileNotFoundError):
        matches = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
        for path in matches[:-count]:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def stage_lock(stage: str) -> Iterator[None]:
    """Allow one running stage per workspace.

    After ``kill -9`` of ``dvc repro`` its stage keeps running, and the next ``dvc repro`` would
    start a second one beside it.

    Raises
    ------
    UserError
        If another stage is running in this workspace.
    """
    folder = Path(".dvc", "tmp")  # not DVC_ROOT's: a temporary workspace has a lock of its own
    folder.mkdir(parents=True, exist_ok=True)
    with run_lock(folder / "stage.lock", stage):
        yield


@contextlib.contextmanager
def run_lock(path: Path, name: str = "") -> Iterator[bool]:
    """Allow one process at a time to run what a lock file stands for, by the name of its program.

    Yields whether the file is locked. The system releases the lock when the process exits, even
    after ``kill -9``. A file system without locks (some network file systems) allows any number.

    Raises
    ------
    UserError
        If another process holds the lock.
    """
    with open(path, "a+", encoding="utf-8") as file:
        try:
            locked = _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{name}: {file.read().strip() or 'another process'} is still running in this"
                " workspace; wait for it or stop it, then run again"
            ) from None
        file.truncate(0)
        file.write(f"{name} (process {os.getpid()})")
        file.flush()
        yield locked


def _lock(file: IO[str], flags: int) -> bool:
    """Lock a file for this process, not for its workers; return False where that is impossible.

    Raises
    ------
    BlockingIOError
        If another process holds the lock and `flags` say not to wait.
    """
    try:
        fcntl.lockf(file, flags)
    except OSError as error:
        if error.errno in _BUSY:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from None
        _report_missing_locks(error.strerror)
        return False
    return True


@functools.cache  # once is enough
def _report_missing_locks(reason: str) -> None:
    print(
        f"This file system can't lock files ({reason}): run one stage at a time in this workspace."
        " Decoded images are not kept for the next run.",
        file=sys.stderr,
    )


def fingerprint(paths: Iterable[Path], **values: Any) -> str:
    """Return a hash (SHA-256, 64 hexadecimal digits) of files and of values.

    Parameters
    ----------
    paths : iterable of path
        Files; their names and contents are hashed, their folders are not.
    **values : anything that JSON can represent
    """
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for path in sorted(paths):
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").digest()
        digest.update(path.name.encode() + b"\0" + content)
    return digest.hexdigest()


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
