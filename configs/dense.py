"""Dense decoders, from a laptop's to one billion parameters.

    python -m spannorm_jax.train --config configs/dense.py:tiny,placement=span,init=scale --workdir runs/tiny

The argument is a preset, then any of depth, width, placement, init:  configs/dense.py:350m,depth=48,placement=pre
rival=NAME is a placement with the initialisation that its authors published:  configs/dense.py:tiny,rival=deepnorm
(or prores, PreNorm whose branches come in one after another)
Everything else is an override:  --config.optim.lr=1e-3 --config.data.seq_len=2048

preset  blocks  width  heads (kv)  ffn   vocabulary     parameters
tiny        24     64    4 (4)      176  256 (bytes)     1,240,128   the demo's; results in README.md
124m        12    768    6 (6)     2048  50304, tied   123,587,328   not measured yet
350m        24   1024    8 (8)     2816  50304, tied   359,842,816   not measured yet
1b          20   2048   16 (8)     5504  50304, tied 1,031,096,320   not measured yet

ladder      12    768   12 (12)    2048  50304, tied   123,587,328   not measured yet

Parameters are those of placement=span (pre and span have one more norm than post). The larger presets have
a vocabulary for a 50k tokenizer; for bytes write --config.model.vocab_size=256.

ladder has one dial, its depth: the width is 64 times that, a head has 64 of it, the learning rate falls with it, and
the run sees 20 tokens a parameter. ladder,depth=8 has 51 million parameters, ladder,depth=24 has 757 million.

The sweeps of this file (docs/sweeps.md) vary tiny in size cpu and ladder in size gpu.
"""

from collections.abc import Iterable

from ml_collections import ConfigDict

from spannorm_jax.model.placement import PLACEMENTS
from spannorm_jax.sweep.definition import (
    Point,
    arguments,
    chain,
    compares,
    fixed,
    options,
    product,
    seeds,
    sweep_seed,  # noqa: F401 (a sweep of this file too)
)

from .common import DENSE, STUDIED, dense_decoder, full_size

PRESETS = {
    "tiny": {"depth": 24, "width": 64, "head_dim": 16, "seq_len": 128, "batch_size": 8, "lr": 3e-3},
    **DENSE,
    "ladder": {"depth": 12, "width": 0, "head_dim": 64, "seq_len": 1024, "batch_size": 256, "lr": 0.0},
}


def get_config(arg: str | None = None) -> ConfigDict:
    preset, config = dense_decoder(arg, PRESETS)
    if preset != "tiny":
        full_size(config)
        config.model.vocab_size = 50304
    if preset == "ladder":
        model = config.model
        model.width = model.width or 64 * model.depth
        model.num_heads = max(1, model.width // 64)
        config.optim.lr = 0.768 / model.width
        parameters = 12 * model.depth * model.width**2 + model.vocab_size * model.width
        config.training.steps, config.training.tokens = 0, 20 * parameters
    return config


# ---- sweeps ---------------------------------------------------------------------------------------
#
# Each says its time in size cpu and in size gpu, by `cost` at 7e10 FLOP/s (two CPU cores) and 4e14 (an H100).
# Seeds come first: a sweep that is stopped has whole comparisons, of fewer seeds.

ARMS = ("pre", "post", "span")
RATES = {"cpu": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "gpu": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)}


def _recipe(size: str, steps: int = 250) -> list[Point]:
    """What all runs of a size share: in size cpu 250 steps of tiny, as in the demo, if not said otherwise."""
    if size == "cpu":
        return fixed("tiny", {"training.steps": steps, "checkpoint.every_steps": 50, "checkpoint.keep_last": 1})
    return fixed("ladder")


def _two_depths(size: str, steps: int = 250) -> list[Point]:
    """A moderate and a great depth at one width and number of tokens."""
    if size == "cpu":
        return product(_recipe(size, steps), arguments(depth=(24, 96)))
    return product(_recipe(size), fixed("width=768", {"training.tokens": 10**9}), arguments(depth=(24, 96)))


def sweep_placement_init(size: str) -> Iterable[Point]:
    """Seventeen placements with each initialisation that is no rival's own, three seeds. 153 runs: 1.5 h, 210 h."""
    return product(seeds(3), _recipe(size), arguments(placement=STUDIED, init=("plain", "gpt2", "scale")))


def sweep_rivals(size: str) -> Iterable[Point]:
    """Placements with what they were published with, at two depths and three learning rates. 378 runs: 5.4 h, 805 h.

    Where the authors have no initialisation of their own it is plain. The three main ones are also trained with Muon.
    ProRes's last block has come in after half of the run; its authors' 1000 updates a block are for longer ones. In
    size cpu a run has half the steps of the demo.
    """
    own = [name for name in STUDIED if PLACEMENTS[name].published_init]
    others = [name for name in STUDIED if name not in own]
    half = {"cpu": 125, "gpu": 3815}[size] / 2
    warmed = (
        fixed(f"rival=prores,depth={depth}", {"model.branch_warmup_steps": round(half / depth, 2)})
        for depth in (24, 96)
    )
    muon = product(arguments(rival=ARMS), options({"optim.name": ("muon",)}))
    recipes = chain(arguments(rival=own), arguments(placement=others, init=("plain",)), *warmed, muon)
    return product(seeds(3), _two_depths(size, steps=125), recipes, options({"optim.lr": RATES[size][1:4]}))


@compares("pre_embnorm", baseline="pre")
def sweep_newcomers(size: str) -> Iterable[Point]:
    """Normed embeddings, DeepScaleLM's pair, DS-Init and zero outputs beside the main arms. 84 runs: 3.0 h, 115 h.

    The comparison is PreNorm with normed embeddings less PreNorm: SpanNorm alone of the three main ones has that norm.
    In size cpu a run has four times the steps of the demo.
    """
    placements = arguments(placement=("pre", "pre_embnorm", "deepscale", "span"), init=("plain", "scale"))
    arms = chain(placements, arguments(placement=ARMS, init=("ds", "zero_out")))
    return product(seeds(3), _recipe(size, steps=1000), arms, options({"optim.lr": RATES[size][2:4]}))


def sweep_depth_factor(size: str) -> Iterable[Point]:
    """Where ScaleInit's factor stands, how it falls with depth, and a control. 126 runs: 3.2 h, 268 h."""
    places = {"model.depth_factor": ("weight", "multiplier"), "model.variance_exponent": (0.0, 0.5, 1.0)}
    control = fixed("init=shrink", {"model.variance_exponent": 0.0})
    choices = chain(product(arguments(init=("scale",)), options(places)), control)
    return product(seeds(3), _two_depths(size), arguments(placement=ARMS), choices)


def sweep_branch_factor(size: str) -> Iterable[Point]:
    """ScaleInit's factor in the weight or the forward pass, with three exponents, over rates. 216 runs: 7.8 h, 296 h.

    SpanNorm less PreNorm, each at its own best rate, for each factor and exponent. In size cpu a run has four times
    the steps of the demo. The seeds choose rates and arms for longer runs of other seeds; they give no verdict.
    """
    arms = product(
        options({"model.variance_exponent": (1.0, 0.0, 0.5)}),
        options({"optim.lr": (3e-3, 5.6e-3, 1e-2, 1.8e-2) if size == "cpu" else RATES[size][1:]}),
        options({"model.depth_factor": ("multiplier", "weight")}),
        arguments(placement=ARMS, init=("scale",)),
    )
    return product(seeds(3), _recipe(size, steps=1000), arms)


@compares("span", baseline="pre")
def sweep_lengths(size: str) -> Iterable[Point]:
    """SpanNorm less PreNorm against tokens: each length with its own schedule, on fresh seeds. 108 runs: 26.3 h, 126 h.

    In size cpu 1,000, 4,000 and 16,000 steps; in size gpu 300 million to 4.8 billion tokens. Shorter ones come first.
    """
    readings = list(arguments(placement=("pre", "span"), init=("scale-L1", "scale-L1-mult")))
    rates = options({"optim.lr": (5.6e-3, 3e-3, 1e-2) if size == "cpu" else RATES[size][1:4]})
    arms = product(options({"seed": (3, 4, 5)}), rates, readings)
    if size == "cpu":
        return chain(*(product(_recipe(size, steps=1000 * 4**i), arms) for i in range(3)))
    tokens = options({"training.tokens": [300_000_000 * 4**i for i in range(3)]})
    return product(_recipe(size), tokens, arms)


@compares("span", baseline="pre")
def sweep_rung_s(size: str) -> Iterable[Point]:
    """20 tokens a parameter at 0.6 million parameters: enough to pass counts of 4-grams. 42 runs: 9.1 h, 0 h.

    The rungs ask what SpanNorm less PreNorm is, at an equal and at each one's own rate, after as many tokens as a
    compute-optimal run has (Hoffmann et al. 2022). A rung is the same in both sizes: S is for two CPU cores, M and L,
    which have more tokens a step and another text, for one GPU, on which so small a model is far from the rate by which
    these hours go.
    """
    return product(seeds(3), _rung("s"), options({"optim.lr": (5.6e-3, 3e-3)}), RUNG_ARMS)


@compares("span", baseline="pre")
def sweep_rung_m(size: str) -> Iterable[Point]:
    """The same at 1.2 million parameters, over four rates. 56 runs: 46.9 h, 0 h."""
    return product(seeds(2), _rung("m"), options({"optim.lr": (1e-2, 5.6e-3, 3e-3, 1.8e-2)}), RUNG_ARMS)


@compares("span", baseline="pre")
def sweep_rung_l(size: str) -> Iterable[Point]:
    """The same at 4.9 million parameters. 28 runs: 342.6 h, 0 h."""
    return product(seeds(2), _rung("l"), options({"optim.lr": (5.6e-3, 3e-3)}), RUNG_ARMS)


@compares("span", baseline="siamese")
def sweep_rate_stress(size: str) -> Iterable[Point]:
    """1, 2 and 4 times each arm's own rate, held constant over 49 million tokens. 36 runs: 59.8 h, 0 h.

    Whether a placement is stable at any rate: SiameseNorm's authors say that SpanNorm diverges where theirs does not.
    The rate warms up over a tenth of the steps and stays, so that spikes and what becomes of them are not hidden by
    its end. An arm's own rate is the best of its shorter runs so far: 3e-3 for SpanNorm, SiameseNorm and PostNorm with
    the factor in the weight. It is 6e-3 for PreNorm and for SpanNorm with the multiplier; SiameseNorm gets the same.
    """
    constant = fixed("", {"optim.schedule": "wsd", "optim.decay_fraction": 0.0})
    low, high = (list(options({"optim.lr": [times * lr for times in (1, 2, 4)]})) for lr in (3e-3, 6e-3))
    arms = chain(
        product(arguments(placement=("span", "siamese"), init=("scale-L1-mult",)), high),
        product(arguments(placement=("span", "siamese", "post"), init=("scale-L1",)), low),
        product(fixed("placement=pre,init=scale-L1"), high),
    )
    return product(seeds(2), _rung("m", steps=3_000), constant, arms)


def _rung(name: str, steps: int | None = None) -> list[Point]:
    # Beside the standard library M and L would read their text 2 and 9 times. Half of what lies on sys.path is 70 MB,
    # read 1.5 times at most, and its store is small enough to be carried to a GPU (experiments/gpu_session.py).
    installed = {"data.dataset": "python_source/sys_path", "data.train_split": "train[:50%]"}
    depth, width, own_steps, rows, data = {
        "s": (12, 64, 12_400, 8, {"data.dataset": "python_source"}),
        "m": (24, 64, 1_512, 128, installed),
        "l": (24, 128, 5_980, 128, installed),
    }[name]
    steps = steps or own_steps
    values = {"training.steps": steps, "training.batch_size": rows, **data}
    values |= {"eval.every_steps": steps // 10, "checkpoint.every_steps": max(50, steps // 25)}
    return fixed(f"tiny,depth={depth},width={width}", values | {"checkpoint.keep_last": 1})


# The two placements with the readings that lead, their usual controls, and the reading that is nearest to the paper.
RUNG_ARMS = [
    *arguments(placement=("span", "pre"), init=("scale-L1", "scale-L1-mult")),
    *fixed("placement=pre,init=plain"),
    *fixed("placement=post,init=scale-L1"),
    *fixed("placement=span,init=scale-L0.5"),
]


def sweep_exponent(size: str) -> Iterable[Point]:
    """Whether ScaleInit's exponent matters at every learning rate. 90 runs: 55 min, 123 h."""
    arms = product(arguments(placement=ARMS, init=("scale",)), options({"model.variance_exponent": (0.0, 1.0)}))
    return product(seeds(3), _recipe(size), arms, options({"optim.lr": RATES[size]}))


@compares("span", baseline="pre")
def sweep_fresh_seeds(size: str) -> Iterable[Point]:
    """What the sweeps that chose ScaleInit's exponent found, on seeds that had no part in it. 21 runs: 13 min, 29 h.

    Both exponents at the best rate of PostNorm and SpanNorm, and PreNorm at its own.
    """
    exponents = options({"model.variance_exponent": (0.0, 1.0)})
    shared = product(arguments(placement=ARMS, init=("scale",)), exponents, options({"optim.lr": RATES[size][2:3]}))
    own = fixed("placement=pre,init=scale", {"model.variance_exponent": 1.0, "optim.lr": RATES[size][3]})
    return product(options({"seed": (3, 4, 5)}), _recipe(size), chain(shared, own))


def sweep_depth(size: str) -> Iterable[Point]:
    """Six depths at one width, rate and number of tokens, ScaleInit with two exponents. 162 runs: 3.5 h, 304 h."""
    inits = chain(fixed("init=plain"), *(fixed("init=scale", {"model.variance_exponent": p}) for p in (0.0, 1.0)))
    arms = product(arguments(depth=(6, 12, 24, 48, 96, 128), placement=ARMS), inits)
    if size == "cpu":
        return product(seeds(3), _recipe(size), arms)
    # By the ladder's rule a deeper run would see more tokens.
    return product(seeds(3), _recipe(size), fixed("width=768", {"training.tokens": 10**9}), arms)


# The sweeps of transfer began before p = 1 was ScaleInit's default, and keep to the former one.
_FORMER = {"model.variance_exponent": 0.0}


def sweep_width(size: str) -> Iterable[Point]:
    """Where the best learning rate goes with the width, in the standard parametrisation and in those that say where.

    At one depth `completep` is `mup`. 315 runs: 5.3 h, 1751 h.
    """
    widths = (32, 64, 128) if size == "cpu" else (384, 768, 1536)
    standard = arguments(placement=ARMS)
    base = {"model.parametrisation": ("mup", "everett"), "model.base_width": widths[:1]}
    others = product(arguments(placement=("pre", "span")), options(base))
    arms = product(arguments(width=widths, init=("scale",)), chain(standard, others))
    return product(seeds(3), _recipe(size), fixed("", _FORMER), arms, options({"optim.lr": RATES[size]}))


def sweep_depth_lr(size: str) -> Iterable[Point]:
    """Where the best learning rate goes with the depth, in the standard parametrisation and in CompleteP (a = 1/2, 1).

    At one width `mup` and `everett` are `standard`. 270 runs: 4.8 h, 415 h.
    """
    depths = (6, 24, 96)
    completep = {
        "model.parametrisation": ("completep",),
        "model.base_width": (64 if size == "cpu" else 768,),
        "model.base_depth": depths[:1],
        "model.depth_exponent": (0.5, 1.0),
    }
    arms = product(
        arguments(depth=depths, placement=("pre", "span"), init=("scale",)), chain(fixed(), options(completep))
    )
    same = fixed() if size == "cpu" else fixed("width=768", {"training.tokens": 10**9})
    return product(seeds(3), _recipe(size), same, fixed("", _FORMER), arms, options({"optim.lr": RATES[size]}))


def sweep_lr(size: str) -> Iterable[Point]:
    """How much each placement depends on the learning rate. 90 runs: 55 min, 123 h."""
    arms = arguments(placement=ARMS, init=("plain", "scale"))
    return product(seeds(3), _recipe(size), arms, options({"optim.lr": RATES[size]}))


def sweep_warmup(size: str) -> Iterable[Point]:
    """Whether a longer warm-up lets a placement train at a rate at which it stalled. 36 runs: 22 min, 49 h."""
    arms = arguments(placement=ARMS, init=("scale",))
    rates = RATES[size][2:4]  # in size cpu the best of SpanNorm and PostNorm, and PreNorm's, at which those two stall
    return product(seeds(3), _recipe(size), arms, options({"optim.lr": rates, "optim.warmup_fraction": (0.1, 0.5)}))


def sweep_fixed_budget(size: str) -> Iterable[Point]:
    """Depth against width, with as many weights in the blocks (embeddings differ). 54 runs: 34 min, 79 h."""
    shapes = ((6, 128), (24, 64), (96, 32)) if size == "cpu" else ((3, 1536), (12, 768), (48, 384))
    # The rounding of a default ffn_dim would give the narrow blocks more.
    hidden = {32: 88, 64: 176, 128: 352, 384: 1024, 768: 2048, 1536: 4096}
    made = chain(*(fixed(f"depth={d},width={w}", {"model.ffn_dim": hidden[w]}) for d, w in shapes))
    same = {} if size == "cpu" else {"training.tokens": 2_500_000_000}
    return product(seeds(3), _recipe(size), fixed("", same), made, arguments(placement=ARMS, init=("plain", "scale")))


def sweep_init_targets(size: str) -> Iterable[Point]:
    """Which output projections ScaleInit should damp with depth: it decides the default of `model.init_targets`.

    Every placement gets both choices, so that no arm is tuned alone. 18 runs: 11 min, 25 h.
    """
    arms = arguments(placement=ARMS, init=("scale",))
    return product(
        seeds(3), _recipe(size), arms, options({"model.init_targets": (("ffn_out",), ("attn_out", "ffn_out"))})
    )
