"""Figures as PNG files: grids of images and confusion matrices, drawn by Matplotlib.

Equal input gives equal bytes: figures use the font that Matplotlib ships and its default settings,
whatever the user's own are, and are saved without metadata. All lengths are in pixels, and so are
font sizes, since a figure has 72 pixels per inch.
"""

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, get_font
from PIL import Image

from stages.utils.files import atomic_write

MAX_CLASSES = 20  # in a confusion matrix with numbers; in more cells they can't be read

_FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")
_REGULAR, _BOLD = _FONTS / "DejaVuSans.ttf", _FONTS / "DejaVuSans-Bold.ttf"
_INK, _MUTED, _FRAME = "#1b1f24", "#57606a", "#d0d7de"
_ALERT = "#d55e00"  # vermilion of Okabe and Ito: distinct for the colour-blind, and in grey
_RIGHT, _WRONG = (0, 68, 136), (204, 85, 0)  # blue and orange, for the same reason

_MARGIN, _GAP, _LINE_HEIGHT, _MIN_WIDTH = 16, 12, 16, 560
_IMAGE_SIDE = (40, 144)  # smallest and largest
_GRID_PIXELS = 300_000  # of all images in a grid: a grid of photographs has then about 0.5 MB
_CELL_SIDE = (30, 88)  # smallest and largest, in a confusion matrix
_NAME_WIDTH, _PANEL_GAP = 150, 28  # of a confusion matrix; longer names are shortened


def class_labels(classes: Sequence[str]) -> list[str]:
    """Return class names as the shipped font can draw them.

    Parameters
    ----------
    classes : sequence of str
        In label order.

    Returns
    -------
    labels : list of str
        One line each: the class name with invisible characters escaped, or ``class 3`` (its
        position in image_spec.json, from 0) if the font lacks a character of the name.
    """
    labels = map(_drawable, classes)
    return [
        f"class {number}" if not label.strip() or "\N{REPLACEMENT CHARACTER}" in label else label
        for number, label in enumerate(labels)
    ]


def image_grid(
    images: Sequence[np.ndarray],
    titles: Sequence[str],
    heading: str,
    path: str | Path,
    columns: int = 8,
    marked: Sequence[bool] | None = None,
) -> None:
    """Draw a grid of images, each below its title.

    Parameters
    ----------
    images : sequence of uint8 array of shape (height, width, channels)
        One or three channels. Small images are enlarged by a whole factor, pixel by pixel; large
        ones are shrunk.
    titles : sequence of str
        One per image, of one or more lines. A title may extend over the images to its right whose
        titles are empty; a line that is too long is shortened in the middle.
    heading : str
        The first line is drawn in bold, further lines (explanations) below it, wrapped.
    path : path
        The PNG file to write.
    columns : int, default=8
    marked : sequence of bool, optional
        Which images get an orange frame.

    Raises
    ------
    ValueError
        If the numbers of images, titles and marks differ.
    """
    marked = [False] * len(images) if marked is None else marked
    if not len(images) == len(titles) == len(marked):
        raise ValueError(f"{len(images)} images, {len(titles)} titles, {len(marked)} marks")
    columns = max(1, min(columns, len(images)))
    side = int(np.clip(math.sqrt(_GRID_PIXELS / max(len(images), 1)), *_IMAGE_SIDE))
    tiles = [_fit_image(image, side) for image in images]
    spans = _title_spans(titles, columns)
    bounded = [_width(title) for title, span in zip(titles, spans, strict=True) if span == 1]
    title_width = math.ceil(min(max(bounded, default=0), _IMAGE_SIDE[1]))
    title_height = max((len(title.splitlines()) for title in titles), default=0) * _LINE_HEIGHT + 4
    column_width = max([side, title_width, *(tile.shape[1] for tile in tiles)]) + _GAP
    row_height = title_height + max((len(tile) for tile in tiles), default=0) + _GAP
    size = columns * column_width, math.ceil(len(tiles) / columns) * row_height

    corners = []
    with _figure(*size, heading) as (figure, first_row):
        for number, title in enumerate(titles):
            row, column = divmod(number, columns)
            left, top = _MARGIN + column * column_width, first_row + row * row_height
            room = spans[number] * column_width - _GAP
            for line_number, line in enumerate(title.splitlines()):
                baseline = top + 12 + line_number * _LINE_HEIGHT
                _write(figure, left, baseline, _shorten(line, room))
            corners.append((left, top + title_height))
        page = _render(figure)
    for tile, corner, mark in zip(tiles, corners, marked, strict=True):
        _paste(page, tile, *corner, *((3, _ALERT) if mark else (1, _FRAME)))
    _save(page, path)


def confusion_figure(
    matrix: np.ndarray, pairs: np.ndarray, labels: Sequence[str], split: str, path: str | Path
) -> None:
    """Draw a confusion matrix twice: image counts, and percentages of each true class.

    Parameters
    ----------
    matrix : int array [classes, classes]
        Rows are true classes, columns predicted ones.
    pairs : int array [pairs, 2]
        True and predicted class of all confusions, the most frequent first.
    labels : sequence of str
        From `class_labels`.
    split : str
        What was evaluated, for the heading.
    path : path
        The PNG file to write.

    Notes
    -----
    Of more than 20 classes, the 20 in the most frequent confusions are drawn, those first, next to
    an overview of the whole matrix in the same order.
    """
    order = class_order(len(matrix), pairs)
    counts = matrix[np.ix_(order, order)]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    colors = _cell_colors(shares)
    shown = min(len(matrix), MAX_CLASSES)
    overview = shown < len(matrix)
    heading = (
        f"Confusion matrix of {split}\nRows are true classes, columns predicted classes. Blue is"
        " right, orange is wrong; the darker, the larger the share of the row."
    )
    if overview:
        heading += f" First the {shown} classes that are confused most often, then all."
    names = [_shorten(labels[label], _NAME_WIDTH) for label in order[:shown]]
    name_width = max(map(_width, names)) + 8
    cell = int(np.clip(480 // shown, *_CELL_SIDE))
    side, step = cell * shown, cell * shown + _PANEL_GAP
    rotated = name_width > cell
    tilt: dict[str, Any] = (
        {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if rotated else {}
    )
    height = 20 + side + (0.75 * name_width if rotated else 0) + 24

    with _figure(name_width + (2 + overview) * step, height, heading) as (figure, top):
        left = _MARGIN + name_width
        panels: list[tuple[str, np.ndarray, Callable[[Any], str]]] = [
            ("Images", counts, str),
            ("Percent of the true class", shares, _percent),
        ]
        for number, (title, values, as_text) in enumerate(panels):
            box = (left + number * step, top + 20, side)
            axes = _add_panel(figure, box, title, colors[:shown, :shown])
            axes.set_xticks(range(shown), names, **tilt, **_style())
            if number == 0:  # the second panel has the same rows
                axes.set_yticks(range(shown), names, **_style())
            _fill_cells(axes, values[:shown, :shown], colors, cell, as_text)
        if overview:
            box = (left + 2 * step, top + 20, side)
            _add_panel(figure, box, f"All {len(matrix)} classes", colors)
        _save(_render(figure), path)


def class_order(classes: int, pairs: np.ndarray) -> np.ndarray:
    """Return labels in the order to draw: of more than 20 classes, the most confused come first."""
    confused = pairs.ravel().tolist() if classes > MAX_CLASSES else []
    return np.array(list(dict.fromkeys([*confused, *range(classes)])))


@contextmanager
def _figure(width: float, height: float, heading: str) -> Iterator[tuple[Figure, int]]:
    """Yield a figure with room for `width` by `height` pixels, and the top of that room.

    Inside the block, Matplotlib has its default settings.
    """
    width = math.ceil(max(width, _MIN_WIDTH))
    lines, top = [], _MARGIN
    for number, line in enumerate(heading.splitlines()):
        size, font, color = (13, _REGULAR, _MUTED) if number else (17, _BOLD, _INK)
        line = _drawable(line, font)
        characters = 0.95 * width * len(line) / max(_width(line, size, font), 1)
        for piece in textwrap.wrap(line, max(1, int(characters))):
            lines.append((top + size, piece, _style(size, font, color)))
            top += size + 6
    top += 6
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure(((width + 2 * _MARGIN) / 72, (top + math.ceil(height) + 4) / 72), dpi=72)
        for baseline, piece, style in lines:
            _write(figure, _MARGIN, baseline, piece, style)
        yield figure, top


def _render(figure: Figure) -> np.ndarray:
    """Return the pixels of a figure, uint8 of shape (height, width, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def _save(pixels: np.ndarray, path: str | Path) -> None:
    with atomic_write(path) as tmp:
        Image.fromarray(pixels).save(tmp, format="PNG")  # no metadata


def _write(
    figure: Figure, left: float, baseline: float, line: str, style: dict[str, Any] | None = None
) -> None:
    """Write a line of text; lengths are from the top left corner of the figure."""
    width, height = figure.bbox.size
    figure.text(left / width, 1 - baseline / height, line, **(style or _style()))


def _style(size: float = 12, font: Path = _REGULAR, color: str = _INK) -> dict[str, Any]:
    """Return the properties of a Matplotlib text: the shipped font, and no formulas."""
    return {
        "fontproperties": FontProperties(fname=font, size=size),
        "color": color,
        "parse_math": False,
    }


def _add_panel(
    figure: Figure, box: tuple[float, float, float], title: str, colors: np.ndarray
) -> Axes:
    """Draw a matrix of colours in a square, given by its left, top and side, below a title."""
    (left, top, side), (width, height) = box, figure.bbox.size
    axes = figure.add_axes((left / width, 1 - (top + side) / height, side / width, side / height))
    axes.imshow(colors, interpolation="nearest", aspect="auto")
    axes.set_title(title, loc="left", pad=6, **_style(13, _BOLD))
    axes.set(xticks=[], yticks=[])
    axes.tick_params(length=0, pad=4)
    axes.spines[:].set_color(_FRAME)
    return axes


def _fill_cells(
    axes: Axes, values: np.ndarray, colors: np.ndarray, cell: int, as_text: Callable[[Any], str]
) -> None:
    """Write values into cells; off the diagonal, an empty cell is easier to read than a zero."""
    for row, column in np.argwhere((values > 0) | np.eye(len(values), dtype=bool)):
        text = as_text(values[row, column])
        luminance = colors[row, column] @ (0.299, 0.587, 0.114)
        size = min(14, 0.4 * cell, 1.35 * cell / len(text))
        style = _style(size, color="white" if luminance < 0.55 else _INK)
        axes.text(column, row, text, ha="center", va="center", **style)


def _cell_colors(shares: np.ndarray) -> np.ndarray:
    """Return RGB [classes, classes, 3] from 0 to 1; mistakes have a scale of their own."""
    right = np.eye(len(shares), dtype=bool)
    worst = max(float(shares[~right].max(initial=0.0)), 0.05)
    depth = np.where(right, shares, 0.85 * shares / worst)[..., None] ** 0.6
    hue = np.where(right[..., None], _RIGHT, _WRONG) / 255
    return 1 - depth * (1 - hue)


def _percent(share: float) -> str:
    percent = 100 * share
    return f"{percent:.1f}" if 0 < percent < 9.95 else f"{percent:.0f}"


def _drawable(text: str, font: Path = _REGULAR) -> str:
    """Escape invisible characters, and replace those that a font lacks and would draw as boxes."""
    visible = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return "".join(c if get_font(font).get_char_index(ord(c)) else "\ufffd" for c in visible)


def _width(text: str, size: float = 12, font: Path = _REGULAR) -> float:
    """Return the width of the longest line of a text."""
    return size * max(sum(_advance(c, font) for c in line) for line in text.split("\n"))


@cache
def _advance(character: str, font: Path) -> float:
    """Return the width of a character in a font of size 1."""
    face = get_font(font)
    face.set_size(64, 72)
    return face.load_char(ord(character)).linearHoriAdvance / 65536 / 64


@cache
def _shorten(text: str, room: float) -> str:
    """Cut out the middle of a line that is too long: names differ at their start and end."""
    text = short = _drawable(text)
    length = len(text)
    while _width(short) > room and length:
        length -= 1
        short = text[: (length + 1) // 2].rstrip() + "…" + text[len(text) - length // 2 :].lstrip()
    return short


def _title_spans(titles: Sequence[str], columns: int) -> list[int]:
    """Return how many cells of its row each title may extend over."""
    spans = []
    for number in range(len(titles)):
        others = titles[number + 1 : (number // columns + 1) * columns]
        spans.append(1 + len(list(takewhile(lambda title: not title, others))))
    return spans


def _fit_image(image: np.ndarray, side: int) -> np.ndarray:
    """Return an image in three channels, enlarged or shrunk to at most `side` pixels."""
    height, width, _ = image.shape
    scale = side / max(height, width)
    scale = math.floor(scale) if scale >= 1 else scale
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    resampling = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    pixels = np.broadcast_to(image, (height, width, 3))
    return np.asarray(Image.fromarray(pixels).resize(size, resampling))


def _paste(page: np.ndarray, tile: np.ndarray, left: int, top: int, edge: int, color: str) -> None:
    """Put an image with a frame on a page."""
    height, width, _ = tile.shape
    frame = page[top - edge : top + height + edge, left - edge : left + width + edge]
    frame[:] = list(bytes.fromhex(color[1:]))
    page[top : top + height, left : left + width] = tile
