"""The embedded TFDS dataset `python_source`: Python sources that lie on this machine (`python_files`)."""

import contextlib
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from spannorm_jax import durable
from spannorm_jax.data import damage, python_files
from spannorm_jax.errors import UserError


def prepare(data_dir: Path, full_name: str) -> tfds.core.DatasetBuilder:
    """The builder of a `python_source`, which is written below `data_dir` if it was not there.

    Args:
      data_dir: root of TFDS's folders.
      full_name: `python_source/<kind>_<hash>/<version>`. What lies in `data_dir` is opened; of the others, only this
        interpreter's own can be made.

    Raises:
      UserError: it is neither there nor this interpreter's own, `data_dir` cannot be written, there are no sources, or
        the files there are damaged.
    """
    target = data_dir / full_name
    if not target.is_dir():
        kind = full_name.split("/")[1].rpartition("_")[0]
        here = python_files.full_name(kind)
        if full_name != here:
            dataset = python_files.DATASET + ("/sys_path" if kind == "sys_path" else "")
            raise UserError(
                f"dataset {full_name!r} is not in {data_dir}, and the files it was made from are not those of this "
                f"Python, which are {here!r}; set config key data.data_dir to where it is, or start a new run with "
                f"data.dataset={dataset}"
            )
        with durable.temporary_folder(data_dir / python_files.DATASET, "config key data.data_dir") as temp:
            # TFDS announces itself on stdout, which belongs to our programs.
            tfds.disable_progress_bar()
            with contextlib.redirect_stdout(io.StringIO()):
                builder = _builder(kind, temp)
                builder.download_and_prepare(file_format="array_record")
            durable.publish(Path(builder.data_dir), target)
    with damage.naming_the_damaged_folder(target):
        return tfds.builder_from_directory(target)


def _builder(kind: str, data_dir: Path) -> tfds.core.DatasetBuilder:
    """Makes one example of each file. The config's name holds the files' hash: other contents, other data."""
    files, config = python_files.here(kind)

    class PythonSource(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]  # untyped
        VERSION = tfds.core.Version(python_files.VERSION)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)]  # noqa: RUF012

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(
                builder=self,
                description="Python files found on this machine, split by the hash of their path; 1/16 held out.",
                features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "path": tfds.features.Text()}),
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
            return {split: self._generate_examples(split) for split in ("train", "validation")}

        def _generate_examples(self, split: str) -> Iterator[tuple[str, dict]]:
            seen: Counter[str] = Counter()  # two roots may have files of one path and unlike contents
            for path, file in files:
                if python_files.split_of(path) == split:
                    seen[path] += 1
                    text = python_files.read_source(file)
                    if text is not None:
                        yield path if seen[path] == 1 else f"{path}#{seen[path]}", {"text": text, "path": path}

    return PythonSource(data_dir=data_dir)
