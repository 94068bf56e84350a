"""Norm placements: each is one value, and its `block` reads like the equation in the paper.

Notation: x is the residual stream (B, T, D); `attn` and `ffn` are the sub-layers as callables
(B, T, D) -> (B, T, D), dense or MoE; `n` holds a placement's norms, and its gains without a norm, as
attributes of the block. The stream may be any pytree, and a block sees its index `layer` (from 0, a
number of Python or a traced one) and the `depth`.

Sources: PreNorm and PostNorm, Xiong et al. 2020 (arXiv 2002.04745, figure 1); SpanNorm, Wang et al. 2026
(arXiv 2601.22580); the others at their equations.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from spannorm_jax.config import ModelConfig

Stream = Any  # a pytree of arrays
SubLayer = Callable[[Any], Any]


@dataclass(frozen=True)
class Placement:
    """Where the norms of a Transformer stand.

    Attributes:
      name: the config's spelling.
      block_norms: names of the norms that every block owns.
      end_norms: names of the norms outside the blocks.
      enter: (embeddings x, end norms) -> stream.
      block: (stream, attn, ffn, the block's norms and gains, layer, depth) -> stream.
      leave: (stream, end norms) -> what the head reads, (B, T, D).
      additions: branch (`attn`, `ffn`) that is added to the stream -> what sets its size: the site of
        an output projection, or one of block_norms or block_gains. ScaleInit damps that, and counts
        len(additions) * depth residual additions.
      inner_norms: what is normed inside sub-layers (RMSNorm): a head's `q`, `k` or `v` (one gain for
        all heads), all `heads` together before their projection, the `hidden` units of a
        feed-forward before theirs.
      block_gains: gains of size D without a norm that every block owns -> their start, from the depth.
      published_init: the initialisation that it was published with, if that is a key of
        model.initialisation.INITS, else ""; `model.init=published` stands for it.
    """

    name: str
    block_norms: tuple[str, ...]
    end_norms: tuple[str, ...]
    enter: Callable[[Any, Any], Stream]
    block: Callable[[Stream, SubLayer, SubLayer, Any, Any, int], Stream]
    leave: Callable[[Stream, Any], Any]
    additions: dict[str, str]
    inner_norms: tuple[str, ...] = ()
    block_gains: dict[str, Callable[[int], float]] = field(default_factory=dict)
    published_init: str = ""


def _same(stream: Stream, n: Any) -> Stream:
    return stream


def _final(x: Any, n: Any) -> Any:
    return n.final(x)


def _pre_block(x, attn, ffn, n, layer, depth):
    y = x + attn(n.before_attn(x))
    return y + ffn(n.before_ffn(y))


_PRE = Placement(
    name="pre",
    block_norms=("before_attn", "before_ffn"),
    end_norms=("final",),
    enter=_same,
    block=_pre_block,
    leave=_final,
    additions={"attn": "attn_out", "ffn": "ffn_out"},
    published_init="gpt2",
)


def _post_block(x, attn, ffn, n, layer, depth):
    y = n.after_attn(x + attn(x))
    return n.after_ffn(y + ffn(y))


_POST = Placement(
    name="post",
    block_norms=("after_attn", "after_ffn"),
    end_norms=(),
    enter=_same,
    block=_post_block,
    leave=_same,
    additions={"attn": "attn_out", "ffn": "ffn_out"},
)


def _span_block(x, attn, ffn, n, layer, depth):
    y = n.after_attn(x + attn(x))
    return n.after_ffn(x + ffn(y))  # the second skip spans the block: it starts at x, not at y


# SpanNorm norms the embeddings once, before the first block. Readers of the paper disagree on whether block 1's
# skip carries the normed embeddings or the raw ones. `span` takes the first reading, which lets every block be the
# same function; `span_raw` is the second, as a stream of two (skip, attention input) that agree from block 2 on.
_SPAN = Placement(
    name="span",
    block_norms=("after_attn", "after_ffn"),
    end_norms=("entry",),
    enter=lambda x, n: n.entry(x),
    block=_span_block,
    leave=_same,
    additions={"ffn": "ffn_out"},
    published_init="scale",
)


def _span_raw_block(stream, attn, ffn, n, layer, depth):
    x, x_attn = stream
    y = n.after_attn(x + attn(x_attn))
    x = n.after_ffn(x + ffn(y))
    return x, x


_SPAN_RAW = Placement(
    name="span_raw",
    block_norms=("after_attn", "after_ffn"),
    end_norms=("entry",),
    enter=lambda x, n: (x, n.entry(x)),
    block=_span_raw_block,
    leave=lambda stream, n: stream[0],
    additions={"ffn": "ffn_out"},
    published_init="scale",
)


# ---- rivals -----------------------------------------------------------------------------------------


def _peri_block(x, attn, ffn, n, layer, depth):
    y = x + n.after_attn(attn(n.before_attn(x)))
    return y + n.after_ffn(ffn(n.before_ffn(y)))


# Peri-LN (Kim et al. 2025, arXiv 2502.02732), Gemma 2's sandwich. A branch's size is its norm's gain, whatever its
# weights are.
_PERI = Placement(
    name="peri",
    block_norms=("before_attn", "after_attn", "before_ffn", "after_ffn"),
    end_norms=("final",),
    enter=_same,
    block=_peri_block,
    leave=_final,
    additions={"attn": "after_attn", "ffn": "after_ffn"},
)


def _hybrid_block(x, attn, ffn, n, layer, depth):
    z = n.after_attn(x + attn(x))
    return z + ffn(z)


# HybridNorm (Zhuo et al. 2025, arXiv 2503.04598): queries, keys and values are normed, and the sum after attention.
_HYBRID = Placement(
    name="hybrid",
    block_norms=("after_attn",),
    end_norms=(),
    enter=_same,
    block=_hybrid_block,
    leave=_same,
    additions={"attn": "attn_out", "ffn": "ffn_out"},
    inner_norms=("q", "k", "v"),
)


def _layerscale_block(x, attn, ffn, n, layer, depth):
    y = x + n.scale_attn(attn(n.before_attn(x)))
    return y + n.scale_ffn(ffn(n.before_ffn(y)))


def _layerscale_start(depth: int) -> float:
    return 0.1 if depth <= 18 else 1e-5 if depth <= 24 else 1e-6


# LayerScale (Touvron et al. 2021, arXiv 2103.17239, section 2): PreNorm, each branch times a learnt gain.
_LAYERSCALE = Placement(
    name="layerscale",
    block_norms=("before_attn", "before_ffn"),
    end_norms=("final",),
    enter=_same,
    block=_layerscale_block,
    leave=_final,
    additions={"attn": "scale_attn", "ffn": "scale_ffn"},
    block_gains={"scale_attn": _layerscale_start, "scale_ffn": _layerscale_start},
)


def _siamese_block(stream, attn, ffn, n, layer, depth):
    x, y = stream
    damping = _like((2 * (layer + 1)) ** -0.5, x)
    branch = attn(n.before_attn(x + n.side_attn(y)))
    x, y = n.after_attn(x + branch * damping), y + branch
    branch = ffn(n.before_ffn(x + n.side_ffn(y)))
    return n.after_ffn(x + branch * damping), y + branch


# SiameseNorm (arXiv 2602.08064): a stream that is normed beside one that is not; the divisor is that of its code.
_SIAMESE = Placement(
    name="siamese",
    block_norms=("side_attn", "before_attn", "after_attn", "side_ffn", "before_ffn", "after_ffn"),
    end_norms=("final",),
    enter=lambda x, n: (x, x),
    block=_siamese_block,
    leave=lambda stream, n: stream[0] + n.final(stream[1]),
    additions={"attn": "attn_out", "ffn": "ffn_out"},
)


def _like(factor: Any, x: Any) -> Any:
    """A factor in the stream's dtype: a traced float32 one would turn a bfloat16 stream into float32."""
    return factor.astype(x.dtype) if hasattr(factor, "astype") and hasattr(x, "dtype") else factor


INNER_NORMS = ("q", "k", "v", "heads", "hidden")
PLACEMENTS = {p.name: p for p in (_PRE, _POST, _SPAN, _SPAN_RAW, _PERI, _HYBRID, _LAYERSCALE, _SIAMESE)}


def inner_norms(cfg: ModelConfig) -> tuple[str, ...]:
    """What is normed inside a model's sub-layers: what the placement asks for, and q and k with `qk_norm`."""
    wanted = {*PLACEMENTS[cfg.placement].inner_norms, *(("q", "k") if cfg.qk_norm else ())}
    return tuple(name for name in INNER_NORMS if name in wanted)
