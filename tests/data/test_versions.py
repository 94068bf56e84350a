"""A run stays with its own data, whatever was prepared since; held-out splits that are short, or overlap."""

import dataclasses
import json
import shutil

import pytest
import tensorflow_datasets as tfds
from tiny import prepare

from spannorm_jax import evaluate, train
from spannorm_jax.config import Config, DataConfig, replace, to_dict
from spannorm_jax.data import python_files
from spannorm_jax.data.open import shared_examples
from spannorm_jax.data.tokens import open_store
from spannorm_jax.errors import UserError
from spannorm_jax.report.differing import differing_keys
from spannorm_jax.report.folders import read_run
from spannorm_jax.report.page import read_study
from spannorm_jax.resolution import changed_keys

CONFIG = "configs/dense.py:depth=2,width=32,placement=span,init=scale"
NUM = 40  # examples of each split


def documents(version="1.0.0"):
    return [f"document {i} " + "ü€x" * (i % 5) + f" in version {version}" for i in range(NUM)]


def prepare_nested(root, version="1.0.0", texts=None):
    texts = texts or documents(version)
    prepare(root / "tfds", "nested", {"train": texts, "validation": texts}, version=version, text="text")


def options(root, *more, dataset="nested"):
    return [
        *(f"--config.data.{key}={root / name}" for key, name in (("data_dir", "tfds"), ("cache_dir", "cache"))),
        *(f"--config.data.dataset={dataset}", "--config.data.seq_len=16", "--config.training.batch_size=8"),
        *("--config.training.steps=4", "--config.checkpoint.every_steps=2", "--config.metrics.tensorboard=false"),
        *("--config.eval.tokens=200", *more),
    ]


def argv(workdir, *options):
    return ["--config", CONFIG, "--workdir", str(workdir), *options]


def read(path):
    return json.loads(path.read_text())


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def back_to_step_2(workdir):
    (workdir / "DONE").unlink()
    shutil.rmtree(workdir / "checkpoints" / "4")


# ---- versions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "from before the option"])
def test_a_run_goes_on_with_its_version_and_a_new_one_takes_the_newest(recorded, tmp_path, capsys, refuse):
    prepare_nested(tmp_path)
    old, new = tmp_path / "old", tmp_path / "new"
    assert train.main(argv(old, *options(tmp_path))) == 0
    if not recorded:
        config = read(old / "config.json")
        del config["data"]["full_name"]
        (old / "config.json").write_text(json.dumps(config))
    prepare_nested(tmp_path, "2.0.0")
    before = losses(old)
    capsys.readouterr()
    assert evaluate.main(["--workdir", str(old), "--json"]) == 0
    first = json.loads(capsys.readouterr().out)

    for dataset in ("nested", "nested:1.0.0", "nested"):  # the name may be spelt otherwise, and back
        back_to_step_2(old)
        assert train.main(argv(old, *options(tmp_path, dataset=dataset))) == 0
        said = capsys.readouterr().out
        assert "continuing after step 2" in said and "data nested/1.0.0" in said
        assert losses(old) == before
    assert evaluate.main(["--workdir", str(old), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == first
    assert read(old / "config.json")["data"]["full_name"] == "nested/1.0.0"

    assert train.main(argv(new, *options(tmp_path))) == 0
    assert read(new / "config.json")["data"]["full_name"] == "nested/2.0.0"
    assert losses(new) != before
    capsys.readouterr()
    config = (old / "config.json").read_bytes()
    line = refuse(train, *argv(old, *options(tmp_path, dataset="nested:2.0.0")))
    assert "holds a run with data.dataset='nested'" in line and (old / "config.json").read_bytes() == config


def test_a_run_outlives_an_upgrade_of_python(source_data, tmp_path, monkeypatch):
    where = [f"--config.data.{key}={getattr(source_data, key)}" for key in ("data_dir", "cache_dir")]
    arguments = argv(tmp_path / "run", *options(tmp_path, *where, dataset="python_source"))
    assert train.main(arguments) == 0
    before, made = losses(tmp_path / "run"), open_store(source_data, "validation")

    monkeypatch.setattr(python_files, "here", lambda kind: ([], f"{kind}_0badc0de"))
    back_to_step_2(tmp_path / "run")
    assert train.main(arguments) == 0
    assert losses(tmp_path / "run") == before
    assert evaluate.main(["--workdir", str(tmp_path / "run")]) == 0
    for changes in ({"full_name": made.dataset}, {"dataset": made.dataset}):
        data = dataclasses.replace(source_data, **changes)
        assert open_store(data, "validation").path == made.path
        nowhere = dataclasses.replace(data, data_dir=str(tmp_path / "tfds"), cache_dir=str(tmp_path / "cache"))
        with pytest.raises(UserError, match=rf"{made.dataset}.*stdlib_0badc0de.*data\.data_dir"):
            open_store(nowhere, "validation")
    assert not (tmp_path / "tfds").exists()


def test_names_of_the_same_data_make_no_difference_to_a_start_or_a_report(tmp_path):
    old = replace(Config(), data__dataset="a", data__full_name="a/1.0.0", data__fingerprint="f00d")
    new = replace(old, data__dataset="a:1.0.0", data__full_name="b/c/1.0.0")
    assert changed_keys(old, new) == []
    unknown = [replace(config, data__fingerprint="") for config in (old, new)]
    assert [key for key, _, _ in changed_keys(*unknown)] == ["data.dataset", "data.full_name"]
    assert "data.fingerprint" in [key for key, _, _ in changed_keys(old, replace(new, data__fingerprint="beef"))]
    for i, config in enumerate((old, new)):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "config.json").write_text(json.dumps(to_dict(config)))
    assert differing_keys([read_run(tmp_path / str(i)) for i in range(2)]) == {}


# ---- splits that are short -----------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 5, 1000])
def test_a_held_out_split_shorter_than_a_window_is_evaluated_whole(tmp_path, capsys, tokens):
    prepare_nested(tmp_path)
    short = ["--config.data.eval_split=validation[:1]", "--config.data.seq_len=100", f"--config.eval.tokens={tokens}"]
    assert train.main(argv(tmp_path / "run", *options(tmp_path, *short))) == 0
    capsys.readouterr()
    assert evaluate.main(["--workdir", str(tmp_path / "run"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    length = read(tmp_path / "run" / "starts.jsonl")["data"]["eval_tokens"]
    assert length <= 100 and result["tokens"] == length - 1


@pytest.mark.parametrize(
    ("letters", "changes", "says"),
    [
        ("x", ["eval_split=train[{i}:{j}]"], ["nothing to predict", "'train[{i}:{j}]'"]),
        ("", ["eval_split=train[{i}:{j}]"], ["holds no text", "'train[{i}:{j}]'"]),
        ("x", ["train_split=train[{i}:{j}]", "seq_len=100"], ["data.seq_len=100 is too long for split 'train[{i}:"]),
    ],
)
def test_a_split_without_a_prediction_is_refused_before_training(tmp_path, refuse, letters, changes, says):
    prepare_nested(tmp_path, texts=["a long enough document " * 9, letters])
    examples = tfds.builder("nested", data_dir=tmp_path / "tfds").as_data_source("train")
    i = [example["text"] for example in examples].index(letters.encode())
    changes, says = ([text.format(i=i, j=i + 1) for text in texts] for texts in (changes, says))
    line = refuse(train, *argv(tmp_path / "run", *options(tmp_path, *(f"--config.data.{c}" for c in changes))))
    assert all(part in line for part in says), line
    assert not (tmp_path / "run").exists()


def test_an_evaluation_of_nothing_but_ends_is_one_line(tmp_path, refuse, capsys):
    """Before training, which would end with it; and of a run that is to be evaluated on less than it was."""
    prepare_nested(tmp_path, texts=["x"] * NUM)
    arguments = argv(tmp_path / "run", *options(tmp_path, "--config.data.seq_len=1"))
    line = refuse(train, *arguments, "--config.eval.tokens=1")
    assert "eval.tokens=1" in line and "only ends of documents" in line and not (tmp_path / "run").exists()
    assert train.main(arguments) == 0
    capsys.readouterr()
    line = refuse(evaluate, "--workdir", tmp_path / "run", "--config.eval.tokens=1")
    assert "eval.tokens=1" in line and "only ends of documents" in line


# ---- held-out splits that overlap the training split ---------------------------------------------


def test_shared_examples_are_counted(tmp_path):
    prepare_nested(tmp_path)
    data = DataConfig(dataset="nested", data_dir=str(tmp_path / "tfds"))
    for train_split, eval_split, shared in (
        ("train", "validation", 0),
        ("train[:80%]", "train[80%:]", 0),
        ("train[:10]+train[20:30]", "train[10:20]+train[30:]", 0),
        ("train", "train", NUM),
        ("train[:90%]", "train[80%:]+validation", 4),
        ("train + validation[:5]", "validation[3:]", 2),
        ("all", "validation", NUM),
        ("train[5:6]+train[5:7]", "train[:6]+train[:6]", 1),
    ):
        found = shared_examples(dataclasses.replace(data, train_split=train_split, eval_split=eval_split))
        assert found == shared, (train_split, eval_split)


@pytest.mark.parametrize(("eval_split", "shared"), [("train[80%:]", 8), ("validation", 0)])
def test_an_overlap_is_legal_said_recorded_and_reported(tmp_path, capsys, eval_split, shared):
    prepare_nested(tmp_path)
    workdir = tmp_path / "run"
    said = f"data.eval_split={eval_split!r} shares {shared} examples with data.train_split='train'"
    assert train.main(argv(workdir, *options(tmp_path, f"--config.data.eval_split={eval_split}"))) == 0
    assert (said in capsys.readouterr().err) == bool(shared)
    assert read(workdir / "starts.jsonl")["data"]["eval_overlap"] == shared
    assert evaluate.main(["--workdir", str(workdir), "--json"]) == 0
    printed = capsys.readouterr()
    assert (said in printed.err) == bool(shared)
    recorded = read(workdir / "eval.jsonl")
    assert recorded == json.loads(printed.out) and recorded.get("eval_overlap", 0) == shared
    warned = [text for kind, text in read_study([workdir])[1] if kind == "warning"]
    assert len(warned) == bool(shared) and all("shares 8 examples" in text for text in warned)
