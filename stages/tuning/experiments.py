"""DVC experiments that run apart from the workspace: each in a clone of the last commit.

The workspace can be edited meanwhile. Only the stages that an experiment is for are run, and only
the files that they read are in the clone. The results are commits that `dvc exp show` lists.
"""

import contextlib
import csv
import hashlib
import json
import math
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages.display.status import changed_since_run
from stages.run import files
from stages.run.cli import UserError, progress
from stages.run.cluster import connect
from stages.run.params import set_values
from stages.tuning.processes import Process, exit_with_parent, on_workers

_PACKAGES = ["dvc", "keras", "numpy", "tensorflow"]  # of equal versions on all workers
_PREPARED = ("train", "val", "image_spec.json")
_PREPARED_TEST = ("test", "index.csv")
_OWN_OUTPUTS = (":!metrics/search", ":!metrics/repeat.csv")  # may differ from the commit
_POLL_SECONDS = 0.3


@dataclass(frozen=True)
class Task:
    """An experiment to run.

    Attributes
    ----------
    name : str
        Of the experiment.
    values : dict
        Of params.yaml, by dotted key, where they differ from the baseline.
    epochs : int
        The most that the training can have, for the progress bar.
    stop : callable, default=None
        From the rows of history.csv to the number of epochs after which the training is to be
        stopped, or None. It is asked after each epoch, and must give the same answer for more rows.
    result : Result, default=None
        What is known already: the experiment is then not run.
    """

    name: str
    values: dict[str, Any]
    epochs: int
    stop: Callable[[list[dict[str, str]]], int | None] | None = None
    result: "Result | None" = None


@dataclass(frozen=True)
class Result:
    """What an experiment gave: its history and metrics by stage, or the error that ended it.

    A stopped experiment has neither metrics nor an error.
    """

    history: list[dict[str, str]]
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    error: str = ""


class Baseline:
    """The last commit of the project, from which experiments start.

    Attributes
    ----------
    root : Path
        The project's folder.
    commit : str
        40 hexadecimal digits.

    Raises
    ------
    UserError
        If there is no commit, the workspace differs from it, or prepare has not run since.
    """

    def __init__(self) -> None:
        if not Path("dvc.yaml").is_file():
            raise UserError("dvc.yaml: no such file here; run this from the folder that holds it")
        self.root = Path.cwd()
        try:
            self.commit = _git("rev-parse", "--verify", "HEAD")
        except UserError as error:
            raise UserError(
                f"{error}; experiments start from the last commit:"
                ' `git add -A && git commit -m "Start"` makes one'
            ) from None
        if changed := _git("diff", "--name-only", "HEAD", "--", ".", *_OWN_OUTPUTS).splitlines():
            names = ", ".join(changed[:3])
            raise UserError(
                f"not committed: {names}{', …' if len(changed) > 3 else ''}; experiments start from"
                " the last commit: commit or undo the changes first"
            )
        if stale := changed_since_run(self.root, "prepare"):
            raise UserError(
                f"not up to date ({'; '.join(stale[:3])}); run `dvc repro` and commit first"
            )

    def reference(self, name: str) -> str:
        """Return the Git reference of an experiment that starts from this commit."""
        return f"refs/exps/{self.commit[:2]}/{self.commit[2:]}/{name}"

    def find(self, task: Task) -> Result | None:
        """Return the result of an experiment that has been run, or None."""
        try:
            revision = _git("rev-parse", "--verify", "--quiet", self.reference(task.name))
        except UserError:
            return None
        parameters = YAML(typ="safe", pure=True).load(_git("show", f"{revision}:./params.yaml"))
        if any(_lookup(parameters, key) != value for key, value in task.values.items()):
            return None  # of another search with this name
        history = _git("show", f"{revision}:./metrics/history.csv").splitlines()
        metrics = {}
        for stage in ("train", "evaluate"):
            with contextlib.suppress(UserError):  # evaluate has not run
                text = _git("show", f"{revision}:./metrics/{stage}.json")
                metrics[stage] = json.loads(text)
        return Result(list(csv.DictReader(history)), metrics)


class Clone:
    """A clone of a baseline, in which one experiment at a time runs.

    Parameters
    ----------
    baseline : Baseline
    folder : path
    process : Process
        Runs the stages, here or on a worker.
    stages : sequence of str
        ``["train"]`` or ``["train", "evaluate"]``. The test split is there only for ``evaluate``.

    Attributes
    ----------
    interrupted : bool
        Whether a training was stopped here that the next run can resume.
    """

    interrupted = False

    def __init__(
        self, baseline: Baseline, folder: Path, process: Any, stages: Sequence[str]
    ) -> None:
        self.baseline, self.process, self.stages = baseline, process, stages
        self._top = folder
        self.root = folder / _git("rev-parse", "--show-prefix")
        if not (self.root / ".dvc" / "tmp" / "ready").exists():
            self._create()

    def _create(self) -> None:
        shutil.rmtree(self._top, ignore_errors=True)
        self._top.parent.mkdir(parents=True, exist_ok=True)
        repository = _git("rev-parse", "--show-toplevel")
        _git("clone", "--quiet", "--shared", "--no-checkout", repository, str(self._top))
        for key in ("user.name", "user.email"):  # where only this repository has them
            with contextlib.suppress(UserError):
                self._git("config", key, _git("config", "--get", key))
        self._git("checkout", "--quiet", "--detach", self.baseline.commit)
        private = self.baseline.root / ".dvc" / "config.local"
        if private.exists():
            shutil.copy(private, self.root / ".dvc" / "config.local")
        cache = _dvc("cache", "dir", folder=self.baseline.root).stdout.strip()
        _dvc("config", "--local", "cache.dir", cache, folder=self.root)
        names = _PREPARED + (_PREPARED_TEST if "evaluate" in self.stages else ())
        paths = [f"data/prepared/{name}" for name in names]
        done = _dvc("checkout", "--quiet", *paths, folder=self.root)
        if done.returncode:
            raise UserError(
                f"can't check out the prepared images{_reason(done.stderr)};"
                " if DVC's cache lacks them, `dvc pull --allow-missing && dvc repro` brings them"
            )
        backbones = sorted((self.root / "data" / "backbones").glob("*.dvc"))
        if backbones:  # one that is missing matters only where it is used
            paths = [str(path.relative_to(self.root).with_suffix("")) for path in backbones]
            _dvc("checkout", "--quiet", "--allow-missing", *paths, folder=self.root)
        # Checkpoints stay here: those of many trials would crowd out one of the workspace.
        scratch = self.root / ".dvc" / "tmp" / "scratch"
        scratch.mkdir(parents=True)
        (scratch / "features").symlink_to(files.scratch_dir("features"))
        (scratch.parent / "ready").touch()

    def start(self, task: Task) -> None:
        """Start an experiment: the baseline with the task's values in params.yaml."""
        (self._top / ".git" / "index.lock").unlink(missing_ok=True)  # of a run that was killed
        self._git("reset", "--quiet", "--hard", self.baseline.commit)
        self._git("clean", "--quiet", "-d", "--force", "--", str(self.root / "metrics"))
        # Results of the baseline would be taken for those of the experiment.
        lock = YAML(typ="safe", pure=True).load((self.root / "dvc.lock").read_text("utf-8"))
        for stage in ("train", "evaluate"):
            for out in lock["stages"].get(stage, {}).get("outs", ()):
                (self.root / out["path"]).unlink(missing_ok=True)
        set_values(task.values, self.root / "params.yaml")
        words = ["-m", "stages.tuning.experiments", task.name, *self.stages]
        self.process.start(words, str(self.root), {})

    def history(self) -> list[dict[str, str]]:
        """Return the rows of history.csv, so far."""
        try:
            with open(self.root / "metrics" / "history.csv", encoding="utf-8", newline="") as file:
                return list(csv.DictReader(file))
        except FileNotFoundError:
            return []

    def collect(self, task: Task) -> Result:
        """Bring the finished experiment into the project; return its result."""
        reference = self.baseline.reference(task.name)
        _git("fetch", "--quiet", str(self._top), f"+{reference}:{reference}")
        result = self.baseline.find(task)
        assert result
        return result

    def error(self, status: int) -> str:
        """Return in a line why the stages ended with this status."""
        lines = [line for line in self.process.errors().splitlines() if line.strip()]
        of_dvc = ("ERROR: failed to reproduce", "Having any troubles?")
        said = [line for line in lines if not line.startswith(of_dvc)]
        killed = any(line.endswith(("exited with -9", "exited with 137")) for line in lines)
        if killed or status < 0:  # 137 is how some shells say that the command was killed
            return "killed, as by the system when memory runs out"
        return said[-1] if said else f"exit status {status}"

    def _git(self, *words: str) -> None:
        _git("-C", str(self._top), *words)


@contextlib.contextmanager
def open_clones(
    baseline: Baseline, key: str, stages: Sequence[str], side_by_side: bool
) -> Iterator[list[Clone]]:
    """Yield clones in which experiments can run at the same time.

    Parameters
    ----------
    baseline : Baseline
    key : str
        The command. With the baseline and the stages, it finds clones of an interrupted run again.
    stages : sequence of str
        As in `Clone`.
    side_by_side : bool
        Whether to use a clone for each worker of the Dask cluster that DASK_SCHEDULER_ADDRESS
        names. Otherwise, and without a cluster, there is one clone, which runs here.

    Raises
    ------
    UserError
        If another process uses these clones.
    """
    inputs = json.dumps([baseline.commit, key, *stages])
    folder = files.scratch_dir("clones") / hashlib.sha256(inputs.encode()).hexdigest()[:12]
    with contextlib.ExitStack() as stack:
        folder.mkdir(exist_ok=True)
        stack.enter_context(files.run_lock(folder / ".lock", key))
        _delete_others(folder)
        cluster = stack.enter_context(connect(_PACKAGES)) if side_by_side else None
        processes: list[Any] = [Process()]
        if cluster:
            stack.enter_context(cluster.client.as_current())  # the actors look for it
            processes = on_workers(cluster, len(cluster.threads))
        clones = []
        for number, process in enumerate(processes):
            stack.callback(process.stop)
            clones.append(Clone(baseline, folder / str(number), process, stages))
        yield clones
        if not any(clone.interrupted for clone in clones):  # otherwise their checkpoints are needed
            shutil.rmtree(folder, ignore_errors=True)


def _delete_others(folder: Path) -> None:
    """Delete the clones of others that were interrupted; they would be made again."""
    for other in {*folder.parent.iterdir()} - {folder}:
        with contextlib.suppress(UserError, OSError), files.run_lock(other / ".lock") as locked:
            if locked:
                shutil.rmtree(other, ignore_errors=True)


def run_in_order(
    clones: Sequence[Clone], tasks: Iterable[Task], deadline: float = math.inf
) -> Iterator[tuple[Task, Result]]:
    """Run tasks, as many at once as there are clones, and yield results in the order of the tasks.

    The next task is taken only after the caller has seen the result that frees its clone, so that
    it can depend on all results but those of tasks that still run. That makes it the same task
    whatever takes how long.

    Parameters
    ----------
    clones : sequence of Clone
    tasks : iterable of Task
    deadline : float, default=infinity
        Of ``time.monotonic()``. What then still runs is stopped, and has no result; its finished
        epochs are kept.
    """
    waiting, free, running = iter(tasks), list(clones), deque[_Run]()
    while True:
        while free and time.monotonic() < deadline and (task := next(waiting, None)):
            running.append(_Run(free.pop(), task))
        if not running:
            return
        first = running[0]
        bar = progress((), total=first.task.epochs, unit="epoch", label=first.task.name)
        with contextlib.closing(bar):
            while first.result is None:
                if time.monotonic() > deadline:
                    for run in running:
                        run.clone.interrupted = run.result is None
                        run.clone.process.stop()
                    return
                time.sleep(_POLL_SECONDS)
                for run in running:
                    run.update()
                bar.n = len(first.history)
                bar.refresh()
        running.popleft()
        free.append(first.clone)
        yield first.task, first.result


class _Run:
    """A task in its clone."""

    def __init__(self, clone: Clone, task: Task) -> None:
        self.clone, self.task = clone, task
        self.history: list[dict[str, str]] = []
        self.result = task.result
        if not self.result and (found := clone.baseline.find(task)):
            self._finish(found)
        elif not self.result:
            clone.start(task)

    def update(self) -> None:
        """Look at the history and the process; set `result` when the task has ended."""
        if self.result:
            return
        _, status = self.clone.process.poll()
        epochs = len(self.history)
        self.history = self.clone.history()
        if status is None:
            if len(self.history) > epochs and self.task.stop and self.task.stop(self.history):
                self.clone.process.stop()
                self._finish(Result(self.history))
        elif status:
            self.result = Result(self.history, error=self.clone.error(status))
        else:
            self._finish(self.clone.collect(self.task))

    def _finish(self, result: Result) -> None:
        # Here as well, for a training that was faster than this process, or is known already.
        end = self.task.stop(result.history) if self.task.stop else None
        self.result = Result(result.history[:end]) if end else result


def _lookup(parameters: Any, key: str) -> Any:
    for name in key.split("."):
        parameters = parameters.get(name, {})
    return parameters


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"`git {' '.join(words)}` failed: {done.stderr.strip()}")
    return done.stdout.strip()


def _dvc(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dvc", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def _reason(errors: str) -> str:
    lines = [line for line in errors.splitlines() if line.startswith("ERROR:")]
    return f" ({lines[0].removeprefix('ERROR: ')})" if lines else ""


def main(name: str, *stages: str) -> int:
    """Run stages in this folder, and save the result as an experiment; return the exit status."""
    exit_with_parent()
    from dvc.cli import main as dvc  # in this process, since its start takes a second

    for stage in stages:
        if status := dvc(["repro", "--single-item", stage]):
            return status
    save = ["exp", "save", *stages, "--quiet", "--force", "--name", name]
    for path in ["metrics/history.csv", *(f"metrics/{stage}.json" for stage in stages)]:
        save += ["--include-untracked", path]  # if the baseline has no results yet
    return dvc(save)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
