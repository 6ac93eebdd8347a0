"""What `use` and `start` look at before a dataset is prepared: sizes of images, and backbones."""

import re
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stages.data.checks import list_unreadable
from stages.data.images import ImageError, read_size
from stages.display.backbones import BACKBONES, propose
from stages.run.cli import UserError, count
from stages.run.processes import cpu_count

SMALL_SIDE = 64  # pixels: up to here, the median of the short sides is that of small images
BACKBONE_FOLDER = Path("data/backbones")
_SAMPLE = 300  # images whose size is read


def short_sides(folder: Path, paths: Sequence[str]) -> tuple[np.ndarray, dict[str, str]]:
    """Return the short sides of a sample of images, and why others of it can't be read, by path.

    Raises
    ------
    UserError
        If none of them can be read.
    """
    rows = np.unique(np.linspace(0, len(paths) - 1, _SAMPLE).astype(int))
    sides, unreadable = [], {}
    with warnings.catch_warnings(action="ignore"):  # about damaged images
        for path in (paths[row] for row in rows):
            try:
                sides.append(min(read_size(folder / path)))
            except ImageError as error:
                unreadable[path] = str(error)
    if not sides:
        raise UserError(
            f"dataset: {folder}: none of {count(len(rows), 'image')} can be read:"
            f" {list_unreadable(unreadable, unreadable.values())}"
        )
    return np.array(sides), unreadable


def list_backbones() -> list[str]:
    """Return the names of the backbones that are here, with their ending, sorted."""
    return sorted(path.name for path in BACKBONE_FOLDER.glob("*.keras"))


def image_size(name: str) -> tuple[int, str]:
    """Return the side of the images that a backbone is for, in pixels, and how that is known.

    `name` is that of a file that is here, or will be.
    """
    path = BACKBONE_FOLDER / name
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            text = archive.read("config.json").decode("utf-8", "replace")
        if fixed := re.search(r'"batch_shape": \[null, (\d+), (\d+), 3\]', text):
            return int(fixed[1]), f"{name} is made for this size"
    if known := BACKBONES.get(name.removesuffix(".keras")):
        return known.size, f"{name} was trained at this size"
    return 224, "most backbones were trained at this size"


def propose_backbone(images: int) -> tuple[str, str]:
    """Return the name of a backbone for this number of images, and what it costs, in words."""
    name = propose(images, cores := cpu_count())
    minutes = BACKBONES[name].seconds * images / 1000 / cores / 60
    time = f"about {minutes:.0f} min" if minutes >= 1 else "less than a minute"
    return name, f"{BACKBONES[name].megabytes} MB to download, then {time} for these images, once"
