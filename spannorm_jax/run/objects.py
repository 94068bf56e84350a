"""What Orbax and TensorStore need to be told of a bucket.

Orbax 0.12.8 writes into gs:// by itself. Of s3:// it knows how to read the address and not how to write: it takes it
for a folder `s3:` on the disk. TensorStore has what is needed, so `_teach_s3` has Orbax take s3:// as it takes gs://.
"""

import functools
import os
from pathlib import Path
from typing import Any

from orbax.checkpoint._src.path import atomicity, gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from spannorm_jax.run.bucket import in_bucket


def base(folder: Path) -> dict[str, Any]:
    """TensorStore's specification of a folder; no URL, which gives characters such as `%` and `#` another meaning."""
    if not in_bucket(folder):
        return {"driver": "file", "path": f"{folder.resolve()}/"}  # which refuses `..`
    if str(folder).startswith("s3://"):
        return _s3(f"{folder}/")
    bucket, _, name = str(folder).removeprefix("gs://").partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": f"{name}/"}


def manager_options(checkpoints: Path) -> dict[str, Any]:
    """Options of Orbax's manager for a folder: in a bucket a last object commits a checkpoint, and no rename."""
    if not in_bucket(checkpoints):
        return {}
    if str(checkpoints).startswith("s3://"):
        _teach_s3()
    return {"temporary_path_class": atomicity.CommitFileTemporaryPath}


def _s3(path: str) -> dict[str, Any]:
    bucket, _, name = path.removeprefix("s3://").partition("/")
    found = {"driver": "s3", "bucket": bucket, "path": name}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return found | ({"endpoint": endpoint} if endpoint else {}) | ({"aws_region": region} if region else {})


@functools.cache
def _teach_s3() -> None:
    is_bucket, spec = gcs_utils.is_gcs_path, gcs_utils.get_kvstore_for_gcs

    def normal(path: str) -> str:
        return os.path.normpath(path).replace("gs:/", "gs://").replace("s3:/", "s3://")

    gcs_utils.is_gcs_path = lambda path: str(path).startswith("s3://") or is_bucket(path)
    gcs_utils.get_kvstore_for_gcs = lambda path: _s3(path) if path.startswith("s3://") else spec(path)
    tensorstore_utils._use_gcs_driver = lambda path: path.startswith(("gs://", "s3://"))
    tensorstore_utils._normalize_path = normal
