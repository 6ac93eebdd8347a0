"""Image grids of predictions: samples, worst mistakes, label suspects."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from stages.data.arrays import Split
from stages.report.figures import class_labels, image_grid
from stages.report.tables import IMAGES_OF


def draw_grids(
    images: pd.DataFrame,
    suspects: pd.DataFrame,
    splits: Mapping[str, Split],
    classes: Sequence[str],
    count: int,
    folder: Path,
) -> None:
    """Draw samples.png, mistakes.png and suspects.png, of at most `count` images each.

    `images` are the evaluated ones, and `suspects` the label suspects in all splits, best
    candidates first: rows of `stages.report.tables.image_table`. The figures show no paths, so that
    renaming a file changes none of them.
    """
    names = np.array(class_labels(classes), object)
    source = IMAGES_OF[images["split"].iloc[0]]
    legend = "the true class, then the predicted class and its probability."
    titles = names[images["label"]] + "\n→ " + names[images["predicted"]]
    titles += [f" {100 * p:.0f} %" if p < 0.995 else " >99 %" for p in images["confidence"]]
    is_wrong = images["predicted"] != images["label"]
    images = images.assign(title=titles, marked=False, rank=images.groupby("label").cumcount())
    samples = images.assign(marked=is_wrong).sort_values(["rank", "label"])[:count]
    mistakes = images[is_wrong].sort_values("label_probability", kind="stable")[:count]
    pairs = zip(names[suspects["label"]], names[suspects["predicted"]], strict=True)
    titles = [
        f"{rank}. {given}\n→ {suggested}?" for rank, (given, suggested) in enumerate(pairs, 1)
    ]
    best = suspects.assign(title=titles, marked=False)[:count]
    headings = {
        "samples": f"Sample predictions\nOf the {source}, taking each class in turn: {legend}"
        " Mistakes have an orange frame.",
        "mistakes": f"Worst mistakes\n{len(mistakes)} of {is_wrong.sum():,} mistakes in"
        f" {len(images):,} {source}, those with the lowest probability of the true class: {legend}",
        "suspects": f"Label suspects\n{len(best)} of {len(suspects):,} suspects among the"
        f" {sum(map(len, splits.values())):,} validation and test images, numbered as in"
        " label_suspects.csv: the given label, then the suggested one.",
    }
    for (name, heading), rows in zip(headings.items(), (samples, mistakes, best), strict=True):
        places = zip(rows["split"], rows["array_index"], strict=True)
        pixels = [splits[split].gather(np.array([row]))[0] for split, row in places]
        path, marked = folder / f"{name}.png", rows["marked"].tolist()
        image_grid(pixels, rows["title"].tolist(), heading, path, marked=marked)
