"""Everything that needs TensorFlow.

Importing this package imports TensorFlow, which takes seconds: a terminal shows a line meanwhile.
The log lines that TensorFlow writes then, and that no setting turns off, are hidden.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

from stages.utils import environment


@contextlib.contextmanager
def _stderr_to_devnull() -> Iterator[None]:
    """Discard what libraries below Python write to standard error."""
    stderr, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    sys.stderr.flush()
    os.dup2(devnull, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(devnull)


@contextlib.contextmanager
def _hidden_from_keras() -> Iterator[None]:
    """Hide packages that Keras imports if they are installed, for functions that aren't used here.

    Importing them takes a quarter of the time. In a notebook, Keras keeps these functions.
    """
    names = {"matplotlib", "sklearn"} - sys.modules.keys() if environment.is_set_up else set()
    for name in names:
        sys.modules[name] = None  # type: ignore[assignment]  # as if it were not installed
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


_LOADING = "loading TensorFlow ..."
if sys.stderr.isatty():
    print(_LOADING, end="\r", file=sys.stderr, flush=True)
with _stderr_to_devnull(), _hidden_from_keras():
    import tensorflow as tf

    tf.config.list_physical_devices()  # the first call writes more of them
if sys.stderr.isatty():
    print(" " * len(_LOADING), end="\r", file=sys.stderr, flush=True)
