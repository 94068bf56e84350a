"""A model of images as transformers' ViTForImageClassification, where it is one.

docs/huggingface.md says what is folded. Names are those of transformers 4, which version 5 reads and writes too.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from spannorm_jax.config import Config
from spannorm_jax.errors import UserError
from spannorm_jax.hf.stock import as_pre, traits
from spannorm_jax.hf.weights import exported
from spannorm_jax.model.vision import sincos2d

NAME = "ViTForImageClassification"
_HAS: dict[str, tuple[Any, ...]] = {  # what it has of a model's options
    "model.placement": ("pre", "lns", "layerscale"),
    "model.norm": ("layernorm",),
    "model.ffn": ("gelu", "relu"),
    "model.qk_norm": (False,),
    "model.moe.num_experts": (0,),
    "image.pool": ("token",),  # its classifier reads the token alone
}
_BLOCK = {
    "attn.q": "attention.attention.query",
    "attn.k": "attention.attention.key",
    "attn.v": "attention.attention.value",
    "attn.out": "attention.output.dense",
    "norms.before_attn": "layernorm_before",
    "norms.before_ffn": "layernorm_after",
    "ffn.in_.0": "intermediate.dense",
    "ffn.out": "output.dense",
}
_WITHOUT_BIAS = ("attn.q", "attn.k", "attn.v")  # by qkv_bias=false; other biases are zero


def check(config: Config, arch: str) -> None:
    """Raises UserError for a model that is no ViT of transformers', and names what it lacks."""
    model = config.model
    if arch == "custom":
        raise UserError("--arch custom is of task=text: our modelling file has no images; leave it out")
    found = {f"model.{key}": value for key, value in traits(model).items()} | {"image.pool": config.image.pool}
    lacking = [f"{key}={found[key]}" for key, values in _HAS.items() if found[key] not in values]
    if model.num_kv_heads != model.num_heads:
        lacking.append(f"model.num_kv_heads={model.num_kv_heads} of {model.num_heads} heads")
    if lacking:
        raise UserError(f"{NAME}, transformers' ViT, cannot carry this model exactly: it lacks {', '.join(lacking)}")


def named_tensors(config: Config, params: Any, model_state: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors by their names there, float32: positions in a table of their own, biases zero."""
    cfg, image = config.model, config.image
    blocks, ends = exported(cfg, params, model_state)
    as_pre(cfg, blocks, ends)
    side, D = image.size // image.patch, cfg.width
    positions_NxD = np.asarray(params["positions"]) if image.positions == "learned" else sincos2d(side, D)
    patch_FxD = ends["embed"].reshape(image.patch, image.patch, image.channels, D)
    yield "vit.embeddings.cls_token", np.asarray(params["token"])[None]
    yield "vit.embeddings.position_embeddings", np.pad(positions_NxD, ((1, 0), (0, 0)))[None]
    yield from _with_bias("vit.embeddings.patch_embeddings.projection", patch_FxD.transpose(3, 2, 0, 1))
    for layer, block in enumerate(blocks):
        for ours, name in _BLOCK.items():
            full = f"vit.encoder.layer.{layer}.{name}"
            yield from [(f"{full}.weight", block[ours])] if ours in _WITHOUT_BIAS else _with_bias(full, block[ours])
    yield from _with_bias("vit.layernorm", ends["ends.final"])
    yield from _with_bias("classifier", ends["head"])


def _with_bias(name: str, weight: np.ndarray) -> list[tuple[str, np.ndarray]]:
    return [(f"{name}.weight", weight), (f"{name}.bias", np.zeros(len(weight), np.float32))]


def files(config: Config, dtype: str) -> dict[str, dict[str, Any]]:
    """config.json, and how pixels are scaled: from -1 to 1."""
    cfg, image = config.model, config.image
    labels = [str(i) for i in range(cfg.vocab_size)]
    model = {
        "architectures": [NAME],
        "model_type": "vit",
        "hidden_size": cfg.width,
        "num_hidden_layers": cfg.depth,
        "num_attention_heads": cfg.num_heads,
        "intermediate_size": cfg.ffn_dim,
        "hidden_act": cfg.ffn,
        "layer_norm_eps": cfg.norm_eps,
        "image_size": image.size,
        "patch_size": image.patch,
        "num_channels": image.channels,
        "qkv_bias": False,
        "id2label": dict(zip(labels, labels, strict=True)),
        "label2id": {label: i for i, label in enumerate(labels)},
        "torch_dtype": dtype,
    }
    half = [0.5] * image.channels
    scaling = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": image.size, "width": image.size},
        "resample": 3,  # bicubic, as here
        "rescale_factor": 1 / 255,
        "image_mean": half,
        "image_std": half,
    }
    return {"config.json": model, "preprocessor_config.json": scaling}
