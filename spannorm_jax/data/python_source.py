"""The embedded TFDS dataset `python_source`: sources of the running Python's standard library.

Importing this module registers the builder, so that `tfds.load('python_source')` finds it.
"""

import contextlib
import functools
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from spannorm_jax.data import atomic, damage, stdlib_files


@functools.cache
def _configs() -> list[tfds.core.BuilderConfig]:
    return [
        tfds.core.BuilderConfig(
            name=stdlib_files.config_name(),
            description="The .py files of the standard library, without tests.",
        )
    ]


class _LazyConfigs:
    """`BUILDER_CONFIGS` that are computed when first read: their names hash 12 MB of files."""

    def __get__(self, instance: Any, owner: type) -> list[tfds.core.BuilderConfig]:
        return _configs()


class PythonSource(tfds.core.GeneratorBasedBuilder):
    """One example a file. The config's name holds the files' hash: other contents, other data."""

    VERSION = tfds.core.Version(stdlib_files.VERSION)
    RELEASE_NOTES = {stdlib_files.VERSION: "Standard library without tests; 1/16 held out."}  # noqa: RUF012
    BUILDER_CONFIGS = _LazyConfigs()

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Python files found on this machine, split by the hash of their path.",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "path": tfds.features.Text()}),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        root = stdlib_files.stdlib_root()
        files = stdlib_files.list_files(root)
        return {
            split: self._generate_examples(root, [f for f in files if stdlib_files.split_of(f) == split])
            for split in ("train", "validation")
        }

    def _generate_examples(self, root: Path, files: list[str]) -> Iterator[tuple[str, dict]]:
        for path in files:
            text = stdlib_files.read_source(root / path)
            if text is not None:
                yield path, {"text": text, "path": path}


def prepare(data_dir: Path) -> tfds.core.DatasetBuilder:
    """Returns the builder of the default config, written below `data_dir` if it was not there.

    Raises:
      UserError: `data_dir` cannot be written, the standard library has no sources, or the files there are damaged.
    """
    target = data_dir / stdlib_files.full_name()
    if not target.is_dir():
        with atomic.temporary_folder(data_dir / stdlib_files.DATASET, "data.data_dir") as temp:
            # TFDS announces itself on stdout, which belongs to our programs.
            tfds.disable_progress_bar()
            with contextlib.redirect_stdout(io.StringIO()):
                builder = PythonSource(data_dir=temp)
                builder.download_and_prepare(file_format="array_record")
            atomic.publish(Path(builder.data_dir), target)
    with damage.described(target):
        return PythonSource(data_dir=data_dir)
