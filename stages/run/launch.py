"""Start the replicas of a training, a process each, and stop all when one of them fails."""

import contextlib
import functools
import json
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from stages.run import files, processes
from stages.run.cli import UserError, first_line
from stages.run.cluster import Cluster, connect

LOST = "the connection to another replica is lost"
_PACKAGES = ["keras", "numpy", "tensorflow"]  # of equal versions on all workers
_PARENT = "TRAIN_PARENT"  # the process that has started a replica
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 5  # for the others to end after one has failed
_ANSWER_SECONDS = 20  # of a worker
_RESUME = "`dvc repro` resumes after the last epoch"


def run_replicas(count: int, words: Sequence[str], gpus: int) -> None:
    """Run a Python program as replicas of one training, and wait until all have ended.

    They run on as many workers of the Dask cluster that DASK_SCHEDULER_ADDRESS names, or here. What
    the first one prints is printed. All are stopped if one fails, or when this process ends.

    Parameters
    ----------
    count : int
        The number of replicas.
    words : sequence of str
        The words of the command after ``python``. TF_CONFIG tells it which replica it is. It has to
        call `exit_with_stage`.
    gpus : int
        The number of GPUs of this machine. If there are some, each replica here gets its own.

    Raises
    ------
    UserError
        If a replica fails, or there are too few workers or GPUs.
    """
    printed: queue.SimpleQueue[str] = queue.SimpleQueue()
    with connect(_PACKAGES) as cluster:
        if cluster:
            workers = _idle_workers(cluster, count)
            running = _on_workers(cluster, workers, words, printed.put)
        else:
            workers, running = [], _here(words, _gpu_variables(count, gpus), printed.put)
        with running as replicas:
            failed: dict[int, str] = {}  # in the order in which they did
            ended: set[int] = set()
            deadline = math.inf
            while len(ended) < count and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
                for number, replica in enumerate(replicas):
                    if number not in ended and replica.done():
                        ended.add(number)
                        if error := _error(replica):
                            failed[number] = error
                while not printed.empty():
                    print(printed.get(), end="", flush=True)
                if failed:
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
                if cluster:
                    _check_present(cluster, workers)
    if failed:  # of the others: that the connection to the one that failed is lost
        number = min(failed, key=lambda number: LOST in failed[number])
        raise UserError(f"replica {number + 1} of {count}: {failed[number]}")


def exit_with_stage() -> None:
    """In a replica that `run_replicas` has started: exit when the process that did so is gone."""
    if parent := os.environ.get(_PARENT):
        processes.exit_with_parent(int(parent))


@contextlib.contextmanager
def _here(
    words: Sequence[str], variables: Sequence[dict[str, str]], write: Callable[[str], None]
) -> Iterator[list[Any]]:
    """Run replicas on this machine: yield a future of each, and stop them at the end."""
    folder, stopped = os.getcwd(), threading.Event()

    def run(number: int) -> tuple[int, str]:
        own = variables[number] | configs[number]
        return _run(words, folder, own, lambda: not stopped.is_set(), None if number else write)

    with contextlib.ExitStack() as reserved:
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in variables]
        ports = [reserved.enter_context(server).getsockname()[1] for server in sockets]
    configs = _configs([f"127.0.0.1:{port}" for port in ports])
    with ThreadPoolExecutor(len(variables)) as pool:
        try:
            yield [pool.submit(run, number) for number in range(len(variables))]
        finally:
            stopped.set()


@contextlib.contextmanager
def _on_workers(
    cluster: Cluster, workers: Sequence[str], words: Sequence[str], write: Callable[[str], None]
) -> Iterator[list[Any]]:
    """Run a replica on each of some workers: yield a future of each, and stop them at the end."""
    folder, topic = os.getcwd(), f"replicas-{uuid.uuid4().hex}"
    with tempfile.NamedTemporaryFile(dir=files.scratch_dir("replicas")) as file:
        ports = cluster.run(_free_port, file.name)
    if blind := [worker for worker in workers if ports[worker] is None]:
        raise UserError(
            f"the Dask worker at {blind[0]} can't see the folder {folder}, which it has to share"
            " with this machine"
        )
    configs = _configs([f"{urlsplit(worker).hostname}:{ports[worker]}" for worker in workers])
    root = {name: os.environ[name] for name in ("DVC_ROOT",) if name in os.environ}
    start = functools.partial(cluster.client.submit, _run_on_worker, words, folder, pure=False)
    with cluster.errors():
        cluster.client.subscribe_topic(topic, lambda event: write(event[1]))
        futures = [
            start(root | config, None if number else topic, workers=[workers[number]])
            for number, config in enumerate(configs)
        ]
    try:
        yield futures
    finally:
        with contextlib.suppress(Exception):  # the scheduler may be gone
            cluster.client.cancel(futures, force=True)


def _run_on_worker(
    words: Sequence[str], folder: str, variables: dict[str, str], topic: str | None
) -> tuple[int, str]:
    """Run a replica as a task of a worker, until it ends or the task is cancelled."""
    from distributed import Status, get_worker

    worker = get_worker()
    key = worker.get_current_task()

    def is_wanted() -> bool:
        task = worker.state.tasks.get(key)
        is_open = worker.status in (Status.running, Status.paused)
        return is_open and task is not None and task.state == "executing"

    write = functools.partial(worker.log_event, topic) if topic else None
    return _run(words, folder, variables, is_wanted, write)


def _run(
    words: Sequence[str],
    folder: str,
    variables: dict[str, str],
    is_wanted: Callable[[], bool],
    write: Callable[[str], None] | None,
) -> tuple[int, str]:
    """Run Python until it ends or is not wanted any more; return its exit status and its errors.

    If `write` is given, it is called with each line of its output.
    """
    environment = {**os.environ, **variables, _PARENT: str(os.getpid())}
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(
            [sys.executable, *words], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace",
            start_new_session=True,  # Ctrl-C is for the stage, which stops all
        ) as process,
    ):  # fmt: skip

        def stop() -> None:
            while process.poll() is None and is_wanted():
                time.sleep(_POLL_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        threading.Thread(target=stop, daemon=True).start()
        assert process.stdout
        for line in process.stdout:
            if write:
                write(line)
        status = process.wait()
        errors.seek(0)
        return status, errors.read().strip()


def _error(replica: Any) -> str:
    """Return why a replica that has ended failed, or nothing."""
    try:
        status, said = replica.result(timeout=_ANSWER_SECONDS)
    except Exception as error:
        return f"{first_line(error)}; {_RESUME}"
    if status < 0:  # what a library says before it aborts is on the end
        reason = "".join(f" ({line})" for line in said.splitlines()[-1:])
        return f"killed by signal {-status}{reason}; {_RESUME}"
    return (said or f"exit status {status}; {_RESUME}") if status else ""


def _configs(addresses: Sequence[str]) -> list[dict[str, str]]:
    """Return the environment variables by which each replica knows all, and its own number."""
    jobs = {"worker": addresses}
    tasks = [{"type": "worker", "index": number} for number in range(len(addresses))]
    return [{"TF_CONFIG": json.dumps({"cluster": jobs, "task": task})} for task in tasks]


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


def _idle_workers(cluster: Cluster, count: int) -> list[str]:
    """Return workers that have no task, on different machines first."""
    with cluster.errors():
        tasks = cluster.client.processing()
    idle = [worker for worker in sorted(cluster.threads) if not tasks.get(worker)]
    if len(idle) < count:
        raise UserError(
            f"params.yaml: train.replicas: {count} replicas need as many idle workers, found"
            f" {len(idle)} of {cluster}; start more workers, wait for their tasks, or lower it"
        )
    hosts = [urlsplit(worker).hostname for worker in idle]
    order = sorted(range(len(idle)), key=lambda number: hosts[:number].count(hosts[number]))
    return [idle[number] for number in order[:count]]


def _free_port(file: str) -> int | None:
    """Return a free port of this machine, or None if it does not see a file."""
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1] if Path(file).exists() else None


def _check_present(cluster: Cluster, workers: Sequence[str]) -> None:
    """Raise a UserError if a worker is gone."""
    present = cluster.present()
    for number, worker in enumerate(workers, 1):
        if worker not in present:
            raise UserError(
                f"replica {number} of {len(workers)}: the Dask worker at {worker} is gone;"
                f" {_RESUME}"
            )
