"""The cache of decoded images: what goes in comes out, and a broken file is replaced."""

import errno
import io
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.data.cache import Cache, Info
from stages.data.images import Preprocessing, hash_bytes
from stages.data.scan import decode_for_cache
from stages.run.cli import UserError

SIZE = (8, 6)
CROP = Preprocessing(SIZE, "crop")
FILE = "images.sqlite"


def picture(seed: int, channels: int = 3) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 20, channels), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(file, "PNG")
    return file.getvalue()


def fill(folder: Path, count: int, size=SIZE) -> list[bytes]:
    """Add so many pictures, as one run does; return their digests."""
    pictures = {hash_bytes(data): data for data in map(picture, range(count))}
    with Cache(folder, Preprocessing(size, "crop")) as cache:
        cache.put(
            {name: decode_for_cache(d, Preprocessing(size, "crop")) for name, d in pictures.items()}
        )
    return list(pictures)


@pytest.mark.parametrize("data", [picture(0), picture(0, 1), b"no image"])
def test_what_goes_in_comes_out(tmp_path, data):
    digest = hash_bytes(data)
    info, pixels = decode_for_cache(data, CROP)
    with Cache(tmp_path, CROP) as cache:
        assert not cache.info([digest]) and not len(cache.digests())
        cache.put({digest: (info, pixels)})
    with Cache(tmp_path, CROP) as cache:
        assert cache.info([digest, bytes(16)]) == {digest: info}
        if pixels:
            found = cache.pixels([digest])[digest]
            assert found.shape == (*SIZE, info.channels) and found.tobytes() == pixels
        assert cache.digests().tolist() == [digest]
    for other in (((6, 8), "crop"), (SIZE, "pad"), (SIZE, "crop", 4095)):
        with Cache(tmp_path, Preprocessing(*other)) as cache:
            assert not cache.info([digest]) and not len(cache.digests())


def test_digests_are_sorted(tmp_path):
    names = fill(tmp_path, 50)
    with Cache(tmp_path, CROP) as cache:
        assert cache.digests().tolist() == sorted(names)


@pytest.mark.parametrize("start", [0, 100, 20_000, 60_000])
def test_a_broken_file_is_replaced(tmp_path, start):
    names = fill(tmp_path, 60, (72, 72))
    content = bytearray((tmp_path / FILE).read_bytes())
    content[start : start + 50_000] = b"this is no database " * 2500
    (tmp_path / FILE).write_bytes(content)
    with Cache(tmp_path, Preprocessing((72, 72), "crop")) as cache:
        for _ in range(2):  # what is broken is found at once, or when it is read
            cache.info(names)
            cache.pixels(names)
        data = picture(0)
        cache.put({hash_bytes(data): decode_for_cache(data, Preprocessing((72, 72), "crop"))})
        cache.evict([])
        assert hash_bytes(data) in cache.pixels(names)


def test_a_folder_that_can_not_be_written(tmp_path):
    (tmp_path / FILE).mkdir()
    with pytest.raises(UserError, match="can't open the cache of decoded images"):
        Cache(tmp_path, CROP)


def test_eviction_keeps_what_was_used_last(tmp_path):
    names = fill(tmp_path, 60, (72, 72))  # a page of the file each
    with Cache(tmp_path, Preprocessing((72, 72), "crop")) as cache:
        cache.evict(names)
        full = (tmp_path / FILE).stat().st_size
        cache.evict(names[:20], 2 * full - 2**17)  # more than half full: use is recorded
        cache.evict([], full // 2)
        left = cache.info(names)
    assert set(names[:20]) <= set(left) and 20 <= len(left) < 35
    assert (tmp_path / FILE).stat().st_size <= full // 2 + 2**16


@pytest.mark.parametrize("side", [8, 64, 96])
def test_eviction_deletes_no_more_than_it_must(tmp_path, side):
    image = Info(3, 1, 1, 0, 0, "", bytes(24 * 24)), bytes(side * side * 3)
    names = [number.to_bytes(16, "big") for number in range(1, 3_000_000 // (side * side))]
    with Cache(tmp_path, Preprocessing((side, side), "crop")) as cache:
        cache.put(dict.fromkeys(names, image))
        cache.evict([])
        cache.evict([], (tmp_path / FILE).stat().st_size // 4)
        left = len(cache.digests())
    assert 0.2 * len(names) < left < 0.27 * len(names)


def test_no_memory_is_shared_between_processes(tmp_path):
    """On a network file system it can't be."""
    fill(tmp_path, 3)
    with sqlite3.connect(tmp_path / FILE) as database:  # by an earlier version
        assert database.execute("PRAGMA journal_mode = WAL").fetchone() == ("wal",)
    database.close()
    with Cache(tmp_path, CROP) as cache:
        assert len(cache.digests()) == 3
        assert {path.name for path in tmp_path.iterdir()} == {FILE, ".lock"}


def test_two_runs_at_once(tmp_path):
    data = picture(0)
    digest, decoded = hash_bytes(data), decode_for_cache(data, CROP)
    with Cache(tmp_path, CROP) as one, Cache(tmp_path, CROP) as two:
        one.put({digest: decoded})
        two.put({digest: decoded})
        assert one.info([digest]) and two.pixels([digest])
        one.evict([], 0)
        assert not two.info([digest]) and not two.pixels([digest])


def test_without_file_locks_each_run_has_a_cache_of_its_own(tmp_path, monkeypatch):
    """SQLite needs locks: two writers without them would mix up their images."""
    known = fill(tmp_path, 3)
    before = (tmp_path / FILE).read_bytes()

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    with Cache(tmp_path, CROP) as one, Cache(tmp_path, CROP) as two:
        for seed, cache in enumerate((one, two)):
            data = picture(seed)
            info, pixels = decode_for_cache(data, CROP)
            cache.put({hash_bytes(data): (info, pixels)})
            (found,) = cache.pixels(known).values()
            assert found.tobytes() == pixels
            cache.evict([])
    assert (tmp_path / FILE).read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {FILE, ".lock"}


STARTS = """
import multiprocessing, sys
from stages.data.cache import Cache, Info
from stages.data.images import Preprocessing

def start(place, number, barrier):
    barrier.wait()
    cache = Cache(place, Preprocessing((1, 1), "crop"))
    cache.put({bytes([number] * 16): (Info(1, 1, 1, 0, 0, "", bytes(576)), b"x")})

fork = multiprocessing.get_context("fork")
for place in sys.argv[1:]:
    barrier = fork.Barrier(6)
    runs = [fork.Process(target=start, args=(place, number, barrier)) for number in range(6)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0] * 6
"""


def test_many_runs_that_start_at_once(tmp_path):
    places = [tmp_path / str(number) for number in range(5)]
    for place in places:
        place.mkdir()
    subprocess.run([sys.executable, "-c", STARTS, *places], check=True)
    for place in places:
        with Cache(place, Preprocessing((1, 1), "crop")) as cache:
            assert len(cache.digests()) == 6


def test_a_full_disk(tmp_path):
    image = Info(3, 1, 1, 0, 0, "", bytes(24 * 24)), bytes(8 * 6 * 3)
    with Cache(tmp_path, CROP) as cache:
        with sqlite3.connect(tmp_path / FILE) as database:
            (pages,) = database.execute("PRAGMA page_count").fetchone()
        cache.put({bytes(16): image})
        cache._database.execute(f"PRAGMA max_page_count = {pages + 5}")
        with pytest.raises(OSError) as caught:
            cache.put({number.to_bytes(16, "big"): image for number in range(1, 500)})
        assert caught.value.errno == errno.ENOSPC
        assert cache.digests().tolist() == [b""]  # sixteen zeros: nothing of what did not fit
