"""Peak memory of prepare with 10,000 and with 100,000 images, over all its processes.

    python tests/benchmarks/prepare_memory.py [FEW MANY]

Draws small random pictures, each its own. Counts proportional set sizes (a page that k processes
share counts 1/k for each), as Linux tells them, every tenth of a second. Goals: with ten times the
images at most 4 times the peak, and an image takes no longer; also for 100000 1000000.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

ROOT = str(Path(__file__).resolve().parents[2])
PREPARE = """
import sys
sys.path.insert(0, {root!r})
from stages.data.parameters import Prepare
from stages.prepare import prepare
prepare(Prepare(image_size=[32, 32], layout="classes"), {data!r}, {out!r}, {out!r}, {out!r})
"""
HEADER = b"P6 32 32 255\n"


def draw(folder: Path, count: int) -> None:
    """Write so many pictures (PPM) of ten classes: large spots and a little noise."""
    random = np.random.default_rng(0)
    for number in range(count):
        spots = random.integers(0, 256, (4, 4, 3)).repeat(8, axis=0).repeat(8, axis=1)
        pixels = np.clip(spots + random.integers(-20, 20, spots.shape), 0, 255).astype(np.uint8)
        place = folder / f"class {number % 10}" / f"{number // 10 // 1000:03d}"
        if number // 10 % 1000 == 0:
            place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:07d}.ppm").write_bytes(HEADER + pixels.tobytes())


def memory(process: psutil.Process) -> int:
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            text = Path(f"/proc/{one.pid}/smaps_rollup").read_text()
            total += int(text.split("\nPss:")[1].split()[0]) * 1024
        except (OSError, IndexError, psutil.Error):  # it has just ended
            pass
    return total


def measure(count: int) -> tuple[int, float]:
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "data", Path(folder) / "out"
        draw(data, count)
        out.mkdir()
        code = PREPARE.format(root=ROOT, data=str(data), out=str(out))
        begun, peak = time.perf_counter(), 0
        running = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
        process = psutil.Process(running.pid)
        while running.poll() is None:
            peak = max(peak, memory(process))
            time.sleep(0.1)
        assert running.returncode == 0
        return peak, time.perf_counter() - begun


def main() -> None:
    few, many = map(int, sys.argv[1:3]) if len(sys.argv) > 2 else (10_000, 100_000)
    results = {count: measure(count) for count in (few, many)}
    for count, (peak, seconds) in results.items():
        print(f"{count:9,} images: peak {peak / 2**20:.0f} MB, {seconds / count * 1e6:.0f} µs each")
    peak, seconds = np.divide(results[many], results[few])
    print(
        f"with {many / few:.0f} times the images, {peak:.2f} times the peak (goal: 4) and"
        f" {seconds:.1f} times the seconds (goal: {many / few:.0f})"
    )


if __name__ == "__main__":
    main()
