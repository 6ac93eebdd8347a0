"""Processes that work through tasks on all cores.

Plain subprocesses that speak through their pipes. Nothing else is inherited, so that a worker ends
when the stage does, however that ends: its next answer, at the latest, finds a closed pipe.
"""

import contextlib
import importlib
import os
import pickle
import selectors
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from stages.utils.cli import UserError

_VARIABLE = "PREPARE_WORKERS"
_ROOT = Path(__file__).resolve().parents[2]
_START = "from stages.data.parallel import serve; serve()"
_AHEAD = 2  # tasks that a worker has at hand
_WORTH = 256  # images that are worth a process


def number(images: int) -> int:
    """Return how many processes to use for so many images.

    As many as there are cores for this process, or as PREPARE_WORKERS says, unless the images are
    so few that a process would not pay.
    """
    value = os.environ.get(_VARIABLE)
    if not value:
        affinity = getattr(os, "sched_getaffinity", None)
        most = len(affinity(0)) if affinity else os.cpu_count() or 1
    elif value.isdecimal() and int(value):
        most = int(value)
    else:
        raise UserError(f"{_VARIABLE}: expected a number of processes from 1 on, found {value!r}")
    return min(most, -(-images // _WORTH))


class Workers:
    """A number of worker processes; with one, this process does the work itself.

    Use it as a context: the processes end with it.

    Attributes
    ----------
    count : int
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._processes: dict[subprocess.Popen, ThreadPoolExecutor] = {}  # and who writes to each
        self._closing: set[subprocess.Popen] = set()

    def __enter__(self) -> "Workers":
        if self.count > 1:
            places = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
            for _ in range(self.count):
                process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _START],  # this package, whatever folder we are in
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env=environment,
                )
                self._processes[process] = ThreadPoolExecutor(1)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the processes, whatever they are at."""
        for process in self._processes:
            process.kill()
        for process, writer in self._processes.items():
            process.wait()
            writer.shutdown()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):  # what it could not read any more
                    pipe.close()
        self._processes = {}

    def run(self, kind: type, setup: tuple, tasks: Iterable[tuple]) -> Iterator[Any]:
        """Yield all answers to all tasks, in the order of arrival.

        Parameters
        ----------
        kind : class of a module
            Each process makes one of ``kind(*setup)``. It is called with a task's arguments and
            yields answers; its method `close` ends the work.
        setup : tuple
        tasks : iterable of tuple
        """
        if not self._processes:
            with contextlib.closing(kind(*setup)) as worker:
                for task in tasks:
                    yield from worker(*task)
            return
        tasks = iter(tasks)
        self._closing.clear()
        open_ = dict.fromkeys(self._processes, 0)  # what each has still to end
        with selectors.DefaultSelector() as selector:
            for process in self._processes:
                selector.register(process.stdout, selectors.EVENT_READ, process)
                self._send(process, ("open", (kind.__module__, kind.__name__, setup)))
            for _ in range(_AHEAD):
                for process in self._processes:
                    open_[process] += self._give(process, tasks)
            while any(open_.values()):
                for key, _ in selector.select():
                    process = key.data
                    for word, value in self._take(process):
                        if word == "value":
                            yield value
                        elif word == "error":
                            raise value
                        elif word == "end":
                            open_[process] += self._give(process, tasks) - 1
                        else:
                            open_[process] -= 1

    def _give(self, process: subprocess.Popen, tasks: Iterator[tuple]) -> int:
        """Send the next task, or that there is none; return how many answers that adds."""
        task = next(tasks, None)
        if task is not None:
            self._send(process, ("task", task))
            return 1
        if process in self._closing:
            return 0
        self._closing.add(process)
        self._send(process, ("close", None))
        return 1

    def _send(self, process: subprocess.Popen, message: tuple[str, Any]) -> None:
        # From a thread, since it may wait for the process, and the process for us to read. If that
        # one is no more, reading from it says so.
        self._processes[process].submit(_send, process.stdin, message)

    def _take(self, process: subprocess.Popen) -> Iterator[tuple[str, Any]]:
        """Yield one message, and what else has arrived with it."""
        while True:
            try:
                yield pickle.load(process.stdout)
            except (EOFError, pickle.UnpicklingError):
                raise _died() from None
            if not _buffered(process.stdout):
                return


def _buffered(pipe: Any) -> bool:
    """Tell whether bytes were read already that a selector does not see."""
    os.set_blocking(pipe.fileno(), False)
    try:
        return bool(pipe.peek(1))
    finally:
        os.set_blocking(pipe.fileno(), True)


def _died() -> UserError:
    return UserError(
        "a worker process was ended from outside (is memory short?); run again, with fewer at once"
        f" if need be: {_VARIABLE}=1 dvc repro"
    )


def serve() -> None:
    """Work as a worker: tasks from standard input, answers to standard output, until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the stage's to handle
    warnings.simplefilter("ignore")  # of damaged images: the stage lists them
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # a stray print must not speak for us
    worker: Any = None
    try:
        while True:
            try:
                word, value = pickle.load(source)
                if word == "open":
                    module, name, setup = value
                    worker = getattr(importlib.import_module(module), name)(*setup)
                elif word == "task":
                    for answer in worker(*value):
                        _send(sink, ("value", answer))
                    _send(sink, ("end", None))
                else:
                    worker.close()
                    _send(sink, ("closed", None))
            except (BrokenPipeError, EOFError):
                return
            except Exception as error:
                error.add_note(traceback.format_exc())
                try:
                    pickle.dumps(error)
                except Exception:
                    error = RuntimeError(traceback.format_exc())
                _send(sink, ("error", error))
    except BrokenPipeError:
        pass
    finally:
        os._exit(0)  # what is left in the pipe's buffer has no reader


def _send(pipe: IO[bytes], message: tuple[str, Any]) -> None:
    pickle.dump(message, pipe)
    pipe.flush()
