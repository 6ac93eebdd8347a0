"""Start the replicas of a training, a process each, and stop all when one of them fails."""

import contextlib
import json
import math
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from stages.utils.cli import UserError, first_line
from stages.utils.cluster import Cluster, connect

LOST = "the connection to another replica is lost"
_ROOT = Path(__file__).parents[2]  # where a replica's Python finds the package
_PACKAGES = ["keras", "numpy", "tensorflow"]  # of equal versions on all workers
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 5  # for the others to end after one has failed
_ANSWER_SECONDS = 20  # of a worker
_RESUME = "`dvc repro` resumes after the last epoch"
_REPLICA = "TRAIN_REPLICA"  # set in each process that is started here


def is_replica() -> bool:
    """Return whether this process is one of the replicas that `run_replicas` started."""
    return _REPLICA in os.environ


def run_replicas(count: int, words: Sequence[str], gpus: int) -> None:
    """Run a Python program as replicas of one training, and wait until all have ended.

    They run on as many workers of the Dask cluster that DASK_SCHEDULER_ADDRESS names, or here. What
    the first one prints is printed. All are stopped if one fails, or when this process ends.

    Parameters
    ----------
    count : int
        The number of replicas.
    words : sequence of str
        The words of the command after ``python``.
    gpus : int
        The number of GPUs of this machine. If there are some, each replica here gets its own.

    Raises
    ------
    UserError
        If a replica fails, or there are too few workers or GPUs.
    """
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(connect(_PACKAGES))
        processes: list[Any]
        variables: list[dict[str, str]]
        if cluster:
            stack.enter_context(cluster.client.as_current())  # the actors look for it
            processes, variables = _on_workers(cluster, count), [{}] * count
        else:
            processes, variables = [Process() for _ in range(count)], _gpu_variables(count, gpus)
        if root := os.environ.get("DVC_ROOT"):
            variables = [{"DVC_ROOT": root} | own for own in variables]
        addresses = [process.free_address() for process in processes]
        for number, process in enumerate(processes):
            stack.callback(process.stop)
            task = {"type": "worker", "index": number}
            config = json.dumps({"cluster": {"worker": addresses}, "task": task})
            own = variables[number] | {"TF_CONFIG": config, _REPLICA: str(number)}
            process.start(words, os.getcwd(), own)
        _watch(processes)


class Process:
    """A Python process that ends with this object, also if its owner is killed.

    The process has to call `exit_with_parent`.

    On a cluster, it is a Dask actor: it lives on a worker, and ends with the stage's connection.

    Parameters
    ----------
    host : str, default="127.0.0.1"
        The address by which other replicas reach this machine.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._host, self._position = host, 0
        self._process: subprocess.Popen | None = None

    def free_address(self) -> str:
        """Return the host and a free port, which is reserved until the process starts."""
        self._port = socket.create_server((self._host, 0))
        return f"{self._host}:{self._port.getsockname()[1]}"

    def start(self, words: Sequence[str], folder: str, variables: dict[str, str]) -> None:
        """Start Python in a folder."""
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 closed with this object, as all
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        stdin, lifeline = os.pipe()
        self._lifeline = open(lifeline, "wb")  # noqa: SIM115 its end ends the process
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
                start_new_session=True,  # Ctrl-C is for the stage, which stops all
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
        """Kill the process, if it runs."""
        if self._process:
            self._process.kill()
            self._process.wait()


def exit_with_parent() -> None:
    """Let this process, which a `Process` has started, exit when that object is gone."""

    def wait() -> None:
        os.read(0, 1)  # returns when the other end of standard input is closed
        os._exit(1)

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
                    f"train.replicas: the Dask worker at {self._worker} can't see the folder"
                    f" {os.getcwd()}, which all replicas must share"
                ) from None
            except (OSError, RuntimeError) as error:
                raise UserError(
                    f"the Dask worker at {self._worker} is gone, or can't do what was asked of it"
                    f" ({first_line(error)}); {_RESUME}"
                ) from None

        return call

    def stop(self) -> None:
        with contextlib.suppress(UserError):
            self.__getattr__("stop")()


def _on_workers(cluster: Cluster, count: int) -> list[Any]:
    """Start an actor on each of the workers that are the least busy, on different machines first.

    A worker is busy if it holds results: replicas of other runs are among them.
    """
    if len(cluster.threads) < count:
        raise UserError(
            f"params.yaml: train.replicas: {count} replicas need as many workers, found {cluster};"
            " start more workers, or lower it"
        )
    with cluster.errors():
        held = {worker: len(keys) for worker, keys in cluster.client.has_what().items()}
    workers = sorted(cluster.threads, key=lambda worker: (held.get(worker, 0), worker))
    hosts = [urlsplit(worker).hostname for worker in workers]
    turns = [hosts[:number].count(host) for number, host in enumerate(hosts)]
    order = sorted(range(len(workers)), key=lambda n: (held.get(workers[n], 0), turns[n]))
    return [_OnWorker(cluster, workers[number]) for number in order[:count]]


def _gpu_variables(count: int, gpus: int) -> list[dict[str, str]]:
    """Return environment variables that give each replica on this machine a GPU of its own."""
    if not gpus:
        return [{}] * count
    if gpus < count:
        raise UserError(
            f"params.yaml: train.replicas: {count} replicas need as many GPUs, found {gpus}; lower"
            " it, or hide the GPUs: CUDA_VISIBLE_DEVICES=-1"
        )
    names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    return [{"CUDA_VISIBLE_DEVICES": name} for name in names.split(",")[:count]]


def _watch(processes: Sequence[Any]) -> None:
    """Print what the first process prints until all have ended, or five seconds after a failure."""
    statuses: list[int | None] = [None] * len(processes)
    failed: list[int] = []  # in the order in which they did
    deadline = math.inf
    while None in statuses and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        for number, process in enumerate(processes):
            text, statuses[number] = process.poll()
            if number == 0 and text:
                print(text, end="", flush=True)
        failed += [
            number for number, status in enumerate(statuses) if status and number not in failed
        ]
        if failed:
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    errors = {number: _error(processes[number], statuses[number]) for number in failed}
    if errors:  # of the others: that the connection to the one that failed is lost
        number = min(failed, key=lambda number: LOST in errors[number])
        raise UserError(f"replica {number + 1} of {len(processes)}: {errors[number]}")


def _error(process: Any, status: int | None) -> str:
    said = process.errors()
    if status is not None and status < 0:  # what a library says before it aborts is on the end
        reason = "".join(f" ({line})" for line in said.splitlines()[-1:])
        return f"killed by signal {-status}{reason}; {_RESUME}"
    return said or f"exit status {status}; {_RESUME}"
