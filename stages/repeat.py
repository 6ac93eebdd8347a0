"""Train with several seeds: ``python -m stages repeat --seeds 5``.

The result is one number with its standard deviation, which says how much of a difference between
two trainings is chance. Only ``--test`` evaluates the networks, on the test split.
"""

import argparse
import json
from pathlib import Path

import pandas as pd

from stages.display.search import mean_text
from stages.run import cli, files
from stages.run.cli import UserError
from stages.tuning.training import TrainingFailed, Trainings, own_folder


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
    trainings = Trainings("train", "evaluate") if test else Trainings("train")
    if test and not json.loads(Path("metrics/prepare.json").read_text("utf-8"))["test"]:
        raise UserError("params.yaml: prepare.test_fraction is 0: there is no test split")
    print("\n   seed  val_loss  val_accuracy" + "  test_accuracy" * test, flush=True)
    rows = []
    first = trainings.parameters.seed
    with own_folder() as folder:
        for seed in range(first, first + seeds):
            try:
                result = trainings.run({"train.seed": seed}, folder, f"seed {seed}")
            except TrainingFailed as error:
                raise UserError(f"train.seed {seed}: {error}") from None
            row = {"seed": seed}
            row |= {name: result["train"][name] for name in ("val_loss", "val_accuracy")}
            line = f"  {seed:>5}  {row['val_loss']:8.4f}  {row['val_accuracy']:12.4f}"
            if test:
                row["test_accuracy"] = result["evaluate"]["accuracy"]
                line += f"  {row['test_accuracy']:13.4f}"
            print(line, flush=True)
            rows.append(row)
    table = pd.DataFrame(rows)
    files.write_csv(path, table)
    return table


def main(options: argparse.Namespace) -> None:
    """Train as the command line says."""
    table = repeat(options.seeds, options.test)
    lines = {"val_loss": mean_text(table["val_loss"].tolist())}
    for name in [str(column) for column in table][2:]:
        lines[name] = mean_text((100 * table[name]).tolist(), 1, " %")
    lines["seeds"] = f"{cli.count(len(table), 'seed')}, mean ± standard deviation"
    cli.summary("repeat: done", lines | {"table": "metrics/repeat.csv"})
