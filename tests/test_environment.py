"""Environment variables: fixed in programs of ours, and left alone by imports."""

import json
import os
import platform
import subprocess
import sys

import matplotlib
import pytest
from conftest import ROOT

# Variables of a user that must not reach a result.
HOSTILE = {
    "KERAS_BACKEND": "torch", "KERAS_HOME": "/nowhere", "KERAS_NNX_ENABLED": "1",
    "MPLBACKEND": "TkAgg", "MATPLOTLIBRC": "/nowhere", "OMP_NUM_THREADS": "7",
    "TF_ENABLE_ONEDNN_OPTS": "0", "TF_XLA_FLAGS": "--x", "XLA_FLAGS": "--y",
    "ONEDNN_MAX_CPU_ISA": "SSE41", "TF_NUM_INTRAOP_THREADS": "1", "NPY_DISABLE_CPU_FEATURES": "AVX",
}  # fmt: skip

# Variables that only say how a program runs.
HARMLESS = {
    "TF_FORCE_GPU_ALLOW_GROWTH": "true", "TF_GPU_ALLOCATOR": "cuda_malloc_async",
    "TF_GPU_THREAD_MODE": "gpu_private", "TF_CPP_MIN_LOG_LEVEL": "1",
    "CUDA_VISIBLE_DEVICES": "0", "DVC_ROOT": "/somewhere",
}  # fmt: skip

# Prints the variables when the interpreter ends; Python imports a module of this name by itself.
PRINT_AT_EXIT = """
import atexit, json, os, signal
atexit.register(lambda: print(json.dumps({**os.environ, "SIGINT": str(signal.getsignal(2))})))
"""

NOTEBOOK = """
import os
from matplotlib import pyplot
from tensorflow import config, zeros
import stages.prepare, stages.train, stages.evaluate
import stages.predict, stages.compare, stages.backbone
from stages.model.device import setup

assert pyplot.get_backend() == "svg"
assert config.threading.get_intra_op_parallelism_threads() == 0
cores = len(os.sched_getaffinity(0))
assert setup()["threads"] == config.threading.get_intra_op_parallelism_threads() == cores
zeros(1) + 1
os.sched_getaffinity = lambda _: range(77)
assert setup()["threads"] == cores
"""


def variables_of(folder, *command, **environment) -> dict[str, str]:
    """Run Python; return its variables, and how it handles Ctrl-C, at its end."""
    (folder / "sitecustomize.py").write_text(PRINT_AT_EXIT)
    path = os.pathsep.join([str(folder), str(ROOT)])
    plain = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=plain | environment, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_changes_nothing_and_threads_are_set_by_the_first_setup(tmp_path):
    notebook = HARMLESS | {
        "MPLBACKEND": "svg", "OMP_NUM_THREADS": "8", "KERAS_HOME": str(tmp_path),
        "MPLCONFIGDIR": matplotlib.get_cachedir(),  # with a list of fonts, which takes long to make
    }  # fmt: skip
    before = variables_of(tmp_path, "-c", "pass", **notebook)
    after = variables_of(tmp_path, "-c", NOTEBOOK, **notebook)
    assert before.items() <= after.items()  # scikit-learn and TensorFlow add some of their own
    assert not {"KERAS_BACKEND", "OPENBLAS_NUM_THREADS"} & after.keys()


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "stages", "predict"],
        ["-um", "stages", "predict"],
        ["-m", "cProfile", "-o", os.devnull, "-m", "stages", "predict"],
    ],
)
def test_a_program_ignores_what_could_change_a_result(tmp_path, words):
    plain, hostile = (
        variables_of(tmp_path, *words, "--help", **environment) for environment in ({}, HOSTILE)
    )
    assert plain == hostile
    assert (plain["KERAS_BACKEND"], plain["OMP_NUM_THREADS"]) == ("tensorflow", "1")
    if platform.machine() == "x86_64":
        assert plain["TF_ENABLE_ONEDNN_OPTS"] == "1"


def test_a_program_keeps_what_only_says_how_to_run(tmp_path):
    variables = variables_of(tmp_path, "-m", "stages", "predict", "--help", **HARMLESS)
    assert {key: variables[key] for key in HARMLESS} == HARMLESS


def test_a_program_works_in_the_repository_of_its_folder_even_in_a_hook(tmp_path):
    listed = subprocess.run(
        ["git", "rev-parse", "--local-env-vars"], capture_output=True, text=True
    )
    hook = dict.fromkeys(listed.stdout.split(), str(tmp_path / "other"))
    settings = {name: hook.pop(name) for name in ("GIT_CONFIG_COUNT", "GIT_CONFIG_PARAMETERS")}
    assert "GIT_DIR" in hook
    words = ("-m", "stages", "predict", "--help")
    variables = variables_of(tmp_path, *words, **hook, **settings, GIT_AUTHOR_NAME="A")
    assert not hook.keys() & variables.keys()
    assert variables.items() >= (settings | {"GIT_AUTHOR_NAME": "A"}).items()
