"""The backbones that are proposed, with what they cost."""

from typing import NamedTuple


class Backbone(NamedTuple):
    """A network of `keras.applications`, trained on ImageNet."""

    size: int  # pixels, the side of the images it was trained on
    weights: float  # million
    megabytes: int  # to download
    seconds: float  # of CPU time, for 1,000 images
    top1: float  # percent on ImageNet
    license: str


BACKBONES = {
    "MobileNetV3Small": Backbone(224, 0.9, 4, 20, 68.1, "Apache 2.0"),
    "EfficientNetV2B0": Backbone(224, 5.9, 24, 60, 78.7, "Apache 2.0"),
}


def propose(images: int, cores: int) -> str:
    """Return the best backbone that is quick enough for this number of images and of cores."""
    minutes = images / 1000 * BACKBONES["EfficientNetV2B0"].seconds / cores / 60
    return "EfficientNetV2B0" if minutes < 10 else "MobileNetV3Small"
