import dataclasses
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from processes import LIMIT_S
from tiny import LINES, prepare

from spannorm_jax.data import python_files, tokens
from spannorm_jax.data.tokens import Windows, fingerprint, open_store

BUILD = "from spannorm_jax.data import tokens; print(tokens.open_store(data, 'train').sha256)"


def documents(store):
    """The store's documents as a multiset of byte strings."""
    parts = store.tokens.tobytes().split(b"\xff")
    assert parts.pop() == b"", "the last document has no end"
    return Counter(parts)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_store_holds_the_library_itself(source_data, split):
    store = open_store(source_data, split)
    files = [file for name, file in python_files.here("stdlib")[0] if python_files.split_of(name) == split]
    expected = Counter(text.encode() for text in map(python_files.read_source, files) if text is not None)
    assert documents(store) == expected
    assert store.num_docs == expected.total()
    assert store.num_bytes == sum(len(text) * n for text, n in expected.items())
    assert store.num_tokens == store.num_bytes + store.num_docs


def test_a_dataset_of_ones_own_by_name(tiny):
    for split in ("train", "test"):
        store = open_store(tiny, split)
        assert documents(store) == Counter(line.encode() for line in LINES[split])
        assert (store.dataset, store.split) == ("tiny_lines/1.2.3", split)
    text = b"".join(line.encode() + b"\xff" for line in LINES["test"])
    p = [n / len(text) for n in Counter(text).values()]
    assert store.unigram_entropy == pytest.approx(-sum(q * math.log(q) for q in p), rel=1e-12)
    with pytest.raises(ValueError, match="read-only"):
        store.tokens[0] = 1


def test_documents_longer_than_the_buffer_are_written_in_order(tiny, monkeypatch):
    whole = open_store(tiny, "train")
    monkeypatch.setattr(tokens, "_WRITE_AT_ONCE", 10)
    other = open_store(dataclasses.replace(tiny, cache_dir=tiny.cache_dir + "2"), "train")
    np.testing.assert_array_equal(whole.tokens, other.tokens)
    assert (whole.sha256, whole.unigram_entropy) == (other.sha256, other.unigram_entropy)


def test_a_start_with_its_stores_at_hand_imports_neither_tfds_nor_tokenizers(source_data, start_python):
    splits = [open_store(source_data, split).sha256 for split in ("train", "validation")]
    code = """
from spannorm_jax.data.open import open_data
from spannorm_jax.config import Config
data, _ = open_data(Config(data=data))
print(data.train.sha256, data.eval.sha256, {'tensorflow_datasets', 'tokenizers'} & {*sys.modules})
"""
    printed = start_python(code, source_data).communicate(timeout=LIMIT_S)
    assert printed == (" ".join([*splits, "set()"]) + "\n", "")


def test_the_default_cache_follows_xdg(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    store = open_store(dataclasses.replace(tiny, cache_dir=""), "test")
    assert store.path.is_relative_to(tmp_path / "xdg" / "spannorm_jax" / "tokens")


def test_a_killed_build_is_never_trusted_and_two_processes_build_one_store(tiny, start_python):
    killed = start_python(BUILD, tiny, die=True)
    killed.communicate()
    assert killed.returncode == -9
    assert list(Path(tiny.cache_dir).rglob("tokens.bin")), "the kill came too early to test anything"
    both = [start_python(BUILD, tiny) for _ in range(2)]
    outputs = [p.communicate() for p in both]
    store = open_store(tiny, "train")
    assert store.num_docs == 100 and outputs == [(store.sha256 + "\n", "")] * 2


def test_a_failed_build_leaves_nothing(tiny, monkeypatch):
    def fail(text):
        raise RuntimeError("disk on fire")

    with monkeypatch.context() as patch:
        patch.setattr(tokens, "BYTES", dataclasses.replace(tokens.BYTES, encode=fail))
        with pytest.raises(RuntimeError, match="on fire"):
            open_store(tiny, "train")
    assert not [p for p in Path(tiny.cache_dir).rglob("*") if p.is_file() or "incomplete" in p.name]
    assert open_store(tiny, "train").num_docs == 100


def test_the_same_name_with_other_contents_is_another_store(tiny, tmp_path):
    prepare(tmp_path / "other", splits={"train": ["other text"]})
    first = open_store(tiny, "train")
    second = open_store(dataclasses.replace(tiny, data_dir=str(tmp_path / "other")), "train")
    assert documents(second) == Counter([b"other text"])
    assert first.path != second.path


def test_fingerprints_tell_stores_and_their_order_apart(tiny):
    train, test = open_store(tiny, "train"), open_store(tiny, "test")
    prints = [fingerprint(train, test), fingerprint(test, train), fingerprint(train)]
    prints.append(fingerprint(dataclasses.replace(train, tokenizer="other")))
    assert len(set(prints)) == 4
    assert all(len(p) == 16 and int(p, 16) >= 0 for p in prints)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("tokens.bin", lambda content: b"short"),
        ("tokens.bin", lambda content: b"L" + content[1:]),
        ("meta.json", lambda content: None),
        ("meta.json", lambda content: b'{"format": 1'),
        ("meta.json", lambda content: content.replace(b"100", b"101")),
    ],
    ids=["cut", "flipped", "no meta", "half a meta", "another meta"],
)
def test_a_damaged_store_names_the_remedy(tiny, refused, file, change):
    path = open_store(tiny, "train").path
    changed = change((path / file).read_bytes())
    (path / file).unlink()
    if changed is not None:
        (path / file).write_bytes(changed)
    assert f"delete {path}" in refused(open_store, tiny, "train")


def test_windows_predict_each_token_once(tiny, refused):
    store = open_store(tiny, "train")
    for seq_len in (1, 16, 100, store.num_tokens - 1):
        windows = Windows(store, seq_len)
        assert len(windows) == (store.num_tokens - 1) // seq_len
        rows = np.stack([windows[i] for i in range(len(windows))])
        assert rows.dtype == np.int32 and rows.shape[1] == seq_len + 1
        targets = rows[:, 1:].reshape(-1)
        np.testing.assert_array_equal(targets, store.tokens[1 : 1 + len(targets)])
        assert store.num_tokens - 1 - len(targets) < seq_len
    with pytest.raises(IndexError):
        windows[len(windows)]
    assert f"data.seq_len={store.num_tokens} is too long" in refused(Windows, store, store.num_tokens)
