"""Read a folder of labelled images for a model that is trained already."""

import functools
import hashlib
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd

from stages.data.arrays import LABELS, ImageSpec
from stages.data.dataset import list_images
from stages.data.images import ImageError, read_bytes, read_image
from stages.run import cli
from stages.run.cli import UserError
from stages.run.files import write_csv

NO_CLASS = "not a class of the model"
_IMAGES_IN_MEMORY = 256


def read_folder(folder: Path, spec: ImageSpec, output: Path) -> pd.DataFrame:
    """Read a labelled folder, and write it as the prepare stage would write a test split.

    Parameters
    ----------
    folder : path
        One sub-folder per class of the model, with images at any depth.
    spec : ImageSpec
        Of the model.
    output : path
        An existing folder, for image_spec.json, index.csv, and val/ and test/ (val/ is empty).

    Returns
    -------
    index : DataFrame
        A row for each image, with the columns of index.csv. ``exclusion_reason`` says why an image
        is not in the split: it can't be read, or its folder is not a class of the model.

    Raises
    ------
    UserError
        If there is no such folder, no class of the model in it, or no readable image of one.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected one with a folder of images per class")
    # macOS may store a name as other code points than those typed (NFD and NFC).
    classes = {unicodedata.normalize("NFC", name): name for name in spec.classes}
    listed = _list(folder)
    found = [
        (path, classes.get(unicodedata.normalize("NFC", top)), reason)
        for path, top, reason in listed
    ]
    files = [folder / path for path, name, reason in found if name is not None and not reason]
    if not files:
        folders = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise UserError(
            f"{folder}: no images in a folder named like a class of the model; it holds"
            f" {cli.list_names(folders) or 'no folders'}, and the classes are"
            f" {cli.list_names(spec.classes)}"
        )
    for split in ("val", "test"):
        (output / split).mkdir()
    decoded = iter(_decode(files, spec, output / "test"))
    rows: list[tuple[str, str, str, str, str, int | str]] = []
    labels: list[int] = []
    for path, name, reason in found:
        digest = ""
        if name is None:
            reason = NO_CLASS
        elif not reason:
            digest, reason = next(decoded)
        if name is not None and not reason:
            rows.append((path, name, "test", digest, "", len(labels)))
            labels.append(spec.classes.index(name))
        else:
            rows.append((path, name or "", "", digest, reason, ""))
    columns = ["path", "class", "split", "digest", "exclusion_reason", "array_index"]
    index = pd.DataFrame(rows, columns=columns)
    if not labels:
        reason = index["exclusion_reason"][index["class"] != ""].iloc[0]
        raise UserError(f"{folder}: none of {len(files):,} images can be read ({reason})")
    np.save(output / "test" / LABELS, np.array(labels, np.int32))
    spec.write(output / "image_spec.json")
    write_csv(output / "index.csv", index)
    return index


def _list(folder: Path) -> list[tuple[str, str, str]]:
    """Return each path in the folder, the top folder that it is in, and why it is not read."""
    listed = []
    for file, reason in list_images(folder):
        parts = file.relative_to(folder).parts
        listed.append(("/".join(parts), parts[0] if reason or len(parts) > 1 else "", reason))
    names = [path for path, _, _ in listed if not _is_utf8(path)]
    if names:
        raise UserError(f"{folder}: names that are not valid UTF-8: {cli.list_names(names)}")
    return listed


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _decode(files: list[Path], spec: ImageSpec, output: Path) -> list[tuple[str, str]]:
    """Write the images that can be read; return each file's digest, and why it can't be read."""
    results: list[tuple[str, str]] = []
    read = functools.partial(_read, spec=spec)
    starts = range(0, len(files), _IMAGES_IN_MEMORY)
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor() as pool:
        for start in cli.progress(starts, total=len(starts), unit="chunk", label="read"):
            chunk = list(pool.map(read, files[start : start + _IMAGES_IN_MEMORY]))
            results += [(digest, reason) for digest, _, reason in chunk]
            images = [image for _, image, _ in chunk if image is not None]
            if images:
                np.save(output / f"images-{start:09d}.npy", np.stack(images))
    return results


def _read(file: Path, spec: ImageSpec) -> tuple[str, np.ndarray | None, str]:
    """Return the digest, the image and an empty string, or no image and why it can't be read."""
    digest = ""
    try:
        content = read_bytes(file)
        digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        return digest, read_image(content, spec)[0], ""
    except ImageError as error:
        return digest, None, str(error)
