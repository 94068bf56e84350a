"""Measures a model's signal, block by block, at initialisation or at a run's checkpoint; docs/signal.md says what.

python -m spannorm_jax.analysis.signal --config FILE.py[:arg] | --workdir runs/x [--step N] [--json] [--out FILE]
"""

from typing import Any

from spannorm_jax.analysis.groups import GROUPS, TEXTS, USUAL, Settings
from spannorm_jax.analysis.quantities import SHARPNESS, init_in, shown, table
from spannorm_jax.command import Parser, run_command
from spannorm_jax.config_file import LOCAL_DATA, check_overridable, for_this_machine, load, override, split_overrides
from spannorm_jax.durable import to_json, write_text
from spannorm_jax.errors import UserError
from spannorm_jax.paths import user_path
from spannorm_jax.run.folder import read_config, run_folder_path

# What may differ from a run's own config; anything else would measure another model.
_OVERRIDABLE = ("platform", "execution.", *LOCAL_DATA)


def main(argv: list[str]) -> int:
    rest, overrides = split_overrides(argv)
    parser = Parser(prog="python -m spannorm_jax.analysis.signal", description=__doc__)
    parser.add_argument("--config", help="FILE.py or FILE.py:arg, see configs/: the model at initialisation")
    parser.add_argument("--workdir", type=run_folder_path, help="a run's folder: one of its checkpoints")
    parser.add_argument("--step", type=int, help="checkpoint step (default: the newest, or last good one)")
    parser.add_argument("--text", default=Settings.text, help=f"of the rows: {' or '.join(TEXTS)} (%(default)s)")
    parser.add_argument("--tokens", type=int, default=0, help="of a row (default: data.seq_len)")
    for name, of in (("rows", "of tokens"), ("probes", "random gradients"), ("blocks", "to leave out; 0: all")):
        parser.add_argument(f"--{name}", type=int, default=getattr(Settings, name), help=f"{of} (default %(default)s)")
    parser.add_argument("--fit_tokens", type=int, default=0, help="of affine maps (default: 4 times their unknowns)")
    told = f"some of {','.join(GROUPS)} (default: all but {GROUPS[-1]})"
    parser.add_argument("--only", default=",".join(USUAL), help=told)
    parser.add_argument("--json", action="store_true", help="print one JSON line and nothing else")
    parser.add_argument("--out", metavar="FILE", help="file that the record is written to")
    args = parser.parse_args(rest)
    if bool(args.config) == bool(args.workdir):
        raise UserError("give --config FILE.py for a model at initialisation, or --workdir FOLDER for a checkpoint")
    if args.step is not None and not args.workdir:
        raise UserError("--step is of a checkpoint, and --config has none; give --workdir")
    only = tuple(filter(None, args.only.split(",")))
    settings = Settings(args.text, args.tokens, args.rows, args.probes, args.blocks, args.fit_tokens, only)
    out = user_path(args.out, "--out") if args.out else None
    if args.workdir:
        check_overridable(overrides, _OVERRIDABLE, "measuring")
        config = override(for_this_machine(read_config(args.workdir)), overrides)
    else:
        config = load(args.config, overrides)
    # JAX comes with it: a command that is mistyped does without.
    from spannorm_jax.analysis.measure import signal

    record = signal(config, args.workdir, args.step, settings, argv)
    line = to_json(record)
    if out:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_text(out, line + "\n")
        except OSError as error:
            raise UserError(f"--out {out} cannot be written ({error.strerror}); give another file") from error
    print(line if args.json else _printed(record))
    return 0


def _printed(record: dict[str, Any]) -> str:
    """Some of the numbers."""
    model, settings = record["config"]["model"], record["settings"]
    head = (
        f"{model['placement']} / {init_in(model)}: {model['depth']} blocks, width {model['width']}, step "
        f"{record['step']}, {settings['rows']} x {settings['tokens']} tokens"
    )
    whole = [key for key in ("loss", "useful_share", "update_logits_change", *SHARPNESS) if key in record]
    return "\n".join([head, *(f"{key} {shown(record[key], '.5g')}" for key in whole), *table(record, model["depth"])])


if __name__ == "__main__":
    run_command(main)
