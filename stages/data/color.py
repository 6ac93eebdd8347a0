"""Colors, converted to sRGB where an image has an ICC profile."""

import functools
import io
import struct

import numpy as np
from PIL import Image, ImageCms

# Code points of H.273: primaries (unknown, of BT.709, of old television) and transfer functions
# (unknown, BT.709 and its relatives, sRGB) that viewers show as sRGB.
_PRIMARIES, _TRANSFERS = (1, 2, 5, 6, 7), (1, 2, 6, 13, 14, 15)
_GAMMA = 1 / 2.2  # of sRGB, as a PNG states it; libpng corrects deviations of more than 5 %
_CHROMATICITY = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)  # of sRGB: white, r, g, b


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert an image of mode L, RGB or CMYK from its ICC profile to sRGB, in mode L or RGB.

    A profile that is broken or made for another mode is ignored, as image viewers do.
    """
    transform = _srgb_transform(profile, image.mode) if profile else None
    mode = "L" if image.mode == "L" else "RGB"
    return (transform.apply(image) if transform else image).convert(mode)


@functools.lru_cache(maxsize=16)
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    try:
        return ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError):
        return None


def is_other_color(image: Image.Image, data: bytes) -> bool:
    """Return whether an image defines other colors than sRGB, but not by an ICC profile.

    These are code points (of PNG, HEIC and AVIF), and gamma with primaries (of PNG). Nothing
    converts them: tone mapping of PQ and HLG is a matter of taste, and the others are rare.
    """
    info, place, form = image.info, -1, ">HH"
    if info.get("icc_profile"):
        return False
    if image.format == "PNG":
        place, form = data.find(b"\0\0\0\4cICP", 0, data.find(b"IDAT")), ">BB"
    elif image.format in ("HEIF", "AVIF"):
        place = data.find(b"colrnclx")
    if place >= 0 and len(data) >= place + 12:
        primaries, transfer = struct.unpack_from(form, data, place + 8)
        return primaries not in _PRIMARIES or transfer not in _TRANSFERS
    if image.format != "PNG" or "gamma" not in info or "srgb" in info:
        return False
    colors = info.get("chromaticity", _CHROMATICITY)
    return abs(info["gamma"] / _GAMMA - 1) > 0.05 or not np.allclose(
        colors, _CHROMATICITY, rtol=0, atol=0.01
    )
