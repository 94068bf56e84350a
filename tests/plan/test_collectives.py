"""Collectives read from compiled programs, against what each must move; and from text as other backends write it."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from spannorm_jax.plan.collectives import collectives
from spannorm_jax.plan.hlo import Module

ROWS, WIDTH = 16, 48  # of a device's float32 array
BYTES = ROWS * WIDTH * 4


def ring(x, axis):
    n = jax.lax.axis_size(axis)
    return jax.lax.ppermute(x, axis, [(i, (i + 1) % n) for i in range(n)])


def compiled(fn, *more):
    """Text of `fn(x, *more)` compiled for a 2 x 4 mesh, every device with its own (ROWS, WIDTH) of x."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    spec, all_ = PartitionSpec(("a", "b")), PartitionSpec()
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=(spec, *[all_ for _ in more]), out_specs=spec, check_vma=False)
    x = jax.ShapeDtypeStruct((8 * ROWS, WIDTH), jnp.float32, sharding=NamedSharding(mesh, spec))
    return jax.jit(mapped).lower(x, *more).compile().as_text()


def facts(found):
    return [(c.kind, c.bytes, c.group, c.count, c.branch) for c in found]


@pytest.mark.parametrize(("axis", "n"), [("a", 2), ("b", 4), (("a", "b"), 8)], ids=str)
def test_bytes_and_group(axis, n):
    """Each kind once; the sum of 8 rows and of one number is one operation, and two arrays."""

    def fn(x):
        with jax.named_scope("moe"), jax.named_scope("dispatch"):
            x = jax.lax.all_to_all(ring(x, axis), axis, 0, 0, tiled=True)
        x = jnp.sum(jax.lax.all_gather(x, axis), axis=0)
        x = jnp.tile(jax.lax.psum_scatter(x, axis, tiled=True), (n, 1))
        return x * jax.lax.psum(jnp.sum(x), axis) + jax.lax.psum(x[:8], axis).sum()

    found = collectives(Module(compiled(fn)))
    assert sorted(facts(found)) == [
        ("all_gather", BYTES * (n - 1), n, 1, ()),
        *(("all_reduce", 2 * size * (n - 1) // n, n, 1, ()) for size in (4, 8 * WIDTH * 4)),
        ("all_to_all", BYTES * (n - 1) // n, n, 1, ()),
        ("collective_permute", BYTES, 2, 1, ()),
        ("reduce_scatter", BYTES * (n - 1) // n, n, 1, ()),
    ]
    assert ["moe/dispatch" in c.name for c in found] == [c.kind in ("all_to_all", "collective_permute") for c in found]


def test_loops_are_multiplied_out_and_branches_told_apart():
    """An all-to-all in the outer of two loops; in the inner one a sum, or rarely what a switch says or a gather."""

    def rare(x, i):
        x = jnp.mean(jax.lax.all_gather(x.astype(jnp.float16), "a").astype(x.dtype), axis=0)
        return jax.lax.switch(i - 1, [lambda x: x, lambda x: jax.lax.psum(x, "a"), lambda x: ring(x, "b")], x)

    def fn(x, i):
        def inner(x, _):
            return jax.lax.cond(i > 0, rare, lambda x, _: jax.lax.psum(x, "b") / 4, x, i) + 1, None

        def outer(x, _):
            x = jax.lax.all_to_all(x, "b", 0, 0, tiled=True)
            return jax.lax.scan(inner, x, length=3)[0], None

        return jax.lax.scan(outer, x, length=5)[0]

    found = collectives(Module(compiled(fn, 0)))
    assert sorted(facts(found)) == [
        ("all_gather", BYTES // 2, 2, 15, (1,)),  # half precision keeps its size
        ("all_reduce", BYTES, 2, 15, (1, 1)),
        ("all_reduce", BYTES * 3 // 2, 4, 15, (0,)),
        ("all_to_all", BYTES * 3 // 4, 4, 5, ()),
        ("collective_permute", BYTES, 2, 15, (1, 2)),
    ]
    assert sum(c.total for c in found if c.branch[:1] == (0,)) == 15 * BYTES * 3 // 2


def test_a_sum_of_which_each_device_takes_a_slice():
    """What the partitioner makes of a gradient that fsdp shards."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    rows, columns, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("d",), (None, "d"), ()))
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=rows)
    for out, sliced in ((columns, True), (whole, False)):
        text = jax.jit(lambda x: x.T @ x, out_shardings=out).lower(x).compile().as_text()
        assert [(c.kind, c.bytes, c.sliced) for c in collectives(Module(text))] == [
            ("all_reduce", 2 * 4096 * 7 // 8, sliced)
        ]


# As backends with asynchronous collectives write them, with tiled layouts, and with the other ways to write groups.
ASYNCHRONOUS = """HloModule jit_f, is_scheduled=true, num_partitions=8

%wrapped (p.1: bf16[64,4]) -> bf16[16,4] {
  %p.1 = bf16[64,4]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %reduce-scatter.1 = bf16[16,4]{1,0} reduce-scatter(%p.1), channel_id=3, replica_groups=[2,4]<=[8], to_apply=%add
}

ENTRY %main (p: bf16[16,4]) -> bf16[16,4] {
  %p = bf16[16,4]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %ag = (bf16[16,4]{1,0}, bf16[64,4]{1,0}) all-gather-start(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %agd = bf16[64,4]{1,0:T(8,128)(2,1)} all-gather-done(%ag), metadata={op_name="ignored"}
  %rs = ((bf16[64,4]{1,0}), bf16[16,4]{1,0}) async-start(%agd), calls=%wrapped
  %rsd = bf16[16,4]{1,0} async-done(%rs)
  %ar = bf16[16,4]{1,0} all-reduce-start(%rsd), replica_groups={}, to_apply=%add, metadata={op_name="jit(f)/psum"}
  %ard = bf16[16,4]{1,0} all-reduce-done(%ar)
  %cp = (bf16[16,4], bf16[16,4], u32[], u32[]) collective-permute-start(%ard), source_target_pairs={{0,1},{1,0}}
  %cpd = bf16[16,4]{1,0} collective-permute-done(%cp)
  %still = bf16[16,4]{1,0} collective-permute(%cpd), source_target_pairs={{0,0},{1,1}}
  %ar2 = bf16[16,4]{1,0} all-reduce(%still), replica_groups=mesh['x'=2,'y'=4] {'y':(2)2}, to_apply=%add
  ROOT %ar3 = bf16[16,4]{1,0} all-reduce(%ar2), replica_groups=mesh['x'=2,'y'=4] {'x','y'}, to_apply=%add
}
"""


def test_starts_and_ends_count_once():
    size = 16 * 4 * 2
    assert facts(collectives(Module(ASYNCHRONOUS))) == [
        ("all_gather", 3 * size, 4, 1, ()),
        ("reduce_scatter", 3 * size, 4, 1, ()),
        ("all_reduce", 2 * size * 7 // 8, 8, 1, ()),
        ("collective_permute", size, 2, 1, ()),
        ("all_reduce", 2 * size // 2, 2, 1, ()),
        ("all_reduce", 2 * size * 7 // 8, 8, 1, ()),
    ]
    assert collectives(Module(ASYNCHRONOUS))[2].name == "jit(f)/psum"
    with pytest.raises(ValueError, match="unknown way"):
        collectives(Module(ASYNCHRONOUS.replace("replica_groups={}", "replica_groups=@7")))


def test_a_loop_of_unknown_length_is_refused():
    def fn(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 1, lambda x: jax.lax.psum(x, "b"), x)

    with pytest.raises(ValueError, match="how often"):
        collectives(Module(compiled(fn)))
