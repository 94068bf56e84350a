"""What is measured of each block in one pass over the model's scan; docs/signal.md defines each number."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from spannorm_jax.analysis.tracked import run_block
from spannorm_jax.model.block import Block
from spannorm_jax.model.decoder import Decoder
from spannorm_jax.model.kernels.attention_logits import entropies, largest_logit
from spannorm_jax.model.layers import FeedForward, activation
from spannorm_jax.model.moe.experts import ExpertOps
from spannorm_jax.model.moe.layer import MoE
from spannorm_jax.model.vision import Encoder
from spannorm_jax.training.step import router_metrics

Model = Decoder | Encoder  # with its weights

# ---- streams --------------------------------------------------------------------------------------


def first(stream: Any) -> Array:
    """The stream that is measured: the first of two."""
    return jax.tree.leaves(stream)[0]


def with_first(stream: Any, x_BxTxD: Array) -> Any:
    leaves, structure = jax.tree.flatten(stream)
    return jax.tree.unflatten(structure, [x_BxTxD, *leaves[1:]])


def mean_nll(model: Model, features_BxTxD: Array, targets: Array) -> Array:
    """Nats a token or an image, of what the head reads."""
    log_probs = jax.nn.log_softmax(model.logits(features_BxTxD))
    return -jnp.mean(jnp.take_along_axis(log_probs, targets[..., None], axis=-1))


# ---- statistics -------------------------------------------------------------------------------------


def mean_square(x: Array) -> Array:
    return jnp.mean(jnp.square(x.astype(jnp.float32)))


def _unit(x_BxTxD: Array) -> Array:
    """Each token's vector with norm 1; a vector of zeros stays one."""
    x = x_BxTxD.astype(jnp.float32)
    norms = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.where(norms == 0, 1, norms)


def token_correlation(x_BxTxD: Array) -> Array:
    """Mean cosine between the vectors of two tokens of a row, over rows and pairs."""
    unit, T = _unit(x_BxTxD), x_BxTxD.shape[1]
    sums = jnp.sum(jnp.square(jnp.sum(unit, axis=1)), axis=-1) - jnp.sum(jnp.square(unit), axis=(1, 2))
    return jnp.mean(sums) / (T * (T - 1))


def angular_distance(x_BxTxD: Array, y_BxTxD: Array) -> Array:
    """Mean angle between the vectors of a token, as a share of a half turn.

    By the half-angle form, which is exact for small angles: arccos of a rounded cosine is not.
    """
    x, y = _unit(x_BxTxD), _unit(y_BxTxD)
    angle = 2 * jnp.arctan2(jnp.linalg.norm(x - y, axis=-1), jnp.linalg.norm(x + y, axis=-1))
    return jnp.mean(angle) / jnp.pi


def gram(x_BxTxF: Array) -> Array:
    """(B, T, T): products of tokens' vectors."""
    x = x_BxTxF.astype(jnp.float32)
    return jnp.einsum("btf,buf->btu", x, x, precision=jax.lax.Precision.HIGHEST)


def hidden_gram(ffn: FeedForward | MoE, x_BxTxD: Array) -> Array:
    """(B, T, T): the Gram matrix of what the feed-forward's last matrix reads, all experts' side by side."""
    if isinstance(ffn, FeedForward):
        return gram(ffn.hidden(x_BxTxD))
    B, T, _ = x_BxTxD.shape
    weights_Nxk, ids_Nxk, _ = ffn.routing(x_BxTxD)
    rows = jnp.arange(B * T)[:, None]
    weights_NxE = jnp.zeros((B * T, ffn.in_[...].shape[0])).at[rows, ids_Nxk].set(weights_Nxk)
    normed = hasattr(ffn, "hidden_gain")
    how = ExpertOps(ffn.cfg.ffn, "", norm_eps=ffn.cfg.norm_eps if normed else 0.0)
    gain_ExF = ffn.hidden_gain[...] if normed else jnp.ones((ffn.in_[...].shape[0], 1))

    def add(total: Array, expert: tuple[Array, Array, Array]) -> tuple[Array, None]:
        w_PxDxF, gain_F, weights_N = expert
        parts = [jnp.matmul(x_BxTxD, w_DxF.astype(x_BxTxD.dtype)) for w_DxF in w_PxDxF]
        hidden = how.normed(activation(parts, how.kind)) * gain_F * weights_N.reshape(B, T, 1)
        return total + gram(hidden), None

    total, _ = jax.lax.scan(add, jnp.zeros((B, T, T)), (ffn.in_[...], gain_ExF, weights_NxE.T))
    return total + gram(ffn.shared.hidden(x_BxTxD)) if hasattr(ffn, "shared") else total


# ---- a block's Jacobians, by random gradients ---------------------------------------------------------


def _energy(x: Array) -> Array:
    return jnp.sum(jnp.square(x.astype(jnp.float32)))


def probed(block: Block, stream: Any, layer: Any, angles_TxK2: Array, keys_P: Array) -> dict[str, Array]:
    """The numbers that random gradients tell of one block, each from the mean over the probes."""
    x = first(stream)
    stop = jax.lax.stop_gradient

    def attn(x_BxTxD: Array) -> Array:
        return block.attn(x_BxTxD, angles_TxK2)

    def ffn(x_BxTxD: Array) -> Array:
        return block.feed_forward(x_BxTxD)[0]

    def added(nudges: dict[str, Array]) -> dict[str, Array]:
        """What is added to the stream, with the sub-layers' arguments fixed but for the nudges."""
        _, additions = run_block(
            block, stream, layer, lambda x: attn(stop(x) + nudges["attn"]), lambda x: ffn(stop(x) + nudges["ffn"])
        )
        return {name: addition.added for name, addition in additions.items()}

    def whole(x_BxTxD: Array) -> Array:
        return first(run_block(block, with_first(stream, x_BxTxD), layer, attn, ffn)[0])

    def skip(x_BxTxD: Array) -> Array:
        fixed = (lambda x: stop(attn(x)), lambda x: stop(ffn(x)))
        return first(run_block(block, with_first(stream, x_BxTxD), layer, *fixed)[0])

    through_branches = jax.vjp(added, {"attn": jnp.zeros_like(x), "ffn": jnp.zeros_like(x)})[1]
    through_block, through_skip = jax.vjp(whole, x)[1], jax.vjp(skip, x)[1]

    def normal(key: Array, index: int) -> Array:
        return jax.random.normal(jax.random.fold_in(key, index), x.shape, x.dtype)

    def of_skip(key: Array) -> Array:
        g = normal(key, 0)
        (at_input,) = through_skip(g)
        return _energy(at_input) / _energy(g)

    skip_path = jnp.sqrt(jnp.mean(jax.lax.map(of_skip, keys_P)))

    def of_rest(key: Array) -> dict[str, Array]:
        g, *for_branches = (normal(key, i) for i in range(3))
        at_added = dict(zip(("attn", "ffn"), for_branches, strict=True))
        (at_input,), (nudges,) = through_block(g), through_branches(at_added)
        return {
            "block_backward_gain": _energy(at_input) / _energy(g),
            "jacobian_deviation": _energy(at_input - g) / _energy(g),
            "jacobian_deviation_unscaled": _energy(at_input / skip_path.astype(g.dtype) - g) / _energy(g),
            **{f"{name}_backward_gain": _energy(nudges[name]) / _energy(at_added[name]) for name in at_added},
        }

    mean = jax.tree.map(jnp.mean, jax.lax.map(of_rest, keys_P))
    roots = {name: jnp.sqrt(mean[name]) for name in ("jacobian_deviation", "jacobian_deviation_unscaled")}
    return mean | roots | {"block_skip_gain": skip_path}


# ---- the pass over all blocks ---------------------------------------------------------------------------


def forward(model: Model, inputs: Array, targets: Array, keys_LxP: Array) -> tuple[dict[str, Array], dict[str, Array]]:
    """Numbers of the whole model, and numbers of its blocks, (L, ...); those of routers (blocks with experts, ...).

    Of ranks there are the Gram matrices, `stream_gram` and `ffn_gram`, (L, B, T, T).
    `keys_LxP` are the random keys of each block's probes, as many as there are probes.
    """

    def step(block: Block, stream: Any, layer: Array, angles: Any, keys_P: Array) -> tuple[Any, dict[str, Array], Any]:
        got: dict[str, Array] = {}
        stats = None

        def attn(x_BxTxD: Array) -> Array:
            q, k, _ = block.attn.qkv(x_BxTxD, angles)
            pair = int(block.attn.causal)  # the first query that sees two
            T = q.shape[1]
            log_visible_T = jnp.log(jnp.arange(1, T + 1) if block.attn.causal else jnp.full(T, T))[pair:]
            entropy_BxHxT = entropies(q, k, block.attn.causal)[:, :, pair:]
            got["attention_entropy"] = jnp.mean(entropy_BxHxT)
            got["attention_entropy_relative"] = jnp.mean(entropy_BxHxT / log_visible_T)
            got["attention_logit_max"] = largest_logit(q, k, block.attn.causal)
            out = block.attn(x_BxTxD, angles)
            got["attn_variance"] = mean_square(out)
            return out

        def ffn(x_BxTxD: Array) -> Array:
            nonlocal stats
            out, stats = block.feed_forward(x_BxTxD)
            got["ffn_variance"] = mean_square(out)
            got["ffn_gram"] = hidden_gram(block.ffn, x_BxTxD)
            return out

        before = first(stream)
        behind, additions = run_block(block, stream, layer, attn, ffn)
        x = first(behind)
        for name, addition in additions.items():
            got[f"{name}_forward_variance"] = mean_square(addition.added) / mean_square(addition.skip)
        got |= {
            "stream_variance": mean_square(x),
            "token_correlation": token_correlation(x),
            "stream_gram": gram(x),
            "angular_distance": angular_distance(before, x),
            **probed(block, stream, layer, angles, keys_P),
        }
        return behind, got, stats

    entry = mean_square(first(model.enter(model.embeddings(inputs))))
    features, _, of_blocks, stats = model.run(inputs, step, keys_LxP)
    whole = {"loss": mean_nll(model, features, targets), "entry_variance": entry}
    if stats is None:
        return whole, of_blocks
    of_blocks["expert_load"] = stats["counts"] / jnp.sum(stats["counts"], axis=-1, keepdims=True)
    routers = router_metrics(stats)
    return whole, of_blocks | {name: routers[name] for name in ("expert_load_max", "router_entropy")}


def traced(model: Model, inputs: Array) -> tuple[Any, Any]:
    """The stream that enters each block, (L, ...) leaves, and the stream after the last."""

    def step(block: Block, stream: Any, layer: Array, angles: Any, _: None) -> tuple[Any, Any, None]:
        return block.whole(stream, layer, angles)[0], stream, None

    passed = model.run(inputs, step)
    return passed.ys, passed.stream
