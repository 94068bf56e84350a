"""A model's weights as Hugging Face's layouts want them, and back: by block, (out, in), with all constants folded in.

Names are this code's own, with a dot: `attn.q`, `ffn.in_.0` (SwiGLU's gate; of GELU and ReLU all), `ffn.in_.1`,
`ffn.out`, `ffn.router`, `ffn.bias`, `ffn.experts.3.out`, `ffn.shared.out`, `norms.after_attn`, `attn.q_norm`. Those
outside the blocks are `embed`, `head` and `ends.final`. Rotary embeddings turn the same pairs on both sides.
"""

from collections.abc import Callable
from typing import Any

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


def imported(cfg: ModelConfig, tensor: Callable[[str, int | None], np.ndarray]) -> dict[str, Any]:
    """Parameters, as `exported` has them with nothing folded; of placements and options that Llama's layout has.

    `tensor` gives a tensor by its name here and its block.
    """
    D, kinds = cfg.width, moe_layers(cfg)
    K = D // cfg.num_heads

    def block(layer: int, moe: bool) -> dict[str, Any]:
        def of(name: str) -> np.ndarray:
            return np.asarray(tensor(name, layer), np.float32)

        def feed_forward(prefix: str) -> dict[str, Any]:
            return {"in_": np.stack([of(f"{prefix}.in_.{i}").T for i in range(2)]), "out": of(f"{prefix}.out").T}

        attn: dict[str, Any] = {name: of(f"attn.{name}").T.reshape(D, -1, K) for name in "qkv"}
        attn["out"] = of("attn.out").T.reshape(-1, K, D)
        if cfg.qk_norm:
            attn |= {name: {"gain": of(f"attn.{name}")} for name in ("q_norm", "k_norm")}
        ffn = feed_forward("ffn") if not moe else {"router": of("ffn.router").T}
        if moe:
            experts = [feed_forward(f"ffn.experts.{e}") for e in range(cfg.moe.num_experts)]
            ffn |= {name: np.stack([expert[name] for expert in experts]) for name in ("in_", "out")}
        norms = {name: {"gain": of(f"norms.{name}")} for name in placement_of(cfg).block_norms}
        return {"attn": attn, "ffn": ffn, "norms": norms}

    def stacked(trees: list[Any]) -> Any:
        if isinstance(trees[0], dict):
            return {name: stacked([tree[name] for tree in trees]) for name in trees[0]}
        return np.stack(trees)

    made: dict[str, Any] = {
        STACKS[moe]: stacked([block(layer, moe) for layer, kind in enumerate(kinds) if kind == moe])
        for moe in sorted(set(kinds))
    }
    made["ends"] = {
        name: {"gain": np.asarray(tensor(f"ends.{name}", None), np.float32)} for name in placement_of(cfg).end_norms
    }
    made["embed"] = np.asarray(tensor("embed", None), np.float32)
    made["head"] = np.asarray(tensor("head", None), np.float32).T
    return made
