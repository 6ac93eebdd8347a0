"""Versions of the pipeline: commits, tags, branches, experiments and the workspace.

Whatever a version wrote is read through DVC: from the workspace, the cache or the remote. Nothing
is run, and nothing is checked out.
"""

import contextlib
import json
import posixpath
import subprocess
import sys
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
from stages.utils.cli import UserError, first_line

WORKSPACE = "workspace"
_NOT_PULLED = ("deleted", "not in cache")  # in `dvc status`, of outputs


@dataclass(frozen=True)
class Version:
    """One version of the pipeline.

    Attributes
    ----------
    name : str
        As the user names it.
    files : DVCFileSystem
        The repository's files, of Git and of DVC, as they were in this version.
    folder : str
        The DVC project's folder in `files`.
    parameters : dict
        The values that its stages ran with, by dotted name.
    code : dict
        The MD5 of each module that its stages ran, by path.
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
        """Read predictions.csv.

        Returns
        -------
        predictions : DataFrame
            A row for each evaluated image: ``path``, ``class``, ``predicted``, ``confidence``.
        classes : list of str
            In label order.
        """
        columns = ["path", "class", "predicted", "confidence"]
        with self._reading("metrics/predictions.csv") as path:
            with self.files.open(path) as file:
                header = pd.read_csv(file, nrows=0, lineterminator="\n").columns
            with self.files.open(path) as file:
                predictions = pd.read_csv(
                    file, usecols=columns, dtype=dict.fromkeys(columns[:3], str),
                    keep_default_na=False, lineterminator="\n",
                )  # fmt: skip
        return predictions, [name[2:] for name in header if name.startswith("p:")]

    def images(self, split: str, rows: np.ndarray) -> np.ndarray:
        """Return the prepared images at `rows` (int array of shape (k,)) of a split.

        Returns
        -------
        images : uint8 array of shape (k, height, width, channels)
        """
        images: dict[int, np.ndarray] = {}
        first = 0
        with self._reading(f"data/prepared/{split}") as folder:
            for path in sorted(self.files.ls(folder, detail=False)):
                if posixpath.basename(path).startswith("images-"):
                    with self.files.open(path) as file:
                        block = np.load(file)
                    within = rows[(rows >= first) & (rows < first + len(block))]
                    images |= {row: block[row - first] for row in within}
                    first += len(block)
        return np.array([images[row] for row in rows])

    @contextlib.contextmanager
    def _reading(self, path: str) -> Iterator[str]:
        """Yield the path in `files`; whatever DVC or a remote's library raises becomes one line."""
        try:
            yield posixpath.join("/", self.folder, path)
        except KeyError as error:
            raise UserError(
                f"{self.name}: {path} has no column {error}: an earlier version of the code wrote"
                " it; compare versions that are more recent"
            ) from error
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
    root = Path(root).resolve()
    project = _nearest(root, ".dvc")
    if project is None:
        raise UserError(f"{root}: not in a DVC repository; run this where dvc.yaml is")
    folder = "."
    if name != WORKSPACE:  # a revision is opened at the root of Git, of which DVC may be a part
        folder = project.relative_to(_nearest(project, ".git") or project).as_posix()
    rev = None if name == WORKSPACE else name or "''"  # DVC takes an empty text for the workspace
    with contextlib.closing(DVCFileSystem(project, rev=rev, subrepos=True)) as files:
        stages = _locked_stages(files, posixpath.join("/", folder, "dvc.lock"), name)
        if "evaluate" not in stages:
            raise UserError(
                f"{name}: its dvc.lock has no stage evaluate; run `dvc repro` on that version"
            )
        if name == WORKSPACE:
            _check_reproduced(project)
        code: dict[str, str] = {}
        parameters: dict[str, Any] = {}
        for stage in stages.values():
            deps = {dep["path"]: dep.get("md5") for dep in stage.get("deps", [])}
            code |= {path: md5 for path, md5 in deps.items() if path.startswith("stages/")}
            values = stage.get("params", {}).get("params.yaml", {})
            flat = pd.json_normalize(values, sep=".").to_dict("records")[0]
            parameters |= {str(key): value for key, value in flat.items()}
        yield Version(name, files, folder, parameters, code)


def _nearest(folder: Path, member: str) -> Path | None:
    """Return the folder, or the nearest one above it, that holds `member`."""
    return next((path for path in (folder, *folder.parents) if (path / member).exists()), None)


def _locked_stages(files: DVCFileSystem, path: str, name: str) -> dict[str, Any]:
    """Return the section `stages` of dvc.lock; empty if there is no such file."""
    try:
        with files.open(path) as file:
            return (YAML(typ="safe", pure=True).load(file) or {}).get("stages", {})
    except FileNotFoundError:
        return {}
    except DvcException as error:
        raise UserError(
            f"{name}: {first_line(error)}; `git log --oneline` and `dvc exp list`"
            " list what there is"
        ) from None


def _check_reproduced(project: Path) -> None:
    """Raise a UserError if the workspace's outputs are not those of its inputs."""
    command = [sys.executable, "-m", "dvc", "status", "--json"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"`dvc status` failed: {done.stderr.strip()}")
    edited = []
    for address, entries in json.loads(done.stdout).items():
        names = []
        for entry in entries:  # "changed command", or {"changed deps": {path: "modified"}}
            changes = entry.values() if isinstance(entry, dict) else [{entry: "changed"}]
            names += [n for paths in changes for n, c in paths.items() if c not in _NOT_PULLED]
        if names:
            stage = address.rpartition(":")[2]  # without the path of dvc.yaml
            edited.append(f"{stage}: {', '.join(names[:3])}")
    if edited:
        raise UserError(
            f"{WORKSPACE}: edited, but not reproduced ({'; '.join(edited)}); run `dvc repro` first,"
            " or name two revisions"
        )
