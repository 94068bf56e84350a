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

from .common import DENSE, dense_decoder, full_size

PRESETS = {
    "tiny": {"depth": 24, "width": 64, "head_dim": 16, "seq_len": 128, "batch_size": 8, "lr": 3e-3},
    **DENSE,
}


def get_config(arg: str | None = None) -> ConfigDict:
    preset, config = dense_decoder(arg, PRESETS)
    if preset != "tiny":
        full_size(config)
        config.model.vocab_size = 50304
    return config
