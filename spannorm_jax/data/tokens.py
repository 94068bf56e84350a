"""TFDS split -> token store on disk -> windows of sequence length + 1.

A store is a folder with `tokens.bin`, all documents in a row with an end-of-text token after each, `meta.json`, and
`tokenizer.json` if the tokenizer was trained. It appears atomically and never changes, so any number of processes may
share it. Each start checks it: `meta.json` by a hash of its own, `tokens.bin` by its size and, up to `data.verify_mib`,
by its hash.
"""

import functools
import hashlib
import json
import math
import sys
import types
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spannorm_jax import durable
from spannorm_jax.config import DataConfig
from spannorm_jax.data import bpe, names, shards
from spannorm_jax.data.shards import Shard
from spannorm_jax.data.tokenizer import BYTES, Tokenizer, vocab_size
from spannorm_jax.errors import UserError, one_line
from spannorm_jax.paths import cache_home, user_path

FORMAT = 2  # of the store; another format is another folder
_TOKENS = "tokens.bin"
_META = "meta.json"
_TOKENIZER = "tokenizer.json"
_WRITE_AT_ONCE = 1 << 20  # tokens held in memory before they are written


@dataclass(frozen=True, eq=False)
class TokenStore:
    """The tokens of one split."""

    path: Path  # of its folder
    tokens: np.ndarray  # [num_tokens] of the tokenizer's dtype, a map of the file, read only
    dataset: str  # TFDS's full name, with config and version
    split: str
    text_feature: str
    tokenizer: str  # `Tokenizer.name`, which holds the hash of a trained one
    num_docs: int  # and so end-of-text tokens
    num_bytes: int  # of text that all tokens stand for
    sha256: str  # of tokens.bin, hex
    unigram_entropy: float  # nats per token of the frequencies: the loss of a model that knows nothing else

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class _Source:
    """The dataset that a config names. TFDS, whose import takes its time, is asked only when it must be."""

    data: DataConfig

    @functools.cached_property
    def _builder(self) -> Any:
        return _tfds().open_dataset(self.data)

    @functools.cached_property
    def identity(self) -> str:
        """Name that no other contents have, for folders."""
        return names.embedded(self.data) or _tfds().identity(self._builder)

    @property
    def full_name(self) -> str:
        return self._builder.info.full_name

    def texts(self, split: str, shard: Shard | None = None) -> Iterator[bytes]:
        return _tfds().open_split(self._builder, self.data, split, shard)


def _tfds() -> types.ModuleType:
    from spannorm_jax.data import tfds_files

    return tfds_files


def open_store(data: DataConfig, split: str) -> TokenStore:
    """Opens the token store of `split`. One that is not there is built first, of its shards if they are there.

    Raises:
      UserError: the tokenizer, dataset, split or text feature is wrong (see `tfds_files`), the split holds no text, a
        folder cannot be written, a store on disk is damaged, or some but not all of its shards are there.
    """
    source, tokenizer, path = _place(data, split)
    # Before the store is looked for: who joins shards publishes the store first, then removes them.
    left = shards.begun(path)
    store = _read(path, data.verify_mib)
    if store is None:
        complete = [n for n in left if not left[n]]
        if left and not complete:
            shards.refuse(path, left)
        facts = _facts(source, tokenizer, split)
        if complete:
            _join(path, complete[0], tokenizer, facts)
        else:
            _write(path, _chunks(source.texts(split), tokenizer), tokenizer, facts)
        store = _read(path, data.verify_mib)
        if store is None:
            raise UserError(f"{path} was removed as soon as it was made; repeat the command")
    return store


def write_shard(data: DataConfig, split: str, shard: Shard) -> list[int]:
    """Makes one part of the token store of `split`, and the store if this part was the last; returns those missing.

    Any processes that share `data.cache_dir` may make any parts, also the same one, at any time.

    Raises:
      UserError: as `open_store`, and if a part on disk is damaged.
    """
    source, tokenizer, path = _place(data, split)
    facts = _facts(source, tokenizer, split)
    if not path.is_dir() and not shards.folder(path, shard).is_dir():
        _write(path, _chunks(source.texts(split, shard), tokenizer), tokenizer, facts, shard)
    left = shards.begun(path)
    if path.is_dir():  # meanwhile joined by another process, which did not need this part
        shards.remove(path)
        return []
    if not left[shard[1]]:
        _join(path, shard[1], tokenizer, facts)
    return left[shard[1]]


def open_tokenizer(data: DataConfig, source: _Source | None = None) -> Tokenizer:
    """The tokenizer of `data`; BPE is trained on the training split if it is not in `data.cache_dir`.

    Raises:
      UserError: the hash is not `data.tokenizer_hash`, a file is damaged, or as `open_store`.
    """
    if data.tokenizer == "bytes":
        return BYTES
    if data.tokenizer_file:
        path = user_path(data.tokenizer_file, "config key data.tokenizer_file")
        return _load_tokenizer(data, path, "set config key data.tokenizer_file to a byte-level BPE's tokenizer.json")
    source = source or _Source(data)
    name = f"bpe_{data.bpe_vocab_size}_{data.bpe_train_mib}MiB"
    folder = _folder(data, source.identity, name, data.train_split)
    path = folder / _TOKENIZER
    if not folder.is_dir():
        texts = source.texts(data.train_split)
        with durable.temporary_folder(folder.parent, "config key data.cache_dir") as temp:
            trained = bpe.train(texts, data.bpe_vocab_size, data.bpe_train_mib << 20)
            (temp / _TOKENIZER).write_text(trained, encoding="utf-8")
            durable.publish(temp, folder)
    return _load_tokenizer(data, path, f"delete {folder}, and it is trained again")


def _load_tokenizer(data: DataConfig, path: Path, remedy: str) -> Tokenizer:
    try:
        opened = bpe.load(path.read_text(encoding="utf-8"), vocab_size(data))
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer {path} cannot be read ({error}); {remedy}") from error
    if data.tokenizer_hash not in ("", opened.hash):
        raise UserError(
            f"the tokenizer here has hash {opened.hash}, not data.tokenizer_hash={data.tokenizer_hash}; put the "
            f"tokenizer.json that the run was made with at {path}, or start a new run without data.tokenizer_hash"
        )
    return opened


def fingerprint(*stores: TokenStore) -> str:
    """16 hex digits that change with any token, tokenizer or the order of the stores."""
    facts = "\n".join(f"{store.tokenizer} {store.sha256}" for store in stores)
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


class Windows:
    """Random access to a store's full windows: window i is int32 [seq_len + 1].

    Window i starts at token i * seq_len, so neighbours share one token: the last target of one is the first input of
    the next, and each token is predicted once. Raises UserError if the store is shorter than one window.
    """

    def __init__(self, store: TokenStore, seq_len: int):
        if store.num_tokens < seq_len + 1:
            raise UserError(
                f"config key data.seq_len={seq_len} is too long for split {store.split!r} of "
                f"{store.dataset}, which has {store.num_tokens} tokens; a window takes "
                f"seq_len + 1: write {max(store.num_tokens - 1, 1)} or less, or take more data"
            )
        # A plain view of the map: slicing a np.memmap costs several times as much.
        self._tokens = np.asarray(store.tokens)
        self._seq_len = seq_len

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._seq_len

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = int(index) * self._seq_len
        return self._tokens[start : start + self._seq_len + 1].astype(np.int32)


def _place(data: DataConfig, split: str) -> tuple[_Source, Tokenizer, Path]:
    """What the store of `split` is made from, and its folder."""
    source = _Source(data)
    tokenizer = open_tokenizer(data, source)
    return source, tokenizer, _folder(data, source.identity, tokenizer.name, split)


def cache_folder(data: DataConfig, kind: str) -> Path:
    """Where stores are: `data.cache_dir`, or a folder of their kind in the user's cache."""
    if data.cache_dir:
        return user_path(data.cache_dir, "config key data.cache_dir").absolute()
    remedy = "set config key data.cache_dir or the variable XDG_CACHE_HOME"
    return cache_home(remedy).absolute() / "spannorm_jax" / kind


def _folder(data: DataConfig, dataset: str, tokenizer_name: str, split: str) -> Path:
    cache = cache_folder(data, "tokens")
    # Splits may be slices such as train[:90%].
    split_folder = urllib.parse.quote(split, safe="")
    return cache / f"v{FORMAT}" / dataset / tokenizer_name / data.text_feature / split_folder


def _facts(source: _Source, tokenizer: Tokenizer, split: str) -> dict:
    named = {"dataset": source.full_name, "split": split, "text_feature": source.data.text_feature}
    return {"format": FORMAT, **named, "tokenizer": tokenizer.name}


def _read(path: Path, verify_mib: float = math.inf) -> TokenStore | None:
    """Returns the store in folder `path`, checked; None if there is no such folder."""
    if not path.is_dir():
        return None
    file = path / _TOKENS
    try:
        meta = json.loads((path / _META).read_text(encoding="utf-8"))
        if meta.pop("meta_sha256") != _meta_sha256(meta):
            raise ValueError(f"{path / _META} has not the hash it was written with")
        dtype, num_tokens = np.dtype(meta.pop("dtype")), meta.pop("num_tokens")
        size = file.stat().st_size
        if size != num_tokens * dtype.itemsize:
            raise ValueError(f"{file} has {size} bytes where {_META} says {num_tokens * dtype.itemsize}")
        # An empty file, which a shard may be, has no map.
        tokens = np.memmap(file, dtype, mode="r") if size else np.zeros(0, dtype)
        if size > verify_mib * 2**20:
            print(f"only the size of {file} was checked: it is above data.verify_mib={verify_mib}", file=sys.stderr)
        elif hashlib.sha256(tokens.data).hexdigest() != meta["sha256"]:
            raise ValueError(f"{file} has not the hash in {_META}")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"token store {path} is damaged or cannot be read ({one_line(error)}); delete {path}, and it is rebuilt"
        ) from error
    del meta["format"]
    return TokenStore(path=path, tokens=tokens, **meta)


def _meta_sha256(meta: dict) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _join(path: Path, n: int, tokenizer: Tokenizer, facts: dict) -> None:
    def chunks() -> Iterator[np.ndarray]:
        for i in range(n):
            part = _read(shards.folder(path, (i, n)))
            if part is None:
                raise UserError(f"a shard of token store {path} was removed while it was joined; repeat the command")
            yield from (part.tokens[j : j + _WRITE_AT_ONCE] for j in range(0, part.num_tokens, _WRITE_AT_ONCE))

    try:
        _write(path, chunks(), tokenizer, facts)
    except UserError:
        if not path.is_dir():
            raise
        # Another process joined and removed them while we read.
    shards.remove(path)


def _write(
    path: Path, chunks: Iterator[np.ndarray], tokenizer: Tokenizer, facts: dict, shard: Shard | None = None
) -> None:
    """Writes the store in folder `path`, or one of its shards, which alone may hold no text."""
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    digest = hashlib.sha256()
    with durable.temporary_folder(path.parent, "config key data.cache_dir") as temp:
        with open(temp / _TOKENS, "wb") as file:
            for tokens in chunks:
                counts += np.bincount(tokens, minlength=tokenizer.vocab_size)
                digest.update(tokens.tobytes())
                file.write(tokens.tobytes())
        num_bytes = int(counts @ tokenizer.token_bytes)
        if num_bytes == 0 and not shard:
            raise UserError(
                f"split {facts['split']!r} of {facts['dataset']} holds no text in feature "
                f"{facts['text_feature']!r}; set config key data.text_feature or another split"
            )
        meta = facts | {
            "dtype": tokenizer.dtype.str,
            "num_tokens": int(counts.sum()),
            "num_docs": int(counts[tokenizer.end_of_text]),
            "num_bytes": num_bytes,
            "sha256": digest.hexdigest(),
            "unigram_entropy": entropy(counts),
        }
        durable.write_json(temp / _META, meta | {"meta_sha256": _meta_sha256(meta)})
        if tokenizer.source:
            (temp / _TOKENIZER).write_text(tokenizer.source, encoding="utf-8")
        durable.publish(temp, shards.folder(path, shard) if shard else path)


def _chunks(texts: Iterator[bytes], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Joins documents into arrays large enough that counting and writing them is cheap."""
    end = np.array([tokenizer.end_of_text], tokenizer.dtype)
    pending, size = [], 0
    for text in texts:
        pending += [tokenizer.encode(text), end]
        size += len(pending[-2]) + 1
        if size >= _WRITE_AT_ONCE:
            yield np.concatenate(pending)
            pending, size = [], 0
    if pending:
        yield np.concatenate(pending)


def entropy(counts: np.ndarray) -> float:
    """Nats, of the shares that counts are of their sum."""
    p = counts[counts > 0] / counts.sum()
    return float(-np.sum(p * np.log(p)))
