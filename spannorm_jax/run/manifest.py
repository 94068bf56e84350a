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
# Orbax adds the moment of the commit to this file of its own while it renames the folder; the rest is hashed.
_ORBAX_METADATA, _ADDED_LATER = "_CHECKPOINT_METADATA", "commit_timestamp_nsecs"


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
        if found[name] != expected[name]:
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
            facts = json.loads(path.read_bytes())
            facts.pop(_ADDED_LATER, None)
        except (ValueError, AttributeError):
            return "unreadable"
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
