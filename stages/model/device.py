"""The device that computes: how it is set up, and what the bytes of a training depend on."""

import platform
from importlib.metadata import version
from pathlib import Path

import keras
import tensorflow as tf

# Makes augmentation five times as fast, and convolutions on a CPU half as fast.
XLA = platform.system() == "Linux"


def setup(seed: int = 0, deterministic: bool = True) -> dict[str, str | int | bool]:
    """Fix random state and determinism; tell what the bytes of a training depend on.

    Parameters
    ----------
    seed : int, default=0
        Of new weights.
    deterministic : bool, default=True
        Let TensorFlow use only operations that give the same bits each time.

    Returns
    -------
    environment : dict
        Versions, processor family, number of threads, kind of device; nothing of one machine.
    """
    keras.backend.clear_session(free_memory=False)  # collecting garbage would take 0.2 s
    keras.utils.set_random_seed(seed)
    if deterministic:
        tf.config.experimental.enable_op_determinism()
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "tensorflow": version("tensorflow"),
        "keras": version("keras"),
        "numpy": version("numpy"),
        "system": platform.system(),
        "processor": _processor(),
        "threads": tf.config.threading.get_intra_op_parallelism_threads(),
        "device": gpu() or "CPU",
        "deterministic": deterministic,
    }


def gpu() -> str:
    """Return the name of the first GPU's kind, or an empty text where there is none."""
    devices = tf.config.list_physical_devices("GPU")
    if not devices:
        return ""
    return tf.config.experimental.get_device_details(devices[0]).get("device_name", "GPU")


def precision(choice: str, *, backbone: bool = False) -> str:
    """Return the Keras dtype policy of a training: "auto" goes by the kind of device.

    Parameters
    ----------
    choice : {"auto", "float32", "mixed_float16", "mixed_bfloat16"}
    backbone : bool, default=False
        Depthwise convolutions, common in backbones, are slower in bfloat16 on a CPU.
    """
    if choice != "auto":
        return choice
    devices = tf.config.list_physical_devices("GPU")
    if not devices:
        fast = _vectors()[-1:] in (["avx512_bf16"], ["amx_bf16"])
        return "mixed_bfloat16" if fast and not backbone else "float32"
    details = tf.config.experimental.get_device_details(devices[0])
    major, _ = details.get("compute_capability", (0, 0))
    return "mixed_bfloat16" if major >= 8 else "mixed_float16" if major >= 7 else "float32"


def _facts() -> dict[str, str]:
    """What Linux says of the first processor; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _vectors() -> list[str]:
    flags = _facts().get("flags", "").split()
    return [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]


def _processor() -> str:
    """Architecture, maker, family and the widest vectors: what libraries choose their code by."""
    facts = _facts()
    parts = [platform.machine(), facts.get("vendor_id"), facts.get("cpu family"), *_vectors()[-1:]]
    return " ".join(part for part in parts if part)
