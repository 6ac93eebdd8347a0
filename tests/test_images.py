"""The image reader against an independent reading of every unusual kind of image."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from stages.data import images
from stages.data.arrays import ImageSpec

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


def on_white(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return np.floor(color * share + 255 * (1 - share) + 0.5).astype(np.uint8)


RGB = drawing(3).astype(np.uint8)
GREY = drawing(1).astype(np.uint8)
ALPHA = drawing(5)[..., 0].astype(np.uint8)
COLOR = Image.fromarray(RGB)
SHADES = Image.fromarray(GREY[..., 0])
PALETTE = COLOR.quantize(16)
SIXTEEN = drawing(2, 65535)[..., 0].astype(np.uint16)
INDEXED = np.asarray(PALETTE.convert("RGB"))
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
    "palette with a clear colour": (
        saved(PALETTE, "PNG", transparency=3), np.where(CLEAR, 255, INDEXED)
    ),
    "colour with a clear colour": (
        saved(COLOR, "PNG", transparency=tuple(RGB[2, 2].tolist())),
        np.where((RGB[2, 2] == RGB).all(axis=-1, keepdims=True), 255, RGB),
    ),
    "grey with a clear shade": (
        saved(SHADES, "PNG", transparency=int(GREY[2, 2, 0])),
        np.where(GREY[2, 2] == GREY, 255, GREY).repeat(3, axis=-1),
    ),
    "rgba": (saved(Image.fromarray(np.dstack([RGB, ALPHA])), "PNG"), on_white(RGB, ALPHA)),
    "rgba webp": (
        saved(Image.fromarray(np.dstack([RGB, ALPHA])), "WEBP", lossless=True, exact=True),
        on_white(RGB, ALPHA),
    ),
    "la": (
        saved(Image.fromarray(np.dstack([GREY[..., 0], ALPHA]), "LA"), "PNG"),
        on_white(GREY, ALPHA).repeat(3, axis=-1),
    ),
    "16-bit png": (
        saved(Image.fromarray(SIXTEEN), "PNG"),
        np.floor(SIXTEEN / 257 + 0.5).astype(np.uint8)[..., None].repeat(3, axis=-1),
    ),
    "16-bit tiff": (
        saved(Image.fromarray(SIXTEEN), "TIFF"),
        np.floor(SIXTEEN / 257 + 0.5).astype(np.uint8)[..., None].repeat(3, axis=-1),
    ),
    "16-bit pgm": (
        b"P5 11 9 65535\n" + SIXTEEN.astype(">u2").tobytes(),
        np.floor(SIXTEEN / 257 + 0.5).astype(np.uint8)[..., None].repeat(3, axis=-1),
    ),
    "1-bit": (
        saved(SHADES.point(lambda value: 255 * (value > 99), "1"), "PNG"),
        np.where(GREY > 99, np.uint8(255), np.uint8(0)).repeat(3, axis=-1),
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


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("resize", ("crop", "pad", "stretch"))
def test_reduced_scale_is_close_to_a_full_decode(orientation, resize, monkeypatch):
    """Of sizes that the scale does not divide too: the last row of pixels is half padding."""
    noise = np.random.default_rng(0).normal(0, 8, (533, 799, 3))
    photo = np.clip(smooth((533, 799)) + noise, 0, 255).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(photo), "JPEG", quality=90, exif=exif)
    reduced = read(data, size=(48, 64), resize=resize).astype(int)
    monkeypatch.setattr(images, "_MIN_DECODE_SCALE", 100)
    difference = np.abs(reduced - read(data, size=(48, 64), resize=resize))
    assert 0 < difference.max() <= 12 and difference.mean() < 0.7


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
        (b"hello", "not an image of a supported format, or damaged at its start"),
        (PNG[:-200], "truncated: its end is missing; copy it again"),
        (JPEG[:-200], "truncated: its end is missing; copy it again"),
        (HEIC[:-200], "truncated: its end is missing; copy it again"),
        (
            PNG[:60] + bytes(90) + PNG[150:],
            "damaged, or of a kind that is not supported: save it as PNG with another program",
        ),
        (bomb(), "more than 178,956,970 pixels: save it smaller"),
        (float_tiff(), "floating-point pixels: convert it to 8 or 16 bits"),
        (DEEP, "pixels outside 0 to 65535: convert it to 8 or 16 bits"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
            "not an image of a supported format, or damaged at its start",
        ),
    ],
)
def test_reasons(data, reason, capfd):
    with pytest.raises(images.ImageError) as caught:
        read(data)
    assert str(caught.value) == reason
    assert capfd.readouterr() == ("", "")


def test_files(tmp_path: Path):
    (tmp_path / "link.png").symlink_to("nowhere.png")
    (tmp_path / "real.png").write_bytes(PNG)
    (tmp_path / "good.png").symlink_to("real.png")
    assert read(tmp_path / "good.png", size=(5, 5)).shape == (5, 5, 3)
    with pytest.raises(images.ImageError, match="broken link"):
        read(tmp_path / "link.png")


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
