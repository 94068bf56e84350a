"""A run's folder with two checkpoints of other weights each, made without training, for the tests of inference."""

import dataclasses

import jax

from spannorm_jax.config import CheckpointConfig, Config, MeshConfig, replace, to_dict
from spannorm_jax.model.definition import define
from spannorm_jax.parallel.mesh import make_mesh
from spannorm_jax.resolution import resolve
from spannorm_jax.run import folder as run_folder
from spannorm_jax.run.checkpoint import Checkpoints
from spannorm_jax.training.step import make_program

SEQ_LEN = 32


def small_config(vocab_size=320, **changes):
    """Two blocks of width 16; 320 rows of the embedding, of which the tokenizer of bytes has 256."""
    sizes = {"model__depth": 2, "model__width": 16, "model__num_heads": 2, "model__num_kv_heads": 1}
    sizes |= {"model__qk_norm": True, "data__seq_len": SEQ_LEN, "training__batch_size": 8}
    config = replace(Config(), **sizes, model__vocab_size=vocab_size, **changes)
    return resolve(config, vocab_size=256, platform="cpu", fingerprint="", tokenizer_hash=config.data.tokenizer_hash)


def write_small_run(workdir, config, change=lambda params: params):
    """Checkpoints 1 and 2, their weights changed by `change`."""
    with run_folder.open_run(workdir, config):
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        checkpoints = Checkpoints(workdir / run_folder.CHECKPOINTS, CheckpointConfig())
        with jax.set_mesh(mesh):
            program = make_program(config, define(config.model, config.execution), mesh)
            for step in (1, 2):
                state = program.init(step)
                state = dataclasses.replace(state, params=change(state.params))
                checkpoints.save(step, state, to_dict(config))
        checkpoints.wait()
        checkpoints.close()
    return workdir
