"""A user's mistake is one line that names the thing and the remedy, exit code 2, and nothing lost."""

import json
import shlex
import subprocess
import sys

import pytest
from processes import LIMIT_S

from spannorm_jax import evaluate, sample, train
from spannorm_jax.config import Config, to_dict
from spannorm_jax.plan import __main__ as plan
from spannorm_jax.training.tasks import text

pytestmark = pytest.mark.usefixtures("own_caches")

CONFIG = "configs/dense.py:depth=2,width=32,placement=span,init=scale"


@pytest.fixture
def refuse_train(refuse, tmp_path):
    """Starts a training that must be refused before it touches its folder."""

    def run(*more):
        workdir = tmp_path / "run"
        line = refuse(train, "--config", CONFIG, "--workdir", workdir, *more)  # a later --config holds
        assert not workdir.exists()
        return line

    return run


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("--config.modle.depth=4", ["modle.depth", "'model.depth'"]),
        ("--config.model.detph=4", ["model.detph", "'depth'"]),
        ("--config.optim.steps=4", ["optim.steps", "'training.steps'"]),
        ("--config.model.parametrisation=mup", ["model.base_width", "model.base_width=32"]),
        ("--config.optim.decay_gains=before_attn", ["optim.decay_gains='before_attn'", "after_attn"]),
        ("--config.optim.hold_norms=out", ["optim.hold_norms='out'", "ffn_out"]),
        ("--config.training.steps=ten", ["training.steps='ten'", "an integer"]),
        ("--config.training.steps=2.5", ["training.steps='2.5'", "an integer"]),
        ("--config.training.steps=-1", ["training.steps=-1", "1 or more"]),
        ("--config.training.steps=99999999999999999999", ["training.steps=99999999999999999999", "2147483647"]),
        ("--config.training.steps=0", ["training.steps=0", "training.tokens"]),
        ("--config.training.tokens=-5", ["training.tokens=-5", "0 or more"]),
        ("--config.training.tokens=5000", ["training.tokens=5000", "5 updates", "training.steps=300", "steps=0"]),
        ("--config.training.tokens=1e9", ["training.tokens='1e9'", "an integer"]),
        ("--config.optim.decay_fraction=1.5", ["optim.decay_fraction=1.5", "between 0 and 1"]),
        ("--config.metrics.wandb_project=norms", ["metrics.wandb_project='norms'", "pip install wandb"]),
        ("--config.optim.lr=fast", ["optim.lr='fast'", "a finite number"]),
        ("--config.optim.lr=nan", ["optim.lr='nan'", "a finite number"]),
        ("--config.optim.b2=1", ["optim.b2=1.0", "below 1"]),
        ("--config.model.qk_norm=maybe", ["model.qk_norm='maybe'", "true or false"]),
        ("--config.model=small", ["config key model", "group"]),
        ("--config.model.depth.x=1", ["model.depth.x", "no further keys"]),
        ("--config.model.depth", ["--config.model.depth", "=VALUE"]),
        ("--config.model.init_targets=ffn_uot", ["model.init_targets='ffn_uot'", "'ffn_out'"]),
        ("--config.model.num_heads=5", ["model.num_heads=5", "model.width=32", "4 or 8"]),
        ("--config.model.num_heads=32", ["odd", "even head size"]),
        ("--config.model.num_kv_heads=3", ["model.num_kv_heads=3", "model.num_heads=2"]),
        ("--config.execution.scan_unroll=3", ["execution.scan_unroll=3", "model.depth=2"]),
        ("--config.model.vocab_size=100", ["model.vocab_size=100", "256"]),
        ("--config.training.num_microbatches=3", ["num_microbatches=3", "batch_size=8"]),
        ("--config.mesh.data=3", ["mesh.data=3", "devices", "-1"]),
        ("--config.mesh.fsdp=-1", ["mesh=", "more than one -1"]),
        ("--config.mesh.tensor=0", ["mesh.tensor=0", "at least 1"]),
        ("--config.data.dataset=python_sauce", ["python_sauce", "python_source"]),
        ("--config.data.dataset=1_000", ["data.dataset='1_000'", "not a TFDS name"]),
        ("--config.data.tokenizer_file=x.json", ["data.tokenizer_file='", "data.tokenizer=bpe"]),
        ("--config.data.tokenizer_hash=" + 5000 * "x", ["data.tokenizer_hash=xxx", "leave it out"]),
        ("--config.data.train_split=" + 300 * "x", ["data.train_split=", "200 bytes"]),
        ("--config.data.dataset=é", ["data.dataset='é'", "not a TFDS name"]),
        ("--config.data.train_split=trian", ["data.train_split", "trian", "train"]),
        ("--config.data.eval_split=test", ["data.eval_split", "test", "validation"]),
        ("--config.data.text_feature=txet", ["data.text_feature", "txet", "text"]),
        ("--config.data.fingerprint=0123456789abcdef", ["0123456789abcdef", "data.fingerprint", "restore"]),
        ("--config.platform=cuda", ["platform='cuda'", "cpu"]),
        # values that contradict each other
        (
            "--config.optim.schedule=wsd --config.optim.decay_fraction=0.7 --config.optim.warmup_fraction=0.4",
            ["0.7", "0.4", "lower one"],
        ),
        ("--config.training.steps=0 --config.training.tokens=99999999999999", ["=99999999999999 ", "2147483647"]),
        # the config file and its argument
        ("--config=configs/dence.py", ["configs/dence.py", "does not exist"]),
        ("--config=configs/dense.py:huge", ["'huge'", "preset", "tiny"]),
        ("--config=configs/dense.py:350M", ["'350M'", "'350m'"]),
        ("--config=configs/dense.py:detph=3", ["'detph'", "'depth'"]),
        ("--config=configs/dense.py:depth=three", ["depth='three'", "an integer"]),
        ("--config=configs/dense.py:placement=mid", ["model.placement='mid'", "mix"]),
        # flags
        *(
            (f"--profile_steps={steps}", ["--profile_steps", f"{steps}'", "A:B"])
            for steps in ("", "ten", "-3:5", "5:3")
        ),
        *((f"--profile_steps={steps}", ["--profile_steps", "A:B"]) for steps in ("3:", "0:2", "1:2:3", "٣x")),
        ("--profile_steps=7:301", ["--profile_steps", "7:301", "300"]),
        ("--devices=8", ["--devices"]),
    ],
)
def test_training_that_cannot_be(refuse_train, override, says):
    first, *more = override.split(" --config")
    line = refuse_train(first, *(f"--config{item}" for item in more))
    assert all(part in line for part in says), line


def test_a_window_that_is_too_long_is_refused_before_anything_of_its_size_is_made(refuse_train, monkeypatch):
    monkeypatch.setattr(text, "eval_batches", lambda *_: pytest.fail("16 windows take many GB"))
    line = refuse_train("--config.data.seq_len=100000000")
    assert "data.seq_len=100000000" in line and "too long" in line


def test_a_typo_inside_a_config_file_names_its_line(refuse_train, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from spannorm_jax.config_file import default_config\n\n\ndef get_config(arg=None):\n"
        "    config = default_config()\n    config.model.detph = 8\n    return config\n"
    )
    line = refuse_train("--config", str(path))
    assert "line 6" in line and "detph" in line and "depth" in line


def test_a_folder_that_holds_something_else_is_left_alone(refuse, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("precious")
    line = refuse(train, "--config", CONFIG, "--workdir", tmp_path / "thesis")
    assert "thesis" in line and "not a run" in line
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter1.tex"]


def test_evaluation_refuses_what_is_no_run_or_a_damaged_one_and_another_model(refuse, tmp_path):
    line = refuse(evaluate, "--workdir", tmp_path)
    assert str(tmp_path) in line and "not a run" in line
    line = refuse(evaluate, "--workdir", tmp_path, "--config.model.depth=3")
    assert "--config.model.depth" in line and "mesh.*" in line
    (tmp_path / "config.json").write_text(json.dumps({"seed": 0})[:-1])
    assert "config.json is damaged" in refuse(evaluate, "--workdir", tmp_path)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--temperature=-0.5", ["--temperature -0.5", "0 or more"]),
        ("--temperature=nan", ["--temperature nan", "0 or more"]),
        ("--temperature=inf", ["--temperature inf", "0 or more"]),
        ("--top_k=-1", ["--top_k -1", "0 or more"]),
        ("--max_tokens=0", ["--max_tokens 0", "1 or more"]),
        ("--max_tokens=99999999999", ["--max_tokens 99999999999", "2147483647"]),
        ("--seed=-1", ["--seed -1", "0 or more"]),
        ("--config.model.depth=3", ["--config.model.depth", "mesh.*"]),
        ("--temperature=0", ["not a run"]),
    ],
)
def test_a_sample_that_cannot_be(refuse, tmp_path, option, says):
    line = refuse(sample, "--workdir", tmp_path, "--prompt", "def ", option)
    assert all(part in line for part in says), line


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), ["--topology", "--devices", "not both"]),
        (("--devices=8", "--topology=v5e:2x2"), ["not both"]),
        (("--topology=v5x:2x2",), ["'v5x:2x2'", "did you mean 'v5"]),
        (("--topology=v5e",), ["'v5e' has no shape", "v5e:4x4"]),
        (("--topology=v5e-17",), ["'v5e-17' is no slice", "16, 32"]),
        (("--topology=v5e:2x2",), ["compiler is not installed", "tpu-plan"]),
        (("--devices=8", "--program=sample"), ["need --topology"]),
        (("--topology=v5e:2x2", "--slices=0"), ["--slices '0'", "1 to 2048"]),
        (("--devices=0",), ["--devices '0'", "1 to 2048"]),
        (("--devices=-8",), ["--devices '-8'", "1 to 2048"]),
        (("--devices=many",), ["--devices 'many'", "1 to 2048"]),
        (("--devices=" + 9000 * "9",), ["--devices '999", "1 to 2048"]),
        (("--devices=256", "--config.mesh.fsdp=3"), ["mesh.fsdp=3", "256 devices", "-1"]),
        (("--devices=256",), ["training.batch_size", "=8 ", "=256", "change one"]),
        (("--devices=8", "--config.mesh.expert=8"), ["mesh.expert=8", "num_experts=0"]),
        (("--devices=8", "--device_kind=NVIDIA H20"), ["--device_kind 'NVIDIA H20'", "'NVIDIA H200'"]),
        (("--devices=8", "--device_kind=TPU v5e"), ["--device_kind 'TPU v5e'", "did you mean 'TPU v5"]),
        (("--devices=8", "--profile_steps=3"), ["--profile_steps=3", "spannorm_jax.plan --help"]),
        (("--devices=8", "--config.execution.attention=cudnn"), ["execution.attention=cudnn", "no GPU"]),
        (("--devices=8", "--config.model.vocab_size=100"), ["model.vocab_size=100", "256"]),
        (("--devices=8", "--config.model.detph=100"), ["model.detph", "'depth'"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_a_plan_that_cannot_be(refuse, options, says):
    line = refuse(plan, "--config", CONFIG, *options)
    assert all(part in line for part in says), line


# Of each command, arguments that it takes; RUN is a run's folder.
OF_A_CONFIG = {
    "train": "--config configs/dense.py --workdir absent",
    "show_init": "--config configs/dense.py",
    "prepare": "--config configs/dense.py",
    "plan.__main__": "--config configs/dense.py --devices 8",
}
OF_RUNS = {"evaluate": "--workdir RUN", "sample": "--workdir RUN", "report.__main__": "RUN"}
# With a mistake, and what is said of it; of a flag that is given twice, the second holds.
MISTYPED = [
    *((f"{command} --help", "usage: python -m spannorm_jax.") for command in OF_A_CONFIG | OF_RUNS),
    *((f"{command} {taken} --wrokdir x", "--wrokdir") for command, taken in (OF_A_CONFIG | OF_RUNS).items()),
    *(
        (f"{command} {taken} {mistake}", says)
        for command, taken in OF_A_CONFIG.items()
        for mistake, says in (
            ("--config configs/dense.py:tny", "'tiny'"),
            ("--config configs/dense.py:placement=spam", "'span'"),
            ("--config configs/dense.py:init=scael", "'scale'"),
            ("--config.optim.lrr=1", "'lr'"),
            ("--config.execution.attention=xal", "'xla'"),
            ("--config.execution.grouped_matmul=paded", "'padded'"),
            ("--config.data.tokenizer=byte", "'bytes'"),
        )
    ),
    (f"train {OF_A_CONFIG['train']} --profile_steps 5:3", "--profile_steps '5:3'"),
    ("train --config configs/dense.py", "--workdir"),
    (f"train {OF_A_CONFIG['train']} --num_processes 2", "give all three"),
    (f"plan.__main__ {OF_A_CONFIG['plan.__main__']} --device_kind H200", "NVIDIA H200,"),
    (f"prepare {OF_A_CONFIG['prepare']} --shard 3/3", "--shard '3/3'"),
    (f"show_init {OF_A_CONFIG['show_init']} --config.model.vocab_size=9", "model.vocab_size=9"),
    ("evaluate --workdir RUN --config.mesh.fdsp=2", "'fsdp'"),
    ("evaluate --workdir RUN --heartbeat_s 0", "write 1 or more"),
    ("sample --workdir RUN --config.mesh.fdsp=2", "'fsdp'"),
    ("sample --workdir RUN --top_k -1", "--top_k -1"),
]
REFUSALS = """
import contextlib, importlib, io, json, sys
from spannorm_jax.command import run_command

refusals = []
for command, *argv in json.loads(sys.argv[1]):
    said = io.StringIO()
    sys.argv = [command, *argv]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            run_command(importlib.import_module("spannorm_jax." + command).main)
        except SystemExit as exit_:
            code = exit_.code
    refusals.append((code, said.getvalue(), sorted({"flax", "jax"} & {*sys.modules})))
print(json.dumps(refusals))
"""


def test_a_command_that_is_mistyped_is_refused_without_importing_jax(tmp_path):
    """The import takes seconds, on a busy machine many."""
    (tmp_path / "config.json").write_text(json.dumps(to_dict(Config())))
    commands = [[str(tmp_path) if word == "RUN" else word for word in shlex.split(line)] for line, _ in MISTYPED]
    done = subprocess.run(
        [sys.executable, "-c", REFUSALS, json.dumps(commands)], capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stderr
    for (line, says), (code, said, imported) in zip(MISTYPED, json.loads(done.stdout), strict=True):
        assert not imported, line
        assert says in said, (line, said)
        assert code == 0 if "--help" in line else code == 2 and said.count("\n") == 1, (line, said)
