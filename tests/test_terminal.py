"""What reaches a terminal is seen, and commands nothing."""

import sys
import unicodedata

import pytest

from spannorm_jax.command import run_command
from spannorm_jax.errors import UserError, one_line, visible


def test_every_character_is_itself_or_its_escape():
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        # Cc: control characters; Cs: lone halves; and the explicit embeddings, overrides and isolates of direction.
        command = unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t"
        command |= unicodedata.bidirectional(character) in (
            "LRE",
            "RLE",
            "PDF",
            "LRO",
            "RLO",
            "LRI",
            "RLI",
            "FSI",
            "PDI",
        )
        shown = visible(character)
        assert (shown == character) != command
        if command:
            assert shown.isascii() and shown.isprintable() and eval(f"'{shown}'") == character


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mb\x7f", "a\\x1b[31mb\\x7f"),
        ("a\n\tb\r\nc", "a b c"),  # one line
        ("run\u202efdp.json", "run\\u202efdp.json"),
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
