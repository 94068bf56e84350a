"""What each of the CPU's own kernels gains: the train step without it, against the step with all, in one process.

    python -m experiments.benchmarks.kernels --config configs/throughput.py --json kernels.json

`linear` and `gelu` (model/kernels/cpu.py) are replaced by the plain product and by jax.nn.gelu, blocked attention by
XLA's. Prints a table and writes the record: for each variant the step's seconds and how many times as long it takes,
the median over rounds with its 95% interval.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp

from experiments.benchmarks import timing
from spannorm_jax.command import run_command
from spannorm_jax.config import Config, replace
from spannorm_jax.config_file import load, split_overrides
from spannorm_jax.data.open import open_data
from spannorm_jax.model import layers
from spannorm_jax.parallel.platform import start_jax

PLAIN = {
    "linear": lambda x, w: jax.lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ()))),
    "gelu": lambda x: jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype),
}


def main(argv: list[str]) -> int:
    rest, overrides = split_overrides(argv)
    args = timing.benchmark_parser("kernels", __doc__, rounds=10, steps=2).parse_args(rest)
    config = load(args.config, overrides)
    start_jax(config.platform)
    data, config = open_data(config)
    with_all = replace(config, execution__attention="blocked")
    with_xla = replace(config, execution__attention="xla")
    variants: dict[str, Config] = {"all": with_all, "blocked attention": with_xla, "linear": with_all}
    if config.model.ffn == "gelu":
        variants["gelu"] = with_all
    variants["none"] = with_xla
    loader = timing.train_loader(config, data)
    record = timing.step_times(variants, loader, args.rounds, args.steps, while_traced=_without)
    for name, got in record.items():
        got["times_as_long"] = timing.median_ratio(got["step_times_s"], record["all"]["step_times_s"])
        words = {"all": "with all of them", "none": "without any"}.get(name, f"without {name}")
        ratio = timing.ratio_text(got["times_as_long"], ".2f")
        print(f"{words:<26}{got['step_s'] * 1e3:>9.1f} ms   {ratio} times as long")
    timing.write_record(args.json, "experiments.benchmarks.kernels", argv, data, config, {"variants": record})
    return 0


@contextlib.contextmanager
def _without(name: str) -> Iterator[None]:
    """Traces with the plain form of the kernel of this name, or of both for "none"."""
    with contextlib.ExitStack() as stack:
        for kernel, plain in PLAIN.items():
            if name in (kernel, "none"):
                stack.enter_context(mock.patch.object(layers, kernel, plain))
        yield


if __name__ == "__main__":
    run_command(main, lasting=True)
