"""A training's state between two epochs, written whole or not at all."""

import hashlib
import io
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stages.utils import files
from stages.utils.files import atomic_write

_KEPT = 4  # checkpoints of interrupted runs that nobody went on with


def identity(files: Iterable[Path], **values: Any) -> str:
    """Return a name for one exact training: its data, parameters, surroundings and code.

    Parameters
    ----------
    files : iterable of path
        Their names and bytes count; read once, which also brings them into the page cache.
    **values : anything that JSON can hold

    Returns
    -------
    identity : str
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    code = sorted(
        Path(module.__file__)
        for name, module in sys.modules.items()
        if name.split(".")[0] in ("stages", "__main__") and getattr(module, "__file__", None)
    )
    for path in [*sorted(files), *code]:
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").digest()
        digest.update(path.name.encode() + b"\0" + content)
    return digest.hexdigest()


class Checkpoint:
    """The one checkpoint of a training, named by its identity, in the scratch folder.

    Parameters
    ----------
    identity : str
        Another identity's checkpoint is never read.
    """

    def __init__(self, identity: str) -> None:
        self.path = files.scratch_dir("checkpoints") / f"{identity}.npz"

    def save(self, arrays: Mapping[str, Iterable[np.ndarray]], state: Mapping[str, Any]) -> None:
        """Write lists of arrays by name, and a state that JSON can hold."""
        content = io.BytesIO()
        named = {"state": np.array(json.dumps(state))}
        for key, items in arrays.items():
            named |= {f"{key}/{n}": array for n, array in enumerate(items)}
        np.savez(content, **named)
        content = content.getbuffer()
        with files.exclusive(self.path.parent):  # two experiments may be the same training
            with atomic_write(self.path) as tmp, open(tmp, "wb") as file:
                file.write(hashlib.sha256(content).digest())
                file.write(content)
            files.keep_newest(self.path.parent, "*.npz", _KEPT)

    def load(self) -> tuple[dict[str, list[np.ndarray]], dict[str, Any]] | None:
        """Return what was saved last, or None where there is nothing or it is damaged."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        if hashlib.sha256(content[32:]).digest() != content[:32]:
            print("The checkpoint of an interrupted run is damaged: starting afresh.")
            return None
        with np.load(io.BytesIO(content[32:])) as saved:
            state = json.loads(str(saved["state"]))
            arrays: dict[str, list[np.ndarray]] = {}
            for name in saved.files[1:]:
                arrays.setdefault(name.split("/")[0], []).append(saved[name])
        return arrays, state

    def delete(self) -> None:
        """Remove it: the training has ended well."""
        self.path.unlink(missing_ok=True)
