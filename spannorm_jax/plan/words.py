"""What all plans print alike: the model and its batch, and numbers with their units."""

from spannorm_jax.config import Config
from spannorm_jax.model.initialisation import init_of
from spannorm_jax.model.stack import remat_for
from spannorm_jax.training.tasks import task_of


def setting(config: Config, platform: str) -> str:
    """A resolved config in one line, as it runs on a platform."""
    model, batch = config.model, config.training
    remat = remat_for(config.execution.remat, platform)
    pieces = f" in {batch.num_microbatches} microbatches" if batch.num_microbatches > 1 else ""
    return (
        f"{model.placement} / {init_of(model)}: {model.depth} blocks, width {model.width}, batch {batch.batch_size} x "
        f"{task_of(config).positions(config)}{pieces}, remat {remat}, {model.dtype}"
    )


def flop_words(count: float) -> str:
    sizes = (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9))
    prefix, size = next((prefix_size for prefix_size in sizes if count >= prefix_size[1]), ("M", 1e6))
    return f"{count / size:.1f} {prefix}FLOP"


def size_words(count: float) -> str:
    if count >= 1e9:
        return f"{count / 1e9:,.2f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
