"""The compute device: threads, determinism, precision, and the facts that results depend on."""

import contextlib
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from tensorflow.python.framework import config as tf_config

from stages.run.cli import UserError
from stages.run.processes import cpu_count

_KERAS = {"backend": "tensorflow", "floatx": "float32", "image_data_format": "channels_last"}
# Augmentation gets five times as fast with XLA; convolutions on a CPU get half as fast.
XLA = platform.system() == "Linux"


def setup(deterministic: bool = True, seed: int | None = None) -> dict[str, str | int | bool]:
    """Set TensorFlow's threads and op determinism, and describe the environment.

    Parameters
    ----------
    deterministic : bool, default=True
        Whether TensorFlow uses only ops that give the same bits every time. This holds for the
        whole process; False also switches it off again.
    seed : int, default=None
        If given, seed Python, NumPy and Keras with it and restart Keras's numbering of layer names.

    Returns
    -------
    environment : dict
        What the trained weights depend on: versions, processor family, threads, kind of
        device, determinism; nothing that identifies the machine.

    Raises
    ------
    UserError
        If Keras is not configured as this project needs it.
    """
    for name, expected in _KERAS.items():
        found = getattr(keras.config, name)()
        if found != expected:
            raise UserError(
                f"Keras's setting {name} is {found!r} in this process, expected {expected!r};"
                " change it in keras.json or by the environment variable KERAS_BACKEND"
            )
    with contextlib.suppress(RuntimeError):  # TensorFlow is already in use, as in a notebook
        tf.config.threading.set_intra_op_parallelism_threads(cpu_count())
        tf.config.threading.set_inter_op_parallelism_threads(2)
    if seed is not None:
        keras.backend.clear_session(free_memory=False)  # garbage collection would take 0.2 s
        keras.utils.set_random_seed(seed)
    if deterministic:
        tf.config.experimental.enable_op_determinism()
    else:
        tf_config.disable_op_determinism()  # not exported; tested with TensorFlow 2.21
    gpu = _gpu_details()
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "tensorflow": version("tensorflow"),
        "keras": version("keras"),
        "numpy": version("numpy"),
        "system": platform.system(),
        "processor": _processor(),
        # 0 is TensorFlow's default: one thread per core.
        "threads": tf.config.threading.get_intra_op_parallelism_threads() or cpu_count(),
        "device": "CPU" if gpu is None else gpu.get("device_name", "GPU"),
        "deterministic": deterministic,
    }


def precision(choice: str, *, backbone: bool = False) -> str:
    """Return the Keras dtype policy for training; "auto" depends on the device.

    Parameters
    ----------
    choice : {"auto", "float32", "mixed_float16", "mixed_bfloat16"}
    backbone : bool, default=False
        Whether a backbone is trained: depthwise convolutions, common in backbones, are slower in
        bfloat16 on a CPU.
    """
    if choice != "auto":
        return choice
    gpu = _gpu_details()
    if gpu is None:
        has_bfloat16 = _vector_extensions()[-1:] in (["avx512_bf16"], ["amx_bf16"])
        return "mixed_bfloat16" if has_bfloat16 and not backbone else "float32"
    major, _ = gpu.get("compute_capability", (0, 0))
    return "mixed_bfloat16" if major >= 8 else "mixed_float16" if major >= 7 else "float32"


def gpu_count() -> int:
    """Return the number of GPUs that TensorFlow sees."""
    return len(tf.config.list_physical_devices("GPU"))


def _gpu_details() -> dict[str, Any] | None:
    """Return TensorFlow's details of the first GPU, or None if there is none."""
    gpus = tf.config.list_physical_devices("GPU")
    return tf.config.experimental.get_device_details(gpus[0]) if gpus else None


def _cpu_info() -> dict[str, str]:
    """Return the fields of /proc/cpuinfo for the first core; empty except on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return {}
    fields = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in fields}


def _vector_extensions() -> list[str]:
    """Return the processor's extensions that change results or precision, the widest last."""
    flags = _cpu_info().get("flags", "").split()
    return [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]


def _processor() -> str:
    """Return architecture, vendor, family and widest vector extension, for CPU dispatch."""
    info = _cpu_info()
    parts = [platform.machine(), info.get("vendor_id"), info.get("cpu family")]
    return " ".join(part for part in [*parts, *_vector_extensions()[-1:]] if part)
