"""Pictures: readable whatever the classes are called, and the same bytes everywhere."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from factories import class_names
from PIL import Image

from stages.report import figures, matrix

pytestmark = pytest.mark.filterwarnings("error")

DRAW = """
import sys
from pathlib import Path
import numpy as np
from stages.report import figures, matrix
folder = Path(sys.argv[1])
images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
figures.image_grid(images, ["a_$b$", "b", "c", "d", "e"], "Five\\nimages", folder / "grid.png")
matrix.confusion_figure(np.eye(3, dtype=int) * 4, ["a", "b", "c"], "test", folder / "matrix.png")
"""


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG" and not image.info
        return np.asarray(image.convert("RGB"))


def contains(page, tile):
    """Say whether `tile` is somewhere in `page`, to the pixel."""
    height, width = tile.shape[:2]
    places = np.argwhere((page == tile[0, 0]).all(2))
    return any(
        np.array_equal(page[top : top + height, left : left + width], tile) for top, left in places
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_tiny_images_are_enlarged_pixel_by_pixel(tmp_path, channels):
    image = np.random.default_rng(0).integers(0, 256, (8, 6, channels), dtype=np.uint8)
    figures.image_grid([image], ["title"], "heading", tmp_path / "a.png")
    tile = np.broadcast_to(image, (8, 6, 3)).repeat(18, 0).repeat(18, 1)
    assert contains(pixels(tmp_path / "a.png"), tile)


def test_large_images_are_shrunk_and_many_make_no_large_file(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (120, 224, 224, 3), dtype=np.uint8)
    figures.image_grid(noise, [""] * 120, "Noise", tmp_path / "a.png", columns=10)
    assert (tmp_path / "a.png").stat().st_size < 1_500_000  # noise is the worst there is
    assert pixels(tmp_path / "a.png").shape[1] < 800


def test_marks_frame_an_image(tmp_path):
    images = np.zeros((2, 8, 8, 3), np.uint8)
    alert = np.array([0xD5, 0x5E, 0x00])
    for name, marked in (("a", [False, True]), ("b", None)):
        figures.image_grid(images, ["", ""], "", tmp_path / name, marked=marked)
        assert (pixels(tmp_path / name) == alert).all(2).any() == (name == "a")


def test_no_images_make_a_picture_that_says_so(tmp_path):
    figures.image_grid([], [], "Nothing to show", tmp_path / "a.png")
    assert pixels(tmp_path / "a.png").std() > 0


def test_as_many_titles_as_images(tmp_path):
    with pytest.raises(ValueError, match="1 images, 2 titles"):
        figures.image_grid([np.zeros((8, 8, 1), np.uint8)], ["a", "b"], "", tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_class_labels_can_be_drawn_and_told_apart():
    names = ["$x_1$", "a\nb", "café", "猫", "犬", "", "ё"]
    assert figures.class_labels(names) == [
        "$x_1$", "a\\nb", "café", "class 3", "class 4", "class 5", "ё",
    ]  # fmt: skip


def test_what_is_too_long_loses_its_middle():
    text = "a very long name of a class, number "
    shown = [figures.shorten(text + str(number), 120) for number in (11, 12)]
    assert shown[0] != shown[1] and shown[0].startswith("a very") and shown[0].endswith("11")
    assert all(figures.text_width(line) <= 120 for line in shown)
    assert figures.shorten("short", 120) == "short"


@pytest.mark.parametrize("classes", [2, 10, 20, 100])
def test_a_confusion_matrix_of_any_size(tmp_path, classes):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 2, (classes, classes)) + 30 * np.eye(classes, dtype=int)
    counts[1] = 0  # a class without images
    labels = figures.class_labels(class_names(classes))
    matrix.confusion_figure(counts, labels, "test images", tmp_path / "a.png")
    height, width = pixels(tmp_path / "a.png").shape[:2]
    assert 200 < height < 1_000 and 500 < width < 2_000


def test_of_many_classes_those_confused_most_come_first():
    counts = 50 * np.eye(30, dtype=int)
    counts[25, 7], counts[3, 29] = 9, 5
    assert matrix.class_order(counts)[:4].tolist() == [25, 7, 3, 29]
    assert sorted(matrix.class_order(counts)) == list(range(30))
    assert matrix.class_order(counts[:20, :20]).tolist() == list(range(20))


def test_the_users_settings_change_no_byte(tmp_path):
    """A matplotlibrc where the program runs, and variables, would change size, font and colours."""
    (tmp_path / "rc").mkdir()
    (tmp_path / "rc" / "matplotlibrc").write_text(
        "font.size: 40\nfont.family: cursive\ntext.usetex: True\nfigure.dpi: 30\n"
        "savefig.dpi: 30\nimage.interpolation: bilinear\nfigure.facecolor: red\naxes.grid: True\n"
    )
    seen = []
    for name in ("plain", "rc"):
        place = tmp_path / name
        place.mkdir(exist_ok=True)
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", DRAW, str(place)], cwd=place,
            env={"PYTHONPATH": str(ROOT), "MPLBACKEND": "svg"}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0 and not done.stderr, done.stderr
        seen.append([(place / file).read_bytes() for file in ("grid.png", "matrix.png")])
    assert seen[0] == seen[1]
