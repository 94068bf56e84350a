"""TFDS datasets by name, version, format and feature: what is opened, and what is refused in one line."""

import dataclasses
import json
import os
import shutil
import sys
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from tiny import LINES, prepare

from spannorm_jax.config import DataConfig
from spannorm_jax.data import names
from spannorm_jax.data.tokens import open_store, write_shard
from spannorm_jax.errors import UserError

F = tfds.features
BESIDE = {
    "dict": (
        F.FeaturesDict({"id": np.int32, "inner": F.FeaturesDict({"tag": F.Text()})}),
        {"id": 1, "inner": {"tag": "t"}},
    ),
    "translation": (F.Translation(languages=["en", "de"]), {"en": "one", "de": "eins"}),
    "sequence_of_dict": (F.Sequence({"start": np.int32, "answer": F.Text()}), [{"start": 1, "answer": "a"}] * 2),
    "empty": (F.Sequence({"start": np.int32, "answer": F.Text()}), []),
    "sequence_of_text": (F.Sequence(F.Text()), ["x", "yy"]),
    "tensor": (F.Tensor(shape=(2, 3), dtype=np.float32), np.ones((2, 3), np.float32)),
    "compressed": (F.Tensor(shape=(2,), dtype=np.int32, encoding="zlib"), np.arange(2, dtype=np.int32)),
}


def documents(store):
    return sorted(part.decode() for part in store.tokens.tobytes().split(b"\xff")[:-1])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        # A name that is none, unknown or not prepared; a config or version that is not there.
        ({"dataset": "huggingface:squad"}, ["not a TFDS name", "name/config"]),
        ({"dataset": "tiny_line"}, ["data.dataset='tiny_line'", "did you mean 'tiny_lines'", "DIR"]),
        ({"dataset": "wiki40/en"}, ["did you mean 'wiki40b'"]),
        ({"dataset": "c4/webtext"}, ["did you mean 'webtextlike'"]),
        ({"dataset": "tiny_lines/large"}, ["write 'tiny_lines' alone"]),
        ({"dataset": "python_source/stdlib_00000000"}, ["stdlib_", "data.data_dir"]),
        ({"dataset": "python_source/syspath"}, ["write python_source, python_source/sys_path"]),
        ({"dataset": "lm1b"}, ["not prepared in DIR", "data.data_dir", "tfds.builder('lm1b'", "'array_record'"]),
        ({"dataset": "tiny_lines:9.0.0"}, ["tiny_lines/1.2.3"]),
        ({"full_name": "tiny_lines/9.0.0"}, ["tiny_lines/1.2.3"]),
        ({"full_name": "tiny_lines"}, ["data.full_name='tiny_lines' is no name, with its version"]),
        ({"full_name": "other/1.0.0"}, ["data.full_name='other/1.0.0' is no name", "data.dataset='tiny_lines'"]),
        ({"dataset": "tiny_lines:1.2.3", "full_name": "tiny_lines/2.0.0"}, ["is no name"]),
        ({"dataset": "python_source", "full_name": "python_source/sys_path_01234567/1.0.0"}, ["is no name"]),
        ({"full_name": "../tiny_lines/1.0.0"}, ["not a TFDS name"]),
        # Folders that are not where datasets are.
        ({"data_dir": "DIR/tiny_lines"}, ["data.data_dir to the folder that holds tiny_lines/"]),
        ({"data_dir": "DIR/none", "dataset": "lm1b"}, ["no such folder", "tfds.builder('lm1b'"]),
        ({"data_dir": "DIR/none", "dataset": "lm1"}, ["no such folder", "did you mean 'lm1b'"]),
        ({"data_dir": "DIR/tiny_lines/1.2.3/features.json"}, ["no such folder"]),
        # Splits and features.
        ({"train_split": "trian"}, ["data.train_split='trian'", "did you mean 'train'"]),
        ({"train_split": "validation", "eval_split": "validation"}, ["data.eval_split=", "blank, test, train"]),
        ({"train_split": "train[:0]"}, ["holds no text", "train[:0]"]),
        ({"train_split": "blank"}, ["holds no text", "blank"]),
        ({"text_feature": "text"}, ["data.text_feature='text' is unknown", "line"]),
        ({"text_feature": "number"}, ["data.text_feature='number' is not text", "line"]),
        ({"cache_dir": "DIR/tiny_lines/1.2.3/features.json"}, ["data.cache_dir"]),
    ],
    ids=str,
)
def test_what_cannot_be_opened_is_one_line(tiny, tiny_dir, refused, changes, says):
    before = sorted(os.walk(tiny_dir))
    data = dataclasses.replace(tiny, **{key: value.replace("DIR", tiny_dir) for key, value in changes.items()})
    line = refused(open_store, data, data.train_split)
    assert all(part.replace("DIR", tiny_dir) in line for part in says), line
    assert sorted(os.walk(tiny_dir)) == before


@pytest.mark.parametrize("text", ["", "a/b/c", "a:1.0", "a:", "a/1.0.0/b", "a/../b", "a/..:1.0", "1a", "a/1.0.0\n"])
def test_what_is_no_name(text):
    with pytest.raises(UserError, match=r"data\.dataset=.*not a TFDS name"):
        names.parse(text, "data.dataset")


def test_a_version_and_a_config_are_opened_by_each_of_their_spellings(tmp_path):
    for version in ("1.0.0", "2.0.0", "11.0.0"):
        for config in ("", "en", "en.big"):
            splits = {"train": [f"{config or 'plain'} in version {version}"]}
            prepare(tmp_path / config, "many" if config else "one", splits, version=version, config=config, text="text")
    for config in ("en", "en.big"):
        shutil.copytree(tmp_path / config / "many", tmp_path / "many", dirs_exist_ok=True)
    where = DataConfig(data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    for base in ("one", "many/en", "many/en.big"):
        assert open_store(dataclasses.replace(where, dataset=base), "train").dataset == f"{base}/11.0.0"
        for version in ("1.0.0", "2.0.0"):
            spellings = [{"dataset": f"{base}:{version}"}, {"dataset": f"{base}/{version}"}]
            spellings += [{"dataset": base, "full_name": f"{base}{sign}{version}"} for sign in "/:"]
            stores = [open_store(dataclasses.replace(where, **changes), "train") for changes in spellings]
            assert {store.dataset for store in stores} == {f"{base}/{version}"}
            assert len({store.path for store in stores}) == 1
            assert f"in version {version}".encode() in stores[0].tokens.tobytes()


# ---- features ----------------------------------------------------------------------------------


def test_what_nests_or_repeats_beside_the_text_is_left_alone_and_is_no_text(tmp_path, refused):
    scalar = {"scalar": (F.Scalar(np.str_), "a string too")}
    prepare(tmp_path / "tfds", text="text", kind=F.Tensor(shape=(), dtype=np.bytes_), beside=BESIDE | scalar)
    data = DataConfig(dataset="tiny_lines", data_dir=str(tmp_path / "tfds"), cache_dir=str(tmp_path / "cache"))
    assert documents(open_store(data, "train")) == sorted(LINES["train"])
    assert documents(open_store(dataclasses.replace(data, text_feature="scalar"), "test")) == ["a string too"] * 3
    for name in BESIDE:
        line = refused(open_store, dataclasses.replace(data, text_feature=name), "train")
        assert f"data.text_feature='{name}' is not text" in line and "valid ones are scalar, text" in line


# ---- formats -----------------------------------------------------------------------------------


def as_format(tiny, root, name):
    """The tiny dataset as if prepared in another format, writing which takes other packages."""
    folder = prepare(root)
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = name
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for file in folder.glob("*.array_record*"):
        shutil.move(file, str(file).replace("array_record", name))
    return dataclasses.replace(tiny, data_dir=str(root))


def test_a_format_that_cannot_be_read_says_so(tiny, tmp_path, monkeypatch, refused):
    riegeli, tfrecord = (as_format(tiny, tmp_path / name, name) for name in ("riegeli", "tfrecord"))
    line = refused(open_store, riegeli, "train")
    assert "as riegeli" in line and "file_format='array_record'" in line
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # the import fails, installed or not
    line = refused(open_store, tfrecord, "train")
    assert "as tfrecord" in line and "pip install 'spannorm_jax[tf]'" in line


def test_tfrecord_is_read_file_by_file_through_tensorflow(tiny, tmp_path, monkeypatch):
    """TensorFlow is played by a stand-in that holds the examples and keeps what TFDS was asked for."""
    data = as_format(tiny, tmp_path / "tfds", "tfrecord")
    asked, hidden = {}, []

    def as_dataset(self, *, split, **options):
        asked.update(options)
        ((start, stop),) = [(f.skip, f.skip + f.take) for f in self.info.splits[split].file_instructions]
        stop = stop if stop > 0 else 100
        return [{"line": line.encode(), "number": b"not decoded"} for line in LINES["train"][start:stop]]

    config = types.SimpleNamespace(set_visible_devices=lambda devices, kind: hidden.append((devices, kind)))
    monkeypatch.setitem(sys.modules, "tensorflow", types.SimpleNamespace(config=config))
    monkeypatch.setattr(tfds, "ReadConfig", lambda **options: options)
    monkeypatch.setattr(tfds.decode, "PartialDecoding", lambda features: features)
    monkeypatch.setattr(tfds, "as_numpy", iter)
    monkeypatch.setattr(tfds.core.DatasetBuilder, "as_dataset", as_dataset)
    store = open_store(data, "train")
    assert store.tokens.tobytes() == b"".join(line.encode() + b"\xff" for line in LINES["train"])
    assert asked["shuffle_files"] is False and asked["read_config"] == {"interleave_cycle_length": 1}
    assert asked["decoders"] == {"line": True}
    assert hidden[0] == ([], "GPU")  # TensorFlow must leave the accelerator to JAX

    sharded = dataclasses.replace(data, cache_dir=str(tmp_path / "sharded"))
    assert [write_shard(sharded, "train", (i, 3)) for i in (2, 0, 1)] == [[0, 1], [1], []]
    assert open_store(sharded, "train").sha256 == store.sha256


# ---- damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("*train.array_record*", lambda content: content[:100] + bytes([content[100] ^ 1]) + content[101:]),
        ("*train.array_record*", lambda content: content[: len(content) // 2]),
        ("*train.array_record*", lambda content: None),
        ("dataset_info.json", lambda content: content[:-20]),
        ("features.json", lambda content: b"\xff" + content),
    ],
    ids=["a bit", "a half", "gone", "info", "features"],
)
def test_a_dataset_that_changed_is_named(tiny, tmp_path, refused, file, damage):
    (path,) = prepare(tmp_path / "tfds").glob(file)
    changed = damage(path.read_bytes())
    path.unlink()
    if changed is not None:
        path.write_bytes(changed)
    line = refused(open_store, dataclasses.replace(tiny, data_dir=str(tmp_path / "tfds")), "train")
    named = path.parent if path.suffix == ".json" else path
    assert f"dataset {named} is damaged" in line and f"delete {path.parent}" in line


def test_a_read_that_fails_once_is_told_as_it_was(tiny, monkeypatch):
    def fail(self, keys):
        raise RuntimeError("the wire was cut")

    with monkeypatch.context() as patch:
        patch.setattr(ArrayRecordDataSource, "__getitems__", fail)
        with pytest.raises(RuntimeError, match="the wire was cut"):
            open_store(tiny, "train")
    assert documents(open_store(tiny, "train")) == sorted(LINES["train"])
