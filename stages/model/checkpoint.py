"""Checkpoints: the state of a training run after an epoch, written atomically."""

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from stages.run import files
from stages.run.files import atomic_write

_MAX_CHECKPOINTS = 4  # one per interrupted training run; the oldest are deleted
_DIGEST_BYTES = 32


class Checkpoint:
    """The latest checkpoint of one training run, in the scratch folder.

    Parameters
    ----------
    fingerprint : str
        A hash of all that the run depends on. Only a checkpoint with the same fingerprint is
        loaded.
    """

    def __init__(self, fingerprint: str) -> None:
        self.path = files.scratch_dir("checkpoints") / f"{fingerprint}.npz"

    def save(self, arrays: Mapping[str, Iterable[np.ndarray]], state: Mapping[str, Any]) -> None:
        """Write named lists of arrays, and a state that JSON can represent."""
        buffer = io.BytesIO()
        named = {"state": np.array(json.dumps(state))}
        for key, items in arrays.items():
            named |= {f"{key}/{n}": array for n, array in enumerate(items)}
        np.savez(buffer, allow_pickle=False, **named)
        content = buffer.getbuffer()
        with files.exclusive(self.path.parent):  # two experiments may train the same model
            with atomic_write(self.path) as tmp, open(tmp, "wb") as file:
                file.write(hashlib.sha256(content).digest())
                file.write(content)
            files.keep_newest(self.path.parent, "*.npz", _MAX_CHECKPOINTS)

    def load(self) -> tuple[dict[str, list[np.ndarray]], dict[str, Any]] | None:
        """Return the arrays and the state, or None if there is no checkpoint or it is damaged."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return None
        digest, content = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if hashlib.sha256(content).digest() != digest:
            print("The checkpoint of an interrupted run is damaged: starting from the beginning.")
            return None
        with np.load(io.BytesIO(content)) as saved:
            state = json.loads(str(saved["state"]))
            arrays: dict[str, list[np.ndarray]] = {}
            for name in saved.files[1:]:
                arrays.setdefault(name.split("/")[0], []).append(saved[name])
        return arrays, state

    def delete(self) -> None:
        """Delete the checkpoint; call it when the training is complete."""
        self.path.unlink(missing_ok=True)
