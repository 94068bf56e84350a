"""The standard library's Python files: which they are, their hash, their splits.

Apart from the TFDS builder made of them, so that a start with a token store at hand need not
import TFDS to know the name of its data.
"""

import functools
import hashlib
import os
import sysconfig
import tokenize
from pathlib import Path

from spannorm_jax.errors import UserError

DATASET = "python_source"
VERSION = "1.0.0"  # of the rules below: which files, how they are read, how they are split

# Installed packages and tests are no part of the library; caches hold no sources.
# pydoc_data is one generated string of English, which alone would be most of the held-out bytes.
_SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "__pycache__"),
    *("test", "tests", "idle_test", "pydoc_data"),
}


def stdlib_root() -> Path:
    """The folder of this interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def list_files(root: Path) -> list[str]:
    """Returns the posix paths of the .py files below `root`, relative to it, sorted."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in _SKIPPED_FOLDERS]
        here = Path(folder)
        found += [here / f for f in files if f.endswith(".py") and (here / f).is_file()]
    return sorted(path.relative_to(root).as_posix() for path in found)


def read_source(path: Path) -> str | None:
    """Returns a Python file's text, in the encoding it declares; None if it does not decode."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return None


def split_of(path: str) -> str:
    """Returns 'validation' for one relative posix path in 16, chosen by its hash, else 'train'."""
    return "validation" if hashlib.sha256(path.encode()).digest()[0] < 16 else "train"


@functools.cache
def content_hash(root: Path) -> str:
    """Returns 8 hex digits of the sha256 over the paths and contents of all files of `list_files`.

    Raises:
      UserError: there are no files.
    """
    files = list_files(root)
    if not files:
        raise UserError(
            f"the standard library's sources are not in {root}, so dataset {DATASET!r} cannot be "
            "made; set config key data.dataset to another TFDS text dataset"
        )
    digest = hashlib.sha256()
    for name in files:
        content = (root / name).read_bytes()
        # The lengths keep (path, content) pairs apart in the stream.
        digest.update(f"{len(name.encode())} {len(content)} {name}".encode())
        digest.update(content)
    return digest.hexdigest()[:8]


def config_name() -> str:
    """Name of the builder config that holds this interpreter's library, `stdlib_<hash>`."""
    return f"stdlib_{content_hash(stdlib_root())}"


def full_name() -> str:
    """TFDS's full name of the default dataset: `python_source/stdlib_<hash>/<version>`."""
    return f"{DATASET}/{config_name()}/{VERSION}"
