"""What theory predicts over what is measured, and the signal of runs that stall: the numbers of docs/theory.md.

    python -m experiments.signal_records initial
    python -m experiments.signal_records trained
    python -m experiments.signal_records page

`initial` predicts and measures models before their first step, of 64 different tokens: every placement at 12, 48 and
128 blocks (width 256, plain; the three main ones also with ScaleInit, and with two seeds), four placements with each
activation, and those whose tokens collapse at three widths. `trained` trains runs of the demo with checkpoints from the
first steps on, and measures them. Both write a line of JSON a measurement into experiments/results/signal, and go on
where they were. `page` makes the tables between the marks of docs/theory.md, and the figures beside the records.
"""

import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from experiments.record import append_record, read_records
from spannorm_jax import train
from spannorm_jax.analysis.figures import read_lines
from spannorm_jax.analysis.groups import Settings
from spannorm_jax.command import Parser, run_command
from spannorm_jax.config_file import load, resolve_without_data
from spannorm_jax.errors import UserError, did_you_mean
from spannorm_jax.model.placement import PLACEMENTS
from spannorm_jax.paths import user_path
from spannorm_jax.report.tables import markdown

RECORDS, PAGE = Path("experiments/results/signal"), Path("docs/theory.md")
INITIAL, TRAINED = RECORDS / "initial.jsonl", RECORDS / "trained.jsonl"
DEPTHS, WIDTH, TOKENS = (12, 48, 128), 256, 64
MAIN = ("pre", "post", "span")
BESIDE = (*MAIN, "b2t")  # columns of the activations
COLLAPSING = (("post", "swiglu"), ("post", "relu"), ("span", "relu"))
WIDTHS, WIDTH_SEEDS = (128, 256, 512), 6
ARMS = (("post", "plain"), ("post", "scale"), ("span", "plain"), ("span", "scale"), ("pre", "plain"))
PRODUCTS = ("stream_grad_norm", "skip_path")  # of a factor a block: their mean over seeds is the geometric one
STEPS = (5, 10, 20, 40, 80, 250)
KEPT = (  # of a measurement
    *("time", "command", "git_commit", "versions", "device", "data", "settings", "step", "loss", "entry_variance"),
    *("stream_variance", "attn_variance", "ffn_variance", "token_correlation", "effective_rank", "stream_grad_norm"),
    *("skip_path", "stream_loss_grad_norm", "attn_forward_variance", "ffn_forward_variance", "attn_backward_gain"),
    *("ffn_backward_gain", "block_backward_gain", "angular_distance", "ffn_effective_rank"),
)
_MODEL = ("placement", "init", "variance_exponent", "ffn", "depth", "width")  # kept of its config
DRAWN = ("stream_grad_norm", "token_correlation")
_VERBS = ("initial", "trained", "page")


# ---- measuring ------------------------------------------------------------------------------------------


def _rounded(value: Any) -> Any:
    """Six digits: the rest is rounding, and four fifths of the file."""
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _compact(record: dict[str, Any]) -> dict[str, Any]:
    model = {key: record["config"]["model"][key] for key in _MODEL}
    kept = {key: _rounded(record[key]) for key in KEPT if key in record}
    return kept | {"config": {"model": model, "seed": record["config"]["seed"]}}


class Case(NamedTuple):
    """A model before its first step."""

    placement: str
    init: str
    depth: int
    ffn: str = "swiglu"
    width: int = WIDTH

    @property
    def spec(self) -> str:
        shape = f"depth={self.depth},width={self.width}"
        return f"configs/dense.py:{shape},placement={self.placement},init={self.init}"


def cases() -> Iterator[tuple[Case, int]]:
    """Each model and how many seeds it is measured with, the shallow ones first; some come twice."""
    for depth in DEPTHS:
        for placement in PLACEMENTS:
            yield Case(placement, "plain", depth), 2 if placement in MAIN else 1
        for placement in MAIN:
            yield Case(placement, "scale", depth), 2
    for depth in (24, 64):
        for ffn in ("swiglu", "gelu", "relu"):
            for placement in BESIDE:
                yield Case(placement, "plain", depth, ffn), 1
            for placement in MAIN:
                yield Case(placement, "scale", depth, ffn), 1
    for width in WIDTHS:
        for placement, ffn in COLLAPSING:
            yield Case(placement, "plain", 64, ffn, width), WIDTH_SEEDS


def initial(path: Path, models: Iterator[tuple[Case, int]]) -> None:
    """Predicts and measures at initialisation what `path` lacks."""
    from spannorm_jax.analysis import measure, prediction

    done = {_name(record) for record in read_records(path)}
    for case, seeds in models:
        own = [("model.ffn", case.ffn)]
        if (case, "predicted", 0) not in done:
            cfg = resolve_without_data(load(case.spec, own), platform="cpu").model
            found = prediction.as_dict(cfg, TOKENS, prediction.predict(cfg, TOKENS))
            append_record(path, {key: _rounded(value) for key, value in found.items()})
            done.add((case, "predicted", 0))
        for seed in range(seeds):
            if (case, "measured", seed) in done:
                continue
            settings = Settings("random", TOKENS, 2, 2, only=("forward", "backward"))
            argv = ["--config", case.spec, f"--config.model.ffn={case.ffn}", f"--config.seed={seed}"]
            argv += ["--text=random", f"--tokens={TOKENS}", "--rows=2"]
            record = measure.signal(load(case.spec, [*own, ("seed", str(seed))]), None, None, settings, argv)
            append_record(path, _compact(record))
            done.add((case, "measured", seed))
            print(*case, f"seed {seed}", flush=True)


def trained(path: Path, runs: Path, steps: tuple[int, ...] = STEPS, overrides: tuple[str, ...] = ()) -> None:
    """Trains the arms and measures their checkpoints, what `path` lacks."""
    from spannorm_jax.analysis import measure
    from spannorm_jax.run.folder import read_config

    done = {(*_name(record)[0][:2], record["step"]) for record in read_records(path)}
    for placement, init in ARMS:
        left = [step for step in (0, *steps) if (placement, init, step) not in done]
        if not left:
            continue
        workdir = runs / f"{placement}-{init}"
        spec = f"configs/dense.py:tiny,placement={placement},init={init}"
        saved = ("--config.checkpoint.every_steps=5", "--config.checkpoint.keep_every=5")
        argv = ["--config", spec, f"--config.training.steps={max(steps)}", *saved, *overrides]
        if code := train.main([*argv, "--workdir", str(workdir)]):
            raise UserError(f"run {workdir} ended with {code}; start the command again to go on")
        for step in left:
            settings = Settings(only=("forward", "backward"), rows=2)
            of_run = ["--workdir", str(workdir), f"--step={step}"] if step else ["--config", spec]
            config = read_config(workdir)
            record = measure.signal(config, workdir if step else None, step or None, settings, of_run)
            append_record(path, _compact(record))
            print(placement, init, f"step {step}", flush=True)


def _name(record: dict[str, Any]) -> tuple[Case, str, int]:
    """The model, `predicted` or `measured`, and the seed."""
    measured = "settings" in record
    model = record["config"]["model"] if measured else record
    case = Case(*(model[field] for field in Case._fields))
    return case, "measured" if measured else "predicted", record["config"]["seed"] if measured else 0


# ---- the page -------------------------------------------------------------------------------------------


class Values:
    """A number of each record, by model."""

    def __init__(self, records: list[dict[str, Any]], key: str, block: int):
        self.mean = statistics.geometric_mean if key in PRODUCTS else statistics.fmean
        self.of: dict[tuple[Case, str], list[float]] = {}
        for record in records:
            self.of.setdefault(_name(record)[:2], []).append(record[key][block])

    def cases(self) -> list[Case]:
        return list(dict.fromkeys(case for case, _ in self.of))

    def cell(self, case: Case, form: str) -> str:
        """Predicted / measured, the mean over seeds; a dash for what there is no record of."""
        both = (self.value(case, kind) for kind in ("predicted", "measured"))
        return " / ".join("–" if value is None else format(value, form) for value in both)

    def value(self, case: Case, kind: str = "measured") -> float | None:
        values = self.of.get((case, kind))
        return self.mean(values) if values else None

    def ratios(self, case: Case) -> list[float]:
        """Measured over predicted, a seed each."""
        predicted = self.of.get((case, "predicted"))
        return [value / predicted[0] for value in self.of.get((case, "measured"), [])] if predicted else []


def _table(header: list[str], lines: list[list[str]]) -> str:
    return markdown([(name, False) for name in header], lines)


def initial_table(records: list[dict[str, Any]], key: str, block: int, form: str) -> str:
    """A line a placement and initialisation, a column a depth of DEPTHS."""
    values = Values(records, key, block)
    own = [case for case in values.cases() if (case.ffn, case.width) == ("swiglu", WIDTH) and case.depth in DEPTHS]
    depths = sorted({case.depth for case in own})
    lines = [
        [f"`{placement}`", f"`{init}`", *(values.cell(Case(placement, init, depth), form) for depth in depths)]
        for placement, init in dict.fromkeys(case[:2] for case in own)
    ]
    return _table(["placement", "init", *(f"{depth} blocks" for depth in depths)], lines)


def activations_table(records: list[dict[str, Any]], key: str, block: int, form: str) -> str:
    """A line an activation, depth and initialisation, a column a placement of BESIDE."""
    values = Values(records, key, block)
    own = [case for case in values.cases() if case.depth in (24, 64) and case.width == WIDTH]
    lines = [
        [ffn, str(depth), f"`{init}`"]
        + [values.cell(case, form) if case in own else "" for case in (Case(p, init, depth, ffn) for p in BESIDE)]
        for ffn, depth, init in dict.fromkeys((case.ffn, case.depth, case.init) for case in own)
    ]
    return _table(["ffn", "blocks", "init", *(f"`{placement}`" for placement in BESIDE)], lines)


def widths_table(records: list[dict[str, Any]], key: str, block: int) -> str:
    """A line a collapsing model, a column a width: measured over predicted, geometric mean and range over seeds."""
    values = Values(records, key, block)
    lines = [
        [f"`{placement}`", ffn, *(_spread(values.ratios(Case(placement, "plain", 64, ffn, width))) for width in WIDTHS)]
        for placement, ffn in COLLAPSING
    ]
    return _table(["placement", "ffn", *(f"width {width}" for width in WIDTHS)], lines)


def _spread(ratios: list[float]) -> str:
    if not ratios:
        return "–"
    mean = statistics.geometric_mean(ratios)
    return f"{mean:.2f} ({min(ratios):.2f} to {max(ratios):.2f}, n = {len(ratios)})"


def trained_table(records: list[dict[str, Any]]) -> str:
    """A line an arm and step: f, b and token correlation of the middle block, and the gradient of the stream, first
    block over last, by the formula of docs/signal.md and measured."""
    header = ["placement", "init", "step", "loss", "f", "b", "correlation", "gradient by the formula", "measured"]
    lines = []
    for record in records:
        placement, init = _name(record)[0][:2]
        middle = len(record["stream_variance"]) // 2
        values = [record["loss"], record["ffn_forward_variance"][middle], record["ffn_backward_gain"][middle]]
        values += [record["token_correlation"][middle]]
        formula = "" if placement == "pre" else f"{formed(record, placement):.2g}"
        cells = [f"`{placement}`", f"`{init}`", str(record["step"]), *(f"{value:.3g}" for value in values), formula]
        lines.append([*cells, f"{record['stream_loss_grad_norm'][0]:.2g}"])
    return _table(header, lines)


def formed(record: dict[str, Any], placement: str) -> float:
    """The root of the product over all blocks but the last, as `stream_grad_norm` has it."""
    energy = 1.0
    keys = ("attn_forward_variance", "attn_backward_gain", "ffn_forward_variance", "ffn_backward_gain")
    for fa, ba, ff, bf in list(zip(*(record[key] for key in keys), strict=True))[:-1]:
        attn = (1 + ba) / (1 + fa)
        energy *= attn * (1 + bf) / (1 + ff) if placement == "post" else (1 + bf * attn) / (1 + ff)
    return energy**0.5


def _sections() -> Iterator[tuple[str, str]]:
    """(mark, text) of what there are records for."""
    if INITIAL.exists():
        records = read_records(INITIAL)
        yield "gradient", initial_table(records, "stream_grad_norm", 0, ".3g")
        yield "skip", initial_table(records, "skip_path", 0, ".2g")
        yield "correlation", initial_table(records, "token_correlation", -1, ".3f")
        yield "rank", initial_table(records, "effective_rank", -1, ".3g")
        yield "variance", initial_table(records, "stream_variance", -1, ".3g")
        yield "activations", activations_table(records, "stream_grad_norm", 0, ".3g")
        yield "collapse", activations_table(records, "token_correlation", -1, ".3f")
        yield "widths", widths_table(records, "stream_grad_norm", 0)
    if TRAINED.exists():
        yield "trained", trained_table(read_records(TRAINED))


def write_page() -> None:
    """Fills docs/theory.md between `<!-- NAME: made -->` and `<!-- end -->`, and draws the figures."""
    from spannorm_jax.analysis.drawing import draw

    text = PAGE.read_text(encoding="utf-8")
    for mark, made in _sections():
        pattern = rf"(<!-- {mark}: made by [^>]*-->\n).*?(<!-- end -->)"
        text, count = re.subn(pattern, lambda m, made=made: f"{m[1]}\n{made}\n\n{m[2]}", text, flags=re.DOTALL)  # type: ignore[misc]
        if count != 1:
            raise UserError(
                f"{PAGE} has {count} places for {mark!r}; write one <!-- {mark}: made by ... --> and <!-- end -->"
            )
    PAGE.write_text(text, encoding="utf-8")
    if INITIAL.exists():
        lines = [record for record in read_lines(INITIAL) if _drawn(record["about"])]
        for main, folder in ((True, RECORDS), (False, RECORDS / "rivals")):
            own = [record for record in lines if (record["about"]["placement"] in MAIN) == main]
            for path in draw([{key: record[key] for key in ("about", *DRAWN)} for record in own], folder):
                path.unlink()  # the PNG beside it is what a document shows


def _drawn(about: dict[str, Any]) -> bool:
    return about["depth"] in DEPTHS and (about["init"], about["ffn"], about["width"]) == ("plain", "swiglu", WIDTH)


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m experiments.signal_records", description=__doc__)
    parser.add_argument("verb", metavar="VERB", help=" | ".join(_VERBS))
    parser.add_argument("--runs", type=user_path, default=Path("runs/signal"), help="where `trained` trains")
    args = parser.parse_args(argv)
    if args.verb not in _VERBS:
        raise UserError(f"unknown verb {args.verb!r}; {did_you_mean(args.verb, _VERBS)}")
    if args.verb == "initial":
        initial(INITIAL, cases())
    elif args.verb == "trained":
        trained(TRAINED, args.runs)
    else:
        write_page()
    return 0


if __name__ == "__main__":
    run_command(main, lasting=True)
