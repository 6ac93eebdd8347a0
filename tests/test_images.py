"""The image reader against an independent reading of every unusual kind of image."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image, ImageFile, PngImagePlugin

from stages.data import images
from stages.data.arrays import ImageSpec
from stages.data.checks import list_unreadable
from stages.data.repair import lacks_its_end

SIZE = (9, 11)  # height, width of what is drawn here; asked for, so that nothing is resized


def drawing(channels: int, top: int = 255, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Return pixels without symmetry, from 0 to `top`."""
    values = np.random.default_rng(channels).integers(0, top + 1, (*size, channels))
    values[0, 0], values[0, 1] = 0, top
    return values


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read(
    data: bytes | Path, color_mode: str = "rgb", size=SIZE, resize: str = "crop", white: int = 65535
) -> np.ndarray:
    shape = (*size, 3 if color_mode == "rgb" else 1)
    spec = ImageSpec(["a"], shape, color_mode, resize, white_level=white)
    return images.read_image(data, spec)[0]


def chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def on_white(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return np.floor(color * share + 255 * (1 - share) + 0.5).astype(np.uint8)


RGB = drawing(3).astype(np.uint8)
GRAY = drawing(1).astype(np.uint8)
ALPHA = drawing(5)[..., 0].astype(np.uint8)
COLOR = Image.fromarray(RGB)
SHADES = Image.fromarray(GRAY[..., 0])
PALETTE = COLOR.quantize(16)
SIXTEEN = drawing(2, 65535)[..., 0].astype(np.uint16)
INDEXED = np.asarray(PALETTE.convert("RGB"))


def with_small_colors(data: bytes) -> bytes:
    """Write the colors of a TIFF's palette as 8-bit values, which should have 16 bits."""
    colors = Image.open(io.BytesIO(data)).tag_v2[320]
    old, new = (struct.pack("<768H", *(n >> bits for n in colors)) for bits in (0, 8))
    assert data.count(old) == 1
    return data.replace(old, new)


CLEAR = (np.asarray(PALETTE) == 3)[..., None]

LOSSLESS = {
    "png": (saved(COLOR, "PNG"), RGB),
    "bmp": (saved(COLOR, "BMP"), RGB),
    "tiff": (saved(COLOR, "TIFF"), RGB),
    "compressed tiff": (saved(COLOR, "TIFF", compression="tiff_lzw"), RGB),
    "webp": (saved(COLOR, "WEBP", lossless=True), RGB),
    "ppm": (saved(COLOR, "PPM"), RGB),
    "jpeg 2000": (saved(COLOR, "JPEG2000"), RGB),
    "gif": (saved(PALETTE, "GIF"), INDEXED),
    "palette": (saved(PALETTE, "PNG"), INDEXED),
    "tiff with a palette": (saved(PALETTE, "TIFF"), INDEXED),
    "tiff with a palette of 8-bit colors": (with_small_colors(saved(PALETTE, "TIFF")), INDEXED),
    "compressed tiff with a palette of 8-bit colors": (
        with_small_colors(saved(PALETTE, "TIFF", compression="tiff_lzw")), INDEXED
    ),
    "palette with a clear color": (
        saved(PALETTE, "PNG", transparency=3), np.where(CLEAR, 255, INDEXED)
    ),
    "color with a clear color": (
        saved(COLOR, "PNG", transparency=tuple(RGB[2, 2].tolist())),
        np.where((RGB[2, 2] == RGB).all(axis=-1, keepdims=True), 255, RGB),
    ),
    "gray with a clear gray level": (
        saved(SHADES, "PNG", transparency=int(GRAY[2, 2, 0])),
        np.where(GRAY[2, 2] == GRAY, 255, GRAY).repeat(3, axis=-1),
    ),
    "rgba": (saved(Image.fromarray(np.dstack([RGB, ALPHA])), "PNG"), on_white(RGB, ALPHA)),
    "rgba webp": (
        saved(Image.fromarray(np.dstack([RGB, ALPHA])), "WEBP", lossless=True, exact=True),
        on_white(RGB, ALPHA),
    ),
    "la": (
        saved(Image.fromarray(np.dstack([GRAY[..., 0], ALPHA]), "LA"), "PNG"),
        on_white(GRAY, ALPHA).repeat(3, axis=-1),
    ),
    "16-bit png": (
        saved(Image.fromarray(SIXTEEN), "PNG"),
        np.floor(SIXTEEN / 257 + 0.5).astype(np.uint8)[..., None].repeat(3, axis=-1),
    ),
    "16-bit tiff": (
        saved(Image.fromarray(SIXTEEN), "TIFF"),
        np.floor(SIXTEEN / 257 + 0.5).astype(np.uint8)[..., None].repeat(3, axis=-1),
    ),
    "16-bit jpeg 2000": (
        saved(Image.fromarray(SIXTEEN), "JPEG2000"),
        np.floor(SIXTEEN / 257 + 0.5).astype(np.uint8)[..., None].repeat(3, axis=-1),
    ),
    "16-bit pgm": (
        b"P5 11 9 65535\n" + SIXTEEN.astype(">u2").tobytes(),
        np.floor(SIXTEEN / 257 + 0.5).astype(np.uint8)[..., None].repeat(3, axis=-1),
    ),
    "1-bit": (
        saved(SHADES.point(lambda value: 255 * (value > 99), "1"), "PNG"),
        np.where(GRAY > 99, np.uint8(255), np.uint8(0)).repeat(3, axis=-1),
    ),
    "cmyk tiff": (
        saved(Image.fromarray(np.dstack([RGB, 0 * ALPHA]), "CMYK"), "TIFF"), 255 - RGB
    ),
    "animated gif": (
        saved(PALETTE, "GIF", save_all=True, append_images=[PALETTE.rotate(180)]), INDEXED
    ),
    "animated webp": (
        saved(COLOR, "WEBP", save_all=True, append_images=[COLOR.rotate(180)], lossless=True), RGB
    ),
    "animated png": (saved(COLOR, "PNG", save_all=True, append_images=[COLOR.rotate(180)]), RGB),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_formats_to_the_pixel(name):
    data, expected = LOSSLESS[name]
    np.testing.assert_array_equal(read(data), expected)


def offset_gif(picture: Image.Image, size: tuple[int, int], place: tuple[int, int], **options):
    """Write a GIF whose first frame covers a part of its canvas; sizes are width and height."""
    data = bytearray(saved(picture, "GIF", **options))
    data[6:10] = struct.pack("<2H", *size)
    start = data.index(b"," + bytes(4) + struct.pack("<2H", *picture.size)) + 1
    data[start : start + 4] = struct.pack("<2H", *place)
    return bytes(data)


@pytest.mark.parametrize("clear", [None, 3])
@pytest.mark.parametrize("picture", [PALETTE, SHADES])
def test_a_gif_whose_first_frame_covers_a_part_of_it(picture, clear):
    options = {} if clear is None else {"transparency": clear}
    data = offset_gif(picture, (30, 20), (7, 4), **options)
    expected = np.full((20, 30, 3), 255)
    expected[4:13, 7:18] = read(saved(picture, "GIF", **options))
    np.testing.assert_array_equal(read(data, size=(20, 30)), expected)


def smooth(size: tuple[int, int]) -> np.ndarray:
    down, across = np.mgrid[: size[0], : size[1]]
    channels = (
        127 + 120 * np.sin(down / 9 + across / 14), 255 * down / size[0], 255 * across / size[1]
    )  # fmt: skip
    return np.stack(channels, axis=-1).astype(np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_within_two_levels_of_a_plain_decode(mode):
    picture = Image.fromarray(smooth((40, 60))).convert(mode)
    data = saved(picture, "JPEG", quality=95)
    plain = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(read(data, size=(40, 60)) - plain).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_orientation(orientation, kind):
    # Independent: EXIF says where row 0 and column 0 of the stored picture are seen.
    turns = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda a: a.transpose(1, 0, 2)[::-1],
    }
    stored = smooth((24, 40))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"PNG": {}, "JPEG": {"quality": 95}, "TIFF": {}, "WEBP": {"lossless": True}}[kind]
    data = saved(Image.fromarray(stored), kind, exif=exif, **options)
    if kind == "JPEG":  # what the encoder lost is not the reader's
        stored = np.asarray(Image.open(io.BytesIO(data)))
    seen = turns[orientation](stored)
    got = read(data, size=seen.shape[:2]).astype(int)
    assert np.abs(got - seen).max() <= (2 if kind == "JPEG" else 0)


@pytest.mark.parametrize("size", [(48, 64), (80, 121)])  # 2.1 and 1.65 times it are decoded
@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("resize", ("crop", "pad", "stretch"))
def test_reduced_scale_is_close_to_a_full_decode(size, orientation, resize, monkeypatch):
    """Of sizes that the scale does not divide too: the last row of pixels is half padding."""
    noise = np.random.default_rng(0).normal(0, 8, (533, 799, 3))
    photo = np.clip(smooth((533, 799)) + noise, 0, 255).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(photo), "JPEG", quality=90, exif=exif)
    reduced = read(data, size=size, resize=resize).astype(int)
    monkeypatch.setattr(images, "_MIN_DECODE_SCALE", 100)
    difference = np.abs(reduced - read(data, size=size, resize=resize))
    assert 0 < difference.max() <= 12 and difference.mean() < 0.7


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "MPO", "without its end"])
@pytest.mark.filterwarnings("ignore:Image appears to be a malformed MPO")
def test_a_thumbnail_depends_on_nothing_but_the_file(mode, orientation, kind):
    """Whatever is asked for: of these sizes, a JPEG is decoded at all four scales."""
    picture, exif = Image.fromarray(smooth((400, 533))).convert(mode), Image.Exif()
    exif[0x0112] = orientation
    if kind == "PNG":
        data = saved(picture.convert("RGB"), "PNG", exif=exif)
    else:
        several = {"save_all": True, "append_images": [picture]} if kind == "MPO" else {}
        data = saved(picture, "MPO" if several else "JPEG", quality=95, exif=exif, **several)
    if kind == "without its end":
        data = data.removesuffix(b"\xff\xd9")
    found = {
        images.decode(data, images.Preprocessing(size, resize), with_thumbnail=True).thumbnail
        for size, resize in zip(
            ((24, 24), (32, 200), (64, 48), (128, 128), (224, 224)),
            ("crop", "pad", "stretch", "crop", "pad"),
            strict=True,
        )
    }
    (thumbnail,) = found
    whole = Image.fromarray(read(data, size=(533, 400) if orientation == 6 else (400, 533)))
    plain = np.asarray(whole.convert("L").resize((24, 24), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(np.frombuffer(thumbnail, np.uint8).reshape(24, 24) - plain).max() <= 6
    assert images.decode(data, images.Preprocessing((24, 24), "crop")).thumbnail == b""


def test_a_jpeg_of_several_pictures():
    """Phones write these (MPO); the first picture counts."""
    first, second = Image.fromarray(smooth((24, 40))), Image.new("RGB", (40, 24))
    data = saved(first, "MPO", save_all=True, append_images=[second], quality=95)
    assert np.abs(read(data, size=(24, 40)).astype(int) - smooth((24, 40))).mean() < 4


def test_one_pixel_and_a_long_strip():
    one = saved(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG")
    assert (read(one, size=(4, 6)) == [9, 8, 7]).all()
    strip = Image.new("L", (20000, 30), 50)
    strip.paste(200, (10000, 0, 20000, 30))
    for resize in ("crop", "pad", "stretch"):
        row = read(saved(strip, "PNG"), "grayscale", (8, 8), resize)[3]
        assert row[[1, 6], 0].tolist() == [50, 200]


@pytest.mark.parametrize("resize", ["crop", "pad", "stretch"])
def test_any_size_fits(resize):
    """Also where a ratio of sides, rounded, is a little too large: 29 / 7 * 7 > 29."""
    for side in range(1, 260):
        for size in ((side, 300), (300, side)):
            for target in ((7, 7), (49, 49), (7, 49)):
                fitted = images.resize_image(Image.new("L", size, 9), target, resize)
                row = images.to_array(fitted, target)
                assert row.shape == (*target, 1) and row[target[0] // 2, target[1] // 2] == 9


def test_ways_to_resize():
    picture = Image.new("RGB", (40, 20), "red")
    picture.paste("blue", (10, 0, 30, 20))
    data = saved(picture, "PNG")
    assert (read(data, size=(10, 10), resize="crop") == [0, 0, 255]).all(axis=-1)[:, 1:-1].all()
    padded = read(data, size=(10, 10), resize="pad")
    assert (padded[[0, 1, 8, 9]] == 0).all() and (padded[4, 5] == [0, 0, 255]).all()
    stretched = read(data, size=(10, 10), resize="stretch")
    assert (stretched[:, 0] == [255, 0, 0]).all() and (stretched[:, 5] == [0, 0, 255]).all()


def test_grayscale_is_luma():
    luma = RGB @ np.array([0.299, 0.587, 0.114])
    assert np.abs(read(saved(COLOR, "PNG"), "grayscale")[..., 0] - luma).max() < 1


def float_tiff() -> bytes:
    return saved(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")


def bomb() -> bytes:
    return b"P6 60000 60000 255\n"


PNG = saved(Image.fromarray(smooth((50, 50))), "PNG")
JPEG = saved(Image.fromarray(smooth((50, 50))), "JPEG")
HEIC = saved(Image.fromarray(smooth((50, 50))), "HEIF")
DEEP = saved(Image.fromarray(np.full((3, 3), 70000, np.int32)), "TIFF")


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "empty file"),
        (
            b"hello",
            "not an image but a text, such as an error message of a download: look at it in an"
            " editor",
        ),
        (b"\1\2\3\4", "not an image of a supported format, or damaged at its start"),
        (PNG[:-200], "truncated: its end is missing; copy it again"),
        (JPEG[:-200], "truncated: its end is missing; copy it again"),
        (HEIC[:-200], "truncated: its end is missing; copy it again"),
        (
            PNG[:60] + bytes(90) + PNG[150:],
            "damaged, or of a kind that is not supported: copy it again, or save it as PNG with"
            " another program",
        ),
        (bomb(), "more than 178,956,970 pixels: save it smaller"),
        (float_tiff(), "floating-point pixels: convert it to 8 or 16 bits"),
        (DEEP, "pixels outside 0 to 65535: convert it to 8 or 16 bits"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
            "a PostScript file: save it as PNG",
        ),
    ],
)
def test_reasons(data, reason, capfd):
    with pytest.raises(images.ImageError) as caught:
        read(data)
    assert str(caught.value) == reason
    assert capfd.readouterr() == ("", "")


def with_frame(marker: int, bits: int) -> bytes:
    """Write a JPEG whose frame has another marker and depth; its pixels are not reached."""
    place = JPEG.index(b"\xff\xc0")
    frame = bytes([0xFF, marker]) + JPEG[place + 2 : place + 4] + bytes([bits])
    return JPEG[:place] + frame + JPEG[place + 5 :]


KINDS = {
    "Git LFS pointer.*`git lfs pull`": [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        b"version https://hawser.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    ],
    "git-annex pointer.*`git annex get .`": [
        b"/annex/objects/SHA256E-s9--4d7a.jpg\n", b"../../.git/annex/objects/W8/1q/SHA256E-s9"
    ],
    "zeros.*copy or download it again": [bytes(20), bytes(99_999)],
    "a text.*in an editor": [
        b"<!DOCTYPE html>\n<html>", b'{"error": "not found"}', "../ü/a.jpg".encode(),
        b"\xef\xbb\xbf404",
    ],
    "PNG whose line ends.*as a binary file": [
        PNG.replace(b"\r\n", b"\n"), PNG.replace(b"\n", b"\r\n"),
        PNG.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"),
    ],
    "JPEG XL: save": [b"\xff\n\xfa\x7f\x01", b"\0\0\0\x0cJXL \r\n\x87\n"],
    "JPEG XR: save": [b"II\xbc\1\x20\0\0\0"],
    "JPEG-LS: save": [with_frame(0xF7, 8), with_frame(0xF7, 12)],
    "JPEG of 12 bits.*16 bits": [with_frame(0xC0, 12), with_frame(0xC1, 12), with_frame(0xC2, 12)],
    "JPEG of 16 bits": [with_frame(0xC3, 16)],
    "DICOM.*16 bits": [bytes(128) + b"DICM\2\0\0\0UL", b"II*\0".ljust(128, b"\0") + b"DICM"],
    "an archive: unpack": [
        b"PK\3\4\x14\0", b"\x1f\x8b\x08\0\1", b"a.jpg".ljust(257, b"\0") + b"ustar\x0000"
    ],
    "a video": [b"\0\0\0\x20ftypisom\0\0\2\0", b"\0\0\0\x14ftypqt  ", b"RIFF\1\2\3\4AVI LIST"],
    "HEIF file that is damaged or": [b"\0\0\0\x18ftypvvic\0\0\0\0vvicmif1" + bytes(9)],
    "Photoshop document": [b"8BPS\0\1\0\0"],
    "an SVG drawing": [b"<svg>", b"<?xml version='1.0'?>\n<!-- a -->\n<svg xmlns='x'>"],
    "NumPy array": [b"\x93NUMPY\1\0v\0{'descr'"],
    "raw file: export": [b"II*\0\x10\0\0\0CR\2\0", b"\0\0\0\x18ftypcrx \0\0\0\1"],
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")  # the stages silence them
@pytest.mark.parametrize(
    ("reason", "data"), [(reason, data) for reason, files in KINDS.items() for data in files]
)
def test_what_is_no_image_is_named_with_what_to_do(reason, data, tmp_path):
    with pytest.raises(images.ImageError, match=reason):
        read(data)
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(images.ImageError, match=reason):
        images.read_size(tmp_path / "a.jpg")


def test_unreadable_images_are_listed_by_reason():
    reasons = ["lost", *7 * ["empty"], "lost", "torn", "odd", "odd", "odd"]
    listed = list_unreadable([f"{n}.png" for n in range(13)], reasons)
    assert listed == (
        "1.png and 6 more (empty); 10.png and 2 more (odd); 0.png and 1 more (lost);"
        " and 1 more for other reasons"
    )


def test_files(tmp_path: Path):
    (tmp_path / "link.png").symlink_to("nowhere.png")
    (tmp_path / "real.png").write_bytes(PNG)
    (tmp_path / "good.png").symlink_to("real.png")
    assert read(tmp_path / "good.png", size=(5, 5)).shape == (5, 5, 3)
    with pytest.raises(images.ImageError, match="broken link"):
        read(tmp_path / "link.png")
    (tmp_path / "annexed.png").symlink_to("../.git/annex/objects/W8/1q/SHA256E-s9--4d7a.png")
    with pytest.raises(images.ImageError, match="git-annex pointer.*`git annex get .`"):
        read(tmp_path / "annexed.png")


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_a_sound_picture_with_broken_exif_is_read_as_upright(kind):
    picture = Image.new("RGB", (20, 10), "red")
    data = saved(picture, kind, exif=b"Exif\0\0XX\x2a\0broken")
    expected = read(saved(picture, kind), size=(10, 20))
    np.testing.assert_array_equal(read(data, size=(10, 20)), expected)


def test_a_wrong_extension_does_not_matter(tmp_path):
    (tmp_path / "really.jpg").write_bytes(PNG)
    np.testing.assert_array_equal(read(tmp_path / "really.jpg", size=(50, 50)), smooth((50, 50)))


def test_image_names():
    for name in ("a.jpg", "A.JPG", "b.Png", "c.tif", "d, e.WebP", "f.heic", "g\n.gif"):
        assert images.is_image_name(name)
    for name in (".a.jpg", "Thumbs.db", "notes.txt", "labels.csv", "jpg", "a.jpg.txt", "._a.png"):
        assert not images.is_image_name(name)


def test_settings_of_pillow_do_not_leak():
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


# More than 8 bits per channel


def png(values: np.ndarray, extra: bytes = b"", bits: int = 16) -> bytes:
    """Write a PNG of `bits` per channel."""
    height, width, channels = values.shape
    color = {1: 0, 3: 2, 2: 4, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    numbers = values.reshape(height, -1)[..., None] >> np.arange(bits)[::-1] & 1
    packed = np.packbits(numbers.reshape(height, -1), axis=1)
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    body = extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


def tiff(
    values: np.ndarray,
    kind: str = "<u2",
    photometric: int | None = None,
    planar: int = 1,
    deflate: bool = False,
) -> bytes:
    """Write a TIFF of values of a NumPy type."""
    height, width, bands = values.shape
    order, dtype = kind[0], np.dtype(kind)
    data = (values.transpose(2, 0, 1) if planar == 2 else values).astype(dtype).tobytes()
    data = zlib.compress(data) if deflate else data
    strips = bands if planar == 2 else 1
    if photometric is None:
        photometric = 2 if bands > 2 else 1
    length = len(data) // strips
    tags = {
        256: [width], 257: [height], 258: [8 * dtype.itemsize] * bands, 259: [8 if deflate else 1],
        262: [photometric], 273: [8 + n * length for n in range(strips)], 277: [bands],
        278: [height], 279: [length] * strips, 284: [planar],
        339: [{"u": 1, "i": 2, "f": 3}[dtype.kind]] * bands,
    }  # fmt: skip
    entries, pool, end = b"", b"", 8 + len(data) + 2 + 12 * len(tags) + 4
    for tag, numbers in tags.items():
        content = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            content, pool = struct.pack(f"{order}I", end + len(pool)), pool + content
        entries += struct.pack(f"{order}HHI", tag, 4, len(numbers)) + content
    start = struct.pack(f"{order}2sHI", {"<": b"II", ">": b"MM"}[order], 42, 8 + len(data))
    return start + data + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + pool


def scaled(values: np.ndarray, white: int) -> np.ndarray:
    """Return what becomes of gray or color values, as three channels."""
    levels = np.floor(np.minimum(values, white) / white * 255 + 0.5).astype(np.uint8)
    return levels.repeat(3, axis=-1) if levels.shape[-1] == 1 else levels


def over_white(values: np.ndarray, white: int) -> np.ndarray:
    return on_white(scaled(values[..., :-1], white), np.floor(values[..., -1] / 257 + 0.5))


GRAY16, COLOR16, GRAY_ALPHA16, COLOR_ALPHA16 = (drawing(n, 65535) for n in (1, 3, 2, 4))
CLEAR16 = struct.pack(">3H", *COLOR16[2, 2])
OF_MORE_BITS = {
    "gray png": (png(GRAY16), scaled, GRAY16),
    "color png": (png(COLOR16), scaled, COLOR16),
    "gray png with alpha": (png(GRAY_ALPHA16), over_white, GRAY_ALPHA16),
    "color png with alpha": (png(COLOR_ALPHA16), over_white, COLOR_ALPHA16),
    "color png with a clear color": (
        png(COLOR16, chunk(b"tRNS", CLEAR16)),
        lambda values, white: np.where(
            (values == values[2, 2]).all(-1, keepdims=True), 255, scaled(values, white)
        ),
        COLOR16,
    ),
    "gray tiff": (tiff(GRAY16), scaled, GRAY16),
    "gray tiff, big-endian": (tiff(GRAY16, ">u2"), scaled, GRAY16),
    "gray tiff, 0 is white": (
        tiff(GRAY16, photometric=0), lambda *v: 255 - scaled(*v), GRAY16
    ),
    "gray tiff, signed": (tiff(GRAY16 // 2, "<i2"), scaled, GRAY16 // 2),
    "gray tiff, 32 bits": (tiff(GRAY16, "<u4"), scaled, GRAY16),
    "color tiff": (tiff(COLOR16), scaled, COLOR16),
    "color tiff, big-endian": (tiff(COLOR16, ">u2"), scaled, COLOR16),
    "color tiff, compressed": (tiff(COLOR16, deflate=True), scaled, COLOR16),
    "color tiff, compressed, big-endian": (tiff(COLOR16, ">u2", deflate=True), scaled, COLOR16),
    "gray tiff, compressed, big-endian": (tiff(GRAY16, ">u2", deflate=True), scaled, GRAY16),
}  # fmt: skip


@pytest.mark.parametrize("white", [65535, 4095, 3000])
@pytest.mark.parametrize("name", OF_MORE_BITS)
def test_more_than_8_bits_to_the_pixel(name, white):
    data, scale, values = OF_MORE_BITS[name]
    got = read(data, white=white).astype(int)
    exact = "alpha" not in name  # two roundings
    assert np.abs(got - scale(values, white)).max() <= (0 if exact else 1)


@given(st.integers(1, 65535), st.lists(st.integers(0, 65535), min_size=1, max_size=9))
def test_one_scale_for_any_value_and_white_level(white, values):
    row = np.array(values)[None, :, None]
    assume(row.min() < white or row.max() == white)  # otherwise it is refused
    got = read(png(row), "grayscale", (1, len(values)), white=white)
    assert np.abs(got[0, :, 0] - np.minimum(values, white) * 255 / white).max() <= 0.5


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_clear_shade_of_few_bits(bits):
    values = drawing(1, 2**bits - 1)
    for clear in {0, 2**bits // 2, 2**bits - 1}:
        if (bits, clear) == (1, 0):
            continue  # all that is left is white, which is refused
        data = png(values, chunk(b"tRNS", struct.pack(">H", clear)), bits)
        expected = np.where(values == clear, 255, values * 255 // (2**bits - 1))
        np.testing.assert_array_equal(read(data, "grayscale"), expected)


def test_the_largest_value_is_of_the_file(tmp_path):
    for data, peak in (
        (png(GRAY16 // 16), GRAY16.max() // 16),
        (tiff(COLOR16 // 64), COLOR16.max() // 64),
        (png(np.dstack([GRAY16 // 16, 65535 + 0 * GRAY16])), GRAY16.max() // 16),  # not of alpha
        (saved(COLOR, "PNG"), 0),
    ):
        assert images.decode(data, images.Preprocessing(SIZE, "crop")).peak == peak


def deep_jpeg2000(mode: str, kind: int = 11) -> bytes:
    """Write a JPEG 2000 that says that its channels have 12 bits, or another kind of values."""
    data = saved(COLOR.convert(mode), "JPEG2000")
    start = data.index(b"\xff\x4f\xff\x51") + 42  # where three bytes of each channel begin
    channels = bytes([kind, 1, 1]) * len(mode)
    return data[:start] + channels + data[start + len(channels) :]


FLOATS = np.linspace(0, 1, 99).reshape(9, 11, 1)
UNSUPPORTED = {
    "negative": (tiff(GRAY16 // 2 - 1000, "<i2"), "pixels outside 0 to 65535: convert it"),
    "32 bits": (tiff(GRAY16 * 2, "<u4"), "pixels outside 0 to 65535: convert it"),
    "signed 8 bits": (tiff(GRAY16 % 128, "<i1"), "signed 8-bit pixels: convert it"),
    "32-bit float": (tiff(FLOATS, "<f4"), "floating-point pixels: convert it"),
    "64-bit float": (tiff(FLOATS, "<f8"), "1 band of 64-bit floating-point values.*save it as"),
    "five bands": (tiff(drawing(5), "<u1", 1), "5 bands of 8-bit unsigned"),
    "0 is white, big-endian": (tiff(GRAY16, ">u2", 0), "16-bit unsigned.*interpretation 0.*save"),
    "big-endian BigTIFF": (
        struct.pack(">2s3HQ", b"MM", 43, 8, 0, 16) + bytes(200),
        "a BigTIFF in big-endian order: save it as a plain TIFF or PNG",
    ),
    "color jpeg 2000": (deep_jpeg2000("RGB"), "a JPEG 2000 of 12-bit RGB pixels: save it as PNG"),
    "jpeg 2000 with alpha": (deep_jpeg2000("LA"), "a JPEG 2000 of 12-bit LA pixels: save it as"),
    "signed jpeg 2000": (deep_jpeg2000("L", 0x87), "signed 8-bit pixels: convert it to unsigned"),
    "signed jpeg 2000 of 16 bits": (deep_jpeg2000("L", 0x8F), "signed 16-bit pixels: convert it"),
    "separate planes": (tiff(COLOR16, planar=2), "stores its bands one by one: save it as PNG"),
}  # fmt: skip


def directory_first(data: bytes) -> bytes:
    """Append the strip of a little-endian TIFF again, and use that one."""
    entry, length = struct.pack("<HHI", 273, 4, 1), int.from_bytes(data[4:8], "little") - 8
    moved = entry + struct.pack("<I", len(data))
    return data.replace(entry + struct.pack("<I", 8), moved) + data[8 : 8 + length]


CUT_TIFFS = {
    "directory at the end": saved(COLOR, "TIFF", compression="tiff_lzw")[:-200],
    "big-endian, directory at the end": tiff(COLOR16, ">u2")[:-200],
    "palette at the end": saved(PALETTE, "TIFF", compression="packbits")[:-20],
    "pixels at the end": directory_first(tiff(GRAY16))[:-20],
    "compressed pixels at the end": directory_first(tiff(GRAY16, deflate=True))[:-20],
    "BigTIFF": struct.pack("<2s3HQ", b"II", 43, 8, 0, 1000) + bytes(200),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # the stages silence them
@pytest.mark.parametrize("name", CUT_TIFFS)
def test_a_truncated_tiff(name, capfd):
    with pytest.raises(images.ImageError, match="^truncated: its end is missing; copy it again$"):
        read(CUT_TIFFS[name])
    assert capfd.readouterr() == ("", "")


def test_a_tiff_whose_directory_comes_first():
    data = directory_first(tiff(GRAY16, deflate=True))
    np.testing.assert_array_equal(read(data), read(tiff(GRAY16)))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_pixels_that_are_not_supported_are_refused_with_the_true_reason(name):
    data, reason = UNSUPPORTED[name]
    with pytest.raises(images.ImageError, match=reason):
        read(data)


# Sound pictures in faulty files

JPEGS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "optimized": {"optimize": True},
    "with restart markers": {"restart_marker_blocks": 3},
    "progressive with restart markers": {"progressive": True, "restart_marker_rows": 1},
}


@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_may_lack_its_end_marker_but_no_pixels(name):
    data = saved(Image.fromarray(drawing(3, 255, (33, 41)).astype(np.uint8)), "JPEG", **JPEGS[name])
    expected = read(data, size=(33, 41))
    for cut in (data[:-1], data[:-2], data[:-2] + bytes(20)):
        np.testing.assert_array_equal(read(cut, size=(33, 41)), expected)
    markers = [n for n in range(len(data) - 1) if data[n] == 255 and data[n + 1]]
    near_markers = {n + k for n in markers for k in (-1, 0, 1, 2) if 700 < n + k < len(data) - 2}
    for length in [*near_markers, len(data) - 3, len(data) - 4, len(data) // 2]:
        with pytest.raises(images.ImageError, match="truncated"):
            read(data[:length], size=(33, 41))


@pytest.mark.parametrize("size", [(160, 240), (8, 12)])  # also decoded at a reduced scale
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_an_end_marker_does_not_hide_that_half_of_a_jpeg_is_missing(mode, size):
    data = saved(Image.fromarray(smooth((160, 240))).convert(mode), "JPEG")
    with pytest.raises(images.ImageError, match="truncated"):
        read(data[: len(data) // 2] + data[-2:], size=size)


@pytest.mark.parametrize("size", [(160, 240), (8, 12)])  # also decoded at a reduced scale
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", JPEGS)
def test_zeros_in_place_of_the_second_half_of_a_jpeg(name, mode, size):
    """As a crash or a full disk leaves them; libjpeg decodes zeros as if they were pixels."""
    noise = np.random.default_rng(0).normal(0, 12, (160, 240, 3))
    picture = Image.fromarray((smooth((160, 240)) + noise).clip(0, 255).astype(np.uint8))
    for quality in (50, 97):
        data = saved(picture.convert(mode), "JPEG", quality=quality, **JPEGS[name])
        for part in (0.5, 0.85):
            start, lost = data[: int(part * len(data))], len(data) - int(part * len(data))
            for end in (bytes(lost), bytes(lost) + data[-2:], bytes(lost) + data[-2:] + bytes(99)):
                with pytest.raises(images.ImageError, match="copy it again"):
                    read(start + end, size=size)


@pytest.mark.parametrize("size", [(160, 240), (8, 12)])  # also decoded at a reduced scale
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("name", ["baseline", "with restart markers"])
def test_a_lost_sector_in_the_middle_of_a_jpeg(name, mode, size):
    """Zeros in metadata, as cameras write them, do no harm."""
    exif = Image.Exif()
    exif[0x9286] = bytes(5000)
    picture = Image.fromarray(smooth((160, 240))).convert(mode)
    data = saved(picture, "JPEG", quality=97, exif=exif.tobytes(), **JPEGS[name])
    read(data, size=size)
    for part in (0.6, 0.9):
        start = int(part * len(data))
        with pytest.raises(images.ImageError, match="copy it again"):
            read(data[:start] + bytes(512) + data[start + 512 :], size=size)


@pytest.mark.parametrize("kind", ["WEBP", "HEIF", "AVIF", "PNG"])
def test_zeros_in_place_of_the_last_pixels_of_other_formats(kind):
    """What follows the pixels does no harm."""
    noise = np.random.default_rng(0).integers(0, 256, (160, 240, 3))
    data = saved(Image.fromarray(noise.astype(np.uint8)), kind)
    for after in (bytes(9000), b"MotionPhoto_Data", b"\0\0\1\0mpvd" + bytes(248)):
        np.testing.assert_array_equal(read(data + after, size=(8, 12)), read(data, size=(8, 12)))
        assert kind == "PNG" or not lacks_its_end(data + after)
    # libheif itself makes up the tiles that a phone's photograph lacks.
    assert kind == "PNG" or (lacks_its_end(data[:-1]) and lacks_its_end(data[:-5000]))
    for lost in (5000, len(data) // 2):
        for more in (0, 9000):
            with pytest.raises(images.ImageError, match="copy it again"):
                read(data[:-lost] + bytes(lost + more), size=(8, 12))


def test_a_plain_webp_may_end_in_zeros():
    picture = Image.new("RGB", (1600, 1200), "white")
    picture.paste(Image.fromarray(smooth((90, 120))))
    data = saved(picture, "WEBP", method=4)
    assert data.endswith(bytes(100))
    read(data + bytes(9000))


@pytest.mark.parametrize("level", [0, 1, 9])
def test_any_wrong_byte_in_the_pixels_of_a_png_is_noticed(level):
    data = saved(Image.fromarray(smooth((20, 30))), "PNG", compress_level=level)
    start = data.index(b"IDAT") + 4
    for place in range(start, data.index(b"IEND") - 4, 5):
        with pytest.raises(images.ImageError, match="damaged|truncated"):
            read(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])


@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_whose_line_ends_were_converted(name):
    """As Git does if .gitattributes says that all files are texts."""
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3)).astype(np.uint8)
    data = saved(Image.fromarray(noise), "JPEG", **JPEGS[name])
    read(data)
    with pytest.raises(images.ImageError, match="line ends"):
        read(data.replace(b"\n", b"\r\n"))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", JPEGS)
@pytest.mark.parametrize("shade", ["white", "black"])
def test_a_jpeg_may_end_in_zeros(name, mode, shade):
    """Plain parts are coded as zeros; other zeros may follow the pixels or the end marker."""
    picture = Image.new("RGB", (900, 700), shade)
    picture.paste(Image.fromarray(smooth((90, 900))))
    data = saved(picture.convert(mode), "JPEG", **JPEGS[name])
    if name == "optimized":
        assert data.endswith(bytes(64), 0, -3)
    expected = read(data, size=(70, 90))
    np.testing.assert_array_equal(read(data + bytes(5000), size=(70, 90)), expected)
    whole = saved(Image.fromarray(smooth((90, 900))).convert(mode), "JPEG", **JPEGS[name])
    padded = whole[:-2] + bytes(300) + whole[-2:]
    np.testing.assert_array_equal(read(padded, size=(9, 90)), read(whole, size=(9, 90)))


@pytest.mark.parametrize("after", [b"", bytes(9), JPEG])
def test_a_jpeg_may_end_in_mid_gray(after):
    picture = smooth((40, 60))
    picture[16:] = 128
    got = read(saved(Image.fromarray(picture), "JPEG", quality=95) + after, size=(40, 60))
    assert (got[32:] == 128).all()


def faulty_pngs() -> dict[str, bytes]:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "hello")
    info.add_text("Long", "x" * 2_000_000, zip=True)
    data = saved(COLOR, "PNG", pnginfo=info)
    plain = saved(COLOR, "PNG")
    split = plain.index(b"IDAT") - 4
    physical = chunk(b"pHYs", bytes(9))
    return {
        "large text": data,
        "a comment with a wrong checksum": data.replace(b"hello", b"hallo"),
        "a large profile": saved(COLOR, "PNG", icc_profile=bytes(1_500_000)),
        "resolution with a wrong checksum": plain[:split] + physical[:-1] + b"!" + plain[split:],
        "no end": plain[:-12],
    }


@pytest.mark.parametrize("name", faulty_pngs())
def test_a_png_with_faulty_metadata(name):
    np.testing.assert_array_equal(read(faulty_pngs()[name]), RGB)


@pytest.mark.parametrize("damage", ["pixels", "size", "transparency", "end"])
def test_faulty_metadata_does_not_hide_damage(damage):
    """In a file whose comment has a wrong checksum."""
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "hello")
    data = saved(PALETTE, "PNG", pnginfo=info, transparency=3).replace(b"hello", b"hallo")
    if damage == "end":
        data = data[: data.index(b"IDAT") + 30]
    else:
        name = {"pixels": b"IDAT", "size": b"IHDR", "transparency": b"tRNS"}[damage]
        place = data.index(name) + 7
        data = data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :]
    with pytest.raises(images.ImageError):
        read(data)


# HEIC

LOSSLESS_HEIC = {"quality": -1, "chroma": 444, "matrix_coefficients": 0}
SCENE = smooth((24, 40))


def heic(*pictures: np.ndarray, primary: int = 0, **options) -> bytes:
    """Write a HEIC file; the values of 16-bit pictures are rounded to 10 bits."""
    file, out = pillow_heif.HeifFile(), io.BytesIO()
    for pixels in pictures:
        mode = "RGB;16" if pixels.dtype == np.uint16 else "RGB"
        file.add_frombytes(mode, pixels.shape[1::-1], pixels.tobytes())
    file.save(out, primary_index=primary, **LOSSLESS_HEIC | options)
    return out.getvalue()


def test_heic_to_the_pixel(tmp_path):
    (tmp_path / "IMG_0001.HEIC").write_bytes(heic(SCENE))
    np.testing.assert_array_equal(read(tmp_path / "IMG_0001.HEIC", size=(24, 40)), SCENE)


def test_heic_of_10_bits():
    deep = SCENE.astype(np.uint16) * 4 + 1  # of 10 bits
    assert np.abs(read(heic(deep << 6), size=(24, 40)).astype(int) - SCENE).max() <= 1


def test_the_primary_image_of_a_heic_file():
    data = heic(SCENE[::-1], SCENE, primary=1)
    np.testing.assert_array_equal(read(data, size=(24, 40)), SCENE)


@pytest.mark.parametrize("orientation", [3, 6, 8])  # in the EXIF data, and by the format itself
def test_a_heic_file_is_turned_once(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(SCENE), "HEIF", exif=exif.tobytes(), **LOSSLESS_HEIC)
    seen = np.rot90(SCENE, {3: 2, 6: 3, 8: 1}[orientation])
    np.testing.assert_array_equal(read(data, size=seen.shape[:2]), seen)


# What a person should know of an image

FOUR_BANDS = drawing(4)
CUTOUT = np.where(np.arange(11) > 3, 255, 0).astype(np.uint8) + 0 * ALPHA
CLEAR_RGB = [Image.fromarray(np.dstack([RGB, alpha])) for alpha in (0 * ALPHA, CUTOUT)]
OPAQUE = Image.fromarray(np.dstack([RGB, 0 * ALPHA + 255]))
WHITE_ICON = Image.fromarray(np.dstack([0 * RGB + 255, CUTOUT]))


def png_with(*chunks: bytes) -> bytes:
    data = saved(COLOR, "PNG")
    place = data.index(b"IDAT") - 4
    return data[:place] + b"".join(chunks) + data[place:]


def gamma(value: int) -> bytes:
    return chunk(b"gAMA", struct.pack(">I", value))


def primaries(green: tuple[int, int]) -> bytes:
    values = (31270, 32900, 64000, 33000, *green, 15000, 6000)
    return chunk(b"cHRM", struct.pack(">8I", *values))


def code_points(kind: str, primaries: int, transfer: int) -> bytes:
    """Write an image of these code points of H.273."""
    if kind == "PNG":
        return png_with(chunk(b"cICP", bytes([primaries, transfer, 0, 1])))
    data = saved(COLOR, kind)
    place = data.index(b"colrnclx") + 8
    return data[:place] + struct.pack(">2H", primaries, transfer) + data[place + 4 :]


def several(kind: str) -> bytes:
    return saved(COLOR, kind, save_all=True, append_images=[COLOR.rotate(180)])


def extra_samples(data: bytes) -> bytes:
    """Say in a TIFF of four bands that the last is of no particular kind."""
    old, new = (struct.pack("<HHII", tag, 4, 1, value) for tag, value in ((284, 1), (338, 0)))
    assert data.count(old) == 1
    return data.replace(old, new)  # planar configuration has this default


SRGB_GREEN, ADOBE_GREEN = (30000, 60000), (21000, 71000)
NOTED = {
    "": [
        *(saved(COLOR, kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "AVIF", "HEIF")),
        saved(OPAQUE, "PNG"), saved(OPAQUE, "WEBP"), several("MPO"), png(GRAY16), tiff(COLOR16),
        png_with(gamma(45455), primaries(SRGB_GREEN)), png_with(primaries(ADOBE_GREEN)),
        png_with(chunk(b"sRGB", b"\0"), gamma(100000)),
        *(code_points(kind, 1, 13) for kind in ("PNG", "HEIF", "AVIF")), code_points("HEIF", 6, 6),
    ],
    "TRANSPARENT": [
        *(saved(CLEAR_RGB[1], kind) for kind in ("PNG", "WEBP", "TIFF", "AVIF", "GIF")),
        png(COLOR_ALPHA16), tiff(FOUR_BANDS, "<u1"), LOSSLESS["palette with a clear color"][0],
    ],
    "PLAIN": [saved(Image.new(mode, (11, 9)), "PNG") for mode in ("L", "RGB", "1")],
    "PLAIN|DARK": [png(GRAY16 // 655 + 9000)],
    "DARK": [png(GRAY16 // 5)],
    "FIRST": [
        *(several(kind) for kind in ("TIFF", "GIF", "PNG", "WEBP", "AVIF", "HEIF")),
        extra_samples(tiff(FOUR_BANDS, "<u1")), extra_samples(tiff(COLOR_ALPHA16)),
    ],
    "OTHER_COLOR": [
        png_with(gamma(100000)), png_with(gamma(55556)),
        png_with(gamma(45455), primaries(ADOBE_GREEN)),
        *(code_points(kind, *points) for kind in ("PNG", "HEIF", "AVIF")
          for points in ((12, 13), (9, 16), (9, 18), (9, 14))),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("notes", "data"), [(notes, data) for notes, files in NOTED.items() for data in files]
)
def test_what_a_person_should_know_is_noted(notes, data):
    found = images.decode(data, images.Preprocessing(SIZE, "crop")).notes
    assert found == sum(images.Note[name] for name in notes.split("|") if name)


def test_the_bands_behind_red_green_and_blue_are_no_transparency():
    for data, plain in ((tiff(FOUR_BANDS, "<u1"), tiff(FOUR_BANDS[..., :3], "<u1")),
                        (tiff(COLOR_ALPHA16), tiff(COLOR_ALPHA16[..., :3]))):  # fmt: skip
        np.testing.assert_array_equal(read(extra_samples(data)), read(plain))


def test_a_profile_counts_more_than_code_points():
    data = png_with(chunk(b"iCCP", b"a\0\0" + zlib.compress(icc_profile(1.8, SRGB))), gamma(99999))
    assert images.decode(data, images.Preprocessing(SIZE, "crop")).notes == 0


@pytest.mark.parametrize(
    "data",
    [
        *(saved(CLEAR_RGB[0], kind) for kind in ("PNG", "WEBP", "TIFF", "AVIF", "GIF", "HEIF")),
        saved(WHITE_ICON, "PNG"),
        png(np.dstack([COLOR16, 0 * GRAY16])),
        tiff(np.dstack([RGB, 0 * ALPHA]), "<u1"),
    ],
)
def test_an_image_of_which_nothing_is_left_on_white_is_refused(data):
    with pytest.raises(images.ImageError, match="the rest is transparent: save it without"):
        read(data)


def test_an_image_above_the_white_level_is_refused():
    data = png(GRAY16 // 655 + 5000)
    with pytest.raises(
        images.ImageError, match=r"above .*white_level \(4095\): set it, for instance, to 8191,"
    ):
        read(data, white=4095)
    notes = images.decode(png(GRAY16), images.Preprocessing(SIZE, "crop", 4095)).notes
    assert notes == images.Note.CLIPPED


# Color profiles

# Red, green and blue in the CIE's XYZ, white as in print (D50), in columns.
SRGB = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])
DISPLAY_P3 = np.array(
    [[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]]
)


def icc_profile(gamma: float, colors: np.ndarray | None = None) -> bytes:
    """Write an ICC profile of a gamma curve and of three colors, or of gray."""

    def xyz(values) -> bytes:
        return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(65536 * v) for v in values))

    curve = b"curv" + bytes(4) + struct.pack(">IHxx", 1, round(256 * gamma))
    white = xyz([0.9642, 1, 0.8249])
    tags = {b"wtpt": white}
    if colors is None:
        tags[b"kTRC"] = curve
    else:
        for name, color in zip("rgb", colors.T, strict=True):
            tags |= {f"{name}XYZ".encode(): xyz(color), f"{name}TRC".encode(): curve}
    start, table, body = 132 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content
    size = struct.pack(">I", start + len(body))
    space = b"GRAY" if colors is None else b"RGB "
    header = size + bytes(4) + b"\x02\x40\0\0mntr" + space + b"XYZ " + bytes(12) + b"acsp"
    header = header.ljust(68, b"\0") + white[8:]
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def encoded(linear: np.ndarray) -> np.ndarray:
    """Return sRGB levels of linear light."""
    linear = linear.clip(0, 1)
    curve = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return 255 * curve


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_colors_are_converted_to_srgb(kind):
    picture = np.array([[[200, 80, 60], [40, 160, 90], [128, 128, 128], [10, 20, 250]]], np.uint8)
    picture = picture.repeat(16, axis=0).repeat(16, axis=1)
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    data = saved(
        Image.fromarray(picture), kind, icc_profile=icc_profile(2.2, DISPLAY_P3), **options
    )
    linear = (picture / 255) ** 2.2 @ (np.linalg.inv(SRGB) @ DISPLAY_P3).T
    difference = np.abs(read(data, size=(16, 64)) - encoded(linear))
    assert difference.max() <= (4 if kind == "JPEG" else 2)
    assert np.abs(encoded(linear) - picture).max() > 20


def test_gray_is_converted_and_stays_gray():
    data = saved(SHADES, "PNG", icc_profile=icc_profile(1.8))
    got = read(data)
    assert np.abs(got[..., :1] - encoded((GRAY / 255) ** 1.8)).max() <= 2
    assert (
        images.to_array(images.decode(data, images.Preprocessing(SIZE, "crop")).fitted, SIZE).shape[
            -1
        ]
        == 1
    )


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("clear", ["alpha", "shade"])
def test_a_gray_profile_applies_with_transparency(clear, depth):
    white = 2**depth - 1
    values = drawing(1, white - 1)
    profile = chunk(b"iCCP", b"gray\0\0" + zlib.compress(icc_profile(1.8)))
    plain = read(png(values, profile, depth))
    assert (plain != read(png(values, bits=depth))).any()
    if clear == "alpha":
        data = png(np.dstack([values, white + 0 * values]), profile, depth)
    else:
        data = png(values, profile + chunk(b"tRNS", struct.pack(">H", white)), depth)
    np.testing.assert_array_equal(read(data), plain)


@pytest.mark.parametrize(
    ("picture", "profile"),
    [
        (COLOR, icc_profile(2.2)),
        (SHADES, icc_profile(2.2, DISPLAY_P3)),
        (COLOR, b"broken"),
        (COLOR, icc_profile(2.2, DISPLAY_P3)[:200]),
        (Image.fromarray(np.dstack([RGB, 0 * ALPHA]), "CMYK"), b"broken"),
    ],
)
def test_a_profile_that_does_not_fit_is_ignored(picture, profile):
    kind = "TIFF" if picture.mode == "CMYK" else "PNG"
    expected = read(saved(picture, kind))
    np.testing.assert_array_equal(read(saved(picture, kind, icc_profile=profile)), expected)
