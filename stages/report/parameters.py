"""The parameters of the evaluate stage."""

from pydantic import Field

from stages.run.params import Parameters


class Evaluate(Parameters):
    """The section `evaluate` of params.yaml, where each key is explained."""

    top_k: int = Field(5, ge=2)
    grid_images: int = Field(24, ge=1, le=200)
