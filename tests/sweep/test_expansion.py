"""From names to runs and folders. A folder's name is for ever: runs that exist are found by it."""

import dataclasses
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from spannorm_jax import config as config_module
from spannorm_jax.config import Config, replace
from spannorm_jax.config_file import load
from spannorm_jax.errors import UserError
from spannorm_jax.sweep import __main__ as command
from spannorm_jax.sweep import cost, expansion
from spannorm_jax.sweep.expansion import expand, folder_name, identity, sweeps_of

SWEEPS = (Path(__file__).parents[2] / "docs/sweeps.md").read_text(encoding="utf-8")
SHIPPED = [
    (f"configs/{file}.py", name)
    for file in ("dense", "moe", "vision", "stability")
    for name in sweeps_of(f"configs/{file}.py")
]
# By these names runs lie on disks of users. A change here takes their runs away from them.
GOLDEN = {
    (
        "configs/dense.py:tiny,placement=span,init=scale",
        (("model.variance_exponent", "0"),),  # the default when this run was named
    ): "span-scale-24x64-lr0.003-seed0-44136fa355",
    ("configs/dense.py:tiny,placement=span,init=scale", ()): "span-scale-24x64-lr0.003-seed0-5cddbe33a9",
    (
        "configs/dense.py:tiny,placement=post,init=plain",
        (("seed", "2"), ("optim.lr", "1e-2")),
    ): "post-plain-24x64-lr0.01-seed2-527a083cfc",
    (
        "configs/moe.py:tiny",
        (("model.init_targets", "ffn_out"), ("model.qk_norm", "true"), ("model.variance_exponent", "0")),
    ): "span-scale-24x64-8experts-lr0.003-seed0-41bb326e12",
}


@functools.cache
def shipped(name, size, file):
    return expand(name, size, file)


@pytest.mark.parametrize(("spec", "overrides"), GOLDEN)
def test_names_of_folders_stay_as_they_are(spec, overrides):
    assert folder_name(load(spec, overrides)) == GOLDEN[spec, overrides]
    assert folder_name(load(spec, overrides[::-1])) == GOLDEN[spec, overrides]


def test_another_process_with_another_hash_seed_gives_the_same_names():
    (spec, overrides), name = list(GOLDEN.items())[-1]
    code = (
        "from spannorm_jax.config_file import load; from spannorm_jax.sweep.expansion import folder_name; "
        f"print(folder_name(load({spec!r}, {overrides!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": "7"})
    assert done.stdout.strip() == name, done.stderr


def test_a_new_option_with_its_default_changes_no_name(monkeypatch):
    """The config of a later version, which has one option more in a group and one group more."""
    before = folder_name(replace(Config(), optim__lr=0.5))
    optim = dataclasses.make_dataclass(
        "OptimConfig", [("nesterov", bool, False)], bases=(config_module.OptimConfig,), frozen=True
    )
    more = dataclasses.make_dataclass("More", [("deep", int, 3)], frozen=True)
    fields = [("optim", optim, dataclasses.field(default_factory=optim)), ("more", more, more())]
    later = dataclasses.make_dataclass("Config", fields, bases=(Config,), frozen=True)
    monkeypatch.setattr(expansion, "Config", later)
    assert folder_name(later(optim=optim(lr=0.5))) == before
    assert folder_name(later(optim=optim(lr=0.5, nesterov=True))) != before
    assert folder_name(later(optim=optim(lr=0.5), more=more(deep=4))) != before


def test_runtime_options_are_no_part_of_what_a_run_is():
    usual = folder_name(Config())
    assert folder_name(replace(Config(), metrics__log_every=7, execution__remat="block", platform="cpu")) == usual
    assert folder_name(replace(Config(), training__batch_size=9)) != usual
    own = {"model.init_targets": ("ffn_out",)}
    assert identity(replace(Config(), model__init_targets=("ffn_out",))) == own | {"model.variance_exponent": 1.0}
    # Plain does not read ScaleInit's options.
    assert identity(replace(Config(), model__init_targets=("ffn_out",), model__init="plain")) == {"model.init": "plain"}


def test_which_of_a_machines_own_sources_the_data_are_is_no_part_of_what_a_run_is():
    """So a run has the name that its sweep gives it, also where its data were carried from another machine."""
    name = {"data.full_name": "python_source/sys_path_01234567/1.0.0"}
    for override, same in ((name, True), ({"data.full_name": "lm1b/1.1.0"}, False)):
        dataset = "python_source/sys_path" if same else "lm1b"
        left_open, named = (
            folder_name(load("configs/dense.py:tiny", tuple(({"data.dataset": dataset} | more).items())))
            for more in ({}, override)
        )
        assert (left_open == named) is same


@pytest.mark.parametrize("size", ["cpu", "gpu"])
@pytest.mark.parametrize(("file", "name"), SHIPPED)
def test_every_shipped_sweep_expands_and_tells_its_cost(file, name, size):
    """The number of its runs and the hours that they take, as its docstring and docs/sweeps.md say."""
    sweep = shipped(name, size, file)
    number = len(sweep.runs)
    said = cost.report(sweep, rate=1e12)
    assert (
        re.match(rf"sweep {name} \({size}\): (about \d+ of )?{number} runs of ", said) and "at 1.00e+12 FLOP/s" in said
    )
    flops = float(re.search(r"FLOPs  (\S+),", said)[1])
    took, unit = re.search(r"time   (\S+) (h|min) ", said).groups()
    seconds, shown = float(took) * (3600 if unit == "h" else 60), {"h": 180, "min": 60}[unit]
    assert seconds == pytest.approx(flops / 1e12, rel=0.01, abs=shown)  # FLOPs of three digits, to 0.1 h or the minute
    if name == "seed":  # it multiplies others
        assert number == 3
        return
    took = re.search(r"time   (.*) at", cost.report(sweep, rate={"cpu": 7e10, "gpu": 4e14}[size]))[1]
    told = re.search(r"(\d+) runs: ([\d.]+ \w+), (\d+) h\.", sweeps_of(file)[name].__doc__)
    if size == "cpu":
        assert told.groups()[:2] == (str(number), took)
        assert re.search(rf"^\| `{name}` \|.*\| {number} \| {took} \|$", SWEEPS, re.MULTILINE)
    else:
        value, unit = took.split()
        assert float(told[3]) == pytest.approx(float(value) / {"h": 1, "min": 60}[unit], abs=0.55)  # rounded twice


def test_the_documents_table_has_all_sweeps_of_the_config_files():
    assert set(re.findall(r"^\| `(\w+)` \|", SWEEPS, re.MULTILINE)) == {name for _, name in SHIPPED}


def test_sweeps_share_their_runs():
    names = {
        name: {run.name for run in shipped(name, "cpu", file).runs}
        for file, name in SHIPPED
        if name in ("lr", "placement_init", "demo", "experts")
    }
    assert len(names["lr"] & names["placement_init"]) == 3 * 2 * 3
    assert len(names["demo"] & names["placement_init"]) == 6  # without experts configs/moe.py gives what dense.py does
    assert len(names["demo"] & names["experts"]) == 3 + 3


def test_names_multiply():
    alone, both = expand("demo", "cpu").runs, expand("demo,seed", "cpu").runs
    assert len(both) == 3 * len(alone) and {run.name for run in alone} < {run.name for run in both}
    assert len(expand("placement_init,lr", "cpu").runs) == len(expand("lr", "cpu").runs)  # joined along what both set
    smaller = expand("demo", "cpu", overrides=[("training.steps", "12")])
    assert all(run.config.training.steps == 12 for run in smaller.runs)
    assert not {run.name for run in smaller.runs} & {run.name for run in shipped("demo", "cpu", "configs/moe.py").runs}


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["dpeth", "list"], ["unknown sweep 'dpeth'", "'depth'"]),
        (["seed", "list"], ["configs/dense.py and configs/moe.py", "--config"]),
        (["demo,lr", "list"], ["no one config file", "demo, lr"]),
        (["lr", "lst"], ["unknown verb 'lst'", "'list'"]),
        (["lr", "list", "3"], ["I goes with run"]),
        (["lr", "run"], ["index"]),
        (["lr", "run", "90"], ["no run 90", "0 to 89"]),
        (["lr", "run", "-1"], ["-1"]),
        (["lr", "run", "0", "--of", "no"], ["has changed", "--of no"]),
        (["lr", "list", "--jobs", "2"], ["--jobs goes with local, not with list"]),
        (["lr", "status", "--retry"], ["--retry goes with local, run, slurm"]),
        (["lr", "local", "--jobs", "0"], ["--jobs 0", "above 0"]),
        (["lr", "local", "--jobs", "4096"], ["--jobs 4096", "cores here"]),
        (["lr", "cost", "--rate", "nan"], ["--rate nan"]),
        (["lr", "list", "--size", "tpu"], ["--size", "'cpu', 'gpu'"]),
        (["lr", "list", "--config.optim.lr=1"], ["are the same run", "--config.KEY"]),
        (["lr", "list", "--config.optim.rl=1"], ["run 0", "optim.rl"]),
        (["lr", "table", "--out", "nowhere"], ["no run of sweep lr (cpu) has started"]),
        (["lr", "list", "--config", "none.py"], ["none.py", "does not exist"]),
        (["lr", "list", "--config", "configs/c4.py"], ["unknown sweep 'lr'", "defines none"]),
    ],
)
def test_mistakes_are_one_line(argv, says):
    with pytest.raises(UserError) as refused:
        command.main(argv)
    assert all(word in str(refused.value) for word in says) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("empty", ["empty", "no point in size cpu"]),
        ("lr,empty", ["no run", "empty yields no point"]),
        ("lr,invalid", ["optim.lr"]),
        ("twice", ["runs 0", "and 1", "are the same run", "metrics.log_every=2"]),
        ("broken", ["tiny.py line", "ZeroDivisionError"]),
        ("invalid", ["run 1", "optim.lr=-1.0"]),
    ],
)
def test_mistakes_of_a_sweeps_author_are_one_line(tiny, name, says):
    if name == "lr,invalid":  # they agree on one rate
        assert len(expand(name, "cpu", tiny).runs) == 1
        return
    with pytest.raises(UserError) as refused:
        expand(name, "cpu", tiny)
    assert all(word in str(refused.value) for word in says)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return None", "line 4: sweep mine: TypeError"),
        ("return lambda: 0", "line 4: sweep mine: TypeError"),
        ("return 1 / 0", "line 5: sweep mine: ZeroDivisionError"),
        ("yield 3", "line 4: sweep mine: TypeError: 3 is no point"),
        ("yield 'tiny', {'optim.lr': 0.1}", "line 4: sweep mine: TypeError: ('tiny', {'optim.lr': 0.1}) is no point"),
        ("return fixed(values={}['sede'])", "line 5: sweep mine: KeyError: 'sede'"),
        ("return helper()", "common.py line 2: sweep mine: NameError"),
    ],
)
def test_what_fails_in_a_sweeps_function_is_told_by_file_line_and_name(tmp_path, monkeypatch, body, says):
    imports = "from spannorm_jax.sweep.definition import fixed\nfrom .common import helper\n\n"
    (tmp_path / "x.py").write_text(f"{imports}def sweep_mine(size):\n    {body}\n")
    (tmp_path / "common.py").write_text("def helper():\n    return missing\n")
    monkeypatch.chdir(tmp_path)
    for file in ("x.py", str(tmp_path / "x.py")):
        with pytest.raises(UserError) as refused:
            expand("mine", "cpu", file)
        where = file.removesuffix("x.py") + ("" if says.startswith("common") else "x.py ")
        assert str(refused.value).startswith(f"config file {where}{says}"), refused.value


@pytest.mark.parametrize("verb", ["list", "cost", "local", "run", "slurm", "status", "table", "report"])
@pytest.mark.parametrize("below", ["", "/runs"])
def test_a_folder_of_runs_that_is_a_file_is_refused_by_every_verb(tiny, tmp_path, verb, below):
    (tmp_path / "file").write_text("")
    index = ["0"] if verb == "run" else []
    with pytest.raises(UserError, match=f"--out {tmp_path}/file{below}: .*/file is not a folder; give another"):
        command.main(["lr", verb, *index, "--config", tiny, "--out", f"{tmp_path}/file{below}"])


def test_list_says_what_each_run_is_and_status_how_far(tiny, tmp_path, capsys):
    assert command.main(["lr", "list", "--config", tiny]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["0", "1", "2"]
    assert lines[1].split()[1:] == [expand("lr", "cpu", tiny).runs[1].name, "(no", "argument)", "optim.lr=0.002"]
    assert command.main(["lr", "status", "--config", tiny, "--out", str(tmp_path / "none" / "yet")]) == 0
    assert capsys.readouterr().out.endswith("3 runs: 3 new\n")
