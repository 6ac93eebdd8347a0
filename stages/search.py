"""Search for better training parameters: ``python -m stages search --trials 30``.

Each trial is a training with other parameters; if it is completed, it becomes a DVC experiment.
Optuna proposes the parameters from the validation losses of the trials before. The best trials and
the present parameters are then trained again with other seeds, which shows whether a trial was
better or only lucky. Trials run in a clone of the last commit; the test split is not even there.
"""

import argparse
import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from stages.model.parameters import Train
from stages.run import cli, files
from stages.run.cli import UserError
from stages.run.params import read_section
from stages.tuning import report
from stages.tuning.experiments import Baseline, Clone, Task, open_clones, run_in_order
from stages.tuning.space import DEFAULT_SPACES, read_space
from stages.tuning.study import Study, Trial, import_optuna

_BEST = 3  # trials, at most, that are trained again with other seeds


def search(
    trials: int | None,
    seconds: float = math.inf,
    seeds: int = 3,
    space_path: str | None = None,
    folder: str | Path = "metrics/search",
) -> dict[str, str]:
    """Search, train the best trials again, and write tables and pictures.

    Parameters
    ----------
    trials : int or None
        The number of trials to end with, those of earlier runs included. None: no limit.
    seconds : float, default=infinity
        After this time no trial is started, and what runs is left to the next search. The trainings
        with other seeds come in addition.
    seeds : int, default=3
        The number of other seeds: those after `train.seed`.
    space_path : str, default=None
        The file of a search space (see `read_space`). None: a default space.
    folder : path, default="metrics/search"
        For ``trials.csv``, ``seeds.csv`` and the pictures.

    Returns
    -------
    summary : dict of str to str
        What was found, by topic.

    Raises
    ------
    UserError
        If the search can't start, or the present parameters can't be trained.
    """
    import_optuna()
    parameters, folder = read_section(Train, "train"), Path(folder)
    space = read_space(space_path, parameters)
    baseline = Baseline()
    deadline = time.monotonic() + seconds
    side_by_side = parameters.replicas == 1  # replicas need the workers for themselves
    with open_clones(baseline, "search", ["train"], side_by_side) as clones:
        study = Study(parameters, space, baseline.commit, len(clones))
        report.print_start(study, space_path or DEFAULT_SPACES.name, len(clones))
        numbers = itertools.count() if trials is None else range(trials)
        for task, result in run_in_order(clones, study.ask(numbers), deadline):
            study.tell(task, result)
            report.print_trial(study.trials[-1])
        if not study.trials:
            raise UserError("no trial has ended in this time; the next search resumes the first")
        for name in report.FILES:  # of an earlier search
            (folder / name).unlink(missing_ok=True)
        files.write_csv(folder / "trials.csv", report.trial_table(study))
        report.draw(study, folder)
        best = study.best(_BEST)
        again = pd.DataFrame()
        if best:
            seeds_range = range(parameters.seed + 1, parameters.seed + 1 + seeds)
            again = _train_again(clones, [study.trials[0], *best], seeds_range)
            files.write_csv(folder / "seeds.csv", again)
    return report.summary(study, again, folder)


def _train_again(
    clones: Sequence[Clone], trials: Sequence[Trial], seeds: Sequence[int]
) -> pd.DataFrame:
    """Train the parameters of trials with other seeds; return seeds.csv."""
    which = "the present parameters and the best trials"
    trainings = cli.count(len(trials) * len(seeds), "training")
    print(f"\n{which}, with {cli.count(len(seeds), 'other seed')}: {trainings}")
    print("\n  trial  seed  val_loss  val_accuracy", flush=True)
    pairs = [(trial, seed) for seed in seeds for trial in trials]
    tasks = []
    for trial, seed in pairs:
        values = trial.task.values | {"train.seed": seed}
        tasks.append(Task(f"{trial.task.name}-seed-{seed}", values, trial.task.epochs))
    rows = []
    for (trial, seed), (_, result) in zip(pairs, run_in_order(clones, tasks), strict=True):
        row: dict[str, Any] = {"trial": trial.number, "seed": seed}
        shown = f"failed: {result.error}"
        if result.metrics:
            row |= {key: result.metrics["train"][key] for key in ("val_loss", "val_accuracy")}
            shown = f"{row['val_loss']:8.4f}  {row['val_accuracy']:12.4f}"
        print(f"  {trial.number:>5}  {seed:>4}  {shown}", flush=True)
        rows.append(row)
    return pd.DataFrame(rows, columns=["trial", "seed", "val_loss", "val_accuracy"])


def main(options: argparse.Namespace) -> None:
    """Search with the budget that the command line gives."""
    if options.trials is None and options.time is None:
        raise UserError("a search needs a budget: --trials 30, --time 2h, or both")
    seconds = math.inf if options.time is None else options.time
    cli.summary("search: done", search(options.trials, seconds, options.seeds, options.space))
