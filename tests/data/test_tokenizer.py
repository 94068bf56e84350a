import numpy as np
import pytest

from spannorm_jax.data.tokenizer import BYTES


@pytest.mark.parametrize("text", ["", "aé", "def f(x):\n\treturn x\n", "naïve €  \U0001f600 \x00"])
def test_a_byte_is_a_token_and_text_survives_the_round_trip(text):
    tokens = BYTES.encode(text.encode())
    assert tokens.dtype == BYTES.dtype == np.uint8 and tokens.tobytes() == text.encode()
    assert BYTES.decode(np.append(tokens, BYTES.end_of_text)) == text
    assert BYTES.token_bytes.shape == (BYTES.vocab_size,) and BYTES.token_bytes[BYTES.end_of_text] == 0
    assert BYTES.token_bytes[tokens].sum() == len(text.encode())


def test_no_bytes_can_forge_the_end_of_text():
    every_byte = bytes(range(256)) + b"\xff\xff"
    tokens = BYTES.encode(every_byte)
    assert BYTES.end_of_text not in tokens
    assert BYTES.decode(tokens) == every_byte.decode(errors="replace")


def test_half_a_character_decodes_to_a_mark_and_ids_outside_the_vocabulary_are_refused():
    assert BYTES.decode(BYTES.encode("€".encode())[:2]) == "\ufffd"
    with pytest.raises(ValueError, match="300"):
        BYTES.decode(np.array([65, 300], np.int32))
