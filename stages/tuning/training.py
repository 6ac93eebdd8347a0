"""Trainings with other parameters than those of params.yaml, each in a process of its own.

A training is the stage itself, run in a temporary folder that has its own params.yaml and links to
the prepared images. DVC and Git take no part in it.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
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

_PROGRAM = """
from stages.run.processes import exit_with_parent
exit_with_parent({})
from stages.__main__ import main
main()
"""
_POLL_SECONDS = 0.1
_PACKAGES = ("keras", "numpy", "tensorflow")  # on which a result depends

History = list[dict[Hashable, Any]]  # val_loss and val_accuracy of each epoch


class TrainingFailed(UserError):
    """A training has ended with an error: the text is its last line."""


class Trainings:
    """Trainings on the data and with the code that this workspace has now.

    With ``Trainings("train", "evaluate")``, each network is evaluated, too. `parameters` are those
    of params.yaml, and `fingerprint` is a hash of all that a result depends on: parameters, data,
    code and packages. Raises a UserError if the prepared images are missing or out of date.
    """

    def __init__(self, *stages: str) -> None:
        self.stages = stages
        pipeline = load_yaml(Path("dvc.yaml"))["stages"]
        names = sorted({name for stage in stages for name in pipeline[stage]["deps"]})
        self._prepared = [Path(name) for name in names if name.startswith("data/prepared/")]
        self._code = [Path(name) for name in names if name.startswith("stages/")]
        if missing := [path for path in self._prepared if not path.exists()]:
            raise UserError(f"{missing[0]}: not there; run `dvc repro` first")
        if stale := changed_since_run(Path.cwd(), "prepare"):
            raise UserError(
                f"data/prepared is not up to date ({'; '.join(stale[:3])}); run `dvc repro` first"
            )
        self.parameters, self.fingerprint = self._read_inputs()

    def run(
        self,
        values: Mapping[str, Any],
        name: str,
        on_epoch: Callable[[History], None] = lambda history: None,
    ) -> dict[str, Any]:
        """Train; go on after the last epoch if the same training was stopped before.

        `values` (by dotted key) are what differs from params.yaml, and `name` is for the progress
        bar. After each epoch, `on_epoch` is called with the history up to there; if it raises, the
        training is stopped. Returns the content of each stage's JSON file, by stage. Raises
        TrainingFailed, or a UserError if data, code or params.yaml have changed since the start.
        """
        epochs = replace(self.parameters, values).total_epochs
        self._check()
        with (
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary,
            cli.progress((), total=epochs, unit="epoch", label=name) as bar,
        ):
            folder = Path(temporary)
            (folder / "data" / "prepared").mkdir(parents=True)
            for path in [*self._prepared, Path("data/backbones")]:
                (folder / path).symlink_to(path.absolute())
            shutil.copy("params.yaml", folder)
            set_values(values, folder / "params.yaml")

            def tell(history: History) -> None:
                bar.update()
                on_epoch(history)

            try:
                for stage in self.stages:
                    run_stage(stage, folder, tell)
            except Exception:
                self._check()  # a change may be the reason
                raise
            self._check()
            names = {stage: folder / "metrics" / f"{stage}.json" for stage in self.stages}
            return {stage: json.loads(path.read_text("utf-8")) for stage, path in names.items()}

    def _check(self) -> None:
        found = None
        with contextlib.suppress(FileNotFoundError):  # deleted while it is read
            found = self._read_inputs()[1]
        if found != self.fingerprint:
            raise UserError(
                "params.yaml, data/prepared or the code has changed since the start. What is"
                " finished is kept: the same command goes on from there once they are as they were,"
                " and otherwise begins anew"
            )

    def _read_inputs(self) -> tuple[Train, str]:
        """Return the parameters that params.yaml has now, and the hash of all that matters."""
        parameters = read_section(Train, "train")
        found = [Path("data/backbones", parameters.backbone)]
        for path in [*self._prepared, *self._code]:
            found += path.rglob("*") if path.is_dir() else [path]
        hidden = ("__pycache__", ".")
        fingerprint = files.fingerprint(
            [p for p in found if p.is_file() and not any(x.startswith(hidden) for x in p.parts)],
            parameters=parameters.model_dump(),
            packages={package: metadata.version(package) for package in _PACKAGES},
        )
        return parameters, fingerprint


def run_stage(stage: str, folder: Path, on_epoch: Callable[[History], None]) -> None:
    """Run a stage in a folder that has its inputs and params.yaml.

    After each new epoch, `on_epoch` is called with the history up to there; if it raises, the stage
    is stopped. Raises TrainingFailed.
    """
    history = _read_history(folder)
    with _start(stage, folder) as process:
        ended = False
        while not ended:
            ended = process.poll() is not None
            for row in _read_history(folder)[len(history) :]:
                history.append(row)
                on_epoch(history)
            if not ended:
                time.sleep(_POLL_SECONDS)


@contextlib.contextmanager
def _start(stage: str, folder: Path) -> Iterator[subprocess.Popen]:
    """Run a stage in a folder; kill it at the end of the block, or raise if it has failed."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM.format(os.getpid()), stage],
            cwd=folder,
            # With a scratch folder of their own, they crowd out no checkpoint of `dvc repro`.
            env=os.environ
            | {"PYTHONPATH": os.getcwd(), "DVC_ROOT": str(files.scratch_dir("trainings"))},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,  # Ctrl-C is for this process, which stops the other
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.returncode < 0:
            raise TrainingFailed("killed, as by the system when memory runs out")
        if process.returncode:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").splitlines()
            said = [line for line in lines if line.strip()]
            raise TrainingFailed(said[-1] if said else f"exit status {process.returncode}")


def _read_history(folder: Path) -> History:
    path = folder / "metrics" / "history.csv"
    if not path.exists():
        return []
    return pd.read_csv(path)[["val_loss", "val_accuracy"]].to_dict("records")
