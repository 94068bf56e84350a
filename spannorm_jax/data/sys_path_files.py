"""The .py files on sys.path, installed packages included: which they are, their hash.

Reading and splitting them is `stdlib_files`' business. Nothing is read before someone asks.
"""

import functools
import hashlib
import os
import sys
import sysconfig
from pathlib import Path

from spannorm_jax.data import stdlib_files
from spannorm_jax.errors import UserError

DATASET = f"{stdlib_files.DATASET}/sys_path"  # as a config names it, without the hash
_INSTALLED = ("site-packages", "dist-packages")


def roots(entries: list[str]) -> list[Path]:
    """Returns the folders among `entries` of sys.path whose files are data, sorted.

    The working folder, that of the program, and the checkout that this package runs from are left
    out: they change with where one stands and with each edit, and the data would with them.
    """
    program = getattr(sys.modules["__main__"], "__file__", None) or "."
    passing = {Path.cwd().resolve(), Path(program).resolve().parent}
    checkout = Path(__file__).resolve().parents[2]
    library = {Path(sysconfig.get_path(key)).resolve() for key in ("stdlib", "platstdlib")}
    found = set()
    for entry in entries:
        path = Path(entry).resolve()  # "" is the working folder
        ours = path in passing or path.is_relative_to(checkout)
        if path.is_dir() and (not ours or path in library or not {*path.parts}.isdisjoint(_INSTALLED)):
            found.add(path)
    return sorted(found)


def list_files(folders: list[Path]) -> list[tuple[str, Path]]:
    """Returns (posix path relative to its root, file) of the .py files below `folders`, sorted.

    Of files with the same contents the first is taken, whatever the order of the folders. What lies
    below an inner root belongs to that; site-packages that are no root are not importable.
    """
    first: dict[str, tuple[str, Path]] = {}
    for root in folders:
        for here, inner, names in os.walk(root):
            inner[:] = [f for f in inner if _descend(Path(here, f), folders)]
            for file in (Path(here, name) for name in names if name.endswith(".py")):
                if file.is_file() and os.access(file, os.R_OK):
                    digest = hashlib.sha256(file.read_bytes()).hexdigest()
                    found = (file.relative_to(root).as_posix(), file)
                    first[digest] = min(first.get(digest, found), found)
    # By contents where paths are equal, since the place of a root on a machine is no property of the data.
    return [found for _, found in sorted(first.items(), key=lambda item: (item[1][0], item[0]))]


def content_hash(files: list[tuple[str, Path]]) -> str:
    """Returns 8 hex digits of the sha256 over paths and contents. Raises UserError if there are none."""
    if not files:
        raise UserError(
            f"no .py file lies on sys.path, so dataset {DATASET!r} cannot be made; set data.dataset to another"
        )
    digest = hashlib.sha256()
    for name, file in files:
        content = file.read_bytes()
        # The lengths keep (path, content) pairs apart in the stream.
        digest.update(f"{len(name.encode())} {len(content)} {name}".encode())
        digest.update(content)
    return digest.hexdigest()[:8]


@functools.cache
def here() -> tuple[list[tuple[str, Path]], str]:
    """(files, builder config `sys_path_<hash>`) of this interpreter, read once a process."""
    files = list_files(roots(sys.path))
    return files, f"sys_path_{content_hash(files)}"


def full_name() -> str:
    """TFDS's full name of this dataset: `python_source/sys_path_<hash>/<version>`."""
    return f"{stdlib_files.DATASET}/{here()[1]}/{stdlib_files.VERSION}"


def _descend(path: Path, folders: list[Path]) -> bool:
    ours = path == Path(__file__).resolve().parents[1]  # this package, where it is installed
    return path.name not in ("__pycache__", *_INSTALLED) and path not in folders and not ours
