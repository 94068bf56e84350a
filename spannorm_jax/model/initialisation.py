"""ScaleInit and the other initialisations: the size of each weight of the table, and what it predicts.

An initialisation is a function (model config, WeightSpec) -> the std that a weight is drawn with, or
where a gain starts; a number, or one for each of the weight's layers, (L,). It reads the
weight's site and fans, so any initialisation goes with any placement.

ScaleInit (Wang et al. 2026, arXiv 2601.22580) has no public exact form; docs/design.md says how it is read here:
  base   std = gain / sqrt(fan_in), with the gain that gives each branch unit output variance at unit-variance input.
  depth  the weight or gain that sets the size of each branch added to the stream (`Placement.additions`) is
         multiplied by sqrt(c L^-p / n): c is `variance_budget`, p `variance_exponent`, n the number of additions.
         `init_targets` names weights instead. With `depth_factor=multiplier` the factor stands in the forward pass.
A Mixture of Experts is a branch like any other: a block with experts adds to the stream what a dense one adds.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spannorm_jax.config import SCALEINIT, ModelConfig, MoEConfig, moe_layers
from spannorm_jax.model.parametrisation import at_base, base_config, forward, multipliers
from spannorm_jax.model.placement import has_normed_input, placement_of

if TYPE_CHECKING:  # a command that is mistyped asks for the names here, and does without JAX
    from spannorm_jax.model.weights import WeightSpec

OUTPUT_SITES = ("v", "attn_out", "ffn_in", "ffn_out")  # what `init_targets` may name
Size = float | np.ndarray  # one number, or one for each layer, (L,)


def activation(name: str, x: np.ndarray) -> np.ndarray:
    if name == "swiglu":
        return x / (1 + np.exp(-x))
    if name == "gelu":
        return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    if name == "relu":
        return np.maximum(x, 0)
    raise ValueError(f"no activation for ffn={name!r}")


def hidden_second_moment(ffn: str, std: float = 1.0) -> float:
    """E[h^2] of a hidden unit whose pre-activations are N(0, std^2).

    h = gelu(a), relu(a), or silu(a) b with independent a, b. Gauss-Hermite quadrature with 128 nodes: relative error
    below 1e-12 for std up to 2, 1e-4 at 5; ReLU exact.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(128)
    moment = weights @ activation(ffn, std * nodes) ** 2 / weights.sum()
    return float(moment * std**2 if ffn == "swiglu" else moment)


@functools.cache
def mixture_gain(moe: MoEConfig, logit_std: float) -> float:
    """E sum_i w_i^2 over a token's experts: the variance of the mixture when each expert has variance 1.

    Routed experts have the weights of a router whose logits are N(0, logit_std^2), independent; each shared one has
    weight 1. Simulated with 2^22 logits and a fixed seed: the standard error is below 0.3% for up to 256 experts.
    """
    logits = logit_std * np.random.default_rng(0).standard_normal((2**22 // moe.num_experts, moe.num_experts))
    if moe.scores == "softmax":
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
    else:
        scores = 1 / (1 + np.exp(-logits))
    others = moe.num_experts - moe.top_k
    chosen = np.partition(scores, others, axis=1)[:, others:]
    if moe.renormalize:
        chosen = chosen / chosen.sum(axis=1, keepdims=True)
    return float(np.mean(np.sum(chosen**2, axis=1))) + moe.num_shared


# Weights of dense blocks -> the same weights, dense and of experts.
BRANCH_OUTPUTS = {
    "ffn_in": ("ffn_in", "expert_in", "shared_in"),
    "ffn_out": ("ffn_out", "expert_out", "shared_out"),
}
_OUTPUTS = ("attn_out", *BRANCH_OUTPUTS["ffn_out"])
_VALUE_PATH = ("v", *BRANCH_OUTPUTS["ffn_in"], *_OUTPUTS)  # not queries and keys


def residual_additions(cfg: ModelConfig) -> int:
    """Times that the stream is added to on its way through the model: n of ScaleInit."""
    return len(placement_of(cfg).additions) * cfg.depth


def depth_factor(cfg: ModelConfig) -> float:
    """sqrt(c L^-p / n): what ScaleInit multiplies a branch by, so that all of them add c L^-p to the stream."""
    return math.sqrt(cfg.variance_budget * cfg.depth**-cfg.variance_exponent / residual_additions(cfg))


def _targets(cfg: ModelConfig) -> tuple[str, ...]:
    """What ScaleInit damps: `init_targets`, or what sizes the placement's additions."""
    return cfg.init_targets or tuple(placement_of(cfg).additions.values())


def with_experts(sites: Iterable[str]) -> set[str]:
    """Sites, and of the feed-forward's output those of experts too."""
    return {other for site in sites for other in BRANCH_OUTPUTS.get(site, (site,))}


def branch_multipliers(cfg: ModelConfig) -> dict[str, float]:
    """Branch (`attn`, `ffn`) -> the constant that its output is multiplied by, where there is one."""
    if cfg.init != "scale" or cfg.depth_factor != "multiplier":
        return {}
    return {site.removesuffix("_out"): depth_factor(base_config(cfg)) for site in _targets(cfg)}


Init = Callable[[ModelConfig, "WeightSpec"], Size]


def _of_matrices(init: Init) -> Init:
    """Decorates an initialisation that says nothing of gains: they start where they are declared to."""

    @functools.wraps(init)
    def size(cfg: ModelConfig, spec: "WeightSpec") -> Size:
        return init(cfg, spec) if spec.start is None else spec.start

    return size


@_of_matrices
def plain(cfg: ModelConfig, spec: "WeightSpec") -> Size:
    """1 / sqrt(fan_in) everywhere (LeCun et al. 1998), nothing scaled by depth."""
    return spec.fan_in**-0.5


@_of_matrices
def gpt2(cfg: ModelConfig, spec: "WeightSpec") -> Size:
    """0.02 everywhere, output projections times 1 / sqrt(2L) (Radford et al. 2019, section 2.3)."""
    return 0.02 * ((2 * cfg.depth) ** -0.5 if spec.site in _OUTPUTS else 1.0)


@_of_matrices
def normal(cfg: ModelConfig, spec: "WeightSpec") -> Size:
    """0.02 everywhere (OLMo 2, arXiv 2501.00656, section 3.1)."""
    return 0.02


@_of_matrices
def megatron(cfg: ModelConfig, spec: "WeightSpec") -> Size:
    """sqrt(2 / (5 D)) everywhere, output projections times 1 / sqrt(2L) (HybridNorm, arXiv 2503.04598)."""
    return math.sqrt(2 / (5 * cfg.width)) * ((2 * cfg.depth) ** -0.5 if spec.site in _OUTPUTS else 1.0)


@_of_matrices
def xavier(cfg: ModelConfig, spec: "WeightSpec") -> Size:
    """sqrt(2 / (fan_in + fan_out)) (Glorot & Bengio 2010, equation 12); embedding and head as `plain`.

    The two halves of SwiGLU's first weight are two matrices.
    """
    if spec.role in ("embedding", "output"):
        return plain(cfg, spec)
    halves = 2 if spec.site in BRANCH_OUTPUTS["ffn_in"] and cfg.ffn == "swiglu" else 1
    return math.sqrt(2 / (spec.fan_in + spec.fan_out / halves))


def deepnorm(cfg: ModelConfig, spec: "WeightSpec") -> Size:
    """Xavier, and all but queries and keys times (8L)^(-1/4) (DeepNorm, arXiv 2203.00555, table 2, decoder-only)."""
    return xavier(cfg, spec) * ((8 * cfg.depth) ** -0.25 if spec.site in _VALUE_PATH else 1.0)


def subln(cfg: ModelConfig, spec: "WeightSpec") -> Size:
    """Xavier, and all but queries and keys times sqrt(ln 2L) (SubLN, arXiv 2210.06423, section 3.2, decoder-only)."""
    return xavier(cfg, spec) * (math.sqrt(math.log(2 * cfg.depth)) if spec.site in _VALUE_PATH else 1.0)


def ds(cfg: ModelConfig, spec: "WeightSpec") -> Size:
    """Xavier, and every matrix of block l, from 1, times 1 / sqrt(l) (DS-Init, Zhang et al. 2019, arXiv 1908.11365).

    That is the paper's range of a uniform draw, with its alpha of 1; its code in effect draws with l^(-1/4). The paper
    has no experts: here they and their router belong to their block.
    """
    in_block = spec.layers and spec.start is None
    return xavier(cfg, spec) * ((1.0 + np.array(spec.layers)) ** -0.5 if in_block else 1.0)


def scale(cfg: ModelConfig, spec: "WeightSpec") -> Size:
    """ScaleInit: unit-variance branches, and what sets the size of an addition times `depth_factor`."""
    damped = cfg.depth_factor != "multiplier" and spec.site in with_experts(_targets(cfg))
    if spec.start is not None:
        return depth_factor(cfg) if damped else spec.start
    return _unit_variance(cfg, spec) * (depth_factor(cfg) if damped else 1.0)


@_of_matrices
def shrink(cfg: ModelConfig, spec: "WeightSpec") -> Size:
    """A control for ScaleInit: all six matrices of a block damped alike, by as much in all as ScaleInit damps some."""
    factor = depth_factor(cfg) ** (len(_targets(cfg)) / 6)
    return _unit_variance(cfg, spec) * (factor if spec.site in ("q", "k", *_VALUE_PATH) else 1.0)


def zero_out(cfg: ModelConfig, spec: "WeightSpec") -> Size:
    """A control for ScaleInit, its end at c = 0: what sets the size of each branch that is added starts at zero.

    That is an output projection, or the gain that a branch ends in: a zero weight before a norm would
    never move. Of SpanNorm it is the feed-forward's alone, as in ScaleInit.
    """
    if spec.site in with_experts(placement_of(cfg).additions.values()):
        return 0.0
    return _unit_variance(cfg, spec) if spec.start is None else spec.start


def _unit_variance(cfg: ModelConfig, spec: "WeightSpec") -> float:
    """The std that gives each branch unit output variance at unit-variance input."""
    size = spec.fan_in**-0.5
    if spec.site in BRANCH_OUTPUTS["ffn_out"]:
        size /= math.sqrt(_hidden_variance(cfg, pre_activation_std=1.0))
    if spec.site in ("expert_out", "shared_out"):
        size /= math.sqrt(mixture_gain(cfg.moe, logit_std=1.0))
    return size


_ALL = (plain, gpt2, scale, normal, xavier, megatron, deepnorm, subln, shrink, zero_out, ds)
INITS: dict[str, Init] = {init.__name__: init for init in _ALL}  # in the order of tables and figures
PUBLISHED = "published"  # in a config: what the placement was published with
_READING = re.compile(r"(?P<init>[a-z]+)-L(?P<power>\d+(\.\d+)?)(?P<mult>-mult)?")


def reading(init: str, exponent: float, place: str) -> str:
    """The name of an initialisation, which for ScaleInit says its reading: `scale-L1`, `scale-L0.5-mult`.

    The number is the power of depth by which a branch's factor falls, (1 + p) / 2; `-mult` says that
    the factor is a multiplier of the branch (`depth_factor`).
    """
    if init not in SCALEINIT:
        return init
    return f"{init}-L{(1 + exponent) / 2:g}{'-mult' * (place == 'multiplier')}"


def init_of(cfg: ModelConfig) -> str:
    """`reading` of a config."""
    return reading(cfg.init, cfg.variance_exponent, cfg.depth_factor)


def read_reading(name: str) -> dict[str, Any]:
    """Options of the model that a name of `reading` stands for, by key; of any other name {"init": name}."""
    found = _READING.fullmatch(name)
    if found is None or found["init"] not in SCALEINIT:
        return {"init": name}
    place = "multiplier" if found["mult"] else "weight"
    return {"init": found["init"], "variance_exponent": 2 * float(found["power"]) - 1, "depth_factor": place}


def initial_size(cfg: ModelConfig, spec: "WeightSpec") -> Size:
    """What a weight starts with: the initialisation's at the base size, times the parametrisation's multiplier."""
    return INITS[cfg.init](*at_base(cfg, spec)) * multipliers(cfg, spec).init


# ---- what follows for the branches ----------------------------------------------------------------------


def predicted_branch_variance(cfg: ModelConfig, specs: Sequence["WeightSpec"]) -> dict[str, np.ndarray]:
    """Output variance of the branches `attn`, `ffn` and `moe` at initialisation, for unit-variance input, (L,).

    Attention's is that of the first position, where a token attends to itself alone, and bounds the
    others: averaging unrelated values over t positions lowers it towards 1/t.
    """
    gain = variance_factors(cfg, specs)
    value = 1.0 if has_normed_input(cfg, "attn_out") else gain["v"]
    variance = {"attn": value * gain["attn_out"]}
    if "ffn_out" in gain:
        variance["ffn"] = _hidden_variance(cfg, np.sqrt(gain["ffn_in"])) * gain["ffn_out"]
    if "expert_out" in gain:
        mixture = mixture_gain(cfg.moe, float(np.sqrt(np.mean(gain["router"]))))
        variance["moe"] = mixture * _hidden_variance(cfg, np.sqrt(gain["expert_in"])) * gain["expert_out"]
    factors = branch_multipliers(cfg)
    factors |= {"moe": factors["ffn"]} if "ffn" in factors else {}
    return {branch: np.broadcast_to(v * factors.get(branch, 1.0) ** 2, (cfg.depth,)) for branch, v in variance.items()}


def predicted_additions(cfg: ModelConfig, specs: Sequence["WeightSpec"]) -> dict[str, np.ndarray]:
    """Variance that each addition of a block brings to the stream at initialisation, by branch, (L,).

    A branch that ends in a norm has its gain's square, whatever its weights are. Constants of the
    placement's block (DeepScaleLM's beta) are left out.
    """
    placement, variance = placement_of(cfg), predicted_branch_variance(cfg, specs)
    sizes = site_sizes(cfg, specs)
    if "moe" in variance:
        variance["ffn"] = np.where(moe_layers(cfg), variance["moe"], variance.get("ffn", 0.0))
    added = {}
    for branch, size in placement.additions.items():
        before = 1.0 if size in placement.block_norms else variance[branch]
        factor = sizes[size] ** 2 if size in (*placement.block_norms, *placement.block_gains) else 1.0
        added[branch] = np.broadcast_to(before * factor * forward(cfg).branch ** 2, (cfg.depth,))
    return added


def site_sizes(cfg: ModelConfig, specs: Sequence["WeightSpec"]) -> dict[str, np.ndarray]:
    """Size of each site's weights, in all layers alike as if every block had them: () or (L,)."""
    layers = tuple(range(cfg.depth))
    alike = (dataclasses.replace(spec, layers=layers) if spec.layers else spec for spec in specs)
    return {spec.site: np.asarray(initial_size(cfg, spec)) for spec in alike}


def variance_factors(cfg: ModelConfig, specs: Sequence["WeightSpec"]) -> dict[str, np.ndarray]:
    """Factor by which each site's matrix multiplies the variance: fan_in x std^2."""
    sizes = site_sizes(cfg, specs)
    return {spec.site: spec.fan_in * sizes[spec.site] ** 2 for spec in specs if spec.fan_in}


def _hidden_variance(cfg: ModelConfig, pre_activation_std: Size) -> Any:
    """Mean square of what a feed-forward's output projection reads."""
    if has_normed_input(cfg, "ffn_out"):
        return 1.0
    return np.vectorize(functools.partial(hidden_second_moment, cfg.ffn))(pre_activation_std)
