"""Trains a model: python -m spannorm_jax.train --config configs/dense.py:tiny --workdir runs/x [--config.a.b=c]"""

from pathlib import Path

from spannorm_jax.config import Config
from spannorm_jax.config_file import load, split_overrides
from spannorm_jax.errors import Parser, run_command
from spannorm_jax.training.loop import train
from spannorm_jax.training.profiling import parse_steps


def parse(argv: list[str]) -> tuple[Config, Path, range]:
    """Config, run folder and steps to profile of a command line. Raises UserError."""
    rest, overrides = split_overrides(argv)
    parser = Parser(prog="python -m spannorm_jax.train", description=__doc__)
    parser.add_argument("--config", required=True, help="FILE.py or FILE.py:arg, see configs/")
    parser.add_argument("--workdir", required=True, type=Path, help="the run's folder, made if absent")
    parser.add_argument("--profile_steps", metavar="A:B", help="trace steps A to B into the folder's profile/")
    args = parser.parse_args(rest)
    profile_steps = range(0) if args.profile_steps is None else parse_steps(args.profile_steps)
    return load(args.config, overrides), args.workdir, profile_steps


def main(argv: list[str]) -> int:
    config, workdir, profile_steps = parse(argv)
    return train(config, workdir, argv, profile_steps)


if __name__ == "__main__":
    run_command(main)
