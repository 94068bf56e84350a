"""The architectures of transformers that carry a model of ours exactly: what each has, and how it calls things.

docs/huggingface.md lists what is folded on the way. An architecture that could carry a model but for a constant that it
applies elsewhere (Llama's embeddings are not multiplied) gets the constant in its weights.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from spannorm_jax.config import ModelConfig, moe_layers
from spannorm_jax.hf.weights import Tensors, branch_outputs, times
from spannorm_jax.model.parametrisation import forward
from spannorm_jax.model.placement import inner_norms

ATTENTION = {
    **{f"attn.{name}": f"self_attn.{name}_proj" for name in "qkv"},
    "attn.out": "self_attn.o_proj",
    **{f"attn.{name}_norm": f"self_attn.{name}_norm" for name in "qkv"},
    "attn.heads_norm": "self_attn.attn_sub_norm",
}
_FFN = {"in_.0": "gate_proj", "in_.1": "up_proj", "out": "down_proj", "hidden_norm": "ffn_sub_norm"}


def named(ours: str, theirs: str, names: dict[str, str] = _FFN) -> dict[str, str]:
    """Names of a feed-forward's tensors; `{e}` in both stands for an expert's number."""
    return {f"{ours}.{name}": f"{theirs}.{own}" for name, own in names.items()}


DENSE = ATTENTION | named("ffn", "mlp")
EXPERTS = DENSE | named("ffn.experts.{e}", "mlp.experts.{e}") | {"ffn.router": "mlp.gate"}
SHARED = EXPERTS | named("ffn.shared", "mlp.shared_experts") | {"ffn.bias": "mlp.gate.e_score_correction_bias"}
_ROUTED = named("ffn.experts.{e}", "block_sparse_moe.experts.{e}", {"in_.0": "w1", "in_.1": "w3", "out": "w2"})
MIXTRAL = ATTENTION | _ROUTED | {"ffn.router": "block_sparse_moe.gate"}
ENDS = {"embed": "model.embed_tokens", "head": "lm_head", "ends.final": "model.norm"}
_LLAMA_NORMS = {"norms.before_attn": "input_layernorm", "norms.before_ffn": "post_attention_layernorm"}
_AFTER_NORMS = {"norms.after_attn": "post_attention_layernorm", "norms.after_ffn": "post_feedforward_layernorm"}
_GEMMA_NORMS = _AFTER_NORMS | {
    "norms.before_attn": "input_layernorm",
    "norms.before_ffn": "pre_feedforward_layernorm",
}


@dataclass(frozen=True)
class Architecture:
    """One of transformers' architectures.

    Attributes:
      name: its class for language models.
      model_type: its name in config.json.
      has: what it has, of `traits`: trait -> values. A trait that is not there may be anything.
      names: our names of a block's tensors -> its own, without `.weight`.
      own: what its config.json holds beside `config_json`.
      minus: what its norms add to the gain that is stored.
      scales: it multiplies embeddings by sqrt(width).
      tied: it can have a tied head, times what `own` says.
      zeros: its name of a tensor -> that of a bias beside it, which we do not have, or "".
    """

    name: str
    model_type: str
    has: dict[str, Collection[Any]]
    names: dict[str, str]
    own: Callable[[ModelConfig], dict[str, Any]] = lambda cfg: {}
    minus: float = 0.0
    scales: bool = False
    tied: Callable[[ModelConfig], bool] = lambda cfg: False
    zeros: Callable[[str], str] = lambda name: ""

    def their_name(self, ours: str) -> str:
        """Its name of a tensor, one of a block in its block."""
        number = re.search(r"experts\.(\d+)\.", ours)
        name = (ENDS | self.names)[re.sub(r"experts\.\d+\.", "experts.{e}.", ours)]
        name = name.format(e=number[1] if number else "")
        return name if name.endswith("bias") else f"{name}.weight"


def traits(cfg: ModelConfig) -> dict[str, Any]:
    """What tells models apart whose constants are folded: config key -> value, of MoE's only with experts."""
    moe = cfg.moe
    found = {
        "placement": cfg.placement,
        "ffn": cfg.ffn,
        "norm": cfg.norm,
        "qk_norm": "q" in inner_norms(cfg),
        "tied_head": cfg.tied_head,
        "moe.num_experts": moe.num_experts,
    }
    if not moe.num_experts:
        return found
    shown = ("scores", "renormalize", "num_shared", "every", "first_dense", "balance")
    return found | {f"moe.{name}": getattr(moe, name) for name in shown}


def _like_llama(**more: Any) -> dict[str, Collection[Any]]:
    usual: dict[str, Collection[Any]] = {
        "placement": ("pre", *_TO_PRE),
        "ffn": ("swiglu",),
        "norm": ("rmsnorm",),
        "qk_norm": (False,),
    }
    return usual | {"moe.num_experts": (0,)} | more


def _lns(cfg: ModelConfig, blocks: list[Tensors], ends: Tensors) -> None:
    for layer, block in enumerate(blocks):
        for name in ("norms.before_attn", "norms.before_ffn"):
            block[name] = times(block[name], (layer + 1) ** -0.5)


def _layerscale(cfg: ModelConfig, blocks: list[Tensors], ends: Tensors) -> None:
    for block in blocks:
        for branch in ("attn", "ffn"):
            gain = block.pop(f"norms.scale_{branch}")
            for name in branch_outputs(block, branch):
                block[name] = gain[:, None] * block[name]


def _normed_embeddings(cfg: ModelConfig, blocks: list[Tensors], ends: Tensors) -> None:
    """A norm of embeddings sees one row of their table at a time."""
    x, gain = ends["embed"].astype(np.float64), ends.pop("ends.entry")
    if cfg.norm == "layernorm":
        x = x - x.mean(-1, keepdims=True)
    x /= np.sqrt(np.mean(x**2, -1, keepdims=True) + cfg.norm_eps)
    ends["embed"] = (x * gain).astype(np.float32)


# Placements beside PreNorm that it carries, and what folds each into its weights.
_TO_PRE: dict[str, Callable[[ModelConfig, list[Tensors], Tensors], None]] = {
    "lns": _lns,
    "layerscale": _layerscale,
    "pre_embnorm": _normed_embeddings,
}


def _untouched(cfg: ModelConfig) -> bool:
    """Whether a head that is tied to embeddings, which enter times sqrt(width), is all that a model does with them."""
    return cfg.tied_head and (forward(cfg).embedding, forward(cfg).logits) == (1, 1)


def _granite(cfg: ModelConfig) -> dict[str, Any]:
    return {
        "embedding_multiplier": cfg.width**0.5 * forward(cfg).embedding,
        "attention_multiplier": (cfg.width // cfg.num_heads) ** -0.5,
        "residual_multiplier": 1.0,
        "logits_scaling": 1 / forward(cfg).logits,
    }


def _full(cfg: ModelConfig) -> dict[str, Any]:
    """Every block's attention sees all tokens."""
    return {"layer_types": ["full_attention"] * cfg.depth}


def _gemma(cfg: ModelConfig) -> dict[str, Any]:
    return _full(cfg) | {
        "hidden_activation": "silu",
        "query_pre_attn_scalar": cfg.width // cfg.num_heads,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "sliding_window": 4096,  # of none of the blocks, and null is refused
    }


def _qwen3_moe(cfg: ModelConfig) -> dict[str, Any]:
    return _experts(cfg) | {
        "num_experts": cfg.moe.num_experts,
        "norm_topk_prob": cfg.moe.renormalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, moe in enumerate(moe_layers(cfg)) if not moe],
        "use_sliding_window": False,
    }


def _experts(cfg: ModelConfig) -> dict[str, Any]:
    return {"num_experts_per_tok": cfg.moe.top_k, "moe_intermediate_size": cfg.moe.expert_dim}


def _glm4_moe(cfg: ModelConfig) -> dict[str, Any]:
    return _experts(cfg) | {
        "n_routed_experts": cfg.moe.num_experts,
        "n_shared_experts": cfg.moe.num_shared,
        "first_k_dense_replace": cfg.moe.first_dense,
        "norm_topk_prob": cfg.moe.renormalize,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "use_qk_norm": "q" in inner_norms(cfg),
        "partial_rotary_factor": 1.0,
    }


def _mixtral(cfg: ModelConfig) -> dict[str, Any]:
    experts = {"num_local_experts": cfg.moe.num_experts, "num_experts_per_tok": cfg.moe.top_k}
    return experts | {"intermediate_size": cfg.moe.expert_dim, "sliding_window": None}


_GEMMA_SCALES: dict[str, Any] = {"minus": 1.0, "scales": True, "tied": _untouched}
_SOME = range(1, 2**31)
_SOFTMAX: dict[str, Collection[Any]] = {
    "moe.num_experts": _SOME,
    "moe.scores": ("softmax",),
    "moe.num_shared": (0,),
    "moe.balance": ("aux_loss", "none"),
}
_SIGMOID_SHARED: dict[str, Collection[Any]] = {
    "moe.num_experts": _SOME,
    "moe.scores": ("sigmoid",),
    "moe.num_shared": _SOME,
    "moe.every": (1,),
}
# The first that has all traits of a model carries it.
STOCK = (
    Architecture(
        "GraniteForCausalLM",
        "granite",
        _like_llama(placement=("pre", "lns", "layerscale"), tied_head=(True,)),
        DENSE | _LLAMA_NORMS,
        _granite,
        tied=lambda cfg: True,
    ),
    Architecture("LlamaForCausalLM", "llama", _like_llama(), DENSE | _LLAMA_NORMS, lambda cfg: {"mlp_bias": False}),
    Architecture(
        "Qwen3ForCausalLM",
        "qwen3",
        _like_llama(qk_norm=(True,)),
        DENSE | _LLAMA_NORMS,
        lambda cfg: {"use_sliding_window": False},
    ),
    Architecture(
        "Exaone4ForCausalLM",
        "exaone4",
        _like_llama(placement=("olmo2",), qk_norm=(True,)),
        DENSE | _AFTER_NORMS,
        lambda cfg: _full(cfg) | {"sliding_window": None},
    ),
    Architecture(
        "Gemma2ForCausalLM",
        "gemma2",
        _like_llama(placement=("peri",)),
        DENSE | _GEMMA_NORMS,
        _gemma,
        **_GEMMA_SCALES,
    ),
    Architecture(
        "Gemma3ForCausalLM",
        "gemma3_text",
        _like_llama(placement=("peri",), qk_norm=(True,)),
        DENSE | _GEMMA_NORMS,
        lambda cfg: _gemma(cfg) | {"rope_local_base_freq": cfg.rope_theta},
        **_GEMMA_SCALES,
    ),
    Architecture("BitNetForCausalLM", "bitnet", _like_llama(placement=("subln",)), DENSE | _LLAMA_NORMS),
    Architecture(
        "ArceeForCausalLM",
        "arcee",
        _like_llama(ffn=("gelu", "relu")),
        DENSE | _LLAMA_NORMS | {"ffn.in_.0": "mlp.up_proj"},
        lambda cfg: {"mlp_bias": False},
    ),
    Architecture(
        "StableLmForCausalLM",
        "stablelm",
        _like_llama(norm=("layernorm",)),
        DENSE | _LLAMA_NORMS,
        lambda cfg: {"layer_norm_eps": cfg.norm_eps, "use_qkv_bias": False, "partial_rotary_factor": 1.0},
        zeros=lambda name: name.replace("norm.weight", "norm.bias") if name.endswith("norm.weight") else "",
    ),
    Architecture(
        "MixtralForCausalLM",
        "mixtral",
        _like_llama() | _SOFTMAX | {"moe.renormalize": (True,), "moe.every": (1,), "moe.first_dense": (0,)},
        MIXTRAL | _LLAMA_NORMS,
        _mixtral,
    ),
    Architecture(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        _like_llama(qk_norm=(True,)) | _SOFTMAX,
        EXPERTS | _LLAMA_NORMS,
        _qwen3_moe,
    ),
    Architecture(
        "Glm4MoeForCausalLM",
        "glm4_moe",
        _like_llama(qk_norm=(False, True)) | _SIGMOID_SHARED,
        SHARED | _LLAMA_NORMS,
        _glm4_moe,
        zeros=lambda name: "mlp.gate.e_score_correction_bias" if name == "mlp.gate.weight" else "",
    ),
)


def stock_for(cfg: ModelConfig) -> tuple[Architecture | None, str]:
    """The architecture that carries a model exactly; None, and what the nearest has not, if there is none."""
    found = traits(cfg)

    def lacks(architecture: Architecture) -> list[str]:
        return [key for key, values in architecture.has.items() if key in found and found[key] not in values]

    def distance(architecture: Architecture) -> tuple[int, bool]:
        lacking = lacks(architecture)
        return len(lacking), "moe.num_experts" in lacking  # of two, the one of the same kind

    nearest = min(STOCK, key=distance)
    missing = lacks(nearest)
    if not missing:
        return nearest, ""
    if not any(cfg.placement in architecture.has["placement"] for architecture in STOCK):
        return None, f"no architecture of transformers has model.placement={cfg.placement}"
    shown = ", ".join(f"model.{key}={found[key]}" for key in missing)
    return None, f"the nearest, {nearest.name}, lacks {shown}"


def as_pre(cfg: ModelConfig, blocks: list[Tensors], ends: Tensors) -> None:
    """Folds what a placement adds to PreNorm into the weights, where that is all it does."""
    if cfg.placement in _TO_PRE:
        _TO_PRE[cfg.placement](cfg, blocks, ends)
