"""An image classifier: three DVC stages (prepare, train, evaluate) and a few commands.

Importing this package has no side effects. Only running a module, ``python -m stages.train``, sets
environment variables here: NumPy and TensorFlow read them when they are imported, which is
before a ``main()`` could set them.
"""

import re
import signal
import sys

# Also matches `python -um stages.train` or `python -m cProfile -m stages.train`.
if re.search(r"\0-[A-Za-z]*m\0?stages\.", "\0".join(sys.orig_argv)):
    from stages.utils import environment

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during imports prints no traceback
    environment.setup()
