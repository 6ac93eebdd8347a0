"""Set params.yaml up for a folder of images: ``python -m stages use data/flowers``.

It prints what the folder holds, and each line of params.yaml that it changes with the reason.
"""

import argparse
import contextlib
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.data.checks import check_class_sizes, list_unreadable
from stages.data.dataset import describe_skipped, find
from stages.data.labels import TABLE
from stages.data.parameters import Prepare
from stages.data.splits import add_groups, splits_to_make
from stages.display.first_look import (
    BACKBONE_FOLDER,
    SMALL_SIDE,
    image_size,
    list_backbones,
    locate_backbone,
    propose_backbone,
    short_sides,
)
from stages.display.label_tables import is_table, make_labels
from stages.display.status import check_merged, git, set_up_merges
from stages.model.parameters import Train
from stages.run import cli
from stages.run.cli import UserError, count, list_names
from stages.run.files import atomic_write
from stages.run.params import list_changes, load_yaml, read_section, set_values

_FEW_IMAGES = 50  # of a class, below which its metrics mean little
_UNEVEN = 10  # ratio of the largest to the smallest class

# For each kind of dataset: the keys of params.yaml to set, their values, and the reasons.
_SCRATCH = "for a network that starts from random weights"
_WEAK = "weak: small images are usually cut out already"
SMALL_IMAGES: dict[str, tuple[Any, str]] = {
    "prepare.image_size": ([32, 32], "the images are small"),
    "train.batch_size": (64, "the default"),
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
    "train.fine_tune_epochs": (5, "no backbone"),
    "train.fine_tune_learning_rate": (0.0001, "no backbone"),
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
    "train.backbone": ("none", "a network from random weights"),
}
ON_BACKBONE = SMALL_IMAGES | {  # what is unused gets its default, or each run would tell of it
    "train.learning_rate": (0.001, "for the layers on a backbone"),
    "train.label_smoothing": (0.1, "labels of photographs and drawings are often ambiguous"),
    "train.dropout": (0.5, "for the layers on a backbone"),
    "train.fine_tune_fraction": (0.0, "frozen: it trains in about a minute"),
}
_FINE_TUNED = "to train most of the backbone's layers, too"
FINE_TUNED = ON_BACKBONE | {
    "train.batch_size": (32, _FINE_TUNED),
    "train.augment.flip": ("horizontal", "set none if a mirror image is wrong (text, hands)"),
    "train.augment.translation": (0.06, "slightly weaker than from random weights"),
    "train.augment.rotation": (8, "the object is not always level"),
    "train.augment.zoom": (0.12, "slightly weaker than from random weights"),
    "train.augment.contrast": (0.2, "slightly weaker than from random weights"),
    "train.fine_tune_fraction": (0.7, "the best: about nine times the CPU time of a frozen one"),
    "train.fine_tune_epochs": (6, _FINE_TUNED),
    "train.fine_tune_learning_rate": (0.0007, _FINE_TUNED),
}
# The keys that belong to one dataset, with what they are set to for another.
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
} | {"train.epochs": 20, "train.class_weight": "none"}
_PREPARED = "data/prepared"


def use(
    folder: str | Path, backbone: str | None = None, quality: str | None = None
) -> dict[str, tuple[Any, Any]]:
    """Set params.yaml up for a dataset, and let DVC track the dataset and the backbone.

    Call it in the folder that holds params.yaml. Every key of `PHOTOGRAPHS` is set, and those that
    belong to one dataset get their defaults, so that nothing is left of an earlier dataset. If
    params.yaml names this dataset already, the latter are kept. Other keys stay as they are.

    Parameters
    ----------
    folder : path
        A folder as described in `stages.data.dataset`; or a table that lists the labels of images,
        or a folder of images with such a table, of which labels.csv is made.
    backbone : str, optional
        The name of a file in data/backbones/, with or without its ending, or the path of a .keras
        file, which is copied there; "none": from random weights. By default, one that is there, if
        the images are large enough.
    quality : {None, "best"}
        With "best", the backbone is fine-tuned; by default, it is frozen.

    Returns
    -------
    changes : dict
        For each changed key: the old value and the new one.

    Raises
    ------
    UserError
        If this is not a dataset, or there is no such backbone; nothing is then changed.
    """
    check_merged()  # of two sides of a dataset, only one is here
    name, file = (backbone, None) if backbone in (None, "none") else locate_backbone(str(backbone))
    source, here = cli.expand_home(folder).resolve(), Path.cwd().resolve()
    # Relative to this folder if it is in it, else absolute; without links.
    source = source.relative_to(here) if source.is_relative_to(here) else source
    folder = _folder_of(source) if is_table(source) else source
    prepare, named = read_section(Prepare, "prepare"), load_yaml(Path("params.yaml"))
    is_set = Path(str(named.get("dataset"))).resolve() == here / folder
    layout = prepare.layout if is_set else "auto"
    with contextlib.ExitStack() as undo:
        facts = make_labels(source, folder, layout, _PREPARED)
        if is_new := "table" in facts:
            undo.callback((folder / TABLE).unlink)
        images, skipped = find(folder, _PREPARED, layout)
        images = add_groups(images, prepare.group_by if is_set else None)
        fractions = prepare.val_fraction, prepare.test_fraction
        sides, unreadable = short_sides(folder, images["path"].tolist())
        check_class_sizes(images, splits_to_make(images, *fractions))
        side = int(np.median(sides))
        kind = _settings(side, name, file, quality)
        settings: dict[str, tuple[Any, str]] = {"dataset": (folder.as_posix(), "what you named")}
        facts |= _facts(images, skipped, sides, unreadable)
        if side > SMALL_SIDE and backbone is None and kind["train.backbone"][0] == "none":
            proposed, cost = propose_backbone(len(images))
            facts["backbone"] = (
                f"none in {BACKBONE_FOLDER}/, and one would help most: `python -m stages backbone"
                f" {proposed}` ({cost}), then run this again"
            )
        if not is_set:
            reason = "reset: what another dataset needed is not known to suit this one"
            settings |= {key: (value, reason) for key, value in _OF_DATASET.items()}
        elif own := list_changes(_OF_DATASET):
            kept = ", ".join(f"{key}: {old}" for key, (old, _) in own.items())
            facts["kept"] = f"{kept}, since params.yaml names this dataset already"
        settings |= kind
        cli.summary(str(folder), facts)
        values = {key: value for key, (value, _) in settings.items()}
        changes = list_changes(values)
        cli.summary("params.yaml", _describe(changes, settings))
        print(flush=True)  # what is changed is told before it is
        network = BACKBONE_FOLDER / str(settings["train.backbone"][0])
        if file and not network.exists():
            print(f"copying {cli.printable(file)} to {BACKBONE_FOLDER}/", flush=True)
            with atomic_write(network) as tmp:
                shutil.copyfile(file, tmp)
        set_values(values)
        undo.pop_all()
    for path in [folder] + ([network] if network.name != "none" else []):
        print(cli.printable(_track(path, is_new and path == folder)))
    if command := set_up_merges():
        print(f"Git merges what several people add: `{command}`")
    return changes


def _folder_of(table: Path) -> Path:
    """Return the folder of a table; or the one beside it, if the pipeline writes to the former."""
    holds_output = Path(_PREPARED).resolve().is_relative_to(table.parent.resolve())
    return table.with_suffix("") if holds_output else table.parent


def _settings(
    side: int, asked: str | None, file: Path | None, quality: str | None
) -> dict[str, tuple[Any, str]]:
    """Return the value and the reason for each key, given the median of the short sides."""
    names = list_backbones()
    if asked not in (None, "none") and not file and f"{asked}.keras" not in names:
        here = f", but {list_names(names)}" if names else ""
        raise UserError(
            f"{BACKBONE_FOLDER}/{asked}.keras: no such file{here}; `python -m stages backbone"
            f" {asked}` downloads it, if keras.applications has it"
        )
    if asked not in (None, "none"):
        kind = ON_BACKBONE | {"train.backbone": (f"{asked}.keras", "the backbone you named")}
    elif names and side > SMALL_SIDE and not asked:
        current = load_yaml(Path("params.yaml")).get("train") or {}
        name = current.get("backbone") if isinstance(current, dict) else None
        name = name if name in names else names[0]
        others = [one for one in names if one != name]
        more = f"; --backbone takes another: {list_names(others)}" if others else ""
        kind = ON_BACKBONE | {"train.backbone": (name, f"it is in {BACKBONE_FOLDER}/{more}")}
    elif quality:
        why = (
            "--from-scratch is without one"
            if asked
            else f"the images are small (half have a short side of at most {side} pixels)"
            if side <= SMALL_SIDE
            else f"there is none in {BACKBONE_FOLDER}/: `python -m stages backbone NAME` first"
        )
        raise UserError(f"--quality {quality} fine-tunes a backbone, and {why}")
    elif side > SMALL_SIDE:
        return dict(PHOTOGRAPHS)
    else:
        size = 32 if side <= 40 else 64
        reason = f"half of the images have a short side of at most {side} pixels"
        return SMALL_IMAGES | {"prepare.image_size": ([size, size], reason)}
    if quality:
        kind = FINE_TUNED | {"train.backbone": kind["train.backbone"]}
    size, reason = image_size(file or BACKBONE_FOLDER / kind["train.backbone"][0])
    return kind | {"prepare.image_size": ([size, size], reason)}


def _describe(
    changes: dict[str, tuple[Any, Any]], settings: dict[str, tuple[Any, str]]
) -> dict[str, str]:
    """Return a line for each change that has an effect, and one for all others."""
    network = {key: settings[f"train.{key}"][0] for key in ("backbone", "fine_tune_fraction")}
    unused = {f"train.{key}" for key in Train.model_construct(**network).unused()}
    shown = {
        key: f"{old} → {new}"
        for key, (old, new) in changes.items()
        if key.removeprefix("train.") in network or ".".join(key.split(".")[:2]) not in unused
    }
    width = max(map(len, shown.values()), default=0)
    lines = {key: f"{text:<{width}}  {settings[key][1]}" for key, text in shown.items()}
    if others := changes.keys() - shown.keys():
        lines["others"] = f"{count(len(others), 'key')} without effect now: set to the default"
    return lines or {"unchanged": "it is set up for this dataset already"}


def _facts(
    images: pd.DataFrame,
    skipped: pd.DataFrame,
    sides: np.ndarray,
    unreadable: dict[str, str],
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
        lines["few images"] = (
            f"fewer than {_FEW_IMAGES} of {list_names(small)}: too few to learn, or to judge by"
        )
    if counts[many] >= _UNEVEN * counts[few]:
        lines["uneven"] = "rare classes weigh more with train.class_weight: balanced"
    if unreadable:
        listed = list_unreadable(unreadable, unreadable.values())
        lines["unreadable"] = f"{len(unreadable)} of the images looked at: {listed}"
    lines |= describe_skipped(skipped, images)
    lines["groups"] = (
        f"{images['group'].nunique():,}, from prepare.group_by or {TABLE}"
        if images["group"].notna().any()
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
        cure = f"git rm -r -q --cached {shlex.quote(str(path))} && git commit -m 'Out of Git'"
        return (
            f"{path} is tracked by Git: all its versions stay in Git's history, and `dvc add`"
            f" refuses it. To let DVC version it: `{cure}`, then run this again"
        )
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
    use(options.folder, options.backbone, options.quality)
    print('\nnext: git add -A && git commit -m "My images", then dvc repro')


if __name__ == "__main__":
    raise SystemExit("run it as: python -m stages use")
