"""Search and repeat with the real `dvc` and `git`; a short program plays most of the trainings."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import psutil
import pytest
import yaml
from conftest import ROOT, Project
from test_cluster import Dask, wait

# The loss depends on two parameters. It falls from epoch to epoch, as they are written.
PLAYED = """\
import json, os, signal, sys, time
from pathlib import Path
import yaml

values = yaml.safe_load(Path("params.yaml").read_text())["train"]
if values["batch_size"] == 7:
    sys.exit("Training diverged: loss is nan in epoch 1")
if values["batch_size"] == 9:
    os.kill(os.getpid(), signal.SIGKILL)
loss = 0.2 + abs(values["dropout"] - 0.4) + 0.001 * (values["seed"] % 3)
rows = "epoch,phase,loss,accuracy,val_loss,val_accuracy,learning_rate\\n"
for epoch in range(1, values["epochs"] + 1):
    now = loss + 0.3 * (1 - epoch / values["epochs"])
    rows += f"{epoch},train,0,0,{now:.6f},{1 - now:.6f},0\\n"
    Path("metrics/history.csv.part").write_text(rows)
    os.replace("metrics/history.csv.part", "metrics/history.csv")
    time.sleep(0.02)
text = json.dumps({"val_loss": round(loss, 5), "val_accuracy": round(1 - loss, 5)})
Path("metrics/train.json").write_text(text)
for name in ("metrics/parameters.csv", "metrics/environment.json", "metrics/plots/augmented.png"):
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("played")
Path("data/model.keras").write_text(text)
"""
SPACE = "train.dropout: {range: [0.0, 0.9]}\ntrain.batch_size: [8, 16, 7, 9]\n"
SEARCH = ["-m", "stages", "search", "--space", "space.yaml", "--seeds", "2"]
COMMAND = [*SEARCH, "--trials", "8"]


@pytest.fixture(scope="module")
def unsearched(_finished, tmp_path_factory) -> Path:
    """A project whose trainings are played; the test split is gone, from DVC's cache as well."""
    project = Project(tmp_path_factory.mktemp("unsearched") / "project")
    shutil.copytree(_finished, project.root, symlinks=True)
    (project / "stages/train.py").write_text(PLAYED)
    project.configure({"train.epochs": 8, "train.dropout": 0.5})
    (project / "space.yaml").write_text(SPACE)
    project.commit("Played")
    for path in hidden_files(project):
        path.rename(f"{path}.hidden")
    shutil.rmtree(project / "data/prepared/test")
    return project.root


@pytest.fixture
def played(unsearched, tmp_path) -> Project:
    shutil.copytree(unsearched, tmp_path / "project", symlinks=True)
    return Project(tmp_path / "project")


@pytest.fixture(scope="module")
def searched(unsearched, tmp_path_factory) -> tuple[Project, str]:
    """A project after a search, to be looked at only, and what was printed."""
    project = Project(tmp_path_factory.mktemp("searched") / "project")
    shutil.copytree(unsearched, project.root, symlinks=True)
    return project, project.python(*COMMAND)


def hidden_files(project: Project) -> list[Path]:
    """Return the files of the test split in DVC's cache."""
    lock = yaml.safe_load((project / "dvc.lock").read_text(encoding="utf-8"))
    [test] = [o for o in lock["stages"]["prepare"]["outs"] if o["path"] == "data/prepared/test"]
    cache = project / ".dvc/cache/files/md5"
    entries = json.loads((cache / test["md5"][:2] / test["md5"][2:]).read_text())
    return [cache / entry["md5"][:2] / entry["md5"][2:] for entry in entries]


def names(project: Project) -> list[str]:
    listed = project.git("for-each-ref", "--format=%(refname)", "refs/exps/*/*/*")
    return [line.rpartition("/")[2] for line in listed.splitlines()]


def test_the_trials_of_a_search(searched):
    project, said = searched
    trials = pd.read_csv(project / "metrics/search/trials.csv")
    assert len(trials) == 8 and trials["train.dropout"][0] == 0.5
    assert {*trials["state"]} == {"complete", "stopped", "failed"}
    failed = trials[trials["state"] == "failed"]
    assert {*failed["train.batch_size"]} <= {7, 9} and len(failed) == said.count("failed: ")
    for error in failed["error"]:
        assert error.startswith(("Training diverged: loss is nan", "killed, as by the system"))
    assert project.git("status", "--porcelain") == "?? metrics/search/"
    assert [*(project / ".dvc/tmp/scratch/clones").iterdir()] == []


def test_the_best_trials_are_trained_again(searched):
    project, said = searched
    trials = pd.read_csv(project / "metrics/search/trials.csv")
    complete = trials[trials["state"] == "complete"].sort_values("val_loss")
    better = complete[complete["val_loss"] < trials["val_loss"][0]]
    best = [0, *better["trial"][:3]]
    assert len(best) > 1
    seeds = pd.read_csv(project / "metrics/search/seeds.csv")
    assert seeds[["seed", "trial"]].values.tolist() == [[s, t] for s in (2, 3) for t in best]
    assert "is better than the present parameters, beyond chance" in said
    for name in ("history", "importances", "parallel"):
        assert (project / f"metrics/search/{name}.png").stat().st_size > 5000
    again = {f"{trials['experiment'][t]}-seed-{seed}" for t in best for seed in (2, 3)}
    assert {*names(project)} == {*complete["experiment"]} | again


def test_trials_in_the_table_of_experiments(searched):
    """No result of the baseline's evaluation is shown as that of a trial."""
    project, _ = searched
    table = json.loads(project.dvc("exp", "show", "--json"))
    rows = [row for group in table for row in group.get("experiments") or []]
    assert len(rows) == len(names(project))
    for row in rows:
        metrics = row["revs"][0]["data"]["metrics"]
        assert "val_loss" in metrics["metrics/train.json"]["data"]
        assert "accuracy" not in str(metrics.get("metrics/evaluate.json", {}).get("data"))


def test_the_last_lines_adopt_the_best_trial(searched, played):
    project, said = searched
    played.git("fetch", "--quiet", project.root, "refs/exps/*:refs/exps/*")
    shutil.copytree(project / ".dvc/cache", played / ".dvc/cache", dirs_exist_ok=True)
    for path in hidden_files(played):
        path.with_name(f"{path.name}.hidden").rename(path)
    [line] = [line for line in said.splitlines() if "dvc exp apply" in line]
    played.dvc("exp", "apply", line.split("`")[1].split()[3])
    trials = pd.read_csv(project / "metrics/search/trials.csv")
    assert (
        played.parameters["train"]["dropout"]
        == trials.nsmallest(1, "val_loss")["train.dropout"].item()
    )
    assert played.changed().keys() == {"evaluate"}


def test_a_killed_search_goes_on_to_the_same_trials(searched, played):
    project, _ = searched
    command = [sys.executable, *SEARCH, "--trials", "2"]
    for moment in (
        lambda: list(played.root.glob(".dvc/tmp/scratch/clones/*/0/metrics/history.csv")),
        lambda: any("seed" in name for name in names(played)),
    ):
        search = subprocess.Popen(command, cwd=played.root, stdout=subprocess.DEVNULL)
        wait(moment)
        search.kill()
        search.wait()
    wait(lambda: not [p for p in psutil.process_iter() if inside(p, played)])
    [best] = [name for name in names(played) if name.endswith("-1")]
    played.dvc("exp", "remove", best)  # it is made again
    said = played.python(*command[1:])
    assert f"`dvc exp apply {best} " in said and best in names(played)
    for table, rows in (("trials.csv", 2), ("seeds.csv", 4)):
        resumed, at_once = (
            (x / "metrics/search" / table).read_text().splitlines() for x in (played, project)
        )
        assert len(resumed) == 1 + rows and resumed == at_once[: 1 + rows]


def inside(process: psutil.Process, project: Project) -> bool:
    try:
        return process.cwd().startswith(str(project.root))
    except psutil.Error:
        return False


def test_a_search_with_too_little_time_is_resumed(played):
    search = subprocess.Popen(
        [sys.executable, *COMMAND], cwd=played.root, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait(lambda: [p for p in psutil.process_iter() if inside(p, played) and p.pid != search.pid])
    refused = played.python(*COMMAND, status=1)
    assert "is still running in this workspace; wait for it" in refused.splitlines()[-1]
    search.send_signal(signal.SIGINT)
    _, errors = search.communicate(timeout=30)
    assert errors == "Stopped: finished trials and epochs are kept; the same command resumes.\n"
    assert not [p for p in psutil.process_iter() if inside(p, played)]

    [left] = (played / ".dvc/tmp/scratch/clones").iterdir()
    played.configure({"prepare.seed": 2})
    played.dvc("repro", "--quiet", "prepare")
    played.commit("Other splits")
    said = played.python(*SEARCH, "--time", "1s", status=1)
    assert said.splitlines()[-1].startswith("no trial has ended in this time")
    [clone] = (played / ".dvc/tmp/scratch/clones").iterdir()  # not the one of the other splits
    labels = "data/prepared/train/labels.npy"
    assert clone != left and (clone / "0" / labels).read_bytes() == (played / labels).read_bytes()


def test_trials_on_workers(played, tmp_path):
    (tmp_path / "dask").mkdir()
    dask = Dask(tmp_path / "dask")
    try:
        said = played.python(*SEARCH, "--trials", "2", DASK_SCHEDULER_ADDRESS=dask.ready(2))
    finally:
        dask.close()
    assert "2 at once, on as many Dask workers" in said
    trials = pd.read_csv(played / "metrics/search/trials.csv")
    assert [*trials["trial"]] == [0, 1] and trials["state"][0] == "complete"
    assert {*trials["experiment"].dropna()} <= {*names(played)}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"train.batch_size": 7}, "the present parameters can't be trained: Training diverged"),
        ({"prepare.seed": 2}, "not up to date (prepare: "),
    ],
)
def test_what_can_not_be_searched(played, change, line):
    played.configure(change)
    refused = played.python(*COMMAND, status=1)
    assert refused.splitlines()[-1].startswith("not committed: params.yaml; experiments start from")
    played.commit()
    refused = played.python(*COMMAND, status=1)
    assert refused.splitlines()[-1].startswith(line)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "a search needs a budget: --trials 30, --time 2h, or both"),
        (["--trials", "0"], "expected a whole number from 1 on, found '0'"),
        (["--trials", "2", "--seeds", "1"], "expected a whole number from 2 on, found '1'"),
        (["--time", "2 hours"], "expected a time such as 2h or 1h30m, found '2 hours'"),
    ],
)
def test_the_words_of_the_command(words, line, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "stages", "search", *words], cwd=tmp_path, capture_output=True,
        text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2 and line in done.stderr


def test_seeds_of_real_trainings(project):
    """Nobody but this repository says whose commits they are, and an earlier table is committed."""
    project.git("config", "user.name", "Someone")
    project.git("config", "user.email", "someone@example.com")
    (project / "metrics/repeat.csv").write_text("of an earlier commit")
    project.commit()
    (project / "metrics/repeat.csv").unlink()
    done = subprocess.run(
        [sys.executable, "-m", "stages", "repeat", "--seeds", "2", "--test"], cwd=project.root,
        env={k: v for k, v in os.environ.items() if not k.startswith(("GIT_AUTHOR", "GIT_COMM"))},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(project / "metrics/repeat.csv")
    assert [*table] == ["seed", "val_loss", "val_accuracy", "test_accuracy"]
    assert [*table["seed"]] == [1, 2] and table["val_loss"].nunique() == 2
    mean, deviation = 100 * table["test_accuracy"].mean(), 100 * table["test_accuracy"].std()
    assert f"test_accuracy  {mean:.1f} ± {deviation:.1f} %" in done.stdout
    assert len(names(project)) == 2
