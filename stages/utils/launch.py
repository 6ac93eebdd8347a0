"""Start the replicas of a training, a process each, and stop all when one of them fails."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stages.utils.cli import UserError

LOST = "the connection to another replica is lost"
_ROOT = Path(__file__).parents[2]  # where the package is found, also by a worker's Python
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 5  # for the others to end after one has failed


class Process:
    """A process that ends when this object does, also if its owner is killed.

    On a cluster, it is a Dask actor: it lives on a worker, and ends with the stage's connection.

    Parameters
    ----------
    host : str, default="127.0.0.1"
        The address by which the other replicas reach this machine.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._host, self._position = host, 0

    def free_address(self) -> str:
        """Return the host and a port that is free."""
        with socket.socket(socket.AF_INET6 if ":" in self._host else socket.AF_INET) as server:
            server.bind((self._host, 0))
            host = f"[{self._host}]" if ":" in self._host else self._host
            return f"{host}:{server.getsockname()[1]}"

    def start(self, words: Sequence[str], folder: str, environment: dict[str, str]) -> None:
        """Start Python in a folder."""
        self._output, self._errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        stdin, lifeline = os.pipe()
        self._lifeline = open(lifeline, "wb")  # closed when this object is gone
        self._process = subprocess.Popen(
            [sys.executable, *words],
            cwd=folder,
            env={**os.environ, **environment},
            stdin=stdin,
            stdout=self._output,
            stderr=self._errors,
            start_new_session=True,  # Ctrl-C is for the stage, which stops all
        )
        os.close(stdin)

    def poll(self) -> tuple[str, int | None]:
        """Return what was printed since the last call, and the exit status or None."""
        status = self._process.poll()
        size = os.fstat(self._output.fileno()).st_size
        text = os.pread(self._output.fileno(), size - self._position, self._position)
        self._position = size
        return text.decode(errors="replace"), status

    def errors(self) -> str:
        """Return what was printed on standard error."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace").strip()

    def stop(self) -> None:
        """Kill the process, if it runs."""
        self._process.kill()
        self._process.wait()


def exit_with_parent() -> None:
    """Let this process, which `Process` has started, exit when its parent's object is gone."""

    def wait() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
