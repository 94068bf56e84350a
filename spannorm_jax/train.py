"""Trains a model: python -m spannorm_jax.train --config configs/dense.py:tiny --workdir runs/x [--config.a.b=c]"""

import argparse
from pathlib import Path

from spannorm_jax.config_file import load, split_overrides
from spannorm_jax.errors import run_command
from spannorm_jax.training.loop import train
from spannorm_jax.training.profiling import parse_steps


def main(argv: list[str]) -> int:
    rest, overrides = split_overrides(argv)
    parser = argparse.ArgumentParser(prog="python -m spannorm_jax.train", description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", required=True, help="FILE.py or FILE.py:arg, see configs/")
    parser.add_argument("--workdir", required=True, type=Path, help="the run's folder, made if absent")
    parser.add_argument("--profile_steps", metavar="A:B", help="trace steps A to B into the folder's profile/")
    args = parser.parse_args(rest)
    profile_steps = range(0) if args.profile_steps is None else parse_steps(args.profile_steps)
    return train(load(args.config, overrides), args.workdir, argv, profile_steps)


if __name__ == "__main__":
    run_command(main)
