"""Prints what a step takes on N devices: memory, FLOPs, collectives. Allocates and writes nothing.

python -m spannorm_jax.plan --config configs/dense.py:1b --devices 64 [--device_kind "TPU v5"] [--config.a.b=c]
"""

from spannorm_jax.command import Parser, run_command
from spannorm_jax.config import Config
from spannorm_jax.config_file import load, split_overrides
from spannorm_jax.errors import UserError, did_you_mean
from spannorm_jax.parallel.devices import DEVICE_KINDS, known_kind

MAX_DEVICES = 2048  # what XLA has for CPUs in one process


def parse(argv: list[str]) -> tuple[Config, int, str]:
    """Config, number and kind of the devices of a command line. Raises UserError."""
    rest, overrides = split_overrides(argv)
    parser = Parser(prog="python -m spannorm_jax.plan", description=__doc__)
    parser.add_argument("--config", required=True, help="FILE.py or FILE.py:arg, see configs/")
    parser.add_argument("--devices", metavar="N", required=True, help="how many; none of them need be here")
    parser.add_argument("--device_kind", default="", help='such as "TPU v5": what shares of its memory and peak are of')
    parser.add_argument("--workdir", help="for the arguments of a training command; not touched")
    args = parser.parse_args(rest)
    if not (args.devices.isdecimal() and 1 <= int(args.devices[:9]) <= MAX_DEVICES):
        raise UserError(f"--devices {args.devices[:80]!r} must be a number of devices, from 1 to {MAX_DEVICES}")
    kind = args.device_kind
    if kind and not known_kind(kind):
        raise UserError(f"--device_kind {kind[:80]!r} is not known; {did_you_mean(kind, DEVICE_KINDS)}")
    return load(args.config, overrides), int(args.devices), kind


def main(argv: list[str]) -> int:
    command = parse(argv)
    from spannorm_jax.plan.dry_run import dry_run  # JAX comes with it: a command that is mistyped does without

    return dry_run(*command)


if __name__ == "__main__":
    run_command(main)
