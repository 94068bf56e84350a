"""Results -> a table, two figures and one HTML page that needs nothing beside it.

    python -m spannorm_jax.report runs/sweep

Reads run folders only. The same folders always give the same bytes.
"""

import base64
import json
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from spannorm_jax.config import is_runtime
from spannorm_jax.errors import UserError, visible
from spannorm_jax.report import figures
from spannorm_jax.report.folders import find_runs
from spannorm_jax.report.rows import STALL_MARGIN, Row, differing_keys, fact, over_seeds, summarise
from spannorm_jax.report.tables import NUMERIC, notices, run_name, seeds_line, table_cells

TITLE = "Norm placement and initialisation"

_DEFINITIONS = {
    "placement": "Where each block puts its norms (config key <code>model.placement</code>).",
    "init": "How the weights are initialised (<code>model.init</code>).",
    "also differs": "Other config keys in which these runs differ from one another.",
    "seeds": "Runs of this setting that the means are taken over, one per seed; “2 of 3” when the "
    "third diverged or is unfinished. ± is the sample standard deviation over seeds (n − 1).",
    "train loss": "Cross-entropy on the training data in nats per token: the mean over the last 10% "
    "of the steps taken. The loss of a step is that of the weights before its update. A run that "
    "diverged has none.",
    "held-out bits/byte": "Cross-entropy on the held-out split in bits per byte of text, from the "
    "newest evaluation at the highest step.",
    "tokens/s": "Training tokens per second over all devices: the median over the steps after the "
    "first 5, which hold compilation.",
    "outcome": "<b>trained</b>: finished, and not stalled. "
    f"<b>stalled</b>: finished, but the train loss is not at least {STALL_MARGIN:.0%} below the "
    "unigram entropy of the training data, so the model has learnt little more than token "
    "frequencies. <b>diverged</b>: a loss or gradient became non-finite at that step. "
    "<b>unfinished</b>: still running, or stopped early.",
    "unigram entropy": "Of the training split’s token frequencies, in nats per token: the loss of "
    "the best model that ignores context.",
}


# ---- the page ---------------------------------------------------------------------------------

_CSS = """
:root { color-scheme: light; --ink: #1f2328; --soft: #59636e; --rule: #dfe3e8; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 62rem; background: #fff;
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .8rem; }
.lead, figcaption, .small { color: var(--soft); }
.small, figcaption { font-size: .9rem; }
.notices { list-style: none; margin: 1.4rem 0 0; padding: 0; }
.notices li { margin: .5rem 0; padding: .55rem .9rem; border-left: 4px solid #9aa4ae;
  background: #f5f6f8; overflow-wrap: anywhere; }
.notices .warning { border-color: #c24e00; background: #fff4ea; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
.wide { white-space: normal; min-width: 14rem; }
th, td { padding: .5rem .8rem; text-align: left; white-space: nowrap; }
th { font-size: .85rem; color: var(--soft); border-bottom: 2px solid var(--rule); }
td { border-bottom: 1px solid var(--rule); }
tbody tr.first td { border-top: 2px solid var(--rule); }
.number { text-align: right; }
.diverged, .stalled { color: #a33b00; font-weight: 600; }
.unfinished { color: var(--soft); font-style: italic; }
svg { vertical-align: middle; margin-right: .5rem; }
figure { margin: 2rem 0 0; }
img { display: block; width: 100%; min-width: 40rem; height: auto; }
dl { margin: 0; display: grid; grid-template-columns: minmax(8rem, max-content) 1fr;
  gap: .35rem 1.2rem; }
dt { font-weight: 600; }
dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font: .87em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { margin: 0; padding: .6rem .8rem; background: #f5f6f8; white-space: pre-wrap;
  overflow-wrap: anywhere; border-radius: 4px; }
details { border-top: 1px solid var(--rule); padding: .55rem 0; }
details dl { padding: .6rem 0 .8rem; }
summary { cursor: pointer; }
@media (max-width: 36rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .6rem; }
  body { padding-top: 1.5rem; } }
"""


def _html_table(rows: Sequence[Row]) -> str:
    header, body = table_cells(rows, missing="–")
    groups = [group for group, _ in body]
    number = [' class="number"' if name in NUMERIC else "" for name in header]
    heads = "".join(f"<th{n}>{escape(h)}</th>" for n, h in zip(number, header, strict=True))
    lines = []
    for i, (group, cells) in enumerate(body):
        html = [f"<td{n}>{escape(c)}</td>" for n, c in zip(number, cells, strict=True)]
        html = [
            f'<td class="wide">{escape(c)}</td>' if n == "also differs" else h
            for h, c, n in zip(html, cells, header, strict=True)
        ]
        html[0] = f"<td>{figures.svg_line(group, groups)}{escape(cells[0])}</td>"
        worst = {row.outcome.kind for row in group.rows} - {"trained"}
        kind = next((k for k in ("diverged", "stalled", "unfinished") if k in worst), "trained")
        html[-1] = f'<td class="{kind}">{escape(cells[-1])}</td>'
        first = i > 0 and group.placement != groups[i - 1].placement
        lines.append(f"<tr{' class=first' if first else ''}>{''.join(html)}</tr>")
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _definitions(names: Sequence[str]) -> str:
    return "".join(f"<dt>{escape(n)}</dt><dd>{_DEFINITIONS[n]}</dd>" for n in names)


def _facts(items: Mapping[str, object]) -> str:
    return "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in items.items())


def _run_details(row: Row, root: Path, is_open: bool) -> str:
    run = row.run
    commands = list(dict.fromkeys(s["command"] for s in run.starts if s.get("command")))
    ended = str(row.outcome)
    if run.diverged and run.diverged.get("where"):
        ended += f", {run.diverged['where']}"
    facts = {
        "folder": os.path.relpath(run.folder, root),
        "seed": run.seed,
        "steps": f"{run.last_step} of {run.steps}",
        "outcome": ended,
        "data fingerprint": run.fingerprint or "not recorded",
        "data": fact(run, "data"),
        "versions": fact(run, "versions"),
        "device": fact(run, "device"),
        "devices": fact(run, "num_devices"),
        "mesh": fact(run, "mesh"),
        "parameters": fact(run, "num_params"),
        "FLOPs per token": fact(run, "flops_per_token"),
        "git commit": fact(run, "git_commit"),
        "started": fact(run, "time"),
    }
    command = escape("\n".join(commands)) or "not recorded"
    return (
        f"<details{' open' * is_open}><summary>{escape(run_name(row))}</summary><dl>"
        f"<dt>command</dt><dd><pre>{command}</pre></dd>{_facts(facts)}</dl></details>"
    )


def _figure(path: Path | None, title: str, caption: str) -> str:
    if path is None:
        return f'<p class="small">{title}: no run recorded it.</p>'
    image = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><div class="scroll"><img alt="{title}" src="data:image/png;base64,{image}"></div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _lead(rows: Sequence[Row]) -> str:
    """What the runs have in common, in a line."""
    options = [row.run.options for row in rows]
    parts = [f"{len(rows)} run{'s'[: len(rows) != 1]}", seeds_line(rows)]
    for key, form in {
        "model.depth": "{} blocks",
        "model.width": "width {}",
        "training.steps": "{} steps",
        "training.batch_size": "batches of {}",
        "data.seq_len": "sequences of {} tokens",
        "data.dataset": "{}",
    }.items():
        values = {str(o.get(key)) for o in options}
        if len(values) == 1 and None not in (o.get(key) for o in options):
            parts.append(form.format(*values))
    prints = {row.run.fingerprint for row in rows}
    if len(prints) == 1 and prints != {""}:
        parts.append(f"fingerprint {prints.pop()}")
    return escape(" · ".join(parts))


def _page(
    rows: Sequence[Row], title: str, root: Path, drawn: Sequence[Path | None], said: Sequence[tuple[str, str]]
) -> str:
    groups = over_seeds(rows)
    several = any(len(group.counted) > 1 for group in groups)
    header, _ = table_cells(rows, missing="–")
    items = "".join(f'<li class="{kind}">{escape(text)}</li>' for kind, text in said)
    levels = figures.entropies(rows)
    below = [
        f"Stalled: above {(1 - STALL_MARGIN) * e:.3f} nats/token, {STALL_MARGIN:.0%} below the "
        f"unigram entropy of {e:.3f}."
        for e in levels
    ]
    if len({row.seed for row in rows}) == 1:
        below.append("One seed: no spread is known, so small differences may be chance.")
    band = " The band is one sample standard deviation over seeds." if several else ""
    alone = "A thin line is a seed that the mean leaves out. " if several else ""
    runs = [row.run for row in rows]
    differing = set(differing_keys(runs))
    common = {
        key: json.dumps(value).strip('"')
        for key, value in runs[0].options.items()
        if key not in differing and not is_runtime(key)
        and len({json.dumps(r.options.get(key)) for r in runs}) == 1
    }  # fmt: skip
    loss = _figure(
        drawn[0],
        "Training loss by step",
        "Training loss by step. Smoothed by a centred running mean over "
        f"{figures.SMOOTHING:.0%} of the logged steps, narrower at both ends. Dashed grey: the "
        "unigram entropy. The number beside a name is its train loss in the table. A cross marks "
        f"where a run diverged. {alone}Curves may leave the top of the figure.{band}",
    )
    grads = _figure(
        drawn[1],
        "Gradient norm of each block",
        "Norm of the loss gradient with respect to each block’s weights, block 0 nearest the input. "
        "Left: at the initial weights. Right: at the last step that recorded it, named where that "
        "is not the run’s last."
        + (" Over seeds: the geometric mean; the band is one deviation of the logarithm." * several),
    )
    details = "".join(_run_details(row, root, len(rows) == 1) for g in groups for row in g.rows)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_CSS}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p class="lead">{_lead(rows)}</p>
{f'<ul class="notices">{items}</ul>' if items else ""}
<h2>Results</h2>
{_html_table(rows)}
<p class="small">{" ".join(below)}</p>
{loss}
{grads}
<h2>What the columns mean</h2>
<dl>{_definitions([*header, "unigram entropy"])}</dl>
<h2>Reproduce</h2>
{details}
<details><summary>Config common to all runs</summary><dl>{_facts(common)}</dl></details>
</body>
</html>
"""


def write_report(root: str | os.PathLike[str], out_dir: str | os.PathLike[str], title: str = TITLE) -> Path:
    """Writes report.html, loss.png and block_grad_norm.png for the runs below `root`.

    A figure that no run has numbers for is not written. Returns the page's path.

    Raises:
      UserError: there is nothing to report, a run's folder is damaged, or `out_dir` cannot be made.
    """
    rows, said = read_rows(Path(root))
    return write_page(rows, said, Path(root), Path(out_dir), title)


def read_rows(root: Path) -> tuple[list[Row], list[tuple[str, str]]]:
    """The rows of the runs below `root`, and the notices that go with them. Raises UserError as `find_runs`."""
    passed_over: list[str] = []
    rows = [summarise(run) for run in find_runs(root, passed_over.append)]
    return rows, notices(rows, passed_over)


def write_page(rows: Sequence[Row], said: Sequence[tuple[str, str]], root: Path, out_dir: Path, title: str) -> Path:
    """Writes the page of `rows` and its figures into `out_dir`. Raises UserError if that cannot be made."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out_dir} cannot be made: {error.strerror}; choose another --out") from error
    groups = over_seeds(rows)
    drawn: list[Path | None] = []
    for name, draw in {
        "loss.png": figures.plot_losses,
        "block_grad_norm.png": figures.plot_block_grad_norms,
    }.items():
        (out_dir / name).unlink(missing_ok=True)  # an older report's
        drawn.append(draw(groups, out_dir / name))
    page = out_dir / "report.html"
    page.write_text(visible(_page(rows, title, root, drawn, said)), encoding="utf-8")
    return page
