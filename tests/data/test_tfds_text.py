import dataclasses
import json
import shutil

import pytest
from tiny_lines import prepare_tiny

from spannorm_jax.data.tokens import open_store
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


def test_known_but_not_prepared_says_where_it_looked_and_how_to_prepare(tiny):
    message = error_of(tiny, dataset="lm1b")
    assert f"not prepared in {tiny.data_dir}" in message and "data.data_dir" in message
    assert "tfds.builder('lm1b'" in message and "file_format='array_record'" in message


def test_a_version_that_is_not_there_names_those_that_are(tiny):
    assert "tiny_lines/1.2.3" in error_of(tiny, dataset="tiny_lines:9.0.0")
    assert open_store(dataclasses.replace(tiny, dataset="tiny_lines:1.2.3"), "train").num_docs == 100


def test_another_file_format_says_so(tiny, tmp_path):
    # Writing real TFRecord files needs TensorFlow; what decides is the format the info names.
    folder = prepare_tiny(tmp_path / "tfds")
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for file in folder.glob("*.array_record*"):
        shutil.move(file, str(file).replace("array_record", "tfrecord"))
    message = error_of(tiny, data_dir=str(tmp_path / "tfds"))
    assert "as tfrecord" in message and "file_format='array_record'" in message


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
