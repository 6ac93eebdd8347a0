"""The tables and counts that prepare writes about its images. Pure functions."""

import numpy as np
import pandas as pd

from stages.data.arrays import SPLITS, ImageSpec
from stages.data.duplicates import Matches
from stages.data.scan import NO_DIGEST
from stages.data.splits import DUPLICATE, LABEL_CONFLICT, NEAR_DUPLICATE, label_conflicts


def duplicate_pairs(images: pd.DataFrame, matches: Matches, cross_split: Matches) -> pd.DataFrame:
    """Return the table of duplicates: an image and one that it duplicates.

    Parameters
    ----------
    images : DataFrame
        With their splits.
    matches : Matches
        Across the splits made here.
    cross_split : Matches
        Across the dataset's own splits.

    Returns
    -------
    duplicates : DataFrame
        Sorted, each image once for each kind at most. ``image`` and ``other`` are rows of `images`;
        ``distance`` is 0 for identical files, at most 0.02; ``kind`` is ``"exact"`` (identical
        files in a class), ``"near"`` (near duplicates), ``"conflict"`` (identical files in two
        classes) or ``"cross-split"`` (duplicates across the dataset's own splits).
    """
    reasons = images["exclusion_reason"].to_numpy()
    near = pd.DataFrame(matches._asdict()).set_axis(["image", "other", "distance"], axis=1)
    near = near[reasons[near["image"]] == NEAR_DUPLICATE].assign(kind="near")
    across = pd.DataFrame(cross_split._asdict()).set_axis(["image", "other", "distance"], axis=1)

    # Of identical images in a class, the first is one that is kept.
    table = pd.DataFrame(
        {
            "image": np.arange(len(images)),
            "content": images["content"].to_numpy(),
            "label": images["class"].cat.codes.to_numpy(),
            "is_repeat": reasons == DUPLICATE,
        }
    )
    readable = table[table["content"] >= 0]
    firsts = readable.sort_values(["content", "label", "is_repeat"], kind="stable")
    firsts = firsts.drop_duplicates(["content", "label"]).rename(columns={"image": "other"})
    exact = readable[readable["is_repeat"]].merge(
        firsts[["content", "label", "other"]], on=["content", "label"]
    )
    content, label = table["content"].to_numpy(), table["label"].to_numpy()
    conflicting = table[label_conflicts(content, label, content >= 0)]
    conflict = conflicting[["image", "content", "label"]].merge(firsts, on="content")
    conflict = conflict[conflict["label_x"] != conflict["label_y"]].drop_duplicates("image")
    parts = [
        near,
        exact.assign(distance=0.0, kind="exact"),
        conflict.assign(distance=0.0, kind="conflict"),
        across.assign(kind="cross-split"),
    ]
    columns = ["image", "other", "distance", "kind"]
    pairs = pd.concat([part[columns] for part in parts if len(part)] or [near[columns]])
    return pairs.sort_values(columns, ignore_index=True)


def index_table(images: pd.DataFrame) -> pd.DataFrame:
    """Return index.csv (see `stages.data.arrays.read_index`)."""
    digests = [b"" if digest == NO_DIGEST else digest for digest in images["digest"]]
    return pd.DataFrame(
        {
            "path": images["path"],
            "class": images["class"],
            "split": images["split"],
            "digest": [digest.hex() for digest in digests],
            "exclusion_reason": images["exclusion_reason"],
            "array_index": images["array_index"],
        }
    )


def duplicates_table(images: pd.DataFrame, duplicates: pd.DataFrame) -> pd.DataFrame:
    """Return duplicates.csv."""
    image, other = images.iloc[duplicates["image"]], images.iloc[duplicates["other"]]
    return pd.DataFrame(
        {
            "path": image["path"].to_numpy(),
            "split": image["assigned_split"].to_numpy(),
            "other_path": other["path"].to_numpy(),
            "other_split": other["assigned_split"].to_numpy(),
            "distance": [f"{max(distance, 0):.3f}" for distance in duplicates["distance"]],
            "kind": duplicates["kind"].to_numpy(),
            "excluded_path": image["path"].where(image["split"].isna(), "").to_numpy(),
        }
    )


def classes_table(images: pd.DataFrame) -> pd.DataFrame:
    """Return prepare_classes.csv: the number of images of each class in each split."""
    where = images["split"].cat.add_categories("excluded").fillna("excluded")
    counts = images.groupby(["class", where], observed=False).size().unstack()
    return counts[[*SPLITS, "excluded"]].reset_index()


def count_images(
    images: pd.DataFrame, duplicates: pd.DataFrame, spec: ImageSpec
) -> dict[str, int | float]:
    """Return the numbers of prepare.json."""
    splits, reasons = images["split"].value_counts(), images["exclusion_reason"].value_counts()
    height, width, channels = spec.image_shape
    return {
        "image_height": height,
        "image_width": width,
        "channels": channels,
        "classes": len(spec.classes),
        **{split: int(splits[split]) for split in SPLITS},
        "excluded": int(images["split"].isna().sum()),
        "duplicates": int(reasons.get(DUPLICATE, 0)),
        "near_duplicates": int(reasons.get(NEAR_DUPLICATE, 0)),
        "label_conflicts": int(reasons.get(LABEL_CONFLICT, 0)),
        "unreadable": int((images["content"] < 0).sum()),
        "cross_split_duplicates": int((duplicates["kind"] == "cross-split").sum()),
        "cropped_fraction": _cropped_fraction(images, spec),
    }


def _cropped_fraction(images: pd.DataFrame, spec: ImageSpec) -> float:
    """Return the fraction of its area that the average image loses by cropping."""
    if spec.resize != "crop":
        return 0.0
    height, width, _ = spec.image_shape
    readable = images[images["content"] >= 0]
    scales = readable[["width", "height"]].to_numpy() / (width, height)
    return round(float((1 - scales.min(axis=1) / scales.max(axis=1)).mean()), 4)
