"""Images: the class of each."""

import dataclasses
import math
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from spannorm_jax.config import Config, ImageConfig
from spannorm_jax.data.floors import linear_classifier
from spannorm_jax.data.images import ImageStore, fingerprint, held_out_rows, open_images, rows_of
from spannorm_jax.errors import UserError
from spannorm_jax.model.definition import define
from spannorm_jax.model.vision import Encoder
from spannorm_jax.parallel import distributed
from spannorm_jax.resolution import resolve
from spannorm_jax.training.task import Batch, Field, Fields, Rows, Task

_COMPARED = 2**28  # bytes of images whose splits are compared


@dataclasses.dataclass(frozen=True)
class OpenImages:
    train: ImageStore
    eval: ImageStore


# ---- data -------------------------------------------------------------------------------------


def _open(config: Config) -> tuple[OpenImages, Config]:
    splits = config.data.train_split, config.data.eval_split
    train, held_out = (open_images(config.data, config.image, split) for split in splits)
    _, size, _, channels = train.images.shape
    if 0 < config.model.vocab_size < train.num_classes:
        raise UserError(
            f"config key model.vocab_size={config.model.vocab_size} is below the {train.num_classes} classes of "
            f"{train.dataset}; write {train.num_classes}, or 0"
        )
    config = dataclasses.replace(config, image=dataclasses.replace(config.image, size=size, channels=channels))
    if size % config.image.patch:
        raise UserError(
            f"config key image.patch={config.image.patch} does not divide the {size} pixels of a side of "
            f"{train.dataset}; write a divisor"
        )
    return OpenImages(train, held_out), resolve(
        config,
        vocab_size=train.num_classes,
        platform=jax.default_backend(),
        fingerprint=fingerprint(train, held_out),
        full_name=train.dataset,
    )


def _sample(store: ImageStore, T: int, rows: int, flag: str) -> Rows:
    available = len(store.labels)
    if rows > available:
        raise UserError(f"{flag} asks for {rows} images, and the split of {store.dataset} has {available}; write less")
    which = np.arange(rows) * available // rows
    return {"image": np.asarray(store.images[which]), "label": store.labels[which]}


def _fields(B: int, image: ImageConfig, **by_row: str) -> Fields:
    """`image`, `label` and numbers of a row: name -> type."""
    shape = (B, image.size, image.size, image.channels)
    numbers = {"label": "int32"} | by_row
    fields = {"image": Field(shape, "uint8", ("batch", "parts", "parts", "parts"))}
    return fields | {name: Field((B,), dtype, ("batch",)) for name, dtype in numbers.items()}


def _facts(data: OpenImages) -> dict[str, Any]:
    return {
        "dataset": data.train.dataset,
        "fingerprint": fingerprint(data.train, data.eval),
        "train_images": len(data.train.labels),
        "eval_images": len(data.eval.labels),
        "unigram_entropy": data.train.label_entropy,
    }


def _announced(config: Config, data: OpenImages) -> str:
    image = config.image
    return (
        f"data {data.train.dataset}, {len(data.train.labels):,} training images of {image.size} x {image.size} x "
        f"{image.channels}, {data.train.num_classes} classes, fingerprint {config.data.fingerprint}"
    )


def _warn(config: Config, data: OpenImages) -> None:
    """Says if held-out images are trained on too, where finding that out takes a moment."""
    splits = data.train.images, data.eval.images
    if sum(images.nbytes for images in splits) > _COMPARED:
        return
    trained_on, held_out = ({image.tobytes() for image in images} for images in splits)
    if shared := len(trained_on & held_out):
        distributed.print_once(
            f"config key data.eval_split={config.data.eval_split!r} shares {shared:,} images with data.train_split="
            f"{config.data.train_split!r}: its loss is not held out",
            sys.stderr,
        )


# ---- loss -------------------------------------------------------------------------------------


def augmented(images_BxSxSxC: Array, draw_B: Array, image: ImageConfig) -> Array:
    """Images padded by zeros, cut to size anywhere, half of them flipped: each by its own `draw`."""

    def one(x: Array, draw: Array) -> Array:
        to_cut, to_flip = jax.random.split(jax.random.key(draw))
        if image.pad:
            row, column = jax.random.randint(to_cut, (2,), 0, 2 * image.pad + 1)
            padded = jnp.pad(x, ((image.pad, image.pad), (image.pad, image.pad), (0, 0)))
            x = jax.lax.dynamic_slice(padded, (row, column, 0), x.shape)
        return jnp.where(jax.random.bernoulli(to_flip), x[:, ::-1], x) if image.flip else x

    return jax.vmap(one)(images_BxSxSxC, draw_B) if image.pad or image.flip else images_BxSxSxC


def loss_sums(encoder: Encoder, batch: Batch, z_loss: ArrayLike = 0.0) -> dict[str, Any]:
    """Sums over the images with weight 1, as `Task.loss_sums` has them.

    A batch with `draw` is of training, and is augmented. Label smoothing (Szegedy et al. 2016, arXiv 1512.00567,
    section 7) is in the objective alone.
    """
    image = encoder.image
    pixels = augmented(batch["image"], batch["draw"], image) if "draw" in batch else batch["image"]
    passed = encoder.run(pixels)
    logits_BxC = encoder.logits(passed.features)
    with jax.named_scope("loss"):
        labels, w = batch["label"], batch.get("weights", jnp.ones(len(logits_BxC)))
        log_z = jax.nn.logsumexp(logits_BxC, axis=-1)
        nll = log_z - jnp.take_along_axis(logits_BxC, labels[:, None], axis=-1)[:, 0]
        even = log_z - jnp.mean(logits_BxC, axis=-1)  # of a target that is the same for all classes
        smoothed = (1 - image.label_smoothing) * nll + image.label_smoothing * even
        correct = jnp.argmax(logits_BxC, axis=-1) == labels
        parts = {"nll": nll, "log_z": log_z, "z": log_z**2, "correct": correct, "count": jnp.ones_like(nll)}
        sums = {name: jnp.sum(part * w) for name, part in parts.items()}
        objective = jnp.sum((smoothed + z_loss * log_z**2) * w)
    router = {"router": passed.stats} if passed.stats else {}
    return {"objective": objective} | sums | router


# ---- measures ---------------------------------------------------------------------------------


def _measures(totals: dict[str, float]) -> dict[str, float]:
    """Loss (nats an image), and accuracy of the likeliest class."""
    return {
        "loss": totals["nll"] / totals["count"],
        "accuracy": totals["correct"] / totals["count"],
        "images": int(totals["count"]),
    }


def _summary(result: dict[str, Any]) -> str:
    floors = result["floors"]
    linear = f", a linear classifier {floors['linear_accuracy']:.4f}" if "linear" in floors else ""
    return (
        f"step {result['step']}  loss {result['loss']:.4f} nats/image  accuracy {result['accuracy']:.4f}  "
        f"({result['images']:,} images of {result['split']}; chance {math.exp(-floors['chance']):.4f}{linear})"
    )


IMAGE = Task(
    open=_open,
    check=lambda config, data: None,
    define=lambda config: define(config.model, config.execution, partial(Encoder, image=config.image)),
    positions=lambda config: config.data.seq_len,
    counted=lambda config: ("images", 1),
    train_fields=lambda config: _fields(config.training.batch_size, config.image, draw="uint32"),
    eval_fields=lambda config: _fields(config.eval.batch_size, config.image, weights="float32"),
    rows=lambda config, data: rows_of(data.train, config.seed, config.training.batch_size),
    inputs=lambda batch: batch["image"],
    targets=lambda batch: batch["label"],
    sample=_sample,
    loss_sums=lambda config, mesh_shape, rows: loss_sums,
    held_out=lambda config, data: ((rows, {}) for rows in held_out_rows(data.eval, config.eval.batch_size)),
    measures=_measures,
    logged=("loss", "accuracy"),
    facts=_facts,
    files=lambda data: {},
    announced=_announced,
    warn=_warn,
    floors=lambda config, data, measures: (
        {"chance": math.log(data.train.num_classes)} | linear_classifier(config.data, data.train, data.eval)
    ),
    summary=_summary,
)
