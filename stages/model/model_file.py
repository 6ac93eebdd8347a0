"""The model file: a normal `.keras` file that is the same bytes for the same model."""

import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import keras

from stages.data.arrays import ImageSpec
from stages.utils.cli import NO_SPACE, UserError, first_line
from stages.utils.files import atomic_write

_READING = "image_spec.json"


def save(model: keras.Model, path: str | Path, reading: dict[str, Any] | None = None) -> None:
    """Write a model so that equal models are equal bytes.

    Parameters
    ----------
    model : Keras model
        Not compiled: optimizer state has no place in a model that is used.
    path : path
    reading : dict, default=None
        Class names and how images are read (none for a backbone); kept as ``image_spec.json``
        in the archive, which Keras leaves alone.
    """
    with (
        atomic_write(path) as tmp,
        tempfile.TemporaryDirectory(".part", ".", tmp.parent) as folder,
    ):
        plain = Path(folder) / "model.keras"
        model.save(plain)
        with zipfile.ZipFile(plain) as old, zipfile.ZipFile(tmp, "w") as new:
            for name in sorted(old.namelist()):
                content = old.read(name)
                if name == "config.json":
                    content = _dump(_numbered(json.loads(content), {}))
                elif name == "metadata.json":  # else the time of saving
                    content = _dump(json.loads(content) | {"date_saved": "1980-01-01@00:00:00"})
                new.writestr(zipfile.ZipInfo(name), content)
            if reading is not None:
                new.writestr(zipfile.ZipInfo(_READING), _dump(reading))


def load(path: str | Path) -> tuple[keras.Model, ImageSpec]:
    """Read a model file of this pipeline.

    Returns
    -------
    model : Keras model
        Takes uint8 [n, height, width, channels]; gives probabilities, float32 [n, classes].
    spec : ImageSpec

    Raises
    ------
    UserError
        If there is no such file, or it is not a model of this pipeline.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(
            f"{path}: no such model file; `dvc repro` makes data/model.keras, `dvc pull` fetches it"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            spec = ImageSpec.from_json(archive.read(_READING), path)
    except (zipfile.BadZipFile, IsADirectoryError):
        raise UserError(f"{path}: not a model file; expected a .keras file") from None
    except KeyError:
        raise UserError(
            f"{path}: a .keras file, but not one of this pipeline: it doesn't say what its classes"
            " are; give the data/model.keras of a `dvc repro`"
        ) from None
    try:
        return keras.saving.load_model(path, compile=False, safe_mode=True), spec
    except (ValueError, TypeError, KeyError, OSError, zipfile.BadZipFile) as error:
        if getattr(error, "errno", None) in NO_SPACE:  # Keras unpacks the weights to a file
            raise
        reason = first_line(error)
        raise UserError(f"{path}: Keras {keras.__version__} can't load it: {reason}") from None


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def _numbered(value: Any, numbers: dict[int, int]) -> Any:
    """Replace each `shared_object_id`, an address in memory, by the order of its appearance."""
    if isinstance(value, list):
        return [_numbered(item, numbers) for item in value]
    if isinstance(value, dict):
        return {
            key: numbers.setdefault(item, len(numbers))
            if key == "shared_object_id"
            else _numbered(item, numbers)
            for key, item in value.items()
        }
    return value
