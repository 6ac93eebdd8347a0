"""Versions of the pipeline: commits, tags, branches, experiments and the workspace.

What they wrote is read through DVC, from its cache or remote. Nothing is run or checked out.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from dvc.api import DVCFileSystem
from dvc.exceptions import DvcException
from ruamel.yaml import YAML

from stages.data.arrays import read_index
from stages.display.status import changed_since_run
from stages.run.cli import UserError, first_line

WORKSPACE = "workspace"


@dataclass(frozen=True)
class Version:
    """One version of the pipeline.

    `files` are the repository's, of Git and of DVC, and `folder` is the project's folder in them.
    `parameters` has the values that the stages ran with, by dotted name, and `code` the MD5 of each
    module that they ran, by path.
    """

    name: str
    files: DVCFileSystem
    folder: str
    parameters: dict[str, Any]
    code: dict[str, str]

    def index(self) -> pd.DataFrame:
        """Read index.csv, as `stages.data.arrays.read_index` does."""
        with self._reading("data/prepared/index.csv") as path, self.files.open(path) as file:
            return read_index(file)

    def predictions(self) -> tuple[pd.DataFrame, list[str]]:
        """Read predictions.csv: path, class, predicted, confidence; and the classes, in order."""
        columns = ["path", "class", "predicted", "confidence"]
        with self._reading("metrics/predictions.csv") as path, self.files.open(path) as file:
            types = dict.fromkeys(columns[:3], str)
            table = pd.read_csv(file, dtype=types, keep_default_na=False, lineterminator="\n")
            return table[columns], [str(n)[2:] for n in table if str(n).startswith("p:")]

    def images(self, split: str, rows: np.ndarray) -> np.ndarray:
        """Read prepared images of a split, uint8 [k, height, width, channels], at rows, int [k]."""
        images: dict[int, np.ndarray] = {}
        first = 0
        with self._reading(f"data/prepared/{split}") as folder:
            for path in sorted(self.files.glob(f"{folder}/images-*")):
                with self.files.open(path) as file:
                    block = np.load(file)
                within = rows[(rows >= first) & (rows < first + len(block))]
                images |= {row: block[row - first] for row in within}
                first += len(block)
            return np.array([images[row] for row in rows])

    @contextlib.contextmanager
    def _reading(self, path: str) -> Iterator[str]:
        """Yield the path in `files`; turn errors of DVC or a remote into a one-line UserError."""
        try:
            yield f"{self.folder}/{path}"
        except KeyError as error:
            advice = (
                "an earlier version of the code wrote it; compare versions that are more recent"
            )
            raise UserError(f"{self.name}: {path} has no column {error}: {advice}") from error
        except Exception as error:
            there = "here" if self.name == WORKSPACE else f"with {self.name} checked out"
            raise UserError(
                f"{self.name}: {path} can't be read from DVC's cache or remote"
                f" ({first_line(error)}); `dvc push` where it was made, or `dvc repro` {there}"
            ) from error


@contextlib.contextmanager
def open_version(name: str, root: str | Path = ".") -> Iterator[Version]:
    """Open one version of the pipeline.

    Parameters
    ----------
    name : str
        A commit, branch, tag, experiment, or "workspace".
    root : path, default="."
        A folder in the repository.

    Raises
    ------
    UserError
        If there is no such version, nothing was evaluated in it, or the workspace was edited since
        its last `dvc repro`.
    """
    project = _nearest(Path(root).resolve(), ".dvc")
    if project is None:
        raise UserError(f"{root}: not in a DVC repository; run this where dvc.yaml is")
    folder, rev = "", None
    if name != WORKSPACE:  # a revision is opened at the root of Git, which may be above DVC's
        below = project.relative_to(_nearest(project, ".git") or project)
        folder = "".join(f"/{part}" for part in below.parts)
        rev = name or "''"  # DVC takes an empty string for the workspace
    with contextlib.closing(DVCFileSystem(project, rev=rev, subrepos=True)) as files:
        try:
            lock = YAML(typ="safe", pure=True).load(files.read_text(f"{folder}/dvc.lock"))
        except FileNotFoundError:
            lock = None
        except DvcException as error:
            advice = "`git log --oneline` and `dvc exp list` list what there is"
            raise UserError(f"{name}: {first_line(error)}; {advice}") from None
        stages = (lock or {}).get("stages", {})
        if "evaluate" not in stages:
            raise UserError(f"{name}: its dvc.lock has no evaluate stage; run `dvc repro` there")
        if name == WORKSPACE and (changed := changed_since_run(project)):
            advice = "run `dvc repro` first, or name two revisions"
            raise UserError(f"{name}: not up to date ({'; '.join(changed[:3])}); {advice}")
        code: dict[str, str] = {}
        parameters: dict[str, Any] = {}
        for stage in stages.values():
            values = pd.json_normalize(stage.get("params", {}).get("params.yaml", {}), sep=".")
            parameters |= {str(key): value for key, value in values.to_dict("records")[0].items()}
            modules = [dep for dep in stage["deps"] if dep["path"].startswith("stages/")]
            code |= {module["path"]: module["md5"] for module in modules}
        yield Version(name, files, folder, parameters, code)


def _nearest(folder: Path, member: str) -> Path | None:
    """Return the folder, or the nearest one above it, that holds `member`."""
    return next((path for path in (folder, *folder.parents) if (path / member).exists()), None)
