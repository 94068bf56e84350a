"""What reaches a terminal is seen, and commands nothing."""

import pytest

from spannorm_jax.command import run_command
from spannorm_jax.errors import UserError, one_line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mb\x7f", "a\\x1b[31mb\\x7f"),
        ("\x00\x07\x08\x0e\x80\x9f", "\\x00\\x07\\x08\\x0e\\x80\\x9f"),
        ("a\n\tb\r\nc", "a b c"),  # one line
        ("run\u202efdp.json", "run\\u202efdp.json"),  # what turns the direction of text around
        (
            "\u202a\u202b\u202c\u202d\u2066\u2067\u2068\u2069",
            "\\u202a\\u202b\\u202c\\u202d\\u2066\\u2067\\u2068\\u2069",
        ),
        ("caf\udce9/\x9b2J", "caf\\udce9/\\x9b2J"),  # a byte of a file name that is not UTF-8
        ("é€😀 ｔ \\x1b", "é€😀 ｔ \\x1b"),
    ],
)
def test_an_error_is_one_line_that_a_terminal_shows(capsys, monkeypatch, text, shown):
    def main(argv):
        raise UserError(text)

    with pytest.raises(SystemExit) as exit_:
        run_command(main)
    assert exit_.value.code == 2 and capsys.readouterr().err == f"error: {shown}\n"
    assert one_line(one_line(text)) == one_line(text)  # a line that is quoted in another
