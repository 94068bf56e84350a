"""Checkpoints on disk: whole whatever their folder is called, and safe from a trainer while they are read."""

import contextlib
import fcntl
import json
from types import SimpleNamespace

import chex
import jax
import numpy as np
import pytest
import tensorstore as ts

from spannorm_jax.config import CheckpointConfig, Config, replace, to_dict
from spannorm_jax.errors import UserError
from spannorm_jax.resolution import fill_sizes
from spannorm_jax.run import array_store, checkpoint
from spannorm_jax.run.checkpoint import Checkpoints
from spannorm_jax.run.state import TrainState

SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def state(step):
    """A state whose every number tells the step and its place; one array is all zeros, as a bias is at first."""
    params = {"blocks": {"w": np.arange(12.0, dtype=np.float32).reshape(3, 4) + step}, "bias": np.zeros(5, np.float32)}
    moments = ({"mu": jax.tree.map(lambda x: x * 2, params)}, {"count": np.int32(step)})
    return jax.device_put(TrainState(np.int32(step), params, moments, {}), SHARDING)


ABSTRACT = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SHARDING), state(0))


def opened(folder, run=None, **options):
    """Checkpoints as a reader opens them, or with options as a trainer does, until the end of a block."""
    return contextlib.closing(Checkpoints(folder, CheckpointConfig(**options) if options else None, run))


def save(folder, *steps):
    with opened(folder, keep_last=5) as saving:
        for step in steps:
            saving.save(step, state(step), {"step": step})
        saving.wait()


@pytest.mark.parametrize("name", ["seed[0]", "team [ml]/run", "a*b?", "[!x]", "a b", "a%20b#c", "a:b", "{x}", "é\nend"])
def test_what_is_saved_is_read_whatever_the_folder_is_called(tmp_path, name):
    folder = tmp_path / name / "checkpoints"
    folder.mkdir(parents=True)
    save(folder, 3)
    with opened(folder) as reading:
        assert reading.find(None) == (3, [])
        chex.assert_trees_all_equal(reading.restore(3, ABSTRACT), state(3))
        chex.assert_trees_all_equal(reading.restore_model(3, ABSTRACT.params, {})[0], state(3).params)


def test_a_folder_by_way_of_its_parent(tmp_path):
    (tmp_path / "a").mkdir()
    save(tmp_path / "a" / ".." / "checkpoints", 1)
    assert array_store.incomplete(tmp_path / "checkpoints" / "1") is None


def test_a_save_that_is_not_whole_is_never_sealed(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "join_parts", lambda folder: None)
    with pytest.raises(RuntimeError, match=r"save of step 2 failed.*never joined"):
        save(tmp_path / "[x]", 2)
    with opened(tmp_path / "[x]") as reading:
        assert reading.steps() == []


def test_what_was_sealed_without_its_arrays_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "[x]"
    with monkeypatch.context() as before:
        before.setattr(checkpoint, "join_parts", lambda folder: None)
        before.setattr(checkpoint, "incomplete", lambda folder: None)
        save(folder, 2)
    with (
        opened(folder) as reading,
        pytest.raises(UserError, match="opt_state is not whole: its parts were never joined"),
    ):
        reading.find(None)


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("blocks.w/.zarray", "array blocks.w is missing"),
        ("blocks.w/0.0", "array blocks.w has 0 of 1 chunks"),
        ("bias/0", "array bias has 0 of 1 chunks"),
    ],
)
def test_an_array_that_is_not_there_is_named(tmp_path, key, says):
    save(tmp_path / "c", 1)
    path = tmp_path / "c" / "1" / "params"
    store = ts.KvStore.open({"driver": "ocdbt", "base": {"driver": "file", "path": f"{path}/"}}).result()
    store.write(key, None).result()
    assert array_store.incomplete(tmp_path / "c" / "1") == f"{path} is not whole: {says}"


def test_a_reader_keeps_its_checkpoint_from_a_trainer(tmp_path):
    save(tmp_path, 1)
    with opened(tmp_path, keep_last=1) as saving:
        with opened(tmp_path) as reading:
            assert reading.find(None) == (1, [])
            for step in (2, 3):
                saving.save(step, state(step), {"step": step})
                saving.wait()
            assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "3"]  # 3 may be bad, and 2 is good
            chex.assert_trees_all_equal(reading.restore_model(1, ABSTRACT.params, {})[0], state(1).params)
        saving.save(4, state(4), {"step": 4})
        saving.finish(4)
    assert [p.name for p in tmp_path.iterdir()] == ["4"]


def test_what_the_newest_has_not_proved_is_kept_with_keep_last_1_and_no_more(tmp_path):
    """The weights of the newest may be bad, as only the step after it tells."""
    with opened(tmp_path, keep_last=1) as saving:
        for step in (1, 2, 3, 4):
            saving.save(step, state(step), {"step": step})
            assert len([p for p in tmp_path.iterdir() if (p / "manifest.json").exists()]) <= 2
            saving.wait()
            assert saving.steps() == list(range(max(1, step - 1), step + 1))
            assert saving.newest_sound(before=step) == (step - 1 or None, [])
        saving.finish(4)
    assert [p.name for p in tmp_path.iterdir()] == ["4"]


@contextlib.contextmanager
def being_removed(checkpoint):
    """As a trainer holds it."""
    with open(checkpoint / "manifest.json", "r+b") as trainer:
        fcntl.flock(trainer, fcntl.LOCK_EX)
        yield


def test_a_reader_passes_over_what_a_trainer_is_removing(tmp_path):
    save(tmp_path, 1, 2)
    with opened(tmp_path) as reading, being_removed(tmp_path / "2"):
        assert reading.find(None) == (1, [])
        with pytest.raises(UserError, match="2 is being removed by a trainer; choose another --step"):
            reading.find(2)


def test_a_reader_takes_the_newest_again_where_a_trainer_is_removing_all_that_it_found(tmp_path, monkeypatch):
    save(tmp_path, 1)
    waits = []

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == 2:
            save(tmp_path, 2)

    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(sleep=wait))
    with being_removed(tmp_path / "1"):
        with opened(tmp_path) as reading:
            assert reading.find(None) == (2, []) and len(waits) == 2
        refusal = pytest.raises(UserError, match="being removed by a trainer; repeat the command")
        with opened(tmp_path) as reading, being_removed(tmp_path / "2"), refusal:
            reading.find(None)


# ---- what a folder's name says, and what its meta does ---------------------------------------------------

RUN = fill_sizes(replace(Config(), model__vocab_size=256, data__fingerprint="f00d"))
NOT_ITS_OWN = {
    "another seed": ({"seed": 1}, "is of another run: it was saved with seed=1, and this run has 0"),
    "other data": ({"data__fingerprint": "beef"}, "data.fingerprint='beef', and this run has 'f00d'"),
    "another rate": ({"optim__lr": 0.5}, "optim.lr=0.5"),
    "another name": ({}, "is the checkpoint of step 2 under another name"),
    "a newer version": ({"model__norm": "novel"}, "that this version does not know"),
}


def with_meta(folder, name, changes, step=2):
    """A sound checkpoint of step 1, and one of `step` as step `name` whose config has changes."""
    folder.mkdir()
    with opened(folder, keep_last=5) as saving:
        saving.save(1, state(1), {"step": 1, "config": to_dict(RUN)})
        saving.save(step, state(step), {"step": step, "config": to_dict(replace(RUN, **changes))})
    (folder / str(step)).rename(folder / str(name))


@pytest.mark.parametrize("what", list(NOT_ITS_OWN))
def test_a_checkpoint_that_does_not_belong_is_passed_over_refused_by_name_and_moved_by_the_trainer(tmp_path, what):
    changes, says = NOT_ITS_OWN[what]
    name, folder = 3 if what == "another name" else 2, tmp_path / "checkpoints"
    with_meta(folder, name, changes)
    with opened(folder, run=RUN) as reading:
        found, [fault] = reading.find(None)
        assert found == 1 and says in fault and str(folder / str(name)) in fault
        with pytest.raises(UserError, match=r"choose another --step \(there: 1") as refused:
            reading.find(name)
        assert says in str(refused.value)
    with opened(folder, run=RUN, keep_last=3) as training:
        assert training.resume(tmp_path / "damaged") == (1, [fault])
    assert [p.name for p in folder.iterdir()] == ["1"] and (tmp_path / "damaged" / str(name) / "manifest.json").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"model__dtype": "bfloat16"},
        {"eval__tokens": 7, "mesh__tensor": 2, "checkpoint__every_steps": 3, "data__cache_dir": "/elsewhere"},
        {"data__full_name": "python_source/stdlib_00000000/1.0.0"},  # of the same tokens
    ],
)
def test_what_may_change_when_a_run_goes_on_makes_no_other_run(tmp_path, changes):
    with_meta(tmp_path / "checkpoints", 2, changes)
    with opened(tmp_path / "checkpoints", run=RUN) as reading:
        assert reading.find(None) == (2, [])


def test_options_that_are_younger_than_a_checkpoint_make_it_no_other_run(tmp_path):
    saved = to_dict(RUN)
    del saved["model"]["variance_exponent"], saved["optim"]["name"]
    with opened(tmp_path, keep_last=3) as saving:
        saving.save(1, state(1), {"step": 1, "config": saved})
    with opened(tmp_path, run=replace(RUN, model__variance_exponent=0.0)) as reading:  # what was done before it came
        assert reading.find(None) == (1, [])


def test_a_checkpoint_that_goes_while_it_is_read_is_one_line(tmp_path):
    """Where no lock holds it, as on a file system without them."""
    save(tmp_path, 1)
    with opened(tmp_path) as reading:
        (tmp_path / "1").rename(tmp_path / "gone")
        with pytest.raises(UserError, match="was removed while it was read"):
            reading.restore_model(1, ABSTRACT.params, {})


def test_weights_that_an_older_version_laid_out_otherwise_are_one_line(tmp_path):
    save(tmp_path, 1)
    with opened(tmp_path) as reading:
        turned = {"blocks": {"w": jax.ShapeDtypeStruct((4, 3), np.float32, sharding=SHARDING)}}
        with pytest.raises(UserError, match=r"older version.*\(3, 4\), now \(4, 3\)"):
            reading.restore_model(1, ABSTRACT.params | turned, {})


def test_multiples_of_keep_every_stay(tmp_path):
    with opened(tmp_path, keep_last=2, keep_every=4) as saving:
        for step in range(1, 10):
            saving.save(step, state(step), {"step": step})
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [4, 8, 9]


def test_what_orbax_adds_to_its_own_file_after_the_seal_is_no_damage_and_half_of_the_file_is(tmp_path):
    """It is written by a thread of Orbax's, which may be behind."""
    save(tmp_path, 1)
    about = tmp_path / "1" / "_CHECKPOINT_METADATA"
    facts = json.loads(about.read_text())
    about.write_text(json.dumps(facts | {"item_handlers": None, "commit_timestamp_nsecs": 0}))
    with opened(tmp_path) as reading:
        assert reading.find(None) == (1, [])
        chex.assert_trees_all_equal(reading.restore(1, ABSTRACT), state(1))
        about.write_text(about.read_text()[:20])
        with pytest.raises(UserError, match="_CHECKPOINT_METADATA is damaged"):
            reading.find(None)
