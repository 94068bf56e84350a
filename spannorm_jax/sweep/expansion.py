"""Turns names of sweeps into runs, each with its config and a folder name that identifies it."""

import functools
import hashlib
import inspect
import json
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spannorm_jax.config import Config, flatten, former_defaults, is_runtime, unread
from spannorm_jax.config_file import PRESETS, authors_errors, read_spec, run_file, split_spec, with_overrides
from spannorm_jax.data.names import made_here
from spannorm_jax.errors import UserError, did_you_mean
from spannorm_jax.sweep.definition import Point, product

CONFIGS = Path("configs")  # of the checkout that a command is typed in, or else those of the package
_PREFIX = "sweep_"


@dataclass(frozen=True)
class Run:
    """One run of a sweep: its place in it, what it was written as, its config as loaded, its folder's name."""

    index: int
    spec: str  # FILE.py:argument
    overrides: tuple[tuple[str, str], ...]
    config: Config = field(repr=False)
    name: str

    @property
    def argv(self) -> list[str]:
        """What `spannorm_jax.train` takes, but for --workdir."""
        return ["--config", self.spec, *(f"--config.{key}={text}" for key, text in self.overrides)]


@dataclass(frozen=True)
class Sweep:
    """Runs that are asked for together, as they were: names with commas between, a size, overrides of all runs."""

    names: str
    size: str
    file: str
    overrides: tuple[tuple[str, str], ...]
    runs: tuple[Run, ...]
    compares: tuple[str, str] | None = None  # placement and baseline, where the sweep names them (`definition`)
    bisects: bool = False  # over learning rates, which decides what is run (`bisection`); else every run is

    @property
    def title(self) -> str:
        return f"{self.names} ({self.size})"

    @property
    def hash(self) -> str:
        """Of its runs in their order: an index means the same run as long as this is the same."""
        return _hash([run.name for run in self.runs])


def expand(names: str, size: str, file: str | None = None, overrides: Sequence[tuple[str, str]] = ()) -> Sweep:
    """The sweep that `names` multiply to. `overrides` are those of every run, and come last.

    Args:
      names: one sweep, or several with commas between.
      size: one of `definition.SIZES`.
      file: the config file that defines them; None: the one in configs/ that does.

    Raises:
      UserError: no file defines them, or several do; a config is not valid; there is no run; or two
        runs are the same.
    """
    wanted = names.split(",")
    file, found = _find(wanted, file)
    bisecting = [name for name in wanted if "bisects" in vars(found[name])]
    if len(bisecting) > 1:
        raise UserError(f"sweeps {' and '.join(bisecting)} both bisect the learning rate; name one of them")
    of_each = {name: _points(file, name, found[name], size) for name in wanted}
    points = product(*(of_each[name] for name in wanted))
    if not points:
        raise UserError(f"sweep {names} has no run: {_why_empty(of_each, size)}")
    once = functools.cache(read_spec)  # runs of one argument differ in their overrides
    runs = tuple(_run(i, file, point, overrides, once) for i, point in enumerate(points))
    first_with: dict[str, Run] = {}
    for run in runs:
        other = first_with.setdefault(run.name, run)
        if other is not run:
            raise UserError(
                f"sweep {names}: runs {other.index} ({shown(other)}) and {run.index} ({shown(run)}) are the same run, "
                f"{run.name}; leave one out, or leave out the --config.KEY that makes them so"
            )
    named = [vars(found[name])["compares"] for name in wanted if "compares" in vars(found[name])]
    return Sweep(
        names, size, file, tuple(overrides), runs, named[0] if len(named) == 1 else None, bisects=bool(bisecting)
    )


def shown(run: Run) -> str:
    """A run as it was written: argument, then overrides."""
    argument = split_spec(run.spec)[1] or "(no argument)"
    return " ".join([argument, *(f"{key}={text}" for key, text in run.overrides)])


def _points(file: str, name: str, function: types.FunctionType, size: str) -> list[Point]:
    """The points of one sweep. Raises UserError for what fails in its function, and for what is no point."""
    with authors_errors(file, f"sweep {name}: ", function):
        points = list(function(size))
        for point in points:
            match point:
                case (str(), dict(values)) if all(isinstance(text, str) for item in values.items() for text in item):
                    continue
            raise TypeError(f"{point!r} is no point, which is (argument, {{key: text}}); `fixed` makes one of numbers")
    return points


def _run(
    index: int,
    file: str,
    point: Point,
    overrides: Sequence[tuple[str, str]],
    read_once: Callable[[str], dict[str, Any]],
) -> Run:
    argument, own = point
    spec = f"{file}:{argument}" if argument else file
    values = tuple((own | dict(overrides)).items())
    try:
        config = with_overrides(read_once(spec), values)
    except UserError as error:
        raise UserError(f"run {index} ({argument}): {error}") from error
    return Run(index, spec, values, config, folder_name(config))


# ---- names ----------------------------------------------------------------------------------------


def sweeps_of(file: str) -> dict[str, types.FunctionType]:
    """The sweeps that a config file defines or imports, by name."""
    functions = inspect.getmembers(run_file(file), inspect.isfunction)
    return {name.removeprefix(_PREFIX): function for name, function in functions if name.startswith(_PREFIX)}


def _find(wanted: Sequence[str], file: str | None) -> tuple[str, dict[str, types.FunctionType]]:
    """The config file that defines all of the sweeps `wanted`, and those that it has."""
    here = sorted(CONFIGS.glob("*.py")) or sorted(Path(PRESETS).glob("*.py"))
    files = [file] if file else [str(CONFIGS / path.name) for path in here]
    found = {path: sweeps_of(path) for path in files}
    every = {name for sweeps in found.values() for name in sweeps}
    for name in wanted:
        if name not in every:
            near = did_you_mean(name, every) if every else f"{', '.join(files)} defines none (a function sweep_NAME)"
            raise UserError(f"unknown sweep {name!r}; {near}")
    able = [path for path in files if all(name in found[path] for name in wanted)]
    if not able:
        raise UserError(f"no one config file defines all of the sweeps {', '.join(wanted)}: they cannot be multiplied")
    if len(able) > 1:
        raise UserError(f"sweep {','.join(wanted)} is in {' and '.join(able)}; say which by --config FILE.py")
    return able[0], found[able[0]]


def _why_empty(of_each: Mapping[str, Sequence[Point]], size: str) -> str:
    for name, points in of_each.items():
        if not points:
            return f"{name} yields no point in size {size}"
    return f"no points of {' and '.join(of_each)} agree on what both set; leave one of them out"


# ---- identity -------------------------------------------------------------------------------------


def identity(config: Config) -> dict[str, Any]:
    """The options that say what a run is: those that differ from what was done before they came.

    So neither a new option nor a new default changes an identity. Runtime options are not in it, nor those that the
    run's initialisation does not read, nor which version of this machine's own sources the data are: a run that leaves
    that open has it filled in, and goes on with no other.
    """
    then, left_out = flatten(Config()) | former_defaults(), unread(config.model.init)
    if made_here(config.data):
        left_out |= {"data.full_name"}
    return {
        key: value
        for key, value in flatten(config).items()
        if value != then[key] and key not in left_out and not is_runtime(key)
    }


def folder_name(config: Config) -> str:
    """What a reader tells runs apart by, and a hash of `identity`, which tells apart all that differ."""
    model = config.model
    experts = f"-{model.moe.num_experts}experts" if model.moe.num_experts else ""
    what = f"{model.placement}-{model.init}-{model.depth}x{model.width}{experts}"
    return f"{what}-lr{config.optim.lr:g}-seed{config.seed}-{_hash(identity(config))}"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]
