"""The report on a search: lines while it runs, tables, pictures, and what has been found."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.run import cli
from stages.run.files import atomic_write
from stages.tuning.space import lookup
from stages.tuning.study import Study, Trial

FILES = ("trials.csv", "seeds.csv", "history.png", "importances.png", "parallel.png")
_MIN_TRIALS = 5  # complete ones, for the importance of parameters


def print_start(study: Study, space: str, side_by_side: int) -> None:
    """Print what the search varies and where it runs."""
    lines = {
        "search": f"{study.key}, from commit {study.commit[:7]}",
        "space": f"{space}: {', '.join(key.removeprefix('train.') for key in study.space)}",
    }
    if side_by_side > 1:
        lines["trials"] = f"{side_by_side} at once, on as many Dask workers"
    cli.summary("search", lines)


def print_trial(trial: Trial) -> None:
    """Print a line for a trial that has ended; the first comes with the names of the columns."""
    if trial.number == 0:
        print("\n  trial  val_loss  val_accuracy   epochs", flush=True)
    numbers = " " * 22
    if row := trial.best_epoch:
        numbers = f"{float(row['val_loss']):8.4f}  {float(row['val_accuracy']):12.4f}"
    epochs = f"{len(trial.result.history)}/{trial.task.epochs}"
    notes = {"stopped": "stopped; ", "failed": f"failed: {trial.result.error}; "}
    what = describe(trial) if trial.number else "the present parameters"
    print(
        f"  {trial.number:>5}  {numbers}  {epochs:>7}  {notes.get(trial.state, '')}{what}",
        flush=True,
    )


def describe(trial: Trial) -> str:
    """Return the parameters of a trial in a line."""
    pairs = trial.task.values.items()
    return ", ".join(f"{key.removeprefix('train.')} {_text(value)}" for key, value in pairs)


def trial_table(study: Study) -> pd.DataFrame:
    """Return trials.csv: a row for each trial, with its parameters."""
    rows = []
    for trial in study.trials:
        best = trial.best_epoch or {}
        rows.append(
            {
                "trial": trial.number,
                "state": trial.state,
                "val_loss": best.get("val_loss"),
                "val_accuracy": best.get("val_accuracy"),
                "epochs": len(trial.result.history),
                "experiment": trial.task.name if trial.result.metrics else None,
                "error": trial.result.error or None,
            }
            | {
                key: _text(trial.task.values.get(key, lookup(study.parameters, key)))
                for key in study.space
            }
        )
    return pd.DataFrame(rows)


def summary(study: Study, again: pd.DataFrame, folder: Path) -> dict[str, str]:
    """Return what was found, by topic: the lines that the search ends with.

    Parameters
    ----------
    study : Study
    again : DataFrame
        seeds.csv: columns ``trial``, ``seed``, ``val_loss``, ``val_accuracy``, which are missing
        where the training failed. Empty if no trial has a lower loss than the present parameters.
    folder : Path
        With the files of this search.
    """
    states = pd.Series([trial.state for trial in study.trials]).value_counts()
    lines = {"trials": ", ".join(f"{number} {state}" for state, number in states.items())}
    names = [name for name in FILES if (folder / name).exists()]
    files = {"see": f"{folder}/ ({', '.join(names)})"}
    if again.empty:
        lines["result"] = "no trial has a lower val_loss than the present parameters: keep them"
        if len(study.trials) == 1:
            lines["result"] = "only the present parameters were trained; give a larger budget"
        return lines | files
    losses = {}
    for number in again["trial"].unique():
        rows = again[again["trial"] == number]
        name = f"trial {number}" if number else "present"
        if rows["val_loss"].isna().any():
            lines[name] = "failed with another seed"
            continue
        losses[int(number)] = rows["val_loss"].tolist()
        accuracy = mean_text((100 * rows["val_accuracy"]).tolist(), 1, " %")
        lines[name] = f"val_loss {mean_text(losses[int(number)])}, val_accuracy {accuracy}"
    best, is_better, lines["result"] = compare(losses)
    if best:
        name = study.trials[best].task.name
        lines[f"trial {best} has"] = describe(study.trials[best])
        adopt = "adopt it" if is_better else "to adopt it anyway"
        lines[adopt] = f"`dvc exp apply {name} && dvc repro`"
    return lines | files


def compare(losses: Mapping[int, Sequence[float]]) -> tuple[int | None, bool, str]:
    """Say which parameters are the best, and whether their lead is more than chance.

    Dunnett's test (1955) compares each of several means with that of a control. It takes into
    account that the best of several has a lower mean even by chance.

    Parameters
    ----------
    losses : mapping of int to sequence of float
        For each trial, its validation losses with seeds that the search has not used. Number 0 is
        the control.

    Returns
    -------
    best : int or None
        The trial with the lowest mean loss; None if that of the control is lower.
    is_better : bool
        Whether its lead is more than chance, at the 5 % level.
    sentence : str
    """
    from scipy import stats

    means = {number: float(np.mean(values)) for number, values in losses.items()}
    others = [number for number in losses if number]
    if not others:
        return None, False, "no comparison: the best trials have failed with another seed"
    if 0 not in losses:
        return None, False, "no comparison: the present parameters have failed with another seed"
    best = min(others, key=lambda number: means[number])
    lead = means[0] - means[best]
    if lead <= 0:
        sentence = "with other seeds, no trial is better than the present parameters: keep them"
        return None, False, sentence
    if all(len(set(values)) == 1 for values in losses.values()):  # no spread, no test
        return best, True, f"trial {best} is better: val_loss is lower by {lead:.4f} with each seed"
    samples = [losses[number] for number in others]
    with warnings.catch_warnings(action="ignore"):  # about a sample without spread
        test = stats.dunnett(*samples, control=losses[0], rng=np.random.default_rng(0))
        interval, position = test.confidence_interval(0.95), others.index(best)
    low, high = -interval.high[position], -interval.low[position]
    numbers = (
        f"val_loss is lower by {lead:.4f} (95 % interval {low:.4f} to {high:.4f}, Dunnett's test,"
        f" p = {max(test.pvalue[position], 1e-4):.2g})"
    )
    if low > 0:
        sentence = f"trial {best} is better than the present parameters, beyond chance: {numbers}"
        return best, True, sentence
    sentence = f"the lead of trial {best} may be chance (more seeds: --seeds 10): {numbers}"
    return best, False, sentence


def draw(study: Study, folder: Path) -> None:
    """Draw the course of the search and what mattered in it, if there are complete trials.

    Parallel coordinates and importances (fANOVA, Hutter et al., 2014) need five complete trials.
    """
    import matplotlib.pyplot as plt
    import optuna
    from optuna.visualization import matplotlib as plots

    complete = [trial for trial in study.optuna_study.trials if trial.values]
    draws: dict[str, Callable[..., Any]] = {}
    if complete:
        draws["history.png"] = plots.plot_optimization_history
    if len({trial.values[0] for trial in complete}) >= _MIN_TRIALS:
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        draws["importances.png"] = partial(plots.plot_param_importances, evaluator=evaluator)
        draws["parallel.png"] = plots.plot_parallel_coordinate
    # Optuna calls these functions experimental, and they change Matplotlib's settings.
    with warnings.catch_warnings(action="ignore"), plt.style.context("default"):
        for name, function in draws.items():
            figure = function(study.optuna_study, target_name="val_loss").figure
            figure.set_size_inches(max(8, 1.4 * len(study.space)), 5)
            with atomic_write(folder / name) as tmp:
                figure.savefig(tmp, format="png", bbox_inches="tight", metadata={"Software": None})
            plt.close(figure)


def mean_text(values: Sequence[float], digits: int = 4, unit: str = "") -> str:
    """Return a mean and the standard deviation: ``"0.3121 ± 0.0110"``."""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}{unit}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
