"""A run's checkpoint as a folder that transformers loads: weights, config.json, tokenizer, and a model card."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spannorm_jax.config import Config, MeshConfig
from spannorm_jax.durable import publish, temporary_folder, write_json, write_text
from spannorm_jax.errors import UserError
from spannorm_jax.hf import stock, vit
from spannorm_jax.hf.card import card
from spannorm_jax.hf.custom import CUSTOM, FILE, check, modelling_file
from spannorm_jax.hf.files import check_new, write_tensors
from spannorm_jax.hf.stock import Architecture
from spannorm_jax.hf.tokenizer import tokenizer_files
from spannorm_jax.hf.weights import Tensors, exported
from spannorm_jax.inference.options import SampleOptions
from spannorm_jax.inference.sampling import run_tokenizer
from spannorm_jax.parallel.mesh import make_mesh
from spannorm_jax.parallel.platform import start_jax
from spannorm_jax.run.trained import open_trained
from spannorm_jax.training.tasks import task_of


def export(config: Config, workdir: Path, step: int | None, out: Path, arch: str, dtype: str) -> str:
    """Writes a checkpoint (default: that of `open_trained`) to the new folder `out`; returns the architecture's name.

    Args:
      arch: stock, custom, or "" for stock where one of transformers' own carries the model exactly.
      dtype: of the tensors, float32 or bfloat16. Constants are folded in float32 before.

    Raises:
      UserError: there is no such checkpoint, it cannot be exported so, or `out` is there or cannot be written.
    """
    architecture = architecture_for(config, arch) if config.task == "text" else None
    if architecture is None:
        vit.check(config, arch)
    check_new(out, "--out")
    start_jax("cpu")  # nothing is computed, and a model that takes several devices fits the host
    with open_trained(workdir, step, "exporting") as restore:
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        trained = restore(config, task_of(config).define(config), mesh)
        params, model_state = jax.device_get((trained.params, trained.model_state))
        if architecture is None:
            weights, files, num_ids = vit.named_tensors(config, params, model_state), vit.files(config, dtype), 0
        else:
            tokenizer = run_tokenizer(config, workdir)
            weights = named_tensors(config, params, model_state, architecture)
            ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.end_of_text)
            files = tokenizer_files(tokenizer, config.data.seq_len)
            files["config.json"] = config_json(config, architecture, dtype) | ids
            num_ids = tokenizer.num_ids
            files["generation_config.json"] = ids | _generation(config, num_ids)
        texts = {"README.md": card(workdir, trained, architecture, dtype, num_ids)}
        if architecture is CUSTOM:
            texts[FILE] = modelling_file()
        with temporary_folder(out.parent, "--out") as folder:
            write_tensors(folder, ((name, _cast(name, tensor, dtype)) for name, tensor in weights))
            for name, words in texts.items():
                write_text(folder / name, words)
            for name, values in files.items():
                write_json(folder / name, values)
            publish(folder, out)
            if folder.exists():
                raise UserError(f"--out {out} was made meanwhile by another process; give another folder")
    return architecture.name if architecture else vit.NAME


def architecture_for(config: Config, arch: str) -> Architecture:
    """What carries a model. Raises UserError if it is not to be had."""
    check(config.model)
    exact, why = stock.stock_for(config.model)
    if arch == "stock" and not exact:
        raise UserError(f"--arch stock cannot carry this model exactly: {why}; write --arch custom")
    return exact if exact and arch != "custom" else CUSTOM


def named_tensors(
    config: Config, params: Any, model_state: Any, architecture: Architecture
) -> Iterator[tuple[str, np.ndarray]]:
    """The architecture's tensors by their names there, float32."""
    cfg = config.model
    tied = architecture.tied(cfg)
    blocks, ends = exported(cfg, params, model_state, tied)
    if architecture is not CUSTOM:
        stock.as_pre(cfg, blocks, ends)
    if architecture.scales and not tied:
        ends["embed"] = ends["embed"] / np.float32(cfg.width**0.5)

    def theirs(tensors: Tensors, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
        for ours, tensor in tensors.items():
            name = architecture.their_name(ours)
            yield prefix + name, tensor - np.float32(architecture.minus) if name.endswith("norm.weight") else tensor
            zeros = architecture.zeros(name)
            if zeros and "ffn.bias" not in tensors:
                yield prefix + zeros, np.zeros(len(tensor), np.float32)

    yield from theirs(ends, "")
    for layer, block in enumerate(blocks):
        yield from theirs(block, f"model.layers.{layer}.")


def _cast(name: str, tensor: np.ndarray, dtype: str) -> np.ndarray:
    """A router's bias stays float32: its updates are smaller than what bfloat16 tells apart."""
    return tensor if name.endswith("bias") else tensor.astype(jnp.dtype(dtype))


def config_json(config: Config, architecture: Architecture, dtype: str) -> dict[str, Any]:
    """config.json without the tokenizer's ids."""
    cfg = config.model
    made = {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.width,
        "intermediate_size": cfg.ffn_dim,
        "num_hidden_layers": cfg.depth,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.width // cfg.num_heads,
        "hidden_act": "silu" if cfg.ffn == "swiglu" else cfg.ffn,
        "max_position_embeddings": config.data.seq_len,
        "rms_norm_eps": cfg.norm_eps,
        # Versions 4 and 5 each read their own, and fall back to a default without a word.
        "rope_theta": cfg.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},
        "attention_bias": False,
        "tie_word_embeddings": architecture.tied(cfg),
        "torch_dtype": dtype,
    }
    return made | architecture.own(cfg)


def _generation(config: Config, num_ids: int) -> dict[str, Any]:
    """As `sample` draws if nothing else is asked for; rows that fill up the vocabulary are never drawn."""
    usual = SampleOptions()
    drawn = {"do_sample": True, "temperature": usual.temperature, "top_k": usual.top_k}
    unused = list(range(num_ids, config.model.vocab_size))
    return {"max_length": config.data.seq_len} | drawn | ({"suppress_tokens": unused} if unused else {})
