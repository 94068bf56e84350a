"""Arrays that a placement's own equation is run on, to see what it adds to what."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import jax
from jax import Array

from spannorm_jax.model.block import Block
from spannorm_jax.model.layers import Norms


@dataclass(frozen=True)
class Addition:
    """A sum of a block: the output of a branch, after what follows it, and what it is added to."""

    skip: Array
    added: Array


class _Notes:
    """The first addition of each branch."""

    def __init__(self) -> None:
        self.additions: dict[str, Addition] = {}


@partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=["notes", "branch"])
@dataclass(frozen=True, eq=False)
class Tracked:
    """An array that knows which branch's output it is, if it is one: "attn", "ffn" or "".

    Norms, gains and factors leave it that; a sum ends it, and is noted if it is its branch's first.
    """

    value: Array
    notes: _Notes
    branch: str = ""

    @property
    def dtype(self) -> Any:
        return self.value.dtype

    def __add__(self, other: "Tracked") -> "Tracked":
        skip, branch = (other, self) if self.branch else (self, other)
        if branch.branch and not skip.branch:
            self.notes.additions.setdefault(branch.branch, Addition(skip.value, branch.value))
        return Tracked(self.value + other.value, self.notes)

    def __mul__(self, factor: Any) -> "Tracked":
        return replace(self, value=self.value * factor)

    __rmul__ = __mul__

    def __truediv__(self, factor: Any) -> "Tracked":
        return replace(self, value=self.value / factor)


class _Norms:
    """A block's norms and gains, on tracked arrays."""

    def __init__(self, norms: Norms):
        self._norms = norms

    def __getattr__(self, name: str) -> Callable[[Tracked], Tracked]:
        norm = getattr(self._norms, name)
        return lambda x: replace(x, value=norm(x.value))


def run_block(
    block: Block, stream: Any, layer: Any, attn: Callable[[Array], Array], ffn: Callable[[Array], Array]
) -> tuple[Any, dict[str, Addition]]:
    """The stream after the block, whose sub-layers are `attn` and `ffn`, and the first addition of each branch."""
    notes = _Notes()

    def branch(name: str, sub_layer: Callable[[Array], Array]) -> Callable[[Tracked], Tracked]:
        return lambda x: Tracked(sub_layer(x.value), notes, name)

    of_ffn = branch("ffn", ffn)
    # The block's own way through its placement, with norms that take tracked arrays.
    on_tracked = cast(Block, SimpleNamespace(cfg=block.cfg, norms=_Norms(block.norms)))
    tracked = jax.tree.map(lambda x: Tracked(x, notes), stream)
    out, _ = Block.__call__(
        on_tracked, tracked, layer, cast(Any, branch("attn", attn)), cast(Any, lambda x: (of_ffn(x), None))
    )
    return jax.tree.map(lambda x: x.value, out, is_leaf=lambda x: isinstance(x, Tracked)), notes.additions
