"""Prepare: a folder of images in, arrays for the network out.

An image's split follows from its content and the seed (stages/data/splits.py), near copies of val
and test images are kept out of training (copies.py), and an image is decoded once (store.py).
"""

import argparse
import contextlib
import functools
import math
import re
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from stages.data import arrays, cache, duplicates, images, parallel, scan, splits, tables
from stages.data.arrays import SPLITS
from stages.data.dataset import Dataset, find
from stages.data.splits import TRAIN
from stages.report import figures
from stages.utils import cli, files
from stages.utils.cli import UserError, progress
from stages.utils.params import Parameters, read_dataset, read_section

Pixels = Annotated[int, Field(ge=1, le=4096)]


class Prepare(Parameters):
    """The section `prepare:` of params.yaml."""

    image_size: list[Pixels] = Field([32, 32], min_length=2, max_length=2)
    color_mode: Literal["auto", "rgb", "grayscale"] = "auto"
    resize: Literal["crop", "pad", "stretch"] = "crop"
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.15
    seed: int = Field(1, ge=0, lt=2**32)
    drop_near_duplicates: bool = True
    group_by: str | None = None
    max_unreadable_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01

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


_SHOWN = 20  # names that the terminal lists
_SHRUNK = 4  # times, from which on the summary speaks of it
_MANY = 0.02  # near copies among all images, from which on the summary speaks of them
_PICTURE = (20, 6)  # classes, and images of each


def main() -> None:
    """Run the stage as params.yaml says."""
    parameters, dataset = read_section(Prepare, "prepare"), read_dataset()
    with files.stage_lock("prepare"):
        prepare(parameters, dataset, "data/prepared", "metrics")


def prepare(
    parameters: Prepare,
    dataset: str | Path,
    output: str | Path,
    metrics: str | Path,
    rows: str | Path | None = None,
) -> int:
    """Make arrays for the network from a folder of images.

    Parameters
    ----------
    parameters : Prepare
    dataset : path
        A folder as `stages.data.dataset` describes it.
    output : path
        The folder for train/, val/, test/, image_spec.json, index.csv and copies.csv.
    metrics : path
        The folder for prepare.json, prepare_classes.csv and plots/prepared.png.
    rows : path, optional
        The folder that keeps finished images; by default one in the scratch area.

    Returns
    -------
    decoded : int
        How many pictures were decoded; the others were finished in an earlier run.

    Raises
    ------
    UserError
        If the dataset can't be used as it is.
    """
    output, metrics = Path(output), Path(metrics)
    rows = Path(rows) if rows else files.scratch_dir("rows")
    found = find(dataset, output)
    try:
        return _prepare(parameters, found, output, metrics, rows)
    except cache.Damaged:
        cache.clear(rows)
    except cache.Lost:  # what is missing is decoded again
        pass
    return _prepare(parameters, found, output, metrics, rows)


def _prepare(parameters: Prepare, found: Dataset, output: Path, metrics: Path, rows: Path) -> int:
    size, resize = tuple(parameters.image_size), parameters.resize
    with (
        warnings.catch_warnings(action="ignore"),  # of damaged images: they are listed
        ThreadPoolExecutor(1) as aside,
        cache.Store(rows, size, resize) as kept,
        parallel.Workers(parallel.number(len(found))) as pool,
    ):
        kept.begin()
        read = scan.read(found, pool, rows, size, resize)
        _check_files(found, read, parameters.max_unreadable_fraction)

        near = functools.partial(read.near_copies, pool, (rows, size, resize))
        search = duplicates.Search(read.contents, near if parameters.drop_near_duplicates else None)
        units, ranks, alone = _units(found, read, parameters)
        decision = splits.decide(
            read.contents, found.labels, found.given, units, ranks,
            parameters.val_fraction, parameters.test_fraction, search,
        )  # fmt: skip
        _check_classes(found, read, decision, units)

        color_mode = parameters.color_mode
        if color_mode == "auto":
            color_mode = "rgb" if (read.channels == 3).any() else "grayscale"
        shape = (*size, 3 if color_mode == "rgb" else 1)
        orders = _orders(found, read, decision)
        pairs = tables.pairs(found, read, decision, search)
        counts = tables.counts(found, read, decision, pairs)
        picture = _picture(found, read, orders[TRAIN], kept, color_mode)

        def tell() -> None:
            arrays.ImageSpec(found.classes, shape, color_mode, resize).write(
                output / "image_spec.json"
            )
            index = tables.index_table(found, read, decision, orders)
            tables.write(output / "index.csv", index)
            tables.write(output / "copies.csv", tables.copies_table(found, decision, pairs))
            named = dict(zip(("image_height", "image_width", "channels"), shape, strict=True))
            files.write_json(metrics / "prepare.json", named | counts)
            tables.write(metrics / "prepare_classes.csv", tables.classes_table(found, decision))
            figures.image_grid(*picture, metrics / "plots" / "prepared.png", columns=_PICTURE[1])

        telling = aside.submit(tell)  # while the workers write the arrays
        again = _write_splits(found, read, orders, pool, rows, shape, resize, output)
        telling.result()
        kept.evict(used=read.names(np.arange(len(read.firsts))))

    _summarize(found, read, decision, counts, shape, parameters, alone, output)
    return read.decoded + again


def _check_files(found: Dataset, read: scan.Reading, tolerated: float) -> None:
    bad = len(read.reasons)
    if bad > tolerated * len(found) or bad == len(found):
        raise UserError(
            f"prepare: {bad} of {len(found)} images can't be read, more than"
            f" prepare.max_unreadable_fraction ({tolerated:g}) allows;"
            " fix or remove them, or raise it:"
            f" {'; '.join(_bad(found, read))}"
        )
    for code, split in enumerate(SPLITS):
        own = read.contents[found.given == code]
        if len(own) and (own < 0).all():
            raise UserError(
                f"prepare: none of the {len(own)} images of the dataset's own {split} can be read;"
                f" mend them, or remove that folder: {'; '.join(_bad(found, read))}"
            )


def _bad(found: Dataset, read: scan.Reading) -> list[str]:
    """Name the files that can't be read, the first ones at least."""
    rows = sorted(read.reasons)
    shown = [f"{found.paths[row]} ({read.reasons[row]})" for row in rows[:_SHOWN]]
    return shown + ([f"and {len(rows) - _SHOWN} more"] if len(rows) > _SHOWN else [])


def _units(
    found: Dataset, read: scan.Reading, parameters: Prepare
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return what each image stays together with, the ranks of these, and how many have no group.

    Images of equal bytes are a unit, or all images of a group.
    """
    ranks = splits.ranks(read.names(np.arange(len(read.firsts))), parameters.seed)
    if parameters.group_by is None:
        return read.contents, ranks, 0
    pattern, groups, units = re.compile(parameters.group_by), {}, read.contents.copy()
    alone = 0
    for row, path in enumerate(found.paths):
        match = pattern.search(path)
        name = match and (match.group(1) if pattern.groups else match.group())
        if name is None:
            alone += 1
        elif units[row] >= 0:
            units[row] = len(ranks) + groups.setdefault(name, len(groups))
    names = (b"group " + name.encode() for name in groups)
    return units, np.concatenate((ranks, splits.ranks(names, parameters.seed))), alone


def _check_classes(
    found: Dataset, read: scan.Reading, decision: splits.Decision, units: np.ndarray
) -> None:
    """Refuse classes that are left without an image in a split that is drawn."""
    counts = np.zeros((len(found.classes), len(SPLITS)), int)
    kept = decision.splits >= 0
    np.add.at(counts, (found.labels[kept], decision.splits[kept]), 1)
    short = np.flatnonzero((counts[:, decision.needed] == 0).any(axis=1))
    if not len(short):
        return
    lines, parted = [], ""
    for label in short[:_SHOWN]:
        mine = found.labels == label
        out = Counter(
            tables.REASONS[reason] for reason in decision.reasons[mine & (read.contents >= 0)]
        )
        out["unreadable"] = int((mine & (read.contents < 0)).sum())
        left = ", ".join(f"{count} {why}" for why, count in sorted(out.items()) if why and count)
        usable = int(counts[label].sum())
        groups = len(np.unique(units[mine & kept]))
        if groups < usable:
            parted = ", in groups that differ"
        lines.append(
            f"class {found.classes[label]} has {usable} usable image{'' if usable == 1 else 's'}"
            + (f", groups by prepare.group_by: {groups}" if groups < usable else "")
            + (f" (left out: {left})" if left else "")
        )
    more = f"; and {len(short) - _SHOWN} more classes" if len(short) > _SHOWN else ""
    need = [SPLITS[split] for split in decision.needed]
    raise UserError(
        f"prepare: too few images: {'; '.join(lines)}{more}; each class needs {len(need)} or more"
        f" that differ{parted}, one for each of {', '.join(need)}: add images or remove the class"
    )


def _orders(found: Dataset, read: scan.Reading, decision: splits.Decision) -> list[np.ndarray]:
    """Return each split's images (positions in the dataset) in the order of their rows."""
    orders = []
    for code in range(len(SPLITS)):
        mine = np.flatnonzero(decision.splits == code)
        orders.append(mine[np.lexsort((mine, found.labels[mine], read.contents[mine]))])
    return orders


def _write_splits(
    found: Dataset,
    read: scan.Reading,
    orders: list[np.ndarray],
    pool: parallel.Workers,
    rows: Path,
    shape: tuple[int, int, int],
    resize: str,
    output: Path,
) -> int:
    """Write the arrays; return how many images had to be decoded again."""
    parts = []
    with contextlib.ExitStack() as stack:
        for split, order in zip(SPLITS, orders, strict=True):
            folder = stack.enter_context(files.atomic_write(output / split))
            folder.mkdir()
            prefixes = read.digests[order, :4].copy().view(">u4").ravel()
            bounds = arrays.file_bounds(prefixes, math.prod(shape))
            for k in range(len(bounds) - 1):
                parts.append((folder / arrays.file_name(k), order[bounds[k] : bounds[k + 1]]))
            if len(order):
                arrays.write_labels(folder, found.labels[order])
        setup = (found.folder, rows, shape, resize)
        tasks = (
            (file, read.digests[part].tobytes(), [found.paths[row] for row in part])
            for file, part in parts
        )
        answers = pool.run(scan.Writer, setup, tasks)
        try:
            return sum(progress(answers, total=len(parts), unit="file", label="write"))
        except BaseException:
            pool.stop()  # before the folders are removed that they write to
            raise


def _picture(
    found: Dataset, read: scan.Reading, train: np.ndarray, kept: cache.Store, color_mode: str
) -> tuple[list[np.ndarray], list[str], str]:
    """Return some training images of each class, as the network sees them, and what they are."""
    shown, each = _PICTURE
    rows, titles = [], []
    names = figures.class_labels(found.classes)
    for label in range(min(len(names), shown)):
        mine = train[found.labels[train] == label][:each].tolist()
        rows += mine
        titles += [names[label]] + [""] * (len(mine) - 1)
    digests = [read.digests[row].tobytes() for row in rows]
    pixels = kept.pixels(digests)
    for row, digest in zip(rows, digests, strict=True):
        if digest not in pixels:
            pixels[digest] = scan.again(found.folder, found.paths[row], digest, kept).pixels
    grid = [images.in_color_mode(pixels[digest], color_mode) for digest in digests]
    which = "" if len(names) <= shown else f", {shown} of {len(names)} classes"
    return grid, titles, f"Prepared images{which}"


def _summarize(
    found: Dataset,
    read: scan.Reading,
    decision: splits.Decision,
    counts: dict[str, int],
    shape: tuple[int, int, int],
    parameters: Prepare,
    alone: int,
    output: Path,
) -> None:
    height, width, channels = shape
    colors = "colour" if channels == 3 else "grey"
    lines = {
        "images": f"{len(found):,} of {len(found.classes)} classes, {read.decoded:,} decoded now",
        "size": f"{height} × {width} pixels, {colors}",
    }
    for code, split in enumerate(SPLITS):
        if split in found.splits and code not in decision.drawn:
            origin = "the dataset's own"
            if split == "train" and decision.drawn:
                origin += ", less what is cut from it"
        else:
            origin = "cut from train" if found.splits and counts[split] else ""
        lines[split] = f"{counts[split]:,}" + (f" ({origin})" if origin else "")
    if decision.lent.any():
        lines["lent"] = f"{decision.lent.sum()} to splits that a class would not reach otherwise"
    if counts["left_out"]:
        names = ("exact_copies", "near_copies", "conflicts", "unreadable")
        parts = [f"{counts[name]:,} {name.replace('_', ' ')}" for name in names if counts[name]]
        lines["left out"] = f"{counts['left_out']:,} ({', '.join(parts)})"
    if counts["near_copies"] > _MANY * len(found):
        lines["near copies"] = (
            f"many; look at {output / 'copies.csv'}, and if they are pictures of their own (as"
            " simple drawings may be), set prepare.drop_near_duplicates: false"
        )
    if counts["shared"]:
        lines["WARNING"] = (
            f"{counts['shared']:,} images have a copy in another of the dataset's own splits:"
            f" scores will look better than they are; see {output / 'copies.csv'}"
        )
    if parameters.group_by is not None:
        lines["groups"] = f"{alone:,} paths do not match group_by; each is a group of its own"
    if read.reasons:
        lines["unreadable"] = "; ".join(_bad(found, read))
    if found.ignored:
        lines["passed over"] = f"{found.ignored:,} files that are no images by their names"
    if found.linked:
        lines["links"] = f"{found.linked:,} to folders, which DVC does not follow either"
    shrunk = int(np.median(read.shrinks[read.channels > 0]))
    if shrunk >= _SHRUNK:
        lines["shrunk"] = (
            f"the images are {shrunk} times as large or more; to keep more of them, set"
            " prepare.image_size in params.yaml"
        )
    lines["see"] = f"{output / 'index.csv'} (each image), metrics/plots/prepared.png"
    cli.summary("prepare: done", lines)


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m stages.prepare", description=__doc__).parse_args()
    cli.run(main, on_interrupt="images that are finished are kept; run `dvc repro` to go on")
