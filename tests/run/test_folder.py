"""A run's folder: lines that a crash has left, and configs of older versions."""

import contextlib
import json

import pytest

from spannorm_jax.config import Config, replace, to_dict
from spannorm_jax.durable import append_line
from spannorm_jax.errors import UserError
from spannorm_jax.resolution import fill_sizes
from spannorm_jax.run import lines
from spannorm_jax.run.folder import CONFIG, open_run, read_config
from spannorm_jax.run.metrics import MetricsWriter


def test_half_a_line_is_dropped_and_a_broken_one_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        append_line(path, {"step": step})
    path.write_text(path.read_text() + '{"step": 4, "lo')
    append_line(path, {"step": 4})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    lines.keep_until(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    for broken in ('{"step": 1}\n{"st\n{"step": 3}\n', '{"step": 1}\n{"step": 1}\n', '{"step": 1}\n[]\n'):
        path.write_text(broken)
        with pytest.raises(UserError, match=r"metrics\.jsonl line 2 is damaged"):
            lines.keep_until(path, 9)
        assert path.read_text() == broken


def test_options_that_are_younger_than_a_run_stand_for_what_was_done_before(tmp_path):
    values = to_dict(Config())
    del values["optim"]["name"], values["model"]["variance_exponent"], values["execution"]
    (tmp_path / CONFIG).write_text(json.dumps(values))
    found = read_config(tmp_path)
    assert (found.execution, found.optim) == (Config().execution, Config().optim)
    assert found.model.variance_exponent == 0.0  # its default has changed since


def test_what_the_initialisation_does_not_read_may_differ_where_a_run_goes_on(tmp_path):
    """A run without ScaleInit goes on whatever default its options have now; one with it keeps its own."""
    resolved = fill_sizes(replace(Config(), model__vocab_size=256))
    for init, fits in (("plain", True), ("scale", False)):
        was, now = (replace(resolved, model__init=init, model__variance_exponent=p) for p in (0.0, 1.0))
        with open_run(tmp_path / init, was):
            pass
        refusal = pytest.raises(UserError, match=r"model.variance_exponent=0.0, not 1.0")
        with contextlib.nullcontext() if fits else refusal, open_run(tmp_path / init, now):
            pass


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ({"model": 5}, "model is a group, not 5"),
        ({"execution": 5}, "execution is a group, not 5"),
        ({"model": {"remat": "block"}, "execution": "xla"}, "unknown config key model.remat"),
    ],
)
def test_a_group_that_is_none_is_one_line(tmp_path, broken, words):
    (tmp_path / CONFIG).write_text(json.dumps(to_dict(Config()) | broken))
    with pytest.raises(UserError, match=words):
        read_config(tmp_path)


def test_a_metrics_file_that_is_removed_while_the_run_is_at_work_is_said(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path, None, 0)
    writer.write({"step": 1, "machine_s": {}})
    writer.sync()
    path.unlink()
    with pytest.raises(
        UserError, match=r"metrics.jsonl was removed or replaced while the run was at work; put it back"
    ):
        writer.sync()
    writer.close()
