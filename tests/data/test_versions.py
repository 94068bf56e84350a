"""Two versions of a dataset side by side: a run stays with its own, whatever was prepared since."""

import dataclasses
import json
import shutil
import sys

import pytest
import tensorflow_datasets as tfds
from nested import prepare_nested, texts

from spannorm_jax import evaluate, train
from spannorm_jax.command import run_command
from spannorm_jax.config import Config, DataConfig, changed_keys, replace
from spannorm_jax.data import names, stdlib_files
from spannorm_jax.data.tokens import open_store
from spannorm_jax.errors import UserError
from spannorm_jax.report.folders import read_run
from spannorm_jax.report.rows import differing_keys

CONFIG = "configs/dense.py:depth=2,width=32,placement=span,init=scale"


def prepare(root, version, **changes):
    documents = tuple(f"{text} in version {version}" for text in texts(100))
    version = tfds.core.Version(version)
    prepare_nested(root / "tfds", beside=(), VERSION=version, documents=documents, **changes)


def options(root, dataset="nested"):
    return [
        *(f"--config.data.{key}={root / name}" for key, name in (("data_dir", "tfds"), ("cache_dir", "cache"))),
        *(f"--config.data.dataset={dataset}", "--config.data.seq_len=16", "--config.training.batch_size=8"),
        *("--config.training.steps=4", "--config.checkpoint.every_steps=2", "--config.metrics.tensorboard=false"),
        "--config.eval.tokens=200",
    ]


def start(workdir, *options):
    return train.main(["--config", CONFIG, "--workdir", str(workdir), *options])


def read(path):
    return json.loads(path.read_text())


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def back_to_step_2(workdir):
    (workdir / "DONE").unlink()
    shutil.rmtree(workdir / "checkpoints" / "4")


@pytest.fixture(params=["recorded", "from before the option"])
def old_run(request, tmp_path):
    """A run on the only version there was, and another version that has come since."""
    prepare(tmp_path, "1.0.0")
    workdir = tmp_path / "old"
    assert start(workdir, *options(tmp_path)) == 0
    if request.param != "recorded":
        config = read(workdir / "config.json")
        del config["data"]["full_name"]
        (workdir / "config.json").write_text(json.dumps(config))
    prepare(tmp_path, "2.0.0")
    return workdir


def test_an_old_run_is_evaluated_and_continued_and_a_new_one_takes_the_newest(old_run, tmp_path, capsys):
    capsys.readouterr()
    assert evaluate.main(["--workdir", str(old_run), "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    before = losses(old_run)

    back_to_step_2(old_run)
    assert start(old_run, *options(tmp_path)) == 0
    said = capsys.readouterr().out
    assert "continuing after step 2" in said and "data nested/1.0.0" in said
    assert losses(old_run) == before
    assert evaluate.main(["--workdir", str(old_run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == first
    assert read(old_run / "config.json")["data"]["full_name"] == "nested/1.0.0"

    new = tmp_path / "new"
    assert start(new, *options(tmp_path)) == 0
    assert read(new / "config.json")["data"]["full_name"] == "nested/2.0.0"
    assert losses(new) != before


@pytest.mark.parametrize("spelling", ["nested:1.0.0", "nested/1.0.0"])
def test_the_name_may_be_spelt_otherwise_and_back(old_run, tmp_path, spelling):
    before = losses(old_run)
    for dataset in (spelling, "nested"):
        back_to_step_2(old_run)
        assert start(old_run, *options(tmp_path, dataset)) == 0
        assert losses(old_run) == before


def test_another_version_is_another_run(old_run, tmp_path, monkeypatch, capsys):
    config = (old_run / "config.json").read_bytes()
    monkeypatch.setattr(sys, "argv", ["train", "--config", CONFIG, "--workdir", str(old_run)])
    sys.argv += options(tmp_path, "nested:2.0.0")
    with pytest.raises(SystemExit) as exit_:
        run_command(train.main)
    assert exit_.value.code == 2 and "holds a run with data.dataset='nested'" in capsys.readouterr().err
    assert (old_run / "config.json").read_bytes() == config


@pytest.fixture
def versions(tmp_path):
    for version in ("1.0.0", "2.0.0", "11.0.0"):
        prepare(tmp_path, version)
    return DataConfig(dataset="nested", data_dir=str(tmp_path / "tfds"), cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("version", ["1.0.0", "2.0.0", "11.0.0"])
def test_a_version_is_opened_by_each_of_its_spellings(versions, version):
    spellings = [{"dataset": f"nested:{version}"}, {"dataset": f"nested/{version}"}]
    spellings += [{"full_name": f"nested/{version}"}, {"full_name": f"nested:{version}"}]
    stores = [open_store(dataclasses.replace(versions, **changes), "train") for changes in spellings]
    assert {store.dataset for store in stores} == {f"nested/{version}"}
    assert len({store.path for store in stores}) == 1
    assert f"in version {version}".encode() in stores[0].tokens.tobytes()


def test_no_version_is_the_newest(versions):
    assert open_store(versions, "train").dataset == "nested/11.0.0"


@pytest.mark.parametrize("asked", ["nested:1.0.1", "nested/0.0.0", "nested/1.1.0"])
@pytest.mark.parametrize("key", ["dataset", "full_name"])
def test_a_version_that_is_not_there_is_one_line_that_lists_those(versions, asked, key):
    with pytest.raises(UserError) as error:
        open_store(dataclasses.replace(versions, **{key: asked}), "train")
    line = str(error.value)
    assert "\n" not in line and repr(asked) in line
    assert all(f"nested/{version}" in line for version in ("1.0.0", "2.0.0", "11.0.0"))


@pytest.mark.parametrize("version", ["1.0.0", "2.0.0"])
def test_configs_have_versions_too(tmp_path, version):
    for v in ("1.0.0", "2.0.0"):
        for config in ("en", "en.big", "de"):
            prepare(tmp_path / config, v, BUILDER_CONFIGS=[tfds.core.BuilderConfig(name=config)])
            shutil.copytree(tmp_path / config / "tfds", tmp_path / "tfds", dirs_exist_ok=True)
    data = DataConfig(data_dir=str(tmp_path / "tfds"), cache_dir=str(tmp_path / "cache"))
    for config in ("en", "en.big", "de"):
        for name in (f"nested/{config}:{version}", f"nested/{config}/{version}"):
            store = open_store(dataclasses.replace(data, dataset=name), "train")
            assert store.dataset == f"nested/{config}/{version}"
        assert open_store(dataclasses.replace(data, dataset=f"nested/{config}"), "train").dataset.endswith("/2.0.0")


@pytest.mark.parametrize(
    ("dataset", "full_name", "says"),
    [
        ("nested", "nested", "no version"),
        ("nested", "other/1.0.0", "names"),
        ("nested:1.0.0", "nested/2.0.0", "names"),
        ("nested/en", "nested/de/1.0.0", "names"),
        ("python_source", "python_source/sys_path_01234567/1.0.0", "names"),
        ("python_source/sys_path", "python_source/stdlib_01234567/1.0.0", "names"),
        ("nested", "../nested/1.0.0", "not a TFDS name"),
    ],
)
def test_names_that_contradict_one_another_are_one_line(versions, dataset, full_name, says):
    with pytest.raises(UserError, match=rf"data\.full_name='{full_name}'.*{says}"):
        open_store(dataclasses.replace(versions, dataset=dataset, full_name=full_name), "train")


@pytest.mark.parametrize("text", ["", "a/b/c", "a:1.0", "a:", "a/1.0.0/b", "a/../b", "a/..:1.0", "1a", "a/1.0.0\n"])
def test_what_is_no_name(text):
    with pytest.raises(UserError, match=r"data\.dataset=.*not a TFDS name"):
        names.parse(text, "data.dataset")


# ---- the library of this Python, after an upgrade ---------------------------------------------


@pytest.fixture
def upgraded(source_data, monkeypatch):
    """python_source as a run recorded it, and an interpreter with another library."""
    store = open_store(source_data, "validation")
    monkeypatch.setattr(stdlib_files, "content_hash", lambda root: "0badc0de")
    return store


def test_the_library_of_an_older_python_is_opened_by_its_full_name(source_data, upgraded, tmp_path):
    for changes in ({"full_name": upgraded.dataset}, {"dataset": upgraded.dataset}):
        data = dataclasses.replace(source_data, **changes)
        assert open_store(data, "validation").path == upgraded.path
        fresh = dataclasses.replace(data, cache_dir=str(tmp_path / "cache"))  # tokenised anew, from the dataset
        assert open_store(fresh, "validation").sha256 == upgraded.sha256


def test_a_library_that_is_neither_here_nor_there_is_one_line(source_data, upgraded, tmp_path):
    nowhere = dataclasses.replace(source_data, data_dir=str(tmp_path / "tfds"), cache_dir=str(tmp_path / "cache"))
    for changes in ({"full_name": upgraded.dataset}, {"dataset": upgraded.dataset}):
        with pytest.raises(UserError, match=rf"{upgraded.dataset}.*stdlib_0badc0de.*data\.data_dir") as error:
            open_store(dataclasses.replace(nowhere, **changes), "validation")
        assert "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())


def test_this_pythons_own_library_is_made_by_its_full_name(tmp_path):
    data = DataConfig(
        full_name=stdlib_files.full_name(), data_dir=str(tmp_path / "tfds"), cache_dir=str(tmp_path / "cache")
    )
    assert open_store(data, "validation").dataset == stdlib_files.full_name()


def test_a_run_outlives_an_upgrade_of_python(source_data, tmp_path, monkeypatch, capsys):
    where = [f"--config.data.{key}={getattr(source_data, key)}" for key in ("data_dir", "cache_dir")]
    argv = [*options(tmp_path, "python_source")[2:], *where]
    assert start(tmp_path / "run", *argv) == 0
    before = losses(tmp_path / "run")
    monkeypatch.setattr(stdlib_files, "content_hash", lambda root: "0badc0de")
    back_to_step_2(tmp_path / "run")
    assert start(tmp_path / "run", *argv) == 0
    assert losses(tmp_path / "run") == before
    assert evaluate.main(["--workdir", str(tmp_path / "run")]) == 0


# ---- what tells whether data are the same -----------------------------------------------------


def test_a_name_makes_no_difference_where_the_fingerprint_is_the_same(tmp_path):
    old = replace(Config(), data__dataset="a", data__full_name="a/1.0.0", data__fingerprint="f00d")
    new = replace(old, data__dataset="a:1.0.0", data__full_name="b/c/1.0.0")
    assert changed_keys(old, new) == []
    unknown = [replace(config, data__fingerprint="") for config in (old, new)]
    assert [key for key, _, _ in changed_keys(*unknown)] == ["data.dataset", "data.full_name"]
    other = replace(new, data__fingerprint="beef")
    assert "data.fingerprint" in [key for key, _, _ in changed_keys(old, other)]


def test_a_report_does_not_tell_runs_apart_by_the_name_of_the_same_data(tmp_path):
    prepare(tmp_path, "1.0.0")
    for name in ("nested", "nested/1.0.0"):
        start(tmp_path / name.replace("/", "_"), *options(tmp_path, name))
    runs = [read_run(tmp_path / name) for name in ("nested", "nested_1.0.0")]
    assert differing_keys(runs) == {}
