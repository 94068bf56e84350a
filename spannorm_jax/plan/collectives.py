"""What a compiled step sends between devices, read from XLA's text of it (`compiled.as_text()`).

Bytes are those that one device receives, by the usual algorithms: of n devices in a group, an all-gather brings all of
its result but the device's own share, (n-1)/n of it; a reduce-scatter n-1 parts of the size of its result; an
all-reduce is the one after the other, 2 (n-1)/n of the array; an all-to-all brings (n-1)/n of the result; a collective
permute all of it.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "collective_permute")


@dataclass(frozen=True)
class Collective:
    """One array's way between devices. An operation that XLA has combined from several is as many of these.

    Attributes:
      kind: one of KINDS.
      bytes: that a device receives each time.
      group: devices that exchange among themselves; of a collective permute, the length of its longest chain.
      count: times that a run of the program does it; loops are multiplied out.
      branch: of each conditional around it, from the outermost, the branch it is in: of `lax.cond` 0 is the false
        function, 1 the true one. (): it is done in any case.
      sliced: an all-reduce of whose result a device only uses a slice: TPUs' and GPUs' compilers make a reduce-scatter
        of the two, which brings half of `bytes`. XLA on a CPU does not.
      name: where in the program it is: JAX's scopes, of one of those that XLA has combined.
    """

    kind: str
    bytes: int
    group: int
    count: int = 1
    branch: tuple[int, ...] = ()
    sliced: bool = False
    name: str = ""

    @property
    def total(self) -> int:
        """Bytes that a device receives by it in a run of the program that takes its branch."""
        return self.bytes * self.count


def collectives(hlo: str) -> list[Collective]:
    """The collectives of a run of the program whose text this is, in the program's order; none among one device.

    Raises:
      ValueError: a loop that holds collectives runs for a number of times that XLA does not know, or a group of
        devices is written in a way that is unknown here.
    """
    module = _parse(hlo)
    return [found for found in _walk(module, module.entry, 1, ()) if found.count and found.group > 1]


# ---- text -> instructions ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Instruction:
    name: str
    shapes: list[int]  # bytes of each array of the result
    opcode: str
    operands: list[str]
    attributes: str  # all that follows; of a parameter, its number


@dataclass
class _Module:
    num_devices: int
    computations: dict[str, dict[str, _Instruction]] = field(default_factory=dict)
    entry: str = ""


_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,<=]*)\]")
_PARENTHESIS = re.compile(r"[()]")
_NAME = re.compile(r"%([\w.\-]+)")


def _parse(hlo: str) -> _Module:
    header = hlo.partition("\n")[0]
    counts = [int(n) for n in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header)]
    module = _Module(math.prod(counts))
    current: dict[str, _Instruction] = {}
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            current = module.computations[match[2]] = {}
            module.entry = match[2] if match[1] else module.entry
        elif match := _INSTRUCTION.match(line):
            made = _instruction(match[1], line[match.end() :])
            current[made.name] = made
    return module


def _instruction(name: str, text: str) -> _Instruction:
    """`TYPE opcode(operands), attributes`, where the type may be a tuple."""
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    kind, text = text[:end], text[end:].lstrip()
    start = text.index("(")
    end = _closing(text, start)
    inside, rest = text[start:end], text[end:]
    opcode = text[:start]
    attributes = inside.strip("()") if opcode == "parameter" else rest
    return _Instruction(name, _sizes(kind), opcode, _NAME.findall(inside), attributes)


def _closing(text: str, start: int) -> int:
    """The index after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in _PARENTHESIS.finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    raise ValueError(f"unbalanced parentheses in {text[:200]!r}")


def _sizes(kind: str) -> list[int]:
    def size(match: re.Match) -> int:
        bits = 8 if match[1] == "pred" else int(match[2])
        return math.ceil(bits * math.prod(int(n.lstrip("<=")) for n in match[3].split(",") if n) / 8)

    return [size(match) for match in _ARRAY.finditer(kind)]


# ---- instructions -> collectives -----------------------------------------------------------------


def _walk(module: _Module, computation: str, count: int, branch: tuple[int, ...]) -> Iterator[Collective]:
    instructions = module.computations[computation]
    for made in instructions.values():
        kind = made.opcode.removesuffix("-done").replace("-", "_")
        if kind in KINDS:
            # An operation in two halves has its shape in the second, all else in the first.
            start = instructions[made.operands[0]] if made.opcode.endswith("-done") else made
            yield from _of(module, computation, kind, made, start, count, branch)
        elif made.opcode == "while":
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', made.attributes)
            for part, more in (("condition", 1), ("body", 0)):
                for found in _walk(module, _called(made, part), count, branch):
                    if not trips:
                        raise ValueError(f"how often the loop {made.name}, which holds collectives, runs is not known")
                    yield replace(found, count=found.count * (int(trips[1]) + more))
        elif made.opcode == "conditional":
            for i, called in enumerate(_branches(made)):
                yield from _walk(module, called, count, (*branch, i))
        elif made.opcode in ("call", "async-start", "fusion"):
            yield from _walk(module, _called(made, "calls|to_apply"), count, branch)


def _found(pattern: str, made: _Instruction) -> str:
    """The first group of a pattern that an instruction's attributes must hold."""
    match = re.search(pattern, made.attributes)
    if match is None:
        raise ValueError(f"{made.name} is written in an unknown way: {pattern} is not in {made.attributes[:100]!r}")
    return match[1]


def _called(made: _Instruction, key: str) -> str:
    return _found(rf"\b(?:{key})=%([\w.\-]+)", made)


def _branches(made: _Instruction) -> list[str]:
    several = re.search(r"\bbranch_computations=\{([^}]*)\}", made.attributes)
    if several:
        return _NAME.findall(several[1])
    return [_called(made, "false_computation"), _called(made, "true_computation")]


def _of(
    module: _Module,
    computation: str,
    kind: str,
    made: _Instruction,
    start: _Instruction,
    count: int,
    branch: tuple[int, ...],
) -> Iterator[Collective]:
    if kind == "collective_permute":
        pairs = [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", _pairs(start))]
        group = _longest_chain(pairs)
        moved = float(group > 1)
    else:
        group = _group(start, module.num_devices)
        share = (group - 1) / group
        moved = {"all_reduce": 2 * share, "reduce_scatter": group - 1}.get(kind, share)
    name = re.search(r'op_name="([^"]*)"', start.attributes)
    # A split all-to-all has a part of its one array for each device; of all others each part is an array by itself.
    sizes = [sum(made.shapes)] if kind == "all_to_all" else made.shapes
    for i, size in enumerate(sizes):
        sliced = kind == "all_reduce" and _only_sliced(module, computation, made, i)
        yield Collective(kind, round(moved * size), group, count, branch, sliced, name[1] if name else "")


def _pairs(start: _Instruction) -> str:
    return _found(r"source_target_pairs=(\{(?:\{[\d,]*\},?)*\})", start)


def _longest_chain(pairs: list[tuple[int, int]]) -> int:
    """Devices along the longest way from one to the next; 1 if all send to themselves."""
    following = {a: b for a, b in pairs if a != b}
    longest = 1
    for first in following:
        device: int | None = following[first]
        length = 1
        while device != first and device is not None:
            device, length = following.get(device), length + 1
        longest = max(longest, length)
    return longest


def _group(start: _Instruction, num_devices: int) -> int:
    """Devices of a group, in each of the three ways that XLA writes them."""
    text = start.attributes.partition("replica_groups=")[2]
    if match := re.match(r"\[\d+,(\d+)\]", text):  # [groups, devices of a group]<=[...]
        return int(match[1])
    if match := re.match(r"\{\{([\d,]+)\}", text):
        return len(match[1].split(","))
    if match := re.match(r"mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):  # mesh['a'=2,'b'=4] {'b'}, or {'b':(1)2}, a part
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", match[1]))
        return math.prod(
            int(part or sizes[axis]) for axis, part in re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", match[2])
        )
    if text.startswith("{}") or not text:
        return num_devices
    raise ValueError(f"the devices of {start.name} are written in an unknown way: {text[:100]!r}")


_SAME_ELEMENTS = ("bitcast", "copy", "reshape", "transpose", "convert")


def _only_sliced(module: _Module, computation: str, made: _Instruction, element: int) -> bool:
    """Whether each use of one array of the result is a slice of it."""
    if len(made.shapes) == 1:
        return _uses_slice(module, computation, made.name)
    parts = [
        user.name
        for user in module.computations[computation].values()
        if user.operands == [made.name] and re.search(rf"\bindex={element}\b", user.attributes)
    ]
    return bool(parts) and all(_uses_slice(module, computation, part) for part in parts)


def _uses_slice(module: _Module, computation: str, name: str) -> bool:
    users = [user for user in module.computations[computation].values() if name in user.operands]

    def slices(user: _Instruction) -> bool:
        if user.opcode == "dynamic-slice":
            return user.operands[0] == name
        if user.opcode in _SAME_ELEMENTS:
            return _uses_slice(module, computation, user.name)
        if user.opcode not in ("fusion", "call"):
            return False
        called = _called(user, "calls|to_apply")
        numbers = {str(i) for i, operand in enumerate(user.operands) if operand == name}
        inside = module.computations[called].values()
        parameters = [x.name for x in inside if x.opcode == "parameter" and x.attributes in numbers]
        return all(_uses_slice(module, called, parameter) for parameter in parameters)

    return bool(users) and all(slices(user) for user in users)
