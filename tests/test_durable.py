"""What is written: lines and files that any reader of JSON takes."""

import errno
import json
import os
import resource

import pytest

from spannorm_jax.durable import append_line, to_json, unwritable, write_json


def test_every_number_in_a_file_is_json(tmp_path):
    value = {"a": float("nan"), "b": [float("inf"), 1.5, {"c": -float("inf")}], "d": (2, "NaN"), "e": True, "f": None}
    plain_value = {"a": None, "b": [None, 1.5, {"c": None}], "d": [2, "NaN"], "e": True, "f": None}

    def strict(text):
        return json.loads(text, parse_constant=lambda name: pytest.fail(name))

    append_line(tmp_path / "lines", value)
    write_json(tmp_path / "file", value)
    for text in (to_json(value), (tmp_path / "lines").read_text(), (tmp_path / "file").read_text()):
        assert strict(text) == plain_value


@pytest.mark.parametrize("before", [None, b"", b'{"a": 1}\n', b'{"a": 1}\n{"b'])
def test_a_line_that_cannot_be_written_leaves_no_part_of_it_and_no_empty_file(tmp_path, before):
    path = tmp_path / "lines"
    if before is not None:
        path.write_bytes(before)
    room = len((before or b"").rpartition(b"\n")[0]) + 4  # for a part of the line
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, usual[1]))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            append_line(path, {"long": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([b'{"a": 1}\n'] if before else [])


def test_causes_that_go_in_a_ring_have_an_end():
    ring = [RuntimeError(str(i)) for i in range(3)]
    for i, error in enumerate(ring):
        error.__cause__ = ring[(i + 1) % 3]
    assert unwritable(ring[0]) is None
    ring[-1].__cause__ = OSError(errno.ENOSPC, "no room")
    assert unwritable(ring[0]) == "the disk is full"
