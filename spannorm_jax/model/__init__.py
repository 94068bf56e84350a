import spannorm_jax.model.rivals  # noqa: F401 (they enter the table of placements)
