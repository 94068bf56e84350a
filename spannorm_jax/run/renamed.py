"""Checkpoints of older versions: read in the form of then, given in that of now."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

# Norms of a block, by name now -> name then. No placement of then had both norms of a pair.
_NORMS = {"before_attn": "attn", "after_attn": "attn", "before_ffn": "ffn", "after_ffn": "ffn"}


@dataclass(frozen=True)
class Names:
    """What a checkpoint calls otherwise: norms of blocks, and the router's bias, which was among the weights."""

    norms: bool
    bias: bool


def _paths(item: Path) -> list[list[str]]:
    """Of each array of an item of a checkpoint: the keys that lead to it."""
    tree = json.loads((item / "_METADATA").read_text(encoding="utf-8"))["tree_metadata"].values()
    return [[key["key"] for key in leaf["key_metadata"]] for leaf in tree]


def item_of(name: str, checkpoint: Path) -> str:
    """What a checkpoint calls an item: the model state was `router` when routers alone had any."""
    return "router" if name == "model_state" and (checkpoint / "router").exists() else name


# ---- weights -----------------------------------------------------------------------------------


def names_of(item: Path) -> Names | None:
    """The names in a checkpoint's parameters; None if they are those of now."""
    paths = _paths(item)
    names = Names(
        norms=any(path[-3:-1] in (["norms", "attn"], ["norms", "ffn"]) for path in paths),
        bias=["moe_blocks", "ffn", "bias"] in paths,
    )
    return names if names.norms or names.bias else None


def to_old_names(tree: Any, names: Names, within: str = "") -> Any:
    """A pytree of dicts and tuples with its weights as they were called, and those that have gone from there."""
    if not isinstance(tree, dict):
        return _map_tuple(lambda node: to_old_names(node, names), tree)
    old = {_old(name, names, within): to_old_names(node, names, name) for name, node in tree.items()}
    return old | {"bias": _bias_beside(tree["router"])} if names.bias and _is_moe(tree) else old


def to_new_names(tree: Any, like: Any, names: Names, within: str = "") -> Any:
    """The inverse: what `to_old_names(like)` is the shape of, under the names of `like`."""
    if not isinstance(like, dict):
        return _map_tuple(lambda node, other: to_new_names(node, other, names), tree, like)
    return {name: to_new_names(tree[_old(name, names, within)], node, names, name) for name, node in like.items()}


def model_state_of(old_params: Any) -> Any:
    """The router's bias that stood among the weights."""
    return {"moe_blocks": {"ffn": {"bias": old_params["moe_blocks"]["ffn"]["bias"]}}}


def _old(name: str, names: Names, within: str) -> str:
    return _NORMS.get(name, name) if names.norms and within == "norms" else name


def _is_moe(tree: dict[str, Any]) -> bool:
    return {"router", "in_", "out"} <= set(tree)


def _bias_beside(router: Any) -> Any:
    """The bias (L, E) that stood beside a router's weight (L, D, E), replicated."""
    where = router.sharding
    if isinstance(where, NamedSharding):
        where = NamedSharding(where.mesh, PartitionSpec())
    return jax.ShapeDtypeStruct((router.shape[0], router.shape[2]), router.dtype, sharding=where)


def _map_tuple(fn: Any, tree: Any, *rest: Any) -> Any:
    if not isinstance(tree, tuple):
        return tree
    nodes = [fn(*nodes) for nodes in zip(tree, *rest, strict=True)]
    return type(tree)(*nodes) if hasattr(tree, "_fields") else tuple(nodes)


# ---- the optimiser's state ---------------------------------------------------------------------


def lacks_clipping(opt_state: Path) -> bool:
    """Whether an optimiser's state was saved without clipping: AdamW's stood alone then, and now comes after it."""
    return ["0", "count"] in _paths(opt_state)
