"""What a frozen backbone makes of a split: computed once, kept for the next run."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import keras
import numpy as np

from stages.model.inference import make_predict_fn
from stages.utils import files
from stages.utils.cli import progress
from stages.utils.files import atomic_write

_CHUNK = 256  # images: a multiple of the batches that `forward` runs
_KEPT = 8  # splits' features in the scratch folder; the oldest go
_DIGEST = 32  # bytes, after the array


class Features:
    """Vectors of a split's images, with its labels.

    Parameters
    ----------
    vectors : float32 array [n, d]
    labels : int array [n]
    """

    def __init__(self, vectors: np.ndarray, labels: np.ndarray) -> None:
        self.vectors, self.labels = vectors, labels

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors at these positions: float32 [k, d]."""
        return self.vectors[rows]

    def batches(self) -> Iterator[np.ndarray]:
        """Yield all vectors in order, some at a time."""
        for start in range(0, len(self), _CHUNK):
            yield np.asarray(self.vectors[start : start + _CHUNK])


def features(backbone: keras.Model, split, identity: str, label: str) -> Features:
    """Run a frozen backbone on a split, or take its vectors from the scratch folder.

    Parameters
    ----------
    backbone : Keras model
        uint8 images to float32 vectors [n, d].
    split : Split
    identity : str
        Of the split's arrays, the backbone's file and the code: what the vectors follow from.
    label : str
        What the progress bar says.

    Returns
    -------
    features : Features
        Memory-mapped.
    """
    shape = len(split), backbone.output_shape[-1]
    place = files.scratch_dir("features")
    with files.exclusive(place):  # another experiment may want the same ones
        path = place / f"{identity}.npy"
        vectors = _read(path, shape)
        if vectors is None:
            run = make_predict_fn(backbone)
            count = -(-len(split) // _CHUNK)
            chunks = progress(split.batches(_CHUNK), total=count, unit="chunk", label=label)
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            with atomic_write(path) as tmp, open(tmp, "w+b") as file:
                np.lib.format.write_array_header_1_0(file, header)
                for chunk in chunks:
                    file.write(run([chunk]).tobytes())
                file.write(_digest(file, file.tell()))
            files.keep_newest(place, "*.npy", _KEPT)
            vectors = _read(path, shape)
    return Features(vectors, split.labels)


def _read(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """Return what a file holds, or None where it is absent or damaged."""
    try:
        with open(path, "rb") as file:
            end = path.stat().st_size - _DIGEST
            if _digest(file, end) != file.read():
                return None
        vectors = np.load(path, mmap_mode="r")
    except (OSError, ValueError):
        return None
    return vectors if vectors.shape == shape else None


def _digest(file: BinaryIO, end: int) -> bytes:
    """Return the digest of a file's first bytes, and leave the file at their end."""
    digest = hashlib.blake2b(digest_size=_DIGEST)
    file.seek(0)
    while file.tell() < end:
        digest.update(file.read(min(1 << 20, end - file.tell())))
    return digest.digest()
