"""Trains a model: python -m spannorm_jax.train --config configs/dense.py:tiny --workdir runs/x [--config.a.b=c]"""

from pathlib import Path

from spannorm_jax.config import Config
from spannorm_jax.config_file import load, split_overrides
from spannorm_jax.errors import Parser, run_command
from spannorm_jax.training.loop import train


def parse(argv: list[str]) -> tuple[Config, Path]:
    """Config and run folder of a command line. Raises UserError."""
    rest, overrides = split_overrides(argv)
    parser = Parser(prog="python -m spannorm_jax.train", description=__doc__)
    parser.add_argument("--config", required=True, help="FILE.py or FILE.py:arg, see configs/")
    parser.add_argument("--workdir", required=True, type=Path, help="the run's folder, made if absent")
    args = parser.parse_args(rest)
    return load(args.config, overrides), args.workdir


def main(argv: list[str]) -> int:
    return train(*parse(argv), argv)


if __name__ == "__main__":
    run_command(main)
