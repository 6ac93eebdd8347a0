"""Prepare: a folder of images in, arrays for the network out.

An image's split follows from its content and the seed (stages/data/splits.py), near copies of val
and test images are kept out of training (copies.py), and an image is decoded once (store.py).
"""

import contextlib
import csv
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from stages.data import copies, prepared, reading, splits, store, workers
from stages.data.dataset import Dataset, find
from stages.data.prepared import SPLITS
from stages.data.splits import LEFT_OUT, TEST, TRAIN, VAL
from stages.report import figures
from stages.run import files, scratch, terminal
from stages.run.parameters import Parameters, read_dataset, read_section
from stages.run.terminal import UserError

Pixels = Annotated[int, Field(ge=1, le=4096)]


class Prepare(Parameters):
    """The section `prepare:` of params.yaml."""

    image_size: tuple[Pixels, Pixels] = (32, 32)
    color_mode: Literal["auto", "rgb", "grayscale"] = "auto"
    resize: Literal["crop", "pad", "stretch"] = "crop"
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.15
    seed: int = 1
    near_copies: bool = True
    group_by: str | None = None
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01

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
_REASONS = ("", "exact copy", "near copy", "conflict")
_PICTURE = (20, 6)  # classes, and images of each


def main() -> None:
    """Run the stage as params.yaml says."""
    with scratch.lock("prepare"):
        prepare(read_section(Prepare, "prepare"), read_dataset(), "data/prepared", "metrics")


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
        The folder for train/, val/, test/, classes.json, index.csv and copies.csv.
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
    rows = Path(rows) if rows else scratch.folder("rows")
    found = find(dataset, output)
    try:
        return _prepare(parameters, found, output, metrics, rows)
    except store.Damaged:
        store.clear(rows)
        return _prepare(parameters, found, output, metrics, rows)


def _prepare(parameters: Prepare, found: Dataset, output: Path, metrics: Path, rows: Path) -> int:
    size, resize = parameters.image_size, parameters.resize
    with (
        store.Store(rows, size, resize) as kept,
        workers.Workers(workers.number(len(found))) as pool,
    ):
        kept.begin()
        read = reading.read(found, pool, rows, size, resize)
        _check_files(found, read, parameters.max_bad_fraction)

        search = copies.Search(
            read.contents,
            read.descriptors if parameters.near_copies else None,
            lambda contents: read.thumbnails(kept, found, contents),
        )
        units, ranks, alone = _units(found, read, parameters)
        decision = splits.decide(
            read.contents, found.labels, found.given, units, ranks,
            parameters.val_fraction, parameters.test_fraction, search,
        )  # fmt: skip
        _check_classes(found, read, decision)
        pairs = _pairs(found, read, decision, search)

        color_mode = parameters.color_mode
        if color_mode == "auto":
            color_mode = "rgb" if (read.channels == 3).any() else "grayscale"
        shape = (*size, 3 if color_mode == "rgb" else 1)
        places, again = _write_splits(found, read, decision, pool, kept, rows, color_mode, output)
        kept.used(read.names(np.arange(len(read.firsts))))
        kept.evict()

    prepared.write_classes(
        output / "classes.json", prepared.Classes(found.classes, shape, color_mode, resize)
    )
    _write_table(output / "index.csv", _index(found, read, decision, places))
    _write_table(output / "copies.csv", _copies(found, decision, pairs))
    counts = _counts(found, read, decision, pairs)
    files.write_json(
        metrics / "prepare.json",
        dict(zip(("image_height", "image_width", "channels"), shape, strict=True)) | counts,
    )
    _write_table(metrics / "prepare_classes.csv", _classes(found, decision))
    _draw(output / "train", found.classes, metrics / "plots" / "prepared.png")
    _summarize(found, read, decision, counts, shape, parameters, alone, output)
    return read.decoded + again


def _check_files(found: Dataset, read: reading.Reading, tolerated: float) -> None:
    bad = len(read.reasons)
    if bad > tolerated * len(found) or bad == len(found):
        raise UserError(
            f"prepare: {bad} of {len(found)} images can't be read, more than"
            f" prepare.max_bad_fraction ({tolerated:g}) allows; mend or remove them, or raise it:"
            f" {'; '.join(_bad(found, read))}"
        )


def _bad(found: Dataset, read: reading.Reading) -> list[str]:
    """Name the files that can't be read, the first ones at least."""
    rows = sorted(read.reasons)
    shown = [f"{found.paths[row]} ({read.reasons[row]})" for row in rows[:_SHOWN]]
    return shown + ([f"and {len(rows) - _SHOWN} more"] if len(rows) > _SHOWN else [])


def _units(
    found: Dataset, read: reading.Reading, parameters: Prepare
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


def _check_classes(found: Dataset, read: reading.Reading, decision: splits.Decision) -> None:
    """Refuse classes that are left without an image in a split that is drawn."""
    counts = np.zeros((len(found.classes), len(SPLITS)), int)
    kept = decision.splits >= 0
    np.add.at(counts, (found.labels[kept], decision.splits[kept]), 1)
    short = np.flatnonzero((counts[:, decision.needed] == 0).any(axis=1))
    if not len(short):
        return
    lines = []
    for label in short[:_SHOWN]:
        mine = found.labels == label
        out = Counter(_REASONS[reason] for reason in decision.reasons[mine & (read.contents >= 0)])
        out["unreadable"] = int((mine & (read.contents < 0)).sum())
        left = ", ".join(f"{count} {why}" for why, count in sorted(out.items()) if why and count)
        usable = int(counts[label].sum())
        lines.append(
            f"class {found.classes[label]} has {usable} usable image{'' if usable == 1 else 's'}"
            + (f" (left out: {left})" if left else "")
        )
    more = f"; and {len(short) - _SHOWN} more classes" if len(short) > _SHOWN else ""
    need = [SPLITS[split] for split in decision.needed]
    raise UserError(
        f"prepare: too few images: {'; '.join(lines)}{more}; each class needs {len(need)} or more"
        f" that differ, one for each of {', '.join(need)}: add images or remove the class"
    )


def _write_splits(
    found: Dataset,
    read: reading.Reading,
    decision: splits.Decision,
    pool: workers.Workers,
    kept: store.Store,
    rows: Path,
    color_mode: str,
    output: Path,
) -> tuple[np.ndarray, int]:
    """Write the arrays; return each image's position in its split and how many were decoded."""
    places = np.full(len(found), -1, np.int32)
    parts = []
    with contextlib.ExitStack() as stack:
        for code, split in enumerate(SPLITS):
            mine = np.flatnonzero(decision.splits == code)
            mine = mine[np.lexsort((mine, found.labels[mine], read.contents[mine]))]
            places[mine] = np.arange(len(mine))
            folder = stack.enter_context(files.replacing(output / split))
            folder.mkdir()
            prefixes = read.digests[mine, :4].copy().view(">u4").ravel()
            bounds = prepared.file_bounds(prefixes)
            for k in range(len(bounds) - 1):
                parts.append((folder / prepared.file_name(k), mine[bounds[k] : bounds[k + 1]]))
            if len(mine):
                prepared.write_labels(folder, found.labels[mine])
        setup = (found.folder, rows, *kept.fit, color_mode)
        tasks = (
            (file, read.digests[part].tobytes(), [found.paths[row] for row in part])
            for file, part in parts
        )
        again = sum(pool.run(reading.Writer, setup, tasks))
    return places, again


def _pairs(
    found: Dataset, read: reading.Reading, decision: splits.Decision, search: copies.Search
) -> list[tuple[int, int, float, str]]:
    """List the copies: position of an image, of the other, their distance, and the kind."""
    pairs = []
    near = decision.copies
    for row, other, distance in zip(near.queries, near.copies, near.distances, strict=True):
        if decision.reasons[row] == splits.NEAR_COPY:
            pairs.append((row, other, distance, "near" if distance else "group"))
    # What holds the same bytes lies side by side; the one of a class that counts comes first.
    again = decision.reasons == splits.COPY
    order = np.lexsort((again, found.labels, read.contents))
    same = np.diff(read.contents[order], prepend=-1) == 0
    own = same & (np.diff(found.labels[order], prepend=-1) == 0)
    first = np.maximum.accumulate(np.where(own, 0, np.arange(len(order))))
    for place in np.flatnonzero(again[order]):
        pairs.append((order[place], order[first[place]], 0.0, "exact"))
    conflicts = splits.conflicts(read.contents, found.labels, read.contents >= 0)
    starts = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
    for place in np.flatnonzero(conflicts[order]):
        end = np.searchsorted(
            read.contents[order[starts[place] :]], read.contents[order[place]], "right"
        )
        others = order[starts[place] : starts[place] + end]
        other = others[found.labels[others] != found.labels[order[place]]][0]
        pairs.append((order[place], other, 0.0, "conflict"))
    if found.splits:
        # Nothing is removed from splits that the dataset brings; what they share is told.
        near = search(decision.splits)
        for row, other, distance in zip(near.queries, near.copies, near.distances, strict=True):
            pairs.append((row, other, distance, "shared"))
    return sorted(pairs)


def _copies(
    found: Dataset, decision: splits.Decision, pairs: list[tuple[int, int, float, str]]
) -> Iterator[list[Any]]:
    yield ["path", "split", "other_path", "other_split", "distance", "kind", "left_out"]
    for row, other, distance, kind in pairs:
        yield [
            found.paths[row],
            _split(decision.sides[row]),
            found.paths[other],
            _split(decision.sides[other]),
            f"{max(distance, 0):.3f}",
            kind,
            found.paths[row] if decision.splits[row] == LEFT_OUT else "",
        ]


def _split(code: int) -> str:
    return "" if code == LEFT_OUT else SPLITS[code]


def _index(
    found: Dataset, read: reading.Reading, decision: splits.Decision, places: np.ndarray
) -> Iterator[list[Any]]:
    yield ["path", "class", "split", "digest", "reason", "row"]
    for row, path in enumerate(found.paths):
        digest = read.digests[row].tobytes()
        yield [
            path,
            found.classes[found.labels[row]],
            _split(decision.splits[row]),
            "" if digest == reading.NO_DIGEST else digest.hex(),
            read.reasons.get(row) or _REASONS[decision.reasons[row]],
            "" if places[row] < 0 else places[row],
        ]


def _classes(found: Dataset, decision: splits.Decision) -> Iterator[list[Any]]:
    counts = np.zeros((len(found.classes), len(SPLITS) + 1), int)
    np.add.at(counts, (found.labels, decision.splits), 1)  # the last column: left out
    yield ["class", *SPLITS, "left_out"]
    for name, numbers in zip(found.classes, counts.tolist(), strict=True):
        yield [name, *numbers]


def _counts(
    found: Dataset,
    read: reading.Reading,
    decision: splits.Decision,
    pairs: list[tuple[int, int, float, str]],
) -> dict[str, int]:
    splits_ = np.bincount(decision.splits + 1, minlength=len(SPLITS) + 1).tolist()
    reasons = np.bincount(decision.reasons, minlength=len(_REASONS)).tolist()
    return {
        "classes": len(found.classes),
        "train": splits_[TRAIN + 1],
        "val": splits_[VAL + 1],
        "test": splits_[TEST + 1],
        "left_out": splits_[0],
        "exact_copies": reasons[splits.COPY],
        "near_copies": reasons[splits.NEAR_COPY],
        "conflicts": reasons[splits.CONFLICT],
        "unreadable": len(read.reasons),
        "shared": sum(kind == "shared" for *_, kind in pairs),
    }


def _write_table(path: Path, lines: Iterable[list[Any]]) -> None:
    with files.replacing(path) as beside, open(beside, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)


def _draw(train: Path, classes: list[str], path: Path) -> None:
    """Draw some training images of each class, as the network sees them."""
    split = prepared.read_split(train)
    shown, each = _PICTURE
    rows, titles = [], []
    names = figures.class_labels(classes)
    for label in range(min(len(classes), shown)):
        mine = np.flatnonzero(split.labels == label)[:each].tolist()
        rows += mine
        titles += [names[label]] + [""] * (len(mine) - 1)
    images = list(split.gather(np.array(rows, int)))
    which = "" if len(classes) <= shown else f", {shown} of {len(classes)} classes"
    figures.image_grid(images, titles, f"Prepared images{which}", path, columns=each)


def _summarize(
    found: Dataset,
    read: reading.Reading,
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
    terminal.summary("prepare: done", lines)


if __name__ == "__main__":
    terminal.run(main, kept="images that are finished are kept; run `dvc repro` to go on")
