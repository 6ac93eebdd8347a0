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
    """Draw samples.png, mistakes.png and suspects.png.

    They show no paths, so that renaming a file changes no figure.

    Parameters
    ----------
    images, suspects : DataFrame
        The evaluated images, and the label suspects in all splits, best candidates first: rows of
        `stages.report.tables.image_table`.
    splits : mapping of str to Split
    classes : sequence of str
    count : int
        How many images to draw at most in each grid.
    folder : path
        Where to write the grids.
    """
    names = class_labels(classes)
    source = IMAGES_OF[images["split"].iloc[0]]
    rank_in_class = images.groupby("label").cumcount()
    samples = images.assign(rank=rank_in_class).sort_values(["rank", "label"])[:count]
    image_grid(
        _pixels(samples, splits),
        _titles(samples, names),
        f"Sample predictions\nOf the {source}, taking each class in turn: the true class, then the"
        " predicted class and its probability. Mistakes have an orange frame.",
        folder / "samples.png",
        marked=(samples["predicted"] != samples["label"]).tolist(),
    )

    mistakes = images[images["predicted"] != images["label"]]
    worst = mistakes.sort_values("label_probability", kind="stable")[:count]
    image_grid(
        _pixels(worst, splits),
        _titles(worst, names),
        f"Worst mistakes\n{len(worst)} of {len(mistakes):,} mistakes in {len(images):,} {source},"
        " those with the lowest probability of the true class: the true class, then the predicted"
        " class and its probability.",
        folder / "mistakes.png",
    )

    best = suspects[:count]
    pairs = zip(best["label"], best["predicted"], strict=True)
    image_grid(
        _pixels(best, splits),
        [f"{rank}. {names[a]}\n→ {names[b]}?" for rank, (a, b) in enumerate(pairs, 1)],
        f"Label suspects\n{len(best)} of {len(suspects):,} suspects among the"
        f" {sum(map(len, splits.values())):,} validation and test images, numbered as in"
        " label_suspects.csv: the given label, then the suggested one.",
        folder / "suspects.png",
    )


def _pixels(images: pd.DataFrame, splits: Mapping[str, Split]) -> list[np.ndarray]:
    places = zip(images["split"], images["array_index"], strict=True)
    return [splits[split].gather(np.array([row]))[0] for split, row in places]


def _titles(images: pd.DataFrame, names: Sequence[str]) -> list[str]:
    columns = zip(images["label"], images["predicted"], images["confidence"], strict=True)
    return [
        f"{names[label]}\n→ {names[predicted]} {_percent(confidence)}"
        for label, predicted, confidence in columns
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share < 0.995 else ">99 %"
