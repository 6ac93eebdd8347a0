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
    """Draw samples.png, mistakes.png and suspects.png, each of at most `count` images.

    They show no paths, so that renaming a file changes no figure.

    Parameters
    ----------
    images, suspects : DataFrame
        The evaluated images, and the label suspects in all splits, best candidates first: rows of
        `stages.report.tables.image_table`.
    splits : mapping of str to Split
    classes : sequence of str
    count : int
    folder : path
        Where to write the figures.
    """
    names = np.array(class_labels(classes), object)
    source = IMAGES_OF[images["split"].iloc[0]]
    titles = names[images["label"]] + "\n→ " + names[images["predicted"]]
    titles += [f" {100 * p:.0f} %" if p < 0.995 else " >99 %" for p in images["confidence"]]
    images = images.assign(title=titles, is_wrong=images["predicted"] != images["label"])

    rank_in_class = images.groupby("label").cumcount()
    samples = images.assign(rank=rank_in_class).sort_values(["rank", "label"])[:count]
    image_grid(
        _pixels(samples, splits),
        samples["title"].tolist(),
        f"Sample predictions\nOf the {source}, taking each class in turn: the true class, then the"
        " predicted class and its probability. Mistakes have an orange frame.",
        folder / "samples.png",
        marked=samples["is_wrong"].tolist(),
    )
    mistakes = images[images["is_wrong"]].sort_values("label_probability", kind="stable")
    worst = mistakes[:count]
    image_grid(
        _pixels(worst, splits),
        worst["title"].tolist(),
        f"Worst mistakes\n{len(worst)} of {len(mistakes):,} mistakes in {len(images):,} {source},"
        " those with the lowest probability of the true class: the true class, then the predicted"
        " class and its probability.",
        folder / "mistakes.png",
    )
    best = suspects[:count]
    pairs = zip(names[best["label"]], names[best["predicted"]], strict=True)
    image_grid(
        _pixels(best, splits),
        [f"{rank}. {given}\n→ {suggested}?" for rank, (given, suggested) in enumerate(pairs, 1)],
        f"Label suspects\n{len(best)} of {len(suspects):,} suspects among the"
        f" {sum(map(len, splits.values())):,} validation and test images, numbered as in"
        " label_suspects.csv: the given label, then the suggested one.",
        folder / "suspects.png",
    )


def _pixels(images: pd.DataFrame, splits: Mapping[str, Split]) -> list[np.ndarray]:
    places = zip(images["split"], images["array_index"], strict=True)
    return [splits[split].gather(np.array([row]))[0] for split, row in places]
