"""Every option of a run: frozen dataclasses with defaults and reasons, and what makes a config valid.

Unknown keys, wrong types and impossible combinations raise `UserError` with one line that names the key,
the value and the remedy. `config_file.py` reads configs from files and command lines.
"""

import dataclasses
import math
import typing
from dataclasses import dataclass, field
from typing import Any

from spannorm_jax.errors import UserError, did_you_mean


@dataclass(frozen=True)
class ModelConfig:
    depth: int = 24  # number of blocks, L
    width: int = 64  # residual stream width, D
    num_heads: int = 4  # query heads; must divide width
    num_kv_heads: int = 0  # grouped-query attention; 0: as many as num_heads
    ffn_dim: int = 0  # hidden units of the feed-forward; 0: `default_ffn_dim`
    vocab_size: int = 0  # rows of the embedding; 0: the tokenizer's
    placement: str = "span"  # a key of model.placement.PLACEMENTS
    init: str = "scale"  # a key of model.scale_init.INITS
    variance_budget: float = 1.0  # ScaleInit's c: branch variance summed over the stream's additions
    init_targets: tuple[str, ...] = ()  # weights ScaleInit damps with depth; (): the placement's branches
    norm: str = "rmsnorm"  # rmsnorm | layernorm (both with a gain, neither with a bias)
    norm_eps: float = 1e-6
    ffn: str = "swiglu"  # swiglu | gelu
    qk_norm: bool = False  # RMSNorm with a gain on each head's queries and keys
    rope_theta: float = 10000.0
    tied_head: bool = False  # True: the head is the embedding, and embeddings enter times sqrt(width)
    dtype: str = "auto"  # compute: float32 | bfloat16; auto: bfloat16 on accelerators, float32 on CPU
    attention: str = "auto"  # auto | xla; auto: the best that this device runs, printed at start
    remat: str = "none"  # none | block (save block inputs only) | dots (save matmul outputs)
    scan_unroll: int = 1  # blocks a scan iteration holds; depth: no loop (slower compile, faster GPU step)


@dataclass(frozen=True)
class DataConfig:
    dataset: str = "python_source"  # a TFDS name, "name/config" where it has configs
    text_feature: str = "text"  # the feature that holds the text
    train_split: str = "train"
    eval_split: str = "validation"
    tokenizer: str = "bytes"  # UTF-8 bytes; 0xFF, which UTF-8 never uses, ends a document
    seq_len: int = 128  # tokens the model sees, T; a window has one more
    data_dir: str = ""  # where TFDS datasets are; "": $TFDS_DATA_DIR or ~/tensorflow_datasets
    cache_dir: str = ""  # where token stores are; "": $XDG_CACHE_HOME/spannorm_jax
    verify_mib: int = 4096  # token stores up to this size are hashed whole at each start, about 1 s a GiB
    fingerprint: str = ""  # hash of the tokens trained and evaluated on; "": filled in at start


@dataclass(frozen=True)
class TrainingConfig:
    steps: int = 300  # optimiser updates
    batch_size: int = 8  # sequences an update, over all devices and microbatches
    num_microbatches: int = 1  # gradient accumulation; the result equals one full batch
    z_loss: float = 0.0  # weight of log(Z)^2, which keeps the logits' normaliser near 1
    max_logits_mib: int = 256  # float32 logits alive at once per device; above it the loss is chunked


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 3e-3  # peak learning rate of AdamW
    warmup_fraction: float = 0.1  # of training.steps, linear from 0
    final_lr_fraction: float = 0.1  # of lr, where the cosine ends
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on hidden matrices and the head; never on norms and embeddings
    clip_norm: float = 1.0  # global gradient norm; 0: no clipping


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = 100  # 0: only at the end or when stopped
    keep_last: int = 2  # newest checkpoints kept
    keep_every: int = 0  # checkpoints at multiples of this are kept for ever; 0: none


@dataclass(frozen=True)
class EvalConfig:
    tokens: int = 131072  # predictions on the held-out split, evenly spread over it; 0: all of it
    batch_size: int = 16  # sequences a step


@dataclass(frozen=True)
class MetricsConfig:
    log_every: int = 1  # steps between lines of metrics.jsonl
    block_grad_every: int = 50  # steps between gradient norms per block; 0: only the first and last step
    console_every_s: float = 5.0  # seconds between progress lines in a log; a terminal's is redrawn in place
    tensorboard: bool = True
    peak_flops: float = 0.0  # FLOP/s of one device for MFU; 0: from the table of known accelerators


@dataclass(frozen=True)
class MeshConfig:
    data: int = -1  # replicas of the parameters; -1 on one axis: all the devices that are left
    fsdp: int = 1  # shards of parameters, optimiser state and batch
    tensor: int = 1  # shards of heads, ffn units and vocabulary


@dataclass(frozen=True)
class Config:
    seed: int = 0  # initialisation and data order
    platform: str = "auto"  # cpu | gpu | tpu; a platform that is absent is an error; auto: JAX's choice
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)


# What may change when a run is continued: none of it touches the numbers beyond float rounding.
RUNTIME_KEYS = ("platform", "mesh", "checkpoint", "metrics", "data.data_dir", "data.cache_dir", "data.verify_mib")

PLATFORMS = ("auto", "cpu", "gpu", "tpu")
NORMS = ("rmsnorm", "layernorm")
FFNS = ("swiglu", "gelu")
DTYPES = ("auto", "float32", "bfloat16")
REMATS = ("none", "block", "dots")


def default_ffn_dim(width: int, ffn: str) -> int:
    """Hidden units that give a feed-forward 8 D^2 weights, rounded up (16 below width 256, else 128)."""
    exact = 4 * width if ffn == "gelu" else 8 * width / 3
    multiple = 16 if width < 256 else 128
    return math.ceil(exact / multiple) * multiple


def divisors(n: int) -> list[int]:
    """The divisors of n >= 1, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


# ---- dictionaries <-> dataclasses -------------------------------------------------------------


def matches(value: Any, kind: Any) -> bool:
    """Whether a value is of an option's type; an integer will do for a float."""
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple | list) and all(isinstance(v, str) for v in value)
    if kind is float:
        # Numbers travel as float32; a longer one would turn infinite on its way. (int against int: nothing overflows.)
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MAX_FLOAT
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def kind_name(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return "a list of names"
    return {int: "an integer", float: "a finite number (float32)", bool: "true or false", str: "a string"}[kind]


def from_dict(values: Any, cls: type = Config, prefix: str = "") -> Any:
    """Builds the dataclass `cls` from a nested mapping that has exactly its keys.

    Raises:
      UserError: a key is unknown or missing, or a value has the wrong type.
    """
    kinds = typing.get_type_hints(cls)
    for key in values:
        if key not in kinds:
            raise UserError(f"unknown config key {prefix}{key}; {did_you_mean(str(key), kinds)}")
    made = {}
    for name, kind in kinds.items():
        path = prefix + name
        if name not in values:
            raise UserError(f"config key {path} is missing; a config must hold every key")
        value = values[name]
        if dataclasses.is_dataclass(kind):
            if not hasattr(value, "keys"):
                raise UserError(f"config key {path} is a group, not {value!r}; set {path}.NAME instead")
            made[name] = from_dict(value, kind, path + ".")
        elif not matches(value, kind):
            raise UserError(f"config key {path}={value!r} must be {kind_name(kind)}")
        elif typing.get_origin(kind) is tuple:
            made[name] = tuple(value)
        else:
            made[name] = kind(value)
    return cls(**made)


def to_dict(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)


def flatten(config: Config) -> dict[str, Any]:
    """Dotted keys to values, in declaration order."""
    flat: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        for item in dataclasses.fields(node):
            value = getattr(node, item.name)
            if dataclasses.is_dataclass(value):
                walk(value, prefix + item.name + ".")
            else:
                flat[prefix + item.name] = value

    walk(config, "")
    return flat


def replace(config: Config, **changes: Any) -> Config:
    """`dataclasses.replace` for dotted keys, written with `__` for the dot: `model__depth=4`."""
    for key, value in changes.items():
        *groups, name = key.split("__")
        if groups:
            group = dataclasses.replace(getattr(config, groups[0]), **{name: value})
            config = dataclasses.replace(config, **{groups[0]: group})
        else:
            config = dataclasses.replace(config, **{name: value})
    return config


def changed_keys(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """(key, old, new) of every difference that continuing a run does not allow."""
    before, after = flatten(old), flatten(new)

    def runtime(key: str) -> bool:
        return any(key == r or key.startswith(r + ".") for r in RUNTIME_KEYS)

    return [(k, before[k], after[k]) for k in before if before[k] != after[k] and not runtime(k)]


def resolve(config: Config, *, vocab_size: int, platform: str, fingerprint: str) -> Config:
    """Fills in what a config leaves open: zeros, 'auto' compute dtype and the data's fingerprint.

    Raises:
      UserError: the vocabulary is too small for the tokenizer, or the data are not those asked for.
    """
    model, data = config.model, config.data
    if 0 < model.vocab_size < vocab_size:
        raise UserError(
            f"config key model.vocab_size={model.vocab_size} is below the {vocab_size} tokens of "
            f"data.tokenizer={data.tokenizer}; write {vocab_size} or more, or 0"
        )
    if data.fingerprint not in ("", fingerprint):
        raise UserError(
            f"the data here have fingerprint {fingerprint}, not data.fingerprint={data.fingerprint}: "
            f"{data.dataset} differs from what the config or run was made with, so results would not "
            "compare; restore that data, or start a new run without data.fingerprint"
        )
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            model,
            num_kv_heads=model.num_kv_heads or model.num_heads,
            ffn_dim=model.ffn_dim or default_ffn_dim(model.width, model.ffn),
            vocab_size=model.vocab_size or vocab_size,
            dtype=("float32" if platform == "cpu" else "bfloat16") if model.dtype == "auto" else model.dtype,
        ),
        data=dataclasses.replace(data, fingerprint=fingerprint),
    )


# ---- validation -------------------------------------------------------------------------------

_AT_LEAST = {  # key -> smallest legal value
    "seed": 0,
    "model.depth": 1,
    "model.width": 2,
    "model.num_heads": 1,
    "model.num_kv_heads": 0,
    "model.ffn_dim": 0,
    "model.vocab_size": 0,
    "model.variance_budget": 0,
    "model.scan_unroll": 1,
    "data.seq_len": 1,
    "data.verify_mib": 0,
    "training.steps": 1,
    "training.batch_size": 1,
    "training.num_microbatches": 1,
    "training.z_loss": 0,
    "training.max_logits_mib": 1,
    "optim.lr": 0,
    "optim.weight_decay": 0,
    "optim.clip_norm": 0,
    "checkpoint.every_steps": 0,
    "checkpoint.keep_last": 1,
    "checkpoint.keep_every": 0,
    "eval.tokens": 0,
    "eval.batch_size": 1,
    "metrics.log_every": 1,
    "metrics.block_grad_every": 0,
    "metrics.console_every_s": 0,
    "metrics.peak_flops": 0,
    "mesh.data": -1,
    "mesh.fsdp": -1,
    "mesh.tensor": -1,
}
_ABOVE_ZERO = ("model.norm_eps", "model.rope_theta", "optim.eps", "model.variance_budget")
_FRACTIONS = ("optim.warmup_fraction", "optim.final_lr_fraction")  # in [0, 1]
_BELOW_ONE = ("optim.b1", "optim.b2")  # in [0, 1)
_MAX_INT = 2**31 - 1  # steps, sizes and seeds travel as int32
_MAX_FLOAT, _MIN_FLOAT = (2 - 2**-23) * 2.0**127, 2.0**-126  # float32's largest, and smallest normal


def validate(config: Config) -> None:
    """Raises UserError for the first value that is out of range or contradicts another."""
    flat = flatten(config)
    for key, least in _AT_LEAST.items():
        if flat[key] < least:
            raise UserError(f"config key {key}={flat[key]} is too small; write {least} or more")
    for key, value in flat.items():
        if isinstance(value, int) and value > _MAX_INT:
            raise UserError(f"config key {key}={value} is too large; write {_MAX_INT} or less")
    for key in _ABOVE_ZERO:
        if flat[key] < _MIN_FLOAT:
            raise UserError(f"config key {key}={flat[key]} must be above 0, and at least {_MIN_FLOAT} for float32")
    for key in _FRACTIONS:
        if not 0 <= flat[key] <= 1:
            raise UserError(f"config key {key}={flat[key]} must be between 0 and 1")
    for key in _BELOW_ONE:
        if not 0 <= flat[key] <= 1 - 2**-24:  # what is nearer to 1 is 1 in float32
            raise UserError(f"config key {key}={flat[key]} must be at least 0 and below 1, also in float32")
    choices = {
        "platform": PLATFORMS,
        "model.norm": NORMS,
        "model.ffn": FFNS,
        "model.dtype": DTYPES,
        "model.remat": REMATS,
    }
    for key, valid in choices.items():
        if flat[key] not in valid:
            raise UserError(f"config key {key}={flat[key]!r} is unknown; {did_you_mean(flat[key], valid)}")
    _validate_shapes(config)


def _validate_shapes(config: Config) -> None:
    model, training, mesh = config.model, config.training, config.mesh
    if model.width % model.num_heads:
        fits = [h for h in divisors(model.width) if model.width // h % 2 == 0]
        near = [*[h for h in fits if h < model.num_heads][-1:], *[h for h in fits if h > model.num_heads][:1]]
        raise UserError(
            f"config key model.num_heads={model.num_heads} does not divide model.width={model.width}; "
            f"write {' or '.join(map(str, near)) or 'an even model.width'}, or change the width"
        )
    head_dim = model.width // model.num_heads
    if head_dim % 2:
        raise UserError(
            f"model.width / model.num_heads = {head_dim} is odd, and rotary embeddings turn pairs; "
            "choose an even head size"
        )
    if model.num_kv_heads and model.num_heads % model.num_kv_heads:
        raise UserError(
            f"config key model.num_kv_heads={model.num_kv_heads} does not divide "
            f"model.num_heads={model.num_heads}; write a divisor, or 0 for as many"
        )
    if model.depth % model.scan_unroll:
        raise UserError(
            f"config key model.scan_unroll={model.scan_unroll} does not divide model.depth={model.depth}; "
            "write a divisor (1 for a loop, the depth for none)"
        )
    if training.batch_size % training.num_microbatches:
        raise UserError(
            f"config key training.num_microbatches={training.num_microbatches} does not divide "
            f"training.batch_size={training.batch_size}; write a divisor"
        )
    for key in ("training.batch_size", "eval.batch_size"):
        rows = config.training.batch_size if key == "training.batch_size" else config.eval.batch_size
        if rows * config.data.seq_len > _MAX_INT:
            raise UserError(
                f"config key {key}={rows} x data.seq_len={config.data.seq_len} is above {_MAX_INT} tokens a step; "
                "make one of them smaller"
            )
    axes = dataclasses.asdict(mesh)
    for axis, size in axes.items():
        if size == 0:
            raise UserError(f"config key mesh.{axis}=0 must be at least 1, or -1 for the devices that are left")
    if sum(size == -1 for size in axes.values()) > 1:
        raise UserError(f"config group mesh={axes} has more than one -1; only one axis can take what is left")
