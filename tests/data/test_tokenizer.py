"""Bytes, and byte-level BPE as it is trained, kept and opened."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from processes import LIMIT_S
from tiny import LINES

from spannorm_jax.config import DataConfig
from spannorm_jax.data import bpe
from spannorm_jax.data.tokenizer import BYTES, vocab_size
from spannorm_jax.data.tokens import fingerprint, open_store, open_tokenizer
from spannorm_jax.errors import UserError

TEXTS = [line.encode() for line in LINES["train"]]
ODD = [
    "",
    "plain words, and more words\n\n\n",
    "def f(x):\n\treturn  x   \r\n",
    "naïve € \U0001f600\u200d\U0001f525 \x00\x7f\x85\xad \u2028 \ufeff",
    "日本語 עברית ٣ e\u0301 \u00a0\u3000",
    "<|endoftext|><s></s>[UNK]<unk> Ġ Ċ",
    "a" * 3000,
    "".join(chr(i) for i in [*range(0xD800), *range(0xE000, 0x12000), *range(0x1F000, 0x20000)]),
]


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request):
    return BYTES if request.param == "bytes" else bpe.load(bpe.train(TEXTS, 400, max_bytes=0), vocab_size=512)


@pytest.fixture
def tiny_bpe(tiny):
    return dataclasses.replace(tiny, tokenizer="bpe", bpe_vocab_size=400)


@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_any_text_survives_and_its_token_bytes_are_its_length(tokenizer, text):
    tokens = tokenizer.encode(text.encode())
    assert tokens.dtype == tokenizer.dtype == (np.uint8 if tokenizer is BYTES else np.uint16)
    assert tokenizer.decode(np.append(tokens, tokenizer.end_of_text)) == text
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes[tokens].sum() == len(text.encode())


def test_no_text_can_forge_the_end_and_no_bytes_are_refused(tokenizer):
    forged = ["<|endoftext|>", chr(tokenizer.end_of_text)]
    forged += json.loads(tokenizer.source)["model"]["vocab"] if tokenizer.source else []
    assert tokenizer.end_of_text not in tokenizer.encode(" ".join(forged).encode())
    assert tokenizer.token_bytes[tokenizer.end_of_text] == 0
    every_byte = bytes(range(256)) + b"\xff\xff"
    tokens = tokenizer.encode(every_byte)
    assert tokenizer.end_of_text not in tokens and tokenizer.decode(tokens) == every_byte.decode(errors="replace")
    assert tokenizer.decode(tokenizer.encode("日".encode())[:1]) == "\ufffd"  # a character that is cut
    with pytest.raises(ValueError, match=str(tokenizer.end_of_text + 1)):
        tokenizer.decode(np.array([65, tokenizer.end_of_text + 1]))


def test_training_again_in_other_processes_gives_the_same_file():
    # Threads count words in parallel, and hash tables are seeded anew in each process.
    code = "import sys; from spannorm_jax.data import bpe; print(bpe.train(sys.stdin.buffer.readlines(), 500, 0))"
    text = b"\n".join(TEXTS) + b"".join(b"tie%d eit%d " % (i, i) for i in range(2000))

    def train(threads):
        env = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONPATH": os.getcwd()}
        return subprocess.run([sys.executable, "-c", code], input=text, env=env, capture_output=True, check=True).stdout

    assert train("1") == train("4") == train("4")


@pytest.mark.parametrize("letters", ["ACGT", "天地玄黃宇宙洪荒", " \t\n"])
def test_no_token_is_longer_than_the_runs_that_training_sees(letters):
    text = "".join(np.random.default_rng(0).choice(list(letters), 20_000))
    tokenizer = bpe.load(bpe.train([f"x = {text}\nx".encode()], 2000, 0), 2048)
    assert 1 < tokenizer.token_bytes.max() <= 1 + 256 * len(letters[0].encode())  # a space goes before
    assert tokenizer.decode(tokenizer.encode(text.encode())) == text


def test_ordinary_text_gives_the_tokenizer_that_unbounded_runs_give():
    """The reference is byte-level BPE as `tokenizers` has it."""
    lines = [*TEXTS, *(text.encode() for text in ODD[:-2]), b"x" * 256, b" " * 256 + b"x", b"don't we'll 1234567"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=599, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((line.decode() for line in lines), trainer)
    assert bpe.train(lines, 600, 0) == tokenizer.to_str()
    assert bpe.train(lines, 600, max_bytes=1) == bpe.train(lines[:1], 600, 0)  # only the front is trained on


def test_what_goes_wrong_with_the_texts_or_the_process_is_raised(monkeypatch):
    def damaged():
        yield b"some text"
        raise UserError("shard 3 is damaged")

    with pytest.raises(UserError, match="shard 3 is damaged"):
        bpe.train(damaged(), 300, 0)
    monkeypatch.setattr(bpe.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="ended with code"):
        bpe.train([b"x" * 100_000] * 10, 300, 0)


@pytest.mark.parametrize("phase", ["reading", "merging"])
def test_ctrl_c_ends_training_and_leaves_nothing(tiny, phase, start_python):
    code = """
import itertools, random
from spannorm_jax.data import bpe, tokens
from spannorm_jax.command import run_command
bpe._TOLD_ABOVE = 0
def texts(*args):
    print("training the tokenizer, or rather reading", file=sys.stderr, flush=True)
    yield from itertools.repeat(b"some text")
genome = "".join(random.choices("ACGT", k=2_000_000)).encode()  # takes many seconds
tokens._Source.texts = texts if sys.argv.pop() == "reading" else lambda *args: [genome]
run_command(lambda argv: tokens.open_tokenizer(data))
"""
    data = dataclasses.replace(tiny, tokenizer="bpe", bpe_train_mib=0)
    process = start_python(code, data, phase)
    assert "training the tokenizer" in (line := process.stderr.readline()), line + process.stderr.read()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=LIMIT_S)  # which waits for the trainer's end too: it has the same stderr
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "interrupted" and "Traceback" not in err and out == ""
    assert not [path for path in Path(tiny.cache_dir).rglob("*") if path.is_file() or "incomplete" in path.name]


@pytest.mark.parametrize(("tokens", "rows"), [(257, 384), (8192, 8192), (50257, 50304)])
def test_rows_are_divisible_and_known_before_training(tokens, rows):
    assert vocab_size(DataConfig(tokenizer="bpe", bpe_vocab_size=tokens)) == rows


def test_a_store_of_bpe_holds_the_text_and_its_tokenizer(tiny_bpe):
    tokenizer = open_tokenizer(tiny_bpe)
    for split in ("train", "test"):
        store = open_store(tiny_bpe, split)
        parts = np.split(store.tokens, np.flatnonzero(store.tokens == tokenizer.end_of_text) + 1)
        assert sorted(tokenizer.decode(part) for part in parts[:-1]) == sorted(LINES[split])
        assert store.num_bytes == len("".join(LINES[split]).encode())
        assert store.tokenizer == f"bpe-{tokenizer.hash}" in store.path.parts
        assert (store.path / "tokenizer.json").read_text() == tokenizer.source
    assert tokenizer.vocab_size == 512


def test_other_training_text_or_size_is_another_tokenizer_and_fingerprint(tiny_bpe):
    changes = ({}, {"bpe_vocab_size": 300}, {"train_split": "train[:10%]"})
    variants = [dataclasses.replace(tiny_bpe, **change) for change in changes]
    assert len({open_tokenizer(data).hash for data in variants}) == 3
    assert len({fingerprint(open_store(data, "test")) for data in variants}) == 3


def test_a_tokenizer_that_is_not_the_configs_or_damaged_names_the_remedy(tiny_bpe, tmp_path, refused):
    right = open_tokenizer(tiny_bpe)
    assert open_tokenizer(dataclasses.replace(tiny_bpe, tokenizer_hash=right.hash)).source == right.source
    line = refused(open_store, dataclasses.replace(tiny_bpe, tokenizer_hash="0123"), "test")
    assert all(part in line for part in (right.hash, "data.tokenizer_hash=0123", "tokenizer.json"))
    (path,) = (tmp_path / "cache").rglob("bpe_*/**/tokenizer.json")
    for damaged in (path.read_text()[:-20], "", "{}", right.source.replace('"vocab":', '"vocab": 1, "v":')):
        path.write_text(damaged)
        assert f"delete {path.parent}" in refused(open_tokenizer, tiny_bpe)
    path.unlink()
    assert f"delete {path.parent}" in refused(open_tokenizer, tiny_bpe)
