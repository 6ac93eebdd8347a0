"""Figures: readable for any class names, and the same bytes for any settings."""

import base64
import io
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from factories import class_names, make_prepared
from PIL import Image

from stages.data.arrays import read_split
from stages.report import figures
from stages.report.grids import label_error_gallery, mistake_gallery, sample_figure
from stages.report.metrics import confused_pairs

pytestmark = pytest.mark.filterwarnings("error")

DRAW = """
import sys
from pathlib import Path
import numpy as np
from stages.report import figures
folder = Path(sys.argv[1])
images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
figures.image_grid(images, ["a_$b$", "b", "c", "d", "e"], "Five\\nimages", folder / "grid.png")
counts = np.array([[4, 1, 0], [0, 4, 0], [0, 0, 4]])
figures.confusion_figure(
    counts, np.array([[0, 1]]), ["a", "b", "c"], "test", folder / "matrix.png"
)
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
    tile = np.broadcast_to(image, (8, 6, 3)).repeat(21, 0).repeat(21, 1)
    assert contains(pixels(tmp_path / "a.png"), tile)


def test_large_images_are_shrunk_and_many_make_no_large_file(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (120, 224, 224, 3), dtype=np.uint8)
    figures.image_grid(noise, [""] * 120, "Noise", tmp_path / "a.png", columns=(10,))
    assert (tmp_path / "a.png").stat().st_size < 1_500_000  # noise is the worst there is
    assert pixels(tmp_path / "a.png").shape[1] < 800


def test_marks_frame_an_image(tmp_path):
    images = np.zeros((2, 8, 8, 3), np.uint8)
    alert = np.array([0xD5, 0x5E, 0x00])
    for name, marked in (("a", [False, True]), ("b", None)):
        figures.image_grid(images, ["", ""], "", tmp_path / name, marked=marked)
        assert (pixels(tmp_path / name) == alert).all(2).any() == (name == "a")


def test_groups_of_columns_are_told_apart_by_wider_gaps(tmp_path):
    """Of five black images in columns of two and two, the fifth begins the second row."""
    images = np.zeros((5, 8, 8, 1), np.uint8)
    figures.image_grid(images, [""] * 5, "", tmp_path / "a.png", columns=(2, 2))
    page = pixels(tmp_path / "a.png")
    edges = np.flatnonzero(np.diff((page == 0).all(2).any(0).astype(int)))
    first, between, last = edges[2] - edges[1], edges[4] - edges[3], edges[6] - edges[5]
    assert len(edges) == 8 and between > 2 * first == 2 * last
    assert (page == 0).all(2).any(1).sum() == 2 * (edges[1] - edges[0])


def test_without_images_there_is_still_a_heading(tmp_path):
    figures.image_grid([], [], "Nothing to show", tmp_path / "a.png")
    assert pixels(tmp_path / "a.png").std() > 0


def test_as_many_titles_as_images(tmp_path):
    with pytest.raises(ValueError, match="longer"):
        figures.image_grid([np.zeros((8, 8, 1), np.uint8)], ["a", "b"], "", tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_class_labels_can_be_drawn_and_told_apart():
    names = ["$x_1$", "a\nb", "café", "猫", "犬", "", "ё"]
    assert figures.class_labels(names) == [
        "$x_1$", "a\\nb", "café", "class 3", "class 4", "class 5", "ё",
    ]  # fmt: skip


def test_long_titles_stay_in_their_cells_and_differ(tmp_path):
    images = np.zeros((4, 8, 8, 1), np.uint8)
    figures.image_grid(images, [""] * 4, "", tmp_path / "untitled.png")
    gaps = (pixels(tmp_path / "untitled.png") == 255).all((0, 2))
    grids = []
    for number in (1, 2):
        titles = [f"a long class name, WWWWWWWWWWWW, number {number}"] * 4
        figures.image_grid(images, titles, "", tmp_path / "titled.png")
        grids.append(pixels(tmp_path / "titled.png"))
        assert (grids[-1][:, gaps] == 255).all()
    assert (grids[0] != grids[1]).any()


def test_a_title_may_extend_over_untitled_images(tmp_path):
    images, long = np.zeros((24, 8, 8, 1), np.uint8), "a long class name " * 3
    gaps, in_gaps = None, []
    for titles in ([""] * 24, [long, *[""] * 11] * 2, [long] * 24):
        figures.image_grid(images, titles, "", tmp_path / "a.png", columns=(12,))
        page = pixels(tmp_path / "a.png")
        gaps = (page == 255).all((0, 2)) if gaps is None else gaps
        in_gaps.append(bool((page[:, gaps] < 255).any()))
    assert in_gaps == [False, True, False]


def no_evidence(images, labels):
    return np.zeros(images.shape[:3])


def test_an_image_is_drawn_beside_its_heatmap(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (8, 6, 1), dtype=np.uint8)
    heatmap = np.zeros((8, 6))
    heatmap[2, 3] = 1
    figures.explanation_figure(image, heatmap, "a\nb", tmp_path / "a.png")
    gray = np.broadcast_to(image, (8, 6, 3))
    heated = figures.overlay(image, heatmap)
    assert np.flatnonzero((heated != gray).any(2)).tolist() == [2 * 6 + 3]
    assert heated[2, 3, 0] > heated[2, 3, 1] > heated[2, 3, 2]
    factor = 720 // 13  # of both and the gap
    for tile in (gray, heated):
        assert contains(pixels(tmp_path / "a.png"), tile.repeat(factor, 0).repeat(factor, 1))


def test_titles_name_classes_and_files_and_an_empty_grid_says_none(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("stages.report.grids.image_grid", lambda *args, **_: drawn.append(args))
    make_prepared(tmp_path, ["a", "b"], {"train": 2, "test": 4})
    splits = {"test": read_split(tmp_path / "data/prepared/test")}
    images = pd.DataFrame({
        "path": [f"a/{row}.png" for row in range(4)], "split": "test", "array_index": range(4),
        "class": "a", "predicted": "a", "label": 0, "predicted_label": 0, "confidence": 0.78,
        "label_probability": 0.78, "suggestion": 1,
    })  # fmt: skip
    wrong = images.assign(predicted="b", predicted_label=1, label_probability=0.22)[:1]
    sample_figure(wrong, splits, ["a", "b"], 3, tmp_path)
    assert [titles for _, titles, _, _ in drawn] == [["a\n→ b, 78 %"]]
    mistakes = mistake_gallery(wrong, splits, 3, no_evidence)
    errors = label_error_gallery(wrong, splits, ["a", "b"], 3)
    assert mistakes["of"].tolist() == errors["of"].tolist() == [1]
    for gallery in (mistakes, errors):
        (row,) = gallery.to_dict("records")
        assert (row["rank"], row["path"], row["class"], row["predicted"]) == (
            1,
            "a/0.png",
            "a",
            "b",
        )
        picture = Image.open(io.BytesIO(base64.b64decode(row["image"].partition(",")[2])))
        assert (np.asarray(picture)[..., :1] == splits["test"].gather(np.array([0]))[0]).all()
    assert mistakes["confidence"][0] == 0.78 and mistakes["heatmap"][0].startswith("data:image/png")
    assert np.isnan(errors["confidence"][0]) and not errors["heatmap"][0]
    for gallery in (
        mistake_gallery(images, splits, 3, no_evidence),
        label_error_gallery(wrong[:0], splits, ["a", "b"], 3),
    ):
        assert gallery.empty and list(gallery) == list(mistakes)


@pytest.mark.parametrize("classes", [2, 10, 20, 100])
def test_a_confusion_matrix_of_any_size(tmp_path, classes):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 2, (classes, classes)) + 30 * np.eye(classes, dtype=int)
    counts[1] = 0  # a class without images
    labels = figures.class_labels(class_names(classes))
    pairs = confused_pairs(counts)
    figures.confusion_figure(counts, pairs, labels, "test images", tmp_path / "a.png")
    height, width = pixels(tmp_path / "a.png").shape[:2]
    assert 200 < height < (1_800 if classes > figures.MAX_CLASSES else 1_000) and 500 < width < 800


def test_a_class_without_images_has_an_empty_row(tmp_path):
    """It would look like a recall of 0, so only the name of the class is drawn there."""
    spans = []
    for counts in ([[4, 0], [0, 0]], [[4, 0], [2, 0]]):
        matrix, pairs = np.array(counts), np.array([[1, 0]])
        figures.confusion_figure(matrix, pairs, ["a", "b"], "test images", tmp_path / "a.png")
        last_row = pixels(tmp_path / "a.png")[-160:-60]
        spans.append(np.ptp(np.flatnonzero((last_row < 128).any((0, 2)))))
    assert spans[0] < 20 < 200 < spans[1]


def test_of_many_classes_the_most_confused_come_first(tmp_path):
    """So the figure is that of a matrix which has these classes in front."""
    labels = np.array(figures.class_labels(class_names(30)))
    counts = 50 * np.eye(30, dtype=int)
    counts[25, 7], counts[3, 29] = 9, 5
    order = np.array(list(dict.fromkeys([25, 7, 3, 29, *range(30)])))
    sorted_counts = counts[np.ix_(order, order)]
    for name, matrix, names in (("a", counts, labels), ("b", sorted_counts, labels[order])):
        pairs = confused_pairs(matrix)
        figures.confusion_figure(matrix, pairs, names.tolist(), "test images", tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    figures.confusion_figure(counts, np.empty((0, 2), int), labels, "test images", tmp_path / "c")
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_the_users_settings_change_no_byte(tmp_path):
    """A matplotlibrc where the program runs, and variables, would change size, font and colors."""
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
