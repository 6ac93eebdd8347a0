"""Prepare: a folder of images in, arrays for the network out."""

import csv
import functools
import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from stages.data import dataset as datasets
from stages.data import images, prepared, splits
from stages.run import files, parameters, scratch, terminal

Pixels = Annotated[int, Field(ge=1, le=4096)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Prepare(parameters.Parameters):
    """What params.yaml says under `prepare:`."""

    image_size: tuple[Pixels, Pixels] = (32, 32)
    color_mode: Literal["auto", "rgb", "grayscale"] = "auto"
    resize: Literal["crop", "pad", "stretch"] = "crop"
    val_fraction: Fraction = 0.15
    test_fraction: Fraction = 0.15
    seed: int = 1
    near_copies: bool = True
    group_by: str | None = None
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01


def main() -> None:
    """Run the stage as params.yaml says."""
    with scratch.lock("prepare"):
        prepare(
            parameters.read_dataset(), "data/prepared", "metrics",
            parameters.read_section(Prepare, "prepare"),
        )  # fmt: skip


def prepare(
    dataset: str | Path, output: str | Path, metrics: str | Path, parameters: Prepare
) -> None:
    """Make arrays for the network from a folder of images."""
    output, metrics = Path(output), Path(metrics)
    found = datasets.find(dataset, output)
    p = parameters
    digests, rows, bad = [], {}, {}
    for i, path in enumerate(terminal.progress(found.paths, total=len(found), unit="image", label="prepare")):
        try:
            data = images.read_bytes(found.folder / path)
            digest = hashlib.blake2b(data, digest_size=16).hexdigest()
            digests.append(digest)
            if digest not in rows:
                rows[digest] = images.fit(images.decode(data, p.image_size), p.image_size, p.resize)
        except images.ImageError as error:
            bad[i] = str(error)
    ok = np.array([i for i in range(len(found)) if i not in bad])
    names, contents = np.unique(digests, return_inverse=True)
    decision = splits.decide(
        contents, found.labels[ok], found.given[ok], contents,
        splits.ranks(map(bytes.fromhex, names), p.seed), p.val_fraction, p.test_fraction)
    mode = p.color_mode
    if mode == "auto":
        mode = "rgb" if any(r.shape[-1] == 3 for r in rows.values()) else "grayscale"
    shape = (*p.image_size, 1 if mode == "grayscale" else 3)
    place = np.full(len(ok), -1)
    for code, split in enumerate(prepared.SPLITS):
        here = np.flatnonzero(decision.splits == code)
        here = here[np.lexsort((found.labels[ok][here], contents[here]))]
        place[here] = np.arange(len(here))
        prefixes = np.array([int(names[c][:8], 16) for c in contents[here]], np.uint32)
        bounds = prepared.file_bounds(prefixes)
        with files.replacing(output / split) as folder:
            folder.mkdir()
            for k in range(len(bounds) - 1):
                part = here[bounds[k]:bounds[k + 1]]
                prepared.write_images(folder / prepared.file_name(k), len(part), shape,
                    (images.in_color_mode(rows[names[contents[j]]], mode) for j in part))
            if len(here):
                prepared.write_labels(folder, found.labels[ok][here])
    prepared.write_classes(output / "classes.json", prepared.Classes(found.classes, shape, mode, p.resize))
    with files.replacing(output / "index.csv") as beside, open(beside, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "class", "split", "digest", "reason", "row"])
        back = {i: j for j, i in enumerate(ok)}
        for i, path in enumerate(found.paths):
            name = found.classes[found.labels[i]]
            if i in bad:
                writer.writerow([path, name, "", "", bad[i], ""])
                continue
            j = back[i]
            s = decision.splits[j]
            writer.writerow([path, name, prepared.SPLITS[s] if s >= 0 else "", names[contents[j]],
                ["", "exact copy", "near copy", "conflict"][decision.reasons[j]], place[j] if s >= 0 else ""])
    with files.replacing(output / "copies.csv") as beside:
        beside.write_text("path,split,other_path,other_split,distance,kind,left_out\n")
    counts = Counter(decision.splits.tolist())
    files.write_json(metrics / "prepare.json", dict(
        train=counts[0], val=counts[1], test=counts[2], classes=len(found.classes),
        image_height=shape[0], image_width=shape[1], channels=shape[2], left_out=len(found) - sum(counts[c] for c in range(3))))
    with files.replacing(metrics / "prepare_classes.csv") as beside, open(beside, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["class", *prepared.SPLITS])
        for code, name in enumerate(found.classes):
            here = decision.splits[found.labels[ok] == code]
            writer.writerow([name, *(int((here == s).sum()) for s in range(3))])
    from stages.report import figures
    (metrics / "plots").mkdir(parents=True, exist_ok=True)
    train = prepared.read_split(output / "train")
    figures.image_grid(list(train.gather(np.arange(min(12, len(train))))), [found.classes[c] for c in train.labels[:12]],
        "Prepared images", metrics / "plots" / "prepared.png", 6)


if __name__ == "__main__":
    terminal.run(main)
