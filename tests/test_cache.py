"""The row store: what goes in comes out, and nothing damaged does."""

import errno
import io
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.data import cache
from stages.data.scan import digest

SIZE = (8, 6)


def picture(seed: int, channels: int = 3) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 20, channels), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(file, "PNG")
    return file.getvalue()


def fill(folder: Path, count: int, size=SIZE) -> list[bytes]:
    names = []
    with cache.Store(folder, size, "crop") as kept:
        kept.begin()
        for seed in range(count):
            names.append(digest(picture(seed)))
            kept.add(names[-1], cache.make(picture(seed), size, "crop"))
        kept.flush()
    return names


@pytest.mark.parametrize("data", [picture(0), picture(0, 1), b"no image"])
def test_what_goes_in_comes_out(tmp_path, data):
    row, name = cache.make(data, SIZE, "crop"), digest(data)
    with cache.Store(tmp_path, SIZE, "crop") as kept:
        assert not kept.look([name]) and not kept.pixels([name])
        kept.add(name, row)
        assert kept.look([name]) == {name: row}
        kept.flush()
    with cache.Store(tmp_path, SIZE, "crop") as kept:
        found = kept.look([name])[name]
        assert (found.reason, found.shrink) == (row.reason, row.shrink)
        if row.pixels is not None:
            assert found.pixels.shape[-1] == row.pixels.shape[-1]
            np.testing.assert_array_equal(found.thumbnail, row.thumbnail)
            np.testing.assert_array_equal(kept.pixels([name])[name], row.pixels)
    for other in (((6, 8), "crop"), (SIZE, "pad")):
        with cache.Store(tmp_path, *other) as kept:
            assert not kept.look([name])


def test_a_killed_run_keeps_what_it_wrote(tmp_path):
    names = fill(tmp_path, 3)
    with cache.Store(tmp_path, SIZE, "crop") as kept:
        kept.add(digest(picture(3)), cache.make(picture(3), SIZE, "crop"))  # and never flushed
    with cache.Store(tmp_path, SIZE, "crop") as kept:
        assert set(kept.look(names)) == set(names)
        assert not kept.look([digest(picture(3))])


@pytest.mark.parametrize("broken", ["a bit", 1000, -1, None, "text", b"bytes"])
@pytest.mark.parametrize("column", ["looks", "channels", "checksum", "data"])
def test_a_damaged_row_is_not_trusted(tmp_path, column, broken):
    (name,) = fill(tmp_path, 1)
    with sqlite3.connect(tmp_path / "rows.sqlite") as database:
        (value,) = database.execute(f"SELECT {column} FROM rows").fetchone()
        if broken == "a bit":
            broken = 1 if column == "channels" else bytes([value[0] ^ 1]) + value[1:]
        database.execute(f"UPDATE rows SET {column} = ?", (broken,))
    with cache.Store(tmp_path, SIZE, "crop") as kept:
        assert not kept.look([name]) or not kept.pixels([name])
        row = cache.make(picture(0), SIZE, "crop")
        kept.add(name, row)
        kept.flush()
        np.testing.assert_array_equal(kept.pixels([name])[name], row.pixels)
        assert kept.look([name])


def test_a_row_of_another_image_is_not_trusted(tmp_path):
    one, two = fill(tmp_path, 2)
    with sqlite3.connect(tmp_path / "rows.sqlite") as database:
        database.execute("UPDATE keys SET id = 3 - id")
    with cache.Store(tmp_path, SIZE, "crop") as kept:
        assert not kept.look([one]) and not kept.pixels([two])


def test_a_damaged_file_says_so(tmp_path):
    fill(tmp_path, 1)
    (tmp_path / "rows.sqlite").write_bytes(b"this is no database at all" * 400)
    with pytest.raises(cache.Damaged):
        cache.Store(tmp_path, SIZE, "crop")
    cache.clear(tmp_path)
    with cache.Store(tmp_path, SIZE, "crop") as kept:
        assert not kept.look([bytes(16)])


def test_eviction_keeps_what_was_used_last(tmp_path):
    names = fill(tmp_path, 60, (72, 72))  # a page of the file each
    with cache.Store(tmp_path, (72, 72), "crop") as kept:
        kept.begin()
        full = (tmp_path / "rows.sqlite").stat().st_size
        kept.evict(names[:20], 2 * full - 2**17)  # more than half full: what was used is noted
        kept.begin()
        kept.evict([], full // 2)
        left = kept.look(names)
    assert set(names[:20]) <= set(left) and 20 <= len(left) < 35
    assert (tmp_path / "rows.sqlite").stat().st_size <= full // 2 + 2**16


@pytest.mark.parametrize("side", [8, 64, 96])
def test_eviction_deletes_no_more_than_it_must(tmp_path, side):
    size = side, side
    row = cache.Row(np.zeros((*size, 3), np.uint8), np.zeros((24, 24), np.uint8))
    with cache.Store(tmp_path, size, "crop") as kept:
        kept.begin()
        names = [number.to_bytes(16, "big") for number in range(3_000_000 // (side * side))]
        for name in names:
            kept.add(name, row)
        kept.flush()
        full = (tmp_path / "rows.sqlite").stat().st_size
        kept.evict([], full // 4)
        left = sum(len(kept.look(names[i : i + 500])) for i in range(0, len(names), 500))
    assert 0.2 * len(names) < left < 0.27 * len(names)


def test_two_runs_at_once(tmp_path):
    with cache.Store(tmp_path, SIZE, "crop") as one, cache.Store(tmp_path, SIZE, "crop") as two:
        row, name = cache.make(picture(0), SIZE, "crop"), digest(picture(0))
        for kept in (one, two):
            kept.add(name, row)
        one.flush()
        two.flush()
        one.evict([], 0)
        assert not two.look([name]) and not two.pixels([name])


def test_many_runs_that_start_at_once(tmp_path):
    code = (
        "import sys; from stages.data import cache; sys.stdin.read(1);"
        "cache.Store(sys.argv[1], (8, 6), 'crop').begin()"
    )
    for number in range(5):
        place = tmp_path / str(number)
        place.mkdir()
        runs = [
            subprocess.Popen([sys.executable, "-c", code, place], stdin=subprocess.PIPE)
            for _ in range(6)
        ]
        for run in runs:
            run.stdin.close()
        assert [run.wait(60) for run in runs] == [0] * 6
        with cache.Store(place, SIZE, "crop") as kept:
            assert kept._database.execute("PRAGMA user_version").fetchone() == (6,)


def test_a_run_ends_while_another_one_reads(tmp_path):
    names = fill(tmp_path, 3)
    with cache.Store(tmp_path, SIZE, "crop") as one, cache.Store(tmp_path, SIZE, "crop") as two:
        assert one.pixels(names)  # and holds on to what it saw
        two.evict(names)  # else this would wait for ten minutes
        two.add(digest(picture(3)), cache.make(picture(3), SIZE, "crop"))
        two.flush()
        assert set(one.pixels(names)) == set(names)


def test_the_log_ends_while_others_look(tmp_path):
    """A reader that held on to what it saw would let SQLite's log grow with all that is written."""
    size = (256, 256)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    row = cache.Row(pixels, np.zeros((24, 24), np.uint8))
    with cache.Store(tmp_path, size, "crop") as one, cache.Store(tmp_path, size, "crop") as two:
        names = [number.to_bytes(16, "big") for number in range(150)]
        for name in names:
            one.look(names)
            two.add(name, row)
            two.flush()
        assert len(one.look(names)) == 150
        log = (tmp_path / "rows.sqlite-wal").stat().st_size
    assert log < 150 * pixels.nbytes / 2


def test_a_full_disk(tmp_path):
    with cache.Store(tmp_path, SIZE, "crop") as kept:
        kept._database.execute("PRAGMA max_page_count = 12")
        with pytest.raises(OSError) as caught:
            for seed in range(200):
                kept.add(seed.to_bytes(16, "big"), cache.make(picture(seed), SIZE, "crop"))
            kept.flush()
        assert caught.value.errno == errno.ENOSPC
