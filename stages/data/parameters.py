"""The parameters of the prepare stage."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from stages.data.layout import Layout
from stages.run.params import Parameters

Pixels = Annotated[int, Field(ge=1, le=4096)]


class Prepare(Parameters):
    """The section `prepare` of params.yaml, where each key is explained."""

    layout: Layout = "auto"
    image_size: list[Pixels] = Field([32, 32])
    color_mode: Literal["auto", "rgb", "grayscale"] = "auto"
    resize: Literal["crop", "pad", "stretch"] = "crop"
    white_level: Annotated[int, Field(ge=1, le=65535)] = 65535
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.15
    seed: int = Field(1, ge=0, lt=2**32)
    drop_near_duplicates: bool = True
    group_by: str | None = None
    max_unreadable_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01

    @field_validator("image_size", mode="before")
    @classmethod
    def _is_pair(cls, value: object) -> object:
        if not isinstance(value, list) or len(value) != 2:
            raise ValueError("expected [height, width], for instance [128, 128]")
        return value

    @field_validator("group_by")
    @classmethod
    def _is_pattern(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"expected a regular expression ({error})") from None
        return value

    @model_validator(mode="after")
    def _leaves_training(self) -> "Prepare":
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError(
                "val_fraction and test_fraction leave nothing to train on: expected a sum below 1"
            )
        return self
