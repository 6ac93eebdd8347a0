"""Replicas of a training: processes on this machine and on the workers of a Dask cluster."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import psutil
import pytest
from factories import make_prepared
from test_cluster import ROOT, Dask, wait

from stages.model import model_file
from stages.model.fit import effective_batch_size
from stages.model.network import flatten_layers
from stages.model.parameters import Train
from stages.model.replicas import Replicas
from stages.run import launch, processes
from stages.run.cli import UserError
from stages.train import train


@pytest.fixture(scope="module")
def dask(tmp_path_factory):
    running = Dask(tmp_path_factory.mktemp("dask"))
    for _ in range(2):
        running.start_worker()
    yield running
    running.close()


@pytest.fixture(params=["here", "on workers"])
def place(request, monkeypatch):
    """Both places where replicas run."""
    if request.param == "on workers":
        monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", request.getfixturevalue("dask").wait_for(2))
    return request.param


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which two replicas have trained here, after one had; and their histories.

    Nothing depends on who has which image: no dropout, frozen batch normalization. TF_CONFIG is
    set as platforms do, for other programs.
    """
    folder = tmp_path_factory.mktemp("trained")
    make_prepared(folder, ["a", "b", "c"], {"train": 90, "val": 60})
    labels = folder / "data/prepared/train/labels.npy"
    np.save(labels, np.where(np.arange(90) % 4, np.load(labels), 0))
    images = keras.Input((None, None, 3))
    x = keras.layers.Rescaling(1 / 128, -1)(images)
    x = keras.layers.Conv2D(6, 3, strides=2, activation="relu")(x)
    x = keras.layers.Conv2D(6, 1)(keras.layers.BatchNormalization()(x))
    (folder / "data/backbones").mkdir()
    keras.Model(images, x).save(folder / "data/backbones/small.keras")
    histories = []
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.delenv("DVC_ROOT", raising=False)
        patch.setenv("TF_CONFIG", '{"cluster": {"chief": ["a:1"]}, "task": {"type": "chief"}}')
        for replicas in (1, 2):
            train(parameters(replicas))
            histories.append(pd.read_csv("metrics/history.csv").drop(columns="phase"))
        yield folder, histories


def parameters(replicas: int) -> Train:
    return Train(
        epochs=2, batch_size=8, dropout=0, class_weight="balanced", label_smoothing=0.1,
        backbone="small.keras", fine_tune_fraction=1, fine_tune_epochs=6,
        fine_tune_learning_rate=0.01, replicas=replicas,
    )  # fmt: skip


def replicas_of(folder: Path) -> list[psutil.Process]:
    """Return the processes that train in a folder."""
    found = []
    for process in psutil.process_iter(["cwd", "cmdline"]):
        if process.info["cwd"] == str(folder) and "train" in process.info["cmdline"]:
            found.append(process)
    return sorted(found, key=lambda process: process.environ()["TF_CONFIG"][-3:])


def test_two_replicas_learn_what_one_learns_from_the_whole_batch(trained):
    folder, histories = trained
    assert len(histories[0]) == 8 and np.allclose(*histories, rtol=1e-3)
    assert json.loads((folder / "metrics/environment.json").read_text())["replicas"] == 2


def test_workers_write_the_bytes_of_replicas_here_also_after_one_was_killed(
    trained, dask, monkeypatch, capfd
):
    folder, _ = trained
    monkeypatch.chdir(folder)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", dask.wait_for(2))
    expected = Path("data/model.keras").read_bytes()
    Path("data/model.keras").unlink()

    def strike():
        wait(lambda: list(folder.glob(".dvc/tmp/scratch/checkpoints/*.npz")))
        replicas_of(folder)[1].kill()

    striker = threading.Thread(target=strike)
    striker.start()
    with pytest.raises(UserError, match=r"^replica 2 of 2: killed by signal 9; .* resumes"):
        train(parameters(2))
    striker.join()
    assert not replicas_of(folder) and not Path("data/model.keras").exists()
    capfd.readouterr()
    assert train(parameters(2))["epochs"] == 8
    assert re.search(r"Resuming after epoch [1-7]\.", capfd.readouterr().out)
    assert Path("data/model.keras").read_bytes() == expected


def test_moments_of_batch_normalization_are_averaged(trained, tmp_path, monkeypatch):
    """The mean of a batch is the mean of its shares', if the weights stay as they are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    still = dict.fromkeys(["translation", "rotation", "zoom", "contrast"], 0)
    means = []
    for replicas in (1, 2):
        parameters = Train(
            epochs=1, batch_size=8, dropout=0, filters=[4], convs_per_block=1, dense_units=0,
            learning_rate=1e-9, augment=still, replicas=replicas,
        )  # fmt: skip
        train(parameters, trained[0] / "data/prepared", "model.keras")
        layers = flatten_layers(model_file.load("model.keras")[0])
        means += [x.moving_mean for x in layers if isinstance(x, keras.layers.BatchNormalization)]
    one, two = map(np.asarray, means)
    assert np.abs(one).min() > 1e-3
    np.testing.assert_allclose(two, one, rtol=1e-3)


def test_replicas_that_differ_are_refused(monkeypatch):
    monkeypatch.setattr(Replicas, "gather", lambda _, row: np.array([row, row, row[::-1]]))
    with pytest.raises(UserError, match="not the same files in replica 1 and in replica 3; all"):
        Replicas().require_equal("files", "abc")


@pytest.mark.parametrize(
    ("batch_size", "images", "replicas", "expected"),
    [(64, 1000, 1, 64), (64, 1000, 3, 63), (2, 1000, 4, 4), (64, 90, 2, 8), (64, 3, 3, 3)],
)
def test_a_batch_has_equal_shares(batch_size, images, replicas, expected):
    assert effective_batch_size(batch_size, images, replicas) == expected


def test_more_replicas_than_images_are_refused():
    with pytest.raises(UserError, match="train.replicas: 4 replicas can't share 3 images"):
        effective_batch_size(64, 3, 4)


def test_too_few_gpus_or_workers_are_refused(dask, monkeypatch):
    with pytest.raises(UserError, match="train.replicas: 3 replicas need as many GPUs, found 2"):
        launch.run_replicas(3, ["-c", "pass"], gpus=2)
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", dask.wait_for(2))
    with pytest.raises(UserError, match="3 replicas need as many workers, found 2 Dask workers"):
        launch.run_replicas(3, ["-c", "pass"], gpus=0)


def test_a_worker_that_cannot_see_the_folder_is_named(dask, monkeypatch):
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", dask.wait_for(2))
    monkeypatch.setattr(os, "getcwd", lambda: "/only/here")
    line = "worker at tcp://127.0.0.1:.* can't see the folder /only/here, which it"
    with pytest.raises(UserError, match=line):
        launch.run_replicas(2, ["-c", "pass"], gpus=0)


CODE = (
    "import json, os, sys, time\n"
    "from stages.run.processes import exit_with_parent\n"
    "exit_with_parent()\n"
    "number = int(os.environ['TRAIN_REPLICA'])\n"
)


def test_a_replica_finds_what_the_stage_does(tmp_path, monkeypatch):
    (tmp_path / "module_of_the_cluster.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    launch.run_replicas(1, ["-c", "import module_of_the_cluster, stages.run.cli"], gpus=0)


def test_only_the_first_replica_is_heard_and_each_has_a_port_and_a_gpu(place, capsys):
    code = CODE + "print(number, os.environ['TF_CONFIG'], os.environ.get('CUDA_VISIBLE_DEVICES'))"
    launch.run_replicas(2, ["-c", code], gpus=2)
    said = capsys.readouterr().out
    ports = re.findall(r'"127.0.0.1:(\d+)"', said)
    assert said.startswith("0 ") and said.count("\n") == 1 and len({*ports}) == 2
    assert said.endswith(" 0\n" if place == "here" else " None\n")


@pytest.mark.parametrize(
    ("by_first", "by_second", "line"),
    [
        (f"sys.exit('{launch.LOST}')", "sys.exit('no space left')", "2 of 2: no space left"),
        ("time.sleep(99)", "os.kill(os.getpid(), 9)", "2 of 2: killed by signal 9; `dvc repro`"),
        ("sys.exit('diverged')", "time.sleep(0.7); sys.exit('diverged')", "1 of 2: diverged"),
        ("time.sleep(0.7); sys.exit('of it')", "sys.exit('the cause')", "2 of 2: the cause"),
        (
            "time.sleep(99)",
            "print('why', file=sys.stderr, flush=True); os.abort()",
            "2 of 2: killed by signal 6 (why); `dvc repro`",
        ),
    ],
)
def test_the_line_of_the_replica_that_failed_first(place, monkeypatch, by_first, by_second, line):
    monkeypatch.setattr(launch, "_GRACE_SECONDS", 1)
    code = CODE + f"if number:\n    {by_second}\nelse:\n    {by_first}"
    with pytest.raises(UserError) as caught:
        launch.run_replicas(2, ["-c", code], gpus=0)
    assert str(caught.value).startswith(f"replica {line}")


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_replicas_end_with_the_stage(place, tmp_path, ending):
    code = CODE + f"open(f'{tmp_path}/{{os.getpid()}}', 'w'); time.sleep(99)"
    stage = subprocess.Popen(
        [sys.executable, "-c",
         "from stages.run import cli, launch\n"
         f"cli.run(lambda: launch.run_replicas(2, ['-c', {code!r}], gpus=0))"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait(lambda: len(list(tmp_path.iterdir())) == 2)
    replicas = [psutil.Process(int(path.name)) for path in tmp_path.iterdir()]
    stage.send_signal(ending)
    _, errors = stage.communicate(timeout=30)
    assert errors.count("\n") == (ending == signal.SIGINT) and "Traceback" not in errors
    wait(lambda: all(not p.is_running() or p.status() == psutil.STATUS_ZOMBIE for p in replicas))


def test_a_worker_that_dies_is_named(dask, monkeypatch, tmp_path):
    """The last test of these workers."""
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", dask.wait_for(2))
    monkeypatch.setattr(processes, "_ANSWER_SECONDS", 3)
    code = CODE + f"open(f'{tmp_path}/{{os.getpid()}}', 'w'); time.sleep(99)"

    def strike():
        wait(lambda: len(list(tmp_path.iterdir())) == 2)
        dask.processes[-1].kill()

    striker = threading.Thread(target=strike)
    striker.start()
    with pytest.raises(UserError, match=r"the Dask worker at tcp://127.0.0.1:\d+ is gone"):
        launch.run_replicas(2, ["-c", code], gpus=0)
    striker.join()
