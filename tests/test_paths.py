"""Paths as users write them."""

import pytest

from spannorm_jax.errors import UserError
from spannorm_jax.paths import user_path


@pytest.mark.parametrize(
    "text", ["~nobody_of_that_name/x", "hdfs://a/b", "file:///tmp/x", "bad\udce9name", "x" * 300, "a\0b"]
)
def test_a_path_that_cannot_be_is_one_line(text):
    with pytest.raises(UserError) as refusal:
        user_path(text, "--workdir")
    assert "--workdir" in str(refusal.value)
