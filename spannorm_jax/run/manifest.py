"""The manifest of a finished checkpoint: a hash of each of its files.

Orbax's rename, or in a bucket its last object, says that a save was complete; the manifest, which appears with it, says
that its bytes are still those that were saved. On a disk the hash is sha256. In a bucket it is what the service keeps
of each object (md5, or an etag), so that nothing is read again; a copy on the other side is read to be compared.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from spannorm_jax.run.bucket import checksums, in_bucket
from spannorm_jax.run.store import write_json

MANIFEST = "manifest.json"
# Orbax writes this file of its own from a thread that may be behind the manifest, and says nothing there of the arrays:
# it need only be whole.
_ORBAX_METADATA, _WHOLE = "_CHECKPOINT_METADATA", "whole"
_ETAG = "etag"  # how a service makes it is its own secret: elsewhere it compares with nothing


def write_manifest(folder: Path) -> None:
    """Writes `folder`/manifest.json, atomically."""
    write_json(folder / MANIFEST, _files(folder, {}))


def fault(folder: Path) -> str | None:
    """What is wrong with the checkpoint in `folder`, naming the file; None if every byte is as it was saved.

    It reads every file once: about a second a GB and core.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return f"{path} is missing"
    try:
        expected = json.loads(path.read_text(encoding="utf-8"))
        found = _files(folder, expected if isinstance(expected, dict) else {})
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


def _files(folder: Path, expected: dict[str, str]) -> dict[str, str]:
    """The hash of each file, of the kind that is expected of it."""
    if in_bucket(folder):
        known = checksums(folder)
        names = [name for name in known if name != MANIFEST]
    else:
        known = {}
        paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
        names = [path.relative_to(folder).as_posix() for path in paths]

    def digest(name: str) -> str:
        wanted, path = expected.get(name, ""), folder / name
        if path.name == _ORBAX_METADATA:
            return _whole(path)
        if name in known and (not wanted or _kind(wanted) == _kind(known[name])):
            return known[name]
        return wanted if _kind(wanted) == _ETAG else _hash(path, _kind(wanted))

    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing leaves Python's lock free
        return dict(zip(names, pool.map(digest, names), strict=True))


def _kind(digest: str) -> str:
    """`md5` or `etag`, which is said before the hash; or sha256."""
    return digest.rpartition(":")[0] or "sha256"


def _whole(path: Path) -> str:
    try:
        return _WHOLE if isinstance(json.loads(path.read_bytes()), dict) else "damaged"
    except ValueError:
        return "damaged"


def _hash(path: Path, kind: str) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, kind).hexdigest()
    return digest if kind == "sha256" else f"{kind}:{digest}"
