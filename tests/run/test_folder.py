"""A run's folder: lines that a crash has left."""

import json

import pytest

from spannorm_jax.durable import append_line
from spannorm_jax.errors import UserError
from spannorm_jax.run.folder import keep_lines_until


def test_half_a_line_is_dropped_and_a_broken_one_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        append_line(path, {"step": step})
    path.write_text(path.read_text() + '{"step": 4, "lo')
    append_line(path, {"step": 4})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    keep_lines_until(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    for broken in ('{"step": 1}\n{"st\n{"step": 3}\n', '{"step": 1}\n{"step": 1}\n', '{"step": 1}\n[]\n'):
        path.write_text(broken)
        with pytest.raises(UserError, match=r"metrics\.jsonl line 2 is damaged"):
            keep_lines_until(path, 9)
        assert path.read_text() == broken
