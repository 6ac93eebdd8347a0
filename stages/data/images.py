"""The one image reader: prepare and predict see an image alike.

JPEGs that are shrunk a lot are decoded at a reduced scale (libjpeg's DCT scaling), at least twice
the size that is asked for: on photographs of 400 x 533, a pixel differs by 0.3 levels of 255 on
average from a full decode. Colour profiles are not applied.
"""

import importlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

READER_VERSION = 4  # changes whenever the pixels that an image gives change

_NAMES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".webp", ".bmp", ".dib", ".tif",
    ".tiff", ".pbm", ".pgm", ".ppm", ".pnm", ".avif", ".jp2", ".heic", ".heif",
)  # fmt: skip
_HEIC = (b".heic", b".heif")
# The formats that are opened; Pillow knows others, some of which run programs.
_FORMATS = {
    "JPEG": "Jpeg", "PNG": "Png", "GIF": "Gif", "WEBP": "WebP", "BMP": "Bmp",
    "DIB": "Bmp", "TIFF": "Tiff", "PPM": "Ppm", "AVIF": "Avif", "JPEG2000": "Jpeg2K",
}  # fmt: skip
_KINDS = tuple(_FORMATS)
for _plugin in (*_FORMATS.values(), "Mpo"):  # some JPEGs of phones hold several pictures
    importlib.import_module(f"PIL.{_plugin}ImagePlugin")
_HEADROOM = 2  # a JPEG is decoded at this many times the target's size, or more
_ORIENTATION = 0x0112
_TURNED = range(5, 9)  # orientations that swap height and width
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip


class Preprocessing(NamedTuple):
    """How images are resized.

    Attributes
    ----------
    image_size : sequence of int
        Height and width in pixels.
    resize : {"crop", "pad", "stretch"}
    """

    image_size: Sequence[int]
    resize: str


class ImageError(Exception):
    """An image that can't be read. Its text is a short reason, without the file's name."""


def is_image_name(name: str) -> bool:
    """Tell an image from other files by its name; hidden files are no images."""
    return not name.startswith(".") and name.lower().endswith(_NAMES)


def read_image(
    file: str | Path | bytes, image_size: tuple[int, int], color_mode: str, resize: str
) -> np.ndarray:
    """Read one image as the network takes it.

    Parameters
    ----------
    file : path or bytes
        An image file, or its content.
    image_size : tuple of int
        Height and width.
    color_mode : {"rgb", "grayscale"}
        Grayscale is ITU-R 601-2 luma, as Pillow computes it, of the resized image.
    resize : {"crop", "pad", "stretch"}
        How an image of another shape is fitted: its centre is cut out, black bars are added, or
        it is distorted. All three are bicubic with antialiasing.

    Returns
    -------
    image : uint8 array of shape (height, width, 3 or 1)

    Raises
    ------
    ImageError
        With a short reason, if this is not an image that can be read.
    """
    data = file if isinstance(file, bytes) else read_bytes(file)
    fitted, _ = decode(data, image_size, resize)
    return in_color_mode(to_array(fitted, image_size), color_mode)


def read_bytes(path: str | bytes | Path) -> bytes:
    """Read a file's content.

    Raises
    ------
    ImageError
        If it can't be read, or its name says that Pillow can't decode it.
    """
    if os.fsencode(path).lower().endswith(_HEIC):
        raise ImageError("HEIC can't be read: convert it to JPEG")
    if not os.path.isfile(path):
        raise ImageError("not a file, or a link to nothing")
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except PermissionError:
        raise ImageError("no permission to read it") from None


def decode(
    data: bytes, image_size: tuple[int, int], resize: str
) -> tuple[Image.Image, tuple[int, int]]:
    """Decode a picture: its first frame, upright, in mode L or RGB, and bring it to a size.

    Pillow's warnings are the caller's to silence: doing so here would not be safe with threads.

    Parameters
    ----------
    data : bytes
        A file's content.
    image_size : tuple of int
        Height and width; with ``"pad"`` one side may be smaller, since bars come later.
    resize : str

    Returns
    -------
    fitted : Image
    size : tuple of int
        The file's own width and height.

    Raises
    ------
    ImageError
    """
    if not data:
        raise ImageError("empty file")
    try:
        image = Image.open(io.BytesIO(data), formats=_KINDS)
        size = image.size
        extent = None
        if image.format in ("JPEG", "MPO"):
            # The orientation is told before the pixels, if at all.
            known = "exif" in image.info or "xmp" in image.info
            orientation = _orientation(image) if known else 1
            height, width = image_size[::-1] if orientation in _TURNED else image_size
            if size[0] >= 2 * _HEADROOM * width and size[1] >= 2 * _HEADROOM * height:
                # What the picture takes of the pixels: a part of the last ones is padding.
                reduced = image.draft(None, (_HEADROOM * width, _HEADROOM * height))
                extent = reduced and reduced[1][2:]
            image.load()
        else:
            image.load()
            orientation = _orientation(image)
        if orientation in _TURNED:
            image_size = image_size[::-1]
        fitted = resize_image(_flat(image), image_size, resize, extent)
        turn = _UPRIGHT.get(orientation)
        return fitted if turn is None else fitted.transpose(turn), size
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise ImageError("not an image") from None
    except Image.DecompressionBombError:
        raise ImageError("too many pixels") from None
    except Exception as error:  # Pillow raises many kinds for damaged files
        cut = "truncated" in str(error) or isinstance(error, EOFError)
        raise ImageError("truncated" if cut else "damaged") from None


def _orientation(image: Image.Image) -> int:
    """Return an image's EXIF orientation; 1, upright, where that can't be read."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # the picture itself may well be sound
        return 1


def _flat(image: Image.Image) -> Image.Image:
    """Return an image of any mode in mode L or RGB, transparent parts on white."""
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return _eight_bits(image)
    if image.mode == "F":
        raise ImageError("floating-point pixels: convert it to 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        flat = Image.new("RGB", image.size, "white")
        flat.paste(image.convert("RGB"), mask=alpha)
        return flat
    return image.convert("L" if image.mode == "1" else "RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits."""
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ImageError("32-bit pixels: convert it to 8 or 16 bits")
    return Image.fromarray(((pixels + 128) // 257).astype(np.uint8))


def resize_image(
    picture: Image.Image,
    image_size: tuple[int, int],
    resize: str,
    extent: tuple[float, float] | None = None,
) -> Image.Image:
    """Bring a picture to a size; `extent` is its width and height if not all pixels are its own."""
    height, width = image_size
    right, bottom = extent or picture.size
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
    if (width, height) == picture.size and box == (0, 0, width, height):
        return picture
    return picture.resize((width, height), Image.Resampling.BICUBIC, box)


def to_array(fitted: Image.Image, image_size: tuple[int, int]) -> np.ndarray:
    """Return a fitted picture's pixels, between black bars where it is smaller than the size.

    Returns
    -------
    row : uint8 array of shape (height, width, 1 or 3)
        One channel if every pixel is grey.
    """
    height, width = image_size
    if fitted.size != (width, height):
        padded = Image.new(fitted.mode, (width, height))
        padded.paste(fitted, ((width - fitted.width) // 2, (height - fitted.height) // 2))
        fitted = padded
    row = np.asarray(fitted)
    if row.ndim == 2:
        return row[..., None]
    grey = all((part[..., 1:] == part[..., :1]).all() for part in (row[:1], row))  # few, then all
    return row[..., :1] if grey else row


def in_color_mode(row: np.ndarray, color_mode: str) -> np.ndarray:
    """Give a row the channels of a colour mode."""
    if color_mode == "rgb":
        return np.repeat(row, 3, axis=-1) if row.shape[-1] == 1 else row
    if row.shape[-1] == 1:
        return row
    return np.asarray(Image.fromarray(row).convert("L"))[..., None]
