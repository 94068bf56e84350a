"""What the README promises: a placement is one value, and nothing else in the package asks which one it is."""

import importlib.util
import math

import pytest
from processes import values_of

from spannorm_jax import sample
from spannorm_jax.analysis.prediction import predict
from spannorm_jax.model.placement import PLACEMENTS
from spannorm_jax.run.folder import read_config
from spannorm_jax.sweep import __main__ as sweep
from spannorm_jax.sweep.expansion import expand

# A norm and a gain of new names, a norm within attention, and two streams: all that a declaration can say.
MINE = """
from spannorm_jax.model.placement import declare


@declare(
    "mine",
    "My own norm",
    block_norms=("my_norm", "after_ffn"),
    block_gains={"my_gain": lambda cfg: 1 / cfg.depth},
    additions={"attn": "my_gain", "ffn": "after_ffn"},
    inner_norms=("heads",),
    end_norms=("my_end",),
    enter=lambda x, n: (x, x),
    leave=lambda stream, n: n.my_end(stream[0] + stream[1]),
)
def mine(stream, attn, ffn, n, layer, cfg):
    x, r = stream
    x = x + n.my_gain(attn(n.my_norm(x)))
    return x + n.after_ffn(ffn(x + r)), r
"""
CONFIG = """
from spannorm_jax.config_file import default_config, parse_arg
from spannorm_jax.sweep.definition import arguments


def get_config(arg=None):
    config = default_config()
    config.model.placement = parse_arg(arg, placement="span").placement
    config.model.depth, config.model.width, config.model.num_heads, config.model.ffn_dim = 2, 16, 2, 16
    config.data.seq_len, config.training.steps = 16, 3
    config.eval.tokens, config.eval.batch_size, config.checkpoint.every_steps = 256, 8, 3
    return config


def sweep_ours(size):
    return arguments(placement=("mine", "pre"))
"""


@pytest.fixture
def folder(tmp_path, own_caches):
    """A folder with the placement's file, which is imported, and a config file."""
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "ours.py").write_text(CONFIG)
    spec = importlib.util.spec_from_file_location("mine", tmp_path / "mine.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    yield tmp_path
    del PLACEMENTS["mine"]


def test_a_placement_in_a_file_of_its_own_is_swept_trained_sampled_predicted_and_reported(folder, capsys):
    ours = ["--config", str(folder / "ours.py"), "--out", str(folder / "runs")]
    for index in ("0", "1"):
        assert sweep.main(["ours", "run", index, *ours]) == 0
    workdir = folder / "runs" / expand("ours", "cpu", ours[1]).runs[0].name
    losses = values_of(workdir / "metrics.jsonl", "loss")
    assert len(losses) == 3 and losses[-1] < losses[0] and (workdir / "DONE").exists()

    capsys.readouterr()
    assert sample.main(["--workdir", str(workdir), "--prompt", "def ", "--max_tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("def ")

    # Branches end in gains of sqrt(1 / (L 2L)), ScaleInit's: two blocks add 1 / L to the stream.
    predicted = predict(read_config(workdir).model, tokens=4)
    assert predicted.stream_variance[-1] - predicted.entry_variance < 1 / 2
    assert predicted.stream_variance[-1] > predicted.entry_variance and all(map(math.isfinite, predicted.skip_path))

    assert sweep.main(["ours", "report", *ours]) == 0
    assert "mine" in capsys.readouterr().out
    [page] = (folder / "runs").rglob("*.html")
    assert "mine" in page.read_text(encoding="utf-8")
