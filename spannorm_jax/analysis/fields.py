"""Covariances in place of arrays: what a placement's own equation is run on, forward and then backward.

At initialisation and large width each number of a stream is a Gaussian field over the tokens, alike and independent
across the width (Neal 1996; Schoenholz et al. 2017, arXiv 1611.01232; Yang 2019, arXiv 1910.12478). All that matters
of it is its covariance over tokens, (T, T). The output of a branch is a new field, independent of the branch's input
since its weights are, and with a covariance that follows from the input's (`covariances.py`). So a stream is a sum of
independent fields, each times a factor a token, and a `Field` holds that sum. A gradient has the same form: going
back through a branch it meets the same weights transposed, which act on it as if they were drawn anew.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy import ndarray


class Source:
    """A Gaussian field over tokens that is independent of all others. It is known by its identity.

    One that is `common` has the same value in all coordinates of the width, as the mean of fixed positions has.
    """

    def __init__(self, covariance_TxT: ndarray, common: bool = False):
        self.covariance, self.common = covariance_TxT, common


class Mixture:
    """x_t = sum_i a_i(t) s_i(t) of independent sources s_i: Cov(x)_tu = sum_i a_i(t) a_i(u) Cov(s_i)_tu."""

    def __init__(self, parts: dict[Source, ndarray], covariance_TxT: ndarray | None = None):
        self._parts, self._covariance = parts, covariance_TxT

    @classmethod
    def new(cls, covariance_TxT: ndarray, common: bool = False) -> "Mixture":
        """One source, independent of all that was there before."""
        return cls({Source(covariance_TxT, common): np.ones(len(covariance_TxT))}, covariance_TxT)

    @property
    def covariance(self) -> ndarray:
        if self._covariance is None:
            terms = (np.outer(a, a) * source.covariance for source, a in self._parts.items())
            self._covariance = sum(terms, start=np.zeros(2 * (self._tokens,)))
        return self._covariance

    @property
    def _tokens(self) -> int:
        return len(next(iter(self._parts.values())))

    def __add__(self, other: "Mixture") -> "Mixture":
        if self._parts.keys().isdisjoint(other._parts):
            return Mixture(self._parts | other._parts, self.covariance + other.covariance)
        # A source that comes along both ways adds its factors, and not its variances.
        parts = dict(self._parts)
        for source, a in other._parts.items():
            parts[source] = parts[source] + a if source in parts else a
        return Mixture(parts)

    def centred(self) -> "Mixture":
        """Without what all coordinates have in common."""
        own = {source: a for source, a in self._parts.items() if not source.common}
        return self if len(own) == len(self._parts) else Mixture(own)

    def times(self, factor: ndarray | float) -> "Mixture":
        """Times a number, or a number a token (T,)."""
        factor_T = np.broadcast_to(factor, (self._tokens,))
        parts = {source: a * factor_T for source, a in self._parts.items()}
        known = self._covariance
        return Mixture(parts, None if known is None else np.outer(factor_T, factor_T) * known)


@dataclass(frozen=True)
class _Step:
    """An operation that was done: the fields it read and made, and what it does to a gradient on its way back."""

    inputs: tuple[int, ...]
    output: int
    pull: Callable[[Mixture], Mixture]
    is_branch: bool = False


class Tape:
    """The operations on fields, in their order, for the way back."""

    def __init__(self) -> None:
        self._steps: list[_Step] = []
        self._names = itertools.count()

    def field(self, mixture: Mixture) -> "Field":
        return Field(self, next(self._names), mixture)

    def record(
        self, inputs: "tuple[Field, ...]", mixture: Mixture, pull: Callable[[Mixture], Mixture], is_branch: bool = False
    ) -> "Field":
        """The field that an operation makes of its inputs; pull: gradient of the output -> that of each input."""
        made = self.field(mixture)
        self._steps.append(_Step(tuple(x.name for x in inputs), made.name, pull, is_branch))
        return made

    def gradients(
        self, output: "Field", covariance_TxT: ndarray, of: "Iterable[Field]", through_branches: bool = True
    ) -> list[ndarray]:
        """Covariances over tokens (T, T) of the gradients of some fields, for one of the output that is an independent
        field. Without branches only the skip path carries it: sums, factors and norms."""
        names = [field.name for field in of]
        wanted = set(names)
        kept: dict[int, Mixture] = {}
        adjoint = {output.name: Mixture.new(covariance_TxT)}
        for step in reversed(self._steps):
            gradient = adjoint.pop(step.output, None)
            if gradient is None:
                continue
            if step.output in wanted:
                kept[step.output] = gradient
            if step.is_branch and not through_branches:
                continue
            pulled = step.pull(gradient)
            for name in step.inputs:
                adjoint[name] = adjoint[name] + pulled if name in adjoint else pulled
        kept |= adjoint
        nothing = np.zeros_like(covariance_TxT)
        return [kept[name].covariance if name in kept else nothing for name in names]


class Field:
    """Stands for an array (T, D) in a placement's equation: `+`, `-`, a number times it, norms, gains, branches."""

    __array_ufunc__ = None  # a number of NumPy times a field asks the field

    def __init__(self, tape: Tape, name: int, mixture: Mixture):
        self.tape, self.name, self.mixture = tape, name, mixture

    @property
    def covariance(self) -> ndarray:
        """(T, T): mean over the width of x_t x_u."""
        return self.mixture.covariance

    def scaled(self, factor: ndarray | float) -> "Field":
        return self.tape.record((self,), self.mixture.times(factor), lambda g: g.times(factor))

    def normed(self, gain: float, eps: float, centred: bool = False) -> "Field":
        """RMSNorm, or `centred` LayerNorm, which first takes away what all coordinates have in common.

        A norm divides each token by its root mean square, sqrt(Cov_tt + eps), which is a constant at large width. The
        gradient meets the same factor; the projection off the normed vector takes one of its D components away. A token
        of zeros passes no gradient (`layers.inverse_rms`).
        """
        x = self.tape.record((self,), self.mixture.centred(), lambda g: g) if centred else self
        variance_T = np.diag(x.covariance)
        return x.scaled(np.where(variance_T == 0, 0.0, gain / np.sqrt(variance_T + eps)))

    def branch(self, forward: Callable[[ndarray], ndarray], backward: Callable[[ndarray, ndarray], ndarray]) -> "Field":
        """A sub-layer: forward(C) -> covariance of its output, backward(C, G) -> that of the gradient of its input."""
        C = self.covariance
        return self.tape.record(
            (self,), Mixture.new(forward(C)), lambda g: Mixture.new(backward(C, g.covariance)), is_branch=True
        )

    def __add__(self, other: Any) -> "Field":
        if not isinstance(other, Field):
            raise TypeError(f"a field plus {other!r}: a placement adds streams and branches only")
        return self.tape.record((self, other), self.mixture + other.mixture, lambda g: g)

    def __mul__(self, factor: Any) -> "Field":
        if isinstance(factor, Field):
            raise TypeError("a field times a field: a placement multiplies by numbers, gains and norms only")
        return self.scaled(float(factor))

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> "Field":
        return self.scaled(1 / float(divisor))

    def __neg__(self) -> "Field":
        return self.scaled(-1.0)

    def __sub__(self, other: Any) -> "Field":
        return self + -other


# ---- statistics of a covariance ---------------------------------------------------------------------


def variance(covariance_TxT: ndarray) -> float:
    """Mean square over tokens and width."""
    return float(np.mean(np.diag(covariance_TxT)))


def token_correlation(covariance_TxT: ndarray) -> float:
    """Mean over pairs of tokens t != u of C_tu / sqrt(C_tt C_uu): the cosine of their vectors at large width."""
    T, root = len(covariance_TxT), np.sqrt(np.diag(covariance_TxT))
    # A token of zeros has no direction: its cosines are 0.
    cosine = covariance_TxT / np.maximum(np.outer(root, root), np.finfo(float).tiny)
    return float((cosine.sum() - np.trace(cosine)) / (T * (T - 1)))


def effective_rank(covariance_TxT: ndarray) -> float:
    """exp of the entropy of the normalised eigenvalues (Roy & Vetterli 2007), of the uncentred covariance of tokens."""
    if not np.isfinite(covariance_TxT).all():  # the solver would raise
        return math.nan
    eigenvalues = np.maximum(np.linalg.eigvalsh(covariance_TxT), 0)
    share = eigenvalues[eigenvalues > 0] / max(eigenvalues.sum(), np.finfo(float).tiny)
    return math.exp(-float(np.sum(share * np.log(share))))
