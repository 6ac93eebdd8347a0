"""Trainings with other parameters than those of params.yaml, each in a process of its own.

A training is the stage itself, run in a folder that has its own params.yaml and links to the
prepared images. DVC and Git take no part in it.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

from stages.display.status import changed_since_run
from stages.model.parameters import Train
from stages.run import cli, files
from stages.run.cli import UserError
from stages.run.params import load_yaml, read_section, set_values
from stages.tuning.space import replace

_ROOT = Path(__file__).parents[2]  # where a process finds the package
_PROGRAM = """
from stages.run.processes import exit_with_parent
exit_with_parent({})
from stages.__main__ import main
main()
"""
_POLL_SECONDS = 0.1
_MAX_RESULTS = 1000  # kept; the oldest are deleted
_PACKAGES = ("keras", "numpy", "tensorflow")  # on which a result depends

History = list[dict[Hashable, Any]]  # val_loss and val_accuracy of each epoch


class TrainingFailed(UserError):
    """A training has ended with an error: the text is its last line."""


class Trainings:
    """Trainings on the data and with the code that this workspace has now.

    Parameters
    ----------
    *stages : str
        ``"train"``, or ``"train", "evaluate"`` to evaluate each network, too.

    Attributes
    ----------
    parameters : Train
        Those of params.yaml.
    fingerprint : str
        A hash of the parameters and of the files on which the stages depend.

    Raises
    ------
    UserError
        If there are no prepared images, or they are not those of params.yaml and the dataset.
    """

    def __init__(self, *stages: str) -> None:
        self.stages = stages
        self.parameters = read_section(Train, "train")
        self._params = load_yaml(Path("params.yaml"))
        pipeline = load_yaml(Path("dvc.yaml"))["stages"]
        names = {name for stage in stages for name in pipeline[stage]["deps"]}
        self._prepared = [Path(name) for name in sorted(names) if name.startswith("data/prepared/")]
        if missing := [path for path in self._prepared if not path.exists()]:
            raise UserError(f"{missing[0]}: not there; run `dvc repro` first")
        if stale := changed_since_run(Path.cwd(), "prepare"):
            raise UserError(
                f"data/prepared is not up to date ({'; '.join(stale[:3])}); run `dvc repro` first"
            )
        backbone = Path("data/backbones", self.parameters.backbone)
        code = [Path(name) for name in names if name.startswith("stages/")]
        self._inputs = [*self._prepared, *code, backbone]
        self._stat = self._read_stat()
        self.fingerprint = self._read_fingerprint()

    def check(self) -> None:
        """Raise a UserError if data, code or params.yaml are not as they were at the start."""
        try:
            stat = self._read_stat()
            is_same = load_yaml(Path("params.yaml")) == self._params and (
                stat == self._stat  # or else the same content may have been written again
                or self._read_fingerprint() == self.fingerprint
            )
        except FileNotFoundError:  # deleted while it is read
            is_same = False
        if not is_same:
            raise UserError(
                "params.yaml, data/prepared or the code has changed since the start. What is"
                " finished is kept: the same command goes on from there once they are as they were,"
                " and otherwise begins anew"
            )
        self._stat = stat

    def run(
        self,
        values: Mapping[str, Any],
        folder: Path,
        name: str,
        on_epoch: Callable[[History], None] = lambda history: None,
    ) -> dict[str, Any]:
        """Train, unless the result of the same training is known.

        Parameters
        ----------
        values : mapping
            What differs from params.yaml, by dotted key.
        folder : path
            Of `own_folder`.
        name : str
            For the progress bar.
        on_epoch : callable
            Called after each epoch with the history up to there. If it raises, the training is
            stopped; the same training then resumes after its last epoch.

        Returns
        -------
        result : dict
            ``"history"``, and by stage the content of its JSON file.

        Raises
        ------
        TrainingFailed
            If the training ends with an error.
        UserError
            If the workspace has changed meanwhile.
        """
        parameters = replace(self.parameters, values)
        backbone = Path("data/backbones", parameters.backbone)
        key = files.fingerprint(
            [backbone] if backbone.is_file() else [],
            inputs=self.fingerprint,
            parameters=parameters.model_dump(),
            stages=self.stages,
            packages={package: metadata.version(package) for package in _PACKAGES},
        )
        path = files.scratch_dir("trainings") / f"{key}.json"
        if path.exists():
            result = json.loads(path.read_text(encoding="utf-8"))
            for epochs in range(1, len(result["history"]) + 1):
                on_epoch(result["history"][:epochs])
            return result
        self.check()
        folder = folder / "workspace"
        self._lay_out(folder, values)
        bar = cli.progress((), total=parameters.total_epochs, unit="epoch", label=name)
        history: History = []

        def read_new_epochs() -> None:
            for row in _read_history(folder)[len(history) :]:
                self.check()
                history.append(row)
                bar.update()
                on_epoch(history)

        try:
            with contextlib.closing(bar):
                for stage in self.stages:
                    with _start(stage, folder) as process:
                        while process.poll() is None:
                            read_new_epochs()
                            time.sleep(_POLL_SECONDS)
                        read_new_epochs()
        except TrainingFailed:
            self.check()  # a change may be the reason
            raise
        self.check()
        result = {"history": history}
        for stage in self.stages:
            result[stage] = json.loads((folder / f"metrics/{stage}.json").read_text("utf-8"))
        files.write_json(path, result)
        files.keep_newest(path.parent, "*.json", _MAX_RESULTS)
        return result

    def _lay_out(self, folder: Path, values: Mapping[str, Any]) -> None:
        """Make a workspace for the stages; the test split is in it only if it is to be read."""
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "data" / "prepared").mkdir(parents=True)
        for path in [*self._prepared, Path("data/backbones")]:
            try:
                (folder / path).symlink_to(path.absolute())
            except OSError:  # a drive without links
                (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path)
        shutil.copy("params.yaml", folder)
        set_values(values, folder / "params.yaml")

    def _files(self) -> list[Path]:
        found: list[Path] = []
        for path in self._inputs:
            found += [path] if path.is_file() else path.rglob("*")
        hidden = ("__pycache__", ".")
        return [p for p in found if p.is_file() and not any(x.startswith(hidden) for x in p.parts)]

    def _read_stat(self) -> dict[Path, tuple[int, int]]:
        stats = {path: path.stat() for path in self._files()}
        return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}

    def _read_fingerprint(self) -> str:
        return files.fingerprint(self._files(), parameters=self.parameters.model_dump())


def unused_folders() -> Generator[Path, None, None]:
    """Yield each folder of a process that runs no more; no other process takes it meanwhile.

    Don't call it within `own_folder`: a process that opens its lock a second time loses it.
    """
    for folder in sorted(files.scratch_dir("trainings/processes").iterdir()):
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(files.run_lock(folder / ".lock"))
            except UserError:  # its process runs
                continue
            yield folder


@contextlib.contextmanager
def own_folder() -> Iterator[Path]:
    """Yield a folder for the trainings of this process, which no other process uses meanwhile."""
    while (own := next(unused := unused_folders(), None)) is None:
        (files.scratch_dir("trainings/processes") / secrets.token_hex(4)).mkdir()
    with contextlib.closing(unused):  # which holds the folder
        yield own
        shutil.rmtree(own / "workspace", ignore_errors=True)


@contextlib.contextmanager
def _start(stage: str, folder: Path) -> Iterator[subprocess.Popen]:
    """Run a stage in a folder; kill it at the end of the block, or raise if it has failed."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM.format(os.getpid()), stage],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(_ROOT), "DVC_ROOT": str(_shared_scratch())},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,  # Ctrl-C is for this process, which stops the other
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        if process.returncode < 0:
            raise TrainingFailed("killed, as by the system when memory runs out")
        if process.returncode:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").splitlines()
            said = [line for line in lines if line.strip()]
            raise TrainingFailed(said[-1] if said else f"exit status {process.returncode}")


def _shared_scratch() -> Path:
    """Return what is DVC_ROOT for trainings: their checkpoints don't crowd out one of `dvc repro`.

    Cached features are those of the workspace.
    """
    root = files.scratch_dir("trainings")
    scratch = root / ".dvc" / "tmp" / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):  # there already, or a drive without links
        (scratch / "features").symlink_to(files.scratch_dir("features"))
    return root


def _read_history(folder: Path) -> History:
    path = folder / "metrics" / "history.csv"
    if not path.exists():
        return []
    return pd.read_csv(path)[["val_loss", "val_accuracy"]].to_dict("records")
