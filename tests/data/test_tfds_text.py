import dataclasses
import json
import shutil
import sys
import types

import pytest
import tensorflow_datasets as tfds
from tiny_lines import TINY_TRAIN, prepare_tiny

from spannorm_jax.data.tokens import open_store, write_shard
from spannorm_jax.errors import UserError


def error_of(data, split="train", **changes):
    with pytest.raises(UserError) as error:
        open_store(dataclasses.replace(data, **changes), split)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_unknown_dataset_names_the_nearest(tiny):
    message = error_of(tiny, dataset="tiny_line")
    assert "data.dataset='tiny_line'" in message and "'tiny_lines'" in message
    assert tiny.data_dir in message
    assert "did you mean 'wiki40b'" in error_of(tiny, dataset="wiki40/en")


def test_a_name_that_is_none(tiny):
    assert "name/config" in error_of(tiny, dataset="huggingface:squad")


def test_unknown_config_names_the_nearest(tiny):
    assert "did you mean 'webtextlike'" in error_of(tiny, dataset="c4/webtext")
    assert "write 'tiny_lines' alone" in error_of(tiny, dataset="tiny_lines/large")
    assert "stdlib_" in error_of(tiny, dataset="python_source/stdlib_00000000")
    assert "did you mean 'sys_path'" in error_of(tiny, dataset="python_source/syspath")


def test_known_but_not_prepared_says_where_it_looked_and_how_to_prepare(tiny):
    message = error_of(tiny, dataset="lm1b")
    assert f"not prepared in {tiny.data_dir}" in message and "data.data_dir" in message
    assert "tfds.builder('lm1b'" in message and "file_format='array_record'" in message


def test_a_version_that_is_not_there_names_those_that_are(tiny):
    assert "tiny_lines/1.2.3" in error_of(tiny, dataset="tiny_lines:9.0.0")
    assert open_store(dataclasses.replace(tiny, dataset="tiny_lines:1.2.3"), "train").num_docs == 100


def as_format(data_dir, name):
    """The tiny dataset as if prepared in another format, writing which takes other packages."""
    folder = prepare_tiny(data_dir)
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = name
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for file in folder.glob("*.array_record*"):
        shutil.move(file, str(file).replace("array_record", name))
    return str(data_dir)


def test_another_file_format_says_so(tiny, tmp_path):
    message = error_of(tiny, data_dir=as_format(tmp_path / "tfds", "riegeli"))
    assert "as riegeli" in message and "file_format='array_record'" in message


def test_tfrecord_without_tensorflow_names_the_extra(tiny, tmp_path, monkeypatch):
    data_dir = as_format(tmp_path / "tfds", "tfrecord")
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # the import fails, installed or not
    message = error_of(tiny, data_dir=data_dir)
    assert "as tfrecord" in message and "pip install 'spannorm_jax[tf]'" in message


def test_tfrecord_is_read_file_by_file_through_tensorflow(tiny, tmp_path, monkeypatch):
    """TensorFlow is played by a stand-in that holds the examples and keeps what TFDS was asked for."""
    data = dataclasses.replace(tiny, data_dir=as_format(tmp_path / "tfds", "tfrecord"))
    asked, hidden = {}, []

    def as_dataset(self, *, split, **options):
        asked.update(options)
        rows = list(range(100)) if split == "train" else tfds_rows(self, split)
        return [{"line": TINY_TRAIN[i].encode(), "number": b"not decoded"} for i in rows]

    def tfds_rows(builder, part):
        ((start, stop),) = [(f.skip, f.skip + f.take) for f in builder.info.splits[part].file_instructions]
        return range(start, stop)

    config = types.SimpleNamespace(set_visible_devices=lambda devices, kind: hidden.append((devices, kind)))
    monkeypatch.setitem(sys.modules, "tensorflow", types.SimpleNamespace(config=config))
    monkeypatch.setattr(tfds, "ReadConfig", lambda **options: options)
    monkeypatch.setattr(tfds.decode, "PartialDecoding", lambda features: features)
    monkeypatch.setattr(tfds, "as_numpy", iter)
    monkeypatch.setattr(tfds.core.DatasetBuilder, "as_dataset", as_dataset)
    store = open_store(data, "train")
    assert store.tokens.tobytes() == b"".join(line.encode() + b"\xff" for line in TINY_TRAIN)
    assert asked["shuffle_files"] is False and asked["read_config"] == {"interleave_cycle_length": 1}
    assert asked["decoders"] == {"line": True}
    assert hidden[0] == ([], "GPU")  # TensorFlow must leave the accelerator to JAX

    sharded = dataclasses.replace(data, cache_dir=str(tmp_path / "sharded"))
    left = [write_shard(sharded, "train", (i, 3)) for i in (2, 0, 1)]
    assert left == [[0, 1], [1], []]
    assert open_store(sharded, "train").sha256 == store.sha256


def test_unknown_split_names_the_splits_and_the_key(tiny):
    message = error_of(tiny, split="validation", eval_split="validation")
    assert "data.eval_split='validation'" in message and "blank, test, train" in message
    message = error_of(tiny, split="trian", train_split="trian")
    assert "data.train_split='trian'" in message and "did you mean 'train'" in message


@pytest.mark.parametrize("split", ["train[:0]", "blank"])
def test_a_split_without_text_is_refused(tiny, split):
    message = error_of(tiny, split=split)
    assert "holds no" in message and split in message


@pytest.mark.parametrize(("feature", "fault"), [("text", "unknown"), ("number", "not text")])
def test_a_feature_that_is_no_text_names_those_that_are(tiny, feature, fault):
    message = error_of(tiny, text_feature=feature)
    assert f"data.text_feature='{feature}'" in message and fault in message and "line" in message


def test_an_unwritable_cache_names_the_key(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    assert "data.cache_dir" in error_of(tiny, cache_dir=str(tmp_path / "file"))
