"""Errors that are the user's to mend: one clear line, exit code 2, no traceback."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

USER_ERROR_EXIT = 2
DIVERGED_EXIT = 3  # a loss or a gradient is not finite
_LONGEST = 900  # characters of a line


class UserError(Exception):
    """A mistake in what the user asked for.

    The message is one line that says what was wrong, where, and what to write instead. Long messages are cut in the
    middle. Everything else that goes wrong keeps its traceback.
    """

    def __init__(self, message: str):
        super().__init__(message if len(message) <= _LONGEST else f"{message[:400]} ... {message[-400:]}")


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Returns a hint that ends an error line: the nearest valid name, or all of them."""
    names = [str(v) for v in valid]
    close = get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    if len(names) > 12:
        return f"valid ones are {', '.join(sorted(names)[:12])}, ..."
    return f"valid ones are {', '.join(sorted(names))}"


# Control characters but newline and tab, what turns the direction of text around, and lone halves of characters.
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with what would command a terminal, not show on it, as Python writes it: `\\x1b`, `\\u202e`."""

    def escaped(found: re.Match[str]) -> str:
        code = ord(found[0])
        return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"

    return _UNSEEN.sub(escaped, text)


def one_line(text: object) -> str:
    """The text in one line, which a terminal shows as it is."""
    return visible(" ".join(str(text).split()))
