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
from spannorm_jax.data.tokenizer import vocab_size
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


@pytest.fixture(scope="module")
def tokenizer():
    return bpe.load(bpe.train(TEXTS, vocab_size=400, max_bytes=0), vocab_size=512)


@pytest.fixture
def tiny_bpe(tiny):
    return dataclasses.replace(tiny, tokenizer="bpe", bpe_vocab_size=400)


@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_any_text_survives_and_its_token_bytes_are_its_length(tokenizer, text):
    tokens = tokenizer.encode(text.encode())
    assert tokens.dtype == tokenizer.dtype == np.uint16
    assert tokenizer.decode(np.append(tokens, tokenizer.end_of_text)) == text
    assert tokenizer.token_bytes[tokens].sum() == len(text.encode())


def test_no_text_can_forge_the_end_and_no_bytes_are_refused(tokenizer):
    names = [*json.loads(tokenizer.source)["model"]["vocab"], "<|endoftext|>", chr(tokenizer.end_of_text)]
    assert tokenizer.end_of_text not in tokenizer.encode(" ".join(names).encode())
    assert tokenizer.token_bytes[tokenizer.end_of_text] == 0
    assert tokenizer.decode(tokenizer.encode(b"a\xffb")) == "a\ufffdb"
    for unused in (tokenizer.end_of_text + 1, 511):
        with pytest.raises(ValueError, match=str(unused)):
            tokenizer.decode(np.array([unused]))


@pytest.mark.parametrize("source", ["", "{}", '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'[:-1]])
def test_a_damaged_source_is_refused(source):
    with pytest.raises(ValueError, match="byte-level BPE"):
        bpe.load(source, 512)


def test_training_again_in_other_processes_gives_the_same_file():
    # Threads count words in parallel, and hash tables are seeded anew in each process.
    code = "import sys; from spannorm_jax.data import bpe; print(bpe.train(sys.stdin.buffer.readlines(), 500, 0))"
    text = b"\n".join(TEXTS) + b"".join(b"tie%d eit%d " % (i, i) for i in range(2000))

    def train(threads):
        env = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONPATH": os.getcwd()}
        return subprocess.run([sys.executable, "-c", code], input=text, env=env, capture_output=True, check=True).stdout

    assert train("1") == train("4") == train("4")


def test_only_the_front_is_trained_on():
    assert bpe.train(TEXTS, 300, max_bytes=1) == bpe.train(TEXTS[:1], 300, 0)


@pytest.mark.parametrize(
    "letters", ["ACGT", "0123456789", "!#$%&()*+,-./:;<=>?", "天地玄黃宇宙洪荒", " ", "\n", " \t\n"]
)
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
import itertools, random, sys
from spannorm_jax.data import bpe, tokens
from spannorm_jax import prepare
from spannorm_jax.command import run_command
phase = sys.argv.pop()
bpe._TELL_EVERY_S = 0.01
genome = "".join(random.choices("ACGT", k=2_000_000)).encode()  # takes many seconds
tokens._Source.texts = lambda *args: itertools.repeat(b"some text") if phase == "reading" else [genome]
run_command(prepare.main)
"""
    config = dataclasses.asdict(dataclasses.replace(tiny, tokenizer="bpe", bpe_train_mib=0))
    changed = ("dataset", "text_feature", "eval_split", "data_dir", "cache_dir", "tokenizer", "bpe_train_mib")
    options = [f"--config.data.{key}={config[key]}" for key in changed]
    process = start_python(code, "--config", "configs/dense.py", *options, phase)
    for line in process.stderr:  # progress is told
        if f"training the tokenizer: {phase}" in line:
            break
        assert "training the tokenizer" in line, line + process.stderr.read()
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


def test_a_tokenizer_that_is_not_the_configs_or_damaged_names_the_remedy(tiny_bpe, tmp_path):
    right = open_tokenizer(tiny_bpe)
    assert open_tokenizer(dataclasses.replace(tiny_bpe, tokenizer_hash=right.hash)).source == right.source
    with pytest.raises(UserError, match=rf"{right.hash}.*data\.tokenizer_hash=0123.*tokenizer\.json"):
        open_store(dataclasses.replace(tiny_bpe, tokenizer_hash="0123"), "test")
    (path,) = (tmp_path / "cache").rglob("bpe_*/**/tokenizer.json")
    path.write_text(path.read_text()[:-20])
    with pytest.raises(UserError, match=f"delete {path.parent}"):
        open_tokenizer(tiny_bpe)
    path.unlink()
    with pytest.raises(UserError, match=f"delete {path.parent}"):
        open_tokenizer(tiny_bpe)


def test_runs_on_bytes_do_not_import_it(tiny, start_python):
    open_store(tiny, "train")
    code = """
import sys
from spannorm_jax.config import DataConfig
from spannorm_jax.data.tokens import open_store, open_tokenizer
data = DataConfig(dataset='tiny_lines', text_feature='line', data_dir=sys.argv[1], cache_dir=sys.argv[2])
open_store(data, 'train'), open_tokenizer(data)
assert 'tokenizers' not in sys.modules
"""
    assert start_python(code, tiny.data_dir, tiny.cache_dir).communicate(timeout=LIMIT_S) == ("", "")
