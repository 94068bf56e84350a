"""XLA's text of a compiled program (`as_text()`): instructions, and how often each runs."""

import math
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple


class Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    inside: str  # the parentheses: operands; of a parameter, its number
    attributes: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.inside)

    def called(self, key: str) -> str:
        """The computation that the attribute `key`, or one of `key|other`, names."""
        match = re.search(rf"\b(?:{key})=%([\w.\-]+)", self.attributes)
        if match is None:
            raise ValueError(f"{self.name} is written in an unknown way: no {key} in {self.attributes[:100]!r}")
        return match[1]

    def branches(self) -> list[str]:
        """The computations of a conditional; of `lax.cond` the first is the false function."""
        several = re.search(r"\bbranch_computations=\{([^}]*)\}", self.attributes)
        if several:
            return re.findall(r"%([\w.\-]+)", several[1])
        return [self.called("false_computation"), self.called("true_computation")]


Computation = dict[str, Instruction]  # by name, in the program's order
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*?)\)(?:, (.*))?$")
_ARRAY = re.compile(r"\b(?:(pred)|[a-z]+(\d+)\w*)\[([\d,<=]*)\]")


class Module:
    """The parsed text; `num_devices` that the program runs on."""

    def __init__(self, hlo: str):
        self.computations: dict[str, Computation] = {}
        self.entry = name = ""
        for line in hlo.splitlines():
            if match := _COMPUTATION.match(line):
                name = match[2]
                self.computations[name] = {}
                self.entry = name if match[1] else self.entry
            elif match := _LINE.match(line):
                self.computations[name][match[1]] = Instruction(*match.groups(default=""))
        sizes = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", hlo.partition("\n")[0])
        self.num_devices = math.prod(map(int, sizes))

    def shape_of(self, user: Instruction, operand: str) -> str:
        """The shape's text of an operand."""
        return self.computations[self._home[user.name]][operand].shape

    @cached_property
    def _home(self) -> dict[str, str]:
        """Instruction -> the computation that it stands in: names are unique in a module."""
        return {name: home for home, instructions in self.computations.items() for name in instructions}

    def trips(self, loop: Instruction) -> int | None:
        """How often the loop's body runs; None if only the run knows.

        A CPU's and a GPU's text says it. In a TPU's it is the one constant that the condition compares with.
        """
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations[loop.called("condition")].values()
        compares = [made for made in condition if made.opcode == "compare"]
        constants = [int(made.inside) for made in condition if made.opcode == "constant" and made.inside.isdecimal()]
        return constants[0] if len(compares) == len(constants) == 1 else None

    def total(self, cost: Callable[[Instruction], float], computation: str = "") -> float:
        """The sum of `cost` over a run: loops multiplied out, the cheapest branch of each condition.

        A loop whose turns are unknown counts once.
        """
        total = 0.0
        for made in self.computations[computation or self.entry].values():
            if made.opcode == "while":
                total += (self.trips(made) or 1) * self.total(cost, made.called("body"))
            elif made.opcode == "conditional":
                total += min(self.total(cost, branch) for branch in made.branches())
            elif made.opcode == "call":
                total += self.total(cost, made.called("to_apply"))
            else:
                total += cost(made)
        return total

    def loops(self, computation: str = "") -> Iterator[Instruction]:
        """Every loop of a run, each once."""
        for made in self.computations[computation or self.entry].values():
            called = {"while": "body", "call": "to_apply"}.get(made.opcode)
            inner = made.branches() if made.opcode == "conditional" else [made.called(called)] if called else []
            if made.opcode == "while":
                yield made
            for name in inner:
                yield from self.loops(name)


def array_bytes(shape: str) -> list[int]:
    """Bytes of each array of a shape's text."""
    return [
        math.ceil((8 if pred else int(bits)) * math.prod(int(n.lstrip("<=")) for n in dims.split(",") if n) / 8)
        for pred, bits, dims in _ARRAY.findall(shape)
    ]
