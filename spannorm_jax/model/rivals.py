"""Placements that others published, and PreNorm with a norm of SpanNorm's. Notation and fields: `placement.py`."""

import math
from typing import Any

from spannorm_jax.config import ModelConfig
from spannorm_jax.model.placement import declare, final, post, pre
from spannorm_jax.model.traced import choose, like

_SANDWICH = ("before_attn", "after_attn", "before_ffn", "after_ffn")
_IN_NORM = {"attn": "after_attn", "ffn": "after_ffn"}  # additions that end in a norm: its gain is their size
_IN_GAIN = {"attn": "scale_attn", "ffn": "scale_ffn"}
_TWO_STREAMS: dict[str, Any] = {
    "end_norms": ("final",),
    "enter": lambda x, n: (x, x),
    "leave": lambda stream, n: stream[0] + n.final(stream[1]),
}


# Peri-LN (Kim et al. 2025, arXiv 2502.02732), Gemma 2's sandwich.
@declare("peri", "Peri-LN", like=pre, block_norms=_SANDWICH, additions=_IN_NORM)
def peri(x, attn, ffn, n, layer, cfg):
    y = x + n.after_attn(attn(n.before_attn(x)))
    return y + n.after_ffn(ffn(n.before_ffn(y)))


# HybridNorm (Zhuo et al. 2025, arXiv 2503.04598): queries, keys and values are normed, and the sum after attention.
@declare("hybrid", "HybridNorm", block_norms=("after_attn",), inner_norms=("q", "k", "v"), published_init="megatron")
def hybrid(x, attn, ffn, n, layer, cfg):
    z = n.after_attn(x + attn(x))
    return z + ffn(z)


def _layerscale_start(cfg: ModelConfig) -> float:
    return 0.1 if cfg.depth <= 18 else 1e-5 if cfg.depth <= 24 else 1e-6


# LayerScale (Touvron et al. 2021, arXiv 2103.17239, section 2): PreNorm, each branch times a learnt gain.
@declare(
    "layerscale",
    "LayerScale",
    like=pre,
    additions=_IN_GAIN,
    block_gains=dict.fromkeys(_IN_GAIN.values(), _layerscale_start),
)
def layerscale(x, attn, ffn, n, layer, cfg):
    y = x + n.scale_attn(attn(n.before_attn(x)))
    return y + n.scale_ffn(ffn(n.before_ffn(y)))


# SiameseNorm (arXiv 2602.08064): a stream that is normed beside one that is not; the divisor is that of its code.
@declare("siamese", "SiameseNorm", block_norms=("side_attn", "side_ffn", *_SANDWICH), **_TWO_STREAMS)
def siamese(stream, attn, ffn, n, layer, cfg):
    x, y = stream
    damping = like((2 * (layer + 1)) ** -0.5, x)
    branch = attn(n.before_attn(x + n.side_attn(y)))
    x, y = n.after_attn(x + branch * damping), y + branch
    branch = ffn(n.before_ffn(x + n.side_ffn(y)))
    return n.after_ffn(x + branch * damping), y + branch


# DeepNorm (Wang et al. 2022, arXiv 2203.00555, section 3 and table 2, decoder-only): PostNorm with a heavier skip.
@declare("deepnorm", "DeepNorm", like=post, published_init="deepnorm")
def deepnorm(x, attn, ffn, n, layer, cfg):
    alpha = (2 * cfg.depth) ** 0.25
    y = n.after_attn(alpha * x + attn(x))
    return n.after_ffn(alpha * y + ffn(y))


# OLMo 2's reordered norm (arXiv 2501.00656, section 3.2), with normed queries and keys: here by head, there over all
# heads together.
@declare(
    "olmo2",
    "OLMo 2",
    block_norms=("after_attn", "after_ffn"),
    end_norms=("final",),
    leave=final,
    additions=_IN_NORM,
    inner_norms=("q", "k"),
    published_init="normal",
)
def olmo2(x, attn, ffn, n, layer, cfg):
    y = x + n.after_attn(attn(x))
    return y + n.after_ffn(ffn(y))


# B2T (Takase et al. 2022, arXiv 2206.00330, equation 9): PostNorm and a skip from the block's input to its last norm.
# Without the skip from y it is SpanNorm.
@declare("b2t", "B2T", like=post, published_init="xavier")
def b2t(x, attn, ffn, n, layer, cfg):
    y = n.after_attn(x + attn(x))
    return n.after_ffn(x + y + ffn(y))


# ResiDual (Xie et al. 2023, arXiv 2304.14802, section 3.1): PostNorm's stream x, and beside it one of PreNorm's kind
# that is only added to.
@declare("residual", "ResiDual", like=post, published_init="xavier", **_TWO_STREAMS)
def residual(stream, attn, ffn, n, layer, cfg):
    x, r = stream
    branch = attn(x)
    x, r = n.after_attn(x + branch), r + branch
    branch = ffn(x)
    return n.after_ffn(x + branch), r + branch


# Mix-LN (Li et al. 2024, arXiv 2412.13795, section 3): PostNorm in the first blocks, the whole ones in `mix_share` of
# the depth, then PreNorm. With a share of 1 its final norm comes after a norm.
@declare("mix", "Mix-LN", block_norms=("attn", "ffn"), end_norms=("final",), leave=final, published_init="normal")
def mix(x, attn, ffn, n, layer, cfg):
    is_post = layer < math.floor(cfg.mix_share * cfg.depth + 1e-6)  # 0.29 x 100 is 28.999999999999996

    def sub_layer(x, f, norm):
        y = x + f(choose(is_post, x, norm(x)))
        return choose(is_post, norm(y), y)

    return sub_layer(sub_layer(x, attn, n.attn), ffn, n.ffn)


# LayerNorm Scaling (Sun et al. 2025, arXiv 2502.05795, equation 5): PreNorm with each norm's output over sqrt(l).
@declare(
    "lns",
    "LayerNorm Scaling",
    like=pre,
    published_init="plain",
    not_with=dict.fromkeys(
        ("gpt2", "megatron", "scale"),
        "LayerNorm Scaling damps by depth already, and is not to be combined with a depth factor of the weights "
        "(arXiv 2502.05795, section 4)",
    ),
)
def lns(x, attn, ffn, n, layer, cfg):
    damping = like((layer + 1) ** -0.5, x)
    y = x + attn(n.before_attn(x) * damping)
    return y + ffn(n.before_ffn(y) * damping)


# KEEL (arXiv 2601.19895): PostNorm with a skip as heavy as the number of sub-layers, and normed branches.
@declare("keel", "KEEL", block_norms=_SANDWICH, published_init="plain")
def keel(x, attn, ffn, n, layer, cfg):
    alpha = 2.0 * cfg.depth
    y = n.after_attn(alpha * x + attn(n.before_attn(x)))
    return n.after_ffn(alpha * y + ffn(n.before_ffn(y)))


# ReZero (Bachlechner et al. 2020, arXiv 2003.04887, equation 4): no norm, and each branch times a learnt number that
# starts at zero.
@declare(
    "rezero",
    "ReZero",
    additions=_IN_GAIN,
    block_gains=dict.fromkeys(_IN_GAIN.values(), lambda cfg: 0.0),
    scalar_gains=tuple(_IN_GAIN.values()),
    published_init="xavier",
)
def rezero(x, attn, ffn, n, layer, cfg):
    y = x + n.scale_attn(attn(x))
    return y + n.scale_ffn(ffn(y))


# SubLN (Wang et al. 2022, arXiv 2210.06423, section 3): PreNorm, and a norm before each output projection.
declare("subln", "SubLN", like=pre, inner_norms=("heads", "hidden"), published_init="subln")(pre.block)


# DeepScaleLM's forward pair on PreNorm (Kedia et al. 2024, arXiv 2403.09635): lambda^2 = 1 - 2/N and beta^2 = 2/N, so
# that branches of variance 1 keep a stream of variance 1. That N counts layers, each of an attention and a feed-forward
# (the depth here), and that both additions take the pair, is read from two implementations of others. At two blocks
# lambda is 0: there is no skip. At one there is no pair.
@declare("deepscale", "DeepScaleLM", like=pre, least_depth=2)
def deepscale(x, attn, ffn, n, layer, cfg):
    keep, add = math.sqrt(1 - 2 / cfg.depth), math.sqrt(2 / cfg.depth)
    y = keep * x + add * attn(n.before_attn(x))
    return keep * y + add * ffn(n.before_ffn(y))


# PreNorm that norms its embeddings as SpanNorm does: what of their difference is that norm's. Embeddings before a norm
# are those of Dettmers et al. 2022 (arXiv 2110.02861, the stable embedding layer); that layer has weights of its own,
# so nothing here is what it was published with.
declare(
    "pre_embnorm",
    "PreNorm, normed embeddings",
    like=pre,
    end_norms=("entry", "final"),
    enter=lambda x, n: n.entry(x),
)(pre.block)
