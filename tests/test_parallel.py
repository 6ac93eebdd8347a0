"""Mapping a function over tasks: the same results here and in a pool, and a clean end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from stages.run import parallel
from stages.run.cli import UserError

ROOT = Path(__file__).parents[1]


def add(number: int, array: np.ndarray) -> tuple[int, int, int]:
    time.sleep(0.01)
    return number, int(array.sum()) + number, os.getpid()


def work(number: int) -> int:
    """End this worker process, or raise an error that can't be unpickled, or wait."""
    if number == -1 and parallel_worker():
        os.kill(os.getpid(), signal.SIGKILL)
    if number == -2 and parallel_worker():
        raise TwoArgumentsError(1, 2)
    time.sleep(0.05)
    return number


class TwoArgumentsError(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


def parallel_worker() -> bool:
    return "loky" in " ".join(psutil.Process().cmdline())


@pytest.fixture(autouse=True)
def two_workers(monkeypatch):
    monkeypatch.setenv("PREPARE_WORKERS", "2")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def run(count: int) -> list[tuple[int, int, int]]:
    array = np.ones(100_000, np.uint8)
    return sorted(parallel.map_unordered(add, ((n, array) for n in range(count)), count))


def test_much_work_is_shared_by_a_pool():
    results = run(400)
    assert [number for number, _, _ in results] == list(range(400))
    assert [total for _, total, _ in results] == list(range(100_000, 100_400))
    assert len({process for _, _, process in results}) == 3  # this one, and two of the pool


def test_little_work_stays_in_this_process():
    assert {process for _, _, process in run(40)} == {os.getpid()}


def test_one_worker_is_this_process(monkeypatch):
    monkeypatch.setenv("PREPARE_WORKERS", "1")
    assert {process for _, _, process in run(200)} == {os.getpid()}


@pytest.mark.parametrize("value", ["many", "0", "-1", "1.5"])
def test_a_number_of_workers_that_is_none(value, monkeypatch):
    monkeypatch.setenv("PREPARE_WORKERS", value)
    with pytest.raises(UserError, match=f"PREPARE_WORKERS: expected .*{value}"):
        parallel.worker_count()


def test_a_killed_worker_is_told_in_one_line():
    tasks = [*range(20), -1, *range(200)]
    with pytest.raises(UserError, match="a worker process was killed.*PREPARE_WORKERS=1"):
        list(parallel.map_unordered(work, ((n,) for n in tasks), len(tasks)))


def test_what_a_worker_raises_is_raised_here():
    """Also an error that can be pickled and not unpickled."""
    tasks = [*range(20), -2, *range(200)]
    with pytest.raises(Exception) as caught:
        list(parallel.map_unordered(work, ((n,) for n in tasks), len(tasks)))
    assert "TwoArgumentsError" in "".join(
        map(str, (caught.type, caught.value, caught.value.__cause__))
    )


def test_tasks_that_are_no_longer_wanted_are_cancelled_in_silence(recwarn):
    results = parallel.map_unordered(work, ((n,) for n in range(10_000)), 10_000)
    for _ in zip(range(40), results, strict=False):  # until the pool is at work
        pass
    results.close()
    assert "joblib" in sys.modules and not recwarn.list


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_stage(ending):
    code = (
        "import test_parallel as t; from stages.run.parallel import map_unordered\n"
        "from stages.run import cli\n"
        "def main():\n"
        "    for n in map_unordered(t.work, ((n,) for n in range(10_000)), 10_000):\n"
        "        print(n, flush=True)\n"
        "cli.run(main)"
    )
    stage = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    for _ in range(20):  # until the pool is at work
        stage.stdout.readline()
    workers = psutil.Process(stage.pid).children(recursive=True)
    if ending == signal.SIGINT:
        os.killpg(stage.pid, ending)  # as a terminal does
    else:
        stage.send_signal(ending)
    _, errors = stage.communicate(timeout=30)
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert len(workers) >= 2 and not alive
    if ending == signal.SIGINT:
        assert stage.returncode == 130 and errors.strip().count("\n") == 0 and "Stopped" in errors


@pytest.mark.parametrize("seconds", [0, 0.1, 0.3])
def test_ctrl_c_while_workers_start_is_one_line(seconds):
    """They would print a traceback each: of Ctrl-C, or of what they share and is gone."""
    code = (
        "import test_parallel as t; from stages.run.parallel import map_unordered\n"
        "from stages.run import cli\n"
        "cli.run(lambda: [0 for n in map_unordered(t.work, ((n,) for n in range(10_000)), 10_000)])"
    )
    stage = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True, env=os.environ | {"PREPARE_WORKERS": "4"},
    )  # fmt: skip
    process = psutil.Process(stage.pid)
    while not any("loky" in str(child.cmdline()) for child in process.children()):
        time.sleep(0.001)
    time.sleep(seconds)
    os.killpg(stage.pid, signal.SIGINT)
    output, _ = stage.communicate(timeout=60)
    assert (stage.returncode, output) == (130, "Stopped: no partial files are left.\n")
