"""The embedded TFDS dataset `python_source`: Python sources that lie on this machine.

Its default config holds the standard library, config `sys_path` every .py file on sys.path.
Importing this module registers the builder, so that `tfds.load('python_source')` finds it.
"""

import contextlib
import functools
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from spannorm_jax import durable
from spannorm_jax.data import damage, stdlib_files, sys_path_files
from spannorm_jax.errors import UserError


class _LazyConfigs:
    """`BUILDER_CONFIGS` that are computed when first read: their names hash all the files."""

    def __init__(self, name: Callable[[], str], description: str):
        self._make = functools.cache(lambda: [tfds.core.BuilderConfig(name=name(), description=description)])

    def __get__(self, instance: Any, owner: type) -> list[tfds.core.BuilderConfig]:
        return self._make()


class PythonSource(tfds.core.GeneratorBasedBuilder):
    """One example a file. The config's name holds the files' hash: other contents, other data."""

    VERSION = tfds.core.Version(stdlib_files.VERSION)
    RELEASE_NOTES = {stdlib_files.VERSION: "Python files of this machine; 1/16 held out."}  # noqa: RUF012
    BUILDER_CONFIGS = _LazyConfigs(
        stdlib_files.config_name, description="The .py files of the standard library, without tests."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Python files found on this machine, split by the hash of their path.",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "path": tfds.features.Text()}),
        )

    def _files(self) -> list[tuple[str, Path]]:
        root = stdlib_files.stdlib_root()
        return [(path, root / path) for path in stdlib_files.list_files(root)]

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        files = self._files()
        return {
            split: self._generate_examples([f for f in files if stdlib_files.split_of(f[0]) == split])
            for split in ("train", "validation")
        }

    def _generate_examples(self, files: list[tuple[str, Path]]) -> Iterator[tuple[str, dict]]:
        copies: dict[str, int] = {}  # two roots may have files of one path and unlike contents
        for path, file in files:
            copies[path] = copies.get(path, 0) + 1
            text = stdlib_files.read_source(file)
            if text is not None:
                yield path if copies[path] == 1 else f"{path}#{copies[path]}", {"text": text, "path": path}


class SysPathSource(PythonSource, skip_registration=True):  # type: ignore[call-arg]  # of TFDS, which has no types
    """The same for the files on sys.path.

    A class of its own, since TFDS reads the names of all of a builder's configs whenever it opens
    one, and this one's name takes the reading of some hundred megabytes.
    """

    name = stdlib_files.DATASET
    BUILDER_CONFIGS = _LazyConfigs(lambda: sys_path_files.here()[1], description="The .py files on sys.path.")

    def _files(self) -> list[tuple[str, Path]]:
        return sys_path_files.here()[0]


def prepare(data_dir: Path, full_name: str = "") -> tfds.core.DatasetBuilder:
    """Returns the builder of a `python_source`, written below `data_dir` if it was not there.

    Args:
      data_dir: root of TFDS's folders.
      full_name: `python_source/stdlib_<hash>/<version>` or `python_source/sys_path_<hash>/<version>`. What lies in
        `data_dir` is opened; of the others, only this interpreter's own can be made. "": its standard library.

    Raises:
      UserError: it is neither there nor this interpreter's own, `data_dir` cannot be written, there are no sources, or
        the files there are damaged.
    """
    full_name = full_name or stdlib_files.full_name()
    target = data_dir / full_name
    if not target.is_dir():
        of_path = full_name.startswith(sys_path_files.DATASET)
        here = (sys_path_files if of_path else stdlib_files).full_name()
        if full_name != here:
            raise UserError(
                f"dataset {full_name!r} is not in {data_dir}, and the files it was made from are not those of this "
                f"Python, which are {here!r}; set config key data.data_dir to where it is, or start a new run with "
                f"data.dataset={sys_path_files.DATASET if of_path else stdlib_files.DATASET}"
            )
        with durable.temporary_folder(data_dir / stdlib_files.DATASET, "data.data_dir") as temp:
            # TFDS announces itself on stdout, which belongs to our programs.
            tfds.disable_progress_bar()
            with contextlib.redirect_stdout(io.StringIO()):
                builder = (SysPathSource if of_path else PythonSource)(data_dir=temp)
                builder.download_and_prepare(file_format="array_record")
            durable.publish(Path(builder.data_dir), target)
    with damage.naming_the_damaged_file(target):
        return tfds.builder_from_directory(target)
