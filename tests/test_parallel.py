"""The worker processes: whatever goes back and forth, and however it ends."""

from pathlib import Path

import psutil
import pytest
from factories import Echo

from stages.data.parallel import Workers


@pytest.fixture(autouse=True)
def found_by_workers(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def test_large_tasks_and_answers(tmp_path):
    """More than pipes hold, both ways at once."""
    tasks = [(number, bytes(300_000), 200_000) for number in range(12)]
    with Workers(2) as pool:
        answers = list(pool.run(Echo, (), tasks))
    assert sorted(number for number, _ in answers) == list(range(12))
    assert all(len(data) == 200_000 for _, data in answers)


def test_what_a_worker_raises_is_raised_here():
    with Workers(2) as pool, pytest.raises(ZeroDivisionError):
        list(pool.run(Echo, (), [(0, b"", 1 / 3)]))
    with Workers(2) as pool, pytest.raises(RuntimeError, match="a local one"):
        list(pool.run(Echo, (), [(0, b"", -1)]))


def test_workers_run_this_package_in_any_folder(tmp_path, monkeypatch):
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "__init__.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    with Workers(2) as pool:
        assert len(list(pool.run(Echo, (), [(0, b"", 1)]))) == 1


def test_no_process_is_left():
    with Workers(2) as pool:
        workers = psutil.Process().children()
        next(pool.run(Echo, (), [(0, bytes(300_000), 300_000)] * 9))
        pool.stop()
        assert len(workers) >= 2
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
