"""Trains a model: python -m spannorm_jax.train --config configs/dense.py:tiny --workdir runs/x [--config.a.b=c]"""

from pathlib import Path

from spannorm_jax.command import Parser, add_flags, flags_of, run_command
from spannorm_jax.config import Config
from spannorm_jax.config_file import load, split_overrides
from spannorm_jax.parallel.rank import ProcessFlags
from spannorm_jax.run.folder import run_folder_path
from spannorm_jax.training.flags import Flags, parse_steps


def parse(argv: list[str]) -> tuple[Config, Path, Flags, ProcessFlags]:
    """Config, run folder, flags and processes of a command line. Raises UserError."""
    rest, overrides = split_overrides(argv)
    parser = Parser(prog="python -m spannorm_jax.train", description=__doc__)
    parser.add_argument("--config", required=True, help="FILE.py or FILE.py:arg, see configs/; or a run's config.json")
    parser.add_argument("--workdir", required=True, type=run_folder_path, help="the run's folder, made if absent")
    parser.add_argument("--profile_steps", metavar="A:B", help="trace steps A to B into the folder's profile/")
    parser.add_argument(
        "--stop_code", type=int, default=0, help="exit code if a signal stops the run before its end (default 0)"
    )
    add_flags(parser)
    args = parser.parse_args(rest)
    if not 0 <= args.stop_code < 128:
        parser.error(f"--stop_code {args.stop_code} is no exit code; write 0 to 127")
    profile_steps = range(0) if args.profile_steps is None else parse_steps(args.profile_steps)
    flags = Flags(argv, profile_steps, args.stop_code)
    return load(args.config, overrides), args.workdir, flags, flags_of(args)


def main(argv: list[str]) -> int:
    command = parse(argv)
    from spannorm_jax.training.loop import train  # JAX comes with it: a command that is mistyped does without

    return train(*command)


if __name__ == "__main__":
    run_command(main, lasting=True)
