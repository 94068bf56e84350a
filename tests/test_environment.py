"""What surrounds a command: who reads its output, which folders, home, locale and switches it finds."""

import json
import os
import shutil
import signal
import sys

import pytest
from processes import LIMIT_S, finish, launch, lines_of, metrics, paused

from spannorm_jax import evaluate, sample
from spannorm_jax.errors import UserError

pytestmark = pytest.mark.process

STEPS = 6
TINY = (
    f"--config={os.getcwd()}/configs/dense.py:depth=1,width=16,placement=span,init=scale",
    f"--config.training.steps={STEPS}",
    "--config.data.seq_len=32",
    "--config.training.batch_size=4",
    "--config.checkpoint.every_steps=3",
    "--config.eval.tokens=256",
)
# What SIGHUP does is inherited: by default nothing but the end, under nohup nothing.
HUNG_UP = """
import os, signal, sys
signal.signal(signal.SIGHUP, getattr(signal, sys.argv[1]))
os.execv(sys.argv[2], sys.argv[2:])
"""
ENDLESS = ("--config.training.steps=1000000", "--config.metrics.console_every_s=0", "--config.checkpoint.every_steps=0")


def run(env, module, *argv, code=0, cwd=None):
    """(stdout, stderr) of a command that must end with `code`."""
    return finish(launch(env, module, *argv, cwd=cwd), code)


def in_shell(env, redirection, module, *argv):
    """A command behind a shell's redirection; its code and what is left of its stderr."""
    process = launch(env, module, *argv, under=["sh", "-c", f'"$@" {redirection}', "sh"])
    _, err = process.communicate(timeout=LIMIT_S)
    return process.returncode, err


@pytest.fixture(scope="module")
def plain(env, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "plain"
    run(env, "train", *TINY, "--workdir", workdir)
    return workdir


def refused(err, *words):
    assert err.count("\n") == 1 and err.startswith("error: ") and all(word in err for word in words), err


# ---- who reads the output -----------------------------------------------------------------------


@pytest.mark.parametrize("redirection", ["| head -1", ">&-", ">&- 2>&- <&-", ">/dev/full 2>/dev/full"])
def test_outputs_that_nobody_reads_take_no_run_with_them(env, plain, tmp_path, redirection):
    often = ("--config.metrics.console_every_s=0", "--workdir", tmp_path / "run")
    code, err = in_shell(env | {"PYTHONUNBUFFERED": "1"}, redirection, "train", *TINY, *often)
    assert (code, err) == (0, "")
    assert (tmp_path / "run" / "DONE").exists() and metrics(tmp_path / "run") == metrics(plain)


def test_an_evaluation_nobody_reads_is_recorded_and_one_that_cannot_be_printed_fails(env, plain, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(plain, workdir)
    assert in_shell(env, ">&-", "evaluate", "--workdir", workdir) == (0, "")
    code, err = in_shell(env, ">/dev/full", "evaluate", "--workdir", workdir, "--json")
    assert code == 2
    refused(err, "No space left on device")
    assert len(lines_of(workdir / "eval.jsonl")) == 2


@pytest.mark.parametrize(("usual", "stops"), [("SIG_DFL", True), ("SIG_IGN", False)])
def test_a_terminal_that_closes_stops_a_run_unless_nohup_says_otherwise(env, plain, tmp_path, usual, stops):
    workdir = tmp_path / "run"
    argv = (*TINY, *ENDLESS, "--workdir", workdir)
    process = launch(env, "train", *argv, pause_at="step 3/", under=[sys.executable, "-c", HUNG_UP, usual])
    paused(process)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGCONT)
    if not stops:  # it goes on, until something else stops it
        assert any(line.startswith("step 23/") for line in process.stdout)
        process.send_signal(signal.SIGTERM)
    out, _ = finish(process)
    assert f"stopped by {'SIGHUP' if stops else 'SIGTERM'}, saved at step" in out
    assert len(list((workdir / "checkpoints").glob("*/manifest.json"))) == 1


# ---- folders -------------------------------------------------------------------------------------


def test_a_home_is_expanded_everywhere_and_addresses_are_refused_before_anything_is_made(env, tmp_path):
    env = env | {"HOME": str(tmp_path)}
    data = ("--config.data.data_dir=~/data", "--config.data.cache_dir=cache")
    out, _ = run(env, "train", *TINY, *data, "--workdir=~/runs/x", cwd=tmp_path)
    assert out.endswith(f"done: {tmp_path / 'runs' / 'x'}\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "data", "runs"]
    # A relative folder is found again from another working folder.
    run(env, "evaluate", "--workdir=~/runs/x", cwd=tmp_path / "runs")
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["x"]

    for option in ("--workdir=hdfs://host/x", "--config.data.cache_dir=gs://b/c", "--config.data.data_dir=s3://b"):
        _, err = run(env, "train", *TINY, "--workdir=y", option, code=2, cwd=tmp_path)
        refused(err, "://", "is an address", "mount")
    for module in ("evaluate", "sample"):
        refused(run(env, module, "--workdir=gs://bucket", code=2, cwd=tmp_path)[1], "names no object")
    refused(run(env, "train", *TINY, "--workdir=a\\b", code=2, cwd=tmp_path)[1], "backslash")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "data", "runs"]


def test_without_a_home_a_line_names_what_to_set_and_nothing_else_is_asked(env, plain, tmp_path):
    """As in a container with a user id that has no name."""
    (tmp_path / "sitecustomize.py").write_text(
        "import pwd\ndef nobody(uid):\n    raise KeyError(uid)\npwd.getpwuid = nobody\n"
    )
    homeless = {k: v for k, v in env.items() if k not in ("HOME", "XDG_CACHE_HOME", "TFDS_DATA_DIR")}
    homeless["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{env['PYTHONPATH']}"
    cache, data = env["XDG_CACHE_HOME"], env["TFDS_DATA_DIR"]
    _, err = run(homeless, "train", *TINY, "--workdir", tmp_path / "run", code=2)
    refused(err, "no home directory", "data.cache_dir")
    empty = f"--config.data.cache_dir={tmp_path / 'empty'}"
    refused(run(homeless, "train", *TINY, empty, "--workdir", tmp_path / "run", code=2)[1], "data.data_dir")
    assert not (tmp_path / "run").exists()
    stores = f"--config.data.cache_dir={cache}/spannorm_jax/tokens"
    run(homeless, "train", *TINY, stores, f"--config.data.data_dir={data}", "--workdir", tmp_path / "run")
    run(homeless, "evaluate", "--workdir", tmp_path / "run")
    run(homeless, "sample", "--workdir", tmp_path / "run", "--max_tokens", 2)


def test_a_folder_that_cannot_be_written_is_evaluated_with_a_result(env, plain, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(plain, workdir)
    (workdir / "eval.jsonl").mkdir()  # whoever asks, root too, cannot append to it
    out, err = run(env, "evaluate", "--workdir", workdir, "--json", code=2)
    result = json.loads(out)
    assert result["step"] == STEPS
    refused(err, "not recorded: ", "--out FILE")
    elsewhere = tmp_path / "result.jsonl"
    out, err = run(env, "evaluate", "--workdir", workdir, "--json", "--out", elsewhere)
    assert json.loads(elsewhere.read_text()) == json.loads(out) == result and err == ""
    assert run(env, "evaluate", "--workdir", workdir, "--json", "--out", "none")[1] == ""
    _, err = run(env, "evaluate", "--workdir", workdir, "--out", tmp_path / "no" / "where", code=2)
    refused(err, "--out", "cannot be written")


# ---- locale --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ascii_env(env):
    """The narrowest locale that there is: without Python's own help it encodes nothing but ASCII."""
    return env | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def test_files_are_utf8_in_any_locale(ascii_env, tmp_path):
    bpe = ("--config.data.tokenizer=bpe", "--config.data.bpe_vocab_size=300", "--config.data.bpe_train_mib=1")
    run(ascii_env, "train", *TINY, *bpe, "--workdir", tmp_path / "run")
    assert "Ġ" in (tmp_path / "run" / "tokenizer.json").read_text(encoding="utf-8")
    run(ascii_env, "evaluate", "--workdir", tmp_path / "run")
    run(ascii_env, "sample", "--workdir", tmp_path / "run", "--max_tokens", 4, "--prompt", "é")
    run(ascii_env, "report", tmp_path)
    # Whatever opens a file without naming its encoding is an error here.
    strict = ascii_env | {"PYTHONWARNDEFAULTENCODING": "1", "PYTHONWARNINGS": "error::EncodingWarning:spannorm_jax"}
    run(strict, "evaluate", "--workdir", tmp_path / "run")


def test_a_folder_whose_name_the_locale_cannot_say_is_one_line(ascii_env, tmp_path):
    _, err = run(ascii_env, "train", *TINY, "--workdir", os.fsencode(tmp_path / "é").decode("latin-1"), code=2)
    refused(err, "no UTF-8 here", "PYTHONUTF8=1")
    assert list(tmp_path.iterdir()) == []
    run(ascii_env | {"PYTHONUTF8": "1"}, "train", *TINY, "--workdir", tmp_path / "é")
    assert (tmp_path / "é" / "DONE").exists()


# ---- switches of the environment --------------------------------------------------------------------


def test_the_environment_changes_no_number(env, plain, tmp_path):
    switches = {
        "JAX_ENABLE_X64": "1",
        "JAX_DEFAULT_PRNG_IMPL": "rbg",
        "JAX_THREEFRY_PARTITIONABLE": "0",
        "JAX_RANDOM_SEED_OFFSET": "7",
        "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "JAX_DEBUG_NANS": "1",
        "JAX_DISABLE_JIT": "1",
    }
    run(env | switches, "train", *TINY, "--workdir", tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics(plain)
    start = json.loads((tmp_path / "run" / "starts.jsonl").read_text())["numerics"]
    assert start["fixed"]["jax_enable_x64"] is False and start["fixed"]["jax_default_prng_impl"] == "threefry2x32"
    assert switches.items() <= start["environment"].items()
    evaluated = [run(e, "evaluate", "--workdir", plain, "--json", "--out=none")[0] for e in (env, env | switches)]
    assert evaluated[0] == evaluated[1]
    texts = [run(e, "sample", "--workdir", plain, "--max_tokens", 5)[0] for e in (env, env | switches)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("module", ["evaluate", "sample"])
def test_a_platform_that_is_absent_is_refused_by_every_command(env, plain, module):
    _, err = run(env, module, "--workdir", plain, "--config.platform=tpu", code=2)
    refused(err, "platform=tpu")


# ---- runs that were written elsewhere ------------------------------------------------------------------


def with_config(plain, folder, change):
    shutil.copytree(plain, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_dense_run_from_before_experts_and_other_options_goes_on(env, plain, tmp_path):
    def without(config):
        del config["model"]["moe"], config["model"]["qk_norm"], config["optim"]["schedule"]

    workdir = with_config(plain, tmp_path / "older", without)
    (workdir / "DONE").unlink()
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    out, _ = run(env, "train", *TINY, "--workdir", workdir)
    assert "continuing after step 3" in out and metrics(workdir) == metrics(plain)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("placement", "spam", "model.placement='spam' is unknown"),
        ("norm", "batchnorm", "model.norm='batchnorm' is unknown"),
        ("init_targets", ["attn_middle"], "model.init_targets='attn_middle' is unknown"),
        ("depth", 0, "model.depth=0 is too small"),
        ("new_option", 1, "unknown config key model.new_option"),
        ("width", "wide", "model.width='wide' must be an integer"),
    ],
)
def test_a_config_that_this_version_does_not_know_is_one_line(plain, tmp_path, capsys, key, value, says):
    workdir = with_config(plain, tmp_path / "newer", lambda config: config["model"].__setitem__(key, value))
    for module in (evaluate, sample):
        with pytest.raises(UserError) as refusal:
            module.main(["--workdir", str(workdir)])
        line = str(refusal.value)
        assert str(workdir / "config.json") in line and says in line and "newer version" in line


# ---- numbers that are not numbers --------------------------------------------------------------------


def test_weights_that_diverged_are_evaluated_to_null_and_not_called_good(env, plain, tmp_path):
    """A rate at which the first update overflows: the state of step 1 is saved before anybody has looked at it."""
    workdir = tmp_path / "run"
    more = ("--config.optim.lr=1e38", "--config.optim.warmup_fraction=0", "--config.checkpoint.every_steps=1")
    out, _ = run(env, "train", *TINY, *more, "--workdir", workdir, code=3)
    assert "there is no good checkpoint (that of step 1 holds the weights with which this happened)" in out
    assert json.loads((workdir / "DIVERGED").read_text())["last_good_checkpoint"] is None
    for module in ("evaluate", "sample"):
        refused(run(env, module, "--workdir", workdir, code=2)[1], "before it had a good checkpoint", "--step N")
    out, err = run(env, "evaluate", "--workdir", workdir, "--json", "--step", 1, code=3)
    line = (workdir / "eval.jsonl").read_text()
    assert line == out and "NaN" not in line and json.loads(line)["loss"] is None
    assert "loss of step 1 is not finite" in err
    _, err = run(env, "sample", "--workdir", workdir, "--max_tokens", 3, "--step", 1, code=2)
    refused(err, "logits are not finite", "--step")
    run(env, "report", tmp_path)


def test_a_loss_beyond_what_a_perplexity_can_be_is_recorded(env, tmp_path, monkeypatch):
    """Large logits that are sure and wrong: some thousand nats a token, and exp of that is no number."""
    workdir = tmp_path / "run"
    more = ("--config.optim.lr=1e4", "--config.optim.warmup_fraction=0", "--config.training.steps=1")
    run(env, "train", *TINY, *more, "--workdir", workdir)
    out, _ = run(env, "evaluate", "--workdir", workdir, "--json")
    result = json.loads(out)
    assert result["loss"] > 710 and result["perplexity"] is None and result["bits_per_byte"] > 710
