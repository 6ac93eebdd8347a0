"""Compare two versions: python -m stages.compare [REV [REV]]

From what Git and DVC keep: nothing is run, and nothing is checked out.
"""

import argparse
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import yaml

from stages.data.arrays import Split, open_split, read_index
from stages.report import differences, metrics
from stages.utils import cli
from stages.utils.cli import UserError, first_line
from stages.utils.params import Loader

if TYPE_CHECKING:
    from dvc.repo import Repo

WORKSPACE = "workspace"
_INDEX, _PREDICTIONS = "data/prepared/index.csv", "metrics/predictions.csv"
_NEEDED = f"{_INDEX} {_PREDICTIONS}"
_ABSENT = ("deleted", "not in cache")
_SHOWN = 10  # images or classes in a list; all are in --format json
_PICTURED = 48


@dataclass(frozen=True)
class Version:
    """One version of the pipeline, as dvc.lock tells of it.

    Attributes
    ----------
    name : str
        As the user names it.
    outputs : dict
        The MD5 of each output, by path.
    parameters : dict
        The values that its stages ran with, by name with dots.
    code : dict
        The MD5 of each module that its stages ran, by path.
    """

    name: str
    repository: "Repo"
    outputs: dict[str, str]
    parameters: dict[str, Any]
    code: dict[str, str]

    def file(self, output: str, member: str = "") -> Path:
        """Find a file, or a member of a folder: in the workspace, or in DVC's cache.

        Raises
        ------
        UserError
            If it is not on this machine.
        """
        if self.name == WORKSPACE:
            path = Path(self.repository.root_dir, output, member)
            if path.exists():
                return path
            raise UserError(f"{output}: not in the workspace; `dvc pull {_NEEDED}` gets it")
        if output not in self.outputs:
            raise UserError(f"{self.name}: its dvc.lock knows no {output}; compare later versions")
        digest = self.outputs[output]
        if member:
            digest = self._members(output)[member]
        path = Path(self.repository.cache.local.oid_to_path(digest))
        if path.exists():
            return path
        raise UserError(
            f"{self.name}: {output} is not in DVC's cache here;"
            f" `dvc fetch --all-commits {_NEEDED}` gets it (an experiment's, `dvc exp pull`)"
        )

    def images(self, split: str) -> Split:
        """Open the images of a split, without their labels."""
        output = f"data/prepared/{split}"
        if self.name == WORKSPACE:
            names = [path.name for path in self.file(output).iterdir()]
        else:
            names = list(self._members(output))
        names = sorted(name for name in names if name.startswith("images-"))
        return open_split(self.file(output, name) for name in names)

    def _members(self, output: str) -> dict[str, str]:
        folder = Path(self.repository.cache.local.oid_to_path(self.outputs[output]))
        if not folder.exists():
            raise UserError(
                f"{self.name}: {output} is not in DVC's cache here; it is made anew from the"
                f" dataset, so check out {self.name} and `dvc repro prepare`"
            )
        return {entry["relpath"]: entry["md5"] for entry in json.loads(folder.read_bytes())}


@contextmanager
def opened(root: str | Path = ".") -> Iterator["Repo"]:
    """Open the repository that `root` is in, and turn DVC's errors into lines of ours."""
    from dvc.exceptions import DvcException, NotDvcRepoError
    from dvc.repo import Repo

    logging.getLogger("dvc").setLevel(logging.ERROR)
    try:
        with Repo(os.fspath(root)) as repository:
            yield repository
    except NotDvcRepoError:
        raise UserError(f"{root}: not in a DVC repository; run this where dvc.yaml is") from None
    except DvcException as error:
        raise UserError(f"DVC: {first_line(error)}") from None


def read_version(repository: "Repo", name: str) -> Version:
    """Read what dvc.lock says of a commit, branch, tag, experiment or the workspace.

    Raises
    ------
    UserError
        If there is no such version, nothing was run in it, or the workspace was edited since.
    """
    from dvc.scm import RevError, resolve_rev

    if name == WORKSPACE:
        path = Path(repository.root_dir, "dvc.lock")
        text = path.read_bytes() if path.exists() else None
        if text:
            _check_reproduced(repository)
    else:
        try:
            files = repository.scm.get_fs(resolve_rev(repository.scm, name))
        except RevError:
            raise UserError(
                f"{name}: no such commit, branch, tag or experiment; `git log --oneline` and"
                " `dvc exp list` name them"
            ) from None
        inside = os.path.relpath(repository.root_dir, repository.scm.root_dir)
        path = os.path.normpath(os.path.join(inside, "dvc.lock"))
        text = files.cat_file(path) if files.exists(path) else None
    stages = (yaml.load(text, Loader) or {}).get("stages", {}) if text else {}
    if "evaluate" not in stages:
        raise UserError(f"{name}: its dvc.lock tells of no evaluation; `dvc repro` there first")
    outputs, code, parameters = {}, {}, {}
    for stage in stages.values():
        outputs |= {out["path"]: out["md5"] for out in stage.get("outs", []) if "md5" in out}
        code |= {
            dep["path"]: dep["md5"]
            for dep in stage.get("deps", [])
            if dep["path"].startswith("stages/") and "md5" in dep
        }
        parameters |= _flat(stage.get("params", {}).get("params.yaml", {}))
    return Version(name, repository, outputs, parameters, code)


def _check_reproduced(repository: "Repo") -> None:
    """Raise a UserError if the workspace's outputs are not those of its inputs."""
    edited = {}
    for stage, entries in repository.status().items():
        for entry in entries:
            for kind, changes in entry.items() if isinstance(entry, dict) else [(entry, {})]:
                # An output that was never pulled is looked for when it is needed.
                names = [name for name, change in changes.items() if change not in _ABSENT]
                if names or not changes:
                    stage = stage.rpartition(":")[2]  # without the path of dvc.yaml
                    edited.setdefault(stage, []).extend(names or [kind])
    if edited:
        told = "; ".join(f"{stage}: {', '.join(names[:3])}" for stage, names in edited.items())
        raise UserError(
            f"{WORKSPACE}: edited, but not reproduced ({told}); `dvc repro` first, or name two"
            " revisions"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _evaluated(version: Version) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """The index; the predictions with each image's digest, split and row; the classes."""
    index = read_index(version.file(_INDEX))
    path = version.file(_PREDICTIONS)
    columns = pd.read_csv(path, nrows=0, lineterminator="\n").columns
    classes = [name.removeprefix("p:") for name in columns[4:]]
    texts = dict.fromkeys(("path", "class", "predicted"), str)
    wanted = ["path", "class", "predicted", "confidence"]
    predictions = pd.read_csv(
        path, usecols=wanted, dtype=texts, keep_default_na=False, lineterminator="\n"
    )
    rows = index[["path", "digest", "split", "row"]]
    return index, predictions.merge(rows, on="path"), classes


def compare(
    before: str = "HEAD",
    after: str = WORKSPACE,
    root: str | Path = ".",
    picture: Path | None = None,
) -> dict[str, Any]:
    """Compare two versions of the pipeline.

    Parameters
    ----------
    before, after : str
        A commit, branch, tag, experiment, or "workspace".
    root : path, default="."
        A folder in the repository.
    picture : path, optional
        A PNG file to draw the images on which the versions differ.

    Returns
    -------
    report : dict
        ``data``, ``parameters``, ``code``, ``classes`` and ``predictions``: what ``--format json``
        prints.

    Raises
    ------
    UserError
        If a version is unknown or incomplete on this machine.
    """
    with opened(root) as repository:
        versions = [read_version(repository, name) for name in (before, after)]
        (old_index, old, old_classes), (index, new, classes) = map(_evaluated, versions)
        changes = differences.data_changes(old_index, index)
        images = differences.prediction_changes(old, new)
        if picture:
            _draw(versions[1], images, before, _union(classes, old_classes), picture)
    fixed, broke = (int((images["change"] == change).sum()) for change in ("fixed", "broke"))
    p, meaning = differences.verdict(fixed, broke)
    if not len(images):
        meaning = "No image was evaluated by both versions."
    elif {*old["split"], *new["split"]} != {"test"}:
        p, meaning = None, "Validation images chose the epoch, so this can't tell chance from more."
    changed = images[images["change"] != ""]
    columns = [
        "change", "path", "class", "predicted_before", "confidence_before", "predicted",
        "confidence",
    ]  # fmt: skip
    return {
        "before": before,
        "after": after,
        "data": {
            "images_before": len(old_index),
            "images_after": len(index),
            "counts": {c: int((changes["change"] == c).sum()) for c in differences.CHANGES},
            "per_class": differences.per_class(changes).to_dict("index"),
            "images": changes.to_dict("records"),
        },
        "parameters": _changes(versions, "parameters"),
        "code": [*differences.mapping_changes(versions[0].code, versions[1].code)],
        "classes": {
            "added": [name for name in classes if name not in old_classes],
            "removed": [name for name in old_classes if name not in classes],
        },
        "predictions": {
            "accuracy_before": _accuracy(old),
            "accuracy_after": _accuracy(new),
            "in_both": len(images),
            "fixed": fixed,
            "broke": broke,
            "p_value": None if p is None else float(f"{p:.4g}"),
            "meaning": meaning,
            "per_class": _per_class(changed),
            "images": changed[columns].round(4).to_dict("records"),
        },
    }


def _changes(versions: list[Version], kind: str) -> dict[str, dict[str, Any]]:
    pairs = differences.mapping_changes(*(getattr(version, kind) for version in versions))
    return {key: {"before": old, "after": new} for key, (old, new) in pairs.items()}


def _accuracy(predictions: pd.DataFrame) -> dict[str, Any]:
    right, images = int((predictions["predicted"] == predictions["class"]).sum()), len(predictions)
    split = predictions["split"].iloc[0]
    value = {"accuracy": round(right / images, 4), "images": images, "split": split}
    if split == "test":  # validation images chose the epoch: no interval holds for them
        low, high = metrics.interval(right, images)
        value |= {"low": round(float(low), 4), "high": round(float(high), 4)}
    return value


def _per_class(changed: pd.DataFrame) -> dict[str, dict[str, int]]:
    counts = pd.crosstab(changed["class"], changed["change"])
    counts = counts.reindex(columns=["fixed", "broke"], fill_value=0)
    order = (counts["fixed"] - counts["broke"]).sort_values(kind="stable").index
    return counts.loc[order].to_dict("index")


def _draw(version: Version, images: pd.DataFrame, before: str, classes: list, path: Path) -> None:
    """Draw the images that broke, then those that were fixed, as the later version read them."""
    from stages.report import figures

    changed = pd.concat([images[images["change"] == kind] for kind in ("broke", "fixed")])
    shown = changed.head(_PICTURED)
    splits = {split: version.images(split) for split in shown["split"].unique()}
    names = dict(zip(classes, figures.class_labels(classes), strict=True))
    cases = shown.to_dict("records")
    broke = int((changed["change"] == "broke").sum())
    figures.image_grid(
        [splits[case["split"]].gather(np.array([case["row"]], int))[0] for case in cases],
        [
            f"{names[case['class']]}\n{_told(names, case, '_before')}\n→ {_told(names, case, '')}"
            for case in cases
        ],
        f"{before} → {version.name}: {broke} broke, {len(changed) - broke} fixed\n"
        f"Below the true class what each version says. Those that broke come first, in an orange"
        f" frame. {len(shown)} of {len(changed)} are shown.",
        path,
        marked=[case["change"] == "broke" for case in cases],
    )


def _union(first: list, second: list) -> list:
    return list(dict.fromkeys([*first, *second]))


def _told(names: Mapping[str, str], case: Mapping[str, Any], which: str) -> str:
    return f"{names[case[f'predicted{which}']]} {case[f'confidence{which}']:.0%}"


def report(result: Mapping[str, Any]) -> str:
    """Tell a comparison in one screen of text."""
    data, predictions = result["data"], result["predictions"]
    lines = [f"{result['before']} → {result['after']}", ""]

    counts = [f"{count:,} {change}" for change, count in data["counts"].items() if count]
    total = f"{data['images_before']:,} → {data['images_after']:,} images"
    lines += [f"data        {total}: {', '.join(counts) or 'the same'}"]
    rows = list(data["per_class"].items())
    rows.sort(key=lambda row: -sum(row[1].values()))
    for name, kinds in rows[:_SHOWN]:
        told = ", ".join(f"{count:,} {change}" for change, count in kinds.items() if count)
        lines.append(f"              {name}: {told}")
    lines += _more(rows)
    for name in ("added", "removed"):
        if result["classes"][name]:
            lines.append(f"classes     {name}: {', '.join(result['classes'][name])}")
    for key, pair in result["parameters"].items():
        lines.append(f"parameter   {key}: {pair['before']} → {pair['after']}")
    if result["code"]:
        lines.append(f"code        {', '.join(result['code'])}")

    lines.append("")
    for name in ("before", "after"):
        lines.append(f"{result[name]:<12}{_tell_accuracy(predictions[f'accuracy_{name}'])}")
    if predictions["in_both"]:
        p = predictions["p_value"]
        lines.append(
            f"in both     {predictions['in_both']:,} images: {predictions['fixed']:,} fixed,"
            f" {predictions['broke']:,} broke"
            + ("" if p is None else f" (exact McNemar test, p = {p:.3g})")
        )
    lines += [f"            {predictions['meaning']}"]
    rows = list(predictions["per_class"].items())
    for name, kinds in rows[:_SHOWN]:
        lines.append(f"              {name}: {kinds['fixed']} fixed, {kinds['broke']} broke")
    lines += _more(rows)
    for change in ("broke", "fixed"):
        cases = [case for case in predictions["images"] if case["change"] == change]
        if cases:
            lines += ["", f"{change}, the surest mistakes first:"]
        for case in cases[:_SHOWN]:
            lines.append(
                f"  {case['path']}  is {case['class']}:"
                f" {case['predicted_before']} {case['confidence_before']:.0%}"
                f" → {case['predicted']} {case['confidence']:.0%}"
            )
        lines += _more(cases)
    return "\n".join(lines)


def _more(rows: list) -> list[str]:
    if len(rows) <= _SHOWN:
        return []
    return [f"              and {len(rows) - _SHOWN:,} more: --format json lists all"]


def _tell_accuracy(value: Mapping[str, Any]) -> str:
    told = f"accuracy {value['accuracy']:.4f} on {value['images']:,} {value['split']} images"
    if "low" in value:
        return f"{told} (95 % interval {value['low']:.4f} to {value['high']:.4f})"
    return f"{told}, which chose the epoch"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m stages.compare",
        description="What changed between two versions: data, parameters, predictions.",
    )
    parser.add_argument(
        "before", nargs="?", default="HEAD", metavar="REV", help="commit, tag, experiment; HEAD"
    )
    parser.add_argument(
        "after", nargs="?", default=WORKSPACE, metavar="REV", help="likewise; the workspace"
    )
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw the images that were fixed or broke"
    )
    arguments = parser.parse_args()
    result = compare(arguments.before, arguments.after, picture=arguments.picture)
    if arguments.format == "json":
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        print(report(result))


if __name__ == "__main__":
    cli.run(main)
