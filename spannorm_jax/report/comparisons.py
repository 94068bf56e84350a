"""Methods against their baselines: paired differences, the error of a study, and what is the same under two names."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import polars as pl

from spannorm_jax.report import stats
from spannorm_jax.report.stats import Interval, Pooled
from spannorm_jax.report.study import ARM, Arm, Method, Place, Study

OWN, SHARED = "each at its own best learning rate", "both at the baseline's best"
Family = tuple[Place, str]
_COMPARED = ("comparison", *ARM, "baseline", "baseline_lr")
_DIFFERENCES: dict[str, Any] = {
    "comparison": pl.String,
    **dict.fromkeys(("method", "depth", "width", "baseline", "n", "pairs"), pl.Int64),
    **dict.fromkeys(("lr", "baseline_lr", "difference", "low", "high", "pooled_low", "pooled_high", "p"), pl.Float64),
    "named": pl.Boolean,
}


def differences(about: Study) -> pl.DataFrame:
    """Each method less its baseline at each place, in the loss that is compared, over seeds that both finished.

    Where the learning rate varies there are two comparisons: at own best rates, and at the baseline's
    where the method was run at it.

    Attributes of lines:
      method, baseline: their indices in `about.methods`.
      difference, low, high, n: the arm's own interval, null and 0 without a seed that both finished.
      pairs: seeds that either has.
      named: whether the comparison was named before the runs.
      pooled_low, pooled_high: bounds with the spread pooled over arms (`family`); null where an arm
        did not train with every seed, whose losses spread otherwise.
      p: Holm's p-value of the pooled error, among the named or the other comparisons of one kind.
    """
    losses, seeds = (about.by_seed(column, about.reported) for column in ("loss", "outcome"))
    lines: list[dict[str, Any]] = []
    for kind, pairs, known in _compared(about):
        found = []
        for ours, theirs in pairs:
            own = stats.t_interval(stats.paired_differences(losses.get(ours, {}), losses.get(theirs, {})))
            runs = seeds.get(ours, {}).keys() | seeds.get(theirs, {}).keys()
            line = dict(zip(_COMPARED, (kind, *ours, theirs[0], theirs[-1]), strict=True))
            line |= {"n": 0, "pairs": len(runs), "named": about.confirms(ours[0])}
            found.append(line)
            if own is None:
                continue
            line |= {"difference": own.mean, "low": own.low, "high": own.high, "n": own.n}
            families = [family(about, arm) for arm in (ours, theirs) if arm in about.trained]
            if len(families) == 2 and all(key in known for key in families):
                pooled, p = stats.pooled_difference(own.mean, own.n, *(known[key] for key in families))
                line |= {"pooled_low": pooled.low, "pooled_high": pooled.high, "p": p}
        for named in (False, True):
            judged = [line for line in found if line["named"] == named and "p" in line]
            for line, p in zip(judged, stats.holm([line["p"] for line in judged]), strict=True):
                line["p"] = p
        lines += found
    return pl.DataFrame(lines, schema=_DIFFERENCES)


Pairs = list[tuple[Arm, Arm]]


def _compared(about: Study) -> list[tuple[str, Pairs, dict[Family, Pooled]]]:
    """Of each comparison its arms, each with its baseline, and their spreads."""
    found = []
    for kind in (OWN, SHARED) if about.varies("lr") else (OWN,):
        pairs: Pairs = []
        for place in about.places:
            for method in range(len(about.methods)):
                baseline = about.partner(method)
                own, theirs = (about.best.get((m, *place)) for m in (method, baseline))
                ours = (method, *place, own if kind == OWN else theirs)
                if method != baseline and own is not None and theirs is not None and ours[-1] in about.lrs[ours[:-1]]:
                    pairs.append((ours, (baseline, *place, theirs)))
        found.append((kind, pairs, spreads(about, (arm for pair in pairs for arm in pair))))
    return found


def family(about: Study, arm: Arm) -> Family:
    """What the spread of a loss is pooled over: arms of one depth, width and initialisation, in whatever reading.

    An initialisation with which some arms hardly train spreads losses more than one with which all do.
    """
    return Place(*arm[1:3]), about.methods[arm[0]].init.partition("-")[0]


def spreads(about: Study, arms: Iterable[Arm]) -> dict[Family, Pooled]:
    """The spread of a loss in each family, of its arms that trained with every seed that is reported."""
    losses, members = about.by_seed("loss", about.reported), dict[Family, list[Arm]]()
    for arm in sorted(set(arms), key=lambda arm: (about.methods[arm[0]], arm)):
        if arm in about.trained:
            members.setdefault(family(about, arm), []).append(arm)
    found = {key: stats.pooled([losses.get(arm, {}) for arm in own]) for key, own in members.items()}
    return {key: spread for key, spread in found.items() if spread is not None}


def errors(about: Study) -> list[tuple[str, Family, Pooled]]:
    """What the intervals of differences rest on: comparison, family and its spread."""
    return [(kind, key, spread) for kind, _, known in _compared(about) for key, spread in known.items()]


def replicates(about: Study) -> dict[tuple[Method, Method], int]:
    """Methods of which runs have equal losses at every step, and how many: one method under two names."""
    runs = [(place, lr, seed, m, row) for (m, place, lr), rows in about.cells.items() for seed, row in rows.items()]
    first, found = dict[tuple[Any, ...], Method](), Counter[tuple[Method, Method]]()
    for place, lr, seed, method, row in sorted(runs, key=lambda run: run[:3]):
        losses = row.run.metrics.loss
        one = first.setdefault((place, lr, seed, losses.tobytes()), method) if len(losses) > 1 else method
        if one != method:
            found[one, method] += 1
    return dict(found)


def replicate_notices(about: Study) -> list[tuple[str, str]]:
    """A warning for each pair of `replicates`."""
    return [
        ("warning", f"Equal losses at every step under two names, in {count} run{'s'[: count != 1]}: {one.label} and "
         f"{other.label}. They are one method: it has two lines, and enters the pooled error once.")
        for (one, other), count in replicates(about).items()
    ]  # fmt: skip


def overall(about: Study) -> list[tuple[Method, Method, Interval, int, int]]:
    """Methods less their baselines over all depths, widths and learning rates that both were run at, capped losses.

    A line a method with enough settings in common with its baseline: both, the interval, the settings, and
    in how many of them the method's mean is the lower.
    """
    capped, found = about.by_seed("capped"), []
    for i, method in enumerate(about.methods):
        partner = about.partner(i)
        arms = sorted(arm for arm in capped if arm[0] == i != partner)
        pairs = [stats.paired_differences(capped[arm], capped.get((partner, *arm[1:]), {})) for arm in arms]
        each = [kept for differences in pairs if (kept := [d for d in differences if math.isfinite(d)])]
        interval = stats.bootstrap(each)
        if interval is not None and partner is not None:
            lower = sum(sum(differences) < 0 for differences in each)
            found.append((method, about.methods[partner], interval, len(each), lower))
    return found
