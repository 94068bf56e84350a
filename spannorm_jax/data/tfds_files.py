"""Finds a TFDS dataset that is prepared on disk and reads the texts or the images of one of its splits."""

import contextlib
import hashlib
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from spannorm_jax.config import DataConfig
from spannorm_jax.data import damage, names, python_source
from spannorm_jax.data.python_files import DATASET
from spannorm_jax.errors import UserError, did_you_mean
from spannorm_jax.paths import below_home, user_path

_FORMATS = (tfds.core.FileFormat.ARRAY_RECORD, tfds.core.FileFormat.TFRECORD)  # the first is preferred
_INFO = "dataset_info.json"  # in the folder of each version that is complete
_READ_AT_ONCE = 16  # examples; four times as fast as one at a time, and books still fit


def open_dataset(data: DataConfig, kind: str = "text") -> tfds.core.DatasetBuilder:
    """Returns the builder of `data.full_name`, or, if that is open, of `data.dataset` in its newest version.

    `kind` is the package of TFDS that knows it. Its examples lie in `data_dir` as array_record or TFRecord. Only
    `python_source` is ever prepared here; other datasets are read, never made.

    Raises:
      UserError: the dataset or its config is unknown, not prepared, damaged, or in another file format, or
        it is in TFRecord and TensorFlow is not installed.
    """
    root = _data_dir(data)
    if full_name := names.embedded(data):
        return python_source.prepare(root, full_name)

    key, asked, name = names.asked_for(data)
    base, config, version = name
    builder_class, prepared = _builder_class(base, kind), _prepared(root, base)
    there = ", ".join(prepared) or ("nothing of that name" if root.is_dir() else "no such folder")
    where = f"set config key data.data_dir to the folder that holds {base}/"
    if builder_class is None and not prepared:
        known = {DATASET, *tfds.list_builders(with_community_datasets=False), *(f.name for f in root.glob("[!.]*/"))}
        raise UserError(
            f"config key {key}={asked!r}: no TFDS dataset {base!r} is known or lies in {root} (there: {there}); "
            f"{where}; {did_you_mean(base, known)}"
        )
    configs = {p.split("/")[1] for p in prepared if p.count("/") == 2}
    configs |= set(builder_class.builder_configs) if builder_class else set()
    if config and config not in configs:
        hint = did_you_mean(config, configs) if configs else f"write {base!r} alone"
        raise UserError(f"config key {key}={asked!r}: {base!r} has no config {config!r}; {hint}")
    wanted = [p for p in prepared if {config, version} - {""} <= {*p.split("/")[1:]}]
    builder = None
    with contextlib.suppress(tfds.core.DatasetNotFoundError):  # files without code, and not of this config
        if wanted:
            with damage.naming_the_damaged_folder(root / wanted[-1]):
                builder = tfds.builder(str(name), data_dir=root)
    if builder is None or not (Path(builder.data_dir) / _INFO).is_file():
        make = f", or run {_how_to_prepare(name, root, kind)}" if builder_class else ""
        raise UserError(f"dataset {asked!r} is not prepared in {root} (there: {there}); {where}{make}")
    _check_format(builder, asked, name, kind)
    return builder


def _check_format(builder: tfds.core.DatasetBuilder, asked: str, name: names.Name, kind: str) -> None:
    """Raises UserError unless the examples can be read here, and readies TensorFlow where it is to read them."""
    wrong = f"dataset {asked!r} is prepared in {builder.data_dir} as"
    elsewhere = f"set config key data.data_dir to another folder DIR, and run {_how_to_prepare(name, 'DIR', kind)}"
    if _format(builder) is None:
        raise UserError(f"{wrong} {builder.info.file_format.value}, not as array_record or tfrecord; {elsewhere}")
    if _format(builder) is tfds.core.FileFormat.TFRECORD:
        try:
            tensorflow = importlib.import_module("tensorflow")
        except ImportError as error:
            extra = "pip install 'spannorm_jax[tf]'"
            raise UserError(f"{wrong} tfrecord, which takes TensorFlow to read: {extra}; or {elsewhere}") from error
        tensorflow.config.set_visible_devices([], "GPU")  # it would take the accelerator's memory from JAX


def open_split(
    builder: tfds.core.DatasetBuilder, data: DataConfig, split: str, shard: tuple[int, int] | None = None
) -> Iterator[bytes]:
    """Returns an iterator over the texts (UTF-8) of `split`, a TFDS split such as `train[:90%]`.

    Args:
      builder: from `open_dataset`.
      data: names the text feature.
      split: what to read.
      shard: (i, n), the i-th (from 0) of n parts of the split, which in a row are all of it; None: all.

    Raises:
      UserError: at the call, the split or the text feature is unknown, the feature is no text, or the split has lost
        or gained records; at a text, a record is damaged.
    """
    part, num_examples = _part(builder, data, split, shard)
    features, full_name = builder.info.features, builder.info.full_name
    features = features if isinstance(features, tfds.features.FeaturesDict) else {}
    text_features = [n for n, f in features.items() if _is_text(f)]
    if data.text_feature not in text_features:
        fault = "is not text" if data.text_feature in features else "is unknown"
        hint = did_you_mean(data.text_feature, text_features) if text_features else "it has no text"
        raise UserError(f"config key data.text_feature={data.text_feature!r} {fault} in {full_name}; {hint}")
    if not num_examples:  # a part of a split with fewer examples than shards may have none
        return iter(())
    if _format(builder) is tfds.core.FileFormat.TFRECORD:
        # A Translation, whose features are all text, is no FeaturesDict of which TFDS could decode a part.
        whole = type(features) is not tfds.features.FeaturesDict
        decoders = None if whole else tfds.decode.PartialDecoding({data.text_feature: True})
        return (example[data.text_feature] for example in _decoded(builder, part, decoders))

    def read(record: bytes) -> bytes:
        values = tf_example_pb2.Example.FromString(record).features.feature[data.text_feature].bytes_list.value
        return values[0] if values else b""  # an example that lacks the text has an empty one

    damage.check_records(builder, split)
    return _records(builder, part, read)


def open_encoded(
    builder: tfds.core.DatasetBuilder, data: DataConfig, split: str, features: tuple[str, str]
) -> tuple[Iterator[tuple[bytes, int]], int]:
    """An iterator over encoded images and their classes, of the features of these names; and how many there are.

    Raises:
      UserError: at the call, the split is unknown; at an image, a record is damaged.
    """
    _, number = _part(builder, data, split)
    image, label = features
    if not number:
        return iter(()), 0
    if _format(builder) is tfds.core.FileFormat.TFRECORD:
        examples = _decoded(builder, split, {image: tfds.decode.SkipDecoding()})
        return ((example[image], int(example[label])) for example in examples), number

    def read(record: bytes) -> tuple[bytes, int]:
        values = tf_example_pb2.Example.FromString(record).features.feature
        return values[image].bytes_list.value[0], values[label].int64_list.value[0]

    damage.check_records(builder, split)
    return _records(builder, split, read), number


def _part(
    builder: tfds.core.DatasetBuilder, data: DataConfig, split: str, shard: tuple[int, int] | None = None
) -> tuple[Any, int]:
    """A split, or the part of it, as TFDS takes it, and its examples. Raises UserError if there is no such split."""
    key = names.split_key(data, split)
    splits = builder.info.splits
    try:
        part = tfds.even_splits(split, shard[1])[shard[0]] if shard else split
        return part, splits[split].num_examples and splits[part].num_examples
    except (KeyError, ValueError, AssertionError) as error:
        raise UserError(
            f"config key {key}={split!r} is no split of {builder.info.full_name}; {did_you_mean(split, splits)}"
        ) from error


def _is_text(feature: tfds.features.FeatureConnector) -> bool:
    """Whether it holds one string: Text, or a scalar of a string's type, which TFDS stores in the same way."""
    scalar = isinstance(feature, tfds.features.Tensor) and feature.shape == ()
    return scalar and np.dtype(feature.np_dtype).kind in "OSU"


def _format(builder: tfds.core.DatasetBuilder) -> tfds.core.FileFormat | None:
    available = builder.info.available_file_formats()
    return next((f for f in _FORMATS if f in available), None)


def _decoded(builder: tfds.core.DatasetBuilder, split: Any, decoders: Any) -> Iterator[dict[str, Any]]:
    """Examples of files in TFRECORD, one file after another: TFDS interleaves them unless it is told otherwise, and a
    split would not be its shards in a row."""
    in_order = tfds.ReadConfig(interleave_cycle_length=1)
    return tfds.as_numpy(builder.as_dataset(split=split, shuffle_files=False, read_config=in_order, decoders=decoders))


def _records(builder: tfds.core.DatasetBuilder, split: Any, read: Callable[[bytes], Any]) -> Iterator[Any]:
    """`read` of each record of files in array_record. Raises UserError if one is damaged."""
    # Raw records, since TFDS without TensorFlow can neither decode nor skip most features that nest or repeat.
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    source = builder.as_data_source(split, file_format="array_record", deserialize_method=raw)
    for start in range(0, len(source), _READ_AT_ONCE):
        stop = min(start + _READ_AT_ONCE, len(source))
        try:
            records = source.__getitems__(list(range(start, stop)))
            if not all(records):  # what the reader makes of a record that it cannot find
                raise ValueError("records are missing")
            found = [read(record) for record in records]
        except (RuntimeError, ValueError, IndexError, TypeError, DecodeError):
            damage.check_records(builder, split, whole=True)
            raise  # no file is damaged: it failed this once
        yield from found


def identity(builder: tfds.core.DatasetBuilder) -> str:
    """Returns the full name, plus what tells apart two preparations that share name and version."""
    sizes = [(s.name, s.num_bytes, s.shard_lengths) for s in builder.info.splits.values()]
    digest = hashlib.sha256(repr(sorted(sizes)).encode()).hexdigest()
    return f"{builder.info.full_name}-{digest[:8]}"


def _data_dir(data: DataConfig) -> Path:
    if text := data.data_dir or os.environ.get("TFDS_DATA_DIR"):
        return user_path(text, "config key data.data_dir" if data.data_dir else "TFDS_DATA_DIR").absolute()
    return below_home("tensorflow_datasets", "set config key data.data_dir or the variable TFDS_DATA_DIR").absolute()


def _builder_class(name: str, kind: str) -> type[tfds.core.DatasetBuilder] | None:
    # TFDS imports its builders in a row and silently stops at the first that lacks a package
    # (h5py, for one), which hides the text datasets behind it.
    importlib.import_module(f"tensorflow_datasets.{kind}")
    try:
        return tfds.builder_cls(name)
    except tfds.core.DatasetNotFoundError:
        return None


def _prepared(root: Path, base: str) -> list[str]:
    """Full names, `base/version` and `base/config/version`, of what is complete below `root`."""
    infos = [info for depth in ("*", "*/*") for info in (root / base).glob(f"{depth}/{_INFO}")]
    names = (info.parent.relative_to(root).as_posix() for info in infos)
    return sorted(name for name in names if "/." not in name)


def _how_to_prepare(name: names.Name, data_dir: Path | str, kind: str) -> str:
    # Not `tfds build`, which does not start without TensorFlow. The second import has `_builder_class`'s reason.
    return (
        f'python -c "import tensorflow_datasets as tfds, tensorflow_datasets.{kind}; '
        f"tfds.builder('{name}', data_dir='{data_dir}')"
        ".download_and_prepare(file_format='array_record')\""
    )
