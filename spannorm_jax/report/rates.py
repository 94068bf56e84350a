"""The learning rates of a study: where the least loss lies, how it moves, how much the rate matters."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from spannorm_jax.report import stats
from spannorm_jax.report.stats import Optimum
from spannorm_jax.report.study import Arm, Study

Losses = Mapping[Arm, Mapping[int, float]]
_RATES: dict[str, Any] = {
    **dict.fromkeys(("method", "depth", "width"), pl.Int64),
    **{"best": pl.Float64, "kind": pl.String, "at": pl.Float64, "low": pl.Float64, "high": pl.Float64, "n": pl.Int64},
    **dict.fromkeys(("sensitivity", "least", "most"), pl.Float64),
    "seeds": pl.Int64,
}


def _complete(capped: Losses, at: Arm, lrs: Sequence[float]) -> dict[int, list[float]]:
    """seed -> its capped losses at `lrs`, of the seeds that have all of them."""
    each = [capped.get((*at, lr), {}) for lr in lrs]
    seeds = set.intersection(*map(set, each)) if each else set()
    return {seed: [losses[seed] for losses in each] for seed in sorted(seeds)}


def _optima(study: Study, capped: Losses, at: Arm) -> dict[int, Optimum]:
    """seed -> its optimum, if it ran at all of three or more rates; {} if the method trains at none."""
    lrs = [lr for lr in study.lrs.get(at, ()) if lr > 0]
    by_seed = _complete(capped, at, lrs) if len(lrs) > 2 else {}
    outcomes = study.by_seed("outcome") if by_seed else {}
    trained = [all(outcomes[*at, lr][seed] == "trained" for seed in by_seed) for lr in lrs]
    return {seed: stats.optimum_of_seed(lrs, losses, trained) for seed, losses in by_seed.items() if any(trained)}


def rates(study: Study) -> pl.DataFrame:
    """Of each size and method its best learning rate, the optimum, and the sensitivity, null where there is none.

    `kind` to `n` are an `Optimum`. `sensitivity` to `seeds` are an `Interval` over seeds of Wortsman et al. (2023):
    the mean over learning rates of min(loss, loss at initialisation) less the least, over the rates that all methods
    of a size share, if they are three or more.
    """
    capped, starts = study.by_seed("capped"), study.by_seed("loss_at_init")
    lines = []
    for size in study.sizes:
        here = [i for i in range(len(study.methods)) if (i, *size) in study.lrs]
        shared = sorted(set.intersection(*(set(study.lrs[i, *size]) for i in here)))
        for i in here:
            optimum = stats.lr_optimum(list(_optima(study, capped, (i, *size)).values()))
            values = []
            for seed, losses in _complete(capped, (i, *size), shared).items() if len(shared) > 2 else ():
                start = [at[seed] for lr in shared if seed in (at := starts.get((i, *size, lr), {}))]
                if start:  # the first loss does not depend on the learning rate
                    own = np.minimum(losses, start[0])  # infinite where a run diverged and has no start
                    values.append(float(own.mean() - own.min()))
            sensitivity = stats.t_interval(values)
            numbers = [*vars(optimum).values()] if optimum else [None] * 5
            numbers += [*vars(sensitivity).values()] if sensitivity else [None] * 4
            lines.append((i, *size, study.best.get((i, *size)), *numbers))
    return pl.DataFrame(lines, schema=_RATES, orient="row")


def drifts(study: Study) -> list[dict[str, Any]]:
    """What a method's best learning rate is multiplied by where its depth or width doubles, over the `sizes` at which
    no seed's best rate is an end of the range: the other seeds alone would say too little.
    """
    capped, lines = study.by_seed("capped"), []
    for axis, other in (("width", "depth"), ("depth", "width")):
        for fixed in sorted({getattr(size, other) for size in study.sizes}) if study.varies(axis) else []:
            places = [size for size in study.sizes if getattr(size, other) == fixed]
            for i, method in enumerate(study.methods):
                each = {getattr(size, axis): _optima(study, capped, (i, *size)) for size in places}
                used = {size: of for size, of in each.items() if of and all(o.kind != "end" for o in of.values())}
                by_seed = [[of.get(seed) for of in used.values()] for seed in sorted(set().union(*used.values()))]
                factor = stats.factor_per_doubling(list(used), by_seed)
                if factor is not None:
                    line = {"method": method.label, "axis": axis, "other": other, "fixed": fixed, "sizes": list(used)}
                    lines.append(line | {"factor": factor})
    return lines
