"""The train step with each value of one option: seconds over those with the first value.

    python -m experiments.benchmarks.variants --config configs/dense.py:124m --option execution.attention=cudnn,xla

Prints a table and writes the record.
"""

import jax

from experiments.benchmarks import timing
from spannorm_jax.command import run_command
from spannorm_jax.config import Config
from spannorm_jax.config_file import load, split_overrides
from spannorm_jax.data.open import open_data
from spannorm_jax.errors import UserError
from spannorm_jax.parallel.platform import start_jax


def variants(config: str, option: str, overrides: list[tuple[str, str]]) -> dict[str, Config]:
    """Value -> config. Raises UserError if `option` is no KEY=A,B of model or execution."""
    key, _, values = option.partition("=")
    if not key.startswith(("model.", "execution.")) or not all(values.split(",")):
        raise UserError(f"--option {option[:80]!r} is no KEY=A,B of model or execution: execution.attention=cudnn,xla")
    return {value: load(config, [*overrides, (key, value)]) for value in values.split(",")}


def main(argv: list[str]) -> int:
    rest, overrides = split_overrides(argv)
    parser = timing.benchmark_parser("variants", __doc__, rounds=10, steps=5)
    parser.add_argument("--option", required=True, metavar="KEY=A,B", help="an option and the values to compare")
    args = parser.parse_args(rest)
    configs = variants(args.config, args.option, overrides)
    first = next(iter(configs))
    start_jax(configs[first].platform)
    jax.config.update("jax_enable_compilation_cache", False)  # compile seconds are to be a compiler's
    opened = {value: open_data(config) for value, config in configs.items()}
    data, config = opened[first]
    resolved = {value: config for value, (_, config) in opened.items()}
    record = timing.step_times(resolved, timing.train_loader(config, data), args.rounds, args.steps)
    for value, got in record.items():
        got["times_as_long"] = timing.median_ratio(got["step_times_s"], record[first]["step_times_s"])
        ratio = timing.ratio_text(got["times_as_long"], ".3f")
        print(f"{value:<12}{got['step_s'] * 1e3:>9.1f} ms   {ratio} times as long")
    measured = {"option": args.option, "variants": record}
    timing.write_record(args.json, "experiments.benchmarks.variants", argv, data, config, measured)
    return 0


if __name__ == "__main__":
    run_command(main, lasting=True)
