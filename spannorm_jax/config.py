"""Every option of a run: frozen dataclasses with defaults, rules and reasons, and their form as dictionaries.

Unknown keys and wrong types raise `UserError` with one line that names the key, the value and the remedy. What an
option may be stands on its own line; combinations are checked by `validation.py`. `config_file.py` checks the names
of placements and initialisations, and reads configs from files and command lines.
"""

import dataclasses
import functools
import math
import typing
from dataclasses import dataclass, field
from typing import Any

from spannorm_jax.errors import UserError, did_you_mean

kinds_of: Any = functools.cache(typing.get_type_hints)  # name -> type, of the fields of a dataclass
MAX_INT = 2**31 - 1  # steps, sizes and seeds travel as int32
MIN_FLOAT = 2.0**-126  # float32's smallest normal number
MAX_FLOAT = (2 - 2**-23) * 2.0**127  # float32's largest


@dataclass(frozen=True)
class Rule:
    """What an option may be, apart from its type and from the other options (`validation.py`)."""

    least: float = -math.inf
    why: str = ""  # what is wrong below `least`
    most: float = math.inf
    unbounded: bool = False  # an integer that may be above MAX_INT
    below: float = math.inf
    choices: tuple[str, ...] = ()  # (): any text, or what the code that knows the names says (`config_file.py`)
    names_file: bool = False  # it becomes the name of a folder of token stores
    runtime: bool = False  # may change when a run is continued: it touches no number beyond float rounding
    number: bool = False  # a number of the step (`training/numbers.py`): it changes no shape, and no program
    beginning: bool = False  # of the weights that a run begins with, or of the order of its data
    inits: tuple[str, ...] = ()  # initialisations that read it; (): all
    text: bool = False  # of task=text alone: nothing reads it of images
    before: Any = None  # what was done before the option came; None: the default


def option(default: Any, **rule: Any) -> Any:
    """A field of a config's dataclass, with its `Rule`."""
    return field(default=default, metadata={"rule": Rule(**rule)})


SCALEINIT = ("scale", "shrink")  # initialisations that read ScaleInit's options


@dataclass(frozen=True)
class MoEConfig:
    # routed experts of a Mixture-of-Experts feed-forward; 0: every feed-forward is dense
    num_experts: int = option(0, least=0, most=2**16)
    top_k: int = option(2, least=1)  # routed experts per token
    expert_dim: int = option(0, least=0)  # hidden units of an expert; 0: model.ffn_dim
    num_shared: int = option(0, least=0)  # extra experts, of the same size, that see every token
    every: int = option(1, least=1)  # each n-th block has experts, the others a dense feed-forward
    first_dense: int = option(0, least=0)  # blocks at the start that are dense in any case
    scores: str = option("softmax", choices=("softmax", "sigmoid"))  # softmax | sigmoid (each expert by itself)
    renormalize: bool = True  # the weights of a token's experts sum to 1
    # aux_loss | bias (selection bias, moved by the loads, outside the optimiser) | none
    balance: str = option("aux_loss", choices=("aux_loss", "bias", "none"))
    # weight of the load-balance loss, summed over blocks; balance=aux_loss only
    aux_loss: float = option(0.01, least=0, number=True)
    bias_rate: float = option(1e-3, least=0, number=True)  # step of the selection bias; balance=bias only
    router_z_loss: float = option(0.0, least=0, number=True)  # weight of the router's log(Z)^2, summed over blocks


@dataclass(frozen=True)
class ModelConfig:
    depth: int = option(24, least=1, most=2**16)  # number of blocks, L
    width: int = option(64, least=2)  # residual stream width, D
    num_heads: int = option(4, least=1)  # query heads; must divide width
    num_kv_heads: int = option(0, least=0)  # grouped-query attention; 0: as many as num_heads
    ffn_dim: int = option(0, least=0)  # hidden units of the feed-forward; 0: `resolution.default_ffn_dim`
    vocab_size: int = option(0, least=0)  # rows of the embedding; 0: the tokenizer's
    placement: str = "span"  # a key of model.placement.PLACEMENTS
    # a key of model.initialisation.INITS, or published: that of the placement's authors
    init: str = option("scale", beginning=True)
    # ScaleInit's c: branch variance summed over the stream's additions
    variance_budget: float = option(1.0, least=MIN_FLOAT, why="it vanishes in float32", inits=SCALEINIT, beginning=True)
    # ScaleInit's p: the budget is variance_budget x depth^-p
    variance_exponent: float = option(1.0, least=-4.0, most=4.0, inits=SCALEINIT, before=0.0, beginning=True)
    # ScaleInit's factor: in the weight that a branch starts with, or a constant times the branch, which training keeps
    depth_factor: str = option("weight", choices=("weight", "multiplier"), beginning=True)
    # weights ScaleInit damps with depth; (): the placement's branches
    init_targets: tuple[str, ...] = option((), inits=SCALEINIT, beginning=True)
    # of placement mix: the part of the blocks, from the first, that are PostNorm's
    mix_share: float = option(0.25, least=0.0, most=1.0)
    # ProRes's T: what block l (from 1) adds is multiplied by min(1, t / (T l)) in update t; 0: by nothing
    branch_warmup_steps: float = option(0.0, least=0)
    # what follows the width and depth, from a base where all are `standard` (`model/parametrisation.py`):
    # standard | mup | everett (standard with learning rates by layer) | completep (width and depth)
    parametrisation: str = option("standard", choices=("standard", "mup", "everett", "completep"))
    base_width: int = option(0, least=0)  # where it was tuned; all but standard need it
    base_depth: int = option(0, least=0)  # where it was tuned; completep needs it
    base_head_dim: int = option(0, least=0)  # head size at the base; 0: as here, since wider presets have more heads
    depth_exponent: float = option(1.0, least=0, most=1)  # completep's a: branches times (depth / base_depth)^-a
    # rmsnorm | layernorm (both with a gain, neither with a bias)
    norm: str = option("rmsnorm", choices=("rmsnorm", "layernorm"))
    norm_eps: float = option(1e-6, least=1e-24, why="the gradient of a row near zero overflows float32")
    ffn: str = option("swiglu", choices=("swiglu", "gelu", "relu"))  # swiglu | gelu | relu
    qk_norm: bool = False  # RMSNorm with a gain on each head's queries and keys
    rope_theta: float = option(10000.0, least=1.0, why="a pair turns by more than 1 radian a token", text=True)
    tied_head: bool = option(False, text=True)  # the head is the embedding, which enters times sqrt(width)
    # compute: float32 | bfloat16; auto: bfloat16 on accelerators, float32 on CPU
    dtype: str = option("auto", choices=("auto", "float32", "bfloat16"))
    moe: MoEConfig = field(default_factory=MoEConfig)


@dataclass(frozen=True)
class ExecutionConfig:
    """How the model is executed. No option here changes the model, so all may change when a run goes on."""

    # auto: the best that this device runs; the others are model.kernels.attention.IMPLEMENTATIONS
    attention: str = option("auto", choices=("auto", "xla", "blocked", "cudnn", "splash"), runtime=True)
    # auto: the best that this device runs; the others are model.moe.grouped_matmul.IMPLEMENTATIONS
    grouped_matmul: str = option("auto", choices=("auto", "padded", "ragged_dot", "tokamax"), runtime=True)
    # none | block (save block inputs only) | dots (save outputs of matmuls and attention)
    # auto: none on a CPU, dots on a GPU, block on a TPU (model.stack.remat_for)
    remat: str = option("auto", choices=("auto", "none", "block", "dots"), runtime=True)
    # blocks a scan iteration holds; depth: no loop (slower compile, faster GPU step)
    scan_unroll: int = option(1, least=1, runtime=True)
    # float32 logits alive at once per device; above it the loss is chunked. 0: 256 on a CPU, 1024 elsewhere
    max_logits_mib: int = option(0, least=0, runtime=True, text=True)
    # ring | all_to_all, with mesh.expert > 1; auto: the one that moves fewer bytes
    expert_parallel: str = option("auto", choices=("auto", "ring", "all_to_all"), runtime=True)
    # all_to_all buffer size over an even share; a step that overflows takes the ring
    capacity: float = option(1.5, least=1, why="even loads do not fit", runtime=True)


@dataclass(frozen=True)
class DataConfig:
    # a TFDS name: name or name/config, and :version (default: the newest there)
    dataset: str = option("python_source", names_file=True)
    # TFDS's, with config and version, of what dataset was opened as; "": filled in at start
    full_name: str = option("", names_file=True)
    text_feature: str = option("text", names_file=True, text=True)  # the feature that holds the text
    train_split: str = option("train", names_file=True)
    eval_split: str = option("validation", names_file=True)
    # bytes (UTF-8; 0xFF, which it never uses, ends a document) | bpe (byte-level, trained)
    tokenizer: str = option("bytes", choices=("bytes", "bpe"), text=True)
    # tokens of bpe, end-of-text included; rows are rounded up to a multiple of 128
    bpe_vocab_size: int = option(8192, least=257, text=True)
    # text of the training split that bpe is trained on, from its front; 0: all of it
    bpe_train_mib: int = option(256, least=0, text=True)
    # a tokenizer.json to use where bpe would train one; its one added token, if any, ends a document
    tokenizer_file: str = option("", runtime=True, text=True)
    tokenizer_hash: str = option("", text=True)  # of bpe's tokenizer.json; "": filled in at start
    seq_len: int = option(128, least=1)  # tokens the model sees, T; a window has one more; of images filled in
    data_dir: str = option("", runtime=True)  # where TFDS datasets are; "": $TFDS_DATA_DIR or ~/tensorflow_datasets
    cache_dir: str = option("", runtime=True)  # where token stores are; "": $XDG_CACHE_HOME/spannorm_jax
    verify_mib: int = option(4096, least=0, runtime=True)  # token stores up to this size are hashed whole at each start
    fingerprint: str = ""  # hash of the tokens trained and evaluated on; "": filled in at start


@dataclass(frozen=True)
class ImageConfig:
    """Of task=image: patches of an image are what tokens of a text are."""

    size: int = option(0, least=0)  # pixels of a side, to which images are cut square and scaled; 0: the dataset's
    channels: int = option(0, least=0)  # 1: grey, 3: colours; 0: the dataset's
    patch: int = option(4, least=1)  # pixels of a patch's side; must divide size
    positions: str = option("sincos2d", choices=("sincos2d", "learned"))  # what is added to each patch
    pool: str = option("mean", choices=("mean", "token"))  # what the head reads: all patches, or one token before them
    label_smoothing: float = option(0.0, least=0, below=1)  # of the objective alone: losses are reported without it
    pad: int = option(0, least=0)  # training images are padded by so many pixels, and cut to size anywhere
    flip: bool = False  # half of the training images, left to right


@dataclass(frozen=True)
class TrainingConfig:
    steps: int = option(300, number=True)  # optimiser updates; 0: as many as training.tokens takes
    # tokens trained on, rounded up to whole updates; 0: training.steps decides. Never both
    tokens: int = option(0, least=0, unbounded=True, number=True, text=True)
    batch_size: int = option(8, least=1)  # sequences an update, over all devices and microbatches
    num_microbatches: int = option(1, least=1)  # gradient accumulation; the result equals one full batch
    z_loss: float = option(0.0, least=0, number=True)  # weight of log(Z)^2, which keeps the logits' normaliser near 1
    # without a step, after which the process ends itself (exit code 4); 0: never
    watchdog_minutes: float = option(30.0, least=0, runtime=True)


@dataclass(frozen=True)
class OptimConfig:
    name: str = option("adamw", choices=("adamw", "lion", "muon"))  # the keys of training.optimizer.OPTIMIZERS
    # peak learning rate; muon: of its matrices and of AdamW's weights alike
    lr: float = option(3e-3, least=0, number=True)
    schedule: str = option("cosine", choices=("cosine", "wsd"))  # wsd: warm-up, stable, decay
    warmup_fraction: float = option(0.1, least=0, most=1, number=True)  # of all updates, linear from 0
    # of all updates, linear at the end; wsd only, the cosine takes all after warm-up
    decay_fraction: float = option(0.2, least=0, most=1, number=True)
    final_lr_fraction: float = option(0.1, least=0, most=1, number=True)  # of lr, where the decay ends
    b1: float = option(0.9, least=0, below=1, number=True)
    b2: float = option(0.95, least=0, below=1, number=True)
    # of Muon's matrices; b1 and b2 are of AdamW's weights
    muon_momentum: float = option(0.95, least=0, below=1, number=True)
    eps: float = option(1e-8, least=MIN_FLOAT, why="it vanishes in float32", number=True)  # adamw, and muon's AdamW
    # on hidden matrices and the head, tied or not; never on other embeddings, on gains by decay_gains
    weight_decay: float = option(0.1, least=0, number=True)
    # coupled: an update shrinks weights by lr x weight_decay | independent: by weight_decay times the schedule's shape
    decay_coupling: str = option("coupled", choices=("coupled", "independent"), number=True)
    decay_gains: tuple[str, ...] = ()  # gains that decay too, towards 0, by site (before_attn, final, ...); or all
    clip_norm: float = option(1.0, least=0, number=True)  # global gradient norm; 0: no clipping
    hold_norms: tuple[str, ...] = ()  # sites whose weights keep in each block the norm that they begin with


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = option(100, least=0, runtime=True)  # 0: only at the end or when stopped
    keep_last: int = option(2, least=1, runtime=True)  # newest checkpoints kept; two at least while a run trains
    keep_every: int = option(0, least=0, runtime=True)  # checkpoints at multiples of this are kept for ever; 0: none


@dataclass(frozen=True)
class EvalConfig:
    # predictions on the held-out split, evenly spread over it; 0: all of it
    tokens: int = option(131072, least=0, runtime=True, text=True)
    batch_size: int = option(16, least=1, runtime=True)  # sequences a step
    # updates between held-out losses in training, and one at its end; 0: none
    every_steps: int = option(0, least=0, runtime=True)


@dataclass(frozen=True)
class MetricsConfig:
    log_every: int = option(1, least=1, runtime=True)  # steps between lines of metrics.jsonl
    # steps between gradient norms per block; 0: only the first and last step
    block_grad_every: int = option(50, least=0, runtime=True)
    # steps between early warnings: update ratio, stream RMS and largest attention logit of each block, also at the
    # first and last step; 0: none
    signal_every: int = option(50, least=0, runtime=True)
    # seconds between progress lines in a log; a terminal's is redrawn in place
    console_every_s: float = option(5.0, least=0, runtime=True)
    tensorboard: bool = option(True, runtime=True)
    # also log to this Weights & Biases project (pip install wandb); "": do not
    wandb_project: str = option("", runtime=True)
    # FLOP/s of one device for MFU; 0: from the table of known accelerators
    peak_flops: float = option(0.0, least=0, runtime=True)


@dataclass(frozen=True)
class MeshConfig:
    # replicas of the parameters; -1 on one axis: all the devices that are left
    data: int = option(-1, least=-1, runtime=True)
    fsdp: int = option(1, least=-1, runtime=True)  # shards of parameters, optimiser state and batch
    # shards of routed experts and batch; dense weights are replicated over it
    expert: int = option(1, least=-1, runtime=True)
    tensor: int = option(1, least=-1, runtime=True)  # shards of heads, ffn units and vocabulary


@dataclass(frozen=True)
class Config:
    seed: int = option(0, least=0, beginning=True)  # initialisation and data order
    task: str = option("text", choices=("text", "image"))  # text: the next token | image: its class
    # cpu | gpu | tpu; a platform that is absent is an error; auto: JAX's choice
    platform: str = option("auto", choices=("auto", "cpu", "gpu", "tpu"), runtime=True)
    model: ModelConfig = field(default_factory=ModelConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)


def moe_layers(cfg: ModelConfig) -> tuple[bool, ...]:
    """Which blocks have experts: after the first `first_dense`, each `every`-th."""
    moe = cfg.moe
    if not moe.num_experts:
        return (False,) * cfg.depth
    return tuple(i >= moe.first_dense and (i - moe.first_dense + 1) % moe.every == 0 for i in range(cfg.depth))


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
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_FLOAT
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def kind_name(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return "a list of names"
    return {int: "an integer", float: "a finite number (float32)", bool: "true or false", str: "a string"}[kind]


def from_dict(values: Any, cls: type = Config, prefix: str = "", of_older_run: bool = False) -> Any:
    """Builds the dataclass `cls` from a nested mapping that has exactly its keys.

    A run that was made before an option existed lacks its key (`of_older_run`). What was done then stands for it: the
    default, or the former one.

    Raises:
      UserError: a key is unknown or missing, or a value has the wrong type.
    """
    kinds = kinds_of(cls)
    for key in values:
        if key not in kinds:
            raise UserError(f"unknown config key {prefix}{key}; {did_you_mean(str(key), kinds)}")
    made = {}
    for name, kind in kinds.items():
        path = prefix + name
        if name not in values:
            if of_older_run:
                if path in former_defaults():
                    made[name] = former_defaults()[path]
                continue
            raise UserError(f"config key {path} is missing; a config must hold every key")
        value = values[name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            if not hasattr(value, "keys"):
                raise UserError(f"config key {path} is a group, not {value!r}; set {path}.NAME instead")
            made[name] = from_dict(value, kind, path + ".", of_older_run)
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
    """Dotted key -> value, in declaration order."""
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
        name, _, rest = key.partition("__")
        changed: dict[str, Any] = {name: replace(getattr(config, name), **{rest: value}) if rest else value}
        config = dataclasses.replace(config, **changed)
    return config


@functools.cache
def rules() -> dict[str, Rule]:
    """Dotted key -> rule, for each option that has one."""
    found: dict[str, Rule] = {}

    def walk(cls: type, prefix: str) -> None:
        kinds = kinds_of(cls)
        for item in dataclasses.fields(cls):
            if dataclasses.is_dataclass(kinds[item.name]):
                walk(kinds[item.name], f"{prefix}{item.name}.")
            elif "rule" in item.metadata:
                found[prefix + item.name] = item.metadata["rule"]

    walk(Config, "")
    return found


def is_runtime(key: str) -> bool:
    """Whether an option may change when a run is continued: it touches no number beyond float rounding."""
    return key in rules() and rules()[key].runtime


@functools.cache
def former_defaults() -> dict[str, Any]:
    """Dotted key -> former default, for each option whose default has changed."""
    return {key: rule.before for key, rule in rules().items() if rule.before is not None}


@functools.cache
def unread(init: str) -> frozenset[str]:
    """Dotted keys of the options that an initialisation does not read: with it they say nothing of a run."""
    return frozenset(key for key, rule in rules().items() if rule.inits and init not in rule.inits)
