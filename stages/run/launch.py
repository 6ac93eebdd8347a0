"""Start the replicas of a training, a process each, and stop all when one of them fails."""

import contextlib
import functools
import json
import math
import os
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
from stages.run.cli import UserError
from stages.run.cluster import Cluster, connect

LOST = "the connection to another replica is lost; run again: it resumes after the last epoch"
_PACKAGES = ["keras", "numpy", "tensorflow"]  # of equal versions on all workers
_PARENT = "TRAIN_PARENT"  # the process that has started a replica
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 5  # for the replica to fail to which another has lost the connection
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
        The command after ``python``, which has to call `exit_with_stage`; TF_CONFIG tells it which
        replica it is.
    gpus : int
        The number of GPUs of this machine. If there are some, each replica here gets its own.

    Raises
    ------
    UserError
        If a replica fails, or there are too few workers or GPUs.
    """
    lost, deadline = "", math.inf
    with connect(_PACKAGES) as cluster:
        workers = _idle_workers(cluster, count) if cluster else []
        started = _on_workers(cluster, workers, words) if cluster else _here(count, words, gpus)
        with started as replicas:
            running = dict(enumerate(replicas))
            while running and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
                left = cluster.workers() if cluster else []
                for number, replica in list(running.items()):
                    if replica.done():
                        error = replica.result(_ANSWER_SECONDS)
                    elif cluster and workers[number] not in left:
                        error = f"the Dask worker at {workers[number]} is gone; {_RESUME}"
                    else:
                        continue
                    del running[number]
                    failure = f"replica {number + 1} of {count}: {error}"
                    if error and LOST not in error:
                        raise UserError(failure)
                    if error and not lost:  # by one that fails in a moment, and names the cause
                        lost, deadline = failure, time.monotonic() + _GRACE_SECONDS
    if lost:
        raise UserError(lost)


def exit_with_stage() -> None:
    """In a replica that `run_replicas` has started: exit when the process that did so is gone."""
    if parent := os.environ.get(_PARENT):
        processes.exit_with_parent(int(parent))


@contextlib.contextmanager
def _here(count: int, words: Sequence[str], gpus: int) -> Iterator[list[Any]]:
    """Run replicas on this machine: yield a future of each, and stop them at the end."""
    if 0 < gpus < count:
        raise UserError(
            f"params.yaml: train.replicas: {count} replicas need as many GPUs, found {gpus}; lower"
            " it, or hide the GPUs: CUDA_VISIBLE_DEVICES=-1"
        )
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    variables = _tf_configs([f"127.0.0.1:{server.getsockname()[1]}" for server in servers])
    for server in servers:
        server.close()
    if gpus:
        names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        for own, name in zip(variables, names.split(","), strict=False):
            own["CUDA_VISIBLE_DEVICES"] = name
    folder, stopped = os.getcwd(), threading.Event()
    with ThreadPoolExecutor(count) as pool:
        try:
            yield [
                pool.submit(_run, words, folder, own, stopped.is_set, None if number else _write)
                for number, own in enumerate(variables)
            ]
        finally:
            stopped.set()


@contextlib.contextmanager
def _on_workers(
    cluster: Cluster, workers: Sequence[str], words: Sequence[str]
) -> Iterator[list[Any]]:
    """Run a replica on each of some workers: yield a future of each.

    They are stopped when the connection to the cluster ends.
    """
    folder, topic = os.getcwd(), f"replicas-{uuid.uuid4().hex}"
    with tempfile.NamedTemporaryFile(dir=files.scratch_dir("replicas")) as file:
        ports = cluster.run(_free_port, file.name)
    if blind := [worker for worker in workers if not ports.get(worker)]:
        raise UserError(
            f"the Dask worker at {blind[0]} can't see the folder {folder}, which it has to share"
            " with this machine"
        )
    variables = _tf_configs([f"{urlsplit(worker).hostname}:{ports[worker]}" for worker in workers])
    root = {"DVC_ROOT": os.environ.get("DVC_ROOT", folder)}
    start = functools.partial(cluster.client.submit, _run_on_worker, words, folder, pure=False)
    cluster.client.subscribe_topic(topic, lambda event: _write(event[1]))
    yield [
        start(own | root, None if number else topic, workers=[workers[number]])
        for number, own in enumerate(variables)
    ]


def _run_on_worker(
    words: Sequence[str], folder: str, variables: dict[str, str], topic: str | None
) -> str:
    """Run a replica as a task of a worker, until it ends or the task is canceled."""
    from distributed import Status, get_worker

    worker = get_worker()
    task = worker.state.tasks[worker.get_current_task()]

    def is_stopped() -> bool:
        is_open = worker.status in (Status.running, Status.paused)
        return not is_open or task.state != "executing"

    write = functools.partial(worker.log_event, topic) if topic else None
    return _run(words, folder, variables, is_stopped, write)


def _run(
    words: Sequence[str],
    folder: str,
    variables: dict[str, str],
    is_stopped: Callable[[], bool],
    write: Callable[[str], None] | None,
) -> str:
    """Run Python until it ends or is stopped; return why it failed, or nothing.

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
            while process.poll() is None and not is_stopped():
                time.sleep(_POLL_SECONDS)
            process.kill()

        threading.Thread(target=stop, daemon=True).start()
        for line in process.stdout or ():
            if write:
                write(line)
        status = process.wait()
        errors.seek(0)
        said = errors.read().strip()
    if status < 0:  # what a library says before it aborts is on the end
        reason = "".join(f" ({line})" for line in said.splitlines()[-1:])
        return f"killed by signal {-status}{reason}; {_RESUME}"
    return (said or f"exit status {status}; {_RESUME}") if status else ""


def _write(line: str) -> None:
    print(line, end="", flush=True)


def _tf_configs(addresses: Sequence[str]) -> list[dict[str, str]]:
    """Return the environment variable by which each replica knows all, and its own number."""
    jobs = {"worker": addresses}
    tasks = [{"type": "worker", "index": number} for number in range(len(addresses))]
    return [{"TF_CONFIG": json.dumps({"cluster": jobs, "task": task})} for task in tasks]


def _idle_workers(cluster: Cluster, count: int) -> list[str]:
    """Return workers that have no task, on different machines first."""
    tasks = cluster.client.processing()
    idle = [worker for worker in cluster.workers() if not tasks.get(worker)]
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
