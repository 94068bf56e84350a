"""Runs -> rows: what each run reached, and in what runs differ. Numbers that a folder does not hold are None."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spannorm_jax.config import NAMES_OF_DATA, is_runtime
from spannorm_jax.report.folders import RunFolder, finite
from spannorm_jax.report.stats import GRAD_NORM_QUANTILE, spikes

# What a report compares; a difference in any other config key is said aloud.
COMPARED_KEYS = ("model.placement", "model.init", "model.variance_exponent", "model.depth_factor", "seed")
# What a figure has an axis for: a sweep goes over them, with every method alike.
AXES = ("model.depth", "model.width", "optim.lr")
_NOT_RECORDED = "not recorded"
# How a finished run has ended, by its own curve: see `outcome`.
LEARNT = 0.05  # below the unigram entropy, as a fraction of it: what a run that trains has learnt at least
KEPT = 0.5  # of what it had learnt at its best: what it still has at its end
FINISHED = ("trained", "plateau", "collapsed")
FINAL_FRACTION = 0.1  # of the steps taken, over which the train loss is averaged
SHORTEST_MEAN = 20  # logged steps, over which the least mean of a curve is taken at least
WARMUP_STEPS = 5  # left out of tokens/s: they hold compilation


# ---- one run ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    kind: str  # trained | plateau | collapsed | diverged | unfinished
    step: int  # where it diverged, or the last step logged
    steps: int  # asked for

    def __str__(self) -> str:
        notes = {"diverged": f" (step {self.step})", "unfinished": f" (step {self.step} of {self.steps})"}
        return self.kind + notes.get(self.kind, "")


@dataclass(frozen=True)
class Row:
    """What one run reached; None stands for a number that its folder does not hold."""

    placement: str
    init: str
    depth: int
    width: int
    lr: float
    seed: int
    outcome: Outcome
    train_loss: float | None  # nats/token, mean over the last 10% of steps; None when diverged
    held_out_loss: float | None  # nats/token, of the evaluation that counts; None when diverged
    bits_per_byte: float | None  # of the same
    floors: dict[str, float]  # nats/token on the same predictions, by name (`data.floors`); {} where not recorded
    loss_at_init: float | None  # nats/token, that of step 1: the weights before their first update
    tokens_per_s: float | None  # median over the steps after the first 5
    spikes: int | None
    clipped_share: float | None  # of the logged steps, those whose gradient was scaled down
    grad_norm_p999: float | None  # 99.9th percentile over the logged steps
    run: RunFolder = field(repr=False)

    @property
    def over_fourgram(self) -> float | None:
        """Bits per byte above what counts of four tokens reach on the same predictions: below zero is better."""
        floor = self.floors.get("fourgram")
        if floor is None or self.bits_per_byte is None or not self.held_out_loss:
            return None
        return self.bits_per_byte * (1 - floor / self.held_out_loss)


def train_loss(run: RunFolder) -> float | None:
    """Mean loss over the last 10% of the steps taken, at least the last one."""
    losses = run.metrics.loss[run.metrics.step > (1 - FINAL_FRACTION) * run.last_step + 1e-6]
    return math.fsum(losses) / len(losses) if len(losses) and np.isfinite(losses).all() else None


def held_out(run: RunFolder) -> dict[str, Any] | None:
    """The evaluation that counts: newest of the highest step, on the config's held-out split.

    Of a run that is done it is one of its last step, on the tokens that its config asks for: another is
    no result. Other splits count only when that one was never evaluated, the training split never.
    """
    options, evals = run.options, list(run.evals)
    if run.done is not None:
        asked = {"asked_tokens": options.get("eval.tokens"), "fingerprint": run.fingerprint}
        asked["step"] = run.done.get("step", run.steps)
        # An evaluation from before a key came agrees with whatever is asked.
        evals = [e for e in evals if all(e.get(key, value) == value for key, value in asked.items())]
    lines = [e for e in evals if e.get("split") in (None, options.get("data.eval_split"))]
    lines = lines or [e for e in evals if e.get("split") != options.get("data.train_split")]
    return max(reversed(lines), key=lambda e: e["step"], default=None)  # the first of equals wins


def outcome(run: RunFolder) -> Outcome:
    """How the run ended.

    diverged    a loss or gradient became non-finite.
    unfinished  neither diverged nor done: still running, or stopped.
    Done, with `learnt` the unigram entropy of the training data less a mean of the train loss:
    trained     at the end it has learnt 5% of the entropy (`LEARNT`), and half of what it had
                learnt at its best (`KEPT`); or the entropy was not recorded.
    collapsed   else, if at its best it had learnt 5%: it has lost it.
    plateau     else: it never learnt more than token frequencies.

    The end is the last 10% of the steps, and the best the least mean of as many logged steps in a
    row, of 20 at least: fewer would call the noise of the batches a best.
    """
    last = run.last_step
    if run.diverged is not None or (last and not np.isfinite(run.metrics.loss[-1])):
        step = (run.diverged or {}).get("step")
        return Outcome("diverged", step if isinstance(step, int) else last, run.steps)
    return Outcome("unfinished" if run.done is None else _how_it_trained(run), last, run.steps)


def _how_it_trained(run: RunFolder) -> str:
    end, entropy = train_loss(run), run.unigram_entropy
    if end is None or entropy is None:
        return "trained"
    losses = run.metrics.loss[np.isfinite(run.metrics.loss)]
    several = min(len(losses), max(SHORTEST_MEAN, round(FINAL_FRACTION * len(losses))))
    sums = np.concatenate([[0.0], np.cumsum(losses, dtype=np.float64)])
    best = min(end, float((sums[several:] - sums[:-several]).min()) / several)
    learnt, had_learnt = entropy - end, entropy - best
    if learnt >= LEARNT * entropy and learnt >= KEPT * had_learnt:
        return "trained"
    return "collapsed" if had_learnt >= LEARNT * entropy else "plateau"


def summarise(run: RunFolder) -> Row:
    """The run's numbers, as `Row` defines them."""
    ended, metrics, options = outcome(run), run.metrics, run.options
    speeds = metrics.tokens_per_s[(metrics.step > WARMUP_STEPS) & np.isfinite(metrics.tokens_per_s)]
    norms = metrics.grad_norm[np.isfinite(metrics.grad_norm)]
    clip, losses = finite(options.get("optim.clip_norm")), metrics.loss[np.isfinite(metrics.loss)]
    evaluation, diverged = held_out(run) or {}, ended.kind == "diverged"
    if not evaluation and 0 < run.last_step == run.steps:
        evaluation = {"loss": metrics.held_out_loss[-1]}  # which training itself measured
    floors = evaluation["floors"] if isinstance(evaluation.get("floors"), dict) else {}
    return Row(
        placement=run.placement,
        init=run.init,
        depth=options["model.depth"],
        width=options["model.width"],
        lr=options["optim.lr"],
        seed=run.seed,
        outcome=ended,
        train_loss=None if diverged else train_loss(run),
        held_out_loss=None if diverged else finite(evaluation.get("loss")),
        bits_per_byte=finite(evaluation.get("bits_per_byte")),
        floors={name: value for name, value in floors.items() if finite(value) is not None},
        loss_at_init=finite(float(metrics.loss[0])) if run.last_step and metrics.step[0] == 1 else None,
        tokens_per_s=statistics.median(speeds.tolist()) if len(speeds) else None,
        spikes=spikes(losses, max(1, options.get("metrics.log_every") or 1)),
        clipped_share=float((norms > clip).mean()) if clip and len(norms) else None,
        grad_norm_p999=float(np.quantile(norms, GRAD_NORM_QUANTILE)) if len(norms) else None,
        run=run,
    )


def fact(run: RunFolder, key: str) -> str:
    """What each start recorded under `key`, told again wherever it changed between starts."""
    told = [_words(start[key]) for start in run.starts if start.get(key)]
    return ", then ".join(dict.fromkeys(told)) or _NOT_RECORDED


def _words(value: Any) -> str:
    """`value` in words: a dictionary as `name value, name value`, a large number with commas."""
    if value is None:
        return _NOT_RECORDED
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(value[name])}" for name in sorted(value))
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() else f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


# ---- several runs -----------------------------------------------------------------------------


def ending(outcomes: Sequence[Outcome]) -> str:
    """How the seeds of a setting ended, in words."""
    if len(outcomes) == 1:
        return str(outcomes[0])
    kinds = list(dict.fromkeys(outcome.kind for outcome in outcomes))
    if len(kinds) == 1 and kinds[0] in FINISHED:
        return kinds[0]
    parts = []
    for kind in kinds:
        steps = sorted(outcome.step for outcome in outcomes if outcome.kind == kind)
        at = f" (step{'s'[: len(steps) > 1]} {', '.join(map(str, steps))})"
        parts.append(f"{len(steps)} {kind}{at if kind in ('diverged', 'unfinished') else ''}")
    return ", ".join(parts)


def differing_keys(runs: Sequence[RunFolder]) -> dict[str, list[str]]:
    """Config keys that differ, but for those compared -> each run's value as JSON.

    What names the data is left out where they are the same, and an option that a run of another
    version does not have is no difference.
    """
    all_options = [run.options | {"data.fingerprint": run.fingerprint} for run in runs]
    same_data = len({run.fingerprint for run in runs}) == 1 and runs[0].fingerprint
    left_out = COMPARED_KEYS + (NAMES_OF_DATA if same_data else ())
    keys = list(dict.fromkeys(key for options in all_options for key in options))
    found = {}
    for key in keys:
        texts = [json.dumps(o[key]) if key in o else _NOT_RECORDED for o in all_options]
        if key not in left_out and len(set(texts) - {_NOT_RECORDED}) > 1:
            found[key] = texts
    return found


def in_words(key: str, value: str, short: bool = False) -> str:
    """`model.ffn=relu`, or `ffn=relu` in short; of the number of experts `dense` or `8 experts`."""
    if key == "model.moe.num_experts":
        return "dense" if value == "0" else f"{value} experts"
    return f"{key.rsplit('.', 1)[-1] if short else key}={value}"


def followers(differing: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Keys that say nothing more than others -> these: their value is the same wherever those are.

    They are depth, width and learning rate, which `model.ffn_dim` follows, or these and one key that comes earlier in
    the config: `model.moe.expert_dim` follows the number of experts.
    """
    others = [key for key in differing if key not in AXES and key != "data.fingerprint" and not is_runtime(key)]
    axes = [axis for axis in AXES if axis in differing]
    found: dict[str, str] = {}
    for i, key in enumerate(others):
        for leader in [[], *([earlier] for earlier in others[:i] if earlier not in found)]:
            at = list(zip(*(differing[k] for k in leader + axes), strict=True))
            if at and len(set(zip(at, differing[key], strict=True))) == len(set(at)):
                found[key] = " and ".join([*leader, *["depth, width and learning rate"] * bool(axes)])
                break
    return found


def variants(runs: Sequence[RunFolder]) -> list[tuple[tuple[str, str], ...]]:
    """Of each run the keys and values that set it apart: neither of runtime, nor following from others."""
    differing = differing_keys(runs)
    following = followers(differing)
    kept = {key: texts for key, texts in differing.items() if not is_runtime(key) and key not in following}
    return [tuple((key, texts[i].strip('"')) for key, texts in kept.items()) for i in range(len(runs))]
