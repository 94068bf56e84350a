"""Norm placements: each is one value, and its block reads like the equation in the paper.

Notation: x is the residual stream (B, T, D); `attn` and `ffn` are the sub-layers as callables
(B, T, D) -> (B, T, D), dense or MoE; `n` holds a placement's norms, and its gains without a norm, as
attributes of the block. The stream may be any pytree, and a block sees its index `layer` (from 0, a
number of Python or a traced one) and the model's config `cfg`.

Here are PreNorm and PostNorm (Xiong et al. 2020, arXiv 2002.04745, figure 1) and SpanNorm (Wang et al.
2026, arXiv 2601.22580); `rivals.py` declares the others.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from spannorm_jax.config import ModelConfig

Stream = Any  # a pytree of arrays
SubLayer = Callable[[Any], Any]
Block = Callable[[Stream, SubLayer, SubLayer, Any, Any, ModelConfig], Stream]

# What may be normed inside sub-layers, by an RMSNorm -> the output projection whose input then has a fixed variance.
# A head's q, k or v has one gain for all heads; `heads` are all together, before their projection.
INNER_NORMS = {"q": None, "k": None, "v": "attn_out", "heads": "attn_out", "hidden": "ffn_out"}


def _same(stream: Stream, n: Any) -> Stream:
    return stream


def final(x: Any, n: Any) -> Any:
    """A norm before the head."""
    return n.final(x)


@dataclass(frozen=True)
class Placement:
    """Where the norms of a Transformer stand."""

    name: str  # the config's spelling
    title: str  # the name in words
    block: Block  # (stream, attn, ffn, the block's norms and gains, layer, cfg) -> stream
    block_norms: tuple[str, ...] = ()  # names of the norms that every block owns
    end_norms: tuple[str, ...] = ()  # names of the norms outside the blocks
    enter: Callable[[Any, Any], Stream] = _same  # (embeddings x, end norms) -> stream
    leave: Callable[[Stream, Any], Any] = _same  # (stream, end norms) -> what the head reads, (B, T, D)
    # Branch (`attn`, `ffn`) that is added to the stream -> what sets its size: the site of an output projection, or one
    # of block_norms or block_gains. ScaleInit damps that, and counts len(additions) * depth residual additions.
    additions: dict[str, str] = field(default_factory=lambda: {"attn": "attn_out", "ffn": "ffn_out"})
    inner_norms: tuple[str, ...] = ()  # what is normed inside sub-layers, of INNER_NORMS
    # Gains of size D without a norm that every block owns -> their start.
    block_gains: dict[str, Callable[[ModelConfig], float]] = field(default_factory=dict)
    scalar_gains: tuple[str, ...] = ()  # those of block_gains that are one number instead of D
    published_init: str = ""  # what it was published with, a key of model.initialisation.INITS, if that is one
    not_with: dict[str, str] = field(default_factory=dict)  # initialisation that its authors advise against -> why
    least_depth: int = 1  # the fewest blocks that its equation is defined for


PLACEMENTS: dict[str, Placement] = {}  # by name, in the order of their declarations: tables and figures follow it


def declare(name: str, title: str, like: Placement | None = None, **own: Any) -> Callable[[Block], Placement]:
    """Decorates a block: makes its placement, and enters that in PLACEMENTS. What `own` leaves out is as in `like`,
    but for what its authors say of initialisations.
    """

    def made(block: Block) -> Placement:
        if name in PLACEMENTS or not set(own.get("inner_norms", ())) <= set(INNER_NORMS):
            raise ValueError(f"placement {name!r}: its name stands already, or an inner norm is not in INNER_NORMS")
        own.update(name=name, title=title, block=block)
        authors: dict[str, Any] = {"published_init": "", "not_with": {}}  # which nobody has for being alike
        PLACEMENTS[name] = replace(like, **authors | own) if like else Placement(**own)
        return PLACEMENTS[name]

    return made


@declare(
    "pre",
    "PreNorm",
    block_norms=("before_attn", "before_ffn"),
    end_norms=("final",),
    leave=final,
    published_init="gpt2",
)
def pre(x, attn, ffn, n, layer, cfg):
    y = x + attn(n.before_attn(x))
    return y + ffn(n.before_ffn(y))


@declare("post", "PostNorm", block_norms=("after_attn", "after_ffn"), published_init="xavier")
def post(x, attn, ffn, n, layer, cfg):
    y = n.after_attn(x + attn(x))
    return n.after_ffn(y + ffn(y))


# SpanNorm norms the embeddings once, before the first block. Readers of the paper disagree on whether block 1's
# skip carries the normed embeddings or the raw ones. `span` takes the first reading, which lets every block be the
# same function; `span_raw` is the second, as a stream of two (skip, attention input) that agree from block 2 on.
@declare(
    "span",
    "SpanNorm",
    like=post,
    end_norms=("entry",),
    enter=lambda x, n: n.entry(x),
    additions={"ffn": "ffn_out"},
    published_init="scale",
)
def span(x, attn, ffn, n, layer, cfg):
    y = n.after_attn(x + attn(x))
    return n.after_ffn(x + ffn(y))  # the second skip spans the block: it starts at x, not at y


@declare(
    "span_raw",
    "SpanNorm, raw skip",
    like=span,
    enter=lambda x, n: (x, n.entry(x)),
    leave=lambda stream, n: stream[0],
    published_init="scale",
)
def span_raw(stream, attn, ffn, n, layer, cfg):
    x, x_attn = stream
    y = n.after_attn(x + attn(x_attn))
    x = n.after_ffn(x + ffn(y))
    return x, x


def placement_of(cfg: ModelConfig) -> Placement:
    """The placement of a model."""
    return PLACEMENTS[cfg.placement]


EVERY_GAIN = "all"  # in optim.decay_gains


def gain_sites(cfg: ModelConfig) -> tuple[str, ...]:
    """Sites of a model's gains, of its norms and without one."""
    placement = placement_of(cfg)
    inner = [f"{name}_norm" for name in inner_norms(cfg) if name != "hidden"]
    hidden = [f"{part}_hidden_norm" for part in ("ffn", "expert", "shared") if "hidden" in inner_norms(cfg)]
    return (*placement.block_norms, *placement.block_gains, *placement.end_norms, *inner, *hidden)


def inner_norms(cfg: ModelConfig) -> tuple[str, ...]:
    """What is normed inside a model's sub-layers: what the placement asks for, and q and k with `qk_norm`."""
    wanted = {*placement_of(cfg).inner_norms, *(("q", "k") if cfg.qk_norm else ())}
    return tuple(name for name in INNER_NORMS if name in wanted)


def has_normed_input(cfg: ModelConfig, projection: str) -> bool:
    """Whether an inner norm fixes the variance of what an output projection (`attn_out`, `ffn_out`) reads."""
    return projection in (INNER_NORMS[name] for name in inner_norms(cfg))
