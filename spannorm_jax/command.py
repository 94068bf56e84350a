"""What every command line shares: its parser, the flags of many processes, and how it ends."""

import argparse
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from spannorm_jax.console import guard_output
from spannorm_jax.errors import USER_ERROR_EXIT, UserError, one_line
from spannorm_jax.parallel.rank import ProcessFlags


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are one line like all others, and which takes no abbreviations."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def add_flags(parser: Parser) -> None:
    group = parser.add_argument_group("many processes", "found by itself under Slurm, Kubernetes and on TPU pods")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--num_processes", type=int, metavar="N")
    group.add_argument("--process_id", type=int, metavar="I", help="0 to N - 1")
    group.add_argument("--start_timeout_s", type=int, default=300, help="to wait for the others (default 300)")
    group.add_argument(
        "--heartbeat_s", type=int, default=100, help="after which a silent process is dead (default 100)"
    )


def flags_of(args: argparse.Namespace) -> ProcessFlags:
    """The flags of a parsed command line. Raises UserError if some are missing or out of range."""
    flags = ProcessFlags(args.coordinator, args.num_processes, args.process_id, args.start_timeout_s, args.heartbeat_s)
    given = (flags.coordinator, flags.num_processes, flags.process_id)
    if any(value is not None for value in given) and None in given:
        raise UserError("--coordinator, --num_processes and --process_id go together; give all three, or none")
    if min(flags.start_timeout_s, flags.heartbeat_s) < 1:
        raise UserError("--start_timeout_s and --heartbeat_s are seconds; write 1 or more")
    return flags


def run_command(main: Callable[[list[str]], int], lasting: bool = False) -> None:
    """Runs a command line's `main(argv)` and exits with its code; a UserError exits with 2.

    `lasting` is for work whose result lies in files: it goes on when nobody reads its output any more.
    """
    guard_output(lasting)
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        code = USER_ERROR_EXIT
    except KeyboardInterrupt:  # before there was anything to save
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader of our output has gone, as in `... | head`
        code = 0
    sys.exit(code)
