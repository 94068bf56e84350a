"""A sweep is the points that `sweep_NAME(size)` of a config file yields; functions here compose them.

A point is the config argument of a run and its overrides, ("tiny,placement=pre", {"optim.lr": "0.001"}). A sweep is
any iterable of points, so that generators compose as functions do:

    def sweep_lr(size: str) -> Iterable[Point]:
        return product(arguments(placement=("pre", "span")), options({"optim.lr": (1e-3, 3e-3)}))
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

Point = tuple[str, dict[str, str]]
SIZES = ("cpu", "gpu")


Sweep = Callable[[str], Iterable[Point]]


def compares(placement: str, baseline: str) -> Callable[[Sweep], Sweep]:
    """Names the comparison of two placements that a sweep is run for, before it is run.

    `sweep NAME report` then has that baseline and calls the comparison confirmatory, the others exploratory:

        @compares("span", baseline="pre")
        def sweep_lr(size: str) -> Iterable[Point]: ...
    """

    def named(sweep: Sweep) -> Sweep:
        vars(sweep)["compares"] = placement, baseline
        return sweep

    return named


def bisects(rates: Sequence[float]) -> Callable[[Sweep], Sweep]:
    """Each point of a sweep with each of the learning rates, of which only those are run that a bisection asks for.

    The points without the rate and the seed are its cells. Of each the runner finds the highest rate at which every
    seed trains, `report.ceilings` says how; the rates ascend:

        @bisects(ladder(1e-3, 1e-1))
        def sweep_ceiling(size: str) -> Iterable[Point]: ...
    """

    def bisecting(sweep: Sweep) -> Sweep:
        @functools.wraps(sweep)
        def points(size: str) -> Iterable[Point]:
            return product(sweep(size), options({"optim.lr": rates}))

        vars(points)["bisects"] = True
        return points

    return bisecting


def ladder(least: float, greatest: float, factor: float = 1.2) -> list[float]:
    """Rates from `least` to about `greatest`, each a factor above the one before, in three digits."""
    rungs = 1 + round(math.log(greatest / least) / math.log(factor))
    return [float(f"{least * factor**i:.3g}") for i in range(rungs)]


def arguments(**values: Iterable[Any]) -> Iterator[Point]:
    """Each combination of values of a config file's arguments."""
    for chosen in itertools.product(*values.values()):
        yield _argument(dict(zip(values, map(_text, chosen), strict=True))), {}


def options(values: Mapping[str, Iterable[Any]]) -> Iterator[Point]:
    """Each combination of values of options, which go by their dotted keys."""
    for chosen in itertools.product(*values.values()):
        yield "", dict(zip(values, map(_text, chosen), strict=True))


def fixed(argument: str = "", values: Mapping[str, Any] | None = None) -> list[Point]:
    """The one point of an argument, as it is typed, and options: what all runs of a sweep share."""
    return [(argument, {key: _text(value) for key, value in (values or {}).items()})]


def seeds(n: int) -> Iterator[Point]:
    """The seeds 0 to n - 1, which give the initial weights and the order of the data."""
    return options({"seed": range(n)})


def product(*sweeps: Iterable[Point]) -> list[Point]:
    """Each point of one sweep with each of the next, where they agree on what both set.

    So sweeps that share an axis are joined along it: `lr` and `seed` give each rate with each seed,
    also where `lr` has seeds of its own.
    """
    made: list[Point] = [("", {})]
    for points in map(list, sweeps):
        made = [both for left in made for right in points if (both := _both(left, right)) is not None]
    return made


def chain(*sweeps: Iterable[Point]) -> Iterator[Point]:
    """The points of one sweep after those of another."""
    return itertools.chain(*sweeps)


def sweep_seed(size: str) -> Iterable[Point]:
    """Three seeds, to multiply other sweeps by: `demo,seed`."""
    return seeds(3)


def _both(left: Point, right: Point) -> Point | None:
    arguments = _joined(_argument_values(left[0]), _argument_values(right[0]))
    overrides = _joined(left[1], right[1])
    return None if arguments is None or overrides is None else (_argument(arguments), overrides)


def _joined(left: dict[str, str], right: dict[str, str]) -> dict[str, str] | None:
    agree = all(left[key] == right[key] for key in left.keys() & right.keys())
    return left | right if agree else None


def _argument_values(argument: str) -> dict[str, str]:
    """`tiny,placement=pre` as names and values; the bare word is the preset."""
    pairs = (item.partition("=") for item in argument.split(",") if item)
    return {name if equals else "preset": value if equals else name for name, equals, value in pairs}


def _argument(values: Mapping[str, str]) -> str:
    words = [values["preset"]] if "preset" in values else []
    return ",".join(words + [f"{name}={value}" for name, value in values.items() if name != "preset"])


def _text(value: Any) -> str:
    """A value as an override writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(value)
    return str(value)
