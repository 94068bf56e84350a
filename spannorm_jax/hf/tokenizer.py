"""A run's tokenizer as a tokenizer.json that transformers reads, and back. End-of-text is a special token there.

Its string stands for it only when it decodes: `split_special_tokens` keeps texts from forging it.
"""

import json
from typing import Any

from spannorm_jax.data.bpe import byte_characters
from spannorm_jax.data.tokenizer import Tokenizer

END_OF_TEXT = "<|endoftext|>"


def tokenizer_files(tokenizer: Tokenizer, seq_len: int) -> dict[str, Any]:
    """Name of a file -> its JSON."""
    end = tokenizer.end_of_text
    made = json.loads(tokenizer.source) if tokenizer.source else _bytes()
    special = {"content": END_OF_TEXT, "single_word": False, "lstrip": False, "rstrip": False}
    special |= {"normalized": False, "special": True}
    made |= {"added_tokens": [{"id": end} | special], "decoder": _byte_level(use_regex=True)}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # what version 5 calls it older readers do not know
        "model_max_length": seq_len,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "added_tokens_decoder": {str(end): special},
        # Documents begin after an end of text.
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
    }
    return {"tokenizer.json": made, "tokenizer_config.json": config}


def _bytes() -> dict[str, Any]:
    """A BPE of no merges whose ids are bytes. 255, which UTF-8 never has, is end-of-text."""
    vocab = {character: byte for byte, character in enumerate(byte_characters()[:-1])} | {END_OF_TEXT: 255}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": None,
        "pre_tokenizer": _byte_level(use_regex=False),
        "post_processor": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [],
        },
    }


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
