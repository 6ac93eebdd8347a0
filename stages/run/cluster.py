"""A Dask cluster as the place where work runs: connect, check the workers, map tasks over them.

The cluster is the user's own, started in any of Dask's ways; the environment variable
DASK_SCHEDULER_ADDRESS says where it is. Workers need the same versions of the packages that affect
the results. The code of this project is sent to them.
"""

import contextlib
import hashlib
import importlib
import io
import itertools
import logging
import os
import pickle
import queue
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.run import cli
from stages.run.cli import UserError

if TYPE_CHECKING:
    from distributed import Client, Future, Worker

_VARIABLE = "DASK_SCHEDULER_ADDRESS"
_CONNECT_SECONDS = 5
_ANSWER_SECONDS = 60  # for an answer of the scheduler, or of a worker, both of which may be busy
_CHECK_SECONDS = 5  # without a result, after which the cluster is asked whether it is still there
_TASKS_PER_THREAD = 2  # in flight
_DASK = ("Python", "dask", "distributed", "cloudpickle")  # what the scheduler needs, too
_PACKAGE = "stages"


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

    def __init__(self, address: str, client: "Client", threads: dict[str, int]) -> None:
        self.address, self.client, self.threads = address, client, threads

    def __str__(self) -> str:
        return f"{cli.count(len(self.threads), 'Dask worker')} at {self.address}"

    def run(self, function: Callable[..., Any], *args: Any) -> dict[str, Any]:
        """Run a function on each worker, without waiting for its tasks; return results by worker.

        An exception of the function is returned as its result, unless it is an OSError.

        Raises
        ------
        UserError
            If a worker is gone, does not answer, or has no room on its disk, say.
        """
        with self.errors():
            results = self.client.run(
                function,
                *args,
                workers=list(self.threads),
                on_error="return",
                callback_timeout=_ANSWER_SECONDS,
            )
        failed = [
            f"{worker} ({cli.first_line(result)})"
            for worker, result in results.items()
            if isinstance(result, OSError)
        ]
        if failed:
            raise UserError(
                f"{cli.count(len(failed), 'worker')} of {self} failed or did not answer:"
                f" {cli.list_names(failed)}; correct that, and run again"
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
        submitted at once.

        Parameters
        ----------
        function : callable
            A function of a module of this project.
        tasks : iterable of tuple
        shared : sequence
            The last arguments of all tasks; each worker gets them once.

        Raises
        ------
        UserError
            If the scheduler or all workers are gone, or a task takes several workers with it.
        """
        tasks, running = iter(tasks), set["Future"]()
        done: queue.SimpleQueue[Future] = queue.SimpleQueue()
        # The scheduler reads what is submitted, and lacks our modules: it gets them as bytes.
        common = self._submit(pickle.loads, pickle.dumps(tuple(shared), pickle.HIGHEST_PROTOCOL))
        try:
            while True:
                room = _TASKS_PER_THREAD * sum(self.threads.values()) - len(running)
                for task in itertools.islice(tasks, room):
                    call = pickle.dumps((function, task), pickle.HIGHEST_PROTOCOL)
                    future = self._submit(_runner(), call, common)
                    running.add(future)
                    future.add_done_callback(done.put)
                if not running:
                    return
                finished = self._wait(done)
                running.difference_update(finished)
                yield from self._results(finished)
        finally:
            with contextlib.suppress(Exception):  # the scheduler may be gone
                self.client.cancel([*running, common], force=True)

    def present(self) -> dict[str, int]:
        """Return the workers that are there now, by address, with their number of threads."""
        with self.errors():
            if (scheduler := self.client.scheduler) is None:
                raise OSError("closed")
            return self.client.sync(scheduler.ncores, callback_timeout=_ANSWER_SECONDS)

    def _submit(self, function: Callable[..., Any], *args: Any) -> "Future":
        with self.errors():
            return self.client.submit(function, *args, workers=list(self.threads), pure=False)

    def _wait(self, done: "queue.SimpleQueue[Future]") -> "list[Future]":
        """Return the tasks that have finished, one or more."""
        while True:
            try:
                finished = [done.get(timeout=_CHECK_SECONDS)]
            except queue.Empty:
                self._check()
                continue
            while not done.empty():
                finished.append(done.get())
            return finished

    def _results(self, finished: "list[Future]") -> list[Any]:
        from distributed import KilledWorker
        from distributed.client import FutureCancelledError

        async def fetch() -> list[Any]:
            return await self.client.gather(finished, asynchronous=True)

        try:
            return self.client.sync(fetch, callback_timeout=_ANSWER_SECONDS)
        except KilledWorker:
            raise UserError(
                f"the same task killed several of {self}, perhaps because memory is short; start"
                " fewer workers on each machine, and run again"
            ) from None
        except ModuleNotFoundError as error:
            if error.name != _PACKAGE:
                raise
            raise UserError(
                f"a worker of {self} was restarted, perhaps because memory is short; run again"
            ) from None
        except (FutureCancelledError, OSError):
            if any(future.status == "error" for future in finished):
                raise  # by the function
            raise self._lost() from None

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
        try:
            yield
        except (OSError, RuntimeError, AttributeError):  # also of a client that closed itself
            raise self._lost() from None

    def _lost(self) -> UserError:
        return UserError(f"the Dask scheduler at {self.address} is lost; start it, and run again")


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
        If there is no cluster at that address, or a worker can't take part.
    """
    address = os.environ.get(_VARIABLE)
    if not address:
        yield None
        return
    with _client(address) as client:
        cluster = Cluster(address, client, {})
        cluster.threads = cluster.present()
        if not cluster.threads:
            raise UserError(
                f"{_VARIABLE}: the Dask scheduler at {address} has no workers; start some:"
                f" dask worker {address}"
            )
        _check_versions(cluster, packages)
        _send_code(cluster)
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
    for name in ("distributed", "distributed.client"):  # what matters is told in a UserError
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        get_address_host_port(address)  # a client that fails over it takes 10 s to end
        with warnings.catch_warnings(action="ignore"):  # about versions, which are checked here
            client = Client(address, timeout=_CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{_VARIABLE}: no Dask scheduler answers at {address} ({cli.first_line(error)});"
            " expected an address such as tcp://host:8786; start one there (dask scheduler), or"
            " unset the variable to run on this machine alone"
        ) from None
    try:
        yield client
    finally:
        client.close(timeout=_CONNECT_SECONDS)


def _check_versions(cluster: Cluster, packages: Sequence[str]) -> None:
    """Raise a UserError that lists the workers whose Python or packages are not the same as here.

    The processor's type and the system count too: other libraries are used there.
    """
    from distributed.versions import get_versions

    names = [*_DASK[1:], *packages]

    def flatten(found: dict[str, dict[str, Any]]) -> dict[str, str | None]:
        host = found["host"]
        python = ".".join(host["python"].split(".")[:2])
        system = f"{host['OS']} on {host['machine']}"
        return {"Python": python, "system": system} | {
            name: found["packages"][name] for name in names
        }

    with cluster.errors():
        scheduler = cluster.client.run_on_scheduler(
            get_versions, names, callback_timeout=_ANSWER_SECONDS
        )
    own, refused = flatten(get_versions(names)), []
    for place, found in {"the scheduler": scheduler, **cluster.run(get_versions, names)}.items():
        theirs = flatten(found)
        differing = [
            f"{name} {theirs[name] or 'missing'} (here {own[name]})"
            for name in (_DASK if found is scheduler else own)
            if theirs[name] != own[name]
        ]
        refused += [f"{place} has {', '.join(differing)}"] if differing else []
    if refused:
        raise UserError(
            f"the Dask cluster at {cluster.address} can't be used:"
            f" {cli.list_names(refused, separator='; ')}; install the same versions there, on the"
            " same kind of system, and restart the scheduler and its workers"
        )


def _send_code(cluster: Cluster) -> None:
    """Send the code of this project to the workers.

    Raises
    ------
    UserError
        If a worker has already imported another version of it, which it can't forget.
    """
    import cloudpickle

    code, digest = _zipped_code()
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # not there yet
    try:
        answers = cluster.run(_import_code, code, digest)
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    refused = [f"{worker} ({answer})" for worker, answer in sorted(answers.items()) if answer]
    if refused:
        raise UserError(
            f"{cli.count(len(refused), 'worker')} of the Dask cluster can't run this version of the"
            f" code in {_PACKAGE}/: {cli.list_names(refused, separator='; ')}; correct that, and"
            " restart them"
        )


def _zipped_code() -> tuple[bytes, str]:
    """Return the Python files of this project as a ZIP, and a hash of them."""
    root = Path(__file__).parents[2]
    files = {path.relative_to(root): path for path in sorted((root / _PACKAGE).rglob("*.py"))}
    digest, archive = hashlib.blake2b(digest_size=16), io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, path in files.items():
            content = path.read_bytes()
            opened.writestr(name.as_posix(), content)
            digest.update(b"%s\0%d\0%s" % (os.fsencode(name), len(content), content))
    return archive.getvalue(), digest.hexdigest()


def _import_code(code: bytes, digest: str, dask_worker: "Worker") -> str | None:
    """Import the project on a worker; return why that is not possible, or None."""
    folder = os.path.join(dask_worker.local_directory, f"{_PACKAGE}-{digest}")
    try:
        if folder not in sys.path:
            zipfile.ZipFile(io.BytesIO(code)).extractall(folder)
            sys.path.insert(0, folder)
            importlib.invalidate_caches()
        for name in ("numpy", _PACKAGE):
            importlib.import_module(name)
        limits = importlib.import_module("threadpoolctl").threadpool_limits
        limits(1, "blas")  # as in a stage: the last bits depend on it
    except (ImportError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    source = sys.modules[_PACKAGE].__file__
    return None if source and source.startswith(folder) else f"it has imported {source}"


def _runner() -> Callable[[bytes, tuple[Any, ...]], Any]:
    """Return a function that is sent as code: a local one is no part of a module."""

    def run(call: bytes, shared: tuple[Any, ...]) -> Any:
        function, task = pickle.loads(call)
        return function(*task, *shared)

    return run
