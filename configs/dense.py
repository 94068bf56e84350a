"""Dense decoders, from a laptop's to one billion parameters.

    python -m spannorm_jax.train --config configs/dense.py:tiny,placement=span,init=scale --workdir runs/tiny

The argument is a preset, then any of depth, width, placement, init:  configs/dense.py:350m,depth=48,placement=pre
Everything else is an override:  --config.optim.lr=1e-3 --config.data.seq_len=2048

preset  blocks  width  heads (kv)  ffn   vocabulary     parameters
tiny        24     64    4 (4)      176  256 (bytes)     1,240,128   the demo's; results in README.md
124m        12    768   12 (12)    2048  50304, tied   123,587,328   not measured yet
350m        24   1024   16 (16)    2816  50304, tied   359,842,816   not measured yet
1b          20   2048   16 (8)     5504  50304, tied 1,031,096,320   not measured yet

Parameters are those of placement=span (pre and span have one more norm than post). The larger presets have
a vocabulary for a 50k tokenizer; for bytes write --config.model.vocab_size=256.
"""

from ml_collections import ConfigDict

from spannorm_jax.config_file import default_config, parse_arg

PRESETS = {
    "tiny": {"depth": 24, "width": 64, "head_dim": 16, "seq_len": 128, "batch_size": 8, "lr": 3e-3},
    "124m": {"depth": 12, "width": 768, "head_dim": 64, "seq_len": 1024, "batch_size": 256, "lr": 1e-3},
    "350m": {"depth": 24, "width": 1024, "head_dim": 64, "seq_len": 1024, "batch_size": 256, "lr": 6e-4},
    "1b": {"depth": 20, "width": 2048, "head_dim": 128, "seq_len": 2048, "batch_size": 512, "lr": 4e-4},
}


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, presets=tuple(PRESETS), depth=0, width=0, placement="span", init="scale")
    preset = PRESETS[arg.preset]
    config = default_config()
    config.model.depth = arg.depth or preset["depth"]
    config.model.width = arg.width or preset["width"]
    config.model.num_heads = max(1, config.model.width // preset["head_dim"])
    config.model.placement = arg.placement
    config.model.init = arg.init
    config.data.seq_len = preset["seq_len"]
    config.training.batch_size = preset["batch_size"]
    config.optim.lr = preset["lr"]
    if arg.preset != "tiny":
        config.model.vocab_size = 50304
        config.model.tied_head = True
        config.training.steps = 20000
        config.training.z_loss = 1e-4
        config.checkpoint.every_steps = 1000
        config.metrics.log_every = 10
        config.metrics.block_grad_every = 500
        config.eval.tokens = 2**21
    if arg.preset == "1b":
        config.model.num_kv_heads = config.model.num_heads // 2
        config.execution.remat = "dots"
    return config
