"""What a measurement is asked for; read without JAX."""

from dataclasses import dataclass

from spannorm_jax.errors import UserError, did_you_mean

USUAL = ("forward", "backward", "update", "skip", "affine")
GROUPS = (*USUAL, "sharpness")  # the last takes as long as all others
TEXTS = ("held_out", "random")


@dataclass(frozen=True)
class Settings:
    """As docs/signal.md has them; 0 stands for a default that the model or the data give."""

    text: str = TEXTS[0]
    tokens: int = 0
    rows: int = 1
    probes: int = 2
    blocks: int = 8
    fit_tokens: int = 0
    only: tuple[str, ...] = USUAL

    def __post_init__(self) -> None:
        """Raises UserError for a value that cannot be."""
        for name, least in (("tokens", 0), ("rows", 1), ("probes", 1), ("blocks", 0), ("fit_tokens", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} {getattr(self, name)} must be {least} or more")
        if self.text not in TEXTS:
            raise UserError(f"--text {self.text!r} is no kind of text; {did_you_mean(self.text, TEXTS)}")
        for group in self.only or ("",):
            if group not in GROUPS:
                raise UserError(f"--only {group!r} is no group; {did_you_mean(group, GROUPS)}")
