"""configs/c4.py on a small dataset in C4's layout, by the commands that the config names."""

import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tiny import prepare as prepare_dataset

from spannorm_jax import evaluate, prepare, train
from spannorm_jax.config_file import load
from spannorm_jax.data.tokens import open_store

CONFIG = "configs/c4.py:124m,depth=2,width=64"
TRAIN = [f"Page {i} of the web. " + "It says naïve things. " * (i % 11) for i in range(200)]
VALIDATION = [f"Held-out page {i}, never trained on. " * 3 for i in range(20)]


def prepare_c4(root, **changes):
    others = ("url", "timestamp", "content-type", "content-length")
    beside = {name: (tfds.features.Text(), "text/plain") for name in others}
    splits = {"train": TRAIN, "validation": VALIDATION}
    prepare_dataset(root, "c4", splits, version="3.0.1", config="en", text="text", beside=beside, **changes)


@pytest.fixture(scope="module")
def c4(tmp_path_factory):
    root = tmp_path_factory.mktemp("c4")
    prepare_c4(root)
    return root


@pytest.fixture
def options(c4, tmp_path):
    return [
        *(f"--config.data.{key}={value}" for key, value in (("data_dir", c4), ("cache_dir", tmp_path / "c"))),
        *("--config.data.bpe_vocab_size=400", "--config.data.seq_len=32", "--config.training.batch_size=8"),
        *("--config.training.steps=2", "--config.eval.tokens=0", "--config.metrics.tensorboard=false"),
    ]


def store_of(options, split):
    overrides = [option.removeprefix("--config.").split("=", 1) for option in options]
    return open_store(load(CONFIG, overrides).data, split)


def test_its_vocabulary_is_a_trained_one_and_the_models_rows_follow():
    config = load("configs/c4.py")
    assert (config.data.dataset, config.data.tokenizer) == ("c4/en:3.0.1", "bpe")
    assert (config.data.bpe_vocab_size, config.model.vocab_size) == (32768, 0)


def test_prepared_by_shards_trained_and_evaluated(options, tmp_path, capsys):
    for i in (1, 2, 0):
        assert prepare.main(["--config", CONFIG, "--shard", f"{i}/3", *options]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "train: shard 1/3 is made, 2 of 3 are missing"
    assert len(said) == 6 and "validation: " in said[5] and f"in {len(VALIDATION)} documents" in said[5]

    train_store, eval_store = (store_of(options, split) for split in ("train", "validation"))
    assert train_store.dataset == "c4/en/3.0.1"
    assert train_store.num_bytes == len("".join(TRAIN).encode())
    workdir = tmp_path / "run"
    assert train.main(["--config", CONFIG, "--workdir", str(workdir), *options]) == 0

    config = json.loads((workdir / "config.json").read_text())
    assert config["model"]["vocab_size"] == 512  # 400, rounded up
    assert eval_store.tokenizer == "bpe-" + config["data"]["tokenizer_hash"]
    assert (workdir / "tokenizer.json").read_bytes() == (eval_store.path / "tokenizer.json").read_bytes()

    capsys.readouterr()
    assert evaluate.main(["--workdir", str(workdir), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tokens"] == eval_store.num_tokens - 1
    # All but the first token are predicted; what those stand for is the text without that one.
    vocab = json.loads((workdir / "tokenizer.json").read_text())["model"]["vocab"]
    first = next(token for token, i in vocab.items() if i == eval_store.tokens[0])
    assert result["bytes"] == len("".join(VALIDATION)) - len(first)  # both ASCII


def test_tfrecord_makes_the_same_stores(options, tmp_path):
    """With the extra [tf]; test_tfds_files.py plays TensorFlow's part where it is not installed."""
    pytest.importorskip("tensorflow")
    prepare_c4(tmp_path / "tfds", file_format="tfrecord")
    other = [f"--config.data.{key}={tmp_path / name}" for key, name in (("data_dir", "tfds"), ("cache_dir", "other"))]
    for split in ("train", "validation"):
        a, b = (store_of(options + more, split) for more in ([], other))
        assert a.path != b.path
        np.testing.assert_array_equal(a.tokens, b.tokens)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--shard", "3/3"], ["--shard", "'3/3'", "0/4"]),
        (["--config.data.bpe_vocab_size=256"], ["data.bpe_vocab_size=256", "257"]),
        (["--config.model.vocab_size=384"], ["model.vocab_size=384", "512", "data.tokenizer=bpe"]),
        (["--config.data.tokenizer_hash=0123456789abcdef"], ["0123456789abcdef", "tokenizer.json"]),
        (["--config.data.dataset=c4/en:3.1.0"], ["not prepared", "c4/en/3.0.1"]),
    ],
)
def test_what_cannot_be_is_one_line(options, more, says, refuse, tmp_path):
    command = train if "model" in more[0] else prepare
    where = ["--workdir", str(tmp_path / "run")] if command is train else []
    line = refuse(command, "--config", CONFIG, *where, *options, *more)
    assert all(part in line for part in says), line
    assert not (tmp_path / "run").exists()
