"""Names of datasets as TFDS spells them, read without TFDS, whose import takes its time."""

import re
from typing import NamedTuple

from spannorm_jax.config import DataConfig
from spannorm_jax.data import python_files
from spannorm_jax.errors import UserError

_VERSION = r"\d+\.\d+\.\d+"
# A part that looks like a version is one, so that name/1.0.0 has no config.
_NAME = re.compile(rf"([A-Za-z_]\w*)(?:/((?!{_VERSION}\Z)[\w\-+.]+))?(?:[:/]({_VERSION}))?", re.ASCII)
_HASHED = re.compile(r"(stdlib|sys_path)_[0-9a-f]{8}")  # configs of python_source, each of one library
_KINDS = {"": "stdlib", "sys_path": "sys_path"}  # of python_source as it is asked for: what lies here


def split_key(data: DataConfig, split: str) -> str:
    """The config key that names a split."""
    return "data.eval_split" if split == data.eval_split else "data.train_split"


class Name(NamedTuple):
    """A dataset: parts that a user left out are ""."""

    base: str
    config: str
    version: str

    def __str__(self) -> str:
        """As `tfds.builder` takes it."""
        return self.base + (self.config and f"/{self.config}") + (self.version and f":{self.version}")


def parse(text: str, key: str) -> Name:
    """Reads `name`, `name/config`, and both with `:version` or `/version`. Raises UserError that names config `key`."""
    match = _NAME.fullmatch(text)
    if not match:
        raise UserError(f"config key {key}={text!r} is not a TFDS name; write name, name/config or name/config:version")
    return Name(*match.groups(default=""))


def asked_for(data: DataConfig) -> tuple[str, str, Name]:
    """(config key, its value, what it names): `data.full_name` if it is set, else `data.dataset`.

    Raises:
      UserError: one of them is no name, or they name different datasets.
    """
    name = parse(data.dataset, "data.dataset")
    if not data.full_name:
        return "data.dataset", data.dataset, name
    exact = parse(data.full_name, "data.full_name")
    if not exact.version or not _may_be(name, exact):
        raise UserError(
            f"config key data.full_name={data.full_name!r} is no name, with its version, of data.dataset="
            f"{data.dataset!r}; leave data.full_name out, and it is filled in"
        )
    return "data.full_name", data.full_name, exact


def goes_on(data: DataConfig, old: DataConfig) -> bool:
    """Whether `data` leaves open what `old` was opened as, and names the same dataset in whatever spelling."""
    if data.full_name or not old.full_name:
        return False
    name, before = parse(data.dataset, "data.dataset"), parse(old.dataset, "data.dataset")
    exact = parse(old.full_name, "data.full_name")
    return name.config in (before.config, exact.config) and _may_be(name, exact)


def made_here(data: DataConfig) -> bool:
    """Whether it is a `python_source`, which is named by what lies on the machine."""
    return parse(data.dataset, "data.dataset").base == python_files.DATASET


def embedded(data: DataConfig) -> str:
    """TFDS's full name of a `python_source`, which tells its contents; "" for anything else.

    Without a hash in its name it is what lies on this machine, and naming that reads all of it.
    """
    key, asked, name = asked_for(data)
    if name.base != python_files.DATASET:
        return ""
    if _HASHED.fullmatch(name.config):
        return f"{name.base}/{name.config}/{name.version or python_files.VERSION}"
    if name.config in _KINDS and name.version in ("", python_files.VERSION):
        return python_files.full_name(_KINDS[name.config])
    raise UserError(
        f"config key {key}={asked!r} is no {name.base}; write {name.base}, {name.base}/sys_path, or the full name that "
        "a run recorded"
    )


def _may_be(name: Name, exact: Name) -> bool:
    """Whether `name`, of which parts may be missing, can have been opened as `exact`."""
    if name.base == python_files.DATASET and name.config in _KINDS:
        same_config = exact.config.startswith(f"{_KINDS[name.config]}_")
    else:
        same_config = name.config in ("", exact.config)
    return name.base == exact.base and same_config and name.version in ("", exact.version)
