"""Read a folder of labeled images for a model that is trained already."""

import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd

from stages.data.arrays import LABELS, ImageSpec
from stages.data.checks import list_unreadable
from stages.data.dataset import list_images
from stages.data.reading import read_batches
from stages.run import cli
from stages.run.cli import UserError
from stages.run.files import write_csv

NO_CLASS = "not a class of the model"
_COLUMNS = ["path", "class", "split", "digest", "exclusion_reason", "array_index"]


def read_folder(folder: Path, spec: ImageSpec, output: Path) -> pd.DataFrame:
    """Read a labeled folder, and write it as the prepare stage would write a test split.

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
        A row for each image, with the columns of index.csv and ``notes`` (as `images.Note`).
        ``exclusion_reason`` says why an image is not in the split: it can't be read, or its folder
        is not a class of the model.

    Raises
    ------
    UserError
        If there is no such folder, no class of the model in it, or no readable image of one.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected one with a folder of images per class")
    index = _list(folder, spec.classes)
    files = int((index["exclusion_reason"] == "").sum())
    if not files:
        folders = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise UserError(
            f"{folder}: no images in a folder named like a class of the model; it holds"
            f" {cli.list_names(folders) or 'no folders'}, and the classes are"
            f" {cli.list_names(spec.classes)}"
        )
    for split in ("val", "test"):
        (output / split).mkdir()
    paths = [folder / path for path in index["path"]]
    found = list(zip(paths, index["exclusion_reason"], strict=True))
    readings = []
    for number, (batch, images) in enumerate(read_batches(found, spec, "read")):
        readings += batch
        if len(images):
            np.save(output / "test" / f"images-{number:06d}.npy", images)
    index["digest"] = [reading.digest for reading in readings]
    index["exclusion_reason"] = [reading.error for reading in readings]
    index["notes"] = [int(reading.notes) for reading in readings]
    is_read = index["exclusion_reason"] == ""
    if not is_read.any():
        own = index[index["class"] != ""]
        reasons = list_unreadable(own["path"], own["exclusion_reason"])
        raise UserError(f"{folder}: none of {files:,} images can be read: {reasons}")
    index["split"] = np.where(is_read, "test", "")
    index["array_index"] = (is_read.cumsum() - 1).where(is_read).astype("Int64")
    labels = index["class"][is_read].map(spec.classes.index)
    np.save(output / "test" / LABELS, labels.to_numpy(np.int32))
    spec.write(output / "image_spec.json")
    write_csv(output / "index.csv", index[_COLUMNS])
    return index[[*_COLUMNS, "notes"]]


def _list(folder: Path, classes: list[str]) -> pd.DataFrame:
    """Return path, class and exclusion reason of all images, and of what is not looked into."""
    # macOS may store a name as other code points than those typed (NFD and NFC).
    names = {unicodedata.normalize("NFC", name): name for name in classes}
    rows = []
    for file, reason in list_images(folder):
        path = file.relative_to(folder)
        top = path.parts[0] if reason or len(path.parts) > 1 else ""
        name = names.get(unicodedata.normalize("NFC", top), "")
        rows.append((path.as_posix(), name, reason if name else NO_CLASS))
    wrong = [path for path, _, _ in rows if path.encode(errors="ignore").decode() != path]
    if wrong:
        raise UserError(f"{folder}: names that are not valid UTF-8: {cli.list_names(wrong)}")
    return pd.DataFrame(rows, columns=["path", "class", "exclusion_reason"])
