"""Start the replicas of a training, a process each, and stop all when one of them fails."""

import contextlib
import json
import math
import os
import time
from collections.abc import Sequence
from typing import Any

from stages.run.cli import UserError
from stages.run.cluster import connect
from stages.run.processes import Process, on_workers

LOST = "the connection to another replica is lost"
_PACKAGES = ["keras", "numpy", "tensorflow"]  # of equal versions on all workers
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 5  # for the others to end after one has failed
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
            if len(cluster.threads) < count:
                raise UserError(
                    f"params.yaml: train.replicas: {count} replicas need as many workers, found"
                    f" {cluster}; start more workers, or lower it"
                )
            stack.enter_context(cluster.client.as_current())  # the actors look for it
            processes, variables = on_workers(cluster, count), [{}] * count
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
