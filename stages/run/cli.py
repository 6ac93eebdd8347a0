"""Terminal output: progress bars, summaries, one-line errors."""

import argparse
import contextlib
import difflib
import errno
import io
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

_MOST_NAMES = 5000  # of a folder, to look for a near one in: a third of a second
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class UserError(Exception):
    """An error that the user can fix: its text says what is wrong, where, and what was expected."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def run(main: Callable[[], int | None], on_interrupt: str = "no partial files are left") -> None:
    """Run a stage or command as a program, and exit.

    Parameters
    ----------
    main : callable
        Returns the exit status (None: 0).
    on_interrupt : str, default="no partial files are left"
        Printed when the run is interrupted or fails: what it leaves behind, how to resume.

    Notes
    -----
    A `UserError`, or what the system refuses (a full disk, a read-only folder), prints one line and
    exits with status 1; Ctrl-C and SIGTERM print one line and exit with the usual 130 and 143. Any
    other exception is a bug, with its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that can't show a class name
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        status = main() or 0
        sys.stdout.flush()  # here, so that a closed pipe or a full disk is handled below
    except UserError as error:
        status = _fail(str(error), 1)
    except KeyboardInterrupt:
        status = _fail(f"Stopped: {on_interrupt}.", 130)
    except _Terminated:
        status = _fail(f"Stopped by SIGTERM: {on_interrupt}.", 143)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except OSError as error:
        if not error.strerror:  # not of the system: a library's own
            raise
        named = isinstance(error.filename, str | bytes | os.PathLike)  # else a descriptor, or none
        where = f"{list_names([os.fsdecode(error.filename)])}: " if named else ""
        advice = "free some space and run again; " * (error.errno in NO_SPACE)
        status = _fail(f"{where}{error.strerror}; {advice}{on_interrupt}.", 1)
    sys.stdout.flush()
    sys.stderr.flush()
    if "tensorflow" in sys.modules:
        os._exit(status)  # its own exit takes a second
    sys.exit(status)


class _Terminated(BaseException):
    pass


def _terminate(*_: object) -> None:
    raise _Terminated


def _fail(message: str, status: int) -> int:
    sys.stdout.flush()
    print(printable(message, "\n"), file=sys.stderr)
    return status


def expand_home(path: str | Path) -> Path:
    """Replace ``~`` at the start of a path.

    Raises
    ------
    UserError
        If there is no such user, or the path is empty, as an unset variable of a shell is.
    """
    if not str(path):
        raise UserError("an empty path was given; expected a file or a folder")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: no such home folder") from None


def no_such(what: str, path: str | Path, advice: str = "") -> str:
    """Return the message on a path that is not there: ``"data/Friut: no such folder; ..."``.

    It ends with the nearest path that is there, or with how to fetch it from DVC; if there is none,
    with the advice. `what` is what was expected, such as ``"folder"``.
    """
    if Path(f"{path}.dvc").is_file():
        advice = "DVC tracks it: fetch it with `dvc pull`"
    elif near := _nearest(Path(path), 0.6) or _nearest(Path("data", path), 0.8):
        advice = f"did you mean {near}?"
    return f"{path}: no such {what}" + f"; {advice}" * bool(advice)


def _nearest(path: Path, cutoff: float) -> Path | None:
    """Return the path that is there and differs by a few letters (as of difflib), if there is."""
    found = Path()
    for part in path.parts:
        if not (found / part).exists():
            names: dict[str, str] = {}
            with contextlib.suppress(OSError):  # a file, or no permission
                listed = (name.removesuffix(".dvc") for name in os.listdir(found))
                names = {name.casefold(): name for name in listed if name and name[0] != "."}
            known = list(names)[:_MOST_NAMES]
            near = difflib.get_close_matches(part.casefold(), known, 1, cutoff)
            if not near:
                return None
            part = names[near[0]]
        found /= part
    return found


def whole_number(smallest: int) -> Callable[[str], int]:
    """Return the type of a command line argument (argparse) that is a whole number."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < smallest:
            raise argparse.ArgumentTypeError(
                f"expected a whole number from {smallest} on, found {text!r}"
            )
        return int(text)

    return read


def count(number: int, noun: str) -> str:
    """Return a number and its noun, in the plural where it belongs: ``"1,234 files"``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def printable(text: object, keep: str = "") -> str:
    """Return text with escapes for what a terminal would obey or can't show, but what to keep."""
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in str(text))


def list_names(names: Iterable[str], limit: int = 5, separator: str = ", ") -> str:
    """List names on one line, as many as `limit`, with escapes for what a terminal can't show."""
    names = list(map(printable, names))
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return separator.join(names[:limit]) + more


def summary(title: str, rows: Mapping[str, Any]) -> None:
    """Print a title, then a line for each name and its value: aligned, wrapped on a terminal."""
    print(f"\n{printable(title)}")
    width = max(map(len, rows), default=0)
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    for name, value in rows.items():
        line, indent = f"  {name:<{width}}  {printable(value)}", " " * (width + 4)
        print(
            textwrap.fill(
                line,
                columns,
                subsequent_indent=indent,
                break_long_words=False,
                break_on_hyphens=False,
            )
        )


def progress(items: Iterable[Any], *, total: int, unit: str, label: str) -> "tqdm":
    """Wrap an iterable in a progress bar with rate and time left; no bar without a terminal."""
    from tqdm import tqdm  # worker processes, which draw no bar, start faster without it

    return tqdm(
        items, total=total, unit=unit, desc=label, leave=False, disable=None, dynamic_ncols=True
    )
