"""Methods against their baselines: paired differences, the error of a study, and what is the same under two names."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import polars as pl

from spannorm_jax.report import stats
from spannorm_jax.report.stats import Interval, Pooled
from spannorm_jax.report.study import ARM, Arm, Method, Size, Study

OWN, SHARED = "each at its own best learning rate", "both at the baseline's best"
Family = tuple[Size, str]
Pairs = list[tuple[Arm, Arm]]
_DIFFERENCES: dict[str, Any] = {
    "comparison": pl.String,
    **dict.fromkeys(("method", "depth", "width", "baseline", "n", "pairs"), pl.Int64),
    **dict.fromkeys(("lr", "baseline_lr", "difference", "low", "high", "pooled_low", "pooled_high", "p"), pl.Float64),
    "named": pl.Boolean,
}


def differences(study: Study) -> pl.DataFrame:
    """Each method less its baseline at each size, in the loss that is compared, over seeds that both finished.

    Where the learning rate varies, at own best rates, and at the baseline's where the method was run at it. Columns:
      method, baseline: their indices in `study.methods`.
      difference, low, high, n: the arm's own interval, null and 0 without a seed that both finished.
      pairs, named: seeds that either has; whether the comparison was named before the runs.
      pooled_low, pooled_high: bounds with the spread pooled over arms (`family`); null where an arm
        did not train with every seed, whose losses spread otherwise.
      p: Holm's p-value of the pooled error, among the named or the other comparisons of one kind.
    """
    losses, seeds = (study.by_seed(column, study.reported) for column in ("loss", "outcome"))
    lines: list[dict[str, Any]] = []
    for kind, pairs, known in _compared(study):
        for ours, theirs in pairs:
            runs = seeds.get(ours, {}).keys() | seeds.get(theirs, {}).keys()
            line = {"comparison": kind, "baseline": theirs[0], "baseline_lr": theirs[-1], "n": 0, "pairs": len(runs)}
            line |= {"named": study.confirms(ours[0]), **dict(zip(ARM, ours, strict=True))}
            own = stats.t_interval(stats.paired_differences(losses.get(ours, {}), losses.get(theirs, {})))
            if own is not None:
                line |= {"difference": own.mean, "low": own.low, "high": own.high, "n": own.n}
            families = [family(study, arm) for arm in (ours, theirs) if arm in study.trained]
            if own is not None and len(families) == 2 and known.keys() >= {*families}:
                pooled, p = stats.pooled_difference(own.mean, own.n, *(known[key] for key in families))
                line |= {"pooled_low": pooled.low, "pooled_high": pooled.high, "p": p}
            lines.append(line)
        for named in (False, True):
            judged = [d for d in lines if d["comparison"] == kind and d["named"] == named and "p" in d]
            for line, p in zip(judged, stats.holm([line["p"] for line in judged]), strict=True):
                line["p"] = p
    return pl.DataFrame(lines, schema=_DIFFERENCES)


def _compared(study: Study) -> list[tuple[str, Pairs, dict[Family, Pooled]]]:
    """Of each comparison its arms, each with its baseline, and their spreads."""
    compared = []
    for kind in (OWN, SHARED) if study.varies("lr") else (OWN,):
        pairs: Pairs = []
        for size in study.sizes:
            for method in range(len(study.methods)):
                baseline = study.partner(method)
                own, theirs = (study.best.get((m, *size)) for m in (method, baseline))
                ours = (method, *size, own if kind == OWN else theirs)
                if method != baseline and own is not None and theirs is not None and ours[-1] in study.lrs[ours[:-1]]:
                    pairs.append((ours, (baseline, *size, theirs)))
        compared.append((kind, pairs, spreads(study, (arm for pair in pairs for arm in pair))))
    return compared


def family(study: Study, arm: Arm) -> Family:
    """What the spread of a loss is pooled over: arms of one depth, width and initialisation, in whatever reading.

    An initialisation with which some arms hardly train spreads losses more than one with which all do.
    """
    return Size(*arm[1:3]), study.methods[arm[0]].init.partition("-")[0]


def spreads(study: Study, arms: Iterable[Arm]) -> dict[Family, Pooled]:
    """The spread of a loss in each family, of its arms that trained with every seed that is reported."""
    losses, members = study.by_seed("loss", study.reported), dict[Family, list[Arm]]()
    for arm in sorted(study.trained.intersection(arms), key=lambda arm: (study.methods[arm[0]], arm)):
        members.setdefault(family(study, arm), []).append(arm)
    pooled = {key: stats.pooled([losses.get(arm, {}) for arm in own]) for key, own in members.items()}
    return {key: spread for key, spread in pooled.items() if spread is not None}


def errors(study: Study) -> list[tuple[str, Family, Pooled]]:
    """What the intervals of differences rest on: comparison, family and its spread."""
    return [(kind, key, spread) for kind, _, known in _compared(study) for key, spread in known.items()]


def replicates(study: Study) -> dict[tuple[Method, Method], int]:
    """Methods of which runs have equal losses at every step, and how many: one method under two names."""
    first, counts = dict[tuple[Any, ...], Method](), Counter[tuple[Method, Method]]()
    runs = study.runs.filter("first").sort("depth", "width", "lr", "seed", maintain_order=True)
    for *at, method, row in runs.select("depth", "width", "lr", "seed", "method", "row").iter_rows():
        losses, own = study.rows[row].metrics.loss, study.methods[method]
        one = first.setdefault((*at, losses.tobytes()), own) if len(losses) > 1 else own
        if one != own:
            counts[one, own] += 1
    return dict(counts)


def overall(study: Study) -> list[tuple[Method, Method, Interval, int, int]]:
    """Methods less their baselines over all settings that both were run at, in capped losses, where they are enough:
    both, the interval, the settings, and in how many of them the method's mean is the lower.
    """
    capped, lines = study.by_seed("capped"), []
    for i, method in enumerate(study.methods):
        partner = study.partner(i)
        arms = sorted(arm for arm in capped if arm[0] == i != partner)
        pairs = [stats.paired_differences(capped[arm], capped.get((partner, *arm[1:]), {})) for arm in arms]
        each = [kept for differences in pairs if (kept := [d for d in differences if math.isfinite(d)])]
        interval = stats.bootstrap(each)
        if interval is not None and partner is not None:
            lower = sum(sum(differences) < 0 for differences in each)
            lines.append((method, study.methods[partner], interval, len(each), lower))
    return lines
