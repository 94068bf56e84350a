"""Run folders with random weights, gains apart from one, that no training has made."""

import jax
import numpy as np

from spannorm_jax.config import CheckpointConfig, Config, replace, to_dict
from spannorm_jax.config_file import check, override, resolve_without_data
from spannorm_jax.data import bpe
from spannorm_jax.durable import write_json
from spannorm_jax.hf.export import export
from spannorm_jax.hf.files import TensorFiles, read_json
from spannorm_jax.hf.importing import model_config, read_params
from spannorm_jax.run.checkpoint import Checkpoints
from spannorm_jax.run.folder import CHECKPOINTS, CONFIG, TOKENIZER
from spannorm_jax.run.state import TrainState
from spannorm_jax.training.tasks import task_of

SEQ_LEN = 24


def with_bpe(config, text, size=300):
    """The config and the tokenizer.json of a BPE that is trained on `text`; its rows are rounded up to 384."""
    source = bpe.train([text.encode()], size, 0)
    loaded = bpe.load(source, -(-size // 128) * 128)
    changes = {"tokenizer": "bpe", "bpe_vocab_size": size, "tokenizer_hash": loaded.hash}
    changed = {f"data__{key}": value for key, value in changes.items()}
    return replace(config, **changed, model__vocab_size=loaded.vocab_size), source


def configure(**changes):
    """A model of 4 blocks whose options all differ from what transformers would take by itself."""
    small = {"depth": 4, "width": 32, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 48, "norm_eps": 1e-5}
    small |= {"rope_theta": 777.0, "init": "plain", "dtype": "float32"}
    named = {f"model__{name}": value for name, value in (small | changes).items()}
    config = resolve_without_data(replace(Config(), data__seq_len=SEQ_LEN, training__steps=4, **named), "cpu")
    check(config)
    return config


def configure_images(**changes):
    """As `configure`, of images of 8 x 8 pixels: what transformers' ViT can carry, if nothing else is asked for."""
    usual = {"model__placement": "pre", "model__norm": "layernorm", "model__ffn": "gelu", "image__pool": "token"}
    usual |= {"task": "image", "image__size": 8, "image__channels": 3, "model__vocab_size": 5, "model__depth": 3}
    usual |= {"model__width": 32, "model__num_heads": 4, "model__ffn_dim": 48, "model__dtype": "float32"}
    config = resolve_without_data(replace(Config(), training__steps=4, **usual | changes), "cpu")
    check(config)
    return config


def experts(**moe):
    return {f"moe__{name}": value for name, value in ({"num_experts": 4, "top_k": 2, "expert_dim": 24} | moe).items()}


def draw(config, seed=0):
    """Weights and model state: matrices keep variances, gains and biases are random, and a warm-up is over."""
    model, rng = task_of(config).define(config), np.random.default_rng(seed)

    def weight(spec):
        if spec.role == "norm":  # a number that multiplies a branch which nothing norms is small
            return (rng.uniform(0.5, 1.5, spec.shape) * (0.1 if "scalar" in spec.axes else 1)).astype(np.float32)
        return (rng.standard_normal(spec.shape) * spec.fan_in**-0.5).astype(np.float32)

    def state(path, shape):
        if path[-1].key == "warmup_factor":
            return np.ones(shape.shape, np.float32)
        return (0.1 * rng.standard_normal(shape.shape)).astype(np.float32)

    return model, model.map_weights(weight), jax.tree.map_with_path(state, model.model_state)


def save(workdir, config, params, model_state, step=1, tokenizer=""):
    """A run's folder with one checkpoint."""
    workdir.mkdir(parents=True)
    write_json(workdir / CONFIG, to_dict(config))
    if tokenizer:
        (workdir / TOKENIZER).write_text(tokenizer, encoding="utf-8")
    checkpoints = Checkpoints(workdir / CHECKPOINTS, CheckpointConfig())
    checkpoints.save(step, TrainState(np.int32(step), params, {"none": np.zeros(1)}, model_state), {"step": step})
    checkpoints.close()


def export_run(folder, changes, arch="", dtype="float32", text=""):
    """Config, parameters and state of a model in folder/run, which is exported to folder/out; its BPE is of `text`."""
    config, source = configure(**changes), ""
    if text:
        config, source = with_bpe(config, text)
    _, params, state = draw(config)
    save(folder / "run", config, params, state, tokenizer=source)
    export(config, folder / "run", None, folder / "out", arch, dtype)
    return config, params, state


def read_model(folder):
    """The model of a config.json, computing in float32, and the parameters beside it."""
    values = read_json(folder / "config.json")
    layout, config = model_config(folder, values)
    config = override(replace(config, model__dtype="float32"), [])
    return config.model, read_params(config, TensorFiles(folder), layout, values.get("tie_word_embeddings", False))
