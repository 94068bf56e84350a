"""A TFDS dataset whose files have changed since they were written: which file it is, and what to do.

array_record files hold checksums of their own, over every byte that is read; the JSON files beside them hold none, so
that what they say is compared with the records.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from spannorm_jax.errors import UserError, one_line


@contextlib.contextmanager
def naming_the_damaged_file(folder: Path) -> Iterator[None]:
    """Turns what TFDS raises over damaged metadata in `folder` into a UserError that names the file."""
    try:
        yield
    except (UserError, tfds.core.DatasetNotFoundError):
        raise
    except Exception as error:  # TFDS, protobuf and json each raise their own kinds over one flipped byte
        raise damaged(_unreadable_json(folder) or folder, error) from error


def damaged(path: Path, why: object) -> UserError:
    return UserError(
        f"dataset file {path} is damaged ({one_line(why)[:200]}); delete {path.parent if path.suffix else path} and "
        "prepare the dataset again, or put the file back from a copy"
    )


def check_counts(builder: tfds.core.DatasetBuilder, split: str) -> None:
    """Raises UserError for a record file of `split` that is missing or has another number of records than TFDS says."""
    for shard in builder.info.splits[split].file_instructions:
        path = Path(shard.filename)
        count = _open(path).num_records()
        if count != shard.examples_in_shard:
            raise damaged(path, f"it has {count} records where dataset_info.json says {shard.examples_in_shard}")


def first_damaged(builder: tfds.core.DatasetBuilder, split: str) -> UserError | None:
    """Reads the record files of `split` whole; the error of the first that is damaged, if any."""
    for shard in builder.info.splits[split].file_instructions:
        path = Path(shard.filename)
        try:
            _open(path).read_all()
        except UserError as error:
            return error
        except (RuntimeError, ValueError, IndexError) as error:
            return damaged(path, error)
    return None


def _open(path: Path) -> ArrayRecordReader:
    try:
        reader = ArrayRecordReader(str(path))
        reader.num_records()
        return reader
    except (RuntimeError, ValueError, OSError) as error:
        raise damaged(path, error) from error


def _unreadable_json(folder: Path) -> Path | None:
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return path
    return None
