"""The model card: what the model was trained on and how good it is, from the files in metrics/.

After Mitchell et al.: Model cards for model reporting, FAT* 2019. Every number is measured.
"""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from stages.data.arrays import ImageSpec

_RESIZED = {
    "crop": "cropped to the center",
    "pad": "padded with black bars",
    "stretch": "stretched",
}


def model_card(
    metrics: str | Path, spec: ImageSpec, version: dict[str, str], author: str = ""
) -> str:
    """Return a model card in Markdown.

    Parameters
    ----------
    metrics : path
        The folder with verdict.csv, summary.csv, per_class.csv and evaluate_details.json of this
        model.
    spec : ImageSpec
    version : dict of str to str
        Names and values that identify the model and its data.
    author : str, default=""
        Who exports the model.
    """
    metrics = Path(metrics)
    verdict, summary = (
        pd.read_csv(metrics / name, dtype=str, keep_default_na=False)
        for name in ("verdict.csv", "summary.csv")
    )
    verdict = verdict[verdict["name"] != "next"]
    classes = pd.read_csv(
        metrics / "per_class.csv", dtype={"class": str, "top_confusion": str}, keep_default_na=False
    )
    details = pd.read_json(metrics / "evaluate_details.json", typ="series")
    height, width, channels = spec.image_shape
    shares = [
        name for name in ("precision", "recall", "recall_low", "recall_high") if name in classes
    ]
    classes[shares] = classes[shares].map("{:.3f}".format)
    columns = ["class", "support", *shares, "top_confusion"]
    return "\n".join(
        [
            "# Model card",
            "",
            f"An image classifier for {len(spec.classes)} classes, one label per image. It was"
            f" evaluated on the {details['split']} split, {details['images']} images"
            + (
                ", which training and model choice did not see."
                if details["split"] == "test"
                else ": these also chose the epoch, so the numbers are too good."
            ),
            "",
            *_table(["", ""], verdict.to_numpy().tolist()),
            "",
            "## Intended use",
            "",
            "To be filled in: what it is for, who may use it, and what it must not be used for."
            f" Author: {author or 'to be filled in'}. License: to be filled in.",
            "",
            "## Numbers",
            "",
            *_table(["", ""], summary.to_numpy().tolist()),
            "",
            "## Classes",
            "",
            *_table([name.replace("_", " ") for name in columns], classes[columns].values.tolist()),
            "",
            "## Confidence",
            "",
            "A confidence is the calibrated probability of the predicted class. Its expected"
            f" calibration error is {details['ece']:.3f} ({details['ece_uncalibrated']:.3f} before"
            f" calibration), the log loss {details['log_loss_uncalibrated']:.3f} before.",
            "",
            "## Limits",
            "",
            f"- It sees {height} × {width} pixels in {'gray' if channels == 1 else 'color'};"
            f" images of another aspect ratio are {_RESIZED[spec.resize]}.",
            "- It names one of its classes for every image, whatever the image shows.",
            "- The numbers hold for images like those of the dataset.",
            "",
            "## Version",
            "",
            *_table(["", ""], version.items()),
            "",
            "## Use",
            "",
            "`pip install -r requirements.txt && python classify.py PHOTO`, or open `index.html`.",
            "",
        ]
    )


def _table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [list(map(str, header)), *(list(map(_cell, row)) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return [f"| {' | '.join(line)} |" for line in lines]


def _cell(value: object) -> str:
    return " ".join(str(value).replace("|", "\\|").split())
