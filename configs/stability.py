"""Ceilings: the highest learning rate at which a method trains with each of three seeds, found by bisection.

    python -m spannorm_jax.sweep ceiling_factor local

A cell is `configs/dense.py:tiny` with 250 steps, and the same in both sizes: in 150 a slow collapse does not show
(docs/stability.md). The ladder has a factor of 1.2. Sweeps share the cells that they have in
common; expected hours are those of `cost` at 7e10 FLOP/s, two CPU cores, for each sweep by itself. The most telling
come first.
"""

from collections.abc import Iterable

from spannorm_jax.sweep.definition import Point, arguments, bisects, chain, fixed, ladder, options, product, seeds

from .common import STUDIED
from .dense import ARMS, get_config  # noqa: F401 (the config of these sweeps)

LADDER = ladder(3e-4, 1e-1)
DEPTHS, WIDTHS = (6, 12, 24, 48, 96), (32, 64, 128)


OUTPUTS = ("attn_out", "ffn_out")
# Output projections that keep their norm, PreNorm and SpanNorm; and what they are to be better than.
REMEDY_ARMS = [
    *product(arguments(placement=("span", "pre"), init=("scale-L1",)), fixed("", {"optim.hold_norms": OUTPUTS})),
    *arguments(placement=("span", "pre"), init=("scale-L1",)),
    *fixed("placement=span,init=scale-L1-mult"),
    *fixed("placement=pre,init=plain"),
]


def _cells(*of: Iterable[Point]) -> list[Point]:
    short = {"training.steps": 250, "eval.tokens": 16384, "checkpoint.every_steps": 50, "checkpoint.keep_last": 1}
    return product(seeds(3), fixed("tiny", short | {"metrics.tensorboard": False}), *of)


@bisects(LADDER)
def sweep_ceiling_factor(size: str) -> Iterable[Point]:
    """ScaleInit's factor in the weight and in the forward pass. About 44 of 594 runs: 23 min, 0 h."""
    return _cells(arguments(placement=("span", "pre", "post"), init=("scale-L1", "scale-L1-mult")))


@bisects(LADDER)
def sweep_ceiling_targets(size: str) -> Iterable[Point]:
    """SpanNorm with ScaleInit's factor on both output projections, where it is usually on the feed-forward's alone.

    About 15 of 198 runs: 8 min, 0 h.
    """
    both = fixed("", {"model.init_targets": OUTPUTS})
    return _cells(arguments(placement=("span",), init=("scale-L1", "scale-L1-mult")), both)


@bisects(LADDER)
def sweep_ceiling_held(size: str) -> Iterable[Point]:
    """Weights that keep their norm (`optim.hold_norms`): output projections, or all but those of queries and keys.

    About 44 of 594 runs: 23 min, 0 h.
    """
    held = options({"optim.hold_norms": (OUTPUTS, ("v", "attn_out", "ffn_in", "ffn_out"))})
    return _cells(arguments(placement=("span", "pre", "post"), init=("scale-L1",)), held)


@bisects(LADDER)
def sweep_ceiling_depth(size: str) -> Iterable[Point]:
    """Five depths at width 64. About 111 of 1485 runs: 1.5 h, 0 h."""
    return _cells(arguments(depth=DEPTHS, placement=ARMS, init=("scale-L1",)))


@bisects(LADDER)
def sweep_ceiling_placements(size: str) -> Iterable[Point]:
    """Seventeen placements with ScaleInit. About 126 of 1683 runs: 1.1 h, 0 h."""
    return _cells(arguments(placement=STUDIED, init=("scale-L1",)))


@bisects(LADDER)
def sweep_ceiling_plain(size: str) -> Iterable[Point]:
    """The same without a depth factor. About 126 of 1683 runs: 1.1 h, 0 h."""
    return _cells(arguments(placement=STUDIED, init=("plain",)))


@bisects(LADDER)
def sweep_ceiling_warmup(size: str) -> Iterable[Point]:
    """A warm-up over a tenth and over half of the steps. About 44 of 594 runs: 23 min, 0 h."""
    return _cells(arguments(placement=ARMS, init=("scale-L1",)), options({"optim.warmup_fraction": (0.1, 0.5)}))


@bisects(LADDER)
def sweep_ceiling_width(size: str) -> Iterable[Point]:
    """Three widths at 24 blocks. About 66 of 891 runs: 59 min, 0 h."""
    return _cells(arguments(width=WIDTHS, placement=ARMS, init=("scale-L1",)))


@bisects(LADDER)
def sweep_ceiling_parametrisation(size: str) -> Iterable[Point]:
    """The standard parametrisation and CompleteP from 6 blocks of width 32, where one grows and where both do.

    About 133 of 1782 runs: 2.6 h, 0 h.
    """
    completep = {"model.parametrisation": "completep", "model.base_width": 32, "model.base_depth": 6}
    sizes = chain(arguments(depth=(24, 48), width=(64,)), arguments(depth=(24,), width=(128,)))
    return _cells(chain(fixed(), fixed("", completep)), sizes, arguments(placement=ARMS, init=("scale-L1",)))


@bisects(LADDER)
def sweep_ceiling_batch(size: str) -> Iterable[Point]:
    """Batches of 8, 32 and 128 rows at 12 blocks. About 66 of 891 runs: 2.0 h, 0 h."""
    rows = options({"training.batch_size": (8, 32, 128)})
    return _cells(rows, arguments(depth=(12,), placement=ARMS, init=("scale-L1",)))


def _remedy(first_seed: int, num_seeds: int, *of: Iterable[Point]) -> list[Point]:
    short = {
        "training.steps": 500,
        "checkpoint.every_steps": 100,
        "checkpoint.keep_last": 1,
        "metrics.tensorboard": False,
    }
    return product(options({"seed": range(first_seed, first_seed + num_seeds)}), fixed("tiny", short), *of)


def sweep_remedy_rates(size: str) -> Iterable[Point]:
    """At which rate is each arm of the remedy's comparison best, after 500 steps? 24 runs: 27 min, 0 h."""
    return _remedy(0, 1, options({"optim.lr": (3e-3, 6e-3, 1.2e-2, 2.4e-2)}), REMEDY_ARMS)
