"""A run's tokenizer as a tokenizer.json that transformers reads, and back. End-of-text is a special token there.

Its string stands for it only when it decodes: `split_special_tokens` keeps texts from forging it.
"""

import json
from typing import Any

from spannorm_jax.data.bpe import byte_characters
from spannorm_jax.data.tokenizer import Tokenizer

END_OF_TEXT = "<|endoftext|>"
_SPECIAL = {"content": END_OF_TEXT, "normalized": False, "special": True}
_SPECIAL |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)


def tokenizer_files(tokenizer: Tokenizer, seq_len: int) -> dict[str, Any]:
    """Name of a file -> its JSON."""
    end = tokenizer.end_of_text
    made = json.loads(tokenizer.source) if tokenizer.source else _bytes()
    added = made.get("added_tokens") or [{"id": end} | _SPECIAL]
    special = {name: value for name, value in added[0].items() if name != "id"}
    made |= {"added_tokens": added, "decoder": made.get("decoder") or _byte_level(use_regex=True)}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # what version 5 calls it older readers do not know
        "model_max_length": seq_len,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "model_input_names": ["input_ids", "attention_mask"],  # version 4 would add token_type_ids, which none takes
        "added_tokens_decoder": {str(end): special},
        # Documents begin after an end of text.
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), special["content"]),
    }
    return {"tokenizer.json": made, "tokenizer_config.json": config}


def _bytes() -> dict[str, Any]:
    """A BPE of no merges whose ids are bytes. 255, which UTF-8 never has, is end-of-text."""
    vocab = {character: byte for byte, character in enumerate(byte_characters()[:-1])} | {END_OF_TEXT: 255}
    return {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding", "normalizer")),
        "pre_tokenizer": _byte_level(use_regex=False),
        "post_processor": None,
        "model": {
            "type": "BPE",
            **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [],
        },
    }


def run_tokenizer_json(values: dict[str, Any], end_of_text: int) -> str:
    """A tokenizer.json as `bpe.load` takes it: of its added tokens the one that ends a document. "": it is bytes."""
    if values.get("model", {}).get("vocab") == _bytes()["model"]["vocab"]:
        return ""
    added = [token for token in values.get("added_tokens") or [] if token["id"] == end_of_text]
    added = added or [{"id": end_of_text} | _SPECIAL]
    unused = dict.fromkeys(("truncation", "padding", "post_processor"))  # what would cut texts, or add to them
    return json.dumps(values | unused | {"added_tokens": added}, ensure_ascii=False)


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
