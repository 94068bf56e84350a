"""A second task, rows of patches with a class each: its value and its model's ends are all that training needs.

Its trunk is the decoder's, without a mask and without positions.
"""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_lanes import TINY

from spannorm_jax.config import replace
from spannorm_jax.inference.evaluation import evaluate
from spannorm_jax.model.definition import define, flops_per_token
from spannorm_jax.model.stack import ACTIVATION
from spannorm_jax.model.trunk import Trunk
from spannorm_jax.model.weights import weight
from spannorm_jax.parallel.mesh import constrain
from spannorm_jax.parallel.rank import ProcessFlags
from spannorm_jax.report.folders import read_run
from spannorm_jax.resolution import resolve
from spannorm_jax.run.folder import read_config
from spannorm_jax.training import loop, tasks
from spannorm_jax.training.flags import Flags
from spannorm_jax.training.lanes import train_lanes
from spannorm_jax.training.task import Field, Task

PATCHES, PATCH, CLASSES, HELD_OUT = 6, 8, 4, 40
MEANS = np.random.default_rng(7).standard_normal((CLASSES, PATCHES, PATCH)).astype(np.float32)


class Encoder(Trunk):
    """Patches -> what the mean over patches says of the class."""

    def __init__(self, cfg, execution):
        super().__init__(cfg, execution, causal=False)
        D, C = cfg.width, cfg.vocab_size
        self.patch = weight((PATCH, D), ("parts", "embed"), "embedding", "embed", fan_in=PATCH, fan_out=D)
        self.head = weight((D, C), ("embed", "vocab"), "output", "head", fan_in=D, fan_out=C)

    def run(self, x_BxPxF, step=None):
        x = jnp.asarray(x_BxPxF @ self.patch[...], self.cfg.dtype)
        return self.run_from(self.enter(constrain(x, ACTIVATION)), None, step)


def drawn(seed, step, start, stop):
    """Rows of a step, each by its own number, as a task's must be whoever reads them."""
    rngs = [np.random.default_rng((seed, step, row)) for row in range(start, stop)]
    classes = np.array([rng.integers(CLASSES) for rng in rngs], np.int32)
    noise = np.stack([rng.standard_normal((PATCHES, PATCH), np.float32) for rng in rngs])
    return {"x": MEANS[classes] + noise, "y": classes}


def loss_sums(model, batch, z_loss=0.0):
    passed = model.run(batch["x"])
    logits = jnp.mean(passed.features, axis=1) @ model.head[...]
    log_z = jax.nn.logsumexp(logits, axis=-1)
    w = batch.get("weights", jnp.ones(log_z.shape))
    sums = {
        "nll": log_z - jnp.take_along_axis(logits, batch["y"][:, None], axis=-1)[:, 0],
        "log_z": log_z,
        "z": log_z**2,
        "correct": jnp.argmax(logits, axis=-1) == batch["y"],
        "count": jnp.ones(log_z.shape),
    }
    sums = {name: jnp.sum(value * w) for name, value in sums.items()}
    router = {"router": passed.stats} if passed.stats else {}
    return {"objective": sums["nll"] + z_loss * sums["z"]} | sums | router


def fields(B, **more):
    return {
        "x": Field((B, PATCHES, PATCH), "float32", ("batch", "time", "parts")),
        "y": Field((B,), "int32", ("batch",)),
    } | more


def held_out(config, data):
    rows, B = drawn(10**6, 0, 0, HELD_OUT), config.eval.batch_size
    for first in range(0, HELD_OUT, B):
        here = {name: x[first : first + B] for name, x in rows.items()}
        short = B - len(here["y"])
        padded = {name: np.pad(x, [(0, short), *[(0, 0)] * (x.ndim - 1)]) for name, x in here.items()}
        yield padded | {"weights": np.float32(np.arange(B) < B - short)}, {}


PATCHED = Task(
    open=lambda config: (
        None,
        resolve(config, vocab_size=CLASSES, platform=jax.default_backend(), fingerprint="patches", full_name="patches"),
    ),
    check=lambda config, data: None,
    define=lambda config: define(config.model, config.execution, Encoder),
    positions=lambda config: PATCHES,
    counted=lambda config: ("images", 1),
    train_fields=lambda config: fields(config.training.batch_size),
    eval_fields=lambda config: fields(
        config.eval.batch_size, weights=Field((config.eval.batch_size,), "float32", ("batch",))
    ),
    rows=lambda config, data: lambda step, start, stop: drawn(config.seed, step, start, stop),
    inputs=lambda batch: batch["x"],
    targets=lambda batch: batch["y"],
    sample=lambda data, length, rows, flag: drawn(0, 1, 0, rows),
    loss_sums=lambda config, mesh_shape, rows: loss_sums,
    held_out=held_out,
    measures=lambda totals: {
        "loss": totals["nll"] / totals["count"],
        "accuracy": totals["correct"] / totals["count"],
        "rows": int(totals["count"]),
    },
    logged=("loss", "accuracy"),
    facts=lambda data: {"dataset": "patches", "unigram_entropy": math.log(CLASSES)},
    files=lambda data: {},
    announced=lambda config, data: "patches",
    warn=lambda config, data: None,
    floors=lambda config, data, measures: {"chance": math.log(CLASSES)},
    summary=lambda result: f"{result['rows']} rows",
)
CONFIG = replace(  # learns in a moment
    TINY, training__steps=20, training__batch_size=16, optim__lr=2e-2, eval__every_steps=10, eval__batch_size=16
)


@pytest.fixture(autouse=True)
def patched(monkeypatch, tmp_path):
    monkeypatch.setitem(tasks.TASKS, "text", PATCHED)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("changes", [{}, {"model__moe__num_experts": 2, "training__num_microbatches": 2}])
def test_a_second_task_trains_is_measured_evaluated_and_goes_on(changes, tmp_path, capfd):
    config, run = replace(CONFIG, **changes), tmp_path / "run"
    assert loop.train(config, run, Flags([]), ProcessFlags()) == 0
    got = lines(run)
    assert got[-1]["held_out_accuracy"] > 0.5  # chance: 0.25
    assert "patches" in capfd.readouterr().out
    result = evaluate(read_config(run), run, None, ProcessFlags(), None)
    assert result["rows"] == HELD_OUT and result["floors"] == {"chance": math.log(CLASSES)}
    assert result["loss"] == pytest.approx(got[-1]["held_out_loss"], rel=1e-6)
    row = read_run(run)
    assert row.outcome == "trained" and row.reached["bits_per_byte"] is None
    assert got[-1]["images"] == 20 * 16 and len(got[-1]["attention_logit_max"]) == config.model.depth


def test_its_lanes_are_its_runs(tmp_path):
    seeds = [replace(CONFIG, seed=seed) for seed in (0, 1)]
    together = [(config, tmp_path / f"lane{config.seed}", Flags([])) for config in seeds]
    assert train_lanes(together) == [0, 0]
    for config in seeds:
        run = tmp_path / f"alone{config.seed}"
        assert loop.train(config, run, Flags([]), ProcessFlags()) == 0
        losses = ([line["loss"] for line in lines(folder)] for folder in (run, tmp_path / f"lane{config.seed}"))
        np.testing.assert_allclose(*losses, rtol=1e-4)  # rounding grows over 20 updates; 4e-5 was seen


def test_attention_without_a_mask_counts_twice():
    cfg = resolve(CONFIG, vocab_size=CLASSES, platform="cpu", fingerprint="").model
    model = define(cfg, None, Encoder)
    assert flops_per_token(model, PATCHES) - flops_per_token(model, 0) == 12 * cfg.depth * cfg.width * PATCHES
