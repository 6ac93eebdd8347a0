"""What `use` and `start` look at before a dataset is prepared: sizes of images, and backbones."""

import filecmp
import re
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stages.data.checks import list_unreadable
from stages.data.images import ImageError, read_size
from stages.display.backbones import BACKBONES, propose
from stages.run import cli
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


def locate_backbone(named: str) -> tuple[str, Path | None]:
    """Return a backbone's name, and its file if it was named by its path.

    Raises
    ------
    UserError
        If there is no such file, it is no Keras model, or another one has its name here.
    """
    path = cli.expand_home(named)
    if len(path.parts) == 1 and (path.suffix != ".keras" or named in list_backbones()):
        return named.removesuffix(".keras"), None
    if not path.is_file():
        raise UserError(f"--backbone: {cli.no_such('file', path)}")
    if path.suffix != ".keras" or not zipfile.is_zipfile(path):
        raise UserError(
            f"--backbone: {path}: not a .keras file; `python -m stages backbone NAME --weights"
            f" {path}` makes one of published weights"
        )
    here = BACKBONE_FOLDER / path.name
    if here.exists() and not filecmp.cmp(path, here, shallow=False):
        raise UserError(f"--backbone: {path}: {here} is another file; rename one of them")
    return path.stem, path


def image_size(path: Path) -> tuple[int, str]:
    """Return the side of the images that a backbone is for, in pixels, and how that is known."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            text = archive.read("config.json").decode("utf-8", "replace")
        if fixed := re.search(r'"batch_shape": \[null, (\d+), (\d+), 3\]', text):
            return int(fixed[1]), f"{path.name} is made for this size"
    if known := BACKBONES.get(path.stem):
        return known.size, f"{path.name} was trained at this size"
    return 224, "most backbones were trained at this size"


def propose_backbone(images: int) -> tuple[str, str]:
    """Return the name of a backbone for this number of images, and what it costs, in words."""
    name = propose(images, cores := cpu_count())
    minutes = BACKBONES[name].seconds * images / 1000 / cores / 60
    time = f"about {minutes:.0f} min" if minutes >= 1 else "less than a minute"
    return name, f"{BACKBONES[name].megabytes} MB to download, then {time} for these images, once"
