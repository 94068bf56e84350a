"""Norm placement and ScaleInit for decoder-only language models in JAX."""
