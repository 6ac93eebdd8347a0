"""Versions of the pipeline: commits, tags, branches, experiments and the workspace.

What they wrote is read through DVC, from its cache or remote. Nothing is run or checked out.
"""

import contextlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from dvc.api import DVCFileSystem
from dvc.exceptions import NotDvcRepoError
from dvc.repo import Repo
from dvc.utils.serialize import ParseError

from stages.data.arrays import read_index
from stages.display.status import changed_since_run, git
from stages.run.cli import UserError, first_line

WORKSPACE = "workspace"


@dataclass(frozen=True)
class Version:
    """One version of the pipeline: what it wrote.

    `commit` is its hash in Git, empty for the workspace. `files` are the repository's, of Git and
    of DVC, and `folder` is the project's folder in them.
    """

    name: str
    commit: str
    files: DVCFileSystem
    folder: str

    def index(self) -> pd.DataFrame:
        """Read index.csv, as `stages.data.arrays.read_index` does."""
        columns = ["path", "class", "split", "digest", "array_index"]
        return read_index(self._open_table("data/prepared/index.csv", columns))

    def predictions(self) -> tuple[pd.DataFrame, list[str]]:
        """Read predictions.csv: path, class, predicted, confidence; and the classes, in order."""
        columns = ["path", "class", "predicted", "confidence"]
        file = self._open_table("metrics/predictions.csv", columns)
        types = dict.fromkeys(columns[:3], str)
        table = pd.read_csv(file, dtype=types, keep_default_na=False, lineterminator="\n")
        return table[columns], [str(name)[2:] for name in table if str(name).startswith("p:")]

    def metrics(self, name: str) -> dict[str, Any]:
        """Read metrics/NAME.json; empty if Git has none of it."""
        with self._reading(f"metrics/{name}.json") as path:
            return json.loads(self.files.read_text(path)) if self.files.exists(path) else {}

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
        for row in rows:
            if row not in images:
                raise self._outdated(f"data/prepared/{split} has no image {row}")
        return np.array([images[row] for row in rows])

    def _open_table(self, path: str, columns: Sequence[str]) -> io.BytesIO:
        """Return the content of a CSV file, or raise a UserError if it lacks one of the columns."""
        with self._reading(path) as full_path, self.files.open(full_path) as file:
            content = io.BytesIO(file.read())
        try:
            found = pd.read_csv(content, nrows=0, lineterminator="\n").columns
        except ValueError:  # empty, or no text
            raise self._outdated(f"{path} is no table") from None
        for column in columns:
            if column not in found:
                raise self._outdated(f"{path} has no column {column!r}")
        content.seek(0)
        return content

    def _outdated(self, found: str) -> UserError:
        advice = "an earlier version of the code wrote it; compare versions that are more recent"
        return UserError(f"{self.name}: {found}: {advice}")

    @contextlib.contextmanager
    def _reading(self, path: str) -> Iterator[str]:
        """Yield the path in `files`; turn errors of DVC or a remote into a one-line UserError."""
        try:
            yield f"{self.folder}/{path}"
        except ParseError as error:
            advice = "was a conflict of a merge committed? Name another version"
            raise UserError(f"{self.name}: {first_line(error)}; {advice}") from error
        except Exception as error:
            where = f"with {self.name} checked out" if self.commit else "here"
            raise UserError(
                f"{self.name}: {path} can't be read from DVC's cache or remote"
                f" ({first_line(error)}); `dvc push` where it was made, or `dvc repro` {where}"
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
        If there is no such version, or the workspace was edited since its last `dvc repro`.
    """
    try:
        project = Path(Repo.find_root(str(root)))
    except NotDvcRepoError:
        raise UserError(f"{root}: not in a DVC repository; run this where dvc.yaml is") from None
    if name == WORKSPACE:
        if changed := changed_since_run(project):
            advice = "run `dvc repro` first, or name two revisions"
            raise UserError(f"{name}: not up to date ({'; '.join(changed[:3])}); {advice}")
        with contextlib.closing(DVCFileSystem(str(project), subrepos=True)) as files:
            yield Version(name, "", files, "")
        return
    # DVC takes an empty string for the workspace.
    git("rev-parse", folder=project)  # it explains what is wrong better than what DVC uses
    _complete(name, project)
    with contextlib.closing(DVCFileSystem(project, rev=name or "''", subrepos=True)) as files:
        try:
            commit = files.repo.get_rev()
        except Exception as error:  # of DVC, or of the Git libraries that it uses
            advice = "`git log --oneline` and `dvc exp list` list what there is"
            if git("rev-parse", "--is-shallow-repository", folder=project) == "true":
                advice = "this is a shallow clone, as in CI: `git fetch --unshallow --tags`"
            raise UserError(f"{name}: {first_line(error)}; {advice}") from None
        # A revision is opened at the root of Git, which may be above DVC's.
        below = project.relative_to(files.repo.scm.root_dir)
        yield Version(name, commit, files, "".join(f"/{part}" for part in below.parts))


def _complete(name: str, project: Path) -> None:
    """Let Git fetch what a partial clone lacks of a commit: DVC would wait for it forever."""
    if not git("config", "--get-regexp", r"^remote\..*\.promisor$", folder=project):
        return
    git("archive", f"--output={os.devnull}", name, folder=project)
    objects = git("rev-list", "--objects", "--no-walk", "--missing=print", name, folder=project)
    if any(line.startswith("?") for line in objects.splitlines()):
        raise UserError(f"{name}: this partial clone lacks files of it, and can't fetch them now")
