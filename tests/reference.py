"""A decoder in plain float64 NumPy, written from the equations with a loop over every head and position.

It shares nothing with the package but the names and shapes of the weights:

    embed (V, D), head (D, V) if not tied, ends.<norm>.gain (D,), and with a leading axis of L blocks
    blocks.norms.<norm or gain>.gain (D,), blocks.attn.{q (D,H,K), k (D,G,K), v (D,G,K), out (H,K,D)},
    blocks.attn.{q,k,v}_norm.gain (K,) where they are normed, blocks.attn.heads_norm.gain (H K,) too,
    blocks.ffn.{in_ (2 or 1,D,F), out (F,D)}, blocks.ffn.hidden_norm.gain (F,); of experts hidden_gain (E,F)

or, with experts in every block, moe_blocks, whose ffn is {router (D,E), in_ (E,2 or 1,D,F), out (E,F,D)},
{shared.{in_, out}} with shared experts, and bias (E,) if that takes part in the selection.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

erf = np.vectorize(math.erf, otypes=[np.float64])


@dataclass(frozen=True)
class Router:
    top_k: int
    scores: str
    renormalize: bool
    aux_loss: float
    z_loss: float


@dataclass(frozen=True)
class Options:
    """What the weights do not tell."""

    placement: str
    norm: str = "rmsnorm"
    ffn: str = "swiglu"
    eps: float = 1e-6
    theta: float = 10000.0
    router: Router | None = None
    warmup: tuple[float, int] | None = None  # ProRes's T, and the update t
    causal: bool = True  # False: neither a mask nor rotary positions


def to_float64(tree):
    if isinstance(tree, dict):
        return {name: to_float64(node) for name, node in tree.items()}
    return np.asarray(tree, np.float64)


def rms_norm(x, gain, eps):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * gain


def layer_norm(x, gain, eps):
    mean = np.mean(x, axis=-1, keepdims=True)
    variance = np.mean((x - mean) ** 2, axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps) * gain


def rope(x_K, position, theta):
    """Rotates the pair (i, i + K/2) by position * theta^(-2i/K)."""
    half = len(x_K) // 2
    out = np.empty_like(x_K)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x_K))
        out[i] = x_K[i] * math.cos(angle) - x_K[i + half] * math.sin(angle)
        out[i + half] = x_K[i] * math.sin(angle) + x_K[i + half] * math.cos(angle)
    return out


def attention(w, x_TxD, options):
    """Softmax attention of one sequence; query head h reads key-value head h // (H / G)."""
    T, D = x_TxD.shape
    H, K = w["q"].shape[1:]
    G = w["k"].shape[1]
    heads = np.zeros((T, H, K))

    def project(name, head):
        x_TxK = x_TxD @ w[name][:, head]
        return rms_norm(x_TxK, w[f"{name}_norm"]["gain"], options.eps) if f"{name}_norm" in w else x_TxK

    for h in range(H):
        g = h // (H // G)
        q, k, v = project("q", h), project("k", g), project("v", g)
        if options.causal:
            q = np.stack([rope(q[t], t, options.theta) for t in range(T)])
            k = np.stack([rope(k[t], t, options.theta) for t in range(T)])
        for t in range(T):
            end = t + 1 if options.causal else T
            logits = k[:end] @ q[t] / math.sqrt(K)
            p = np.exp(logits - logits.max())
            heads[t, h] = (p / p.sum()) @ v[:end]
    heads = heads.reshape(T, H * K)
    if "heads_norm" in w:
        heads = rms_norm(heads, w["heads_norm"]["gain"], options.eps)
    return heads @ w["out"].reshape(H * K, D)


def feed_forward(w, x_TxD, options):
    a = x_TxD @ w["in_"][0]
    if options.ffn == "swiglu":
        hidden = a / (1 + np.exp(-a)) * (x_TxD @ w["in_"][1])
    elif options.ffn == "relu":
        hidden = np.where(a > 0, a, 0)
    else:
        hidden = a * (1 + erf(a / math.sqrt(2))) / 2
    if "hidden_norm" in w:
        hidden = rms_norm(hidden, w["hidden_norm"]["gain"], options.eps)
    return hidden @ w["out"]


def experts(w, x_TxD, options, seen):
    """Each token's experts, one after the other; `seen` gets what the losses of the router need of each token."""
    router, out = options.router, np.zeros_like(x_TxD)
    for t, x in enumerate(x_TxD):
        logits = x @ w["router"]
        if router.scores == "softmax":
            score = np.exp(logits) / np.sum(np.exp(logits))
        else:
            score = 1 / (1 + np.exp(-logits))
        chosen = np.argsort(-(score + w.get("bias", 0)))[: router.top_k]
        total = np.sum(score[chosen]) if router.renormalize else 1.0
        for e in chosen:
            expert = {"in_": w["in_"][e], "out": w["out"][e]}
            if "hidden_gain" in w:
                expert["hidden_norm"] = {"gain": w["hidden_gain"][e]}
            out[t] += score[e] / total * feed_forward(expert, x[None], options)[0]
        seen.append((chosen, score / np.sum(score), math.log(np.sum(np.exp(logits))) ** 2))
    return out + feed_forward(w["shared"], x_TxD, options) if "shared" in w else out


def router_loss(seen, options):
    """Of one block, over the tokens of the whole batch: E sum_e f_e P_e, and the mean square of log Z."""
    router, E = options.router, len(seen[0][1])
    share = np.bincount(np.concatenate([chosen for chosen, _, _ in seen]), minlength=E) / (len(seen) * router.top_k)
    balance = E * share @ np.mean([probs for _, probs, _ in seen], axis=0)
    return router.aux_loss * balance + router.z_loss * np.mean([z for _, _, z in seen])


# ---- placements: how the stream is entered, one block, how it is left -------------------------------
# n(name, x) is a norm of the block, g(name, x) a gain of it, N(name, x) a norm of the ends; l counts from 0, of L.


def pre(X, A, F, n, g, l, L):
    X = X + A(n("before_attn", X))
    return X + F(n("before_ffn", X))


def post(X, A, F, n, g, l, L):
    X = n("after_attn", X + A(X))
    return n("after_ffn", X + F(X))


def span(X, A, F, n, g, l, L):
    """Y = N(X + A(X')), X = N(X + F(Y)); X' = X after the norm at the entry."""
    Y = n("after_attn", X + A(X))
    return n("after_ffn", X + F(Y))


def span_raw(stream, A, F, n, g, l, L):
    """The skip of block 1 carries the raw embeddings, its attention reads the normed ones."""
    X, X_attn = stream
    Y = n("after_attn", X + A(X_attn))
    X = n("after_ffn", X + F(Y))
    return X, X


def peri(X, A, F, n, g, l, L):
    for before, f, after in (("before_attn", A, "after_attn"), ("before_ffn", F, "after_ffn")):
        X = X + n(after, f(n(before, X)))
    return X


def hybrid(X, A, F, n, g, l, L):
    """Y = X + A(X) with queries, keys and values normed; Z = N(Y); X = Z + F(Z)."""
    Z = n("after_attn", X + A(X))
    return Z + F(Z)


def layerscale(X, A, F, n, g, l, L):
    X = X + g("scale_attn", A(n("before_attn", X)))
    return X + g("scale_ffn", F(n("before_ffn", X)))


def siamese(stream, A, F, n, g, l, L):
    """O = f(N(X + N(Y))), X = N(X + O / sqrt(2 (l + 1))), Y = Y + O."""
    X, Y = stream
    for f, name in ((A, "attn"), (F, "ffn")):
        O = f(n(f"before_{name}", X + n(f"side_{name}", Y)))
        X, Y = n(f"after_{name}", X + O / math.sqrt(2 * (l + 1))), Y + O
    return X, Y


def deepnorm(X, A, F, n, g, l, L):
    """X = N(a X + f(X)), a = (2L)^(1/4)."""
    X = n("after_attn", (2 * L) ** (1 / 4) * X + A(X))
    return n("after_ffn", (2 * L) ** (1 / 4) * X + F(X))


def olmo2(X, A, F, n, g, l, L):
    X = X + n("after_attn", A(X))
    return X + n("after_ffn", F(X))


def b2t(X, A, F, n, g, l, L):
    Y = n("after_attn", X + A(X))
    return n("after_ffn", X + Y + F(Y))


def residual(stream, A, F, n, g, l, L):
    """R = R + f(X), X = N(X + f(X))."""
    X, R = stream
    for f, name in ((A, "after_attn"), (F, "after_ffn")):
        O = f(X)
        X, R = n(name, X + O), R + O
    return X, R


MIX_SHARE = 0.4


def mix(X, A, F, n, g, l, L):
    """PostNorm in the first blocks, in whole ones, then PreNorm."""
    for f, name in ((A, "attn"), (F, "ffn")):
        X = n(name, X + f(X)) if l + 1 <= MIX_SHARE * L else X + f(n(name, X))
    return X


def lns(X, A, F, n, g, l, L):
    """X = X + f(N(X) / sqrt(l)), l from 1."""
    X = X + A(n("before_attn", X) / math.sqrt(l + 1))
    return X + F(n("before_ffn", X) / math.sqrt(l + 1))


def keel(X, A, F, n, g, l, L):
    """X = N(2L X + f(N X))."""
    X = n("after_attn", 2 * L * X + A(n("before_attn", X)))
    return n("after_ffn", 2 * L * X + F(n("before_ffn", X)))


def rezero(X, A, F, n, g, l, L):
    X = X + g("scale_attn", A(X))
    return X + g("scale_ffn", F(X))


def deepscale(X, A, F, n, g, l, L):
    """X = sqrt(1 - 2/L) X + sqrt(2/L) f(N X)."""
    for f, name in ((A, "before_attn"), (F, "before_ffn")):
        X = math.sqrt(1 - 2 / L) * X + math.sqrt(2 / L) * f(n(name, X))
    return X


def as_it_is(X, N):
    return X


def final(X, N):
    return N("final", X)


def two_streams(X, N):
    return X, X


def sum_of_two(stream, N):
    return stream[0] + N("final", stream[1])


@dataclass(frozen=True)
class Equation:
    """A placement by hand: how the stream is entered, one block, how it is left, and what it owns."""

    enter: Callable
    block: Callable
    leave: Callable
    owned: int  # gains of size D in a block, of norms and without one
    ends: tuple[str, ...] = ()  # norms at the ends
    inner: tuple[str, ...] = ()  # what is normed within sub-layers
    scalars: int = 0  # gains of size 1 in a block
    added: tuple[str, ...] = ("A", "F")  # what is added to the stream: a sub-layer, or a norm of one

    def gains(self, m):
        """Numbers in a block's gains, of a model config."""
        K = m.width // m.num_heads
        inner = {*self.inner, *(("q", "k") if m.qk_norm else ())}
        sizes = {"q": K, "k": K, "v": K, "heads": m.num_heads * K, "hidden": m.ffn_dim}
        return self.owned * m.width + self.scalars + sum(sizes[name] for name in inner)


NORMED = ("after_attn", "after_ffn")
EQUATIONS = {
    "pre": Equation(as_it_is, pre, final, 2, ("final",)),
    "post": Equation(as_it_is, post, as_it_is, 2),
    "span": Equation(lambda X, N: N("entry", X), span, as_it_is, 2, ("entry",), added=("F",)),
    "span_raw": Equation(lambda X, N: (X, N("entry", X)), span_raw, lambda s, N: s[0], 2, ("entry",), added=("F",)),
    "peri": Equation(as_it_is, peri, final, 4, ("final",), added=NORMED),
    "hybrid": Equation(as_it_is, hybrid, as_it_is, 1, inner=("q", "k", "v")),
    "layerscale": Equation(as_it_is, layerscale, final, 4, ("final",)),
    "siamese": Equation(two_streams, siamese, sum_of_two, 6, ("final",)),
    "deepnorm": Equation(as_it_is, deepnorm, as_it_is, 2),
    "olmo2": Equation(as_it_is, olmo2, final, 2, ("final",), inner=("q", "k"), added=NORMED),
    "b2t": Equation(as_it_is, b2t, as_it_is, 2),
    "residual": Equation(two_streams, residual, sum_of_two, 2, ("final",)),
    "mix": Equation(as_it_is, mix, final, 2, ("final",)),
    "lns": Equation(as_it_is, lns, final, 2, ("final",)),
    "keel": Equation(as_it_is, keel, as_it_is, 4),
    "rezero": Equation(as_it_is, rezero, as_it_is, 0, scalars=2),
    "subln": Equation(as_it_is, pre, final, 2, ("final",), inner=("heads", "hidden")),
    "deepscale": Equation(as_it_is, deepscale, final, 2, ("final",)),
    "pre_embnorm": Equation(lambda X, N: N("entry", X), pre, final, 2, ("entry", "final")),
}


def warmed(A, F, n, l, options):
    """ProRes: what is added to the stream times min(1, t / (T l)), l from 1."""
    T, t = options.warmup
    added, a = EQUATIONS[options.placement].added, min(1.0, t / (T * (l + 1)))
    return (
        (lambda x: a * A(x)) if "A" in added else A,
        (lambda x: a * F(x)) if "F" in added else F,
        lambda name, x: n(name, x) * (a if name in added else 1),
    )


def features(params, x_TxD, options, seen=None):
    """What the head reads of one sequence's embeddings; seen[layer] grows by what its router did."""
    norm_fn = {"rmsnorm": rms_norm, "layernorm": layer_norm}[options.norm]
    blocks, ends = params["moe_blocks" if options.router else "blocks"], params.get("ends", {})
    depth = len(blocks["ffn"]["out"])

    def end_norm(name, x):
        return norm_fn(x, ends[name]["gain"], options.eps)

    equation = EQUATIONS[options.placement]
    stream = equation.enter(x_TxD, end_norm)
    for layer in range(depth):
        w = _at(blocks, layer)

        def attn(x, w=w):
            return attention(w["attn"], x, options)

        def ffn(x, w=w, layer=layer):
            if options.router:
                return experts(w["ffn"], x, options, seen.setdefault(layer, []))
            return feed_forward(w["ffn"], x, options)

        def n(name, x, w=w):
            return norm_fn(x, w["norms"][name]["gain"], options.eps)

        def g(name, x, w=w):
            return w["norms"][name]["gain"] * x

        functions = warmed(attn, ffn, n, layer, options) if options.warmup else (attn, ffn, n)
        stream = equation.block(stream, *functions, g, layer, depth)
    return equation.leave(stream, end_norm)


def _at(leaf, layer):
    if isinstance(leaf, dict):
        return {name: _at(node, layer) for name, node in leaf.items()}
    return leaf[layer]


def logits(params, tokens_BxT, options, seen=None):
    embed, seen = params["embed"], {} if seen is None else seen
    head, scale = (params["head"], 1.0) if "head" in params else (embed.T, math.sqrt(embed.shape[1]))
    return np.stack([features(params, scale * embed[tokens_T], options, seen) @ head for tokens_T in tokens_BxT])


def loss(params, tokens_BxT1, options):
    """Mean cross-entropy in nats of predicting token t + 1 at position t, and the losses of the routers."""
    seen = {}
    z = logits(params, tokens_BxT1[:, :-1], options, seen)
    total = 0.0
    for row, targets in zip(z, tokens_BxT1[:, 1:], strict=True):
        for at_t, target in zip(row, targets, strict=True):
            top = at_t.max()
            total += top + math.log(np.sum(np.exp(at_t - top))) - at_t[target]
    return total / (z.shape[0] * z.shape[1]) + sum(router_loss(block, options) for block in seen.values())
