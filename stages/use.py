"""Set params.yaml up for a folder of images: ``python -m stages use data/flowers``.

It prints what the folder holds, and each line of params.yaml that it changes with the reason.
"""

import argparse
import contextlib
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.data.checks import list_unreadable
from stages.data.dataset import describe_skipped, find
from stages.data.images import ImageError, read_size
from stages.data.labels import TABLE
from stages.data.parameters import Prepare
from stages.display.label_tables import is_table, make_labels
from stages.display.status import check_merged, git
from stages.run import cli
from stages.run.cli import UserError, count, list_names
from stages.run.params import list_changes, load_yaml, read_section, set_values

_SAMPLE = 300  # images whose size is read
_SMALL_SIDE = 64  # pixels: up to here, the median of the short sides is that of small images
_FEW_IMAGES = 50  # of a class, below which its metrics mean little
_UNEVEN = 10  # ratio of the largest to the smallest class

# For each kind of dataset: the keys of params.yaml to set, their values, and the reasons.
_SCRATCH = "for a network that starts from random weights"
_WEAK = "weak: small images are usually cut out already"
SMALL_IMAGES: dict[str, tuple[Any, str]] = {
    "prepare.image_size": ([32, 32], "the images are small"),
    "train.learning_rate": (0.01, _SCRATCH),
    "train.label_smoothing": (0.0, "small images are rarely ambiguous"),
    "train.filters": ([32, 64, 128], "three blocks are enough for small images"),
    "train.dropout": (0.3, _SCRATCH),
    "train.augment.flip": ("none", "letters are no letters in a mirror; else set horizontal"),
    "train.augment.translation": (0.08, _WEAK),
    "train.augment.rotation": (8, _WEAK),
    "train.augment.zoom": (0.1, _WEAK),
    "train.augment.contrast": (0.1, _WEAK),
    "train.backbone": ("none", "backbones are made for larger images"),
    "train.fine_tune_fraction": (0.0, "no backbone"),
}
PHOTOGRAPHS = SMALL_IMAGES | {
    "prepare.image_size": ([128, 128], "enough for most photographs"),
    "train.label_smoothing": (0.1, "labels of photographs and drawings are often ambiguous"),
    "train.filters": ([32, 64, 128, 256], "a fourth block, for larger images"),
    "train.augment.flip": ("horizontal", "set none if a mirror image is wrong (text, hands)"),
    "train.augment.translation": (0.1, "the object is not always in the center"),
    "train.augment.rotation": (10, "the object is not always level"),
    "train.augment.zoom": (0.2, "the distance varies"),
    "train.augment.contrast": (0.3, "the light varies"),
    "train.backbone": ("none", "there is none in data/backbones/; one would help most"),
}
ON_BACKBONE = {
    key: (value, "unused with a frozen backbone") for key, (value, _) in SMALL_IMAGES.items()
} | {
    "prepare.image_size": ([224, 224], "most backbones were trained at this size"),
    "train.learning_rate": (0.001, "for the layers on a backbone"),
    "train.label_smoothing": (0.1, "labels of photographs and drawings are often ambiguous"),
    "train.dropout": (0.5, "for the layers on a backbone"),
    "train.fine_tune_fraction": (0.0, "frozen at first: it trains in about a minute"),
}
# The keys that belong to one dataset, with their defaults.
_OF_DATASET: dict[str, Any] = {
    f"prepare.{key}": Prepare.model_fields[key].default
    for key in (
        "layout",
        "color_mode",
        "resize",
        "white_level",
        "drop_near_duplicates",
        "group_by",
        "max_unreadable_fraction",
    )
} | {"train.class_weight": "none"}
_BACKBONES, _PREPARED = Path("data/backbones"), "data/prepared"


def use(folder: str | Path) -> dict[str, tuple[Any, Any]]:
    """Set params.yaml up for a dataset, and let DVC track the dataset and the backbone.

    Call it in the folder that holds params.yaml. Every key of `PHOTOGRAPHS` is set, and those that
    belong to one dataset get their defaults, so that nothing is left of an earlier dataset. If
    params.yaml names this dataset already, the latter are kept. Other keys stay as they are.

    Parameters
    ----------
    folder : path
        A folder as described in `stages.data.dataset`; or a table that lists the labels of images,
        or a folder of images with such a table, of which labels.csv is made.

    Returns
    -------
    changes : dict
        For each changed key: the old value and the new one.

    Raises
    ------
    UserError
        If this is not a dataset; nothing is then changed.
    """
    check_merged()  # of two sides of a dataset, only one is here
    source, here = cli.expand_home(folder).resolve(), Path.cwd().resolve()
    # Relative to this folder if it is in it, else absolute; without links.
    source = source.relative_to(here) if source.is_relative_to(here) else source
    folder = _folder_of(source) if is_table(source) else source
    layout, named = read_section(Prepare, "prepare").layout, load_yaml(Path("params.yaml"))
    is_set = Path(str(named.get("dataset"))).resolve() == here / folder
    layout = layout if is_set else "auto"
    with contextlib.ExitStack() as undo:
        facts = make_labels(source, folder, layout, _PREPARED)
        if is_new := "table" in facts:
            undo.callback((folder / TABLE).unlink)
        images, skipped = find(folder, _PREPARED, layout)
        sides, unreadable = _short_sides(folder, images)
        settings = {"dataset": (folder.as_posix(), "the folder you named")}
        facts |= _facts(images, skipped, sides, unreadable)
        if not is_set:
            reason = "the default: what another dataset needed is not known to suit this one"
            settings |= {key: (value, reason) for key, value in _OF_DATASET.items()}
        elif own := list_changes(_OF_DATASET):
            kept = ", ".join(f"{key}: {old}" for key, (old, _) in own.items())
            facts["kept"] = f"{kept}, since params.yaml names this dataset already"
        settings |= _settings(int(np.median(sides)))
        cli.summary(str(folder), facts)
        values = {key: value for key, (value, _) in settings.items()}
        changes = list_changes(values)
        texts = {key: f"{old} → {new}" for key, (old, new) in changes.items()}
        width = max(map(len, texts.values()), default=0)
        lines = {key: f"{text:<{width}}  {settings[key][1]}" for key, text in texts.items()}
        cli.summary("params.yaml", lines or {"unchanged": "it is set up for this dataset already"})
        print(flush=True)  # what is changed is told before it is
        set_values(values)
        undo.pop_all()
    backbone = settings["train.backbone"][0]
    for path in [folder] + ([_BACKBONES / backbone] if backbone != "none" else []):
        print(cli.printable(_track(path, is_new and path == folder)))
    return changes


def _folder_of(table: Path) -> Path:
    """Return the folder of a table; or the one beside it, if the pipeline writes to the former."""
    holds_output = Path(_PREPARED).resolve().is_relative_to(table.parent.resolve())
    return table.with_suffix("") if holds_output else table.parent


def _short_sides(folder: Path, images: pd.DataFrame) -> tuple[np.ndarray, str]:
    """Return the short sides of a sample of images, and which of it can't be read."""
    rows = np.unique(np.linspace(0, len(images) - 1, _SAMPLE).astype(int))
    sides, reasons = [], {}
    with warnings.catch_warnings(action="ignore"):  # about damaged images
        for path in images["path"].iloc[rows]:
            try:
                sides.append(min(read_size(folder / path)))
            except ImageError as error:
                reasons[path] = str(error)
    unreadable = list_unreadable(reasons, reasons.values())
    if not sides:
        looked_at = count(len(rows), "image")
        raise UserError(f"dataset: {folder}: none of {looked_at} can be read: {unreadable}")
    return np.array(sides), unreadable


def _settings(side: int) -> dict[str, tuple[Any, str]]:
    """Return the value and the reason for each key, given the median of the short sides."""
    if side <= _SMALL_SIDE:
        size = 32 if side <= 40 else 64
        reason = f"half of the images have a short side of at most {side} pixels"
        return SMALL_IMAGES | {"prepare.image_size": ([size, size], reason)}
    names = sorted(path.name for path in _BACKBONES.glob("*.keras"))
    if not names:
        return dict(PHOTOGRAPHS)
    others = f"; set another if you like: {list_names(names[1:])}" if names[1:] else ""
    return ON_BACKBONE | {"train.backbone": (names[0], f"it is in {_BACKBONES}/{others}")}


def _facts(
    images: pd.DataFrame, skipped: pd.DataFrame, sides: np.ndarray, unreadable: str
) -> dict[str, str]:
    """Return the lines on what the folder holds, and on what looks suspicious."""
    counts = images["class"].value_counts(sort=False)
    few, many = str(counts.idxmin()), str(counts.idxmax())
    smallest, largest = (f"{counts[name]:,} ({name})" for name in (few, many))
    own_splits = images["own_split"].cat.remove_unused_categories().cat.categories
    each = f"{smallest} to {largest}" if counts[few] < counts[many] else f"{counts[few]:,} each"
    lines = {
        "images": f"{len(images):,} in {len(counts)} classes: {each}",
        "short side": f"{sides.min()} to {sides.max()} pixels, median {np.median(sides):.0f}"
        f" ({len(sides)} images looked at)",
        "layout": f"its own splits: {', '.join(own_splits)}"
        if len(own_splits)
        else "no splits of its own; prepare makes train, val and test",
    }
    if small := counts.index[counts < _FEW_IMAGES].tolist():
        lines["few images"] = f"fewer than {_FEW_IMAGES} of {list_names(small)}: scores mean little"
    if counts[many] >= _UNEVEN * counts[few]:
        lines["uneven"] = "rare classes weigh more with train.class_weight: balanced"
    if unreadable:
        lines["unreadable"] = f"of the images looked at: {unreadable}"
    lines |= describe_skipped(skipped, images)
    lines["groups"] = (
        f"{images['group'].nunique():,}, from {TABLE}"
        if "group" in images
        else "if several images show one person or object, set prepare.group_by"
    )
    return lines


def _track(path: Path, is_new: bool = False) -> str:
    """Let DVC track a file or folder, unless that is wrong; return what was done, or why not.

    `is_new` says that there is a new labels.csv in the folder.
    """
    if path.is_absolute():
        return f"{path} is not in this folder, so not versioned; copy it to data/ if it should be"
    if git("--literal-pathspecs", "ls-files", "--", path):
        return f"{path} is tracked by Git"
    pointers = [Path(f"{above}.dvc") for above in (path, *path.parents)]
    if found := next(filter(Path.is_file, [*pointers, *path.glob("*.dvc")]), None):
        is_stale = is_new and found in pointers
        command = f"dvc add {shlex.quote(str(found.with_suffix('')))}"
        return f"{path} is tracked by DVC" + f"; `{command}` adds {TABLE}" * is_stale
    command = f"dvc add {shlex.quote(str(path))}"
    print(f"running `{cli.printable(command)}` ...", flush=True)
    # Not its standard output, which recommends what the next step says better.
    added = subprocess.run(
        [sys.executable, "-m", "dvc", "add", path], stdout=subprocess.DEVNULL, check=False
    )
    if added.returncode:
        raise UserError(f"`{command}` failed, for the reason above; solve that and run this again")
    if git("--literal-pathspecs", "ls-files", "--others", "--exclude-standard", "--", path):
        raise UserError(
            f"{path} is tracked by DVC now, but Git does not ignore it, so that `git add -A` would"
            " add it to Git, too, for a blank at the end of its name or a rule in .gitignore:"
            f" `dvc remove {shlex.quote(f'{path}.dvc')}`, change that, and run this again"
        )
    return f"{path} is now tracked by DVC"


def main(options: argparse.Namespace) -> None:
    """Set params.yaml up for the dataset that the command line names."""
    use(options.folder)
    print('\nnext: git add -A && git commit -m "My images", then dvc repro')


if __name__ == "__main__":
    raise SystemExit("run it as: python -m stages use")
