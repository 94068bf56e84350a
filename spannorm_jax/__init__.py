"""Norm placement and ScaleInit for decoder-only language models in JAX."""

import contextlib
import os
import sys

# A command's own folder comes last: a config file there that is called random.py is not the module of that name.
if sys.argv[:1] == ["-m"]:
    with contextlib.suppress(FileNotFoundError):  # it has been removed
        if sys.path[0] == os.getcwd():
            sys.path.append(sys.path.pop(0))
