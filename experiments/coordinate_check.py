"""Coordinate check: do activations, and what updates change of them, keep their size when width and depth grow?

    python -m experiments.coordinate_check --config configs/dense.py:tiny,placement=pre --out runs/coordinates

Models of each width (at --at_depth blocks) and of each depth (at --at_width) take --steps updates at a constant rate,
from several seeds, under each parametrisation, whose base is the least width and depth. Of each the root mean square of
the branches' outputs, of what the head reads and of the logits is taken on one batch that is not trained on, and that
of their change since the start (Yang et al. 2022, arXiv 2203.03466, appendix D.1; of depth: Dey et al. 2025, arXiv
2505.01618, figure 3). The slope of log size over log width, or log depth, is 0 where nothing grows or vanishes.

A parametrisation is held to what it promises: `mup` and `everett` to widths, `completep` to both, `standard` to
nothing. Exit code 1 if a slope of those, after the last update, is beyond --bound. Known exception: muP's logits fall
as m^-1/2 until they are learnt, and with them what first updates change of them: they are held to not growing.

OUT gets record.json (every number), table.md and figure.svg, figure.png. `--judge RECORD` makes table and figure again,
and judges by another bound.
"""

import argparse
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.record import about, save_record
from spannorm_jax.command import Parser, run_command
from spannorm_jax.config import Config, replace, to_dict
from spannorm_jax.config_file import load, split_overrides
from spannorm_jax.data.loader import TrainLoader
from spannorm_jax.data.open import OpenData, open_data
from spannorm_jax.durable import write_text
from spannorm_jax.errors import UserError, did_you_mean, one_line
from spannorm_jax.model.block import Block
from spannorm_jax.model.decoder import Decoder
from spannorm_jax.model.definition import define
from spannorm_jax.model.parametrisation import PARAMETRISATIONS
from spannorm_jax.parallel.mesh import make_mesh
from spannorm_jax.parallel.platform import start_jax
from spannorm_jax.paths import user_path
from spannorm_jax.report.tables import markdown
from spannorm_jax.resolution import fill_sizes
from spannorm_jax.training.numbers import numbers_of, on_devices
from spannorm_jax.training.step import make_program
from spannorm_jax.validation import validate

SITES = ("attn", "ffn", "features", "logits")  # branches, what the head reads, what it says
STEADY = ("attn", "ffn", "features", "change of attn", "change of ffn", "change of features")  # neither grow nor fall
AXES = ("width", "depth")
_ROWS = 2  # of the batch that is looked at, at most

Sizes = dict[str, list[float]]  # what -> after each update, from 0


def activations(decoder: Decoder, tokens_BxT: Array) -> dict[str, Array]:
    """SITES of a model: branches' outputs before any multiplier (L, B, T, D), features (B, T, D), logits (B, T, V)."""

    def step(block: Block, stream: Any, layer: Array, angles: Any, _: None) -> tuple[Any, dict[str, Array], Any]:
        seen: dict[str, Array] = {}

        def attn(x: Array) -> Array:
            seen["attn"] = block.attn(x, angles)
            return seen["attn"]

        def ffn(x: Array) -> tuple[Array, Any]:
            seen["ffn"], stats = block.feed_forward(x)
            return seen["ffn"], stats

        stream, stats = block(stream, layer, attn, ffn)
        return stream, seen, stats

    features, _, branches, _ = decoder.run(tokens_BxT, step)
    return branches | {"features": features, "logits": decoder.logits(features)}


def measure(config: Config, data: OpenData, seeds: int, steps: int) -> list[Sizes]:
    """Sizes of a resolved config's model after 0, 1, ... updates, for each seed."""
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    model = define(config.model, config.execution)
    program, found = make_program(config, model, mesh), []
    looked_at = jax.jit(lambda params, model_state, tokens: activations(model.bind(params, model_state), tokens))
    with jax.set_mesh(mesh):
        numbers = on_devices(numbers_of(config), mesh)
        for seed in range(seeds):
            loader = TrainLoader(data.train, config.data.seq_len, config.training.batch_size, seed)
            batches = [program.put({"tokens": loader.rows(i)}) for i in range(1, steps + 2)]
            tokens = batches[-1]["tokens"][:_ROWS, :-1]
            state = program.init(seed)
            first = looked_at(state.params, state.model_state, tokens)
            sizes: Sizes = {name: [] for site in SITES for name in (site, f"change of {site}")}
            for update in range(steps + 1):
                now = looked_at(state.params, state.model_state, tokens)
                for name, (size, change) in jax.device_get(_sizes(now, first)).items():
                    sizes[name].append(float(size))
                    sizes[f"change of {name}"].append(float(change))
                if update < steps:
                    state, _ = program.train(state, batches[update], numbers)
            found.append(sizes)
    return found


@jax.jit
def _sizes(now: dict[str, Array], first: dict[str, Array]) -> dict[str, tuple[Array, Array]]:
    def size(x: Array) -> Array:
        return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))

    return {name: (size(x), size(x - first[name])) for name, x in now.items()}


def at(base: Config, sizes: dict[str, int], least: dict[str, int], parametrisation: str) -> Config:
    """The config of a width and depth. Heads keep their size, and the rate its peak from the first update on."""
    head_dim = base.model.width // base.model.num_heads
    config = fill_sizes(
        replace(
            base,
            model__width=sizes["width"],
            model__depth=sizes["depth"],
            model__num_heads=max(1, sizes["width"] // head_dim),
            model__num_kv_heads=0,
            model__ffn_dim=0,
            model__parametrisation=parametrisation,
            model__base_width=least["width"],
            model__base_depth=least["depth"],
            training__steps=10**6,
            training__tokens=0,
            optim__warmup_fraction=0.0,
        )
    )
    validate(config)
    return config


def slopes(sizes: Sequence[int], found: Sequence[Sequence[Sizes]], name: str, update: int) -> list[float]:
    """Least squares slope of log size over log width or depth, of each seed; `found` is of each size, then seed."""
    x = [math.log(size) for size in sizes]
    by_seed = zip(*([math.log(max(s[name][update], 1e-30)) for s in of_size] for of_size in found), strict=True)
    return [float(np.polyfit(x, y, 1)[0]) for y in by_seed]


def table(results: list[dict[str, Any]], bound: float) -> tuple[list[str], int]:
    """Lines of Markdown, one a slope after the last update, and how many of those that are promised are beyond."""
    heads = ("axis", "parametrisation", "of", "slope (mean ± sd of seeds)", "promised")
    lines, failed = [], 0
    for result in results:
        for name, by_update in result["slopes"].items():
            last = by_update[-1]
            if not last:
                continue
            mean, spread = float(np.mean(last)), float(np.std(last, ddof=1)) if len(last) > 1 else 0.0
            least = -bound if name in STEADY else -math.inf
            beyond = result["promised"] and not least <= mean <= bound
            failed += beyond
            promise = "no" if not result["promised"] else f"broken (bound {bound})" if beyond else "kept"
            lines.append([result["axis"], result["parametrisation"], name, f"{mean:+.3f} ± {spread:.3f}", promise])
    return markdown([(head, False) for head in heads], lines).splitlines(), failed


def draw(results: list[dict[str, Any]], out: Path) -> None:
    """Change against width and depth, a line an update, a panel for each parametrisation and site."""
    import vl_convert

    from spannorm_jax.report.looks import alt

    rows = [
        {"panel": f"{r['axis']}, {r['parametrisation']}", "site": name.removeprefix("change of "), "size": size}
        | {"update": update, "change": float(np.exp(np.mean(np.log([max(s[name][update], 1e-30) for s in seeds]))))}
        for r in results
        for size, seeds in zip(r["sizes"], r["found"], strict=True)
        for name in (f"change of {site}" for site in SITES)
        for update in range(1, len(seeds[0][name]))
    ]
    panels, size = list(dict.fromkeys(row["panel"] for row in rows)), alt.Scale(type="log", base=2, nice=False)
    chart = (
        alt.Chart(alt.Data(values=rows), width=110, height=90)
        .mark_line(point={"size": 12}, strokeWidth=1.2)
        .encode(
            x=alt.X("size:Q", scale=size, title="width or depth"),
            y=alt.Y("change:Q", scale=alt.Scale(type="log"), title="change since the start"),
            color=alt.Color("update:Q", scale=alt.Scale(scheme="viridis"), title="update"),
            detail="update:N",
            row=alt.Row("panel:N", sort=panels, title=None, header=alt.Header(labelAngle=0, labelAlign="left")),
            column=alt.Column("site:N", sort=list(SITES), title=None),
        )
        .resolve_scale(x="independent", y="independent")
    )
    svg = vl_convert.vegalite_to_svg(chart.to_dict())
    write_text(out / "figure.svg", svg)
    (out / "figure.png").write_bytes(vl_convert.svg_to_png(svg))


def main(argv: list[str]) -> int:
    rest, overrides = split_overrides(argv)
    parser = Parser(prog="python -m experiments.coordinate_check", description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", help="FILE.py or FILE.py:arg, see configs/")
    parser.add_argument("--judge", type=user_path, metavar="RECORD", help="an earlier record.json; nothing is measured")
    parser.add_argument("--out", required=True, type=user_path, help="folder of record, table and figure")
    parser.add_argument("--widths", type=_integers, default="64,128,256,512,1024", help="none: --widths=")
    parser.add_argument("--depths", type=_integers, default="2,4,8,16,32,64", help="none: --depths=")
    parser.add_argument("--at_depth", type=int, default=2, help="blocks of the models of each width")
    parser.add_argument("--at_width", type=int, default=64, help="width of the models of each depth")
    parser.add_argument("--parametrisations", default=",".join(PARAMETRISATIONS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="updates")
    parser.add_argument("--bound", type=float, default=0.25, help="of a slope that is promised to be 0")
    args = parser.parse_args(rest)
    if bool(args.config) == bool(args.judge):
        raise UserError("--config measures and --judge reads a record; give one of them")
    if args.judge:
        try:
            results = json.loads(args.judge.read_text(encoding="utf-8"))["results"]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"--judge {args.judge} is no record of this command: {one_line(error)}") from error
    else:
        results = _measured(args, argv, overrides)
    lines, failed = table(results, args.bound)
    args.out.mkdir(parents=True, exist_ok=True)
    write_text(args.out / "table.md", "\n".join(lines) + "\n")
    draw(results, args.out)
    print("\n".join(lines), f"{failed} promises are broken; {args.out}", sep="\n")
    return 1 if failed else 0


def _measured(args: argparse.Namespace, argv: list[str], overrides: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """The results of each axis and parametrisation, which are written into the record too. Raises UserError."""
    names = args.parametrisations.split(",")
    for name in names:
        if name not in PARAMETRISATIONS:
            raise UserError(f"--parametrisations: {name!r} is unknown; {did_you_mean(name, PARAMETRISATIONS)}")
    if min(args.seeds, args.steps) < 1:
        raise UserError("--seeds and --steps must be 1 or more")
    grids = {axis: sizes for axis, sizes in (("width", args.widths), ("depth", args.depths)) if sizes}
    for axis, sizes in grids.items():
        if len(sizes) < 2:
            raise UserError(f"--{axis}s {sizes[0]}: a slope needs two sizes or more")
    config = load(args.config, overrides)
    start_jax(config.platform)
    data, config = open_data(config)
    record = about("experiments.coordinate_check", argv) | {"config": to_dict(config)}
    results: list[dict[str, Any]] = []
    for axis, sizes in grids.items():
        fixed = {"width": args.at_width, "depth": args.at_depth}
        least = fixed | {axis: min(sizes)}
        for name in names:
            if name != "standard" and axis not in PARAMETRISATIONS[name].base:
                continue  # along this axis it is `standard` to the bit
            made = partial(at, config, least=least, parametrisation=name)
            found = [measure(made(sizes=fixed | {axis: size}), data, args.seeds, args.steps) for size in sizes]
            updates = range(args.steps + 1)
            every = {
                what: [slopes(sizes, found, what, t) if t or "change" not in what else [] for t in updates]
                for what in found[0][0]
            }
            about_it = {"axis": axis, "parametrisation": name, "promised": axis in PARAMETRISATIONS[name].base}
            results.append(about_it | {"sizes": sizes, "slopes": every, "found": found})
            print(f"measured: {axis} under {name}", flush=True)
    save_record(args.out / "record.json", record | {"results": results})
    return results


def _integers(text: str) -> list[int]:
    return sorted({int(part) for part in text.split(",") if part})


if __name__ == "__main__":
    run_command(main, lasting=True)
