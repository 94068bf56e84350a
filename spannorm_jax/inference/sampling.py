"""Text from a run's checkpoint, from its folder alone: prompts are read at once, then one token a step over a cache."""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from spannorm_jax.config import Config
from spannorm_jax.data import bpe
from spannorm_jax.data.tokenizer import BYTES, Tokenizer, vocab_size
from spannorm_jax.errors import UserError
from spannorm_jax.inference.options import SampleOptions, check_options
from spannorm_jax.model.cache import cache_bytes, cached_features, empty_cache
from spannorm_jax.model.decoder import Decoder
from spannorm_jax.model.definition import ModelDef, define
from spannorm_jax.parallel.mesh import batch_shards, check_divisible, make_mesh
from spannorm_jax.parallel.platform import start_jax
from spannorm_jax.run import folder as run_folder
from spannorm_jax.run.trained import open_trained

_CAST = ("embedding", "hidden", "output", "expert")  # norms and routers compute in float32


# ---- pure functions ----------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass
class Rows:
    """What stands between two steps: the cache, each row's newest token, its position and random key, and whether its
    logits were finite; (B,)."""

    cache: Any
    tokens: Array
    positions: Array
    keys: Array
    finite: Array


def choose(logits_BxV: Array, keys_B: Array, temperature: float, top_k: int, vocab_size: int) -> Array:
    """The next token of each row, int32 (B,): drawn with its own key, or the likeliest if the temperature is 0.

    Ids from vocab_size on pad the model's vocabulary, stand for no text and are never chosen.
    """
    with jax.named_scope("choose"):
        logits_BxV = logits_BxV[:, :vocab_size]
        if temperature == 0:
            return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
        # Best first, and the best at 0: no temperature, however small, can overflow.
        top_BxN, ids_BxN = jax.lax.top_k(logits_BxV, min(top_k or vocab_size, vocab_size))
        scaled = (top_BxN - top_BxN[:, :1]) / max(temperature, float(jnp.finfo(jnp.float32).tiny))
        drawn = jax.vmap(jax.random.categorical)(keys_B, scaled)
        return jnp.take_along_axis(ids_BxN, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _advance(
    decoder: Decoder, pick: Callable, tokens_BxT: Array, positions_BxT: Array, last: Array, rows: Rows
) -> Rows:
    """Reads tokens into the cache and chooses each row's next one from the logits at its index `last`."""
    features, cache = cached_features(decoder, tokens_BxT, positions_BxT, rows.cache)
    logits = decoder.logits(jnp.take_along_axis(features, last[:, None, None], axis=1)[:, 0])
    positions = jnp.take_along_axis(positions_BxT, last[:, None], axis=1)[:, 0] + 1
    # Keyed by row and position: a text is the same whatever else is in the batch.
    chosen = pick(logits, jax.vmap(jax.random.fold_in)(rows.keys, positions))
    return Rows(cache, chosen, positions, rows.keys, jnp.all(jnp.isfinite(logits), axis=-1))


def prefill(
    model: ModelDef,
    pick: Callable,
    slots: int,
    params: Any,
    model_state: Any,
    tokens_BxP: Array,
    lengths_B: Array,
    seed: Array,
) -> Rows:
    """Reads prompts, padded on the right to P tokens, into a cache of `slots`, and chooses the first new tokens."""
    B, P = tokens_BxP.shape
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(B))
    empty = Rows(empty_cache(model.cfg, B, slots), tokens_BxP[:, 0], lengths_B, keys, jnp.ones(B, bool))
    positions = jnp.broadcast_to(jnp.arange(P), (B, P))
    return _advance(model.bind(params, model_state), pick, tokens_BxP, positions, lengths_B - 1, empty)


def decode(model: ModelDef, pick: Callable, params: Any, model_state: Any, rows: Rows) -> Rows:
    """One token more for every row."""
    first = jnp.zeros_like(rows.positions)
    return _advance(model.bind(params, model_state), pick, rows.tokens[:, None], rows.positions[:, None], first, rows)


def as_computed(model: ModelDef, params: Any) -> Any:
    """Weights in the dtype that they are used in, so that a step of decoding reads no more bytes than it needs."""
    return model.map_weights(lambda spec, w: w.astype(model.cfg.dtype) if spec.role in _CAST else w, params)


@functools.lru_cache(maxsize=32)
def _programs(model: ModelDef, temperature: float, top_k: int, num_ids: int, slots: int) -> tuple[Callable, ...]:
    """`as_computed`, `prefill` and `decode`, which a second call with the same shapes does not compile again."""
    pick = partial(choose, temperature=temperature, top_k=top_k, vocab_size=num_ids)
    step = jax.jit(partial(decode, model, pick), donate_argnums=2)
    return jax.jit(partial(as_computed, model)), jax.jit(partial(prefill, model, pick, slots)), step


def generate(
    model: ModelDef,
    params: Any,
    model_state: Any,
    tokenizer: Tokenizer,
    prompts: list[np.ndarray],
    options: SampleOptions,
    show: Callable[[np.ndarray], Any] = lambda tokens: None,
    rows_multiple: int = 1,
    slots: int = 1,
) -> list[np.ndarray]:
    """Continues prompts (ids, at least one each); returns each one's new ids, without the end of text.

    `show` is given every step's tokens, (number of prompts,), as they come, and ends it by True; rows that have ended
    repeat the end of text. The batch is filled up to a multiple of `rows_multiple`, which the mesh may need, and
    prompts to `slots` tokens, so that others of that shape compile nothing.

    Raises:
      UserError: the logits are not finite.
    """
    B, end = len(prompts), tokenizer.end_of_text
    lengths = np.ones(-(-B // rows_multiple) * rows_multiple, np.int32)
    lengths[:B] = [len(prompt) for prompt in prompts]
    tokens = np.full((len(lengths), max(slots, lengths.max())), end, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    # End of text is the last id.
    cast, first, step = _programs(
        model, options.temperature, options.top_k, tokenizer.num_ids, tokens.shape[1] + options.max_tokens
    )
    params = cast(params)
    rows = first(params, model_state, tokens, lengths, options.seed)
    made = np.full((B, options.max_tokens), end, np.int32)
    ended = np.zeros(B, bool)
    for t in range(options.max_tokens):
        # A copy: the next step takes the rows' buffers, and is dispatched before this one's tokens are read.
        newest, finite = jnp.copy(rows.tokens), jnp.copy(rows.finite)
        if t + 1 < options.max_tokens:
            rows = step(params, model_state, rows)
        if not np.asarray(finite)[:B].all():
            raise UserError("the model's logits are not finite: these weights have diverged; give an older --step")
        made[:, t] = np.where(ended, end, np.asarray(newest)[:B])
        ended |= made[:, t] == end
        if show(made[:, t]) is True or ended.all():
            break
    return [row[: np.argmax(row == end)] if end in row else row for row in made]


# ---- a run's folder -> text ------------------------------------------------------------------------------


class TextStream:
    """Turns tokens into text as they come, holding back the bytes of a character that is not complete."""

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], None]):
        self._tokenizer, self._write = tokenizer, write
        self._tokens: list[int] = []
        self._written = 0

    def add(self, tokens: np.ndarray) -> None:
        self._tokens.extend(int(token) for token in tokens)
        self._write_until(self._text().rstrip("\ufffd"))  # such an end may be the start of a character

    def close(self) -> None:
        self._write_until(self._text())

    def _text(self) -> str:
        return self._tokenizer.decode(np.asarray(self._tokens, np.int64))

    def _write_until(self, text: str) -> None:
        if len(text) > self._written:
            self._write(text[self._written :])
            self._written = len(text)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> np.ndarray:
    """Ids of a prompt. An empty one becomes an end of text: what follows is the beginning of a document."""
    tokens = tokenizer.encode(prompt.encode("utf-8", "surrogateescape"))
    return tokens if len(tokens) else np.array([tokenizer.end_of_text], tokenizer.dtype)


def sample(
    config: Config,
    workdir: Path,
    step: int | None,
    prompts: list[str],
    options: SampleOptions,
    write: Callable[[str], None],
) -> None:
    """Continues prompts with a run's checkpoint (default: the newest) and writes prompts and continuations.

    One prompt's text is written as it comes; those of several, under a heading each, when all are complete.

    Raises:
      UserError: an option is out of range, there is no such checkpoint, the cache would be too large, or the mesh
        does not fit.
    """
    check_options(options)
    start_jax(config.platform)
    with open_trained(workdir, step, "sampling from") as restore:
        tokenizer = run_tokenizer(config, workdir)
        ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
        mesh = make_mesh(config.mesh)
        rows_multiple = batch_shards(dict(mesh.shape))
        rows = -(-len(ids) // rows_multiple) * rows_multiple
        check_divisible(config, dict(mesh.shape), "rows", rows)
        _check_length(config, rows, max(map(len, ids)), options)
        with jax.set_mesh(mesh):
            trained = restore(config, define(config.model, config.execution), mesh)
            weights = (trained.params, trained.model_state)
            run = partial(generate, trained.model, *weights, tokenizer, ids, options, rows_multiple=rows_multiple)
            if len(ids) == 1:
                stream = TextStream(tokenizer, write)
                stream.add(ids[0])
                run(show=stream.add)
                stream.close()
                write("\n")
                return
            for number, (prompt, new) in enumerate(zip(ids, run(), strict=True), 1):
                write(f"--- {number} of {len(ids)}\n{tokenizer.decode(np.concatenate([prompt, new]))}\n")


def run_tokenizer(config: Config, workdir: Path) -> Tokenizer:
    """The tokenizer that a run was trained with, from its folder.

    Raises:
      UserError: its tokenizer.json is missing, or is not the one that its config names.
    """
    if config.data.tokenizer == "bytes":
        return BYTES
    path = workdir / run_folder.TOKENIZER
    if not path.is_file():
        raise UserError(f"{path} is missing; copy it back from the run's token store")
    try:
        tokenizer = bpe.load(path.read_text(encoding="utf-8"), vocab_size(config.data))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); copy it back from the run's token store") from error
    if tokenizer.hash != config.data.tokenizer_hash:
        raise UserError(f"{path} is not the run's tokenizer {config.data.tokenizer_hash}; copy that one back")
    return tokenizer


def _check_length(config: Config, rows: int, prompt_tokens: int, options: SampleOptions) -> None:
    tokens = prompt_tokens + options.max_tokens
    mib = cache_bytes(config.model, rows, tokens) / 2**20
    if mib > options.max_cache_mib:
        raise UserError(
            f"keys and values of {rows} rows of {prompt_tokens} + {options.max_tokens} tokens take {mib:,.0f} MiB, "
            f"above --max_cache_mib {options.max_cache_mib}; lower --max_tokens, or raise that limit"
        )
    if tokens > config.data.seq_len:  # rotary embeddings go on for ever; what was learnt does not
        print(
            f"note: the run was trained on {config.data.seq_len} tokens at a time; what stands beyond "
            f"them (of {tokens}) it continues without having learnt to",
            file=sys.stderr,
        )
