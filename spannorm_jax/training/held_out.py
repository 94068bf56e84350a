"""The loss on a fixed part of the held-out split, for evaluation and within training."""

import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from spannorm_jax.config import Config
from spannorm_jax.data.loader import eval_batches
from spannorm_jax.data.open import OpenData
from spannorm_jax.errors import UserError
from spannorm_jax.parallel.mesh import sharding

_LARGEST_EXPONENT = math.log(sys.float_info.max)


def held_out(
    config: Config,
    mesh: Mesh,
    evaluate: Callable[[Any, Any, Array, Array], dict[str, Array]],
    data: OpenData,
    params: Any,
    model_state: Any,
) -> dict[str, float]:
    """Loss (nats a token), perplexity, bits per byte and accuracy over that part of the split.

    `evaluate` is what `training.step.make_evaluate` returns for the same config and mesh.

    Raises:
      UserError: no token of that part stands for text.
    """
    check_predicts_text(config, data)
    totals = {"nll": 0.0, "correct": 0.0, "count": 0.0}
    num_bytes = 0
    for tokens, weights, bytes_here in _batches(config, data):
        num_bytes += bytes_here
        arrays = (  # each process the rows of its own devices
            jax.make_array_from_callback(x.shape, sharding(mesh, ("batch", "time")), x.__getitem__)
            for x in (tokens, weights)
        )
        sums = jax.device_get(evaluate(params, model_state, *arrays))
        totals = {key: total + float(sums[key]) for key, total in totals.items()}
    loss = totals["nll"] / totals["count"]
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < _LARGEST_EXPONENT else math.inf,
        "bits_per_byte": totals["nll"] / math.log(2) / num_bytes,
        "accuracy": totals["correct"] / totals["count"],
        "tokens": int(totals["count"]),
        "bytes": num_bytes,
    }


def check_predicts_text(config: Config, data: OpenData) -> None:
    """Raises UserError if no token of that part stands for text; reads no further than it must."""
    if not any(num_bytes for _, _, num_bytes in _batches(config, data)):
        raise UserError(
            f"config key eval.tokens={config.eval.tokens} predicts no text, only ends of documents; write more, or 0"
        )


def _batches(config: Config, data: OpenData) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """The (tokens, weights) of `eval_batches`, and the bytes of text that its predictions make."""
    for tokens, weights in eval_batches(data.eval, config.data.seq_len, config.eval.tokens, config.eval.batch_size):
        yield tokens, weights, int(np.sum(data.tokenizer.token_bytes[tokens[:, 1:]] * weights))
