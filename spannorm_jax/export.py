"""Exports a run to Hugging Face's layout: python -m spannorm_jax.export --workdir runs/x --out hf/x [--arch custom]

transformers loads the folder. Where one of its own architectures carries the model exactly it is that one, else a
modelling file of our own comes with the weights; docs/huggingface.md lists both.
"""

from spannorm_jax.command import Parser, run_command
from spannorm_jax.config_file import for_this_machine
from spannorm_jax.paths import user_path
from spannorm_jax.run.folder import read_config, run_folder_path


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m spannorm_jax.export", description=__doc__)
    parser.add_argument("--workdir", required=True, type=run_folder_path, help="the run's folder")
    parser.add_argument("--out", required=True, help="the folder to write, new or empty")
    parser.add_argument("--step", type=int, help="checkpoint step (default: the newest, or last good one)")
    parser.add_argument(
        "--arch",
        choices=("stock", "custom"),
        default="",
        help="stock: one of transformers' own; custom: our modelling file (default: stock where one is exact)",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default float32")
    args = parser.parse_args(argv)
    config, out = for_this_machine(read_config(args.workdir)), user_path(args.out, "--out").absolute()

    from spannorm_jax.hf.export import export  # JAX comes with it: a command that is mistyped does without

    name = export(config, args.workdir, args.step, out, args.arch, args.dtype)
    print(f"{args.out}: {name}, {args.dtype}")
    return 0


if __name__ == "__main__":
    run_command(main)
