"""Python files of this machine, the standard library's or all on sys.path: which they are, their hash, their splits.

Apart from the TFDS builder made of them, so that a start with a token store at hand need not import TFDS to know the
name of its data.
"""

import functools
import hashlib
import os
import sys
import sysconfig
import tokenize
from collections.abc import Callable
from pathlib import Path

from spannorm_jax.errors import UserError

DATASET = "python_source"
VERSION = "1.0.0"  # of the rules below: which files, how they are read, how they are split

Files = list[tuple[str, Path]]  # (posix path relative to its root, file), in the order of the data

_INSTALLED = ("site-packages", "dist-packages")
# Installed packages and tests are no part of the library; caches hold no sources.
# pydoc_data is one generated string of English, which alone would be most of the held-out bytes.
_NOT_LIBRARY = {*_INSTALLED, "__pycache__", "test", "tests", "idle_test", "pydoc_data"}


@functools.cache
def here(kind: str) -> tuple[Files, str]:
    """(files, builder config `<kind>_<hash>`) of this interpreter's `stdlib` or `sys_path`, read once a process.

    Raises:
      UserError: there are no files.
    """
    if kind == "stdlib":
        where = sysconfig.get_path("stdlib")
        files = library_files(Path(where))
    else:
        where = "sys.path"
        files = path_files(path_roots(sys.path))
    if not files:
        raise UserError(
            f"no .py file lies in {where}, so dataset {DATASET!r} cannot be made; set config key data.dataset to "
            "another TFDS text dataset"
        )
    return files, f"{kind}_{content_hash(files)}"


def full_name(kind: str = "stdlib") -> str:
    """TFDS's full name of what `here` is: `python_source/<kind>_<hash>/<version>`."""
    return f"{DATASET}/{here(kind)[1]}/{VERSION}"


def library_files(root: Path) -> Files:
    """The standard library's files, where `root` is its folder."""
    return _below(root, lambda folder: folder.name in _NOT_LIBRARY)


def path_files(roots: list[Path]) -> Files:
    """The files below `roots`, each content once: the first by its path, whatever the order of the roots.

    What lies below an inner root belongs to that; site-packages that are no root are not importable.
    """
    ours = Path(__file__).resolve().parents[1]

    def skip(folder: Path) -> bool:
        return folder.name in ("__pycache__", *_INSTALLED) or folder in roots or folder == ours

    first: dict[str, tuple[str, Path]] = {}
    for found in (found for root in roots for found in _below(root, skip) if os.access(found[1], os.R_OK)):
        digest = hashlib.sha256(found[1].read_bytes()).hexdigest()
        first[digest] = min(first.get(digest, found), found)
    # By contents where paths are equal, since the place of a root on a machine is no property of the data.
    return [found for _, found in sorted(first.items(), key=lambda item: (item[1][0], item[0]))]


def path_roots(entries: list[str]) -> list[Path]:
    """The folders among `entries` of sys.path whose files are data, sorted.

    The working folder, that of the program, and the checkout that this package runs from are left out: they change
    with where one stands and with each edit, and the data would with them.
    """
    program = getattr(sys.modules["__main__"], "__file__", None) or "."
    passing = {Path.cwd().resolve(), Path(program).resolve().parent}
    checkout = Path(__file__).resolve().parents[2]
    library = {Path(sysconfig.get_path(key)).resolve() for key in ("stdlib", "platstdlib")}
    found = set()
    for path in (Path(entry).resolve() for entry in entries):  # "" is the working folder
        ours = path in passing or path.is_relative_to(checkout)
        if path.is_dir() and (not ours or path in library or not {*path.parts}.isdisjoint(_INSTALLED)):
            found.add(path)
    return sorted(found)


def _below(root: Path, skip: Callable[[Path], bool]) -> Files:
    found = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if not skip(Path(folder, name))]
        files = [Path(folder, name) for name in names if name.endswith(".py")]
        found += [(file.relative_to(root).as_posix(), file) for file in files if file.is_file()]
    return sorted(found)


def content_hash(files: Files) -> str:
    """8 hex digits of the sha256 over paths and contents."""
    digest = hashlib.sha256()
    for name, file in files:
        content = file.read_bytes()
        # The lengths keep (path, content) pairs apart in the stream.
        digest.update(f"{len(name.encode())} {len(content)} {name}".encode())
        digest.update(content)
    return digest.hexdigest()[:8]


def read_source(path: Path) -> str | None:
    """A Python file's text, in the encoding it declares; None if it does not decode."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return None


def split_of(path: str) -> str:
    """'validation' for one relative posix path in 16, chosen by its hash, else 'train'."""
    return "validation" if hashlib.sha256(path.encode()).digest()[0] < 16 else "train"
