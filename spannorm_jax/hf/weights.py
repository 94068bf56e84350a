"""A model's weights as Hugging Face's layouts want them, and back: by block, (out, in), with all constants folded in.

Names are this code's own, with a dot: `attn.q`, `ffn.in_.0` (SwiGLU's gate; of GELU and ReLU all), `ffn.in_.1`,
`ffn.out`, `ffn.router`, `ffn.bias`, `ffn.experts.3.out`, `ffn.shared.out`, `norms.after_attn`, `attn.q_norm`. Those
outside the blocks are `embed`, `head` and `ends.final`. Rotary embeddings turn the same pairs on both sides.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from spannorm_jax.config import ModelConfig, moe_layers
from spannorm_jax.errors import UserError
from spannorm_jax.model.initialisation import branch_multipliers
from spannorm_jax.model.parametrisation import forward
from spannorm_jax.model.placement import placement_of
from spannorm_jax.model.stack import STACKS

Tensors = dict[str, np.ndarray]


def exported(cfg: ModelConfig, params: Any, model_state: Any, tied: bool = False) -> tuple[list[Tensors], Tensors]:
    """Each block's tensors, and those outside, float32: what the config multiplies by is in the weights.

    A tied head becomes a matrix of its own, for embeddings enter times sqrt(width). With `tied` there is none, and what
    multiplies embeddings and logits is left out.

    Raises:
      UserError: a branch is still warming up.
    """
    rows = dict.fromkeys(STACKS.values(), 0)
    blocks = []
    for layer, moe in enumerate(moe_layers(cfg)):
        stack = STACKS[moe]
        state = _row(model_state.get(stack, {}), rows[stack])
        if (warmup := state.get("warmup_factor", 1.0)) != 1:
            raise UserError(
                f"block {layer + 1} of {cfg.depth} is still warming up (its branches are multiplied by {warmup:.3g}): "
                "no constant of the model, so it cannot be exported; give a later --step, of update "
                f"{cfg.branch_warmup_steps * cfg.depth:.0f} or after"
            )
        block = _flat(_row(params[stack], rows[stack]) | {"state": state})
        blocks.append(_folded(cfg, block))
        rows[stack] += 1
    ends = {f"ends.{name}": np.asarray(norm["gain"]) for name, norm in params.get("ends", {}).items()}
    embed = np.asarray(params["embed"])
    if tied:
        return blocks, ends | {"embed": embed}
    head = embed if cfg.tied_head else np.asarray(params["head"]).T
    factor = cfg.width**0.5 * forward(cfg).embedding if cfg.tied_head else 1.0
    return blocks, ends | {"embed": times(embed, factor), "head": times(head, forward(cfg).logits)}


def times(x: np.ndarray, factor: float) -> np.ndarray:
    return x if factor == 1 else x * np.float32(factor)


def branch_outputs(block: Tensors, branch: str) -> list[str]:
    """The matrices that a branch (`attn`, `ffn`) ends in: of a feed-forward with experts those of each."""
    return [name for name in block if name.startswith(f"{branch}.") and name.endswith(".out")]


def _row(tree: Any, row: int) -> Any:
    """A block's slices of stacked weights, on the host."""
    return {k: _row(v, row) if isinstance(v, dict) else np.asarray(v[row]) for k, v in tree.items()}


def _flat(block: Any) -> Tensors:
    """One block's tensors by name, (out, in)."""
    attn, ffn = block["attn"], block["ffn"]
    made = {f"attn.{name}": attn[name].reshape(attn[name].shape[0], -1).T for name in "qkv"}
    made["attn.out"] = attn["out"].reshape(-1, attn["out"].shape[-1]).T
    made |= {f"attn.{name}": norm["gain"] for name, norm in attn.items() if name.endswith("_norm")}
    made |= {f"norms.{name}": norm["gain"] for name, norm in block.get("norms", {}).items()}
    if "router" not in ffn:
        return made | _feed_forward("ffn", ffn)
    made["ffn.router"] = ffn["router"].T
    if "ffn" in block["state"]:
        made["ffn.bias"] = block["state"]["ffn"]["bias"]
    for e in range(len(ffn["in_"])):
        expert: dict[str, Any] = {"in_": ffn["in_"][e], "out": ffn["out"][e]}
        if "hidden_gain" in ffn:
            expert["hidden_norm"] = {"gain": ffn["hidden_gain"][e]}
        made |= _feed_forward(f"ffn.experts.{e}", expert)
    return made | (_feed_forward("ffn.shared", ffn["shared"]) if "shared" in ffn else {})


def _feed_forward(prefix: str, ffn: Any) -> Tensors:
    made = {f"{prefix}.in_.{part}": w.T for part, w in enumerate(ffn["in_"])} | {f"{prefix}.out": ffn["out"].T}
    return made | ({f"{prefix}.hidden_norm": ffn["hidden_norm"]["gain"]} if "hidden_norm" in ffn else {})


def _folded(cfg: ModelConfig, block: Tensors) -> Tensors:
    """The constants of `model.branches` and of `Forward.attention`, in the weights that they multiply."""
    placement, constants = placement_of(cfg), forward(cfg)
    factors = branch_multipliers(cfg)
    for branch in ("attn", "ffn"):
        factor, added_at = factors.get(branch, 1.0), placement.additions.get(branch)
        if added_at in placement.block_norms:
            block[f"norms.{added_at}"] = times(block[f"norms.{added_at}"], constants.branch)
        elif added_at:
            factor *= constants.branch
        for name in branch_outputs(block, branch):
            block[name] = times(block[name], factor)
    of_queries = "attn.q_norm" if "attn.q_norm" in block else "attn.q"
    block[of_queries] = times(block[of_queries], constants.attention)
    return block


def imported(cfg: ModelConfig, tensor: Callable[[str, int | None, tuple[int, ...]], np.ndarray]) -> dict[str, Any]:
    """Parameters of a model that Llama's layout has: SwiGLU, its head not tied, nothing folded, no shared experts.

    `tensor` gives a tensor by its name here, its block (None: outside) and its shape.
    """
    D, K = cfg.width, cfg.width // cfg.num_heads
    kinds, placement = moe_layers(cfg), placement_of(cfg)

    def of(layer: int | None, name: str, *shape: int) -> np.ndarray:
        return np.asarray(tensor(name, layer, shape), np.float32)

    def feed_forward(layer: int, prefix: str, F: int) -> dict[str, np.ndarray]:
        into = [of(layer, f"{prefix}.in_.{part}", F, D).T for part in range(2)]
        return {"in_": np.stack(into), "out": of(layer, f"{prefix}.out", D, F).T}

    def block(layer: int, moe: bool) -> dict[str, Any]:
        heads = {"q": cfg.num_heads, "k": cfg.num_kv_heads, "v": cfg.num_kv_heads}
        attn: dict[str, Any] = {
            name: of(layer, f"attn.{name}", n * K, D).T.reshape(D, n, K) for name, n in heads.items()
        }
        attn["out"] = of(layer, "attn.out", D, D).T.reshape(-1, K, D)
        attn |= {f"{name}_norm": {"gain": of(layer, f"attn.{name}_norm", K)} for name in "qk" if cfg.qk_norm}
        norms = {name: {"gain": of(layer, f"norms.{name}", D)} for name in placement.block_norms}
        if not moe:
            return {"attn": attn, "ffn": feed_forward(layer, "ffn", cfg.ffn_dim), "norms": norms}
        experts = range(cfg.moe.num_experts)
        each = [feed_forward(layer, f"ffn.experts.{e}", cfg.moe.expert_dim) for e in experts]
        ffn = {name: np.stack([expert[name] for expert in each]) for name in ("in_", "out")}
        return {"attn": attn, "ffn": ffn | {"router": of(layer, "ffn.router", len(experts), D).T}, "norms": norms}

    blocks = {moe: [block(layer, moe) for layer, kind in enumerate(kinds) if kind == moe] for moe in set(kinds)}
    made = {STACKS[moe]: jax.tree.map(lambda *leaves: np.stack(leaves), *trees) for moe, trees in blocks.items()}
    made["ends"] = {name: {"gain": of(None, f"ends.{name}", D)} for name in placement.end_norms}
    V = cfg.vocab_size
    return made | {"embed": of(None, "embed", V, D), "head": of(None, "head", V, D).T}
