"""Norm placements: each is one value, and its `block` reads like the equation in the paper.

Notation: x is the residual stream (B, T, D); `attn` and `ffn` are the sub-layers as callables
(B, T, D) -> (B, T, D), dense or MoE; `n` holds a placement's norms as attributes, each with its own gain.
The stream may be any pytree, and a block sees its index `layer` (0-based, traced inside a scan) and `depth`.

Sources: PreNorm and PostNorm, Xiong et al. 2020 (arXiv 2002.04745, figure 1); SpanNorm, Wang et al. 2026
(arXiv 2601.22580).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
      block: (stream, attn, ffn, block norms, layer, depth) -> stream.
      leave: (stream, end norms) -> what the head reads, (B, T, D).
      stream_branches: output projections whose result is added to the stream, once a block each.
        ScaleInit counts them: the stream passes len(stream_branches) * depth residual additions.
    """

    name: str
    block_norms: tuple[str, ...]
    end_norms: tuple[str, ...]
    enter: Callable[[Any, Any], Stream]
    block: Callable[[Stream, SubLayer, SubLayer, Any, Any, int], Stream]
    leave: Callable[[Stream, Any], Any]
    stream_branches: tuple[str, ...]


def _same(stream: Stream, n: Any) -> Stream:
    return stream


def _pre_block(x, attn, ffn, n, layer, depth):
    y = x + attn(n.attn(x))
    return y + ffn(n.ffn(y))


def _post_block(x, attn, ffn, n, layer, depth):
    y = n.attn(x + attn(x))
    return n.ffn(y + ffn(y))


def _span_block(x, attn, ffn, n, layer, depth):
    y = n.attn(x + attn(x))
    return n.ffn(x + ffn(y))  # the second skip spans the block: it starts at x, not at y


def _span_raw_block(stream, attn, ffn, n, layer, depth):
    x, x_attn = stream
    y = n.attn(x + attn(x_attn))
    x = n.ffn(x + ffn(y))
    return x, x


_PRE = Placement(
    name="pre",
    block_norms=("attn", "ffn"),
    end_norms=("final",),
    enter=_same,
    block=_pre_block,
    leave=lambda x, n: n.final(x),
    stream_branches=("attn_out", "ffn_out"),
)

_POST = Placement(
    name="post",
    block_norms=("attn", "ffn"),
    end_norms=(),
    enter=_same,
    block=_post_block,
    leave=_same,
    stream_branches=("attn_out", "ffn_out"),
)

# SpanNorm norms the embeddings once, before the first block. Readers of the paper disagree on whether block 1's
# skip carries the normed embeddings or the raw ones. `span` takes the first reading, which lets every block be the
# same function; `span_raw` is the second, as a stream of two (skip, attention input) that agree from block 2 on.
_SPAN = Placement(
    name="span",
    block_norms=("attn", "ffn"),
    end_norms=("entry",),
    enter=lambda x, n: n.entry(x),
    block=_span_block,
    leave=_same,
    stream_branches=("ffn_out",),
)

_SPAN_RAW = Placement(
    name="span_raw",
    block_norms=("attn", "ffn"),
    end_norms=("entry",),
    enter=lambda x, n: (x, n.entry(x)),
    block=_span_raw_block,
    leave=lambda stream, n: stream[0],
    stream_branches=("ffn_out",),
)

PLACEMENTS = {p.name: p for p in (_PRE, _POST, _SPAN, _SPAN_RAW)}
