"""What the command line says of a run, besides its config and its processes; read without JAX."""

from dataclasses import dataclass

from spannorm_jax.errors import UserError


@dataclass(frozen=True)
class Flags:
    argv: list[str]  # the whole of it, for starts.jsonl
    profile_steps: range = range(0)  # steps to trace
    stop_code: int = 0  # exit code if a signal stops the run before its end
    module: str = "spannorm_jax.train"  # whose command line it is


def parse_steps(text: str) -> range:
    """`A:B` -> steps A to B, both included; `A` is `A:A`.

    Raises:
      UserError: it is neither, or there are no such steps.
    """
    first, colon, last = text.partition(":")
    if not (first.isdecimal() and (last.isdecimal() or not colon)):
        raise UserError(f"--profile_steps {text!r} must be A:B, the first and the last step to trace, as in 10:12")
    steps = range(int(first), int(last or first) + 1)
    if steps.start < 1 or not steps:
        raise UserError(f"--profile_steps {text!r} holds no step; steps count from 1, and A:B needs A <= B")
    return steps


def check_steps(steps: range, total: int) -> None:
    """Raises UserError if the run of `total` steps ends before the last of `steps`."""
    if steps and steps[-1] > total:
        raise UserError(
            f"--profile_steps {steps[0]}:{steps[-1]} goes beyond the run's last step {total}; write {total} or less"
        )
