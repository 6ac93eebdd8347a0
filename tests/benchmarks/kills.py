"""Kill a pipeline at random moments, fill its disk, force it again: the bytes must stay the same.

    python tests/benchmarks/kills.py --kills 30 --forced 10

Prints a line for each blow and a count at the end; exit 1 at the first difference.
"""

import argparse
import contextlib
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from conftest import SMALL, Project, clone_working_tree, draw_dataset
from test_reproducible import (
    INTERRUPTIONS,
    assert_same,
    epochs,
    forget,
    running_processes,
    start,
    written,
)

EPOCHS = 30
BLOWS = 3  # kills before a run may end
TARGETS = ("group", "dvc", "stage")


def undisturbed(root: Path) -> tuple[Project, dict[str, bytes], float]:
    """Make a project with more to do than that of the tests; return its bytes and seconds."""
    project = clone_working_tree(root)
    draw_dataset(project / "data/formes", {"café noir": 400, "deux mots": 300, "straße": 300})
    project.dvc("add", "--quiet", "data/formes")
    project.configure(SMALL | {"train.epochs": EPOCHS, "train.filters": [16, 32]})
    began = time.monotonic()
    project.dvc("repro", "--quiet")
    seconds = time.monotonic() - began
    project.commit("A first run")
    return project, written(project), seconds


def strike(run: subprocess.Popen, target: str) -> str:
    """Kill the group, dvc or its stage with SIGKILL; return what the stage was, if any."""
    stages = {}
    for child in psutil.Process(run.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if found := re.search(r"-m stages (\w+)", " ".join(child.cmdline())):
                stages[child] = found[1]
    name = next(iter(stages.values()), "dvc")
    if target == "group":
        os.killpg(run.pid, signal.SIGKILL)
    elif target == "dvc" or not stages:
        os.kill(run.pid, signal.SIGKILL)
    else:
        for stage in stages:
            with contextlib.suppress(psutil.Error):
                stage.kill()
    return name


def kill(project: Project, before: dict[str, bytes], seconds: float, count: int) -> Counter:
    """Kill runs from nothing, each `BLOWS` times, until `count` blows have fallen."""
    blows: Counter = Counter()
    again = 0
    while blows.total() < count:
        forget(project, "prepare", "train", "evaluate")
        learned: list[int] = []
        for _ in range(BLOWS):
            target = random.choice(TARGETS)
            moment = random.uniform(0.5, seconds)
            with tempfile.TemporaryFile("w+") as output:
                run = start(project, stdout=output)
                try:
                    run.wait(moment)
                except subprocess.TimeoutExpired:
                    name = strike(run, target)
                    blows[name, target] += 1
                    print(f"  {target} after {moment:.1f} s: {name}", flush=True)
                run.wait(120)
                if target == "dvc":
                    learned.clear()
                if target == "dvc" and running_processes(project):
                    tmp = start(project)
                    said = tmp.communicate(timeout=300)[0]
                    assert tmp.returncode == 0 or "is still running in this workspace" in said, said
                psutil.wait_procs(running_processes(project), timeout=300)
                output.seek(0)
                said = output.read()
            learned += epochs(said) if target != "dvc" else []
        said = project.dvc("repro")
        learned += epochs(said)
        # An epoch may be kept without its line. A training that was killed after its end, but
        # before DVC had kept what came out, starts again.
        for one, next_one in itertools.pairwise(learned):
            assert one < next_one or one >= EPOCHS - 1, f"epochs run twice: {learned}"
            again += one > next_one
        assert_same(project, before)
        assert not list(project.root.rglob(".*.part"))
        print("same bytes", flush=True)
    print(f"{again} trainings started again, having ended")
    return blows


def fill(project: Project, before: dict[str, bytes]) -> None:
    """Let no file of a stage grow beyond a limit; the next run ends with the same bytes."""
    for stage in ("prepare", "train", "evaluate"):
        for limit in (200, 5_000, 30_000, 150_000):
            forget(project, stage)
            environment = {"PYTHONPATH": INTERRUPTIONS, "FILE_LIMIT": f"{stage} {limit}"}
            run = start(project, **environment)
            said = run.communicate(timeout=300)[0]
            full = run.returncode != 0
            assert "Traceback" not in said, said
            assert not full or "free some space" in said, said
            project.dvc("repro", "--quiet")
            assert_same(project, before)
            print(
                f"  {stage}, {limit} bytes: {'full' if full else 'enough'}; same bytes", flush=True
            )


def force(project: Project, before: dict[str, bytes], count: int) -> None:
    """Run everything again, with other numbers of workers; now and then without finished rows."""
    for number in range(1, count + 1):
        if number % 2:
            forget(project, "prepare")
        project.dvc("repro", "--force", "--quiet", PREPARE_WORKERS=str(number % 4 + 1))
        assert_same(project, before)
        print(f"  forced run {number}: same bytes", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--forced", type=int, default=10)
    parser.add_argument("--no-fill", action="store_true", help="leave out the full disks")
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    words = parser.parse_args()
    random.seed(words.seed)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as folder:
        project, before, seconds = undisturbed(Path(folder) / "project")
        print(f"An undisturbed run: {seconds:.1f} s, {len(before)} files")
        try:
            blows = kill(project, before, seconds, words.kills)
            if not words.no_fill:
                fill(project, before)
            force(project, before, words.forced)
        finally:
            for process in running_processes(project):
                process.kill()
    print(f"\n{blows.total()} kills, all equal in the end:")
    for (name, target), count in sorted(blows.items()):
        print(f"  {name:<9} {target:<6} {count}")


if __name__ == "__main__":
    main()
