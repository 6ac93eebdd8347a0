"""An image classifier: three stages (prepare, train, evaluate) and commands beside them.

Importing this package changes nothing. Only a program of ours, ``python -m stages.train``, has its
environment variables fixed here: NumPy and TensorFlow read them when they are imported, which is
before a ``main()`` could set them.
"""

import re
import signal
import sys

# Also as `python -um stages.train` or `python -m cProfile -m stages.train`.
if re.search(r"\0-[A-Za-z]*m\0?stages\.", "\0".join(sys.orig_argv)):
    from stages.utils import environment

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during imports prints no traceback
    environment.setup()
