"""Parametrisations against a table that was written by hand, and against the standard model with rescaled weights."""

import dataclasses

import jax
import numpy as np
import pytest
from small_model import batch, configure, program_of, start

from spannorm_jax.config import Config, ModelConfig, replace
from spannorm_jax.errors import UserError
from spannorm_jax.model.definition import define
from spannorm_jax.model.initialisation import INITS, initial_size, predicted_additions
from spannorm_jax.model.parametrisation import PARAMETRISATIONS, forward, multipliers
from spannorm_jax.model.placement import PLACEMENTS
from spannorm_jax.training.numbers import numbers_of
from spannorm_jax.validation import notices, validate

BASE = {"base_width": 8, "base_depth": 1}


def model_config(**changes):
    """Twice as deep as the base and four times as wide: m = 4, l = 2."""
    made = {"depth": 2, "width": 32, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 48, "vocab_size": 16}
    return ModelConfig(**made | BASE | {"dtype": "float32", "init": "plain", "placement": "pre"} | changes)


# Worked out by hand from the papers' tables for m = 4 and l = 2. Std at the start, plain: 1 / sqrt(fan_in) at the base,
# where a matrix of the width has fan-in 8 and ffn_out 12. Under muP the head's is the base's too.
S = 2**-0.5
STDS = {"embed": 1.0, "q": 32**-0.5, "attn_out": 32**-0.5, "ffn_out": 48**-0.5, "before_ffn": 1.0, "final": 1.0}
KINDS = {"embed": 0, "q": 1, "attn_out": 1, "ffn_out": 1, "before_ffn": 2, "final": 3, "head": 4}
RATES = {  # learning rate, decay, eps: of the embedding, matrices of a block, its gains, gains at the end, the head
    ("standard", 1.0): ((1, 1, 1),) * 5,
    ("mup", 1.0): ((1, 1, 1 / 4), (1 / 4, 4, 1 / 4), (1, 1, 1 / 4), (1, 1, 1 / 4), (1, 1, 1 / 4)),
    ("everett", 1.0): ((1, 1, 1 / 2), (1 / 4, 4, 1 / 2), (1, 1, 1 / 2), (1, 1, 1 / 2), (1 / 4, 4, 1)),
    ("completep", 1.0): ((1, 1, 1 / 4), (1 / 4, 4, 1 / 8), (1, 1, 1 / 8), (1, 1, 1 / 4), (1, 1, 1 / 4)),
    ("completep", 0.5): ((1, 1, 1 / 4), (S / 4, 4, S / 4), (S, 1, S / 4), (1, 1, 1 / 4), (1, 1, 1 / 4)),
}
FORWARD = {  # embedding (of a tied one), branch, attention, logits
    ("standard", 1.0): (1, 1, 1, 1),
    ("mup", 1.0): (1 / 2, 1, 1, 1 / 4),
    ("everett", 1.0): (1, 1, 1, 1),
    ("completep", 1.0): (1 / 2, 1 / 2, 1, 1 / 4),
    ("completep", 0.5): (1 / 2, 2**-0.5, 1, 1 / 4),
}


@pytest.mark.parametrize(("name", "exponent"), RATES)
def test_the_table_is_that_of_the_papers(name, exponent):
    cfg = model_config(parametrisation=name, depth_exponent=exponent)
    specs = {spec.site: spec for spec in define(cfg).specs()}
    stds = STDS | {"head": (8 if name in ("mup", "completep") else 32) ** -0.5}
    for site, kind in KINDS.items():
        of = multipliers(cfg, specs[site])
        want = (stds[site], *RATES[name, exponent][kind])
        assert (initial_size(cfg, specs[site]), of.lr, of.decay, of.eps) == pytest.approx(want, rel=1e-12)
    assert dataclasses.astuple(forward(cfg)) == pytest.approx(FORWARD[name, exponent], rel=1e-12)


def test_experts_and_router_go_as_hidden_matrices():
    cfg = model_config(parametrisation="mup", moe=dataclasses.replace(ModelConfig().moe, num_experts=4, expert_dim=48))
    rates = {spec.site: multipliers(cfg, spec).lr for spec in define(cfg).specs()}
    assert rates["router"] == rates["expert_in"] == rates["expert_out"] == rates["v"] == 1 / 4


def test_attention_logits_go_by_the_base_heads_size():
    """Heads of 8 where the base had 2: q.k / 8, met at q.k / sqrt(2) / ... the base's own rule for heads of 2."""
    cfg = model_config(parametrisation="mup", base_head_dim=2)
    assert forward(cfg).attention * 8**-0.5 == pytest.approx(2**0.5 / 8)
    assert forward(model_config(parametrisation="everett", base_head_dim=2)).attention == 1


@pytest.mark.parametrize("name", PARAMETRISATIONS)
@pytest.mark.parametrize("changes", [{}, {"tied_head": True, "placement": "peri", "init": "gpt2"}])
def test_at_the_base_size_it_is_the_standard_one_to_the_letter(name, changes):
    """The same sizes of all weights, and the same text of the train step, whatever it is run on."""
    changes = {f"model__{key}": value for key, value in changes.items()}
    usual = configure(**changes)
    size = {"model__base_width": usual.model.width, "model__base_depth": usual.model.depth}
    config = configure(**changes | size, model__parametrisation=name, model__depth_exponent=0.7)

    def seen(config):
        program, model = program_of(config), define(config.model)
        sizes = [initial_size(config.model, spec) for spec in model.specs()]
        return sizes, program.train.lower(program.abstract_state, batch(), numbers_of(config)).as_text()

    assert seen(config) == seen(usual)


def site_of(path):
    return path[-2] if path[-1] == "gain" else path[-1]


@pytest.mark.parametrize(
    ("placement", "changes"),
    [
        ("pre", {"base_head_dim": 2}),
        ("span", {}),
        ("peri", {}),
        ("siamese", {"tied_head": True}),
        ("span", {"moe": dataclasses.replace(ModelConfig().moe, num_experts=2, expert_dim=16, num_shared=1, every=2)}),
    ],
)
def test_multipliers_of_the_forward_pass_could_stand_in_the_weights(placement, changes):
    """A model under completep gives the logits of a standard one, whose weights have the multipliers in them.

    What sets a branch's size (an output projection, or the gain of the norm that it ends in) is times l^-a, q times
    sqrt(K0 / K), the head over m; a tied embedding becomes a lookup times sqrt(base_width) and a head over m.
    Float32, logits of size 1: largest difference seen 6e-7.
    """
    cfg = model_config(parametrisation="completep", depth_exponent=0.5, placement=placement, **changes)
    usual = dataclasses.replace(cfg, parametrisation="standard", tied_head=False)
    rng, model = np.random.default_rng(0), define(cfg)
    params = model.map_weights(lambda spec: rng.normal(spec.start or 0, 0.3, spec.shape).astype(np.float32))
    branch = 2**-0.5
    sized = set(PLACEMENTS[placement].additions.values())
    names = {"attn_out": {"attn/out"}, "ffn_out": {"ffn/out", "ffn/shared/out"}}
    sized_paths = set().union(*(names.get(site, {f"norms/{site}/gain"}) for site in sized))

    def moved(path, x):
        name = "/".join(key.key for key in path[1:])
        if name in sized_paths:
            return x * branch
        if name == "attn/q":
            return x * (cfg.base_head_dim / 8) ** 0.5 if cfg.base_head_dim else x
        return x

    other = jax.tree_util.tree_map_with_path(moved, params)
    if cfg.tied_head:
        other |= {"embed": params["embed"] * 8**0.5, "head": params["embed"].T / 4}
    else:
        other |= {"head": params["head"] / 4}
    tokens = np.arange(10).reshape(2, 5) % 16
    got, want = model.bind(params)(tokens), define(usual).bind(other)(tokens)
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-6 * max(1, np.abs(want).max()))
    assert not np.allclose(
        got, define(dataclasses.replace(cfg, parametrisation="standard")).bind(params)(tokens), atol=1e-2
    )


@pytest.mark.parametrize(("init", "power"), [("gpt2", 0.5), ("scale", 1.0)])
def test_depth_is_counted_once(init, power):
    """Under completep an initialisation's factor of depth is the base's, and the multiplier does the rest; under mup,
    which says nothing of depth, it is the model's own."""
    deep = model_config(init=init, parametrisation="completep", depth=32)
    shallow = dataclasses.replace(deep, depth=1)
    sizes = [{s.site: initial_size(cfg, s) for s in define(cfg).specs()} for cfg in (deep, shallow)]
    assert sizes[0] == sizes[1]
    added = [predicted_additions(cfg, define(cfg).specs())["ffn"] for cfg in (deep, shallow)]
    np.testing.assert_allclose(added[0], np.tile(added[1] / 32**2, 32), rtol=1e-12)
    mup = [dataclasses.replace(cfg, parametrisation="mup") for cfg in (deep, shallow)]
    out = [initial_size(cfg, {s.site: s for s in define(cfg).specs()}["ffn_out"]) for cfg in mup]
    assert out[0] == pytest.approx(out[1] / 32**power)


@pytest.mark.parametrize("name", PARAMETRISATIONS)
@pytest.mark.parametrize("width", [32, 128])
def test_a_tied_embedding_enters_at_unit_variance_at_any_width(name, width):
    cfg = model_config(parametrisation=name, width=width, tied_head=True)
    [spec] = [spec for spec in define(cfg).specs() if spec.site == "embed"]
    assert initial_size(cfg, spec) * width**0.5 * forward(cfg).embedding == pytest.approx(1)


# ---- what a width is for ------------------------------------------------------------------------------


def change_of_features(width, name, tied):
    """Root mean square of what one update of AdamW changes of what the head reads; mean over three seeds."""
    sizes = {"model__width": width, "model__num_heads": width // 8, "model__depth": 1, "model__placement": "pre"}
    base = {"model__base_width": 16, "model__base_depth": 1, "model__parametrisation": name, "model__tied_head": tied}
    rates = {"optim__warmup_fraction": 0.0, "optim__lr": 3e-3, "optim__clip_norm": 0.0}
    config = configure(**sizes, **base, **rates)
    program, model = program_of(config), define(config.model, config.execution)
    features = jax.jit(lambda params, tokens: model.bind(params).run(tokens).features)
    found = []
    for seed in range(3):
        state = start(program, program.init(seed).params)
        before = features(state.params, batch(9)["tokens"][:, :-1])
        state, _ = program.train(state, batch(seed), numbers_of(config))
        found.append(float(np.sqrt(np.mean(np.square(features(state.params, batch(9)["tokens"][:, :-1]) - before)))))
    return np.mean(found)


@pytest.mark.parametrize("tied", [False, True])
def test_an_update_changes_as_much_at_another_width(tied):
    """muP's defining property: eight times as wide, an update changes what the head reads by as much.

    Measured, over the change at width 16: 0.75 of it (tied 0.85), and in the standard parametrisation 5.2 (5.6).
    """
    ratio = {
        name: change_of_features(128, name, tied) / change_of_features(16, name, tied) for name in ("mup", "standard")
    }
    assert 0.6 < ratio["mup"] < 1.2, ratio
    assert ratio["standard"] > 3, ratio


# ---- refusals and notices -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model__parametrisation": "mup"}, "model.base_width=64"),
        ({"model__parametrisation": "everett"}, "model.base_width=64"),
        ({"model__parametrisation": "completep", "model__base_width": 32}, "model.base_depth=24"),
        ({"optim__decay_coupling": "independent", "optim__lr": 0.0}, "optim.lr=0.0"),
    ],
)
def test_what_cannot_be_is_one_line(changes, says):
    with pytest.raises(UserError) as refused:
        validate(replace(Config(), **changes))
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_mup_with_experts_is_said():
    config = replace(Config(), model__parametrisation="mup", model__base_width=32)
    assert not notices(config)
    [said] = notices(replace(config, model__moe__num_experts=4))
    assert "2605.14200" in said


@pytest.mark.parametrize("name", ["mup", "everett", "completep"])
@pytest.mark.parametrize("init", INITS)
def test_an_initialisation_is_that_of_the_base_model_times_the_multiplier(init, name):
    """The base model is defined in full: its fans and its depth are its own declarations'."""
    cfg = model_config(init=init, parametrisation=name, num_kv_heads=4)
    sizes = {"width": 8, "num_heads": 1, "num_kv_heads": 1, "ffn_dim": 12}
    base = dataclasses.replace(cfg, **sizes, depth=1 if name == "completep" else cfg.depth, parametrisation="standard")
    of_base = {spec.site: initial_size(base, spec) for spec in define(base).specs()}
    for spec in define(cfg).specs():
        # The base's one block of `completep` stands for both.
        of_blocks = np.broadcast_to(of_base[spec.site], np.shape(initial_size(cfg, spec)))
        assert initial_size(cfg, spec) == pytest.approx(of_blocks * multipliers(cfg, spec).init, rel=1e-12)


@pytest.mark.parametrize(
    ("depth", "places"), [(3, (1, 2, 3)), (6, (1, 1, 2, 2, 3, 3)), (4, (1, 2, 3, 3)), (2, (2, 3)), (1, (3,))]
)
def test_under_completep_a_blocks_factor_is_that_of_the_bases_block_in_its_place(depth, places):
    """Never above the first block's: in deeper models too every matrix starts at Xavier's std or below."""
    cfg = model_config(init="ds", parametrisation="completep", depth=depth, base_depth=3)
    q = next(spec for spec in define(cfg).specs() if spec.site == "q")
    of_xavier = initial_size(dataclasses.replace(cfg, init="xavier"), q)
    assert initial_size(cfg, q) == pytest.approx([of_xavier / l**0.5 for l in places])
    if depth == 3:
        standard = dataclasses.replace(cfg, parametrisation="standard")
        wide = dataclasses.replace(cfg, base_width=cfg.width)
        np.testing.assert_array_equal(initial_size(wide, q), initial_size(standard, q))


def test_a_warm_up_that_outlasts_the_run_is_said():
    config = configure(model__branch_warmup_steps=10.0)  # two blocks, 20 updates
    assert not notices(config)
    [said] = notices(replace(config, model__branch_warmup_steps=10.5))
    assert said.endswith("has come in at update 21, and the run has 20; 10 or less lets all come in")


def test_an_option_that_the_initialisation_does_not_read_is_said():
    config = replace(Config(), model__variance_exponent=0.5, model__init_targets=("ffn_out",))
    assert not notices(config)  # ScaleInit reads both
    said = notices(replace(config, model__init="plain"))
    assert [line.split("=")[0] for line in said] == ["model.init_targets", "model.variance_exponent"]
    assert "0.5 does nothing with model.init=plain" in said[1]
