"""What placements do with numbers that may be traced. JAX stands here, apart from the equations."""

from typing import Any


def choose(condition: Any, x: Any, y: Any) -> Any:
    """x if the condition holds, else y; the condition is Python's or traced."""
    if isinstance(condition, bool):
        return x if condition else y
    import jax  # a command that is mistyped asks for the names here, and does without

    return jax.tree.map(lambda a, b: jax.numpy.where(condition, a, b), x, y)


def like(factor: Any, x: Any) -> Any:
    """A factor in the stream's dtype: a traced float32 one would turn a bfloat16 stream into float32."""
    return factor.astype(x.dtype) if hasattr(factor, "astype") and hasattr(x, "dtype") else factor
