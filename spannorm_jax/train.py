"""Trains a model: python -m spannorm_jax.train --config configs/dense.py:tiny --workdir runs/x [--config.a.b=c]"""

import argparse
from pathlib import Path

from spannorm_jax.config_file import load, split_overrides
from spannorm_jax.errors import run_command
from spannorm_jax.training.loop import train


def main(argv: list[str]) -> int:
    rest, overrides = split_overrides(argv)
    parser = argparse.ArgumentParser(prog="python -m spannorm_jax.train", description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", required=True, help="FILE.py or FILE.py:arg, see configs/")
    parser.add_argument("--workdir", required=True, type=Path, help="the run's folder, made if absent")
    args = parser.parse_args(rest)
    return train(load(args.config, overrides), args.workdir, argv)


if __name__ == "__main__":
    run_command(main)
