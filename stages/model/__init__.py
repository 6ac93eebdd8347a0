"""Whatever runs the network. TensorFlow prints a banner that no variable turns off: done here."""

import os
import sys

_terminal = os.dup(2)
_nowhere = os.open(os.devnull, os.O_WRONLY)
sys.stderr.flush()
os.dup2(_nowhere, 2)
try:
    import tensorflow as tf

    # Its devices are found at first use, with more of the same.
    _devices = tf.config.list_physical_devices()
finally:
    os.dup2(_terminal, 2)
    os.close(_terminal)
    os.close(_nowhere)
