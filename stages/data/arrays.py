"""The prepared arrays, written by prepare and read image by image, and the image spec.

A split is a folder of ``images-0000.npy, images-0001.npy, ...`` and ``labels.npy``. Images are
sorted by digest, and a file holds one range of digests, so that a new image changes one file only.
The number of files is a power of two that follows from the number of images: files are about 1 MB
at most, as long as there are no more than 4,096. An empty split is an empty folder.
"""

import dataclasses
import itertools
import json
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from stages.run import files
from stages.run.cli import UserError, first_line

if TYPE_CHECKING:
    import pandas as pd

SPLITS = ("train", "val", "test")
_MAX_FILE_BYTES, _MAX_FILES = 2**20, 4096  # average bytes per file, files per split
LABELS = "labels.npy"


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """The class names and the preprocessing; written to image_spec.json and the model file.

    Attributes
    ----------
    classes : list of str
        Class names in label order (sorted).
    image_shape : tuple of int
        Height, width and channels (1 or 3).
    color_mode : {"rgb", "grayscale"}
    resize : {"crop", "pad", "stretch"}
    temperature : float, default=1.0
        What the logits of the model were divided by to calibrate it; 1 until a model is trained.
    white_level : int, default=65535
        The value that is white in images of more than 8 bits per channel.
    """

    classes: list[str]
    image_shape: tuple[int, int, int]
    color_mode: str
    resize: str
    temperature: float = 1.0
    white_level: int = 65535

    @classmethod
    def from_json(cls, text: str | bytes, source: str | Path = "image_spec.json") -> "ImageSpec":
        """Parse the JSON text of an image spec.

        Raises
        ------
        UserError
            If the text is not a valid image spec; the message names `source`.
        """
        try:
            spec = cls(**json.loads(text))
            height, width, channels = map(int, spec.image_shape)
            return dataclasses.replace(spec, image_shape=(height, width, channels))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{source}: not a valid image spec ({first_line(error)}); `dvc repro` writes it"
            ) from None

    @classmethod
    def read(cls, path: str | Path) -> "ImageSpec":
        """Read image_spec.json."""
        return cls.from_json(Path(path).read_bytes(), path)

    def to_json(self) -> str:
        """Return the spec as JSON text, one key per line."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    def write(self, path: str | Path) -> None:
        """Write image_spec.json."""
        files.write_json(path, dataclasses.asdict(self))


def read_index(path: str | Path | IO[bytes]) -> "pd.DataFrame":
    """Read index.csv.

    Returns
    -------
    index : DataFrame
        A row for each image of the dataset, in the order of paths. Columns ``path``, ``class``,
        ``split``, ``digest``, ``exclusion_reason`` are str (empty where they do not apply),
        ``array_index`` is Int64: the position in the split's arrays, missing for an image that is
        excluded.
    """
    import pandas as pd

    # No type inference: a class may be called NA or 007, or contain a carriage return.
    table = pd.read_csv(path, dtype=str, keep_default_na=False, lineterminator="\n")
    positions = pd.to_numeric(table["array_index"].replace("", None)).astype("Int64")
    return table.assign(array_index=positions)


@dataclasses.dataclass
class Split:
    """One split, whose images stay on the disk.

    Attributes
    ----------
    labels : int32 array of shape (n,)
        Positions in `ImageSpec.classes`.
    image_shape : tuple of int
        Height, width and channels; zeros in an empty split.
    files : list of (Path, int, int)
        Each file of images, its first row's number in the split, and where its pixels begin.
    """

    labels: np.ndarray
    image_shape: tuple[int, int, int]
    files: list[tuple[Path, int, int]]

    def __post_init__(self) -> None:
        self._firsts = np.array([first for _, first, _ in self.files])

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Return the images at `rows` (int array of shape (k,)), uint8 of shape (k, h, w, c)."""
        # Read, not memory-mapped: a map keeps its file open, and open files are limited.
        images = np.empty((len(rows), *self.image_shape), np.uint8)
        where = np.searchsorted(self._firsts, rows, side="right") - 1
        by_file = sorted(
            zip(where.tolist(), np.asarray(rows).tolist(), range(len(rows)), strict=True)
        )
        for number, group in itertools.groupby(by_file, key=operator.itemgetter(0)):
            path, first, begin = self.files[number]
            with open(path, "rb", buffering=0) as file:
                for _, row, place in group:
                    file.seek(begin + (row - first) * images[place].nbytes)
                    if file.readinto(images[place]) < images[place].nbytes:
                        raise UserError(f"{path}: truncated; delete it and run `dvc repro`")
        return images

    def batches(self, size: int = 128) -> Iterator[np.ndarray]:
        """Yield all images in order, at most `size` at a time."""
        for start in range(0, len(self), size):
            yield self.gather(np.arange(start, min(start + size, len(self))))


def read_split(folder: str | Path) -> Split:
    """Open one split's arrays.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, or it lacks its labels.
    """
    folder = Path(folder)
    paths = sorted(path for path in folder.iterdir() if path.name.startswith("images-"))
    return open_split(paths, np.load(folder / LABELS) if paths else None)


def open_split(paths: Iterable[Path], labels: np.ndarray | None = None) -> Split:
    """Open files of images, in the order of their rows; without labels, these are zeros."""
    found, total, image_shape = [], 0, (0, 0, 0)
    for path in paths:
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            (rows, *shape), _, _ = np.lib.format.read_array_header_1_0(file)
            image_shape = shape[0], shape[1], shape[2]
            found.append((path, total, file.tell()))
        total += rows
    labels = np.zeros(total, np.int32) if labels is None else labels
    return Split(labels, image_shape, found)


def file_bounds(prefixes: np.ndarray, row_bytes: int) -> np.ndarray:
    """Divide the rows of a split into files.

    Parameters
    ----------
    prefixes : uint32 array of shape (n,)
        The first four bytes of each row's digest, big-endian, sorted.
    row_bytes : int
        The size of an image.

    Returns
    -------
    bounds : int array of shape (number of files + 1,)
        File ``i`` holds the rows from ``bounds[i]`` to ``bounds[i + 1]``. The number of files is
        the smallest power of two with which they hold 1 MB at most on average, but no more than
        4,096; no rows, no files.
    """
    if not len(prefixes):
        return np.zeros(1, int)
    count = 1
    while count < _MAX_FILES and count * _MAX_FILE_BYTES < len(prefixes) * row_bytes:
        count *= 2
    firsts = np.arange(count + 1, dtype=np.uint64) * (2**32 // count)
    return np.searchsorted(prefixes.astype(np.uint64), firsts, side="left")


def write_split(
    folder: Path,
    digests: Iterable[bytes],
    labels: np.ndarray,
    image_shape: Sequence[int],
    images: Iterable[np.ndarray],
) -> None:
    """Write the arrays of one split to a new folder, one image at a time to save memory.

    Parameters
    ----------
    folder : path
    digests : iterable of n bytes
        Sorted.
    labels : int array of shape (n,)
    image_shape : sequence of int
    images : iterable of n uint8 arrays of shape `image_shape`
    """
    folder.mkdir()
    images = iter(images)
    prefixes = np.frombuffer(b"".join(digest[:4] for digest in digests), ">u4")
    bounds = file_bounds(prefixes, math.prod(image_shape))
    for number, count in enumerate(np.diff(bounds).tolist()):
        path = folder / f"images-{number:04d}.npy"
        write_images(path, count, image_shape, itertools.islice(images, count))
    if len(labels):
        np.save(folder / LABELS, labels.astype(np.int32))


def write_images(
    path: Path, count: int, image_shape: Sequence[int], images: Iterable[np.ndarray]
) -> None:
    """Write `count` uint8 arrays of shape `image_shape` as one `.npy` file."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *image_shape)}
    with open(path, "wb", buffering=2**20) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for image in images:
            file.write(image.tobytes())
