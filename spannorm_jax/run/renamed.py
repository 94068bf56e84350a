"""What had another name or place when a checkpoint was saved: read as it was then, given as it is now."""

import json
from pathlib import Path
from typing import Any

# Norms of a block, by name now -> name then. No placement of then had both norms of a pair.
_NORMS = {"before_attn": "attn", "after_attn": "attn", "before_ffn": "ffn", "after_ffn": "ffn"}


def _paths(item: Path) -> list[list[str]]:
    """Of each array of an item of a checkpoint: the keys that lead to it."""
    tree = json.loads((item / "_METADATA").read_text(encoding="utf-8"))["tree_metadata"].values()
    return [[key["key"] for key in leaf["key_metadata"]] for leaf in tree]


# ---- norms -------------------------------------------------------------------------------------


def has_old_names(item: Path) -> bool:
    """Whether an item of a checkpoint was saved under the names of then."""
    return any(path[-3:-1] in (["norms", "attn"], ["norms", "ffn"]) for path in _paths(item))


def to_old_names(tree: Any, within_norms: bool = False) -> Any:
    """A pytree of dicts and tuples with its norms under the names of then."""
    if isinstance(tree, dict):
        old = _NORMS if within_norms else {}
        return {old.get(name, name): to_old_names(node, name == "norms") for name, node in tree.items()}
    return _map_tuple(to_old_names, tree)


def to_new_names(tree: Any, like: Any) -> Any:
    """The inverse: what `to_old_names(like)` is the shape of, under the names of `like`."""
    if isinstance(like, dict):
        names = dict(zip(like, to_old_names({"norms": like})["norms"] if _is_norms(like) else like, strict=True))
        return {name: to_new_names(tree[names[name]], node) for name, node in like.items()}
    return _map_tuple(to_new_names, tree, like)


def _is_norms(tree: dict[str, Any]) -> bool:
    return bool(tree) and set(tree) <= set(_NORMS)


def _map_tuple(fn: Any, tree: Any, *rest: Any) -> Any:
    if not isinstance(tree, tuple):
        return tree
    nodes = [fn(*nodes) for nodes in zip(tree, *rest, strict=True)]
    return type(tree)(*nodes) if hasattr(tree, "_fields") else tuple(nodes)


# ---- the optimiser's state ---------------------------------------------------------------------


def lacks_clipping(opt_state: Path) -> bool:
    """Whether an optimiser's state was saved without clipping: AdamW's stood alone then, and now comes after it."""
    return ["0", "count"] in _paths(opt_state)
