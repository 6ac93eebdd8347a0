"""Atomic writes, the scratch folder, locks and fingerprints."""

import errno
import os

import pytest
from test_cli import program

from stages.run import files


def test_one_stage_runs_at_a_time_and_its_lock_ends_with_its_process(tmp_path):
    body = "with files.stage_lock('train'):\n    print('mine', flush=True)\n    time.sleep({})"
    first = program(body.format(60), tmp_path)
    assert first.stdout.readline() == "mine\n"
    second = program(body.format(0), tmp_path)
    _, stderr = second.communicate(timeout=60)
    assert second.returncode == 1
    assert stderr.count("\n") == 1
    assert f"train (process {first.pid}) is still running in this workspace" in stderr
    first.kill()
    first.communicate(timeout=60)
    third = program(body.format(0), tmp_path)
    assert third.communicate(timeout=60) == ("mine\n", "")


# As on some network file systems. A process that holds the lock answers EACCES or EAGAIN.
REFUSE = (
    "import fcntl\ndef refuse(*_): raise OSError({0}, os.strerror({0}))\nfcntl.lockf = refuse\n"
)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_without_file_locks_a_stage_says_so_once_and_runs(tmp_path, number):
    body = REFUSE.format(number) + (
        "place = files.scratch_dir('features')\n"
        "for _ in range(2):\n"
        "    with files.stage_lock('train'), files.exclusive(place) as locked: print(locked)"
    )
    child = program(body, tmp_path)
    stdout, stderr = child.communicate(timeout=60)
    assert (child.returncode, stdout) == (0, "False\nFalse\n")
    assert stderr.count("\n") == 1 and f"can't lock files ({os.strerror(number)})" in stderr


@pytest.mark.parametrize("number", [errno.EACCES, errno.EAGAIN])
def test_a_busy_lock_is_told_from_a_missing_one(tmp_path, number):
    body = REFUSE.format(number) + "with files.stage_lock('train'): print('runs')"
    child = program(body, tmp_path)
    stdout, stderr = child.communicate(timeout=60)
    assert (child.returncode, stdout) == (1, "")
    assert "is still running in this workspace" in stderr


def test_each_workspace_has_a_lock_of_its_own(tmp_path):
    """Experiments in temporary workspaces share the scratch folder, but not the lock."""
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    body = "with files.stage_lock('train'):\n    print('mine', flush=True)\n    sys.stdin.read()"
    children = [program(body, place, DVC_ROOT=str(first)) for place in (first, second)]
    assert [child.stdout.readline() for child in children] == ["mine\n", "mine\n"]
    for child in children:
        child.communicate(timeout=60)
    assert [path.name for path in (second / ".dvc" / "tmp").iterdir()] == ["stage.lock"]


def test_a_scratch_folder_is_locked_by_one_process_at_a_time(tmp_path):
    body = (
        "place = files.scratch_dir('features')\n"
        "with files.exclusive(place):\n"
        "    for word in ('in', 'out'):\n"
        "        with open(place / 'log', 'a') as log:\n"
        "            log.write(word + ' ')\n"
        "        time.sleep(0.3)"
    )
    children = [program(body, tmp_path) for _ in range(3)]
    assert [child.wait(60) for child in children] == [0, 0, 0]
    log = tmp_path / ".dvc/tmp/scratch/features/log"
    assert log.read_text().split() == ["in", "out"] * 3


@pytest.mark.parametrize(
    ("times", "kept"),
    [
        ((1, 2, 3, 4, 5), "345"),
        ((5, 4, 3, 2, 5), "125"),
        ((90, 80, 70, 60, 5), "125"),  # a clock ran ahead, and was then put right
        ((90, 80, 3, 4, 5), "345"),
        ((5, 5, 5, 5, 5), None),
        ((4, 5), "12"),
    ],
)
def test_what_was_just_written_and_the_newest_files_are_kept(tmp_path, times, kept):
    for number, seconds in enumerate(times, 1):
        (tmp_path / f"{number}.npy").touch()
        os.utime(tmp_path / f"{number}.npy", (seconds, seconds))
    (tmp_path / "other").touch()
    files.keep_newest(tmp_path / f"{len(times)}.npy", "*.npy", 3)
    found = {path.name for path in tmp_path.iterdir()}
    assert {"other", f"{len(times)}.npy"} <= found and len(found) == 1 + min(3, len(times))
    if kept:
        assert found == {"other", *(f"{name}.npy" for name in kept)}


def test_the_scratch_folder_is_in_the_main_checkout(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert files.scratch_dir("cache") == tmp_path / ".dvc" / "tmp" / "scratch" / "cache"
    assert files.scratch_dir("cache").is_dir()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with files.atomic_write(path) as tmp:
        tmp.write_text("old")
        assert not path.exists()
        assert os.stat(tmp).st_dev == os.stat(path.parent).st_dev
    with pytest.raises(ZeroDivisionError), files.atomic_write(path) as tmp:
        tmp.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["file.txt"]


def test_a_folder_is_replaced_whole(tmp_path):
    path = tmp_path / "rows"
    path.write_text("a file in its place")
    for name in ("old", "new"):
        with files.atomic_write(path) as tmp:
            tmp.mkdir()
            (tmp / name).write_text(name)
    assert [file.name for file in path.iterdir()] == ["new"]
    assert os.listdir(tmp_path) == ["rows"]


def test_a_replaced_file_does_not_change_its_other_links(tmp_path):
    """With DVC's hardlink cache, a change in place would change the cache."""
    path, cached = tmp_path / "model", tmp_path / "cache"
    path.write_text("old")
    os.link(path, cached)
    files.write_json(path, {"a": 1})
    assert cached.read_text() == "old"


def test_a_killed_write_leaves_nothing_in_the_way(tmp_path):
    body = (
        "from stages.run import files\n"
        "with files.atomic_write('x') as tmp:\n"
        "    tmp.mkdir()\n    (tmp / 'half').touch()\n"
        "    print('ready', flush=True)\n    time.sleep(60)"
    )
    child = program(body, tmp_path)
    child.stdout.readline()
    child.kill()
    child.communicate(timeout=60)
    assert not (tmp_path / "x").exists()
    files.write_json(tmp_path / "x", {"é": "ü"})
    assert (tmp_path / "x").read_bytes() == '{\n  "é": "ü"\n}\n'.encode()
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("make", ["tmp.mkdir(); tmp = tmp / 'x'", "pass"])
def test_two_programs_that_write_one_path_disturb_each_other_in_nothing(tmp_path, make):
    body = (
        "for number in range(100):\n"
        "    with files.atomic_write(f'x/{number % 3}') as tmp:\n"
        f"        {make}\n"
        "        tmp.write_text(sys.argv[0] * 9)\n"
        "        assert tmp.read_text() == sys.argv[0] * 9"
    )
    children = [program(f"sys.argv[0] = '{name}'\n{body}", tmp_path) for name in "ab"]
    assert [child.communicate(timeout=60) for child in children] == [("", "")] * 2
    assert sorted(os.listdir(tmp_path / "x")) == ["0", "1", "2"]


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127])
def test_a_name_may_be_as_long_as_the_system_allows(tmp_path, name):
    files.write_json(tmp_path / name, {})
    assert os.listdir(tmp_path) == [name]


def test_json_holds_only_what_json_can(tmp_path):
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "x", {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


def test_a_fingerprint_follows_names_contents_and_values(tmp_path):
    for folder, name, text in (("a", "x", "1"), ("b", "x", "1"), ("c", "x", "2"), ("d", "y", "1")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
    same, other, content, name = (sorted((tmp_path / folder).iterdir()) for folder in "abcd")
    assert files.fingerprint(same, seed=1) == files.fingerprint(other, seed=1)
    prints = {files.fingerprint(paths, seed=1) for paths in (same, content, name)}
    assert len(prints | {files.fingerprint(same, seed=2), files.fingerprint([], seed=1)}) == 5
