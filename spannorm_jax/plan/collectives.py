"""What a compiled step sends between devices, read from XLA's text of it (`compiled.as_text()`).

Bytes are those that one device receives, by the usual algorithms: of n devices in a group, an all-gather brings all of
its result but the device's own share, (n-1)/n of it; a reduce-scatter n-1 parts of the size of its result; an
all-reduce is the one after the other, 2 (n-1)/n of the array; an all-to-all brings (n-1)/n of the result; a collective
permute all of it, from one device.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "collective_permute")


@dataclass(frozen=True)
class Collective:
    """One array's way between devices. An operation that XLA has combined from several is as many of these."""

    kind: str  # one of KINDS
    bytes: int  # that a device receives each time
    group: int  # devices that exchange among themselves
    count: int = 1  # times that a run of the program does it; loops are multiplied out
    # Of each conditional around it, from the outermost, the branch it is in: of `lax.cond` 0 is the false function.
    branch: tuple[int, ...] = ()
    # An all-reduce of whose result a device only uses a slice: TPUs' and GPUs' compilers make a reduce-scatter of the
    # two, which brings half of `bytes`. XLA on a CPU does not.
    sliced: bool = False
    name: str = ""  # where in the program it is: JAX's scopes, of one of those that XLA has combined

    @property
    def total(self) -> int:
        """Bytes that a device receives by it in a run of the program that takes its branch."""
        return self.bytes * self.count


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    inside: str  # the parentheses: operands; of a parameter, its number
    attributes: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.inside)


_Module = dict[str, dict[str, _Instruction]]  # computation -> name -> instruction
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*?)\)(?:, (.*))?$")


def collectives(hlo: str) -> list[Collective]:
    """The collectives of a run of the program whose text this is, in the program's order; none among one device.

    Raises:
      ValueError: a loop that holds collectives runs for a number of times that XLA does not know, or a group of
        devices is written in a way that is unknown here.
    """
    module: _Module = {}
    entry = name = ""
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[2]
            module[name] = {}
            entry = name if match[1] else entry
        elif match := _LINE.match(line):
            module[name][match[1]] = _Instruction(*match.groups(default=""))
    sizes = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", hlo.partition("\n")[0])
    return [one for one in _walk(module, entry, math.prod(map(int, sizes))) if one.count and one.group > 1]


def _walk(module: _Module, computation: str, num_devices: int) -> Iterator[Collective]:
    for made in module[computation].values():
        kind = made.opcode.removesuffix("-done").replace("-", "_")
        if kind in KINDS:
            yield from _arrays(module, computation, kind, made, num_devices)
        elif made.opcode == "while":
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', made.attributes)
            for part, more in (("condition", 1), ("body", 0)):
                for one in _walk(module, _called(made, part), num_devices):
                    if not trips:
                        raise ValueError(f"how often the loop {made.name}, which holds collectives, runs is not known")
                    yield replace(one, count=one.count * (int(trips[1]) + more))
        elif made.opcode == "conditional":
            several = re.search(r"\bbranch_computations=\{([^}]*)\}", made.attributes)
            branches = [_called(made, "false_computation"), _called(made, "true_computation")] if not several else []
            for i, called in enumerate(branches or re.findall(r"%([\w.\-]+)", several[1] if several else "")):
                yield from (replace(one, branch=(i, *one.branch)) for one in _walk(module, called, num_devices))
        elif made.opcode in ("call", "async-start", "fusion"):
            yield from _walk(module, _called(made, "calls|to_apply"), num_devices)


def _called(made: _Instruction, key: str) -> str:
    match = re.search(rf"\b(?:{key})=%([\w.\-]+)", made.attributes)
    if match is None:
        raise ValueError(f"{made.name} is written in an unknown way: no {key} in {made.attributes[:100]!r}")
    return match[1]


def _arrays(module: _Module, computation: str, kind: str, made: _Instruction, num_devices: int) -> Iterator[Collective]:
    # An operation in two halves has its shape in the second, all else in the first.
    start = module[computation][made.operands[0]] if made.opcode.endswith("-done") else made
    if kind == "collective_permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", start.attributes.partition("source_target_pairs=")[2])
        group = 2 if any(a != b for a, b in pairs) else 1
        moved = 1.0
    else:
        group = _group(start, num_devices)
        share = (group - 1) / group
        moved = {"all_reduce": 2 * share, "reduce_scatter": group - 1}.get(kind, share)
    sizes = [
        math.ceil((8 if pred else int(bits)) * math.prod(int(n.lstrip("<=")) for n in dims.split(",") if n) / 8)
        for pred, bits, dims in re.findall(r"\b(?:(pred)|[a-z]+(\d+)\w*)\[([\d,<=]*)\]", made.shape)
    ]
    # A split all-to-all has a part of its one array for each device; of all others each part is an array by itself.
    sizes = [sum(sizes)] if kind == "all_to_all" else sizes
    name = re.search(r'op_name="([^"]*)"', start.attributes)
    users = module[computation].values()
    for i, size in enumerate(sizes):
        parts = [made.name]
        if len(sizes) > 1:
            one = re.compile(rf"\bindex={i}\b")
            parts = [user.name for user in users if user.operands == [made.name] and one.search(user.attributes)]
        sliced = kind == "all_reduce" and bool(parts) and all(_only_sliced(module, computation, p) for p in parts)
        yield Collective(kind, round(moved * size), group, sliced=sliced, name=name[1] if name else "")


def _group(start: _Instruction, num_devices: int) -> int:
    """Devices of a group, in each of the three ways that XLA writes them."""
    text = start.attributes.partition("replica_groups=")[2]
    if match := re.match(r"\[\d+,(\d+)\]", text):  # [groups, devices of a group]<=[...]
        return int(match[1])
    if match := re.match(r"\{\{([\d,]+)\}", text):
        return len(match[1].split(","))
    if match := re.match(r"mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):  # mesh['a'=2,'b'=4] {'b'}, or {'b':(1)2}, a part
        sizes, axes = (
            dict(re.findall(r"'([^']*)'=(\d+)", match[1])),
            re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", match[2]),
        )
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if text.startswith("{}") or not text:
        return num_devices
    raise ValueError(f"the devices of {start.name} are written in an unknown way: {text[:100]!r}")


def _only_sliced(module: _Module, computation: str, name: str) -> bool:
    """Whether each use of a result is a slice of it, also of its elements in another form, or within a fusion."""

    def slices(user: _Instruction) -> bool:
        if user.opcode == "dynamic-slice":
            return user.operands[0] == name
        if user.opcode in ("bitcast", "copy", "reshape", "transpose", "convert"):
            return _only_sliced(module, computation, user.name)
        if user.opcode not in ("fusion", "call"):
            return False
        called = _called(user, "calls|to_apply")
        numbers = {str(i) for i, operand in enumerate(user.operands) if operand == name}
        parameters = [x.name for x in module[called].values() if x.opcode == "parameter" and x.inside in numbers]
        return all(_only_sliced(module, called, parameter) for parameter in parameters)

    users = [user for user in module[computation].values() if name in user.operands]
    return bool(users) and all(map(slices, users))
