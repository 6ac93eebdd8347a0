"""Processes: the cores they may use, and that they end with the one that started them."""

import os
import threading
import time


def cpu_count() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def exit_with_parent(parent: int) -> None:
    """Let this process exit within a second after its parent is gone, even if that was killed.

    Parameters
    ----------
    parent : int
        The ID of the parent process, which may be gone already.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
