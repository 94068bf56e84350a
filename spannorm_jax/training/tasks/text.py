"""Text: the next token of windows of a corpus."""

import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from spannorm_jax.config import Config, divisors
from spannorm_jax.data.floors import MOST_SCORED, floors
from spannorm_jax.data.loader import TrainLoader, check_held_out, eval_batches
from spannorm_jax.data.open import OpenData, open_data, say_overlap
from spannorm_jax.data.tokens import TokenStore, Windows, fingerprint
from spannorm_jax.errors import UserError
from spannorm_jax.model.decoder import Decoder
from spannorm_jax.model.definition import define
from spannorm_jax.model.kernels.cross_entropy import cross_entropy
from spannorm_jax.parallel.mesh import batch_shards, target_platform
from spannorm_jax.run.folder import TOKENIZER
from spannorm_jax.training.task import Batch, Field, Fields, LossSums, Rows, Task

# Logits alive at once where the config leaves them open: a CPU's fit its caches better, an accelerator's pieces cost a
# pass over the head's gradient each.
_LOGITS_MIB = {"cpu": 256, "gpu": 1024, "tpu": 1024}
_LARGEST_EXPONENT = math.log(sys.float_info.max)

# ---- data -------------------------------------------------------------------------------------


def _open(config: Config) -> tuple[OpenData, Config]:
    data, config = open_data(config)
    check_held_out(data.eval, data.tokenizer)
    return data, config


def _train_fields(config: Config) -> Fields:
    shape = (config.training.batch_size, config.data.seq_len + 1)
    return {"tokens": Field(shape, "int32", ("batch", "time"))}


def _eval_fields(config: Config) -> Fields:
    B, T = config.eval.batch_size, config.data.seq_len
    axes = ("batch", "time")
    return {"tokens": Field((B, T + 1), "int32", axes), "weights": Field((B, T), "float32", axes)}


def _rows(config: Config, data: OpenData) -> Callable[[int, int, int], Rows]:
    loader = TrainLoader(data.train, config.data.seq_len, config.training.batch_size, config.seed)
    return lambda step, start, stop: {"tokens": loader.rows(step, start, stop)}


def _held_out(config: Config, data: OpenData) -> Iterator[tuple[Rows, dict[str, int]]]:
    """The batches of `eval_batches`, and the bytes of text that their predictions make."""
    for tokens, weights in eval_batches(data.eval, config.data.seq_len, config.eval.tokens, config.eval.batch_size):
        num_bytes = int(np.sum(data.tokenizer.token_bytes[tokens[:, 1:]] * weights))
        yield {"tokens": tokens, "weights": weights}, {"bytes": num_bytes}


def _sample(store: TokenStore, T: int, rows: int, flag: str) -> Rows:
    available = len(Windows(store, T))
    if rows > available:
        raise UserError(
            f"{flag} asks for {rows} rows of {T} tokens, and split {store.split!r} of {store.dataset} has {available}; "
            "write less, or take more data"
        )
    ((tokens, _),) = eval_batches(store, T, rows * T, rows)
    return {"tokens": tokens}


def _check(config: Config, data: OpenData) -> None:
    """Raises UserError if no token of the held-out part stands for text; reads no further than it must."""
    if not any(counts["bytes"] for _, counts in _held_out(config, data)):
        raise UserError(
            f"config key eval.tokens={config.eval.tokens} predicts no text, only ends of documents; write more, or 0"
        )


def _facts(data: OpenData) -> dict[str, Any]:
    """What a record says of its data."""
    return {
        "dataset": data.train.dataset,
        "fingerprint": fingerprint(data.train, data.eval),
        "train_tokens": data.train.num_tokens,
        "eval_tokens": data.eval.num_tokens,
        "eval_overlap": data.eval_overlap,
        "unigram_entropy": data.train.unigram_entropy,
    }


def _announced(config: Config, data: OpenData) -> str:
    return (
        f"data {data.train.dataset} ({config.data.tokenizer}), {data.train.num_tokens:,} training tokens, "
        f"fingerprint {config.data.fingerprint}"
    )


def _floors(config: Config, data: OpenData, measures: dict[str, float]) -> dict[str, float]:
    if measures["tokens"] > MOST_SCORED:
        return {}
    return floors(data.train, data.eval, data.tokenizer, config.data.seq_len, config.eval.tokens)


# ---- loss -------------------------------------------------------------------------------------


def _inputs(batch: Batch) -> Array:
    return batch["tokens"][:, :-1]


def _targets(batch: Batch) -> Array:
    return batch["tokens"][:, 1:]


def _loss_sums(config: Config, mesh_shape: dict[str, int], rows: int) -> LossSums:
    return partial(loss_sums, num_chunks=num_loss_chunks(config, mesh_shape, rows))


def num_loss_chunks(config: Config, mesh_shape: dict[str, int], rows: int) -> int:
    """Pieces of the time axis whose float32 logits fit in execution.max_logits_mib on each device, as few as can be.

    A few more, below twice as many, where those divide seq_len: then the last piece needs no padding.
    """
    seq_len = config.data.seq_len
    limit = (config.execution.max_logits_mib or _LOGITS_MIB[target_platform()]) * 2**20
    rows_here = -(-rows // batch_shards(mesh_shape))
    per_token = rows_here * config.model.vocab_size // mesh_shape["tensor"] * 4
    fewest = -(-seq_len // max(1, min(seq_len, limit // per_token)))
    return next(n for n in (*divisors(seq_len), fewest) if fewest <= n < 2 * fewest)


def loss_sums(decoder: Decoder, batch: Batch, z_loss: ArrayLike = 0.0, *, num_chunks: int = 1) -> dict[str, Any]:
    """Sums over the positions with weight 1, as `Task.loss_sums` has them.

    `tokens` holds T + 1 tokens a row; position t predicts token t + 1. `weights` (B, T) is 1 everywhere if it is left
    out. With num_chunks > 1 the logits exist for one piece of the time axis at once.
    """
    inputs, targets = _inputs(batch), _targets(batch)
    weights_BxT = batch.get("weights", jnp.ones(targets.shape))
    passed = decoder.run(inputs)
    with jax.named_scope("loss"):
        features, head = decoder.head_inputs(passed.features)
        objective, sums = cross_entropy(features, head, targets, weights_BxT, jnp.float32(z_loss), num_chunks)
    router = {"router": passed.stats} if passed.stats else {}
    return {"objective": objective} | sums | router


# ---- measures ---------------------------------------------------------------------------------


def _measures(totals: dict[str, float]) -> dict[str, float]:
    """Loss (nats a token), perplexity, bits per byte and accuracy.

    Bits per byte count the bytes of the text that the predicted tokens stand for: the cost of predicting where
    documents end is in the bits.
    """
    loss = totals["nll"] / totals["count"]
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < _LARGEST_EXPONENT else math.inf,
        "bits_per_byte": totals["nll"] / math.log(2) / totals["bytes"],
        "accuracy": totals["correct"] / totals["count"],
        "tokens": int(totals["count"]),
        "bytes": int(totals["bytes"]),
    }


def _summary(result: dict[str, Any]) -> str:
    return (
        f"step {result['step']}  loss {result['loss']:.4f} nats/token  perplexity {result['perplexity']:.3f}  "
        f"{result['bits_per_byte']:.4f} bits/byte  accuracy {result['accuracy']:.4f}  "
        f"({result['tokens']:,} tokens of {result['split']})"
    )


TEXT = Task(
    open=_open,
    check=_check,
    define=lambda config: define(config.model, config.execution),
    positions=lambda config: config.data.seq_len,
    counted=lambda config: ("tokens", config.data.seq_len),
    train_fields=_train_fields,
    eval_fields=_eval_fields,
    rows=_rows,
    inputs=_inputs,
    targets=_targets,
    sample=_sample,
    loss_sums=_loss_sums,
    held_out=_held_out,
    measures=_measures,
    logged=("loss", "bits_per_byte"),
    facts=_facts,
    files=lambda data: {TOKENIZER: data.tokenizer.source} if data.tokenizer.source else {},
    announced=_announced,
    warn=say_overlap,
    floors=_floors,
    summary=_summary,
)
