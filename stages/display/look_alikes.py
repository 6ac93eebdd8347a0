"""Files whose names say that they show the same: ``img7.jpg``, ``img7_rot90.jpg``, ``img7 2.jpg``.

Near duplicates are found by their pixels (stages/data/duplicates.py), but not if they are turned by
90 degrees or changed otherwise; then the names are the only hint.
"""

import os
import re
from collections.abc import Iterable

import pandas as pd

from stages.data.layout import split_folder
from stages.run import cli

_WORDS = (
    "copy", "kopie", "copie", "copia", "rot", "rotate", "rotated", "rotation", "flip", "flipped",
    "hflip", "vflip", "fliplr", "flipud", "mirror", "mirrored", "crop", "cropped", "aug",
    "augmented", "edited", "blur", "blurred", "noise", "noisy", "bright", "brightness", "dark",
    "contrast", "zoom", "zoomed", "shear", "sheared", "shift", "shifted", "scaled", "resized",
    "gray", "grayscale", "rf", "fliptb", r"(?:new)?\d+deg(?:fliplr)?", r"newpixel\d+", "gaussian",
    "hue", "saturation", "clahe", "elastic", "jitter", "preview", "thumb", "burst", "sync-conflict",
    "conflict", "conflicted copy", "another copy", "left", "right", "jpg", "jpeg", "png",
)  # fmt: skip
_WORD = re.compile(rf"[^/][ _.(-]+({'|'.join(_WORDS)})(?![a-z])[^/]*\.\w+$", re.IGNORECASE)
# After a number: IMG_001(2), img7_2, PXL_7~2.
_NUMBERS = (r"(?<=\d) ?\(\d+\)", r"(?<=\d)[ _.-]\d+", r"(?<=\d)~\d+")
_MAX_FILES = 20  # of one picture; more files, or half of a class, are numbered by their names


def describe_look_alikes(images: pd.DataFrame) -> dict[str, str]:
    """Return a warning of look-alikes in several splits, with the pattern for prepare.group_by.

    `images` has ``path``, ``class``, ``own_split`` and ``split``.
    """
    pairs = zip(images["path"], images["own_split"], strict=True)
    within = [path.removeprefix(f"{split_folder(path, split)}/") for path, split in pairs]
    names = pd.Series(within, images.index, object)  # text of pandas' own is slow to go through
    matches = map(_WORD.search, names)
    found = {re.sub(r"\d+", r"\\d+", match[1].lower()) for match in matches if match}
    words = [word for word in sorted(found) if _is_ending(images, names, _of_words([word]))]
    numbers = [ending for ending in _NUMBERS if _is_ending(images, names, ending)]
    endings = [_of_words(words)] * bool(words) + numbers
    if not endings:
        return {}
    pattern = _pattern(endings)
    sets = _sets(images, names, pattern)
    # The same name in several of the dataset's own splits: each was numbered for itself.
    sets = sets[(sets["splits"] > 1) & (sets["stems"] == sets["files"])]
    if not len(sets):
        return {}
    is_own = sets["own_splits"] > 1  # which group_by leaves as they are
    advice = [] if is_own.all() else [f"set prepare.group_by: '{pattern}'"]
    advice += ["move each set into one of the dataset's own splits"] if is_own.any() else []
    return {
        "WARNING: names": (
            "by their names, these files may show the same, and are in several splits:"
            f" {cli.list_names(sets['example'], 3, '; ')}; if so, scores will look better than they"
            f" are: {' or '.join(advice)}"
        )
    }


def _of_words(words: Iterable[str]) -> str:
    return rf"[ _.(-]+(?:{'|'.join(words)})(?![a-z])"


def _pattern(endings: Iterable[str]) -> str:
    return rf"(?i)^(.*?[^/])(?:(?:{'|'.join(endings)})[^/]*)?\.\w+$"


def _is_ending(images: pd.DataFrame, names: pd.Series, ending: str) -> bool:
    """Return whether names with this ending are of look-alikes, not of numbered pictures."""
    sets = _sets(images, names, _pattern([ending]))
    sizes = sets["class"].map(images["class"].value_counts()).astype(int)
    is_large = (sets["files"] > _MAX_FILES) | (2 * sets["files"] > sizes)
    has_originals = ending not in _NUMBERS or sets["has_original"].mean() > 0.5
    return bool(has_originals and not is_large.any())


def _sets(images: pd.DataFrame, names: pd.Series, pattern: str) -> pd.DataFrame:
    """Return a row for each set of names that are alike but for their endings."""
    matches = [re.search(pattern, name) for name in names]
    stems = [os.path.splitext(name)[0] for name in names]
    table = images[["path", "class", "split", "own_split"]].assign(
        key=[match[1] if match else name for match, name in zip(matches, names, strict=True)],
        stem=stems,
    )
    table = table[table["key"].duplicated(keep=False)]
    table = table.assign(is_original=table["key"] == table["stem"])
    groups = table.groupby("key")
    sets = pd.DataFrame(
        {
            "files": groups.size(),
            "stems": groups["stem"].nunique(),
            "splits": groups["split"].nunique(),
            "own_splits": groups["own_split"].nunique(),
            "class": groups["class"].first(),
            "has_original": groups["is_original"].any(),
            "has_ending": ~groups["is_original"].all(),
            "example": groups["path"].agg(lambda paths: ", ".join(paths[:2])),
        }
    )
    return sets[sets["has_ending"]]
