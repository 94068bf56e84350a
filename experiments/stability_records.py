"""Measured ceilings beside what probes say of them, for experiments/stability.md, the template of docs/stability.md.

`experiments.probes` makes the probes.
"""

import functools
import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from experiments.record import read_records
from experiments.results_page import NAMES, Results
from experiments.results_page import read as read_runs
from spannorm_jax.config import to_dict
from spannorm_jax.errors import UserError
from spannorm_jax.model.initialisation import reading
from spannorm_jax.report.ceilings import bracket, interval_text, trains
from spannorm_jax.report.runs import dotted
from spannorm_jax.report.study import Study
from spannorm_jax.report.tables import markdown
from spannorm_jax.sweep.bisection import Cell, cells_of
from spannorm_jax.sweep.expansion import expand

TEMPLATE = Path("experiments/stability.md")
RECORDS = Path("experiments/results/stability")
PROBES, WATCHED = RECORDS / "probes.jsonl", RECORDS / "watched.jsonl"
STEPS = 25  # before the second probe of a cell
RATES = tuple(float(f"{2e-4 * 1.5**i:.3g}") for i in range(18))
CLOSE = 1.5  # factor
SHOWN = {  # of a watched run -> its head
    **{"loss": "loss", "token_correlation": "tokens' correlation", "attenuation": "sum of log(1 + f)"},
    **{"token_change": "change of what is said of tokens", "logits_change": "change of the logits"},
    "over_the_edge": "sharpness over its bound",
}


def cell_name(cell: Cell) -> str:
    """The name of its run at the lowest rate with its first seed, which tells cells of all sweeps apart."""
    return cell.rungs[0][0].name


def read_probes(path: Path = PROBES) -> dict[tuple[str, int], dict[str, Any]]:
    """(cell's name, steps before the update) -> its record."""
    return {(record["cell"], record["steps"]): record for record in read_records(path)}


def crossing(values: Sequence[float | None], level: float) -> float:
    """The least rate at which a number of a probe, at each of RATES, reaches `level` from below; infinity where none
    does. Between two rates it is on the line of the number by the rate's logarithm. None, not finite, is beyond it."""
    for i, value in enumerate(values):
        if value is None or value >= level:
            if i == 0 or value is None:
                return RATES[i]
            share = (level - values[i - 1]) / (value - values[i - 1])
            return RATES[i - 1] * (RATES[i] / RATES[i - 1]) ** share
    return math.inf


# ---- what a probe says of a ceiling ---------------------------------------------------------------------------

# name -> (steps before the update, number, level; None: the rate at which the number is least). An attenuation is
# counted from that without an update.
QUANTITIES: dict[str, tuple[int, str, float | None]] = {
    "tokens' correlation is 0.85, first update": (0, "token_correlation", 0.85),
    "half of what is said of tokens changes": (STEPS, "token_change", 0.5),
    "half of the logits changes": (STEPS, "logits_change", 0.5),
    "the loss is least": (STEPS, "loss", None),
    "half of what is said of tokens changes, first update": (0, "token_change", 0.5),
    "half of the logits changes, first update": (0, "logits_change", 0.5),
    "tokens' correlation is 0.98, first update": (0, "token_correlation", 0.98),
    "the loss is least, first update": (0, "loss", None),
    "the sum of log(1 + f) grows by 5": (STEPS, "attenuation", 5.0),
    "the sum of log(1 + f) grows by 5, first update": (0, "attenuation", 5.0),
}
LAW = next(iter(QUANTITIES))
COLUMNS = {
    **{"placement": "model.placement", "init": "model.init", "blocks": "model.depth", "width": "model.width"},
    **{"parametrisation": "model.parametrisation", "warm-up": "optim.warmup_fraction", "rows": "training.batch_size"},
    "held": "optim.hold_norms",
}

# Law of growth -> the exponent of 1 / L in it.
GROWTH = {"by growth": 0.25, "by growth that agrees": 0.5}

# What the head reads was normed with the stream in every block, so that the share of the embeddings in it falls with
# each. Of other placements some path to the head is only added to. Mix-LN has both, one after the other.
STREAMS = dict.fromkeys(("post", "span", "span_raw", "hybrid", "deepnorm", "b2t", "keel"), "normed")
STREAMS["mix"] = "normed, then added to"

# sweep -> what it asks
ASKS = {
    "ceiling_factor": "Does the forward pass's constant bear more than the weight's factor?",
    "ceiling_placements": "Which placements bear more, with ScaleInit?",
    "ceiling_plain": "The same without a depth factor",
    "ceiling_depth": "How does the ceiling fall with depth?",
    "ceiling_width": "How does it move with width?",
    "ceiling_targets": "SpanNorm with the factor on both output projections",
    "ceiling_held": "Weights that keep their norm",
    "ceiling_warmup": "Does a warm-up over half of the steps lift it?",
    "ceiling_parametrisation": "Does CompleteP keep it where width and depth grow?",
    "ceiling_batch": "How does it move with gradient noise?",
    "ceiling_images": "Does the same hold on images?",
}


KNOWN = ("ceiling_factor", "ceiling_placements", "ceiling_targets", "ceiling_held")  # when LAW was chosen


@dataclass(frozen=True)
class Ceiling:
    """Of a cell the highest rate that holds and the next that fails, None beyond the ladder's ends."""

    cell: str
    values: dict[str, Any]  # of COLUMNS
    low: float | None
    high: float | None
    runs: int

    @property
    def middle(self) -> float:
        """The interval's geometric mean; beyond the ladder its end."""
        ends = [end for end in (self.low, self.high) if end is not None]
        return statistics.geometric_mean(ends)

    @property
    def interval(self) -> str:
        return interval_text(self.low, self.high)

    def off(self, rate: float) -> float:
        """The factor by which a rate is beyond the interval; 1 within it."""
        if self.low is not None and rate < self.low:
            return rate / self.low
        return rate / self.high if self.high is not None and rate > self.high else 1.0


def ceilings_of(sweep: str, study: Study) -> list[Ceiling]:
    """The settled ceilings of a sweep, in its order; `study` has its runs."""
    outcomes: dict[str, str | None] = {row.folder.name: row.outcome for row in study.rows}
    found = []
    for cell in cells_of(expand(sweep, "cpu")):

        def trained(rung: int, seed: int, cell: Cell = cell) -> bool | None:
            return trains(outcomes.get(cell.rungs[rung][seed].name))

        low, high, wanted = bracket(len(cell.rungs), len(cell.rungs[0]), trained)
        if wanted:
            continue
        first = cell.rungs[0][0].config
        options = dotted(to_dict(first))
        own = reading(first.model.init, first.model.variance_exponent, first.model.depth_factor)
        values = {name: options[key] for name, key in COLUMNS.items()} | {"init": own}
        values["held"] = ", ".join(values["held"])
        values["stream"] = STREAMS.get(values["placement"], "added to")
        ends = [cell.rungs[rung][0].config.optim.lr if 0 <= rung < len(cell.rungs) else None for rung in (low, high)]
        runs = sum(run.name in outcomes for rung in cell.rungs for run in rung)
        found.append(Ceiling(cell_name(cell), values, ends[0], ends[1], runs))
    return found


def is_close(off: float) -> bool:
    return 1 / CLOSE <= off <= CLOSE


@dataclass(frozen=True)
class Ceilings:
    """All settled ceilings beside their probes, as a template asks for them.

    A quantity of QUANTITIES becomes a predicted ceiling by one factor for all: the geometric mean of ceiling over
    quantity of the sweep `fitted`, whose cells then have no part in what is said of the prediction.
    """

    by_sweep: dict[str, list[Ceiling]]
    probes: dict[tuple[str, int], dict[str, Any]]
    watched: Sequence[dict[str, Any]] = ()
    interventions: Sequence[dict[str, Any]] = ()
    fitted: str = "ceiling_factor"
    asks, steps, level = ASKS, STEPS, QUANTITIES[LAW][2]

    def rate(self, ceiling: Ceiling, name: str) -> float | None:
        """A quantity; None without a probe."""
        steps, key, level = QUANTITIES[name]
        record = self.probes.get((ceiling.cell, steps))
        if record is None:
            return None
        start = record[key][0] if key == "attenuation" else 0
        values = [None if value is None else value - start for value in record[key][1:]]
        return crossing(values, level) if level is not None else RATES[int(np.nanargmin(np.array(values, np.float64)))]

    def factor(self, name: str = LAW) -> float:
        pairs = [(each.middle, self.rate(each, name)) for each in self.by_sweep[self.fitted]]
        return statistics.geometric_mean(ceiling / rate for ceiling, rate in pairs if rate and math.isfinite(rate))

    def predicted(self, ceiling: Ceiling, name: str = LAW) -> float | None:
        rate = self.rate(ceiling, name)
        return None if rate is None else rate * self.factor(name)

    def by_growth(self, ceiling: Ceiling, exponent: float) -> float | None:
        """A law of GROWTH, from the cell of `fitted` with 24 blocks of width 64; None where it says no number."""
        own = {name: ceiling.values[name] for name in COLUMNS if name not in ("blocks", "width")}
        base = [each for each in self.by_sweep[self.fitted] if own.items() <= each.values.items()]
        if ceiling.values["init"] != "scale-L1" or not base or base[0].high is None:
            return None
        blocks, width = (ceiling.values[name] / base[0].values[name] for name in ("blocks", "width"))
        return base[0].middle / width / blocks**exponent

    def off_growth(self, law: str, sweep: str) -> list[float]:
        """The factors by which a law of GROWTH is beyond the ceilings of a sweep, but for those it is counted from."""
        base = {each.cell for each in self.by_sweep[self.fitted]}
        others = [each for each in self.by_sweep[sweep] if each.cell not in base]
        return [each.off(rate) for each in others if (rate := self.by_growth(each, GROWTH[law]))]

    def progress(self, sweep: str) -> str:
        """How many ceilings of a sweep are settled."""
        settled = len(self.by_sweep.get(sweep, ()))
        return f"{settled} of {len(cells_of(expand(sweep, 'cpu')))}" if settled else "not run"

    def apart_from(self, sweeps: Sequence[str]) -> list[Ceiling]:
        """Cells that none of these sweeps has, each once, with a probe."""
        known = {each.cell for sweep in sweeps for each in self.by_sweep.get(sweep, ())}
        others = {each.cell: each for own in self.by_sweep.values() for each in own if each.cell not in known}
        return [each for each in others.values() if self.rate(each, LAW) is not None]

    @functools.cached_property
    def tested(self) -> list[Ceiling]:
        """Cells that had no part in the factors."""
        return self.apart_from((self.fitted,))

    @functools.cached_property
    def fresh(self) -> list[Ceiling]:
        """Cells that had no part in the choice of LAW either."""
        return self.apart_from(KNOWN)

    def close(self, own: Sequence[Ceiling], name: str = LAW) -> list[Ceiling]:
        """Those whose predicted rate is within a factor of CLOSE of the interval."""
        told = [(each, self.predicted(each, name)) for each in own]
        return [each for each, rate in told if rate is not None and is_close(each.off(rate))]

    def slope(self, sweep: str, placement: str, along: str) -> float:
        """The exponent of a ceiling over `blocks` or `width`: the slope of its logarithm, by least squares."""
        cells = [each for each in self.by_sweep[sweep] if each.values["placement"] == placement]
        sizes, middles = np.log([[each.values[along], each.middle] for each in cells]).T
        return float(np.polyfit(sizes, middles, 1)[0])

    def off(self, placement: str, name: str = LAW) -> float:
        """The factor by which a quantity's prediction is beyond a placement's ceiling."""
        cell = self.cell(placement, sweep="ceiling_placements")
        return cell.off(self.predicted(cell, name) or 0)

    def order(self, own: Sequence[Ceiling], name: str = LAW) -> float:
        """Spearman's rank correlation of the quantity with the ceiling."""
        return float(scipy.stats.spearmanr([each.middle for each in own], [self.rate(each, name) for each in own])[0])

    def table(self, sweep: str) -> str:
        """A line a cell, with those of COLUMNS that differ among them."""
        own = self.by_sweep[sweep]
        columns = [name for name in own[0].values if len({each.values[name] for each in own}) > 1]
        laws: dict[str, Callable[[Ceiling], float | None]] = {"predicted": self.predicted}
        if {"blocks", "width"} & set(columns):
            laws |= {name: functools.partial(self.by_growth, exponent=exponent) for name, exponent in GROWTH.items()}
        lines = []
        for each in own:
            told = []
            for law in laws.values():
                rate = law(each)
                told += ["–", "–"] if rate is None else [f"{rate:.2g}", f"{each.off(rate):.2f}"]
            cells = [NAMES.get(value := each.values[name], str(value)) for name in columns]
            lines.append([*cells, each.interval, str(each.runs), *told])
        heads = (*columns, "ceiling", "runs", *(head for law in laws for head in (law, "off by a factor of")))
        return markdown([(head, False) for head in heads], lines)

    def quantities(self) -> str:
        """A line a quantity: how it orders the tested cells and the fresh among them, and how near it comes."""
        lines = []
        for name in QUANTITIES:
            told = [name, f"{self.factor(name):.2g}"]
            for own in (self.tested, self.fresh):
                told += [f"{self.order(own, name):+.2f}", f"{len(self.close(own, name))} of {len(own)}"]
            lines.append(told)
        heads = ("rank correlation", f"within a factor of {CLOSE:g}")
        heads = ("the rate at which", "times", *heads, *(f"{head}, fresh cells" for head in heads))
        return markdown([(head, False) for head in heads], lines)

    def bisected(self, results: Results) -> Results:
        """A sweep's runs as those of its bisection, which figures of ceilings need."""
        rungs = cells_of(expand(results.name, "cpu"))[0].rungs
        rates = [rung[0].config.optim.lr for rung in rungs]
        return replace(results, study=replace(results.study, ladder=rates, ladder_seeds=len(rungs[0])))

    def cell(self, placement: str, init: str = "scale-L1", sweep: str = "ceiling_factor", **values: Any) -> Ceiling:
        """The settled ceiling of a cell of a sweep.

        Raises:
          UserError: it is not settled, or the values fit several.
        """
        own = {"placement": placement, "init": init} | values
        found = [each for each in self.by_sweep.get(sweep, ()) if own.items() <= each.values.items()]
        if len(found) != 1:
            raise UserError(f"the template asks for the ceiling of {own} in {sweep}, of which {len(found)} are settled")
        return found[0]

    def held(self, name: str) -> tuple[float | None, float | None]:
        """The ceiling of SpanNorm under an intervention."""
        (found,) = (record["ceiling"] for record in self.interventions if record["held"] == name)
        return found[0], found[1]

    def seen(self, placement: str, lr: float, step: int) -> dict[str, float]:
        """The numbers of a watched run at a step."""
        runs = (record for record in self.watched if f"placement={placement}," in record["config"])
        (run,) = (record for record in runs if record["lr"] == lr)
        return next(each for each in run["measured"] if each["step"] == step)

    def watched_table(self, at: Sequence[int]) -> str:
        """A line a step of `at` for each watched run (`probes.watch`)."""
        lines = []
        for record in self.watched:
            own = f"`{record['config'].partition(':')[2].removeprefix('tiny,')}`"
            by_step = {each["step"]: each for each in record["measured"]}
            for step in at:
                numbers = [by_step[step].get(key, "") for key in SHOWN]  # null, where one was not finite
                cells = [f"{n:.2f}" if isinstance(n, float) else "–" if n is None else n for n in numbers]
                lines.append([own, f"{record['lr']:g}", str(step), *cells])
                own = ""
        return markdown([(head, False) for head in ("run", "rate", "step", *SHOWN.values())], lines)

    def interventions_table(self) -> str:
        """A line an intervention, by its ceiling."""
        lines = []
        for record in sorted(self.interventions, key=lambda record: record["ceiling"][0] or 0):
            overrides = re.findall(r"--config\.((?:model|optim)\.\S+)", record["command"])
            named = [record["held"]] if record["held"] != "none" else overrides
            name = ", ".join(f"`{text}`" for text in named)
            lines.append([name, interval_text(*record["ceiling"]), str(len(record["outcomes"]))])
        return markdown([(head, False) for head in ("what is held", "ceiling", "runs")], lines)


def read(runs: Path) -> Ceilings:
    """All records; `runs` holds a folder of run folders for each sweep that has some."""
    sweeps = {folder.name: read_runs(folder) for folder in sorted(runs.iterdir()) if folder.name.startswith("ceiling_")}
    by_sweep = {name: ceilings_of(name, study) for name, study in sweeps.items()}
    held = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RECORDS.glob("intervention-*.json"))]
    return Ceilings(by_sweep, read_probes(), read_records(WATCHED), held)
