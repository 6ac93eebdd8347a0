"""Pictures: grids of images, drawn by Pillow; confusion matrices, by Matplotlib.

Equal input gives equal bytes: the font is the one that Matplotlib ships, and the user's settings of
Matplotlib have no effect. Lengths are in pixels.
"""

import base64
import io
import itertools
import math
import textwrap
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from stages.run.files import atomic_write

MAX_CLASSES = 20  # in a confusion matrix with numbers; in more cells they can't be read

_INK, _MUTED, _FRAME = "#1b1f24", "#57606a", "#d0d7de"
_ALERT = "#d55e00"  # vermilion of Okabe and Ito: distinct for the color-blind, and in gray
_RIGHT, _WRONG = (0, 68, 136), (204, 85, 0)  # blue and orange, for the same reason
_HEAT = np.array([230, 97, 1])  # orange
_MARGIN, _GAP, _GROUP_GAP, _LINE_HEIGHT = 16, 12, 28, 20
_WIDTH = 720  # a page of 700 pixels shows it at 620, and its text in 12
_TEXT_SIZE = 15
_GALLERY_SIDE, _SMALL_SIDE = 224, 64  # small images are stored without loss
_NAME_WIDTH = 140  # of the name of a class beside a confusion matrix; longer ones are shortened
_GRID_PIXELS = 800_000  # total per grid; a grid of photographs is then about 1 MB
_STYLE = {
    "font.size": _TEXT_SIZE, "text.parse_math": False, "axes.edgecolor": _FRAME,
    "xtick.color": _INK, "ytick.color": _INK, "xtick.major.size": 0, "ytick.major.size": 0,
}  # fmt: skip


def class_labels(classes: Sequence[str]) -> list[str]:
    """Return class names, in label order, as the font can draw them, one line each.

    Invisible characters are escaped. A name with a character that the font lacks becomes
    ``class 3``, its position in image_spec.json, from 0.
    """
    names = ["".join(c if c.isprintable() else ascii(c)[1:-1] for c in name) for name in classes]
    return [
        name if name.strip() and all(map(_is_drawable, name)) else f"class {number}"
        for number, name in enumerate(names)
    ]


def path_label(path: str) -> str:
    """Return a path, or the name of a file, as the font can draw it, one line."""
    return "".join(c if c.isprintable() and _is_drawable(c) else "?" for c in path)


def image_grid(
    images: Sequence[np.ndarray],
    titles: Sequence[str],
    heading: str,
    path: str | Path,
    columns: Sequence[int] = (4,),
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
    columns : sequence of int, default=(4,)
        The number of columns in each group of columns; the gap between groups is wider.
    marked : sequence of bool, optional
        Which images get an orange frame; by default none.

    Raises
    ------
    ValueError
        If the numbers of images, titles and marks differ.
    """
    count, gaps = sum(columns), _GROUP_GAP * (len(columns) - 1)
    width = (_WIDTH - gaps) // count
    side = min(width - _GAP, max(40, int(math.sqrt(_GRID_PIXELS / max(len(images), 1)))))
    tiles = [_resize(image, side) for image in images]
    starts = [n for n, title in enumerate(titles) if title or n % count == 0]
    lines: list[list[str]] = [[] for _ in titles]
    for start, end in itertools.pairwise([*starts, len(titles)]):
        space = (end - start) * width - _GAP
        lines[start] = [_shorten(line, space) for line in titles[start].splitlines()]
    text_height = _LINE_HEIGHT * max(map(len, lines), default=0) + 4
    height = text_height + max((tile.height for tile in tiles), default=0) + _GAP

    lefts = np.arange(count) * width + np.repeat(np.arange(len(columns)), columns) * _GROUP_GAP
    rows = math.ceil(len(images) / count)
    body = Image.new("RGB", (_WIDTH, rows * height), "white")
    marked = [False] * len(images) if marked is None else marked
    frames = [(3, _ALERT) if mark else (1, _FRAME) for mark in marked]
    for number, (tile, title, frame) in enumerate(zip(tiles, lines, frames, strict=True)):
        left, top = int(lefts[number % count]) + 3, number // count * height
        for row, line in enumerate(title):
            ImageDraw.Draw(body).text((left, top + row * _LINE_HEIGHT), line, _INK, _font())
        corner = (left - frame[0], top + text_height - frame[0])
        body.paste(ImageOps.expand(tile, *frame), corner)
    _save(heading, body, path)


def data_url(image: np.ndarray) -> str:
    """Return an image, uint8 [height, width, 1 or 3], for a web page; large ones are shrunk."""
    picture = Image.fromarray(np.broadcast_to(image, (*image.shape[:2], 3)))
    is_small = max(picture.size) <= _SMALL_SIDE
    picture.thumbnail((_GALLERY_SIDE, _GALLERY_SIDE), Image.Resampling.LANCZOS)
    with io.BytesIO() as file:
        picture.save(file, "PNG") if is_small else picture.save(file, "JPEG", quality=85)
        kind = "png" if is_small else "jpeg"
        return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def overlay(image: np.ndarray, heatmap: np.ndarray) -> np.ndarray:
    """Return an image in gray below its heatmap in orange: uint8 [height, width, 3].

    The image is uint8 [height, width, channels], the heatmap [height, width] from 0 (transparent)
    to 1.
    """
    gray = image.mean(-1, keepdims=True)
    return np.rint(gray + 0.75 * heatmap[..., None] * (_HEAT - gray)).astype(np.uint8)


def explanation_figure(
    image: np.ndarray, heatmap: np.ndarray, heading: str, path: str | Path
) -> None:
    """Draw an image and, to its right, the image with its heatmap: arguments as in `overlay`.

    Size and heading are as in `image_grid`; `path` is the PNG file to write.
    """
    height, width = heatmap.shape
    gap = np.full((height, max(1, width // 20), 3), 255, np.uint8)
    colored = np.broadcast_to(image, (height, width, 3))
    pair = np.concatenate([colored, gap, overlay(image, heatmap)], axis=1)
    _save(heading, _resize(pair, _WIDTH), path)


def confusion_figure(
    matrix: np.ndarray, pairs: np.ndarray, labels: Sequence[str], images: str, path: str | Path
) -> None:
    """Draw a confusion matrix: image counts, and percentages of each true class.

    Of more than 20 classes, the 20 in the most frequent confusions are drawn, those first, next to
    an overview of the whole matrix in the same order.

    Parameters
    ----------
    matrix : int array [classes, classes]
        Rows are true classes, columns predicted ones.
    pairs : int array [pairs, 2]
        True and predicted class of all confusions, as `confused_pairs` returns them.
    labels : sequence of str
        From `class_labels`.
    images : str
        What was evaluated, for the heading.
    path : path
        The PNG file to write.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    order = list(range(len(matrix)))
    heading = (
        f"Confusion matrix of {images}\nNumbers of images: rows are true classes, columns predicted"
        " ones. Blue is right, orange is wrong; the darker, the larger the share of the row."
    )
    if overview := len(matrix) > MAX_CLASSES:
        order = list(dict.fromkeys([*pairs.ravel().tolist(), *order]))
        heading += (
            f" Above: the {MAX_CLASSES} classes that are confused most often; below: all of them."
        )
    names = [_shorten(labels[label], _NAME_WIDTH) for label in order[:MAX_CLASSES]]
    ticks, counts = range(len(names)), matrix[np.ix_(order, order)]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    colors = _cell_colors(shares)
    cell = min(160, (_WIDTH - _NAME_WIDTH) // len(names))
    side = cell * len(names) / 72  # in inches
    angle = 45 if max(map(_font().getlength, names)) > cell - 8 else 0

    with style.context(["default", _STYLE]), io.BytesIO() as file:
        figure = Figure((side, (1 + 1.3 * overview) * side), dpi=72)
        grid = {"left": 0, "right": 1, "bottom": 0, "top": 1, "hspace": 0.3}
        panels = figure.subplots(1 + overview, 1, squeeze=False, gridspec_kw=grid)[:, 0]
        panels[-1].set(xticks=[], yticks=[])
        panels[-1].imshow(colors)
        panels[0].imshow(colors[:MAX_CLASSES, :MAX_CLASSES])
        panels[0].set_xticks(ticks, names, rotation=angle, rotation_mode="xtick")
        panels[0].set_yticks(ticks, names)
        for row, column in itertools.product(ticks, ticks):
            count, share = counts[row, column], shares[row, column]
            # Elsewhere, and in the row of a class without images, empty is easier to read than 0.
            if count or (row == column and counts[row].any()):
                text = str(count)
                if cell >= 3 * _TEXT_SIZE:
                    text += f"\n{100 * share:.{int(0 < share < 0.0995)}f} %"
                size = min(_TEXT_SIZE, 1.6 * cell / len(str(count)))
                luminance = colors[row, column] @ (0.299, 0.587, 0.114)
                color = "white" if luminance < 0.55 else _INK
                panels[0].text(column, row, text, size=size, color=color, ha="center", va="center")
        bounds = figure.get_tightbbox().padded(0.1)
        figure.savefig(file, bbox_inches=bounds, pil_kwargs={"compress_level": 0})
        _save(heading, Image.open(file).convert("RGB"), path)


def _cell_colors(shares: np.ndarray) -> np.ndarray:
    """Return RGB [classes, classes, 3] from 0 to 1; mistakes have a scale of their own."""
    right = np.eye(len(shares), dtype=bool)
    worst = max(shares[~right].max(initial=0), 0.05)
    opacity = np.where(right, shares, 0.85 * shares / worst)[..., None] ** 0.6
    color = np.where(right[..., None], _RIGHT, _WRONG) / 255
    return 1 - opacity * (1 - color)


def _resize(image: np.ndarray, side: int) -> Image.Image:
    """Return an image in three channels, enlarged or shrunk to at most `side` pixels."""
    tile = Image.fromarray(np.broadcast_to(image, (*image.shape[:2], 3)))
    if factor := side // max(tile.size):
        return ImageOps.scale(tile, factor, Image.Resampling.NEAREST)
    tile.thumbnail((side, side), Image.Resampling.LANCZOS)
    return tile


def _save(heading: str, body: Image.Image, path: str | Path) -> None:
    """Write a heading, and a body below it, as PNG without metadata."""
    width, top = max(body.width, _WIDTH), _MARGIN
    lines = []
    for number, line in enumerate(heading.splitlines()):
        font, color = (_font(), _MUTED) if number else (_font(20, bold=True), _INK)
        for part in textwrap.wrap(line, int(width / font.getlength("x"))):
            lines.append(((_MARGIN, top), part, color, font))
            top += int(font.size) + 6
    page = Image.new("RGB", (width + 2 * _MARGIN, top + body.height + 10), "white")
    page.paste(body, (_MARGIN, top + 6))
    for text in lines:
        ImageDraw.Draw(page).text(*text)
    with atomic_write(path) as tmp:
        page.save(tmp, format="PNG")


def _shorten(line: str, width: int) -> str:
    """Cut out the middle of a line that is too long: names differ at their start and end."""
    short, length = line, len(line)
    while _font().getlength(short) > width:
        length -= 1
        short = line[: (length + 1) // 2] + "…" + line[len(line) - length // 2 :]
    return short


@cache
def _is_drawable(character: str) -> bool:
    """Return whether the font has a character: what it lacks is drawn like any other it lacks."""
    return bytes(_font().getmask(character)) != bytes(_font().getmask("\uffff"))


@cache
def _font(size: int = _TEXT_SIZE, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return Matplotlib's font for Pillow, laid out alike whatever libraries the system has."""
    package = find_spec("matplotlib")  # not imported: that takes longer than to draw a grid
    assert package is not None and package.origin is not None
    folder = Path(package.origin).parent / "mpl-data" / "fonts" / "ttf"
    path = folder / f"DejaVuSans{'-Bold' * bold}.ttf"
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
