"""What a model's signal and gradients should be at initialisation, by its placement's equation, block by block.

python -m spannorm_jax.analysis.theory --config configs/dense.py:depth=24,width=256,placement=span,init=plain

No weights are drawn. Of text no data is read; of images some held-out ones enter. docs/theory.md has the derivation,
and what is left out.
"""

from spannorm_jax.analysis.quantities import shown, table
from spannorm_jax.command import Parser, run_command
from spannorm_jax.config import Config
from spannorm_jax.config_file import load, resolve_without_data, split_overrides
from spannorm_jax.durable import to_json
from spannorm_jax.errors import UserError
from spannorm_jax.model.initialisation import init_of

MAX_TOKENS = 256  # memory grows with the square: 128 blocks take about a GiB
MAX_DEPTH = 1024  # time grows with the square
_NUMBERS = {"text": ("tokens", 2, 64), "image": ("rows", 1, 4)}  # task -> flag, least, default


def parse(argv: list[str]) -> tuple[Config, int, bool]:
    """The config, the number of tokens, of images that of images, and whether JSON is wanted. Raises UserError."""
    rest, overrides = split_overrides(argv)
    parser = Parser(prog="python -m spannorm_jax.analysis.theory", description=__doc__)
    parser.add_argument("--config", required=True, help="FILE.py or FILE.py:arg, see configs/")
    parser.add_argument("--tokens", metavar="T", help=f"of a text, 2 to {MAX_TOKENS} (default 64)")
    parser.add_argument("--rows", metavar="B", help=f"images that enter, 1 to {MAX_TOKENS} (default 4)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON, with all numbers")
    args = parser.parse_args(rest)
    config = load(args.config, overrides)
    flag, least, default = _NUMBERS[config.task]
    for other, value in (("tokens", args.tokens), ("rows", args.rows)):
        if value is not None and other != flag:
            raise UserError(f"--{other} does nothing with task={config.task}; leave it out, or write --{flag}")
    asked = getattr(args, flag) or str(default)
    if not (asked.isdecimal() and least <= int(asked[:9]) <= MAX_TOKENS):
        raise UserError(f"--{flag} {asked[:80]!r} must be a number of {flag}, from {least} to {MAX_TOKENS}")
    config = resolve_without_data(config, platform="cpu") if config.task == "text" else config
    if config.model.depth > MAX_DEPTH:
        raise UserError(
            f"config key model.depth={config.model.depth} is too deep to predict; write {MAX_DEPTH} or less"
        )
    return config, int(asked), args.json


def main(argv: list[str]) -> int:
    config, number, as_json = parse(argv)
    from spannorm_jax.analysis import prediction  # JAX comes with it: a command that is mistyped does without
    from spannorm_jax.training.tasks import task_of

    if config.task == "text":
        tokens, cfg = number, config.model
        found = prediction.predict(cfg, tokens)
    else:
        task = task_of(config)
        data, config = task.open(config)
        tokens, cfg = config.data.seq_len, config.model
        if tokens > MAX_TOKENS:
            raise UserError(f"{tokens} patches are too many to predict; {MAX_TOKENS} or less, by a larger image.patch")
        found = prediction.predict_images(config, task.sample(data.eval, tokens, number, "--rows")["image"])
    record = prediction.as_dict(cfg, tokens, found)
    if as_json:
        print(to_json(record))
        return 0
    print(f"{cfg.placement} / {init_of(cfg)} / {cfg.ffn}: {cfg.depth} blocks, width {cfg.width}, {tokens} tokens")
    print(f"the stream enters block 1 with variance {found.entry_variance:.4g}")
    print("\n".join(table(record, cfg.depth)))
    print("\ngradient norms of weights, for one of norm 1 at the output:")
    for site, norms in found.weight_grad_norm.items():
        own = [norm for norm in norms if norm is not None]
        print(f"  {site:<12} first block {shown(own[0], '.4g'):<10} last {shown(own[-1], '.4g')}")
    for note in found.notes:
        print(f"note: {note}")
    return 0


if __name__ == "__main__":
    run_command(main)
