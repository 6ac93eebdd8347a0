"""Processes: the cores they may use, and that they end with the one that started them."""

import os
import threading
import time
from collections.abc import Callable


def cpu_count() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def exit_with_parent(parent: int, find_parent: Callable[[], int] = os.getppid) -> None:
    """Let this process exit within a second after its parent is gone, even if that was killed.

    Parameters
    ----------
    parent : int
        The ID of the parent process, which may be gone already.
    find_parent : callable, optional
        Returns the ID as it is now; by default that of this process's parent.
    """

    def watch() -> None:
        while find_parent() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def exit_with_dvc() -> None:
    """Let this process exit within a second after the ``dvc`` that started it is gone."""
    import psutil  # which dvc needs, too

    shell = psutil.Process(os.getppid())
    exit_with_parent(shell.pid)
    if "-c" in shell.cmdline():  # without SHELL, it is /bin/sh, which may wait for this process
        exit_with_parent(shell.ppid(), shell.ppid)
