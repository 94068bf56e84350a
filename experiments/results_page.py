"""Pages of docs/ from run folders of sweeps: the words are a template's in experiments/, the numbers are of records."""

import json
import math
import statistics
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import polars as pl
import vl_convert

from spannorm_jax.errors import UserError
from spannorm_jax.model.placement import PLACEMENTS
from spannorm_jax.report import comparisons, stats
from spannorm_jax.report.contents import contents, in_markdown
from spannorm_jax.report.curves import gap_curves
from spannorm_jax.report.figures import FIGURES
from spannorm_jax.report.folders import find_runs
from spannorm_jax.report.frames import named
from spannorm_jax.report.page import print_svg
from spannorm_jax.report.runs import FINISHED, RunFolder
from spannorm_jax.report.stats import Interval
from spannorm_jax.report.study import ARM, Study, by_loss, study_of
from spannorm_jax.report.tables import interval, markdown, spread

Wanted = dict[str, Any]  # what `Results.rows` takes
TEMPLATE = Path("experiments/results.md")
FLOORS = Path("experiments/results/floors.json")
FAILED = ("plateau", "collapsed", "diverged")
NAMES = {placement.name: placement.title for placement in PLACEMENTS.values()} | {
    **{"ds": "DS-Init", "zero_out": "zero outputs", "gpt2": "GPT-2", "xavier": "Xavier", "megatron": "Megatron"},
    **{"scale-L1": "ScaleInit-L1", "scale-L0.5": "ScaleInit-L0.5", "muon": "Muon"},
}


@dataclass(frozen=True)
class Results:
    """A sweep's runs, as a template asks for them. Losses are held-out bits per byte."""

    name: str
    study: Study
    figures: Path  # folder of the figures
    beside: str  # the same, as the page links to it

    def runs(self, **wanted: Any) -> pl.DataFrame:
        """The study's runs with these values, by name (placement, init, lr, ...) or by config key (`optim.eps`)."""
        rows = (self.study.rows[i] for i in self.study.runs["row"])
        chosen = [all(_value(row, key) == value for key, value in wanted.items()) for row in rows]
        return self.study.runs.filter(pl.Series(chosen, dtype=pl.Boolean))

    def rows(self, **wanted: Any) -> list[RunFolder]:
        """These runs, in the order of the study's tables."""
        return [self.study.rows[i] for i in self.runs(**wanted)["row"]]

    def where(self, **wanted: Any) -> "Results":
        """The same, of the runs with these values alone."""
        return replace(self, study=study_of(self.rows(**wanted)))

    def against(self, **baseline: str) -> "Results":
        """The same, compared with this placement and initialisation."""
        return replace(self, study=study_of(self.study.rows, baseline))

    def gaps(self, **wanted: Any) -> list[float]:
        """Of one method its training loss less the baseline's, along the run; see `curves.gap_curves`."""
        return named(self.study, gap_curves(self.study)).filter(**wanted)["gap"].to_list()

    @property
    def least(self) -> float:
        """The least loss of any run."""
        return min(self.study.runs["bits_per_byte"].drop_nulls(), default=math.inf)

    @property
    def placements(self) -> list[str]:
        return list(dict.fromkeys(method.placement for method in self.study.methods))

    @property
    def failing(self) -> list[tuple[str, str]]:
        """Placement and initialisation of the runs that did not train, each once, by alphabet."""
        failed = self.study.runs.filter(pl.col("outcome").is_in(FAILED))
        return sorted(failed.select("placement", "init").unique().rows())

    def mean(self, placement: str, init: str) -> float:
        """Mean loss over all runs of both; infinity without any."""
        bits = self.runs(placement=placement, init=init)["bits_per_byte"].drop_nulls()
        return math.inf if bits.is_empty() else statistics.fmean(bits)

    @property
    def seeds(self) -> int:
        return len(self.study.seeds)

    def loss(self, **wanted: Any) -> str:
        """Mean ± standard deviation over the seeds, and how many did not train or have none."""
        runs, ends = self.runs(**wanted), self.ends(**wanted)
        if runs.is_empty():
            return "not run"
        finished = runs.filter(pl.col("outcome").is_in(FINISHED))["bits_per_byte"]
        bits = finished.drop_nulls().to_list()
        text = spread(statistics.fmean(bits), statistics.stdev(bits) if len(bits) > 1 else None, ".3f") if bits else "–"
        bad = [f"{n} of {len(runs)} {kind}" for kind in FAILED if (n := ends[kind])]
        bad += [f"{n} of {len(runs)} not evaluated"] if (n := finished.null_count()) else []
        return f"{text} ({', '.join(bad)})" if bad else text

    def ends(self, **wanted: Any) -> Counter[str]:
        """Outcome -> how many of the runs with these values ended so."""
        return Counter(self.runs(**wanted)["outcome"])

    def trains(self, **wanted: Any) -> bool:
        """Whether there are such runs, and all of them trained."""
        return self.ends(**wanted).keys() == {"trained"}

    def fails(self, **wanted: Any) -> bool:
        """Whether there are such runs, and none of them trained."""
        ends = self.ends(**wanted)
        return bool(ends) and not ends["trained"]

    def each(self, placement: str, init: str) -> str:
        """Losses of the seeds in their order: 2.66, 2.77 and 2.71."""
        rows = sorted(self.rows(placement=placement, init=init), key=lambda row: row.seed)
        if not rows:
            return "not run"
        *first, last = (f"{bits:.2f}" if (bits := row.reached["bits_per_byte"]) else row.outcome for row in rows)
        return f"{', '.join(first)} and {last}" if first else last

    def table(self, down: str, across: str, columns: dict[str, dict[str, Any]] | None = None, **fixed: Any) -> str:
        """A line a value of `down`, a column a value of `across` or one each of `columns`: name -> values of `rows`."""
        if columns is None:
            columns = {_named(value): {across: value} for value in self.values(across)}
        return self.grid(down, {_named(value): {down: value} for value in self.values(down)}, columns, **fixed)

    def grid(
        self, head: str, lines: dict[str, Wanted], columns: dict[str, Wanted], own_best: bool = False, **fixed: Any
    ) -> str:
        """A line and a column for each name -> values of `rows`; `own_best`: at the best learning rate there."""

        def cell(wanted: Wanted) -> str:
            if not own_best:
                return self.loss(**wanted)
            lr = self.best_lr(**wanted)
            return "not run" if lr is None else f"{self.loss(lr=lr, **wanted)} at {lr:g}"

        cells = [[name, *(cell(line | column | fixed) for column in columns.values())] for name, line in lines.items()]
        return markdown([(name, False) for name in (head, *columns)], cells)

    def best_lr(self, **wanted: Any) -> float | None:
        """Of the least mean over seeds, of capped losses; None if nothing was run."""
        return next(iter(by_loss(self.runs(**wanted))["lr"]), None)

    def arms(self) -> dict[str, dict[str, str]]:
        """Columns for `table`: one a method."""
        return {
            f"{_named(method.placement)}, {_named(method.init)}": {"placement": method.placement, "init": method.init}
            for method in self.study.methods
        }

    def values(self, key: str) -> list[Any]:
        """Placements and initialisations in the order of the study, numbers by size."""
        values = dict.fromkeys(_value(row, key) for row in self.rows())
        return list(values) if key in ("placement", "init") else sorted(values)

    def difference(
        self, method: tuple[str, str], baseline: tuple[str, str], own_best: bool = False, **fixed: Any
    ) -> str:
        """`between` two methods."""
        both = [{"placement": placement, "init": init} for placement, init in (method, baseline)]
        return self.between(*both, own_best, **fixed)

    def between(self, ours: Wanted, theirs: Wanted, own_best: bool = False, **fixed: Any) -> str:
        """The difference of two kinds of runs with its interval and n, of any values of `rows`."""
        return _told(*self.judged(ours, theirs, own_best, **fixed))

    def judged(
        self, ours: Wanted, theirs: Wanted, own_best: bool = False, **fixed: Any
    ) -> tuple[Interval | None, bool]:
        """The mean of ours less theirs by seed, held-out nats per token, and whether its error is pooled.

        `own_best`: each at its own best learning rate. The error is pooled as in a report, over all arms
        at their own best rates or at the rates of these two, where both of these trained with every seed.

        Raises:
          ValueError: a side has two runs of one seed.
        """
        both = [fixed | wanted for wanted in (ours, theirs)]
        both = [wanted | ({"lr": self.best_lr(**wanted)} if own_best else {}) for wanted in both]
        sides = [self.runs(**wanted) for wanted in both]
        found = stats.t_interval(stats.paired_differences(*(self.by_seed(**wanted) for wanted in both)))
        if found is None or any(set(side["outcome"]) != {"trained"} for side in sides):
            return found, False
        lrs = {lr for side in sides for lr in side["lr"]}
        rates = {at: {self.study.best.get(at)} if own_best else lrs for at in self.study.lrs}
        arms = ((*at, lr) for at, own in self.study.lrs.items() for lr in own if lr in rates[at])
        spreads = comparisons.spreads(self.study, arms)
        families = [comparisons.family(self.study, side.select(ARM).row(0)) for side in sides]
        if not all(family in spreads for family in families):
            return found, False
        return stats.pooled_difference(found.mean, found.n, *(spreads[family] for family in families))[0], True

    def by_seed(self, **wanted: Any) -> dict[int, float]:
        """seed -> loss that is compared, of the runs with these values. Raises ValueError for two of one seed."""
        runs = self.runs(**wanted)
        if runs["seed"].is_duplicated().any():
            raise ValueError(f"{self.name}: {wanted} is of several methods")
        return dict(runs.select("seed", "loss").drop_nulls().iter_rows())

    def ahead(self, ours: Wanted, theirs: Wanted, own_best: bool = False, **fixed: Any) -> bool:
        """Whether the interval of ours less theirs lies below zero."""
        found, _ = self.judged(ours, theirs, own_best, **fixed)
        return found is not None and found.high is not None and found.high < 0

    def alike(self, ours: Wanted, theirs: Wanted, own_best: bool = False, **fixed: Any) -> bool:
        """Whether the interval of ours less theirs holds zero."""
        found, _ = self.judged(ours, theirs, own_best, **fixed)
        return found is not None and found.low is not None and found.high is not None and found.low <= 0 <= found.high

    def mean_between(self, ours: Wanted, theirs: Wanted, **fixed: Any) -> float:
        """The mean of ours less theirs by seed; not a number without a seed that both have."""
        found, _ = self.judged(ours, theirs, **fixed)
        return math.nan if found is None else found.mean

    def recipes(self, **fixed: Any) -> dict[str, Wanted]:
        """Placement, initialisation, optimiser and warm-up of branches, as they were run together, by name."""
        found = {}
        for row in self.rows(**fixed):
            optimizer, warmup = _value(row, "optim.name"), _value(row, "model.branch_warmup_steps")
            name = f"{_named(row.placement)}, {_named(row.init)}" + ", ProRes" * bool(warmup)
            name += "" if optimizer == "adamw" else f", {_named(optimizer)}"
            own = {"placement": row.placement, "init": row.init, "optim.name": optimizer}
            found[name] = own | {"model.branch_warmup_steps": warmup} | fixed
        return found

    def by_rate(self, shared: float, baseline: str, **fixed: Any) -> str:
        """Recipes by their losses at their own best learning rate, less the `baseline`'s, and at a `shared` rate."""
        recipes, rates = self.recipes(**fixed), self.runs(**fixed)["lr"].unique().sort()
        best = {name: wanted | {"lr": self.best_lr(**wanted)} for name, wanted in recipes.items()}
        means = {name: self.runs(**wanted)["capped"].mean() for name, wanted in best.items()}
        order = sorted(recipes, key=lambda name: math.inf if means[name] is None else means[name])
        lines = [
            [
                name,
                self.loss(**best[name]),
                f"{best[name]['lr']:g}" + " (an end of the grid)" * (best[name]["lr"] in (rates[0], rates[-1])),
                "" if name == baseline else self.between(best[name], best[baseline]),
                self.loss(lr=shared, **recipes[name]),
            ]
            for name in order
        ]
        heads = ("recipe", "at its own best rate", "which is", f"less {baseline}, nats", f"at {shared:g}")
        return markdown([(head, False) for head in heads], lines)

    def again(self, other: "Results") -> str:
        """What the runs that `other` has too, of another machine, reach there less here, where both trained."""
        runs = [r.study.runs.with_columns(name=pl.col("folder").str.split("/").list.last()) for r in (self, other)]
        pairs = runs[0].join(runs[1], on="name", suffix="_there", maintain_order="left")
        both = pairs.filter(outcome="trained", outcome_there="trained")
        differences = (both["loss"] - both["loss_there"]).to_list()
        alike = f"{(pairs['outcome'] == pairs['outcome_there']).sum()} of {len(pairs)} end alike"
        if len(differences) < 2:
            return alike
        mean, deviation = statistics.fmean(differences), statistics.stdev(differences)
        return f"{alike}, and the {len(both)} that trained in both differ by {spread(mean, deviation, '+.3f')} nats"

    def report(self, name: str) -> str:
        """A table of the sweep's report, by its name in `contents.TABLES`."""
        return in_markdown(contents(self.study, (), Path(), self.name))[name]

    def figure(self, name: str, alternative: str, view: str = "") -> str:
        """Draws a figure of the report, in a view of its page or the first one, and links to it."""
        figure = FIGURES[name][0](self.study)
        if figure is None:
            raise ValueError(f"{self.name} has no figure {name}: {FIGURES[name][1]}")
        if view:
            figure = replace(figure, views={view: figure.views[view]})
        file = f"{self.name}-{name}.png"
        (self.figures / file).write_bytes(vl_convert.svg_to_png(print_svg(figure), scale=1.5))
        return f"![{alternative}]({self.beside}/{file})"


def _value(row: RunFolder, key: str) -> Any:
    return row.options[key] if "." in key else getattr(row, key)


def _named(value: Any) -> str:
    return NAMES.get(value, value) if isinstance(value, str) else f"{value:g}"


def _told(found: Interval | None, pooled: bool) -> str:
    if found is None:
        return "–"
    of_its_own = "" if pooled or found.low is None else ", own spread"
    return f"{interval(found.mean, found.low, found.high)}, n {found.n}{of_its_own}"


def claim(holds: bool, what: str) -> str:
    """Nothing, where what a template says of its records holds.

    Raises:
      UserError: it does not, so that no page says it.
    """
    if not holds:
        raise UserError(f"a template says what its records do not: {what}; mend the words")
    return ""


@cache  # both pages are of the same runs
def read(folder: Path) -> Study:
    """The runs below a folder. Those of a CPU and of a GPU are of one method, whose compute dtype follows the device.

    Raises:
      UserError: it holds no run.
    """
    runs = find_runs([folder])
    undecided = [replace(run, config=run.config | {"model": run.config["model"] | {"dtype": "auto"}}) for run in runs]
    return study_of(undecided)


def write_page(runs: Path, page: Path, figures: Path, template: Path | None = None, **more: Any) -> Path:
    """Renders a template, by default TEMPLATE. `runs` holds a folder of run folders for each sweep that has records.

    The template has `sweeps`, `floors`, `claim`, and what there is in `more`.

    Raises:
      UserError: a folder holds no run, or a sentence does not hold of the records (`claim`).
    """
    beside = "../" * len(page.parent.parts) + figures.as_posix()
    sweeps = {folder.name: Results(folder.name, read(folder), figures, beside) for folder in sorted(runs.iterdir())}
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    words = environment.from_string((template or TEMPLATE).read_text(encoding="utf-8"))
    floors = json.loads(FLOORS.read_text(encoding="utf-8"))
    page.write_text(words.render(sweeps=sweeps, floors=floors, claim=claim, **more) + "\n", encoding="utf-8")
    return page
