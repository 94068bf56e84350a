"""The array store (OCDBT) inside a checkpoint's item: joined from its parts, and asked for every array.

Each process writes its arrays into a part of its own, `ocdbt.process_<i>`; a last step joins the parts. Orbax 0.12.8
lists them by a pattern that holds the whole path, finds none where a folder's name has one of `[]*?`, and leaves a
store without arrays behind, with a warning alone. So nothing is taken for granted here.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import tensorstore as ts

from spannorm_jax.run import objects

PART = "ocdbt.process_"
_TREE, _MANIFEST = "_METADATA", "manifest.ocdbt"


def _open(folder: Path, context: ts.Context) -> ts.KvStore:
    base = objects.base(folder)
    return ts.KvStore.open({"driver": "ocdbt", "base": base}, context=context).result()


def items(checkpoint: Path) -> list[Path]:
    """The items of a checkpoint that hold arrays, by name."""
    return sorted(path.parent for path in checkpoint.glob(f"*/{_TREE}"))


def join_parts(checkpoint: Path) -> None:
    """Joins the parts of each item that nobody has joined. The parts stay: the joined store refers to their data."""
    for item in items(checkpoint):
        parts = sorted(path for path in item.iterdir() if path.name.startswith(PART))
        if not parts or (item / _MANIFEST).exists():
            continue
        context = ts.Context()  # one for all: copies are refused between stores of unlike contexts
        transaction = ts.Transaction(atomic=True)
        whole = _open(item, context).with_transaction(transaction)
        for part in parts:
            _open(part, context).experimental_copy_range_to(whole).result()
        transaction.commit_async().result()


def incomplete(checkpoint: Path) -> str | None:
    """What a checkpoint lacks, naming the item and the array; None if every array is there, chunk by chunk."""
    found = items(checkpoint)
    if not found:
        return f"{checkpoint} holds no arrays"
    for item in found:
        try:
            lacking = next(_lacking(item), None)
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"{item} cannot be read ({error})"
        if lacking:
            return f"{item} is not whole: {lacking}"
    return None


def _lacking(item: Path) -> Iterator[str]:
    tree = json.loads((item / _TREE).read_text(encoding="utf-8"))["tree_metadata"].values()
    arrays = [
        ".".join(str(key["key"]) for key in leaf["key_metadata"])
        for leaf in tree
        if not leaf["value_metadata"]["skip_deserialize"]
    ]
    if not arrays:
        return
    if not (item / _MANIFEST).exists():
        yield "its parts were never joined"
        return
    store = _open(item, ts.Context())
    chunks: dict[str, int] = {}
    for key in store.list().result():
        name, _, chunk = key.decode().rpartition("/")
        chunks[name] = chunks.get(name, 0) + (chunk != ".zarray")
    reads = {name: store.read(f"{name}/.zarray") for name in arrays}
    for name in arrays:
        described = reads[name].result()
        if described.state != "value":
            yield f"array {name} is missing"
            continue
        facts = json.loads(described.value)
        wanted = math.prod(-(-n // chunk) for n, chunk in zip(facts["shape"], facts["chunks"], strict=True))
        if chunks[name] != wanted:
            yield f"array {name} has {chunks[name]} of {wanted} chunks"
