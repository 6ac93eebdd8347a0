"""Map a function over tasks, in parallel if that is faster (joblib), or on a cluster (Dask)."""

import itertools
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from stages.run.cli import UserError
from stages.run.cluster import Cluster
from stages.run.processes import cpu_count, exit_with_parent

Result = TypeVar("Result")

_VARIABLE = "PREPARE_WORKERS"
_TRIAL_SECONDS = 0.1  # of work in this process, from which the rest is estimated
_POOL_SECONDS = 1.5  # of work that is left, from which a pool pays: it takes a second to start,
_RUNNING_POOL_SECONDS = 0.2  # unless it was started before
_START_SECONDS = 0.5  # of work that this process does while the pool starts
_IDLE_SECONDS = 10


def worker_count() -> int:
    """Return the number of processes to use: PREPARE_WORKERS, or one per available core.

    Raises
    ------
    UserError
        If PREPARE_WORKERS is not a positive whole number.
    """
    value = os.environ.get(_VARIABLE)
    if not value:
        return cpu_count()
    if value.isdecimal() and int(value):
        return int(value)
    raise UserError(f"{_VARIABLE}: expected a positive number of processes, found {value!r}")


def map_unordered(
    function: Callable[..., Result],
    tasks: Iterable[tuple[Any, ...]],
    count: int,
    shared: Sequence[Any] = (),
    cluster: Cluster | None = None,
) -> Iterator[Result]:
    """Yield ``function(*task, *shared)`` of each task, in the order in which they finish.

    Without a cluster, the first tasks run in this process. If the others would keep it busy for
    longer than a pool takes to start, they run in a pool.

    Parameters
    ----------
    function : callable
        Importable by its name. It returns a result and changes nothing else.
    tasks : iterable of tuple
        Arguments.
    count : int
        The number of tasks.
    shared : sequence
        The last arguments of every task. Large arrays among them are memory-mapped and not copied
        to each process.
    cluster : Cluster, optional
        Where all tasks run.

    Raises
    ------
    UserError
        If a worker process is killed, for instance because memory is short, or the cluster is gone.
    """
    if cluster is not None:
        yield from cluster.map_unordered(function, tasks, shared)
        return
    tasks, started = iter(tasks), time.monotonic()
    workers = worker_count()
    worth_a_pool = _RUNNING_POOL_SECONDS if "joblib" in sys.modules else _POOL_SECONDS
    for done, task in enumerate(tasks, 1):
        yield function(*task, *shared)
        seconds = time.monotonic() - started
        left = seconds / done * (count - done)
        if workers > 1 and seconds > _TRIAL_SECONDS and left > worth_a_pool:
            break
    else:
        return
    import joblib  # takes 0.2 s to import, which small updates avoid
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    pool = joblib.Parallel(
        workers,
        return_as="generator_unordered",
        batch_size=1,
        max_nbytes=2**16,
        idle_worker_timeout=_IDLE_SECONDS,
        initializer=_start_worker,
        initargs=(os.getpid(),),
    )
    # While the pool starts, this process goes on.
    meanwhile = list(itertools.islice(tasks, int(_START_SECONDS * done / seconds)))
    results = pool(joblib.delayed(function)(*task, *shared) for task in tasks)
    try:
        for task in meanwhile:
            yield function(*task, *shared)
        for result in results:  # noqa: UP028 `yield from` would close it, with the warning
            yield result
    except TerminatedWorkerError:
        raise UserError(
            "a worker process was killed, perhaps because memory is short; run again, with fewer"
            f" processes if it happens again: {_VARIABLE}=1 dvc repro"
        ) from None
    finally:
        with warnings.catch_warnings(action="ignore"):  # that the remaining tasks are cancelled
            results.close()


def _start_worker(parent: int) -> None:
    """Make a worker process ignore Ctrl-C, and exit when its parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # about damaged images: the stage lists them
    exit_with_parent(parent)
