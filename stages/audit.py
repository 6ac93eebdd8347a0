"""Find what is wrong in the data: ``python -m stages audit``.

It looks at all prepared images, lists those that a person should look at, and writes a page for
that. The page saves decisions, which ``python -m stages audit --apply FILE`` adds to
data/corrections.csv, and `dvc repro` applies.
"""

import argparse
import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from stages.auditing import shortcuts
from stages.auditing.facts import read_facts
from stages.auditing.features import Evidence, read_evidence, typical
from stages.auditing.page import LEFT_OUT, write_page
from stages.auditing.quality import quality
from stages.data import corrections, splits
from stages.data.arrays import SPLITS, ImageSpec, read_index
from stages.data.dataset import find
from stages.data.duplicates import NO_MATCHES, find_near
from stages.data.images import THUMBNAIL_SIDE, Preprocessing, decode, read_bytes
from stages.data.parameters import Prepare
from stages.display.status import changed_since_run
from stages.model.parameters import Train
from stages.report.label_errors import find_label_errors, find_neighbors, find_outliers
from stages.run import cli, files
from stages.run.cli import UserError
from stages.run.params import read_dataset, read_section

COLUMNS = ["path", "kind", "score", "label", "suggestion", "digest", "other"]
LABEL_ERROR, TWO_LABELS, NEAR_DUPLICATE = "label error", "two labels", "near duplicate"
OUTLIER, SHORTCUT = "outlier", "shortcut"
_SIDE = 320  # pixels of an image on the page, at most
_TYPICAL = 6  # images of each class beside it


def audit(
    dataset: str | Path,
    prepare: Prepare,
    train: Train,
    prepared: str | Path = "data/prepared",
    metrics: str | Path = "metrics",
    corrections_file: str | Path = corrections.FILE,
) -> pd.DataFrame:
    """List the images that a person should look at: audit.csv, and the page audit.html.

    Parameters
    ----------
    dataset : path
        The dataset that was prepared.
    prepare, train : Prepare, Train
        The parameters with which images were prepared, and the network was trained.
    prepared, metrics : path
        Their outputs; the latter is the folder to write to.
    corrections_file : path, default="data/corrections.csv"
        Images that were decided on are not listed again.

    Returns
    -------
    findings : DataFrame
        What ``audit.csv`` has: ``path``, ``kind`` (of the problem), ``score`` (within a kind,
        greater is worse), ``label``, ``suggestion`` (another class, or empty), ``digest``,
        ``other`` (the path of an image that looks the same, or empty). The worst of a kind come
        first. A shortcut belongs to a class: it has no path, and ``other`` says what tells it.

    Raises
    ------
    UserError
        If the prepared data is missing, or images have changed since.
    """
    dataset, prepared, metrics = Path(dataset), Path(prepared), Path(metrics)
    inputs = [prepared / name for name in ("index.csv", "image_spec.json", *SPLITS)]
    if missing := [path for path in [*inputs, metrics / "train.json"] if not path.exists()]:
        raise UserError(f"{missing[0]}: not there; run `dvc repro` first")
    classes = ImageSpec.read(prepared / "image_spec.json").classes
    decided = corrections.read(corrections_file)
    images = _read_images(prepared)
    facts = read_facts(images, dataset, prepare.white_level)
    pairs = _find_pairs(images, facts, prepare.drop_near_duplicates)
    images["unit"] = _units(images, pairs, dataset, prepare)

    used = images[images["array_index"].notna()]  # those that come first
    labels, units = used["class"].map(classes.index).to_numpy(), used["unit"].to_numpy()
    digests = used["digest"].to_numpy()
    accuracy = json.loads((metrics / "train.json").read_text("utf-8"))["val_accuracy"]
    evidence = read_evidence(labels, units, digests, train, accuracy, prepared)
    examples = typical(evidence, labels, len(classes), _TYPICAL)

    errors, outliers = _judge_contents(used, evidence, labels, units, classes)
    poor = _describe(images, quality(facts))
    findings = pd.concat([errors, _describe_pairs(images, pairs), outliers, poor])
    findings = findings.reindex(columns=COLUMNS).fillna("")
    findings = findings[~findings["digest"].isin(decided["digest"])].reset_index(drop=True)
    told = shortcuts.shortcuts(facts.iloc[: len(used)], labels, classes)
    sentences = [shortcuts.describe(row) for _, row in told.iterrows()]

    on_page = write_page(
        metrics / "audit.html",
        findings,
        lambda path: _open(dataset / path, prepare.white_level),
        classes,
        {
            name: used["path"].iloc[rows].tolist()
            for name, rows in zip(classes, examples, strict=True)
        },
        sentences,
        str(dataset),
    )
    of_classes = told.rename(columns={"class": "label", "recall": "score", "facts": "other"})
    of_classes = of_classes.assign(kind=SHORTCUT)
    table = pd.concat([findings, of_classes.reindex(columns=COLUMNS)]).fillna("")
    scores = [float(f"{score:.4g}") for score in table["score"]]
    files.write_csv(metrics / "audit.csv", table.assign(score=scores))
    _print_summary(findings, sentences, images, decided, on_page, dataset, metrics)
    return table


def _read_images(prepared: Path) -> pd.DataFrame:
    """Return the rows of index.csv of images in the arrays, in their order.

    Behind them come those that are in none, as they are identical to one of another class.
    """
    index = read_index(prepared / "index.csv")
    is_used = index["array_index"].notna()
    index = index[is_used | (index["exclusion_reason"] == splits.LABEL_CONFLICT)]
    order = index["split"].map([*SPLITS, ""].index)
    return index.assign(order=order).sort_values(["order", "array_index"], ignore_index=True)


def _find_pairs(images: pd.DataFrame, facts: pd.DataFrame, near: bool) -> pd.DataFrame:
    """Return pairs of images that look the same: positions ``row`` and ``other``, ``distance``.

    These are identical files in two classes, and, if wanted, near duplicates: of each image the
    first one before it.
    """
    files_ = images[["digest", "class"]].assign(row=np.arange(len(images)))
    same = files_.merge(files_.rename(columns={"row": "other"}), on="digest")
    same = same[same["class_x"] != same["class_y"]].drop_duplicates("row").assign(distance=0.0)
    matches = NO_MATCHES
    if near:
        pixels = np.frombuffer(b"".join(facts["thumbnail"]), np.uint8)
        thumbnails = pixels.reshape(-1, THUMBNAIL_SIDE, THUMBNAIL_SIDE)
        rows = np.arange(len(images))
        matches = find_near(thumbnails, rows, rows, only_earlier=True)
    columns = ["row", "other", "distance"]
    alike = pd.DataFrame(matches._asdict()).set_axis(columns, axis=1)
    pairs = pd.concat([same[columns], alike]).drop_duplicates("row", ignore_index=True)
    # The one to drop is probably the smaller one; of equal ones the one found later.
    size = (facts["width"] * facts["height"]).to_numpy()
    is_larger = size[pairs["row"]] > size[pairs["other"]]
    pairs.loc[is_larger, ["row", "other"]] = pairs.loc[is_larger, ["other", "row"]].to_numpy()
    return pairs


def _units(
    images: pd.DataFrame, pairs: pd.DataFrame, dataset: Path, parameters: Prepare
) -> np.ndarray:
    """Return a number for what an image shows: the same for a group, and for near duplicates.

    It follows from contents alone, so that a new image leaves the numbers of most others.
    """
    found, _ = find(dataset, layout=parameters.layout)
    groups = splits.add_groups(found, parameters.group_by).set_index("path")["group"]
    codes, _ = pd.factorize(groups.reindex(images["path"]))
    rows = np.arange(len(images))
    first = pd.Series(rows).groupby(codes).transform("first").to_numpy()
    ends = np.concatenate(
        [pairs[["row", "other"]].to_numpy(int), np.stack([rows, first], 1)[codes >= 0]]
    )
    graph = coo_array((np.ones(len(ends)), tuple(ends.T)), shape=(len(images), len(images)))
    _, units = connected_components(graph, directed=False)
    smallest = images["digest"].groupby(units).transform("min")
    return smallest.map(lambda digest: int(digest[:15], 16)).to_numpy(np.int64)


def _judge_contents(
    images: pd.DataFrame,
    evidence: list[Evidence],
    labels: np.ndarray,
    units: np.ndarray,
    classes: list[str],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the findings of label errors and of outliers."""
    wrong: list[pd.DataFrame] = []
    far: list[pd.DataFrame] = []
    for rows, vectors, probabilities in evidence:
        neighbors, own = find_neighbors(vectors, units[rows]), labels[rows]
        for found, those in (
            (wrong, find_label_errors(probabilities, neighbors, own)),
            (far, find_outliers(neighbors, own)),
        ):
            found.append(those.assign(row=rows[those["row"]]))
    errors, outliers = (
        pd.concat(found).sort_values("score", ascending=False, kind="stable")
        for found in (wrong, far)
    )
    names = np.array(classes, object)[errors["suggestion"]]
    errors = errors.assign(kind=LABEL_ERROR, suggestion=names)
    return _describe(images, errors), _describe(images, outliers.assign(kind=OUTLIER))


def _describe_pairs(images: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """Return the findings of pairs: both images if they have two labels, else the second."""
    classes = images["class"].to_numpy()
    pairs = pairs.assign(score=1 - pairs["distance"])
    is_same = classes[pairs["row"]] == classes[pairs["other"]]
    both = pairs[~is_same]
    both = pd.concat([both, both.rename(columns={"row": "other", "other": "row"})])
    both = both.drop_duplicates("row").assign(kind=TWO_LABELS)
    both["suggestion"] = classes[both["other"]]
    found = pd.concat([both, pairs[is_same].assign(kind=NEAR_DUPLICATE)])
    found = found.sort_values(["kind", "score"], ascending=False, kind="stable")
    return _describe(images, found.assign(other=images["path"].to_numpy()[found["other"]]))


def _describe(images: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    """Add path, label and digest to findings, whose ``row`` is a position among the images."""
    rows = images.iloc[found["row"].astype(int)]
    return found.assign(
        path=rows["path"].to_numpy(),
        label=rows["class"].to_numpy(),
        digest=rows["digest"].to_numpy(),
    )


def _open(path: Path, white_level: int) -> Image.Image:
    """Read a whole image, upright, with a long side of at most 320 pixels."""
    with warnings.catch_warnings(action="ignore"):  # about damaged images
        decoded = decode(read_bytes(path), Preprocessing([_SIDE, _SIDE], "pad", white_level))
    image = decoded.fitted
    if max(decoded.size) < _SIDE:  # not enlarged
        image = image.resize(decoded.size)
    return image.convert("RGB")


def _print_summary(
    findings: pd.DataFrame,
    sentences: list[str],
    images: pd.DataFrame,
    decided: pd.DataFrame,
    on_page: Mapping[str, int],
    dataset: Path,
    metrics: Path,
) -> None:
    """Print how many images of each kind there are, and what to do."""
    lines = {LABEL_ERROR: "none"}
    for kind, own in findings.groupby("kind", sort=False):
        worst = own.iloc[0]
        hint = f", probably {worst['suggestion']}" if kind == LABEL_ERROR else ""
        beside = f" and {worst['other']}" if worst["other"] else ""
        lines[str(kind)] = (
            f"{len(own):,}, the first: {worst['path']} ({worst['label']}{hint}){beside}"
        )
    for number, sentence in enumerate(sentences, 1):
        lines[f"{SHORTCUT} {number}" if len(sentences) > 1 else SHORTCUT] = sentence
    if known := len(decided):
        lines["decided"] = f"{cli.count(known, 'image')} before, not listed ({corrections.FILE})"
    if on_page[LEFT_OUT]:
        lines["left out"] = (
            f"{cli.count(on_page[LEFT_OUT], 'image')} for which the page has no room: decide on the"
            " others, apply, and audit again"
        )
    page, command = metrics / "audit.html", "python -m stages audit --apply"
    if len(findings):
        lines["next"] = (
            f"open {page} in a browser, decide, save; `{command} ~/Downloads/corrections.csv`;"
            " `dvc repro`"
        )
    lines["see"] = f"{metrics / 'audit.csv'} (all findings)"
    asked = findings["digest"].nunique()
    cli.summary(f"audit: {asked:,} of {len(images):,} images of {dataset} to look at", lines)


def apply(file: Path) -> None:
    """Add the decisions in a file, as the page saves it, to data/corrections.csv.

    Raises
    ------
    UserError
        If a decision is wrong or differs from an earlier one; nothing is then written.
    """
    new, index = corrections.read(file), read_index("data/prepared/index.csv")
    added = corrections.merge(new, file, corrections.FILE, index)
    dropped, checked = added["label"] == "", added["label"] == added["was"]
    lines = {
        "relabeled": f"{(~dropped & ~checked).sum():,}",
        "dropped": f"{dropped.sum():,}",
        "checked": f"{checked.sum():,}: their label is right, and the audit does not ask again",
    }
    if known := len(new) - len(added):
        lines["known"] = f"{known:,} were there already"
    lines["next"] = "`dvc repro`, then `git commit -a`"
    cli.summary(f"audit: {cli.count(len(added), 'decision')} added to {corrections.FILE}", lines)


def main(options: argparse.Namespace) -> None:
    """Run the command."""
    if options.apply:
        apply(cli.expand_home(options.apply))
        return
    if stale := changed_since_run(Path.cwd(), "prepare", "train"):
        raise UserError(f"not up to date ({'; '.join(stale[:3])}); run `dvc repro` first")
    audit(read_dataset(), read_section(Prepare, "prepare"), read_section(Train, "train"))


if __name__ == "__main__":
    raise SystemExit("run it as: python -m stages audit")
