"""The tables that prepare writes about its images."""

from pathlib import Path

import pandas as pd

from stages.data.arrays import SPLITS, ImageSpec
from stages.data.corrections import DROPPED
from stages.data.scan import NO_DIGEST
from stages.data.splits import DUPLICATE, LABEL_CONFLICT, NEAR_DUPLICATE
from stages.run.files import write_csv, write_json


def write(
    images: pd.DataFrame, duplicates: pd.DataFrame, spec: ImageSpec, output: Path, metrics: Path
) -> dict[str, int | float]:
    """Write index.csv, duplicates.csv, prepare_classes.csv and prepare.json; return the last."""
    counts = _count(images, duplicates, spec)
    write_csv(output / "index.csv", _index(images))
    write_csv(output / "duplicates.csv", _duplicates(images, duplicates))
    write_csv(metrics / "prepare_classes.csv", _classes(images))
    write_json(metrics / "prepare.json", counts)
    return counts


def _index(images: pd.DataFrame) -> pd.DataFrame:
    """Return index.csv (see `stages.data.arrays.read_index`)."""
    digests = [b"" if digest == NO_DIGEST else digest for digest in images["digest"]]
    return pd.DataFrame(
        {
            "path": images["path"],
            "class": images["class"],
            "was": images["was"],
            "split": images["split"],
            "digest": [digest.hex() for digest in digests],
            "exclusion_reason": images["exclusion_reason"],
            "array_index": images["array_index"],
        }
    )


def _duplicates(images: pd.DataFrame, duplicates: pd.DataFrame) -> pd.DataFrame:
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


def _classes(images: pd.DataFrame) -> pd.DataFrame:
    """Return prepare_classes.csv: the number of images of each class in each split."""
    where = images["split"].cat.add_categories("excluded").fillna("excluded")
    counts = images.groupby(["class", where], observed=False).size().unstack()
    return counts[[*SPLITS, "excluded"]].reset_index()


def _count(
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
        "relabeled": int((images["was"] != "").sum()),
        "dropped": int(images["exclusion_reason"].str.startswith(DROPPED).sum()),
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
