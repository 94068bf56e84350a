"""Weights & Biases, the only file that knows it. The package is no dependency: it is imported when a config asks."""

import importlib
import json
import secrets
from pathlib import Path
from typing import Any

from spannorm_jax.config import Config, to_dict
from spannorm_jax.errors import UserError, one_line
from spannorm_jax.run import folder as run_folder
from spannorm_jax.run.store import on_disk, write_json


def load(config: Config) -> Any:
    """The wandb module, or None if metrics.wandb_project is empty.

    Raises:
      UserError: it is asked for and not installed.
    """
    project = config.metrics.wandb_project
    if not project:
        return None
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise UserError(
            f"config key metrics.wandb_project={project!r} needs the package wandb ({one_line(error)}); "
            "pip install wandb, or leave the key empty"
        ) from error


def open_run(wandb: Any, config: Config, workdir: Path) -> Any:
    """Opens the wandb run of a run's folder, the same one again when the run is continued; None without wandb.

    Lines of steps that it has already seen are dropped by wandb: they are the same numbers.

    Raises:
      UserError: wandb refuses, as it does where nobody has logged in.
    """
    if wandb is None:
        return None
    path = workdir / run_folder.WANDB
    if not path.exists():
        write_json(path, {"id": secrets.token_hex(8)})
    try:
        run_id = json.loads(path.read_text(encoding="utf-8"))["id"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({one_line(error)}); put it back, or remove it to log to another wandb run"
        ) from error
    try:
        return wandb.init(
            project=config.metrics.wandb_project,
            id=run_id,
            name=workdir.absolute().name,
            dir=str(on_disk(workdir)),  # its own files, which it sends away itself
            config=to_dict(config),
            resume="allow",
        )
    except wandb.Error as error:
        raise UserError(
            f"config key metrics.wandb_project={config.metrics.wandb_project!r}: wandb refuses "
            f"({one_line(error)[:200]}); wandb login, set WANDB_MODE=offline, or leave the key empty"
        ) from error
