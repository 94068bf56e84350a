"""The model that the CPU's speed is measured on: 12 blocks, width 256, 4 heads, GELU, 9.6M parameters.

    python -m experiments.benchmarks.throughput --config configs/throughput.py --json cpu.json

Sequence 256, batch 8, bytes, float32: the size that other trainers have been measured at.
"""

from ml_collections import ConfigDict

from spannorm_jax.config_file import default_config, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, placement="span", init="scale")
    config = default_config()
    config.model.depth = 12
    config.model.width = 256
    config.model.num_heads = 4
    config.model.ffn = "gelu"
    config.execution.remat = "dots"
    config.model.placement = arg.placement
    config.model.init = arg.init
    config.data.seq_len = 256
    config.training.batch_size = 8
    return config
