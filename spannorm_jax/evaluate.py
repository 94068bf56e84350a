"""Evaluates a run's checkpoint: python -m spannorm_jax.evaluate --workdir runs/x [--step N] [--json] [--out FILE]

The folder is all it needs. It runs on all devices here, whatever mesh trained the run; another mesh is
--config.mesh.tensor=2, more held-out text --config.eval.tokens=0 (all of it). With --tasks it is lm-eval's judgement:
of tasks made from the run's held-out text (held_out_rolling, held_out_continuation), or any that lie on this disk.
"""

import argparse
import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

from spannorm_jax.command import Parser, add_flags, flags_of, run_command
from spannorm_jax.config_file import LOCAL_DATA, check_overridable, for_this_machine, override, split_overrides
from spannorm_jax.durable import to_json
from spannorm_jax.errors import DIVERGED_EXIT, UserError
from spannorm_jax.paths import user_path
from spannorm_jax.resolution import check_text
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
    tasks = parser.add_argument_group("tasks of lm-evaluation-harness", "pip install 'spannorm_jax[eval]'")
    tasks.add_argument("--tasks", metavar="NAME,...", help="names of tasks, or YAML files, in place of held-out loss")
    tasks.add_argument("--include_path", metavar="DIR", type=_folder, help="folder whose YAML files have the tasks")
    tasks.add_argument("--limit", type=int, metavar="N", help="the first N documents of each task (default: all)")
    add_flags(parser)
    args = parser.parse_args(rest)
    names = _task_names(args)
    check_overridable(overrides, _OVERRIDABLE, "evaluation")
    config = override(for_this_machine(read_config(args.workdir)), overrides)
    if names:
        check_text(config, "--tasks")
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError("--tasks needs lm-evaluation-harness, which is not here; pip install 'spannorm_jax[eval]'")
    if args.out is None:
        out = args.workdir / EVAL
    else:
        out = None if args.out == "none" else user_path(args.out, "--out")
    processes = flags_of(args)
    # JAX comes with these: a command that is mistyped does without.
    from spannorm_jax.inference.evaluation import NotRecorded, evaluate
    from spannorm_jax.parallel.distributed import is_first
    from spannorm_jax.training.tasks import task_of

    unrecorded = None
    asked = (config, args.workdir, args.step, processes, out)
    try:
        if names:
            from spannorm_jax.inference.harness import evaluate_tasks

            result = evaluate_tasks(*asked, names, args.include_path, args.limit)
        else:
            result = evaluate(*asked)
    except NotRecorded as error:
        result, unrecorded = error.result, error
    judged = [score["value"] for score in result["tasks"]] if names else [result["loss"]]
    code = 0 if all(map(math.isfinite, judged)) else DIVERGED_EXIT
    if not is_first():
        return code
    print(to_json(result) if args.json else _task_lines(result) if names else task_of(config).summary(result))
    if code:
        what = "a task's value" if names else "the held-out loss"
        print(f"{what} of step {result['step']} is not finite; its record holds null", file=sys.stderr)
    if unrecorded:
        raise unrecorded
    return code


def _folder(text: str) -> Path:
    path = user_path(text, "--include_path")
    if not path.is_dir():
        raise UserError(f"--include_path {path} is no folder; name the one that holds the tasks' YAML files")
    return path


def _task_names(args: argparse.Namespace) -> list[str]:
    """What --tasks asks for; [] without it. Raises UserError."""
    names = [name.strip() for name in (args.tasks or "").split(",") if name.strip()]
    if not names and any(value is not None for value in (args.tasks, args.include_path, args.limit)):
        raise UserError("--include_path and --limit are of --tasks NAME,..., which names no task; name one")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit} leaves no document; write 1 or more")
    return names


def _task_lines(result: dict[str, Any]) -> str:
    lines = [f"step {result['step']}"]
    for score in result["tasks"]:
        error, chance = (f"{score[key]:.4f}" if score[key] is not None else "-" for key in ("stderr", "chance"))
        value = f"{score['value']:.4f} ± {error}"
        lines.append(f"{score['task']}  {score['metric']}  {value}  chance {chance}  ({score['n']:,} documents)")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
