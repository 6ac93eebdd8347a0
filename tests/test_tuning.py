"""Search spaces, the study of a search, and the order in which it runs trials."""

import itertools
import json
import time
from pathlib import Path
from random import random
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.model.parameters import Train
from stages.run.cli import UserError
from stages.tuning import experiments, report
from stages.tuning.experiments import Result, run_in_order
from stages.tuning.space import DEFAULT_SPACES, decode, encode, lookup, read_space, replace
from stages.tuning.study import Study

SPACE = {
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


# Spaces


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
    assert key in space and encode(parameters, space) is not None


def test_every_value_of_the_default_spaces_can_be_trained_with():
    for name in yaml.safe_load(DEFAULT_SPACES.read_text(encoding="utf-8")):
        backbone = {"from_scratch": {}, "frozen_backbone": {"backbone": "x.keras"}}.get(
            name, {"backbone": "x.keras", "fine_tune_fraction": 0.5}
        )
        read_space(None, Train(**backbone))


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
        ("train.dropout", {"range": [0.5, 0.5]}, "train.dropout: an empty range, [0.5, 0.5]"),
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
        ("train.dropout", [0.1, 0.1], "train.dropout: a value is listed twice: [0.1, 0.1]"),
        ("train.dropout", {"log": [0, 0.5]}, "train.dropout: on a logarithmic scale, the lower"),
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
    space = read_space(write(tmp_path, SPACE), Train())
    study = Study(Train(), space, "a commit", 1)
    for task in itertools.islice(study.ask(range(1, 60)), 59):
        parameters = replace(Train(), task.values)
        assert set(task.values) == set(SPACE)
        assert 1e-4 <= parameters.learning_rate <= 0.1 and 0 <= parameters.dropout <= 0.6
        assert len(f"{parameters.learning_rate * 1e5:.6g}") <= 6  # three digits
        assert type(parameters.dense_units) is int
        assert list(parameters.filters) in SPACE["train.filters"]


def test_present_values_outside_of_the_space(tmp_path):
    space = read_space(write(tmp_path, {"train.dropout": {"range": [0.4, 0.6]}}), Train())
    assert encode(Train(dropout=0.3), space) is None
    assert decode(encode(Train(dropout=0.5), space), space) == {"train.dropout": 0.5}


# The study


def loss_of(task: experiments.Task) -> float:
    values = replace(Train(), task.values)
    return abs(values.dropout - 0.4) + 10 * abs(values.learning_rate - 0.02) + 0.2


def history_of(task: experiments.Task, epochs: int | None = None) -> list[dict[str, str]]:
    """A loss that falls with the share of the schedule, to `loss_of`."""
    losses = [loss_of(task) + 1 - (n + 1) / task.epochs for n in range(task.epochs)]
    return [{"val_loss": str(loss), "val_accuracy": "0.5"} for loss in losses][:epochs]


def result_of(task: experiments.Task) -> Result:
    if task.values and loss_of(task) > 0.65:
        return Result(history_of(task, 1), error="Training diverged")
    history = history_of(task)
    end = task.stop(history) if task.stop else None
    if end:
        return Result(history[:end])
    metrics = {"val_loss": float(history[-1]["val_loss"]), "val_accuracy": 0.5}
    return Result(history, {"train": metrics})


def run(study: Study, count: int) -> list[bool]:
    """Run trials; return which of them were known already."""
    known = []
    for task in study.ask(range(count)):
        known.append(task.result is not None)
        study.tell(task, task.result or result_of(task))
    return known


def outline(study: Study) -> list[tuple]:
    return [(t.number, t.state, t.task.values, len(t.result.history)) for t in study.trials]


@pytest.fixture
def space(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    two = {k: SPACE[k] for k in ("train.learning_rate", "train.dropout")}
    return read_space(write(tmp_path, two | {"train.epochs": [10, 20, 40]}), Train())


def test_an_interrupted_study_asks_the_same_trials(space, tmp_path):
    first = Study(Train(), space, "a", 1)
    assert not any(run(first, 20))
    expected = outline(first)
    assert {state for _, state, _, _ in expected} == {"complete", "stopped", "failed"}
    (record,) = tmp_path.glob(".dvc/tmp/scratch/searches/*.json")
    saved = json.loads(record.read_text())
    for count in (0, 1, 7, 20):
        record.write_text(json.dumps({key: saved[key] for key in saved if int(key) < count}))
        study = Study(Train(), space, "a", 1)
        known = run(study, 20)
        assert outline(study) == expected
        # A complete trial is found as an experiment, and what failed is tried again.
        assert known == [n < count and expected[n][1] == "stopped" for n in range(20)]
    other = Study(Train(), space, "another commit", 1)
    assert not any(run(other, 3))


def test_a_trial_is_stopped_if_it_is_worse_than_the_median_at_the_same_share(space):
    study = Study(Train(), space, "a", 1)
    run(study, 30)
    complete: list = []
    for trial in study.trials:
        epochs = trial.task.epochs
        if trial.state == "stopped":
            assert len(complete) >= 4 and epochs / 4 <= len(trial.result.history) < epochs
            share = len(trial.result.history) / epochs
            others = [1 - share + loss_of(other.task) for other in complete]
            assert loss_of(trial.task) + 1 - share > pd.Series(others).median() - 1e-9
        if trial.state == "complete":
            complete.append(trial)
    assert {trial.task.epochs for trial in study.trials if trial.state == "stopped"} > {10}


def test_the_best_are_better_than_the_present(space):
    study = Study(Train(), space, "a", 1)
    run(study, 30)
    best = study.best(3)
    assert [t.loss for t in best] == sorted(t.loss for t in study.trials)[:3]
    assert best[0].loss < study.trials[0].loss
    study.trials.append(best[0])  # proposed once more
    assert study.best(3) == best
    study = Study(Train(dropout=0.4, learning_rate=0.02), space, "b", 1)
    for task in study.ask(range(5)):
        better = Result(history_of(task), {"train": {"val_loss": 0.1 + len(task.values)}})
        study.tell(task, better)
    assert study.best(3) == []


class Bench:
    """A clone whose trainings advance by an epoch each time that they are looked at, or wait."""

    interrupted = False

    def __init__(self, waits):
        self.waits, self.baseline, self.process = waits, self, self

    def find(self, task):
        return None

    def start(self, task):
        self.looks = 0

    def poll(self):
        self.looks += next(self.waits)
        return "", 0 if self.looks >= 6 else None

    def history(self):
        return []

    def stop(self):
        pass

    def collect(self, task):
        return result_of(task)


@settings(max_examples=15)
@given(st.lists(st.integers(0, 3).map(lambda n: n or 1), min_size=1), st.integers(1, 3))
def test_trials_side_by_side_do_not_depend_on_what_takes_how_long(waits, count):
    space = read_space(None, Train())
    orders = []
    for delays in ([1], waits):
        study = Study(Train(), space, str(random()), count)  # nothing is known of it
        benches = [Bench(itertools.cycle(delays)) for _ in range(count)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(experiments, "_POLL_SECONDS", 0)
            for task, result in run_in_order(benches, study.ask(range(14))):
                study.tell(task, result)
        orders.append([t.task.values for t in study.trials])
    # From the eleventh on, a trial depends on the results of those before.
    assert orders[0] == orders[1] and len(orders[0]) == 14


def test_what_runs_at_the_deadline_is_stopped_and_can_be_resumed(space):
    benches = [Bench(itertools.repeat(0)), Bench(itertools.repeat(6))]  # the last one is fast
    study = Study(Train(), space, "d", 2)
    tasks = study.ask(range(2))
    assert [*run_in_order(benches[:1], tasks, time.monotonic() + 0.5)] == []
    assert benches[0].interrupted and not benches[1].interrupted
    assert len([*run_in_order(benches[1:], tasks, time.monotonic() + 60)]) == 1
    assert not benches[1].interrupted


# The report


@pytest.mark.parametrize("status", [-9, 137])  # by shells that replace themselves, and by others
def test_a_killed_training_is_told(status):
    clone = experiments.Clone.__new__(experiments.Clone)
    dvc = "ERROR: failed to reproduce 'train': failed to run: python -m stages train, exited with"
    clone.process = SimpleNamespace(errors=lambda: f"Killed\n{dvc} {status}\n")
    assert clone.error(255).startswith("killed, as by the system")
    clone.process = SimpleNamespace(errors=lambda: f"Training diverged\n{dvc} 1\n")
    assert clone.error(255) == "Training diverged"


def test_a_lead_beyond_chance():
    losses = {0: [0.5, 0.52, 0.51], 3: [0.3, 0.31, 0.32], 7: [0.5, 0.4, 0.6]}
    best, is_better, sentence = report.compare(losses)
    assert best == 3 and is_better
    assert sentence.startswith("trial 3 is better than the present parameters, beyond chance")


def test_a_lead_that_may_be_chance():
    best, is_better, sentence = report.compare({0: [0.5, 0.7, 0.6], 3: [0.6, 0.5, 0.65]})
    assert best == 3 and not is_better
    assert sentence.startswith(
        "the lead of trial 3 may be chance (more seeds: --seeds 10): val_los"
    )


@pytest.mark.parametrize(
    ("losses", "best", "sentence"),
    [
        ({0: [0.5, 0.51], 3: [0.6, 0.61]}, None, "with other seeds, no trial is better than the p"),
        ({0: [0.5, 0.5], 3: [0.4, 0.4]}, 3, "trial 3 is better: val_loss is lower by 0.1000 with"),
        ({0: [0.5, 0.5], 3: [0.4, 0.41]}, 3, "trial 3 is better than the present parameters, bey"),
        (
            {3: [0.4, 0.4]},
            None,
            "no comparison: the present parameters have failed with another se",
        ),
        ({0: [0.5, 0.5]}, None, "no comparison: the best trials have failed with another seed"),
    ],
)
def test_no_lead_no_spread_no_comparison(losses, best, sentence, recwarn):
    assert report.compare(losses)[0] == best
    assert report.compare(losses)[2].startswith(sentence)
    assert not recwarn.list


def test_the_last_lines(space, tmp_path):
    study = Study(Train(), space, "a", 1)
    run(study, 1)
    none = pd.DataFrame()
    assert "larger budget" in report.summary(study, none, tmp_path)["result"]
    study = Study(Train(), space, "a", 1)
    run(study, 12)
    assert "keep them" in report.summary(study, none, tmp_path)["result"]
    columns = ["trial", "seed", "val_loss", "val_accuracy"]
    rows = [[0, 2, 0.5, 0.8], [0, 3, 0.6, 0.8], [5, 2, 0.55, 0.8], [5, 3, 0.52, 0.9]]
    rows += [[7, 2, 0.1, 0.9], [7, 3, None, None]]
    lines = report.summary(study, pd.DataFrame(rows, columns=columns), tmp_path)
    assert lines["trial 7"] == "failed with another seed"
    assert lines["trial 5"] == "val_loss 0.5350 ± 0.0212, val_accuracy 85.0 ± 7.1 %"
    assert "adopt it" not in lines and f"{study.key}-5 " in lines["to adopt it anyway"]


def test_a_lead_by_chance_is_seldom_called_better():
    """Of 60 searches in which no trial is better, some 3 may say otherwise."""
    generator = np.random.default_rng(1)
    draws = generator.normal(0.5, 0.05, (60, 4, 3)).tolist()
    sentences = [report.compare(dict(enumerate(losses)))[2] for losses in draws]
    assert sum("beyond chance" in sentence for sentence in sentences) <= 6


def test_lookup_and_replace():
    values = {"train.augment.zoom": 0.25, "train.filters": [8]}
    changed = replace(Train(), values)
    assert {key: lookup(changed, key) for key in values} == values
