"""Parametrisations: what changes with width and depth, so that what was tuned at a base size holds at another.

A parametrisation is two functions: of a weight's declaration (cfg, WeightSpec) -> `Multipliers`, and of the model
(cfg) -> `Forward`. Both are 1 everywhere at the base size, where each parametrisation is `standard` bit for bit.

Notation: m = width / base_width, l = depth / base_depth, a = `depth_exponent`. Matrices are the weights that map the
width to something: roles hidden, expert and router. Multipliers are for optimisers whose updates have entries of one
size (AdamW, Lion); Muon's learning rates are `training/muon.py`'s.

An initialisation is asked for the BASE size (`at_base`), and the parametrisation goes on from there. So under
`completep` an initialisation's factor of depth (ScaleInit's, GPT-2's 1 / sqrt(2L)) is that of the base depth, and depth
is counted once: by the multiplier of the branches. A factor of a block's position (DS-Init's 1 / sqrt(l)) is that of
the base's block in its place, ceil(l base_depth / depth). `mup` and `everett` leave such factors in force.

Heads: the presets add heads of one size when the width grows, so attention logits q.k / sqrt(K) keep their size. Where
heads grow instead (`base_head_dim`), muP's rule q.k / K is met at the base: q.k / sqrt(K) times sqrt(K0 / K).
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spannorm_jax.config import ModelConfig

if TYPE_CHECKING:  # a command that is mistyped asks for the names here, and does without JAX
    from spannorm_jax.model.weights import WeightSpec

MATRICES = ("hidden", "expert", "router")


@dataclass(frozen=True)
class Multipliers:
    """Of one weight: std at the start, learning rate, coefficient of decay (beside that of its rate), AdamW's eps."""

    init: float = 1.0
    lr: float = 1.0
    decay: float = 1.0
    eps: float = 1.0


@dataclass(frozen=True)
class Forward:
    """Of the model: what enters from a tied embedding, each branch that is added to the stream, attention logits,
    output logits."""

    embedding: float = 1.0
    branch: float = 1.0
    attention: float = 1.0
    logits: float = 1.0


@dataclass(frozen=True)
class Parametrisation:
    """The two functions, and the base sizes that they read (`width`, `depth`)."""

    weight: Callable[[ModelConfig, "WeightSpec"], Multipliers]
    forward: Callable[[ModelConfig], Forward]
    base: tuple[str, ...] = ()


# ---- the table --------------------------------------------------------------------------------------


def _mup_weight(cfg: ModelConfig, spec: "WeightSpec") -> Multipliers:
    """muP for Adam (Yang et al. 2022, arXiv 2203.03466, table 8): a matrix's variance and learning rate / m.

    Decay is x m where the rate is / m: their product, by which a weight shrinks, stays. A gradient's entries are / m,
    and eps with them (Dey et al. 2025, arXiv 2505.01618, table 1). Others have the base's rate and variance.
    """
    m = cfg.width / cfg.base_width
    if spec.role in MATRICES:
        return Multipliers(init=m**-0.5, lr=1 / m, decay=m, eps=1 / m)
    return Multipliers(eps=1 / m)


def _mup_forward(cfg: ModelConfig) -> Forward:
    """Output logits / m; attention logits by 1 / K. A tied embedding keeps the base's std, and so its lookup the base's
    factor sqrt(base_width), where the width's own would let the stream grow by sqrt(m)."""
    m = cfg.width / cfg.base_width
    head_dim = cfg.width // cfg.num_heads
    attention = ((cfg.base_head_dim or head_dim) / head_dim) ** 0.5
    return Forward(embedding=m**-0.5, attention=attention, logits=1 / m)


def _everett_weight(cfg: ModelConfig, spec: "WeightSpec") -> Multipliers:
    """Standard parametrisation with a learning rate for each layer (Everett et al. 2024, arXiv 2407.05872, Adam with
    full alignment): matrices and the head have variance 1 / n and rate 1 / n, embeddings and gains the base's rate.

    The gradient's entries, and eps with them, are m^-1/2 of the base's but for the head's own. A tied embedding goes by
    the head's rule, and as a lookup moves by m^-1/2 less than the base's: no one rate serves both.
    """
    m = cfg.width / cfg.base_width
    if spec.role in (*MATRICES, "output"):
        return Multipliers(init=m**-0.5, lr=1 / m, decay=m, eps=1.0 if spec.role == "output" else m**-0.5)
    return Multipliers(eps=m**-0.5)


def _completep_weight(cfg: ModelConfig, spec: "WeightSpec") -> Multipliers:
    """CompleteP (Dey et al. 2025, arXiv 2505.01618, table 1): muP, and in the blocks rate x l^(a-1), eps x l^-a."""
    of_width = _mup_weight(cfg, spec)
    if not spec.layers:
        return of_width
    l, a = cfg.depth / cfg.base_depth, cfg.depth_exponent
    return dataclasses.replace(of_width, lr=of_width.lr * l ** (a - 1), eps=of_width.eps * l**-a)


def _completep_forward(cfg: ModelConfig) -> Forward:
    """muP's, and each branch that is added to the stream times l^-a."""
    return dataclasses.replace(_mup_forward(cfg), branch=(cfg.depth / cfg.base_depth) ** -cfg.depth_exponent)


PARAMETRISATIONS = {
    "standard": Parametrisation(lambda cfg, spec: Multipliers(), lambda cfg: Forward()),
    "mup": Parametrisation(_mup_weight, _mup_forward, base=("width",)),
    "everett": Parametrisation(_everett_weight, lambda cfg: Forward(), base=("width",)),
    "completep": Parametrisation(_completep_weight, _completep_forward, base=("width", "depth")),
}


def multipliers(cfg: ModelConfig, spec: "WeightSpec") -> Multipliers:
    """Those of one weight of a model."""
    return PARAMETRISATIONS[cfg.parametrisation].weight(cfg, spec)


def forward(cfg: ModelConfig) -> Forward:
    """Those of a model."""
    return PARAMETRISATIONS[cfg.parametrisation].forward(cfg)


# ---- the base ---------------------------------------------------------------------------------------


def base_config(cfg: ModelConfig) -> ModelConfig:
    """The config that an initialisation sees: of the base's width and depth, as far as the parametrisation reads it."""
    read = PARAMETRISATIONS[cfg.parametrisation].base
    return dataclasses.replace(cfg, **{size: getattr(cfg, f"base_{size}") for size in read})


def at_base(cfg: ModelConfig, spec: "WeightSpec") -> tuple[ModelConfig, "WeightSpec"]:
    """The config and declaration that an initialisation sees: of the base size, as far as the parametrisation reads it.

    A fan that is a number of units of the width's kind is / m; what a lookup sums, and tokens or experts, stay. Blocks
    are those of the base in their places.
    """
    if "width" in PARAMETRISATIONS[cfg.parametrisation].base:
        m = cfg.width / cfg.base_width
        if spec.role in (*MATRICES, "output"):
            spec = dataclasses.replace(spec, fan_in=spec.fan_in / m)
        if spec.role in ("embedding", "hidden", "expert"):
            spec = dataclasses.replace(spec, fan_out=spec.fan_out / m)
    base = base_config(cfg)
    places = (math.ceil((layer + 1) * base.depth / cfg.depth) - 1 for layer in spec.layers)
    return base, dataclasses.replace(spec, layers=tuple(places))
