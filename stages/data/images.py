"""Decode and resize images: the one image reader of prepare and predict.

JPEGs of at least three times the requested size are decoded at a reduced scale (libjpeg's DCT
scaling), to at least 1.5 times that size: if a photograph of 400 x 533 becomes 128 x 128, a pixel
differs by 0.7 levels of 255 on average from a full decode, which takes twice as long. Colors are
converted from an embedded ICC profile to sRGB, but after resizing: at 128 x 128 that takes 1 ms,
instead of half a second for a photograph of 12 million pixels, and a pixel differs by 0.2 levels.
"""

import enum
import hashlib
import importlib
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pillow_heif
from PIL import Image, ImageFile, UnidentifiedImageError

from stages.data.color import is_other_color, to_srgb
from stages.data.depth import (
    MAX_VALUE,
    TRUNCATED,
    ImageError,
    read_deep,
    scale_palette,
    scale_transparent_gray,
    to_eight_bits,
    why_no_tiff,
)
from stages.data.formats import why_not_opened
from stages.data.repair import (
    ends_in_zeros,
    has_converted_lines,
    has_hole,
    has_wrong_checksum,
    lacks_its_end,
    lacks_pixels,
    repair,
)

if TYPE_CHECKING:
    from stages.data.arrays import ImageSpec

READER_VERSION = 9  # increment it when reading gives different pixels, notes or reasons
DARK_FRACTION = 0.25  # of the white level: images whose largest value is below look almost black

_EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".webp", ".bmp", ".dib", ".tif",
    ".tiff", ".pbm", ".pgm", ".ppm", ".pnm", ".avif", ".jp2", ".heic", ".heif", ".hif",
)  # fmt: skip
# The formats that are opened, with their plugins; some others of Pillow run external programs.
_PLUGINS = {
    "JPEG": "Jpeg", "PNG": "Png", "GIF": "Gif", "WEBP": "WebP", "BMP": "Bmp",
    "DIB": "Bmp", "TIFF": "Tiff", "PPM": "Ppm", "AVIF": "Avif", "JPEG2000": "Jpeg2K",
}  # fmt: skip
_FORMATS = (*_PLUGINS, "HEIF")
_JPEG = ("JPEG", "MPO")
for _plugin in (*_PLUGINS.values(), "Mpo"):  # some JPEGs of phones hold several images
    importlib.import_module(f"PIL.{_plugin}ImagePlugin")
pillow_heif.register_heif_opener()
_MIN_DECODE_SCALE = 1.5  # a JPEG is decoded at this many times the requested size, or more
THUMBNAIL_SIDE = 24  # pixels
# The size for which a JPEG is decoded to make its thumbnail: a usual one, so that this rarely takes
# a decoding of its own.
_THUMBNAIL_SOURCE = 128, 128
_ORIENTATION_TAG = 0x0112
_SAMPLES_TAG = 277  # of TIFF: how many bands there are
_PLAIN_LEVELS = 3  # of 255: a picture that spans no more is one plain shade
_SIDEWAYS = range(5, 9)  # EXIF orientations that swap height and width
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip


class Note(enum.IntFlag):
    """What a person should know of an image that was read."""

    TRANSPARENT = enum.auto()  # it has transparent parts, which become white
    PLAIN = enum.auto()  # it is one plain shade, once it is resized
    DARK = enum.auto()  # it has more than 8 bits per channel, and is almost black
    CLIPPED = enum.auto()  # it has values above the white level
    FIRST = enum.auto()  # it is the first of several pages or frames, or has bands left out
    OTHER_COLOR = enum.auto()  # its colors are defined in a way that is not converted to sRGB


class Preprocessing(NamedTuple):
    """How images become arrays of one size and of 8 bits.

    Attributes
    ----------
    image_size : sequence of int
        Height and width in pixels.
    resize : {"crop", "pad", "stretch"}
    white_level : int, default=65535
        The value that is white in images of more than 8 bits per channel.
    """

    image_size: Sequence[int]
    resize: str
    white_level: int = MAX_VALUE


class DecodedImage(NamedTuple):
    """A decoded image.

    Attributes
    ----------
    fitted : Image
        Resized, in mode L or RGB; with ``"pad"`` one side may be smaller, since bars come later.
    size : tuple of int
        Width and height of the original as it is seen: upright.
    peak : int
        The largest value of an image of more than 8 bits per channel, before scaling; otherwise 0.
    thumbnail : bytes
        The whole image in gray, stretched to 24 x 24 pixels; it depends on nothing but the file.
        Empty if it was not asked for.
    notes : Note
    """

    fitted: Image.Image
    size: tuple[int, int]
    peak: int
    thumbnail: bytes
    notes: Note


def is_image_name(name: str) -> bool:
    """Return whether a file name has an image extension and is not hidden."""
    return not name.startswith(".") and name.lower().endswith(_EXTENSIONS)


def read_image(file: str | Path | bytes, spec: "ImageSpec") -> tuple[np.ndarray, Note]:
    """Read one image as the network takes it.

    Parameters
    ----------
    file : path or bytes
        An image file, or its content.
    spec : ImageSpec
        The size; ``color_mode``: grayscale is ITU-R 601-2 luma, as Pillow computes it, of the
        resized image; ``resize``, for another aspect ratio: the center is cropped, black bars are
        added, or the image is distorted, all three bicubic with antialiasing; ``white_level``.

    Returns
    -------
    image : uint8 array of shape (height, width, 3 or 1)
    notes : Note

    Raises
    ------
    ImageError
        If the image can't be read, or nothing is left of it on white or below the white level.
    """
    data = file if isinstance(file, bytes) else read_bytes(file)
    image_size = spec.image_shape[:2]
    decoded = decode(data, Preprocessing(image_size, spec.resize, spec.white_level))
    return in_color_mode(to_array(decoded.fitted, image_size), spec.color_mode), decoded.notes


def read_size(path: str | Path) -> tuple[int, int]:
    """Return the width and height that an image file states; its pixels are not read.

    Raises
    ------
    ImageError
        If it can't be opened.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            return image.size
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise ImageError(_reason(error, read_bytes(path))) from None


def read_bytes(path: str | bytes | Path) -> bytes:
    """Read a file's content.

    Raises
    ------
    ImageError
        If it can't be read.
    """
    if not os.path.isfile(path):
        target = os.readlink(os.fsencode(path)) if os.path.islink(path) else b""
        is_annexed = b".git/annex/objects/" in target
        raise ImageError(why_not_opened(target) if is_annexed else "not a file, or a broken link")
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except PermissionError:
        raise ImageError("no permission to read it") from None
    except OSError as error:
        raise ImageError(f"can't be read: {error.strerror}") from None


def hash_bytes(data: bytes) -> bytes:
    """Return the digest of a file's content (BLAKE2b, 16 bytes)."""
    return hashlib.blake2b(data, digest_size=16).digest()


def open_image(data: bytes) -> ImageFile.ImageFile:
    """Open an image by its header; its pixels are not read yet. Pillow's errors are not caught."""
    return Image.open(io.BytesIO(data), formats=_FORMATS)


def decode(data: bytes, preprocessing: Preprocessing, with_thumbnail: bool = False) -> DecodedImage:
    """Decode an image (its first frame, upright, in sRGB) and resize it.

    The caller has to silence Pillow's warnings: to do so here would not be thread-safe.

    Parameters
    ----------
    data : bytes
        A file's content.
    preprocessing : Preprocessing
    with_thumbnail : bool, default=False

    Raises
    ------
    ImageError
    """
    try:
        return _decode(data, preprocessing, with_thumbnail)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # Pillow raises many kinds for damaged files
        reason = _reason(error, data)
    try:
        return _decode(repair(data), preprocessing, with_thumbnail)
    except (ImageError, MemoryError):
        raise
    except Exception:
        raise ImageError(reason) from None


def _decode(data: bytes, preprocessing: Preprocessing, with_thumbnail: bool) -> DecodedImage:
    image_size, resize, white_level = preprocessing
    opened = open_image(data)
    size = opened.size
    if opened.format in ("HEIF", "AVIF", "WEBP") and lacks_its_end(data):
        raise ImageError(TRUNCATED)
    if opened.format in _JPEG and has_converted_lines(data):
        raise ImageError("damaged: line ends were converted; copy it again, as a binary file")
    notes = Note.FIRST * _is_first_of_several(opened, data)
    scale, thumbnail_scale = _scale(opened, image_size), _scale(opened, _THUMBNAIL_SOURCE)
    extent = _reduce(opened, scale)
    samples = read_deep(opened, data)
    scale_transparent_gray(opened)
    scale_palette(opened)
    frame = opened.tile[0].extents if opened.format == "GIF" else None
    opened.load()
    if _may_lack_pixels(opened) and lacks_pixels(data):
        raise ImageError(TRUNCATED)
    if opened.format in _JPEG and (has_hole(data) or ends_in_zeros(data)):
        raise ImageError("damaged: zeros in place of some of its pixels; copy it again")
    if opened.format == "PNG" and has_wrong_checksum(data):
        raise ImageError("damaged: the checksum of its pixels is wrong; copy it again")
    orientation, profile = _orientation(opened), opened.info.get("icc_profile")
    image: Image.Image = opened
    peak = 0
    if samples is not None:
        image, peak = to_eight_bits(opened, samples, white_level)
        notes |= Note.DARK * (peak <= white_level * DARK_FRACTION)
        notes |= Note.CLIPPED * (peak > white_level)
    if frame:
        image = _on_canvas(opened, frame)
    opaque, is_transparent = _opaque(image, keep_cmyk=profile is not None)
    fitted = resize_image(opaque, _upright(image_size, orientation), resize, extent)
    fitted = to_srgb(fitted, profile)
    is_plain = _is_plain(fitted)
    if is_plain and is_transparent:
        raise ImageError(
            "one plain shade on white, as the rest is transparent: save it without an alpha channel"
        )
    notes |= Note.TRANSPARENT * is_transparent | Note.PLAIN * is_plain
    notes |= Note.OTHER_COLOR * is_other_color(opened, data)
    small = None
    if with_thumbnail and scale == thumbnail_scale:
        small = thumbnail(opaque, extent)
    elif with_thumbnail:
        again = open_image(data)
        small = thumbnail(again, _reduce(again, thumbnail_scale))
    if orientation in _TRANSPOSES:
        fitted = fitted.transpose(_TRANSPOSES[orientation])
        small = small and small.transpose(_TRANSPOSES[orientation])
    seen = small.tobytes() if small else b""
    return DecodedImage(fitted, _upright(size, orientation), peak, seen, Note(notes))


def _reason(error: Exception, data: bytes) -> str:
    """Say why an image can't be decoded, and what a person can do."""
    if not data:
        return "empty file"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels: save it smaller"
    if isinstance(error, UnidentifiedImageError):
        return (
            why_not_opened(data)
            or why_no_tiff(data)
            or "not an image of a supported format, or damaged at its start"
        )
    message = str(error)
    if "truncated" in message or "end of file" in message or isinstance(error, EOFError):
        return TRUNCATED
    return (
        "damaged, or of a kind that is not supported: copy it again, or save it as PNG with another"
        " program"
    )


def _scale(image: ImageFile.ImageFile, image_size: Sequence[int]) -> int:
    """Return by how much an image is shrunk as it is decoded: 1, or up to 8 for a large JPEG."""
    if image.format not in _JPEG:
        return 1
    least = _upright(
        [math.ceil(_MIN_DECODE_SCALE * side) for side in image_size], _orientation(image)
    )
    scale = min(image.height // least[0], image.width // least[1])
    return next((factor for factor in (8, 4, 2) if scale >= factor), 1)


def _reduce(image: ImageFile.ImageFile, scale: int) -> tuple[float, float] | None:
    """Let a JPEG be decoded at a reduced scale; return its exact size in that scale."""
    if scale == 1:
        return None
    reduced = image.draft(None, (image.width // scale, image.height // scale))
    return reduced and reduced[1][2:]  # without the last pixels, which are partly padding


def _upright(sides: Sequence[int], orientation: int) -> tuple[int, int]:
    first, second = sides
    return (second, first) if orientation in _SIDEWAYS else (first, second)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1 (upright) where it can't be read.

    It is complete once the image is loaded; in a JPEG it comes before the pixels, if at all.
    """
    if image.format in _JPEG and not {"exif", "xmp"} & image.info.keys():
        return 1
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # the pixels may be valid
        return 1


def _may_lack_pixels(image: Image.Image) -> bool:
    """Return whether a baseline JPEG ends in mid-gray, which decoders put for missing pixels."""
    if image.format not in _JPEG or "progressive" in image.info:
        return False
    last = image.getpixel((image.width - 1, image.height - 1))
    return {127, 128}.issuperset(last if isinstance(last, tuple) else (last,))


def _on_canvas(image: Image.Image, frame: tuple[int, int, int, int]) -> Image.Image:
    """Return a GIF with white around its first frame, as browsers show it, instead of color 0."""
    if frame == (0, 0, *image.size) or "transparency" in image.info:
        return image
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(image.crop(frame).convert("RGB"), frame)
    return canvas


def _opaque(image: Image.Image, keep_cmyk: bool) -> tuple[Image.Image, bool]:
    """Convert an image of 8 bits to mode L or RGB (or CMYK), transparent parts to white.

    Return also whether there are transparent parts.
    """
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
        image = image.convert(f"{mode}A")
        flat, alpha = Image.new(mode, image.size, "white"), image.getchannel("A")
        flat.paste(image.convert(mode), mask=alpha)
        return flat, alpha.getextrema() != (255, 255)
    if image.mode in ("L", "RGB") or (keep_cmyk and image.mode == "CMYK"):
        return image, False
    return image.convert("L" if image.mode == "1" else "RGB"), False


def _is_plain(image: Image.Image) -> bool:
    extrema = (image.getchannel(band).getextrema() for band in image.getbands())
    return all(np.subtract(high, low) <= _PLAIN_LEVELS for low, high in extrema)


def _is_first_of_several(image: Image.Image, data: bytes) -> bool:
    """Return whether a file has pages, frames or bands that are not read.

    The pictures that phones put behind a JPEG show the same, so they don't count.
    """
    if image.format in _JPEG:
        return False
    try:
        if image.format == "GIF":  # which has to look for a second frame
            image = Image.open(io.BytesIO(data), formats=["GIF"])
        bands = getattr(image, "tag_v2", {}).get(_SAMPLES_TAG, 1)  # of a TIFF
        return bool(getattr(image, "is_animated", False)) or bands > len(image.getbands())
    except Exception:  # the first frame may be intact
        return False


def resize_image(
    image: Image.Image,
    image_size: Sequence[int],
    resize: str,
    extent: tuple[float, float] | None = None,
) -> Image.Image:
    """Resize an image; `extent` is its width and height if the last pixels are padding."""
    height, width = image_size
    right, bottom = extent or image.size
    across, down = right / width, bottom / height
    box = 0.0, 0.0, float(right), float(bottom)
    if resize == "pad":
        scale = max(across, down)
        width = max(1, round(right / scale))
        height = max(1, round(bottom / scale))
    elif resize == "crop":
        scale = min(across, down)
        # Rounding may bring one of them below zero, which Pillow refuses.
        left = max(0.0, right - scale * width) / 2
        top = max(0.0, bottom - scale * height) / 2
        box = left, top, right - left, bottom - top
    if (width, height) == image.size and box == (0, 0, width, height):
        return image
    return image.resize((width, height), Image.Resampling.BICUBIC, box)


def thumbnail(image: Image.Image, extent: tuple[float, float] | None = None) -> Image.Image:
    """Return an image in gray, stretched to 24 x 24 pixels; `extent` as in `resize_image`."""
    box = (0.0, 0.0, *(extent or image.size))
    side, resample = THUMBNAIL_SIDE, Image.Resampling.BILINEAR
    return image.convert("L").resize((side, side), resample, box, reducing_gap=3.0)


def to_array(fitted: Image.Image, image_size: Sequence[int]) -> np.ndarray:
    """Return the pixels of a resized image, with black bars where it is smaller than the size.

    Returns
    -------
    pixels : uint8 array of shape (height, width, 1 or 3)
        One channel if every pixel is gray.
    """
    height, width = image_size
    if fitted.size != (width, height):
        padded = Image.new(fitted.mode, (width, height))
        padded.paste(fitted, ((width - fitted.width) // 2, (height - fitted.height) // 2))
        fitted = padded
    pixels = np.asarray(fitted)
    if pixels.ndim == 2:
        return pixels[..., None]
    # The first row is enough to recognize most color images.
    is_gray = all((part[..., 1:] == part[..., :1]).all() for part in (pixels[:1], pixels))
    return pixels[..., :1] if is_gray else pixels


def in_color_mode(pixels: np.ndarray, color_mode: str) -> np.ndarray:
    """Convert pixels of 1 or 3 channels to those of a color mode."""
    if color_mode == "rgb":
        return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels
    if pixels.shape[-1] == 1:
        return pixels
    return np.asarray(Image.fromarray(pixels).convert("L"))[..., None]
