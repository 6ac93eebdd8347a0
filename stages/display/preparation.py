"""Figures and terminal output of prepare."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.data import arrays, corrections
from stages.data.arrays import SPLITS, ImageSpec
from stages.data.cache import Cache
from stages.data.checks import advise_on_near_duplicates, list_unreadable
from stages.data.dataset import describe_skipped
from stages.data.images import DARK_FRACTION, Note
from stages.data.labels import TABLE
from stages.data.layout import split_folder
from stages.data.parameters import Prepare
from stages.data.scan import read_images
from stages.display.look_alikes import describe_look_alikes
from stages.display.notes import note_lines
from stages.model.parameters import MIN_TO_CALIBRATE
from stages.report import figures
from stages.run import cli
from stages.run.cluster import Cluster

_SMALL_CROP, _LARGE_CROP = 0.01, 1 / 3  # cropped fraction: mentioned, warned of
_MANY_DARK = 0.1  # fraction of dark images, of those of more than 8 bits, that is warned of
_SMALL_SCALE = 4  # shrink factor at which the summary gives advice
_FEW_TEST = 100  # test images below which the summary says how little they tell
_MAX_UNMATCHED = 0.05  # fraction of images without a group above which the summary warns
_MANY_NEAR_DUPLICATES = 0.02  # fraction of all images above which the summary gives advice
_MAX_PAIRS = 24  # in the figure of duplicates
_MAX_CONFLICTS = 2  # pairs with two labels that the summary names
_GRID_CLASSES, _GRID_COLUMNS = 20, 6  # classes in the figure, images in a row


def draw_samples(prepared: Path, spec: ImageSpec, path: Path) -> None:
    """Draw the first prepared training images of each class, up to 20 classes."""
    names = figures.class_labels(spec.classes)
    train = arrays.read_split(prepared / "train")
    labels = pd.Series(train.labels)
    count = _GRID_COLUMNS if len(names) <= 10 else _GRID_COLUMNS // 2  # or the figure is too high
    first = labels.groupby(labels).head(count).sort_values(kind="stable")
    shown = first[first < _GRID_CLASSES]
    is_first = ~shown.duplicated()
    titles = [names[label] if new else "" for label, new in zip(shown, is_first, strict=True)]
    which = f", {_GRID_CLASSES} of {len(names)} classes" if len(names) > _GRID_CLASSES else ""
    grid = list(train.gather(shown.index.to_numpy()))
    figures.image_grid(grid, titles, f"Prepared images{which}", path, columns=(_GRID_COLUMNS,))


def draw_duplicates(
    images: pd.DataFrame,
    duplicates: pd.DataFrame,
    dataset: Path,
    cache: Cache,
    spec: ImageSpec,
    parameters: Prepare,
    path: Path,
) -> None:
    """Draw duplicates side by side, in an orange frame if their labels differ."""
    pairs = pairs_to_check(images, duplicates)
    total, half = len(pairs), _MAX_PAIRS // 2
    if total > _MAX_PAIRS:  # the first ones, and some from there to the last
        rest = np.linspace(half, total - 1, _MAX_PAIRS - half).round().astype(int)
        pairs = pairs.iloc[[*range(half), *rest]]
    names = figures.class_labels(spec.classes)
    shown = images.iloc[pairs[["image", "other"]].to_numpy(int).ravel()]
    marked = pairs["has_two_labels"].repeat(2).tolist()
    titles = []
    for _, image in shown.iterrows():
        name = figures.path_label(image["path"].rpartition("/")[2])
        split = image["assigned_split"] + (", excluded" if pd.isna(image["split"]) else "")
        titles.append(f"{names[spec.classes.index(image['class'])]}\n{name}\n{split}")
    grid = list(read_images(shown, dataset, cache, spec))
    heading = f"Duplicates\n{explain_duplicates(pairs, total, parameters.drop_near_duplicates)}"
    figures.image_grid(grid, titles, heading, path, columns=(2, 2), marked=marked)


def pairs_to_check(images: pd.DataFrame, duplicates: pd.DataFrame) -> pd.DataFrame:
    """Return the duplicates that a person may want to see, each pair once.

    Pairs with two labels come first, the others from the closest to the least alike. Identical
    files in a class are left out: there is nothing to see.
    """
    pairs = duplicates[duplicates["kind"] != "exact"]
    ends = pairs[["image", "other"]].to_numpy(int)
    pairs = pairs[~pd.DataFrame(np.sort(ends, axis=1)).duplicated().to_numpy()]
    labels = images["class"].cat.codes.to_numpy()
    is_same = labels[pairs["image"]] == labels[pairs["other"]]
    rank = pairs["kind"].map({"conflict": 0, "near": 1, "cross-split": 2})
    pairs = pairs.assign(has_two_labels=~is_same, rank=rank)
    order = ["has_two_labels", "distance", "rank", "image", "other"]
    return pairs.sort_values(order, ascending=[False, True, True, True, True], ignore_index=True)


def explain_duplicates(drawn: pd.DataFrame, total: int, near: bool) -> str:
    """Explain the figure of duplicates; `near` says whether near duplicates were looked for."""
    note = "None was found in different splits. Identical files in a class are not shown."
    if total:
        note = f"{len(drawn)} of " if len(drawn) < total else ""
        note += (
            f"{cli.count(total, 'pair')}, side by side: class, file and split of each image, and"
            " whether it is excluded (duplicates.csv has the paths). "
        )
        note += (
            "Those in an orange frame come first: in two classes, but identical or alike. Is one of"
            " the labels wrong? The others follow, from the closest to the least alike."
            if drawn["has_two_labels"].any()
            else "They go from the closest to the least alike."
        )
    if near:
        return note
    return f"{note} Near duplicates were not looked for (prepare.drop_near_duplicates: false)."


def print_summary(
    dataset: Path,
    images: pd.DataFrame,
    duplicates: pd.DataFrame,
    skipped: pd.DataFrame,
    decisions: pd.DataFrame,
    counts: Mapping[str, Any],
    spec: ImageSpec,
    parameters: Prepare,
    to_make: list[int],
    workers: Cluster | None,
    prepared: Path,
    figure: Path,
) -> None:
    """Print what was done, and what deserves attention.

    `decisions` are the corrections of labels, `to_make` are the splits that were made here, and
    `figure` is that of duplicates.
    """
    lines = {"dataset": str(dataset)}
    lines |= _count_lines(images, counts, spec, to_make, workers)
    lines |= few_lines(counts, parameters, [SPLITS[code] for code in to_make])
    lines |= _correction_lines(images, decisions, counts)
    lines |= _duplicate_lines(images, duplicates, counts, figure)
    kept = images[~images["is_dropped"]]
    lines |= _pixel_lines(kept, parameters, counts["cropped_fraction"])
    lines |= _skipped_lines(images, skipped)
    lines |= _own_split_lines(images)
    lines |= _group_lines(images, parameters.group_by) or describe_look_alikes(images)
    lines["see"] = f"{prepared / 'index.csv'} (every image), {figure.parent} (figures)"
    cli.summary("prepare: done", lines)


def _count_lines(
    images: pd.DataFrame,
    counts: Mapping[str, Any],
    spec: ImageSpec,
    to_make: list[int],
    workers: Cluster | None,
) -> dict[str, str]:
    height, width, channels = spec.image_shape
    decoded = images["digest"][images["is_decoded"]].nunique()
    lines = {
        "images": f"{len(images):,} of {len(spec.classes)} classes, {decoded:,} decoded now"
        + (f" on {workers}" if workers else ""),
        "size": f"{height} × {width} pixels, {'color' if channels == 3 else 'gray'}",
    }
    own_splits = images["own_split"]
    for code, split in enumerate(SPLITS):
        origin, own = "", images["path"][own_splits == split]
        if len(own) and code not in to_make:
            name = split_folder(own.iloc[0], split)
            origin = " (the dataset's own" + (f", from {name}/" if name not in ("", split) else "")
            origin += ", minus what was split off)" if split == "train" and to_make else ")"
        elif own_splits.notna().any() and counts[split]:
            origin = " (split off from train)"
        lines[split] = f"{counts[split]:,}{origin}"
    if moved := int(images["is_moved"].sum()):
        lines["moved"] = f"{cli.count(moved, 'image')}, so that every split has every class"
    if counts["excluded"]:
        names = ("duplicates", "near_duplicates", "label_conflicts", "dropped", "unreadable")
        parts = [f"{counts[name]:,} {name.replace('_', ' ')}" for name in names if counts[name]]
        lines["excluded"] = f"{counts['excluded']:,} ({', '.join(parts)})"
    return lines


def few_lines(
    counts: Mapping[str, Any], parameters: Prepare, made: Sequence[str]
) -> dict[str, str]:
    """Return a line if val or test have few images: what it means, and what to set."""
    findings = {}
    if counts["val"] < MIN_TO_CALIBRATE:
        findings["val"] = (
            f"{cli.count(counts['val'], 'val image')}: too few to calibrate confidences"
            f" ({MIN_TO_CALIBRATE}) and to tell close epochs apart"
        )
    if 0 < counts["test"] < _FEW_TEST:
        from stages.report.binomial import clopper_pearson  # SciPy takes half a second to import

        right = round(0.9 * counts["test"])
        low, high = clopper_pearson(right, counts["test"])
        findings["test"] = (
            f"{cli.count(counts['test'], 'test image')}: an accuracy of 90 % is known to"
            f" ±{50 * (high - low):.0f} points"
        )
    if not findings:
        return {}
    keys = [
        f"prepare.{split}_fraction ({getattr(parameters, f'{split}_fraction'):g})"
        for split in findings
        if split in made
    ]
    raised = f", or raise {' and '.join(keys)}, at the cost of training" if keys else ""
    return {"few images": f"{'; '.join(findings.values())}: add images{raised}"}


def _correction_lines(
    images: pd.DataFrame, decisions: pd.DataFrame, counts: Mapping[str, Any]
) -> dict[str, str]:
    """Return the lines on corrections of labels, and those that have no effect here."""
    if not len(decisions):
        return {}
    known = {digest.hex() for digest in images["digest"]}
    is_known = decisions["digest"].isin(known)
    is_checked = decisions["label"] == decisions["was"]
    relabeled = {digest.hex() for digest in images["digest"][images["was"] != ""]}
    is_done = ~is_checked & (decisions["label"] != "") & ~decisions["digest"].isin(relabeled)
    parts = {
        "relabeled": counts["relabeled"],
        "dropped": counts["dropped"],
        "checked": int((is_known & is_checked).sum()),
        "in the right class by now": int((is_known & is_done).sum()),
    }
    told = ", ".join(f"{number:,} {name}" for name, number in parts.items() if number)
    lines = {"corrections": f"{told or 'none of these images'} ({corrections.FILE})"}
    if not is_known.all():
        lines["WARNING: corrections"] = (
            f"{cli.count(int((~is_known).sum()), 'line')} of {corrections.FILE} without effect: no"
            f" image here has the content of {cli.list_names(decisions['path'][~is_known], 3)}; if"
            " these images are gone for good, delete the lines"
        )
    return lines


def _duplicate_lines(
    images: pd.DataFrame, duplicates: pd.DataFrame, counts: Mapping[str, Any], figure: Path
) -> dict[str, str]:
    """Return the lines on duplicates that deserve attention."""
    lines = {}
    pairs = pairs_to_check(images, duplicates)
    conflicts = pairs[pairs["has_two_labels"]]
    if len(conflicts):
        shown = conflicts.head(_MAX_CONFLICTS)
        signs = shown["kind"].map(lambda kind: "=" if kind == "conflict" else "≈")
        paths = images["path"].iloc
        ends = zip(paths[shown["image"]], signs, paths[shown["other"]], strict=True)
        names = [" ".join(pair) for pair in ends]
        more = len(conflicts) - len(names)
        lines["two labels"] = (
            "in two classes, but identical (=) or alike (≈); is one of the labels wrong?"
            f" {'; '.join(names)}"
            f"{f'; and {more:,} more pairs' if more else ''}; see {figure}, and for all"
            " duplicates.csv"
        )
    near = counts["near_duplicates"]
    if near > _MANY_NEAR_DUPLICATES * len(images):
        share = f"{near:,} of {len(images):,} images ({near / len(images):.0%}) are excluded"
        lines["near duplicates"] = f"{share}. {advise_on_near_duplicates(figure)}"
    if counts["cross_split_duplicates"]:
        lines["WARNING"] = (
            f"{counts['cross_split_duplicates']:,} images have a duplicate in another of the"
            f" dataset's own splits: scores will look better than they are; see {figure}"
        )
    return lines


def _pixel_lines(images: pd.DataFrame, parameters: Prepare, cropped: float) -> dict[str, str]:
    """Return the lines on what resizing and scaling to 8 bits leave of the images."""
    lines = {}
    if cropped >= _LARGE_CROP:
        lines["WARNING: crop"] = (
            f"cuts off {cropped:.0%} of the average image; set prepare.resize in params.yaml to pad"
            " or stretch, which keep all of it"
        )
    elif cropped >= _SMALL_CROP:
        lines["crop"] = f"cuts off {cropped:.0%} of the average image; prepare.resize: pad keeps it"
    readable = images[images["content"] >= 0]
    shortest = readable[["width", "height"]].min(axis=1)
    scale = int((shortest // min(parameters.image_size)).median())
    if scale >= _SMALL_SCALE:
        lines["scale"] = (
            f"half of the originals are at least {scale} times as large; for more detail, raise"
            " prepare.image_size in params.yaml"
        )
    white, peaks = parameters.white_level, images["peak"][images["peak"] > 0]
    dark, clipped = int((peaks <= white * DARK_FRACTION).sum()), int((peaks > white).sum())
    of_all = f"of {len(peaks):,} images of more than 8 bits per channel"
    if dark > _MANY_DARK * len(peaks):
        lines["WARNING: dark"] = (
            f"{dark:,} {of_all} use less than a quarter of the values up to prepare.white_level"
            f" ({white}); make sure that all images have the same scale"
        )
    if clipped:
        lines["clipped"] = (
            f"{clipped:,} {of_all} have values above prepare.white_level ({white}), up to"
            f" {peaks.max()}; they become white"
        )
    notes = images["notes"].to_numpy() & ~np.uint8(Note.DARK | Note.CLIPPED)  # told above
    return lines | note_lines(notes, images["path"].tolist(), white)


def _skipped_lines(images: pd.DataFrame, skipped: pd.DataFrame) -> dict[str, str]:
    """Return the lines on files that are left out."""
    lines = {}
    unreadable = images[images["content"] < 0]
    if len(unreadable):
        lines["unreadable"] = list_unreadable(unreadable["path"], unreadable["unreadable"])
    return lines | describe_skipped(skipped, images)


def _own_split_lines(images: pd.DataFrame) -> dict[str, str]:
    """Return a warning if a class is missing in a split of the dataset's own."""
    counts = pd.crosstab(images["class"], images["split"], dropna=False)
    missing = []
    for split in images["own_split"].cat.remove_unused_categories().cat.categories:
        absent = [name for name in images["class"].cat.categories if not counts.loc[name, split]]
        if absent:
            missing.append(f"{split} has no image of {cli.list_names(absent)}")
    if not missing:
        return {}
    advice = "add some, or delete the folder of that split: prepare then makes it from train"
    return {"WARNING: classes": f"{'; '.join(missing)}; {advice}"}


def _group_lines(images: pd.DataFrame, group_by: str | None) -> dict[str, str]:
    """Return the lines on groups: warnings where many images have none, or splits share groups."""
    source = "prepare.group_by" if group_by else TABLE
    grouped = images[images["group"].notna()]
    if not len(grouped):
        return {}
    lines = {}
    splits = grouped.groupby("group")["own_split"].nunique()
    groups, shared = cli.count(len(splits), "group"), int((splits > 1).sum())
    if shared:
        lines["WARNING: groups"] = (
            f"{shared:,} of {len(splits):,} groups are in several of the dataset's own splits:"
            " scores will look better than they are"
        )
    unmatched = images["path"][images["group"].isna()]
    if not len(unmatched):
        line = groups
    elif len(unmatched) > _MAX_UNMATCHED * len(images):
        line = (
            f"WARNING: {groups}, but {len(unmatched):,} of {len(images):,} images have none (by"
            f" {source}), so that related images may be in different splits:"
            f" {cli.list_names(unmatched, 3)}"
        )
    else:
        line = (
            f"{groups}; {cli.count(len(unmatched), 'image')} without one (by {source}), each its"
            f" own group: {cli.list_names(unmatched, 1)}"
        )
    return {"groups": line} | lines
