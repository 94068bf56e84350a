import numpy as np
import pytest

from spannorm_jax.data.tokenizer import BYTES


@pytest.mark.parametrize("text", ["", "def f(x):\n\treturn x\n", "naïve €  \U0001f600 \x00"])
def test_text_survives_the_round_trip(text):
    tokens = BYTES.encode(text.encode())
    assert tokens.dtype == BYTES.dtype == np.uint8
    assert BYTES.decode(tokens) == text


def test_a_byte_is_a_token():
    np.testing.assert_array_equal(BYTES.encode("aé".encode()), [0x61, 0xC3, 0xA9])


def test_no_bytes_can_forge_the_end_of_text():
    every_byte = bytes(range(256)) + b"\xff\xff"
    tokens = BYTES.encode(every_byte)
    assert BYTES.end_of_text not in tokens
    assert BYTES.decode(tokens) == every_byte.decode(errors="replace")


def test_end_of_text_decodes_to_nothing_and_half_a_character_to_a_mark():
    euro = BYTES.encode("€".encode())
    assert BYTES.decode(np.append(euro, BYTES.end_of_text)) == "€"
    assert BYTES.decode(euro[:2]) == "\ufffd"


def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="300"):
        BYTES.decode(np.array([65, 300], np.int32))


def test_token_bytes_count_the_text():
    text = "naïve €".encode()
    tokens = np.append(BYTES.encode(text), BYTES.end_of_text)
    assert BYTES.token_bytes.shape == (BYTES.vocab_size,)
    assert BYTES.token_bytes[tokens].sum() == len(text)
