"""Checkpoints: the state of a training run after an epoch, written atomically."""

import json
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from stages.run import files

_MAX_CHECKPOINTS = 4  # one per interrupted training run; the oldest are deleted


class Checkpoint:
    """The latest checkpoint of one training run, in the scratch folder.

    Its name is the fingerprint, a hash of all that the run depends on: no other run loads it.
    """

    def __init__(self, fingerprint: str) -> None:
        self.path = files.scratch_dir("checkpoints") / f"{fingerprint}.npz"

    def save(self, arrays: Mapping[str, Iterable[np.ndarray]], state: Mapping[str, Any]) -> None:
        """Write named lists of arrays, and a state that JSON can represent."""
        named = {
            f"{name}/{n}": array for name, items in arrays.items() for n, array in enumerate(items)
        }
        contents = json.dumps({"names": [*named], "state": state})
        with files.exclusive(self.path.parent):  # two experiments may train the same model
            with files.atomic_write(self.path) as tmp, open(tmp, "wb") as file:
                np.savez(file, allow_pickle=False, contents=contents, **named)
            files.keep_newest(self.path, "*.npz", _MAX_CHECKPOINTS)

    def load(self) -> tuple[dict[str, list[np.ndarray]], dict[str, Any]] | None:
        """Return the arrays and the state, or None if there is no checkpoint or it is damaged."""
        if not self.path.exists():
            return None
        with open(self.path, "rb") as file:  # what can't be opened is not damaged
            try:
                with zipfile.ZipFile(file) as archive:
                    if archive.testzip():  # the name of a member with another checksum
                        raise zipfile.BadZipFile
                file.seek(0)
                with np.load(file) as saved:
                    contents = json.loads(str(saved["contents"]))
                    arrays: dict[str, list[np.ndarray]] = {}
                    for name in contents["names"]:
                        arrays.setdefault(name.split("/")[0], []).append(saved[name])
            except Exception:  # there are many kinds of damage
                print("The checkpoint of an interrupted run is damaged: all epochs are repeated.")
                return None
        return arrays, contents["state"]

    def delete(self) -> None:
        """Delete the checkpoint; call it when the training is complete."""
        self.path.unlink(missing_ok=True)
