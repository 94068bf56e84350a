"""From `--config FILE.py[:arg]` and `--config.a.b=value` to a validated `Config`.

A config file (`configs/*.py`) defines `get_config(arg)`, which edits `default_config()` and returns it. What stands
beside it in its folder it imports by a relative name: `from .common import decoder`. A run's config.json is taken too.
Every failure on this way is the user's to mend, and is one line.
"""

import contextlib
import copy
import dataclasses
import importlib.util
import os
import sys
import traceback
import types
import typing
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from spannorm_jax.config import (
    Config,
    MeshConfig,
    ModelConfig,
    flatten,
    from_dict,
    kind_name,
    kinds_of,
    matches,
    replace,
    to_dict,
)
from spannorm_jax.data.tokenizer import vocab_size
from spannorm_jax.durable import read_object
from spannorm_jax.errors import UserError, did_you_mean, one_line
from spannorm_jax.model.initialisation import INITS, OUTPUT_SITES, PUBLISHED
from spannorm_jax.model.placement import EVERY_GAIN, PLACEMENTS, gain_sites, placement_of
from spannorm_jax.paths import user_path
from spannorm_jax.resolution import fill_sizes, resolve
from spannorm_jax.validation import validate

PRESETS = os.path.join(os.path.dirname(__file__), "presets")  # configs/ of the repository, which a wheel has too
LOCAL_DATA = ("data.data_dir", "data.cache_dir", "data.tokenizer_file", "data.verify_mib")  # where a run's data lie
_FOLDER = "_config_folder"  # the package that a config file's folder is while it is read


def default_config() -> ConfigDict:
    """The defaults as a locked ConfigDict, for `get_config` in configs/*.py to edit and return."""
    return ConfigDict(dataclasses.asdict(Config())).lock()


def parse_arg(arg: str | None, presets: tuple[str, ...] = (), **defaults: Any) -> types.SimpleNamespace:
    """Parses a config file's `name=value,...` argument strictly against typed defaults.

    A bare word is short for `preset=word`. Raises UserError for an unknown name or a wrong type.
    """
    values = dict(defaults)
    if presets:
        values["preset"] = presets[0]
    for item in filter(None, (arg or "").split(",")):
        name, equals, text = item.partition("=")
        if not equals:
            if name not in presets:
                raise UserError(
                    f"config argument {name!r} is no preset; {did_you_mean(name, presets)} "
                    "Other arguments are written name=value"
                )
            name, text = "preset", name
        if name not in values:
            raise UserError(f"unknown config argument {name!r}; {did_you_mean(name, values)}")
        if name == "preset" and text not in presets:
            raise UserError(f"unknown preset {text!r}; {did_you_mean(text, presets)}")
        values[name] = _parse_text(text, type(values[name]), f"config argument {name}")
    return types.SimpleNamespace(**values)


def _parse_text(text: str, kind: Any, where: str) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if typing.get_origin(kind) is tuple:
            return tuple(filter(None, text.split(",")))
        value = kind(text)
    except (ValueError, KeyError, OverflowError):
        value = None
    if value is None or not matches(value, kind):
        raise UserError(f"{where}={_shown(text)!r} must be {kind_name(kind)}")
    return value


def _shown(text: str) -> str:
    """A user's text as far as it belongs in one line."""
    return text if len(text) <= 80 else text[:80] + "..."


def _apply_override(config: Any, key: str, text: str) -> None:
    """Sets a dotted key in a config's nested mapping."""
    kind: Any = Config
    *groups, last = key.split(".")
    for i, part in enumerate((*groups, last)):
        if not dataclasses.is_dataclass(kind):
            raise UserError(f"unknown config key {_shown(key)}; {'.'.join(groups[:i])} holds no further keys")
        kinds = kinds_of(kind)
        if part not in kinds:
            # The right name in the wrong group is likelier than another name of this group.
            elsewhere = [k for k in flatten(Config()) if k.split(".")[-1] == last]
            near = f"did you mean {elsewhere[0]!r}?" if elsewhere else did_you_mean(part, kinds)
            raise UserError(f"unknown config key {_shown(key)}; {near}")
        kind = kinds[part]
    if dataclasses.is_dataclass(kind):
        raise UserError(f"config key {_shown(key)} is a group; set one of its keys: {key}.NAME=VALUE")
    for group in groups:
        config = config[group]
    config[last] = _parse_text(text, kind, f"config key {key}")


def _found(path: str) -> str:
    """Where a config file is: configs/NAME.py is the package's own if the working folder has none."""
    folder, name = os.path.split(path)
    own = os.path.join(PRESETS, name)
    return own if folder == "configs" and not os.path.isfile(path) and os.path.isfile(own) else path


def run_file(path: str) -> types.ModuleType:
    """The module that a config file makes. Raises UserError for whatever fails inside it."""
    path = _found(path)
    if not os.path.isfile(path):
        raise UserError(f"config file {path[:200]!r} does not exist; see configs/ (FILE.py or FILE.py:arg)")
    module_spec = importlib.util.spec_from_file_location(f"{_FOLDER}.config_file", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"config file {path!r} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    with authors_errors(path):
        module_spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def authors_errors(path: str, what: str = "", function: types.FunctionType | None = None) -> Iterator[None]:
    """Around code of a config file: its author is the user, and mends what fails there by its line and message.

    `what` begins the message. What no line of the author raises is told by the line of the `function` that led to it.
    """
    folder = os.path.dirname(os.path.join(os.getcwd(), path))  # as frames name it
    try:
        with _as_package(folder):
            yield
    except UserError:
        raise
    except Exception as error:
        where = _place(error, path, folder, function)
        raise UserError(
            f"config file {where}: {what}{type(error).__name__}: {one_line(error)}{_neighbour(error, folder)}"
        ) from error


def _neighbour(error: Exception, folder: str) -> str:
    """What to write for a module that stands beside the config file, where an absolute import does not find it."""
    name = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if not any(os.path.exists(os.path.join(folder, found)) for found in (name + ".py", name) if name):
        return ""
    return f"; it stands beside the config file: write from .{name} import ..., or from . import {name}"


def split_spec(spec: str) -> tuple[str, str]:
    """File and argument of `FILE.py[:arg]`. A file that is there is meant, whatever colons its name holds."""
    ends = [i for i, sign in enumerate(spec) if sign == ":"] + [len(spec)]
    end = next((i for i in ends if os.path.isfile(spec[:i])), None)
    if end is None:
        end = next((i for i in ends if spec[:i].endswith(".py")), ends[0])
    return spec[:end], spec[end + 1 :]


def read_config_file(spec: str) -> ConfigDict:
    """What `get_config(arg)` of `FILE.py[:arg]` returns. Raises UserError."""
    path, arg = split_spec(spec)
    path = _found(path)
    module = run_file(path)
    if not hasattr(module, "get_config"):
        raise UserError(f"config file {path} defines no get_config(arg)")
    with authors_errors(path):
        config = module.get_config(arg or None)
    if not isinstance(config, ConfigDict):
        raise UserError(f"config file {path}: get_config must return a ConfigDict, not {type(config).__name__}")
    return config


@contextlib.contextmanager
def _as_package(folder: str) -> Iterator[None]:
    """Makes `folder` the package that relative imports look in; leaves sys.modules as it was."""

    def take_out() -> dict[str, types.ModuleType]:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == _FOLDER}

    before = take_out()  # of a config file that reads another one
    package = types.ModuleType(_FOLDER)
    package.__path__ = [folder]
    sys.modules[_FOLDER] = package
    try:
        yield
    finally:
        take_out()
        sys.modules.update(before)


def _place(error: Exception, path: str, folder: str, function: types.FunctionType | None) -> str:
    """The file and line at which a config file failed, or a file that it imports from its folder."""
    frames: list[tuple[str, int | None]] = []
    if function:
        frames.append((function.__code__.co_filename, function.__code__.co_firstlineno))
    frames += [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        frames.append((error.filename or "", error.lineno))
    within = [(os.path.basename(file), line) for file, line in frames if os.path.dirname(file) == folder]
    name, line = within[-1] if within else (os.path.basename(path), None)
    return os.path.join(os.path.dirname(path), name) + (f" line {line}" if line else "")


def load(spec: str, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """Reads a config file, or a run's config.json, applies `(dotted key, text)` overrides and validates the result.

    Raises:
      UserError: with one line that names the key, the value and what to write instead.
    """
    return with_overrides(read_spec(spec), overrides)


def read_spec(spec: str) -> dict[str, Any]:
    """What `load` begins with: a config before overrides, as nested dictionaries. Raises UserError."""
    if spec.endswith(".json"):
        return _read_recorded(spec)
    return read_config_file(spec).copy_and_resolve_references().to_dict()


def with_overrides(values: dict[str, Any], overrides: Sequence[tuple[str, str]]) -> Config:
    """The config that `load` makes of what `read_spec` has read, which stays as it is. Raises UserError."""
    config = copy.deepcopy(values)
    for key, text in overrides:
        _apply_override(config, key, text)
    return _checked(from_dict(config))


def _read_recorded(path: str) -> dict[str, Any]:
    try:
        values = read_object(Path(path))
    except (OSError, ValueError) as error:
        raise UserError(f"config file {path[:200]!r} cannot be read ({one_line(error)})") from error
    return to_dict(recorded_config(values))


def resolve_without_data(config: Config, platform: str) -> Config:
    """`resolve` for programs that read no data: sizes of tokenizer and images are the config's.

    Raises UserError.
    """
    data = config.data
    if config.task == "image":
        for key in ("model.vocab_size", "image.size", "image.channels"):
            if not flatten(config)[key]:
                raise UserError(f"config key {key}=0 leaves to the dataset what is needed without it; write it")
    return resolve(
        config,
        vocab_size=config.model.vocab_size if config.task == "image" else vocab_size(data),
        platform=platform,
        fingerprint=data.fingerprint,
        full_name=data.full_name,
        tokenizer_hash=data.tokenizer_hash,
    )


def _check_names(config: Config) -> None:
    model = config.model

    def check_known(key: str, names: Collection[str], valid: Collection[str]) -> None:
        for name in names:
            if name not in valid:
                raise UserError(f"config key {key}={name!r} is unknown; {did_you_mean(name, valid)}")

    check_known("model.placement", [model.placement], PLACEMENTS)
    check_known("model.init", [model.init], (*INITS, PUBLISHED))
    check_known("model.init_targets", model.init_targets, OUTPUT_SITES)
    check_known("optim.decay_gains", config.optim.decay_gains, (EVERY_GAIN, *gain_sites(model)))
    check_known("optim.hold_norms", config.optim.hold_norms, OUTPUT_SITES)
    if config.optim.hold_norms and model.init == "zero_out":
        raise UserError("config key optim.hold_norms would hold zeros, with model.init=zero_out; leave one of both out")
    least = placement_of(model).least_depth
    if model.depth < least:
        raise UserError(
            f"config key model.depth={model.depth} is too small for model.placement={model.placement}, "
            f"whose equation needs {least} blocks; write {least} or more"
        )
    _check_multiplier(model)


def _check_multiplier(model: ModelConfig) -> None:
    """Raises UserError if ScaleInit's factor is to stand at a branch, and there is none that it could multiply."""
    if model.depth_factor != "multiplier":
        return
    if model.init != "scale":
        raise UserError(
            f"config key model.depth_factor=multiplier is ScaleInit's, and model.init={model.init}; "
            "write model.init=scale, or model.depth_factor=weight"
        )
    sites = model.init_targets or tuple(placement_of(model).additions.values())
    inside = [site for site in sites if site not in ("attn_out", "ffn_out")]
    if inside:
        leave = ", or leave model.init_targets out" if model.init_targets else ""
        raise UserError(
            f"config key model.depth_factor=multiplier multiplies whole branches, and {inside[0]} is not the last "
            f"weight of one; write model.depth_factor=weight{leave}"
        )


def split_overrides(argv: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Takes `--config.a.b=value` (or `--config.a.b value`) out of argv; returns (rest, overrides)."""
    rest: list[str] = []
    overrides: list[tuple[str, str]] = []
    items = iter(argv)
    for item in items:
        if not item.startswith("--config."):
            rest.append(item)
            continue
        key, equals, text = item[len("--config.") :].partition("=")
        if not equals:
            following = next(items, None)
            if following is None or following.startswith("--"):
                raise UserError(f"--config.{key} has no value; write --config.{key}=VALUE")
            text = following
        overrides.append((key, text))
    return rest, overrides


def check_overridable(overrides: list[tuple[str, str]], allowed: tuple[str, ...], what: str) -> None:
    """Raises UserError if an override names a key that a run is not `allowed` to change: keys, or groups with a dot."""
    for key, _ in overrides:
        if not key.startswith(allowed):
            raise UserError(
                f"--config.{key} cannot be changed for {what}, the run's own config holds; "
                f"these can: {', '.join(k + '*' if k.endswith('.') else k for k in allowed)}"
            )


def override(config: Config, overrides: list[tuple[str, str]]) -> Config:
    """`config` with `(dotted key, text)` overrides, validated. Raises UserError."""
    values = to_dict(config)
    for key, text in overrides:
        _apply_override(values, key, text)
    return _checked(from_dict(values))


def for_this_machine(config: Config) -> Config:
    """A run's config for evaluation on this machine: the mesh and platform that trained it need not be here."""
    return dataclasses.replace(config, platform="auto", mesh=MeshConfig())


def recorded_config(values: dict[str, Any]) -> Config:
    """The config of a run from what its config.json holds.

    Options that are younger than the run stand for what was done before them (`config.option`).

    Raises:
      UserError: as for a config that is typed; a name or a key may be of a newer version.
    """
    made = fill_sizes(from_dict(values, of_older_run=True))
    check(made)
    return made


def _checked(config: Config) -> Config:
    check(config)
    paths = {
        f"data__{name}": str(user_path(text, f"config key data.{name}").absolute())
        for name in ("data_dir", "cache_dir", "tokenizer_file")
        if (text := getattr(config.data, name))
    }
    # Absolute, so that a run's config holds in any working folder.
    return replace(config, **paths, model__init=_init(config.model))


def _init(model: ModelConfig) -> str:
    """The name in INITS that a config means."""
    if model.init != PUBLISHED:
        return model.init
    found = placement_of(model).published_init
    if not found:
        raise UserError(
            f"config key model.init={PUBLISHED}: what model.placement={model.placement} was published with is not "
            f"among the initialisations here; write one of {', '.join(INITS)}"
        )
    return found


def check(config: Config) -> None:
    """Raises UserError for the first value that is out of range, unknown, or contradicts another."""
    validate(config)
    _check_names(config)
