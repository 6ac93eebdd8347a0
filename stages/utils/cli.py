"""What a person sees of a stage: progress, a summary, one line for a mistake."""

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

_PLACES = (PermissionError, FileExistsError, NotADirectoryError)  # something is in the way
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class UserError(Exception):
    """A mistake that the user can mend: its text says what, where, what was expected."""


def first_line(error: BaseException) -> str:
    """Return the first line of what a library says of an error, or the error's kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def run(main: Callable[[], int | None], kept: str = "nothing half-written is left") -> None:
    """Run a stage or command as a program, and exit.

    Parameters
    ----------
    main : callable
        Its return value is the exit status (None: 0).
    kept : str
        What an interrupted run leaves, and how to go on.

    Notes
    -----
    A `UserError` and a full disk end in one line and status 1; Ctrl-C and SIGTERM in one line and
    the status that shells expect (130, 143).
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that can't show a class name
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        status = main() or 0
        sys.stdout.flush()  # here, where a closed pipe or a full disk is told
    except UserError as error:
        status = _fail(str(error), 1)
    except KeyboardInterrupt:
        status = _fail(f"Stopped: {kept}.", 130)
    except _Terminated:
        status = _fail(f"Stopped by SIGTERM: {kept}.", 143)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except OSError as error:
        if error.errno in NO_SPACE:
            status = _fail(f"{error.strerror}: free some space and run again; {kept}.", 1)
        elif error.filename is not None and isinstance(error, _PLACES):
            status = _fail(f"{os.fsdecode(error.filename)}: {error.strerror}; {kept}.", 1)
        else:
            raise
    sys.stdout.flush()
    sys.stderr.flush()
    if "tensorflow" in sys.modules:
        os._exit(status)  # its own exit takes a second
    sys.exit(status)


class _Terminated(BaseException):
    pass


def _terminate(*_: Any) -> None:
    raise _Terminated


def _fail(message: str, status: int) -> int:
    sys.stdout.flush()
    print(message, file=sys.stderr)
    return status


def summary(title: str, rows: Mapping[str, Any]) -> None:
    """Print what a stage did: a title, then aligned lines of name and value."""
    print(f"\n{title}")
    width = max(map(len, rows), default=0)
    for name, value in rows.items():
        print(f"  {name:<{width}}  {value}")


def progress(items: Iterable[Any], *, total: int, unit: str, label: str) -> "tqdm":
    """Wrap an iterable in a progress bar with rate and time left; silent without a terminal."""
    from tqdm import tqdm  # a third of what a worker process, which draws no bar, would import

    return tqdm(
        items, total=total, unit=unit, desc=label, leave=False, disable=None, dynamic_ncols=True
    )
