"""The manifest of a finished checkpoint: the sha256 of each of its files.

Orbax's rename says that a save was complete; the manifest, which appears with it, says that its bytes are still those
that were saved.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from spannorm_jax.durable import write_json

MANIFEST = "manifest.json"
# Orbax writes this file of its own from a thread that may be behind the manifest, and says nothing there of the arrays:
# it need only be whole.
_ORBAX_METADATA, _WHOLE = "_CHECKPOINT_METADATA", "whole"


def write_manifest(folder: Path) -> None:
    """Writes `folder`/manifest.json, atomically."""
    write_json(folder / MANIFEST, _files(folder))


def fault(folder: Path) -> str | None:
    """What is wrong with the checkpoint in `folder`, naming the file; None if every byte is as it was saved.

    It reads every file once: about a second a GB and core.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return f"{path} is missing"
    try:
        expected = json.loads(path.read_text(encoding="utf-8"))
        found = _files(folder)
    except (OSError, ValueError) as error:
        return f"{path} cannot be checked ({error})"
    if not isinstance(expected, dict) or not expected:
        return f"{path} is damaged: it holds no list of files"
    for name in expected:  # Orbax adds an empty mark of the commit to a folder later, which is not there
        if name not in found:
            return f"{folder / name} is missing"
        if found[name] not in (expected[name], _WHOLE):
            return f"{folder / name} is damaged: its hash is not that in {MANIFEST}"
    return None


def _files(folder: Path) -> dict[str, str]:
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing leaves Python's lock free
        hashes = pool.map(_sha256, paths)
        return {path.relative_to(folder).as_posix(): digest for path, digest in zip(paths, hashes, strict=True)}


def _sha256(path: Path) -> str:
    if path.name == _ORBAX_METADATA:
        try:
            return _WHOLE if isinstance(json.loads(path.read_bytes()), dict) else "damaged"
        except ValueError:
            return "damaged"
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
