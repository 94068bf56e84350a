"""docs/claims.md from records: each claim's test, effect in each reading of ScaleInit, and verdict.

A verdict follows from numbers (`less`, `trains_where`, `stays`, ...), and one seed tells nothing.
There are two exceptions: no record tells of a collapse, and one seed shows the variance, which a
norm fixes.
"""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from experiments.record import read_records
from experiments.results_page import FAILED, Results, Wanted, read
from experiments.stability_records import ceilings_of
from spannorm_jax.report import stats
from spannorm_jax.report.rates import drifts
from spannorm_jax.report.runs import RunFolder
from spannorm_jax.report.stats import Interval
from spannorm_jax.report.tables import interval, markdown, number

HOLDS, FAILS, NOT_TOLD, NOT_TESTED = "holds", "fails", "not told", "not tested"
TRANSFER = 1.25  # by how much a best learning rate may move a doubling, either way, and still be said to stay
VANISHED = 0.5  # of the last block's gradient: what the first block's has not vanished above
COST = 1.02  # of PreNorm's step: what costs no more
RECORDS = Path("experiments/results")
TEMPLATE = Path("experiments/claims.md")
BEGIN, END = "<!-- claims: made by python -m experiments.sweep_records page -->", "<!-- end -->"
TOP = 8  # claims in the README

PRE, POST, SPAN = ({"placement": name} for name in ("pre", "post", "span"))
OWN_RATE, SHALLOW, DEEP = 0.003, 6, 96
READINGS, MULTIPLIER = ("scale-L0.5", "scale-L1"), "scale-L1-mult"


@dataclass(frozen=True)
class Verdict:
    word: str = NOT_TESTED
    effect: str = ""
    rows: Sequence[RunFolder] = ()  # the runs it is of, whose regime is told

    def __str__(self) -> str:
        return f"**{self.word}**" + (f": {self.effect}" if self.effect else "")


class Claim(NamedTuple):
    text: str
    test: str
    verdicts: Mapping[str, Verdict] = MappingProxyType({})  # by column
    named: str = "no"  # whether the comparison was named before the runs


# ---- how a verdict follows from numbers ---------------------------------------------------------


def _of_seeds(word: str, effect: str, rows: Sequence[RunFolder]) -> Verdict:
    """A verdict on how runs ended; of one seed nothing is told."""
    return Verdict(word if len({row.seed for row in rows}) > 1 else NOT_TOLD, effect, rows)


def below_zero(found: Interval | None, effect: str, rows: Sequence[RunFolder] = ()) -> Verdict:
    """Holds where the interval lies below zero, fails where above; of one pair nothing is told."""
    if found is None:
        return Verdict()
    low, high = found.low, found.high
    word = NOT_TOLD if low is None or high is None or low <= 0 <= high else HOLDS if high < 0 else FAILS
    return Verdict(word, effect, rows)


def less(sweep: Results, ours: Wanted, theirs: Wanted, own_best: bool = False, **fixed: Any) -> Verdict:
    """Whether ours has the lower held-out loss, by the interval of `Results.judged`. Ours that failed has not."""
    both = [fixed | ours, fixed | theirs]
    if own_best:
        both = [wanted | {"lr": sweep.best_lr(**wanted)} for wanted in both]
    rows = [sweep.rows(**wanted) for wanted in both]
    if not all(rows):
        return Verdict()
    if own_best and len({tuple(sorted({row.lr for row in sweep.rows(**fixed | w)})) for w in (ours, theirs)}) > 1:
        return Verdict(NOT_TOLD, "they were not run at the same rates", rows[0] + rows[1])
    found, _ = sweep.judged(ours, theirs, own_best, **fixed)
    if {row.outcome for row in rows[0]} <= set(FAILED) and sweep.trains(**both[1]):
        return _of_seeds(FAILS, f"it {_ends(sweep, both[0])}", rows[0])
    return below_zero(found, sweep.between(ours, theirs, own_best, **fixed), rows[0] + rows[1])


def trains_where(sweep: Results, ours: Wanted, theirs: Wanted, **fixed: Any) -> Verdict:
    """Whether ours trains with every seed where theirs trains with none; not told where theirs trains too."""
    here, there = fixed | ours, fixed | theirs
    if not sweep.ends(**here) or not sweep.ends(**there):
        return Verdict()
    word = FAILS if not sweep.trains(**here) else HOLDS if sweep.fails(**there) else NOT_TOLD
    return _of_seeds(word, f"it {_ends(sweep, here)}, the other {_ends(sweep, there)}", sweep.rows(**here))


def trains_too(sweep: Results, ours: Wanted, theirs: Wanted, **fixed: Any) -> Verdict:
    """Whether ours trains with every seed where theirs does; not told where theirs does not."""
    here, there = fixed | ours, fixed | theirs
    if not sweep.ends(**here) or not sweep.ends(**there):
        return Verdict()
    word = NOT_TOLD if not sweep.trains(**there) else HOLDS if sweep.trains(**here) else FAILS
    return _of_seeds(word, f"it {_ends(sweep, here)}", sweep.rows(**here))


def _ends(sweep: Results, wanted: Wanted) -> str:
    ends = sweep.ends(**wanted)
    return f"trained with {ends['trained']} of {sum(ends.values())} seeds"


def stays(low: float, high: float, rows: Sequence[RunFolder] = ()) -> Verdict:
    """Whether a best learning rate stays where a size doubles, given the range of factors that it may move by."""
    inside, outside = low >= 1 / TRANSFER and high <= TRANSFER, high < 1 / TRANSFER or low > TRANSFER
    return Verdict(HOLDS if inside else FAILS if outside else NOT_TOLD, f"times {low:.2f} to {high:.2f}", rows)


def drift(sweep: Results, axis: str, **wanted: Any) -> Verdict:
    """`stays` of SpanNorm's best learning rate over depth or width."""
    part = sweep.where(**SPAN, **wanted)
    found = [drift["factor"] for drift in drifts(part.study) if drift["axis"] == axis]
    if not found or found[0].low is None or found[0].high is None:
        return Verdict() if not part.study.rows else Verdict(NOT_TOLD, "no range", part.study.rows)
    return stays(found[0].low, found[0].high, part.study.rows)


def change(sweep: Results, one: Wanted, other: Wanted, ours: Wanted, theirs: Wanted) -> Verdict:
    """Whether ours less theirs grows from one place to the other, seed by seed: then the lead falls (fails)."""
    gaps = []
    for place in (one, other):
        ends, others = (sweep.by_seed(**place, **wanted) for wanted in (ours, theirs))
        gaps.append({seed: ends[seed] - others[seed] for seed in ends.keys() & others.keys()})
    found = stats.t_interval(stats.paired_differences(gaps[1], gaps[0]))
    effect = "" if found is None else f"{interval(found.mean, found.low, found.high)}, n {found.n}"
    return below_zero(found, effect, sweep.rows(**one, **ours) + sweep.rows(**other, **ours))


def bears(sweeps: Mapping[str, Results]) -> dict[str, Verdict]:
    """Initialisation -> whether SpanNorm's ceiling is as high as PreNorm's; both intervals are told."""
    found = {}
    for name in ("ceiling_factor", "ceiling_plain"):
        ceilings = ceilings_of(name, sweeps[name].study) if name in sweeps else []
        theirs = {each.values["init"]: each for each in ceilings if each.values["placement"] == "pre"}
        for here in (each for each in ceilings if each.values["placement"] == "span"):
            if there := theirs.get(here.values["init"]):
                above = (here.low or 0) >= (there.high or math.inf)
                below = (here.high or math.inf) <= (there.low or 0)
                word = HOLDS if above else FAILS if below else NOT_TOLD
                found[here.values["init"]] = Verdict(word, f"{here.interval} (the other's {there.interval})")
    return found


def gradient(sweep: Results, ours: Wanted, theirs: Wanted, **fixed: Any) -> Verdict:
    """Whether ours has at least `VANISHED` of the last block's gradient in the first, at the initial weights."""
    each = [_first_over_last(sweep.rows(**fixed, **wanted)) for wanted in (ours, theirs)]
    if not all(each):
        return Verdict()
    here, there = (math.exp(statistics.fmean(map(math.log, ratios))) for ratios in each)
    effect = f"{here:.2g} of the last block's (the other's {there:.2g})"
    return _of_seeds(HOLDS if min(each[0]) >= VANISHED else FAILS, effect, sweep.rows(**fixed, **ours))


def _first_over_last(rows: list[RunFolder]) -> list[float]:
    return [norms[0] / norms[-1] for row in rows for step, norms in row.metrics.block_grad_norm if step == 1]


# ---- the claims ---------------------------------------------------------------------------------


def over(inits: Sequence[str], verdict: Callable[..., Verdict], *compared: Any, **fixed: Any) -> dict[str, Verdict]:
    """Column -> the verdict of each initialisation."""
    return {init: verdict(*compared, init=init, **fixed) for init in inits}


def claims(sweeps: Mapping[str, Results]) -> list[Claim]:
    """All of them, in the order of the page. A verdict without records is `not tested`."""
    init, lr, exponent, fresh, depth, width, depth_lr, moe, factor, rivals = (
        *(sweeps[name] for name in ("placement_init", "lr", "exponent", "fresh_seeds", "depth", "width", "depth_lr")),
        *(sweeps[name] for name in ("experts", "depth_factor", "rivals")),
    )
    plain, multiplier = ("plain",), SPAN | {"init": MULTIPLIER}
    everett, completep = {"model.parametrisation": "everett"}, {"model.parametrisation": "completep"}
    as_published = {"depth": 24, "optim.name": "adamw"}
    growth = {r: change(depth, {"depth": SHALLOW, "init": r}, {"depth": 48, "init": r}, SPAN, PRE) for r in READINGS}
    best_of_pre = {r: exponent.best_lr(init=r, **PRE) for r in READINGS}
    return [
        Claim(
            "It trains where PostNorm fails",
            "with every seed, where PostNorm trains with none: 24 blocks at 3e-3 (`placement_init`); with "
            "ScaleInit, with which both train there, 48 blocks (`depth`)",
            over(READINGS, trains_where, depth, SPAN, POST, depth=48)
            | over(("plain", "gpt2"), trains_where, init, SPAN, POST),
        ),
        Claim(
            "It beats PostNorm",
            "lower held-out loss, each at the best of five rates, chosen on the same seeds (`exponent`; plain: `lr`)",
            over(READINGS, less, exponent, SPAN, POST, True) | over(plain, less, lr, SPAN, POST, True),
        ),
        Claim(
            "It beats PreNorm at an equal learning rate",
            "lower held-out loss at 3e-3, 24 blocks, on seeds that chose nothing (`fresh_seeds`); plain and GPT-2's: "
            "`placement_init`; the multiplier, which serves no PreNorm, less PreNorm with `scale-L1`: `depth_factor`",
            over(READINGS, less, fresh, SPAN, PRE, lr=OWN_RATE)
            | over(("plain", "gpt2"), less, init, SPAN, PRE)
            | {MULTIPLIER: less(factor, multiplier, PRE | {"init": "scale-L1"}, depth=24)},
            named="the readings",
        ),
        Claim(
            "It beats PreNorm, each at its own learning rate",
            "the same, each at the best of five rates, chosen on the same seeds (`exponent`; plain: `lr`)",
            over(READINGS, less, exponent, SPAN, PRE, True) | over(plain, less, lr, SPAN, PRE, True),
        ),
        Claim(
            "The same on seeds that chose no rate",
            "SpanNorm at 3e-3 less PreNorm at 1e-2 (`fresh_seeds`)",
            over(READINGS, less, fresh, SPAN | {"lr": OWN_RATE}, PRE | {"lr": 0.01}),
            named="yes",
        ),
        Claim(
            "Without touching the learning rate",
            "lower held-out loss at the rate that is best for PreNorm (`exponent`)",
            {r: less(exponent, SPAN, PRE, init=r, lr=best_of_pre[r]) for r in READINGS},
        ),
        Claim(
            "It bears PreNorm's learning rates",
            "its ceiling, the highest rate at which each of three seeds trains, is not below PreNorm's, 24 blocks "
            "(`ceiling_factor`, `ceiling_plain`; [stability.md](stability.md))",
            bears(sweeps),
        ),
        Claim(
            "It trains as deep as PreNorm",
            "with every seed at 96 blocks and 3e-3, where PreNorm does (`depth`; the multiplier: `depth_factor`)",
            over((*READINGS, "plain"), trains_too, depth, SPAN, PRE, depth=DEEP)
            | over((MULTIPLIER,), trains_too, factor, SPAN, PRE, depth=DEEP),
        ),
        Claim(
            "Its lead does not fall up to 48 blocks",
            "SpanNorm less PreNorm at 48 blocks less the same at 6, at 3e-3, not above zero (`depth`)",
            growth,
        ),
        Claim(
            "Its best learning rate stays over widths",
            f"moves by less than {TRANSFER:g} times a doubling under `everett` (`width`)",
            {"scale-L0.5": drift(width, "width", **everett)},
        ),
        Claim(
            "Its best learning rate stays over depths",
            f"moves by less than {TRANSFER:g} times a doubling under `completep`, a = 1 (`depth_lr`)",
            {"scale-L0.5": drift(depth_lr, "depth", **completep, **{"model.depth_exponent": 1.0})},
        ),
        Claim(
            "It is ahead with greater width",
            "lower held-out loss at width 128, each at its own best rate under `everett` (`width`)",
            {"scale-L0.5": less(width, SPAN, PRE, True, width=128, **everett)},
        ),
        Claim(
            "It is ahead with experts",
            "lower held-out loss with 8 experts at 3e-3 (the demo, one seed)",
            {"scale-L1": less(moe, SPAN, PRE)},
        ),
        Claim(
            "Gradients do not vanish",
            f"at the initial weights the first block's is at least {VANISHED:g} of the last block's with every seed; "
            "PostNorm's beside it (`placement_init`)",
            over(("plain", "gpt2", "scale-L1"), gradient, init, SPAN, POST),
        ),
        Claim(
            "ScaleInit serves PreNorm too (a control)",
            "lower held-out loss than plain PreNorm, each at the best of five rates (`lr`)",
            {"scale-L1": less(lr, {"init": "scale-L1"}, {"init": "plain"}, True, **PRE)},
        ),
        Claim(
            "SiameseNorm is ahead of SpanNorm (its authors)",
            "its held-out loss, from plain weights, lower than SpanNorm's with `scale-L1`, each at the best of three "
            "rates, 24 blocks, 125 steps (`rivals`)",
            {"scale-L1": less(rivals, {"placement": "siamese"}, SPAN, True, **as_published)},
        ),
        *_signal(),
        *_longer(sweeps),
        Claim(
            "It costs what PreNorm costs",
            f"the 95% interval of a step's time over PreNorm's below {COST:g} (two CPU cores; no accelerator yet)",
            {"plain": _cost()},
        ),
    ]


def _signal() -> list[Claim]:
    """Of trained models, one seed each: what is told of them is a number, and no verdict on a collapse."""
    lines = read_records(RECORDS / "signal/trained.jsonl")
    ends = {
        (model["placement"], model["init"]): line
        for line in lines
        if (model := line["config"]["model"]) and line["step"] == max(other["step"] for other in lines)
    }
    found = {}
    for column, init in (("plain", "plain"), ("scale-L1", "scale")):
        span = ends["span", init]
        growth = span["stream_variance"][-1] / span["stream_variance"][0]
        found[column] = Verdict(HOLDS if growth < 2 else FAILS, f"times {growth:.2f}, one seed")
    span, pre = (ends[name, "plain"]["token_correlation"][-1] for name in ("span", "pre"))
    collapse = Verdict(NOT_TOLD, f"plain: {span:.2f}, PreNorm {pre:.2f}, one seed")
    return [
        Claim(
            "The signal's variance is bounded",
            "less than twice as large after the last block as after the first, after 250 steps (signal records)",
            found,
        ),
        Claim(
            "Representations do not collapse",
            "a lower correlation of tokens after the last block than PreNorm's, after training; wants three seeds, and "
            "PreNorm with ScaleInit, which was never measured",
            {"plain": collapse},
        ),
    ]


def _longer(sweeps: Mapping[str, Results]) -> list[Claim]:
    """The comparison with longer runs, as far as they were run."""
    made = []
    serves = PRE | {"init": "scale-L1"}  # the multiplier serves no PreNorm
    for name, test, fixed in (
        ("lengths", "of three rates, 24 blocks, 16,000 steps (`lengths`)", {"training.steps": 16_000}),
        ("rung_s", "rate run, 12 blocks, 20 tokens a parameter (`rung_s`)", {}),
    ):
        verdicts = {}
        if sweep := sweeps.get(name):
            verdicts = over(READINGS, less, sweep, SPAN, PRE, True, **fixed)
            verdicts[MULTIPLIER] = less(sweep, SPAN | {"init": MULTIPLIER}, serves, True, **fixed)
        test = f"lower held-out loss, each at the best {test}"
        made.append(Claim("It beats PreNorm with longer training", test, verdicts, "yes"))
    return made


def _cost() -> Verdict:
    record = json.loads((RECORDS / "throughput/cpu.json").read_text(encoding="utf-8"))
    low, high = record["placements"]["span"]["step_over_pre_interval"]
    word = HOLDS if high < COST else FAILS if low > COST else NOT_TOLD
    return Verdict(word, f"{record['placements']['span']['step_over_pre']:.3f} [{low:.3f}, {high:.3f}]")


# ---- the page -----------------------------------------------------------------------------------

COLUMNS = {"plain": "plain", "gpt2": "GPT-2's", **{r: f"`{r}`" for r in (*READINGS, MULTIPLIER)}}


def regime(rows: Sequence[RunFolder], floor: float) -> str:
    """Tokens a parameter, and held-out bits per byte over a 4-gram's of the best of the runs."""
    bits = [bits for row in rows if (bits := row.reached["bits_per_byte"])]
    if not bits:
        return ""
    each = [row.last_step * (row.tokens_per_step or 0) / row.starts[0]["num_params"] for row in rows]
    return f"{statistics.median(each):.2g}; {number(min(bits) - floor, '+.2f')}"


def short_table(made: list[Claim]) -> str:
    """The verdicts alone."""
    lines = [[claim.text, *(claim.verdicts.get(c, Verdict()).word for c in COLUMNS)] for claim in made]
    return markdown([(head, False) for head in ("claim of SpanNorm", *COLUMNS.values())], lines)


def table(made: list[Claim], floor: float) -> str:
    heads = ("claim", "test", "named before", *COLUMNS.values(), "tokens a parameter; bits over 4-gram")
    lines = [
        [
            *(claim.text, claim.test, claim.named),
            *(str(claim.verdicts.get(column, Verdict())) for column in COLUMNS),
            regime([row for verdict in claim.verdicts.values() for row in verdict.rows], floor),
        ]
        for claim in made
    ]
    return markdown([(head, False) for head in heads], lines)


def write_page(runs: Path, page: Path, readme: Path) -> Path:
    """docs/claims.md, and the verdicts in the README; `runs` holds a folder of run folders for each sweep."""
    sweeps = {folder.name: Results(folder.name, read(folder), runs, "") for folder in sorted(runs.iterdir())}
    sweeps["experts"] = sweeps["demo"].where(**{"model.moe.num_experts": 8})
    floor = json.loads((RECORDS / "floors.json").read_text(encoding="utf-8"))["bits_per_byte"]["fourgram"]
    made = claims(sweeps)
    text = TEMPLATE.read_text(encoding="utf-8").replace("{{ table }}", table(made, floor))
    page.write_text(text, encoding="utf-8")
    before, begin, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    readme.write_text(f"{before}{begin}\n{short_table(made[:TOP])}\n{END}{after}", encoding="utf-8")
    return page
