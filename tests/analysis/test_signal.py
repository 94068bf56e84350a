"""Each measured number against its definition (docs/signal.md), in NumPy or by whole Jacobians, of a tiny model."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx
from small_model import standard_normal

from spannorm_jax.analysis import measure as measuring
from spannorm_jax.analysis import replaced
from spannorm_jax.analysis.groups import USUAL, Settings
from spannorm_jax.analysis.measure import Measured, measure
from spannorm_jax.config import Config, ModelConfig, MoEConfig, replace
from spannorm_jax.model.definition import define
from spannorm_jax.model.layers import rotary_angles
from spannorm_jax.model.placement import PLACEMENTS
from spannorm_jax.training.tasks import task_of

T, B, DEPTH, WIDTH, VOCAB = 6, 2, 3, 8, 11
TINY = {"depth": DEPTH, "width": WIDTH, "num_heads": 2, "num_kv_heads": 2, "ffn_dim": 12, "vocab_size": VOCAB}
TINY |= {"dtype": "float32", "rope_theta": 20.0, "norm_eps": 1e-2, "init": "plain", "mix_share": reference.MIX_SHARE}
MIXED = MoEConfig(num_experts=4, expert_dim=6, num_shared=1, every=2, first_dense=1, balance="bias", scores="sigmoid")
# Of these all groups are measured, of the others what looks into a block: the rest knows no placement, and compiling
# it for each would take minutes. Post-type, a spanning skip, normed branches, two streams, a choice by block.
SOME = ("post", "span", "peri", "siamese", "mix")
PROBES = 300  # of 96 numbers each: means of squares have standard errors of about 1%


def tiny(placement, **changes):
    """A model with weights that bend every nonlinearity, and gains apart from one."""
    cfg = ModelConfig(placement=placement, **TINY | changes)
    config = replace(Config(), data__seq_len=T, optim__clip_norm=0.5, optim__eps=1e-3)
    config = replace(config, **{f"model__{name}": getattr(cfg, name) for name in ModelConfig.__dataclass_fields__})
    model, rng = define(cfg), np.random.default_rng(0)

    def draw(spec):
        norm = spec.role == "norm"
        return (rng.uniform(0.5, 1.5, spec.shape) if norm else 0.4 * standard_normal(rng, spec)).astype(np.float32)

    model_state = jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape).astype(np.float32), model.model_state)
    return Measured(config, model, model.map_weights(draw), model_state)


def tokens(rows=B, seed=1):
    return np.random.default_rng(seed).integers(VOCAB, size=(rows, T + 1)).astype(np.int32)


FIT = tokens(rows=12, seed=2)


def mean_nll(logits, rows):
    log_probs = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(log_probs, rows[:, 1:, None], axis=-1))


@functools.cache
def found(placement, probes=PROBES, **changes):
    only = USUAL if placement in ("pre", *SOME) else ("forward",)
    return measure(
        tiny(placement, **changes), {"tokens": tokens()}, {"tokens": FIT}, Settings(probes=probes, blocks=0, only=only)
    )


# ---- the reference, block by block ------------------------------------------------------------------------


class Seen:
    """What one block did with all rows, in float64: the rows' streams before and after, and of each branch its
    argument, its output and what was added to what."""

    def __init__(self):
        self.before, self.after, self.argument, self.output, self.normed, self.skip = [], [], {}, {}, {}, {}


def watched(placement, what):
    """A `Seen` for each block, from the equations of tests/reference.py."""
    cfg, params = what.model.cfg, reference.to_float64(what.params)
    options = reference.Options(placement, cfg.norm, cfg.ffn, cfg.norm_eps, cfg.rope_theta)
    equation = reference.EQUATIONS[placement]
    seen = [Seen() for _ in range(cfg.depth)]
    for row in tokens()[:, :-1]:
        end_norm = lambda name, x: reference.rms_norm(x, params["ends"][name]["gain"], 1e-2)  # noqa: E731
        stream = equation.enter(params["embed"][row], end_norm)
        for layer in range(cfg.depth):
            w, got = jax.tree.map(lambda x, layer=layer: x[layer], params["blocks"]), seen[layer]

            def watch(name, fn, got=got):
                def run(x):
                    got.argument.setdefault(name, []).append(x)
                    got.output.setdefault(name, []).append(fn(x))
                    return got.output[name][-1]

                return run

            def n(name, x, w=w):
                return reference.rms_norm(x, w["norms"][name]["gain"], options.eps)

            def g(name, x, w=w):
                return w["norms"][name]["gain"] * x

            got.before.append(stream)
            attn = watch("attn", lambda x, w=w: reference.attention(w["attn"], x, options))
            ffn = watch("ffn", lambda x, w=w: reference.feed_forward(w["ffn"], x, options))
            stream = equation.block(stream, attn, ffn, n, g, layer, cfg.depth)
            got.after.append(stream)
    return seen


def leading(streams):
    return np.array([stream[0] if isinstance(stream, tuple) else stream for stream in streams])


@functools.cache
def reference_of(placement):
    return watched(placement, tiny(placement))


def cosines(x_TxD):
    unit = x_TxD / np.linalg.norm(x_TxD, axis=1, keepdims=True)
    return unit @ unit.T


def rank_by_svd(x_TxF):
    shares = np.linalg.svd(x_TxF, compute_uv=False) ** 2
    shares /= shares.sum()
    return math.exp(-sum(p * math.log(p) for p in shares if p > 0))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_forward_numbers_are_those_of_the_equations(placement):
    """float32 against float64: largest relative difference seen 3e-5, of ranks."""
    got, seen = found(placement), reference_of(placement)
    want = {name: [] for name in ("stream_variance", "attn_variance", "ffn_variance", "token_correlation")}
    want |= {"effective_rank": [], "angular_distance": []}
    for block in seen:
        x = leading(block.after)
        want["stream_variance"].append(np.mean(x**2))
        for name in ("attn", "ffn"):
            want[f"{name}_variance"].append(np.mean(np.square(block.output[name])))
        apart = ~np.eye(T, dtype=bool)
        want["token_correlation"].append(np.mean([cosines(row)[apart] for row in x]))
        want["effective_rank"].append(np.mean([rank_by_svd(row) for row in x]))
        both = zip(leading(block.before).reshape(-1, WIDTH), x.reshape(-1, WIDTH), strict=True)
        angles = [math.acos(min(1, a @ b / np.linalg.norm(a) / np.linalg.norm(b))) for a, b in both]
        want["angular_distance"].append(np.mean(angles) / math.pi)
    assert got["entry_variance"] == pytest.approx(np.mean(leading(seen[0].before) ** 2), rel=1e-5)
    for name, values in want.items():
        np.testing.assert_allclose(got[name], values, rtol=2e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("placement", ("pre", "hybrid"))
def test_attention_is_that_of_an_explicit_softmax(placement):
    """Queries and keys by the model's own projections, logits and entropies one query at a time."""
    what, got = tiny(placement), found(placement)
    angles = rotary_angles(T, WIDTH // 2, 20.0)
    for layer, block in enumerate(reference_of(placement)):
        q, k, _ = map(np.asarray, modules(what)[layer].attn.qkv(jnp.float32(np.array(block.argument["attn"])), angles))
        logits, entropies, shares = [], [], []
        for row, head, t in np.ndindex(B, 2, T):
            z = k[row, : t + 1, head] @ q[row, t, head] / math.sqrt(WIDTH // 2)
            p = np.exp(z - z.max()) / np.sum(np.exp(z - z.max()))
            logits.append(z.max())
            if t:
                entropies.append(-np.sum(p * np.log(p)))
                shares.append(entropies[-1] / math.log(t + 1))
        assert got["attention_logit_max"][layer] == pytest.approx(max(logits), rel=1e-4)
        assert got["attention_entropy"][layer] == pytest.approx(np.mean(entropies), rel=1e-4)
        assert got["attention_entropy_relative"][layer] == pytest.approx(np.mean(shares), rel=1e-4)


def test_the_rank_of_post_activations_is_that_of_the_hidden_units():
    what, got = tiny("post"), found("post")
    for layer, block in enumerate(reference_of("post")):
        w_in = np.asarray(what.params["blocks"]["ffn"]["in_"], np.float64)[layer]
        ranks = []
        for x in block.argument["ffn"]:
            a, b = x @ w_in[0], x @ w_in[1]
            ranks.append(rank_by_svd(a / (1 + np.exp(-a)) * b))
        assert got["ffn_effective_rank"][layer] == pytest.approx(np.mean(ranks), rel=2e-4)


# ---- branches and blocks, by whole Jacobians ----------------------------------------------------------------


def modules(what):
    """The blocks of a dense model, one module each."""
    graph, state = nnx.split(what.model.bind(what.params, what.model_state).stacks[False])
    return [nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], state)) for i in range(what.model.cfg.depth)]


def energy(jacobian):
    """E|J'g|^2 / E|g|^2 = |J|_F^2 / outputs."""
    return float(jnp.sum(jnp.square(jacobian)) / np.prod(jacobian.shape[: jacobian.ndim // 2]))


# Of each placement, by hand: what follows a branch's output before it is added, and what it is added to (from the
# block's input x, and y, what the second branch is added to). The others are those of PreNorm.
FOLLOWED_BY = {"peri": "after_{}", "layerscale": "scale_{}"}


def skips(placement, block, seen):
    x = leading(seen.before)
    added = {name: np.array(seen.output[name]) for name in ("attn", "ffn")}
    if placement in FOLLOWED_BY:
        added = {
            k: np.asarray(getattr(block.norms, FOLLOWED_BY[placement].format(k))(jnp.float32(v)))
            for k, v in added.items()
        }
    after_attn = np.array(seen.argument["ffn"])  # where attention is followed by a norm of the sum
    if placement == "siamese":
        added = {k: v / math.sqrt(2 * (seen.layer + 1)) for k, v in added.items()}
        after_attn = np.asarray(block.norms.after_attn(jnp.float32(x + added["attn"])))
    y = {"post": after_attn, "hybrid": after_attn, "siamese": after_attn, "span": x, "span_raw": x}.get(placement)
    return added, {"attn": x, "ffn": x + added["attn"] if y is None else y}


@pytest.mark.parametrize("placement", ["pre", "post", "span", "peri", "layerscale", "siamese"])
def test_forward_variance_and_backward_gain_of_each_branch(placement):
    """f from the reference's arrays; b from the Jacobian of the branch. 300 probes: largest error seen 2.4%."""
    what, got = tiny(placement), found(placement)
    angles = rotary_angles(T, WIDTH // 2, 20.0)
    for layer, (block, seen) in enumerate(zip(modules(what), reference_of(placement), strict=True)):
        seen.layer = layer
        added, skip = skips(placement, block, seen)
        branches = {"attn": lambda x, block=block: block.attn(x, angles), "ffn": block.ffn}
        for name, branch in branches.items():
            f = np.mean(added[name] ** 2) / np.mean(skip[name] ** 2)
            assert got[f"{name}_forward_variance"][layer] == pytest.approx(f, rel=1e-4)

            def to_added(x, branch=branch, name=name, block=block, layer=layer):
                out = branch(x)
                if placement in FOLLOWED_BY:
                    out = getattr(block.norms, FOLLOWED_BY[placement].format(name))(out)
                return out / math.sqrt(2 * (layer + 1)) if placement == "siamese" else out

            b = energy(jax.jacobian(to_added)(jnp.float32(np.array(seen.argument[name]))))
            assert got[f"{name}_backward_gain"][layer] == pytest.approx(b, rel=0.06)


def one_block(what, layer, stream):
    """(first stream -> first stream) of a block, at this stream; and the same with its sub-layers' outputs fixed."""
    block, leaves = modules(what)[layer], list(stream) if isinstance(stream, tuple) else [stream]
    angles, placement = rotary_angles(T, WIDTH // 2, 20.0), PLACEMENTS[what.model.cfg.placement]

    def run(x, fixed):
        hold = jax.lax.stop_gradient if fixed else lambda y: y
        whole = (x, *leaves[1:]) if len(leaves) > 1 else x
        attn, ffn = (lambda x: hold(block.attn(x, angles))), (lambda x: hold(block.ffn(x)))
        return jax.tree.leaves(placement.block(whole, attn, ffn, block.norms, layer, block.cfg))[0]

    return run, leaves[0]


@pytest.mark.parametrize("placement", SOME)
def test_jacobians_of_blocks(placement):
    what, got = tiny(placement), found(placement)
    for layer, seen in enumerate(reference_of(placement)):
        stream = jax.tree.map(lambda *rows: jnp.float32(np.stack(rows)), *seen.before)
        run, x = one_block(what, layer, stream)
        whole, skip = (jax.jacobian(functools.partial(run, fixed=fixed))(x) for fixed in (False, True))
        eye = jnp.eye(x.size).reshape(whole.shape)
        s = math.sqrt(energy(skip))
        assert got["block_backward_gain"][layer] == pytest.approx(energy(whole), rel=0.06)
        assert got["block_skip_gain"][layer] == pytest.approx(s, rel=0.03)
        assert got["jacobian_deviation"][layer] == pytest.approx(math.sqrt(energy(whole - eye)), rel=0.03)
        unscaled = math.sqrt(energy(whole / s - eye))
        assert got["jacobian_deviation_unscaled"][layer] == pytest.approx(unscaled, rel=0.03)


def test_f_and_b_make_the_factor_of_a_post_type_block():
    """(1 + b) / (1 + f): of a wide model at initialisation, gains one, within 10% of what the block does."""
    what = tiny("post", width=64, ffn_dim=176, depth=1, norm_eps=1e-6)
    what = Measured(what.config, what.model, jax.jit(what.model.init)(jax.random.key(0)), {})
    got = measure(what, {"tokens": tokens()}, None, Settings(probes=20, only=("forward",)))
    factors = [
        (1 + got[f"{name}_backward_gain"][0]) / (1 + got[f"{name}_forward_variance"][0]) for name in ("attn", "ffn")
    ]
    assert got["block_backward_gain"][0] == pytest.approx(math.prod(factors), rel=0.1)


# ---- backward -------------------------------------------------------------------------------------------------


def unrolled(what, streams, without=None):
    """(loss, features) of the blocks one after another, with streams[l] added to what enters block l."""
    placement, decoder = PLACEMENTS[what.model.cfg.placement], what.model.bind(what.params)
    angles, row = rotary_angles(T, WIDTH // 2, 20.0), tokens()
    stream = placement.enter(decoder.embeddings(row[:, :-1]), decoder.ends)
    for layer, block in enumerate(modules(what)):
        if layer == without:
            continue
        leaves, structure = jax.tree.flatten(stream)
        stream = jax.tree.unflatten(structure, [leaves[0] + streams[layer], *leaves[1:]])
        stream, _ = block(stream, layer, lambda x, block=block: block.attn(x, angles), block.feed_forward)
    features = placement.leave(stream, decoder.ends)
    return mean_nll(decoder.logits(features), row), features


@pytest.mark.parametrize("placement", SOME)
def test_gradient_norms_of_the_stream(placement):
    """Of the loss by jax.grad; of an isotropic gradient by the whole Jacobian of what the head reads."""
    what, got = tiny(placement), found(placement)
    zeros = jnp.zeros((DEPTH, B, T, WIDTH))
    by_loss = jax.grad(lambda s: unrolled(what, s)[0])(zeros)
    norms = np.sqrt(np.sum(np.square(by_loss), axis=(1, 2, 3)))
    np.testing.assert_allclose(got["stream_loss_grad_norm"], norms / norms[-1], rtol=1e-4)
    jacobian = jax.jacobian(lambda s: unrolled(what, s)[1])(zeros)
    norms = np.sqrt(np.sum(np.square(jacobian), axis=(0, 1, 2, 4, 5, 6)))
    np.testing.assert_allclose(got["stream_grad_norm"], norms / norms[-1], rtol=0.05)


def nll(what, params, model_state=None):
    return mean_nll(what.model.bind(params, model_state)(tokens()[:, :-1]), tokens())


def test_gradient_norms_of_weights():
    """By site and block, against jax.grad of the whole model; and all squares together for the isotropic gradient."""
    what, got = tiny("span"), found("span")
    grads = jax.grad(lambda p: nll(what, p))(what.params)
    norms = got["weight_loss_grad_norm"]
    for site, of_blocks in (
        ("q", grads["blocks"]["attn"]["q"]),
        ("attn_out", grads["blocks"]["attn"]["out"]),
        ("ffn_in", grads["blocks"]["ffn"]["in_"]),
        ("after_ffn", grads["blocks"]["norms"]["after_ffn"]["gain"]),
    ):
        want = [np.linalg.norm(np.ravel(of_blocks[layer])) for layer in range(DEPTH)]
        np.testing.assert_allclose(norms[site], want, rtol=1e-4)
    for site, whole in (("embed", grads["embed"]), ("head", grads["head"]), ("entry", grads["ends"]["entry"]["gain"])):
        assert norms[site] == pytest.approx(np.linalg.norm(np.ravel(whole)), rel=1e-4)
    jacobian = jax.jacobian(lambda p: what.model.bind(p).run(tokens()[:, :-1]).features)(what.params)
    of_out = jacobian["blocks"]["ffn"]["out"]
    want = np.sqrt(np.sum(np.square(of_out), axis=(0, 1, 2, 4, 5)) / (B * T * WIDTH))
    np.testing.assert_allclose(got["weight_grad_norm"]["ffn_out"], want, rtol=0.05)
    assert got["weight_grad_norm"]["head"] == 0


# ---- one update, and blocks that are left out --------------------------------------------------------------------


def test_the_change_by_one_update():
    """By Optax's own AdamW with clipping, and the unrolled blocks of both models."""
    what, got = tiny("pre"), found("pre")
    grads = jax.grad(lambda p: nll(what, p))(what.params)
    optim = what.config.optim
    decayed = what.model.map_weights(lambda spec: spec.role in ("hidden", "output"))
    adam = optax.adamw(optim.lr, optim.b1, optim.b2, optim.eps, weight_decay=optim.weight_decay, mask=decayed)
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), adam)
    updates, _ = optimizer.update(grads, optimizer.init(what.params), what.params)
    new = Measured(what.config, what.model, optax.apply_updates(what.params, updates), {})
    logits = [np.asarray(w.model.bind(w.params)(tokens()[:, :-1])) for w in (what, new)]
    assert got["update_logits_change"] == pytest.approx(
        np.linalg.norm(logits[1] - logits[0]) / np.linalg.norm(logits[0]), rel=1e-3
    )
    for layer, (old, after) in enumerate(zip(watched("pre", what), watched("pre", new), strict=True)):
        old, after = leading(old.after), leading(after.after)
        change = np.linalg.norm(after - old) / np.linalg.norm(old)
        assert got["update_stream_change"][layer] == pytest.approx(change, rel=1e-3)


@pytest.mark.parametrize("placement", ["pre", *SOME])
def test_a_block_is_skipped_as_if_it_were_deleted_and_the_others_keep_their_index(placement):
    what, got = tiny(placement), found(placement)
    for layer in range(DEPTH):
        loss, _ = unrolled(what, jnp.zeros((DEPTH, B, T, WIDTH)), without=layer)
        assert got["skip_loss_change"][layer] == pytest.approx(float(loss) - got["loss"], abs=2e-5)


@pytest.mark.parametrize("placement", ["pre", "post", "siamese"])
def test_a_block_is_replaced_by_its_least_squares_map(placement):
    """Against numpy.linalg.lstsq on the reference's streams, for the last block: its result is what the head reads."""
    what, got = tiny(placement), found(placement)

    def both(rows):
        trace = measuring.blocks.traced(what.model.bind(what.params), rows[:, :-1])
        return [
            np.concatenate([np.asarray(x).reshape(-1, WIDTH) for x in jax.tree.leaves(s)], axis=1)
            for s in replaced.block_of(trace, DEPTH - 1)
        ]

    (before, after), (probe, _) = both(FIT), both(tokens())
    ones = np.ones((len(before), 1))
    weights = np.linalg.lstsq(np.hstack([before, ones]).astype(np.float64), after.astype(np.float64), rcond=None)[0]
    made = np.hstack([probe, np.ones((len(probe), 1))]) @ weights
    parts = [jnp.float32(part.reshape(B, T, WIDTH)) for part in np.split(made, made.shape[1] // WIDTH, axis=1)]
    decoder = what.model.bind(what.params)
    features = PLACEMENTS[placement].leave(parts[0] if len(parts) == 1 else tuple(parts), decoder.ends)
    loss = mean_nll(decoder.logits(features), tokens())
    assert got["affine_loss_change"][-1] == pytest.approx(float(loss) - got["loss"], abs=1e-4)
    share = np.mean([change > 0.1 * got["loss"] for change in got["affine_loss_change"]])
    assert got["useful_share"] == pytest.approx(share)


def test_an_affine_block_costs_nothing_when_it_is_replaced():
    """Gains of zero on both branches leave the identity, which is affine."""
    what = tiny("layerscale")
    norms = what.params["blocks"]["norms"]
    zero = {name: {"gain": 0 * norms[name]["gain"]} for name in ("scale_attn", "scale_ffn")}
    params = what.params | {"blocks": what.params["blocks"] | {"norms": norms | zero}}
    what = Measured(what.config, what.model, params, {})
    got = measure(what, {"tokens": tokens()}, {"tokens": FIT}, Settings(blocks=0, only=("skip", "affine")))
    np.testing.assert_allclose(got["skip_loss_change"], 0, atol=1e-6)
    np.testing.assert_allclose(got["affine_loss_change"], 0, atol=1e-5)
    assert got["useful_share"] == 0


# ---- experts, and every placement -----------------------------------------------------------------------------


def test_dense_and_expert_blocks_in_one_model():
    """Blocks 1 and 2 dense, 3 with experts (sigmoid scores, a bias, a shared expert): every list has one number a block
    or null, router numbers are those of the block's own arguments, and skipping is deleting."""
    what = tiny("span", moe=MIXED)
    got = found("span", probes=1, moe=MIXED)
    assert [load is None for load in got["expert_load"]] == [True, True, False]
    assert sum(got["expert_load"][2]) == pytest.approx(1) and len(got["expert_load"][2]) == 4
    assert got["expert_load_max"][2] == pytest.approx(4 * max(got["expert_load"][2]), rel=1e-5)
    assert got["loss"] == pytest.approx(float(nll(what, what.params, what.model_state)), rel=1e-5)
    assert all(x is not None for x in got["skip_loss_change"] + got["affine_loss_change"] + got["stream_variance"])
    sites = got["weight_loss_grad_norm"]
    assert [x is None for x in sites["ffn_out"]] == [False, False, True]
    assert [x is None for x in sites["expert_out"]] == [True, True, False]
    grads = jax.grad(lambda p: nll(what, p, what.model_state))(what.params)
    want = np.linalg.norm(np.ravel(grads["moe_blocks"]["ffn"]["out"]))
    assert sites["expert_out"][2] == pytest.approx(want, rel=1e-4)
    # Post-activations of the expert block: hidden units of all experts side by side, by NumPy from the same argument.
    decoder = what.model.bind(what.params, what.model_state)
    trace = measuring.blocks.traced(decoder, tokens()[:, :-1])
    before, _ = replaced.block_of(trace, 2)
    graph, state = nnx.split(decoder.stacks[True])
    block = nnx.merge(graph, jax.tree.map(lambda x: x[0], state))
    y = block.norms.after_attn(before + block.attn(before, rotary_angles(T, WIDTH // 2, 20.0)))
    w = reference.to_float64(jax.tree.map(lambda x: x[0], what.params["moe_blocks"]["ffn"]))
    bias = np.asarray(what.model_state["moe_blocks"]["ffn"]["bias"], np.float64)[0]
    ranks = []
    for row in np.asarray(y, np.float64):
        hidden = []
        for x in row:
            score = 1 / (1 + np.exp(-x @ w["router"]))
            chosen = np.argsort(-(score + bias))[:2]
            parts = []
            for e in range(4):
                a = np.einsum("d,pdf->pf", x, w["in_"][e])
                weight = score[e] / score[chosen].sum() if e in chosen else 0
                parts.append(weight * a[0] / (1 + np.exp(-a[0])) * a[1])
            a = np.einsum("d,pdf->pf", x, w["shared"]["in_"])
            hidden.append(np.concatenate([*parts, a[0] / (1 + np.exp(-a[0])) * a[1]]))
        ranks.append(rank_by_svd(np.array(hidden)))
    assert got["ffn_effective_rank"][2] == pytest.approx(np.mean(ranks), rel=1e-3)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_placement_is_measured(placement):
    """A new placement enters by itself: each number is there, finite, and one a block."""
    what, got = tiny(placement), found(placement)
    assert got["loss"] == pytest.approx(float(nll(what, what.params)), rel=1e-5)
    assert {"attn_forward_variance", "ffn_forward_variance", "attn_backward_gain", "ffn_backward_gain"} <= set(got)
    for name, value in got.items():
        if name.startswith("weight_"):
            assert all(np.all(np.isfinite(np.array(x, float))) for x in value.values()), name
        else:
            assert np.all(np.isfinite(value)), name
            assert not isinstance(value, list) or len(value) == DEPTH, name


# ---- images ------------------------------------------------------------------------------------------------------


def test_a_model_of_images_is_measured():
    """Every query sees all patches: entropy by NumPy, in the first block; and a skipped block is deleted."""
    config = replace(Config(), task="image", image__size=4, image__patch=2, image__channels=1, data__seq_len=4)
    cfg = ModelConfig(placement="pre", **TINY)
    config = dataclasses.replace(config, model=cfg)
    model, rng = task_of(config).define(config), np.random.default_rng(0)
    params = model.map_weights(lambda s: (0.4 * standard_normal(rng, s) + (s.role == "norm")).astype(np.float32))
    images = rng.integers(256, size=(3, 4, 4, 1), dtype=np.uint8)
    batch = {"image": jnp.asarray(images), "label": jnp.array([1, 0, 10])}
    got = measure(Measured(config, model, params, {}), batch, batch, Settings(blocks=0, only=("forward", "skip")))

    def loss(params, depth=DEPTH):
        less = replace(config, model__depth=depth)
        log_probs = jax.nn.log_softmax(task_of(less).define(less).bind(params)(images))
        return -float(np.mean(np.asarray(log_probs)[np.arange(3), [1, 0, 10]]))

    assert got["loss"] == pytest.approx(loss(params), rel=1e-5)
    for layer in range(DEPTH):
        kept = np.array([i for i in range(DEPTH) if i != layer])
        less = params | {"blocks": jax.tree.map(lambda x, kept=kept: x[kept], params["blocks"])}
        assert got["skip_loss_change"][layer] == pytest.approx(loss(less, DEPTH - 1) - got["loss"], abs=2e-5)
    w = reference.to_float64(params)
    entropies = []
    for x in np.asarray(model.bind(params).embeddings(images), np.float64):
        x = reference.rms_norm(x, w["blocks"]["norms"]["before_attn"]["gain"][0], 1e-2)
        q, k = (np.einsum("td,dhk->htk", x, w["blocks"]["attn"][name][0]) for name in "qk")
        weights = np.exp(np.einsum("htk,hsk->hts", q, k) / math.sqrt(WIDTH // 2))
        weights /= weights.sum(axis=-1, keepdims=True)
        entropies.append(-np.sum(weights * np.log(weights), axis=-1))
    assert got["attention_entropy"][0] == pytest.approx(np.mean(entropies), rel=1e-5)
    assert got["attention_entropy_relative"][0] == pytest.approx(np.mean(entropies) / math.log(4), rel=1e-5)


# ---- rows of zeros ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_row_of_zeros_through_128_blocks_has_finite_gradients(placement):
    """A token with a zero embedding at the first position: its row stays zero to the end.

    Multiplied by eps^(-1/2) in each norm, its gradient overflowed in every placement. Norms pass none for such a row:
    what is left comes by skips without a norm, so that with ScaleInit the gradient of that embedding is at most 10
    times the norm of the largest of the others (largest seen 2.2, of OLMo 2).
    """
    cfg = ModelConfig(**TINY | {"placement": placement, "depth": 128, "init": "scale", "norm_eps": 1e-6})
    model = define(cfg)
    params = jax.jit(model.init)(jax.random.key(0))
    params["embed"] = params["embed"].at[0].set(0)
    what, rows = Measured(Config(), model, params, {}), np.array([[0, 0, 1, 2, 3, 4, 5]])

    @jax.jit
    def gradient(params):
        def loss(params):
            features = model.bind(params).run(rows[:, :-1]).features
            return mean_nll(model.bind(params).logits(features), rows)

        return jax.value_and_grad(loss)(params)

    loss, grads = gradient(what.params)
    chex.assert_tree_all_finite((loss, grads))
    norms = np.linalg.norm(grads["embed"], axis=1)
    assert norms[0] < 10 * norms[1:].max()
