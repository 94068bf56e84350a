"""Vision Transformers with the decoder's blocks, placements and initialisations.

    python -m spannorm_jax.train --config configs/vision.py:tiny,placement=span,init=scale --workdir runs/digits

The argument is a preset, then any of depth, width, placement, init (or rival), as in configs/dense.py. Everything else
is an override, for example --config.image.label_smoothing=0.1 --config.image.pool=token

preset   data            blocks  width  heads  patches        parameters
tiny     digits               6     64      4  4 of 4 x 4        297,408   scikit-learn's: always there
fashion  fashion_mnist       12    128      4  49 of 4 x 4     2,365,824   Debian's dataset-fashion-mnist, or TFDS
cifar    cifar10             12    192      3  64 of 4 x 4     5,324,352   TFDS
s16      imagenet2012        12    384      6  196 of 16 x 16 21,922,176   TFDS; big_vision's recipe, less its mixing

sweep_images asks whether placements differ on images as they do on text, and sweep_ceiling_images which rates they
bear there. Neither is run yet.

Parameters are those of placement=span. `pip install 'spannorm_jax[vision]'` reads images. s16 follows big_vision's
vit_s16_i1k (Beyer et al. 2022, arXiv 2205.01580) but for RandAugment, mixup and random scales, which are not here.
"""

from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from spannorm_jax.sweep.definition import Point, arguments, bisects, chain, compares, fixed, options, product, seeds

from .common import decoder
from .dense import ARMS
from .stability import LADDER

PRESETS = {
    "tiny": {"depth": 6, "width": 64, "head_dim": 16, "batch_size": 64, "lr": 3e-3},
    "fashion": {"depth": 12, "width": 128, "head_dim": 32, "batch_size": 128, "lr": 1e-3},
    "cifar": {"depth": 12, "width": 192, "head_dim": 64, "batch_size": 128, "lr": 1e-3},
    "s16": {"depth": 12, "width": 384, "head_dim": 64, "batch_size": 1024, "lr": 1e-3},
}
# preset -> dataset, held-out split, size, channels, patch, classes, epochs, images, pad
_DATA = {
    "tiny": ("digits", "test", 8, 1, 4, 10, 40, 1_437, 1),
    "fashion": ("fashion_mnist", "test", 28, 1, 4, 10, 10, 60_000, 2),
    "cifar": ("cifar10", "test", 32, 3, 4, 10, 200, 50_000, 4),
    "s16": ("imagenet2012", "validation", 224, 3, 16, 1000, 90, 1_281_167, 0),
}


def get_config(arg: str | None = None) -> ConfigDict:
    preset, config = decoder(arg, PRESETS)
    dataset, held_out, size, channels, patch, classes, epochs, images, pad = _DATA[preset]
    config.task = "image"
    config.data.dataset, config.data.eval_split = dataset, held_out
    config.image.size, config.image.channels, config.image.patch, config.image.pad = size, channels, patch, pad
    config.image.flip = dataset not in ("digits", "mnist")
    config.image.label_smoothing = 0.1
    config.model.vocab_size, config.model.norm, config.model.ffn = classes, "layernorm", "gelu"
    config.training.steps = epochs * images // config.training.batch_size
    config.optim.b2, config.optim.weight_decay = 0.999, 0.05
    config.eval.batch_size = 256
    if preset == "s16":
        config.image.label_smoothing, config.optim.weight_decay = 0.0, 0.1
        config.optim.warmup_fraction = 10_000 / config.training.steps
        config.checkpoint.every_steps, config.metrics.log_every = 1000, 10
    return config


def _recipe(size: str, **more: Any) -> list[Point]:
    """The model of images in a size: its options, and those of a sweep."""
    width, patch = {"cpu": (64, 7), "gpu": (128, 4)}[size]
    same: dict[str, Any] = {"image.patch": patch, "checkpoint.keep_last": 1}
    same |= {"image.pad": 0, "image.flip": False} if size == "cpu" else {}  # images seen once need no variants
    return fixed(f"fashion,width={width}", same | {key.replace("__", "."): value for key, value in more.items()})


@compares("span", baseline="pre")
def sweep_images(size: str) -> Iterable[Point]:
    """Five placements with ScaleInit's readings on Fashion-MNIST, over depths and rates. 117 runs: 3.8 h, 0 h.

    SpanNorm less PreNorm, each at its own best rate, for each initialisation and depth. What damps gains (olmo2, peri)
    has no multiplier. In size cpu a model has width 64 and patches of 7 x 7, and sees the images once; in size gpu it
    is `fashion`, and sees them fifty times. The one seed chooses rates, and gives no verdict.
    """
    epochs, rates = {"cpu": (1, (1e-3, 3e-3, 1e-2)), "gpu": (50, (3e-4, 1e-3, 3e-3))}[size]
    methods = chain(
        arguments(placement=("pre", "post", "span", "olmo2", "peri"), init=("plain", "scale-L1")),
        arguments(placement=("pre", "post", "span"), init=("scale-L1-mult",)),
    )
    recipe = _recipe(size, training__steps=epochs * 60_000 // 128, checkpoint__every_steps=500)
    return product(seeds(1), recipe, arguments(depth=(12, 24, 48)), methods, options({"optim.lr": rates}))


@bisects(LADDER)
def sweep_ceiling_images(size: str) -> Iterable[Point]:
    """The rates that are borne on Fashion-MNIST in 250 steps, over depths. About 89 of 1188 runs: 1.5 h, 0 h."""
    recipe = _recipe(size, training__steps=250, checkpoint__every_steps=50, metrics__tensorboard=False)
    methods = chain(arguments(placement=ARMS, init=("scale-L1",)), fixed("placement=span,init=scale-L1-mult"))
    return product(seeds(3), recipe, arguments(depth=(12, 24, 48)), methods)
