import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from tiny_lines import TINY_TEST, TINY_TRAIN

from spannorm_jax.config import DataConfig
from spannorm_jax.data import bpe
from spannorm_jax.data.tokenizer import vocab_size
from spannorm_jax.data.tokens import fingerprint, open_store, open_tokenizer
from spannorm_jax.errors import UserError

LINES = [line.encode() for line in TINY_TRAIN]
ODD = [
    "",
    "plain words, and more words\n\n\n",
    "def f(x):\n\treturn  x   \r\n",
    "naïve € \U0001f600\u200d\U0001f525 \x00\x7f\x85\xad \u2028 \ufeff",
    "日本語 עברית ٣ e\u0301 \u00a0\u3000",
    "<|endoftext|><s></s>[UNK]<unk> Ġ Ċ",
    "a" * 3000,
]


@pytest.fixture(scope="module")
def tokenizer():
    return bpe.load(bpe.train(LINES, vocab_size=400, max_bytes=0), vocab_size=512)


@pytest.fixture
def tiny_bpe(tiny):
    return dataclasses.replace(tiny, tokenizer="bpe", bpe_vocab_size=400)


@pytest.mark.parametrize("text", ODD)
def test_any_text_survives_and_its_token_bytes_are_its_length(tokenizer, text):
    tokens = tokenizer.encode(text.encode())
    assert tokens.dtype == tokenizer.dtype == np.uint16
    assert tokenizer.decode(np.append(tokens, tokenizer.end_of_text)) == text
    assert tokenizer.token_bytes[tokens].sum() == len(text.encode())


def test_every_character_of_every_length_survives(tokenizer):
    text = "".join(chr(i) for i in [*range(0xD800), *range(0xE000, 0x12000), *range(0x1F000, 0x20000)])
    tokens = tokenizer.encode(text.encode())
    assert tokenizer.decode(tokens) == text
    assert tokenizer.token_bytes[tokens].sum() == len(text.encode())


def test_no_text_can_forge_the_end(tokenizer):
    names = [*json.loads(tokenizer.source)["model"]["vocab"], "<|endoftext|>", chr(tokenizer.end_of_text)]
    assert tokenizer.end_of_text not in tokenizer.encode(" ".join(names).encode())
    assert tokenizer.token_bytes[tokenizer.end_of_text] == 0


def test_it_was_trained_on_the_text(tokenizer):
    line = b"line 3 of the tiny set: "
    assert len(tokenizer.encode(line)) < len(line) / 2


def test_bytes_that_are_not_utf8_become_marks(tokenizer):
    assert tokenizer.decode(tokenizer.encode(b"a\xffb")) == "a\ufffdb"


def test_half_a_character_decodes_to_a_mark_and_unused_ids_are_refused(tokenizer):
    euro = bpe.load(bpe.train([b"x"], 300, 0), 384).encode("€".encode())
    assert len(euro) == 3  # nothing to merge was learnt
    assert tokenizer.decode(euro[:2]) == "\ufffd"
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
    text = b"\n".join(LINES) + b"".join(b"tie%d eit%d " % (i, i) for i in range(2000))

    def train(threads):
        env = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONPATH": os.getcwd()}
        return subprocess.run([sys.executable, "-c", code], input=text, env=env, capture_output=True, check=True).stdout

    assert train("1") == train("4") == train("4")


def test_only_the_front_is_trained_on():
    assert bpe.train(LINES, 300, max_bytes=1) == bpe.train(LINES[:1], 300, 0)


@pytest.mark.parametrize(("tokens", "rows"), [(257, 384), (8192, 8192), (50257, 50304)])
def test_rows_are_divisible_and_known_before_training(tokens, rows):
    assert vocab_size(DataConfig(tokenizer="bpe", bpe_vocab_size=tokens)) == rows


def test_a_store_of_bpe_holds_the_text_and_its_tokenizer(tiny_bpe):
    tokenizer = open_tokenizer(tiny_bpe)
    for split, lines in (("train", TINY_TRAIN), ("test", TINY_TEST)):
        store = open_store(tiny_bpe, split)
        parts = np.split(store.tokens, np.flatnonzero(store.tokens == tokenizer.end_of_text) + 1)
        assert sorted(tokenizer.decode(part) for part in parts[:-1]) == sorted(lines)
        assert store.num_bytes == len("".join(lines).encode())
        assert store.tokenizer == f"bpe-{tokenizer.hash}"
        assert tokenizer.name in store.path.parts
        assert (store.path / "tokenizer.json").read_text() == tokenizer.source
    assert tokenizer.vocab_size == 512


def test_other_training_text_or_size_is_another_tokenizer_and_fingerprint(tiny_bpe):
    variants = [
        tiny_bpe,
        dataclasses.replace(tiny_bpe, bpe_vocab_size=300),
        dataclasses.replace(tiny_bpe, train_split="train[:10%]"),
    ]
    assert len({open_tokenizer(data).hash for data in variants}) == 3
    assert len({fingerprint(open_store(data, "test")) for data in variants}) == 3


def test_a_tokenizer_that_is_not_the_configs_says_where_the_right_one_goes(tiny_bpe):
    right = open_tokenizer(tiny_bpe)
    assert open_tokenizer(dataclasses.replace(tiny_bpe, tokenizer_hash=right.hash)).source == right.source
    with pytest.raises(UserError, match=rf"{right.hash}.*data\.tokenizer_hash=0123.*tokenizer\.json"):
        open_store(dataclasses.replace(tiny_bpe, tokenizer_hash="0123"), "test")


def test_a_damaged_tokenizer_file_names_the_remedy(tiny_bpe, tmp_path):
    open_tokenizer(tiny_bpe)
    (path,) = (tmp_path / "cache").rglob("tokenizer.json")
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
    assert start_python(code, tiny.data_dir, tiny.cache_dir).communicate(timeout=60) == ("", "")
