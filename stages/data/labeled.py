"""Read a folder of labeled images for a model that is trained already."""

import unicodedata
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from stages.data.arrays import LABELS, ImageSpec
from stages.data.checks import list_unreadable
from stages.data.duplicates import find_near
from stages.data.images import thumbnail
from stages.data.labels import NOT_NAMED, READ, TABLE, has_labels, read_labels
from stages.data.layout import check_annotations
from stages.data.listing import Skipped, is_data_folder, list_images
from stages.data.reading import read_batches
from stages.data.splits import DUPLICATE, LABEL_CONFLICT, NEAR_DUPLICATE
from stages.run import cli
from stages.run.cli import UserError
from stages.run.files import write_csv

NO_CLASS = "not a class of the model"
_COLUMNS = ["path", "class", "split", "digest", "exclusion_reason", "array_index"]


def read_folder(folder: Path, spec: ImageSpec, output: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read a labeled folder, and write it as the prepare stage would write a test split.

    Parameters
    ----------
    folder : path
        One sub-folder per class of the model, with images at any depth; or any, with labels.csv.
    spec : ImageSpec
        Of the model.
    output : path
        An existing folder, for image_spec.json, index.csv, and val/ and test/ (val/ is empty).

    Returns
    -------
    index : DataFrame
        A row for each image, with the columns of index.csv and ``notes`` (as `images.Note`).
        ``exclusion_reason`` says why an image is not in the split: it can't be read, its label is
        not a class of the model, it is identical to one of another class, or it is a duplicate or
        near duplicate of one before it, so that a picture counts once.
    skipped : DataFrame
        What is no image, as `stages.data.dataset.find` returns it.

    Raises
    ------
    UserError
        If there is no such folder, no class of the model in it, or no readable image of one; or if
        there are masks or annotations in it.
    """
    if not folder.is_dir():
        advice = "expected one with a folder of images per class"
        raise UserError(cli.no_such("folder", folder, advice))
    index, skipped = _list(folder, spec.classes)
    files = int((index["exclusion_reason"] == "").sum())
    if not files:
        folders = sorted(
            path.name for path in folder.iterdir() if path.is_dir() and is_data_folder(path.name)
        )
        raise UserError(
            f"{folder}: no images in a folder named like a class of the model (or labeled like one"
            f" in {TABLE}); it holds"
            f" {cli.list_names(folders) or 'no folders'}, and the classes are"
            f" {cli.list_names(spec.classes)}"
        )
    for split in ("val", "test"):
        (output / split).mkdir()
    paths = [folder / path for path in index["path"]]
    found = list(zip(paths, index["exclusion_reason"], strict=True))
    readings, thumbnails, arrays = [], [], []
    for number, (batch, images) in enumerate(read_batches(found, spec, "read")):
        readings += batch
        thumbnails += [np.asarray(thumbnail(Image.fromarray(one.squeeze()))) for one in images]
        if len(images):
            arrays.append(output / "test" / f"images-{number:06d}.npy")
            np.save(arrays[-1], images)
    index["digest"] = [reading.digest for reading in readings]
    index["exclusion_reason"] = [reading.error for reading in readings]
    index["notes"] = [int(reading.notes) for reading in readings]
    is_read = index["exclusion_reason"] == ""
    if not is_read.any():
        own = index[index["class"] != ""]
        reasons = list_unreadable(own["path"], own["exclusion_reason"])
        raise UserError(f"{folder}: none of {files:,} images can be read: {reasons}")
    index.loc[is_read, "exclusion_reason"] = _repeats(index[is_read], np.array(thumbnails))
    is_used = index["exclusion_reason"] == ""
    if not is_used.any():
        raise UserError(f"{folder}: each image is in several classes; expected one label for each")
    _keep(arrays, is_used[is_read].to_numpy())
    index["split"] = np.where(is_used, "test", "")
    index["array_index"] = (is_used.cumsum() - 1).where(is_used).astype("Int64")
    labels = index["class"][is_used].map(spec.classes.index)
    np.save(output / "test" / LABELS, labels.to_numpy(np.int32))
    spec.write(output / "image_spec.json")
    write_csv(output / "index.csv", index[_COLUMNS])
    return index[[*_COLUMNS, "notes"]], skipped


def _repeats(images: pd.DataFrame, thumbnails: np.ndarray) -> np.ndarray:
    """Return why images do not count: a picture does once, or not at all if it has two labels."""
    reasons = np.full(len(images), "", object)
    rows = np.flatnonzero(~images["digest"].duplicated())
    near = find_near(thumbnails, rows, rows, only_earlier=True)
    reasons[near.queries] = NEAR_DUPLICATE
    reasons[images["digest"].duplicated()] = DUPLICATE
    labels = images.groupby("digest")["class"].transform("nunique")
    reasons[labels > 1] = LABEL_CONFLICT
    return reasons


def _keep(paths: list[Path], is_used: np.ndarray) -> None:
    """Delete the other rows of files of arrays."""
    start = 0
    for path in paths:
        images = np.load(path)
        np.save(path, images[is_used[start : start + len(images)]])
        start += len(images)


def _list(folder: Path, classes: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return path, class and exclusion reason of all images, and what is passed over."""
    # macOS may store a name as other code points than those typed (NFD and NFC).
    names = {unicodedata.normalize("NFC", name): name for name in classes}

    def class_of(path: Path) -> str:
        top = path.parts[0] if len(path.parts) > 1 else ""
        name = labels.get(path.as_posix(), "") if is_table else top
        return names.get(unicodedata.normalize("NFC", name), "")

    found, others = list_images(folder)
    labels: dict[str, str] = {}
    if is_table := has_labels(folder):
        files = [*(path for path, _ in found), *(Path(one.path) for one in others)]
        table = read_labels(folder, [path.relative_to(folder).as_posix() for path in files])
        if "split" in table:
            raise UserError(f"{folder / TABLE}: a column split; expected only what to evaluate")
        labels |= zip(table["path"], table["label"], strict=True)
        named = {folder / path for path in labels}
        others += [Skipped(str(path), NOT_NAMED) for path, _ in found if path not in named]
        found = [one for one in found if one[0] in named]
    rows = []
    for file, reason in found:
        path = file.relative_to(folder)
        name = class_of(path / "x" if reason else path)  # a folder that is not looked into
        rows.append((path.as_posix(), name, reason if name else NO_CLASS))
    wrong = [path for path, _, _ in rows if path.encode(errors="ignore").decode() != path]
    if wrong:
        raise UserError(f"{folder}: names that are not valid UTF-8: {cli.list_names(wrong)}")
    images = pd.DataFrame(rows, columns=["path", "class", "exclusion_reason"])
    by_folder: dict[str, list[str]] = defaultdict(list)
    for image in map(Path, images["path"][images["exclusion_reason"] == ""]):
        by_folder[image.parent.as_posix()].append(image.name)
        for above in image.parent.parents:
            by_folder["" if above == Path() else above.as_posix()]
    if not is_table:
        check_annotations(folder, by_folder, "classes")
    skipped = []
    for one in others:
        inner = Path(one.path).relative_to(folder)
        reason = READ if is_table and inner == Path(TABLE) else one.reason
        skipped.append((inner.as_posix(), reason, one.files, class_of(inner)))
    return images, pd.DataFrame(skipped, columns=[*Skipped._fields, "class"])
