"""The state of the pipeline, as `dvc status` reports it."""

import json
import subprocess
import sys
from pathlib import Path

from stages.run.cli import UserError


def changed_since_run(project: Path, *stages: str) -> list[str]:
    """Return what differs from the last run of the stages (default: all), as ``"train: params"``.

    Outputs that are missing, here or in DVC's cache, are no difference.

    Raises
    ------
    UserError
        If `dvc status` fails.
    """
    command = [sys.executable, "-m", "dvc", "status", "--json", *stages]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"`dvc status` failed: {done.stderr.strip()}")
    changed = []
    for stage, entries in json.loads(done.stdout).items():
        for entry in entries:  # "changed command", or {"changed deps": {path: "modified"}}
            for paths in entry.values() if isinstance(entry, dict) else [{entry: ""}]:
                missing = ("deleted", "not in cache")
                changed += [f"{stage}: {path}" for path in paths if paths[path] not in missing]
    return changed
