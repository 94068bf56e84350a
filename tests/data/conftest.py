"""Datasets that the data tests share: `python_source`, and a tiny TFDS dataset of our own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

import spannorm_jax
from spannorm_jax.config import DataConfig

TINY_TRAIN = [f"line {i} of the tiny set: " + "ü€x" * (i % 7) for i in range(100)]
TINY_TEST = ["held out", "", "and more"]


# Not registered: TFDS has its files only, as with a dataset that another machine prepared.
class TinyLines(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.2.3")
    train = tuple(TINY_TRAIN)

    def _info(self):
        features = {"line": tfds.features.Text(), "number": tfds.features.Scalar("int32")}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(self.train),
            "test": self._generate_examples(TINY_TEST),
            "blank": self._generate_examples(["", ""]),
        }

    def _generate_examples(self, lines):
        for i, line in enumerate(lines):
            yield i, {"line": line, "number": i}


def prepare_tiny(data_dir, train=None):
    tfds.disable_progress_bar()
    builder = TinyLines(data_dir=data_dir)
    if train is not None:
        builder.train = train
    builder.download_and_prepare(file_format="array_record")
    return Path(builder.data_dir)


@pytest.fixture(scope="session")
def source_data(tmp_path_factory) -> DataConfig:
    """python_source, prepared and tokenised once by whoever asks first."""
    root = tmp_path_factory.mktemp("source")
    return DataConfig(data_dir=str(root / "tfds"), cache_dir=str(root / "cache"))


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("tiny")
    prepare_tiny(root)
    return str(root)


@pytest.fixture
def tiny(tiny_dir, tmp_path) -> DataConfig:
    """The tiny dataset with a cache of the test's own."""
    return DataConfig(
        dataset="tiny_lines",
        text_feature="line",
        eval_split="test",
        data_dir=tiny_dir,
        cache_dir=str(tmp_path / "cache"),
    )


@pytest.fixture
def start_python():
    """Starts `python -c code args...` with the package importable."""

    def start(code, *args):
        root = Path(spannorm_jax.__file__).parents[1]
        env = os.environ | {"PYTHONPATH": str(root)}
        return subprocess.Popen(
            [sys.executable, "-c", code, *map(str, args)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start
