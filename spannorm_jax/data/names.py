"""Names of datasets as TFDS spells them, read without TFDS, whose import takes its time."""

import re
from dataclasses import dataclass

from spannorm_jax.config import DataConfig
from spannorm_jax.data import stdlib_files, sys_path_files
from spannorm_jax.errors import UserError

_VERSION = r"\d+\.\d+\.\d+"
# A part that looks like a version is one, so that name/1.0.0 has no config.
_NAME = re.compile(
    rf"(?P<base>[A-Za-z_]\w*)(/(?P<config>(?!{_VERSION}\Z)[\w\-+.]+))?([:/](?P<version>{_VERSION}))?", re.ASCII
)
_HASHED = re.compile(r"(stdlib|sys_path)_[0-9a-f]{8}")  # configs of python_source, each of one library


@dataclass(frozen=True)
class Name:
    """A dataset: parts that a user left out are ""."""

    base: str
    config: str
    version: str

    def __str__(self) -> str:
        """As `tfds.builder` takes it."""
        config, version = self.config and f"/{self.config}", self.version and f":{self.version}"
        return self.base + config + version


def parse(text: str, key: str) -> Name:
    """Reads `name`, `name/config`, and both with `:version` or `/version`. Raises UserError that names config `key`."""
    match = _NAME.fullmatch(text)
    if not match:
        raise UserError(f"config key {key}={text!r} is not a TFDS name; write name, name/config or name/config:version")
    return Name(match["base"], match["config"] or "", match["version"] or "")


def asked_for(data: DataConfig) -> tuple[str, str, Name]:
    """(config key, its value, what it names): `data.full_name` if it is set, else `data.dataset`.

    Raises:
      UserError: one of them is no name, or they name different datasets.
    """
    name = parse(data.dataset, "data.dataset")
    if not data.full_name:
        return "data.dataset", data.dataset, name
    exact = parse(data.full_name, "data.full_name")
    if not exact.version:
        raise UserError(
            f"config key data.full_name={data.full_name!r} has no version; write name/version or name/config/version, "
            "or leave it out, and it is filled in"
        )
    if not _may_be(name, exact):
        raise UserError(
            f"config key data.full_name={data.full_name!r} is not what data.dataset={data.dataset!r} names; leave "
            "data.full_name out, and it is filled in"
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
    return parse(data.dataset, "data.dataset").base == stdlib_files.DATASET


def embedded(name: Name) -> str:
    """TFDS's full name of a `python_source`, which tells its contents; "" for anything else.

    Without a hash in `name` it is what lies on this machine, and naming that reads all of it.
    """
    if name.base != stdlib_files.DATASET:
        return ""
    if _HASHED.fullmatch(name.config):
        return f"{name.base}/{name.config}/{name.version or stdlib_files.VERSION}"
    here = {"": stdlib_files, "sys_path": sys_path_files}
    if name.config in here and name.version in ("", stdlib_files.VERSION):
        return here[name.config].full_name()
    return ""


def _may_be(name: Name, exact: Name) -> bool:
    """Whether `name`, of which parts may be missing, can have been opened as `exact`."""
    if name.base == stdlib_files.DATASET and name.config in ("", "sys_path"):
        same_config = exact.config.startswith(f"{name.config or 'stdlib'}_")
    else:
        same_config = name.config in ("", exact.config)
    return name.base == exact.base and same_config and name.version in ("", exact.version)
