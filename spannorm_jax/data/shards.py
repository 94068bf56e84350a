"""Parts of a token store, made by independent processes that share its folder, in any order.

Shard i of n (i from 0) of store `NAME` is the folder `.NAME.parts/i-of-n` beside it, with
`tokens.bin` and `part.json`. It appears atomically; a process that was killed leaves no part.
"""

import contextlib
import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from spannorm_jax import durable
from spannorm_jax.errors import UserError

Shard = tuple[int, int]  # (i, n): part i of n, i from 0

_TOKENS = "tokens.bin"
_PART = "part.json"
_READ_AT_ONCE = 1 << 20  # tokens


def parse(text: str) -> Shard:
    """Parses `i/n`. Raises UserError unless 0 <= i < n."""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if not match or not int(match[1]) < int(match[2]):
        raise UserError(f"--shard {text!r} is no part of a whole; write i/n with i from 0 to n - 1, as in 0/4 .. 3/4")
    return int(match[1]), int(match[2])


def write(store: Path, shard: Shard, chunks: Iterator[np.ndarray]) -> None:
    """Writes the tokens of `shard` of the store in folder `store`, unless they are there. Raises UserError."""
    target = _folder(store) / _name(shard)
    if target.is_dir():
        return
    digest, num_bytes = hashlib.sha256(), 0
    with durable.temporary_folder(store.parent, "data.cache_dir") as temp:
        with open(temp / _TOKENS, "wb") as file:
            for tokens in chunks:
                digest.update(tokens.tobytes())
                num_bytes += file.write(tokens.tobytes())
        part = json.dumps({"num_bytes": num_bytes, "sha256": digest.hexdigest()})
        (temp / _PART).write_text(part + "\n", encoding="utf-8")
        durable.publish(temp, target)


def begun(store: Path) -> dict[int, list[int]]:
    """For each n of which a shard is there, the shards that are still missing."""
    made: dict[int, set[int]] = {}
    for path in _folder(store).glob("*-of-*"):
        i, n = map(int, path.name.split("-of-"))
        made.setdefault(n, set()).add(i)
    return {n: sorted(set(range(n)) - there) for n, there in made.items()}


def read_all(store: Path, n: int, dtype: np.dtype) -> Iterator[np.ndarray]:
    """Iterates over the tokens of all n parts in order, [<= 2^20] of `dtype`.

    Raises:
      UserError: a part is damaged. At its end, so that what was read must not be used.
      OSError: a part has gone, since another process has joined them meanwhile.
    """
    for i in range(n):
        part = _folder(store) / _name((i, n))
        try:
            expected = json.loads((part / _PART).read_text(encoding="utf-8"))["sha256"]
        except (ValueError, KeyError) as error:
            raise _damaged(part / _PART, i, n) from error
        digest = hashlib.sha256()
        with open(part / _TOKENS, "rb") as file:
            while data := file.read(_READ_AT_ONCE * dtype.itemsize):
                digest.update(data)
                if len(data) % dtype.itemsize:
                    break  # truncated, which the hash tells
                yield np.frombuffer(data, dtype)
        if digest.hexdigest() != expected:
            raise _damaged(part / _TOKENS, i, n)


def remove(store: Path) -> None:
    """Removes all parts, once the store itself is there; at once for the eyes of other processes."""
    gone = store.parent / f".incomplete-{uuid.uuid4().hex}"
    with contextlib.suppress(FileNotFoundError):
        _folder(store).rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def refuse(store: Path, left: dict[int, list[int]]) -> None:
    """Raises UserError for a store of which some but not all shards are there (`begun`).

    To make the whole instead would silently take as long as all shards together.
    """
    n = min(left, key=lambda n: len(left[n]) / n)
    some = ", ".join(map(str, left[n][:8])) + (", ..." if len(left[n]) > 8 else "")
    raise UserError(
        f"token store {store} is made in {n} shards of which {len(left[n])} are missing ({some}); run python -m "
        f"spannorm_jax.prepare with --shard i/{n} for each, or delete {_folder(store)} to make it at once"
    )


def _damaged(file: Path, i: int, n: int) -> UserError:
    return UserError(f"{file} is damaged; delete {file.parent} and make it again with --shard {i}/{n}")


def _folder(store: Path) -> Path:
    return store.parent / f".{store.name}.parts"


def _name(shard: Shard) -> str:
    return f"{shard[0]}-of-{shard[1]}"
