"""The model file: a `.keras` file with its image spec; equal models give identical files."""

import io
import json
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

from stages.data.arrays import MAX_SPEC_BYTES, ImageSpec
from stages.run.cli import UserError, first_line, no_such
from stages.run.files import atomic_write

# Members of the archive, which Keras ignores.
_SPEC = "image_spec.json"
_LEARNED = ("trained_on.npy", "validated_on.npy")


class Learned(NamedTuple):
    """The images that a backbone has learned from, by the first 64 bits of their digests.

    Attributes
    ----------
    trained, validated : uint64 array
        Sorted; those that trained it, and those that only chose its epoch.
    """

    trained: np.ndarray
    validated: np.ndarray


def save(
    model: keras.Model,
    path: str | Path,
    spec: ImageSpec | None = None,
    learned: Learned | None = None,
) -> None:
    """Write a model; equal models give byte-identical files.

    Parameters
    ----------
    model : Keras model
        Not compiled: a finished model needs no optimizer state.
    path : path
    spec : ImageSpec, default=None
        The classes, and how images are read for the model; None for a backbone.
    learned : Learned, default=None
        What its backbone has learned from, of a backbone that was a model of this pipeline.
    """
    with atomic_write(path) as tmp:
        keras_file = tmp.with_name("model.keras")
        model.save(keras_file)
        with zipfile.ZipFile(keras_file) as source, zipfile.ZipFile(tmp, "w") as target:
            for name in sorted(source.namelist()):
                content = source.read(name)
                if name == "config.json":
                    content = _dump(_number_shared_objects(json.loads(content), {}))
                elif name == "metadata.json":
                    content = _dump(json.loads(content) | {"date_saved": "1980-01-01@00:00:00"})
                target.writestr(zipfile.ZipInfo(name), content)  # dated 1980, too
            if spec is not None:
                target.writestr(zipfile.ZipInfo(_SPEC), spec.to_json())
            for name, keys in zip(_LEARNED, learned or (), strict=False):
                with io.BytesIO() as file:
                    np.save(file, keys)
                    target.writestr(zipfile.ZipInfo(name), file.getvalue())


def image_keys(digests: Iterable[str]) -> np.ndarray:
    """Return the first 64 bits of digests of images (hexadecimal), sorted, each once: uint64."""
    return np.unique(np.array([int(digest[:16], 16) for digest in digests if digest], np.uint64))


def read_learned(path: str | Path) -> Learned | None:
    """Return what a file's backbone has learned from; None if it was no model of this pipeline."""
    with zipfile.ZipFile(path) as archive:
        if _LEARNED[0] not in archive.namelist():
            return None
        members = (io.BytesIO(archive.read(name)) for name in _LEARNED)
        return Learned(*(np.load(member, allow_pickle=False) for member in members))


def load(path: str | Path) -> tuple[keras.Model, ImageSpec]:
    """Read a model file of this pipeline.

    Returns
    -------
    model : Keras model
        Images of 0 to 255 [n, height, width, channels] to probabilities, float32 [n, classes].
    spec : ImageSpec

    Raises
    ------
    UserError
        If there is no such file, or it is not a model of this pipeline.
    """
    path = Path(path)
    if not path.exists():
        advice = "`dvc repro` makes data/model.keras, `dvc pull` fetches it"
        raise UserError(no_such("model file", path, advice))
    if path.suffix != ".keras":
        raise UserError(f"{path}: not a model file; expected a name that ends in .keras")
    try:
        with zipfile.ZipFile(path) as archive, archive.open(_SPEC) as member:
            content = member.read(MAX_SPEC_BYTES + 1)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, IsADirectoryError):
        raise UserError(f"{path}: not a model file; expected a .keras file") from None
    except KeyError:
        raise UserError(
            f"{path}: a .keras file without {_SPEC}, so not one of this pipeline; use the"
            " data/model.keras of a `dvc repro`"
        ) from None
    spec = ImageSpec.from_json(content, f"{path}: {_SPEC}")
    try:
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
    except (ValueError, TypeError, KeyError, OSError, zipfile.BadZipFile) as error:
        if getattr(error, "strerror", None):  # of the system: Keras extracts the weights to a file
            raise
        reason = first_line(error)
        raise UserError(f"{path}: Keras {keras.__version__} can't load it: {reason}") from None
    shapes = [(None, *spec.image_shape), (None, len(spec.classes))]
    if (found := [model.input_shape, model.output_shape]) != shapes:
        raise UserError(
            f"{path}: its network maps {found[0]} to {found[1]}, but its {_SPEC} says {shapes[0]}"
            f" to {shapes[1]}; `dvc repro` makes another"
        )
    return model, spec


def _dump(value: Any) -> bytes:
    """Return a value as JSON."""
    return json.dumps(value, ensure_ascii=False).encode()


def _number_shared_objects(value: Any, numbers: dict[int, int]) -> Any:
    """Replace each `shared_object_id`, an address in memory, by its order of appearance."""
    if isinstance(value, list):
        return [_number_shared_objects(item, numbers) for item in value]
    if isinstance(value, dict):
        return {
            key: numbers.setdefault(item, len(numbers))
            if key == "shared_object_id"
            else _number_shared_objects(item, numbers)
            for key, item in value.items()
        }
    return value
