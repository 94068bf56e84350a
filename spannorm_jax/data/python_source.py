"""The embedded TFDS dataset `python_source`: Python sources that lie on this machine.

Its default config holds the standard library, config `sys_path` every .py file on sys.path.
Importing this module registers the builder, so that `tfds.load('python_source')` finds it.
"""

import contextlib
import functools
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from spannorm_jax import durable
from spannorm_jax.data import damage, python_files
from spannorm_jax.errors import UserError

_CONTENTS = {
    "stdlib": "The .py files of the standard library, without tests.",
    "sys_path": "The .py files on sys.path.",
}


class _LazyConfigs:
    """`BUILDER_CONFIGS` that are made when first read: their names hash all the files."""

    def __get__(self, instance: Any, owner: Any) -> list[tfds.core.BuilderConfig]:
        return _configs(owner.kind)


@functools.cache
def _configs(kind: str) -> list[tfds.core.BuilderConfig]:
    return [tfds.core.BuilderConfig(name=python_files.here(kind)[1], description=_CONTENTS[kind])]


class PythonSource(tfds.core.GeneratorBasedBuilder):
    """One example a file. The config's name holds the files' hash: other contents, other data."""

    VERSION = tfds.core.Version(python_files.VERSION)
    RELEASE_NOTES = {python_files.VERSION: "Python files of this machine; 1/16 held out."}  # noqa: RUF012
    BUILDER_CONFIGS = _LazyConfigs()
    kind = "stdlib"

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Python files found on this machine, split by the hash of their path.",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "path": tfds.features.Text()}),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in ("train", "validation")}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict]]:
        seen: Counter[str] = Counter()  # two roots may have files of one path and unlike contents
        for path, file in python_files.here(self.kind)[0]:
            if python_files.split_of(path) == split:
                seen[path] += 1
                text = python_files.read_source(file)
                if text is not None:
                    yield path if seen[path] == 1 else f"{path}#{seen[path]}", {"text": text, "path": path}


class SysPathSource(PythonSource, skip_registration=True):  # type: ignore[call-arg]  # of TFDS, which has no types
    """The same for the files on sys.path.

    A class of its own: TFDS reads the names of all configs of a builder, and this name takes some hundred MB to read.
    """

    name = python_files.DATASET
    kind = "sys_path"


def prepare(data_dir: Path, full_name: str = "") -> tfds.core.DatasetBuilder:
    """The builder of a `python_source`, which is written below `data_dir` if it was not there.

    Args:
      data_dir: root of TFDS's folders.
      full_name: `python_source/<kind>_<hash>/<version>`. What lies in `data_dir` is opened; of the others, only this
        interpreter's own can be made. "": its standard library.

    Raises:
      UserError: it is neither there nor this interpreter's own, `data_dir` cannot be written, there are no sources, or
        the files there are damaged.
    """
    full_name = full_name or python_files.full_name()
    target = data_dir / full_name
    if not target.is_dir():
        source = SysPathSource if full_name.startswith(f"{python_files.DATASET}/sys_path") else PythonSource
        here = python_files.full_name(source.kind)
        if full_name != here:
            dataset = python_files.DATASET + "/sys_path" * (source is SysPathSource)
            raise UserError(
                f"dataset {full_name!r} is not in {data_dir}, and the files it was made from are not those of this "
                f"Python, which are {here!r}; set config key data.data_dir to where it is, or start a new run with "
                f"data.dataset={dataset}"
            )
        with durable.temporary_folder(data_dir / python_files.DATASET, "data.data_dir") as temp:
            # TFDS announces itself on stdout, which belongs to our programs.
            tfds.disable_progress_bar()
            with contextlib.redirect_stdout(io.StringIO()):
                builder = source(data_dir=temp)
                builder.download_and_prepare(file_format="array_record")
            durable.publish(Path(builder.data_dir), target)
    with damage.naming_the_damaged_file(target):
        return tfds.builder_from_directory(target)
