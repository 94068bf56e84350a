"""Norm placement and ScaleInit for decoder-only language models in JAX.

The names in `__all__` are public and stay; docs/python.md has each in use. All others are private by convention.
"""

import contextlib
import os
import sys

# Where each public name is: it is imported when it is asked for, for JAX takes seconds.
_HOMES = {
    **dict.fromkeys(("read_config", "load", "read_metrics", "predict_signal"), "api"),
    "Run": "inference.loaded",
    **dict.fromkeys(("define", "make_block", "ModelDef"), "model.definition"),
    **{"Block": "model.block", "Trunk": "model.trunk", "weight": "model.weights", "gain": "model.weights"},
    "rotary_angles": "model.layers",
    **{"PLACEMENTS": "model.placement", "INITS": "model.initialisation", "initial_size": "model.initialisation"},
    "UserError": "errors",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


# A command's own folder comes last: a config file there that is called random.py is not the module of that name.
if sys.argv[:1] == ["-m"]:
    with contextlib.suppress(FileNotFoundError):  # it has been removed
        if sys.path[0] == os.getcwd():
            sys.path.append(sys.path.pop(0))
