"""The state of the repository and of the pipeline, as Git and `dvc status` report it."""

import json
import os
import subprocess
import sys
from pathlib import Path

from stages.run.cli import UserError, first_line, list_names


def git(*words: str | Path, folder: str | Path = ".") -> str:
    """Run Git in a folder, and return what it prints: nothing if it fails.

    Raises
    ------
    UserError
        With Git's own advice, if the repository is another user's.
    """
    done = subprocess.run(
        ["git", *words], cwd=folder, capture_output=True, text=True, errors="replace", check=False
    )
    if "safe.directory" in done.stderr:
        raise UserError(" ".join(done.stderr.split()))
    return done.stdout.strip()


def check_merged(folder: str | Path = ".") -> None:
    """Raise a UserError if a merge has left conflicts in files below a folder."""
    listed = git("ls-files", "-z", "--unmerged", folder=folder)  # names as they are
    if names := sorted({line.partition("\t")[2] for line in listed.split("\0") if line}):
        raise UserError(
            f"{list_names(names)}: in conflict since a merge; edit it, or take one side (`git"
            " checkout --ours FILE`, or --theirs), then `git add FILE` and `dvc checkout`"
        )


def set_up_merges() -> str:
    """Let Git merge what DVC writes; return the command that was run, or "" if it is set up."""
    included = Path(".dvc/merge.gitconfig").resolve()
    driver = "merge.dvc.driver"  # `dvc install` sets it, too, but not for projects in sub-folders
    if git("config", driver) == git("config", "--file", included, driver):
        return ""
    common = git("rev-parse", "--path-format=absolute", "--git-common-dir")
    path = Path(os.path.relpath(included, common)).as_posix()
    git("config", "--local", "--add", "include.path", path)
    return f"git config --add include.path {path}"


def changed_since_run(project: Path, *stages: str) -> list[str]:
    """Return what differs from the last run of the stages (default: all), as ``"train: params"``.

    Outputs that are missing, here or in DVC's cache, are no difference.

    Raises
    ------
    UserError
        If `dvc status` fails, for instance because of a conflict in dvc.lock.
    """
    command = [sys.executable, "-m", "dvc", "status", "--json", *stages]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    if done.returncode:
        check_merged(project)
        reason = first_line(UserError(done.stderr)).removeprefix("ERROR: ")
        raise UserError(f"`dvc status` failed: {reason}")
    changed = []
    for stage, entries in json.loads(done.stdout).items():
        for entry in entries:  # "changed command", or {"changed deps": {path: "modified"}}
            for paths in entry.values() if isinstance(entry, dict) else [{entry: ""}]:
                missing = ("deleted", "not in cache")
                changed += [f"{stage}: {path}" for path in paths if paths[path] not in missing]
    return changed
