"""Every implementation against a float64 loop over heads and positions, its gradient against central differences.

cuDNN's needs a GPU; splash attention is interpreted here.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from test_decoder import count_equations

from spannorm_jax.config import ExecutionConfig, MeshConfig, ModelConfig
from spannorm_jax.errors import UserError
from spannorm_jax.model.kernels.attention import attention, attention_for, keep_attention
from spannorm_jax.model.kernels.probe import compile_problem
from spannorm_jax.parallel.mesh import make_mesh

B, H, G, K = 2, 4, 2, 8
IMPLEMENTATIONS = ("xla", "blocked", "splash")


def reference(q, k, v, causal=True):
    out = np.zeros_like(q)
    for b, h, t in np.ndindex(q.shape[0], H, q.shape[1]):
        g, seen = h // (H // G), slice(t + 1 if causal else None)
        logits = k[b, seen, g] @ q[b, t, h] / K**0.5
        p = np.exp(logits - logits.max())
        out[b, t, h] = p / p.sum() @ v[b, seen, g]
    return out


def inputs(T, scale=1.0):
    rng = np.random.default_rng(T)
    return [scale * rng.standard_normal((B, T, heads, K)) for heads in (H, G, G)]


# 1: nothing to mask; 37: one block; 128 and 192: two and three blocks; 131, a prime: two blocks, of which the last is
# padded; 577, a prime, and 600: loops over nine blocks, two at a time, padded.
LENGTHS = [1, 37, 128, 131, 192, 577, 600]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("name", "T"), [("splash", 100), ("splash", 384), *((n, T) for n in ("xla", "blocked") for T in LENGTHS)]
)
def test_output(name, T, causal):
    q, k, v = inputs(T)
    out = attention(*(jnp.float32(x) for x in (q, k, v)), name, causal)
    # Sums of up to 600 float32 terms of size 1 / T: largest error seen 4.7e-7.
    np.testing.assert_allclose(out, reference(q, k, v, causal), rtol=0, atol=2e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("name", "T"),
    [*((n, 128) for n in IMPLEMENTATIONS), ("blocked", 197), ("blocked", 577), ("splash", 100), ("splash", 1100)],
)
def test_gradients(name, T, causal):
    exact, rng = inputs(T), np.random.default_rng(0)
    cotangent = rng.standard_normal(exact[0].shape)

    def value(*x):
        return jnp.sum(attention(*x, name, causal) * jnp.float32(cotangent))

    grads = jax.grad(value, (0, 1, 2))(*(jnp.float32(x) for x in exact))
    for i, grad in enumerate(grads):
        direction = rng.standard_normal(exact[i].shape)
        moved = [[x + s * direction if j == i else x for j, x in enumerate(exact)] for s in (1e-5, -1e-5)]
        difference = np.sum((reference(*moved[0], causal) - reference(*moved[1], causal)) * cotangent) / 2e-5
        # Terms of both signs: the error is float32's of the largest partial sum, largest seen 6.8e-6.
        assert np.vdot(np.float64(grad), direction) == pytest.approx(difference, abs=3e-5, rel=0)


def test_memory_of_blocks_is_linear_in_time():
    """The logits of a whole square, or of an eighth of one, would be four times as many at twice the length."""

    def temporaries(T):
        x = jax.ShapeDtypeStruct((1, T, 1, K), jnp.float32)
        grad = jax.grad(lambda *x: jnp.sum(attention(*x, "blocked")), (0, 1, 2))
        return jax.jit(grad).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(4096) < 2.2 * temporaries(2048)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_large_logits_do_not_overflow(name):
    q, k, v = inputs(128, scale=40.0)  # logits to about 10^4, whose exponential no float holds
    out = attention(*(jnp.float32(x) for x in (q, k, v)), name)
    np.testing.assert_allclose(out, reference(q, k, v), rtol=0, atol=4e-4)  # largest error seen 9e-5
    assert np.isfinite(out).all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_bfloat16_stays_bfloat16(name):
    q, k, v = inputs(128)
    out = attention(*(jnp.bfloat16(x) for x in (q, k, v)), name)
    assert out.dtype == jnp.bfloat16
    # Inputs, weights and output are each rounded to 8 bits: largest error seen 0.013.
    np.testing.assert_allclose(np.float32(out), reference(q, k, v), rtol=0, atol=0.03)


def test_splash_on_a_mesh_of_eight():
    """Rows over data and fsdp, heads over tensor; each device runs the kernel on its part."""
    rng = np.random.default_rng(1)
    q, k, v = (jnp.float32(rng.standard_normal((4, 128, heads, K))) for heads in (H, G, G))

    def value_and_grads(name):
        def value(*x):
            out = attention(*x, name)
            return jnp.sum(out**2), out

        return jax.jit(jax.grad(value, (0, 1, 2), has_aux=True))(q, k, v)

    alone = value_and_grads("xla")
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        parts = value_and_grads("splash")
    # Float32 sums of up to 128 terms in another order: largest difference seen 1.2e-5, of values up to 22.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-5), parts, alone)


def test_auto_is_blocked_on_a_cpu_and_names_are_taken_or_refused():
    cfg = ModelConfig(width=32, num_heads=4, num_kv_heads=4, dtype="bfloat16")

    def named(name, seq_len=128):
        return attention_for(ExecutionConfig(attention=name), cfg, seq_len)

    assert named("auto") == ("blocked", "")
    assert named("splash") == named("splash", seq_len=100) == ("splash", "")  # the positions are filled up
    with pytest.raises(UserError, match="cudnn cannot run here: there is no GPU"):
        named("cudnn")


def test_a_kernel_that_asks_where_it_is_can_be_tried_within_a_trace():
    """As Pallas kernels do: what has no inputs must not be evaluated at once, where its axis is not bound."""
    mesh = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Auto,))

    @partial(jax.shard_map, mesh=mesh, in_specs=P("i"), out_specs=P("i"))
    def kernel(x):
        return x * jax.lax.axis_index("i")

    found = []

    @jax.jit
    def step(x):
        found.append(compile_problem(kernel, jax.ShapeDtypeStruct((4, 3), jnp.float32), gradients=1))
        found.append(compile_problem(kernel, jax.ShapeDtypeStruct((3, 3), jnp.float32), gradients=1))
        return x + 1

    assert step(1.0) == 2.0
    assert found[0] == "" and "divisible" in found[1]


def test_remat_runs_cudnns_forward_pass_once(monkeypatch):
    """As a program, which needs no GPU once JAX's look for cuDNN is answered."""
    cudnn = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    q, k, v = (jnp.bfloat16(x) for x in inputs(128))

    def forward_passes(policy):
        def value(*x):
            return jnp.sum(jnp.sin(attention(*x, "cudnn").astype(jnp.float32)))

        grad = jax.grad(jax.checkpoint(value, policy=policy), (0, 1, 2))
        return count_equations(jax.make_jaxpr(grad)(q, k, v).jaxpr, "dot_product_attention_fwd_wrapper")

    assert forward_passes(jax.checkpoint_policies.nothing_saveable) == 2
    assert forward_passes(keep_attention) == 1
