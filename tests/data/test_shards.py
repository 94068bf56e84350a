"""A store made in parts, by processes that are killed, repeated, overtaken or damaged."""

import dataclasses
import shutil
from pathlib import Path

import pytest
from processes import LIMIT_S

from spannorm_jax.data import shards, tokens
from spannorm_jax.data.tokens import open_store, write_shard
from spannorm_jax.errors import UserError

MAKE = "from spannorm_jax.data import tokens; print(tokens.write_shard(data, 'train', (int(sys.argv[1]), 3)))"


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_one_go(data, split, tmp_path):
    """Content of the store that is made without shards."""
    return content(open_store(dataclasses.replace(data, cache_dir=str(tmp_path / "once")), split).path)


def made_as(data, split, expected):
    """Whether the store is `expected`, and all that is there."""
    path = open_store(data, split).path
    return content(path) == expected and [p.name for p in path.parent.iterdir()] == [split]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
@pytest.mark.parametrize(
    "order", [[(0, 1)], [(1, 3), (0, 3), (2, 3)], [(1, 3), (1, 3), (0, 3), (2, 3), (0, 3)], [(0, 3), (0, 2), (1, 2)]]
)
def test_shards_in_any_order_repeated_or_overtaken_make_the_same_files(tiny, tmp_path, tokenizer, order):
    data = dataclasses.replace(tiny, tokenizer=tokenizer, bpe_vocab_size=300)
    expected = in_one_go(data, "train", tmp_path)
    done = set()
    for i, n in order:
        left = write_shard(data, "train", (i, n))
        complete = any({(i, n) for i in range(n)} <= done for _, n in done)
        done.add((i, n))
        assert left == ([] if complete else [i for i in range(n) if (i, n) not in done])
    assert made_as(data, "train", expected)


def test_more_shards_than_documents(tiny, tmp_path):
    expected = in_one_go(tiny, "test", tmp_path)
    assert [write_shard(tiny, "test", (i, 5)) for i in range(5)][-1] == []
    assert made_as(tiny, "test", expected)


def test_a_killed_shard_is_made_again_and_processes_may_work_at_the_same_time(tiny, tmp_path, start_python):
    expected = in_one_go(tiny, "train", tmp_path)
    killed = start_python(MAKE, tiny, 1, die=True)
    killed.communicate(timeout=LIMIT_S)
    assert killed.returncode == -9
    left = list(Path(tiny.cache_dir).rglob(".incomplete-*"))
    assert left and left[0].joinpath("tokens.bin").is_file(), "the kill came too early to test anything"
    processes = [start_python(MAKE, tiny, i) for i in (0, 1, 2, 2)]
    results = [(*p.communicate(timeout=LIMIT_S), p.returncode) for p in processes]
    assert all(err == "" and code == 0 for _, err, code in results), results
    assert "[]\n" in [out for out, _, _ in results]
    shutil.rmtree(left[0])
    assert made_as(tiny, "train", expected)


def test_a_later_plain_call_joins_what_a_killed_joiner_left(tiny, tmp_path, monkeypatch):
    expected = in_one_go(tiny, "train", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "_join", lambda *args: None)  # as if killed before it did anything
        for i in range(2):
            write_shard(tiny, "train", (i, 2))
    monkeypatch.setattr(tokens, "_chunks", lambda *args: None)  # joining reads no text
    assert made_as(tiny, "train", expected)


def test_two_joiners_at_once_both_succeed(tiny, tmp_path, monkeypatch):
    expected, read = in_one_go(tiny, "train", tmp_path), tokens._read

    def beaten(path, *args):
        if path.name == "1-of-2":  # the other process joins and removes the parts, once the first is read
            monkeypatch.setattr(tokens, "_read", read)
            open_store(tiny, "train")
        return read(path, *args)

    monkeypatch.setattr(tokens, "_read", beaten)
    assert [write_shard(tiny, "train", (i, 2)) for i in range(2)] == [[1], []]
    assert made_as(tiny, "train", expected)


def test_training_does_not_silently_do_the_work_of_missing_shards(tiny, refused):
    write_shard(tiny, "train", (1, 4))
    parts = next(Path(tiny.cache_dir).rglob(".train.parts"))
    line = refused(open_store, tiny, "train")
    assert all(part in line for part in ("4 shards of which 3 are missing (0, 2, 3)", "--shard i/4", f"delete {parts}"))
    shutil.rmtree(parts)
    assert open_store(tiny, "train").num_docs == 100


@pytest.mark.parametrize("file", ["tokens.bin", "meta.json"])
@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_part_is_named_and_nothing_made_of_it(tiny, refused, file, damage):
    write_shard(tiny, "train", (0, 2))
    (path,) = Path(tiny.cache_dir).rglob(f"0-of-2/{file}")
    good = path.read_bytes()
    path.write_bytes(good[:-3] if damage == "cut" else good[:-10] + bytes([good[-10] ^ 1]) + good[-9:])
    assert f"delete {path.parent}" in refused(write_shard, tiny, "train", (1, 2))
    shutil.rmtree(path.parent)
    assert write_shard(tiny, "train", (0, 2)) == []
    assert open_store(tiny, "train").num_docs == 100


@pytest.mark.parametrize("text", ["", "3", "3/3", "-1/3", "0/0", "1/2/3", "a/b", "0.5/2"])
def test_a_shard_that_is_none(text):
    with pytest.raises(UserError, match="--shard"):
        shards.parse(text)
    assert shards.parse("0/1") == (0, 1) and shards.parse("2/3") == (2, 3)
