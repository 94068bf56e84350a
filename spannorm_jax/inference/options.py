"""What may be asked of sampling, and what of it cannot be; read without JAX."""

import math
from dataclasses import dataclass

from spannorm_jax.errors import UserError


@dataclass(frozen=True)
class SampleOptions:
    max_tokens: int = 200  # new tokens a prompt, at most; an end of text comes earlier
    temperature: float = 0.8  # of the softmax; 0: always the likeliest token
    top_k: int = 40  # only the likeliest k tokens are drawn; 0, or the vocabulary or more: all of them
    seed: int = 0  # a row's text depends on its prompt, its place among the prompts and this
    max_cache_mib: int = 4096  # keys and values of all prompts; above it the request is refused


_LEAST = {"max_tokens": 1, "temperature": 0, "top_k": 0, "seed": 0, "max_cache_mib": 1}


def check_options(options: SampleOptions) -> None:
    """Raises UserError for the first option that is out of range."""
    for name, least in _LEAST.items():
        value = getattr(options, name)
        if not math.isfinite(value) or value < least:
            raise UserError(f"--{name} {value} cannot be; write {least} or more")
        if value > 2**31 - 1:
            raise UserError(f"--{name} {value} is too large; write {2**31 - 1} or less")
