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
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from stages.run.cli import UserError
from stages.run.processes import exit_with_dvc

if TYPE_CHECKING:
    import pandas as pd

_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)  # another process has put its folder there meanwhile
_BUSY = (errno.EACCES, errno.EAGAIN)  # another process holds the lock; POSIX allows both


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Write to a temporary path beside `path`, and rename it to `path` on success.

    The temporary path is yielded: write a file there, or make a folder. It is in a folder of this
    process, which may hold other temporary files. If the block raises, `path` stays as it was. A
    file is synced to the disk before the rename; the content of a folder is not.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    name, number = path.name[:50], 1  # cut, since a name has at most 255 bytes
    while not (lock := _lock_folder(folder := path.with_name(f".{name}.{number}.part"))):
        number += 1
    with lock:
        _clear(folder, lock.name)  # of what a process that was killed has left
        tmp = folder / "new"
        try:
            yield tmp
            if tmp.is_file():
                _sync(tmp)
            while tmp.exists():
                if path.is_dir() or tmp.is_dir():
                    with contextlib.suppress(FileNotFoundError):
                        os.rename(path, Path(tempfile.mkdtemp(dir=folder)) / "old")
                try:
                    os.replace(tmp, path)
                except OSError as error:
                    if error.errno not in _TAKEN:
                        raise
            _sync(path.parent)
        finally:
            with contextlib.suppress(OSError):  # once the lock is gone, another process may enter
                _clear(folder, lock.name)
                os.unlink(lock.name)
                os.rmdir(folder)


def _lock_folder(folder: Path) -> IO[bytes] | None:
    """Make a folder and lock it for this process; None if another one has locked it."""
    while True:
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder)
        with contextlib.suppress(FileNotFoundError):  # another process has just deleted it
            lock = open(folder / "lock", "wb")  # noqa: SIM115 the caller closes it
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                return None
            except OSError:
                pass  # a file system without locks
            if os.path.samestat(os.stat(lock.name), os.fstat(lock.fileno())):
                return lock


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


def keep_newest(written: Path, pattern: str, count: int) -> None:
    """Delete all but `count` matching files in the folder of one that was just written.

    That one is kept, and the newest of the others; other runs may do so at the same time. Files
    that seem even newer were written while a clock ran ahead: these go first.
    """
    with contextlib.suppress(FileNotFoundError):
        now = written.stat().st_mtime
        times = {path: path.stat().st_mtime for path in written.parent.glob(pattern)}
        times.pop(written, None)
        newest = sorted(times, key=lambda path: (times[path] <= now, times[path]), reverse=True)
        for path in newest[count - 1 :]:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def stage_lock(stage: str) -> Iterator[None]:
    """Allow one running stage per workspace, which ends with the ``dvc repro`` that started it.

    A stage that outlived it would work for nothing: only ``dvc repro`` records what comes out. The
    system releases the lock when the process exits, even after ``kill -9``. A file system without
    locks (some network file systems) allows any number.

    Raises
    ------
    UserError
        If another stage is running in this workspace.
    """
    if "DVC_STAGE" in os.environ:  # DVC sets it
        exit_with_dvc()
    folder = Path(".dvc", "tmp")  # not DVC_ROOT's: a temporary workspace has a lock of its own
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "stage.lock", "a+", encoding="utf-8") as file:
        try:
            _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{stage}: {file.read().strip() or 'another process'} is still running in this"
                " workspace; stop it, and `dvc repro` goes on where it was"
            ) from None
        file.truncate(0)
        file.write(f"{stage} (process {os.getpid()})")
        file.flush()
        yield


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


def _clear(folder: Path, lock: str) -> None:
    for path in {*folder.iterdir()} - {Path(lock)}:
        _remove(path)


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
