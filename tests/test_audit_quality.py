"""Facts of original images, findings of poor quality, shortcuts."""

import io
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pillow_heif
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps, PngImagePlugin

from stages.auditing import shortcuts as shortcut_search
from stages.auditing.facts import read_facts
from stages.auditing.quality import KINDS, quality
from stages.auditing.shortcuts import describe, shortcuts
from stages.data.images import Preprocessing, decode, hash_bytes
from stages.run.cli import UserError

SIZE = (90, 60)  # width, height


def picture(seed: int = 0, size: tuple[int, int] = SIZE, mode: str = "RGB") -> Image.Image:
    """Draw sharp shapes of random colors, from dark to bright, on a background."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(rng.integers(80, 180, 3).tolist()))
    draw, (width, height) = ImageDraw.Draw(image), size
    for shade in (20, 230, *rng.integers(0, 256, 8).tolist()):
        left, top = rng.uniform(0, 0.8, 2) * size
        box = (left, top, left + width / 4, top + height / 4)
        draw.rectangle(box, fill=(shade, shade, int(rng.integers(0, 256))))
    return image.convert(mode)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def facts_of(folder: Path, *contents: bytes, **options) -> pd.DataFrame:
    for number, content in enumerate(contents):
        (folder / f"{number:03d}").write_bytes(content)
    return read_facts(table(folder), folder, **options)


def table(folder: Path) -> pd.DataFrame:
    """List the files in a folder, as index.csv does; with an index of another order."""
    paths = sorted(path.name for path in folder.iterdir())
    digests = [hash_bytes((folder / path).read_bytes()).hex() for path in paths]
    index = range(len(paths), 0, -1)
    return pd.DataFrame({"path": paths, "digest": digests}, index)


def exif(**tags) -> Image.Exif:
    found = Image.Exif()
    for tag, value in tags.items():
        found[{"orientation": 274, "make": 271, "model": 272}[tag]] = value
    return found


def heic(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    pillow_heif.from_pillow(image).save(file, quality=90, **options)
    return file.getvalue()


def with_broken_text(data: bytes) -> bytes:
    """Damage a PNG's text, which Pillow refuses to open and prepare repairs."""
    return data.replace(b"tEXtComment\0", b"tEXtComment\1", 1)


def text() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "text")
    return info


CAMERA = exif(make="Maker", model="Model 1\0")
FILES = {
    "JPEG": (encoded(picture(), "JPEG", quality=95, exif=CAMERA), "RGB", "Maker Model 1"),
    "progressive JPEG": (encoded(picture(), "JPEG", quality=95, progressive=True), "RGB", ""),
    "CMYK": (encoded(picture(mode="CMYK"), "JPEG", quality=95), "CMYK", ""),
    "JPEG without its end": (encoded(picture(), "JPEG", quality=95)[:-2], "RGB", ""),
    "PNG": (encoded(picture(), "PNG", exif=CAMERA), "RGB", "Maker Model 1"),
    "PNG with broken text": (
        with_broken_text(encoded(picture(), "PNG", pnginfo=text())), "RGB", "",
    ),
    "palette": (encoded(picture().quantize(200), "PNG"), "P", ""),
    "GIF": (encoded(picture().quantize(200), "GIF"), "P", ""),
    "alpha": (encoded(picture(mode="RGBA"), "PNG"), "RGBA", ""),
    "WebP": (encoded(picture(), "WEBP", lossless=True, exif=CAMERA), "RGB", "Maker Model 1"),
    "TIFF": (encoded(picture(), "TIFF", tiffinfo={271: "Maker", 272: "Model 1"}), "RGB",
             "Maker Model 1"),
    "HEIC": (heic(picture(), exif=CAMERA.tobytes()), "RGB", "Maker Model 1"),
    "broken EXIF": (encoded(picture(), "JPEG", quality=95, exif=b"Exif\0\0MM\0*broken"), "RGB", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_facts_of_every_kind_of_file_that_prepare_reads(name, tmp_path):
    data, mode, camera = FILES[name]
    decode(data, Preprocessing(SIZE[::-1], "crop"))  # prepare reads it
    facts = facts_of(tmp_path, data).iloc[0]
    pixels, gray = np.asarray(picture(), float), np.asarray(picture(mode="L"), float)
    assert tuple(facts[["width", "height", "file_bytes", "mode"]]) == (*SIZE, len(data), mode)
    assert facts["camera"] == camera
    assert (facts["quantization"] > 0) == (facts["format"] == "JPEG")
    color = facts[["red", "green", "blue"]].tolist()
    assert color == pytest.approx(pixels.mean((0, 1)), abs=3)
    assert facts["contrast"] == pytest.approx(gray.std(), abs=3)
    percentiles = np.percentile(gray, (0.1, 99))
    assert facts[["darkest", "brightest"]].tolist() == pytest.approx(percentiles, abs=12)
    assert facts["saturation"] == pytest.approx(np.ptp(pixels, axis=-1).mean(), abs=6)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_size_is_upright(kind, tmp_path):
    facts = facts_of(tmp_path, encoded(picture(), kind, exif=exif(orientation=6)))
    assert facts[["width", "height"]].to_numpy().tolist() == [[60, 90]]


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (3000, 1), (15, 16), (257, 255), (2400, 1800)])
def test_any_size(size, tmp_path):
    facts = facts_of(tmp_path, encoded(picture(size=size), "JPEG")).iloc[0]
    assert (facts["width"], facts["height"]) == size
    has_border = min(size) >= 16
    assert np.isfinite(facts[["sharpness", "border_red"]].astype(float)).all() == has_border


def test_the_border_is_that_of_the_whole_image(tmp_path):
    framed = ImageOps.expand(picture(size=(640, 480)), 30, (200, 30, 40))
    facts = facts_of(tmp_path, encoded(framed, "PNG")).iloc[0]
    border = facts[["border_red", "border_green", "border_blue"]].tolist()
    assert border == pytest.approx([200, 30, 40], abs=1)


def test_more_than_8_bits_are_as_bright_as_prepare_sees_them(tmp_path):
    """An image of 12 bits fills a part of 16 bits only: with the white level, it isn't dark."""
    values = np.asarray(picture(mode="L")).astype(np.uint16) * 16
    data = encoded(Image.fromarray(values), "PNG")
    assert facts_of(tmp_path, data)["brightest"].item() < 20
    facts = facts_of(tmp_path, data, white_level=4095).iloc[0]
    brightest = np.percentile(values / 16, 99)
    assert facts["brightest"] == pytest.approx(brightest, abs=2) and facts["mode"] == "I;16"


def test_traces_on_white_are_blank(tmp_path):
    """What is too small to be seen in a thumbnail, prepare may have seen in a larger image."""
    image = Image.new("RGBA", (2000, 2000), (0, 0, 0, 0))
    image.putpixel((1000, 1000), (0, 0, 0, 255))
    data = encoded(image, "PNG")
    decode(data, Preprocessing((2000, 2000), "crop"))
    others = [encoded(picture(seed), "PNG") for seed in range(9)]
    found = quality(facts_of(tmp_path, data, *others))
    assert found[["row", "kind"]].to_numpy().tolist() == [[0, "blank"]]


def test_files_that_changed_are_named_all_at_once(tmp_path):
    for number in range(9):
        (tmp_path / f"{number}.png").write_bytes(encoded(picture(number), "PNG"))
    images = table(tmp_path)
    (tmp_path / "3.png").unlink()
    (tmp_path / "5.png").write_bytes(b"")
    (tmp_path / "7.png").write_bytes(encoded(picture(100), "PNG"))
    with pytest.raises(UserError, match=r"3 files changed or gone .* 3\.png, 5\.png, 7\.png;"):
        read_facts(images, tmp_path)


def test_facts_are_in_the_order_of_the_images_and_the_same_in_processes(tmp_path, monkeypatch):
    for number in range(150):
        (tmp_path / f"{number:03d}.png").write_bytes(encoded(picture(number, (30, 20)), "PNG"))
    images = table(tmp_path)
    alone = read_facts(images, tmp_path)
    assert alone.index.tolist() == images.index.tolist()
    last = read_facts(images.iloc[-1:], tmp_path)
    pd.testing.assert_frame_equal(alone.iloc[-1:], last)
    monkeypatch.setenv("PREPARE_WORKERS", "2")
    monkeypatch.setattr("stages.run.parallel._TRIAL_SECONDS", 0)
    monkeypatch.setattr("stages.run.parallel._POOL_SECONDS", 0)
    pd.testing.assert_frame_equal(alone, read_facts(images, tmp_path))


def test_no_images(tmp_path):
    facts = read_facts(pd.DataFrame({"path": [], "digest": []}), tmp_path)
    assert quality(facts).empty and shortcuts(facts, np.empty(0, int), []).empty


LARGE = (400, 300)
DEFECTS = {
    "blank": lambda image: Image.new("RGB", image.size, (90, 120, 150)),
    "blank: black": lambda image: Image.new("RGB", image.size),
    "blank: white": lambda image: Image.new("RGB", image.size, "white"),
    "blank: noise": lambda image: Image.effect_noise(image.size, 8),
    "dark": lambda image: ImageEnhance.Brightness(image).enhance(0.2),
    "bright": lambda image: Image.eval(image, lambda level: 255 - (255 - level) // 5),
    "low contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.07),
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(5)),
    "blurred: moved": lambda image: image.filter(ImageFilter.BoxBlur((12, 0))),
    "blurred: enlarged": lambda image: image.resize((50, 38)).resize(image.size),
    "tiny": lambda image: image.resize((32, 24)),
    "odd shape": lambda image: image.crop((0, 100, 400, 150)),
    "odd shape: tall": lambda image: image.crop((100, 0, 150, 300)),
}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> pd.DataFrame:
    """Facts of 40 sound pictures."""
    contents = [encoded(picture(seed, LARGE), "JPEG", quality=90) for seed in range(40)]
    return facts_of(tmp_path_factory.mktemp("photographs"), *contents)


def test_nothing_is_found_in_sound_pictures(photographs):
    assert quality(photographs).empty


@pytest.mark.parametrize("name", DEFECTS)
def test_each_defect_is_found_as_one_kind_only(name, photographs, tmp_path):
    spoiled = DEFECTS[name](picture(99, LARGE))
    facts = facts_of(tmp_path, encoded(spoiled, "JPEG", quality=90))
    found = quality(pd.concat([photographs, facts]))
    assert found[["row", "kind"]].to_numpy().tolist() == [[40, name.partition(":")[0]]]
    assert found["score"].item() > 1


@pytest.mark.parametrize("name", ["dark", "bright", "low contrast", "blurred", "tiny", "odd shape"])
def test_what_a_whole_dataset_is_like_is_no_defect(name, tmp_path):
    contents = [encoded(DEFECTS[name](picture(seed, LARGE)), "PNG") for seed in range(30)]
    assert quality(facts_of(tmp_path, *contents)).empty


def test_drawings_on_white_are_no_defects_but_an_empty_sheet_is(tmp_path):
    sheets = []
    for seed in range(30):
        sheet, rng = Image.new("L", (28, 28), "white"), np.random.default_rng(seed)
        ImageDraw.Draw(sheet).line(rng.integers(6, 22, 8).tolist(), fill=0)
        sheets.append(encoded(sheet, "PNG"))
    assert quality(facts_of(tmp_path, *sheets)).empty
    found = quality(facts_of(tmp_path, *sheets, encoded(Image.new("L", (28, 28), 255), "PNG")))
    assert found[["row", "kind"]].to_numpy().tolist() == [[30, "blank"]]


def test_a_thin_drawing_among_photographs_is_not_taken_for_too_bright(photographs, tmp_path):
    sheet = Image.new("RGB", LARGE, "white")
    ImageDraw.Draw(sheet).line((150, 100, 250, 180, 200, 220), fill="black", width=3)
    facts = facts_of(tmp_path, encoded(sheet, "PNG"))
    assert quality(pd.concat([photographs, facts])).empty


def test_the_worst_comes_first(photographs, tmp_path):
    light = [0.25, 0.1, 0.2]
    spoiled = [ImageEnhance.Brightness(picture(seed, LARGE)).enhance(by)
               for seed, by in enumerate(light)]  # fmt: skip
    blank = Image.new("RGB", LARGE, "red")
    contents = [encoded(image, "PNG") for image in (*spoiled, blank)]
    found = quality(pd.concat([facts_of(tmp_path, *contents), photographs]))
    assert found["row"].tolist() == [3, 1, 2, 0]
    assert found["kind"].tolist() == ["blank", "dark", "dark", "dark"]
    assert set(found["kind"]) <= set(KINDS) and found["score"][1:].is_monotonic_decreasing


def measured(count: int, seed: int = 0) -> pd.DataFrame:
    """Facts of images that tell nothing about a class."""
    rng = np.random.default_rng(seed)
    levels = ("red", "green", "blue", "saturation", "darkest", "brightest", "contrast")
    borders = ("border_red", "border_green", "border_blue")
    colors = {name: rng.uniform(0, 255, count) for name in (*levels, *borders)}
    return pd.DataFrame(colors).assign(
        width=rng.choice([400, 640], count),
        height=rng.choice([300, 480], count),
        format=rng.choice(["JPEG", "PNG"], count),
        mode="RGB",
        quantization=0,
        camera=rng.choice(["", "A 1", "B 2"], count),
    )


PLANTED = {
    "size and shape": {"width": 401},
    "file type and camera": {"camera": "C 3"},
    "color and brightness": {"brightest": 40.0},
    "color of the border": {"border_red": 200.0, "border_blue": 20.0},
}


@pytest.mark.parametrize("number", [2, 3, 10])
@pytest.mark.parametrize("group", PLANTED)
def test_a_class_that_its_facts_tell_is_found(group, number):
    facts = measured(600)
    labels = np.random.default_rng(1).integers(0, number, 600)
    classes = [f"class {k}" for k in range(number)]
    assert shortcuts(facts, labels, classes).empty
    for column, value in PLANTED[group].items():
        facts[column] = np.where(labels == 1, value, facts[column])
    found = shortcuts(facts, labels, classes)
    assert set(found["facts"]) == {group} and "class 1" in set(found["class"])
    assert len(found) == (2 if number == 2 else 1)  # of two classes, the other is told, too
    assert (found["recall"] > 0.95).all() and (found["recall_shuffled"] < 0.7).all()


def test_a_size_that_others_have_too_tells_no_class():
    """All images of a class have a size that half of the others have: it is no shortcut."""
    facts, labels = measured(600), np.arange(600) % 10
    facts["width"] = np.where((labels == 1) | (np.arange(600) // 10 % 2 == 0), 400, 640)
    facts["height"] = 300
    assert shortcuts(facts, labels, list("abcdefghij")).empty


def test_a_rare_class_is_told_and_one_with_fewer_images_than_folds_left_out():
    facts, labels = measured(1000), np.zeros(1000, int)
    labels[:500], labels[500:520], labels[996:] = 1, 2, 3
    facts.loc[labels >= 2, "width"] = np.where(labels[labels >= 2] == 2, 401, 402)
    found = shortcuts(facts, labels, ["a", "b", "rare", "too few"])
    assert found[["class", "facts"]].to_numpy().tolist() == [["rare", "size and shape"]]


@pytest.mark.parametrize("labels", [[0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1], [0, 1, 2, 3, 4, 5]])
def test_too_few_classes_or_images_for_folds(labels):
    assert shortcuts(measured(6), np.array(labels), list("abcdef")).empty


def test_a_large_dataset_is_thinned_out_alike_each_time(monkeypatch):
    monkeypatch.setattr(shortcut_search, "_MAX_IMAGES", 300)
    facts, labels = measured(5000), np.arange(5000) % 50
    labels[labels > 9] = 0
    facts.loc[labels == 4, "format"] = "GIF"
    rows = shortcut_search._thinned(labels)
    assert np.bincount(labels[rows]).tolist() == [30] * 10
    found = shortcuts(facts, labels, list("abcdefghij"))
    assert found[["class", "facts"]].to_numpy().tolist() == [["e", "file type and camera"]]
    pd.testing.assert_frame_equal(found, shortcuts(facts, labels, list("abcdefghij")))


def test_a_shortcut_as_a_sentence():
    row = pd.Series({"class": "pants", "facts": "size and shape", "recall": 0.9999})
    assert re.fullmatch(
        r"pants can be told by size and shape alone \(recall 99 %\): make sure that .* is learned",
        describe(row),
    )
