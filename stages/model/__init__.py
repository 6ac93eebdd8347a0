"""Whatever runs the network.

Importing this package imports TensorFlow, without the banner that no variable turns off, and fixes
the number of its threads, which is possible only before its first operation.
"""

import contextlib
import os
import sys


@contextlib.contextmanager
def _silent():
    """Send what libraries below Python write to the terminal nowhere."""
    terminal, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    sys.stderr.flush()
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(nowhere)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


with _silent():
    import tensorflow as tf

    with contextlib.suppress(RuntimeError):  # a notebook has used TensorFlow already
        tf.config.threading.set_intra_op_parallelism_threads(_cores())
        tf.config.threading.set_inter_op_parallelism_threads(2)
    tf.config.list_physical_devices()  # finding them prints more of the same
