"""Makes the token stores of a config: python -m spannorm_jax.prepare --config FILE.py[:arg] [--shard i/n]

With --shard only part i (from 0) of n is made. The parts may be made in any order by any processes that share
data.cache_dir; the last one joins them, and the store is the same to the byte as if it had been made at once.
"""

from spannorm_jax.command import Parser, run_command
from spannorm_jax.config_file import load, split_overrides
from spannorm_jax.data import shards, tokens


def main(argv: list[str]) -> int:
    rest, overrides = split_overrides(argv)
    parser = Parser(prog="python -m spannorm_jax.prepare", description=__doc__)
    parser.add_argument("--config", required=True, help="FILE.py or FILE.py:arg, see configs/")
    parser.add_argument("--shard", metavar="i/n", help="make only part i of n, i from 0 (default: everything)")
    args = parser.parse_args(rest)
    data = load(args.config, overrides).data
    shard = shards.parse(args.shard) if args.shard else None
    for split in dict.fromkeys((data.train_split, data.eval_split)):
        if shard and (left := tokens.write_shard(data, split, shard)):
            print(f"{split}: shard {args.shard} is made, {len(left)} of {shard[1]} are missing", flush=True)
            continue
        store = tokens.open_store(data, split)
        print(
            f"{split}: {store.num_tokens:,} tokens ({store.tokenizer}), {store.num_bytes:,} bytes of text in "
            f"{store.num_docs:,} documents, {store.path}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    run_command(main, lasting=True)
