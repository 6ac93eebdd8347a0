"""Cached features of a frozen backbone."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from stages.data.arrays import LABELS, Split
from stages.model.inference import make_predict_fn
from stages.model.parameters import CODE
from stages.run import files
from stages.run.cli import progress

_CHUNK_SIZE = 256  # images; a multiple of the inference batch
_MAX_FILES = 16  # in the cache; the oldest are deleted
_DIGEST_BYTES = 32  # appended to the array


@dataclass(frozen=True)
class Features:
    """Features of a split's images; same methods as `Split`.

    Attributes
    ----------
    vectors : float32 array [n, d]
    labels : int array [n]
    """

    vectors: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors at `rows` (int array [k]): float32 [k, d]."""
        return self.vectors[rows]

    def batches(self, size: int = _CHUNK_SIZE) -> Iterator[np.ndarray]:
        """Yield all vectors in order, at most `size` at a time."""
        for start in range(0, len(self), size):
            yield np.asarray(self.vectors[start : start + size])


def extract_features(
    backbone: keras.Model, split: Split, arrays: Path, environment: Mapping[str, Any]
) -> Features:
    """Run a frozen backbone on a split, or load its features from the cache; memory-mapped.

    `arrays` is the folder of the split, and `environment` what `device.setup` returned: features in
    the cache are of the same network, pixels, code and environment.
    """
    pixels = [path for path in arrays.iterdir() if path.name != LABELS]
    network = _network_digest(backbone)
    fingerprint = files.fingerprint([*CODE, *pixels], network=network, environment=environment)
    shape = len(split), backbone.output_shape[-1]
    folder = files.scratch_dir("features")
    with files.exclusive(folder):  # another experiment may need the same features
        path = folder / f"{fingerprint}.npy"
        vectors = _load(path, shape)
        if vectors is None:
            predict = make_predict_fn(backbone)
            count = -(-len(split) // _CHUNK_SIZE)
            chunks = progress(
                split.batches(_CHUNK_SIZE),
                total=count,
                unit="chunk",
                label=f"features of {arrays.name}",
            )
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            with files.atomic_write(path) as tmp, open(tmp, "wb") as file:
                np.lib.format.write_array_header_1_0(file, header)
                for chunk in chunks:
                    file.write(predict([chunk]).tobytes())
                file.flush()
                file.write(_digest(np.memmap(tmp, np.uint8, "r")))
            files.keep_newest(path, "*.npy", _MAX_FILES)
            vectors = np.load(path, mmap_mode="r")
    return Features(vectors, split.labels)


def _network_digest(model: keras.Model) -> str:
    """Return the digest of a network, the same whether it was built or read from a model file."""
    config = model.get_config() | {"name": ""}  # Keras numbers it
    content = json.dumps(config, sort_keys=True, default=repr).encode()
    weights = (weight.tobytes() for weight in model.get_weights())
    return _digest(np.frombuffer(b"".join([content, *weights]), np.uint8)).hex()


def _load(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """Memory-map a file's vectors; None if it is missing or damaged."""
    try:
        content = np.memmap(path, np.uint8, "r")
        if _digest(content[:-_DIGEST_BYTES]) != content[-_DIGEST_BYTES:].tobytes():
            return None
        vectors = np.load(path, mmap_mode="r")
    except (OSError, ValueError):
        return None
    return vectors if vectors.shape == shape else None


def _digest(content: np.ndarray) -> bytes:
    """Return the digest of bytes."""
    return hashlib.blake2b(content.data, digest_size=_DIGEST_BYTES).digest()
