"""Evaluates a run's checkpoint: python -m spannorm_jax.evaluate --workdir runs/x [--step N] [--json] [--out FILE]

The folder is all it needs. It runs on all devices here, whatever mesh trained the run; another mesh is
--config.mesh.tensor=2, more held-out text --config.eval.tokens=0 (all of it).
"""

import math
import sys

from spannorm_jax.command import Parser, add_flags, flags_of, run_command
from spannorm_jax.config_file import LOCAL_DATA, check_overridable, for_this_machine, override, split_overrides
from spannorm_jax.durable import to_json
from spannorm_jax.errors import DIVERGED_EXIT
from spannorm_jax.paths import user_path
from spannorm_jax.run.folder import EVAL, read_config, run_folder_path

# What may differ from the run's own config; anything else would evaluate another model.
_OVERRIDABLE = ("platform", "mesh.", "eval.", *LOCAL_DATA)


def main(argv: list[str]) -> int:
    rest, overrides = split_overrides(argv)
    parser = Parser(prog="python -m spannorm_jax.evaluate", description=__doc__)
    parser.add_argument("--workdir", required=True, type=run_folder_path, help="the run's folder")
    parser.add_argument("--step", type=int, help="checkpoint step (default: the newest, or last good one)")
    parser.add_argument(
        "--out", metavar="FILE", help="file that the result is appended to, or none (default: eval.jsonl)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line and nothing else")
    add_flags(parser)
    args = parser.parse_args(rest)
    check_overridable(overrides, _OVERRIDABLE, "evaluation")
    config = override(for_this_machine(read_config(args.workdir)), overrides)
    if args.out is None:
        out = args.workdir / EVAL
    else:
        out = None if args.out == "none" else user_path(args.out, "--out")
    processes = flags_of(args)
    # JAX comes with these: a command that is mistyped does without.
    from spannorm_jax.inference.evaluation import NotRecorded, evaluate
    from spannorm_jax.parallel.distributed import is_first

    unrecorded = None
    try:
        result = evaluate(config, args.workdir, args.step, processes, out)
    except NotRecorded as error:
        result, unrecorded = error.result, error
    code = 0 if math.isfinite(result["loss"]) else DIVERGED_EXIT
    if not is_first():
        return code
    if args.json:
        print(to_json(result))
    else:
        print(
            f"step {result['step']}  loss {result['loss']:.4f} nats/token  perplexity {result['perplexity']:.3f}  "
            f"{result['bits_per_byte']:.4f} bits/byte  accuracy {result['accuracy']:.4f}  "
            f"({result['tokens']:,} tokens of {result['split']})"
        )
    if code:
        print(f"the held-out loss of step {result['step']} is not finite; its record holds null", file=sys.stderr)
    if unrecorded:
        raise unrecorded
    return code


if __name__ == "__main__":
    run_command(main)
