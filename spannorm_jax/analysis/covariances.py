"""What sub-layers do to covariances over tokens, at initialisation and large width, forward and backward.

C is the covariance of a branch's input over tokens, (T, T): C_tu is the mean over the width of x_t x_u. G is that of
the gradient at its output. A matrix W of N(0, std^2) multiplies a covariance by v = fan_in x std^2, and leaves its
shape: (W'x_t) . (W'x_u) / fan_out -> v C_tu. Going back, W (fan_in, fan_out) multiplies G by fan_out x std^2; where
two matrices enclose a nonlinearity, D -> F -> D, the product over both is v_in v_out, as it is forward.
Elementwise products are written *, transposes A'. Sources are at the functions.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy import ndarray

from spannorm_jax.config import MoEConfig
from spannorm_jax.model.initialisation import activation, mixture_gain
from spannorm_jax.model.layers import rotary_angles
from spannorm_jax.model.moe.router import route

Squares = dict[str, float]  # weight's site -> squared norm of its gradient, over the width squared

TERMS = 64  # of the Hermite series
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(128)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


# ---- a projection and the norm that may follow it -----------------------------------------------------


@dataclass(frozen=True)
class Projection:
    """A matrix, and the inner norm that may follow.

    Attributes:
      factor: fan_in x std^2, v.
      gain: what the norm's gain starts at; None without a norm.
      eps: of the norm.

    A norm divides each token by its root mean square, d_t = sqrt(v C_tt + eps), so that what follows is
    gain^2 v C_tu / (d_t d_u). Neglected: the gradient's projection off the normed vector, one of its K dimensions.
    """

    factor: float
    gain: float | None = None
    eps: float = 0.0

    def scale(self, covariance_TxT: ndarray) -> ndarray:
        """What the norm multiplies each token by, (T,), for an input of this covariance."""
        if self.gain is None:
            return np.ones(len(covariance_TxT))
        return self.gain / np.sqrt(self.factor * np.diag(covariance_TxT) + self.eps)

    def forward(self, C: ndarray) -> ndarray:
        return _each(self.scale(C)) * self.factor * C

    def backward(self, C: ndarray, G: ndarray) -> ndarray:
        """Gradient at the matrix's output, for one after the norm. The matrix then multiplies it by v."""
        return _each(self.scale(C)) * G

    def normed_before(self, C: ndarray) -> ndarray:
        """What the norm multiplies a covariance by where it stands before the matrix, whose v is no part of it."""
        return _each(dataclasses.replace(self, factor=1.0).scale(C))


def _each(factor_T: ndarray) -> ndarray:
    return np.outer(factor_T, factor_T)


# ---- feed-forward -----------------------------------------------------------------------------------


def hermite_coefficients(kind: str, std_T: ndarray) -> ndarray:
    """a_n(s) = E f(s u) He_n(u) / sqrt(n!) of an activation f (silu for swiglu), (T, TERMS).

    By Gauss-Hermite quadrature with 128 nodes. Mehler's formula makes them a kernel: E f(s u) f(r w) of standard
    normals u, w with correlation c is sum_n a_n(s) a_n(r) c^n.
    """
    f_TxN = activation(kind, std_T[:, None] * _NODES) * _WEIGHTS
    last, this = np.zeros_like(_NODES), np.ones_like(_NODES)  # normalised He_(n-1) and He_n
    columns = []
    for n in range(TERMS):
        columns.append(f_TxN @ this)
        last, this = this, (_NODES * this - math.sqrt(n) * last) / math.sqrt(n + 1)
    return np.stack(columns, axis=1)


def activation_kernels(kind: str, covariance_TxT: ndarray) -> tuple[ndarray, ndarray]:
    """E f(a_t) f(a_u) and E f'(a_t) f'(a_u) of centred Gaussians a with this covariance: (T, T) each.

    f is relu, gelu, or silu for swiglu. ReLU in closed form, the arc-cosine kernels of degree 1 and 0 (Cho & Saul
    2009). The others by Mehler's series (`hermite_coefficients`); the slope's coefficients follow from Stein's lemma,
    E f'(s u) He_n(u) / sqrt(n!) = sqrt(n + 1) a_(n+1) / s. With 64 terms the error is below 1e-5 of the kernel for
    pre-activations of std up to 2; at most 1e-2 at 5, where correlations are near 1.
    """
    std = np.sqrt(np.diag(covariance_TxT))
    c = np.clip(covariance_TxT / np.maximum(_each(std), np.finfo(float).tiny), -1, 1)
    if kind == "relu":
        angle = np.arccos(c)
        slope = (np.pi - angle) / (2 * np.pi)
        return _each(std) * (np.sqrt(1 - c**2) / (2 * np.pi) + c * slope), slope
    # A token of zeros has the slope of f at 0, which the limit s -> 0 of the series gives.
    std = np.maximum(std, 1e-30)
    a = hermite_coefficients(kind, std)
    b = a[:, 1:] * np.sqrt(np.arange(1, TERMS)) / std[:, None]
    return _series(a, c), _series(b, c)


def _series(a_TxN: ndarray, c_TxT: ndarray) -> ndarray:
    """sum_n a_n(t) a_n(u) c^n by Horner's rule."""
    total = np.zeros_like(c_TxT)
    for a_T in a_TxN.T[::-1]:
        total = total * c_TxT + _each(a_T)
    return total


@dataclass(frozen=True)
class FeedForwardKernel:
    """out(f(in x)), or with SwiGLU out(silu(a) b) with a and b from the two halves of `in`.

    Attributes:
      site: of the weights, without _in and _out.
      kind: `model.ffn`.
      into: the projection to the hidden units.
      out: the inner norm `hidden`, if there is one, and the projection back: its gain stands before the matrix.
      units: hidden units over the width.

    Hidden units are alike and independent given their input's covariance (Neal 1996), so that
        forward    v_out k(v_in C)              k = E f f;            SwiGLU: (v_in C) * k, since b is independent of a
        backward   v_in v_out k'(v_in C) * G    k' = E f' f';         SwiGLU: (v_in C) * k' + k, from a and from b
    Neglected: 1 / units and 1 / width.
    """

    site: str
    kind: str
    into: float
    out: Projection
    units: float

    def _hidden(self, C: ndarray) -> tuple[ndarray, ndarray]:
        """Covariance of the hidden units over tokens, and what a gradient is multiplied by on its way to `in`."""
        before = self.into * C
        k, slope = activation_kernels(self.kind, before)
        return (before * k, before * slope + k) if self.kind == "swiglu" else (k, slope)

    def forward(self, C: ndarray) -> ndarray:
        hidden, _ = self._hidden(C)
        return self.out.factor * self.out.normed_before(hidden) * hidden

    def backward(self, C: ndarray, G: ndarray) -> tuple[ndarray, Squares]:
        """Covariance of the gradient of the input, and those of the weights."""
        hidden, slope = self._hidden(C)
        scale = self.out.normed_before(hidden)
        at_hidden = self.out.factor * scale * G * slope
        # |dW_out|^2 = sum_tu (h_t . h_u)(g_t . g_u) over units x D numbers. |dW_in|^2 alike, where a gradient that
        # has reached a unit is D std_out^2 = v_out D / units of G: the units cancel.
        into, out = float(np.sum(C * at_hidden)), self.units * float(np.sum(scale * hidden * G))
        return self.into * at_hidden, {f"{self.site}_in": into, f"{self.site}_out": out}


@functools.partial(jax.jit, static_argnums=2)
def _routed(logits_NxE: Any, probe_NxE: Any, moe: MoEConfig) -> tuple[Any, Any]:
    """Each token's weight of every expert, 0 of those not chosen; and a gradient of them pulled back to the logits."""

    def weights(logits_NxE: Any) -> Any:
        chosen, ids, _ = route(logits_NxE, None, moe)
        rows = jnp.arange(logits_NxE.shape[0])[:, None]
        return jnp.zeros_like(logits_NxE).at[rows, ids].set(chosen)

    out, pull = jax.vjp(weights, logits_NxE)
    return out, pull(probe_NxE)[0]


@functools.cache
def routing_overlap(moe: MoEConfig, logit_std: float) -> tuple[ndarray, ndarray, ndarray]:
    """Of two tokens whose router logits correlate: (angles, overlaps, slopes) over routed experts.

    The overlap is E sum_e w_te w_ue, the slope E sum_ef J_tef J_uef with J the Jacobian of the weights by the logits.
    Logits are N(0, logit_std^2), independent between experts. Both are taken at 17 angles, from 0 (correlation 1: the
    overlap is `mixture_gain` without shared experts) to pi, with the model's own router on 2^19 logits each.
    """
    rng = np.random.default_rng(0)
    shape = (max(2**19 // moe.num_experts, 1), moe.num_experts)
    u, w, probe = (rng.standard_normal(shape, np.float32) for _ in range(3))

    def routed(logits_NxE: ndarray) -> list[ndarray]:
        return [np.asarray(x).astype(np.float64) for x in _routed(np.float32(logit_std) * logits_NxE, probe, moe)]

    angles, first = np.linspace(0, np.pi, 17), routed(u)
    others = [routed(np.float32(np.cos(a)) * u + np.float32(np.sin(a)) * w) for a in angles]
    overlaps, slopes = np.array(
        [[np.mean(np.sum(x * y, axis=1)) for x, y in zip(first, other, strict=True)] for other in others]
    ).T
    return angles, overlaps * (mixture_gain(moe, logit_std) - moe.num_shared) / overlaps[0], slopes


@dataclass(frozen=True)
class MixtureKernel:
    """A Mixture of Experts: routed ones, weighted by a router, and shared ones.

    Attributes:
      moe: its options.
      router: fan_in x std^2 of the router.
      expert, shared: kernels of one expert; None without shared ones.

    Experts are independent, so that two tokens share what their common experts give: the kernel of one expert times
    E sum_e w_te w_ue (`routing_overlap`), plus that of each shared expert. Back through the router: a weight's gradient
    is g_t . y_te, of the covariance D G_tu Y_tu with Y an expert's output; the weights' Jacobian J takes it to the
    logits, and the router brings std^2 = v_router / D: v_router G * Y * E sum_ef J_tef J_uef.
    Neglected: that tokens of unlike variance have unlike logits, and what logits and hidden units have in common.
    """

    moe: MoEConfig
    router: float
    expert: FeedForwardKernel
    shared: FeedForwardKernel | None

    def _overlap(self, C: ndarray) -> tuple[ndarray, ndarray]:
        std = np.sqrt(np.diag(C))
        logit_std = float(f"{math.sqrt(self.router * np.mean(std**2)):.3g}")  # few values, each simulated once
        correlation = np.clip(C / np.maximum(_each(std), np.finfo(float).tiny), -1, 1)
        np.fill_diagonal(correlation, 1)
        angles, overlaps, slopes = routing_overlap(self.moe, logit_std)
        return np.interp(np.arccos(correlation), angles, overlaps), np.interp(np.arccos(correlation), angles, slopes)

    def forward(self, C: ndarray) -> ndarray:
        shared = self.moe.num_shared * self.shared.forward(C) if self.shared else 0.0
        return self._overlap(C)[0] * self.expert.forward(C) + shared

    def backward(self, C: ndarray, G: ndarray) -> tuple[ndarray, Squares]:
        overlap, slope = self._overlap(C)
        into, squares = self.expert.backward(C, overlap * G)
        into = into + self.router * slope * self.expert.forward(C) * G
        if self.shared:
            more, others = self.shared.backward(C, self.moe.num_shared * G)
            into, squares = into + more, squares | others
        return into, squares


# ---- attention --------------------------------------------------------------------------------------


@functools.cache
def rotary_turns(tokens: int, head_dim: int, theta: float | None) -> ndarray:
    """(T, K/2): what RoPE, if any, multiplies the pairs (i, i + K/2) of a head by, as complex numbers."""
    if theta is None:
        return np.ones((tokens, head_dim // 2), complex)
    return np.exp(1j * np.asarray(rotary_angles(tokens, head_dim, theta)).astype(np.float64))


@dataclass(frozen=True)
class AttentionKernel:
    """Attention: causal with RoPE, or over all positions without.

    Attributes:
      q, k, v: the projections to a head's queries, keys and values, with the inner norms of that name.
      out: the inner norm `heads`, if there is one, and the projection back.
      head_dim: K.
      rope_theta: of the rotation; None without a mask and RoPE.
      draws: heads that are drawn.
      seed: of the draws; the same for both directions, another for each block.

    Given a head's weights A (T x T), which depend on its queries and keys alone, a head is linear in its values, and
    its outputs are independent of other heads' by their slices of `out`. With V = Cov(v) over tokens, and Q, K alike:

        forward    v_out A V A'                                        mean over heads
        values     v_out A' G A
        queries    v_out G * (A (V*K) A' - A ((V A')*(K A')) - ((A V)*(A K)) A' + (A V A')*(A K A'))
        keys       v_out (V*(A' M A) - ((A' M)*(V A')) A - A' ((M A)*(A V)) + A' (M*(A V A')) A),    M = G * Q

    The last two are the chain rule through the softmax: dA_ts = g_t . v_s has the covariance G_tu V_sr over (ts, ur);
    the logits' gradient is dz_ts = A_ts (dA_ts - sum_r A_tr dA_tr); and dq_t = sum_s dz_ts k_s / sqrt(K), dk_s =
    sum_t dz_ts q_t / sqrt(K), with keys and queries as independent of dz as they are of any one logit.
    A is drawn with queries and keys of the head's own size, so the logits q.k / sqrt(K) have the law that they have in
    the model, with RoPE and QK-norm; their variance is Q_tt K_ss. RoPE turns keys against each other by their distance,
    which multiplies K_sr above by the mean of cos((s - r) theta_i), and Q_tu alike: exact for a token's variance.
    Neglected: the same turning between two tokens' gradients (t != u), 1 / K, 1 / heads. Grouped queries change nothing
    at this order: heads that share keys and values have independent slices of `out`.
    """

    q: Projection
    k: Projection
    v: Projection
    out: Projection
    head_dim: int
    rope_theta: float | None
    draws: int = 12
    seed: int = 0

    def weights(self, C: ndarray) -> ndarray:
        """Attention weights of `draws` heads, (N, T, T)."""
        rng, T, K = np.random.default_rng(self.seed), len(C), self.head_dim
        # Tokens that have collapsed make C singular, to rounding: 1e-9 of independence keeps the root real.
        root = np.linalg.cholesky(C + np.diag(1e-9 * np.diag(C) + np.finfo(float).tiny))
        turns = rotary_turns(T, K, self.rope_theta)

        def drawn(projection: Projection) -> ndarray:
            x = math.sqrt(projection.factor) * (root @ rng.standard_normal((self.draws, T, K)))
            if projection.gain is not None:
                x *= projection.gain / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + projection.eps)
            # RoPE turns the pairs (i, i + K/2); as complex numbers their real products are those of the heads.
            return (x[..., : K // 2] + 1j * x[..., K // 2 :]) * turns

        logits = (drawn(self.q) @ drawn(self.k).conj().swapaxes(1, 2)).real / math.sqrt(K)
        if self.rope_theta is not None:
            logits = np.where(np.tri(T, dtype=bool), logits, -np.inf)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return weights / weights.sum(axis=-1, keepdims=True)

    def _heads(self, C: ndarray) -> tuple[ndarray, ndarray, ndarray]:
        """The weights, and covariances of a head's output: of each draw, and of their mean."""
        A = self.weights(C)
        each = A @ self.v.forward(C) @ A.swapaxes(1, 2)
        return A, each, each.mean(axis=0)

    def forward(self, C: ndarray) -> ndarray:
        heads = self._heads(C)[2]
        return self.out.factor * self.out.normed_before(heads) * heads

    def backward(self, C: ndarray, G: ndarray) -> tuple[ndarray, Squares]:
        """Covariance of the gradient of the input, and those of the weights."""
        A, each, heads = self._heads(C)
        scale = self.out.normed_before(heads)
        g = self.out.factor * scale * G  # at a head's output
        At = A.swapaxes(1, 2)
        turns = rotary_turns(len(C), self.head_dim, self.rope_theta)
        V, turning = self.v.forward(C), (turns @ turns.conj().T).real / turns.shape[1]
        K, M = self.k.forward(C) * turning, g * self.q.forward(C) * turning
        AV, AK, MA = A @ V, A @ K, M @ A
        VAt, KAt, AtM = AV.swapaxes(1, 2), AK.swapaxes(1, 2), MA.swapaxes(1, 2)  # V, K and M are symmetric
        at_queries = g * (A @ (V * K) @ At - A @ (VAt * KAt) - (AV * AK) @ At + each * (AK @ At))
        at_keys = V * (At @ MA) - (AtM * VAt) @ A - At @ (MA * AV) + At @ (M * each) @ A
        after = {"q": at_queries, "k": at_keys, "v": At @ g @ A}
        into, squares = np.zeros_like(C), {"attn_out": float(np.sum(scale * heads * G))}
        for name, gradient in after.items():
            projection: Projection = getattr(self, name)
            before = projection.backward(C, gradient.mean(axis=0))
            squares[name] = float(np.sum(C * before))
            into += projection.factor * before
        return into, squares
