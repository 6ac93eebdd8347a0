"""The parameters of training, which the stage reads and a search varies."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from stages.run.cli import UserError
from stages.run.params import Parameters

MIN_TO_CALIBRATE = 50  # validation images, for an estimate of the temperature

# The code of the network and of its images: if it changes, what was computed earlier is not used.
_ROOT = Path(__file__).parents[1]
CODE = [_ROOT / "data" / "arrays.py", *_ROOT.glob("model/[!.]*.py")]


class Augment(Parameters):
    """Data augmentation: random changes to each training image, new in each epoch."""

    flip: Literal["none", "horizontal", "both"] = "none"
    translation: float = Field(0.08, ge=0, le=1)
    rotation: float = Field(8.0, ge=0, le=180)
    zoom: float = Field(0.1, ge=0, lt=1)
    contrast: float = Field(0.1, ge=0, lt=1)


class Train(Parameters):
    """The section `train` of params.yaml, which explains each key."""

    seed: int = Field(1, ge=0, lt=2**32)
    epochs: int = Field(10, ge=1, le=100_000)
    patience: int = Field(0, ge=0, le=100_000)
    batch_size: int = Field(64, ge=1)
    replicas: int = Field(1, ge=1, le=1024)
    learning_rate: float = Field(0.01, gt=0, le=10)
    warmup_fraction: float = Field(0.2, ge=0, lt=1)
    weight_decay: float = Field(0.05, ge=0)
    label_smoothing: float = Field(0.0, ge=0, le=0.5)
    class_weight: Literal["none", "balanced"] = "none"
    precision: Literal["auto", "float32", "mixed_float16", "mixed_bfloat16"] = "auto"
    deterministic: bool = True
    filters: list[Annotated[int, Field(ge=1)]] = Field([32, 64, 128], min_length=1)
    convs_per_block: int = Field(2, ge=1, le=10)
    batch_normalization: bool = True
    dense_units: int = Field(128, ge=0)
    dropout: float = Field(0.3, ge=0, lt=1)
    augment: Augment = Augment()
    backbone: str = "none"
    fine_tune_fraction: float = Field(0.0, ge=0, le=1)
    fine_tune_epochs: int = Field(5, ge=1)
    fine_tune_learning_rate: float = Field(0.0001, gt=0, le=10)

    @property
    def total_epochs(self) -> int:
        """The number of epochs of all phases, if none ends early."""
        fine_tuned = self.backbone != "none" and self.fine_tune_fraction > 0
        return self.epochs + (self.fine_tune_epochs if fine_tuned else 0)

    def unused(self) -> list[str]:
        """Return the keys that have no effect, such as ``"filters"`` with a backbone."""
        unused = ["fine_tune_fraction", "fine_tune_epochs", "fine_tune_learning_rate"]
        if self.backbone != "none":
            unused = ["filters", "convs_per_block", "batch_normalization"]
            if not self.fine_tune_fraction:
                unused += ["augment", "fine_tune_epochs", "fine_tune_learning_rate"]
        return unused


def find_backbone(folder: str | Path, name: str) -> Path | None:
    """Return the path of the file that `train.backbone` names; None for the name none.

    Raises
    ------
    UserError
        If there is no such file.
    """
    if name == "none":
        return None
    path = Path(folder, name)
    if not path.is_file():
        known = (
            ", ".join(sorted(path.name for path in Path(folder).glob("*.keras"))) or "no backbone"
        )
        raise UserError(
            f"params.yaml: train.backbone: no such file: {path} (available: {known}); create it"
            " with `python -m stages backbone NAME`, or fetch a shared one with `dvc pull`"
        )
    return path
