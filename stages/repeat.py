"""Train with several seeds: ``python -m stages repeat --seeds 5``.

The result is one number with its standard deviation, which says how much of a difference between
two trainings is chance. Each training is a DVC experiment, in a clone of the last commit. Only
``--test`` evaluates the networks, on the test split.
"""

import argparse
import json
from pathlib import Path

import pandas as pd

from stages.model.parameters import Train
from stages.run import cli, files
from stages.run.cli import UserError
from stages.run.params import read_section
from stages.tuning.experiments import Baseline, Task, open_clones, run_in_order
from stages.tuning.report import mean_text


def repeat(seeds: int, test: bool = False, path: str | Path = "metrics/repeat.csv") -> pd.DataFrame:
    """Train with the parameters of params.yaml and several seeds.

    Parameters
    ----------
    seeds : int
        The number of seeds: `train.seed` and those after it.
    test : bool, default=False
        Whether to evaluate each network, too.
    path : path, default="metrics/repeat.csv"
        The file to write.

    Returns
    -------
    table : DataFrame
        A row for each seed: ``seed``, ``val_loss``, ``val_accuracy``, and with `test`
        ``test_accuracy``.

    Raises
    ------
    UserError
        If a training fails, or there is no test split to evaluate on.
    """
    parameters = read_section(Train, "train")
    stages = ["train", "evaluate"] if test else ["train"]
    baseline = Baseline()
    if test and not json.loads(Path("metrics/prepare.json").read_text("utf-8"))["test"]:
        raise UserError("params.yaml: prepare.test_fraction is 0: there is no test split")
    key = f"{'test' if test else 'repeat'}-{baseline.commit[:4]}"
    tasks = [
        Task(f"{key}-seed-{seed}", {"train.seed": seed}, parameters.total_epochs)
        for seed in range(parameters.seed, parameters.seed + seeds)
    ]
    columns = ["val_loss", "val_accuracy"]
    print("\n   seed  val_loss  val_accuracy" + "  test_accuracy" * test, flush=True)
    rows = []
    with open_clones(baseline, "repeat", stages, parameters.replicas == 1) as clones:
        for task, result in run_in_order(clones, tasks):
            seed = task.values["train.seed"]
            if result.error:
                raise UserError(f"train.seed {seed}: {result.error}")
            row = {"seed": seed} | {name: result.metrics["train"][name] for name in columns}
            line = f"  {seed:>5}  {row['val_loss']:8.4f}  {row['val_accuracy']:12.4f}"
            if test:
                row["test_accuracy"] = result.metrics["evaluate"]["accuracy"]
                line += f"  {row['test_accuracy']:13.4f}"
            print(line, flush=True)
            rows.append(row)
        table = pd.DataFrame(rows)
        files.write_csv(path, table)
    return table


def main(options: argparse.Namespace) -> None:
    """Train as the command line says."""
    table = repeat(options.seeds, options.test)
    summary = {"val_loss": mean_text(table["val_loss"].tolist())}
    for name in [str(column) for column in table][2:]:
        summary[name] = mean_text((100 * table[name]).tolist(), 1, " %")
    summary["seeds"] = f"{cli.count(len(table), 'seed')}, mean ± standard deviation"
    cli.summary("repeat: done", summary | {"table": "metrics/repeat.csv"})
