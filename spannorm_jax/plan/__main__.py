"""Prints what a step takes on devices that need not be here: memory, time, traffic. Allocates and writes nothing.

python -m spannorm_jax.plan --config configs/dense.py:1b --topology v5e:4x4 [--slices N] [--config.a.b=c]
    by the devices' own compiler: v4, v5e, v5p, v6e, tpu7x (extra tpu-plan), h100, h200, b200 (extra gpu)
python -m spannorm_jax.plan --config configs/dense.py:1b --devices 64 [--device_kind "TPU v5"]
    by XLA for as many CPUs, which needs neither
"""

import argparse

from spannorm_jax.command import Parser, run_command
from spannorm_jax.config_file import load, split_overrides
from spannorm_jax.errors import UserError, did_you_mean
from spannorm_jax.parallel.devices import DEVICE_KINDS, known_kind

MAX_DEVICES = 2048  # what XLA has for CPUs in one process
PROGRAMS = ("train", "evaluate", "signal", "sample", "lanes")


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """The options of a command line, and its overrides of the config. Raises UserError."""
    rest, overrides = split_overrides(argv)
    parser = Parser(
        prog="python -m spannorm_jax.plan", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", required=True, help="FILE.py or FILE.py:arg, see configs/")
    parser.add_argument("--topology", help="CHIP:SHAPE, v5e:4x4, or a cloud's name, v5e-16; of GPUs h100:1xHOSTSxGPUS")
    parser.add_argument("--slices", default="1", metavar="N", help="of TPUs, joined by a slow network")
    parser.add_argument("--program", default="train", choices=PROGRAMS)
    parser.add_argument("--lanes", default="8", metavar="N", help="runs of the program lanes")
    parser.add_argument("--compare", metavar="CONFIG", help="another config, with the same overrides: ratios of both")
    parser.add_argument("--devices", metavar="N", help="how many, without a topology")
    parser.add_argument("--device_kind", default="", help='such as "TPU v5": what shares of its memory and peak are of')
    parser.add_argument("--workdir", help="for the arguments of a training command; not touched")
    args = parser.parse_args(rest)
    if (args.topology is None) == (args.devices is None):
        raise UserError("write --topology, such as v5e:4x4, or --devices, a number; not both")
    if args.devices is not None and (args.compare or args.program != "train" or args.slices != "1"):
        raise UserError("--compare, --program and --slices need --topology")
    for name in ("devices", "slices", "lanes"):
        number = getattr(args, name)
        if number is not None and not (number.isdecimal() and 1 <= int(number[:9]) <= MAX_DEVICES):
            raise UserError(f"--{name} {number[:80]!r} must be a number from 1 to {MAX_DEVICES}")
    kind = args.device_kind
    if kind and not known_kind(kind):
        raise UserError(f"--device_kind {kind[:80]!r} is not known; {did_you_mean(kind, DEVICE_KINDS)}")
    return args, overrides


def main(argv: list[str]) -> int:
    args, overrides = parse(argv)
    config = load(args.config, overrides)
    other = load(args.compare, overrides) if args.compare else None
    # JAX comes with these: a command that is mistyped does without.
    if args.devices is not None:
        from spannorm_jax.plan.dry_run import dry_run

        return dry_run(config, int(args.devices), args.device_kind)
    from spannorm_jax.plan.target import open_target, plan
    from spannorm_jax.plan.topology import known_name

    target = open_target(known_name(args.topology), int(args.slices))
    return plan(config, other, target, args.program, int(args.lanes))


if __name__ == "__main__":
    run_command(main)
