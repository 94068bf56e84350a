"""Sweeps that bisect: which runs are chosen next, by how others ended, and that the ceilings are always the same."""

import collections
import itertools
import os
import random
import signal

import pytest
from processes import LIMIT_S, finish, launch

from spannorm_jax.errors import UserError
from spannorm_jax.sweep import __main__ as command
from spannorm_jax.sweep.bisection import Bisection, cells_of, chances
from spannorm_jax.sweep.definition import bisects, ladder, seeds
from spannorm_jax.sweep.expansion import expand

CONFIG = """
from spannorm_jax.config_file import default_config, parse_arg
from spannorm_jax.sweep.definition import bisects, ladder, options, product, seeds

def get_config(arg=None):
    parse_arg(arg)
    config = default_config()
    config.model.depth, config.model.width, config.model.num_heads, config.model.ffn_dim = 1, 16, 1, 16
    config.data.seq_len, config.training.steps, config.training.batch_size = 32, 60, 16
    config.eval.tokens, config.eval.batch_size, config.checkpoint.every_steps = 256, 8, 20
    return config

@bisects([1e-5, 2e-2, 3e-2, 4e-2, 1.0, 10.0, 2e8])
def sweep_ceiling(size):
    return seeds(2)

@bisects(ladder(1e-3, 1e-1))
def sweep_many(size):
    return product(seeds(3), options({"model.depth": (1, 2), "model.placement": ("pre", "post", "span")}))
"""


@pytest.fixture(scope="module")
def config(home):
    (home / "ceilings.py").write_text(CONFIG)
    return str(home / "ceilings.py")


@pytest.fixture(scope="module")
def many(config):
    return expand("many", "cpu", config)


def test_a_ladder_is_geometric_and_a_sweep_has_each_point_with_each_rate():
    rates = ladder(1e-3, 1e-1)
    assert (rates[:3], rates[-1], len(rates)) == ([0.001, 0.0012, 0.00144], 0.0954, 26)
    assert all(high / low == pytest.approx(1.2, rel=5e-3) for low, high in itertools.pairwise(rates))
    sweep = bisects([1e-3, 2e-3])(lambda size: seeds(2))
    assert [point[1] for point in sweep("cpu")] == [
        {"seed": seed, "optim.lr": rate} for seed in "01" for rate in ("0.001", "0.002")
    ]


def test_cells_are_what_differs_besides_rate_and_seed(many):
    cells = cells_of(many)
    assert [len(cells), len(cells[0].rungs), len(cells[0].rungs[0])] == [6, 26, 3]
    assert cells[1].title == "(no argument) model.depth=1 model.placement=post"


def worked(sweep, truth, workers, lanes, draw):
    """The ceilings that so many workers find, whose runs end in random order, and the runs that they did."""
    bisection, outcomes = Bisection(sweep, None), {}
    bisection.outcome = lambda run: outcomes.get(run.index)
    at_work, taken = [], set()
    while True:
        while len(at_work) < workers and (group := bisection.next_group(lanes, taken)):
            at_work.append(group)
            taken.update(run.index for run in group)
        if not at_work:
            return [bisection.bracket(cell) for cell in bisection.cells], outcomes
        ended = at_work.pop(draw.randrange(len(at_work)))
        if draw.random() < 0.1:  # its worker is killed, and the runner started again
            taken = {run.index for group in at_work for run in group}
            continue
        outcomes |= {run.index: truth[run.index] for run in ended}


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_one_worker_and_several_and_lanes_find_the_same_ceilings(many, noise):
    """Also where outcomes are not monotone: a seed trains or not by chance."""
    draw = random.Random(1)
    truth = {}
    for cell in cells_of(many):
        limit = draw.randint(0, 26)
        for rung, runs in enumerate(cell.rungs):
            for run in runs:
                trains = (rung < limit) != (draw.random() < noise)
                truth[run.index] = "trained" if trains else draw.choice(["plateau", "collapsed", "diverged"])
    alone, did = worked(many, truth, 1, 1, draw)
    assert not any(of.wanted for of in alone)
    for workers, lanes in ((2, 1), (4, 1), (30, 1), (1, 3), (1, 9), (4, 30)):
        ceilings, _ = worked(many, truth, workers, lanes, draw)
        assert ceilings == alone
    if not noise:  # the first seed bisects, with one run for the top, and the others follow at its ceiling
        counts = collections.Counter((run.config.model.depth, run.config.model.placement, run.config.seed > 0)
                                     for run in many.runs if run.index in did)  # fmt: skip
        assert all(count <= (2 if key[2] else 6) for key, count in counts.items())


def test_a_second_seed_waits_while_other_cells_have_a_first(many):
    """Of the first cell the ceiling of seed 0 is known: 0.00891, the middle of the ladder."""
    bisection, taken, rates = Bisection(many, None), set(), ladder(1e-3, 1e-1)
    known = {
        run.index: "trained" if rung <= 12 else "collapsed"
        for rung, runs in enumerate(bisection.cells[0].rungs)
        for run in runs[:1]
    }
    bisection.outcome = lambda run: known.get(run.index)
    chosen = []
    for _ in range(7):
        (run,) = bisection.next_group(1, taken)
        taken.add(run.index)
        chosen.append((run.config.optim.lr, run.config.seed))
    assert chosen == [(rates[12], 0)] * 5 + [(rates[12], 1), (rates[12], 2)]
    assert bisection.next_group(1, taken) == ()


def test_lanes_that_are_left_take_what_either_outcome_would_need(many):
    bisection = Bisection(many, None)
    bisection.outcome = lambda run: None
    group = bisection.next_group(7, set())
    rates = ladder(1e-3, 1e-1)
    assert [(run.config.optim.lr, run.config.seed) for run in group] == [
        (rates[rung], seed) for rung, seed in ((12, 0), (25, 0), (5, 0), (25, 1), (25, 2), (18, 0), (8, 0))
    ]
    assert len({run.config.model.placement for run in group}) == 1


def test_the_expected_cost_is_the_mean_over_ceilings(config):
    sweep = expand("many", "cpu", config)
    expected = sum(chances(sweep).values()) / 6
    counts = []
    for ceiling in range(27):
        truth = {
            run.index: "trained" if rung < ceiling else "diverged"
            for cell in cells_of(sweep)
            for rung, runs in enumerate(cell.rungs)
            for run in runs
        }
        counts.append(len(worked(sweep, truth, 1, 1, random.Random(2))[1]) / 6)
    assert expected == pytest.approx(sum(counts) / 27)


def test_what_a_bisection_cannot_do_is_refused_in_one_line(config, tmp_path):
    with pytest.raises(UserError, match="sweeps ceiling and many both bisect"):
        expand("ceiling,many", "cpu", config)
    with pytest.raises(UserError, match=r"bisects: .* start one or more of `sweep many local` with one --out"):
        command.main(["many", "slurm", "--config", config, "--out", str(tmp_path)])
    with pytest.raises(UserError, match="the name of a folder of runs is empty"):
        command.main(["many", "local", "--config", config, "--out", ""])


def test_the_table_of_status_has_each_cell_and_its_next_run(config, tmp_path, capsys):
    command.main(["ceiling", "status", "--config", config, "--out", str(tmp_path)])
    assert capsys.readouterr().out == "14 runs: 14 new\n(no argument): ceiling not known so far, next run 3 (0.04)\n"


def ceilings_of(out):
    return [line for line in out.splitlines() if ": ceiling " in line]


@pytest.mark.process
def test_runners_that_are_killed_and_two_at_once_and_lanes_find_one_ceiling(env, config, tmp_path):
    def local(name, *more):
        where = ["--config", config, "--out", tmp_path / name]
        return launch(env, "sweep", "ceiling", "local", *where, *more)

    out, _ = finish(local("alone"))
    found = ceilings_of(out)
    assert len(found) == 1 and "so far" not in found[0] and "[" in found[0]

    killed = local("killed")
    for line in killed.stdout:
        if ": done" in line:
            break
    killed.kill()
    killed.communicate(timeout=LIMIT_S)
    for runner in (two := [local("killed"), local("killed")]):
        out, _ = finish(runner)
        assert ceilings_of(out) == found
    assert len(two) == 2
    out, _ = finish(local("lanes", "--lanes", "6"))
    (ceiling,) = ceilings_of(out)  # a lane that looked ahead may have seen that the lowest rate is too low
    assert ceiling.partition("; not monotone")[0] == found[0] and "(one of 6 lanes)" in out

    again, _ = finish(local("alone"))
    assert ceilings_of(again) == found and "started" not in again
    _, _ = finish(launch(env, "sweep", "ceiling", "report", "--config", config, "--out", tmp_path / "alone"))
    tables = (tmp_path / "alone" / "reports" / "ceiling-cpu" / "tables.md").read_text()
    assert f"| {found[0].partition(': ceiling ')[2]} |" in tables.partition("## Ceilings")[2]


@pytest.mark.process
def test_a_worker_that_dies_leaves_its_ceiling_open_until_it_is_retried(env, config, tmp_path):
    where = ["--config", config, "--out", tmp_path]
    runner = launch(env, "sweep", "ceiling", "local", *where)
    for line in runner.stdout:
        if ": started" in line:
            break
    children = f"/proc/{runner.pid}/task/{runner.pid}/children"
    with open(children, encoding="utf-8") as file:
        os.kill(int(file.read().split()[0]), signal.SIGKILL)
    out, _ = finish(runner, code=1)
    assert "failed: the process at work on it ended by SIGKILL" in out and "so far, next run 3" in out
    out, _ = finish(launch(env, "sweep", "ceiling", "local", "--retry", *where))
    assert "so far" not in ceilings_of(out)[0]
