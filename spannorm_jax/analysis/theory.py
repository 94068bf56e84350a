"""What a model's signal and gradients should be at initialisation, by its placement's equation, block by block.

python -m spannorm_jax.analysis.theory --config configs/dense.py:depth=24,width=256,placement=span,init=plain

No weights are drawn and no data is read. docs/theory.md has the derivation, and what is left out.
"""

from spannorm_jax.analysis.quantities import shown, table
from spannorm_jax.command import Parser, run_command
from spannorm_jax.config import ModelConfig
from spannorm_jax.config_file import load, resolve_without_data, split_overrides
from spannorm_jax.durable import to_json
from spannorm_jax.errors import UserError
from spannorm_jax.model.initialisation import init_of
from spannorm_jax.resolution import check_text

MAX_TOKENS = 256  # memory grows with the square: 128 blocks take about a GiB
MAX_DEPTH = 1024  # time grows with the square


def parse(argv: list[str]) -> tuple[ModelConfig, int, bool]:
    """The model's config, the number of tokens, and whether JSON is wanted. Raises UserError."""
    rest, overrides = split_overrides(argv)
    parser = Parser(prog="python -m spannorm_jax.analysis.theory", description=__doc__)
    parser.add_argument("--config", required=True, help="FILE.py or FILE.py:arg, see configs/")
    parser.add_argument("--tokens", metavar="T", default="64", help=f"of a sequence, 2 to {MAX_TOKENS} (default 64)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON, with all numbers")
    args = parser.parse_args(rest)
    if not (args.tokens.isdecimal() and 2 <= int(args.tokens[:9]) <= MAX_TOKENS):
        raise UserError(f"--tokens {args.tokens[:80]!r} must be a number of tokens, from 2 to {MAX_TOKENS}")
    config = load(args.config, overrides)
    check_text(config, "a prediction")
    cfg = resolve_without_data(config, platform="cpu").model
    if cfg.depth > MAX_DEPTH:
        raise UserError(f"config key model.depth={cfg.depth} is too deep to predict; write {MAX_DEPTH} or less")
    return cfg, int(args.tokens), args.json


def main(argv: list[str]) -> int:
    cfg, tokens, as_json = parse(argv)
    from spannorm_jax.analysis import prediction  # JAX comes with it: a command that is mistyped does without

    found = prediction.predict(cfg, tokens)
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
