"""Cross-entropy whose gradient is made in the forward pass, against the plain formula and JAX's own gradient of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from small_model import assert_trees_close

from spannorm_jax.config import MeshConfig
from spannorm_jax.model.kernels.cross_entropy import cross_entropy
from spannorm_jax.parallel.mesh import make_mesh

B, T, D, V, Z_LOSS = 4, 12, 16, 40, 0.3


def plain(features, head, targets, weights):
    """The objective in float32, from all logits at once."""
    logits = (features @ head.astype(features.dtype)).astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    nll = log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum((nll + Z_LOSS * log_z**2) * weights)


def drawn(dtype="float32", vocab=V):
    rng = np.random.default_rng(0)
    return (
        jnp.asarray(rng.standard_normal((B, T, D)), dtype),
        jnp.asarray(rng.standard_normal((D, vocab)) / D**0.5, jnp.float32),
        jnp.asarray(rng.integers(vocab, size=(B, T)), jnp.int32),
        jnp.asarray(rng.random((B, T)) < 0.8, jnp.float32),
    )


def ours(num_chunks):
    def objective(features, head, targets, weights):
        return cross_entropy(features, head, targets, weights, jnp.float32(Z_LOSS), num_chunks)[0]

    return jax.jit(jax.value_and_grad(objective, (0, 1)))


@pytest.mark.parametrize("vocab", [V, 8])  # wider and narrower than the features
@pytest.mark.parametrize("num_chunks", [1, 3, 5, 12])
def test_value_and_gradients(num_chunks, vocab):
    """Sums of up to 48 x 40 float32 terms: largest error seen 4e-7 of an array's largest value."""
    args = drawn(vocab=vocab)
    value, grads = ours(num_chunks)(*args)
    want, want_grads = jax.value_and_grad(plain, (0, 1))(*args)
    assert float(value) == pytest.approx(float(want), rel=1e-6)
    assert_trees_close(grads, want_grads, 2e-6)


def test_gradients_in_bfloat16_are_those_of_float32_rounded():
    """The head's is summed in float32 over all pieces: it errs by the rounding of its terms, not of its sums."""
    features, head, *rest = drawn("bfloat16")
    _, (dfeatures, dhead) = ours(6)(features, head, *rest)
    rounded = head.astype(jnp.bfloat16).astype(jnp.float32)
    exact = jax.grad(plain, (0, 1))(features.astype(jnp.float32), rounded, *rest)
    assert (dfeatures.dtype, dhead.dtype) == (jnp.bfloat16, jnp.float32)
    # A term is rounded to 8 bits, 2^-9 of it; those of dfeatures are rounded once more as a sum.
    assert_trees_close(dfeatures, exact[0], 2**-7)
    assert_trees_close(dhead, exact[1], 2**-8)


@pytest.mark.parametrize("shape", [{"data": 8}, {"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_on_eight_devices(shape):
    mesh = make_mesh(MeshConfig(**shape))
    args = tuple(jnp.tile(x, (2, *[1] * (x.ndim - 1))) if i != 1 else x for i, x in enumerate(drawn()))
    want_value, want_grads = ours(3)(*args)
    batch, head = PartitionSpec(("data", "fsdp", "expert")), PartitionSpec("fsdp", "tensor")
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, head if i == 1 else batch)) for i, x in enumerate(args)]
        value, grads = ours(3)(*placed)
    assert float(value) == pytest.approx(float(want_value), rel=1e-6)
    assert_trees_close(grads, want_grads, 2e-6)


def test_a_target_is_correct_if_no_logit_is_larger():
    features, head = jnp.eye(4)[None], jnp.asarray([[0, 1, 2.0], [3, 1, 2], [1, 1, 0], [0, 0, 0]])
    targets = jnp.asarray([[2, 1, 1, 2]])  # largest, smaller, tied, all tied
    sums = cross_entropy(features, head, targets, jnp.ones((1, 4)), jnp.float32(0), 1)[1]
    assert float(sums["correct"]) == 3
