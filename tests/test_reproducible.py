"""Two equal runs write equal bytes, and a killed run resumes."""

import json
import os
import re
import resource
import shutil
import subprocess
from pathlib import Path
from typing import IO

import psutil
import pytest
import yaml
from conftest import SMALL, Project

from stages.run.cli import NO_SPACE

INTERRUPTIONS = str(Path(__file__).parent / "interruptions")


def written(project: Project) -> dict[str, bytes]:
    """Return the content of all files that a run writes: dvc.lock, data, model, metrics."""
    places = [project / "data/prepared", project / "metrics"]
    names = [path for place in places for path in place.rglob("*") if path.is_file()]
    names += [project / "data/model.keras", project / "dvc.lock"]
    return {path.relative_to(project.root).as_posix(): path.read_bytes() for path in names}


def assert_same(project: Project, before: dict[str, bytes]) -> None:
    after = written(project)
    assert [name for name in before if after.get(name) != before[name]] == []
    assert after.keys() == before.keys()


def forget(project: Project, *stages: str) -> None:
    """Make DVC forget the runs of these stages, and delete the scratch folder.

    Later stages are missing from dvc.lock, too, but still in the run cache.
    """
    lock = yaml.safe_load((project / "dvc.lock").read_text(encoding="utf-8"))
    names = list(lock["stages"])
    for name in names[names.index(stages[0]) :]:
        del lock["stages"][name]
    (project / "dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False), encoding="utf-8")
    for record in (project / ".dvc/cache/runs").glob("*/*/*"):
        if any(f"-m stages {stage}" in record.read_text(encoding="utf-8") for stage in stages):
            shutil.rmtree(record.parent)
    shutil.rmtree(project / ".dvc/tmp/scratch", ignore_errors=True)


def running_processes(project: Project) -> list[psutil.Process]:
    """Return the processes that still run in this project."""
    processes = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == project.root:
                processes.append(process)
        except (psutil.Error, OSError):
            continue
    return processes


def test_a_killed_prepare_resumes_and_writes_the_same_bytes(project):
    """DVC alone is killed, with which the stage ends, even if a shell waits for the stage."""
    before = written(project)
    forget(project, "prepare")
    with start(project, INTERRUPT="prepare dvc", SHELL="/bin/sh") as run:
        run.communicate(timeout=50)  # less than the minute that the stage would take
    psutil.wait_procs(running_processes(project), timeout=30)
    assert not running_processes(project)
    project.dvc("repro")
    assert_same(project, before)
    assert not list(project.root.rglob(".*.part"))


def test_a_killed_training_resumes_and_writes_the_same_bytes(project):
    before = written(project)
    forget(project, "train")
    with start(project, INTERRUPT="between epochs group") as run:
        run.communicate(timeout=120)
    assert run.returncode != 0
    history = (project / "metrics/history.csv").read_bytes()  # so far
    assert 1 < history.count(b"\n") <= SMALL["train.epochs"]
    assert before["metrics/history.csv"].startswith(history)
    words = ("--json", "--out", ".dvc/tmp/page", "--targets", "metrics/history.csv")
    shown = json.loads(project.dvc("plots", "diff", *words, "--", "HEAD", "workspace"))
    assert {"HEAD", "workspace"} <= set(re.findall(r"HEAD|workspace", str(shown["data"])))
    resumed = project.dvc("repro")
    assert epochs(resumed) == [3, 4]
    assert "Running stage 'evaluate'" not in resumed  # its inputs are those of a run before
    assert_same(project, before)
    assert not list((project / ".dvc/tmp/scratch/checkpoints").glob("*.npz*"))
    assert not list(project.root.rglob(".*.part"))


def start(
    project: Project, stdout: int | IO[str] = subprocess.PIPE, **environment: str
) -> subprocess.Popen:
    """Start ``dvc repro`` in a process group of its own."""
    environment = {**os.environ, "PYTHONPATH": INTERRUPTIONS, **environment}
    return subprocess.Popen(
        ["dvc", "repro"], cwd=project.root, env=environment, text=True,
        stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def epochs(output: str) -> list[int]:
    return [int(number) for number in re.findall(r"^ *epoch +(\d+)/", output, re.MULTILINE)]


def test_a_full_disk_is_one_line_and_leaves_the_last_outputs(project):
    before = written(project)
    environment = {"PYTHONPATH": INTERRUPTIONS, "FILE_LIMIT": "prepare 2000"}
    output = project.python("-m", "stages", "prepare", status=1, **environment)
    assert "free some space and run again" in output
    assert "Traceback" not in output
    assert_same(project, before)


@pytest.mark.parametrize(("stage", "size"), [("train", 4_000), ("evaluate", 200_000)])
def test_a_full_disk_stops_the_other_stages_likewise(project, capsys, stage, size):
    """Of an error of these numbers, `cli.run` makes the one line."""
    before, limits = written(project), resource.getrlimit(resource.RLIMIT_FSIZE)
    shutil.rmtree(project / ".dvc/tmp/scratch", ignore_errors=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            project.stage(stage)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno in NO_SPACE
    assert_same(project, before)


HOSTILE = {
    "TZ": "Asia/Kathmandu",
    "LC_ALL": "C",
    "PYTHONHASHSEED": "77",
    "KERAS_BACKEND": "torch",
    "MPLBACKEND": "TkAgg",
    "TF_ENABLE_ONEDNN_OPTS": "0",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_DETERMINISTIC_OPS": "0",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OMP_NUM_THREADS": "5",
    "LIST_BACKWARDS": "1",
    "PYTHONPATH": INTERRUPTIONS,
}


def test_a_forced_run_under_hostile_settings_gives_the_same_bytes(project, tmp_path):
    """Another folder, time zone, locale, umask, home, hash seed and order of listing."""
    before = written(project)
    home = tmp_path / "another home"
    for name, text in {
        ".keras/keras.json": '{"floatx": "float64", "image_data_format": "channels_first"}',
        ".config/matplotlib/matplotlibrc": "figure.dpi: 33\nfont.size: 30\nsavefig.bbox: tight\n",
    }.items():
        (home / name).parent.mkdir(parents=True)
        (home / name).write_text(text)
    project.run("rm", "-rf", ".dvc/tmp/scratch")
    project.run(
        "sh", "-c", "umask 077 && dvc repro --force", HOME=str(home),
        XDG_CONFIG_HOME=str(home / ".config"), MPLCONFIGDIR=str(home / ".config/matplotlib"),
        **HOSTILE,
    )  # fmt: skip
    assert_same(project, before)
    assert project.git("status", "--porcelain") == ""
