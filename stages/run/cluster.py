"""A Dask cluster as the place where work runs: connect, check the workers, map tasks over them.

The cluster is the user's own. Its scheduler and its workers are started in clones of this
repository; the environment variable DASK_SCHEDULER_ADDRESS says where it is.
"""

import contextlib
import functools
import hashlib
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

if TYPE_CHECKING:
    from distributed import Client, Future

_VARIABLE = "DASK_SCHEDULER_ADDRESS"
_DASK = ("dask", "distributed", "cloudpickle")
_CODE = Path(__file__).parents[1]
_HOW = (
    "by `python -m dask` in clones of this version, with the same packages, on the same kind of"
    " system"
)
_CONNECT_SECONDS = 5
_ANSWER_SECONDS = 60  # for an answer of a worker, which may be busy
_CHECK_SECONDS = 5  # without a result, after which the cluster is asked whether it is still there
_TASKS_PER_THREAD = 2  # in flight


class Cluster:
    """A connection to a Dask cluster, limited to the workers that were checked when it was made.

    Workers that join later take no part.

    Attributes
    ----------
    address : str
        Of the scheduler.
    client : distributed.Client
    threads : dict of str to int
        The number of threads of each worker, by its address.
    """

    def __init__(self, address: str, client: "Client") -> None:
        self.address, self.client = address, client
        self.threads = self.present()

    def __str__(self) -> str:
        return f"{cli.count(len(self.threads), 'Dask worker')} at {self.address}"

    def present(self) -> dict[str, int]:
        """Return the workers that are there now, by address, with their number of threads."""
        with self.errors():
            if self.client.status != "running":  # it would try again for half a minute
                raise OSError(self.client.status)
            return self.client.nthreads()

    def run(self, function: Callable[..., Any], *args: Any) -> dict[str, Any]:
        """Run a function on each worker, without waiting for its tasks; return results by worker.

        Raises
        ------
        UserError
            If a worker is gone, does not answer, lacks this code, or the function fails there.
        """
        with self.errors():
            results = self.client.run(
                function, *args, workers=list(self.threads), on_error="return",
                callback_timeout=_ANSWER_SECONDS,
            )  # fmt: skip
        failed = [
            f"{worker} ({cli.first_line(result)})"
            for worker, result in results.items()
            if isinstance(result, Exception)
        ]
        if failed:
            raise UserError(
                f"{cli.count(len(failed), 'worker')} of {self} failed or did not answer:"
                f" {cli.list_names(failed)}; restart them {_HOW}"
            )
        return results

    def map_unordered(
        self,
        function: Callable[..., Any],
        tasks: Iterable[tuple[Any, ...]],
        shared: Sequence[Any] = (),
    ) -> Iterator[Any]:
        """Yield ``function(*task, *shared)`` of each task, in the order in which they finish.

        The tasks of a worker that dies are run by others. At most two tasks for each thread are
        submitted at once. Each worker gets the shared arguments once.

        Raises
        ------
        UserError
            If the scheduler or all workers are gone, or a task takes several workers with it.
        """
        from distributed import CancelledError, wait

        tasks, running, workers = iter(tasks), set["Future"](), list(self.threads)
        with self.errors():
            (common,) = self.client.scatter([tuple(shared)], workers, broadcast=True, hash=False)
        submit = functools.partial(self.client.submit, _call, function, workers=workers, pure=False)
        try:
            while True:
                room = _TASKS_PER_THREAD * sum(self.threads.values()) - len(running)
                for task in itertools.islice(tasks, room):
                    with self.errors():
                        running.add(submit(task, common))
                if not running:
                    return
                try:
                    with self.client.as_current():
                        done, running = wait(running, _CHECK_SECONDS, "FIRST_COMPLETED")
                except TimeoutError:
                    self._check()
                    continue
                except CancelledError:  # the scheduler is gone, or with the workers what they share
                    self._check()
                    raise UserError(f"workers of {self} are gone; run again") from None
                yield from self._results(list(done))
        finally:
            with contextlib.suppress(Exception):  # the scheduler may be gone
                self.client.cancel([*running, common], force=True)

    def _results(self, done: "list[Future]") -> list[Any]:
        from distributed import KilledWorker

        for future in done:
            if future.status == "error":
                error = future.exception()
                if isinstance(error, KilledWorker):
                    error = UserError(
                        f"the same task killed several of {self}, perhaps because memory is short;"
                        " start fewer workers on each machine, and run again"
                    )
                raise error
        with self.errors():
            return self.client.gather(done)

    def _check(self) -> None:
        """Raise a UserError if the scheduler does not answer, or if all workers are gone."""
        if not self.present().keys() & self.threads.keys():
            raise UserError(
                f"none is left of {self}, perhaps because memory is short; run again when there are"
                " workers (restarted ones take part in a new run only)"
            )

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Turn errors of the connection into a UserError."""
        from distributed import CancelledError

        try:
            yield
        # Also those of a client that closed itself, and of tasks that the scheduler took with it.
        except (OSError, RuntimeError, AttributeError, CancelledError):
            raise UserError(
                f"the Dask scheduler at {self.address} is lost; start it and its workers, and run"
                " again"
            ) from None


@contextlib.contextmanager
def connect(packages: Sequence[str]) -> Iterator[Cluster | None]:
    """Connect to the cluster that DASK_SCHEDULER_ADDRESS names; at the end, free its workers.

    Yields None if the variable is not set.

    Parameters
    ----------
    packages : sequence of str
        Distributions whose versions have to be the same on each worker as they are here.

    Raises
    ------
    UserError
        If there is no cluster at that address, or its scheduler or a worker has other packages or
        other code of this project.
    """
    address = os.environ.get(_VARIABLE)
    if not address:
        yield None
        return
    with _client(address) as client:
        cluster = Cluster(address, client)
        _check_equal(cluster, (*_DASK, *packages))
        if not cluster.threads:
            raise UserError(
                f"{_VARIABLE}: the Dask scheduler at {address} has no workers; start some in clones"
                f" of this repository: python -m dask worker {address}"
            )
        yield cluster


@contextlib.contextmanager
def _client(address: str) -> "Iterator[Client]":
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
            client = Client(address, timeout=_CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{_VARIABLE}: no Dask scheduler answers at {address} ({cli.first_line(error)});"
            " expected an address such as tcp://host:8786; start one there (python -m dask"
            " scheduler), or unset the variable to run on this machine alone"
        ) from None
    try:
        yield client
    finally:
        client.close(timeout=_CONNECT_SECONDS)


def _check_equal(cluster: Cluster, packages: tuple[str, ...]) -> None:
    """Raise a UserError that lists where Python, packages, code or kind of system differ.

    The scheduler counts too: it reads the tasks, and needs our modules for that.
    """
    try:
        found = {"the scheduler": cluster.client.run_on_scheduler(_installed, packages)}
    except (ImportError, AttributeError) as error:  # it has no clone, or one of another version
        raise UserError(
            f"the Dask scheduler at {cluster.address} can't run this code"
            f" ({cli.first_line(error)}); restart it and its workers {_HOW}"
        ) from None
    found |= cluster.run(_installed, packages)
    own, refused = _describe(packages), []
    for place, answers in found.items():
        differing = {
            f"{name} {theirs[name]} (here {own[name]})": None
            for theirs in answers
            for name in own
            if theirs[name] != own[name]
        }
        refused += [f"{place} has {', '.join(differing)}"] if differing else []
    if refused:
        raise UserError(
            f"the Dask cluster at {cluster.address} can't be used:"
            f" {cli.list_names(refused, separator='; ')}; restart it {_HOW}"
        )


def _installed(packages: tuple[str, ...]) -> list[dict[str, str]]:
    """Return what is there, and what was there when this process was first asked.

    It may have imported the latter. In between, code or packages may have changed.
    """
    return [_describe(packages), _describe_once(packages)]


def _describe(packages: tuple[str, ...]) -> dict[str, str]:
    """Return what has to be equal everywhere for equal results."""
    described = {
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "system": f"{platform.system()} on {platform.machine()}",
    }
    for name in packages:
        try:
            described[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            described[name] = "missing"
    digest = hashlib.blake2b(digest_size=4)
    for path in sorted(_CODE.rglob("*.py")):
        content = path.read_bytes()
        digest.update(b"%s\0%d\0" % (os.fsencode(path.relative_to(_CODE)), len(content)) + content)
    return described | {"code": digest.hexdigest()}


_describe_once = functools.cache(_describe)


def _call(function: Callable[..., Any], task: tuple[Any, ...], shared: tuple[Any, ...]) -> Any:
    """Run a task on a worker, with one thread for BLAS as in a stage: the last bits depend on it.

    Done before every task, since a library that was just imported has as many as it likes.
    """
    from threadpoolctl import threadpool_limits

    threadpool_limits(1, "blas")
    return function(*task, *shared)
