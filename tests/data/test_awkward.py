"""Splits that are short or overlap, and folders that are not where TFDS's datasets are."""

import dataclasses
import json
import shutil
import sys

import pytest
import tensorflow_datasets as tfds
from nested import prepare_nested, texts
from processes import LIMIT_S

from spannorm_jax import evaluate, train
from spannorm_jax.command import run_command
from spannorm_jax.config import DataConfig
from spannorm_jax.data.overlap import shared_examples
from spannorm_jax.data.tokens import open_store
from spannorm_jax.errors import UserError
from spannorm_jax.report.page import read_study

CONFIG = "configs/dense.py:depth=2,width=32,placement=span,init=scale"
NUM = 40  # examples of each split of the nested dataset


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    prepare_nested(root, beside=())
    return root


@pytest.fixture
def data(data_dir, tmp_path):
    return DataConfig(dataset="nested", data_dir=str(data_dir), cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def argv(data, tmp_path):
    def make(*more):
        return [
            *("--config", CONFIG, "--workdir", str(tmp_path / "run"), "--config.data.dataset=nested"),
            *(f"--config.data.{key}={getattr(data, key)}" for key in ("data_dir", "cache_dir")),
            *("--config.data.seq_len=16", "--config.training.steps=2", "--config.training.batch_size=8"),
            *("--config.metrics.tensorboard=false", "--config.eval.tokens=100"),
            *more,
        ]

    return make


@pytest.fixture
def refuse(monkeypatch, capsys):
    def run(command, argv):
        monkeypatch.setattr(sys, "argv", ["command", *argv])
        with pytest.raises(SystemExit) as exit_:
            run_command(command.main)
        line = capsys.readouterr().err
        assert exit_.value.code == 2 and line.count("\n") == 1, line
        return line

    return run


# ---- held-out splits that are short -----------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 5, 1000])
def test_a_held_out_split_shorter_than_a_window_is_evaluated_whole(argv, tmp_path, capsys, tokens):
    more = ["--config.data.eval_split=validation[:1]", "--config.data.seq_len=100", f"--config.eval.tokens={tokens}"]
    assert train.main(argv(*more)) == 0
    capsys.readouterr()
    assert evaluate.main(["--workdir", str(tmp_path / "run"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    length = json.loads((tmp_path / "run" / "starts.jsonl").read_text())["data"]["eval_tokens"]
    assert length <= 100 and result["tokens"] == length - 1


@pytest.mark.parametrize(("letters", "says"), [("x", "nothing to predict"), ("", "holds no text")])
def test_a_held_out_split_without_a_prediction_is_refused_before_training(argv, refuse, tmp_path, letters, says):
    prepare_nested(tmp_path / "tfds", beside=(), documents=("a long enough document " * 9, letters))
    rows = {text: i for i, text in enumerate(read(tmp_path / "tfds"))}
    i = rows[letters.encode()]
    line = refuse(
        train, argv(f"--config.data.data_dir={tmp_path / 'tfds'}", f"--config.data.eval_split=train[{i}:{i + 1}]")
    )
    assert says in line and f"'train[{i}:{i + 1}]'" in line
    assert not (tmp_path / "run").exists()


def read(data_dir):
    return [example["text"] for example in tfds.builder("nested", data_dir=data_dir).as_data_source("train")]


def test_an_evaluation_of_nothing_but_ends_is_one_line(argv, refuse, tmp_path, capsys):
    """Before training, which would end with it; and of a run that is to be evaluated on less than it was."""
    prepare_nested(tmp_path / "tfds", beside=(), documents=("x",) * 40)
    more = [f"--config.data.data_dir={tmp_path / 'tfds'}", "--config.data.seq_len=1"]
    line = refuse(train, argv(*more, "--config.eval.tokens=1"))
    assert "eval.tokens=1" in line and "only ends of documents" in line and not (tmp_path / "run").exists()
    assert train.main(argv(*more)) == 0
    capsys.readouterr()
    line = refuse(evaluate, ["--workdir", str(tmp_path / "run"), "--config.eval.tokens=1"])
    assert "eval.tokens=1" in line and "only ends of documents" in line


def test_a_training_split_shorter_than_a_window_stays_refused(argv, refuse, tmp_path):
    line = refuse(train, argv("--config.data.train_split=train[:1]", "--config.data.seq_len=100"))
    assert "data.seq_len=100 is too long for split 'train[:1]'" in line
    assert not (tmp_path / "run").exists()


# ---- held-out splits that overlap the training split ------------------------------------------


@pytest.mark.parametrize(
    ("train_split", "eval_split", "shared"),
    [
        ("train", "validation", 0),
        ("train[:90%]", "validation[:10%]", 0),
        ("train[:80%]", "train[80%:]", 0),
        ("train[:10]+train[20:30]", "train[10:20]+train[30:]", 0),
        ("train", "train", NUM),
        ("train", "train[80%:]", 8),
        ("train[:90%]", "train[80%:]", 4),
        ("train[:90%]", "train[80%:]+validation", 4),
        ("train+validation", "validation", NUM),
        ("train + validation[:5]", "validation[3:]", 2),
        ("all", "validation", NUM),
        ("train[5:6]+train[5:7]", "train[:6]+train[:6]", 1),
    ],
)
def test_shared_examples_are_counted(data, train_split, eval_split, shared):
    assert shared_examples(dataclasses.replace(data, train_split=train_split, eval_split=eval_split)) == shared


def test_plain_names_do_not_open_tfds(data, start_python):
    code = """
import sys
from spannorm_jax.config import DataConfig
from spannorm_jax.data.overlap import shared_examples
print(shared_examples(DataConfig()), shared_examples(DataConfig(train_split='train[:9%]', eval_split='test[:9%]+val')))
print('tensorflow_datasets' in sys.modules)
"""
    assert start_python(code).communicate(timeout=LIMIT_S) == ("0 0\nFalse\n", "")


@pytest.mark.parametrize(("eval_split", "shared"), [("train[80%:]", 8), ("validation", 0)])
def test_an_overlap_is_legal_said_recorded_and_reported(argv, tmp_path, capsys, eval_split, shared):
    workdir = tmp_path / "run"
    said = f"data.eval_split={eval_split!r} shares {shared} examples with data.train_split='train'"
    assert train.main(argv(f"--config.data.eval_split={eval_split}")) == 0
    assert (said in capsys.readouterr().err) == bool(shared)
    assert json.loads((workdir / "starts.jsonl").read_text())["data"]["eval_overlap"] == shared
    assert evaluate.main(["--workdir", str(workdir), "--json"]) == 0
    printed = capsys.readouterr()
    assert (said in printed.err) == bool(shared)
    recorded = json.loads((workdir / "eval.jsonl").read_text())
    assert recorded == json.loads(printed.out) and recorded.get("eval_overlap", 0) == shared
    assert ("eval_overlap" in recorded) == bool(shared)
    warned = [text for kind, text in read_study([workdir])[1] if kind == "warning"]
    assert len(warned) == bool(shared) and all("shares 8 examples" in text for text in warned)


# ---- folders that are not where datasets are --------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """/x/nested/1.0.0 and /x/many/en/1.0.0, both with files and without code."""
    prepare_nested(tmp_path / "x", beside=())
    prepare_nested(tmp_path / "y", beside=(), BUILDER_CONFIGS=[tfds.core.BuilderConfig(name="en")])
    shutil.copytree(tmp_path / "y" / "nested" / "en", tmp_path / "x" / "many" / "en")
    for file in (tmp_path / "x" / "many" / "en" / "1.0.0").iterdir():
        if file.name == "dataset_info.json":
            file.write_text(file.read_text().replace('"nested"', '"many"'))
        file.rename(file.with_name(file.name.replace("nested", "many")))
    return tmp_path / "x"


@pytest.mark.parametrize("inner", ["nested", "nested/1.0.0", "many", "many/en", "many/en/1.0.0"])
@pytest.mark.parametrize("dataset", ["nested", "many/en", "many/en:1.0.0", "lm1b", "python_source"])
def test_a_datasets_own_folder_is_told_as_such(folders, tmp_path, inner, dataset):
    before = sorted(folders.rglob("*"))
    asked = DataConfig(dataset=dataset, data_dir=str(folders / inner), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError) as error:
        open_store(asked, "train")
    line = str(error.value)
    assert f"folder of dataset {inner.split('/')[0]!r} itself; set config key data.data_dir={folders}" in line
    assert "\n" not in line and len(line) < 500
    assert sorted(folders.rglob("*")) == before and not (tmp_path / "cache").exists()


def test_a_folder_that_holds_datasets_is_none_of_them(folders, tmp_path):
    inside = tmp_path / "nested" / "tfds"  # below a folder of a dataset's name
    shutil.copytree(folders, inside)
    for root in (folders, inside):
        data = DataConfig(data_dir=str(root), cache_dir=str(tmp_path / "cache"))
        for dataset in ("nested", "many/en"):
            assert open_store(dataclasses.replace(data, dataset=dataset), "train").num_docs == len(texts())
        with pytest.raises(UserError, match="did you mean 'nested'"):
            open_store(dataclasses.replace(data, dataset="nestd"), "train")


@pytest.mark.parametrize(
    ("dataset", "says"), [("nested", ""), ("lm1b", "tfds.builder('lm1b'"), ("lm1", "did you mean 'lm1b'")]
)
def test_a_folder_that_is_not_there_is_told_as_such(tmp_path, dataset, says):
    asked = DataConfig(dataset=dataset, data_dir=str(tmp_path / "tfds"), cache_dir=str(tmp_path / "cache"))
    for there in ("does not exist", "is no folder"):
        with pytest.raises(UserError) as error:
            open_store(asked, "train")
        line = str(error.value)
        assert f"{tmp_path / 'tfds'}, which {there}" in line and "data.data_dir" in line
        assert (says in line or there == "is no folder") and "valid ones are" not in line and "\n" not in line
        (tmp_path / "tfds").write_text("")
