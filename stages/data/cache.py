"""The cache of decoded images, by content, in SQLite.

The key is the digest of the file plus all that affects its pixels: the preprocessing, the versions
of the reader and of the libraries that decode. The cache is one SQLite file in the scratch folder:
bounded, safe to delete at any time, safe for concurrent runs. Only the prepare stage writes to it.
A corrupt cache file is deleted and refilled as images are decoded again.

SQLite keeps a rollback journal: the other kind, WAL, needs memory that processes share, which
network file systems don't offer. Where files can't be locked at all, two runs could mix up their
images, so each has a temporary database of its own.
"""

import contextlib
import errno
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import PIL
import pillow_heif

from stages.data import images
from stages.data.images import Preprocessing
from stages.run import files
from stages.run.cli import UserError

MAX_BYTES = 10 * 2**30
_FILE_NAME = "images.sqlite"
_FORMAT = 4  # of the blobs: to be raised whenever it changes
_END = b"\1"  # ends each blob: of a truncated file, SQLite reads zeros, and this is missing
_BUSY_SECONDS = 600  # to wait for another run's write
_FULL = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR_WRITE,
    sqlite3.SQLITE_IOERR_TRUNCATE,
    sqlite3.SQLITE_IOERR_SHMSIZE,
)
_BROKEN = (
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_ERROR,  # a table is missing
    sqlite3.SQLITE_CONSTRAINT,  # an index and its table differ
)
_UNUSABLE = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)
_SCHEMA = """
PRAGMA page_size = 16384;
PRAGMA auto_vacuum = INCREMENTAL;
PRAGMA journal_mode = DELETE;
CREATE TABLE IF NOT EXISTS images (id INTEGER PRIMARY KEY,
    channels INTEGER, width INTEGER, height INTEGER, peak INTEGER, notes INTEGER, reason TEXT,
    thumbnail BLOB, pixels BLOB);
CREATE TABLE IF NOT EXISTS keys (key BLOB PRIMARY KEY, id INTEGER, last_used INTEGER) WITHOUT ROWID;
"""


class Info(NamedTuple):
    """The metadata of a cached image.

    Attributes
    ----------
    channels : int
        1 if every pixel is gray, else 3; 0 if the image can't be read.
    width, height : int
        Of the original, upright; 0 if it can't be read.
    peak : int
        The largest value of an original of more than 8 bits per channel; otherwise 0.
    notes : int
        As `images.Note`.
    reason : str
        Why the image can't be read; empty if it can.
    thumbnail : bytes
        Of 24 x 24 gray pixels.
    """

    channels: int
    width: int
    height: int
    peak: int
    notes: int
    reason: str
    thumbnail: bytes


class Cache:
    """Decoded images of one preprocessing.

    Parameters
    ----------
    folder : path
        It is created if need be.
    preprocessing : Preprocessing
    """

    def __init__(self, folder: str | Path, preprocessing: Preprocessing) -> None:
        self._image_size = tuple(preprocessing.image_size)
        versions = images.READER_VERSION, PIL.__version__, pillow_heif.__version__, _FORMAT
        shaped_by = [*preprocessing, *versions]
        self._variant = hashlib.blake2b(json.dumps(shaped_by).encode(), digest_size=8).digest()
        self._path = Path(folder) / _FILE_NAME
        try:
            self._connect()
        except sqlite3.DatabaseError as error:
            self._recover(error)

    def __enter__(self) -> "Cache":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._database.close()

    def digests(self) -> np.ndarray:
        """Return the digests of all images that are cached, sorted; array of dtype S16."""
        query = "SELECT SUBSTR(key, 1, 16) FROM keys WHERE SUBSTR(key, 17) = ? ORDER BY key"
        return np.array([digest for (digest,) in self._select(query, [self._variant])], "S16")

    def info(self, digests: Sequence[bytes]) -> dict[bytes, Info]:
        """Look up images, without their pixels; those that are not cached are left out."""
        rows = self._lookup("channels, width, height, peak, notes, reason, thumbnail", digests)
        return {digest: Info(*info) for digest, *info in rows}

    def pixels(self, digests: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        """Look up pixels: uint8 arrays of shape (height, width, channels), channels 1 or 3."""
        return {
            digest: np.frombuffer(pixels, np.uint8).reshape(*self._image_size, channels)
            for digest, channels, pixels in self._lookup("channels, pixels", digests)
        }

    def put(self, decoded: Mapping[bytes, tuple[Info, bytes]]) -> None:
        """Add images, info and pixels, by their digests: many at once, since each call writes."""
        digests = sorted(decoded)  # neighbors in the index are written together
        with self._errors(), self._database as database:
            database.execute("BEGIN IMMEDIATE")
            (run,) = database.execute("PRAGMA user_version").fetchone()
            (last,) = database.execute("SELECT IFNULL(MAX(id), 0) FROM images").fetchone()
            database.executemany(
                "INSERT INTO images VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    (id_, *info[:-1], info.thumbnail + _END, pixels + _END)
                    for id_, (info, pixels) in enumerate(
                        map(decoded.__getitem__, digests), last + 1
                    )
                ),
            )
            database.executemany(
                "INSERT OR REPLACE INTO keys VALUES (?, ?, ?)",
                (
                    (digest + self._variant, id_, run)
                    for id_, digest in enumerate(digests, last + 1)
                ),
            )

    def evict(self, used: Iterable[bytes], max_bytes: int = MAX_BYTES) -> None:
        """Delete the least recently used images until the rest fits, at the end of a run.

        Parameters
        ----------
        used : iterable of bytes
            The digests of the images that this run used. They are recorded only in a cache that is
            more than half full, since nothing is deleted before.
        max_bytes : int, default=10 GiB
        """
        with self._errors(), self._database as database:
            database.execute("BEGIN IMMEDIATE")
            (run,) = database.execute("PRAGMA user_version").fetchone()
            database.execute(f"PRAGMA user_version = {run + 1}")
            pages, free, page_size = (
                database.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("page_count", "freelist_count", "page_size")
            )
            size = (pages - free) * page_size
            if size > max_bytes / 2:
                database.executemany(
                    "UPDATE keys SET last_used = ? WHERE key = ?",
                    ((run, digest + self._variant) for digest in used),
                )
            if size > max_bytes:
                _delete_oldest(database, (size - max_bytes) / size)
        with self._errors():
            # As a script, since `execute` would free a single page.
            self._database.executescript("PRAGMA incremental_vacuum")

    def _connect(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with files.exclusive(self._path.parent) as locked:  # SQLite would not wait for its creation
            path = self._path if locked else ""  # a temporary database
            self._database = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
            self._database.executescript(_SCHEMA)

    def _lookup(self, columns: str, digests: Sequence[bytes]) -> Iterator[tuple[Any, ...]]:
        keys = [digest + self._variant for digest in digests]
        query = f"SELECT key, {columns} FROM keys JOIN images USING (id) WHERE key IN "
        rows = self._select(f"{query} ({','.join('?' * len(keys))})", keys)
        for key, *values, blob in rows:
            if blob and blob.endswith(_END):
                yield key[: -len(self._variant)], *values, blob[: -len(_END)]

    def _select(self, query: str, values: Sequence[bytes]) -> list[tuple[Any, ...]]:
        with self._errors():
            return self._database.execute(query, values).fetchall()
        return []

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Replace a broken file by an empty one, and report what else is wrong with it."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            self._recover(error)

    def _recover(self, error: sqlite3.DatabaseError) -> None:
        if error.sqlite_errorcode in _FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
        is_moved = error.sqlite_errorcode == sqlite3.SQLITE_READONLY_DBMOVED  # deleted meanwhile
        if error.sqlite_errorcode & 255 in _UNUSABLE and not is_moved:
            raise UserError(
                f"{self._path}: can't open the cache of decoded images ({error}); check that its"
                " folder exists and is writable, or delete the folder"
            ) from None
        if error.sqlite_errorcode & 255 not in _BROKEN and not is_moved:
            raise error
        self._database.close()
        for suffix in ("", "-journal", "-wal", "-shm"):
            self._path.with_name(_FILE_NAME + suffix).unlink(missing_ok=True)
        self._connect()


def _delete_oldest(database: sqlite3.Connection, share: float) -> None:
    """Delete the least recently used images, up to a share of all bytes."""
    # Delete rows without a key: images that two runs added, or that were added again.
    database.execute("DELETE FROM images WHERE id NOT IN (SELECT id FROM keys)")
    (total,) = database.execute("SELECT IFNULL(SUM(LENGTH(pixels)), 0) FROM images").fetchone()
    oldest = (
        "SELECT key, id, LENGTH(pixels) FROM keys JOIN images USING (id) ORDER BY last_used, id"
    )
    deleted, excess = [], share * total
    for key, number, length in database.execute(oldest):
        if excess <= 0:
            break
        deleted.append((key, number))
        excess -= length
    database.executemany("DELETE FROM keys WHERE key = ?", ((key,) for key, _ in deleted))
    database.executemany("DELETE FROM images WHERE id = ?", ((number,) for _, number in deleted))
