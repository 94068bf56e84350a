"""Datasets whose other features nest or repeat, whose text is another kind of string, and reads that fail."""

import errno
import os

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from nested import FEATURES, prepare_nested, texts

from spannorm_jax.config import DataConfig
from spannorm_jax.data.tokens import open_store
from spannorm_jax.durable import unwritable
from spannorm_jax.errors import UserError

F = tfds.features


def data_in(root, **changes):
    return DataConfig(dataset="nested", data_dir=str(root / "tfds"), cache_dir=str(root / "cache"), **changes)


def documents(store):
    return sorted(part.decode() for part in store.tokens.tobytes().split(b"\xff")[:-1])


@pytest.mark.parametrize("beside", [(name,) for name in FEATURES] + [tuple(FEATURES)], ids="+".join)
def test_what_lies_beside_the_text_is_left_alone(tmp_path, beside):
    prepare_nested(tmp_path / "tfds", beside=beside)
    assert documents(open_store(data_in(tmp_path), "train")) == sorted(texts())


def test_tfrecord_gives_the_same_documents(tmp_path):
    """With the extra [tf]; test_tfds_text.py plays TensorFlow's part where it is not installed."""
    pytest.importorskip("tensorflow")
    prepare_nested(tmp_path / "tfds", file_format="tfrecord")
    assert documents(open_store(data_in(tmp_path), "train")) == sorted(texts())


@pytest.mark.parametrize("name", ["dict", "translation", "sequence_of_dict", "sequence_of_text", "tensor"])
def test_what_nests_or_repeats_is_no_text(tmp_path, name):
    prepare_nested(tmp_path / "tfds", beside=(name,))
    with pytest.raises(UserError, match=rf"data\.text_feature='{name}' is not text .*'?text'?"):
        open_store(data_in(tmp_path, text_feature=name), "train")


@pytest.mark.parametrize(
    "feature",
    [F.Scalar(np.str_), *(F.Tensor(shape=(), dtype=kind) for kind in (np.str_, np.object_, np.bytes_))],
    ids=["scalar", "str", "object", "bytes"],
)
def test_a_scalar_of_a_strings_type_is_text(tmp_path, feature):
    prepare_nested(tmp_path / "tfds", text=feature, beside=())
    assert documents(open_store(data_in(tmp_path), "train")) == sorted(texts())


@pytest.mark.parametrize("error", [RuntimeError, ValueError, IndexError, TypeError])
def test_a_read_that_fails_once_is_told_as_it_was(tmp_path, monkeypatch, error):
    prepare_nested(tmp_path / "tfds", beside=())

    def fail(self, keys):
        raise error("the wire was cut")

    with monkeypatch.context() as patch:
        patch.setattr(ArrayRecordDataSource, "__getitems__", fail)
        with pytest.raises(error, match="the wire was cut") as found:
            open_store(data_in(tmp_path), "train")
    assert found.value.__cause__ is None
    assert documents(open_store(data_in(tmp_path), "train")) == sorted(texts())


@pytest.mark.parametrize("length", [1, 2, 5])
def test_causes_that_go_in_a_ring_have_an_end(length):
    ring = [RuntimeError(str(i)) for i in range(length)]
    for i, error in enumerate(ring):
        error.__cause__ = ring[(i + 1) % length]
    assert unwritable(ring[0]) is None
    ring[-1].__cause__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert unwritable(ring[0]) == "the disk is full"
