"""Pixels of any depth, scaled to 8 bits.

All images of a dataset have the same scale: ``white_level`` is the value that becomes 255.
"""

import io
import sys
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageFile, ImagePalette, TiffImagePlugin

MAX_VALUE = 65535  # of 16 bits
_BITS, _PHOTOMETRIC, _PLANAR, _FORMAT = 258, 262, 284, 339  # tags of TIFF
_COLORS = 320
_OFFSETS, _COUNTS = (273, 324), (279, 325)  # of the data: in strips, or in tiles
_SAMPLE_FORMATS = {1: "unsigned", 2: "signed", 3: "floating-point"}
_START_OF_JPEG2000 = b"\xff\x4f\xff\x51"  # two markers: the codestream, its size
# Pillow's 16-bit layouts of which it keeps the high bytes only: what gives the low bytes instead.
_LOW_BYTES = {
    "16L": "16B", "16B": "16L", "16N": "16B" if sys.byteorder == "little" else "16L"
}  # fmt: skip
TRUNCATED = "truncated: its end is missing; copy it again"


class ImageError(Exception):
    """An image that can't be read. The message is a short reason, without the file's name."""


def read_deep(image: ImageFile.ImageFile, data: bytes) -> np.ndarray | None:
    """Return the samples of an image of more than 8 bits per channel.

    Of 16-bit color, Pillow gives the high bytes only. The low ones come from a second reading, in
    the other byte order.

    Returns
    -------
    samples : int array of shape (height, width, 1 to 4), or None
        Gray or colors, and perhaps alpha. None for an image of 8 bits, and for the rare CMYK and
        premultiplied alpha of 16 bits.
    """
    _check_samples(image, data)
    if image.mode.startswith("I"):
        return np.asarray(image)[..., None]
    layout, _, depth = _raw_mode(image).partition(";")
    if layout == "LA" and depth == "16B":
        _set_raw_mode(image, "RGBA")  # four bytes per pixel as they are
        pixels = np.asarray(image).astype(np.int32)
        return pixels[..., ::2] * 256 + pixels[..., 1::2]
    if layout in ("RGB", "RGBX", "RGBA") and depth in _LOW_BYTES:
        low = Image.open(io.BytesIO(data), formats=["PNG", "TIFF"])
        _set_raw_mode(low, f"{layout};{_LOW_BYTES[depth]}")
        return np.asarray(image).astype(np.int32) * 256 + np.asarray(low)
    return None


def _check_samples(image: ImageFile.ImageFile, data: bytes) -> None:
    if image.mode == "F":
        raise ImageError("floating-point pixels: convert it to 8 or 16 bits")
    if image.format == "JPEG2000":
        depth, is_signed = _jpeg2000_depth(data)
        if is_signed:  # Pillow adds half of the range
            raise ImageError(f"signed {depth}-bit pixels: convert it to unsigned {depth} bits")
        if depth > 8 and image.mode != "I;16":  # rounded to 8 bits, white overflows to black
            raise ImageError(f"a JPEG 2000 of {depth}-bit {image.mode} pixels: save it as PNG")
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return
    bits = image.tag_v2.get(_BITS, (1,))
    if max(bits) > 8 and len(bits) > 1 and image.tag_v2.get(_PLANAR) == 2:
        raise ImageError("a TIFF of 16 bits that stores its bands one by one: save it as PNG")
    if max(bits) == 8 and image.tag_v2.get(_FORMAT, (1,))[0] == 2:
        raise ImageError("signed 8-bit pixels: convert it to unsigned 8 bits")
    if image.tile and image.tile[0].codec_name == "libtiff":  # it would write to stderr
        offsets, counts = (_first(image.tag_v2, tags) for tags in (_OFFSETS, _COUNTS))
        if any(start + count > len(data) for start, count in zip(offsets, counts, strict=False)):
            raise ImageError(TRUNCATED)


def _first(directory: TiffImagePlugin.ImageFileDirectory_v2, tags: Iterable[int]) -> tuple:
    """Return the values of the first of these tags that is there."""
    return next((directory[tag] for tag in tags if tag in directory), ())


def _jpeg2000_depth(data: bytes) -> tuple[int, bool]:
    """Return the largest number of bits of a channel, and whether one of them is signed."""
    header = data[data.find(_START_OF_JPEG2000) :]
    channels = int.from_bytes(header[40:42], "big")
    kinds = header[42 : 42 + 3 * channels : 3]
    return 1 + max((kind & 0x7F for kind in kinds), default=0), any(kind & 0x80 for kind in kinds)


def _raw_mode(image: ImageFile.ImageFile) -> str:
    """Return how pixels are laid out in the file, by Pillow's name; "" where it has none."""
    arguments = image.tile[0].args if image.tile else ""
    first = arguments if isinstance(arguments, str) else next(iter(arguments or ()), "")
    return first if isinstance(first, str) else ""


def _set_raw_mode(image: ImageFile.ImageFile, raw_mode: str) -> None:
    tiles = []
    for tile in image.tile:
        others = () if isinstance(tile.args, str) else (tile.args or ())[1:]
        arguments = (raw_mode, *others) if others else raw_mode
        tiles.append(type(tile)(tile.codec_name, tile.extents, tile.offset, arguments))
    image.tile = tiles


def scale_transparent_gray(image: ImageFile.ImageFile) -> None:
    """Scale the transparent gray level of a PNG of 2 or 4 bits to 8 bits, as Pillow scales pixels.

    Call it before the pixels are loaded.
    """
    layout, _, depth = _raw_mode(image).partition(";")
    if layout == "L" and depth in ("2", "4") and "transparency" in image.info:
        white = 2 ** int(depth) - 1
        image.info["transparency"] = (image.info["transparency"] & white) * 255 // white


def scale_palette(image: ImageFile.ImageFile) -> None:
    """Take the colors of a TIFF's palette for 8-bit values if none is larger, as libtiff does.

    Call it before the pixels are loaded.
    """
    colors = getattr(image, "tag_v2", {}).get(_COLORS, ())
    if image.mode == "P" and colors and max(colors) < 256:
        image.palette = ImagePalette.raw("RGB;L", bytes(colors))


def to_eight_bits(
    image: ImageFile.ImageFile, samples: np.ndarray, white_level: int
) -> tuple[Image.Image, int]:
    """Scale the samples of an image to 8 bits; return the new image and their largest value."""
    bands = 1 if samples.shape[-1] < 3 else 3
    values, alpha = samples[..., :bands], samples[..., bands:]
    peak = int(values.max())
    if values.min() < 0 or peak > MAX_VALUE:
        raise ImageError(f"pixels outside 0 to {MAX_VALUE}: convert it to 8 or 16 bits")
    if values.min() >= white_level and peak > white_level:
        raise ImageError(
            f"plain white, as all its values are above prepare.white_level ({white_level}): set it,"
            f" for instance, to {2 ** peak.bit_length() - 1}, or save the image on that scale"
        )
    levels = np.minimum(np.arange(MAX_VALUE + 1), white_level)
    levels = ((255 * levels + white_level // 2) // white_level).astype(np.uint8)
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC) == 0:
        levels = 255 - levels  # 0 is white
    pixels = levels[values]
    scaled = Image.fromarray(pixels[..., 0] if bands == 1 else pixels)
    clear = image.info.get("transparency")  # one value, or one color
    if clear is not None:
        alpha = np.where((values == clear).all(axis=-1, keepdims=True), 0, MAX_VALUE)
    if alpha.size:
        scaled.putalpha(Image.fromarray(((alpha[..., 0] + 128) // 257).astype(np.uint8)))
    return scaled, peak


def why_no_tiff(data: bytes) -> str:
    """Say why a TIFF can't be opened; an empty string for another content, or unknown damage."""
    if data.startswith(b"MM\0+"):
        return "a BigTIFF in big-endian order: save it as a plain TIFF or PNG"
    if not data.startswith((b"II*\0", b"MM\0*", b"II+\0")):
        return ""
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if data[2:3] == b"+" else 8])
        file = io.BytesIO(data)
        file.seek(tags.next)
        tags.load(file)
        bits = tags.get(_BITS, (1,))
        kind = _SAMPLE_FORMATS.get(tags.get(_FORMAT, (1,))[0], "unknown")
        photometric, offsets = tags.get(_PHOTOMETRIC), _first(tags, _OFFSETS)
    except Exception:  # Pillow raises many kinds for damaged files
        return ""
    if photometric is None or not offsets or (photometric == 3 and _COLORS not in tags):
        return TRUNCATED  # the directory is often at the end, and its longer values after it
    bands = f"{len(bits)} band{'s' * (len(bits) > 1)}"
    kind = f"{bands} of {max(bits)}-bit {kind} values, photometric interpretation {photometric}"
    return f"a TIFF that is not supported ({kind}): save it as 8-bit or 16-bit PNG"
