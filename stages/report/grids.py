"""Pictures of predictions: a figure of samples, and galleries of mistakes and label errors.

A gallery is a table with pictures, which the page of `dvc plots` draws. `images` are rows of
`stages.report.tables.image_table`, and `count` is how many of them are drawn at most.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from stages.data.arrays import Split
from stages.report.figures import data_url, image_grid, overlay
from stages.report.tables import IMAGES_OF, worst_mistakes

_LEGEND = "the true class, and the predicted one with its probability"


def sample_figure(
    images: pd.DataFrame, splits: Mapping[str, Split], names: Sequence[str], count: int, path: Path
) -> None:
    """Draw a grid of predictions of the evaluated images, of each class in turn.

    `names` are the classes as `class_labels` returns them.
    """
    rank = images.groupby("label").cumcount()
    drawn = images.assign(rank=rank).sort_values(["rank", "label"])[:count]
    heading = (
        f"Sample predictions\n{len(drawn):,} of {len(images):,}"
        f" {IMAGES_OF[images['split'].iloc[0]]}, taking each class in turn: {_LEGEND}."
        " Mistakes have an orange frame."
    )
    marked = (drawn["predicted_label"] != drawn["label"]).tolist()
    image_grid(_pixels(drawn, splits), _titles(drawn, names), heading, path, marked=marked)


def mistake_gallery(
    images: pd.DataFrame,
    splits: Mapping[str, Split],
    count: int,
    explain: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> pd.DataFrame:
    """Return a gallery of the worst mistakes among the evaluated images, each with its heatmap.

    `explain` takes images and labels, and returns heatmaps, as `make_heatmap_fn` has it.
    """
    all_mistakes = worst_mistakes(images)
    mistakes = all_mistakes[:count].assign(of=len(all_mistakes))
    if not len(mistakes):
        return _gallery(mistakes, [], [])
    pixels = _pixels(mistakes, splits)
    maps = explain(np.stack(pixels), mistakes["predicted_label"].to_numpy())
    return _gallery(mistakes, pixels, list(map(overlay, pixels, maps)))


def label_error_gallery(
    errors: pd.DataFrame, splits: Mapping[str, Split], classes: Sequence[str], count: int
) -> pd.DataFrame:
    """Return a gallery of images whose label is probably wrong, with the suggested one.

    `errors` are as `stages.report.tables.label_errors` returns them.
    """
    drawn = errors[:count].assign(of=len(errors))
    suggestion = np.array(classes, object)[drawn["suggestion"]]
    pixels = _pixels(drawn, splits)
    return _gallery(drawn.assign(predicted=suggestion, confidence=np.nan), pixels, [])


def _gallery(
    rows: pd.DataFrame, pixels: Sequence[np.ndarray], heatmaps: Sequence[np.ndarray]
) -> pd.DataFrame:
    """Return what the page of plots shows: a row per image, with pictures as data URLs.

    Column ``of``, the same in all rows, says how many images there would be if none was left out.
    """
    table = rows[["path", "class", "predicted", "confidence", "of"]].reset_index(drop=True)
    return table.assign(
        rank=range(1, len(table) + 1),
        confidence=table["confidence"].round(4),
        image=[data_url(image) for image in pixels],
        heatmap=[data_url(image) for image in heatmaps] or "",
    )


def _pixels(rows: pd.DataFrame, splits: Mapping[str, Split]) -> list[np.ndarray]:
    positions = zip(rows["split"], rows["array_index"], strict=True)
    return [splits[split].gather(np.array([row]))[0] for split, row in positions]


def _titles(rows: pd.DataFrame, names: Sequence[str]) -> list[str]:
    columns = (rows["label"], rows["predicted_label"], rows["confidence"])
    return [
        f"{names[label]}\n→ {names[predicted]}, " + (f"{100 * p:.0f} %" if p < 0.995 else ">99 %")
        for label, predicted, p in zip(*columns, strict=True)
    ]
