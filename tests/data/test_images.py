"""Images of TFDS's files and of those that need no download: pixel by pixel, and what is refused."""

import gzip
import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tiny import prepare

from spannorm_jax.config import DataConfig, ImageConfig
from spannorm_jax.data import images
from spannorm_jax.data.images import fingerprint, held_out_rows, open_images, rows_of

PIXELS = np.random.default_rng(0).integers(256, size=(5, 6, 6, 3), dtype=np.uint8)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    file.seek(0)  # TFDS without TensorFlow takes an encoded image, not pixels
    return file


def prepared(tmp_path, pixels=PIXELS, label=2, spoil=lambda file: file):
    """A dataset of images of class 2 out of 3, and two of them held out."""
    splits = {name: [spoil(png(x)) for x in some] for name, some in (("train", pixels), ("test", pixels[:2]))}
    beside = {"label": (tfds.features.ClassLabel(num_classes=3), label)}
    kind = tfds.features.Image(shape=pixels.shape[1:])
    prepare(tmp_path / "tfds", "tiny_images", splits, text="image", kind=kind, beside=beside)
    folders = {"data_dir": str(tmp_path / "tfds"), "cache_dir": str(tmp_path / "cache")}
    return DataConfig("tiny_images", eval_split="test", **folders)


@pytest.fixture
def data(tmp_path):
    return prepared(tmp_path)


def of_rows(store):
    """Bytes of each image, in any order: TFDS shuffles what it prepares."""
    return sorted(x.tobytes() for x in store.images)


def test_images_of_tfds_are_read_without_tensorflow_and_kept(data, monkeypatch):
    store = open_images(data, ImageConfig(), "train")
    assert of_rows(store) == sorted(x.tobytes() for x in PIXELS)
    assert (store.num_classes, store.dataset, {*store.labels}) == (3, "tiny_images/1.2.3", {2})
    monkeypatch.setattr(images, "_write", None)  # the second time they come from the cache
    again = open_images(data, ImageConfig(), "train")
    assert fingerprint(again) == fingerprint(store) != fingerprint(again, again)


def test_a_picture_is_cut_square_and_scaled(data):
    grey = open_images(data, ImageConfig(size=3, channels=1), "test")
    assert grey.images.shape == (2, 3, 3, 1)
    wide = Image.fromarray(np.repeat(PIXELS[0], 2, axis=1))  # 12 x 6
    middle = np.repeat(PIXELS[0], 2, axis=1)[:, 3:9]
    np.testing.assert_array_equal(images._fit(wide, 6, 3), middle)
    even = Image.fromarray(np.full((8, 8, 3), 77, np.uint8))
    np.testing.assert_array_equal(images._fit(even, 4, 3), np.full((4, 4, 3), 77))


def test_a_damaged_store_is_one_line(data, tmp_path, refused):
    open_images(data, ImageConfig(), "train")
    [path] = (tmp_path / "cache").rglob("images.npy")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    line = refused(open_images, data, ImageConfig(), "train")
    assert f"image store {path.parent} is damaged" in line and "delete it, and it is rebuilt" in line


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dataset": "tiny_image"}, "did you mean 'tiny_images'"),
        ({"eval_split": "tests"}, "data.eval_split='tests' is no split of tiny_images"),
        ({"eval_split": "test[:1%]"}, "data.eval_split='test[:1%]' of tiny_images/1.2.3 has no images"),
        ({"dataset": "digits/other"}, "there is one digits"),
        ({"dataset": "digits:2.0.0"}, "there is one digits"),
    ],
)
def test_what_is_not_there_is_one_line(data, changes, says, refused):
    asked = DataConfig(**vars(data) | changes)
    assert says in refused(open_images, asked, ImageConfig(), asked.eval_split)


def test_colours_with_a_fourth_channel_are_three(tmp_path):
    pixels = np.concatenate([PIXELS, np.full((5, 6, 6, 1), 255, np.uint8)], axis=-1)
    store = open_images(prepared(tmp_path, pixels), ImageConfig(), "train")
    assert of_rows(store) == sorted(x.tobytes() for x in PIXELS)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"label": -1}, "has class -1 of 3"),
        ({"spoil": lambda file: io.BytesIO(file.read()[:40])}, "cannot be read"),
        ({"spoil": lambda file: io.BytesIO(b"no image")}, "cannot be read"),
    ],
)
def test_an_image_that_cannot_be_used_is_named(more, says, tmp_path, refused):
    line = refused(open_images, prepared(tmp_path, **more), ImageConfig(), "test")
    assert f"image 0 of split 'test' of tiny_images/1.2.3 {says}" in line
    assert list((tmp_path / "cache").rglob("images.npy")) == []


def test_text_is_no_image(tiny, refused):
    assert "has no image with one class" in refused(open_images, tiny, ImageConfig(), "train")


def idx(path, array):
    sizes = np.array([0x800 + array.ndim, *array.shape], ">i4").tobytes()
    path.write_bytes(gzip.compress(sizes + array.tobytes()))


def test_fashion_mnist_is_debians_where_tfds_has_none(tmp_path, monkeypatch, refused):
    rng = np.random.default_rng(0)
    wanted = {}
    for part, n in (("train", 12), ("t10k", 4)):
        pixels, labels = rng.integers(256, size=(n, 5, 5), dtype=np.uint8), np.arange(n, dtype=np.uint8) % 10
        idx(tmp_path / f"{part}-images-idx3-ubyte.gz", pixels)
        idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", labels)
        wanted[part] = pixels, labels
    monkeypatch.setattr(images, "DEBIAN", tmp_path)
    data = DataConfig("fashion_mnist", data_dir=str(tmp_path / "none"))
    for split, part, which in (("train[:50%]", "train", slice(6)), ("test", "t10k", slice(None))):
        store = open_images(data, ImageConfig(), split)
        np.testing.assert_array_equal(store.images[..., 0], wanted[part][0][which])
        np.testing.assert_array_equal(store.labels, wanted[part][1][which])
    assert store.num_classes == 10
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(b"no gzip")
    assert "install dataset-fashion-mnist again" in refused(open_images, data, ImageConfig(), "train")


def test_rows_are_a_function_of_seed_and_step_and_held_out_ones_come_once():
    store = open_images(DataConfig("digits"), ImageConfig(), "train")
    assert (len(store.labels), store.images.shape[1:], store.num_classes) == (1437, (8, 8, 1), 10)
    rows = rows_of(store, 3, 500)
    first, second = rows(1, 0, 500), rows(2, 0, 500)
    part = rows_of(store, 3, 500)(2, 100, 200)
    for name, value in part.items():
        np.testing.assert_array_equal(value, second[name][100:200])
    assert len({*first["draw"], *second["draw"]}) > 990  # two of a thousand agree by chance once in 8,000 times
    seen = np.concatenate([rows(step, 0, 500)["image"] for step in (1, 2, 3)])[:1437]
    assert of_rows(store) == sorted(x.tobytes() for x in seen)
    assert not np.array_equal(rows_of(store, 4, 500)(1, 0, 500)["label"], first["label"])
    batches = [*held_out_rows(store, 1000)]
    weights = np.concatenate([b["weights"] for b in batches])
    np.testing.assert_array_equal(np.concatenate([b["label"] for b in batches])[weights == 1], store.labels)
    assert (len(weights), weights.sum()) == (2000, 1437)
