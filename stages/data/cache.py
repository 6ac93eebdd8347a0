"""The row store: finished images, so that each is decoded once.

A row is found by the digest of its file and by all that shaped it: image size, resize, reader and
version of Pillow. The store is one SQLite file (and its log) in the scratch folder: bounded, safe
to delete, safe for several processes and runs at once. A row is trusted only if its checksum is
right.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import sqlite3
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL

from stages.data import duplicates, images
from stages.utils import files
from stages.utils.cli import UserError

BOUND = 10 * 2**30  # bytes of rows that are kept between runs
_PATIENCE = 600  # seconds to wait for another run's write
_FLUSH_SECONDS, _FLUSH_BYTES = 1.0, 4 * 2**20
_NAME = "rows.sqlite"
_LOOKS = duplicates.SIDE**2 + 2 + 4  # thumbnail, shrink, their checksum
_SIZES = ("page_count", "freelist_count", "page_size")
_FULL = {13, 778, 1546, 4874}  # SQLite's codes: full; a write, a truncation, the log's index failed
_ELSEWHERE = {5, 6, 8, 14}  # busy, locked, read-only, can't open
_TABLES = """
CREATE TABLE IF NOT EXISTS rows
    (id INTEGER PRIMARY KEY, looks BLOB, channels INTEGER, checksum BLOB, data BLOB);
CREATE TABLE IF NOT EXISTS keys
    (key BLOB PRIMARY KEY, id INTEGER, used INTEGER) WITHOUT ROWID;
"""


class Damaged(Exception):
    """The file is no store, or part of it is broken."""


class Lost(UserError):
    """Rows, or the file, are gone that were there a moment ago."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One finished image.

    Attributes
    ----------
    pixels : uint8 array of shape (height, width, 1 or 3), or None
        One channel if every pixel is grey. None for an image that can't be read.
    thumbnail : uint8 array of shape (24, 24), or None
    shrink : int
        How many times the short side of the file's picture is that of the row, rounded down.
    reason : str
        Why an image can't be read; empty if it can.
    """

    pixels: np.ndarray | None
    thumbnail: np.ndarray | None = None
    shrink: int = 0
    reason: str = ""


def make(data: bytes, image_size: tuple[int, int], resize: str) -> Row:
    """Make the row of an image file's content."""
    try:
        fitted, size = images.decode(data, image_size, resize)
    except images.ImageError as error:
        return Row(None, reason=str(error))
    shrink = min(*size, 65535) // min(image_size)
    return Row(images.as_row(fitted, image_size), duplicates.thumbnail(fitted), shrink)


class Store:
    """Rows of one image size and way to resize.

    Parameters
    ----------
    folder : path
    image_size : tuple of int
    resize : str
    """

    def __init__(self, folder: str | Path, image_size: tuple[int, int], resize: str) -> None:
        self.fit = tuple(image_size), resize
        shaped = [*image_size, resize, images.READER, PIL.__version__]
        self._variant = hashlib.blake2b(json.dumps(shaped).encode(), digest_size=8).digest()
        self._waiting: dict[bytes, Row] = {}
        self._bytes, self._flushed = 0, time.monotonic()
        with _watched():
            path = Path(folder) / _NAME
            path.parent.mkdir(parents=True, exist_ok=True)  # it may be deleted at any time
            self._database = sqlite3.connect(path, timeout=_PATIENCE, isolation_level=None)
            with files.exclusive(
                folder
            ):  # SQLite does not wait for another one that makes the file
                self._database.execute("PRAGMA page_size = 16384")  # large rows: half its time
                self._database.execute("PRAGMA auto_vacuum = INCREMENTAL")
                self._database.execute("PRAGMA journal_mode = WAL")
                self._database.executescript(_TABLES)
            self._database.execute("PRAGMA wal_autocheckpoint = 250")
            self._database.execute("PRAGMA synchronous = OFF")  # rows have checksums

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; rows that wait are not written."""
        self._database.close()

    def look(self, digests: Sequence[bytes]) -> dict[bytes, Row]:
        """Find rows, their pixels left out (an empty array with their channels)."""
        rows = {name: self._waiting[name] for name in digests if name in self._waiting}
        missing = [name for name in digests if name not in rows]
        for name, looks, channels in self._select("looks, channels", missing):
            row = _seen(name, looks, channels) if channels else self._full([name]).get(name)
            if row is not None:
                rows[name] = row
        return rows

    def pixels(self, digests: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        """Find the pixels of a few rows at once; those that are not there or damaged are missing.

        For many calls in a row, and none that writes between: one lock serves them all.
        """
        with _watched():
            if not self._database.in_transaction:
                self._database.execute("BEGIN")  # not in `look`: SQLite's log could never end
        rows = self._full(digests)
        return {name: row.pixels for name, row in rows.items() if row.pixels is not None}

    def _full(self, digests: Sequence[bytes]) -> dict[bytes, Row]:
        rows = {name: self._waiting[name] for name in digests if name in self._waiting}
        missing = [name for name in digests if name not in rows]
        for name, channels, checksum, data in self._select("channels, checksum, data", missing):
            if not isinstance(data, bytes) or _checksum(name, channels, data) != checksum:
                continue
            if channels:
                pixels = np.frombuffer(data, np.uint8).reshape(*self.fit[0], channels)
                rows[name] = Row(pixels)
            else:
                rows[name] = Row(None, reason=data.decode())
        return rows

    def _select(self, columns: str, digests: Sequence[bytes]) -> Iterator[tuple]:
        """Yield the digest and columns of each row that is there."""
        keys = [name + self._variant for name in digests]
        with _watched():
            found = self._database.execute(
                f"SELECT key, {columns} FROM keys JOIN rows USING (id)"
                f" WHERE key IN ({','.join('?' * len(keys))})",
                keys,
            ).fetchall()
        return ((key[: -len(self._variant)], *rest) for key, *rest in found)

    def add(self, digest: bytes, row: Row) -> None:
        """Keep a row: it is written within about a second of work, or by `flush`."""
        self._waiting[digest] = row
        self._bytes += 0 if row.pixels is None else row.pixels.nbytes
        if time.monotonic() - self._flushed > _FLUSH_SECONDS or self._bytes > _FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the rows that wait."""
        if self._waiting:
            digests = sorted(self._waiting)  # neighbours in the index are written together
            rows = [_columns(digest, self._waiting[digest]) for digest in digests]
            with self._transaction() as database:
                (run,) = database.execute("PRAGMA user_version").fetchone()
                (last,) = database.execute("SELECT IFNULL(MAX(id), 0) FROM rows").fetchone()
                database.executemany(
                    "INSERT INTO rows VALUES (?, ?, ?, ?, ?)",
                    ((last + i, *row) for i, row in enumerate(rows, 1)),
                )
                database.executemany(
                    "INSERT OR REPLACE INTO keys VALUES (?, ?, ?)",
                    ((name + self._variant, last + i, run) for i, name in enumerate(digests, 1)),
                )
        self._waiting.clear()
        self._bytes, self._flushed = 0, time.monotonic()

    def begin(self) -> None:
        """Count a run: what it uses is evicted later than what earlier runs used."""
        with self._transaction() as database:
            (run,) = database.execute("PRAGMA user_version").fetchone()
            database.execute(f"PRAGMA user_version = {run + 1}")

    def evict(self, used: Iterable[bytes], bound: int = BOUND) -> None:
        """Delete the rows that were not used for the longest time, until the rest fits.

        Parameters
        ----------
        used : iterable of bytes
            Digests of the rows that this run used. They are noted from where the store is half
            full: nothing is evicted before, and what runs use from then on tells enough.
        bound : int
            Bytes.
        """
        with self._transaction() as database:
            sizes = [database.execute(f"PRAGMA {name}").fetchone()[0] for name in _SIZES]
            excess = (sizes[0] - sizes[1]) * sizes[2] - bound
            if excess > -bound / 2:
                (run,) = database.execute("PRAGMA user_version").fetchone()
                database.executemany(
                    "UPDATE keys SET used = ? WHERE key = ? AND used < ?",
                    ((run, digest + self._variant, run) for digest in used),
                )
            gone = []
            if excess > 0:  # rows that were written anew, since they were damaged or two runs met
                database.execute("DELETE FROM rows WHERE id NOT IN (SELECT id FROM keys)")
                # Rows fill pages, some of them badly: what all take is shared out by length.
                (lengths,) = database.execute("SELECT SUM(LENGTH(data)) FROM rows").fetchone()
                excess *= (lengths or 0) / (excess + bound)
            oldest = "SELECT key, id, LENGTH(data) FROM keys JOIN rows USING (id) ORDER BY used, id"
            for key, number, length in database.execute(oldest) if excess > 0 else ():
                gone.append((key, number))
                excess -= length
                if excess <= 0:
                    break
            database.executemany("DELETE FROM keys WHERE key = ?", ((key,) for key, _ in gone))
            database.executemany("DELETE FROM rows WHERE id = ?", ((number,) for _, number in gone))
        with _watched():
            # As a script, since `execute` would take a single step and free a single page.
            self._database.executescript("PRAGMA incremental_vacuum")
            # The log ends now, unless another run reads it: that one ends it.
            self._database.execute("PRAGMA busy_timeout = 0")
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            self._database.execute(f"PRAGMA busy_timeout = {1000 * _PATIENCE}")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with _watched():
            if self._database.in_transaction:
                self._database.execute("COMMIT")
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")


def clear(folder: str | Path) -> None:
    """Remove a store, damaged or not."""
    with files.exclusive(folder):
        for suffix in ("", "-wal", "-shm"):
            (Path(folder) / (_NAME + suffix)).unlink(missing_ok=True)


def _columns(digest: bytes, row: Row) -> tuple[bytes, int, bytes, bytes]:
    """Return the columns looks, channels, checksum and data."""
    if row.pixels is None:
        data = row.reason.encode()
        return b"", 0, _checksum(digest, 0, data), data
    channels, data = row.pixels.shape[-1], row.pixels.tobytes()
    looks = row.thumbnail.tobytes() + row.shrink.to_bytes(2, "big")
    looks += _checksum(digest, channels, looks)
    return looks, channels, _checksum(digest, channels, data), data


def _seen(digest: bytes, looks: bytes, channels: int) -> Row | None:
    """Return a row without its pixels, or None if this is damaged."""
    if not isinstance(looks, bytes) or len(looks) != _LOOKS:
        return None
    if looks[-4:] != _checksum(digest, channels, looks[:-4]):
        return None
    thumbnail = np.frombuffer(looks, np.uint8, duplicates.SIDE**2).reshape(duplicates.SIDE, -1)
    shrink = int.from_bytes(looks[-6:-4], "big")
    return Row(np.empty((0, 0, channels), np.uint8), thumbnail, shrink)


def _checksum(digest: bytes, channels: int, data: bytes) -> bytes:
    named = digest + str(channels).encode()  # of a damaged row, anything
    return zlib.crc32(data, zlib.crc32(named)).to_bytes(4, "big")


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """Tell a full disk, a damaged file and one that can't be used from each other."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode in _FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
        if error.sqlite_errorcode & 255 in _ELSEWHERE:
            raise Lost(
                f"{_NAME}: the store of finished images can't be used: {error}; is its folder,"
                " .dvc/tmp/scratch, there, and may it be written to?"
            ) from None
        raise Damaged(str(error)) from None
