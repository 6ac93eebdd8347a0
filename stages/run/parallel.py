"""Map a function over tasks, in parallel if that is faster (joblib), or on a cluster (Dask)."""

import contextlib
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import resource_tracker
from typing import Any, TypeVar

from stages.run.cli import UserError
from stages.run.cluster import Cluster
from stages.run.processes import cpu_count, exit_with_parent

Result = TypeVar("Result")

_VARIABLE = "PREPARE_WORKERS"
_TRIAL_SECONDS = 0.1  # of work in this process, from which the rest is estimated
_POOL_SECONDS = 1.5  # of work that is left, from which a pool pays: it takes a second to start
_IDLE_SECONDS = 10


def worker_count() -> int:
    """Return the number of processes to use: PREPARE_WORKERS, or one per available core."""
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

    They run on the cluster, if one is given. Otherwise the first run in this process, and the
    others in a pool, if they take longer than a pool takes to start.

    Parameters
    ----------
    function : callable
        Importable by its name. It returns a result and changes nothing else.
    tasks, count : iterable of tuple, int
        The first arguments of each task, and the number of tasks.
    shared : sequence
        The last arguments of every task. Large arrays among them are memory-mapped, not copied.

    Raises
    ------
    UserError
        If PREPARE_WORKERS is no positive number, if a worker process is killed, for instance
        because memory is short, or if the cluster is gone.
    """
    if cluster is not None:
        yield from cluster.map_unordered(function, tasks, shared)
        return
    tasks, workers, started = iter(tasks), worker_count(), time.monotonic()
    for done, task in enumerate(tasks, 1):
        yield function(*task, *shared)
        seconds = time.monotonic() - started
        is_long = seconds > _TRIAL_SECONDS and seconds / done * (count - done) > _POOL_SECONDS
        if is_long and workers > 1:
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
    results = None
    try:
        with _ctrl_c_later():
            results = pool(joblib.delayed(function)(*task, *shared) for task in tasks)
        for result in results:  # noqa: UP028 `yield from` would close it, with the warning
            yield result
    except KeyboardInterrupt:
        threading.excepthook = lambda _: None  # joblib's thread may miss a task that was cancelled
        raise
    except TerminatedWorkerError:
        raise UserError(
            "a worker process was killed, perhaps because memory is short; run again, with fewer"
            f" processes if it happens again: {_VARIABLE}=1 dvc repro"
        ) from None
    finally:
        if results is not None:
            with warnings.catch_warnings(action="ignore"):  # that remaining tasks are cancelled
                results.close()


@contextlib.contextmanager
def _ctrl_c_later() -> Iterator[None]:
    """Let Ctrl-C wait for the end of a block; processes that are started in it never get it."""
    pressed = []
    resource_tracker.ensure_running()  # joblib would start it, which unblocks the signal
    handler = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        signal.signal(signal.SIGINT, handler)
    if pressed:
        signal.raise_signal(signal.SIGINT)


def _start_worker(parent: int) -> None:
    """Make a worker process ignore Ctrl-C, and exit when its parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # about damaged images: the stage lists them
    exit_with_parent(parent)
