"""docs/python.md: its code runs, its list is the public names, and a package outside of the repository is enough."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from processes import LIMIT_S, user_env
from small_model import assert_trees_close

import spannorm_jax
from spannorm_jax import train
from spannorm_jax.errors import UserError

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
CODE = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder elsewhere, with the page's run: of fewer blocks and steps."""
    folder = tmp_path_factory.mktemp("elsewhere")
    [command] = [line for line in PAGE.splitlines() if line.startswith("    python -m spannorm_jax.train")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        small = ["--config.model.depth=2", "--config.training.steps=3", "--config.eval.tokens=1024"]
        assert train.main([*shlex.split(command)[3:], *small]) == 0
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_code_of_the_page_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    namespace = {}
    for i, code in enumerate(CODE):
        exec(compile(code, f"docs/python.md, block {i + 1}", "exec"), namespace)
    assert namespace["logits"].shape == (2, 16, 256) and namespace["scores"].shape == (2, 4, 5)
    assert namespace["metrics"]["step"].to_list() == [1, 2, 3]
    assert {"loss.svg", "gradients.svg"} <= {path.name for path in folder.iterdir()}
    assert namespace["get_config"]("small").model.depth == 12
    assert set(spannorm_jax.PLACEMENTS) <= set(capsys.readouterr().out.split())


def test_the_list_of_the_page_is_the_public_names():
    listed = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE)))
    assert sorted(listed) == sorted(spannorm_jax.__all__) and set(listed) <= set(dir(spannorm_jax))
    for name in listed:
        assert getattr(spannorm_jax, name).__doc__
    with pytest.raises(AttributeError, match="no_such_name"):
        spannorm_jax.no_such_name  # noqa: B018


def test_the_package_itself_imports_nothing_of_weight():
    code = "import sys, spannorm_jax; print(sorted({'jax', 'flax', 'numpy', 'polars', 'typing'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: spannorm_jax.load("nowhere"), "nowhere is not a run"),
        (lambda: spannorm_jax.load("runs/x", step=2), "no checkpoint of step 2"),
        (lambda: spannorm_jax.load("runs/x", options={"model.depth": 3}), "model.depth cannot be changed"),
        (lambda: spannorm_jax.read_config("configs/dense.py:tinny"), "did you mean 'tiny'"),
        (lambda: spannorm_jax.read_config("configs/none.py"), "does not exist"),
        (lambda: spannorm_jax.read_metrics("nowhere"), "holds no metrics.jsonl"),
    ],
)
def test_mistakes_are_one_line(folder, monkeypatch, call, words):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError) as refused:
        call()
    assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("options", ["", ",init=ds", "moe"])
def test_a_block_by_itself_is_that_of_the_model(options):
    """Drawn with the same key, weight by weight; and it computes what the model's stack computes."""
    file, options = ("moe.py", "") if options == "moe" else ("dense.py", options)
    cfg = spannorm_jax.read_config(f"configs/{file}:tiny,placement=span{options}", {"model.depth": 4}).model
    model, key = spannorm_jax.define(cfg), jax.random.key(5)
    params = jax.jit(model.init)(key)
    x = jax.random.normal(jax.random.key(0), (2, 8, cfg.width))
    stream = x
    for layer in range(cfg.depth):
        block = spannorm_jax.make_block(cfg, layer, key)
        stack = "moe_blocks" if spannorm_jax.config.moe_layers(cfg)[layer] else "blocks"
        row = spannorm_jax.model.definition.stack_layers(cfg)[stack].index(layer)
        got = nnx.to_pure_dict(nnx.state(block, nnx.Param))
        want = jax.tree.map(lambda all, row=row: all[row], params[stack])
        assert_trees_close(got, want, 1e-6)  # rounding: one is jitted
        stream, _, _ = block.whole(stream, layer, None)
    whole = model.bind(params, model.init_model_state()).run_from(x, None).stream
    assert jnp.allclose(stream, whole, rtol=0, atol=1e-5)  # of unit size, float32, four blocks


def test_options_may_be_lists_numbers_and_truths():
    options = {"model.init_targets": ["ffn_out", "v"], "model.qk_norm": True, "optim.lr": 1e-4}
    config = spannorm_jax.read_config("configs/dense.py:tiny,init=scale", options)
    assert config.model.init_targets == ("ffn_out", "v") and config.model.qk_norm and config.optim.lr == 1e-4


@pytest.mark.process
def test_a_built_package_needs_no_repository(tmp_path):
    """What a wheel holds, in a folder elsewhere: presets, sweeps, the page of a report, and the public names."""
    source, built = tmp_path / "source", tmp_path / "built"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("spannorm_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    env = user_env(tmp_path / "home") | {"PYTHONPATH": str(built)}

    def run(*argv, cwd=tmp_path):
        done = subprocess.run(
            [sys.executable, *argv], cwd=cwd, env=env, capture_output=True, text=True, timeout=LIMIT_S
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("-c", "import setuptools; setuptools.setup()", "-q", "build_py", f"--build-lib={built}", cwd=source)
    assert not (built / "spannorm_jax" / "presets").is_symlink() and not (built / "configs").exists()
    where = run("-c", "import spannorm_jax; print(spannorm_jax.load.__code__.co_filename)")
    assert Path(where.strip()).is_relative_to(built)
    preset = "configs/moe.py:tiny,placement=span"
    small = ("--config.model.depth=2", "--config.training.steps=2", "--config.eval.tokens=256")
    run("-m", "spannorm_jax.train", "--config", preset, "--workdir", "runs/x", *small)
    run("-m", "spannorm_jax.report", "runs")
    assert "tiny,placement=pre" in run("-m", "spannorm_jax.sweep", "demo", "list", "--out", "runs/demo")
    code = "import spannorm_jax; print(spannorm_jax.load('runs/x').sample('def ', max_tokens=3))"
    assert run("-c", code).startswith("[")
