"""The pipeline's stages and commands.

Importing this package fixes the environment: what a run gives must not depend on the user's own
settings, so variables that steer the numeric libraries are removed before one of them is loaded.
Which device is used (``CUDA_VISIBLE_DEVICES``) stays the user's choice.
"""

import os
import signal
import sys

if sys.argv[0] == "-m":  # a program's start: Ctrl-C in the midst of imports needs no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

_STEERING = (
    "TF_", "KERAS_", "XLA_", "CUBLAS_", "CUDNN_", "NVIDIA_TF32", "ONEDNN_", "DNNL_", "MKL_", "OMP_",
    "KMP_", "GOMP_", "OPENBLAS_", "BLIS_", "VECLIB_", "NPY_", "MPL", "MATPLOTLIBRC",
)  # fmt: skip

for _name in [name for name in os.environ if name.startswith(_STEERING)]:
    del os.environ[_name]

os.environ.update(
    KERAS_BACKEND="tensorflow",
    KERAS_HOME=os.devnull,  # no folder, so that no keras.json is found or written
    MPLBACKEND="Agg",
    OMP_NUM_THREADS="1",  # NumPy's; TensorFlow has threads of its own
    OPENBLAS_NUM_THREADS="1",
    TF_CPP_MIN_LOG_LEVEL="3",
)
