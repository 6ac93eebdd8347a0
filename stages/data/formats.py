"""What a file is that can't be opened as an image, by its first bytes, and what to do about it."""

import re

_JPEG = b"\xff\xd8\xff"
_SAVE, _DEEP = "save it as PNG", "convert it to PNG, of 16 bits if its values need them"
_EXPORT, _UNPACK = "export it as JPEG or TIFF from a raw converter", "unpack it"

# What a file is, how it begins (the first pattern that matches counts), and what to do.
_KINDS = [
    (
        "a Git LFS pointer in place of the image",
        rb"version https://(git-lfs|hawser)\.github\.com/spec/",
        "run `git lfs pull` in its repository",
    ),
    (
        "a git-annex pointer in place of the image",
        rb"/annex/objects/|(\.\./)*\.git/annex/objects/",
        "run `git annex get .` in its repository",
    ),
    ("zeros in place of the image", rb"\0+$", "copy or download it again"),
    (
        "a PNG whose line ends were converted as in a text",
        rb"\x89PNG(?!\r\n\x1a\n)",
        "copy it again, as a binary file",
    ),
    ("a JPEG XL", rb"\xff\x0a|\0\0\0\x0cJXL ", _SAVE),
    ("a JPEG XR", rb"II\xbc", _SAVE),
    ("a Photoshop document", rb"8BPS", _SAVE),
    ("an icon (ICO)", rb"\0\0[\x01\x02]\0[^\0]", _SAVE),
    ("a PDF", rb"%PDF", _SAVE),
    ("a PostScript file", rb"%!PS|\xc5\xd0\xd3\xc6", _SAVE),
    ("an SVG drawing", rb"\s*(<\?xml.*?)?<svg", _SAVE),
    ("an OpenEXR image of floating-point pixels", rb"v/1\x01", _DEEP),
    ("a Radiance image of floating-point pixels", rb"#\?R", _DEEP),
    ("a PFM image of floating-point pixels", rb"P[Ff]\s", _DEEP),
    ("a FITS file", rb"SIMPLE  =", _DEEP),
    ("a DICOM file", rb".{128}DICM", _DEEP),
    ("an HDF5 file", rb"\x89HDF", _DEEP),
    ("a NumPy array", rb"\x93NUMPY", _DEEP),
    ("a camera's raw file", rb"II\*\0.{4}CR|....ftypcrx |FUJIFILM|IIR[OS]|IIU\0|FOVb", _EXPORT),
    ("an archive", rb"PK[\x03\x05]|\x1f\x8b|Rar!|7z\xbc\xaf|BZh|\xfd7zXZ|.{257}ustar", _UNPACK),
    (
        "a HEIF file that is damaged or of a kind that is not supported",
        rb"....ftyp(mi[af]|msf|he[iv]|avi|jpe|j2k|vvi)",
        "copy it again, or save it as PNG",
    ),
    (
        "a video",
        rb"....(ftyp|moov|mdat|wide)|\x1aE\xdf\xa3|RIFF....AVI |\0\0\x01[\xb3\xba]",
        "save frames of it as images",
    ),
    ("a file that macOS puts beside others", rb"\0\x05\x16\x07", "remove it"),
    (
        "not an image but a text, such as an error message of a download",
        rb"[\t\n\r -~\x80-\xff]+$",
        "look at it in an editor",
    ),
]


def why_not_opened(data: bytes) -> str:
    """Say what a file is that no image reader accepts, and what to do; empty if unknown."""
    if data.startswith(_JPEG):
        return _rare_jpeg(data)
    for what, pattern, advice in _KINDS:
        if re.match(pattern, data[:1024], re.DOTALL):
            return f"{what}: {advice}"
    return ""


def _rare_jpeg(data: bytes) -> str:
    """Name a JPEG of a rare kind, by its frame header; empty for a usual one."""
    place = len(_JPEG) - 1
    while data[place : place + 1] == b"\xff" and place + 4 < len(data):
        marker, bits = data[place + 1], data[place + 4]
        if marker == 0xF7:
            return f"a JPEG-LS: {_SAVE}"
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # tables, not frames
            return f"a JPEG of {bits} bits per channel: {_DEEP}" if bits != 8 else ""
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return ""
