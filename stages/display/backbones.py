"""Which backbones there are, with what they cost, and which one suits a dataset."""

from typing import NamedTuple

_SECONDS = 120  # that computing a dataset's features may take, for a backbone to be proposed


class Backbone(NamedTuple):
    """What a backbone is and costs."""

    size: int  # pixels, height and width of the images that it was trained or measured with
    weights: float  # million
    megabytes: int  # of the download
    # On one core for 1,000 images of that size, from tests/benchmarks/backbones.py.
    seconds: float
    top1: float  # percent of ImageNet's validation images, as its source says
    license: str


# Networks that are among the most accurate for their cost. The accuracies are those of
# keras.io/api/applications (of MobileNetV3: of its page there), trained on ImageNet; those of
# DINOv2, trained without labels, of a linear classifier on its features
# (github.com/facebookresearch/dinov2).
BACKBONES = {
    "MobileNetV3Small": Backbone(224, 0.9, 4, 6, 68.1, "Apache-2.0"),
    "MobileNetV3Large": Backbone(224, 3.0, 12, 17, 75.6, "Apache-2.0"),
    "EfficientNetV2B0": Backbone(224, 5.9, 24, 29, 78.7, "Apache-2.0"),
    "EfficientNetV2B1": Backbone(240, 6.9, 28, 48, 79.8, "Apache-2.0"),
    "EfficientNetV2B2": Backbone(260, 8.8, 36, 72, 80.5, "Apache-2.0"),
    "EfficientNetV2B3": Backbone(300, 12.9, 52, 112, 82.0, "Apache-2.0"),
    "EfficientNetV2S": Backbone(384, 20.3, 82, 289, 83.9, "Apache-2.0"),
    "dinov2-small": Backbone(224, 21.6, 88, 215, 81.1, "Apache-2.0"),
    "dinov2-base": Backbone(224, 85.7, 346, 663, 84.5, "Apache-2.0"),
    "dinov2-with-registers-base": Backbone(224, 85.7, 346, 670, 84.6, "Apache-2.0"),
}


def propose(images: int, cores: int) -> str:
    """Return the name of the most accurate backbone whose features take at most two minutes.

    Parameters
    ----------
    images, cores : int
        The number of images of the dataset, and of processor cores.

    Returns
    -------
    name : str
        A key of `BACKBONES`; the fastest, if all take longer.
    """
    fast = [name for name in BACKBONES if estimate(name, images, cores) <= _SECONDS]
    if fast:
        return max(fast, key=lambda name: BACKBONES[name].top1)
    return min(BACKBONES, key=lambda name: BACKBONES[name].seconds)


def estimate(name: str, images: int, cores: int) -> float:
    """Return the seconds that the features of some images take, once, on a processor like ours."""
    return BACKBONES[name].seconds * images / 1000 / cores


def table() -> str:
    """Return the table of backbones, aligned, fastest first."""
    lines = [("name", "pixels", "million weights", "MB", "CPU s per 1,000", "ImageNet", "license")]
    for name, one in sorted(BACKBONES.items(), key=lambda item: item[1].seconds):
        lines.append(
            (
                name,
                str(one.size),
                f"{one.weights:.1f}",
                str(one.megabytes),
                f"{one.seconds:.0f}",
                f"{one.top1:.1f} %",
                one.license,
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [
        "  ".join(
            text.ljust(width) if number in (0, 6) else text.rjust(width)
            for number, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join(
        [
            *rows,
            "",
            "CPU s: seconds of one core for the features of 1,000 images; cores share the work.",
            "ImageNet: top-1 accuracy; of DINOv2, trained without labels, that of a linear"
            " classifier on its features.",
            "Write one: python -m stages backbone NAME (any other of keras.applications, too)",
        ]
    )
