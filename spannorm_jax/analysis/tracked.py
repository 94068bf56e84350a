"""Arrays that a placement's own equation is run on, to see what it adds to what."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax import Array

from spannorm_jax.model.block import Block
from spannorm_jax.model.layers import Norms
from spannorm_jax.model.placement import PLACEMENTS


@dataclass(frozen=True)
class Addition:
    """A sum of a block: the output of a branch, after norms and gains that follow it, and what it is added to."""

    skip: Array
    added: Array


class Tracked:
    """An array that knows which branch's output it is, if it is one: "attn", "ffn" or "".

    Norms, gains and factors leave it that; a sum ends it, and is noted in `additions` if it is its
    branch's first.
    """

    def __init__(self, value: Array, additions: dict[str, Addition], branch: str = ""):
        self.value, self.additions, self.branch = value, additions, branch
        self.dtype, self.shape = value.dtype, value.shape

    def _with(self, value: Array) -> "Tracked":
        return Tracked(value, self.additions, self.branch)

    def __add__(self, other: "Tracked") -> "Tracked":
        if self.branch and not other.branch:
            self, other = other, self
        if other.branch and not self.branch:
            self.additions.setdefault(other.branch, Addition(self.value, other.value))
        return Tracked(self.value + other.value, self.additions)

    def __mul__(self, factor: Any) -> "Tracked":
        return self._with(self.value * factor)

    def __truediv__(self, factor: Any) -> "Tracked":
        return self._with(self.value / factor)

    __rmul__ = __mul__


class _Norms:
    """A block's norms and gains, on tracked arrays."""

    def __init__(self, norms: Norms):
        self._norms = norms

    def __getattr__(self, name: str) -> Callable[[Tracked], Tracked]:
        norm = getattr(self._norms, name)
        return lambda x: x._with(norm(x.value))


def run_block(
    block: Block, stream: Any, layer: Any, attn: Callable[[Array], Array], ffn: Callable[[Array], Array]
) -> tuple[Any, dict[str, Addition]]:
    """The stream after the block, whose sub-layers are `attn` and `ffn`, and the first addition of each branch."""
    additions: dict[str, Addition] = {}

    def branch(name: str, sub_layer: Callable[[Array], Array]) -> Callable[[Tracked], Tracked]:
        return lambda x: Tracked(sub_layer(x.value), additions, name)

    out = PLACEMENTS[block.placement].block(
        jax.tree.map(lambda x: Tracked(x, additions), stream),
        branch("attn", attn),
        branch("ffn", ffn),
        _Norms(block.norms),
        layer,
        block.depth,
    )
    return jax.tree.map(lambda x: x.value, out), additions
