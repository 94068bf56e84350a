"""docs/results.md from run folders of sweeps: the words are experiments/results.md's, the numbers are of records."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import vl_convert

from spannorm_jax.report import markdown, stats
from spannorm_jax.report.contents import contents
from spannorm_jax.report.figures import FIGURES
from spannorm_jax.report.page import print_svg, read_study
from spannorm_jax.report.rows import Row
from spannorm_jax.report.stats import Interval
from spannorm_jax.report.study import Method, Study, best_lr

TEMPLATE = Path("experiments/results.md")
NAMES = {
    **{"pre": "PreNorm", "post": "PostNorm", "span": "SpanNorm", "span_raw": "SpanNorm, raw skip", "peri": "Peri-LN"},
    **{"hybrid": "HybridNorm", "layerscale": "LayerScale", "siamese": "SiameseNorm", "deepnorm": "DeepNorm"},
    **{"olmo2": "OLMo 2", "b2t": "B2T", "residual": "ResiDual", "mix": "Mix-LN", "lns": "LayerNorm Scaling"},
    **{"keel": "KEEL", "rezero": "ReZero", "subln": "SubLN"},
    **{"plain": "plain", "gpt2": "GPT-2", "scale": "ScaleInit"},
}


@dataclass(frozen=True)
class Results:
    """A sweep's runs, as a template asks for them. Losses are held-out bits per byte."""

    name: str
    about: Study
    figures: Path  # folder of the figures
    beside: str  # the same, as the page links to it

    def rows(self, **wanted: Any) -> list[Row]:
        """The runs with these values, of Row (placement, init, depth, lr, seed, ...) or of the config (`optim.eps`)."""
        return [row for row in self.about.rows if all(_value(row, key) == value for key, value in wanted.items())]

    @cached_property
    def seeds(self) -> int:
        return len({row.seed for row in self.about.rows})

    def loss(self, **wanted: Any) -> str:
        """Mean ± standard deviation over the seeds, and how many did not train."""
        rows = self.rows(**wanted)
        if not rows:
            return "not run"
        bits = [row.bits_per_byte for row in rows if row.outcome.kind in ("trained", "stalled") and row.bits_per_byte]
        text = f"{statistics.fmean(bits):.3f}" if bits else "–"
        text += f" ± {statistics.stdev(bits):.3f}" if len(bits) > 1 else ""
        kinds = [row.outcome.kind for row in rows]
        bad = [f"{n} of {len(rows)} {kind}" for kind in ("stalled", "diverged") if (n := kinds.count(kind))]
        return f"{text} ({', '.join(bad)})" if bad else text

    def each(self, placement: str, init: str) -> str:
        """Losses of the seeds in their order: 2.66, 2.77 and 2.71."""
        rows = sorted(self.rows(placement=placement, init=init), key=lambda row: row.seed)
        if not rows:
            return "not run"
        *first, last = (f"{row.bits_per_byte:.2f}" if row.bits_per_byte else row.outcome.kind for row in rows)
        return f"{', '.join(first)} and {last}" if first else last

    def table(self, down: str, across: str, columns: dict[str, dict[str, Any]] | None = None, **fixed: Any) -> str:
        """A line a value of `down`, a column a value of `across` or one each of `columns`: name -> values of `rows`."""
        values = list(dict.fromkeys(_value(row, down) for row in self._ordered(down)))
        if columns is None:
            found = dict.fromkeys(_value(row, across) for row in self._ordered(across))
            columns = {_named(value): {across: value} for value in found}
        lines = [
            [_named(value), *(self.loss(**{down: value}, **c, **fixed) for c in columns.values())] for value in values
        ]
        return markdown.table([(name, False) for name in (down, *columns)], lines)

    def arms(self) -> dict[str, dict[str, str]]:
        """Columns for `table`: one a method."""
        return {_method(m): {"placement": m.placement, "init": m.init} for m in self.about.methods}

    def _ordered(self, key: str) -> list[Row]:
        """Placements and initialisations in the order of the study, numbers by size."""
        rows = [row for group in self.about.groups for row in group.rows]
        return rows if key in ("placement", "init") else sorted(rows, key=lambda row: _value(row, key))

    def difference(
        self, method: tuple[str, str], baseline: tuple[str, str], own_best: bool = False, **fixed: Any
    ) -> str:
        """Of held-out nats per token, paired by seed, with its t interval and n; at `fixed`, or each at its own best
        learning rate."""
        losses = []
        for placement, init in (method, baseline):
            own = {"lr": best_lr(self.about, Method(placement, init, ()), self.about.places[0])} if own_best else fixed
            rows = self.rows(placement=placement, init=init, **own)
            losses.append({row.seed: loss for row in rows if (loss := self.about.loss(row)) is not None})
        return _interval(stats.t_interval(stats.paired_differences(*losses)))

    def report(self, name: str) -> str:
        """A table of the sweep's report, by its name in `report.markdown`."""
        return markdown.tables(contents(self.about, (), Path(), self.name))[name]

    def figure(self, name: str, alternative: str) -> str:
        """Draws a figure of the report, and links to it."""
        make: Callable[[Study], Any] = FIGURES[name][0]
        figure = make(self.about)
        if figure is None:
            raise ValueError(f"{self.name} has no figure {name}: {FIGURES[name][1]}")
        file = f"{self.name}-{name}.png"
        (self.figures / file).write_bytes(vl_convert.svg_to_png(print_svg(figure), scale=1.5))
        return f"![{alternative}]({self.beside}/{file})"


def _value(row: Row, key: str) -> Any:
    return row.run.options[key] if "." in key else getattr(row, key)


def _named(value: Any) -> str:
    return NAMES.get(value, value) if isinstance(value, str) else f"{value:g}"


def _method(method: Method) -> str:
    return f"{_named(method.placement)}, {_named(method.init)}"


def _interval(found: Interval | None) -> str:
    if found is None:
        return "–"
    bounds = "" if found.low is None else f" [{found.low:+.3f}, {found.high:+.3f}]"
    return f"{found.mean:+.3f}{bounds}, n {found.n}".replace("-", "−")


def write_page(runs: Path, page: Path, figures: Path) -> Path:
    """Renders the template. `runs` holds a folder of run folders for each sweep that has records.

    Raises:
      UserError: a folder holds no run.
    """
    beside = "../" * len(page.parent.parts) + figures.as_posix()
    sweeps = {
        folder.name: Results(folder.name, read_study([folder])[0], figures, beside) for folder in sorted(runs.iterdir())
    }
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    page.write_text(template.render(sweeps=sweeps) + "\n", encoding="utf-8")
    return page
