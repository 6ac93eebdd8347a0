"""Compare two versions of the pipeline: ``python -m stages compare [REV [REV]]``.

From what Git and DVC have stored: nothing is run, and nothing is checked out.
"""

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.display import differences
from stages.display.history import VALIDATION, format_history, read_history
from stages.display.versions import WORKSPACE, Version, open_version
from stages.report import figures
from stages.report.binomial import clopper_pearson
from stages.run import cli

_MAX_LISTED = 10  # images or classes in a list; --format json has all
_MAX_DRAWN = 48


def compare(
    before: str = "HEAD",
    after: str = WORKSPACE,
    root: str | Path = ".",
    picture: str | Path | None = None,
) -> dict[str, Any]:
    """Compare two versions of the pipeline.

    Parameters
    ----------
    before, after : str
        A commit, branch, tag, experiment, or "workspace".
    root : path, default="."
        A folder in the repository.
    picture : path, optional
        A PNG file to write: the images on which the versions differ.

    Returns
    -------
    result : dict
        What ``--format json`` prints: ``before``, ``after`` (names), ``commands`` (which show what
        changed in parameters and code), ``data``, ``classes``, ``validation`` (the numbers to
        choose by; empty if Git does not have them) and ``predictions``.

    Raises
    ------
    UserError
        If a version is unknown, was not evaluated, or can't be read.
    """
    with open_version(before, root) as old, open_version(after, root) as new:
        old_index, old_predictions, old_classes = _read_evaluation(old)
        index, predictions, classes = _read_evaluation(new)
        images = differences.prediction_changes(old_predictions, predictions)
        if picture:
            all_classes = list(dict.fromkeys([*classes, *old_classes]))
            _draw(new, images, before, all_classes, cli.expand_home(picture))
        commands = _other_commands(old, new)
        validation = _compare_validation(old.metrics("train"), new.metrics("train"))
    changes = differences.data_changes(old_index, index)
    if validation:
        validation["same_images"] = _validation_images(old_index) == _validation_images(index)
    copies, corrected = changes[changes["copy"]], changes[changes["correction"]]
    return {
        "before": before,
        "after": after,
        "commands": commands,
        "data": {
            "images_before": int(old_index["array_index"].notna().sum()),
            "images_after": int(index["array_index"].notna().sum()),
            "excluded_before": int(old_index["array_index"].isna().sum()),
            "excluded_after": int(index["array_index"].isna().sum()),
            "counts": _count(changes, differences.CHANGES),
            "copies": _count(copies, ("added", "removed")),
            "corrections": _count(corrected, ("relabeled", "excluded", "included")),
            "per_class": differences.count_by_class(changes).to_dict("index"),
            "images": changes.to_dict("records"),
        },
        "classes": {
            "added": [name for name in classes if name not in old_classes],
            "removed": [name for name in old_classes if name not in classes],
        },
        "validation": validation,
        "predictions": _compare_predictions(old_predictions, predictions, images),
    }


def _compare_validation(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return the validation metrics of both versions, given train.json."""
    return {
        f"{key}_{which}": values[key]
        for key in VALIDATION
        for which, values in (("before", old), ("after", new))
        if key in old and key in new
    }


def _validation_images(index: pd.DataFrame) -> set[tuple[str, str]]:
    val = index[index["split"] == "val"]
    return set(zip(val["digest"], val["class"], strict=True))


def _read_evaluation(version: Version) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Return the index; the predictions with digest, split and array index; the classes."""
    index = version.index()
    predictions, classes = version.predictions()
    columns = ["path", "digest", "split", "array_index"]
    return index, predictions.merge(index[columns], on="path"), classes


def _other_commands(old: Version, new: Version) -> dict[str, str]:
    """Return the commands that show what changed in parameters and in code."""
    # By commit: Git does not know the names of experiments. Without one, it takes the workspace.
    commits = [version.commit[:10] for version in (old, new) if version.commit]
    reverse = [] if old.commit else ["-R"]
    return {
        "parameters": shlex.join(["dvc", "params", "diff", old.name, new.name]),
        "code": shlex.join(["git", "diff", "--stat", *reverse, *commits, "--", "stages"]),
    }


def _count(changes: pd.DataFrame, kinds: Sequence[str]) -> dict[str, int]:
    return {kind: int((changes["change"] == kind).sum()) for kind in kinds}


def _compare_predictions(
    old: pd.DataFrame, new: pd.DataFrame, images: pd.DataFrame
) -> dict[str, Any]:
    changed = images[images["change"] != ""]
    counts = _count(images, ("fixed", "broke"))
    p_value, meaning = differences.verdict(**counts)
    is_tested = {*old["split"], *new["split"]} == {"test"}
    if not len(images):
        meaning = "No image was evaluated by both versions."
    elif not is_tested:
        meaning = "No significance test: the validation images were used to choose the epoch."
    by_class = pd.crosstab(changed["class"], changed["change"])
    by_class = by_class.reindex(columns=["fixed", "broke"], fill_value=0)
    worst_first = (by_class["fixed"] - by_class["broke"]).sort_values(kind="stable").index
    columns = ["change", "path", "class", "predicted_before", "confidence_before"]
    columns += ["predicted", "confidence"]
    return {
        "accuracy_before": _accuracy(old),
        "accuracy_after": _accuracy(new),
        "in_both": len(images),
        **counts,
        "p_value": float(f"{p_value:.4g}") if is_tested or not len(images) else None,
        "meaning": meaning,
        "per_class": by_class.loc[worst_first].to_dict("index"),
        "images": changed[columns].round(4).to_dict("records"),
    }


def _accuracy(predictions: pd.DataFrame) -> dict[str, Any]:
    correct = int((predictions["predicted"] == predictions["class"]).sum())
    images, split = len(predictions), predictions["split"].iloc[0]
    value = {"accuracy": round(correct / images, 4), "images": images, "split": split}
    if split == "test":  # no interval holds for images that were used to choose the epoch
        low, high = clopper_pearson(correct, images)
        value |= {"low": round(float(low), 4), "high": round(float(high), 4)}
    return value


def _draw(
    version: Version, images: pd.DataFrame, before: str, classes: Sequence[str], path: Path
) -> None:
    """Draw the images that broke, then those that were fixed, as prepared for `version`."""
    changed = pd.concat([images[images["change"] == change] for change in ("broke", "fixed")])
    drawn = changed.head(_MAX_DRAWN).reset_index(drop=True)
    pixels: dict[Any, np.ndarray] = {}
    for split, cases in drawn.groupby("split"):
        rows = cases["array_index"].to_numpy(int)
        pixels |= zip(cases.index, version.images(str(split), rows), strict=True)
    labels = dict(zip(classes, figures.class_labels(classes), strict=True))
    titles = [
        f"true: {labels[case['class']]}\n"
        f"{labels[case['predicted_before']]} ({case['confidence_before']:.0%})\n"
        f"→ {labels[case['predicted']]} ({case['confidence']:.0%})\n"
        f"{figures.path_label(case['path'].rpartition('/')[2])}"
        for case in drawn.to_dict("records")
    ]
    broke = (changed["change"] == "broke").sum()
    heading = (
        f"{before} → {version.name}: {broke} broke, {len(changed) - broke} fixed\n"
        "Above each image: its class, the prediction before and after, and the name of the file."
        " Those that broke come first, in an orange frame."
        f" {len(drawn)} of {len(changed)} are shown."
    )
    marked = (drawn["change"] == "broke").tolist()
    figures.image_grid([pixels[n] for n in drawn.index], titles, heading, path, marked=marked)


def format_text(result: Mapping[str, Any]) -> str:
    """Format the result of a comparison as one screen of text."""
    data, predictions = result["data"], result["predictions"]
    counts = _format_counts(data["counts"]) or "the same"
    copies, corrected = (_format_counts(data[name]) for name in ("copies", "corrections"))
    classes = sorted(data["per_class"].items(), key=lambda item: -sum(item[1].values()))
    lines = [
        f"{result['before']} → {result['after']}",
        "",
        f"data        {data['images_before']:,} → {data['images_after']:,} images,"
        f" {data['excluded_before']:,} → {data['excluded_after']:,} left out: {counts}"
        + (f" (of which exact copies: {copies})" if copies else ""),
        *_shorten([f"              {name}: {_format_counts(n)}" for name, n in classes]),
    ]
    if corrected:
        lines.append(f"            by data/corrections.csv: {corrected}")
    for change, names in result["classes"].items():
        if names:
            lines.append(f"classes     {change}: {', '.join(names)}")
    lines += [f"{name:<10}  {command}" for name, command in result["commands"].items()]

    width = max(10, len(result["before"]), len(result["after"]))
    lines.append("")
    for name in ("before", "after"):
        accuracy = _format_accuracy(predictions[f"accuracy_{name}"])
        lines.append(f"{result[name]:<{width}}  {accuracy}")
    if validation := result["validation"]:
        pairs = (
            f"{key} {validation[f'{key}_before']:.4f} → {validation[f'{key}_after']:.4f}"
            for key in VALIDATION
        )
        advice = "choose by val_loss, the lower the better"
        if not validation["same_images"]:
            advice = "the validation images differ, so that small differences mean nothing"
        lines.append(f"validation  {', '.join(pairs)}; {advice}")
    if predictions["in_both"]:
        p_value = predictions["p_value"]
        test = "" if p_value is None else f" (exact McNemar test, {_format_p(p_value)})"
        lines.append(
            f"in both     {predictions['in_both']:,} images: {predictions['fixed']:,} fixed,"
            f" {predictions['broke']:,} broke{test}"
        )
    lines.append(f"            {predictions['meaning']}")
    classes = predictions["per_class"].items()
    lines += _shorten([f"              {name}: {_format_counts(n)}" for name, n in classes])
    for change in ("broke", "fixed"):
        cases = [
            f"  {case['path']}  is {case['class']}:"
            f" {case['predicted_before']} {case['confidence_before']:.0%}"
            f" → {case['predicted']} {case['confidence']:.0%}"
            for case in predictions["images"]
            if case["change"] == change
        ]
        if cases:
            lines += ["", f"{change}, the most confident mistakes first:", *_shorten(cases)]
    return "\n".join(lines)


def _format_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {change}" for change, count in counts.items() if count)


def _format_p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"


def _format_accuracy(value: Mapping[str, Any]) -> str:
    text = f"accuracy {value['accuracy']:.4f} on {value['images']:,} {value['split']} images"
    if "low" in value:
        return f"{text} (95 % interval {value['low']:.4f} to {value['high']:.4f})"
    return f"{text}; optimistic: used to choose the epoch"


def _shorten(lines: list[str]) -> list[str]:
    more = f"              and {len(lines) - _MAX_LISTED:,} more: --format json lists all"
    return lines if len(lines) <= _MAX_LISTED else [*lines[:_MAX_LISTED], more]


def main(options: argparse.Namespace) -> None:
    """Run the command."""
    if options.history:
        if (options.before, options.after) != ("HEAD", WORKSPACE) or options.picture:
            raise cli.UserError("--history is of all versions: it takes no REV and no --picture")
        versions = read_history()
        as_json = options.format == "json"
        text = json.dumps(versions, indent=2) if as_json else format_history(versions)
        print(cli.printable(text, "\n"))
        return
    picture = options.picture and cli.expand_home(options.picture)
    result = compare(options.before, options.after, picture=picture)
    as_json = options.format == "json"
    text = json.dumps(result, indent=2, ensure_ascii=False) if as_json else format_text(result)
    print(cli.printable(text, "\n"))
    if picture and not as_json:
        print(f"\npicture     {cli.printable(picture)}")


if __name__ == "__main__":
    raise SystemExit("run it as: python -m stages compare")
