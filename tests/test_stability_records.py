"""What a probe measures, and what is said of ceilings by it."""

import dataclasses
import math
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from experiments import probes, stability_records
from experiments.probes import PROBE_LR
from experiments.stability_records import LAW, QUANTITIES, RATES, STEPS, Ceiling, Ceilings, crossing
from spannorm_jax.analysis import blocks
from spannorm_jax.config import replace
from spannorm_jax.config_file import load
from spannorm_jax.errors import UserError
from spannorm_jax.sweep.bisection import cells_of
from spannorm_jax.sweep.expansion import expand
from spannorm_jax.training.batches import batches_of
from spannorm_jax.training.flags import Flags
from spannorm_jax.training.session import open_session


def test_a_probe_moves_the_weights_as_the_runs_next_step_does(monkeypatch, own_caches):
    """At the rate of that step, the numbers are those of the run one step later."""
    steps, warmup = 2, 25
    rate = PROBE_LR * (steps + 1) / warmup
    monkeypatch.setattr(probes, "RATES", (rate,))
    small = [("training.steps", "250"), ("data.seq_len", "8"), ("optim.lr", "0.1"), ("seed", "7")]
    config = load("configs/dense.py:tiny,depth=1,width=16,placement=post", small)
    found = probes.probe(config, steps)

    session = open_session(replace(config, optim__lr=PROBE_LR, seed=0), Path("none"), Flags([]))
    rows = jax.tree.map(jnp.asarray, session.task.sample(session.data.eval, 8, probes.ROWS, ""))

    def said(params, model_state):
        model = session.model.bind(params, model_state)
        features = model.run(session.task.inputs(rows)).features
        logits = np.asarray(model.logits(features), np.float64).reshape(-1, session.config.model.vocab_size)
        loss = blocks.mean_nll(model, features, session.task.targets(rows))
        return float(loss), logits - logits.mean(axis=1, keepdims=True)

    each = []
    with jax.set_mesh(session.mesh), closing(batches_of(session, range(1, steps + 2))) as batches:
        state = session.program.init(0)
        for _ in range(steps + 1):
            each.append(said(state.params, state.model_state))
            state, _ = session.program.train(state, next(batches), session.numbers)
        each.append(said(state.params, state.model_state))
    (before, old), (after, new) = each[-2:]
    assert found["loss"] == pytest.approx([before, after], rel=1e-5)
    assert found["logits_change"] == pytest.approx([0, np.linalg.norm(new - old) / np.linalg.norm(old)], rel=1e-3)
    old, new = old - old.mean(axis=0), new - new.mean(axis=0)
    assert found["token_change"] == pytest.approx([0, np.linalg.norm(new - old) / np.linalg.norm(old)], rel=1e-3)
    assert found["token_step"] == found["token_change"]  # of one rate

    monkeypatch.setattr(probes, "WATCH", (0, steps))
    monkeypatch.setattr(probes, "SHARP", ())  # which has tests of its own
    first, last = probes.watch(config, PROBE_LR)
    assert first["step"] == 0 and first["loss"] == pytest.approx(each[0][0], rel=1e-5)
    assert last["step"] == steps
    for key in ("loss", "token_correlation", "attenuation"):
        assert last[key] == pytest.approx(found[key][0], rel=1e-5)
    for key in ("logits_change", "token_change"):
        assert last[key] == pytest.approx(found[key][1], rel=1e-3)


def test_a_level_is_crossed_between_two_rates():
    assert crossing([0.1, 0.3, 0.7], 0.5) == pytest.approx(math.sqrt(RATES[1] * RATES[2]))
    assert crossing([0.6, 0.7], 0.5) == RATES[0] and crossing([0.1, 0.2], 0.5) == math.inf
    assert crossing([0.1, 0.3, 0.2, 0.9], 0.25) < RATES[1]  # the least rate
    assert crossing([0.1, None, 0.7], 0.5) == RATES[1]  # not finite


def invented(ceilings, changes):
    """Ceilings (low, high) of cells named by letters, and probes of the law's number: `changes` times twice its level
    times the rate, so that a change of 100 crosses the level at 5e-3."""
    own = {name: Ceiling(name, {}, low, high, 1) for name, (low, high) in ceilings.items()}
    steps, key, level = QUANTITIES[LAW]
    probes = {(name, steps): {key: [0, *(2 * level * slope * r for r in RATES)]} for name, slope in changes.items()}
    probes |= {("probed alone", steps): probes["a", steps]}
    return own, probes


def test_a_prediction_is_fitted_on_one_sweep_and_tested_on_others():
    """Slopes 100 and 50 cross a half at 5e-3 and 1e-2, and the fitted cells' ceilings are twice that."""
    slopes = {"a": 100, "b": 50, "c": 100, "d": 50, "e": 25}
    ends = {"a": (0.008, 0.0125), "b": (0.016, 0.025), "c": (0.009, 0.011), "d": (0.002, 0.003), "e": (0.055, None)}
    own, probes = invented(ends | {"f": (0.01, 0.02)}, slopes)
    fitted = [own["a"], own["b"]]
    lab = Ceilings({"ceiling_factor": fitted, "ceiling_held": [own["d"]], "others": [own[n] for n in "acdef"]}, probes)
    assert lab.factor() == pytest.approx(2, rel=0.02)  # a straight line is not one by the logarithm
    assert [each.cell for each in lab.tested] == ["d", "c", "e"]  # f has no probe
    assert [each.cell for each in lab.fresh] == ["c", "e"]  # the law was chosen when d was known
    off = [each.off(lab.predicted(each)) for each in lab.tested]
    assert off[1] == 1 and off[0] == pytest.approx(0.02 / 0.003, rel=0.02) and off[2] == pytest.approx(0.727, rel=0.02)
    assert [each.cell for each in lab.close(lab.tested)] == ["c", "e"] and lab.close(fitted) == fitted
    middles, rates = [math.sqrt(0.002 * 0.003), math.sqrt(0.009 * 0.011), 0.055], [0.01, 0.005, 0.02]
    assert lab.order(lab.tested) == pytest.approx(scipy.stats.spearmanr(middles, rates).statistic)


def test_an_attenuation_is_counted_from_that_without_an_update():
    name = next(name for name, (steps, key, _) in QUANTITIES.items() if key == "attenuation" and steps == STEPS)
    record = {"attenuation": [4.0, *(4.0 + 1000 * rate for rate in RATES[:-1]), None]}
    rate = Ceilings({}, {("a", STEPS): record}).rate(Ceiling("a", {}, 0.01, 0.02, 1), name)
    assert rate == pytest.approx(0.005, rel=0.02)


def test_laws_of_growth_go_by_width_and_a_root_of_depth():
    """From SpanNorm's ceiling at 24 blocks of width 64; PreNorm has none there, nor a long warm-up."""
    same = {
        "placement": "span",
        "init": "scale-L1",
        "parametrisation": "standard",
        "warm-up": 0.1,
        "rows": 8,
        "held": "",
    }

    def cell(blocks, width, low=0.01, high=0.04, **other):
        return Ceiling("x", same | {"blocks": blocks, "width": width} | other, low, high, 1)

    lab = Ceilings({"ceiling_factor": [cell(24, 64), cell(24, 64, high=None, placement="pre")]}, {})
    assert lab.by_growth(cell(24, 64), 0.25) == pytest.approx(0.02)  # the middle
    assert lab.by_growth(cell(6, 128), 0.25) == pytest.approx(0.02 / 2 * 4**0.25)
    assert lab.by_growth(cell(6, 128), 0.5) == pytest.approx(0.02)
    for other in ({"placement": "pre"}, {"placement": "post"}, {"warm-up": 0.5}, {"init": "plain"}):
        assert lab.by_growth(cell(6, 64, **other), 0.25) is None
    other = dataclasses.replace(cell(24, 32, 0.02, 0.025), cell="another")  # 0.04 is told
    lab.by_sweep["ceiling_width"] = [*lab.by_sweep["ceiling_factor"], other]
    assert lab.off_growth("by growth", "ceiling_width") == [pytest.approx(0.04 / 0.025)]


def test_the_slope_of_a_ceiling_is_that_of_its_logarithm():
    """2 / L over three depths; another placement's ceiling has no part in it."""
    cells = [Ceiling("x", {"placement": "post", "blocks": n}, 1 / n, 4 / n, 1) for n in (6, 12, 96)]
    lab = Ceilings({"ceiling_depth": [*cells, Ceiling("x", {"placement": "pre", "blocks": 6}, 1, 1, 1)]}, {})
    assert lab.slope("ceiling_depth", "post", "blocks") == pytest.approx(-1)


def test_a_ceiling_that_a_template_asks_for_is_settled_and_one():
    lab = Ceilings({"ceiling_held": [Ceiling("x", {"placement": "span", "init": "plain"}, 0.01, 0.02, 1)] * 2}, {})
    for init, sweep, settled in (("plain", "ceiling_held", 2), ("other", "ceiling_held", 0), ("plain", "absent", 0)):
        with pytest.raises(UserError, match=f"in {sweep}, of which {settled} are settled"):
            lab.cell("span", init, sweep)


def test_ceilings_are_read_from_the_outcomes_of_runs():
    """Of a sweep with every outcome up to 8e-3 trained; an unsettled cell is left out."""
    sweep = expand("ceiling_factor", "cpu")
    first, second = cells_of(sweep)[:2]

    @dataclasses.dataclass
    class Ended:
        folder: Path
        outcome: str

    def ended(run):
        return Ended(Path("x") / run.name, "trained" if run.config.optim.lr < 8e-3 else "collapsed")

    class Of:
        rows = [ended(run) for rung in first.rungs for run in rung] + [ended(second.rungs[0][0])]

    (found,) = stability_records.ceilings_of("ceiling_factor", Of)
    assert found.low < 8e-3 < found.high <= 1.21 * found.low and found.values["init"] == "scale-L1"
    assert found.cell == first.rungs[0][0].name and found.runs == len(Of.rows) - 1
