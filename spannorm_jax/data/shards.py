"""Parts of a token store, made by independent processes that share its folder, in any order.

Shard i of n (i from 0) of store `NAME` is the folder `.NAME.parts/i-of-n` beside it, a token store of its own. It
appears atomically; a process that was killed leaves no part.
"""

import contextlib
import re
import shutil
import uuid
from pathlib import Path

from spannorm_jax.errors import UserError

Shard = tuple[int, int]  # (i, n): part i of n, i from 0


def parse(text: str) -> Shard:
    """Parses `i/n`. Raises UserError unless 0 <= i < n."""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if not match or not int(match[1]) < int(match[2]):
        raise UserError(f"--shard {text!r} is no part of a whole; write i/n with i from 0 to n - 1, as in 0/4 .. 3/4")
    return int(match[1]), int(match[2])


def folder(store: Path, shard: Shard) -> Path:
    return _parts(store) / f"{shard[0]}-of-{shard[1]}"


def begun(store: Path) -> dict[int, list[int]]:
    """For each n of which a shard is there, the shards that are still missing."""
    made: dict[int, set[int]] = {}
    for path in _parts(store).glob("*-of-*"):
        i, n = map(int, path.name.split("-of-"))
        made.setdefault(n, set()).add(i)
    return {n: sorted(set(range(n)) - there) for n, there in made.items()}


def remove(store: Path) -> None:
    """Removes all parts, once the store itself is there; at once for the eyes of other processes."""
    gone = store.parent / f".incomplete-{uuid.uuid4().hex}"
    with contextlib.suppress(FileNotFoundError):
        _parts(store).rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def refuse(store: Path, left: dict[int, list[int]]) -> None:
    """Raises UserError for a store of which some but not all shards are there (`begun`).

    To make the whole instead would silently take as long as all shards together.
    """
    n = min(left, key=lambda n: len(left[n]) / n)
    some = ", ".join(map(str, left[n][:8])) + (", ..." if len(left[n]) > 8 else "")
    raise UserError(
        f"token store {store} is made in {n} shards of which {len(left[n])} are missing ({some}); run python -m "
        f"spannorm_jax.prepare with --shard i/{n} for each, or delete {_parts(store)} to make it at once"
    )


def _parts(store: Path) -> Path:
    return store.parent / f".{store.name}.parts"
