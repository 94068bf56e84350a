"""Norm placements: each is one value, and its `block` reads like the equation in the paper.

Notation: x is the residual stream (B, T, D); `attn` and `ffn` are the sub-layers as callables
(B, T, D) -> (B, T, D), dense or MoE; `n` holds a placement's norms, and its gains without a norm, as
attributes of the block. The stream may be any pytree, and a block sees its index `layer` (from 0, a
number of Python or a traced one) and the model's config `cfg`.

Sources: PreNorm and PostNorm, Xiong et al. 2020 (arXiv 2002.04745, figure 1); SpanNorm, Wang et al. 2026
(arXiv 2601.22580); the others at their equations.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from spannorm_jax.config import ModelConfig

Stream = Any  # a pytree of arrays
SubLayer = Callable[[Any], Any]


def _same(stream: Stream, n: Any) -> Stream:
    return stream


def _final(x: Any, n: Any) -> Any:
    return n.final(x)


@dataclass(frozen=True)
class Placement:
    """Where the norms of a Transformer stand.

    Attributes:
      name: the config's spelling.
      block_norms: names of the norms that every block owns.
      block: (stream, attn, ffn, the block's norms and gains, layer, cfg) -> stream.
      end_norms: names of the norms outside the blocks.
      enter: (embeddings x, end norms) -> stream.
      leave: (stream, end norms) -> what the head reads, (B, T, D).
      additions: branch (`attn`, `ffn`) that is added to the stream -> what sets its size: the site of
        an output projection, or one of block_norms or block_gains. ScaleInit damps that, and counts
        len(additions) * depth residual additions.
      inner_norms: what is normed inside sub-layers (RMSNorm): a head's `q`, `k` or `v` (one gain for
        all heads), all `heads` together before their projection, the `hidden` units of a
        feed-forward before theirs.
      block_gains: gains of size D without a norm that every block owns -> their start, from the config.
      scalar_gains: those of block_gains that are one number instead.
      published_init: the initialisation that it was published with, if that is a key of
        model.initialisation.INITS, else ""; `model.init=published` stands for it.
      not_with: initialisation that its authors advise against -> why, and where they say so.
      least_depth: the fewest blocks that its equation is defined for.
    """

    name: str
    block_norms: tuple[str, ...]
    block: Callable[[Stream, SubLayer, SubLayer, Any, Any, ModelConfig], Stream]
    end_norms: tuple[str, ...] = ()
    enter: Callable[[Any, Any], Stream] = _same
    leave: Callable[[Stream, Any], Any] = _same
    additions: dict[str, str] = field(default_factory=lambda: {"attn": "attn_out", "ffn": "ffn_out"})
    inner_norms: tuple[str, ...] = ()
    block_gains: dict[str, Callable[[ModelConfig], float]] = field(default_factory=dict)
    scalar_gains: tuple[str, ...] = ()
    published_init: str = ""
    not_with: dict[str, str] = field(default_factory=dict)
    least_depth: int = 1


def _pre_block(x, attn, ffn, n, layer, cfg):
    y = x + attn(n.before_attn(x))
    return y + ffn(n.before_ffn(y))


_PRE = Placement(
    name="pre",
    block_norms=("before_attn", "before_ffn"),
    end_norms=("final",),
    block=_pre_block,
    leave=_final,
    published_init="gpt2",
)


def _post_block(x, attn, ffn, n, layer, cfg):
    y = n.after_attn(x + attn(x))
    return n.after_ffn(y + ffn(y))


_POST = Placement(
    name="post",
    block_norms=("after_attn", "after_ffn"),
    block=_post_block,
    published_init="xavier",
)


def _span_block(x, attn, ffn, n, layer, cfg):
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
    additions={"ffn": "ffn_out"},
    published_init="scale",
)


def _span_raw_block(stream, attn, ffn, n, layer, cfg):
    x, x_attn = stream
    y = n.after_attn(x + attn(x_attn))
    x = n.after_ffn(x + ffn(y))
    return x, x


_SPAN_RAW = replace(
    _SPAN,
    name="span_raw",
    enter=lambda x, n: (x, n.entry(x)),
    block=_span_raw_block,
    leave=lambda stream, n: stream[0],
)

# PreNorm that norms its embeddings as SpanNorm does: what of their difference is that norm's. Embeddings before a norm
# are those of Dettmers et al. 2022 (arXiv 2110.02861, the stable embedding layer); that layer has weights of its own,
# so nothing here is what it was published with.
_PRE_EMBNORM = replace(
    _PRE, name="pre_embnorm", end_norms=("entry", "final"), enter=lambda x, n: n.entry(x), published_init=""
)


# ---- rivals -----------------------------------------------------------------------------------------


def _peri_block(x, attn, ffn, n, layer, cfg):
    y = x + n.after_attn(attn(n.before_attn(x)))
    return y + n.after_ffn(ffn(n.before_ffn(y)))


# Peri-LN (Kim et al. 2025, arXiv 2502.02732), Gemma 2's sandwich. A branch's size is its norm's gain, whatever its
# weights are.
_PERI = Placement(
    name="peri",
    block_norms=("before_attn", "after_attn", "before_ffn", "after_ffn"),
    end_norms=("final",),
    block=_peri_block,
    leave=_final,
    additions={"attn": "after_attn", "ffn": "after_ffn"},
)


def _hybrid_block(x, attn, ffn, n, layer, cfg):
    z = n.after_attn(x + attn(x))
    return z + ffn(z)


# HybridNorm (Zhuo et al. 2025, arXiv 2503.04598): queries, keys and values are normed, and the sum after attention.
_HYBRID = Placement(
    name="hybrid",
    block_norms=("after_attn",),
    block=_hybrid_block,
    inner_norms=("q", "k", "v"),
    published_init="megatron",
)


def _layerscale_block(x, attn, ffn, n, layer, cfg):
    y = x + n.scale_attn(attn(n.before_attn(x)))
    return y + n.scale_ffn(ffn(n.before_ffn(y)))


def _layerscale_start(cfg: ModelConfig) -> float:
    return 0.1 if cfg.depth <= 18 else 1e-5 if cfg.depth <= 24 else 1e-6


# LayerScale (Touvron et al. 2021, arXiv 2103.17239, section 2): PreNorm, each branch times a learnt gain.
_LAYERSCALE = replace(
    _PRE,
    name="layerscale",
    block=_layerscale_block,
    published_init="",
    additions={"attn": "scale_attn", "ffn": "scale_ffn"},
    block_gains={"scale_attn": _layerscale_start, "scale_ffn": _layerscale_start},
)


def _siamese_block(stream, attn, ffn, n, layer, cfg):
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
)


def _deepnorm_block(x, attn, ffn, n, layer, cfg):
    alpha = (2 * cfg.depth) ** 0.25
    y = n.after_attn(alpha * x + attn(x))
    return n.after_ffn(alpha * y + ffn(y))


# DeepNorm (Wang et al. 2022, arXiv 2203.00555, section 3 and table 2, decoder-only): PostNorm with a heavier skip.
_DEEPNORM = replace(_POST, name="deepnorm", block=_deepnorm_block, published_init="deepnorm")


def _olmo2_block(x, attn, ffn, n, layer, cfg):
    y = x + n.after_attn(attn(x))
    return y + n.after_ffn(ffn(y))


# OLMo 2's reordered norm (arXiv 2501.00656, section 3.2), with normed queries and keys: here by head, there over all
# heads together.
_OLMO2 = Placement(
    name="olmo2",
    block_norms=("after_attn", "after_ffn"),
    end_norms=("final",),
    block=_olmo2_block,
    leave=_final,
    additions={"attn": "after_attn", "ffn": "after_ffn"},
    inner_norms=("q", "k"),
    published_init="normal",
)


def _b2t_block(x, attn, ffn, n, layer, cfg):
    y = n.after_attn(x + attn(x))
    return n.after_ffn(x + y + ffn(y))


# B2T (Takase et al. 2022, arXiv 2206.00330, equation 9): PostNorm and a skip from the block's input to its last norm.
# Without the skip from y it is SpanNorm.
_B2T = replace(_POST, name="b2t", block=_b2t_block)


def _residual_block(stream, attn, ffn, n, layer, cfg):
    x, r = stream
    branch = attn(x)
    x, r = n.after_attn(x + branch), r + branch
    branch = ffn(x)
    return n.after_ffn(x + branch), r + branch


# ResiDual (Xie et al. 2023, arXiv 2304.14802, section 3.1): PostNorm's stream x, and beside it one of PreNorm's kind
# that is only added to.
_RESIDUAL = Placement(
    name="residual",
    block_norms=("after_attn", "after_ffn"),
    end_norms=("final",),
    enter=lambda x, n: (x, x),
    block=_residual_block,
    leave=lambda stream, n: stream[0] + n.final(stream[1]),
    published_init="xavier",
)


def _mix_block(x, attn, ffn, n, layer, cfg):
    post = layer < post_blocks(cfg)

    def sub_layer(x, f, norm):
        y = x + f(_choose(post, x, norm(x)))
        return _choose(post, norm(y), y)

    return sub_layer(sub_layer(x, attn, n.attn), ffn, n.ffn)


def post_blocks(cfg: ModelConfig) -> int:
    """Blocks of Mix-LN, from the first, that are PostNorm's: the whole ones in `mix_share` of the depth."""
    return math.floor(cfg.mix_share * cfg.depth + 1e-6)  # 0.29 x 100 is 28.999999999999996


# Mix-LN (Li et al. 2024, arXiv 2412.13795, section 3): PostNorm first, then PreNorm. With a share of 1 its final norm
# comes after a norm.
_MIX = Placement(
    name="mix",
    block_norms=("attn", "ffn"),
    end_norms=("final",),
    block=_mix_block,
    leave=_final,
    published_init="normal",
)


def _lns_block(x, attn, ffn, n, layer, cfg):
    damping = _like((layer + 1) ** -0.5, x)
    y = x + attn(n.before_attn(x) * damping)
    return y + ffn(n.before_ffn(y) * damping)


# LayerNorm Scaling (Sun et al. 2025, arXiv 2502.05795, equation 5): PreNorm with each norm's output over sqrt(l).
_LNS = replace(
    _PRE,
    name="lns",
    block=_lns_block,
    published_init="plain",
    not_with=dict.fromkeys(
        ("gpt2", "megatron", "scale"),
        "LayerNorm Scaling damps by depth already, and is not to be combined with a depth factor of the weights "
        "(arXiv 2502.05795, section 4)",
    ),
)


def _keel_block(x, attn, ffn, n, layer, cfg):
    alpha = 2.0 * cfg.depth
    y = n.after_attn(alpha * x + attn(n.before_attn(x)))
    return n.after_ffn(alpha * y + ffn(n.before_ffn(y)))


# KEEL (arXiv 2601.19895): PostNorm with a skip as heavy as the number of sub-layers, and normed branches.
_KEEL = Placement(
    name="keel",
    block_norms=("before_attn", "after_attn", "before_ffn", "after_ffn"),
    block=_keel_block,
    published_init="plain",
)


def _rezero_block(x, attn, ffn, n, layer, cfg):
    y = x + n.scale_attn(attn(x))
    return y + n.scale_ffn(ffn(y))


# ReZero (Bachlechner et al. 2020, arXiv 2003.04887, equation 4): no norm, and each branch times a learnt number that
# starts at zero.
_REZERO = Placement(
    name="rezero",
    block_norms=(),
    block=_rezero_block,
    additions={"attn": "scale_attn", "ffn": "scale_ffn"},
    block_gains={"scale_attn": lambda cfg: 0.0, "scale_ffn": lambda cfg: 0.0},
    scalar_gains=("scale_attn", "scale_ffn"),
    published_init="xavier",
)

# SubLN (Wang et al. 2022, arXiv 2210.06423, section 3): PreNorm, and a norm before each output projection.
_SUBLN = replace(_PRE, name="subln", inner_norms=("heads", "hidden"), published_init="subln")


def _deepscale_block(x, attn, ffn, n, layer, cfg):
    keep, add = math.sqrt(1 - 2 / cfg.depth), math.sqrt(2 / cfg.depth)
    y = keep * x + add * attn(n.before_attn(x))
    return keep * y + add * ffn(n.before_ffn(y))


# DeepScaleLM's forward pair on PreNorm (Kedia et al. 2024, arXiv 2403.09635): lambda^2 = 1 - 2/N and beta^2 = 2/N, so
# that branches of variance 1 keep a stream of variance 1. The pair is the paper's. That N counts layers, each of an
# attention and a feed-forward (the depth here), and that both of a layer's additions take the pair, is read from two
# implementations of others; with N = 2L each would add half as much. No initialisation here is its own
# (docs/placements.md). At two blocks lambda is 0: there is no skip. At one there is no pair.
_DEEPSCALE = replace(_PRE, name="deepscale", block=_deepscale_block, published_init="", least_depth=2)


def _choose(condition: Any, x: Any, y: Any) -> Any:
    """x if the condition holds, else y; the condition is Python's or traced."""
    if isinstance(condition, bool):
        return x if condition else y
    import jax  # a command that is mistyped asks for the names here, and does without

    return jax.tree.map(lambda a, b: jax.numpy.where(condition, a, b), x, y)


def _like(factor: Any, x: Any) -> Any:
    """A factor in the stream's dtype: a traced float32 one would turn a bfloat16 stream into float32."""
    return factor.astype(x.dtype) if hasattr(factor, "astype") and hasattr(x, "dtype") else factor


INNER_NORMS = ("q", "k", "v", "heads", "hidden")
_ALL = (
    *(_PRE, _POST, _SPAN, _SPAN_RAW, _PERI, _HYBRID, _LAYERSCALE, _SIAMESE, _DEEPNORM, _OLMO2, _B2T, _RESIDUAL),
    *(_MIX, _LNS, _KEEL, _REZERO, _SUBLN, _DEEPSCALE, _PRE_EMBNORM),
)
PLACEMENTS = {p.name: p for p in _ALL}


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
