"""A TFDS dataset whose files have changed since they were written: which it is, and what to do.

array_record files hold checksums of their own, over every byte that is read; the JSON files beside them hold none, so
that what they say is compared with the records.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from spannorm_jax.errors import UserError, one_line


def damaged(path: Path, why: object) -> UserError:
    return UserError(
        f"dataset {path} is damaged ({one_line(why)[:200]}); delete {path if path.is_dir() else path.parent} and "
        "prepare the dataset again, or put the file back from a copy"
    )


@contextlib.contextmanager
def naming_the_damaged_folder(folder: Path) -> Iterator[None]:
    """Turns what TFDS raises over damaged metadata in `folder` into a UserError that names the folder."""
    try:
        yield
    except (UserError, tfds.core.DatasetNotFoundError):
        raise
    except Exception as error:  # TFDS, protobuf and json each raise their own kinds over one flipped byte
        raise damaged(folder, error) from error


def check_records(builder: tfds.core.DatasetBuilder, split: str, whole: bool = False) -> None:
    """Raises UserError for the first record file of `split` that is missing, or has not as many records as TFDS says.

    With `whole` all records are read, and one that is damaged is found too.
    """
    for shard in builder.info.splits[split].file_instructions:
        path = Path(shard.filename)
        try:
            reader = ArrayRecordReader(str(path))
            count = reader.num_records()
            if whole:
                reader.read_all()
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            raise damaged(path, error) from error
        if count != shard.examples_in_shard:
            raise damaged(path, f"it has {count} records where dataset_info.json says {shard.examples_in_shard}")
