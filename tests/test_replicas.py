"""Replicas of a training: processes on this machine and on the workers of a Dask cluster."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import psutil
import pytest
import tensorflow as tf
import yaml
from conftest import options
from factories import make_prepared
from test_cluster import ROOT, Dask, wait

from stages.model.features import Features
from stages.model.fit import Trainer, effective_batch_size
from stages.model.parameters import Train
from stages.model.phases import Phase
from stages.model.replicas import Replicas
from stages.run import launch
from stages.run.cli import UserError
from stages.train import main, train

# Nothing depends on who has which image: no dropout, frozen batch normalization; and it is fast.
LEARNING = {
    "epochs": 2, "batch_size": 8, "dropout": 0, "class_weight": "balanced",
    "label_smoothing": 0.1, "backbone": "small.keras", "fine_tune_fraction": 1,
    "fine_tune_epochs": 4, "fine_tune_learning_rate": 0.01,
    "augment": dict.fromkeys(["translation", "rotation", "zoom", "contrast"], 0),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    """A folder that all see, and that has no clone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture(scope="module")
def dask(tmp_path_factory):
    running = Dask(tmp_path_factory.mktemp("dask"), PYTHONPATH=str(ROOT))
    yield running
    running.close()


@pytest.fixture
def workers(dask, monkeypatch):
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", dask.ready(2))


@pytest.fixture(params=["here", "on workers"])
def place(request):
    """Both places where replicas run."""
    if request.param == "on workers":
        request.getfixturevalue("workers")
    return request.param


def make_project(folder: Path) -> None:
    make_prepared(folder, ["a", "b", "c"], {"train": 90, "val": 60})
    labels = folder / "data/prepared/train/labels.npy"
    np.save(labels, np.where(np.arange(90) % 4, np.load(labels), 0))
    images = keras.Input((None, None, 3))
    x = keras.layers.Rescaling(1 / 128, -1)(images)
    x = keras.layers.Conv2D(6, 3, strides=2, activation="relu")(x)
    x = keras.layers.Conv2D(6, 1)(keras.layers.BatchNormalization()(x))
    (folder / "data/backbones").mkdir()
    keras.Model(images, x).save(folder / "data/backbones/small.keras")
    values = {"dataset": "data", "prepare": {}, "train": LEARNING | {"replicas": 2}, "evaluate": {}}
    (folder / "params.yaml").write_text(yaml.safe_dump(values))


def test_replicas_on_workers_learn_what_one_process_learns(dask, tmp_path, monkeypatch, capfd):
    """Two learn from the shares of a batch what one learns from the whole."""
    make_project(tmp_path)
    train(Train(**LEARNING), model="one.keras", metrics="one")
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", dask.ready(2))
    monkeypatch.setenv("TF_CONFIG", "{}")  # as platforms may do for other programs
    capfd.readouterr()
    main(options("train"))
    said = capfd.readouterr().out
    assert "best epoch" in said and said.count("2 replicas, one process each") == 1
    one, two = (pd.read_csv(f"{name}/history.csv").iloc[:, 2:] for name in ("one", "metrics"))
    assert len(one) == 6 and np.allclose(one, two, rtol=1e-3)


@pytest.mark.parametrize("name", ["UnavailableError", "AbortedError", "CancelledError"])
def test_the_error_of_a_replica_that_another_has_left(name):
    replicas = Replicas()
    replicas.count = 2
    with pytest.raises(UserError, match="^the connection to another replica is lost"), replicas:
        raise getattr(tf.errors, name)(None, None, "Connection reset by peer")


class Sevens(Replicas):
    """Replicas whose means are all seven, except within a training step."""

    def mean(self, tensors):
        return [tensor * 0 + 7 for tensor in tensors] if tf.executing_eagerly() else tensors


def test_moments_of_batch_normalization_are_means_over_the_replicas():
    data = Features(np.eye(20, 5, dtype=np.float32), np.arange(20) % 3)

    def network(activation=None):
        layers = keras.layers.BatchNormalization(), keras.layers.Dense(3, activation)
        return keras.Sequential([keras.Input((5,)), *layers])

    phase = Phase("train", network(), network("softmax"), data, data, 1, 0.01)
    Trainer(phase, Train(batch_size=8, warmup_fraction=0, weight_decay=0), 0, Sevens()).run_epoch(0)
    for model in (phase.train_model, phase.eval_model):
        assert np.all(np.stack(model.get_weights()[2:4]) == 7)


def test_replicas_that_differ_are_refused(monkeypatch):
    monkeypatch.setattr(Replicas, "gather", lambda _, row: np.array([row, row, row[::-1]]))
    with pytest.raises(UserError, match="not the same files in replica 1 and in replica 3; all"):
        Replicas().require_equal("files", "abc")


def test_one_process_alone_is_not_several_replicas(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    with pytest.raises(UserError, match="train.replicas: 2 .* `dvc repro` starts them.*--replica"):
        train(Train(replicas=2))


@pytest.mark.parametrize(
    ("batch_size", "images", "replicas", "expected"),
    [(64, 1000, 1, 64), (64, 1000, 3, 63), (2, 1000, 4, 4), (64, 90, 2, 8), (64, 3, 3, 3)],
)
def test_a_batch_has_equal_shares(batch_size, images, replicas, expected):
    assert effective_batch_size(batch_size, images, replicas) == expected


def test_more_replicas_than_images_are_refused():
    with pytest.raises(UserError, match="train.replicas: 4 replicas can't share 3 images"):
        effective_batch_size(64, 3, 4)


def test_too_few_gpus_or_idle_workers_are_refused(dask, workers, monkeypatch):
    line = "3 replicas need as many idle workers, found 2 of 2 Dask workers"
    with pytest.raises(UserError, match=line):
        launch.run_replicas(3, ["-c", "pass"], gpus=0)
    with dask.client() as client:
        busy = client.submit(time.sleep, 4, pure=False)
        wait(lambda: any(client.processing().values()))
        with pytest.raises(UserError, match="2 replicas .* found 1 of 2 .*, wait for their tasks"):
            launch.run_replicas(2, ["-c", "pass"], gpus=0)
        busy.cancel()
    monkeypatch.delenv("DASK_SCHEDULER_ADDRESS")
    with pytest.raises(UserError, match="train.replicas: 3 replicas need as many GPUs, found 2"):
        launch.run_replicas(3, ["-c", "pass"], gpus=2)


def test_a_worker_that_cannot_see_the_folder_is_named(workers, monkeypatch):
    monkeypatch.setattr(launch.files, "scratch_dir", lambda _: "/proc/self/cwd")
    monkeypatch.setattr(os, "getcwd", lambda: "/only/here")
    line = "worker at tcp://127.0.0.1:.* can't see the folder /only/here, which it"
    with pytest.raises(UserError, match=line):
        launch.run_replicas(2, ["-c", "pass"], gpus=0)


CODE = (
    "import json, os, sys, time\n"
    "from stages.run import launch\n"
    "launch.exit_with_stage()\n"
    "number = json.loads(os.environ['TF_CONFIG'])['task']['index']\n"
)


def test_only_the_first_replica_is_heard_and_each_has_a_port_and_a_gpu(place, capfd):
    code = CODE + "print(number, os.environ['TF_CONFIG'], os.environ.get('CUDA_VISIBLE_DEVICES'))"
    launch.run_replicas(2, ["-c", code], gpus=2)
    said = capfd.readouterr().out
    ports = re.findall(r'"127.0.0.1:(\d+)"', said)
    assert said.startswith("0 ") and said.count("\n") == 1 and len({*ports}) == 2
    assert said.endswith(" 0\n" if place == "here" else " None\n")


@pytest.mark.parametrize(
    ("by_first", "by_second", "line"),
    [
        ("sys.exit('.\\n' + launch.LOST)", "sys.exit('no space left')", "2 of 2: no space left"),
        ("sys.exit(launch.LOST)", "time.sleep(99); sys.exit('late')", f"1 of 2: {launch.LOST}"),
        ("time.sleep(0.7); sys.exit('of it')", "sys.exit('the cause')", "2 of 2: the cause"),
        (
            "time.sleep(99)",
            "print('why', file=sys.stderr, flush=True); os.abort()",
            "2 of 2: killed by signal 6 (why); `dvc repro`",
        ),
    ],
)
def test_the_line_of_the_replica_that_failed_first(monkeypatch, by_first, by_second, line):
    monkeypatch.setattr(launch, "_GRACE_SECONDS", 1)
    code = CODE + f"if number:\n    {by_second}\nelse:\n    {by_first}"
    with pytest.raises(UserError) as caught:
        launch.run_replicas(2, ["-c", code], gpus=0)
    assert str(caught.value).startswith(f"replica {line}")


WAITING = CODE + "open(str(os.getpid()), 'w')\nprint('begun', flush=True)\ntime.sleep(99)"


def pids(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]


def runs(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_replicas_are_heard_at_once_and_end_with_the_stage(place, tmp_path, ending):
    stage = subprocess.Popen(
        [sys.executable, "-c",
         "from stages.run import cli, launch\n"
         f"cli.run(lambda: launch.run_replicas(2, ['-c', {WAITING!r}], gpus=0))"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert stage.stdout.readline() == "begun\n"
    wait(lambda: len(pids(tmp_path)) == 2)
    replicas = pids(tmp_path)
    stage.send_signal(ending)
    _, errors = stage.communicate(timeout=30)
    assert errors.count("\n") == (ending == signal.SIGINT) and "Traceback" not in errors
    wait(lambda: not any(map(runs, replicas)))


@pytest.mark.parametrize(
    ("victim", "line"),
    [
        ("replica", r"^replica \d of 2: killed by signal 9; `dvc repro` resumes after the last"),
        ("worker", r"^replica \d of 2: the Dask worker at tcp://.* is gone; `dvc repro` resumes"),
        ("scheduler", "^the Dask scheduler at tcp://.* is lost; start it"),
    ],
)
def test_what_dies_is_named(dask, workers, tmp_path, victim, line):
    def strike():
        wait(lambda: len(pids(tmp_path)) == 2)
        if victim == "replica":
            os.kill(pids(tmp_path)[0], signal.SIGKILL)
        else:
            dask.kill(dask.workers[-1] if victim == "worker" else dask.scheduler)

    striker = threading.Thread(target=strike)
    striker.start()
    with pytest.raises(UserError, match=line):
        launch.run_replicas(2, ["-c", WAITING], gpus=0)
    striker.join()
    wait(lambda: not any(map(runs, pids(tmp_path))))
