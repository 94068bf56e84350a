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

from spannorm_jax.plan.hlo import Instruction, Module, array_bytes

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
    asynchronous: bool = False  # the device computes while it is on its way
    channel: str = ""  # the same for all parts of one exchange
    name: str = ""  # where in the program it is: JAX's scopes, of one of those that XLA has combined

    @property
    def total(self) -> int:
        """Bytes that a device receives by it in a run of the program that takes its branch."""
        return self.bytes * self.count

    @property
    def received(self) -> int:
        """The same, of one that is only sliced as the reduce-scatter that it can be."""
        return self.total // 2 if self.sliced else self.total


def collectives(module: Module) -> list[Collective]:
    """The collectives of a run of the program, in its order; none among one device.

    Raises:
      ValueError: a loop that holds collectives runs for a number of times that XLA does not know, or a group of
        devices is written in a way that is unknown here.
    """
    return [one for one in _walk(module, module.entry) if one.count and one.group > 1]


def _walk(module: Module, computation: str) -> Iterator[Collective]:
    seen = set()
    for made in module.computations[computation].values():
        kind = made.opcode.removesuffix("-done").replace("-", "_")
        if kind in KINDS:
            yield from _arrays(module, computation, kind, made)
        elif made.opcode == "while":
            trips = module.trips(made)
            for part, more in (("condition", 1), ("body", 0)):
                for one in _walk(module, made.called(part)):
                    if trips is None:
                        raise ValueError(f"how often the loop {made.name}, which holds collectives, runs is not known")
                    yield replace(one, count=one.count * (trips + more))
        elif made.opcode == "conditional":
            for i, called in enumerate(made.branches()):
                yield from (replace(one, branch=(i, *one.branch)) for one in _walk(module, called))
        elif made.opcode in ("call", "async-start", "fusion"):
            called = made.called("calls|to_apply")
            hidden = called.startswith("async_collective_fusion")
            for one in _walk(module, called):
                # A TPU's compiler hides one collective behind several fusions, each of which writes it down.
                if not (hidden and one.channel in seen):
                    yield replace(one, asynchronous=one.asynchronous or hidden)
                seen.add(one.channel)


def _arrays(module: Module, computation: str, kind: str, made: Instruction) -> Iterator[Collective]:
    # An operation in two halves has its shape in the second, all else in the first.
    start = module.computations[computation][made.operands[0]] if made.opcode.endswith("-done") else made
    if kind == "collective_permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", start.attributes.partition("source_target_pairs=")[2])
        group = 2 if any(a != b for a, b in pairs) else 1
        moved = 1.0
    else:
        group = _group(start, module.num_devices)
        share = (group - 1) / group
        moved = {"all_reduce": 2 * share, "reduce_scatter": group - 1}.get(kind, share)
    sizes = array_bytes(made.shape)
    # A split all-to-all has a part of its one array for each device; of all others each part is an array by itself.
    sizes = [sum(sizes)] if kind == "all_to_all" else sizes
    name = re.search(r'op_name="([^"]*)"', start.attributes)
    channel = re.search(r"channel_id=(\d+)", start.attributes)
    users = module.computations[computation].values()
    for i, size in enumerate(sizes):
        parts = [made.name]
        if len(sizes) > 1:
            one = re.compile(rf"\bindex={i}\b")
            parts = [user.name for user in users if user.operands == [made.name] and one.search(user.attributes)]
        sliced = kind == "all_reduce" and bool(parts) and all(_only_sliced(module, computation, p) for p in parts)
        yield Collective(
            kind,
            round(moved * size),
            group,
            sliced=sliced,
            asynchronous=made.opcode.endswith("-done"),
            channel=channel[1] if channel else made.name,
            name=name[1] if name else "",
        )


def _group(start: Instruction, num_devices: int) -> int:
    """Devices of a group, in each of the three ways that XLA writes them."""
    text = start.attributes.partition("replica_groups=")[2]
    if match := re.match(r"\[\d+,(\d+)\]", text):  # [groups, devices of a group]<=[...]
        return int(match[1])
    if match := re.match(r"\{\{([\d,]+)\}", text):
        return len(match[1].split(","))
    if match := re.match(r"mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):  # mesh['a'=2,'b'=4] {'b'}, or {'b':(1)2}, a part
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", match[1]))
        axes = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if text.startswith("{}") or not text:
        return num_devices
    raise ValueError(f"the devices of {start.name} are written in an unknown way: {text[:100]!r}")


def _only_sliced(module: Module, computation: str, name: str) -> bool:
    """Whether each use of a result is a slice of it, also of its elements in another form, or within a fusion."""

    def slices(user: Instruction) -> bool:
        if user.opcode == "dynamic-slice":
            return user.operands[0] == name
        if user.opcode in ("bitcast", "copy", "reshape", "transpose", "convert"):
            return _only_sliced(module, computation, user.name)
        if user.opcode not in ("fusion", "call"):
            return False
        called = user.called("calls|to_apply")
        numbers = {str(i) for i, operand in enumerate(user.operands) if operand == name}
        parameters = [
            x.name for x in module.computations[called].values() if x.opcode == "parameter" and x.inside in numbers
        ]
        return all(_only_sliced(module, called, parameter) for parameter in parameters)

    users = [user for user in module.computations[computation].values() if name in user.operands]
    return bool(users) and all(map(slices, users))
