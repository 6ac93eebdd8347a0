"""Remove or set the environment variables that could change a program's results."""

import gc
import os
import platform
import sys

# Prefixes of variables by which libraries choose code, threads or settings files.
_STEERING = (
    "TF_", "KERAS_", "XLA_", "CUBLAS_", "CUDNN_", "NVIDIA_TF32", "ONEDNN_", "DNNL_", "MKL_", "OMP_",
    "KMP_", "GOMP_", "OPENBLAS_", "BLIS_", "VECLIB_", "NPY_", "MPL", "MATPLOTLIBRC",
)  # fmt: skip

# These only say how to run: how GPU memory is allocated, which threads launch kernels, what is
# logged, where the replicas of a training are. Variables that no library above reads
# (CUDA_VISIBLE_DEVICES, say) are not touched at all.
_HARMLESS = (
    "TF_FORCE_GPU_ALLOW_GROWTH", "TF_GPU_ALLOCATOR", "TF_GPU_THREAD_", "TF_CPP_", "TF_CONFIG",
)  # fmt: skip

# Git sets these in a hook, for the repository of the hook: a program of ours, and Git and DVC below
# it, use the repository of its own folder. `git rev-parse --local-env-vars` names them, and two
# more that hold settings only, for instance that a folder of another user is safe.
_OF_A_REPOSITORY = (
    "GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_COMMON_DIR", "GIT_CONFIG", "GIT_DIR", "GIT_GRAFT_FILE",
    "GIT_IMPLICIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_INTERNAL_SUPER_PREFIX",
    "GIT_NO_REPLACE_OBJECTS", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX", "GIT_REPLACE_REF_BASE",
    "GIT_SHALLOW_FILE", "GIT_WORK_TREE",
)  # fmt: skip


def setup() -> None:
    """Remove or set the environment variables that results depend on, and those of Git's hooks.

    Call this before NumPy, TensorFlow, Keras or Matplotlib is imported, which is when they read
    these variables. Child processes inherit them.
    """
    for name in list(os.environ):
        is_steering = name.startswith(_STEERING) and not name.startswith(_HARMLESS)
        if is_steering or name in _OF_A_REPOSITORY:
            del os.environ[name]
    os.environ.update(
        KERAS_BACKEND="tensorflow",
        KERAS_HOME=os.devnull,  # no folder, so that no keras.json is read or written
        MPLBACKEND="Agg",
        OMP_NUM_THREADS="1",  # of NumPy; TensorFlow has threads of its own
        OPENBLAS_NUM_THREADS="1",
        # joblib's resource tracker, a process of its own, warns when the stage is stopped.
        PYTHONWARNINGS="ignore::UserWarning:joblib.externals.loky.backend.resource_tracker",
    )
    if platform.machine() == "x86_64":
        # TensorFlow's default only if the processor has instructions for neural networks. With AVX2
        # alone, a training step takes 1.5 times as long without oneDNN.
        os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def load_tensorflow() -> None:
    """Import TensorFlow, which takes seconds: a terminal shows a line meanwhile.

    The log lines that TensorFlow writes then, and that no setting turns off, are hidden.
    """
    loading = "loading TensorFlow ..."
    if sys.stderr.isatty():
        print(loading, end="\r", file=sys.stderr, flush=True)
    stderr, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    gc.disable()  # what is imported stays: looking for garbage takes a tenth of the time
    try:
        import tensorflow as tf

        tf.config.list_physical_devices()  # the first call writes more of them
    finally:
        gc.enable()
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(devnull)
    if sys.stderr.isatty():
        print(" " * len(loading), end="\r", file=sys.stderr, flush=True)
