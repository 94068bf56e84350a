import dataclasses
import shutil
from pathlib import Path

import pytest
from processes import LIMIT_S

from spannorm_jax.data import shards, tokens
from spannorm_jax.data.tokens import open_store, write_shard
from spannorm_jax.errors import UserError

MAKE = """
import os, signal, sys
from spannorm_jax.config import DataConfig
from spannorm_jax.data import tokens
from spannorm_jax import durable
data = DataConfig(dataset='tiny_lines', text_feature='line', data_dir=sys.argv[1], cache_dir=sys.argv[2])
if sys.argv[4] == 'die':
    durable.publish = lambda folder, target: os.kill(os.getpid(), signal.SIGKILL)
print(tokens.write_shard(data, 'train', (int(sys.argv[3]), 3)))
"""


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(params=["bytes", "bpe"])
def whole(request, tiny, tmp_path):
    """(config with an empty cache, content of the store made in one go)."""
    tiny = dataclasses.replace(tiny, tokenizer=request.param, bpe_vocab_size=300)
    once = dataclasses.replace(tiny, cache_dir=str(tmp_path / "once"))
    return tiny, content(open_store(once, "train").path)


def made_as(data, expected):
    """Whether the store is `expected`, and all that is there."""
    path = open_store(data, "train").path
    return content(path) == expected and [p.name for p in path.parent.iterdir()] == ["train"]


@pytest.mark.parametrize(
    "order", [[(0, 1)], [(1, 3), (0, 3), (2, 3)], [(1, 3), (1, 3), (0, 3), (2, 3), (0, 3)], [(0, 3), (0, 2), (1, 2)]]
)
def test_shards_in_any_order_repeated_or_overtaken_make_the_same_files(whole, order):
    data, expected = whole
    done = set()
    for i, n in order:
        left = write_shard(data, "train", (i, n))
        complete = any({(i, n) for i in range(n)} <= done for _, n in done)
        done.add((i, n))
        assert left == ([] if complete else [i for i in range(n) if (i, n) not in done])
    assert made_as(data, expected)


def test_more_shards_than_documents(tiny, tmp_path):
    expected = content(open_store(dataclasses.replace(tiny, cache_dir=str(tmp_path / "once")), "test").path)
    assert [write_shard(tiny, "test", (i, 5)) for i in range(5)][-1] == []
    assert content(open_store(tiny, "test").path) == expected


def test_a_killed_shard_is_made_again_and_processes_may_work_at_the_same_time(tiny, tmp_path, start_python):
    expected = content(open_store(dataclasses.replace(tiny, cache_dir=str(tmp_path / "once")), "train").path)
    killed = start_python(MAKE, tiny.data_dir, tiny.cache_dir, 1, "die")
    killed.communicate(timeout=LIMIT_S)
    assert killed.returncode == -9
    left = list(Path(tiny.cache_dir).rglob(".incomplete-*"))
    assert left and left[0].joinpath("tokens.bin").is_file(), "the kill came too early to test anything"
    processes = [start_python(MAKE, tiny.data_dir, tiny.cache_dir, i, "live") for i in (0, 1, 2, 2)]
    results = [(*p.communicate(timeout=LIMIT_S), p.returncode) for p in processes]
    assert all(err == "" and code == 0 for _, err, code in results), results
    assert "[]\n" in [out for out, _, _ in results]
    shutil.rmtree(left[0])
    assert made_as(tiny, expected)


def test_a_later_plain_call_joins_what_a_killed_joiner_left(tiny, tmp_path, monkeypatch):
    expected = content(open_store(dataclasses.replace(tiny, cache_dir=str(tmp_path / "once")), "train").path)
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "_join", lambda *args: None)  # as if killed before it did anything
        for i in range(2):
            write_shard(tiny, "train", (i, 2))
    monkeypatch.setattr(tokens, "_chunks", None)  # joining reads no text
    assert content(open_store(tiny, "train").path) == expected


def test_two_joiners_at_once_both_succeed(tiny, monkeypatch):
    join = tokens._join

    def beaten(path, n, tokenizer, facts):
        read_all = shards.read_all

        def slow(*args):
            chunks = read_all(*args)
            yield next(chunks)
            monkeypatch.setattr(shards, "read_all", read_all)
            join(path, n, tokenizer, facts)  # another process joins and removes the parts
            yield from chunks

        monkeypatch.setattr(shards, "read_all", slow)
        join(path, n, tokenizer, facts)

    monkeypatch.setattr(tokens, "_join", beaten)
    assert [write_shard(tiny, "train", (i, 2)) for i in range(2)] == [[1], []]
    store = open_store(tiny, "train")
    assert store.num_docs == 100
    assert [p.name for p in store.path.parent.iterdir()] == ["train"]


def test_training_does_not_silently_do_the_work_of_missing_shards(tiny):
    write_shard(tiny, "train", (1, 4))
    with pytest.raises(UserError, match=r"4 shards of which 3 are missing \(0, 2, 3\).*--shard i/4") as error:
        open_store(tiny, "train")
    parts = next(Path(tiny.cache_dir).rglob(".train.parts"))
    assert f"delete {parts}" in str(error.value)
    shutil.rmtree(parts)
    assert open_store(tiny, "train").num_docs == 100


@pytest.mark.parametrize("file", ["tokens.bin", "part.json"])
@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_part_is_named_and_nothing_made_of_it(tiny, file, damage):
    write_shard(tiny, "train", (0, 2))
    (path,) = Path(tiny.cache_dir).rglob(f"0-of-2/{file}")
    good = path.read_bytes()
    path.write_bytes(good[:-3] if damage == "cut" else good[:-10] + bytes([good[-10] ^ 1]) + good[-9:])
    with pytest.raises(UserError, match=f"is damaged; delete {path.parent} .*--shard 0/2"):
        write_shard(tiny, "train", (1, 2))
    shutil.rmtree(path.parent)
    assert write_shard(tiny, "train", (0, 2)) == []
    assert open_store(tiny, "train").num_docs == 100


@pytest.mark.parametrize("text", ["", "3", "3/3", "-1/3", "0/0", "1/2/3", "a/b", "0.5/2"])
def test_a_shard_that_is_none(text):
    with pytest.raises(UserError, match="--shard"):
        shards.parse(text)
    assert shards.parse("0/1") == (0, 1) and shards.parse("2/3") == (2, 3)
