"""A Dask cluster as the place where work runs: connect, check the workers, map tasks over them.

The cluster is the user's own. Its scheduler and its workers are started in clones of this
repository; the environment variable DASK_SCHEDULER_ADDRESS says where it is.
"""

import contextlib
import functools
import importlib.metadata
import itertools
import logging
import os
import platform
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.run import cli
from stages.run.cli import UserError
from stages.run.files import fingerprint

if TYPE_CHECKING:
    from distributed import Client, Future

_VARIABLE = "DASK_SCHEDULER_ADDRESS"
_DASK = ("dask", "distributed", "cloudpickle")
_CODE = Path(__file__).parents[1]
_RESTART = "restart it in a clone of this version, with the same packages, on a like system"
_CONNECT_SECONDS = 5
_ANSWER_SECONDS = 60  # for an answer of a worker, which may be busy
_CHECK_SECONDS = 5  # without a result, after which the cluster is asked whether it is still there
_TASKS_PER_THREAD = 2  # in flight


class Cluster:
    """A connection to a Dask cluster, limited to the workers that it had when it was made."""

    def __init__(self, address: str, client: "Client") -> None:
        self.address, self.client = address, client
        self._threads: dict[str, int] = client.nthreads()  # of each worker, by its address

    def __str__(self) -> str:
        return f"{cli.count(len(self._threads), 'Dask worker')} at {self.address}"

    def workers(self) -> list[str]:
        """Return the addresses of the workers that are left."""
        if self.client.status != "running":  # it would try again for half a minute
            raise OSError(self.client.status)
        return sorted(self._threads.keys() & self.client.nthreads().keys())

    def run(self, function: Callable[..., Any], *args: Any) -> dict[str, Any]:
        """Run a function on each worker, without waiting for its tasks; return results by worker.

        A worker that is there and does not answer, or where the function fails, is a UserError.
        """
        results = self.client.run(
            function, *args, workers=self.workers(), on_error="return",
            callback_timeout=_ANSWER_SECONDS,
        )  # fmt: skip
        results = {worker: results[worker] for worker in self.workers()}  # the others are gone
        for worker, result in results.items():
            if isinstance(result, Exception):
                reason = cli.first_line(result)
                raise UserError(f"the Dask worker at {worker} failed ({reason}); {_RESTART}")
        return results

    def map_unordered(
        self,
        function: Callable[..., Any],
        tasks: Iterable[tuple[Any, ...]],
        shared: Sequence[Any] = (),
    ) -> Iterator[Any]:
        """Yield ``function(*task, *shared)`` of each task, in the order in which they finish.

        The tasks of a worker that dies are run by others. At most two tasks for each thread are
        submitted at once. Each worker gets the shared arguments once. It is a UserError if all
        workers are gone.
        """
        from distributed import wait

        workers, limit = list(self._threads), _TASKS_PER_THREAD * sum(self._threads.values())
        submit = functools.partial(self.client.submit, pure=False)
        # A task has made them, not `scatter`: Dask makes them again if a worker dies with them.
        common = submit(functools.partial(tuple, shared), workers=workers)
        _copies = [submit(len, common, workers=[worker]) for worker in workers]
        tasks, running = iter(tasks), set["Future"]()
        while True:
            running |= {
                submit(_call, function, task, common, workers=workers)
                for task in itertools.islice(tasks, limit - len(running))
            }
            if not running:
                return
            try:
                done, running = wait(running, _CHECK_SECONDS, "FIRST_COMPLETED")
            except TimeoutError:
                if not self.workers():
                    raise UserError(
                        f"none is left of {self}, perhaps because memory is short; run again when"
                        " there are workers (restarted ones take part in a new run only)"
                    ) from None
            else:
                yield from self.client.gather(list(done))


@contextlib.contextmanager
def connect(packages: Sequence[str]) -> Iterator[Cluster | None]:
    """Connect to the cluster that DASK_SCHEDULER_ADDRESS names; at the end, free its workers.

    Yields None if the variable is not set. It is a UserError if there is no cluster, if its
    scheduler or a worker has other code of this project or another version of one of the packages,
    and if the scheduler is lost in the block.
    """
    address = os.environ.get(_VARIABLE)
    if not address:
        yield None
        return
    with _connect(address) as client:
        from distributed import CancelledError, KilledWorker
        from distributed.comm import CommClosedError

        try:
            cluster = Cluster(address, client)
            _check_equal(cluster, (*_DASK, *packages))
            yield cluster
        except KilledWorker:
            raise UserError(
                f"the same task killed several of {cluster}, perhaps because memory is short; start"
                " fewer workers on each machine, and run again"
            ) from None
        except UserError:
            raise
        except Exception as error:
            # A scheduler that was started again cancels the tasks, of which it knows nothing.
            is_lost = client.status != "running"
            if not is_lost and not isinstance(error, CancelledError | CommClosedError):
                raise
            raise UserError(
                f"the Dask scheduler at {address} is lost; start it and its workers, and run again"
            ) from None


def _connect(address: str) -> "Client":
    try:
        from distributed import Client
        from distributed.comm import get_address_host_port
    except ImportError:
        raise UserError(
            f"{_VARIABLE} is set ({address}), but Dask is not installed:"
            ' pip install ".[cluster]", or unset it to run on this machine alone'
        ) from None
    # What matters is told in a UserError.
    for name in ("distributed", "distributed.client", "tornado.application"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        get_address_host_port(address)  # a client that fails over it takes 10 s to end
        with warnings.catch_warnings(action="ignore"):  # about versions, which are checked here
            return Client(address, timeout=_CONNECT_SECONDS)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{_VARIABLE}: no Dask scheduler answers at {address} ({cli.first_line(error)});"
            " expected an address such as tcp://host:8786; start one there (python -m dask"
            " scheduler), or unset the variable to run on this machine alone"
        ) from None


def _check_equal(cluster: Cluster, packages: tuple[str, ...]) -> None:
    """Raise a UserError that lists where Python, packages, code or kind of system differ."""
    try:  # the scheduler counts too: it reads the tasks, and needs our modules for that
        found = {"scheduler": cluster.client.run_on_scheduler(_installed, packages)}
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"the Dask scheduler at {cluster.address} lacks this code ({cli.first_line(error)});"
            f" {_RESTART}"
        ) from None
    found |= cluster.run(_installed, packages)
    own, refused = _installed(packages), []
    for place, theirs in found.items():
        names = [name for name in own if theirs[name] != own[name]]
        if differing := ", ".join(f"{name} {theirs[name]} (here {own[name]})" for name in names):
            refused.append(f"{place} has {differing}")
    if refused:
        raise UserError(
            f"the Dask cluster at {cluster.address} can't be used:"
            f" {cli.list_names(refused, separator='; ')}; {_RESTART}"
        )
    if len(found) == 1:
        raise UserError(
            f"{_VARIABLE}: the Dask scheduler at {cluster.address} has no workers; start some in"
            f" clones of this repository: python -m dask worker {cluster.address}"
        )


def _installed(packages: tuple[str, ...]) -> dict[str, str]:
    """Return what has to be equal everywhere for equal results.

    Of the code, also what is in its files now, if that has changed: later imports read it.
    """
    found, code = _imported(packages), _code()
    return found if found["code"] == code else found | {"code": f"{found['code']}, now {code}"}


@functools.cache  # as when this process was first asked: it may have imported that
def _imported(packages: tuple[str, ...]) -> dict[str, str]:
    python = ".".join(platform.python_version_tuple()[:2])
    system = {"Python": python, "system": f"{platform.system()} on {platform.machine()}"}
    versions = {name: importlib.metadata.version(name) for name in packages}
    return system | versions | {"code": _code()}


def _code() -> str:
    return fingerprint(_CODE.rglob("[!.]*.py"))[:8]


def _call(function: Callable[..., Any], task: tuple[Any, ...], shared: tuple[Any, ...]) -> Any:
    """Run a task on a worker, with one thread for BLAS as in a stage: the last bits depend on it.

    Done before every task, since a library that was just imported has as many as it likes.
    """
    from threadpoolctl import threadpool_limits

    threadpool_limits(1, "blas")
    return function(*task, *shared)
