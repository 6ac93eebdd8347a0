"""The prepare stage: turn a folder of images into arrays for the network.

What is known of the images is one table, a row per file: each step returns it with more columns.
An image's split depends only on its content and the seed (stages/data/splits.py), near duplicates
of val and test images are kept out of training (duplicates.py), and an image is decoded once
(cache.py).
"""

import argparse
import contextlib
import hashlib
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.data import arrays, checks, corrections, splits, tables
from stages.data.arrays import SPLITS, ImageSpec
from stages.data.cache import Cache
from stages.data.dataset import find
from stages.data.images import Preprocessing, is_image_name
from stages.data.labels import TABLE
from stages.data.listing import is_data_folder
from stages.data.parameters import Prepare
from stages.data.scan import read_images, scan
from stages.display import preparation
from stages.display.parameters import check_parameters
from stages.run import cli, cluster, files
from stages.run.params import read_dataset, read_section, watch_inputs

_PACKAGES = ("numpy", "pillow", "pillow-heif")  # which decide what workers return


def prepare(
    parameters: Prepare,
    dataset: str | Path,
    output: str | Path,
    metrics: str | Path,
    cache_dir: str | Path | None = None,
    corrections_file: str | Path | None = None,
) -> int:
    """Turn a folder of images into arrays for the network.

    A Dask cluster does the work if DASK_SCHEDULER_ADDRESS names one; otherwise all cores do.

    Parameters
    ----------
    parameters : Prepare
    dataset : path
        A folder as described in `stages.data.dataset`.
    output : path
        The folder for train/, val/, test/, image_spec.json, index.csv and duplicates.csv.
    metrics : path
        The folder for prepare.json, prepare_classes.csv and plots/, the figures prepared.png
        and duplicates.png.
    cache_dir : path, optional
        The folder of the cache of decoded images; by default one in the scratch folder.
    corrections_file : path, optional
        Corrections of labels, as `stages.data.corrections` describes them; by default none.

    Returns
    -------
    decoded : int
        How many images were decoded; the others were in the cache.

    Raises
    ------
    UserError
        If the dataset can't be used as it is.
    """
    dataset, output, metrics = Path(dataset), Path(output), Path(metrics)
    cache_dir = Path(cache_dir) if cache_dir else files.scratch_dir("images")
    preprocessing = Preprocessing(parameters.image_size, parameters.resize, parameters.white_level)
    fractions = parameters.val_fraction, parameters.test_fraction
    figure = metrics / "plots" / "duplicates.png"

    decisions = corrections.read(corrections_file) if corrections_file else corrections.NONE
    images, skipped = find(dataset, output, parameters.layout)
    images = splits.add_groups(images, parameters.group_by)
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings(action="ignore"))  # damaged images are listed
        workers = stack.enter_context(cluster.connect(_PACKAGES))
        cache = stack.enter_context(Cache(cache_dir, preprocessing))
        thumbnail_file = _thumbnail_file(cache_dir, output)
        stack.callback(thumbnail_file.unlink, missing_ok=True)

        images, thumbnails = scan(images, dataset, cache, preprocessing, thumbnail_file, workers)
        checks.check_readable(images, parameters.max_unreadable_fraction)
        checks.check_white_level(images, parameters.white_level)
        checks.check_plain(images, thumbnails)
        images = corrections.apply(images, decisions, corrections_file or "")
        spec = _image_spec(images, parameters)

        compared = thumbnails if parameters.drop_near_duplicates else None
        to_make = splits.splits_to_make(images, *fractions)
        images, duplicates = splits.assign(
            images, to_make, *fractions, parameters.seed, compared, workers
        )
        if problem := checks.describe_short_classes(images, to_make, figure):
            preparation.draw_duplicates(
                images, duplicates, dataset, cache, spec, parameters, figure
            )
            raise cli.UserError(problem)

        images = _write_arrays(images, dataset, cache, spec, output)
        cache.evict(used=images["digest"][images["content"] >= 0].unique())
        spec.write(output / "image_spec.json")
        counts = tables.write(images, duplicates, spec, output, metrics)

        preparation.draw_samples(output, spec, metrics / "plots" / "prepared.png")
        preparation.draw_duplicates(images, duplicates, dataset, cache, spec, parameters, figure)
    preparation.print_summary(
        dataset,
        images,
        duplicates,
        skipped,
        decisions,
        counts,
        spec,
        parameters,
        to_make,
        workers,
        output,
        figure,
    )
    return int(images["digest"][images["is_decoded"]].nunique())


def _thumbnail_file(folder: Path, output: Path) -> Path:
    """Return the path of a temporary file, which a run that was killed leaves to the next one."""
    run = hashlib.blake2b(os.fsencode(output.resolve()), digest_size=8).hexdigest()
    return folder / f"thumbnails-{run}.npy"


def _image_spec(images: pd.DataFrame, parameters: Prepare) -> ImageSpec:
    color_mode: str = parameters.color_mode
    if color_mode == "auto":
        has_color = (images["channels"] == 3) & ~images["is_dropped"]
        color_mode = "rgb" if has_color.any() else "grayscale"
    height, width = parameters.image_size
    shape = height, width, 3 if color_mode == "rgb" else 1
    classes = images["class"].cat.categories.tolist()
    return ImageSpec(
        classes, shape, color_mode, parameters.resize, white_level=parameters.white_level
    )


def _write_arrays(
    images: pd.DataFrame, dataset: Path, cache: Cache, spec: ImageSpec, output: Path
) -> pd.DataFrame:
    """Write the arrays of all splits; add the column ``array_index``, an image's row in them.

    At the end, either all or none replace the old ones.
    """
    array_index = pd.Series(pd.NA, images.index, "Int64")
    with contextlib.ExitStack() as stack:
        for name in SPLITS:
            folder = stack.enter_context(files.atomic_write(output / name))
            own = images[images["split"] == name]
            own = own.sort_values(["content", "class"], kind="stable")
            array_index[own.index] = np.arange(len(own))
            pixels = read_images(own, dataset, cache, spec)
            bar = cli.progress(pixels, total=len(own), unit="image", label=name)
            labels = own["class"].cat.codes.to_numpy()
            arrays.write_split(folder, own["digest"], labels, spec.image_shape, bar)
    return images.assign(array_index=array_index)


def _inputs(dataset: Path) -> dict[str, Any]:
    """Return the corrections, and size and time of the last change of images and their labels."""
    stamps: dict[str, Any] = {corrections.FILE: Path(corrections.FILE).read_bytes()}
    table = os.path.join(dataset, TABLE)
    for folder, folders, names in os.walk(dataset):
        folders[:] = filter(is_data_folder, folders)
        for path in (os.path.join(folder, name) for name in names):
            if path == table or is_image_name(os.path.basename(path)):
                stat = os.lstat(path)
                stamps[path] = stat.st_size, stat.st_mtime_ns
    return stamps


def main(_: argparse.Namespace) -> None:
    """Run the stage as params.yaml says."""
    check_parameters()
    dataset = read_dataset()
    check = watch_inputs("prepare", lambda: _inputs(Path(dataset)))
    parameters = read_section(Prepare, "prepare")
    with files.stage_lock("prepare"):
        prepare(parameters, dataset, "data/prepared", "metrics", corrections_file=corrections.FILE)
        check()


if __name__ == "__main__":
    raise SystemExit("run it as: python -m stages prepare")
