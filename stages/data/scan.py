"""Scan a dataset: hash every image, and decode those that the cache lacks.

Worker processes, here or on a cluster, read the images themselves: they import this module, so it
needs no pandas.
"""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from stages.data import images as reader
from stages.data.arrays import ImageSpec
from stages.data.cache import Cache, Info
from stages.data.images import THUMBNAIL_SIDE, Preprocessing, hash_bytes
from stages.run.cli import UserError, progress
from stages.run.parallel import map_unordered

if TYPE_CHECKING:
    import pandas as pd

    from stages.run.cluster import Cluster

NO_DIGEST = bytes(16)  # stands for a file that can't even be opened
_CHUNK_IMAGES = 256  # of a task, at most
_CHUNK_BYTES = 2**20  # of the pixels that a task returns, roughly
_PROBED_FILES = 16  # by which workers show that they see the folder of the dataset
_WRITE_BYTES = 12 * 2**20  # of pixels that are written to the cache at once, roughly

Decoded = tuple[Info, bytes]  # info and pixels; no pixels if the image can't be read


class Scanned(NamedTuple):
    """One image: its digest, and what was decoded, or None if the cache has it."""

    digest: bytes
    decoded: Decoded | None


def scan(
    images: "pd.DataFrame",
    folder: Path,
    cache: Cache,
    preprocessing: Preprocessing,
    thumbnail_file: Path,
    cluster: "Cluster | None" = None,
) -> tuple["pd.DataFrame", np.ndarray]:
    """Hash all images of a dataset, decode those that the cache lacks, and add them to it.

    Parameters
    ----------
    images : DataFrame
        With the column ``path``.
    folder : Path
        The dataset.
    cache : Cache
    preprocessing : Preprocessing
    thumbnail_file : Path
        The file to write the thumbnails to.
    cluster : Cluster, optional
        Its workers scan; they see the dataset under the same path.

    Returns
    -------
    images : DataFrame
        With more columns: ``digest`` (bytes: BLAKE2b of the file; `NO_DIGEST` if it can't be
        opened), ``content`` (int32: an ID of each distinct digest, from 0 in their order; -1 if the
        image can't be read), ``unreadable`` (why it can't be read; empty if it can), ``channels``
        (1 if every pixel is gray, else 3; 0 if unreadable), ``width`` and ``height`` (of the
        original, upright), ``peak`` (the largest value of an original of more than 8 bits per
        channel; otherwise 0), ``notes`` (uint8, as `images.Note`), ``is_decoded`` (the cache lacked
        it).
    thumbnails : uint8 array of shape (n, 24, 24)
        A memory map; black for an image that can't be read.

    Raises
    ------
    UserError
        If a worker of the cluster does not see the dataset as this machine does.
    """
    n, known = len(images), cache.digests()
    paths, root = images["path"].to_numpy(), os.path.abspath(os.fsencode(folder))
    _check_seen(paths, root, cluster)
    digests, unreadable = np.empty(n, object), np.full(n, "", object)
    channels, peaks, notes = np.zeros(n, np.uint8), np.zeros(n, np.uint16), np.zeros(n, np.uint8)
    sizes, is_decoded = np.zeros((n, 2), np.int32), np.zeros(n, bool)
    pending: dict[bytes, Decoded] = {}  # to be written to the cache
    size, pixel_bytes = _chunk_size(preprocessing), 3 * math.prod(preprocessing.image_size)
    starts = range(0, n, size)
    tasks = ((start, root, paths[start : start + size].tolist()) for start in starts)
    results = map_unordered(scan_chunk, tasks, len(starts), (known, preprocessing), cluster)
    label = f"prepare on {cluster}" if cluster else "prepare"
    try:
        with (
            open(thumbnail_file, "wb") as file,
            progress((), total=n, unit="image", label=label) as bar,
        ):
            shape = n, THUMBNAIL_SIDE, THUMBNAIL_SIDE
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            begin = file.tell()
            for start, chunk in results:
                if cluster and any(image.digest == NO_DIGEST for image in chunk):
                    # Perhaps only the worker could not open a file.
                    names = paths[start : start + size].tolist()
                    start, chunk = scan_chunk(start, root, names, known, preprocessing)
                rows = slice(start, start + len(chunk))
                infos = _infos(chunk, paths[rows], root, cache, preprocessing)
                for row, image in enumerate(chunk, start):
                    digests[row] = image.digest
                channels[rows] = [info.channels for info in infos]
                sizes[rows] = [(info.width, info.height) for info in infos]
                peaks[rows] = [info.peak for info in infos]
                notes[rows] = [info.notes for info in infos]
                unreadable[rows] = [info.reason for info in infos]
                # A file that can't be opened has no digest, and is never cached.
                new = [image.decoded and image.digest != NO_DIGEST for image in chunk]
                is_decoded[rows] = new
                pending |= {
                    image.digest: image.decoded
                    for image, is_new in zip(chunk, new, strict=True)
                    if is_new and image.decoded
                }
                file.seek(begin + start * THUMBNAIL_SIDE**2)
                file.write(b"".join(info.thumbnail for info in infos))
                if len(pending) * pixel_bytes > _WRITE_BYTES:
                    cache.put(pending)
                    pending = {}
                bar.update(len(chunk))
    finally:
        cache.put(pending)
    scanned = images.assign(
        digest=digests,
        content=number_contents(digests, channels > 0),
        unreadable=unreadable,
        channels=channels,
        width=sizes[:, 0],
        height=sizes[:, 1],
        peak=peaks,
        notes=notes,
        is_decoded=is_decoded,
    )
    return scanned, np.load(thumbnail_file, mmap_mode="r")


def scan_chunk(
    start: int, root: bytes, paths: Sequence[str], known: np.ndarray, preprocessing: Preprocessing
) -> tuple[int, list[Scanned]]:
    """Hash a few images, and decode those that are not known.

    Parameters
    ----------
    start : int
        The position of the first image; it is returned with the results.
    root : bytes
        The folder of the dataset.
    paths : sequence of str
    known : array of dtype S16
        Sorted digests of images that need not be decoded.
    preprocessing : Preprocessing
    """
    return start, [_scan_one(root, path, known, preprocessing) for path in paths]


def _scan_one(root: bytes, path: str, known: np.ndarray, preprocessing: Preprocessing) -> Scanned:
    try:
        data = reader.read_bytes(os.path.join(root, path.encode()))
    except reader.ImageError as error:
        return Scanned(NO_DIGEST, _unreadable(error))
    digest = hash_bytes(data)
    position = np.searchsorted(known, digest)
    if position < len(known) and known[position].ljust(16, b"\0") == digest:
        return Scanned(digest, None)
    return Scanned(digest, decode_for_cache(data, preprocessing))


def decode_for_cache(data: bytes, preprocessing: Preprocessing) -> Decoded:
    """Decode and resize the content of an image file: info and pixels (none if unreadable)."""
    try:
        decoded = reader.decode(data, preprocessing, with_thumbnail=True)
    except reader.ImageError as error:
        return _unreadable(error)
    fitted, size, peak, thumbnail, notes = decoded
    pixels = reader.to_array(fitted, preprocessing.image_size)
    info = Info(pixels.shape[-1], *size, peak, int(notes), "", thumbnail)
    return info, pixels.tobytes()


def _unreadable(error: reader.ImageError) -> Decoded:
    return Info(0, 0, 0, 0, 0, str(error), bytes(THUMBNAIL_SIDE**2)), b""


def number_contents(digests: np.ndarray, is_readable: np.ndarray) -> np.ndarray:
    """Number the distinct digests of readable images in their order, from 0; the others are -1."""
    joined = np.frombuffer(b"".join(digests.tolist()), ">u8").reshape(-1, 2)
    high, low = joined.T
    order = np.lexsort((low, high))
    order = order[is_readable[order]]
    is_new = np.ones(len(order), bool)
    is_new[1:] = (high[order[1:]] != high[order[:-1]]) | (low[order[1:]] != low[order[:-1]])
    contents = np.full(len(digests), -1, np.int32)
    contents[order] = np.cumsum(is_new) - 1
    return contents


def read_images(
    images: "pd.DataFrame", folder: Path, cache: Cache, spec: ImageSpec
) -> Iterator[np.ndarray]:
    """Yield the images of a table as the network takes them, in order, from the cache.

    Images that have been evicted from the cache are decoded again.

    Parameters
    ----------
    images : DataFrame
        Readable images: ``path`` and ``digest``.
    folder : Path
        The dataset.
    cache : Cache
    spec : ImageSpec
        With the size and the resize mode of the scan.

    Raises
    ------
    UserError
        If a file that has to be decoded again has changed since it was scanned.
    """
    height, width, _ = spec.image_shape
    preprocessing = Preprocessing([height, width], spec.resize, spec.white_level)
    root, size = os.fsencode(folder), _chunk_size(preprocessing)
    for start in range(0, len(images), size):
        chunk = images.iloc[start : start + size]
        digests = chunk["digest"].tolist()
        found = cache.pixels(digests)
        for path, digest in zip(chunk["path"].tolist(), digests, strict=True):
            if digest not in found:
                info, pixels = _decode_again(root, path, digest, cache, preprocessing)
                shape = height, width, info.channels
                found[digest] = np.frombuffer(pixels, np.uint8).reshape(shape)
            yield reader.in_color_mode(found[digest], spec.color_mode)


def _infos(
    chunk: Sequence[Scanned],
    paths: np.ndarray,
    root: bytes,
    cache: Cache,
    preprocessing: Preprocessing,
) -> list[Info]:
    """Return the info of a chunk's images: just decoded, or from the cache."""
    known = cache.info([image.digest for image in chunk if image.decoded is None])
    infos = []
    for path, (digest, decoded) in zip(paths, chunk, strict=True):
        if decoded is None and digest not in known:  # another run has just evicted it
            known[digest] = _decode_again(root, path, digest, cache, preprocessing)[0]
        infos.append(decoded[0] if decoded else known[digest])
    return infos


def _decode_again(
    root: bytes, path: str, digest: bytes, cache: Cache, preprocessing: Preprocessing
) -> Decoded:
    try:
        data = reader.read_bytes(os.path.join(root, path.encode()))
    except reader.ImageError:
        data = b""
    if hash_bytes(data) != digest:
        raise UserError(f"{path}: changed during prepare; run it again")
    decoded = decode_for_cache(data, preprocessing)
    cache.put({digest: decoded})
    return decoded


def identify(root: bytes, paths: Sequence[str]) -> list[tuple[bytes, int] | None]:
    """Return digest and inode of each file, by which a copy differs; None if it can't be read."""
    found: list[tuple[bytes, int] | None] = []
    for path in paths:
        file = os.path.join(root, path.encode())
        try:
            found.append((hash_bytes(reader.read_bytes(file)), os.stat(file).st_ino))
        except (reader.ImageError, OSError):
            found.append(None)
    return found


def _check_seen(paths: np.ndarray, root: bytes, cluster: "Cluster | None") -> None:
    """Raise a UserError if a worker does not see the dataset, or sees a copy of it."""
    if cluster is None:
        return
    sample = paths[np.linspace(0, len(paths) - 1, _PROBED_FILES, dtype=int)].tolist()
    own = identify(root, sample)
    answers = cluster.run(identify, root, sample)
    blind = [worker for worker, found in answers.items() if found != own]
    if blind:
        raise UserError(
            f"prepare: {', '.join(sorted(blind))} of {cluster}: can't see the images in"
            f" {os.fsdecode(root)}; put the dataset on a drive that all workers and this machine"
            " share, under the same path, or unset DASK_SCHEDULER_ADDRESS"
        )


def _chunk_size(preprocessing: Preprocessing) -> int:
    return max(1, min(_CHUNK_IMAGES, _CHUNK_BYTES // (3 * math.prod(preprocessing.image_size))))
