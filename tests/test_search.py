"""Search and repeat on real Optuna and real DVC; a short program plays most of the trainings."""

import contextlib
import io
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from shutil import copytree, rmtree

import optuna
import pandas as pd
import psutil
import pytest
import yaml
from conftest import Project, options
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from stages import repeat, search
from stages.display import search as display
from stages.model.parameters import Train
from stages.run.cli import UserError
from stages.tuning.space import as_suggested, read_space, replace, suggest

# The loss depends on two parameters. It falls from epoch to epoch, as they are written.
PLAYED = """\
import json, os, signal, sys, time
from pathlib import Path
import yaml

def main(options):
    values = yaml.safe_load(Path("params.yaml").read_text())["train"]
    if values["batch_size"] == 7 or str(values["batch_size"]) == os.environ.get("FAILING"):
        sys.exit("Training diverged: loss is nan in epoch 1")
    if values["batch_size"] == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    loss = 0.2 + abs(values["dropout"] - 0.4) + 0.001 * (values["seed"] % 3)
    rows = "epoch,phase,loss,accuracy,val_loss,val_accuracy,learning_rate\\n"
    Path("metrics/plots").mkdir(parents=True, exist_ok=True)
    for epoch in range(1, values["epochs"] + 1):
        now = loss + 0.3 * (1 - epoch / values["epochs"])
        rows += f"{epoch},train,0,0,{now:.6f},{1 - now:.6f},0\\n"
        Path("metrics/history.csv.part").write_text(rows)
        os.replace("metrics/history.csv.part", "metrics/history.csv")
        time.sleep(0.02)
    text = json.dumps({"val_loss": round(loss, 5), "val_accuracy": round(1 - loss, 5)})
    Path("metrics/train.json").write_text(text)
    for name in ("parameters.csv", "environment.json", "plots/augmented.png"):
        Path("metrics", name).write_text("played")
    Path("data/model.keras").write_text(text)
"""
# Which needs what train has written.
PLAYED_EVALUATION = """\
import json
from pathlib import Path

def main(options):
    trained = json.loads(Path("data/model.keras").read_text())
    text = json.dumps({"accuracy": trained["val_accuracy"] / 2})
    Path("metrics/evaluate.json").write_text(text)
"""
SPACE = """\
train.dropout: {range: [0.0, 0.9]}
train.batch_size: [8, 16, 7, 9]
train.filters: [[8, 8], [16]]
train.augment.flip: [none, horizontal]
"""
SEARCH = ["search", "--space", "space.yaml", "--seeds", "2"]


@pytest.fixture(scope="module")
def unsearched(_finished, tmp_path_factory) -> Path:
    """A project whose trainings are played; the test split is gone."""
    project = Project(tmp_path_factory.mktemp("unsearched") / "project")
    copytree(_finished, project.root, symlinks=True)
    (project / "stages/train.py").write_text(PLAYED)
    (project / "stages/evaluate.py").write_text(PLAYED_EVALUATION)
    with open(project / "stages/run/environment.py", "a") as file:
        file.write("\n\ndef load_tensorflow():\n    pass  # this takes seconds\n")
    project.configure({"train.epochs": 8, "train.dropout": 0.5})
    (project / "space.yaml").write_text(SPACE)
    project.commit("Played")
    rmtree(project / "data/prepared/test")
    return project.root


@pytest.fixture
def played(unsearched, tmp_path) -> Project:
    copytree(unsearched, tmp_path / "project", symlinks=True)
    return Project(tmp_path / "project")


@pytest.fixture(scope="module")
def searched(unsearched, tmp_path_factory) -> tuple[Project, str]:
    """A project after a search, to be looked at only, and what was printed."""
    project = Project(tmp_path_factory.mktemp("searched") / "project")
    copytree(unsearched, project.root, symlinks=True)
    return project, run(project, *SEARCH, "--trials", "8")


def run(project: Project, *words: str) -> str:
    """Run search or repeat in this process, its trainings in others; return what it printed."""
    command = {"search": search, "repeat": repeat}[words[0]]
    with contextlib.chdir(project.root), contextlib.redirect_stdout(io.StringIO()) as said:
        command.main(options(*words))
    return said.getvalue()


def wait(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def start(project: Project, *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "stages", *words], cwd=project.root, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def training(process: subprocess.Popen) -> list[psutil.Process]:
    """Return the training that a search or repeat has started."""
    with contextlib.suppress(psutil.Error):
        found = psutil.Process(process.pid).children()
        return [child for child in found if "exit_with_parent" in "".join(child.cmdline())]
    return []


def table(project: Project, name: str = "search/trials") -> pd.DataFrame:
    return pd.read_csv(project / f"metrics/{name}.csv")


def ended(path: Path) -> list[optuna.trial.FrozenTrial]:
    """Return the trials of a journal that have ended."""
    if not path.exists():
        return []
    storage = JournalStorage(JournalFileBackend(str(path)))
    [study] = optuna.get_all_study_names(storage) or [None]
    trials = optuna.load_study(study_name=study, storage=storage).trials if study else []
    return [trial for trial in trials if trial.state.is_finished()]


# A search


def test_the_trials_of_a_search(searched):
    project, said = searched
    trials = table(project)
    assert [*trials["trial"]] == [*range(8)] and trials["train.dropout"][0] == 0.5
    assert {*trials["state"]} == {"complete", "pruned", "failed"}
    failed = trials[trials["state"] == "failed"]
    assert {*failed["train.batch_size"]} <= {7, 9} and len(failed) == said.count("failed: ")
    for error in failed["error"]:
        assert error.startswith(("Training diverged: loss is nan", "killed, as by the system"))
    pruned = trials[trials["state"] == "pruned"]
    assert pruned["epochs"].between(2, 7).all()
    assert (trials["epochs"][trials["state"] == "complete"] == 8).all()
    assert project.git("status", "--porcelain") == "?? metrics/search/"
    for row in pruned.itertuples():  # was worse than the median at the same epoch
        before = trials[(trials["state"] == "complete") & (trials["trial"] < row.trial)]
        assert len(before) >= 4
        assert row.val_loss > (before["val_loss"] + 0.3 * (1 - row.epochs / 8)).median()


def test_the_best_trials_are_trained_again(searched):
    project, said = searched
    trials = table(project)
    complete = trials[trials["state"] == "complete"].sort_values("val_loss")
    best = [0, *sorted(complete["trial"][complete["val_loss"] < trials["val_loss"][0]][:3])]
    assert len(best) > 1
    seeds = table(project, "search/seeds")
    assert seeds[["seed", "trial"]].values.tolist() == [[s, t] for s in (2, 3) for t in best]
    assert "is better than the present parameters, beyond chance" in said
    assert (project / "metrics/search/history.png").stat().st_size > 5000


def test_the_last_lines_adopt_the_best_trial(searched, played):
    project, said = searched
    [line] = [line for line in said.splitlines() if "dvc exp run" in line]
    played.dvc(*shlex.split(line.partition("dvc ")[2]), "--single-item", "train")
    trials = table(project)
    best = trials[trials["state"] == "complete"].nsmallest(1, "val_loss").squeeze()
    train = played.parameters["train"]
    assert train["dropout"] == best["train.dropout"]
    assert train["batch_size"] == best["train.batch_size"]
    assert json.dumps(train["filters"]) == best["train.filters"]
    assert train["augment"]["flip"] == best["train.augment.flip"]
    assert json.loads((played / "metrics/train.json").read_text())["val_loss"] == best["val_loss"]


def test_an_interrupted_search_goes_on(played, tmp_path):
    """It is stopped by a change of parameters, by Ctrl-C, and by a kill between other seeds."""
    (played / "space.yaml").write_text("train.dropout: {range: [0.3, 0.48]}")
    journal = tmp_path / "trials.log"
    command = [*SEARCH, "--trials", "3", "--storage", str(journal)]
    search = start(played, *command)
    wait(lambda: len(ended(journal)) == 1 and training(search))
    played.configure({"train.epochs": 3})
    said, errors = search.communicate(timeout=60)
    assert search.returncode == 1 and "\n      0" in said
    assert errors.startswith("params.yaml, data/prepared or the code has changed since the start")
    assert errors.count("\n") == 1
    played.configure({"train.epochs": 8})

    search = start(played, *command)
    wait(lambda: training(search))
    [process] = training(search)
    search.send_signal(signal.SIGINT)
    _, errors = search.communicate(timeout=30)
    assert errors == "Stopped: finished trials and epochs are kept; the same command resumes.\n"
    assert search.returncode == 130 and not process.is_running()

    search = start(played, *command)
    wait(lambda: training(search))
    [process] = training(search)
    search.kill()
    search.communicate()
    wait(lambda: not process.is_running())
    said = run(played, *command)
    trials = table(played)
    assert [*trials["trial"]] == [*range(len(trials))]
    assert [*trials["state"]].count("complete") == 3 and len(trials) == 6
    assert [*trials["error"].dropna()] == ["interrupted"] * 3
    # Those that were interrupted are repeated with their parameters.
    assert trials["train.dropout"].nunique() == 3
    assert "is better than the present parameters" in said
    run(played, *command)  # all is known
    assert table(played).equals(trials)


def test_what_has_failed_is_tried_again(played, monkeypatch):
    (played / "space.yaml").write_text("train.batch_size: [16, 32]")
    monkeypatch.setenv("FAILING", "16")
    said = run(played, *SEARCH, "--trials", "4")
    assert "failed: Training diverged" in said
    first = table(played)
    failed = first[first["state"] == "failed"]
    assert {*failed["train.batch_size"]} == {16} and len(first) == 4
    monkeypatch.delenv("FAILING")
    run(played, *SEARCH, "--trials", "4")
    trials = table(played)
    assert [*trials["state"][:4]] == [*first["state"]] and len(trials) == 4 + len(failed)
    assert (trials["state"][4:] != "failed").all()
    assert [*trials["train.batch_size"][4:]] == [16] * len(failed)


def test_processes_share_a_database(played, unsearched, tmp_path):
    other = Project(tmp_path / "other")
    copytree(unsearched, other.root, symlinks=True)
    command = [*SEARCH, "--trials", "4", "--storage", f"sqlite:///{tmp_path}/trials.db"]
    run(played, *SEARCH, "--time", "0.1s", *command[-2:])  # as long as one trial
    assert len(table(played)) == 1
    process = start(other, *command)
    run(played, *command)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    [study] = optuna.get_all_study_summaries(command[-1])
    trials = optuna.load_study(study_name=study.study_name, storage=command[-1]).trials
    trials = [trial for trial in trials if "repeats" not in trial.user_attrs]
    assert 4 <= len(trials) <= 5
    assert len({json.dumps(trial.params) for trial in trials}) == len(trials)
    for project in (played, other):
        assert table(project)["train.dropout"][0] == 0.5


@pytest.mark.parametrize("storage", ["nothing://x", "no/folder/trials.log", "params.yaml"])
def test_a_wrong_storage(finished, storage, monkeypatch):
    monkeypatch.chdir(finished.root)
    with pytest.raises(UserError, match="^--storage: expected the path of a file of trials, or"):
        search.main(options("search", "--trials", "1", "--storage", storage))


def test_what_can_not_be_searched(played, monkeypatch):
    played.configure({"train.batch_size": 7})
    with pytest.raises(UserError, match="^the present parameters can't be trained: Training div"):
        run(played, *SEARCH, "--trials", "4")
    monkeypatch.chdir(played.root)
    played.configure({"prepare.seed": 2})
    with pytest.raises(UserError, match=r"^data/prepared is not up to date \(prepare: "):
        search.main(options("search", "--trials", "4"))
    rmtree(played / "data/prepared/val")
    with pytest.raises(UserError, match="^data/prepared/val: not there; run `dvc repro` first"):
        search.main(options("search", "--trials", "4"))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--trials", "0"], "expected a whole number from 1 on, found '0'"),
        (["--trials", "2", "--seeds", "1"], "expected a whole number from 2 on, found '1'"),
        (["--time", "2 hours"], "expected a time such as 2h or 1h30m, found '2 hours'"),
    ],
)
def test_the_words_of_the_command(words, line, capsys):
    with pytest.raises(SystemExit):
        options("search", *words)
    assert line in capsys.readouterr().err


def test_a_search_without_budget_or_without_optuna(monkeypatch):
    with pytest.raises(UserError, match="^a search needs a budget: --trials 30, --time 2h, or b"):
        search.main(options("search"))
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match="^a search needs Optuna: pip install"):
        search.main(options("search", "--trials", "1"))


def test_a_search_with_a_real_training(project):
    """Trial 0 is the training of `dvc repro`; its learning rate is outside of the space."""
    rmtree(project / "data/prepared/test")
    (project / "space.yaml").write_text("train.learning_rate: {log: [0.00001, 0.00002]}")
    run(project, *SEARCH, "--trials", "1")
    trials = table(project)
    trained = json.loads((project / "metrics/train.json").read_text())
    assert trials["val_loss"][0] == pytest.approx(trained["val_loss"], abs=1e-5)
    assert trials["train.learning_rate"][0] == 0.01
    assert [*trials["state"]] == ["complete"] and [*trials["epochs"]] == [4]
    changed = project.git("status", "--porcelain").split("\n")
    assert changed == ["?? metrics/search/", "?? space.yaml"]


# Repeat


def test_a_killed_repeat_trains_no_seed_again(finished, played):
    copytree(finished / "data/prepared/test", played / "data/prepared/test", symlinks=True)
    command = ["repeat", "--seeds", "3", "--test"]
    repeat = start(played, *command)
    scratch = played / ".dvc/tmp/scratch/repeat"
    wait(lambda: [*scratch.glob("*.json")] and training(repeat))
    [process] = training(repeat)
    repeat.kill()
    repeat.communicate()
    wait(lambda: not process.is_running())
    [known] = scratch.glob("*.json")
    results = json.loads(known.read_text())
    assert 1 <= len(results) < 3
    results["1"]["val_loss"] = 0.777  # is read, not trained again
    known.write_text(json.dumps(results))
    said = run(played, *command)
    seeds = table(played, "repeat")
    assert [*seeds] == ["seed", "val_loss", "val_accuracy", "test_accuracy"]
    assert [*seeds["seed"]] == [1, 2, 3] and seeds["val_loss"][0] == 0.777
    assert [*seeds["test_accuracy"].round(4)] == [*(seeds["val_accuracy"] / 2).round(4)]
    mean, deviation = 100 * seeds["test_accuracy"].mean(), 100 * seeds["test_accuracy"].std()
    assert f"test_accuracy  {mean:.1f} ± {deviation:.1f} %" in said
    assert played.git("status", "--porcelain") == "?? metrics/repeat.csv"
    played.configure({"train.batch_size": 7})
    with pytest.raises(UserError, match="^train.seed 1: Training diverged: loss is nan"):
        run(played, "repeat")


# Spaces

SPACES = {
    "train.learning_rate": {"log": [1e-4, 0.1]},
    "train.dense_units": {"range": [0, 256]},
    "train.dropout": {"range": [0, 0.6]},
    "train.filters": [[16], [32, 64, 128]],
    "train.augment.flip": ["none", "horizontal"],
}


def write(tmp_path: Path, space: object) -> Path:
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(space, sort_keys=False), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("backbone", "fraction", "key"),
    [
        ("none", 0.0, "train.filters"),
        ("net.keras", 0.0, "train.dense_units"),
        ("net.keras", 0.5, "train.fine_tune_epochs"),
    ],
)
def test_params_yaml_chooses_the_default_space(backbone, fraction, key):
    parameters = Train(backbone=backbone, fine_tune_fraction=fraction)
    space = read_space(None, parameters)
    assert key in space and as_suggested(parameters, space)


@pytest.mark.parametrize(
    ("key", "entry", "line"),
    [
        ("train.lerning_rate", [0.1], "train.lerning_rate: unknown key; did you mean `learning"),
        ("train.augment.spin", [1.0], "train.augment.spin: unknown key; known keys: flip,"),
        ("train.dropout.x", [1.0], "train.dropout.x: unknown key; train has no section dropout"),
        ("prepare.image_size", [[64, 64]], "prepare.image_size: only keys of train can be varied"),
        ("train.seed", [1, 2], "train.seed: not a hyperparameter; set it in params.yaml"),
        ("train.dropout", [0.1, "high"], "train.dropout: expected a valid number, found 'high'"),
        ("train.epochs", {"range": [1.5, 9]}, "train.epochs: expected a valid integer"),
        ("train.dropout", {"range": [0.5, 1.5]}, "train.dropout: expected less than 1, found 1.5"),
        ("train.dropout", {"range": [0.5, 0.5]}, "train.dropout: expected a list of values, {ra"),
        ("train.dropout", {"range": [0.5]}, "train.dropout: expected a list of values, {range:"),
        ("train.dropout", {"step": [0, 1]}, "train.dropout: expected a list of values, {range:"),
        ("train.dropout", [], "train.dropout: expected a list of values, {range:"),
        (
            "train.weight_decay",
            {"range": [0, float("inf")]},
            "train.weight_decay: expected a finite",
        ),
        ("train.fine_tune_epochs", [4, 5], "train.fine_tune_epochs: has no effect with the other"),
        ("train.dropout", 0.5, "train.dropout: expected a list of values, {range:"),
        ("train.dropout", {"log": [0, 0.5]}, "train.dropout: expected a list of values, {range:"),
        ("train.batch_normalization", {"range": [False, True]}, "train.batch_normalization: expec"),
        ("train.augment.flip", {"range": ["both", "none"]}, "train.augment.flip: expected a list"),
    ],
)
def test_a_wrong_space_gets_a_line_for_each_key(tmp_path, key, entry, line):
    path = write(tmp_path, {"train.epochs": [5, 10], key: entry, "evaluate.top_k": [1]})
    with pytest.raises(UserError) as caught:
        read_space(path, Train())
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{path}: {line}")
    assert second.startswith(f"{path}: evaluate.top_k: only keys of train can be varied")


@pytest.mark.parametrize(("content", "line"), [("{}", "no key"), ("a: [", "not valid YAML")])
def test_a_file_without_a_space(tmp_path, content, line):
    (tmp_path / "space.yaml").write_text(content)
    with pytest.raises(UserError, match=line):
        read_space(tmp_path / "space.yaml", Train())
    with pytest.raises(UserError, match="no such file"):
        read_space(tmp_path / "other.yaml", Train())


def test_what_is_drawn_can_be_trained_with(tmp_path):
    space = read_space(write(tmp_path, SPACES), Train())
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    for _ in range(50):
        trial = study.ask()
        values = {key: suggest(trial, key, entry) for key, entry in space.items()}
        parameters = replace(Train(), values)
        assert 1e-4 <= parameters.learning_rate <= 0.1 and 0 <= parameters.dropout <= 0.6
        assert len(f"{parameters.learning_rate * 1e5:.6g}") <= 6  # three digits
        assert type(parameters.dense_units) is int
        assert list(parameters.filters) in SPACES["train.filters"]


def test_present_values_outside_of_the_space(tmp_path):
    space = read_space(write(tmp_path, {"train.dropout": {"range": [0.4, 0.6]}}), Train())
    space |= {"train.epochs": [20, 30]}
    assert as_suggested(Train(dropout=0.3, epochs=20), space) == {"train.epochs": "20"}
    assert as_suggested(Train(dropout=0.5, epochs=5), space) == {"train.dropout": 0.5}


# What was found


@pytest.mark.parametrize(
    ("losses", "best", "is_better", "sentence"),
    [
        ({0: [0.5, 0.52, 0.51], 3: [0.3, 0.31, 0.32], 7: [0.5, 0.4, 0.6]}, 3, True,
         "trial 3 is better than the present parameters, beyond chance: val_loss is lower by 0.2"),
        ({0: [0.5, 0.7, 0.6], 3: [0.6, 0.5, 0.65]}, 3, False,
         "the lead of trial 3 may be chance (more seeds: --seeds 10): val_loss is lower by 0.01"),
        ({0: [0.5, 0.51], 3: [0.6, 0.61]}, None, False,
         "with other seeds, no trial is better than the present parameters: keep them"),
        ({0: [0.5, 0.5], 3: [0.4, 0.4]}, 3, True,
         "trial 3 is better: val_loss is lower by 0.1000 with each seed"),
        ({0: [0.5, 0.5], 3: [0.4, 0.41]}, 3, True, "trial 3 is better than the present parame"),
        ({3: [0.4, 0.4]}, None, False, "no comparison: the present parameters have failed with"),
        ({0: [0.5, 0.5]}, None, False, "no comparison: the best trials have failed with another"),
    ],
)  # fmt: skip
def test_whether_a_lead_is_chance(losses, best, is_better, sentence, recwarn):
    found = display.dunnett(losses, 0)
    assert found[:2] == (best, is_better) and found[2].startswith(sentence)
    assert not recwarn.list


def test_the_pictures(tmp_path):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    study.enqueue_trial({})
    study.optimize(lambda trial: 0.5 if not trial.number else trial.suggest_float("a", 0, 1), 7)
    display.draw(study, ["a"], tmp_path)
    for name in ("history", "importances", "parallel"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


def test_the_last_lines(tmp_path):
    trials = {}
    for number in range(8):
        attributes = {"values": {"train.dropout": number / 10}}
        trials[number] = optuna.create_trial(value=0.5, user_attrs=attributes)
    none = pd.DataFrame()
    assert "larger budget" in display.conclude({0: trials[0]}, 0, none, tmp_path)["result"]
    assert "keep them" in display.conclude(trials, 0, none, tmp_path)["result"]
    columns = ["trial", "seed", "val_loss", "val_accuracy"]
    rows = [[1, 2, 0.5, 0.8], [1, 3, 0.6, 0.8], [5, 2, 0.55, 0.8], [5, 3, 0.52, 0.9]]
    rows += [[7, 2, 0.1, 0.9], [7, 3, None, None]]
    lines = display.conclude(trials, 1, pd.DataFrame(rows, columns=columns), tmp_path)
    assert lines["trials"] == "8 complete" and lines["present"].startswith("val_loss 0.5500")
    assert lines["trial 7"] == "failed with another seed"
    assert lines["trial 5"] == "val_loss 0.5350 ± 0.0212, val_accuracy 85.0 ± 7.1 %"
    assert "adopt it" not in lines
    assert lines["to adopt it anyway"] == "dvc exp run -S train.dropout=0.5"
