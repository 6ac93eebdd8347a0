"""What worker processes do: read and decode images, find near copies, write arrays."""

import dataclasses
import hashlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stages.data import arrays, duplicates, images
from stages.data.cache import Lost, Row, Store, make
from stages.data.dataset import Dataset
from stages.data.parallel import Workers
from stages.utils.cli import UserError, progress

NO_DIGEST = bytes(16)  # of a file that can't even be read
_TASK = 64  # images that a worker is given at once
_BYTES = 4 * 2**20  # of files that it answers for at once, or little more
_ROWS = 4 * 2**20  # bytes of rows that it takes from the store at once, or a single one,
_MOST_ROWS = 16  # though no more than these


def digest(data: bytes) -> bytes:
    """Return the digest of a file's content (BLAKE2b, 16 bytes)."""
    return hashlib.blake2b(data, digest_size=16).digest()


class Answer(NamedTuple):
    """What reading a few images in a row gave.

    Attributes
    ----------
    first : int
        The position of the first image.
    digests : uint8 array of shape (k, 16)
    descriptors : int8 array of shape (k, 40)
    channels : uint8 array of shape (k,)
        1 for a row of greys, 3 for colours, 0 for an image that can't be read.
    shrinks : uint16 array of shape (k,)
    decoded : bool array of shape (k,)
        The others were in the store.
    reasons : dict of int to str
        Why an image can't be read, by position.
    """

    first: int
    digests: np.ndarray
    descriptors: np.ndarray
    channels: np.ndarray
    shrinks: np.ndarray
    decoded: np.ndarray
    reasons: dict[int, str]


class Reader:
    """Reads images; decodes and stores those that the store lacks.

    Parameters
    ----------
    folder : Path
        The dataset.
    store : Path
        The store's folder.
    image_size : tuple of int
    resize : str
    """

    def __init__(self, folder: Path, store: Path, image_size: tuple[int, int], resize: str) -> None:
        self._folder = os.fsencode(folder)
        self._store = Store(store, image_size, resize)

    def __call__(self, first: int, paths: list[str]) -> Iterator[Answer]:
        """Read images, given their paths within the dataset; answer for a few at once."""
        files: list[bytes | Row] = []
        size = 0
        for path in paths:
            try:
                files.append(images.read_bytes(os.path.join(self._folder, path.encode())))
                size += len(files[-1])
            except images.ImageError as error:
                files.append(Row(None, reason=str(error)))
            if size > _BYTES:
                yield self._answer(first, files)
                first, files, size = first + len(files), [], 0
        if files:
            yield self._answer(first, files)

    def _answer(self, first: int, files: list[bytes | Row]) -> Answer:
        names = [digest(file) if isinstance(file, bytes) else NO_DIGEST for file in files]
        known = self._store.look(names)
        rows, decoded = [], np.zeros(len(files), bool)
        for i, (name, file) in enumerate(zip(names, files, strict=True)):
            if name not in known and isinstance(file, bytes):
                known[name] = make(file, *self._store.fit)
                self._store.add(name, known[name])
                decoded[i] = True
            rows.append(known.get(name, file))
        flat = np.zeros((duplicates.SIDE, duplicates.SIDE), np.uint8)
        return Answer(
            first,
            np.frombuffer(b"".join(names), np.uint8).reshape(-1, 16),
            duplicates.describe(
                np.array([flat if row.pixels is None else row.thumbnail for row in rows])
            ),
            np.array([0 if row.pixels is None else row.pixels.shape[-1] for row in rows], "u1"),
            np.array([row.shrink for row in rows], np.uint16),
            decoded,
            {first + i: row.reason for i, row in enumerate(rows) if row.pixels is None},
        )

    def close(self) -> None:
        """Write what waits."""
        self._store.flush()
        self._store.close()


def again(folder: str | bytes | Path, path: str, name: bytes, store: Store) -> Row:
    """Make a row anew that is damaged, or that the store has lost since it was read.

    Raises
    ------
    UserError
        If the file has another digest than `name` by now, or is gone.
    """
    try:
        data = images.read_bytes(os.path.join(os.fsencode(folder), path.encode()))
    except images.ImageError:
        data = b""
    if digest(data) != name:
        raise UserError(f"{path}: changed while prepare was at work; run it again")
    row = make(data, *store.fit)
    store.add(name, row)
    return row


class Finder:
    """Finds near copies among targets.

    Parameters
    ----------
    store, image_size, resize
        As for `Reader`.
    descriptors : int8 array of shape (k, 40)
        Of the targets.
    digests : uint8 array of shape (k, 16)
    """

    def __init__(
        self,
        store: Path,
        image_size: tuple[int, int],
        resize: str,
        descriptors: np.ndarray,
        digests: np.ndarray,
    ) -> None:
        self._store = Store(store, image_size, resize)
        self._targets = duplicates.Targets(descriptors)
        self._digests = digests

    def __call__(
        self, first: int, descriptors: np.ndarray, digests: np.ndarray
    ) -> Iterator[tuple[int, duplicates.Pairs]]:
        """Yield the number of the first query, and pairs: positions after it and in targets."""

        yield (
            first,
            self._targets.find(
                descriptors,
                lambda rows: self._thumbnails(digests[rows]),
                lambda rows: self._thumbnails(self._digests[rows]),
            ),
        )

    def _thumbnails(self, digests: np.ndarray) -> np.ndarray:
        names = [digest.tobytes() for digest in digests]
        rows = self._store.look(names)
        if any(name not in rows for name in names):
            raise Lost(
                "prepare: finished images were lost while it was at work (another run may have"
                " needed their place); run it again, with fewer runs at once"
            )
        pictures = [rows[name].thumbnail for name in names]
        return np.array(pictures, np.uint8).reshape(-1, duplicates.SIDE, duplicates.SIDE)

    def close(self) -> None:
        """Close the store."""
        self._store.close()


class Writer:
    """Writes files of images from the store's rows; decodes again what the store lost.

    Parameters
    ----------
    folder, store, resize
        As for `Reader`.
    image_shape : tuple of int
        Height, width and channels.
    """

    def __init__(
        self, folder: Path, store: Path, image_shape: tuple[int, int, int], resize: str
    ) -> None:
        self._folder = os.fsencode(folder)
        self._store = Store(store, image_shape[:2], resize)
        self._shape = image_shape
        self._color_mode = "rgb" if image_shape[2] == 3 else "grayscale"

    def __call__(self, file: Path, digests: bytes, paths: list[str]) -> Iterator[int]:
        """Write one file, given 16 bytes and a path for each image; yield how many were decoded."""
        self._decoded = 0
        names = [digests[i : i + 16] for i in range(0, len(digests), 16)]
        arrays.write_images(file, len(names), self._shape, self._rows(names, paths))
        yield self._decoded

    def _rows(self, names: list[bytes], paths: list[str]) -> Iterator[np.ndarray]:
        count = max(1, min(_ROWS // math.prod(self._shape), _MOST_ROWS))
        for first in range(0, len(names), count):
            few = names[first : first + count]
            known = self._store.pixels(few)
            for name, path in zip(few, paths[first : first + count], strict=True):
                if name not in known:
                    known[name] = again(self._folder, path, name, self._store).pixels
                    self._decoded += 1
                yield images.in_color_mode(known[name], self._color_mode)

    def close(self) -> None:
        """Write what waits."""
        self._store.flush()
        self._store.close()


@dataclasses.dataclass(frozen=True)
class Reading:
    """What reading a dataset of n images gave.

    Attributes
    ----------
    contents : int32 array of shape (n,)
        Equal for images of equal bytes, in the order of digests, from 0; -1 if unreadable.
    firsts : int array of shape (number of contents,)
        The position of each content's first image.
    digests : uint8 array of shape (n, 16)
    descriptors : int8 array of shape (n, 40)
    channels : uint8 array of shape (n,)
    shrinks : uint16 array of shape (n,)
    decoded : int
        How many contents were decoded.
    reasons : dict of int to str
        Why an image can't be read, by position.
    """

    contents: np.ndarray
    firsts: np.ndarray
    digests: np.ndarray
    descriptors: np.ndarray
    channels: np.ndarray
    shrinks: np.ndarray
    decoded: int
    reasons: dict[int, str]

    def names(self, contents: np.ndarray) -> Iterator[bytes]:
        """Yield the digests of contents."""
        return (self.digests[row].tobytes() for row in self.firsts[contents])

    def near_copies(
        self, pool: Workers, setup: tuple, queries: np.ndarray, targets: np.ndarray
    ) -> duplicates.Pairs:
        """Find near copies of contents among others, on all cores.

        Parameters
        ----------
        pool : Workers
        setup : tuple
            What a `Store` is made of.
        queries, targets : int arrays
            Contents.
        """

        def looks(contents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            rows = self.firsts[contents]
            return self.descriptors[rows], self.digests[rows]

        firsts = range(0, len(queries) if len(targets) else 0, duplicates.BLOCK)
        tasks = ((first, *looks(queries[first : first + duplicates.BLOCK])) for first in firsts)
        answers = pool.run(Finder, (*setup, *looks(targets)), tasks)
        found = {
            first: (queries[first + pairs.queries], targets[pairs.copies], pairs.distances)
            for first, pairs in progress(answers, total=len(firsts), unit="block", label="copies")
        }
        parts = [found[first] for first in firsts]
        parts.append((np.empty(0, int), np.empty(0, int), np.empty(0)))
        return duplicates.Pairs(*map(np.concatenate, zip(*parts, strict=True)))


def read(
    found: Dataset, pool: Workers, store: Path, image_size: tuple[int, int], resize: str
) -> Reading:
    """Read all images of a dataset; decode those that the store lacks."""
    n = len(found)
    digests = np.zeros((n, 16), np.uint8)
    descriptors = np.zeros((n, duplicates.LENGTH), np.int8)
    channels, shrinks, decoded = np.zeros(n, np.uint8), np.zeros(n, np.uint16), np.zeros(n, bool)
    reasons: dict[int, str] = {}
    tasks = ((first, found.paths[first : first + _TASK]) for first in range(0, n, _TASK))
    answers = pool.run(Reader, (found.folder, store, image_size, resize), tasks)
    with progress((), total=n, unit="image", label="prepare") as bar:
        for answer in answers:
            rows = slice(answer.first, answer.first + len(answer.digests))
            digests[rows], descriptors[rows] = answer.digests, answer.descriptors
            channels[rows], shrinks[rows] = answer.channels, answer.shrinks
            decoded[rows] = answer.decoded
            reasons |= answer.reasons
            bar.update(len(answer.digests))
    high, low = digests.view(">u8").T
    order = np.lexsort((low, high))
    new = np.ones(n, bool)
    new[1:] = (high[order[1:]] != high[order[:-1]]) | (low[order[1:]] != low[order[:-1]])
    number = np.cumsum(new) - 1
    counted = np.zeros(number[-1] + 1, bool)
    counted[number[decoded[order]]] = True
    # Contents are numbered anew without those that can't be read.
    good = channels[order] > 0
    contents = np.full(n, -1, np.int32)
    contents[order[good]] = np.cumsum(new[good]) - 1
    firsts = order[good & new]
    return Reading(
        contents,
        firsts,
        digests,
        descriptors,
        channels,
        shrinks,
        int(counted.sum()),
        reasons,
    )
