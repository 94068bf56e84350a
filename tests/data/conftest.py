"""Datasets that the data tests share: `python_source`, and a tiny TFDS dataset of our own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_lines import prepare_tiny

import spannorm_jax
from spannorm_jax.config import DataConfig


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
