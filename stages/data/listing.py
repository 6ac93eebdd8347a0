"""Which files of a folder are images: the rule for datasets, new images and the exported program.

The exported program has a copy of this module, which therefore needs no package.
"""

import os
import re
from collections.abc import Container
from pathlib import Path
from typing import NamedTuple

from stages.data.images import is_image_name

NO_IMAGE, NOT_FOLLOWED = "no image extension", "a link to a folder, or to nothing"
OF_SYSTEM = "a system's folder"
ELSEWHERE = "stands for what is elsewhere"

# Hidden folders, and those that network drives, Windows, macOS and file systems put among others:
# thumbnails, recycle bins, snapshots, what was found by a check of the disk.
_SYSTEM_FOLDER = re.compile(
    r"\..*"
    r"|[@#$~]_*(ea_?dir|recently|recycle|share(bin|snap)|snapshot|thumb|tmp|trash).*"
    r"|__macosx|network trash folder|temporary items"
    r"|system volume information|found\.\d{3}|lost\+found|(?-i:RECYCLER)",
    re.IGNORECASE | re.DOTALL,
)
# What cloud drives and unfinished downloads put in place of a file or a folder.
_PLACEHOLDER = re.compile(
    r"\..+\.icloud|.+\.(nextcloud|owncloud|part|partial|crdownload|download)", re.IGNORECASE
)


class Skipped(NamedTuple):
    """What is passed over: a file, or a folder with this number of images."""

    path: str
    reason: str
    files: int = 1


def is_data_folder(name: str) -> bool:
    """Return whether a folder may hold images: it is neither hidden nor one of the system's."""
    return not _SYSTEM_FOLDER.fullmatch(name)


def why_skipped(name: str, beside: Container[str]) -> str:
    """Return why a file without an image extension is passed over, given the names beside it."""
    is_absent = name.endswith(".dvc") and name.removesuffix(".dvc") not in beside
    return ELSEWHERE if is_absent or _PLACEHOLDER.fullmatch(name) else NO_IMAGE


def count_images(folder: str | Path) -> int:
    """Return the number of images in a folder, at any depth; none where it can't be looked into."""
    return sum(is_image_name(name) for _, _, names in os.walk(folder) for name in names)


def list_images(folder: Path) -> tuple[list[tuple[Path, str]], list[Skipped]]:
    """List the images in a folder at any depth.

    Returns
    -------
    found : list of (path, reason)
        Sorted. The reason is empty for an image; otherwise the path is a folder without permission
        or a link to a folder, which is not looked into.
    skipped : list of Skipped
        Sorted: systems' folders that hold images, and files without an image extension, apart from
        hidden ones that stand for no other file.
    """
    found: list[tuple[Path, str]] = []
    skipped: list[Skipped] = []

    def refuse(error: OSError) -> None:
        found.append((Path(error.filename), "no permission to look into this folder"))

    for top, folders, names in os.walk(folder, onerror=refuse):
        for name in folders:
            path = os.path.join(top, name)
            if is_data_folder(name) and os.path.islink(path):
                found.append((Path(path), "a link to a folder, which is not followed"))
            elif not is_data_folder(name) and (images := count_images(path)):
                skipped.append(Skipped(path, OF_SYSTEM, images))
        beside = {*folders, *names}
        folders[:] = filter(is_data_folder, folders)
        for name in names:
            if is_image_name(name):
                found.append((Path(top, name), ""))
            elif (why := why_skipped(name, beside)) == ELSEWHERE or not name.startswith("."):
                skipped.append(Skipped(os.path.join(top, name), why))
    return sorted(found), sorted(skipped)
