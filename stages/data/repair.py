"""Repair image files whose pixels are intact but which Pillow refuses.

Only what the pixels do not depend on is changed. If a pixel is missing, the file stays as it is.
"""

import io
import re
import zlib
from collections.abc import Iterator

from PIL import Image

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_END_OF_JPEG, _SCAN, _PROGRESSIVE = b"\xff\xd9", b"\xff\xda", b"\xff\xc2"
_COEFFICIENTS = 64  # of a block
# Bytes in a row: what the pixels of a JPEG end in only if they are plain, and what they may end in.
_MANY_ZEROS, _FEW_ZEROS = 64, 8
_BLOCK = 4096  # bytes of a disk that are lost at once; plain pictures end in fewer zeros
_TAIL, _MANY_LINES = 8192, 16  # bytes at the end of a file, and how often one of 256 is among them
_MAX_PROFILE_BYTES = 2**20  # Pillow's own limit for what a chunk of a PNG unpacks to


def repair(data: bytes) -> bytes:
    """Return the content of an image file that can't be read, without its faults.

    - A PNG without its text, and without whatever else has a wrong checksum or is too large, as
      long as the pixels do not depend on it.
    - A JPEG with the end marker that it lacks, if all its pixels are there.
    - Any other content as it is.
    """
    if data.startswith(_PNG):
        return _essential_chunks(data)
    if data.startswith(_JPEG) and _lacks_only_its_end(data):
        return data.rstrip(b"\xff") + _END_OF_JPEG
    return data


def _essential_chunks(data: bytes) -> bytes:
    kept = [_PNG]
    for chunk, is_intact in _chunks(data):
        kind, content = chunk[4:8], chunk[8:-4]
        is_needed = kind[:1].isupper() or kind == b"tRNS"
        if is_needed or (is_intact and (kind == b"eXIf" or _is_small_profile(kind, content))):
            kept.append(chunk)
    return b"".join(kept)


def _chunks(data: bytes) -> Iterator[tuple[bytes, bool]]:
    """Yield the chunks of a PNG, and whether each has the right checksum."""
    start, chunk = len(_PNG), b""
    while start < len(data) and chunk[4:8] != b"IEND":
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        chunk = data[start:end]
        yield chunk, zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        start = end


def has_wrong_checksum(data: bytes) -> bool:
    """Return whether the pixels of a PNG have a wrong checksum, which Pillow does not look at."""
    return any(chunk[4:8] == b"IDAT" and not is_intact for chunk, is_intact in _chunks(data))


def _is_small_profile(kind: bytes, content: bytes) -> bool:
    if kind != b"iCCP":
        return False
    _, _, packed = content.partition(b"\0")  # the name ends there; a byte for the method follows
    try:
        profile = zlib.decompressobj().decompress(packed[1:], _MAX_PROFILE_BYTES)
    except zlib.error:
        return False
    return len(profile) < _MAX_PROFILE_BYTES


def lacks_pixels(data: bytes) -> bool:
    """Return whether a JPEG's end marker comes before the last pixel. It takes three decodings."""
    content, _, _ = data.rpartition(_END_OF_JPEG)
    return not _lacks_only_its_end(content)


def lacks_its_end(data: bytes) -> bool:
    """Return whether a HEIC, AVIF or WebP is cut, or has zeros in place of its end.

    Their decoders make up what is missing: of a phone's photograph, for instance, some tiles.
    """
    if data.endswith(bytes(_BLOCK)):
        data = data.rstrip(b"\0") + bytes(_BLOCK)
    if data.startswith(b"RIFF"):
        return 8 + int.from_bytes(data[4:8], "little") > len(data)
    start, kind = 0, b"ftyp"
    while kind in (b"ftyp", b"meta", b"moov", b"free", b"mdat") and start < len(data):
        size, kind = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8]
        if size == 1:
            size = int.from_bytes(data[start + 8 : start + 16], "big")
        if size == 0:  # up to the end of the file
            return False
        start += size
    return kind == b"mdat" and start > len(data)


def has_converted_lines(data: bytes) -> bool:
    """Return whether line ends of a JPEG were made those of Windows, as if it were a text."""
    tail = data[-_TAIL:]
    return tail.count(b"\n") == tail.count(b"\r\n") >= _MANY_LINES


def ends_in_zeros(data: bytes) -> bool:
    """Return whether zeros were put in place of the last pixels of a JPEG.

    Zeros after the pixels do no harm. A plain part of a picture may be coded as zeros, too: these
    end with the picture, neither before nor after it.
    """
    end = len(data.rstrip(b"\0"))
    end = end - 2 if data.endswith(_END_OF_JPEG, 0, end) else len(data)
    if data[max(0, end - _MANY_ZEROS) : end].strip(b"\0"):
        return False
    few = len(data[:end].rstrip(b"\0")) + _FEW_ZEROS
    if _lacks_only_its_end(data[:few]):
        return False
    return _lacks_only_its_end(data[: end - 1]) or not _lacks_only_its_end(data[:end])


def has_hole(data: bytes) -> bool:
    """Return whether a baseline JPEG has zeros among its pixels, as a lost sector leaves them.

    Where zeros are the code of a block's end, plain parts look the same, and are not told apart.
    """
    place, marker, zeros_mean = 2, 0, b""
    while marker != 0xDA and data[place : place + 1] == b"\xff" and place + 4 < len(data):
        marker = data[place + 1]
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        tables = data[place + 4 : end] if marker == 0xC4 else b""
        while len(tables) > 17:  # the first, shortest code has only zeros
            zeros_mean += tables[17:18] if tables[0] >> 4 else b""  # 0: the end of the block
            tables = tables[17 + sum(tables[1:17]) :]
        if marker == 0xC2:  # progressive
            return False
        place = end
    hole = data.find(bytes(_MANY_ZEROS), place) if any(zeros_mean) else -1
    if hole < 0 or re.search(rb"\xff[\x01-\xcf\xd8-\xfe]", data[place:hole]):
        return False  # it follows the pixels
    return not _lacks_only_its_end(data[: hole + _FEW_ZEROS])


def _lacks_only_its_end(data: bytes) -> bool:
    """Return whether the pixels of a JPEG stay the same, whatever one puts after its content.

    A decoder that finds the content too short makes up the rest, from what follows if it can.
    """
    data = data.rstrip(b"\xff")  # perhaps the first half of a marker
    fillers = [b""]
    for byte, first in ((0x55, 0), (0xAA, 4)):  # with all markers that may have to come next
        restarts = (bytes([0xFF, 0xD0 + (first + n) % 8]) for n in range(8))
        fillers.append(b"".join(64 * bytes([byte]) + restart for restart in restarts))
    try:
        images = [
            Image.open(io.BytesIO(data + filler + _END_OF_JPEG), formats=["JPEG"])
            for filler in fillers
        ]
        is_whole = "progressive" not in images[0].info or _has_all_scans(data)
        return is_whole and len({image.tobytes() for image in images}) == 1
    except Exception:  # Pillow raises many kinds for damaged files
        return False


def _has_all_scans(data: bytes) -> bool:
    """Return whether no scan of a progressive JPEG is missing."""
    start = data.rfind(_PROGRESSIVE)  # the header of the picture; earlier ones are of thumbnails
    final = set()  # component and coefficient of what comes in full precision
    for scan in data[start:].split(_SCAN)[1:]:
        end = 3 + 2 * scan[2]
        first, last, precision = scan[end : end + 3]
        if precision % 16 == 0:
            final |= {(c, k) for c in scan[3:end:2] for k in range(first, last + 1)}
    return len(final) == _COEFFICIENTS * data[start + 9]
