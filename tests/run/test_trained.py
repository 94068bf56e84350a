"""The way to a trained model: its parameters alone, onto any mesh, whatever newer checkpoints have become."""

import chex
import jax
import numpy as np
import pytest

from spannorm_jax.config import CheckpointConfig, Config, MeshConfig, replace, to_dict
from spannorm_jax.durable import write_json
from spannorm_jax.errors import UserError
from spannorm_jax.model.definition import define
from spannorm_jax.parallel.mesh import make_mesh
from spannorm_jax.resolution import fill_sizes
from spannorm_jax.run.checkpoint import Checkpoints
from spannorm_jax.run.folder import CHECKPOINTS, DIVERGED
from spannorm_jax.run.folder import CONFIG as CONFIG_FILE
from spannorm_jax.run.state import TrainState
from spannorm_jax.run.trained import open_trained

CONFIG = fill_sizes(
    replace(Config(), model__depth=2, model__width=16, model__num_heads=2, model__vocab_size=32, model__dtype="float32")
)
MODEL = define(CONFIG.model)


@pytest.fixture
def workdir(tmp_path):
    """A run's folder with checkpoints of steps 1 and 2, whose optimiser is none that this code knows."""
    write_json(tmp_path / CONFIG_FILE, to_dict(CONFIG))
    saving = Checkpoints(tmp_path / CHECKPOINTS, CheckpointConfig())
    for step in (1, 2):
        params = jax.jit(MODEL.init)(jax.random.key(step))
        saving.save(step, TrainState(np.int32(step), params, {"unknown": np.zeros(3)}, {}), {"step": step})
    saving.close()
    return tmp_path


def test_the_newest_is_restored_onto_the_mesh_that_is_here(workdir, capsys):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with open_trained(workdir, None, "reading") as restore:
        trained = restore(CONFIG, MODEL, mesh)
    assert (trained.step, trained.mesh, capsys.readouterr()) == (2, mesh, ("", ""))
    drawn = jax.jit(trained.model.init)(jax.random.key(2))
    chex.assert_trees_all_equal(trained.params, drawn)
    assert {x.sharding.mesh for x in jax.tree.leaves(trained.params)} == {mesh}
    assert not trained.params["blocks"]["ffn"]["out"].is_fully_replicated


def test_a_damaged_one_is_passed_over_aloud_and_refused_by_name(workdir, capsys):
    file = next(path for path in sorted((workdir / CHECKPOINTS / "2" / "params").rglob("d/*")) if path.is_file())
    file.write_bytes(b"changed")
    with open_trained(workdir, None, "reading") as restore:
        assert restore(CONFIG, MODEL, make_mesh(MeshConfig())).step == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("passed over a checkpoint: ") and err.endswith("; reading step 1\n")
    with pytest.raises(UserError, match="there: 1"), open_trained(workdir, 2, "reading"):
        pass


@pytest.mark.parametrize(("good", "takes"), [(1, 1), (2, 2), (None, None)])
def test_of_a_run_that_diverged_the_last_good_one_is_taken_aloud(workdir, capsys, good, takes):
    write_json(workdir / DIVERGED, {"step": 3, "where": "the loss", "loss": "nan", "last_good_checkpoint": good})
    mesh = make_mesh(MeshConfig())
    if takes is None:
        with pytest.raises(UserError, match="diverged at step 3, before it had a good checkpoint; --step N"):
            open_trained(workdir, None, "reading").__enter__()
    else:
        with open_trained(workdir, None, "reading") as restore:
            assert restore(CONFIG, MODEL, mesh).step == takes
        assert capsys.readouterr().err == f"{workdir} diverged: reading step {takes}, its last good checkpoint\n"
    with open_trained(workdir, 2, "reading") as restore:  # the one that is asked for
        assert restore(CONFIG, MODEL, mesh).step == 2
    assert capsys.readouterr() == ("", "")


def test_it_is_held_until_the_end(workdir):
    """A trainer that keeps one checkpoint, at work beside a reader of an older one."""
    state = TrainState(np.int32(3), {"w": np.zeros(3)}, {"mu": np.zeros(3)}, {})
    with open_trained(workdir, 1, "reading"):
        saving = Checkpoints(workdir / CHECKPOINTS, CheckpointConfig(keep_last=1))
        saving.save(3, state, {})
        saving.finish(3)
        assert saving.steps() == [1, 3]
        saving.close()
