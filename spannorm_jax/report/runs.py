"""One run: what its folder holds, and what the run reached. A number that the folder does not hold is None or NaN."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from spannorm_jax.config import Config, flatten, former_defaults, is_runtime, unread
from spannorm_jax.model.initialisation import reading
from spannorm_jax.report import stats

NOT_RECORDED = "not recorded"
# How a finished run has ended, by its own curve: see `RunFolder.outcome`.
LEARNT = 0.05  # below the unigram entropy, as a fraction of it: what a run that trains has learnt at least
KEPT = 0.5  # of what it had learnt at its best: what it still has at its end
FINISHED = ("trained", "plateau", "collapsed")
FAILED = ("plateau", "collapsed", "diverged")
FINAL_FRACTION = 0.1  # of the steps taken, over which the train loss is averaged
SHORTEST_MEAN = 20  # logged steps, over which the least mean of a curve is taken at least
WARMUP_STEPS = 5  # left out of tokens/s: they hold compilation
_DEFAULTS = flatten(Config())
_BEFORE = {key: value for key, value in (_DEFAULTS | former_defaults()).items() if not is_runtime(key)}


@dataclass(frozen=True, eq=False)
class Metrics:
    """The columns of metrics.jsonl that reports use, by step, each step once; NaN where a line holds no number."""

    step: np.ndarray
    loss: np.ndarray
    grad_norm: np.ndarray
    tokens_per_s: np.ndarray
    held_out_loss: np.ndarray
    block_grad_norm: tuple[tuple[int, list[Any]], ...]  # (step, norms) of the lines that have them


def _option(key: str) -> property:
    return property(lambda run: run.options[key])


@dataclass(frozen=True)
class RunFolder:
    folder: Path
    config: dict[str, Any] = field(repr=False)  # nested, as in config.json
    starts: tuple[dict[str, Any], ...] = field(repr=False)  # one for each time the trainer started
    metrics: Metrics = field(repr=False)
    evals: tuple[dict[str, Any], ...] = field(repr=False)  # of held-out loss, in the order written
    done: dict[str, Any] | None = None
    diverged: dict[str, Any] | None = None
    damage: tuple[str, ...] = ()  # what could not be read
    cut: tuple[str, ...] = ()  # files that end in half a line, which a trainer at work or killed leaves
    judged: tuple[dict[str, Any], ...] = field(default=(), repr=False)  # evaluations by tasks, in the order written

    @cached_property
    def options(self) -> dict[str, Any]:
        """Dotted key -> value. Younger options have what was done before, unread ones their default."""
        recorded = dotted(self.config)
        return _BEFORE | recorded | {key: _DEFAULTS[key] for key in unread(recorded["model.init"])}

    @cached_property
    def of_another_version(self) -> tuple[list[str], list[str]]:
        """Options that the run's config lacks, and options in it that this version does not know."""
        recorded = dotted(self.config)
        return [k for k in _BEFORE if k not in recorded], [k for k in recorded if k not in _DEFAULTS]

    placement, seed = _option("model.placement"), _option("seed")
    depth, width, lr = _option("model.depth"), _option("model.width"), _option("optim.lr")
    steps = _option("training.steps")  # asked for

    @property
    def init(self) -> str:
        """`model.init`, with the reading of ScaleInit (`model.initialisation.reading`)."""
        options = self.options
        return reading(*(options[f"model.{key}"] for key in ("init", "variance_exponent", "depth_factor")))

    def fact(self, key: str) -> str:
        """What each start recorded under `key`, told again wherever it changed between starts."""
        told = [_words(start[key]) for start in self.starts if start.get(key)]
        return ", then ".join(dict.fromkeys(told)) or NOT_RECORDED

    @property
    def data(self) -> dict[str, Any]:
        """What the last start recorded about the data."""
        data = self.starts[-1].get("data") if self.starts else None
        return data if isinstance(data, dict) else {}

    @property
    def fingerprint(self) -> str:
        """Hash of the data; "" when it was not recorded."""
        return self.options["data.fingerprint"] or self.data.get("fingerprint") or ""

    @property
    def unigram_entropy(self) -> float | None:
        """Nats per token of the training split's token frequencies."""
        return finite(self.data.get("unigram_entropy"))

    @property
    def counted(self) -> str:
        """What its metrics count."""
        return "images" if self.options.get("task") == "image" else "tokens"

    @property
    def tokens_per_step(self) -> int | None:
        """Of images, those."""
        keys = ("training.batch_size", *["data.seq_len"] * (self.counted == "tokens"))
        sizes = [self.options.get(key) for key in keys]
        return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None  # type: ignore[arg-type]

    @property
    def flops_per_token(self) -> float | None:
        return finite(self.starts[-1].get(f"flops_per_{self.counted[:-1]}")) if self.starts else None

    @property
    def last_step(self) -> int:
        """The last step logged; 0 before the first."""
        return int(self.metrics.step[-1]) if len(self.metrics.step) else 0

    @cached_property
    def outcome(self) -> str:
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
        if self.diverged is not None or (self.last_step and not np.isfinite(self.metrics.loss[-1])):
            return "diverged"
        end, entropy = self._final_loss, self.unigram_entropy
        if self.done is None or end is None or entropy is None:
            return "unfinished" if self.done is None else "trained"
        losses = self.metrics.loss[np.isfinite(self.metrics.loss)]
        several = min(len(losses), max(SHORTEST_MEAN, round(FINAL_FRACTION * len(losses))))
        sums = np.concatenate([[0.0], np.cumsum(losses, dtype=np.float64)])
        best = min(end, float((sums[several:] - sums[:-several]).min()) / several)
        learnt, had_learnt = entropy - end, entropy - best
        if learnt >= LEARNT * entropy and learnt >= KEPT * had_learnt:
            return "trained"
        return "collapsed" if had_learnt >= LEARNT * entropy else "plateau"

    @property
    def end_step(self) -> int:
        """Where it diverged, or the last step logged."""
        step = (self.diverged or {}).get("step")
        return step if isinstance(step, int) else self.last_step

    @property
    def ended(self) -> str:
        """The outcome in words, with the step of a run that did not finish."""
        notes = {"diverged": f" (step {self.end_step})", "unfinished": f" (step {self.end_step} of {self.steps})"}
        return self.outcome + notes.get(self.outcome, "")

    @cached_property
    def _final_loss(self) -> float | None:
        losses = self.metrics.loss[self.metrics.step > (1 - FINAL_FRACTION) * self.last_step + 1e-6]
        return math.fsum(losses) / len(losses) if len(losses) and np.isfinite(losses).all() else None

    @cached_property
    def held_out(self) -> dict[str, Any] | None:
        """The evaluation that counts: newest of the highest step, on the config's held-out split.

        Of a run that is done it is one of its last step, on the tokens that its config asks for: another is
        no result. Other splits count only when that one was never evaluated, the training split never.
        """
        options, evals = self.options, list(self.evals)
        if self.done is not None:
            asked = {"asked_tokens": options.get("eval.tokens"), "fingerprint": self.fingerprint}
            asked["step"] = self.done.get("step", self.steps)
            # An evaluation from before a key came agrees with whatever is asked.
            evals = [e for e in evals if all(e.get(key, value) == value for key, value in asked.items())]
        lines = [e for e in evals if e.get("split") in (None, options.get("data.eval_split"))]
        lines = lines or [e for e in evals if e.get("split") != options.get("data.train_split")]
        return max(reversed(lines), key=lambda e: e["step"], default=None)  # the first of equals wins

    @property
    def tasks(self) -> list[dict[str, Any]]:
        """The scores of tasks, each from the newest evaluation of the highest step that has it."""
        found: dict[Any, dict[str, Any]] = {}
        for line in sorted(self.judged, key=lambda line: line["step"]):
            for score in line["tasks"] if isinstance(line["tasks"], list) else ():
                if isinstance(score, dict):
                    found[str(score.get("task")), str(score.get("metric"))] = score | {"step": line["step"]}
        return list(found.values())

    @property
    def floors(self) -> dict[str, float]:
        """What `data.floors` has on the predictions of that evaluation, by name; {} where not recorded."""
        floors = (self.held_out or {}).get("floors")
        return {k: v for k, v in floors.items() if finite(v) is not None} if isinstance(floors, dict) else {}

    @cached_property
    def reached(self) -> dict[str, Any]:
        """What the run reached, by the names that `study.RUNS` has."""
        metrics, options, evaluation = self.metrics, self.options, self.held_out or {}
        if not evaluation and 0 < self.last_step == self.steps:
            evaluation = {"loss": metrics.held_out_loss[-1]}  # which training itself measured
        diverged, bits = self.outcome == "diverged", finite(evaluation.get("bits_per_byte"))
        held_out, fourgram = None if diverged else finite(evaluation.get("loss")), self.floors.get("fourgram")
        losses, norms = (column[np.isfinite(column)] for column in (metrics.loss, metrics.grad_norm))
        speeds = metrics.tokens_per_s[(metrics.step > WARMUP_STEPS) & np.isfinite(metrics.tokens_per_s)]
        clip, per_step, per_token = finite(options.get("optim.clip_norm")), self.tokens_per_step, self.flops_per_token
        tokens = None if per_step is None else self.last_step * per_step
        accuracy, linear = finite(evaluation.get("accuracy")), self.floors.get("linear_accuracy")
        over = None if fourgram is None or bits is None or not held_out else bits * (1 - fourgram / held_out)
        return {
            "tokens": tokens,
            "flops": None if tokens is None or per_token is None else tokens * per_token,
            "train_loss": None
            if diverged
            else self._final_loss,  # nats/token, mean over the last 10% of steps; None when diverged
            "held_out_loss": held_out,  # nats/token, of the evaluation that counts; None when diverged
            "bits_per_byte": bits,  # of the same
            "accuracy": None if diverged else accuracy,  # of its predictions
            "over_linear": None if diverged or accuracy is None or linear is None else accuracy - linear,
            "over_fourgram": over,  # of these, above what counts of four tokens reach: below zero is better
            "loss_at_init": finite(float(metrics.loss[0])) if self.last_step and metrics.step[0] == 1 else None,
            "tokens_per_s": statistics.median(speeds.tolist()) if len(speeds) else None,
            "spikes": stats.spikes(losses, max(1, options.get("metrics.log_every") or 1)),
            "clipped_share": float((norms > clip).mean()) if clip and len(norms) else None,
            "grad_norm_p999": float(np.quantile(norms, stats.GRAD_NORM_QUANTILE)) if len(norms) else None,
        }


def dotted(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def finite(value: Any) -> float | None:
    """The value, or None where there is no number: files hold null there, and those of older code NaN or Infinity."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None


def _words(value: Any) -> str:
    """`value` in words: a dictionary as `name value, name value`, a large number with commas."""
    if value is None:
        return NOT_RECORDED
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(value[name])}" for name in sorted(value))
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() else f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def ending(runs: Sequence[RunFolder]) -> str:
    """How the seeds of a setting ended, in words."""
    if len(runs) == 1:
        return runs[0].ended
    kinds = list(dict.fromkeys(run.outcome for run in runs))
    if len(kinds) == 1 and kinds[0] in FINISHED:
        return kinds[0]
    parts = []
    for kind in kinds:
        steps = sorted(run.end_step for run in runs if run.outcome == kind)
        at = f" (step{'s'[: len(steps) > 1]} {', '.join(map(str, steps))})"
        parts.append(f"{len(steps)} {kind}{at if kind in ('diverged', 'unfinished') else ''}")
    return ", ".join(parts)
