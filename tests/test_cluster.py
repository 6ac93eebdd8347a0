"""A Dask cluster: the same bytes as on one machine, and one line for whatever goes wrong.

Schedulers and workers are real processes on the loopback interface.
"""

import contextlib
import importlib.metadata
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import threadpoolctl
from test_prepare import Place

from stages.data import duplicates, scan
from stages.run import cluster
from stages.run.cli import UserError

distributed = pytest.importorskip("distributed")
ROOT = Path(__file__).parents[1]
PACKAGES = ("numpy", "pillow")
SECONDS = 60  # for what takes a few, on a slow machine


class Dask:
    """A scheduler and its workers, each a process with a working folder of its own."""

    def __init__(self, root: Path) -> None:
        self.root, self.file = root, root / "scheduler.json"
        self.processes: list[subprocess.Popen] = []
        self.scheduler = self._start("scheduler", "--host", "127.0.0.1", "--port", "0")

    def _start(self, program: str, *options: str, **environment: str) -> subprocess.Popen:
        folder = self.root / str(len(self.processes))
        folder.mkdir()
        process = subprocess.Popen(
            [sys.executable, "-m", f"distributed.cli.dask_{program}", "--no-dashboard", *options,
             "--scheduler-file", str(self.file)],
            cwd=folder, env=os.environ | environment, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def start_worker(self, *options: str, **environment: str) -> subprocess.Popen:
        where = ["--host", "127.0.0.1", "--local-directory", "scratch"]
        return self._start("worker", "--no-nanny", "--nthreads=1", *where, *options, **environment)

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
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


def wait(condition) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def dask(tmp_path_factory):
    running = Dask(tmp_path_factory.mktemp("dask"))
    running.workers = [running.start_worker(), running.start_worker()]
    yield running
    running.close()


@pytest.fixture
def address(dask, monkeypatch):
    address = dask.wait_for(2)
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", address)
    return address


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """More than a hundred pictures, among them broken ones and near duplicates; and its arrays."""
    place = Place(tmp_path_factory.mktemp("prepare")).fill(each=60).darken(8)
    place.prepare()
    return place, read(place.root)


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


def test_prepare_writes_the_same_bytes_even_if_a_worker_dies(dask, address, dataset, capsys):
    place, expected = dataset
    begun = time.monotonic()
    assert place.prepare(cache="cache of 2") > 100
    seconds = time.monotonic() - begun
    assert (
        f"on 2 Dask workers at {address}, which read the images themselves"
        in capsys.readouterr().out
    )
    assert read(place.root) == expected

    dask.workers.append(dask.start_worker(OPENBLAS_NUM_THREADS="2"))
    dask.wait_for(3)
    with cluster.connect(PACKAGES) as connected:
        pools = connected.run(threadpoolctl.threadpool_info)
    assert {pool["num_threads"] for found in pools.values() for pool in found} == {1}
    victim, delay = random.choice(dask.workers), random.uniform(0, seconds / 2)
    dask.workers.remove(victim)

    def kill() -> None:
        with dask.client() as client:
            wait(lambda: any(client.processing().values()))
            time.sleep(delay)
            victim.kill()

    thread = threading.Thread(target=kill)
    thread.start()
    place.prepare(cache="cache of 3")
    thread.join()
    assert f"on 3 Dask workers at {address}" in capsys.readouterr().out
    assert read(place.root) == expected, f"worker killed after {delay} s"
    assert place.prepare(cache="cache of 3") == 0
    assert read(place.root) == expected


def test_images_are_sent_to_workers_that_do_not_see_them_and_two_runs_share_them(
    dask, address, dataset, tmp_path
):
    place, expected = dataset
    hidden = tmp_path / "hidden"  # in a file system that only the second run sees
    hidden.mkdir()
    code = (
        "import sys; from stages.data import scan; from stages.prepare import prepare\n"
        "from test_prepare import SMALL\n"
        "scan._CHUNK_IMAGES = 4\n"
        "prepare(SMALL, *sys.argv[1:])"
    )
    script = 'mount -t tmpfs none "$1" && cp -r "$2"/. "$1" && shift 2 && exec "$@"'
    words = [
        sys.executable,
        "-c",
        code,
        hidden,
        *(tmp_path / n for n in ("out", "metrics", "cache")),
    ]
    (tmp_path / "cache").mkdir()
    unshare = ["unshare", "--map-root-user", "--mount"]
    with contextlib.suppress(OSError):
        done = subprocess.run([*unshare, "mount", "-t", "tmpfs", "none", hidden], check=False)
        unshare = unshare if done.returncode == 0 else []
    if not unshare:
        pytest.skip("this system can't mount a file system for one process")
    other = subprocess.Popen(
        [*unshare, "sh", "-c", script, "sh", hidden, place.root / "data", *words],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    place.prepare(cache="another cache")
    output, _ = other.communicate(timeout=SECONDS)
    assert f"on 2 Dask workers at {address}, to which the images are sent" in output
    assert read(place.root) == expected == read(tmp_path)


class Blind:
    """A cluster whose workers see the dataset when they are asked, and no file of it later."""

    def run(self, function, *args):
        return {"worker": function(*args)}

    def map_unordered(self, function, tasks, shared):
        for task in tasks:
            if function is scan.scan_chunk:
                task = (task[0], b"/nowhere", task[2])
            yield function(*task, *shared)


def test_a_file_that_only_a_worker_cannot_open_is_not_called_unreadable(dataset, monkeypatch):
    place, expected = dataset
    monkeypatch.setattr(cluster, "current", Blind)
    place.prepare(cache="yet another cache")
    assert read(place.root) == expected


def test_a_worker_with_another_package_or_other_code_is_refused(dask, address, tmp_path):
    metadata = tmp_path / "packages" / "pillow-0.1.dist-info" / "METADATA"
    other = tmp_path / "code" / "stages" / "__init__.py"
    for file, text in ((metadata, "Name: pillow\nVersion: 0.1\n"), (other, "")):
        file.parent.mkdir(parents=True)
        file.write_text(text)
    first = dask.start_worker(PYTHONPATH=str(metadata.parents[1]))
    second = dask.start_worker("--preload", "stages", PYTHONPATH=str(other.parents[1]))
    dask.wait_for(4)
    here = importlib.metadata.version("pillow")
    line = rf"{address} can't be used: tcp://127.0.0.1:\d+ has pillow 0.1 \(here {here}\); install"
    with pytest.raises(UserError, match=line), cluster.connect(PACKAGES):
        pass
    first.kill()
    dask.wait_for(3)
    line = rf"1 worker .* can't run this version of .*: tcp://127.0.0.1:\d+ \(.*{other}\); correct"
    with pytest.raises(UserError, match=line), cluster.connect(PACKAGES):
        pass
    second.kill()
    dask.wait_for(2)


def test_a_worker_that_was_restarted_at_its_address_is_told(tmp_path, monkeypatch):
    """It lacks the code, which was sent to the one before."""
    dask = Dask(tmp_path)
    try:
        first = dask.start_worker()
        monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", dask.wait_for(1))
        with cluster.connect(()) as connected:
            (worker,) = connected.threads
            first.kill()
            dask.wait_for(0)
            dask.start_worker("--worker-port", worker.rpartition(":")[2])
            dask.wait_for(1)
            with pytest.raises(UserError, match="a worker of 1 Dask worker at .* was restarted"):
                list(connected.map_unordered(scan.hash_bytes, [(b"",)]))
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
    assert "done" in stage.stdout.readline()
    stage.send_signal(signal.SIGINT)
    _, errors = stage.communicate(timeout=SECONDS)
    assert (stage.returncode, errors) == (130, "Stopped: no partial files are left.\n")
    with dask.client() as client:
        wait(lambda: not any(client.processing().values()))


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
    with (
        pytest.raises(UserError, match="Dask is not installed: pip install") as caught,
        cluster.connect(PACKAGES),
    ):
        pass
    pin = str(caught.value).split('"')[1]
    assert pin in (ROOT / "tests/requirements.txt").read_text().splitlines()
    assert f'"{pin}"' in (ROOT / "README.md").read_text()


def test_without_the_variable_there_is_no_cluster(monkeypatch):
    monkeypatch.delenv("DASK_SCHEDULER_ADDRESS", raising=False)
    with cluster.connect(PACKAGES) as connected:
        assert connected is None and cluster.current() is None


def test_a_cluster_that_vanishes_ends_the_run_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_CHECK_SECONDS", 1)
    dask = Dask(tmp_path)
    try:
        dask.start_worker(), dask.start_worker()
        monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", dask.wait_for(2))
        for allowed, line in (
            (0, "same task killed several"),
            (3, "none is left of 1 Dask"),
        ):
            with cluster.connect(()) as connected, pytest.raises(UserError, match=line):
                connected.client.run_on_scheduler(
                    lambda n, dask_scheduler: setattr(dask_scheduler, "allowed_failures", n),
                    allowed,
                )
                list(connected.map_unordered(os._exit, [(1,)]))
        with pytest.raises(UserError, match="has no workers; start some"), cluster.connect(()):
            pass
        dask.start_worker()
        dask.wait_for(1)
        with (
            cluster.connect(()) as connected,
            pytest.raises(UserError, match="scheduler at .* is lost"),
        ):
            for _ in connected.map_unordered(time.sleep, ((0.1,) for _ in range(1000))):
                dask.scheduler.kill()
    finally:
        dask.close()
