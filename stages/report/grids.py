"""Image grids of predictions: samples, worst mistakes, label errors.

`images` are rows of `stages.report.tables.image_table`, `names` the classes as `class_labels`
returns them, and `count` is how many images are drawn at most.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from stages.data.arrays import Split
from stages.report.figures import image_grid, overlay, path_label
from stages.report.tables import IMAGES_OF, worst_mistakes

_LEGEND = "the true class, the predicted class and its probability"


def sample_figure(
    images: pd.DataFrame, splits: Mapping[str, Split], names: Sequence[str], count: int, path: Path
) -> None:
    """Draw a grid of predictions of the evaluated images, of each class in turn."""
    rank = images.groupby("label").cumcount()
    drawn = images.assign(rank=rank).sort_values(["rank", "label"])[:count]
    heading = (
        f"Sample predictions\nOf the {IMAGES_OF[images['split'].iloc[0]]}, taking each class in"
        f" turn: {_LEGEND}. Mistakes have an orange frame."
    )
    marked = (drawn["predicted_label"] != drawn["label"]).tolist()
    image_grid(_pixels(drawn, splits), _titles(drawn, names), heading, path, marked=marked)


def mistake_figure(
    images: pd.DataFrame,
    splits: Mapping[str, Split],
    names: Sequence[str],
    count: int,
    explain: Callable[[np.ndarray, np.ndarray], np.ndarray],
    path: Path,
) -> None:
    """Draw a grid of the worst mistakes among the evaluated images, each beside its heatmap.

    `explain` takes images and labels, and returns heatmaps, as `make_heatmap_fn` has it.
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
    maps = explain(np.stack(pixels), mistakes["predicted_label"].to_numpy())
    pairs = zip(pixels, map(overlay, pixels, maps), strict=True)
    titles = [text for title in _number(_titles(mistakes, names), mistakes) for text in (title, "")]
    image_grid([*itertools.chain(*pairs)], titles, heading, path, columns=(2, 2, 2, 2))


def label_error_figure(
    errors: pd.DataFrame,
    splits: Mapping[str, Split],
    names: Sequence[str],
    count: int,
    path: Path,
) -> None:
    """Draw a grid of images of any split whose label is probably wrong, the worst first.

    `errors` are as `stages.report.tables.label_errors` returns them.
    """
    held_out = f"{sum(map(len, splits.values())):,} held-out images"
    drawn = errors[:count]
    heading = (
        f"Label errors\n{len(drawn)} of {len(errors):,} likely ones among the {held_out}, numbered"
        " as in label_errors.csv: the given label, the suggested one, and the name of the file."
    )
    if not len(errors):
        heading = f"Label errors\nNone listed among {held_out}."
    titles = [
        f"label: {names[label]}\nsuggested: {names[suggestion]}"
        for label, suggestion in zip(drawn["label"], drawn["suggestion"], strict=True)
    ]
    image_grid(_pixels(drawn, splits), _number(titles, drawn), heading, path)


def _pixels(rows: pd.DataFrame, splits: Mapping[str, Split]) -> list[np.ndarray]:
    positions = zip(rows["split"], rows["array_index"], strict=True)
    return [splits[split].gather(np.array([row]))[0] for split, row in positions]


def _titles(rows: pd.DataFrame, names: Sequence[str]) -> list[str]:
    columns = (rows["label"], rows["predicted_label"], rows["confidence"])
    return [
        f"true: {names[label]}\npredicted: {names[predicted]}\n"
        + (f"{100 * p:.0f} %" if p < 0.995 else ">99 %")
        for label, predicted, p in zip(*columns, strict=True)
    ]


def _number(titles: Sequence[str], rows: pd.DataFrame) -> list[str]:
    """Number titles from 1, and add the names of the files."""
    return [
        f"#{rank} {title}\n{path_label(path.rpartition('/')[2])}"
        for rank, (title, path) in enumerate(zip(titles, rows["path"], strict=True), 1)
    ]
