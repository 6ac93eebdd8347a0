"""Train with several seeds: ``python -m stages repeat --seeds 5``.

The result is one number with its standard deviation, which says how much of a difference between
two trainings is chance. Only ``--test`` evaluates the networks, on the test split.
"""

import argparse
import json

import pandas as pd

from stages.display.search import mean_text
from stages.run import cli, files
from stages.run.cli import UserError
from stages.tuning.training import TrainingFailed, Trainings


def main(options: argparse.Namespace) -> None:
    """Train with `train.seed` and the seeds after it, and write metrics/repeat.csv."""
    trainings = Trainings("train", "evaluate") if options.test else Trainings("train")
    known = files.scratch_dir("repeat") / f"{trainings.fingerprint}.json"
    results = json.loads(known.read_text(encoding="utf-8")) if known.exists() else {}
    print("\n   seed  val_loss  val_accuracy" + "  test_accuracy" * options.test, flush=True)
    rows = []
    for number in range(options.seeds):
        seed = trainings.parameters.seed + number
        if str(seed) not in results:
            try:
                result = trainings.run({"train.seed": seed}, f"seed {seed}")
            except TrainingFailed as error:
                raise UserError(f"train.seed {seed}: {error}") from None
            scores = {name: result["train"][name] for name in ("val_loss", "val_accuracy")}
            if options.test:
                scores["test_accuracy"] = result["evaluate"]["accuracy"]
            results[str(seed)] = scores
            files.write_json(known, results)
        rows.append({"seed": seed} | results[str(seed)])
        line = f"  {seed:>5}  {rows[-1]['val_loss']:8.4f}  {rows[-1]['val_accuracy']:12.4f}"
        line += f"  {rows[-1]['test_accuracy']:13.4f}" if options.test else ""
        print(line, flush=True)
    table = pd.DataFrame(rows)
    files.write_csv("metrics/repeat.csv", table)
    lines = {"val_loss": mean_text(table["val_loss"].tolist())}
    for name in [str(column) for column in table][2:]:
        lines[name] = mean_text((100 * table[name]).tolist(), 1, " %")
    lines["seeds"] = f"{cli.count(options.seeds, 'seed')}, mean ± standard deviation"
    cli.summary("repeat: done", lines | {"table": "metrics/repeat.csv"})


if __name__ == "__main__":
    raise SystemExit("run it as: python -m stages repeat")
