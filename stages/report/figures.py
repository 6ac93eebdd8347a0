"""Draw pictures of images as PNG files.

The same input gives the same bytes whatever the user's own fonts are: drawn with the font that
Matplotlib ships (itself not imported here, which would take longer than most pictures), and saved
without metadata.
"""

import math
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from stages.utils.files import atomic_write

_FONTS = Path(find_spec("matplotlib").origin).parent / "mpl-data" / "fonts" / "ttf"
REGULAR, BOLD = str(_FONTS / "DejaVuSans.ttf"), str(_FONTS / "DejaVuSans-Bold.ttf")

INK, MUTED, FRAME = "#1b1f24", "#57606a", "#d0d7de"
ALERT = "#d55e00"  # vermilion of Okabe and Ito: stands out for the colour-blind, and in grey

_MARGIN, _GAP = 16, 12
_CELL = (40, 144)  # least and greatest side of an image in a grid, and so of its title
_GRID_PIXELS = 300_000  # of all images in a grid; keeps the file of photographs near 0.5 MB
_TEXT, _HEADING = 12, 17


def class_labels(classes: Sequence[str]) -> list[str]:
    """Name each class with what the shipped font can draw.

    Parameters
    ----------
    classes : sequence of str
        In label order.

    Returns
    -------
    labels : list of str
        One line each: the class's own name with unseen characters escaped, or ``class 3`` (its
        position in image_spec.json, from 0) where a character of the name is not in the font.
    """
    return [
        "".join(_visible(character, REGULAR) for character in name)
        if name.strip() and _drawable(name)
        else f"class {number}"
        for number, name in enumerate(classes)
    ]


def image_grid(
    images: Sequence[np.ndarray],
    titles: Sequence[str],
    heading: str,
    path: str | Path,
    columns: int = 8,
    marked: Sequence[bool] | None = None,
) -> None:
    """Draw images in rows, each below its title.

    Parameters
    ----------
    images : sequence of uint8 array of shape (height, width, channels)
        One or three channels. Small ones are enlarged by a whole factor, pixel by pixel; those
        larger than a cell are shrunk.
    titles : sequence of str
        One per image. May have several lines. A title may run on over the images to its right
        whose titles are empty; what does not fit is shortened in the middle.
    heading : str
        The first line is set in bold, further ones (explanations) below it, wrapped.
    path : path
        The PNG file to write.
    columns : int, default=8
    marked : sequence of bool, optional
        Images to set in a frame of the alert colour.

    Raises
    ------
    ValueError
        If there are not as many titles, or marks, as images.
    """
    marked = [False] * len(images) if marked is None else marked
    if not len(images) == len(titles) == len(marked):
        raise ValueError(f"{len(images)} images, {len(titles)} titles, {len(marked)} marks")
    columns = max(1, min(columns, len(images)))
    side = int(np.clip(math.sqrt(_GRID_PIXELS / max(len(images), 1)), *_CELL))
    tiles = [_fit_image(image, side) for image in images]
    cell_height = max((tile.shape[0] for tile in tiles), default=0)
    cell_width = max([side, _wanted(titles, columns), *(tile.shape[1] for tile in tiles)])
    width = max(2 * _MARGIN + columns * (cell_width + _GAP) - _GAP, 480)

    texts, bottom = lay_out_heading(heading, width)
    boxes = []
    for start in range(0, len(tiles), columns):
        row = slice(start, start + columns)
        blocks = _fit_titles(titles[row], cell_width)
        text_height = max(map(len, blocks)) * (_TEXT + 4)
        for column, (tile, lines) in enumerate(zip(tiles[row], blocks, strict=True)):
            left = _MARGIN + column * (cell_width + _GAP)
            for number, line in enumerate(lines):
                texts.append((left, bottom + number * (_TEXT + 4), line, _TEXT, REGULAR, INK))
            boxes.append((left, bottom + text_height + 3, tile))
        bottom += text_height + 3 + cell_height + _GAP

    page = draw_texts(np.full((bottom + _MARGIN - _GAP, width, 3), 255, np.uint8), texts)
    for (left, top, tile), mark in zip(boxes, marked, strict=True):
        height, tile_width = tile.shape[:2]
        edge = 3 if mark else 1
        frame = page[top - edge : top + height + edge, left - edge : left + tile_width + edge]
        frame[:] = _rgb(ALERT if mark else FRAME)
        page[top : top + height, left : left + tile_width] = tile
    save_png(page, path)


def save_png(pixels: np.ndarray, path: str | Path) -> None:
    """Write uint8 pixels of shape (height, width, 3), without metadata."""
    with atomic_write(path) as tmp:
        Image.fromarray(pixels).save(tmp, format="PNG")


def lay_out_heading(heading: str, width: int) -> tuple[list[tuple], int]:
    """Set a heading in lines; return them for `draw_texts`, and where what follows may begin."""
    texts, top = [], _MARGIN
    for number, line in enumerate(heading.split("\n")):
        size, file, color = (_TEXT + 1, REGULAR, MUTED) if number else (_HEADING, BOLD, INK)
        for piece in _wrap(line, width - 2 * _MARGIN, size, file):
            texts.append((_MARGIN, top, piece, size, file, color))
            top += size + 6
    return texts, top + _GAP // 2


def draw_texts(page: np.ndarray, texts: Sequence[tuple]) -> np.ndarray:
    """Draw texts given as (left, top, text, size, font, color) on a copy of a page of pixels."""
    picture = Image.fromarray(page)
    draw = ImageDraw.Draw(picture)
    for left, top, text, size, file, color in texts:
        # The baseline is the top plus the ascent, near enough.
        draw.text((left, top + size), text, color, _font(file, size), anchor="ls")
    return np.array(picture)


def shorten(text: str, width: float, size: float = _TEXT, file: str = REGULAR) -> str:
    """Return one line of at most `width` pixels; what is too long loses its middle.

    Beginnings and ends of names tell them apart. Characters that can't be seen are escaped, and
    those that the font lacks are replaced.
    """
    text = "".join(_visible(character, file) for character in text)
    if text_width(text, size, file) <= width:
        return text
    for kept in range(len(text) - 1, 0, -1):
        short = text[: (kept + 1) // 2].rstrip() + "…" + text[len(text) - kept // 2 :].lstrip()
        if text_width(short, size, file) <= width:
            return short
    return "…"


def text_width(text: str, size: float = _TEXT, file: str = REGULAR) -> float:
    """Width of a line of text in pixels."""
    return _font(file, size).getlength(text)


@cache
def _font(file: str, size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)


@cache
def _has(file: str, character: str) -> bool:
    """Tell whether a font has a character: what it lacks looks like what no font has."""
    font = _font(file, _TEXT)
    return bytes(font.getmask(character)) != bytes(font.getmask("\uffff"))


def _drawable(text: str) -> bool:
    return all(_has(REGULAR, character) or not character.isprintable() for character in text)


def _visible(character: str, file: str) -> str:
    if not character.isprintable():
        return ascii(character)[1:-1]
    return character if _has(file, character) else "\N{REPLACEMENT CHARACTER}"


def _fit_image(image: np.ndarray, side: int) -> np.ndarray:
    height, width, channels = image.shape
    if channels == 1:
        image = np.repeat(image, 3, axis=2)
    longest = max(height, width)
    if longest <= side:
        factor = side // longest
        return image.repeat(factor, axis=0).repeat(factor, axis=1)
    size = (max(1, round(width * side / longest)), max(1, round(height * side / longest)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def _wanted(titles: Sequence[str], columns: int) -> int:
    """Width for the titles that can't run on over what is to their right, within the bounds."""
    alone = [
        title
        for number, title in enumerate(titles)
        if (number + 1) % columns == 0 or number + 1 == len(titles) or titles[number + 1]
    ]
    widths = [text_width(line) for title in alone for line in title.split("\n")]
    return int(min(max(widths, default=0), _CELL[1]))


def _fit_titles(titles: Sequence[str], cell_width: int) -> list[list[str]]:
    blocks = []
    for position, title in enumerate(titles):
        room = 1
        while position + room < len(titles) and not titles[position + room]:
            room += 1
        width = room * (cell_width + _GAP) - _GAP
        blocks.append([shorten(line, width) for line in title.split("\n")] if title else [])
    return blocks


def _wrap(text: str, width: float, size: float, file: str) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and text_width(longer, size, file) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return [shorten(line, width, size, file) for line in lines]


def _rgb(color: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(color[1:]))
