"""The history of a dataset and of its results, from what Git has stored: nothing is run."""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from stages.data.corrections import FILE
from stages.display.status import git
from stages.display.versions import WORKSPACE
from stages.run.cli import UserError, list_names

VALIDATION = "val_loss", "val_accuracy"  # of train.json: to choose by
_PATHS = ("dvc.lock", "params.yaml", "metrics", "data", FILE)
_DATA = ("classes", "excluded", "label_conflicts")
_RESULT = ("accuracy", "accuracy_low", "accuracy_high")


def read_history() -> list[dict[str, Any]]:
    """Return the versions of the present dataset in the history of this commit, oldest first.

    They are the tags, for each state of the images and their corrections the last commit (with a
    result, if there is one), and the workspace, if it differs from the last commit.

    Returns
    -------
    versions : list of dict
        Of each ``name`` (tags or commit), ``date`` and ``dataset``. If its results belong to its
        images, also ``images``, ``classes``, ``excluded``, ``label_conflicts``, ``per_class``
        (images of each class), ``val_loss``, ``val_accuracy``, and, of the evaluation, ``split``,
        ``evaluated`` (images), ``accuracy``, ``accuracy_low`` and ``accuracy_high``; without what
        is not known.

    Raises
    ------
    UserError
        If there is no commit.
    """
    log = ["log", "--first-parent", "--reverse", "--format=%h%x09%cs%x09%D"]
    changed = {line.partition("\t")[0] for line in git(*log, "--", *_PATHS).splitlines()}
    versions = []
    for line in git(*log).splitlines():
        commit, date, names = line.split("\t")
        tags = [name[5:] for name in names.split(", ") if name.startswith("tag: ")]
        if tags or commit in changed:
            version = {"name": " ".join(tags) or commit, "date": date} | _read(commit)
            versions.append(version | {"is_tag": bool(tags)})
    if not versions:
        raise UserError("no commit here yet, so that there is no history; `git commit` makes one")
    if git("status", "--porcelain", "--", *_PATHS):
        versions.append({"name": WORKSPACE, "date": "", "is_tag": True} | _read(""))
    # Those of other datasets, such as the built-in one, are another history.
    versions = [one for one in versions if one["dataset"] == versions[-1]["dataset"]]
    return [
        {key: value for key, value in version.items() if key not in ("is_tag", "state")}
        for position, version in enumerate(versions)
        if _is_shown(versions, position)
    ]


def _is_shown(versions: Sequence[Mapping[str, Any]], position: int) -> bool:
    """Return whether a version is a tag, or stands for those of its state of the data."""
    version, later = versions[position], versions[position + 1 :]
    if version["is_tag"]:
        return True
    same = []
    for other in later:
        if other["state"] != version["state"]:
            break
        same.append(other)
    return not any(other.get("images") or not version.get("images") for other in same)


def _read(commit: str) -> dict[str, Any]:
    """Return what a commit, or the workspace (""), has of its data and its results."""

    def read(path: str) -> str:
        if commit:
            return git("show", f"{commit}:./{path}")
        return Path(path).read_text(encoding="utf-8").strip() if Path(path).is_file() else ""

    dataset = str((_load(read("params.yaml")) or {}).get("dataset") or "")
    lock = ((_load(read("dvc.lock")) or {}).get("stages") or {}).get("prepare") or {}
    used = {entry["path"]: entry.get("md5") for entry in lock.get("deps", [])}
    pointer = (_load(read(f"{dataset}.dvc")) or {}) if dataset else {}
    # Of images that Git itself has, the tree says whether they are the same as before.
    md5 = pointer["outs"][0].get("md5") if pointer else used.get(dataset)
    tree = "" if pointer else git("rev-parse", f"{commit or 'HEAD'}:./{dataset}")
    corrections = read(FILE)
    decisions = corrections.partition("\n")[2]  # without the header
    version: dict[str, Any] = {"dataset": dataset, "state": (dataset, md5, tree, decisions)}
    if md5 is None or used.get(dataset) != md5 or not _is_used(corrections, used.get(FILE)):
        return version
    prepared, trained, result, details = (
        json.loads(read(f"metrics/{name}.json") or "{}")
        for name in ("prepare", "train", "evaluate", "evaluate_details")
    )
    version |= {key: prepared[key] for key in _DATA if key in prepared}
    if all(name in prepared for name in ("train", "val", "test")):
        version["images"] = sum(prepared[name] for name in ("train", "val", "test"))
    if table := read("metrics/prepare_classes.csv"):
        counts = pd.read_csv(io.StringIO(table), dtype={"class": str}, keep_default_na=False)
        version["per_class"] = counts.set_index("class").sum(axis=1).to_dict()
    version |= {key: trained[key] for key in VALIDATION if key in trained}
    version |= {key: result[key] for key in _RESULT if key in result}
    if "images" in details:
        version |= {"split": details["split"], "evaluated": details["images"]}
    return version


def _load(text: str) -> Any:
    """Return the content of a YAML file, None if it is not one."""
    try:
        return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError:
        return None


def _is_used(corrections: str, md5: str | None) -> bool:
    """Return whether a result is of these corrections; earlier versions of the code had none."""
    known = {hashlib.md5((corrections + end).encode()).hexdigest() for end in ("", "\n")}
    return md5 is None or md5 in known


def format_history(versions: Sequence[Mapping[str, Any]]) -> str:
    """Format versions as `read_history` returns them as a table, with what to know about it."""
    names = ("version", "date", "images", "classes", "left out", "two labels", "val_loss")
    rows = [(*names, "accuracy", "")]
    before: Mapping[str, int] = {}
    for version in versions:
        if "images" not in version:
            rows.append((version["name"], version["date"], *[""] * 5, "not evaluated", ""))
            continue
        now = version.get("per_class", {})
        changes = [
            f"{now.get(name, 0) - before.get(name, 0):+,} {name}"
            for name in dict.fromkeys([*before, *now])
            if before and now.get(name, 0) != before.get(name, 0)
        ]
        before = now
        numbers = [version.get(key, "") for key in ("images", "classes", "excluded")]
        rows.append(
            (
                version["name"],
                version["date"],
                *(f"{number:,}" if number != "" else "" for number in numbers),
                str(version.get("label_conflicts", "")),
                f"{version['val_loss']:.4f}" if "val_loss" in version else "",
                _format_accuracy(version),
                list_names(changes, 4),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            text.rjust(width) if 2 <= number <= 6 else text.ljust(width)
            for number, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines += [
        "",
        "Numbers of different images can't be compared to the point: `python -m stages"
        " compare REV REV`",
        "compares two versions on the images that both have evaluated.",
    ]
    return "\n".join(lines)


def _format_accuracy(version: Mapping[str, Any]) -> str:
    if "accuracy" not in version:
        return "not evaluated"
    text = f"{100 * version['accuracy']:.1f} %"
    if "accuracy_low" in version:
        low, high = version["accuracy_low"], version["accuracy_high"]
        text += f" ({100 * low:.1f} to {100 * high:.1f})"
    if "evaluated" in version:
        text += f" of {version['evaluated']:,} {version['split']}"
    return text
