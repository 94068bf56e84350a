"""What is written: lines and files that any reader of JSON takes."""

import json

import pytest

from spannorm_jax.durable import append_line, to_json, write_json


def test_every_number_in_a_file_is_json(tmp_path):
    value = {"a": float("nan"), "b": [float("inf"), 1.5, {"c": -float("inf")}], "d": (2, "NaN"), "e": True, "f": None}
    plain_value = {"a": None, "b": [None, 1.5, {"c": None}], "d": [2, "NaN"], "e": True, "f": None}

    def strict(text):
        return json.loads(text, parse_constant=lambda name: pytest.fail(name))

    append_line(tmp_path / "lines", value)
    write_json(tmp_path / "file", value)
    for text in (to_json(value), (tmp_path / "lines").read_text(), (tmp_path / "file").read_text()):
        assert strict(text) == plain_value
