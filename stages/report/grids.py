"""Image grids of predictions: samples, worst mistakes, label suspects."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from stages.data.arrays import Split
from stages.report.figures import image_grid, overlay, path_label
from stages.report.tables import IMAGES_OF, worst_mistakes

_LEGEND = "the true class, the predicted class and its probability"


def draw_samples(
    images: pd.DataFrame, splits: Mapping[str, Split], names: Sequence[str], count: int, path: Path
) -> None:
    """Draw a grid of predictions, of each class in turn.

    Parameters
    ----------
    images : DataFrame
        The evaluated images: rows of `stages.report.tables.image_table`.
    splits : dict of str to Split
    names : sequence of str
        The names of the classes as `class_labels` returns them.
    count : int
        How many images are drawn at most.
    path : Path
        The PNG file to write.
    """
    is_wrong = images["predicted"] != images["label"]
    rank = images.groupby("label").cumcount()
    order = images.assign(rank=rank, is_wrong=is_wrong).sort_values(["rank", "label"])[:count]
    heading = (
        f"Sample predictions\nOf the {IMAGES_OF[images['split'].iloc[0]]}, taking each class in"
        f" turn: {_LEGEND}. Mistakes have an orange frame."
    )
    titles, marked = _titles(order, names), order["is_wrong"].tolist()
    image_grid(_pixels(order, splits), titles, heading, path, marked=marked)


def draw_mistakes(
    images: pd.DataFrame,
    splits: Mapping[str, Split],
    names: Sequence[str],
    count: int,
    explain: Callable[[np.ndarray, np.ndarray], np.ndarray],
    path: Path,
) -> None:
    """Draw a grid of the worst mistakes, each beside its heatmap.

    Parameters as in `draw_samples`; `explain` takes images and labels, and returns heatmaps, as
    `stages.report.heatmaps.heatmaps` does.
    """
    mistakes = worst_mistakes(images)
    total, mistakes = len(mistakes), mistakes[:count]
    source = f"{len(images):,} {IMAGES_OF[images['split'].iloc[0]]}"
    if not total:
        image_grid([], [], f"Worst mistakes\nNone in {source}.", path)
        return
    heading = (
        f"Worst mistakes\n{len(mistakes)} of {total:,} mistakes in {source}, those with the lowest"
        f" probability of the true class: {_LEGEND}, and the name of the file. Orange: the parts"
        " that speak for the predicted class. mistakes.csv lists all of them in this order."
    )
    pixels = _pixels(mistakes, splits)
    maps = explain(np.stack(pixels), mistakes["predicted"].to_numpy())
    pairs = zip(pixels, map(overlay, pixels, maps), strict=True)
    titles = [text for title in _number(_titles(mistakes, names), mistakes) for text in (title, "")]
    image_grid([*itertools.chain(*pairs)], titles, heading, path, columns=(2, 2, 2, 2))


def draw_suspects(
    suspects: pd.DataFrame,
    splits: Mapping[str, Split],
    names: Sequence[str],
    count: int,
    path: Path,
) -> None:
    """Draw a grid of images whose label is probably wrong, the best candidates first.

    Parameters as in `draw_samples`, but `suspects` are of all held-out splits.
    """
    held_out = f"{sum(map(len, splits.values())):,} held-out images"
    drawn = suspects[:count]
    heading = (
        f"Label suspects\n{len(drawn)} of {len(suspects):,} suspects among the {held_out}, numbered"
        " as in label_suspects.csv: the given label, the suggested one, and the name of the file."
    )
    if not len(suspects):
        heading = f"Label suspects\nNone found among {held_out}."
    titles = [
        f"label: {names[label]}\nsuggested: {names[predicted]}"
        for label, predicted in zip(drawn["label"], drawn["predicted"], strict=True)
    ]
    image_grid(_pixels(drawn, splits), _number(titles, drawn), heading, path)


def _pixels(rows: pd.DataFrame, splits: Mapping[str, Split]) -> list[np.ndarray]:
    places = zip(rows["split"], rows["array_index"], strict=True)
    return [splits[split].gather(np.array([row]))[0] for split, row in places]


def _titles(rows: pd.DataFrame, names: Sequence[str]) -> list[str]:
    return [
        f"true: {names[label]}\npredicted: {names[predicted]}\n"
        + (f"{100 * p:.0f} %" if p < 0.995 else ">99 %")
        for label, predicted, p in zip(
            rows["label"], rows["predicted"], rows["confidence"], strict=True
        )
    ]


def _number(titles: Sequence[str], rows: pd.DataFrame) -> list[str]:
    """Number titles from 1, and add the names of the files."""
    return [
        f"#{rank} {title}\n{path_label(path.rpartition('/')[2])}"
        for rank, (title, path) in enumerate(zip(titles, rows["path"], strict=True), 1)
    ]
