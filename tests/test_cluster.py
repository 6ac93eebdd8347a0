"""A Dask cluster: the same bytes as on one machine, and one line for whatever goes wrong.

Schedulers and workers are real processes on the loopback interface.
"""

import contextlib
import importlib.metadata
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_prepare import Place

from stages.data import duplicates, scan
from stages.run import cluster
from stages.run.cli import UserError

distributed = pytest.importorskip("distributed")
ROOT = Path(__file__).parents[1]
PACKAGES = ("numpy", "pillow")
SECONDS = 60  # for what takes a few, on a slow machine


class Dask:
    """A scheduler and its workers, started as README says: each a process, in a clone."""

    def __init__(self, folder: Path, clone: Path = ROOT, **environment: str) -> None:
        self.file, self.clone = folder / "scheduler.json", clone
        self.environment = os.environ | environment
        self.workers: list[subprocess.Popen] = []
        self.scheduler: subprocess.Popen | None = None

    def _start(self, *words: str, clone: Path) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "dask", *words, "--host", "127.0.0.1", "--no-dashboard",
             "--scheduler-file", str(self.file)],
            cwd=clone, env=self.environment, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def start_worker(self, clone: Path = ROOT) -> subprocess.Popen:
        words = ["worker", "--no-nanny", "--nthreads=1", "--local-directory", str(self.file.parent)]
        worker = self._start(*words, clone=clone)
        self.workers.append(worker)
        return worker

    def ready(self, count: int) -> str:
        """Let a scheduler and so many workers run, no more; return the scheduler's address."""
        if self.scheduler is None or self.scheduler.poll() is not None:
            self.close()
            self.file.unlink(missing_ok=True)
            self.scheduler = self._start("scheduler", "--port", "0", clone=self.clone)
        self.workers = [worker for worker in self.workers if worker.poll() is None]
        for worker in self.workers[count:]:
            self.kill(worker)
        while len(self.workers) < count:
            self.start_worker()
        return self.wait_for(count)

    def kill(self, process: subprocess.Popen) -> None:
        process.kill()
        process.wait()

    @contextlib.contextmanager
    def client(self) -> Iterator["distributed.Client"]:
        with distributed.Client(
            scheduler_file=str(self.file), timeout=SECONDS, set_as_default=False
        ) as client:
            yield client

    def wait_for(self, workers: int) -> str:
        """Wait until so many workers are there; return the scheduler's address."""
        with self.client() as client:
            wait(lambda: len(client.nthreads()) == workers)
            return client.scheduler.address

    def close(self) -> None:
        for process in [*self.workers, *([self.scheduler] if self.scheduler else [])]:
            self.kill(process)


def wait(condition) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def dask(tmp_path_factory):
    running = Dask(tmp_path_factory.mktemp("dask"), OPENBLAS_NUM_THREADS="2")
    yield running
    running.close()


@pytest.fixture
def address(dask, monkeypatch):
    address = dask.ready(2)
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", address)
    return address


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch):
    monkeypatch.setattr(scan, "_CHUNK_IMAGES", 4)
    monkeypatch.setattr(duplicates, "_BLOCK", 16)


def read(root: Path) -> dict[str, bytes]:
    folders = (root / name for name in ("out", "metrics"))
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for folder in folders
        for path in sorted(folder.rglob("*.*"))
    }


def test_prepare_writes_the_same_bytes_even_if_a_worker_dies(
    dask, address, tmp_path, monkeypatch, capsys
):
    place = Place(tmp_path).fill(each=60).darken(8)
    with monkeypatch.context() as here:
        here.delenv("DASK_SCHEDULER_ADDRESS")
        place.prepare()
    expected = read(place.root)
    shutil.rmtree(place.root / "out")
    dask.start_worker()
    dask.wait_for(3)
    victim, delay = random.choice(dask.workers), random.uniform(0, 0.5)

    def kill() -> None:
        with dask.client() as client:
            wait(lambda: any(client.processing().values()))
            time.sleep(delay)
            dask.kill(victim)

    thread = threading.Thread(target=kill)
    thread.start()
    assert place.prepare(cache="cache of 3") > 100
    thread.join()
    assert f"on 3 Dask workers at {address}" in capsys.readouterr().out
    assert read(place.root) == expected, f"worker killed after {delay} s"


def test_a_worker_that_dies_between_two_maps_costs_nothing(dask, address):
    dask.start_worker()
    dask.wait_for(3)
    with cluster.connect(()) as connected:
        for numbers in (range(20), range(5)):
            found = connected.map_unordered(sum, [([n],) for n in numbers], [1])
            assert sorted(found) == [n + 1 for n in numbers]
            if len(dask.workers) == 3:
                dask.kill(dask.workers.pop())
                dask.wait_for(2)
        assert connected.run(len, "abc") == dict.fromkeys(connected.workers(), 3)


def test_a_task_has_one_thread_for_blas(address):
    with cluster.connect(PACKAGES) as connected:
        tasks = [("__import__('threadpoolctl').threadpool_info()",)] * 8
        found = [*connected.map_unordered(eval, tasks, [{"loaded": np.ones(1)}])]
    assert {pool["num_threads"] for pools in found for pool in pools} == {1}


def test_workers_with_other_packages_or_code_are_refused(dask, address, tmp_path):
    metadata = tmp_path / "pillow-0.1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Name: pillow\nVersion: 0.1\n")
    shutil.copytree(ROOT / "stages", tmp_path / "stages", ignore=lambda *_: ["__pycache__"])
    changed = tmp_path / "stages" / "data" / "scan.py"
    text = changed.read_text()
    changed.write_text(text.replace("256", "128"))
    worker = dask.start_worker(tmp_path)
    dask.wait_for(3)
    here = importlib.metadata.version("pillow")
    line = rf"{address} can't be used: tcp://127.0.0.1:\d+ has pillow 0.1 \(here {here}\), code"
    with pytest.raises(UserError, match=line), cluster.connect(PACKAGES):
        pass
    changed.write_text(text)
    shutil.rmtree(metadata.parent)
    line = r"has pillow 0.1 .*, code \w+, now (\w+) \(here \1\); restart it in"
    with pytest.raises(UserError, match=line), cluster.connect(PACKAGES):
        pass  # it may have imported what was there first
    dask.kill(worker)
    dask.wait_for(2)
    (tmp_path / "empty").mkdir()
    dask.start_worker(tmp_path / "empty")
    dask.wait_for(3)
    line = "the Dask worker at tcp://.* failed .*'stages'.*; restart it in a clone"
    with pytest.raises(UserError, match=line), cluster.connect(PACKAGES):
        pass


def test_a_scheduler_outside_a_clone_or_without_workers_is_refused(tmp_path, monkeypatch):
    for clone, line in (
        (tmp_path, "scheduler at .* lacks this code .*'stages'.*; restart it in a clone"),
        (ROOT, "scheduler at .* has no workers; start some in clones"),
    ):
        dask = Dask(tmp_path, clone)
        try:
            monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", dask.ready(0))
            with pytest.raises(UserError, match=line), cluster.connect(()):
                pass
        finally:
            dask.close()


def test_ctrl_c_frees_the_workers(dask, address):
    code = (
        "import time; from stages.run import cli, cluster\n"
        "def main():\n"
        "    with cluster.connect(()) as dask:\n"
        "        for _ in dask.map_unordered(time.sleep, ((0.1,) for _ in range(10_000))):\n"
        "            print('a task is done', flush=True)\n"
        "cli.run(main)"
    )
    stage = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert "done" in stage.stdout.readline(), stage.stderr.read()
    stage.send_signal(signal.SIGINT)
    _, errors = stage.communicate(timeout=SECONDS)
    assert (stage.returncode, errors) == (130, "Stopped: no partial files are left.\n")
    with dask.client() as client:
        wait(lambda: not any(client.processing().values()))


def test_what_a_task_raises_is_raised_here(address):
    with cluster.connect(()) as connected, pytest.raises(FileNotFoundError, match="nowhere"):
        list(connected.map_unordered(os.stat, [("nowhere",)]))


@pytest.mark.parametrize("wrong", ["tcp://127.0.0.1:1", "localhost", "http://localhost:8786"])
def test_an_address_at_which_no_scheduler_answers(wrong, monkeypatch):
    monkeypatch.setattr(cluster, "_CONNECT_SECONDS", 1)
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", wrong)
    line = f"DASK_SCHEDULER_ADDRESS: no Dask scheduler answers at {wrong} .*expected"
    with pytest.raises(UserError, match=line), cluster.connect(PACKAGES):
        pass


def test_dask_that_is_not_installed(monkeypatch):
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", "tcp://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "distributed", None)
    words = r'Dask is not installed: pip install "\.\[cluster\]"'
    with pytest.raises(UserError, match=words), cluster.connect(PACKAGES):
        pass


def test_without_the_variable_there_is_no_cluster(monkeypatch):
    monkeypatch.delenv("DASK_SCHEDULER_ADDRESS", raising=False)
    with cluster.connect(PACKAGES) as connected:
        assert connected is None


def test_a_cluster_that_vanishes_ends_the_run_in_one_line(dask, address, monkeypatch):
    monkeypatch.setattr(cluster, "_CHECK_SECONDS", 1)
    for allowed, line in ((0, "same task killed several"), (3, "none is left of 1 Dask")):
        with pytest.raises(UserError, match=line), cluster.connect(()) as connected:
            connected.client.run_on_scheduler(
                lambda n, dask_scheduler: setattr(dask_scheduler, "allowed_failures", n), allowed
            )
            list(connected.map_unordered(os._exit, [(1,)]))
    dask.start_worker()
    dask.wait_for(1)
    with (
        pytest.raises(UserError, match="scheduler at .* is lost; start it"),
        cluster.connect(()) as connected,
    ):
        for _ in connected.map_unordered(time.sleep, ((0.1,) for _ in range(1000))):
            dask.scheduler.kill()
