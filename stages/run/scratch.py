"""The scratch folder: finished work that makes the next run shorter. Safe to delete at any time."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from stages.run.terminal import UserError


def folder(name: str) -> Path:
    """Return (and make) one folder of the scratch area, ``.dvc/tmp/scratch/NAME``.

    An experiment in a temporary workspace (``dvc exp run --temp``) shares the main checkout's,
    which DVC names in ``DVC_ROOT``.
    """
    root = Path(os.environ.get("DVC_ROOT") or os.getcwd())
    place = root / ".dvc" / "tmp" / "scratch" / name
    place.mkdir(parents=True, exist_ok=True)
    return place


@contextlib.contextmanager
def turn(place: str | Path) -> Iterator[None]:
    """Give one folder of the scratch area to a process at a time; the others wait."""
    with open(Path(place, ".lock"), "w", encoding="utf-8") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def keep_newest(place: Path, pattern: str, count: int) -> None:
    """Delete all but the newest of the files that match; another run may do the same."""
    with contextlib.suppress(FileNotFoundError):
        files = sorted(place.glob(pattern), key=lambda path: path.stat().st_mtime)
        for path in files[:-count]:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(stage: str) -> Iterator[None]:
    """Keep this workspace to one stage at a time.

    A killed ``dvc repro`` leaves its stage running, and the next one would start a second beside
    it. The lock ends with its process, however that ends.

    Raises
    ------
    UserError
        If another stage works in this workspace.
    """
    place = Path(".dvc", "tmp")  # of this workspace, also where it is an experiment's own
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "stage.lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by worker processes
        except OSError:
            file.seek(0)
            raise UserError(
                f"{stage}: {file.read().strip() or 'another stage'} is still at work here;"
                " wait for it to end, or end it, then run `dvc repro` again"
            ) from None
        file.truncate(0)
        file.write(f"{stage} (process {os.getpid()})")
        file.flush()
        yield
