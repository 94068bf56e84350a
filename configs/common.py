"""What the config files share. Each of them says in its own docstring what its presets are."""

from typing import Any

from ml_collections import ConfigDict

from spannorm_jax.config_file import default_config, parse_arg
from spannorm_jax.errors import UserError
from spannorm_jax.model.initialisation import PUBLISHED, read_reading

# Dense decoders from 124 million parameters up. Heads of 128 fill an accelerator's matrix units; 64 take as long.
DENSE = {
    "124m": {"depth": 12, "width": 768, "head_dim": 128, "seq_len": 1024, "batch_size": 256, "lr": 1e-3},
    "350m": {"depth": 24, "width": 1024, "head_dim": 128, "seq_len": 1024, "batch_size": 256, "lr": 6e-4},
    "1b": {"depth": 20, "width": 2048, "head_dim": 128, "seq_len": 2048, "batch_size": 512, "lr": 4e-4},
}


# The placements of sweeps that have been run over all that there were; newer ones have sweeps of their own.
STUDIED = (
    *("pre", "post", "span", "span_raw", "peri", "hybrid", "layerscale", "siamese", "deepnorm", "olmo2", "b2t"),
    *("residual", "mix", "lns", "keel", "rezero", "subln"),
)

# Recipes with a name of their own, that are no placement's.
RECIPES = {"prores": {"placement": "pre", "init": "plain", "branch_warmup_steps": 1000.0}}  # arXiv 2603.05369


def decoder(arg: str | None, presets: dict[str, dict[str, Any]]) -> tuple[str, ConfigDict]:
    """The preset of a config file's argument, and its config: all that any decoder has.

    `rival=NAME` is a placement with the initialisation that its authors published, or one of RECIPES; `init` may name a
    reading of ScaleInit (`scale-L0.5`, `model.initialisation.reading`).
    """
    arg = parse_arg(arg, presets=tuple(presets), depth=0, width=0, placement="", init="", rival="")
    if arg.rival and (arg.placement or arg.init):
        raise UserError(
            f"rival={arg.rival} says both placement and init; leave those out, or write "
            f"placement={RECIPES.get(arg.rival, {}).get('placement', arg.rival)},init=..."
        )
    preset = presets[arg.preset]
    config = default_config()
    config.model.depth = arg.depth or preset["depth"]
    config.model.width = arg.width or preset["width"]
    config.model.num_heads = max(1, config.model.width // preset["head_dim"])
    config.model.placement = arg.rival or arg.placement or "span"
    config.model.update(read_reading(PUBLISHED if arg.rival else arg.init or "scale"))
    config.model.update(RECIPES.get(arg.rival, {}))
    config.data.seq_len = preset.get("seq_len", config.data.seq_len)  # of images it is filled in
    config.training.batch_size = preset["batch_size"]
    config.optim.lr = preset["lr"]
    return arg.preset, config


def dense_decoder(arg: str | None, presets: dict[str, dict[str, Any]]) -> tuple[str, ConfigDict]:
    """`decoder` without experts; in 1b two heads share keys and values."""
    preset, config = decoder(arg, presets)
    if preset == "1b":
        config.model.num_kv_heads = config.model.num_heads // 2
    return preset, config


def full_size(config: ConfigDict) -> None:
    """What presets beyond a laptop's share: the embedding is the head, and a run is long."""
    config.model.tied_head = True
    config.training.steps = 20000
    config.training.z_loss = 1e-4
    config.checkpoint.every_steps = 1000
    config.metrics.log_every = 10
    config.metrics.block_grad_every = 500
    config.eval.tokens = 2**21
