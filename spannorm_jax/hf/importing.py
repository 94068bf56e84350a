"""A model of Llama's, Qwen3's or Mixtral's layout on disk -> a run's folder, as if it had been trained here.

Its config.json is read key by key: what says something of the model must be what ours is.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spannorm_jax.config import Config, replace
from spannorm_jax.config_file import check_overridable, override
from spannorm_jax.data import bpe
from spannorm_jax.data.tokenizer import BYTES
from spannorm_jax.durable import publish, temporary_folder, write_text
from spannorm_jax.errors import UserError, did_you_mean
from spannorm_jax.hf.files import TensorFiles, check_new, read_json
from spannorm_jax.hf.stock import STOCK, Architecture
from spannorm_jax.hf.tokenizer import run_tokenizer_json
from spannorm_jax.hf.weights import imported
from spannorm_jax.parallel.platform import start_jax
from spannorm_jax.run.folder import CONFIG, TOKENIZER
from spannorm_jax.training.flags import Flags
from spannorm_jax.training.record import Record
from spannorm_jax.training.session import match_machine

_LONGEST = 1024  # tokens of a row, unless data.seq_len is given: models that could read more need the memory for it
# What may be given beside the model.
_OVERRIDABLE = (
    *("seed", "platform", "execution.", "data.", "training.", "optim.", "checkpoint.", "eval.", "metrics.", "mesh."),
    *("model.dtype", "model.moe.balance", "model.moe.aux_loss", "model.moe.bias_rate", "model.moe.router_z_loss"),
)
_OURS = {  # key of config.json -> ours, of the model
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "intermediate_size": "ffn_dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "rms_norm_eps": "norm_eps",
    "num_local_experts": "moe__num_experts",
    "num_experts_per_tok": "moe__top_k",
}
_NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Read below, or of training and of programs, not of the model.
_READ = {
    *("model_type", "head_dim", "rope_theta", "rope_parameters", "tie_word_embeddings", "max_position_embeddings"),
    *("architectures", "torch_dtype", "dtype", "transformers_version", "use_cache", "initializer_range"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "_name_or_path", "output_router_logits", "router_aux_loss_coef"),
    *("router_jitter_noise", "attention_dropout", "max_window_layers", "attn_implementation"),
}
_MUST: dict[str, tuple[Any, ...]] = {  # key -> what our model has, if it is said
    "hidden_act": ("silu",),
    "pretraining_tp": (1,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (None,),
}


# model_type of an architecture that is read -> what transformers takes for keys that its config.json leaves out.
LAYOUTS: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 1e4, "rms_norm_eps": 1e-6},
    "qwen3": {"rope_theta": 1e4, "rms_norm_eps": 1e-6, "head_dim": 128},
    "mixtral": {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "num_local_experts": 8, "num_experts_per_tok": 2},
}


def import_model(
    source: Path, workdir: Path, tokenizer: Path | None, overrides: list[tuple[str, str]], argv: list[str]
) -> Config:
    """Makes the run folder `workdir`, with a checkpoint of step 0, from the model in `source`; returns its config.

    Args:
      tokenizer: a tokenizer.json; by default the one in `source`.
      overrides: of what is no part of the model, as `train` takes them.

    Raises:
      UserError: `source` is no such model or our model lacks something of it, or `workdir` is not new.
    """
    check_overridable(overrides, _OVERRIDABLE, "import")
    check_new(workdir, "--workdir")
    values = read_json(source / CONFIG)
    architecture, config = model_config(source, values)
    text, num_ids = _tokenizer(source, values, tokenizer or source / TOKENIZER)
    config = override(config, overrides)
    if text:
        own = {"data__tokenizer": "bpe", "data__bpe_vocab_size": num_ids}
        config = replace(config, **own, data__tokenizer_file=str((workdir / TOKENIZER).absolute()))
    start_jax(config.platform)
    params = read_params(config, TensorFiles(source), architecture, bool(values.get("tie_word_embeddings")))
    with temporary_folder(workdir.absolute().parent, "--workdir") as temp:
        write_text(temp / TOKENIZER, text)
        here = {"data__tokenizer_file": str(temp / TOKENIZER)} if text else {}
        session = match_machine(replace(config, **here), temp / "run", Flags(argv, module="spannorm_jax.import_hf"))
        made = replace(session.config, data__tokenizer_file=config.data.tokenizer_file)
        with Record(dataclasses.replace(session, config=made)) as record, jax.set_mesh(session.mesh):
            state = record.begin(silent=True)
            state.params = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), params, state.params)
            record.save(0, state)
            record.close()
        publish(temp / "run", workdir)
        if (temp / "run").exists():
            raise UserError(f"--workdir {workdir} was made meanwhile by another process; give another folder")
    return made


def model_config(source: Path, values: dict[str, Any]) -> tuple[Architecture, Config]:
    """The architecture that a config.json names, and a config with its model.

    Raises:
      UserError: a key is missing, or says what our model has not.
    """
    path = source / CONFIG
    kind = values.get("model_type")
    if kind not in LAYOUTS:
        raise UserError(f"{path}: model_type={kind!r} cannot be imported; {did_you_mean(str(kind), LAYOUTS)}")
    architecture = next(one for one in STOCK if one.model_type == kind)
    said = LAYOUTS[kind] | {key: value for key, value in values.items() if value is not None}

    def refuse(key: str, value: Any, why: str = "which our model has not") -> UserError:
        return UserError(f"{path}: {key}={value!r}, {why}; take the key out if it says nothing of the model")

    if said.get("use_sliding_window") is False:
        said.pop("sliding_window", None)
    ours = {}
    for key in _NEEDED:
        if not isinstance(said.get(key), int) or said[key] < 1:
            raise UserError(f"{path}: {key}={said.get(key)!r} must be an integer above 0")
    for key, value in said.items():
        if key in _OURS:
            ours[_OURS[key]] = value
        elif key == "layer_types" and value == ["full_attention"] * len(value):
            continue
        # What is false, 0 or empty asks for nothing.
        elif value not in _MUST[key] if key in _MUST else value and key not in _READ:
            raise refuse(key, value)
    head_dim = said["hidden_size"] // said["num_attention_heads"]
    if said.get("head_dim", head_dim) != head_dim:
        raise refuse("head_dim", said["head_dim"], f"where ours is hidden_size / num_attention_heads = {head_dim}")
    rope = said.get("rope_parameters") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        raise refuse("rope_parameters", rope)
    model = ours | {
        "placement": "pre",
        "init": "gpt2",
        "rope_theta": rope.get("rope_theta", said["rope_theta"]),
        "qk_norm": True in architecture.has["qk_norm"],
        "moe__expert_dim": ours["ffn_dim"] if "moe__num_experts" in ours else 0,
    }
    changes = {f"model__{name}": value for name, value in model.items()}
    longest = said.get("max_position_embeddings")
    changes["data__seq_len"] = min(longest, _LONGEST) if isinstance(longest, int) else _LONGEST
    return architecture, replace(Config(), **changes)


def _tokenizer(source: Path, values: dict[str, Any], path: Path) -> tuple[str, int]:
    """The run's tokenizer.json and its number of ids; "" for bytes."""
    end = values.get("eos_token_id")
    end = end[0] if isinstance(end, list) and end else end
    if not isinstance(end, int):
        raise UserError(f"{source / CONFIG}: eos_token_id={end!r} names no token that ends a document; write its id")
    text = run_tokenizer_json(read_json(path), end)
    if not text:
        return "", BYTES.num_ids
    try:
        return text, bpe.load(text, values["vocab_size"]).num_ids
    except ValueError as error:
        raise UserError(f"tokenizer {path} cannot be used ({error}); give another --tokenizer") from error


def read_params(config: Config, tensors: TensorFiles, architecture: Architecture, tied: bool) -> dict[str, Any]:
    """The model's parameters, float32. Raises UserError for a tensor that is missing, or more than the model has.

    A tied head becomes a matrix of its own, for embeddings are not multiplied there.
    """
    names = architecture.their_name

    def tensor(name: str, layer: int | None, shape: tuple[int, ...]) -> np.ndarray:
        theirs = names("embed" if tied and name == "head" else name)
        return tensors(theirs if layer is None else f"model.layers.{layer}.{theirs}", shape)

    made = imported(config.model, tensor)
    left = {name for name in tensors.unread if not name.endswith("rotary_emb.inv_freq")}
    left -= {names("head")} if tied else set()
    if left:
        raise UserError(f"{tensors.folder} has a tensor {min(left)}, which our model has not ({len(left)} such)")
    return made
