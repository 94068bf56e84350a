"""The config of a run that is there, so that it goes on: one that was imported, or whose own config file has changed.

python -m spannorm_jax.train --config configs/run.py:runs/x --workdir runs/x
"""

from pathlib import Path

from ml_collections import ConfigDict

from spannorm_jax.config import to_dict
from spannorm_jax.config_file import default_config
from spannorm_jax.errors import UserError
from spannorm_jax.run.folder import read_config


def get_config(arg: str | None = None) -> ConfigDict:
    if not arg:
        raise UserError("configs/run.py needs a run's folder; write configs/run.py:runs/x")
    config = default_config()
    config.update(to_dict(read_config(Path(arg))))
    return config
