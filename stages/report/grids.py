"""Image grids of predictions: samples, worst mistakes, label suspects."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from stages.data.arrays import Split
from stages.report.figures import class_labels, image_grid, overlay, path_label
from stages.report.tables import IMAGES_OF, worst_mistakes


def draw_grids(
    images: pd.DataFrame,
    suspects: pd.DataFrame,
    splits: Mapping[str, Split],
    classes: Sequence[str],
    explain: Callable[[np.ndarray, np.ndarray], np.ndarray],
    folder: Path,
    grid_images: int,
) -> None:
    """Draw samples.png, mistakes.png and suspects.png, of at most `grid_images` images each.

    `images` are the evaluated ones, and `suspects` the label suspects in all splits, best
    candidates first: rows of `stages.report.tables.image_table`. The last two figures show the
    names of the files. Beside each mistake is its heatmap: `explain` takes
    images and labels as `stages.report.heatmaps.heatmaps` does.
    """
    names = np.array(class_labels(classes), object)
    source = IMAGES_OF[images["split"].iloc[0]]
    legend = "the true class, the predicted class and its probability"
    titles = "true: " + names[images["label"]] + "\npredicted: " + names[images["predicted"]]
    titles += [f"\n{100 * p:.0f} %" if p < 0.995 else "\n>99 %" for p in images["confidence"]]
    is_wrong = images["predicted"] != images["label"]
    images = images.assign(title=titles, marked=False, rank=images.groupby("label").cumcount())
    samples = images.assign(marked=is_wrong).sort_values(["rank", "label"])[:grid_images]
    mistakes = _number(worst_mistakes(images)[:grid_images])
    titles = "label: " + names[suspects["label"]] + "\nsuggested: " + names[suspects["predicted"]]
    best = _number(suspects.assign(title=titles, marked=False)[:grid_images])
    held_out = f"{sum(map(len, splits.values())):,} held-out images"
    headings = {
        "samples": f"Sample predictions\nOf the {source}, taking each class in turn: {legend}."
        " Mistakes have an orange frame.",
        "mistakes": f"Worst mistakes\n{len(mistakes)} of {is_wrong.sum():,} mistakes in"
        f" {len(images):,} {source}, those with the lowest probability of the true class: {legend},"
        " and the name of the file. Orange: the parts that speak for the predicted class."
        " mistakes.csv lists all of them in this order.",
        "suspects": f"Label suspects\n{len(best)} of {len(suspects):,} suspects among the"
        f" {held_out}, numbered as in label_suspects.csv: the given label, the suggested one, and"
        " the name of the file.",
    }
    if not is_wrong.any():
        headings["mistakes"] = f"Worst mistakes\nNone in {len(images):,} {source}."
    if not len(suspects):
        headings["suspects"] = f"Label suspects\nNone found among {held_out}."
    for (name, heading), rows in zip(headings.items(), (samples, mistakes, best), strict=True):
        places = zip(rows["split"], rows["array_index"], strict=True)
        pixels = [splits[split].gather(np.array([row]))[0] for split, row in places]
        path, titles = folder / f"{name}.png", rows["title"].tolist()
        if name == "mistakes" and pixels:
            maps = explain(np.stack(pixels), rows["predicted"].to_numpy())
            explained = map(overlay, pixels, maps)
            pixels = [*itertools.chain(*zip(pixels, explained, strict=True))]
            titles = [*itertools.chain(*zip(titles, itertools.repeat("")))]
            image_grid(pixels, titles, heading, path, columns=(2, 2, 2, 2))
        else:
            image_grid(pixels, titles, heading, path, marked=rows["marked"].tolist())


def _number(rows: pd.DataFrame) -> pd.DataFrame:
    """Number the titles of rows from 1, and add the names of the files."""
    titles = [
        f"#{rank} {title}\n{path_label(path.rpartition('/')[2])}"
        for rank, (title, path) in enumerate(zip(rows["title"], rows["path"], strict=True), 1)
    ]
    return rows.assign(title=titles)
