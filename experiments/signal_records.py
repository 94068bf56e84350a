"""What theory predicts over what is measured, and the signal of runs that stall: the numbers of docs/theory.md.

    python -m experiments.signal_records initial
    python -m experiments.signal_records trained
    python -m experiments.signal_records page

`initial` predicts and measures every placement at 12, 48 and 128 blocks (width 256, 64 different tokens, plain
initialisation; the three main ones also with ScaleInit, and with two seeds). `trained` trains runs of the demo with
checkpoints from the first steps on, and measures them. Both write a line of JSON a measurement into
experiments/results/signal, and go on where they were. `page` makes the tables between the marks of docs/theory.md, and
the figures beside the records.
"""

import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spannorm_jax import train
from spannorm_jax.analysis.figures import read_lines
from spannorm_jax.analysis.groups import Settings
from spannorm_jax.command import Parser, run_command
from spannorm_jax.config_file import load, resolve_without_data
from spannorm_jax.errors import UserError, did_you_mean
from spannorm_jax.model.placement import PLACEMENTS
from spannorm_jax.paths import user_path
from spannorm_jax.report import markdown

RECORDS, PAGE = Path("experiments/results/signal"), Path("docs/theory.md")
INITIAL, TRAINED = RECORDS / "initial.jsonl", RECORDS / "trained.jsonl"
DEPTHS, WIDTH, TOKENS = (12, 48, 128), 256, 64
MAIN = ("pre", "post", "span")
ARMS = (("post", "plain"), ("post", "scale"), ("span", "plain"), ("span", "scale"), ("pre", "plain"))
STEPS = (5, 10, 20, 40, 80, 250)
KEPT = (  # of a measurement
    *("time", "command", "git_commit", "versions", "device", "data", "settings", "step", "loss", "entry_variance"),
    *("stream_variance", "attn_variance", "ffn_variance", "token_correlation", "effective_rank", "stream_grad_norm"),
    *("skip_path", "stream_loss_grad_norm", "attn_forward_variance", "ffn_forward_variance", "attn_backward_gain"),
    *("ffn_backward_gain", "block_backward_gain", "angular_distance", "ffn_effective_rank"),
)
DRAWN = ("stream_grad_norm", "token_correlation")
_VERBS = ("initial", "trained", "page")


# ---- measuring ------------------------------------------------------------------------------------------


def _append(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _done(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _rounded(value: Any) -> Any:
    """Six digits: the rest is rounding, and four fifths of the file."""
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _compact(record: dict[str, Any]) -> dict[str, Any]:
    model = {key: record["config"]["model"][key] for key in ("placement", "init", "ffn", "depth", "width")}
    kept = {key: _rounded(record[key]) for key in KEPT if key in record}
    return kept | {"config": {"model": model, "seed": record["config"]["seed"]}}


def initial(path: Path, placements: tuple[str, ...] = tuple(PLACEMENTS), depths: tuple[int, ...] = DEPTHS) -> None:
    """Predicts and measures at initialisation what `path` lacks, the shallow models first."""
    from spannorm_jax.analysis import measure, prediction

    done = {_name(record) for record in _done(path)}
    for depth in depths:
        for init in ("plain", "scale"):
            for placement in placements if init == "plain" else [p for p in MAIN if p in placements]:
                about = (placement, init, depth)
                spec = f"configs/dense.py:depth={depth},width={WIDTH},placement={placement},init={init}"
                config = load(spec)
                if (*about, "predicted", 0) not in done:
                    cfg = resolve_without_data(config, platform="cpu").model
                    found = prediction.as_dict(cfg, TOKENS, prediction.predict(cfg, TOKENS))
                    _append(path, {key: _rounded(value) for key, value in found.items()})
                for seed in (0, 1) if placement in MAIN else (0,):
                    if (*about, "measured", seed) in done:
                        continue
                    settings = Settings("random", TOKENS, 2, 2, only=("forward", "backward"))
                    config = load(spec, [("seed", str(seed))])
                    argv = ["--config", spec, f"--config.seed={seed}", f"--text=random --tokens={TOKENS}", "--rows=2"]
                    _append(path, _compact(measure.signal(config, None, None, settings, argv)))
                    print(*about, f"seed {seed}", flush=True)


def trained(path: Path, runs: Path, steps: tuple[int, ...] = STEPS, overrides: tuple[str, ...] = ()) -> None:
    """Trains the arms and measures their checkpoints, what `path` lacks."""
    from spannorm_jax.analysis import measure
    from spannorm_jax.run.folder import read_config

    done = {(*_name(record)[:2], record["step"]) for record in _done(path)}
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
            _append(path, _compact(record))
            print(placement, init, f"step {step}", flush=True)


def _name(record: dict[str, Any]) -> tuple[Any, ...]:
    measured = "settings" in record
    model = record["config"]["model"] if measured else record
    seed = record["config"]["seed"] if measured else 0
    return (model["placement"], model["init"], model["depth"], "measured" if measured else "predicted", seed)


# ---- the page -------------------------------------------------------------------------------------------


def initial_table(records: list[dict[str, Any]], key: str, block: int, form: str) -> str:
    """A line a placement and initialisation, predicted / measured a depth; the measured is the mean over seeds."""
    found: dict[tuple[Any, ...], list[float]] = {}
    for record in records:
        found.setdefault(_name(record)[:4], []).append(record[key][block])
    depths = sorted({name[2] for name in found})
    lines = []
    for placement, init in dict.fromkeys(name[:2] for name in found):
        cells = []
        for depth in depths:
            both = [found.get((placement, init, depth, kind)) for kind in ("predicted", "measured")]
            cells.append(" / ".join(format(statistics.fmean(values), form) if values else "–" for values in both))
        lines.append([f"`{placement}`", f"`{init}`", *cells])
    header = ["placement", "init", *(f"{depth} blocks" for depth in depths)]
    return markdown.table([(name, False) for name in header], lines)


def trained_table(records: list[dict[str, Any]]) -> str:
    """A line an arm and step: f, b and token correlation of the middle block, and the gradient of the stream, first
    block over last, by the formula of docs/signal.md and measured."""
    header = ["placement", "init", "step", "loss", "f", "b", "correlation", "gradient by the formula", "measured"]
    lines = []
    for record in records:
        placement, init = _name(record)[:2]
        middle = len(record["stream_variance"]) // 2
        values = [record["loss"], record["ffn_forward_variance"][middle], record["ffn_backward_gain"][middle]]
        values += [record["token_correlation"][middle]]
        formed = "" if placement == "pre" else f"{_formed(record, placement):.2g}"
        cells = [f"`{placement}`", f"`{init}`", str(record["step"]), *(f"{value:.3g}" for value in values), formed]
        lines.append([*cells, f"{record['stream_loss_grad_norm'][0]:.2g}"])
    return markdown.table([(name, False) for name in header], lines)


def _formed(record: dict[str, Any], placement: str) -> float:
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
        records = _done(INITIAL)
        yield "gradient", initial_table(records, "stream_grad_norm", 0, ".3g")
        yield "correlation", initial_table(records, "token_correlation", -1, ".3f")
        yield "variance", initial_table(records, "stream_variance", -1, ".3g")
    if TRAINED.exists():
        yield "trained", trained_table(_done(TRAINED))


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
        lines = [r for r in read_lines(INITIAL) if r["about"]["placement"] in MAIN and r["about"]["init"] == "plain"]
        for path in draw([{key: r[key] for key in ("about", *DRAWN)} for r in lines], RECORDS):
            path.unlink()  # the PNG beside it is what a document shows


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m experiments.signal_records", description=__doc__)
    parser.add_argument("verb", metavar="VERB", help=" | ".join(_VERBS))
    parser.add_argument("--runs", type=user_path, default=Path("runs/signal"), help="where `trained` trains")
    args = parser.parse_args(argv)
    if args.verb not in _VERBS:
        raise UserError(f"unknown verb {args.verb!r}; {did_you_mean(args.verb, _VERBS)}")
    if args.verb == "initial":
        initial(INITIAL)
    elif args.verb == "trained":
        trained(TRAINED, args.runs)
    else:
        write_page()
    return 0


if __name__ == "__main__":
    run_command(main, lasting=True)
