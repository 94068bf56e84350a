"""Named scopes of the compiled step, which a profile shows."""

import re

import jax

from spannorm_jax.config import Config, replace
from spannorm_jax.model.definition import define
from spannorm_jax.parallel.mesh import make_mesh
from spannorm_jax.resolution import resolve
from spannorm_jax.training.numbers import numbers_of
from spannorm_jax.training.step import make_program

SEQ_LEN = 12


def test_a_profile_of_the_train_step_reads_like_the_paper():
    """Each stage has its name in the compiled step, and every matmul, forward or backward, stands under one."""
    small = {"model__depth": 2, "model__width": 16, "model__num_heads": 2, "data__seq_len": SEQ_LEN}
    config = replace(Config(), model__qk_norm=True, training__num_microbatches=2, **small)
    config = resolve(config, vocab_size=256, platform="cpu", fingerprint="")
    program = make_program(config, define(config.model, config.execution), make_mesh(config.mesh, jax.devices()[:1]))
    text = program.train.lower(program.abstract_state, program.abstract_batch, numbers_of(config)).compile().as_text()
    names = re.findall(r'op_name="(jit\(train_step\)[^"]*)"', text)
    stages = [
        "block/attention/" + s for s in ("qkv", "rope", "norm/q_norm", "norm/k_norm", "dot_product_attention", "out")
    ]
    stages += [
        "block/norm/after_attn",
        "block/norm/after_ffn",
        "block/ffn",
        "embed",
        "norm/entry",
        "head",
        "loss",
        "accumulate",
    ]
    stages += ["optimizer", "metrics"]

    def under(stage, name):  # a scope of the backward pass reads transpose(jvp(loss))
        return f"/{stage}/" in re.sub(r"\b(?:transpose|jvp)\(|\)", "", name)

    for stage in stages:
        assert any(under(stage, name) for name in names), stage
    matmuls = [name for name in names if name.endswith("dot_general")]
    assert matmuls
    for name in matmuls:
        assert any(under(stage, name) for stage in stages), name
