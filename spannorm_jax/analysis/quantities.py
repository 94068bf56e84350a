"""What figures draw of the records of the signal, and how tables write its numbers."""

import math
from typing import Any

from spannorm_jax.model.initialisation import reading

# Key of a list over blocks -> title of its axis, and whether the axis is logarithmic.
QUANTITIES = {
    "stream_variance": ("variance of the stream", True),
    "attn_variance": ("variance of the attention's output", True),
    "ffn_variance": ("variance of the feed-forward's output", True),
    "token_correlation": ("correlation of tokens", False),
    "effective_rank": ("effective rank of the stream", True),
    "ffn_effective_rank": ("effective rank of post-activations", True),
    "stream_grad_norm": ("gradient norm of the stream, over the last block's", True),
    "stream_loss_grad_norm": ("the loss's gradient norm, over the last block's", True),
    "skip_path": ("gradient norm by the skip path alone", True),
    "attn_forward_variance": ("forward variance f of attention", True),
    "ffn_forward_variance": ("forward variance f of the feed-forward", True),
    "attn_backward_gain": ("backward gain b of attention", True),
    "ffn_backward_gain": ("backward gain b of the feed-forward", True),
    "angular_distance": ("angular distance of a block", False),
    "jacobian_deviation": ("Jacobian deviation of a block", True),
    "jacobian_deviation_unscaled": ("Jacobian deviation, norms undone", True),
    "attention_entropy_relative": ("entropy of attention, relative", False),
    "skip_loss_change": ("loss change without the block (nats)", False),
    "affine_loss_change": ("loss change with an affine block (nats)", False),
    "update_stream_change": ("relative change by one update", True),
    "expert_load_max": ("largest load over the mean", False),
    "router_entropy": ("entropy of the router (nats)", False),
}

SHARPNESS = ("sharpness", "preconditioned_sharpness", "sharpness_bound")


def init_in(model: dict[str, Any]) -> str:
    """The initialisation of a record's model, with the reading of ScaleInit; older records lack its younger options."""
    return reading(model["init"], model.get("variance_exponent", 0.0), model.get("depth_factor", "weight"))


# Key -> heading in a table.
_COLUMNS = {
    "stream_variance": "stream var",
    "attn_variance": "attn var",
    "ffn_variance": "ffn var",
    "token_correlation": "correlation",
    "effective_rank": "rank",
    "stream_grad_norm": "gradient",
    "skip_path": "skip path",
    "skip_loss_change": "skipped",
    "affine_loss_change": "affine",
}
_MOST = 24  # rows of a table


def table(record: dict[str, Any], depth: int) -> list[str]:
    """The lines of a table of what a record has of each block, or of evenly spread ones."""
    columns = [key for key in _COLUMNS if key in record]
    if not columns:
        return []
    lines = ["", "block" + "".join(f"{_COLUMNS[key]:>13}" for key in columns)]
    for layer in sorted({round(i * (depth - 1) / (_MOST - 1)) for i in range(_MOST)}):
        lines.append(f"{layer + 1:>5}" + "".join(f"{shown(record[key][layer], '.4g'):>13}" for key in columns))
    return lines


def shown(value: float | None, form: str) -> str:
    """A number in a table, or a dash where there is none, or none that is finite."""
    return "-" if value is None or not math.isfinite(value) else format(value, form)
