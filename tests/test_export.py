"""The command export: files that answer as the model does, run without this package."""

import base64
import io
import json
import re
import shutil
import struct
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, Project, options
from factories import make_model, make_prepared
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import Page, sync_playwright
from test_images import DISPLAY_P3, icc_profile
from test_plots_page import BROWSER, needs_browser

from stages import export as command
from stages.data.arrays import ImageSpec
from stages.data.images import read_image
from stages.deploy import onnx_model
from stages.deploy.card import model_card
from stages.deploy.page import RUNTIME, write_page
from stages.evaluate import evaluate
from stages.export import export
from stages.model.parameters import Train
from stages.predict import predict
from stages.report.parameters import Evaluate
from stages.run.cli import UserError

CLASSES = ["007", "</script>", "猫 café", "owl\nowl"]
SIZE = (12, 10, 3)
WEB = ROOT / ".dvc/tmp/web/node_modules"

needs_runtime = pytest.mark.skipif(
    not (WEB / "onnxruntime-web").exists(),
    reason=f"no ONNX Runtime Web here: npm install --prefix .dvc/tmp/web {RUNTIME}",
)


def photographs(folder: Path) -> Path:
    """Smooth colorful images of several kinds, which a reader can get wrong."""
    folder.mkdir()
    rng = np.random.default_rng(0)

    def colors(width: int, height: int, channels: int = 3) -> Image.Image:
        coarse = rng.integers(0, 256, (5, 4, channels), dtype=np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)

    def turned(orientation: int) -> Image.Exif:
        exif = Image.Exif()
        exif[0x0112] = orientation
        return exif

    xmp = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="3"/>'
    colors(90, 40).save(folder / "sideways.jpg", exif=turned(6), quality=95)
    colors(90, 40).save(folder / "upside down, as XMP says.jpg", xmp=xmp, quality=95)
    for orientation in (2, 5, 6, 7):
        place = folder / f"orientation {orientation}.webp"
        colors(90, 40).save(place, exif=turned(orientation), lossless=True)
    colors(40, 90).save(folder / "orientation 8.png", exif=turned(8))
    colors(40, 90).save(folder / "orientation 4.png", exif=turned(4))
    colors(2500, 1800).save(folder / "read in two strips of rows.png")
    colors(900, 5000).save(folder / "read in two strips of columns.png")
    colors(40, 90).save(folder / "tall.png")
    for name, content in {"gAMA": b"\0\x01\x86\xa0", "cICP": b"\x0c\x10\0\x01"}.items():
        chunk = PngInfo()
        chunk.add(name.encode(), content)  # linear; Display P3 with PQ
        colors(40, 40).save(folder / f"colors by {name}.png", pnginfo=chunk)
    others = [colors(40, 40), colors(40, 40)]
    place = folder / "animated.png"
    colors(40, 40).save(place, save_all=True, default_image=True, append_images=others)
    colors(40, 40).save(folder / "upside down, as XMP says.avif", xmp=xmp, quality=100)
    place = folder / "with a profile.bmp"
    colors(40, 40).save(place)
    place.write_bytes(with_profile(place.read_bytes(), icc_profile(2.2, DISPLAY_P3)))
    colors(7, 5).save(folder / "tiny.png")
    colors(50, 50, 4).save(folder / "transparent.png")
    colors(33, 50).convert("L").save(folder / "gray.png")
    return folder


def with_profile(bitmap: bytes, profile: bytes) -> bytes:
    """A BMP of 24 bits with the longest header, which can hold an ICC profile."""
    size, pixels = 124, bitmap[54:]
    header = struct.pack("<2sIII", b"BM", 138 + len(pixels + profile), 0, 138)
    header += struct.pack("<I", size) + bitmap[18:54] + bytes(16) + b"DEBM" + bytes(48)
    return header + struct.pack("<IIII", 4, size + len(pixels), len(profile), 0) + pixels + profile


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A workspace with a model, and all that export writes for it."""
    root = tmp_path_factory.mktemp("export")
    make_prepared(root, CLASSES, {"val": 40}, size=SIZE)
    make_model(root, CLASSES, size=SIZE)
    photographs(root / "photos")
    if WEB.exists():
        (root / ".dvc/tmp").mkdir(parents=True)
        (root / ".dvc/tmp/web").symlink_to(WEB.parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        export(formats=["saved_model"])
        differences = export(formats=["tflite"])  # what was there before is written anew
    assert set(differences) == {"onnx", "saved_model", "tflite"}
    assert max(differences.values()) < 1e-5
    return root


def probabilities(root: Path) -> dict[str, np.ndarray]:
    table = predict(root / "photos", root / "data/model.keras")
    assert not table["error"].any()
    rows = table.filter(regex="^p:").to_numpy()
    return {Path(path).name: row for path, row in zip(table["path"], rows, strict=True)}


def test_the_program_answers_as_predict_does_without_this_package(exported, tmp_path):
    done = subprocess.run(
        [sys.executable, exported / "data/export/classify.py", exported / "photos"],
        cwd=tmp_path, capture_output=True, encoding="utf-8", check=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONIOENCODING": "cp1252"},
    )  # fmt: skip
    expected = probabilities(exported)
    entries = json.loads(done.stdout)
    assert [Path(entry["path"]).name for entry in entries] == sorted(expected)
    for entry in entries:
        row = expected[Path(entry["path"]).name]
        assert entry["predicted"] == CLASSES[row.argmax()]
        found = [entry["probabilities"][name] for name in CLASSES]
        assert np.allclose(found, row, atol=1e-5)


def test_the_program_names_what_it_cannot_read(exported, tmp_path):
    (tmp_path / "bad.jpg").write_text("no image")
    done = subprocess.run(
        [sys.executable, exported / "data/export/classify.py", tmp_path / "bad.jpg"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert json.loads(done.stdout)[0]["error"].startswith("not an image")
    assert done.stderr == ""


def test_the_program_reads_the_files_that_predict_reads(exported, tmp_path):
    for name in ("b.png", "a/1.jpg", "a/@eaDir/1.jpg/THUMB.jpg", "#recycle/2.png", ".x/3.png"):
        (tmp_path / "new" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(exported / "photos/gray.png", tmp_path / "new" / name)
    (tmp_path / "new/a/link").symlink_to(exported)
    done = subprocess.run(
        [sys.executable, exported / "data/export/classify.py", tmp_path / "new"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    table = predict(tmp_path / "new", exported / "data/model.keras")
    assert [entry["path"] for entry in json.loads(done.stdout)] == list(table["path"])
    assert len(table) == 3 and done.returncode == 1
    assert "passed over: 3 images in folders of a system" in done.stderr
    assert "a/@eaDir" in done.stderr and "#recycle" in done.stderr


def test_a_class_is_a_line_of_the_labels(exported):
    labels = (exported / "data/export/labels.txt").read_text(encoding="utf-8")
    assert labels.splitlines() == ["007", "</script>", "猫 café", "owl owl"]


def test_the_file_says_which_model_of_which_data_it_is(project: Project, monkeypatch):
    monkeypatch.chdir(project.root)
    export()
    _, metadata = onnx_model.load(project / "data/export/model.onnx")
    lock = (project / "dvc.lock").read_text(encoding="utf-8")
    assert metadata["dataset"] == "data/formes"
    assert metadata["dataset_md5"] in lock
    assert metadata["model_md5"] in lock
    assert metadata["commit"] == project.git("log", "-1", "--format=%H", "--", "dvc.lock").strip()
    assert project.git("status", "--porcelain") == ""


def test_a_changed_answer_is_an_error_and_writes_nothing(exported, tmp_path, monkeypatch):
    predict_fn, metadata = onnx_model.load(exported / "data/export/model.onnx")
    shifted = lambda chunks: np.roll(predict_fn(chunks), 1, axis=1)  # noqa: E731
    monkeypatch.setattr(onnx_model, "convert", lambda *_: None)
    monkeypatch.setattr(onnx_model, "load", lambda _: (shifted, metadata))
    monkeypatch.chdir(exported)
    with pytest.raises(UserError, match="the onnx model gives another class than the model for 40"):
        export(output=tmp_path / "export")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["tf2onnx", "onnxruntime", "ai_edge_litert.interpreter"])
def test_a_missing_package_is_one_line(exported, tmp_path, monkeypatch, package):
    if package != "tf2onnx":
        finished = exported / "data/export/model.onnx"
        monkeypatch.setattr(onnx_model, "convert", lambda _, path, __: shutil.copy(finished, path))
    monkeypatch.chdir(exported)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r'not installed: run `pip install "\.\[\w+\]"`') as error:
        export(output=tmp_path / "export", formats=["tflite"])
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_pyproject_pins_the_extras_that_messages_name():
    code = "".join(path.read_text("utf-8") for path in (ROOT / "stages").rglob("*.py"))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"][
        "optional-dependencies"
    ]
    named = set(re.findall(r"pip install \"\.\[(\w+)\]\"", code))
    assert {"cluster", "export", "search", "tflite"} <= named <= extras.keys()
    assert all("==" in requirement for group in extras.values() for requirement in group)


def test_without_validation_images_nothing_is_exported(exported, tmp_path):
    with pytest.raises(UserError, match="no validation images to compare answers on"):
        export(exported / "data/model.keras", tmp_path / "none", output=tmp_path / "export")
    make_prepared(tmp_path, CLASSES, {"val": 4}, size=(8, 8, 3))
    with pytest.raises(UserError, match="not trained on the images in"):
        export(
            exported / "data/model.keras", tmp_path / "data/prepared", output=tmp_path / "export"
        )


def test_another_version_of_the_browser_runtime_is_refused(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runtime = tmp_path / ".dvc/tmp/web/node_modules/onnxruntime-web"
    runtime.mkdir(parents=True)
    (runtime / "package.json").write_text('{"name": "onnxruntime-web", "version": "1.0.0"}')
    with pytest.raises(UserError, match=f"expected {RUNTIME}, found"):
        export(exported / "data/model.keras", exported / "data/prepared", output=tmp_path / "a")


RESIZE = """([text, width, height, changes]) => {
  const data = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const original = { ...SPEC };
  Object.assign(SPEC, changes);
  const pixels = Array.from(preprocess(() => data, width, height, 1));
  Object.assign(SPEC, original);
  return pixels;
}"""
RESIZED = [
    (resize, size, shape)
    for resize in ("crop", "pad", "stretch")
    for size, shape in (
        ((30, 17), (12, 10, 3)), ((5, 9), (12, 10, 3)), ((10, 12), (12, 10, 1)),
        ((201, 64), (31, 32, 1)), ((64, 3), (7, 8, 3)), ((40, 93), (12, 10, 3)),
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def page(exported) -> Iterator[Page]:
    """The exported page, in a browser without a network."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=BROWSER,
            args=[
                "--no-sandbox", "--disable-gpu", "--disable-background-networking",
                "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
            ],
        )  # fmt: skip
        page = browser.new_context(offline=True).new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto((exported / "data/export/index.html").as_uri())
        page.wait_for_selector("#drop")
        yield page
        assert [url for url in asked if not url.startswith(("file:", "blob:"))] == []
        browser.close()


@needs_browser
@needs_runtime
def test_the_page_answers_as_predict_does(exported, page, tmp_path):
    (tmp_path / "no image.png").write_text("no image")
    photos = sorted((exported / "photos").iterdir())
    classify(page, photos)
    found = {
        result.locator(".name").inner_text(): json.loads(result.get_attribute("data-probabilities"))
        for result in page.locator("[data-probabilities]").all()
    }
    expected = probabilities(exported)
    assert [*found] == [photo.name for photo in photos]  # in this order
    for name, row in expected.items():
        another_decoder = name.endswith((".jpg", ".avif"))
        assert np.abs(found[name] - row).max() < (0.05 if another_decoder else 1e-4), name


@needs_browser
@needs_runtime
def test_unsure_predictions_are_marked_and_a_phone_shows_the_page_whole(exported, page, tmp_path):
    runtime, spec = (
        WEB / "onnxruntime-web",
        ImageSpec.read(exported / "data/prepared/image_spec.json"),
    )
    confidences = {name: row.max() for name, row in probabilities(exported).items()}
    threshold = float(np.median([*confidences.values()]))
    write_page(tmp_path / "a.html", exported / "data/export/model.onnx", spec, runtime, threshold)
    tab = page.context.new_page()
    tab.set_viewport_size({"width": 390, "height": 700})
    tab.goto((tmp_path / "a.html").as_uri())
    tab.wait_for_selector("#drop")
    photos = [exported / "photos" / name for name in confidences if name.endswith(".png")]
    for photo in photos:  # each below those that are there
        tab.set_input_files("#files", [photo])
    tab.wait_for_selector(f".result:nth-child({len(photos)})[data-probabilities]")
    results = tab.locator(".result")
    names = [name.inner_text() for name in results.locator(".name").all()]
    assert names == [photo.name for photo in photos]
    marked = ["unsure" in result.get_attribute("class").split() for result in results.all()]
    assert marked == [confidences[name] < threshold for name in names] and {*marked} == {
        True,
        False,
    }
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    tab.close()


def test_the_card_says_what_the_model_is_for_in_rounded_numbers(tmp_path):
    make_prepared(tmp_path, CLASSES, {"train": 5, "val": 30, "test": 40}, size=SIZE)
    make_model(tmp_path, CLASSES, size=SIZE)
    folders = tmp_path / "data/prepared", tmp_path / "data/model.keras", tmp_path / "metrics"
    evaluate(Evaluate(), *folders, "data/pets", Train())
    spec = ImageSpec.read(tmp_path / "data/prepared/image_spec.json")
    card = model_card(tmp_path / "metrics", spec, {"date": "2026-11-30"}, "Ann")
    verdict = pd.read_csv(tmp_path / "metrics/verdict.csv").set_index("name")["value"]
    assert f"| result | {' '.join(verdict['result'].split())} |" in card
    assert verdict["next"] not in card  # that is for the one who trains
    assert "## Intended use" in card and "Author: Ann." in card and "| date | 2026-11-30 |" in card
    assert not re.search(r"\d\.\d{5}", card)


def classify(page: Page, files: list[Path]) -> list[str]:
    """Give files to the page; return what it says of those that it refuses."""
    page.evaluate("byId('results').replaceChildren()")
    page.set_input_files("#files", files)
    page.wait_for_selector(
        f".result:nth-child({len(files)}):is([data-error], [data-probabilities])"
    )
    return [result.inner_text() for result in page.locator("[data-error]").all()]


@needs_browser
@needs_runtime
def test_what_the_page_can_not_read_it_refuses_with_advice(page, tmp_path):
    image = Image.new("RGB", (8, 8), "red")
    (tmp_path / "1 no image.png").write_text("no image")
    image.save(tmp_path / "2.tif")
    image.save(tmp_path / "3.heic")
    image.save(tmp_path / "4.jp2")
    Image.new("L", (33_000, 1)).save(tmp_path / "5 wide.png")
    packed = PngInfo()
    packed.add_text("Raw profile type exif", "\nexif\n 0\n", zip=True)
    image.save(tmp_path / "6 packed.png", pnginfo=packed)
    shades = Image.linear_gradient("L").resize((64, 64))
    image.save(tmp_path / "7 plain.png")
    shades.save(tmp_path / "8 animated.avif", save_all=True, append_images=[image.resize((64, 64))])
    bitmap = io.BytesIO()
    shades.save(bitmap, "BMP")
    (tmp_path / "9 packed.bmp").write_bytes(bitmap.getvalue()[:30] + b"\1" + bitmap.getvalue()[31:])
    refused = classify(page, sorted(tmp_path.iterdir()))
    differ = "browsers differ in what they read of an animated AVIF or a compressed BMP"
    advice = "; save it as a JPEG or PNG of ordinary size, or use classify.py"
    assert refused == [
        f"1 no image.png: it is no image, or damaged{advice}",
        f"2.tif: this browser does not read TIFF{advice}",
        f"3.heic: this browser does not read HEIC{advice}",
        f"4.jp2: this browser does not read JPEG 2000{advice}",
        f"5 wide.png: 33000 × 1 pixels are too many for a browser{advice}",
        f"6 packed.png: its metadata is packed as browsers can't read it{advice}",
        f"7 plain.png: nothing but one plain shade is seen of it{advice}",
        f"8 animated.avif: {differ}{advice}",
        f"9 packed.bmp: {differ}{advice}",
    ]


@needs_browser
@needs_runtime
def test_the_page_refuses_a_file_whose_end_is_missing(page, tmp_path):
    image, thumbnail = Image.linear_gradient("L").convert("RGB"), io.BytesIO()
    image.resize((32, 32)).save(thumbnail, "JPEG")
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\0" + thumbnail.getvalue()
    image.save(tmp_path / "1.jpg", exif=exif)
    image.save(tmp_path / "2.jpg", progressive=True)
    for name in ("3.png", "4.gif", "5.bmp"):
        image.save(tmp_path / name)
    assert classify(page, sorted(tmp_path.iterdir())) == []
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 9 // 10])
    refused = classify(page, sorted(tmp_path.iterdir()))
    assert len(refused) == 5 and all(": its end is missing: copy it" in line for line in refused)


OPEN_TWICE = """async () => {
  const devices = navigator.mediaDevices, open = devices.getUserMedia.bind(devices);
  window.tracks = [];
  devices.getUserMedia = async (wanted) => {
    const stream = await open(wanted);
    tracks.push(...stream.getTracks());
    return stream;
  };
  byId("camera").click();
  byId("camera").click();
}"""


@needs_browser
@needs_runtime
def test_the_camera_is_closed_even_if_it_was_opened_twice(page):
    page.evaluate("byId('results').replaceChildren()")
    page.evaluate(OPEN_TWICE)
    page.wait_for_function("byId('video').videoWidth > 0")
    page.click("#shoot")
    page.wait_for_selector(".result[data-probabilities]")
    page.click("#close")
    states = page.evaluate("tracks.map((track) => track.readyState)")
    assert states and {*states} == {"ended"}
    assert page.is_enabled("#camera") and not page.is_visible("#video")


@needs_browser
@needs_runtime
@pytest.mark.parametrize(("resize", "size", "shape"), RESIZED)
def test_the_page_resizes_to_the_same_pixels(page, resize, size, shape):
    width, height = size
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    mode = "rgb" if shape[2] == 3 else "grayscale"
    expected, _ = read_image(file.getvalue(), ImageSpec([], shape, mode, resize))
    opaque = np.dstack([pixels, np.full((height, width), 255, np.uint8)])
    text = base64.b64encode(opaque.tobytes()).decode()
    found = page.evaluate(RESIZE, [text, width, height, {"resize": resize, "image_shape": shape}])
    assert np.array_equal(found, expected.ravel())


def test_the_command_says_what_it_wrote(exported, monkeypatch, capsys):
    monkeypatch.chdir(exported)
    command.main(options("export"))
    said = capsys.readouterr().out
    assert "same class for every validation image" in said
    assert "classify.py PHOTO" in said
