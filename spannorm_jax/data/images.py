"""Labelled images: TFDS datasets that are prepared on disk, and two that need no download.

`digits` are scikit-learn's. `fashion_mnist` is Debian's package dataset-fashion-mnist, where it is installed and TFDS
has none. Others are read from TFDS's files without TensorFlow, scaled once and kept in `data.cache_dir`.
"""

import gzip
import hashlib
import importlib
import io
import json
import types
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spannorm_jax import durable
from spannorm_jax.config import DataConfig, ImageConfig
from spannorm_jax.data import names
from spannorm_jax.data.loader import shuffled
from spannorm_jax.data.tokens import cache_folder, entropy
from spannorm_jax.errors import UserError, did_you_mean, one_line

FORMAT = 1
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_TRAIN_DIGITS = 1437  # of 1,797; the rest, by other writers, are the test split
_Arrays = tuple[np.ndarray, np.ndarray]  # images and labels
_IMAGES, _LABELS, _META = "images.npy", "labels.npy", "meta.json"


@dataclass(frozen=True)
class ImageStore:
    """A split: images (N, S, S, C) uint8 and labels (N,) int32, below `num_classes`."""

    images: np.ndarray
    labels: np.ndarray
    num_classes: int
    dataset: str  # TFDS's full name
    sha256: str  # of labels and images

    @property
    def label_entropy(self) -> float:
        """Nats: the least loss without looking."""
        return entropy(np.bincount(self.labels))


def open_images(data: DataConfig, image: ImageConfig, split: str) -> ImageStore:
    """A split of `data.dataset` in the size and the channels asked for.

    Raises:
      UserError: a dataset, split, file or package is missing, or images have no class each.
    """
    key, asked, name = names.asked_for(data)
    if name.base == "digits":
        if name.config or name.version not in ("", "1.0.0"):
            raise UserError(f"config key {key}={asked!r}: there is one digits; write digits, or digits/1.0.0")
        return _of_arrays(_digits(), "digits/1.0.0", data, image, split)
    debians = name.base == "fashion_mnist" and not name.config and name.version in ("", "3.0.1")
    if debians and DEBIAN.is_dir() and not _in_tfds(data):
        splits = {"train": _idx("train"), "test": _idx("t10k")}
        return _of_arrays(splits, "fashion_mnist/3.0.1", data, image, split)
    return _of_tfds(data, image, split)


def rows_of(store: ImageStore, seed: int, batch_size: int) -> Any:
    """(step, start, stop) -> `image`, `label`, `draw` of rows of a batch, by `loader.shuffled`.

    A row's `draw` (uint32) follows from the seed and the row's place in that order alone.
    """
    order = shuffled(np.arange(len(store.labels)), seed)

    def rows(step: int, start: int, stop: int) -> dict[str, np.ndarray]:
        places = np.arange((step - 1) * batch_size + start, (step - 1) * batch_size + stop)
        which = np.array([order[int(place)] for place in places])
        draws = [np.random.SeedSequence((seed, int(place))).generate_state(1)[0] for place in places]
        return {"image": store.images[which], "label": store.labels[which], "draw": np.array(draws, np.uint32)}

    return rows


def held_out_rows(store: ImageStore, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Each image once, in order; `weights` (B,) are 0 in the rows that fill the last batch."""
    for first in range(0, len(store.labels), batch_size):
        images, labels = store.images[first : first + batch_size], store.labels[first : first + batch_size]
        short = batch_size - len(labels)
        yield {
            "image": np.pad(images, ((0, short), (0, 0), (0, 0), (0, 0))),
            "label": np.pad(labels, (0, short)),
            "weights": (np.arange(batch_size) < batch_size - short).astype(np.float32),
        }


def fingerprint(*stores: ImageStore) -> str:
    """16 hex digits that change with any pixel, label or the order of the stores."""
    return hashlib.sha256("\n".join(store.sha256 for store in stores).encode()).hexdigest()[:16]


def _sha256(images: np.ndarray, labels: np.ndarray) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(labels).data)
    digest.update(np.ascontiguousarray(images).data)
    return digest.hexdigest()


# ---- without a download -------------------------------------------------------------------------------


def _digits() -> dict[str, _Arrays]:
    found = _package("sklearn.datasets", "scikit-learn").load_digits()
    images, labels = (found.images * 255 / 16).round().astype(np.uint8)[..., None], found.target.astype(np.int32)
    n = _TRAIN_DIGITS
    return {"train": (images[:n], labels[:n]), "test": (images[n:], labels[n:])}


def _idx(part: str) -> _Arrays:
    """Images and labels of files in MNIST's form: big-endian sizes, then bytes."""
    arrays = []
    for kind, dimensions in (("images-idx3", 3), ("labels-idx1", 1)):
        path = DEBIAN / f"{part}-{kind}-ubyte.gz"
        try:
            raw = gzip.decompress(path.read_bytes())
            shape = np.frombuffer(raw, ">i4", dimensions, offset=4)
            arrays.append(np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape))
        except (OSError, EOFError, ValueError) as error:
            raise UserError(
                f"{path} cannot be read ({one_line(error)}); install dataset-fashion-mnist again"
            ) from error
    return arrays[0][..., None], arrays[1].astype(np.int32)


def _of_arrays(
    splits: dict[str, _Arrays], dataset: str, data: DataConfig, image: ImageConfig, split: str
) -> ImageStore:
    """`split` may be a part, `train[:90%]`, as TFDS has it."""
    from tensorflow_datasets.core import ReadInstruction

    sizes = {name: types.SimpleNamespace(num_examples=len(labels)) for name, (_, labels) in splits.items()}
    key = names.split_key(data, split)
    try:
        found = ReadInstruction.from_spec(split).to_absolute(sizes)
    except (KeyError, ValueError, AssertionError) as error:
        hint = did_you_mean(split, splits)
        raise UserError(f"config key {key}={split!r} is no split of {dataset}; {hint}") from error
    images, labels = (np.concatenate([splits[p.splitname][i][p.from_ : p.to] for p in found]) for i in (0, 1))
    _check_some(len(labels), key, split, dataset)
    size, channels = image.size or images.shape[1], image.channels or images.shape[3]
    if (size, channels) != images.shape[2:]:
        pictures = map(_package("PIL.Image").fromarray, images.squeeze(-1))
        images = np.stack([_fit(picture, size, channels) for picture in pictures])
    num_classes = 1 + max(int(x.max()) for _, x in splits.values())
    return ImageStore(images, labels, num_classes, dataset, _sha256(images, labels))


# ---- TFDS ---------------------------------------------------------------------------------------------


def _in_tfds(data: DataConfig) -> bool:
    try:
        _builder(data)
    except UserError:
        return False
    return True


def _builder(data: DataConfig) -> Any:
    from spannorm_jax.data.tfds_files import open_dataset

    return open_dataset(data, "image_classification")


def _of_tfds(data: DataConfig, image: ImageConfig, split: str) -> ImageStore:
    """The store in `data.cache_dir`; one that is not there is made of TFDS's files."""
    from spannorm_jax.data import tfds_files

    builder = _builder(data)
    info, (feature, label) = builder.info, _features(builder)
    shape, num_classes = info.features[feature].shape, info.features[label].num_classes
    size, channels = image.size or shape[0], image.channels or (1 if shape[2] == 1 else 3)
    if not size or (shape[0] != shape[1] and not image.size):
        raise UserError(f"images of {info.full_name} have no one size; write config key image.size, such as 224")
    folder = cache_folder(data, "images") / f"images-v{FORMAT}" / tfds_files.identity(builder)
    folder = folder / f"{size}x{size}x{channels}" / urllib.parse.quote(split, safe="")
    if not folder.is_dir():
        examples, number = tfds_files.open_encoded(builder, data, split, (feature, label))
        _check_some(number, names.split_key(data, split), split, info.full_name)
        _write(folder, examples, (number, size, size, channels), num_classes, f"split {split!r} of {info.full_name}")
    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        images, labels = np.load(folder / _IMAGES, mmap_mode="r"), np.load(folder / _LABELS)
        if len(images) != len(labels) or images.shape[1:] != (size, size, channels):
            raise ValueError("images and labels do not fit")
        if images.nbytes <= data.verify_mib * 2**20 and _sha256(images, labels) != meta["sha256"]:
            raise ValueError(f"{_IMAGES} has not the hash in {_META}")
        return ImageStore(images, labels, num_classes, info.full_name, meta["sha256"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"image store {folder} is damaged ({one_line(error)}); delete it, and it is rebuilt") from error


def _features(builder: Any) -> tuple[str, str]:
    """Names of the image and its class. Raises UserError if there is not one of each."""
    import tensorflow_datasets as tfds

    kinds = (tfds.features.Image, tfds.features.ClassLabel)
    found = [[name for name, f in builder.info.features.items() if isinstance(f, kind)] for kind in kinds]
    if any(len(some) != 1 for some in found):
        raise UserError(f"{builder.info.full_name} has no image with one class; write another data.dataset")
    return found[0][0], found[1][0]


def _write(
    folder: Path,
    examples: Iterator[tuple[bytes, int]],
    shape: tuple[int, int, int, int],
    num_classes: int,
    source: str,
) -> None:
    """Writes the store in `folder`. Raises UserError for an image that has no class or is damaged."""
    pil = _package("PIL.Image", "pillow")
    with durable.temporary_folder(folder.parent, "config key data.cache_dir") as temp:
        images = np.lib.format.open_memmap(temp / _IMAGES, mode="w+", dtype=np.uint8, shape=shape)
        labels = np.zeros(shape[0], np.int32)
        for i, (encoded, label) in enumerate(examples):
            where = f"image {i} of {source}"
            if not 0 <= label < num_classes:
                raise UserError(
                    f"{where} has class {label} of {num_classes}, as unlabelled ones have; take another split"
                )
            try:
                images[i], labels[i] = _fit(pil.open(io.BytesIO(encoded)), shape[1], shape[3]), label
            except (OSError, ValueError, SyntaxError, pil.DecompressionBombError) as error:
                raise UserError(f"{where} cannot be read ({one_line(error)}); prepare the dataset again") from error
        images.flush()
        np.save(temp / _LABELS, labels)
        durable.write_json(temp / _META, {"format": FORMAT, "sha256": _sha256(images, labels)})
        durable.publish(temp, folder)


def _fit(picture: Any, size: int, channels: int) -> np.ndarray:
    """(size, size, channels) uint8: the middle square of a picture, scaled."""
    side = min(picture.size)
    left, top = ((length - side) // 2 for length in picture.size)
    picture = picture.convert("L" if channels == 1 else "RGB")
    if (side, side) != picture.size or side != size:
        picture = picture.resize((size, size), box=(left, top, left + side, top + side))
    return np.asarray(picture).reshape(size, size, channels)


def _check_some(number: int, key: str, split: str, dataset: str) -> None:
    if not number:
        raise UserError(f"config key {key}={split!r} of {dataset} has no images; write a larger part")


def _package(module: str, name: str = "pillow") -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"images take {name}: pip install 'spannorm_jax[vision]'") from error
