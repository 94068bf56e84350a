"""Predictions against the model itself with drawn weights, against closed forms, and as a command."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spannorm_jax.analysis import covariances, theory
from spannorm_jax.analysis.prediction import predict, predict_images
from spannorm_jax.command import run_command
from spannorm_jax.config import ExecutionConfig, ModelConfig, MoEConfig, replace
from spannorm_jax.config_file import load
from spannorm_jax.errors import UserError
from spannorm_jax.model.definition import define
from spannorm_jax.model.initialisation import INITS, plain
from spannorm_jax.model.placement import PLACEMENTS
from spannorm_jax.training.tasks import task_of

T = 16
EXECUTION = ExecutionConfig(attention="xla")


def config(**changes):
    cfg = {"depth": 3, "width": 192, "num_heads": 6, "ffn_dim": 512, "vocab_size": 2**14, "init": "plain"}
    cfg |= {"dtype": "float32"} | changes
    return ModelConfig(**{"num_kv_heads": cfg["num_heads"]} | cfg)


def measured(model, draws=4, rows=4, images=None):
    """What `Prediction` holds, of the model on random tokens or images: means of squares over draws of weights and
    rows, and the standard errors of the draws."""
    cfg = model.cfg

    @jax.jit
    def one(key):
        of_weights, of_tokens, of_gradient = jax.random.split(key, 3)
        inputs = jax.random.randint(of_tokens, (rows, T), 0, cfg.vocab_size) if images is None else images
        params, model_state = model.init(of_weights), model.init_model_state()
        entered = jax.eval_shape(lambda p: model.bind(p, model_state).run(inputs).stream, params)
        tokens = jax.tree.leaves(entered)[0].shape[1]

        def run(params, added):
            bound = model.bind(params, model_state)

            def step(block, stream, layer, angles, added):
                leaves, structure = jax.tree.flatten(stream)
                stream = jax.tree.unflatten(structure, [leaves[0] + added, *leaves[1:]])
                seen = {}

                def attn(x):
                    out = block.attn(x, angles)
                    seen["attn_variance"] = jnp.mean(out**2)
                    return out

                def ffn(x):
                    out, stats = block.feed_forward(x)
                    seen["ffn_variance"] = jnp.mean(out**2)
                    return out, stats

                stream, stats = block(stream, layer, attn, ffn)
                x = jax.tree.leaves(stream)[0]
                unit = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
                seen["stream_variance"] = jnp.mean(x**2)
                pairs = jnp.sum(jnp.sum(unit, axis=1) ** 2) / rows - tokens
                seen["token_correlation"] = pairs / (tokens * (tokens - 1))
                return stream, seen, stats

            features, _, seen, _ = bound.run(inputs, step, added)
            return features, seen

        added = jnp.zeros((cfg.depth, *jax.tree.leaves(entered)[0].shape))
        out, vjp, seen = jax.vjp(run, params, added, has_aux=True)
        of_params, of_stream = vjp(jax.random.normal(of_gradient, out.shape) / math.sqrt(tokens * cfg.width))
        squares = model.map_weights(
            lambda spec, g: jnp.sum(g**2, axis=tuple(range(1 if spec.layers else 0, g.ndim))) / rows, of_params
        )
        return seen, jnp.sum(of_stream**2, axis=(1, 2, 3)), squares

    def named(seen, stream, squares):
        weights = {}
        model.map_weights(lambda spec, x: weights.setdefault(spec.site, np.sqrt(x)) if spec.layers else None, squares)
        return seen | {"stream_grad_norm": np.sqrt(stream / stream[-1]), "weight_grad_norm": weights}

    found = [jax.tree.map(np.float64, one(jax.random.key(seed))) for seed in range(draws)]
    mean = jax.tree.map(lambda *xs: np.mean(xs, axis=0), *found)
    spread = jax.tree.map(lambda *xs: np.std(xs, axis=0) / math.sqrt(draws), *(named(*x) for x in found))
    return named(*mean), spread


# A new placement enters by itself; ffn and initialisation alternate.
FFNS = ("swiglu", "gelu", "relu")
CASES = {
    p: {"placement": p, "ffn": FFNS[i % 3], "init": ("plain", "scale")[i // 3 % 2]} for i, p in enumerate(PLACEMENTS)
}
CASES |= {
    "small": {"placement": "post", "init": "gpt2", "width": 256, "num_heads": 8},
    "tied": {"placement": "pre", "init": "gpt2", "tied_head": True, "ffn": "gelu", "width": 256, "num_heads": 8},
    "qk_norm": {"placement": "span", "qk_norm": True, "num_kv_heads": 3, "norm": "layernorm", "variance_budget": 9.0},
    "warmup": {"placement": "peri", "branch_warmup_steps": 0.5, "ffn": "relu"},  # the third block comes in at 2/3
    "experts": {"placement": "post", "moe": MoEConfig(num_experts=4, expert_dim=256, num_shared=1), "ffn": "gelu"},
}


# About twice the largest error seen over the cases, relative, of correlations absolute. Neglected are 1 / width,
# 1 / heads and the like, and the draws are few.
BOUNDS = {"stream_variance": 0.03, "attn_variance": 0.2, "ffn_variance": 0.12, "stream_grad_norm": 0.03}
CORRELATION = 0.03
WEIGHTS = {"q": 0.17, "k": 0.17}
OTHER_WEIGHTS = 0.12
# Without norms, tokens keep the unlike sizes that they have at finite width, and SwiGLU squares them.
UNNORMED = 3


@pytest.mark.parametrize("case", CASES)
def test_predictions_against_the_model(case):
    cfg = config(**CASES[case])
    against(*measured(define(cfg, EXECUTION)), predict(cfg, T), cfg)


def against(got, errors, want, cfg, times=0):
    """Within the bounds, and so many standard errors of the draws more."""
    more = 1 if PLACEMENTS[cfg.placement].block_norms else UNNORMED

    def near(got, errors, want, name, bound):
        assert np.all(np.abs(got - want) <= bound + times * errors), (name, got, errors, want)

    for name, bound in BOUNDS.items():
        near(got[name], errors[name], getattr(want, name), name, bound * more * np.abs(getattr(want, name)))
    name = "token_correlation"
    near(got[name], errors[name], want.token_correlation, name, CORRELATION)
    drawn = {"norm": False, "router": False}
    sites = {s.site for s in define(cfg).specs() if s.layers and drawn.get(s.role, True)}
    assert set(want.weight_grad_norm) == sites
    for site, norms in want.weight_grad_norm.items():
        bound = WEIGHTS.get(site, OTHER_WEIGHTS)
        found = got["weight_grad_norm"][site], errors["weight_grad_norm"][site]
        near(*found, np.array(norms), site, bound * more * np.array(norms))


# A digit has 16 patches, in the case of a token 17: attention without a mask, fixed positions or learned ones. Patches
# are alike, so that a draw of weights says more of itself than with tokens that all differ: hence the standard errors.
IMAGES = [(placement, {"init": init}) for placement in ("pre", "post", "span") for init in ("plain", "scale")]
IMAGES += [("span", {"image__positions": "learned", "image__pool": "token"}), ("pre", {"model__norm": "rmsnorm"})]


@pytest.mark.parametrize(("placement", "changes"), IMAGES)
def test_predictions_against_the_model_of_images(placement, changes):
    made = config(placement=placement, norm="layernorm", ffn="gelu", init=changes.get("init", "plain"))
    options = {k: v for k, v in changes.items() if k != "init"}
    ours = load("configs/vision.py:tiny", [("image.patch", "2")])
    task = task_of(ours)
    data, ours = task.open(replace(dataclasses.replace(ours, model=dataclasses.replace(made, vocab_size=0)), **options))
    images = task.sample(data.eval, ours.data.seq_len, 4, "")["image"]
    got, errors = measured(task.define(ours), draws=12, images=images)
    against(got, errors, predict_images(ours, images), ours.model, times=3)


# ---- closed forms ----------------------------------------------------------------------------------------


def with_placement(monkeypatch, block, base="pre", **changes):
    made = dataclasses.replace(PLACEMENTS[base], name="made", block=block, **changes)
    monkeypatch.setitem(PLACEMENTS, "made", made)
    return "made"


def test_a_linear_residual_network_in_closed_form(monkeypatch):
    """x += W N x and a final norm, tokens independent: variance 1 + l v after l blocks, and a block that is entered at
    variance s multiplies gradient energy by 1 + v / s. W is a feed-forward whose activation is the identity."""
    monkeypatch.setattr(covariances, "activation", lambda kind, x: x)
    placement = with_placement(monkeypatch, lambda x, attn, ffn, n, layer, cfg: x + ffn(n.before_ffn(x)))
    cfg = config(placement=placement, depth=6, ffn="gelu", norm_eps=1e-12)
    got = predict(cfg, T)
    np.testing.assert_allclose(got.stream_variance, 1 + np.arange(1, 7))
    gains = 1 + 1 / np.arange(1.0, 7.0)
    want = np.sqrt(np.cumprod(gains[::-1])[::-1])
    np.testing.assert_allclose(got.stream_grad_norm, want / want[-1])
    np.testing.assert_allclose(got.token_correlation, 0, atol=1e-12)
    np.testing.assert_allclose(got.effective_rank, T)
    np.testing.assert_allclose(got.ffn_backward_gain, 1)


@pytest.mark.parametrize("ffn", FFNS)
def test_the_skip_path_is_the_papers_argument(ffn):
    """SpanNorm with branches of unit variance: one norm a block on the skip path, 2^(-1/2) each. PreNorm: none."""
    cfg = config(placement="span", init="scale", depth=8, variance_budget=64.0, ffn=ffn)
    got = predict(cfg, T)
    np.testing.assert_allclose(got.ffn_variance, 1, rtol=1e-5)
    np.testing.assert_allclose(got.skip_path, 2.0 ** (-np.arange(7, -1, -1) / 2), rtol=1e-5)
    assert got.stream_grad_norm[0] > 2 * got.skip_path[0]  # branches carry gradient too
    np.testing.assert_allclose(predict(dataclasses.replace(cfg, placement="pre"), T).skip_path, 1, rtol=1e-5)


def test_a_depth_factor_of_the_forward_pass_is_that_of_the_weights():
    """The same function, so the same signal; weights that are larger by 1 / m have gradients smaller by m, and what the
    sub-layer itself returns is larger by 1 / m."""
    cfg = config(placement="span", init="scale", depth=4)
    in_weights, in_forward = (predict(dataclasses.replace(cfg, depth_factor=f), T) for f in ("weight", "multiplier"))
    for name in ("stream_variance", "stream_grad_norm", "ffn_backward_gain", "skip_path"):
        np.testing.assert_allclose(getattr(in_forward, name), getattr(in_weights, name), rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(in_forward.ffn_variance, 16 * np.array(in_weights.ffn_variance), rtol=1e-5)
    ratio = np.array(in_forward.weight_grad_norm["ffn_out"]) / in_weights.weight_grad_norm["ffn_out"]
    np.testing.assert_allclose(ratio, 1 / 4, rtol=1e-5)  # sqrt(1 / 4 / 4)


def test_factors_that_choose_by_layer_and_streams_that_meet_again(monkeypatch):
    """The first block PostNorm, others PreNorm, by factors of the layer, a number of NumPy or JAX; and a stream that is
    split, scaled and added to itself: (3 x - x) / 2 = x, whose parts are no independent sources."""

    def mixed(x, attn, ffn, n, layer, cfg):
        post, pre = jnp.where(layer < 1, 1.0, 0.0), np.float32(layer >= 1)
        x = (3 * x - x) / 2
        y = x + attn(post * x + pre * n.before_attn(x))
        return post * n.before_ffn(y) + (y + ffn(n.before_ffn(y))) * pre

    def written_out(x, attn, ffn, n, layer, cfg):
        if layer < 1:
            return n.before_ffn(x + attn(x))
        y = x + attn(n.before_attn(x))
        return y + ffn(n.before_ffn(y))

    got = predict(config(placement=with_placement(monkeypatch, mixed)), T)
    want = predict(config(placement=with_placement(monkeypatch, written_out)), T)
    for name in ("stream_variance", "stream_grad_norm", "skip_path", "token_correlation"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-9, err_msg=name)


def test_what_a_field_cannot_do_is_refused(monkeypatch):
    for block, says in (
        (lambda x, attn, ffn, n, layer, cfg: x * attn(x), "multiplies by numbers"),
        (lambda x, attn, ffn, n, layer, cfg: x + 1.0, "adds streams and branches"),
    ):
        with pytest.raises(TypeError, match=says):
            predict(config(placement=with_placement(monkeypatch, block)), T)


def test_sizes_come_from_the_table_layer_by_layer(monkeypatch):
    """An initialisation that differs by layer; and where embeddings enter, tied (times sqrt(width)) or not."""

    def growing(cfg, spec):
        size = plain(cfg, spec)
        return size * (1 + np.array(spec.layers)) if spec.site == "ffn_out" else size

    monkeypatch.setitem(INITS, "growing", growing)
    variance = np.array(predict(config(placement="peri", init="growing", ffn="relu"), T).ffn_variance)
    np.testing.assert_allclose(variance, 0.5 * np.array([1, 4, 9]), rtol=1e-4)  # E relu^2 = 1 / 2
    for tied, entry in ((False, 0.02**2), (True, 192 * 0.02**2)):
        cfg = config(placement="post", init="gpt2", tied_head=tied)
        assert predict(cfg, T).entry_variance == pytest.approx(entry)


@pytest.mark.parametrize("ffn", FFNS)
def test_plain_activations_are_three_predictions(ffn):
    """Per block (1 + b) / (1 + f): SwiGLU's gradients grow toward the input, others' hardly; and SpanNorm's tokens stay
    apart under SwiGLU alone, whose kernel is odd."""
    got = predict(config(placement="span", depth=24, ffn=ffn), 32)
    grows = {"swiglu": (20, 40), "gelu": (0.9, 1.5), "relu": (0.6, 1)}[ffn]
    correlation = {"swiglu": (0, 0.03), "gelu": (0.8, 1), "relu": (0.9, 1)}[ffn]
    assert grows[0] < got.stream_grad_norm[0] < grows[1]
    assert correlation[0] < got.token_correlation[-1] < correlation[1]


# ---- the command -----------------------------------------------------------------------------------------

CONFIG = "configs/dense.py:depth=3,width=32,placement=siamese,init=scale"


def test_one_line_of_json_or_a_table(capsys):
    argv = ["--config", CONFIG, "--tokens", "8"]
    assert theory.main([*argv, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    got = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (got["placement"], got["init"], got["depth"], got["tokens"]) == ("siamese", "scale-L1", 3, 8)
    assert all(len(got[name]) == 3 for name in ("stream_variance", "attn_variance", "effective_rank"))
    assert got["stream_grad_norm"][-1] == got["skip_path"][-1] == 1
    assert any("width 32 is small" in note for note in got["notes"])
    assert any("2 leaves" in note for note in got["notes"])
    assert theory.main([*argv, "--config.model.width=256"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if line[:5].strip().isdigit()] == ["1", "2", "3"]
    assert "skip path" in out and "is small" not in out


def test_images_enter_a_prediction(capsys):
    argv = ["--config", "configs/vision.py:tiny,depth=2,width=64", "--rows", "2", "--json"]
    assert theory.main(argv) == 0
    got = json.loads(capsys.readouterr().out)
    assert got["tokens"] == 4 and len(got["stream_grad_norm"]) == 2
    for argv, says in (
        (["--config=configs/vision.py:tiny", "--tokens=16"], "--tokens does nothing with task=image.*--rows"),
        (["--config=configs/dense.py:tiny", "--rows=16"], "--rows does nothing with task=text.*--tokens"),
        (["--config=configs/vision.py:tiny", "--rows=0"], "--rows '0' must be a number of rows, from 1"),
        (["--config=configs/vision.py:tiny", "--config.image.patch=0"], "image.patch"),
    ):
        with pytest.raises(UserError, match=says):
            theory.main(argv)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_too_large_to_predict_is_null_in_json_and_a_dash_in_a_table(capsys):
    """ReZero has no norm in the stream: with branches of variance 3e38 it leaves float64."""
    argv = ["--config", "configs/dense.py:depth=4,width=16,placement=rezero,init=scale", "--tokens=2"]
    argv += ["--config.model.variance_budget=3e38", "--config.model.variance_exponent=-4"]
    assert theory.main([*argv, "--json"]) == 0
    got = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert got["effective_rank"][-1] is got["stream_grad_norm"][0] is None
    assert theory.main(argv) == 0
    out = capsys.readouterr().out
    assert "nan" not in out and "inf" not in out and "            -" in out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--tokens", "1"], "--tokens '1' must be a number of tokens, from 2 to 256"),
        (["--tokens", "1e9"], "--tokens '1e9' must be"),
        (["--tokens", "257"], "--tokens '257' must be"),
        (["--config.model.depth=5000"], "config key model.depth=5000 is too deep to predict; write 1024 or less"),
        (["--config.model.plcement=pre"], "did you mean 'placement'"),
    ],
)
def test_a_mistake_is_one_line(argv, says, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["theory", "--config", CONFIG, *argv])
    with pytest.raises(SystemExit) as exit_:
        run_command(theory.main)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1 and says in error
