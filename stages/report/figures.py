"""Figures as PNG files: grids of images, drawn by Pillow; confusion matrices, by Matplotlib.

Equal input gives equal bytes: the font is the one that Matplotlib ships, and the user's settings of
Matplotlib have no effect. Lengths are in pixels.
"""

import io
import itertools
import math
import textwrap
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from stages.utils.files import atomic_write

MAX_CLASSES = 20  # in a confusion matrix with numbers; in more cells they can't be read

_INK, _MUTED, _FRAME = "#1b1f24", "#57606a", "#d0d7de"
_ALERT = "#d55e00"  # vermilion of Okabe and Ito: distinct for the colour-blind, and in grey
_RIGHT, _WRONG = (0, 68, 136), (204, 85, 0)  # blue and orange, for the same reason
_MARGIN, _GAP, _LINE_HEIGHT, _MIN_WIDTH = 16, 12, 16, 560
_TEXT_WIDTH = 144  # of a title or a class name; longer lines are shortened
_IMAGE_SIDE = (40, 144)  # smallest and largest
_GRID_PIXELS = 300_000  # of all images in a grid: a grid of photographs has then about 0.5 MB
_STYLE = {
    "text.color": _INK, "text.parse_math": False, "font.size": 12, "axes.edgecolor": _FRAME,
    "axes.titlelocation": "left", "axes.titlesize": 13, "axes.titleweight": "bold",
    "xtick.major.size": 0, "ytick.major.size": 0, "savefig.bbox": "tight",
}  # fmt: skip


def class_labels(classes: Sequence[str]) -> list[str]:
    """Return class names, in label order, as the font can draw them, one line each.

    Invisible characters are escaped. A name with a character that the font lacks becomes
    ``class 3``, its position in image_spec.json, from 0.
    """
    from matplotlib.ft2font import FT2Font

    drawable = FT2Font(_font().path).get_charmap()
    names = ["".join(c if c.isprintable() else ascii(c)[1:-1] for c in name) for name in classes]
    return [
        name if name.strip() and all(ord(c) in drawable for c in name) else f"class {number}"
        for number, name in enumerate(names)
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
        One per image, of one or more lines, which are shortened in the middle if they are long. A
        title may extend over the images to its right whose titles are empty.
    heading : str
        The first line is drawn in bold, further lines (explanations) below it, wrapped.
    path : path
        The PNG file to write.
    columns : int, default=8
    marked : sequence of bool, optional
        Which images get an orange frame; by default none.

    Raises
    ------
    ValueError
        If the numbers of images, titles and marks differ.
    """
    marked = [False] * len(images) if marked is None else marked
    if not len(images) == len(titles) == len(marked):
        raise ValueError(f"{len(images)} images, {len(titles)} titles, {len(marked)} marks")
    side = int(np.clip(math.sqrt(_GRID_PIXELS / max(len(images), 1)), *_IMAGE_SIDE))
    tiles = [_resize(image, side) for image in images]
    lines = [[_shorten(line) for line in title.splitlines()] for title in titles]
    text_height = _LINE_HEIGHT * max(map(len, lines), default=0) + 4
    starts = [n for n, title in enumerate(titles) if title or n % columns == 0]
    width = max((tile.width + _GAP for tile in tiles), default=0)
    for start, end in itertools.pairwise([*starts, len(titles)]):
        text_width = max(map(_font().getlength, lines[start]), default=0) + _GAP
        width = max(width, math.ceil(text_width / (end - start)))
    height = text_height + max((tile.height for tile in tiles), default=0) + _GAP

    columns = min(columns, len(images))
    body = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height), "white")
    for number, (tile, title, mark) in enumerate(zip(tiles, lines, marked, strict=True)):
        left, top = number % columns * width + 3, number // columns * height
        for row, line in enumerate(title):
            ImageDraw.Draw(body).text((left, top + row * _LINE_HEIGHT), line, _INK, _font())
        edge, color = (3, _ALERT) if mark else (1, _FRAME)
        body.paste(ImageOps.expand(tile, edge, color), (left - edge, top + text_height - edge))
    _save(heading, body, path)


def confusion_figure(
    matrix: np.ndarray, pairs: np.ndarray, labels: Sequence[str], split: str, path: str | Path
) -> None:
    """Draw a confusion matrix twice: image counts, and percentages of each true class.

    Of more than 20 classes, the 20 in the most frequent confusions are drawn, those first, next to
    an overview of the whole matrix in the same order.

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
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    order = class_order(len(matrix), pairs)
    counts = matrix[np.ix_(order, order)]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    colors = _cell_colors(shares)
    luminance = colors @ (0.299, 0.587, 0.114)
    shown = min(len(matrix), MAX_CLASSES)
    names = [_shorten(labels[label]) for label in order[:shown]]
    titles = ["Images", "Percent of the true class"]
    heading = (
        f"Confusion matrix of {split}\nRows are true classes, columns predicted classes. Blue is"
        " right, orange is wrong; the darker, the larger the share of the row."
    )
    if shown < len(matrix):
        titles.append(f"All {len(matrix)} classes")
        heading += f" First the {shown} classes that are confused most often, then all."
    cell = int(np.clip(480 // shown, 30, 88))
    side, gap = cell * shown, 28
    size = len(titles) * (side + gap) / 72, side / 72  # in inches
    grid = {"left": 0, "right": 1, "bottom": 0, "top": 1, "wspace": gap / side}
    is_narrow = max(map(_font().getlength, names)) < cell - 8
    tilt: Any = {} if is_narrow else {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}

    with style.context(["default", _STYLE]), io.BytesIO() as file:
        figure = Figure(size, dpi=72)
        panels = figure.subplots(1, len(titles), gridspec_kw=grid)
        for axes, title in zip(panels, titles, strict=True):
            axes.set(title=title, xticks=[], yticks=[])
            axes.imshow(colors if title.startswith("All") else colors[:shown, :shown])
        panels[0].set_yticks(range(shown), names)  # the second panel has the same rows
        for axes, values, as_text in ((panels[0], counts, str), (panels[1], shares, _percent)):
            axes.set_xticks(range(shown), names, **tilt)
            # Off the diagonal, an empty cell is easier to read than a zero.
            filled = (counts > 0) | np.eye(len(counts), dtype=bool)
            for row, column in np.argwhere(filled[:shown, :shown]):
                text = as_text(values[row, column])
                ink = "white" if luminance[row, column] < 0.55 else _INK
                size = min(14, 0.4 * cell, 1.35 * cell / len(text))
                axes.text(column, row, text, color=ink, size=size, ha="center", va="center")
        figure.savefig(file)
        _save(heading, Image.open(file).convert("RGB"), path)


def class_order(classes: int, pairs: np.ndarray) -> np.ndarray:
    """Return labels in the order to draw: of more than 20 classes, the most confused come first."""
    confused = pairs.ravel().tolist() if classes > MAX_CLASSES else []
    return np.array(list(dict.fromkeys([*confused, *range(classes)])))


def _cell_colors(shares: np.ndarray) -> np.ndarray:
    """Return RGB [classes, classes, 3] from 0 to 1; mistakes have a scale of their own."""
    right = np.eye(len(shares), dtype=bool)
    worst = max(float(shares[~right].max(initial=0.0)), 0.05)
    depth = np.where(right, shares, 0.85 * shares / worst)[..., None] ** 0.6
    hue = np.where(right[..., None], _RIGHT, _WRONG) / 255
    return 1 - depth * (1 - hue)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}" if 0 < share < 0.0995 else f"{100 * share:.0f}"


def _resize(image: np.ndarray, side: int) -> Image.Image:
    """Return an image in three channels, enlarged or shrunk to at most `side` pixels."""
    tile = Image.fromarray(np.broadcast_to(image, (*image.shape[:2], 3)))
    if factor := side // max(tile.size):
        size = tile.width * factor, tile.height * factor
        return tile.resize(size, Image.Resampling.NEAREST)
    tile.thumbnail((side, side), Image.Resampling.LANCZOS)
    return tile


def _save(heading: str, body: Image.Image, path: str | Path) -> None:
    """Write a heading, and a body below it, as PNG without metadata."""
    width, top = max(body.width, _MIN_WIDTH), _MARGIN
    lines = []
    for number, line in enumerate(heading.splitlines()):
        font, color = (_font(13), _MUTED) if number else (_font(17, bold=True), _INK)
        for piece in textwrap.wrap(line, int(width / font.getlength("n"))):
            lines.append(((_MARGIN, top), piece, color, font))
            top += int(font.size) + 6
    page = Image.new("RGB", (width + 2 * _MARGIN, top + body.height + 10), "white")
    page.paste(body, (_MARGIN, top + 6))
    for line in lines:
        ImageDraw.Draw(page).text(*line)
    with atomic_write(path) as tmp:
        page.save(tmp, format="PNG")


def _shorten(line: str) -> str:
    """Cut out the middle of a line that is too long: names differ at their start and end."""
    short, length = line, len(line)
    while _font().getlength(short) > _TEXT_WIDTH:
        length -= 1
        short = line[: (length + 1) // 2] + "…" + line[len(line) - length // 2 :]
    return short


@cache
def _font(size: int = 12, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return Matplotlib's font for Pillow, laid out alike whatever libraries the system has."""
    import matplotlib

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"DejaVuSans{'-Bold' * bold}.ttf")
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
