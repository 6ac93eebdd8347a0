"""What a search shows: lines while it runs, pictures, and what has been found."""

import json
import shlex
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stages.run import cli
from stages.run.files import atomic_write

if TYPE_CHECKING:
    import optuna

FILES = ("trials.csv", "seeds.csv", "history.png", "importances.png", "parallel.png")
_MIN_TRIALS = 5  # complete ones, for the importance of parameters


def print_start(name: str, path: str | Path, keys: Iterable[str]) -> None:
    """Print what the search varies, and the names of the columns of `print_trial`."""
    varied = ", ".join(key.removeprefix("train.") for key in keys)
    cli.summary("search", {"search": name, "space": f"{path}: {varied}"})
    print("\n  trial  val_loss  val_accuracy  epochs", flush=True)


def print_trial(outcome: Mapping[str, Any]) -> None:
    """Print a line for a trial that has ended: a row of trials.csv, with ``values`` by key."""
    numbers = " " * 22
    if outcome["epochs"]:
        numbers = f"{outcome['val_loss']:8.4f}  {outcome['val_accuracy']:12.4f}"
    note = {"pruned": "pruned; ", "failed": f"failed: {outcome['error']}; "}
    what = list_values(outcome["values"]) if outcome["trial"] else "the present parameters"
    print(
        f"  {outcome['trial']:>5}  {numbers}  {outcome['epochs']:>6}"
        f"  {note.get(outcome['state'], '')}{what}",
        flush=True,
    )


def trial_table(outcomes: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Return trials.csv: a row for each trial, with its parameters."""
    rows = []
    for outcome in outcomes:
        row = {key: value for key, value in outcome.items() if key != "values"}
        rows.append(row | {key: to_text(value) for key, value in outcome["values"].items()})
    return pd.DataFrame(rows)


def list_values(values: Mapping[str, Any]) -> str:
    """Return parameters in a line: ``"dropout 0.4, filters [32, 64]"``."""
    return ", ".join(
        f"{key.removeprefix('train.')} {to_text(value)}" for key, value in values.items()
    )


def to_text(value: Any) -> str:
    """Return a value as params.yaml could have it."""
    return value if isinstance(value, str) else json.dumps(value)


def mean_text(values: Sequence[float], digits: int = 4, unit: str = "") -> str:
    """Return a mean and the standard deviation: ``"0.3121 ± 0.0110"``."""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}{unit}"


def conclude(
    outcomes: Mapping[int, Mapping[str, Any]], again: pd.DataFrame, folder: Path
) -> dict[str, str]:
    """Return what a search has found, by topic: the lines that it ends with.

    Parameters
    ----------
    outcomes : mapping
        What is known of each trial, by its number: ``state``, and ``values`` by key.
    again : DataFrame
        seeds.csv: columns ``trial``, ``seed``, ``val_loss``, ``val_accuracy``, which are missing
        where the training failed. Empty if no trial has a lower loss than the present parameters.
    folder : Path
        With the files of this search.
    """
    states = Counter(outcome["state"] for outcome in outcomes.values())
    lines = {"trials": ", ".join(f"{number} {state}" for state, number in states.items())}
    names = [name for name in FILES if (folder / name).exists()]
    see = {"see": f"{folder}/ ({', '.join(names)})"}
    if again.empty:
        lines["result"] = "no trial has a lower val_loss than the present parameters: keep them"
        if len(outcomes) == 1:
            lines["result"] = "only the present parameters were trained; give a larger budget"
        return lines | see
    losses = {}
    for number in again["trial"].unique().tolist():
        rows = again[again["trial"] == number]
        name = f"trial {number}" if number else "present"
        if rows["val_loss"].isna().any():
            lines[name] = "failed with another seed"
            continue
        losses[number] = rows["val_loss"].tolist()
        accuracy = mean_text((100 * rows["val_accuracy"]).tolist(), 1, " %")
        lines[name] = f"val_loss {mean_text(losses[number])}, val_accuracy {accuracy}"
    best, is_better, lines["result"] = dunnett(losses)
    if best:
        values = outcomes[best]["values"]
        lines[f"trial {best} has"] = list_values(values)
        command = "dvc exp run"
        for key, value in values.items():  # quoted for DVC, then for the shell
            command += f" -S {shlex.quote(f'{key}={json.dumps(value, ensure_ascii=False)}')}"
        lines["adopt it" if is_better else "to adopt it anyway"] = command
    return lines | see


def dunnett(losses: Mapping[int, Sequence[float]]) -> tuple[int | None, bool, str]:
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


def draw(study: "optuna.Study", keys: Sequence[str], folder: Path) -> None:
    """Draw the course of the search and what mattered in it, if there are complete trials.

    Parallel coordinates and importances (fANOVA, Hutter et al., 2014) need five complete trials.
    """
    import matplotlib.pyplot as plt
    import optuna
    from optuna.visualization import matplotlib as plots

    complete = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
    draws: dict[str, Callable[..., Any]] = {}
    if complete:
        draws["history.png"] = plots.plot_optimization_history
    if len({trial.value for trial in complete if trial.params}) >= _MIN_TRIALS:
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        draws["importances.png"] = partial(
            plots.plot_param_importances, evaluator=evaluator, params=[*keys]
        )
        draws["parallel.png"] = partial(plots.plot_parallel_coordinate, params=[*keys])
    # Optuna calls these functions experimental, and they change Matplotlib's settings.
    with warnings.catch_warnings(action="ignore"), plt.style.context("default"):
        for name, function in draws.items():
            figure = function(study, target_name="val_loss").figure
            figure.set_size_inches(max(8, 1.4 * len(keys)), 5)
            with atomic_write(folder / name) as tmp:
                figure.savefig(tmp, format="png", bbox_inches="tight", metadata={"Software": None})
            plt.close(figure)
