"""Folders and files as users name them, and the places that a home directory gives where they name none."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spannorm_jax.errors import UserError

NO_UTF8 = "has a name that is no UTF-8 here; rename it, or set PYTHONUTF8=1 where the locale has another encoding"


def user_path(text: str | os.PathLike[str], what: str = "") -> Path:
    """The path that a user means: `~` stands for a home directory.

    Args:
      text: as it was typed.
      what: the flag or config key that it belongs to, for the error line.

    Raises:
      UserError: it is an address such as gs://bucket/x, there is no such home directory, or the name cannot be the
        same for Python and for the libraries in C++, which take UTF-8, or no system has such a path.
    """
    shown = f"{what} {os.fspath(text)!r}".strip()
    if is_address(text):
        raise UserError(
            f"{shown} is an address, and only folders are read and written here (runs may be in a bucket, all else is "
            "on a disk); mount the bucket or share, and give the folder that it is mounted at"
        )
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{shown} names a home directory that is not known here; write the whole path") from error
    if not is_utf8(path):
        raise UserError(f"{shown} {NO_UTF8}")
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass  # it may be made, and whoever makes it says why it cannot be
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{shown} cannot be a path ({reason}); write another") from error
    return path


def is_address(text: str | os.PathLike[str]) -> bool:
    """Whether it is one such as gs://bucket/x, and no path."""
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(text)))


def is_utf8(path: Path) -> bool:
    """Whether the name is the same for Python and for the libraries in C++ and files, which take UTF-8."""
    try:
        return os.fsencode(path.absolute()) == str(path.absolute()).encode("utf-8")
    except UnicodeEncodeError:
        return False


@contextmanager
def some_home() -> Iterator[None]:
    """Within it a library that wants a home directory when it is imported finds a name, where there is none."""
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = "/nonexistent"
        try:
            yield
        finally:
            del os.environ["HOME"]
    else:
        yield


def below_home(name: str, remedy: str) -> Path:
    """`~/name`. Raises UserError with the remedy if there is no home directory, as for a user id without a name."""
    try:
        return Path.home() / name
    except RuntimeError as error:
        raise UserError(f"there is no home directory for ~/{name} (HOME is not set); {remedy}") from error


def cache_home(remedy: str) -> Path:
    """`$XDG_CACHE_HOME`, or `~/.cache`. Raises UserError with the remedy if there is neither."""
    base = os.environ.get("XDG_CACHE_HOME")
    return user_path(base, "XDG_CACHE_HOME") if base else below_home(".cache", remedy)
