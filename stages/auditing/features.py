"""What is known of the content of all prepared images: features, and out-of-fold probabilities."""

import contextlib
import logging
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from stages.data import arrays
from stages.data.arrays import SPLITS, ImageSpec, Split, read_split
from stages.model.parameters import CODE, Train
from stages.report.label_errors import FOLDS, cross_validate, folds_of
from stages.run import cli, environment, files
from stages.run.cli import UserError
from stages.tuning.training import History, run_stage

_PIXELS = 16  # of a side, at most
_MARGIN = 0.1  # by which pixels may be less accurate than the network, to be used in its place
_CHUNK = 256  # images read at once


class Evidence(NamedTuple):
    """What is known of the content of some images.

    Attributes
    ----------
    rows : int array [n]
        Their positions among all.
    vectors : float32 array [n, d]
        Their features; those of other rows can't be compared with these.
    probabilities : float32 array [n, classes]
        Of a model that did not learn from these images.
    """

    rows: np.ndarray
    vectors: np.ndarray
    probabilities: np.ndarray


def read_evidence(
    labels: np.ndarray,
    units: np.ndarray,
    digests: np.ndarray,
    parameters: Train,
    val_accuracy: float,
    prepared: Path = Path("data/prepared"),
    backbones: Path = Path("data/backbones"),
) -> list[Evidence]:
    """Return what is known of the content of the images in all splits.

    With a backbone, these are its features, which it has never adapted to the labels, and a
    logistic regression on them. Without one, the same with pixels, if that is almost as accurate as
    the network; otherwise the network is trained anew for each of five folds, since one that has
    learned from an image agrees with its label.

    Parameters
    ----------
    labels, units : int arrays [n]
        Of the images in the order of splits and their arrays; those of a unit share a fold.
    digests : array of n str
        Hexadecimal.
    parameters : Train
    val_accuracy : float
        Of the network, from 0 to 1.
    prepared, backbones : path

    Returns
    -------
    evidence : list of Evidence
        One for all images, or one for each fold.
    """
    spec = ImageSpec.read(prepared / "image_spec.json")
    splits = {name: read_split(prepared / name) for name in SPLITS}
    splits = {name: split for name, split in splits.items() if len(split)}
    rows, classes = np.arange(len(labels)), len(spec.classes)
    if parameters.backbone != "none":
        vectors = backbone_features(splits, spec, parameters, prepared, backbones)
        return [Evidence(rows, vectors, cross_validate(vectors, labels, units, classes))]
    vectors = pixels(splits.values(), len(labels), spec)
    probabilities = cross_validate(vectors, labels, units, classes)
    accuracy = (probabilities.argmax(1) == labels).mean()
    if accuracy >= val_accuracy - _MARGIN:
        return [Evidence(rows, vectors, probabilities)]
    epochs = parameters.total_epochs
    print(
        f"audit: a network is trained {FOLDS} times, for {epochs} epochs each, without the images"
        f" that it then judges: pixels alone say too little (accuracy {accuracy:.0%}, the network"
        f" {val_accuracy:.0%}). That takes {FOLDS} times as long as the train stage; with a"
        " backbone, none of it would be needed. Finished trainings are kept.",
        flush=True,
    )
    folds = folds_of(units)
    if len(np.unique(folds)) < FOLDS:
        raise UserError(f"audit: too few images to train on without a {FOLDS}th of them")
    return [
        _train_without(fold, folds, labels, digests, spec, splits, parameters, backbones)
        for fold in np.unique(folds)
    ]


def backbone_features(
    splits: Mapping[str, Split], spec: ImageSpec, parameters: Train, prepared: Path, folder: Path
) -> np.ndarray:
    """Return the features of the frozen backbone: float32 [n, d], of each image one vector.

    Those that train has computed are not computed again.
    """
    environment.load_tensorflow()
    from stages.model import device
    from stages.model.features import extract_features
    from stages.model.network import build

    found = device.setup(parameters.deterministic, parameters.seed)
    file = folder / parameters.backbone
    if not file.is_file():
        raise UserError(f"{file}: train.backbone: no such file; `dvc pull` fetches a shared one")
    backbone = build(spec.image_shape, len(spec.classes), parameters, file).backbone
    features = [
        extract_features(backbone, split, prepared / name, found) for name, split in splits.items()
    ]
    vectors = np.concatenate([one.vectors for one in features])
    assert backbone is not None
    if any(layer.name == "quarters" for layer in backbone.layers):  # one vector for each
        depth = backbone.get_layer("quarters").output.shape[-1]
        vectors = vectors.reshape(len(vectors), -1, depth).mean(1)
    return vectors


def pixels(splits: Iterable[Split], count: int, spec: ImageSpec) -> np.ndarray:
    """Return the pixels of all images as vectors, of at most 16 x 16 pixels: float32 [n, d]."""
    height, width, channels = spec.image_shape
    size = min(width, _PIXELS), min(height, _PIXELS)
    vectors = np.empty((count, size[0] * size[1] * channels), np.float32)
    row = 0
    for split in splits:
        for batch in split.batches(_CHUNK):
            for image in batch:
                small = Image.fromarray(image.squeeze()).resize(size, Image.Resampling.BOX)
                vectors[row] = np.asarray(small).ravel()
                row += 1
    return vectors / 255


def _train_without(
    fold: int,
    folds: np.ndarray,
    labels: np.ndarray,
    digests: np.ndarray,
    spec: ImageSpec,
    splits: Mapping[str, Split],
    parameters: Train,
    backbones: Path,
) -> Evidence:
    """Train the network without a fold, and return what it says of the images in that fold.

    The fold that follows serves as validation, so that not even the epoch is chosen by the fold.
    """
    parts = {"test": folds == fold, "val": folds == (fold + 1) % FOLDS}
    parts["train"] = ~(parts["test"] | parts["val"])
    rows = {name: np.flatnonzero(part) for name, part in parts.items()}
    rows = {name: own[np.argsort(digests[own], kind="stable")] for name, own in rows.items()}
    key = files.fingerprint(
        CODE,
        images=[digests[own].tolist() for own in rows.values()],
        labels=[labels[own].tolist() for own in rows.values()],
        spec=spec.to_json(),
        parameters=parameters.model_dump(),
    )
    environment.load_tensorflow()
    from stages.model import device, model_file
    from stages.report.outputs import predict_both

    # It would warn that each network has a function of its own.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    cache = files.scratch_dir("audit") / f"{key}.npz"
    with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile):  # damaged
        saved = np.load(cache)
        return Evidence(rows["test"], saved["vectors"], saved["probabilities"])
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        for name, own in rows.items():
            images = _gather(splits, own)
            chosen = [bytes.fromhex(digest) for digest in digests[own]]
            target = folder / "data/prepared" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            arrays.write_split(target, chosen, labels[own], spec.image_shape, images)
        spec.write(folder / "data/prepared/image_spec.json")
        (folder / "data/backbones").symlink_to(backbones.absolute())
        shutil.copy("params.yaml", folder)
        label = f"training {fold + 1} of {FOLDS}"
        with cli.progress((), total=parameters.total_epochs, unit="epoch", label=label) as bar:

            def tell(history: History) -> None:
                bar.update()

            run_stage("train", folder, tell)
        device.setup()
        network, _ = model_file.load(folder / "data/model.keras")
        test = read_split(folder / "data/prepared/test")
        probabilities, vectors = predict_both(network, test.batches(_CHUNK))
    with files.atomic_write(cache) as tmp, open(tmp, "wb") as file:
        np.savez(file, vectors=vectors, probabilities=probabilities)
    files.keep_newest(cache, "*.npz", 2 * FOLDS)
    return Evidence(rows["test"], vectors, probabilities)


def _gather(splits: Mapping[str, Split], rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yield images, given their positions among those of all splits."""
    ends = np.cumsum([len(split) for split in splits.values()])
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        images: dict[int, np.ndarray] = {}
        for end, split in zip(ends, splits.values(), strict=True):
            own = chunk[(chunk < end) & (chunk >= end - len(split))]
            images |= zip(own.tolist(), split.gather(own - (end - len(split))), strict=True)
        yield from (images[row] for row in chunk.tolist())


def typical(
    evidence: list[Evidence], labels: np.ndarray, classes: int, count: int
) -> list[list[int]]:
    """Return the positions of the images of each class that are nearest to its mean feature.

    Only images whose label the model agrees with count; of several networks, each has its share.
    """
    found: list[list[int]] = [[] for _ in range(classes)]
    for part in evidence:
        own, said = labels[part.rows], part.probabilities.argmax(1)
        for label in np.unique(own):
            rows = np.flatnonzero((own == label) & (said == label))
            if len(rows):
                vectors = part.vectors[rows]
                distances = np.linalg.norm(vectors - vectors.mean(0), axis=1)
                nearest = rows[np.argsort(distances, kind="stable")[:count]]
                found[label] += part.rows[nearest].tolist()
    return [rows[:: max(1, len(rows) // count)][:count] for rows in found]
