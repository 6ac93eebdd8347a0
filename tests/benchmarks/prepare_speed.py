"""How fast prepare is: against a bare loop, and after one per cent of new images.

    python tests/benchmarks/prepare_speed.py FOLDER [SIZE]

The folder is a dataset. A bare loop does the same work for each image: reads it, hashes its bytes,
decodes and resizes it with Pillow, and makes the perceptual hash. It runs in as many processes as
prepare, each over its share of the files, so that the ratio says what all else costs: the cache,
near duplicates, writing. New images are some of the old ones, rotated, in their own format. All run
three times, the first two in turn, and the best counts; each starts when the disk is at rest.
"""

import io
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

BARE = """
import hashlib, io, sys
import numpy as np
sys.path.insert(0, {root!r})
from PIL import Image
from stages.data import duplicates, images
size = {size}
for path in sys.stdin.read().split("\\0"):
    with open(path, "rb") as file:
        data = file.read()
    hashlib.blake2b(data, digest_size=16).digest()
    picture = Image.open(io.BytesIO(data))
    picture.draft(None, (3 * size // 2, 3 * size // 2))
    picture = picture.convert("RGB")
    short = min(picture.size)
    left, top = (picture.width - short) / 2, (picture.height - short) / 2
    box = left, top, picture.width - left, picture.height - top
    picture = picture.resize((size, size), Image.Resampling.BICUBIC, box)
    picture.tobytes()
    duplicates.compute_descriptors(np.asarray(images.thumbnail(picture))[None])
"""
PREPARE = """
import os, sys
sys.path.insert(0, {root!r})
from stages.data.parameters import Prepare
from stages.prepare import prepare
decoded = prepare(Prepare(image_size=[{size}, {size}]), {data!r}, {out!r} + "/out",
                  {out!r} + "/metrics", {out!r} + "/cache")
print("DECODED", decoded, flush=True)
os._exit(0)  # as the stage ends
"""
ROOT = str(Path(__file__).resolve().parents[2])


def bare(files: list[str], size: int, processes: int) -> float:
    os.sync()
    begun = time.perf_counter()
    code = BARE.format(root=ROOT, size=size)
    running = []
    for share in range(processes):
        process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
        process.stdin.write("\0".join(files[share::processes]).encode())
        process.stdin.close()
        running.append(process)
    assert not any(process.wait() for process in running)
    return time.perf_counter() - begun


def prepare(data: Path, size: int, out: Path) -> tuple[int, float]:
    """Return how many were decoded and the seconds of the whole command."""
    (out / "cache").mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / "out", ignore_errors=True)  # as DVC does before a stage starts
    code = PREPARE.format(root=ROOT, data=str(data), size=size, out=str(out))
    os.sync()
    begun = time.perf_counter()
    printed = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    return int(printed.split("DECODED")[1].split()[0]), time.perf_counter() - begun


def main() -> None:
    data, size = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 32
    from stages.data import dataset
    from stages.run import parallel

    paths = dataset.find(data)[0]["path"].tolist()
    files = [str(data / path) for path in paths]
    processes = parallel.worker_count()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        loops, colds = [], []
        for _ in range(3):
            loops.append(bare(files, size, processes))
            shutil.rmtree(out / "cache", ignore_errors=True)
            decoded, seconds = prepare(data, size, out)
            colds.append(seconds)
        print(f"{len(files):,} images at {size} x {size}, {processes} processes")
        print(f"bare loop    {min(loops):7.2f} s, {len(files) / min(loops):7,.0f} images a second")
        print(f"cold prepare {min(colds):7.2f} s, {len(files) / min(colds):7,.0f} images a second")
        ratio = min(loops) / min(colds)
        print(f"(a) bare loop : cold prepare = {ratio:.2f} (at least 0.85 on photographs)")

        grown = out / "grown"
        subprocess.run(["cp", "-rs", str(data.resolve()), str(grown)], check=True)
        from PIL import Image

        warms = []
        for seed in range(3):
            for path in random.Random(seed).sample(paths, len(files) // 100):
                with Image.open(data / path) as picture:
                    file = io.BytesIO()
                    picture.rotate(90 * (seed + 1)).save(file, picture.format)
                place = grown / path
                place.with_name(f"new {seed} {place.name}").write_bytes(file.getvalue())
            decoded, seconds = prepare(grown, size, out)
            warms.append(seconds)
        again = min(warms)
        _, nothing = prepare(grown, size, out)
        print(f"one per cent more {again:7.2f} s, {decoded} decoded; then nothing {nothing:.2f} s")
        print(
            f"(b) one per cent more : cold = {again / min(colds):.2f} (at most 0.25 on photographs)"
        )


if __name__ == "__main__":
    main()
