"""Read image files that are not part of the dataset, for a trained model."""

import functools
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stages.data.arrays import ImageSpec
from stages.data.images import ImageError, hash_bytes, read_bytes, read_image
from stages.run import cli

_BATCH_SIZE = 64  # images that are read, and are in memory, at once


class Reading(NamedTuple):
    """What is known of a file.

    Attributes
    ----------
    digest : str
        Of its content; empty if it was not opened.
    notes : int
        As `images.Note`; 0 if the image can't be read.
    error : str
        Why the image can't be read; empty if it can.
    """

    digest: str
    notes: int
    error: str


def read_batches(
    found: Sequence[tuple[Path, str]], spec: ImageSpec, label: str
) -> Iterator[tuple[list[Reading], np.ndarray]]:
    """Read images as the network takes them, several at once.

    Parameters
    ----------
    found : sequence of (path, reason)
        As `list_images` returns them: a file with a reason is not opened, which is its error.
    spec : ImageSpec
    label : str
        Of the progress bar.

    Yields
    ------
    readings : list of Reading
        Of the next files, at most 64.
    images : uint8 array of shape (k, height, width, channels)
        Those of these files that can be read.
    """
    read = functools.partial(_read, spec=spec)
    starts = range(0, len(found), _BATCH_SIZE)
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor() as pool:
        for start in cli.progress(starts, total=len(starts), unit="batch", label=label):
            batch = list(pool.map(read, found[start : start + _BATCH_SIZE]))
            images = [image for _, image in batch if image is not None]
            pixels = np.array(images, np.uint8).reshape(-1, *spec.image_shape)
            yield [reading for reading, _ in batch], pixels


def _read(found: tuple[Path, str], spec: ImageSpec) -> tuple[Reading, np.ndarray | None]:
    path, reason = found
    if reason:
        return Reading("", 0, reason), None
    digest = ""
    try:
        content = read_bytes(path)
        digest = hash_bytes(content).hex()
        image, notes = read_image(content, spec)
    except ImageError as error:
        return Reading(digest, 0, str(error)), None
    return Reading(digest, notes, ""), image
