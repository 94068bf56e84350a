"""Decoding over a cache is the full forward pass, for every placement and for rows of different lengths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_placement import TINY, make

from spannorm_jax.config import ExecutionConfig, ModelConfig, MoEConfig
from spannorm_jax.model.cache import cache_bytes, cached_features, empty_cache
from spannorm_jax.model.placement import PLACEMENTS

VARIANTS = {
    "plain": {},
    "gqa_qk_norm_tied": {"num_kv_heads": 2, "qk_norm": True, "tied_head": True},
    "moe": {"moe": MoEConfig(num_experts=4, expert_dim=12, num_shared=1, first_dense=1)},
}
PROMPTS, TOTAL, SLOTS = np.array([1, 4, 7]), 10, 13
# The implementation that decoding uses: in bfloat16 two of them round differently, which these weights amplify.
XLA = ExecutionConfig(attention="xla")


# Rounding in another order through three blocks, as a share of the largest logit: seen are 3.5e-6 in float32, and in
# bfloat16 none at all, where one rounding is 4e-3.
CASES = [(p, v, "float32", 1.5e-5) for p in PLACEMENTS for v in VARIANTS]
CASES += [("span_raw", "gqa_qk_norm_tied", "bfloat16", 0.02)]


@pytest.mark.parametrize(("placement", "variant", "dtype", "tolerance"), CASES)
def test_cached_decoding_is_the_full_forward_pass(placement, variant, dtype, tolerance):
    """Prompts of 1, 4 and 7 tokens in one batch, then token by token to the end, each row at its own position.

    The padding of a prompt and the unused slots of the cache hold large values: none may be seen.
    """
    model, params, _, _ = make(placement, execution=XLA, dtype=dtype, **VARIANTS[variant])
    decoder, tokens = model.bind(params), np.random.default_rng(0).integers(11, size=(len(PROMPTS), TOTAL))
    want = np.asarray(jax.jit(decoder)(tokens))
    cache = jax.tree.map(lambda x: jnp.full_like(x, 1e3), empty_cache(model.cfg, len(PROMPTS), SLOTS))

    @jax.jit
    def step(tokens, positions, cache):
        features, cache = cached_features(model.bind(params), tokens, positions, cache)
        return decoder.logits(features), cache

    P = PROMPTS.max()
    padded = np.where(np.arange(P) < PROMPTS[:, None], tokens[:, :P], 10 - tokens[:, :P])
    logits, cache = step(padded, np.broadcast_to(np.arange(P), padded.shape), cache)
    errors = []
    for row, length in enumerate(PROMPTS):
        errors.append(np.abs(logits[row, :length] - want[row, :length]).max())
    rows = np.arange(len(PROMPTS))
    for t in range(TOTAL - P):  # every row has that many tokens left at least
        positions = PROMPTS + t
        logits, cache = step(tokens[rows, positions][:, None], positions[:, None], cache)
        errors.append(np.abs(logits[:, 0] - want[rows, positions]).max())
    error = np.max(errors) / np.abs(want).max()
    assert error < tolerance


def test_the_cache_is_as_large_as_was_said():
    cfg = ModelConfig(**TINY | {"num_kv_heads": 2, "dtype": "bfloat16"})
    cache = empty_cache(cfg, 3, 5)
    assert cache_bytes(cfg, 3, 5) == sum(x.nbytes for x in jax.tree.leaves(cache)) == 2 * 3 * 3 * 5 * 2 * 4 * 2
