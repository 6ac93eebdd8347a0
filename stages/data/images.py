"""Decode and resize images: the one image reader of prepare and predict.

JPEGs that are shrunk a lot are decoded at a reduced scale (libjpeg's DCT scaling), at least twice
the requested size: on photographs of 400 x 533, a pixel differs by 0.3 levels of 255 on average
from a full decode. Colour profiles are not applied.
"""

import importlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

READER_VERSION = 5  # increment it when reading gives different pixels

_EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".webp", ".bmp", ".dib", ".tif",
    ".tiff", ".pbm", ".pgm", ".ppm", ".pnm", ".avif", ".jp2", ".heic", ".heif",
)  # fmt: skip
_HEIC = (b".heic", b".heif")
# The formats that are opened, with their plugins; some others of Pillow run external programs.
_PLUGINS = {
    "JPEG": "Jpeg", "PNG": "Png", "GIF": "Gif", "WEBP": "WebP", "BMP": "Bmp",
    "DIB": "Bmp", "TIFF": "Tiff", "PPM": "Ppm", "AVIF": "Avif", "JPEG2000": "Jpeg2K",
}  # fmt: skip
_FORMATS = tuple(_PLUGINS)
for _plugin in (*_PLUGINS.values(), "Mpo"):  # some JPEGs of phones hold several images
    importlib.import_module(f"PIL.{_plugin}ImagePlugin")
_MIN_DECODE_SCALE = 2  # a JPEG is decoded at this many times the requested size, or more
THUMBNAIL_SIDE = 24  # pixels
_ORIENTATION_TAG = 0x0112
_SIDEWAYS = range(5, 9)  # EXIF orientations that swap height and width
_TRANSPOSES = {
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


class Picture(NamedTuple):
    """A decoded image.

    Attributes
    ----------
    fitted : Image
        Upright, in mode L or RGB, resized.
    size : tuple of int
        The file's own width and height.
    thumbnail : uint8 array of shape (24, 24), or None
        The whole image in grey, stretched to a square. None if the file is a JPEG that was decoded
        at another scale than its thumbnail is: so it depends on nothing but the file.
    """

    fitted: Image.Image
    size: tuple[int, int]
    thumbnail: np.ndarray | None


class ImageError(Exception):
    """An image that can't be read. The message is a short reason, without the file's name."""


def is_image_name(name: str) -> bool:
    """Return whether a file name has an image extension and is not hidden."""
    return not name.startswith(".") and name.lower().endswith(_EXTENSIONS)


def read_image(
    file: str | Path | bytes, image_size: Sequence[int], color_mode: str, resize: str
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
        How another aspect ratio is handled: the centre is cropped, black bars are added, or
        the image is distorted. All three are bicubic with antialiasing.

    Returns
    -------
    image : uint8 array of shape (height, width, 3 or 1)

    Raises
    ------
    ImageError
        If the image can't be read.
    """
    data = file if isinstance(file, bytes) else read_bytes(file)
    fitted = decode(data, image_size, resize).fitted
    return in_color_mode(to_array(fitted, image_size), color_mode)


def read_bytes(path: str | bytes | Path) -> bytes:
    """Read a file's content.

    Raises
    ------
    ImageError
        If it can't be read, or its extension is of a format that can't be decoded.
    """
    if os.fsencode(path).lower().endswith(_HEIC):
        raise ImageError("HEIC can't be read: convert it to JPEG")
    if not os.path.isfile(path):
        raise ImageError("not a file, or a broken link")
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except PermissionError:
        raise ImageError("no permission to read it") from None
    except OSError as error:
        raise ImageError(f"can't be read: {error.strerror}") from None


def decode(data: bytes, image_size: Sequence[int], resize: str) -> Picture:
    """Decode an image (its first frame, upright, in mode L or RGB) and resize it.

    The caller has to silence Pillow's warnings: to do so here would not be thread-safe.

    Parameters
    ----------
    data : bytes
        A file's content.
    image_size : tuple of int
        Height and width; with ``"pad"`` one side may be smaller, since bars come later.
    resize : str

    Raises
    ------
    ImageError
    """
    if not data:
        raise ImageError("empty file")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        size = image.size
        extent, has_thumbnail = None, True
        if image.format in ("JPEG", "MPO"):
            # The orientation comes before the pixels, if at all.
            known = "exif" in image.info or "xmp" in image.info
            orientation = _orientation(image) if known else 1
            height, width = image_size[::-1] if orientation in _SIDEWAYS else image_size
            if (
                size[0] >= 2 * _MIN_DECODE_SCALE * width
                and size[1] >= 2 * _MIN_DECODE_SCALE * height
            ):
                # The image's size within the decoded pixels: the last ones are partly padding.
                reduced = image.draft(None, (_MIN_DECODE_SCALE * width, _MIN_DECODE_SCALE * height))
                extent = reduced and reduced[1][2:]
            image.load()
            square = (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
            has_thumbnail = _reduction(size, (width, height)) == _reduction(size, square)
        else:
            image.load()
            orientation = _orientation(image)
        if orientation in _SIDEWAYS:
            image_size = image_size[::-1]
        flat = _to_l_or_rgb(image)
        fitted = resize_image(flat, image_size, resize, extent)
        small = thumbnail(flat, extent) if has_thumbnail else None
        if orientation in _TRANSPOSES:
            fitted = fitted.transpose(_TRANSPOSES[orientation])
            small = None if small is None else small.transpose(_TRANSPOSES[orientation])
        return Picture(fitted, size, None if small is None else np.asarray(small))
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise ImageError("not an image") from None
    except Image.DecompressionBombError:
        raise ImageError("too many pixels") from None
    except Exception as error:  # Pillow raises many kinds for damaged files
        cut = "truncated" in str(error) or isinstance(error, EOFError)
        raise ImageError("truncated" if cut else "damaged") from None


def _reduction(size: tuple[int, int], wanted: tuple[int, int]) -> int:
    """Return the factor by which a JPEG is shrunk as it is decoded, given width and height."""
    scale = min(has // (_MIN_DECODE_SCALE * side) for has, side in zip(size, wanted, strict=True))
    return next((factor for factor in (8, 4, 2) if scale >= factor), 1)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1 (upright) where it can't be read."""
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # the pixels may be valid
        return 1


def _to_l_or_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to mode L or RGB, transparent parts to white."""
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
    """Return an image in grey, stretched to 24 x 24 pixels; `extent` as in `resize_image`."""
    box = (0.0, 0.0, *(extent or image.size))
    side, resample = THUMBNAIL_SIDE, Image.Resampling.BILINEAR
    return image.convert("L").resize((side, side), resample, box, reducing_gap=2.0)


def to_array(fitted: Image.Image, image_size: Sequence[int]) -> np.ndarray:
    """Return the pixels of a resized image, with black bars where it is smaller than the size.

    Returns
    -------
    pixels : uint8 array of shape (height, width, 1 or 3)
        One channel if every pixel is grey.
    """
    height, width = image_size
    if fitted.size != (width, height):
        padded = Image.new(fitted.mode, (width, height))
        padded.paste(fitted, ((width - fitted.width) // 2, (height - fitted.height) // 2))
        fitted = padded
    pixels = np.asarray(fitted)
    if pixels.ndim == 2:
        return pixels[..., None]
    # The first row is enough to recognise most colour images.
    is_grey = all((part[..., 1:] == part[..., :1]).all() for part in (pixels[:1], pixels))
    return pixels[..., :1] if is_grey else pixels


def in_color_mode(pixels: np.ndarray, color_mode: str) -> np.ndarray:
    """Convert pixels of 1 or 3 channels to those of a colour mode."""
    if color_mode == "rgb":
        return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels
    if pixels.shape[-1] == 1:
        return pixels
    return np.asarray(Image.fromarray(pixels).convert("L"))[..., None]
