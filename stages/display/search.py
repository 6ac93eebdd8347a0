"""What a search shows: lines while it runs, pictures, and what has been found."""

import json
import shlex
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stages.run import cli
from stages.run.files import atomic_write

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

FILES = ("trials.csv", "seeds.csv", "history.png", "importances.png", "parallel.png")
_MIN_TRIALS = 5  # complete ones, for the importance of parameters


def print_start(name: str, path: str | Path, keys: Iterable[str]) -> None:
    """Print what the search varies, and the names of the columns of `print_trial`."""
    varied = ", ".join(key.removeprefix("train.") for key in keys)
    cli.summary("search", {"search": name, "space": f"{path}: {varied}"})
    print("\n  trial  val_loss  val_accuracy  epochs", flush=True)


def print_trial(trial: "FrozenTrial") -> None:
    """Print a line for a trial that has ended."""
    row = _trial_row(trial)
    numbers = f"{row['val_loss']:8.4f}  {row['val_accuracy']:12.4f}" if row["epochs"] else " " * 22
    note = {"pruned": "pruned; ", "failed": f"failed: {row['error']}; "}.get(row["state"], "")
    what = _list(trial.user_attrs.get("values", {}))
    if "present" in trial.user_attrs:
        what = "the present parameters"
    print(f"  {row['trial']:>5}  {numbers}  {row['epochs']:>6}  {note}{what}", flush=True)


def trial_table(trials: Iterable["FrozenTrial"]) -> pd.DataFrame:
    """Return trials.csv: a row for each trial that has ended, with its parameters."""
    return pd.DataFrame([_trial_row(trial) for trial in trials])


def _trial_row(trial: "FrozenTrial") -> dict[str, Any]:
    known, failed = trial.user_attrs, trial.state.name == "FAIL"
    return {
        "trial": trial.number,
        "state": "failed" if failed else trial.state.name.lower(),
        **(known.get("scores") or {"val_loss": None, "val_accuracy": None, "epochs": 0}),
        "error": known.get("error", "interrupted") if failed else None,
        **{key: _text(value) for key, value in known.get("values", {}).items()},
    }


def print_candidates(trainings: int, seeds: int) -> None:
    """Print what comes after the trials, and the names of the columns of `print_candidate`."""
    which = f"the present parameters and the best trials, with {cli.count(seeds, 'other seed')}"
    print(f"\n{which}: {cli.count(trainings, 'training')}")
    print("\n  trial  seed  val_loss  val_accuracy", flush=True)


def print_candidate(row: Mapping[str, Any], error: str) -> None:
    """Print a row of seeds.csv, or the error of its training."""
    shown = f"failed: {error}" if error else f"{row['val_loss']:8.4f}  {row['val_accuracy']:12.4f}"
    print(f"  {row['trial']:>5}  {row['seed']:>4}  {shown}", flush=True)


def _list(values: Mapping[str, Any]) -> str:
    """Return parameters in a line: ``"dropout 0.4, filters [32, 64]"``."""
    return ", ".join(f"{key.removeprefix('train.')} {_text(v)}" for key, v in values.items())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def mean_text(values: Sequence[float], digits: int = 4, unit: str = "") -> str:
    """Return a mean and the standard deviation: ``"0.3121 ± 0.0110"``."""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}{unit}"


def conclude(
    trials: Mapping[int, "FrozenTrial"], present: int, again: pd.DataFrame, folder: Path
) -> dict[str, str]:
    """Return what a search has found, by topic: the lines that it ends with.

    `trials` are those that have ended, by number; `present` is that with the present parameters.
    `again` is seeds.csv (columns ``trial``, ``seed``, ``val_loss``, ``val_accuracy``, missing where
    a training has failed), empty if no trial has a lower loss than the present parameters.
    """
    states = trial_table(trials.values())["state"].value_counts()
    lines = {"trials": ", ".join(f"{number} {state}" for state, number in states.items())}
    names = [name for name in FILES if (folder / name).exists()]
    see = {"see": f"{folder}/ ({', '.join(names)})"}
    if again.empty:
        lines["result"] = "no trial has a lower val_loss than the present parameters: keep them"
        if len(trials) == 1:
            lines["result"] = "only the present parameters were trained; give a larger budget"
        return lines | see
    losses = {}
    for number, rows in again.groupby("trial", sort=False):
        name = "present" if number == present else f"trial {number}"
        if rows["val_loss"].isna().any():
            lines[name] = "failed with another seed"
            continue
        losses[int(str(number))] = rows["val_loss"].tolist()
        accuracy = mean_text((100 * rows["val_accuracy"]).tolist(), 1, " %")
        lines[name] = f"val_loss {mean_text(rows['val_loss'].tolist())}, val_accuracy {accuracy}"
    best, is_better, lines["result"] = dunnett(losses, present)
    if best is not None:
        values = trials[best].user_attrs["values"]
        lines[f"trial {best} has"] = _list(values)
        command = "dvc exp run"
        for key, value in values.items():  # quoted for DVC, then for the shell
            command += f" -S {shlex.quote(f'{key}={json.dumps(value, ensure_ascii=False)}')}"
        lines["adopt it" if is_better else "to adopt it anyway"] = command
    return lines | see


def dunnett(losses: Mapping[int, Sequence[float]], control: int) -> tuple[int | None, bool, str]:
    """Say which parameters are the best, and whether their lead is more than chance.

    Dunnett's test (1955) compares each of several means with that of a control. It takes into
    account that the best of several has a lower mean even by chance.

    `losses` are, for each trial, its validation losses with seeds that the search has not used;
    `control` is the trial with the present parameters. Returns the trial with the lowest mean loss
    (None if that is the control), whether its lead is more than chance at the 5 % level, and a
    sentence.
    """
    from scipy import stats

    means = {number: float(np.mean(values)) for number, values in losses.items()}
    others = [number for number in losses if number != control]
    if not others:
        return None, False, "no comparison: the best trials have failed with another seed"
    if control not in losses:
        return None, False, "no comparison: the present parameters have failed with another seed"
    best = min(others, key=lambda number: means[number])
    lead = means[control] - means[best]
    if lead <= 0:
        sentence = "with other seeds, no trial is better than the present parameters: keep them"
        return None, False, sentence
    if all(len(set(values)) == 1 for values in losses.values()):  # no spread, no test
        return best, True, f"trial {best} is better: val_loss is lower by {lead:.4f} with each seed"
    samples = [losses[number] for number in others]
    with warnings.catch_warnings(action="ignore"):  # about a sample without spread
        test = stats.dunnett(*samples, control=losses[control], rng=np.random.default_rng(0))
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
    """Draw the course of the search, and with five complete trials what mattered in it.

    Importances are those of fANOVA (Hutter et al., 2014).
    """
    import matplotlib.pyplot as plt
    import optuna
    from optuna.visualization import matplotlib as plots

    complete = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
    # Optuna calls these functions experimental, and they change Matplotlib's settings.
    with warnings.catch_warnings(action="ignore"), plt.style.context("default"):
        axes = {"history": plots.plot_optimization_history(study, target_name="val_loss")}
        if len({trial.value for trial in complete if trial.params}) >= _MIN_TRIALS:
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
            names: dict[str, Any] = {"params": [*keys], "target_name": "val_loss"}
            axes["importances"] = plots.plot_param_importances(study, evaluator, **names)
            axes["parallel"] = plots.plot_parallel_coordinate(study, **names)
        for name, axis in axes.items():
            figure: Any = axis.figure
            figure.set_size_inches(max(8, 1.4 * len(keys)), 5)
            with atomic_write(folder / f"{name}.png") as tmp:
                figure.savefig(tmp, format="png", bbox_inches="tight", metadata={"Software": None})
            plt.close(figure)
