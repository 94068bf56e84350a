"""Continues text with a run's checkpoint: python -m spannorm_jax.sample --workdir runs/x --prompt "def " [--prompt ...]

The folder is all it needs; no data are read. Prompts of any length are continued together. A model that takes
several devices is split by --config.mesh.tensor=2.
"""

import sys

from spannorm_jax.command import Parser, run_command
from spannorm_jax.config_file import check_overridable, for_this_machine, override, split_overrides
from spannorm_jax.errors import visible
from spannorm_jax.inference.options import SampleOptions, check_options
from spannorm_jax.resolution import check_text
from spannorm_jax.run.folder import read_config, run_folder_path

_OVERRIDABLE = ("platform", "mesh.")


def main(argv: list[str]) -> int:
    rest, overrides = split_overrides(argv)
    usual = SampleOptions()
    parser = Parser(prog="python -m spannorm_jax.sample", description=__doc__)
    parser.add_argument("--workdir", required=True, type=run_folder_path, help="the run's folder")
    parser.add_argument("--prompt", action="append", help="text to continue; repeat it for a batch (default: '')")
    parser.add_argument("--step", type=int, help="checkpoint step (default: the newest, or last good one)")
    parser.add_argument("--max_tokens", type=int, default=usual.max_tokens, help="new tokens a prompt, at most")
    parser.add_argument("--temperature", type=float, default=usual.temperature, help="0: the likeliest token")
    parser.add_argument("--top_k", type=int, default=usual.top_k, help="draw from the likeliest k; 0: from all")
    parser.add_argument("--seed", type=int, default=usual.seed, help="the same seed gives the same text")
    parser.add_argument("--max_cache_mib", type=int, default=usual.max_cache_mib, help="memory for keys and values")
    args = parser.parse_args(rest)
    check_overridable(overrides, _OVERRIDABLE, "sampling")
    options = SampleOptions(args.max_tokens, args.temperature, args.top_k, args.seed, args.max_cache_mib)
    check_options(options)
    config = override(for_this_machine(read_config(args.workdir)), overrides)
    check_text(config, "sampling")

    from spannorm_jax.inference.sampling import sample  # JAX comes with it: a command that is mistyped does without

    on_terminal = sys.stdout is not None and sys.stdout.isatty()

    def write(text: str) -> None:  # what a model says must not command the terminal; a file gets it as it is
        print(visible(text) if on_terminal else text, end="", flush=True)

    if hasattr(sys.stdout, "reconfigure"):  # a terminal that cannot show a character shows a question mark
        sys.stdout.reconfigure(errors="replace")
    sample(config, args.workdir, args.step, args.prompt or [""], options, write)
    return 0


if __name__ == "__main__":
    run_command(main)
