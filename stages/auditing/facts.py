"""Facts of the original images: of their files, and of a thumbnail of each.

Worker processes import this module, so it needs no pandas.
"""

import itertools
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageFile, ImageFilter, ImageStat

from stages.data import images as reader
from stages.data.depth import MAX_VALUE
from stages.data.images import ImageError, Preprocessing
from stages.data.repair import repair
from stages.run.cli import UserError, count, list_names, progress
from stages.run.parallel import map_unordered

if TYPE_CHECKING:
    import pandas as pd

_CHUNK_IMAGES = 64  # of a task
_SIDE, _COLOR_SIDE = 256, 64  # pixels of the longer side of a thumbnail, at most
_FINE, _COARSE = 1, 3  # pixels, up to which detail is fine or coarse
_EDGES = 0.997  # sharpness is that of the strongest detail, which is edges
_NOISE = 2  # levels that are not taken for coarse detail
_LEAST_SIDE = 16  # pixels, from which on there is coarse detail, and a border around the subject
_MAKE_TAG, _MODEL_TAG = 0x010F, 0x0110


class Facts(NamedTuple):
    """What is known of an original image. Levels are from 0 to 255, of the whole image in sRGB.

    Attributes
    ----------
    width, height : int
        As it is seen: upright.
    file_bytes : int
    format, mode : str
        As Pillow names them, for instance JPEG and RGB.
    quantization : int
        Of a JPEG: the sum of its table for luminance, which follows from the quality that it was
        saved with. Otherwise 0.
    camera : str
        Make and model in its EXIF data; empty if there is none.
    thumbnail : bytes
        Of 24 x 24 gray pixels, by which near duplicates are found.
    darkest, brightest : int
        The 0.1th and the 99th percentile of its gray levels: a thin line is dark enough for an
        image not to be too bright, but a few lamps do not light a night.
    contrast, smooth_contrast : float
        Standard deviation of its gray levels; the same, smoothed so that noise does not count.
    sharpness : float
        The ratio of fine to coarse detail; NaN for images of less than 16 pixels.
    red, green, blue : float
        Mean color.
    saturation : float
        Mean difference of the largest and the smallest of red, green and blue.
    border_red, border_green, border_blue : float
        Mean color of the outermost pixels of a thumbnail of 64 pixels; NaN for images of less than
        16 pixels.
    """

    width: int
    height: int
    file_bytes: int
    format: str
    mode: str
    quantization: int
    camera: str
    thumbnail: bytes
    darkest: int
    brightest: int
    contrast: float
    smooth_contrast: float
    sharpness: float
    red: float
    green: float
    blue: float
    saturation: float
    border_red: float
    border_green: float
    border_blue: float


def read_facts(
    images: "pd.DataFrame", dataset: Path, white_level: int = MAX_VALUE
) -> "pd.DataFrame":
    """Read facts of original images, in parallel.

    Parameters
    ----------
    images : DataFrame
        Images that prepare could read: ``path`` (within the dataset) and ``digest`` (hex).
    dataset : Path
    white_level : int, default=65535
        As in prepare: the value that is white in images of more than 8 bits per channel.

    Returns
    -------
    facts : DataFrame
        With the index of `images`, and the attributes of `Facts` as columns.

    Raises
    ------
    UserError
        If files have changed or are gone, by their digests.
    """
    import pandas as pd

    starts, root = range(0, len(images), _CHUNK_IMAGES), os.path.abspath(os.fsencode(dataset))
    chunks = (images.iloc[start : start + _CHUNK_IMAGES] for start in starts)
    tasks = (
        (start, root, chunk["path"].tolist(), chunk["digest"].tolist())
        for start, chunk in zip(starts, chunks, strict=True)
    )
    found: dict[int, list[Facts | None]] = {}
    with (
        warnings.catch_warnings(action="ignore"),  # of Pillow, about damaged images
        progress((), total=len(images), unit="image", label="audit: originals") as bar,
    ):
        for start, chunk in map_unordered(read_chunk, tasks, len(starts), (white_level,)):
            found[start] = chunk
            bar.update(len(chunk))
    rows = list(itertools.chain.from_iterable(found[start] for start in starts))
    changed = images["path"][[row is None for row in rows]]
    if len(changed):
        raise UserError(
            f"{dataset}: {count(len(changed), 'file')} changed or gone since the last `dvc repro`:"
            f" {list_names(changed)}; run `dvc repro` again, then audit"
        )
    return pd.DataFrame(rows, images.index, Facts._fields)


def read_chunk(
    start: int, root: bytes, paths: Sequence[str], digests: Sequence[str], white_level: int
) -> tuple[int, list[Facts | None]]:
    """Read facts of a few images; None for a file whose digest is another, or that is gone.

    Parameters
    ----------
    start : int
        The position of the first image; it is returned with the results.
    root : bytes
        The folder of the dataset.
    paths, digests : sequence of str
    white_level : int
    """
    rows = []
    for path, digest in zip(paths, digests, strict=True):
        try:
            data = reader.read_bytes(os.path.join(root, path.encode()))
        except ImageError:
            data = b""
        is_same = reader.hash_bytes(data).hex() == digest
        rows.append(_facts(data, white_level) if is_same else None)
    return start, rows


def _facts(data: bytes, white_level: int) -> Facts:
    header = _header(data)
    side = min(_SIDE, max(header.size))  # it is never enlarged
    try:
        decoded = reader.decode(data, Preprocessing((side, side), "pad", white_level))
        small, (width, height) = decoded.fitted, decoded.size
    except ImageError:  # prepare could read it, perhaps larger: traces on white, the rest is clear
        small, (width, height) = Image.new("L", (side, side), "white"), header.size
    gray = small.convert("L")
    smooth = gray.filter(ImageFilter.BoxBlur(_COARSE))
    darkest, brightest = _percentiles(gray, 0.001, 0.99)
    small.thumbnail((_COLOR_SIDE, _COLOR_SIDE), Image.Resampling.BOX)
    colors = np.asarray(small.convert("RGB"), np.float32)
    red, green, blue = colors.mean((0, 1)).tolist()
    border = np.concatenate((colors[0], colors[-1], colors[1:-1, 0], colors[1:-1, -1])).mean(0)
    has_border = min(small.size) >= _LEAST_SIDE
    border_red, border_green, border_blue = border.tolist() if has_border else 3 * [math.nan]
    return Facts(
        width=width,
        height=height,
        file_bytes=len(data),
        format=header.format or "",
        mode=header.mode,
        quantization=sum(getattr(header, "quantization", {}).get(0, ())),
        camera=_camera(header),
        thumbnail=np.asarray(reader.thumbnail(gray)).tobytes(),
        darkest=darkest,
        brightest=brightest,
        contrast=ImageStat.Stat(gray).stddev[0],
        smooth_contrast=ImageStat.Stat(smooth).stddev[0],
        sharpness=_sharpness(gray),
        red=red,
        green=green,
        blue=blue,
        saturation=float(np.ptp(colors, axis=-1).mean()),
        border_red=border_red,
        border_green=border_green,
        border_blue=border_blue,
    )


def _header(data: bytes) -> ImageFile.ImageFile:
    try:
        return reader.open_image(data)
    except Exception:  # Pillow raises many kinds for damaged files
        return reader.open_image(repair(data))


def _camera(image: ImageFile.ImageFile) -> str:
    if image.format != "TIFF" and "exif" not in image.info:
        return ""  # a PNG would be decoded to look for it
    try:
        exif = image.getexif()
    except Exception:  # the pixels may be valid
        return ""
    names = (str(exif.get(tag, "")).strip("\0 ") for tag in (_MAKE_TAG, _MODEL_TAG))
    return " ".join(names).strip()


def _percentiles(image: Image.Image, *shares: float) -> list[int]:
    sums = np.cumsum(image.histogram())
    return np.searchsorted(sums, np.array(shares) * sums[-1]).tolist()


def _sharpness(gray: Image.Image) -> float:
    """Return the ratio of fine to coarse detail, across or down: where it is less, if it moved."""
    if min(gray.size) < _LEAST_SIDE:
        return math.nan
    ratios = []
    for across, down in ((1, 0), (0, 1)):
        smooth = gray.filter(ImageFilter.BoxBlur((_FINE * across, _FINE * down)))
        smoother = gray.filter(ImageFilter.BoxBlur((_COARSE * across, _COARSE * down)))
        (fine,) = _percentiles(ImageChops.difference(gray, smooth), _EDGES)
        (coarse,) = _percentiles(ImageChops.difference(smooth, smoother), _EDGES)
        ratios.append(fine / (coarse + _NOISE))
    return min(ratios)
