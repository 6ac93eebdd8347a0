"""Scan a dataset: hash every image, and decode those that the cache lacks.

On a cluster, its workers read the images.
"""

import dataclasses
import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from stages.data import images
from stages.data.arrays import ImageSpec
from stages.data.cache import Cache, Info
from stages.data.dataset import Dataset
from stages.data.images import THUMBNAIL_SIDE, Preprocessing
from stages.run.cli import UserError, progress
from stages.run.cluster import Cluster
from stages.run.parallel import map_unordered

NO_DIGEST = bytes(16)  # stands for a file that can't even be opened
_CHUNK_IMAGES = 256  # of a task, at most
_CHUNK_BYTES = 2**20  # of the pixels that a task returns, roughly
_PROBED_FILES = 16  # by which workers show that they see the folder of the dataset
_WRITE_BYTES = 12 * 2**20  # of pixels that are written to the cache at once, roughly

Decoded = tuple[Info, bytes]  # info and pixels; no pixels if the image can't be read


class Result(NamedTuple):
    """One image: its digest, and its decoded data or None if it was cached."""

    digest: bytes
    decoded: Decoded | None


class Content(NamedTuple):
    """One image that has to be decoded: its digest, and the content of its file."""

    digest: bytes
    data: bytes


@dataclasses.dataclass(frozen=True)
class Scan:
    """The n images of a dataset, by content.

    Attributes
    ----------
    contents : int32 array of shape (n,)
        An ID of each distinct file content, from 0 in the order of digests; -1 if unreadable.
    first : int array of shape (number of contents,)
        The position of the first image of each content.
    digests : uint8 array of shape (n, 16)
        BLAKE2b of the file.
    channels : uint8 array of shape (n,)
        1 if every pixel is grey, else 3; 0 if unreadable.
    sizes : int32 array of shape (n, 2)
        Width and height of the original, upright; zeros if unreadable.
    peaks : uint16 array of shape (n,)
        The largest value of an original of more than 8 bits per channel; otherwise 0.
    decoded : int
        How many distinct images were decoded because the cache lacked them.
    reasons : dict of int to str
        Why an image can't be read, by position.
    place : str
        Where images were read and decoded, if on a cluster; otherwise empty.
    """

    contents: np.ndarray
    first: np.ndarray
    digests: np.ndarray
    channels: np.ndarray
    sizes: np.ndarray
    peaks: np.ndarray
    decoded: int
    reasons: dict[int, str]
    place: str = ""

    def content_digests(self) -> list[bytes]:
        """Return the digest of each content."""
        return [digest.tobytes() for digest in self.digests[self.first]]


def scan(
    dataset: Dataset,
    cache: Cache,
    thumbnails: np.ndarray,
    preprocessing: Preprocessing,
    cluster: Cluster | None = None,
) -> Scan:
    """Hash all images of a dataset, decode those that the cache lacks, and add them to it.

    Parameters
    ----------
    dataset : Dataset
    cache : Cache
    thumbnails : uint8 array of shape (n, 24, 24)
        It is filled in: black for an image that can't be read.
    preprocessing : Preprocessing
    """
    n, known = len(dataset), cache.digests()
    digests, is_decoded = np.zeros((n, 16), np.uint8), np.zeros(n, bool)
    channels, peaks = np.zeros(n, np.uint8), np.zeros(n, np.uint16)
    sizes = np.zeros((n, 2), np.int32)
    reasons: dict[int, str] = {}
    pending: dict[bytes, Decoded] = {}  # to be written to the cache
    pixel_bytes = 3 * math.prod(preprocessing.image_size)
    results, place = _start(dataset, known, preprocessing, cluster)
    label = f"prepare on {cluster}" if place else "prepare"
    try:
        with progress((), total=n, unit="image", label=label) as bar:
            for start, chunk in results:
                rows = slice(start, start + len(chunk))
                infos = _infos(dataset, cache, start, chunk, preprocessing)
                joined = b"".join(image.digest for image in chunk)
                digests[rows] = np.frombuffer(joined, np.uint8).reshape(-1, 16)
                channels[rows] = [info.channels for info in infos]
                sizes[rows] = [(info.width, info.height) for info in infos]
                peaks[rows] = [info.peak for info in infos]
                joined = b"".join(info.thumbnail for info in infos)
                thumbnails[rows] = np.frombuffer(joined, np.uint8).reshape(thumbnails[rows].shape)
                is_decoded[rows] = [image.decoded is not None for image in chunk]
                reasons |= {
                    row: info.reason for row, info in enumerate(infos, start) if info.reason
                }
                pending |= {
                    image.digest: image.decoded
                    for image in chunk
                    if image.decoded and image.digest != NO_DIGEST
                }
                if len(pending) * pixel_bytes > _WRITE_BYTES:
                    cache.put(pending)
                    pending = {}
                bar.update(len(chunk))
    finally:
        cache.put(pending)
    is_decoded &= digests.any(axis=1)  # a file that can't be opened has no digest
    contents, first = number_contents(digests, channels > 0)
    decoded = len(np.unique(digests[is_decoded], axis=0))
    return Scan(contents, first, digests, channels, sizes, peaks, decoded, reasons, place)


def _start(
    dataset: Dataset, known: np.ndarray, preprocessing: Preprocessing, cluster: Cluster | None
) -> tuple[Iterator[tuple[int, list[Result]]], str]:
    """Start scanning in chunks; return their results, and on which cluster, if on one."""
    folder, size = os.path.abspath(os.fsencode(dataset.folder)), _chunk_size(preprocessing)
    count = -(-len(dataset) // size)
    if cluster is not None and not _is_seen(cluster, folder, dataset.paths):
        raise UserError(
            f"prepare: not all of {cluster} see the dataset {os.fsdecode(folder)}, or not the same"
            " files; it has to be shared under the same path"
        )
    tasks = (
        (start, folder, dataset.paths[start : start + size].tolist())
        for start in range(0, len(dataset), size)
    )
    results = map_unordered(scan_chunk, tasks, count, (known, preprocessing), cluster)
    if cluster is None:
        return results, ""
    results = _open_again(results, folder, dataset.paths, known, preprocessing)
    return results, f" on {cluster}"


def scan_chunk(
    start: int, folder: bytes, paths: Sequence[str], known: np.ndarray, preprocessing: Preprocessing
) -> tuple[int, list[Result]]:
    """Hash a few images, and decode those that are not known.

    Parameters
    ----------
    start : int
        The position of the first image; it is returned with the results.
    folder : bytes
        The folder of the dataset.
    paths : sequence of str
    known : array of dtype S16
        Sorted digests of images that need not be decoded.
    preprocessing : Preprocessing
    """
    return decode_chunk(start, (read(folder, path, known) for path in paths), preprocessing)


def decode_chunk(
    start: int, chunk: Iterable[Result | Content], preprocessing: Preprocessing
) -> tuple[int, list[Result]]:
    """Decode those of a few images that have to be decoded."""
    return start, [
        Result(image.digest, decode(image.data, preprocessing))
        if isinstance(image, Content)
        else image
        for image in chunk
    ]


def read(folder: bytes, path: str, known: np.ndarray) -> Result | Content:
    """Read and hash an image; its content is returned if it is not known."""
    try:
        data = images.read_bytes(os.path.join(folder, path.encode()))
    except images.ImageError as error:
        return Result(NO_DIGEST, _unreadable(error))
    digest = hash_bytes(data)
    place = np.searchsorted(known, digest)
    is_known = place < len(known) and known[place].ljust(16, b"\0") == digest
    return Result(digest, None) if is_known else Content(digest, data)


def _open_again(
    results: Iterator[tuple[int, list[Result]]],
    folder: bytes,
    paths: np.ndarray,
    known: np.ndarray,
    preprocessing: Preprocessing,
) -> Iterator[tuple[int, list[Result]]]:
    """Scan chunks here in which a worker could not open a file: perhaps it alone could not."""
    for start, chunk in results:
        if any(image.digest == NO_DIGEST for image in chunk):
            names = paths[start : start + len(chunk)].tolist()
            yield scan_chunk(start, folder, names, known, preprocessing)
        else:
            yield start, chunk


def identify(folder: bytes, paths: Sequence[str]) -> list[tuple[bytes, int] | None]:
    """Return digest and inode of each file, by which a copy differs; None if it can't be read."""
    found: list[tuple[bytes, int] | None] = []
    for path in paths:
        full = os.path.join(folder, path.encode())
        try:
            found.append((hash_bytes(images.read_bytes(full)), os.stat(full).st_ino))
        except (images.ImageError, OSError):
            found.append(None)
    return found


def _is_seen(cluster: Cluster, folder: bytes, paths: np.ndarray) -> bool:
    """Return whether all workers see the dataset's files, and not copies that may be outdated."""
    sample = paths[np.linspace(0, len(paths) - 1, _PROBED_FILES, dtype=int)].tolist()
    own, theirs = identify(folder, sample), cluster.run(identify, folder, sample)
    return any(own) and all(found == own for found in theirs.values())


def decode(data: bytes, preprocessing: Preprocessing) -> Decoded:
    """Decode and resize the content of an image file: info and pixels (none if unreadable)."""
    try:
        fitted, size, peak, thumbnail = images.decode(data, preprocessing)
        if thumbnail is None:
            square = preprocessing._replace(
                image_size=(THUMBNAIL_SIDE, THUMBNAIL_SIDE), resize="stretch"
            )
            thumbnail = images.decode(data, square).thumbnail
            assert thumbnail is not None
    except images.ImageError as error:
        return _unreadable(error)
    pixels = images.to_array(fitted, preprocessing.image_size)
    info = Info(pixels.shape[-1], *size, peak, "", thumbnail.tobytes())
    return info, pixels.tobytes()


def read_images(
    dataset: Dataset, scanned: Scan, rows: np.ndarray, cache: Cache, spec: ImageSpec
) -> Iterator[np.ndarray]:
    """Yield images as the network takes them, in order, from the cache.

    Images that have been evicted from the cache are decoded again.

    Parameters
    ----------
    rows : int array
        Positions of readable images.
    spec : ImageSpec
        With the size and the resize mode of the scan.

    Raises
    ------
    UserError
        If a file that has to be decoded again has changed since it was scanned.
    """
    height, width, _ = spec.image_shape
    preprocessing = Preprocessing([height, width], spec.resize, spec.white_level)
    size = _chunk_size(preprocessing)
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        names = [digest.tobytes() for digest in scanned.digests[chunk]]
        found = cache.pixels(names)
        for row, name in zip(chunk, names, strict=True):
            if name not in found:
                info, pixels = _decode_again(dataset, row, name, cache, preprocessing)
                shape = height, width, info.channels
                found[name] = np.frombuffer(pixels, np.uint8).reshape(shape)
            yield images.in_color_mode(found[name], spec.color_mode)


def hash_bytes(data: bytes) -> bytes:
    """Return the digest of a file's content (BLAKE2b, 16 bytes)."""
    return hashlib.blake2b(data, digest_size=16).digest()


def number_contents(digests: np.ndarray, is_readable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the distinct digests of readable images in their order, from 0.

    Returns
    -------
    contents : int32 array of shape (n,)
        -1 for an image that can't be read.
    first : int array of shape (number of contents,)
        The position of the first image of each.
    """
    high, low = digests.view(">u8").T
    order = np.lexsort((low, high))
    order = order[is_readable[order]]
    is_new = np.ones(len(order), bool)
    is_new[1:] = (high[order[1:]] != high[order[:-1]]) | (low[order[1:]] != low[order[:-1]])
    contents = np.full(len(digests), -1, np.int32)
    contents[order] = np.cumsum(is_new) - 1
    return contents, order[is_new]


def _infos(
    dataset: Dataset,
    cache: Cache,
    start: int,
    chunk: Sequence[Result],
    preprocessing: Preprocessing,
) -> list[Info]:
    """Return the info of a chunk's images: just decoded, or from the cache."""
    known = cache.info([image.digest for image in chunk if image.decoded is None])
    infos = []
    for row, (digest, decoded) in enumerate(chunk, start):
        if decoded is None and digest not in known:  # another run has just evicted it
            known[digest] = _decode_again(dataset, row, digest, cache, preprocessing)[0]
        infos.append(decoded[0] if decoded else known[digest])
    return infos


def _decode_again(
    dataset: Dataset, row: int, digest: bytes, cache: Cache, preprocessing: Preprocessing
) -> Decoded:
    path = dataset.paths[row]
    try:
        data = images.read_bytes(os.path.join(os.fsencode(dataset.folder), path.encode()))
    except images.ImageError:
        data = b""
    if hash_bytes(data) != digest:
        raise UserError(f"{path}: changed during prepare; run it again")
    decoded = decode(data, preprocessing)
    cache.put({digest: decoded})
    return decoded


def _chunk_size(preprocessing: Preprocessing) -> int:
    return max(1, min(_CHUNK_IMAGES, _CHUNK_BYTES // (3 * math.prod(preprocessing.image_size))))


def _unreadable(error: images.ImageError) -> Decoded:
    return Info(0, 0, 0, 0, str(error), bytes(THUMBNAIL_SIDE**2)), b""
