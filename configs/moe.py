"""Mixture-of-Experts decoders: as configs/dense.py, with experts in the feed-forward of every block.

    python -m spannorm_jax.train --config configs/moe.py:tiny,placement=span,init=scale --workdir runs/moe

The argument is a preset, then any of depth, width, placement, init. Everything else is an override, for example
--config.model.moe.balance=bias --config.model.moe.scores=sigmoid --config.model.moe.num_shared=1

preset  blocks  width  heads  experts (top)  expert   vocabulary      parameters         active
tiny        24     64      4         8 (2)       88  256 (bytes)       3,685,440      1,252,416   not measured yet
8x124m      12    768      6         8 (2)     2048  50304, tied     520,022,784    180,284,160   not measured yet
64x8-124m   12    768      6        64 (8)      256  50304, tied     520,538,880    124,177,152   not measured yet
16b         27   2048     16        64 (6)     1408  102400       15,789,832,192  2,744,498,176   not measured yet

Parameters are those of placement=span; active ones are those that a token meets.

16b has the shape of DeepSeek-V2-Lite and Moonlight: a dense block, then 26 of 64 small experts (six and two shared a
token), with the router of DeepSeek-V3. It has never been trained here. What a step of 1024 x 4096 tokens takes, from

    python -m spannorm_jax.plan --config configs/moe.py:16b --devices 32 --device_kind 'TPU v5'
    python -m spannorm_jax.plan --config configs/moe.py:16b --devices 8 --device_kind 'NVIDIA H200' \
        --config.training.num_microbatches=32

machine                   mesh (from -1)     state    at least  planned by XLA for a CPU    received   at peak FLOP/s
v5p-64: 32 chips, 95 GB   fsdp 8, expert 4   7.5 GB   14.8 GB   46.2 GB (49%)                 614 GB   4.7 s
8 x H200, 141 GB          fsdp 2, expert 4  30.0 GB   52.2 GB   82.9 GB (59%)               1,949 GB   8.8 s

per device: what lies between steps, with gradients and kept activations, with all temporaries, bytes from others.
"""

from collections.abc import Iterable

from ml_collections import ConfigDict

from spannorm_jax.sweep.definition import (
    Point,
    arguments,
    chain,
    fixed,
    product,
    seeds,
    sweep_seed,  # noqa: F401 (a sweep of this file too)
)

from .common import STUDIED, decoder, full_size

PRESETS = {
    "tiny": {
        "depth": 24, "width": 64, "head_dim": 16, "experts": (8, 2, 88), "seq_len": 128, "batch_size": 8, "lr": 3e-3
    },
    "8x124m": {
        "depth": 12, "width": 768, "head_dim": 128, "experts": (8, 2, 2048), "seq_len": 1024, "batch_size": 256,
        "lr": 1e-3,
    },
    "64x8-124m": {
        "depth": 12, "width": 768, "head_dim": 128, "experts": (64, 8, 256), "seq_len": 1024, "batch_size": 256,
        "lr": 1e-3,
    },
    "16b": {
        "depth": 27, "width": 2048, "head_dim": 128, "experts": (64, 6, 1408), "seq_len": 4096, "batch_size": 1024,
        "lr": 4e-4,
    },
}  # fmt: skip


def get_config(arg: str | None = None) -> ConfigDict:
    preset, config = decoder(arg, PRESETS)
    config.model.moe.num_experts, config.model.moe.top_k, config.model.moe.expert_dim = PRESETS[preset]["experts"]
    if preset != "tiny":
        full_size(config)
        config.model.vocab_size = 50304
    if preset == "16b":
        config.model.vocab_size = 102400
        config.model.tied_head = False
        config.model.ffn_dim = 8 * 1408  # of the first block: as many hidden units as a token meets in the others
        config.execution.remat = "block"
        config.model.moe.num_shared = 2
        config.model.moe.first_dense = 1
        # As DeepSeek-V3: loads are balanced without a loss that pulls against the language model's.
        config.model.moe.scores = "sigmoid"
        config.model.moe.balance = "bias"
        config.training.num_microbatches = 8
        # Each piece of the loss gathers the head and sums its gradient: with 256 MiB that was half of all traffic.
        config.execution.max_logits_mib = 2048
        config.mesh.data, config.mesh.fsdp, config.mesh.expert = 1, -1, 4
    return config


# ---- sweeps ---------------------------------------------------------------------------------------
#
# Each says its time in size cpu and in size gpu, by `cost` at 7e10 FLOP/s (two CPU cores) and 4e14 (an H100).

# Without its experts a preset is that of configs/dense.py, and the run the same.
_WITH, _WITHOUT = fixed(), fixed("", {"model.moe.num_experts": 0, "model.moe.expert_dim": 0})


def _recipe(size: str) -> list[Point]:
    """What all runs of a size share: 250 steps of tiny, or 20 tokens a parameter that a token of 124m meets."""
    if size == "cpu":
        return fixed("tiny", {"training.steps": 250, "checkpoint.every_steps": 50, "checkpoint.keep_last": 1})
    return fixed("8x124m", {"training.steps": 0, "training.tokens": 2_500_000_000})


def sweep_experts(size: str) -> Iterable[Point]:
    """Dense models against experts, seventeen placements, three seeds. 102 runs: 1.0 h, 172 h."""
    arms = arguments(placement=STUDIED, init=("scale",))
    return product(seeds(3), _recipe(size), chain(_WITHOUT, _WITH), arms)


def sweep_demo(size: str) -> Iterable[Point]:
    """`make demo`: three placements with two initialisations, and with experts with one. 9 runs: 5 min, 14 h."""
    placements = ("pre", "post", "span")
    dense = product(_WITHOUT, arguments(placement=placements, init=("plain", "scale")))
    experts = product(_WITH, arguments(placement=placements, init=("scale",)))
    return product(_recipe(size), chain(dense, experts))
