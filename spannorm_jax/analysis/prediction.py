"""A placement's own equation run on covariances: the signal and the gradient that a model starts with, block by block.

Nothing here knows a placement: `enter`, `block` and `leave` are those that train the model, `fields.py` stands for
their arrays, and `covariances.py` for their sub-layers. Sizes of weights and gains come from the initialisation.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy import ndarray

from spannorm_jax.analysis import fields
from spannorm_jax.analysis.covariances import AttentionKernel, FeedForwardKernel, MixtureKernel, Projection, Squares
from spannorm_jax.analysis.fields import Field, Mixture, Tape
from spannorm_jax.config import Config, ModelConfig, moe_layers
from spannorm_jax.model.branches import multiplied_branches, warmup_factor
from spannorm_jax.model.definition import ModelDef, define
from spannorm_jax.model.initialisation import branch_multipliers, init_of, site_sizes, variance_factors
from spannorm_jax.model.parametrisation import forward
from spannorm_jax.model.placement import inner_norms, placement_of
from spannorm_jax.model.vision import patches, sincos2d
from spannorm_jax.training.tasks import task_of

SMALL_WIDTH = 128  # below it a note says that the prediction is for large width
COLLAPSED = 0.9  # token correlation above which a note says that finite width shows

Series = list[float]  # over blocks


@dataclass(frozen=True)
class Prediction:
    """What theory says of a model before its first step; lists are over blocks.

    Values are taken after each block. Of two streams the first is reported, since `leave` needs the end norms.
    The gradient at the output of `leave` is Gaussian, isotropic and independent between tokens.

    Attributes:
      entry_variance: mean square of the stream that enters the first block.
      stream_variance: mean square over tokens and width.
      attn_variance, ffn_variance: mean square of what attention and feed-forward return, before what follows it.
      attn_backward_gain, ffn_backward_gain: what a branch, with its initialisation's constant, multiplies the energy of
        an isotropic gradient by; norms, gains and other constants after it are left out.
      token_correlation: mean over pairs of tokens of the cosine of their vectors.
      effective_rank: exp of the entropy of the normalised eigenvalues of the tokens' covariance (Roy & Vetterli 2007).
      stream_grad_norm: norm of the gradient of the stream that ENTERS a block, over the last block's.
      skip_path: the same if branches passed no gradient: sums, factors and norms alone.
      weight_grad_norm: site -> norm of a weight's gradient for an output gradient of norm 1, of experts all together;
        None where a block lacks the weight.
      notes: what this prediction leaves out that may show.
    """

    entry_variance: float
    stream_variance: Series
    attn_variance: Series
    ffn_variance: Series
    attn_backward_gain: Series
    ffn_backward_gain: Series
    token_correlation: Series
    effective_rank: Series
    stream_grad_norm: Series
    skip_path: Series
    weight_grad_norm: dict[str, list[float | None]]
    notes: list[str]


def predict(cfg: ModelConfig, tokens: int) -> Prediction:
    """The prediction for a resolved config's model of text and sequences of that many different tokens, T.

    Time is O(L^2 T + L T^3), memory O(L T^2).
    """
    weights = _Weights(define(cfg), tokens)
    # Tokens that differ have independent embeddings. A tied one enters times sqrt(width), its fan-in.
    entry = weights.factor("embed") * (forward(cfg).embedding ** 2 if cfg.tied_head else 1.0)
    return _finished(weights, [_pass(weights, Mixture.new(entry * np.eye(tokens)))])


def predict_images(config: Config, images_BxSxSxC: ndarray) -> Prediction:
    """The prediction for a resolved config's model and these images, each of which takes the time of `predict`.

    Variances, correlations and ranks are means over images, as are squares of gradients.
    """
    weights = _Weights(task_of(config).define(config), config.data.seq_len)
    return _finished(weights, [_pass(weights, entry) for entry in _entries(config, weights, images_BxSxSxC)])


def _entries(config: Config, weights: "_Weights", images_BxSxSxC: ndarray) -> list[Mixture]:
    """What each image enters as: its patches, positions, and before them a token of zeros, if any."""
    cfg, image = config.model, config.image
    pixels_BxNxF = np.asarray(patches(jnp.asarray(images_BxSxSxC), image.patch), np.float64)
    N, F = pixels_BxNxF.shape[1:]

    def part(covariance_NxN: ndarray, common: bool = False) -> Mixture:
        return Mixture.new(np.pad(covariance_NxN, ((image.pool == "token", 0),) * 2), common)

    if image.positions == "learned":
        positions = part(weights.factor("positions") / cfg.width * np.eye(N))
    else:
        fixed_NxD = sincos2d(image.size // image.patch, cfg.width).astype(np.float64)
        mean_Nx1 = fixed_NxD.mean(axis=1, keepdims=True)
        rest_NxD = fixed_NxD - mean_Nx1
        positions = part(mean_Nx1 @ mean_Nx1.T, common=True) + part(rest_NxD @ rest_NxD.T / cfg.width)
    return [part(weights.factor("embed") * (x @ x.T) / F) + positions for x in pixels_BxNxF]


def _pass(weights: "_Weights", entry: Mixture) -> dict[str, Any]:
    """One sequence's numbers by the names of `Prediction`, of gradients squares, over blocks."""
    cfg, tokens = weights.cfg, weights.tokens
    placement, multipliers = placement_of(cfg), branch_multipliers(cfg)
    tape = Tape()
    stream = placement.enter(tape.field(entry), weights.norms(0))
    entry_variance = fields.variance(_first(stream).covariance)
    entered: list[Field] = []
    left: list[ndarray] = []
    branches: dict[str, list[_Branch]] = {"attn": [], "ffn": []}
    for layer in range(cfg.depth):
        stream = jax.tree.map(lambda leaf: leaf.scaled(1.0), stream)  # a leaf of its own, which only this block reads
        entered.append(_first(stream))
        branches["attn"].append(_Branch(weights.attention(layer), multipliers.get("attn", 1.0)))
        branches["ffn"].append(_Branch(weights.feed_forward(layer), multipliers.get("ffn", 1.0)))
        attn, ffn = (of_kind[-1] for of_kind in branches.values())
        warmup = float(warmup_factor(cfg, 1, layer)) if cfg.branch_warmup_steps else 1.0
        own = multiplied_branches(cfg, {}, warmup, attn, ffn, weights.norms(layer))  # a `_Branch` has its factor
        stream = placement.block(stream, *own, layer, cfg)
        left.append(_first(stream).covariance)
    out = placement.leave(stream, weights.norms(0))

    def squares(through_branches: bool) -> Series:
        return [float(np.trace(G)) for G in tape.gradients(out, np.eye(tokens), entered, through_branches)]

    numbers = ("variance", "backward_gain")
    of_branches = {f"{name}_{n}": [getattr(b, n) for b in own] for name, own in branches.items() for n in numbers}
    return of_branches | {
        "entry_variance": entry_variance,
        "stream_variance": [fields.variance(C) for C in left],
        "token_correlation": [fields.token_correlation(C) for C in left],
        "effective_rank": [fields.effective_rank(C) for C in left],
        "stream_grad_norm": squares(through_branches=True),
        "skip_path": squares(through_branches=False),
        "weight_grad_norm": [attn.squares | ffn.squares for attn, ffn in zip(*branches.values(), strict=True)],
        "leaves": len(jax.tree.leaves(stream)),
    }


def _finished(weights: "_Weights", passes: Sequence[dict[str, Any]]) -> Prediction:
    """The mean over sequences, and of gradients roots of the mean squares."""
    cfg, tokens = weights.cfg, weights.tokens
    found = jax.tree.map(lambda *values: sum(values) / len(values), *passes)
    for name in ("stream_grad_norm", "skip_path"):
        found[name] = _relative([math.sqrt(square) for square in found[name]])
    found["weight_grad_norm"] = _weight_grad_norms(cfg.width / tokens, found["weight_grad_norm"])
    notes = _notes(cfg, tokens, round(found.pop("leaves")), found["token_correlation"][-1])
    return Prediction(**found, notes=notes)


def _first(stream: Any) -> Field:
    return jax.tree.leaves(stream)[0]


def _relative(values: Series) -> Series:
    """Over the last; NaN where that is zero."""
    return [value / values[-1] if values[-1] else math.nan for value in values]


class _Branch:
    """A block's sub-layer, for fields, times a constant; what it puts out and what reaches its weights is noted."""

    def __init__(self, kernel: Any, multiplier: float):
        self._kernel, self._multiplier = kernel, multiplier
        self.variance = self.backward_gain = math.nan  # of a branch that a placement does not call
        self.squares: Squares = {}

    def __call__(self, x: Field) -> Field:
        out = x.branch(self._kernel.forward, self._backward)
        T = len(x.covariance)
        self.variance = fields.variance(out.covariance)
        probe = self._multiplier**2 * np.eye(T)
        self.backward_gain = float(np.trace(self._kernel.backward(x.covariance, probe)[0])) / T
        return out.scaled(self._multiplier)

    def _backward(self, C: ndarray, G: ndarray) -> ndarray:
        into, self.squares = self._kernel.backward(C, G)
        return into


def _weight_grad_norms(scale: float, of_blocks: list[Squares]) -> dict[str, list[float | None]]:
    """Site -> norms over blocks. A gradient of norm 1 has the variance 1 / (T D): `squares`, which are over D^2 and for
    variance 1, are multiplied by D / T."""
    sites = dict.fromkeys(site for squares in of_blocks for site in squares)
    return {
        site: [math.sqrt(max(scale * squares[site], 0)) if site in squares else None for squares in of_blocks]
        for site in sites
    }


class _Weights:
    """A model's weights and gains as their initialisation makes them, block by block."""

    def __init__(self, model: ModelDef, tokens: int):
        cfg, specs = model.cfg, model.specs()
        self.cfg, self.causal, self.tokens, self.experts = cfg, model.causal, tokens, moe_layers(cfg)
        self._sizes, self._factors = site_sizes(cfg, specs), variance_factors(cfg, specs)

    def factor(self, site: str, layer: int = 0) -> float:
        """fan_in x std^2 of a weight."""
        return _at(self._factors[site], layer)

    def norms(self, layer: int) -> SimpleNamespace:
        """The placement's norms and gains, of a block and of the ends, as functions of a field."""
        placement, eps = placement_of(self.cfg), self.cfg.norm_eps

        def gain(name: str) -> float:
            return _at(self._sizes[name], layer)

        centred = self.cfg.norm == "layernorm"
        sites = (*placement.block_norms, *placement.end_norms)
        made = {name: partial(Field.normed, gain=gain(name), eps=eps, centred=centred) for name in sites}
        return SimpleNamespace(**made | {n: partial(Field.scaled, factor=gain(n)) for n in placement.block_gains})

    def attention(self, layer: int) -> AttentionKernel:
        q, k, v, out = (
            self._projection(site, norm, layer)
            for site, norm in (("q", "q_norm"), ("k", "k_norm"), ("v", "v_norm"), ("attn_out", "heads_norm"))
        )
        multiplier = forward(self.cfg).attention  # of the logits
        if q.gain is None:
            q = dataclasses.replace(q, factor=q.factor * multiplier**2)
        else:
            q = dataclasses.replace(q, gain=q.gain * multiplier)
        head_dim, rope_theta = self.cfg.width // self.cfg.num_heads, self.cfg.rope_theta if self.causal else None
        draws = max(12, 512 // self.tokens)  # few tokens average less, and cost less
        return AttentionKernel(q, k, v, out, head_dim, rope_theta, draws, seed=layer)

    def feed_forward(self, layer: int) -> FeedForwardKernel | MixtureKernel:
        moe = self.cfg.moe

        def kernel(site: str, units: int) -> FeedForwardKernel:
            out = self._projection(f"{site}_out", f"{site}_hidden_norm", layer)
            into = self.factor(f"{site}_in", layer)
            return FeedForwardKernel(site, self.cfg.ffn, into, out, units / self.cfg.width)

        if not self.experts[layer]:
            return kernel("ffn", self.cfg.ffn_dim)
        expert = kernel("expert", moe.expert_dim)
        shared = kernel("shared", moe.expert_dim) if moe.num_shared else None
        return MixtureKernel(moe, self.factor("router", layer), expert, shared)

    def _projection(self, site: str, norm: str, layer: int) -> Projection:
        """A matrix, and its inner norm if the model's table of weights has that."""
        gain = _at(self._sizes[norm], layer) if norm in self._sizes else None
        return Projection(self.factor(site, layer), gain, self.cfg.norm_eps)


def _at(size: ndarray, layer: int) -> float:
    """Of one block, where `size` is () or (L,)."""
    return float(size if size.ndim == 0 else size[layer])


def _notes(cfg: ModelConfig, tokens: int, leaves: int, correlation: float) -> list[str]:
    notes = []
    if cfg.width < SMALL_WIDTH:
        notes.append(f"width {cfg.width} is small: the prediction is for large width, and may mean nothing here")
    if tokens > cfg.width / 8:
        factor = math.exp(-tokens / (2 * cfg.width)) if tokens <= cfg.width else 0.0
        notes.append(
            f"{tokens} tokens in width {cfg.width}: a measured effective rank is lower, of independent tokens "
            + (f"{factor:.2f} times what is predicted" if factor else f"at most {cfg.width}")
        )
    if correlation > COLLAPSED:
        notes.append(
            f"tokens collapse (correlation {correlation:.3f} at the end): what is left of their differences, and "
            "gradients with it, differs from the prediction at finite width"
        )
    if leaves > 1:
        notes.append(f"the stream has {leaves} leaves: its variance, correlation, rank and gradient are the first's")
    if cfg.moe.num_experts:
        notes.append("experts are taken as independent of the router that chooses them")
    if inner_norms(cfg):
        notes.append(
            f"inner norms ({', '.join(inner_norms(cfg))}): the gradient's projection off what is normed is left out"
        )
    return notes


def as_dict(cfg: ModelConfig, tokens: int, prediction: Prediction) -> dict[str, Any]:
    about = {"placement": cfg.placement, "init": init_of(cfg)}
    about |= {key: getattr(cfg, key) for key in ("ffn", "depth", "width")} | {"tokens": tokens}
    return about | dataclasses.asdict(prediction)
