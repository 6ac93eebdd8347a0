"""Draw a confusion matrix as a PNG file."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from stages.report import figures
from stages.report.metrics import confused_pairs

SHOWN = 20  # classes; numbers in more cells can't be read

_RIGHT, _WRONG = (0, 68, 136), (204, 85, 0)  # blue and orange: apart for the colour-blind
_CELL = (30, 88)  # least and greatest side, in pixels
_NAME, _TEXT = 150, 12
_OVERVIEW, _GAP = 300, 28
_PAIRS = 12
_DPI = 72  # so that a font's size in points is its size in pixels


def confusion_figure(
    matrix: np.ndarray, labels: Sequence[str], split: str, path: str | Path
) -> None:
    """Draw counts, and shares of each true class, side by side.

    Parameters
    ----------
    matrix : int array [classes, classes]
        Rows are true classes, columns predicted ones.
    labels : sequence of str
        From `figures.class_labels`.
    split : str
        What was evaluated, for the heading.
    path : path
        The PNG file to write.

    Notes
    -----
    Of more than 20 classes, the 20 in the most frequent confusions are shown, those first, beside
    a picture of the whole matrix in the same order and a list of these confusions.
    """
    order = class_order(matrix)
    matrix, labels = matrix[np.ix_(order, order)], [labels[number] for number in order]
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    colors = _colors(shares)
    shown = min(len(matrix), SHOWN)
    names = [figures.shorten(label, _NAME) for label in labels[:shown]]
    longest = max(map(figures.text_width, names))

    cell = int(np.clip(480 // shown, *_CELL))
    side, margin = cell * shown, int(longest) + 40
    upright = longest + 8 <= cell
    below = 44 if upright else int(0.75 * longest) + 44
    overview = _OVERVIEW + 16 if len(matrix) > shown else 0
    width = max(margin + 2 * (side + _GAP) + overview, 620)
    heading = (
        f"Confusion matrix of {split}\nRows are the true classes, columns what the network says."
        " Blue is right, orange is wrong; the darker, the larger the share of its row."
    )
    if overview:
        heading += f" {shown} of {len(matrix)} classes: those confused most often come first."
    texts, top = figures.lay_out_heading(heading, width)
    top += 24
    if overview:
        texts += _list_pairs(matrix, labels, width - overview, top + _OVERVIEW + 28)
    height = top + max(side + below, overview) + 8

    with _canvas(width, height) as figure:
        numbers = [f"{value:d}" for value in matrix[:shown, :shown].flat]
        percent = [_percent(value) for value in shares[:shown, :shown].flat]
        for panel, (title, cells) in enumerate(
            (("Images", numbers), ("Percent of the true class", percent))
        ):
            left = margin + panel * (side + _GAP)
            axes = _axes(figure, (left, top, side, side), title)
            axes.imshow(colors[:shown, :shown], interpolation="nearest", aspect="auto")
            _name_cells(axes, names, upright)
            if panel:
                axes.set_yticks([])  # the rows are those of the panel to the left
            _fill_cells(axes, cells, colors, matrix[:shown, :shown] > 0, cell)
        if overview:
            rectangle = (margin + 2 * (side + _GAP), top, _OVERVIEW, _OVERVIEW)
            axes = _axes(figure, rectangle, f"All {len(matrix)} classes")
            axes.imshow(colors, interpolation="nearest", aspect="auto")
            axes.set_xticks([])
            axes.set_yticks([])
        figure.canvas.draw()
        page = np.asarray(figure.canvas.buffer_rgba())[..., :3]
        figures.save_png(figures.draw_texts(page, texts), path)


@contextmanager
def _canvas(width: int, height: int) -> Iterator[Figure]:
    """Yield a white figure of that many pixels, under Matplotlib's own default settings."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure((width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
        FigureCanvasAgg(figure)
        yield figure


def _text_style(
    size: float, file: str = figures.REGULAR, color: str = figures.INK
) -> dict[str, Any]:
    """Keyword arguments for a text of Matplotlib: the shipped font, and no formulas."""
    return {
        "fontproperties": FontProperties(fname=file, size=size),
        "color": color,
        "parse_math": False,
    }


def class_order(matrix: np.ndarray) -> np.ndarray:
    """Classes as they come, or if they are many by their most frequent confusion."""
    if len(matrix) <= SHOWN:
        return np.arange(len(matrix))
    everyone = np.arange(len(matrix))
    return np.array(list(dict.fromkeys([*confused_pairs(matrix).ravel(), *everyone])))


def _list_pairs(matrix: np.ndarray, labels: Sequence[str], left: int, top: int) -> list[tuple]:
    lines = [("Most frequent confusions", figures.BOLD)]
    for true, predicted in confused_pairs(matrix)[:_PAIRS]:
        numbers = f"  {matrix[true, predicted]} of {matrix[true].sum()}"
        pair = f"{labels[true]} → {labels[predicted]}"
        room = _OVERVIEW - figures.text_width(numbers)
        lines.append((figures.shorten(pair, room) + numbers, figures.REGULAR))
    return [
        (left, top + 20 * number, line, _TEXT, font, figures.INK)
        for number, (line, font) in enumerate(lines)
    ]


def _colors(shares: np.ndarray) -> np.ndarray:
    """Float array [classes, classes, 3]; mistakes are on a scale of their own, to stand out."""
    right = np.eye(len(shares), dtype=bool)
    worst = max(float(shares[~right].max(initial=0.0)), 0.05)
    depth = np.where(right, shares, 0.85 * shares / worst)[..., None] ** 0.6
    hue = np.where(right[..., None], _RIGHT, _WRONG) / 255
    return 1 - depth * (1 - hue)


def _percent(share: float) -> str:
    percent = 100 * share
    if percent == 0 or percent >= 99.95:
        return f"{percent:.0f}"
    return f"{percent:.1f}" if percent < 10 else f"{percent:.0f}"


def _axes(figure: Figure, box: tuple[int, int, int, int], title: str) -> Axes:
    """Axes at left, top, width and height in pixels."""
    left, top, width, height = box
    whole_width, whole_height = figure.get_size_inches() * figure.dpi
    bottom = whole_height - top - height
    axes = figure.add_axes(
        (left / whole_width, bottom / whole_height, width / whole_width, height / whole_height)
    )
    axes.set_title(title, loc="left", pad=6, **_text_style(_TEXT + 1, figures.BOLD))
    axes.tick_params(length=0, pad=4)
    for spine in axes.spines.values():
        spine.set_color(figures.FRAME)
    return axes


def _name_cells(axes: Axes, names: Sequence[str], upright: bool) -> None:
    style = _text_style(_TEXT)
    turn = {} if upright else {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(names)), names, **style, **turn)
    axes.set_yticks(range(len(names)), names, **style)


def _fill_cells(
    axes: Axes, cells: Sequence[str], colors: np.ndarray, seen: np.ndarray, cell: int
) -> None:
    for (row, column), text in zip(np.ndindex(seen.shape), cells, strict=True):
        if not seen[row, column] and row != column:
            continue  # an empty cell reads better than a field of zeros
        size = min(_TEXT + 2, 0.4 * cell, 0.9 * cell / max(len(text), 1) * 1.5)
        luminance = colors[row, column] @ (0.299, 0.587, 0.114)
        color = "white" if luminance < 0.55 else figures.INK
        axes.text(column, row, text, ha="center", va="center", **_text_style(size, color=color))
