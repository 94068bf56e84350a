"""Makes a run of a model on disk: python -m spannorm_jax.import_hf DIR --workdir runs/y [--config.data.dataset=c4/en]

DIR is a folder as Hugging Face lays it out, of Llama's, Qwen3's or Mixtral's architecture, with its tokenizer.json.
--config.a.b=value says what is no part of the model: data, training, optim. The run is at step 0: evaluate, sample and
analysis read it, and train goes on from there with --config runs/y/config.json
"""

from spannorm_jax.command import Parser, run_command
from spannorm_jax.config_file import split_overrides
from spannorm_jax.errors import UserError
from spannorm_jax.paths import user_path
from spannorm_jax.run.bucket import in_bucket
from spannorm_jax.run.folder import run_folder_path


def main(argv: list[str]) -> int:
    rest, overrides = split_overrides(argv)
    parser = Parser(prog="python -m spannorm_jax.import_hf", description=__doc__)
    parser.add_argument("source", metavar="DIR", help="config.json, *.safetensors and tokenizer.json")
    parser.add_argument("--workdir", required=True, type=run_folder_path, help="the run's folder, new or empty")
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json (default: DIR's)")
    args = parser.parse_args(rest)
    if in_bucket(args.workdir):
        raise UserError(f"--workdir {args.workdir}: an import goes to a disk; copy the folder to the bucket then")
    source = user_path(args.source, "DIR")
    tokenizer = user_path(args.tokenizer, "--tokenizer") if args.tokenizer else None

    from spannorm_jax.hf.importing import import_model  # JAX comes with it: a command that is mistyped does without

    config = import_model(source, args.workdir, tokenizer, overrides, argv)
    print(
        f"{args.workdir}: {config.model.depth} blocks, width {config.model.width}, data {config.data.full_name} "
        f"({config.data.tokenizer}), step 0; to train on: --config {args.workdir}/config.json"
    )
    return 0


if __name__ == "__main__":
    run_command(main, lasting=True)
