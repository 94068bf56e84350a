"""Collectives read from compiled programs, against what each must move; and from text as other backends write it."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from spannorm_jax.plan.collectives import collectives

ROWS, WIDTH = 16, 48  # of a device's float32 array
BYTES = ROWS * WIDTH * 4
INNER, OUTER = 3, 5


def ring(x, axis):
    n = jax.lax.axis_size(axis)
    return jax.lax.ppermute(x, axis, [(i, (i + 1) % n) for i in range(n)])


def partial_chain(x, axis):
    return jax.lax.ppermute(x, axis, [(0, 1)])


# name -> (what a device does with its array over an axis of n, kind, bytes received as a function of the array's, n)
PROGRAMS = {
    "psum": (jax.lax.psum, "all_reduce", lambda size, n: 2 * size * (n - 1) // n),
    "all_gather": (
        lambda x, axis: jnp.sum(jax.lax.all_gather(x, axis), axis=0),
        "all_gather",
        lambda size, n: size * (n - 1),
    ),
    "psum_scatter": (
        lambda x, axis: jnp.tile(jax.lax.psum_scatter(x, axis, tiled=True), (jax.lax.axis_size(axis), 1)),
        "reduce_scatter",
        lambda size, n: size * (n - 1) // n,
    ),
    "all_to_all": (
        lambda x, axis: jax.lax.all_to_all(x, axis, 0, 0, tiled=True),
        "all_to_all",
        lambda size, n: size * (n - 1) // n,
    ),
    "ppermute": (ring, "collective_permute", lambda size, n: size),
}
AXES = {"a": 2, "b": 4, ("a", "b"): 8}


def compiled(fn, *more):
    """Text of `fn(x, *more)` compiled for a 2 x 4 mesh, every device with its own (ROWS, WIDTH) of x."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    spec, all_ = PartitionSpec(("a", "b")), PartitionSpec()
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=(spec, *[all_ for _ in more]), out_specs=spec, check_vma=False)
    x = jax.ShapeDtypeStruct((8 * ROWS, WIDTH), jnp.float32, sharding=NamedSharding(mesh, spec))
    return jax.jit(mapped).lower(x, *more).compile().as_text()


def facts(found):
    return [(c.kind, c.bytes, c.group, c.count, c.branch) for c in found]


@pytest.mark.parametrize("axis", AXES, ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_bytes_and_group(name, axis):
    fn, kind, size = PROGRAMS[name]
    n = AXES[axis]
    assert facts(collectives(compiled(lambda x: fn(x, axis)))) == [(kind, size(BYTES, n), n, 1, ())]


def test_loops_are_multiplied_out_and_branches_told_apart():
    """An all-to-all in the outer of two loops; in the inner one a sum, or rarely a ring's step and a gather."""

    def usual(x):
        return jax.lax.psum(x, "b") / 4

    def rare(x):
        return ring(jnp.mean(jax.lax.all_gather(x, "a"), axis=0), "b")

    def fn(x, rarely):
        def inner(x, _):
            return jax.lax.cond(rarely, rare, usual, x) + 1, None

        def outer(x, _):
            x = jax.lax.all_to_all(x, "b", 0, 0, tiled=True)
            return jax.lax.scan(inner, x, length=INNER)[0], None

        return jax.lax.scan(outer, x, length=OUTER)[0]

    found = collectives(compiled(fn, False))
    assert sum(c.total for c in found if c.branch == (1,)) == INNER * OUTER * 2 * BYTES
    assert sorted(facts(found)) == [
        ("all_gather", BYTES, 2, INNER * OUTER, (1,)),
        ("all_reduce", BYTES * 3 // 2, 4, INNER * OUTER, (0,)),
        ("all_to_all", BYTES * 3 // 4, 4, OUTER, ()),
        ("collective_permute", BYTES, 4, INNER * OUTER, (1,)),
    ]


def test_branches_of_a_switch_inside_a_branch():
    def fn(x, i):
        branches = [lambda x: x, lambda x: jax.lax.psum(x, "a"), lambda x: jax.lax.psum(x, "b")]
        return jax.lax.cond(i > 5, lambda x: jax.lax.switch(i - 6, branches, x), lambda x: ring(x, "a"), x)

    assert sorted(facts(collectives(compiled(fn, 0)))) == [
        ("all_reduce", BYTES, 2, 1, (1, 1)),
        ("all_reduce", BYTES * 3 // 2, 4, 1, (1, 2)),
        ("collective_permute", BYTES, 2, 1, (0,)),
    ]


def test_arrays_that_are_reduced_together_count_one_by_one():
    def fn(x):
        return x * jax.lax.psum(jnp.sum(x), "b") + jax.lax.psum(x[:8], "b").sum()

    found = collectives(compiled(fn))
    assert sorted(c.bytes for c in found) == [2 * 4 * 3 // 4, 2 * (8 * WIDTH * 4) * 3 // 4]


def test_a_chain_that_is_no_ring_and_one_that_goes_nowhere():
    [found] = collectives(compiled(lambda x: partial_chain(x, "b")))
    assert (found.bytes, found.group) == (BYTES, 2)
    still = compiled(lambda x: jax.lax.ppermute(x, "b", [(i, i) for i in range(4)]))
    assert collectives(still) == []


def test_a_sum_of_which_each_device_takes_a_slice():
    """What the partitioner makes of a gradient that fsdp shards."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    rows, columns = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("d",), (None, "d")))
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=rows)

    def product(out):
        text = jax.jit(lambda x: x.T @ x, out_shardings=out).lower(x).compile().as_text()
        return [(c.kind, c.bytes, c.sliced) for c in collectives(text)]

    size = 32 * 32 * 4
    assert product(columns) == [("all_reduce", 2 * size * 7 // 8, True)]
    assert product(NamedSharding(mesh, PartitionSpec())) == [("all_reduce", 2 * size * 7 // 8, False)]


def test_half_precision_keeps_its_size():
    """On a CPU, float16 stays what it is, while bfloat16 becomes float32."""

    def fn(x):
        return jax.lax.all_gather(x.astype(jnp.float16), "b").astype(jnp.float32).sum(0)

    assert [c.bytes for c in collectives(compiled(fn))] == [BYTES // 2 * 3]


def test_names_are_jaxs_scopes():
    def fn(x):
        with jax.named_scope("moe"), jax.named_scope("dispatch"):
            return jax.lax.all_to_all(x, "b", 0, 0, tiled=True)

    [found] = collectives(compiled(fn))
    assert "moe/dispatch" in found.name


# As backends with asynchronous collectives write them, and with the other ways to write groups.
ASYNCHRONOUS = """HloModule jit_f, is_scheduled=true, num_partitions=8

%wrapped (p.1: bf16[64,4]) -> bf16[16,4] {
  %p.1 = bf16[64,4]{1,0} parameter(0)
  ROOT %reduce-scatter.1 = bf16[16,4]{1,0} reduce-scatter(%p.1), channel_id=3, replica_groups=[2,4]<=[8], to_apply=%add
}

ENTRY %main (p: bf16[16,4]) -> bf16[16,4] {
  %p = bf16[16,4]{1,0} parameter(0)
  %ag = (bf16[16,4]{1,0}, bf16[64,4]{1,0}) all-gather-start(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %agd = bf16[64,4]{1,0} all-gather-done(%ag), metadata={op_name="ignored"}
  %rs = ((bf16[64,4]{1,0}), bf16[16,4]{1,0}) async-start(%agd), calls=%wrapped
  %rsd = bf16[16,4]{1,0} async-done(%rs)
  %ar = bf16[16,4]{1,0} all-reduce-start(%rsd), replica_groups={}, to_apply=%add, metadata={op_name="jit(f)/psum"}
  %ard = bf16[16,4]{1,0} all-reduce-done(%ar)
  %cp = (bf16[16,4], bf16[16,4], u32[], u32[]) collective-permute-start(%ard), source_target_pairs={{0,1},{1,0}}
  %cpd = bf16[16,4]{1,0} collective-permute-done(%cp)
  %ar2 = bf16[16,4]{1,0} all-reduce(%cpd), replica_groups=mesh['x'=2,'y'=4] {'y':(2)2}, to_apply=%add
  ROOT %ar3 = bf16[16,4]{1,0} all-reduce(%ar2), replica_groups=mesh['x'=2,'y'=4] {'x','y'}, to_apply=%add
}
"""


def test_starts_and_ends_count_once():
    size = 16 * 4 * 2
    assert facts(collectives(ASYNCHRONOUS)) == [
        ("all_gather", 3 * size, 4, 1, ()),
        ("reduce_scatter", 3 * size, 4, 1, ()),
        ("all_reduce", 2 * size * 7 // 8, 8, 1, ()),
        ("collective_permute", size, 2, 1, ()),
        ("all_reduce", 2 * size // 2, 2, 1, ()),
        ("all_reduce", 2 * size * 7 // 8, 8, 1, ()),
    ]
    assert collectives(ASYNCHRONOUS)[2].name == "jit(f)/psum"


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="unknown way"):
        collectives(ASYNCHRONOUS.replace("replica_groups={}", "replica_groups=@7"))

    def fn(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 1, lambda x: jax.lax.psum(x, "b"), x)

    with pytest.raises(ValueError, match="how often"):
        collectives(compiled(fn))
