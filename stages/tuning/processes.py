"""Python processes that end with their owner, on this machine or on workers of a Dask cluster."""

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from stages.run.cli import UserError, first_line
from stages.run.cluster import Cluster

_ROOT = Path(__file__).parents[2]  # where the process finds the package
_ANSWER_SECONDS = 20  # of a worker


class Process:
    """A Python process that ends with this object, also if its owner is killed.

    The process has to call `exit_with_parent`; all that it starts ends with it.

    On a cluster, it is a Dask actor: it lives on a worker, and ends with its owner's connection.

    Parameters
    ----------
    host : str, default="127.0.0.1"
        The address by which others reach this machine.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._host, self._position = host, 0
        self._port: socket.socket | None = None
        self._process: subprocess.Popen | None = None

    def free_address(self) -> str:
        """Return the host and a free port, which is reserved until the process starts."""
        self._port = socket.create_server((self._host, 0))
        return f"{self._host}:{self._port.getsockname()[1]}"

    def start(self, words: Sequence[str], folder: str, variables: dict[str, str]) -> None:
        """Start Python in a folder, with environment variables besides those of this process."""
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 closed with this object, as all
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._position = 0
        stdin, lifeline = os.pipe()
        self._lifeline = open(lifeline, "wb")  # noqa: SIM115 its end ends the process
        if self._port:
            self._port.close()
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        try:
            self._process = subprocess.Popen(
                [sys.executable, *words],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": path, **variables},
                stdin=stdin,
                stdout=self._output,
                stderr=self._errors,
                start_new_session=True,  # Ctrl-C is for the owner, which stops all
            )
        finally:
            os.close(stdin)

    def poll(self) -> tuple[str, int | None]:
        """Return what was printed since the last call, and the exit status or None."""
        assert self._process
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
        """Kill the process, if it runs, and all that it has started."""
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def exit_with_parent() -> None:
    """Let this process, which a `Process` has started, exit when that object is gone."""

    def wait() -> None:
        os.read(0, 1)  # returns when the other end of standard input is closed
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


class _OnWorker:
    """A `Process` on a worker of a Dask cluster, with the same methods."""

    def __init__(self, cluster: Cluster, worker: str) -> None:
        self._worker = worker
        process = pickle.dumps(Process(urlsplit(worker).hostname or worker))
        # Pickled, because the scheduler, which does not have this project's code, reads the task.
        future = cluster.client.submit(
            pickle.loads, process, workers=[worker], actor=True, pure=False
        )
        with cluster.errors():
            try:
                self._actor = future.result(timeout=_ANSWER_SECONDS)
            except TimeoutError:
                raise UserError(
                    f"the Dask worker at {worker} is busy with other tasks; wait for them, or start"
                    " more workers"
                ) from None

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            try:
                return getattr(self._actor, name)(*args).result(timeout=_ANSWER_SECONDS)
            except FileNotFoundError:
                raise UserError(
                    f"the Dask worker at {self._worker} can't see the folder {os.getcwd()}, which"
                    " it has to share with this machine"
                ) from None
            except (OSError, RuntimeError) as error:
                raise UserError(
                    f"the Dask worker at {self._worker} is gone, or can't do what was asked of it"
                    f" ({first_line(error)}); run the same command again to resume"
                ) from None

        return call

    def stop(self) -> None:
        with contextlib.suppress(UserError):
            self.__getattr__("stop")()


def on_workers(cluster: Cluster, count: int) -> list[Any]:
    """Return a `Process` on each of the `count` workers that are the least busy.

    A worker is busy if it holds results: processes of other runs are among them. Workers on
    different machines come first. The cluster must be Dask's current one (`Client.as_current`).
    """
    with cluster.errors():
        held = {worker: len(keys) for worker, keys in cluster.client.has_what().items()}
    workers = sorted(cluster.threads, key=lambda worker: (held.get(worker, 0), worker))
    hosts = [urlsplit(worker).hostname for worker in workers]
    turns = [hosts[:number].count(host) for number, host in enumerate(hosts)]
    order = sorted(range(len(workers)), key=lambda n: (held.get(workers[n], 0), turns[n]))
    return [_OnWorker(cluster, workers[number]) for number in order[:count]]
