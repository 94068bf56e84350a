"""What makes a config valid: ranges of single values, and combinations that contradict one another."""

import dataclasses

from spannorm_jax.config import (
    BALANCES,
    DTYPES,
    EXPERT_PARALLEL,
    FFNS,
    NORMS,
    PLATFORMS,
    REMATS,
    SCHEDULES,
    SCORES,
    Config,
    divisors,
    flatten,
    num_steps,
)
from spannorm_jax.errors import UserError, did_you_mean

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
    "model.moe.num_experts": 0,
    "model.moe.top_k": 1,
    "model.moe.expert_dim": 0,
    "model.moe.num_shared": 0,
    "model.moe.every": 1,
    "model.moe.first_dense": 0,
    "model.moe.aux_loss": 0,
    "model.moe.bias_rate": 0,
    "model.moe.router_z_loss": 0,
    "data.seq_len": 1,
    "data.verify_mib": 0,
    "data.bpe_vocab_size": 257,  # the bytes and end-of-text
    "data.bpe_train_mib": 0,
    "training.tokens": 0,
    "training.batch_size": 1,
    "training.num_microbatches": 1,
    "training.z_loss": 0,
    "training.watchdog_minutes": 0,
    "training.max_logits_mib": 1,
    "optim.lr": 0,
    "optim.weight_decay": 0,
    "optim.clip_norm": 0,
    "checkpoint.every_steps": 0,
    "checkpoint.keep_last": 1,
    "checkpoint.keep_every": 0,
    "eval.tokens": 0,
    "eval.batch_size": 1,
    "eval.every_steps": 0,
    "metrics.log_every": 1,
    "metrics.block_grad_every": 0,
    "metrics.console_every_s": 0,
    "metrics.peak_flops": 0,
    "mesh.data": -1,
    "mesh.fsdp": -1,
    "mesh.expert": -1,
    "mesh.tensor": -1,
}
_MIN_FLOAT = 2.0**-126  # float32's smallest normal number
_LEAST_FLOATS = {  # key -> smallest legal value, and what is wrong below it
    # The slope of 1 / sqrt(eps) is eps^-1.5 / 2, which float32 holds down to 2^-85 = 2.6e-26.
    "model.norm_eps": (1e-24, "the gradient of a row of zeros overflows float32"),
    # Frequencies are powers of 1 / theta: near 0 angles overflow, and their cosine is no number.
    "model.rope_theta": (1.0, "a pair turns by more than 1 radian a token"),
    "optim.eps": (_MIN_FLOAT, "it vanishes in float32"),
    "model.variance_budget": (_MIN_FLOAT, "it vanishes in float32"),
}
_FRACTIONS = ("optim.warmup_fraction", "optim.decay_fraction", "optim.final_lr_fraction")  # in [0, 1]
_BELOW_ONE = ("optim.b1", "optim.b2")  # in [0, 1)
# of token stores
_FILE_NAMES = ("data.dataset", "data.full_name", "data.text_feature", "data.train_split", "data.eval_split")
_MAX_DEPTH = 2**16  # some of what is told of each block is told on the host
_MAX_INT = 2**31 - 1  # steps, sizes and seeds travel as int32


def validate(config: Config) -> None:
    """Raises UserError for the first value that is out of range or contradicts another."""
    flat = flatten(config)
    for key, least in _AT_LEAST.items():
        if flat[key] < least:
            raise UserError(f"config key {key}={flat[key]} is too small; write {least} or more")
    for key, value in flat.items():
        if isinstance(value, int) and value > _MAX_INT and key != "training.tokens":
            raise UserError(f"config key {key}={value} is too large; write {_MAX_INT} or less")
    for key, (lowest, why) in _LEAST_FLOATS.items():
        if flat[key] < lowest:
            raise UserError(f"config key {key}={flat[key]} is too small: {why}; write {lowest} or more")
    for key, value in flat.items():
        if isinstance(value, float) and 0 < abs(value) < _MIN_FLOAT:  # a clip_norm of 0 / 0 would be no number
            raise UserError(f"config key {key}={value} vanishes in float32; write 0, or {_MIN_FLOAT} or more")
    for key in _FRACTIONS:
        if not 0 <= flat[key] <= 1:
            raise UserError(f"config key {key}={flat[key]} must be between 0 and 1")
    for key in _BELOW_ONE:
        if not 0 <= flat[key] <= 1 - 2**-24:  # what is nearer to 1 is 1 in float32
            raise UserError(f"config key {key}={flat[key]} must be at least 0 and below 1, also in float32")
    if config.model.depth > _MAX_DEPTH:
        raise UserError(f"config key model.depth={config.model.depth} is too large; write {_MAX_DEPTH} or less")
    for key in _FILE_NAMES:
        if len(flat[key].encode()) > 200:
            raise UserError(
                f"config key {key}={flat[key]!r} is too long for the name of a file; write 200 bytes at most"
            )
    choices = {
        "platform": PLATFORMS,
        "model.norm": NORMS,
        "model.ffn": FFNS,
        "model.dtype": DTYPES,
        "model.remat": REMATS,
        "model.moe.scores": SCORES,
        "model.moe.balance": BALANCES,
        "model.moe.expert_parallel": EXPERT_PARALLEL,
        "optim.schedule": SCHEDULES,
    }
    for key, valid in choices.items():
        if flat[key] not in valid:
            raise UserError(f"config key {key}={flat[key]!r} is unknown; {did_you_mean(flat[key], valid)}")
    _validate_shapes(config)
    _validate_length(config)
    _validate_moe(config)


def _validate_moe(config: Config) -> None:
    moe, depth = config.model.moe, config.model.depth
    if not moe.num_experts:
        return
    if moe.top_k > moe.num_experts:
        raise UserError(
            f"config key model.moe.top_k={moe.top_k} is above model.moe.num_experts={moe.num_experts}; "
            f"write {moe.num_experts} or less"
        )
    if moe.capacity < 1:
        raise UserError(
            f"config key model.moe.capacity={moe.capacity} cannot hold even loads; write 1 or more (1.5: half more)"
        )
    if moe.num_experts > 2**16:
        raise UserError(f"config key model.moe.num_experts={moe.num_experts} is too large; write {2**16} or less")
    if moe.first_dense >= depth:
        raise UserError(
            f"config key model.moe.first_dense={moe.first_dense} leaves none of model.depth={depth} blocks to experts; "
            f"write {depth - 1} or less, or model.moe.num_experts=0"
        )
    if (depth - moe.first_dense) % moe.every:
        raise UserError(
            f"config key model.moe.every={moe.every} does not divide the {depth - moe.first_dense} blocks "
            "after the first dense ones (model.depth - model.moe.first_dense); write a divisor"
        )


def _validate_length(config: Config) -> None:
    training, optim = config.training, config.optim
    if training.tokens == 0 and training.steps < 1:
        raise UserError(
            f"config key training.steps={training.steps} is too small; write 1 or more, or 0 and training.tokens"
        )
    steps = num_steps(config)
    # A resolved config holds both, and they agree.
    if training.steps not in (0, steps):
        raise UserError(
            f"config key training.tokens={training.tokens} makes {steps} updates, not training.steps={training.steps}; "
            "write training.steps=0 to go by tokens, or training.tokens=0 to go by steps"
        )
    if steps > _MAX_INT:
        raise UserError(f"config key training.tokens={training.tokens} makes more than {_MAX_INT} updates; write less")
    if optim.schedule == "wsd" and optim.warmup_fraction + optim.decay_fraction > 1:
        raise UserError(
            f"config key optim.decay_fraction={optim.decay_fraction} and optim.warmup_fraction="
            f"{optim.warmup_fraction} are together more than the whole run; lower one of them"
        )


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
    for key, rows in (("training.batch_size", training.batch_size), ("eval.batch_size", config.eval.batch_size)):
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
