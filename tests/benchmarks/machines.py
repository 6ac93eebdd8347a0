"""Measure how results vary between machines: threads, oneDNN, instruction set, precision.

    python tests/benchmarks/machines.py [--seeds 1 2 3]

Trains on the digits with the parameters of params.yaml, and prints each variant's test accuracy and
log loss, and how many images get another class than on this machine without changes: 3 at most.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

ROOT = Path(__file__).resolve().parents[2]
VARIANTS: dict[str, dict] = {
    "unchanged": {},
    "one thread": {"threads": 1},
    "oneDNN off": {"environment": {"TF_ENABLE_ONEDNN_OPTS": "0"}},
    "AVX2 only": {"environment": {"ONEDNN_MAX_CPU_ISA": "AVX2"}, "precision": "float32"},
    "float32": {"precision": "float32"},
}
# Programs remove such variables at their start, so they are set afterwards.
CODE = """
import os
from stages.run import environment
environment.setup()
os.environ.update({environment!r})
if {threads!r}:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:{threads!r}])
from stages import {stage}
from stages.__main__ import parser
{stage}.main(parser().parse_args([{stage!r}]))
"""


def run(stage: str, folder: Path, variant: dict) -> None:
    code = CODE.format(
        stage=stage,
        environment=variant.get("environment", {}),
        threads=variant.get("threads", 0),
    )
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        check=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", default=[1, 2, 3], type=int, nargs="+")
    seeds = parser.parse_args().seeds
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    values["dataset"] = str(ROOT / "data" / "digits")
    rows, reference = [], {}
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(io.StringIO()):
        folder = Path(name)
        for variant, what in VARIANTS.items():
            for seed in seeds:
                values["train"] |= {"seed": seed, "precision": what.get("precision", "auto")}
                (folder / "params.yaml").write_text(yaml.safe_dump(values))
                if not rows:
                    run("prepare", folder, {})
                run("train", folder, what)
                run("evaluate", folder, what)
                numbers = json.loads((folder / "metrics" / "evaluate.json").read_text())
                train = json.loads((folder / "metrics" / "train.json").read_text())
                predicted = pd.read_csv(folder / "metrics" / "predictions.csv")["predicted"]
                reference.setdefault(seed, predicted)
                rows.append(
                    {
                        "variant": variant,
                        "accuracy": numbers["accuracy"],
                        "log loss": numbers["log_loss"],
                        "val_loss": train["val_loss"],
                        "differing": int((predicted != reference[seed]).sum()),
                    }
                )
                print(f"{variant}, seed {seed}: {rows[-1]}", flush=True)
    found = pd.DataFrame(rows)
    table = found.groupby("variant", sort=False)
    print(table.agg(["mean", lambda column: np.std(column, ddof=1)]).round(4).to_string())
    print(f"at most {found['differing'].max()} images get another class (goal: 3)")


if __name__ == "__main__":
    main()
