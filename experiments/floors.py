"""What counts and compression reach on the held-out text of the sweeps: python -m experiments.floors

It writes experiments/results/floors.json: the floors of `spannorm_jax.data.floors` in nats per token and bits per byte,
for the default data, sequence length and evaluation, which the sweeps of size cpu have.
"""

import math
import sys
from pathlib import Path

import numpy as np

from experiments.record import about, save_record
from spannorm_jax.config import Config
from spannorm_jax.data.floors import COUNTED, floors
from spannorm_jax.data.loader import eval_batches
from spannorm_jax.data.open import open_data
from spannorm_jax.parallel.platform import start_jax
from spannorm_jax.parallel.rank import ProcessFlags

RECORD = Path("experiments/results/floors.json")


def main(argv: list[str]) -> int:
    start_jax("cpu", ProcessFlags())
    data, config = open_data(Config())
    nats = floors(data.train, data.eval, data.tokenizer, config.data.seq_len, config.eval.tokens)
    count = num_bytes = 0
    for tokens, weights in eval_batches(data.eval, config.data.seq_len, config.eval.tokens, config.eval.batch_size):
        count += int(weights.sum())
        num_bytes += int(np.sum(data.tokenizer.token_bytes[tokens[:, 1:]] * weights))
    facts = {
        "dataset": data.train.dataset,
        "fingerprint": config.data.fingerprint,
        "seq_len": config.data.seq_len,
        "counted_tokens": min(data.train.num_tokens, COUNTED),
        "predictions": count,
        "bytes": num_bytes,
        "nats_per_token": nats,
        "bits_per_byte": {name: loss * count / math.log(2) / num_bytes for name, loss in nats.items()},
    }
    save_record(RECORD, about("experiments.floors", argv) | facts)
    print(RECORD)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
