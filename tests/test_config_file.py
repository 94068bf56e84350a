"""A config file and what it imports from its folder, wherever it lies and whoever reads it."""

import subprocess
import sys
import types
from pathlib import Path

import pytest

import spannorm_jax
from spannorm_jax.config import to_dict
from spannorm_jax.config_file import load, read_config_file, split_spec
from spannorm_jax.durable import write_json
from spannorm_jax.errors import UserError
from spannorm_jax.resolution import fill_sizes

CONFIGS = Path(spannorm_jax.__file__).parents[1] / "configs"
IMPORTS = "from .common import depth\n"
GETS = """
def get_config(arg=None):
    from spannorm_jax.config_file import default_config
    config = default_config()
    config.model.depth = depth()
    return config
"""


def folder_of(parent, common, config=IMPORTS + GETS):
    parent.mkdir()
    (parent / "common.py").write_text(common)
    (parent / "mine.py").write_text(config)
    return parent


@pytest.mark.parametrize("name", [path.name for path in CONFIGS.glob("*.py") if path.name != "common.py"])
def test_a_config_is_the_same_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    here = load(f"configs/{name}")
    monkeypatch.chdir(tmp_path)
    assert load(str(CONFIGS / name)) == here
    monkeypatch.chdir(CONFIGS)
    assert load(name) == here


def test_each_folder_has_its_own_and_nothing_of_it_stays(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "common", types.ModuleType("common"))  # somebody else's
    path, modules = list(sys.path), dict(sys.modules)
    for depth in (3, 5):
        folder = folder_of(tmp_path / str(depth), f"def depth():\n    return {depth}\n")
        assert read_config_file(str(folder / "mine.py")).model.depth == depth
    assert sys.path == path and sys.modules == modules


def test_a_config_file_may_read_another_before_it_imports(tmp_path):
    inner = folder_of(tmp_path / "inner", "def depth():\n    return 3\n")
    outer = folder_of(
        tmp_path / "outer",
        "def more():\n    return 2\n",
        "from spannorm_jax.config_file import read_config_file\n\n\ndef get_config(arg=None):\n"
        f"    config = read_config_file({str(inner / 'mine.py')!r})\n"
        "    from .common import more\n    config.model.depth += more()\n    return config\n",
    )
    assert read_config_file(str(outer / "mine.py")).model.depth == 5


@pytest.mark.parametrize(
    ("common", "says"),
    [
        ("def depth():\n    return missing\n", "common.py line 2: NameError"),
        ("x = 1\nx.y\n\n", "common.py line 2: AttributeError"),
        ("def depth(\n", "common.py line 1: SyntaxError"),
        ("import no_such_module\n", "common.py line 1: ModuleNotFoundError"),
        ("width = 3\n", "mine.py line 1: ImportError"),
        ("def depth():\n    return 'deep'\n", "mine.py line 6: TypeError"),
    ],
)
@pytest.mark.parametrize("typed", ["{}/mine.py", "mine.py", "../x/mine.py"])
def test_a_failure_beside_a_config_file_names_its_file_and_line(tmp_path, monkeypatch, common, says, typed):
    folder = folder_of(tmp_path / "x", common)
    monkeypatch.chdir(folder)
    path = typed.format(folder)
    with pytest.raises(UserError) as refusal:
        read_config_file(path)
    assert str(refusal.value).startswith(f"config file {path.removesuffix('mine.py')}{says}: ")
    assert not [name for name in sys.modules if "mine" in name or name.startswith("_config_folder")]


def test_a_neighbour_that_is_imported_by_its_bare_name_is_told_how(tmp_path):
    folder = folder_of(tmp_path / "x", "width = 3\n", "import common\n")
    with pytest.raises(UserError, match=r"mine\.py line 1: ModuleNotFoundError.*write from \.common import"):
        read_config_file(str(folder / "mine.py"))
    (folder / "mine.py").write_text("import uncommon\n")
    with pytest.raises(UserError, match=r"No module named 'uncommon'$"):
        read_config_file(str(folder / "mine.py"))


@pytest.mark.parametrize("name", ["random.py", "json.py", "jax.py"])
def test_a_config_file_may_have_the_name_of_a_module(tmp_path, name):
    """From its own folder too, which Python would search first."""
    folder = folder_of(tmp_path / "x", "def depth():\n    return 3\n")
    (folder / "mine.py").rename(folder / name)
    argv = [sys.executable, "-m", "spannorm_jax.analysis.theory", "--config", name, "--tokens", "4"]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and ": 3 blocks" in done.stdout, done.stderr


def test_colons_in_a_folder_and_in_an_argument_are_told_apart(tmp_path, monkeypatch):
    folder = folder_of(
        tmp_path / "a:b.py:c", "def depth():\n    return 3\n", IMPORTS + GETS.replace("depth()", "len(arg)")
    )
    for typed in (str(folder / "mine.py"), "mine.py"):
        monkeypatch.chdir(folder)
        assert read_config_file(f"{typed}:x:y=z").model.depth == 5
        assert split_spec(typed) == (typed, "") and split_spec(f"{typed}:x") == (typed, "x")
    assert split_spec("none/a:b.py:tiny,x=1:2") == ("none/a:b.py", "tiny,x=1:2")
    with pytest.raises(UserError, match="config file 'none' does not exist"):
        load("none:tiny")


@pytest.mark.parametrize(("placement", "init"), [("pre", "gpt2"), ("span", "scale"), ("span_raw", "scale")])
def test_a_published_initialisation_is_recorded_by_its_own_name(placement, init):
    """So the two spellings are one run: GPT-2's PreNorm (Radford et al. 2019), SpanNorm's ScaleInit."""
    published, named = (load(f"{CONFIGS}/dense.py:tiny,placement={placement},init={i}") for i in ("published", init))
    assert published == named


def test_a_placement_may_need_more_than_one_block():
    assert load(f"{CONFIGS}/dense.py:tiny,placement=deepscale,depth=2").model.depth == 2
    assert load(f"{CONFIGS}/dense.py:tiny,placement=pre,depth=1").model.depth == 1


def test_a_rival_is_a_placement_with_what_it_was_published_with():
    config = load(f"{CONFIGS}/dense.py:tiny,rival=subln")
    assert (config.model.placement, config.model.init) == ("subln", "subln")
    model = load(f"{CONFIGS}/dense.py:tiny,rival=prores").model
    assert (model.placement, model.init, model.branch_warmup_steps) == ("pre", "plain", 1000)


@pytest.mark.parametrize(
    ("arg", "options", "says"),
    [
        # DeepScaleLM's skip is the root of 1 - 2 / L: at one block there is none.
        ("placement=deepscale,depth=1", {}, "model.depth=1 is too small for model.placement=deepscale, .* write 2 or"),
        ("placement=peri,init=published", {}, "model.init=published: .* model.placement=peri .* plain, gpt2, scale"),
        ("rival=prores,init=scale", {}, "rival=prores says both placement and init; .* placement=pre,init="),
        ("rival=subln,init=scale", {}, "rival=subln says both placement and init; .* placement=subln,init="),
        ("", {"init": "plain"}, "ScaleInit's, and model.init=plain; write model.init=scale"),
        ("", {"placement": "peri"}, "after_attn is not the last weight of one; write model.depth_factor=weight"),
        ("", {"init_targets": "v"}, "v is not the last .* or leave model.init_targets out"),
        ("", {"mix_share": "1.5"}, "model.mix_share=1.5 must be between 0.0 and 1.0"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_one_line(arg, options, says):
    if options:
        options = {"depth_factor": "multiplier"} | options
    with pytest.raises(UserError, match=says):
        load(f"{CONFIGS}/dense.py:tiny,{arg}", [(f"model.{key}", value) for key, value in options.items()])


def test_a_runs_own_config_is_a_config(tmp_path):
    path = tmp_path / "config.json"
    config = fill_sizes(load("configs/dense.py:depth=2,width=32"))
    write_json(path, to_dict(config))
    assert load(str(path)) == config
    assert load(str(path), [("model.depth", "3")]).model.depth == 3
    for text in ("{", "[]", '{"modle": {}}'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"config\.json|modle"):
            load(str(path))
