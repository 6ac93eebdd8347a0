"""Evaluate the model on the test split: numbers, tables and pictures.

Without a test split the validation images stand in. They have chosen epoch and temperature, so the
numbers are then marked ``in_sample`` and come without an interval.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import Field

from stages.data import arrays
from stages.model import device, model_file
from stages.model.calibration import apply_temperature, log_loss
from stages.model.inference import make_predict_fn
from stages.report import figures, page
from stages.report import metrics as measures
from stages.report.matrix import confusion_figure
from stages.utils import cli, files
from stages.utils.params import Parameters, read_section

_CURVES = 9  # precision-recall curves: more can't be told apart
_NAMES = {"test": "test images", "val": "validation images"}


class Evaluate(Parameters):
    """The section `evaluate` of params.yaml, where each key is explained."""

    top_k: int = Field(5, ge=2)
    grid_images: int = Field(24, ge=1, le=200)


def evaluate(
    parameters: Evaluate,
    prepared: str | Path = "data/prepared",
    model: str | Path = "data/model.keras",
    metrics: str | Path = "metrics",
) -> dict[str, Any]:
    """Run a model on the images that did not train it, and write what there is to know about it.

    Parameters
    ----------
    parameters : Evaluate
    prepared : path, default="data/prepared"
        What the stage prepare wrote; its training images are not read.
    model : path, default="data/model.keras"
        What the stage train wrote.
    metrics : path, default="metrics"
        The folder to write to.

    Returns
    -------
    numbers : dict
        The content of ``evaluate.json``.

    Raises
    ------
    UserError
        If there is no prepared data or no model, or the model was made for other classes or
        images.
    """
    prepared, metrics = Path(prepared), Path(metrics)
    device.setup()
    wanted, splits = _read_prepared(prepared)
    classes = wanted.classes
    network, spec = model_file.load(model)
    reading = dataclasses.asdict(spec) | {"image_shape": list(spec.image_shape)}
    _check_same(f"{model}: made for", reading, wanted, f"{prepared}/image_spec.json")

    evaluated = "test" if len(splits["test"]) else "val"
    total = sum(map(len, splits.values()))
    with cli.progress(None, total=total, unit="image", label="evaluate") as bar:
        run = make_predict_fn(network)
        outputs = {name: run(_counted(split.batches(), bar)) for name, split in splits.items()}
    output, labels = outputs[evaluated], splits[evaluated].labels
    predicted = output.argmax(1)
    matrix = measures.confusion_matrix(labels, predicted, len(classes))

    numbers = _numbers(output, labels, matrix, evaluated, parameters.top_k, reading.temperature)
    scores, hardest = _class_table(output, labels, matrix, classes)
    reliability = measures.reliability(output, labels)
    if numbers["in_sample"]:
        scores = scores.drop(columns=["recall_low", "recall_high"])
        reliability = reliability.drop(columns=["low", "high"])
    index = arrays.read_index(prepared / "index.csv")
    paths = _paths(index, splits)
    suspects = _suspects(outputs, splits)

    files.write_json(metrics / "evaluate.json", numbers)
    square = pd.DataFrame(matrix, index=classes, columns=classes).rename_axis("true class")
    files.write_csv(metrics / "confusion_matrix.csv", square, index=True)
    files.write_csv(metrics / "per_class.csv", scores.round(4))
    curves = _curves(output, labels, classes, hardest[:_CURVES])
    files.write_csv(metrics / "precision_recall.csv", curves.round(4))
    files.write_csv(metrics / "reliability.csv", reliability.round(4))
    files.write_csv(
        metrics / "predictions.csv", _predictions(output, labels, classes, paths[evaluated])
    )
    files.write_csv(metrics / "label_suspects.csv", _name_suspects(suspects, classes, paths))

    names = figures.class_labels(classes)
    confusion_figure(matrix, names, _NAMES[evaluated], metrics / "plots" / "confusion.png")
    _draw(metrics / "plots", splits, outputs, evaluated, suspects, names, parameters.grid_images)
    page.write_scripts(metrics / "page" / "vega.js")

    learned = (index["split"] == "train").sum() / max(index["array_index"].notna().sum(), 1)
    doubts = (
        f"{len(suspects)} of {total:,} validation and test images; it can't judge"
        f" the {learned:.0%} of the dataset that it learned from"
    )
    _summarise(numbers, matrix, scores, classes, doubts)
    return numbers


def _check_same(made: str, reading: arrays.ImageSpec, wanted: arrays.ImageSpec, place: str) -> None:
    """Refuse a model that was made for other images than the prepared ones."""
    mend = "`dvc repro` trains one for these"
    old, new = reading.classes, wanted.classes
    if old != new:
        ours, others = set(new) - {*old}, {*old} - set(new)
        raise cli.UserError(
            f"{made} {len(old)} classes, not for the {len(new)} of {place}"
            f" (new: {_some(ours)}; gone: {_some(others)}); {mend}"
        )
    for key in ("image_shape", "color_mode", "resize"):
        value = getattr(wanted, key)
        if getattr(reading, key) != value:
            raise cli.UserError(
                f"{made} {key} {getattr(reading, key)}, not for the {value} of {place}; {mend}"
            )


def _read_prepared(folder: Path) -> tuple[arrays.ImageSpec, dict[str, arrays.Split]]:
    try:
        classes = arrays.ImageSpec.read(folder / "image_spec.json")
        return classes, {name: arrays.read_split(folder / name) for name in ("val", "test")}
    except FileNotFoundError as error:
        raise cli.UserError(
            f"{error.filename}: nothing prepared here yet; `dvc repro` runs the whole pipeline"
        ) from None


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:5]) or "none"
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _counted(batches, bar):
    for batch in batches:
        yield batch
        bar.update(len(batch))


def _numbers(
    output: np.ndarray,
    labels: np.ndarray,
    matrix: np.ndarray,
    split: str,
    top_k: int,
    temperature: float,
) -> dict[str, Any]:
    """What evaluate.json holds: flat, always in this order, to four decimals."""
    images, right = len(labels), int(np.trace(matrix))
    before = apply_temperature(output, 1 / temperature)
    values: dict[str, float] = {"accuracy": right / images}
    if split == "test":
        values["accuracy_low"], values["accuracy_high"] = measures.interval(right, images)
    values |= measures.averages(matrix)
    if output.shape[1] > top_k:
        values[f"top_{top_k}_accuracy"] = measures.top_k_accuracy(output, labels, top_k)
    values |= {
        "log_loss": log_loss(output, labels),
        "log_loss_uncalibrated": log_loss(before, labels),
        "brier_score": measures.brier_score(output, labels),
        "ece": measures.ece(output, labels),
        "ece_uncalibrated": measures.ece(before, labels),
    }
    rounded = {name: round(float(value), 4) for name, value in values.items()}
    return {"split": split, "in_sample": split != "test", "images": images} | rounded


def _class_table(
    output: np.ndarray, labels: np.ndarray, matrix: np.ndarray, classes: list[str]
) -> tuple[pd.DataFrame, list[int]]:
    """Scores of each class, and the classes that have images, the hardest first."""
    scores, support = measures.per_class(matrix), matrix.sum(1)
    low, high = measures.interval(np.diag(matrix), support)
    wrong = matrix - np.diag(np.diag(matrix))
    most = wrong.argmax(1)
    confused = wrong.max(1)
    average = np.full(len(classes), np.nan)
    for number in np.flatnonzero(support):
        _, average[number] = measures.precision_recall(output[:, number], labels == number)
    table = pd.DataFrame(
        {
            "class": classes,
            "images": support,
            "precision": scores.precision,
            "recall": scores.recall,
            "recall_low": low,
            "recall_high": high,
            "f1": scores.f1,
            "average_precision": average,
            "confused_with": [classes[m] if n else "" for m, n in zip(most, confused, strict=True)],
            "confused": confused,
        }
    )
    order = np.argsort(average, kind="stable")  # NaN, a class without images, comes last
    return table, [int(number) for number in order if support[number]]


def _curves(
    output: np.ndarray, labels: np.ndarray, classes: list[str], chosen: list[int]
) -> pd.DataFrame:
    curves = []
    for rank, number in enumerate(chosen, 1):
        curve, _ = measures.precision_recall(output[:, number], labels == number)
        curve.insert(0, "class", classes[number])
        curve.insert(1, "rank", rank)
        curves.append(curve)
    return pd.concat(curves)


def _paths(index: pd.DataFrame, splits: dict[str, arrays.Split]) -> dict[str, np.ndarray]:
    """The path of each row of each split."""
    found = {}
    for name, split in splits.items():
        rows = index[(index["split"] == name) & index["array_index"].notna()]
        found[name] = np.empty(len(split), object)
        found[name][rows["array_index"].to_numpy(int)] = rows["path"].to_numpy(object)
    return found


def _predictions(
    output: np.ndarray, labels: np.ndarray, classes: list[str], paths: np.ndarray
) -> pd.DataFrame:
    """A row for each evaluated image, in the order of paths."""
    names = np.array(classes, object)
    table = pd.DataFrame(
        {
            "path": paths,
            "class": names[labels],
            "predicted": names[output.argmax(1)],
            "confidence": output.max(1),
        }
    )
    columns = pd.DataFrame(output, columns=[f"p:{name}" for name in classes])
    return pd.concat([table, columns], axis=1).sort_values("path", kind="stable")


def _suspects(outputs: dict[str, np.ndarray], splits: dict[str, arrays.Split]) -> pd.DataFrame:
    """Suspects among all images that did not train the model: split, row, label, likely, score."""
    rows = pd.DataFrame(
        [(name, row) for name, split in splits.items() for row in range(len(split))],
        columns=["split", "row"],
    )
    labels = np.concatenate([split.labels for split in splits.values()])
    found = measures.label_suspects(np.concatenate(list(outputs.values())), labels)
    where = found["row"].to_numpy()
    return found.assign(
        split=rows["split"].to_numpy()[where],
        row=rows["row"].to_numpy()[where],
        label=labels[where],
    )


def _name_suspects(
    suspects: pd.DataFrame, classes: list[str], paths: dict[str, np.ndarray]
) -> pd.DataFrame:
    places = zip(suspects["split"], suspects["row"], strict=True)
    return pd.DataFrame(
        {
            "path": [paths[split][row] for split, row in places],
            "split": suspects["split"],
            "class": [classes[number] for number in suspects["label"]],
            "likely": [classes[number] for number in suspects["likely"]],
            "score": [float(f"{score:.3g}") for score in suspects["score"]],
        }
    )


def _draw(
    folder: Path,
    splits: dict[str, arrays.Split],
    outputs: dict[str, np.ndarray],
    evaluated: str,
    suspects: pd.DataFrame,
    names: list[str],
    grid_images: int,
) -> None:
    """Draw samples, worst mistakes and label suspects. No paths: a renamed file changes nothing."""
    split, output, what = splits[evaluated], outputs[evaluated], _NAMES[evaluated]
    labels, predicted = split.labels, output.argmax(1)

    def titles(rows: np.ndarray) -> list[str]:
        return [
            f"{names[labels[row]]}\n→ {names[predicted[row]]} {_percent(output[row].max())}"
            for row in rows
        ]

    turn = pd.Series(labels).groupby(labels).cumcount().to_numpy()  # one of each class, then again
    rows = np.lexsort((labels, turn))[:grid_images]
    figures.image_grid(
        split.gather(rows),
        titles(rows),
        f"Sample predictions\nFrom the {what}, of each class in turn. First the true class, then"
        " what the network says and how sure it is. Mistakes are framed in orange.",
        folder / "samples.png",
        marked=predicted[rows] != labels[rows],
    )

    wrong = np.flatnonzero(predicted != labels)
    own = output[wrong, labels[wrong]]
    rows = wrong[np.argsort(own, kind="stable")][:grid_images]
    figures.image_grid(
        split.gather(rows),
        titles(rows),
        f"Worst mistakes\n{len(rows)} of {len(wrong)} mistakes in {len(labels)} {what}: those whose"
        " true class the network found least likely. First the true class, then what it says.",
        folder / "mistakes.png",
    )

    top = suspects[:grid_images]
    images, lines = [], []
    for rank, case in enumerate(top.itertuples(), 1):
        images.append(splits[case.split].gather(np.array([case.row]))[0])
        lines.append(f"{rank}. {names[case.label]}\n→ {names[case.likely]}?")
    figures.image_grid(
        images,
        lines,
        f"Label suspects\n{len(top)} of {len(suspects)} suspects among the"
        f" {sum(map(len, splits.values()))} validation and test images, as numbered in"
        " metrics/label_suspects.csv. First the given label, then what the network takes it for.",
        folder / "suspects.png",
    )


def _summarise(
    numbers: dict[str, Any],
    matrix: np.ndarray,
    scores: pd.DataFrame,
    classes: list[str],
    doubts: str,
) -> None:
    what = f"{numbers['images']:,} {_NAMES[numbers['split']]}"
    if numbers["in_sample"]:
        kept = f"{what}, which chose the epoch: no test split, so this is too good"
    else:
        kept = f"95 % interval {numbers['accuracy_low']:.4f} to {numbers['accuracy_high']:.4f}"
        kept += f", {what}"
    pairs = [
        f"{classes[true]!r} as {classes[predicted]!r}"
        f" ({matrix[true, predicted]} of {matrix[true].sum()})"
        for true, predicted in measures.confused_pairs(matrix)[:3]
    ]
    worst = scores.loc[scores["recall"].idxmin()]
    cli.summary(
        "evaluate: done",
        {
            "accuracy": f"{numbers['accuracy']:.4f} ({kept})",
            "confused most": ", ".join(pairs) or "none",
            "worst class": f"{worst['class']!r}: {worst['recall']:.1%} of {worst['images']} found",
            "label suspects": doubts,
            "look next": "`dvc plots show` (the page), metrics/label_suspects.csv,"
            " `python -m stages.compare` (with another version)",
        },
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share < 0.995 else ">99 %"


def main() -> None:
    """Run the stage as params.yaml says."""
    parameters = read_section(Evaluate, "evaluate")
    with files.stage_lock("evaluate"):
        evaluate(parameters)


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m stages.evaluate", description=__doc__).parse_args()
    cli.run(main)
