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
import os
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
MAX_SPEC_BYTES = 2**24  # of an image spec: what is larger is something else


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
        """Parse the JSON text of an image spec, and check each of its values.

        Raises
        ------
        UserError
            If the text is not a valid image spec; the message names `source`.
        """
        try:
            if len(text) > MAX_SPEC_BYTES:
                raise ValueError(f"larger than {MAX_SPEC_BYTES:,} bytes")
            spec = cls(**json.loads(text))
            if problem := next(_problems(spec), ""):
                raise ValueError(problem)
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(
                f"{source}: not a valid image spec ({first_line(error)}); `dvc repro` writes it"
            ) from None
        height, width, channels = spec.image_shape
        return dataclasses.replace(spec, image_shape=(height, width, channels))

    @classmethod
    def read(cls, path: str | Path) -> "ImageSpec":
        """Read image_spec.json."""
        with open(path, "rb") as file:
            return cls.from_json(file.read(MAX_SPEC_BYTES + 1), path)

    def to_json(self) -> str:
        """Return the spec as JSON text, one key per line."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    def write(self, path: str | Path) -> None:
        """Write image_spec.json."""
        files.write_json(path, dataclasses.asdict(self))


def _problems(spec: ImageSpec) -> Iterator[str]:
    """Yield what is wrong with an image spec that was read."""
    names, shape, temperature = spec.classes, spec.image_shape, spec.temperature
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not (is_list and 0 < len(names) == len({*names})):
        yield f"classes: expected a list of different names, found {names!r:.60}"
    is_shape = isinstance(shape, list) and all(type(n) is int and 0 < n <= 4096 for n in shape)
    if not (is_shape and len(shape) == 3 and shape[2] in (1, 3)):
        yield f"image_shape: expected [height, width, 1 or 3], found {shape!r:.60}"
    if spec.color_mode != ("rgb" if shape[2] == 3 else "grayscale"):
        yield f"color_mode: not that of {shape[2]} channels: {spec.color_mode!r:.60}"
    if spec.resize not in ("crop", "pad", "stretch"):
        yield f"resize: expected crop, pad or stretch, found {spec.resize!r:.60}"
    if type(temperature) not in (int, float) or not 0 < temperature < math.inf:
        yield f"temperature: expected a positive number, found {temperature!r:.60}"
    if type(spec.white_level) is not int or not 0 < spec.white_level < 2**16:
        yield f"white_level: expected 1 to 65535, found {spec.white_level!r:.60}"


def read_index(path: str | Path | IO[bytes]) -> "pd.DataFrame":
    """Read index.csv.

    Returns
    -------
    index : DataFrame
        A row for each image of the dataset, in the order of paths. Columns ``path``, ``class``,
        ``was`` (the class in the dataset, if a correction changed it), ``split``, ``digest``,
        ``exclusion_reason`` are str (empty where they do not apply), ``array_index`` is Int64: the
        position in the split's arrays, missing for an image that is excluded.
    """
    import pandas as pd

    try:
        # No type inference: a class may be called NA or 007, or contain a carriage return.
        table = pd.read_csv(path, dtype=str, keep_default_na=False, lineterminator="\n")
        positions = pd.to_numeric(table["array_index"].replace("", None)).astype("Int64")
    except (ValueError, KeyError, TypeError) as error:
        source = path if isinstance(path, str | Path) else "index.csv"
        reason = f"not a table of images ({first_line(error)})"
        raise UserError(f"{source}: {reason}; delete it and run `dvc repro`") from None
    was = table.get("was", pd.Series("", table.index))  # earlier versions knew no corrections
    return table.assign(was=was, array_index=positions)


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
                        raise _damaged(path, "truncated")
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
        If there is no such folder, or it lacks its labels or the image spec beside it.
    UserError
        If a file is damaged or of another kind, or does not fit the image spec.
    """
    folder = Path(folder)
    spec = ImageSpec.read(folder.parent / "image_spec.json")
    paths = sorted(path for path in folder.iterdir() if path.name.startswith("images-"))
    split = _open_images(paths)
    if not len(split):
        return split
    try:
        labels = np.load(folder / LABELS)
        fits = labels.dtype.kind == "i" and labels.shape == (len(split),)
    except (ValueError, EOFError):  # pickled objects, say
        fits = False
    if not fits or labels.min() < 0 or labels.max() >= len(spec.classes):
        raise _damaged(folder / LABELS, f"expected {len(split)} labels from 0 on, one per image")
    if split.image_shape != spec.image_shape:
        raise _damaged(folder, f"images of shape {split.image_shape}, not {spec.image_shape}")
    return dataclasses.replace(split, labels=labels)


def _open_images(paths: Iterable[Path]) -> Split:
    """Open files of images, in the order of their rows; the labels are zeros."""
    found, total, image_shape = [], 0, (0, 0, 0)
    for path in paths:
        with open(path, "rb") as file:
            try:
                is_ours = np.lib.format.read_magic(file) == (1, 0)
                (rows, *shape), by_column, dtype = np.lib.format.read_array_header_1_0(file)
                is_ours &= dtype == np.uint8 and not by_column and len(shape) == 3
            except ValueError:
                is_ours = False
            if not is_ours:
                raise _damaged(path, "not an array of uint8 images")
            if os.fstat(file.fileno()).st_size != file.tell() + rows * math.prod(shape):
                raise _damaged(path, "truncated")
            if total and image_shape != tuple(shape):
                raise _damaged(path, f"images of shape {tuple(shape)}, not {image_shape}")
            image_shape = shape[0], shape[1], shape[2]
            found.append((path, total, file.tell()))
        total += rows
    return Split(np.zeros(total, np.int32), image_shape, found)


def _damaged(path: Path, problem: str) -> UserError:
    return UserError(f"{path}: {problem}; delete it and run `dvc repro`")


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
