"""Plans of small decoders by the compilers of devices that are not here, for test_tpu.py and test_cuda.py."""

import functools
import itertools
import re
from pathlib import Path

import spannorm_jax
from spannorm_jax.config_file import load
from spannorm_jax.plan import target

CONFIGS = Path(spannorm_jax.__file__).parents[1] / "configs"
DEPTH, WIDTH, VOCAB, ROWS, TIME = 4, 128, 512, 16, 128
FSDP = {"mesh.data": 2, "mesh.fsdp": 2}
# Blocks at a width where they, and not the overhead of small programs, are what is compared.
WIDE = {"model.width": 512, "model.num_heads": 4, "model.ffn_dim": 1408, "data.seq_len": 512}


open_target = functools.cache(target.open_target)


@functools.cache
def costs(topology, slices, program, arg="", overrides=()):
    """Name -> cost of the programs of a small decoder with heads of 128."""
    small = {"model.vocab_size": VOCAB, "model.num_heads": 1, "data.seq_len": TIME, "training.batch_size": ROWS}
    small |= {"eval.batch_size": ROWS} | dict(overrides)
    file = "moe.py" if "model.moe.top_k" in small else "dense.py"
    config = load(f"{CONFIGS}/{file}:tiny,depth={DEPTH},width={WIDTH}{arg}", [(k, str(v)) for k, v in small.items()])
    to = open_target(topology, slices)
    return {name: cost for name, cost, _ in target.costs(target.resolved(config, to, program), to, program, 4)}


def train_cost(topology, slices, placement, overrides):
    return costs(topology, slices, "train", f",placement={placement}", tuple(sorted(overrides.items())))["train"]


def gathered(cost):
    """(dtype, shape) of what is gathered, and of the pieces that it is gathered from."""
    lines = [line for line in cost.text.splitlines() if " all-gather(" in line or " all-gather-start(" in line]
    found = [pair for line in lines for pair in re.findall(r"(\w+)\[([\d,]+)\]", line.partition(" all-gather")[0])]
    return {(dtype, tuple(map(int, sizes.split(",")))) for dtype, sizes in found}


def assert_gathers_weights_in_the_compute_dtype_and_no_activation(cost):
    shapes = gathered(cost)
    assert shapes  # weights are split over fsdp
    assert not {(dtype, shape) for dtype, shape in shapes if dtype == "f32" and len(shape) > 1}
    activations = {(ROWS // 4, TIME), (ROWS // 2, TIME), (ROWS, TIME)}
    assert not {shape for _, shape in shapes if activations & set(itertools.pairwise(shape))}
