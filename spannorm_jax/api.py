"""What `spannorm_jax` offers to Python beside its types: configs, runs, metrics, predictions.

`spannorm_jax.NAME` imports what a name needs once it is asked for; docs/python.md shows each in use.
"""

import os
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import polars as pl

from spannorm_jax import config_file
from spannorm_jax.analysis import prediction
from spannorm_jax.analysis.quantities import QUANTITIES
from spannorm_jax.config import Config, ModelConfig
from spannorm_jax.inference.loaded import Run, load_run
from spannorm_jax.parallel.platform import start_jax
from spannorm_jax.report.folders import metrics_lines
from spannorm_jax.run.folder import read_config as run_config
from spannorm_jax.run.folder import run_folder_path


def read_config(spec: str, options: Mapping[str, Any] | None = None) -> Config:
    """The config of `FILE.py[:arg]` with options by their dotted keys, resolved for the devices here; no data are read.

    `configs/dense.py:tiny,placement=span` is a preset that comes with the package.

    Raises:
      UserError: with one line that names the key, the value and what to write instead.
    """
    loaded = config_file.load(spec, _texts(options))
    return config_file.resolve_without_data(loaded, jax.default_backend())


def load(workdir: str | os.PathLike[str], step: int | None = None, options: Mapping[str, Any] | None = None) -> Run:
    """A run's checkpoint, restored on the devices here from its folder alone: no data are read.

    Args:
      workdir: the run's folder.
      step: of the checkpoint; None: the newest sound one, or the last good one of a run that diverged.
      options: of the mesh, as {"mesh.tensor": 2}, or the platform; all else is the run's.

    Raises:
      UserError: there is no such checkpoint, or the mesh does not fit.
    """
    path, asked = run_folder_path(os.fspath(workdir)), _texts(options)
    config_file.check_overridable(asked, ("platform", "mesh."), "a run that is loaded")
    config = config_file.override(config_file.for_this_machine(run_config(path)), asked)
    start_jax(config.platform)
    return load_run(config, path, step, "loading")


def _texts(options: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Options as they are typed."""

    def text(value: Any) -> str:
        return str(value).lower() if isinstance(value, bool) else str(value)

    joined = {k: ",".join(map(str, v)) if isinstance(v, list | tuple) else text(v) for k, v in (options or {}).items()}
    return list(joined.items())


def read_metrics(workdir: str | os.PathLike[str]) -> pl.DataFrame:
    """A run's metrics.jsonl, a row a logged step: `step`, `loss`, `lr`, ...; lists over blocks are lists, null where a
    step has none. Half a last line, which a trainer at work leaves, is left out."""
    return pl.from_dicts(metrics_lines(run_folder_path(os.fspath(workdir))), infer_schema_length=None)


def predict_signal(cfg: ModelConfig, tokens: int = 64) -> pl.DataFrame:
    """What a model of text starts with by its placement's own equation, a row a block: docs/theory.md has the columns.

    No weights are drawn, and no data are read. What the prediction leaves out is warned of.
    """
    found = prediction.predict(cfg, tokens)
    for note in found.notes:
        warnings.warn(note, stacklevel=2)
    columns = {name: values for name, values in vars(found).items() if name in QUANTITIES}
    return pl.DataFrame({"block": range(1, cfg.depth + 1), **columns})
