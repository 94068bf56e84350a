"""A repository of one modelling file that carries every placement: PyTorch around the placements' own text."""

import inspect
import re
from importlib.resources import files
from typing import Any

from spannorm_jax.config import ModelConfig, moe_layers
from spannorm_jax.errors import UserError
from spannorm_jax.hf import stock
from spannorm_jax.hf.stock import Architecture
from spannorm_jax.model import placement, rivals
from spannorm_jax.model.placement import PLACEMENTS, placement_of

FILE = "modeling_spannorm.py"
_HERE = "# PLACEMENTS\n"
_PASTED = (placement, rivals)


def check(cfg: ModelConfig) -> None:
    """Raises UserError for a placement whose text is not here."""
    module = placement_of(cfg).block.__module__
    if module not in {pasted.__name__ for pasted in _PASTED}:
        raise UserError(
            f"model.placement={cfg.placement} was declared in {module}, and only the placements of "
            "spannorm_jax/model can be exported; move its declaration to spannorm_jax/model/rivals.py"
        )


def modelling_file() -> str:
    """The text of modeling_spannorm.py; its equations are those of `placement.py` and `rivals.py`."""
    text = (files("spannorm_jax.hf") / f"{FILE}.txt").read_text(encoding="utf-8")
    pasted = (re.sub(r"(?m)^(import \S+|from \S+ import .*)\n", "", inspect.getsource(module)) for module in _PASTED)
    return text.replace(_HERE, "\n".join(pasted))


def _own(cfg: ModelConfig) -> dict[str, Any]:
    """What config.json says beside what all architectures do."""
    moe = cfg.moe
    made: dict[str, Any] = {
        "auto_map": {
            "AutoConfig": "modeling_spannorm.SpannormConfig",
            "AutoModel": "modeling_spannorm.SpannormModel",
            "AutoModelForCausalLM": "modeling_spannorm.SpannormForCausalLM",
        },
        "placement": cfg.placement,
        "qk_norm": cfg.qk_norm,
        "mix_share": cfg.mix_share,
        "norm": cfg.norm,
    }
    if not moe.num_experts:
        return made
    return made | {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.expert_dim,
        "n_shared_experts": moe.num_shared,
        "router_scores": moe.scores,
        "router_bias": moe.balance == "bias",
        "norm_topk_prob": moe.renormalize,
        "dense_layers": [layer for layer, has in enumerate(moe_layers(cfg)) if not has],
    }


# Its modules are called as Llama's are where it has such, else by our own names.
_SITES = sorted({name for one in PLACEMENTS.values() for name in (*one.block_norms, *one.block_gains)})
CUSTOM = Architecture(
    "SpannormForCausalLM",
    "spannorm",
    {},
    stock.SHARED
    | {f"norms.{name}": f"norms.{name}" for name in _SITES}
    | {f"ends.{name}": f"model.ends.{name}" for one in PLACEMENTS.values() for name in one.end_norms},
    _own,
)
