"""Read a compiled program's text: its collectives, and the compiler's estimate of its time.

The text is the scheduled HLO that `compiled.as_text()` returns, on any backend. Instructions in loop bodies count once
per iteration where the number of iterations is known.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\d\-]*)\(([^)]*)")
_CALLED = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NO_ESTIMATE = 2**63 - 1
"""The compiler's value for instructions that it cannot estimate, such as lookups on a SparseCore."""
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_LISTED = re.compile(r"replica_groups=(\{\{.*?\}\}|\{\})")
_COUNTED = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_ON_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{((?:'\w+',? ?)+)\}"
)
_PAIRS = re.compile(r"source_target_pairs=(\{\{.*?\}\})")


@dataclass(frozen=True)
class ArrayType:
    """Type of an array in HLO's notation."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size without padding."""
        bits = 8 if self.dtype == "pred" else int(re.findall(r"\d+", self.dtype)[0])
        return math.prod(self.shape) * bits // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Collective:
    """An instruction in which devices exchange data."""

    kind: str
    """One of `COLLECTIVES`."""
    arrays: tuple[ArrayType, ...]
    """Its results on one device; several if the compiler combined collectives."""
    axes: tuple[str, ...]
    """Mesh axes along which devices exchange data."""
    times: int
    """Executions per run of the program."""

    @property
    def bytes(self) -> int:
        """Size of the results of one execution on one device."""
        return sum(array.bytes for array in self.arrays)


@dataclass(frozen=True)
class _Instruction:
    computation: str
    name: str
    op: str
    result: str
    operands: tuple[str, ...]
    line: str


def collectives(text: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """Return every collective of a compiled program, in no particular order.

    Args:
        mesh_shape: axis name -> size, of the mesh that the program was compiled for.
    """
    found: dict[str, Collective] = {}
    for instruction, times in _executed(text):
        kind = instruction.op.removesuffix("-start")
        if kind in COLLECTIVES:
            if instruction.computation.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # which the TPU compiler writes as one fusion of all-reduce and slice
            arrays = _results(instruction)
            channel = _CHANNEL.search(instruction.line)
            # A collective that the TPU compiler overlaps with others appears in several fusions, on one channel.
            key = f"{kind} {channel[1]}" if channel else f"{len(found)}"
            found[key] = Collective(kind, arrays, _axes(instruction.line, mesh_shape), times)
    return list(found.values())


def estimated_cycles(text: str) -> int | None:
    """Return the compiler's estimate of the clock cycles of one run, or None if it gives none.

    Collectives are left out, and so are the few instructions that the compiler cannot estimate.
    """
    found = [(int(n), times) for instruction, times in _executed(text) for n in _CYCLES.findall(instruction.line)]
    estimated = [cycles * times for cycles, times in found if cycles != _NO_ESTIMATE]
    return sum(estimated) if estimated else None


def _executed(text: str) -> Iterator[tuple[_Instruction, int]]:
    """Yield each instruction that runs, and how often it runs."""
    computations, entry = _parse(text)
    times: Counter[str] = Counter()

    def visit(name: str, count: int) -> None:
        times[name] += count
        for instruction in computations[name]:
            trips = _trips(instruction, computations) if instruction.op == "while" else 1
            called = _CALLED.findall(instruction.line)
            called += [name.strip(" %") for names in _BRANCHES.findall(instruction.line) for name in names.split(",")]
            for callee in called:
                visit(callee, count * trips)

    visit(entry, 1)
    for name, count in times.items():
        yield from ((instruction, count) for instruction in computations[name])


def _trips(loop: _Instruction, computations: Mapping[str, list[_Instruction]]) -> int:
    """Return how often a loop's body runs; 1 if neither the compiler nor the loop's counter gives the number.

    The counter is the element of the loop's state that the condition compares with a constant. It is assumed to start
    at 0, as in the loops of `lax.scan` and of the compiler, and to rise by a constant.
    """
    if known := _TRIPS.search(loop.line):
        return int(known[1])
    names = _LOOP.search(loop.line)
    if names is None:
        return 1
    condition, body = computations[names[1]], computations[names[2]]
    test, after = condition[-1], body[-1]
    counter = next((one for one in condition if one.name == test.operands[0]), None)
    limit = _constant(condition, test.operands[-1])
    if counter is None or counter.op != "get-tuple-element" or limit is None or "direction=LT" not in test.line:
        return 1
    index = int(re.findall(r"index=(\d+)", counter.line)[0])
    rise = next((one for one in body if after.op == "tuple" and one.name == after.operands[index]), None)
    steps = [_constant(body, name) for name in rise.operands] if rise is not None and rise.op == "add" else []
    step = next((step for step in steps if step), None)
    return math.ceil(limit / step) if step else 1


def _constant(computation: Sequence[_Instruction], name: str) -> int | None:
    """Return the value of an integer constant, or None."""
    found = next((one for one in computation if one.name == name and one.op == "constant"), None)
    return int(found.operands[0]) if found is not None and found.operands[0].isdecimal() else None


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Return the instructions of each computation, and the name of the entry computation."""
    computations: dict[str, list[_Instruction]] = {}
    entry = current = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = header[2]
            computations[current] = []
            entry = current if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            name, result, op, operands = found.groups()
            names = tuple(operand.strip(" %") for operand in operands.split(","))
            computations[current].append(_Instruction(current, name, op, result, names, line))
    if not entry:
        raise ValueError("the text is not a compiled program: it has no ENTRY computation.")
    return computations, entry


def _results(instruction: _Instruction) -> tuple[ArrayType, ...]:
    arrays = [
        ArrayType(dtype, tuple(int(n) for n in shape.split(",") if n))
        for dtype, shape in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", instruction.result))
    ]
    if instruction.op in ("all-gather-start", "collective-permute-start"):
        # These return their operands before the results; a permutation also returns two counters after them.
        arrays = [array for array in arrays if array != ArrayType("u32", ())]
        arrays = arrays[len(arrays) // 2 :]
    return tuple(arrays)


def _axes(line: str, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """Return the mesh axes along which the devices of a group differ."""
    names, sizes = list(mesh_shape), tuple(mesh_shape.values())
    varying: set[int] = set()
    for group in _groups(line, math.prod(sizes)):
        places = np.array(np.unravel_index(group, sizes))
        varying |= {axis for axis in range(len(sizes)) if len(set(places[axis])) > 1}
    return tuple(names[axis] for axis in sorted(varying))


def _groups(line: str, n_devices: int) -> list[list[int]]:
    """Return the groups of devices that exchange data, as indices into the flattened mesh."""
    if found := _PAIRS.search(line) or _LISTED.search(line):
        groups = [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", found[1])]
        return groups or [list(range(n_devices))]
    if found := _COUNTED.search(line):  # [groups, size]<=[a,b]T(p)
        shape, base, order = found.groups()
        return _counted(base, order).reshape(_numbers(shape)).tolist()
    if found := _ON_MESH.search(line):  # mesh['a'=2,'b'=4] {'b'}: along b, where the compiler has renamed the axes
        axes, base, order, along = found.groups()
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
        devices = _counted(base or str(n_devices), order).reshape(tuple(sizes.values()))
        moved = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", along)]
        size = math.prod(devices.shape[axis] for axis in moved)
        return np.moveaxis(devices, moved, range(-len(moved), 0)).reshape(-1, size).tolist()
    raise ValueError(f"cannot read this collective's groups of devices: {line.strip()[:300]}")


def _counted(base: str, order: str | None) -> np.ndarray:
    """Return 0, 1, … in the shape `base`, transposed."""
    numbers = np.arange(math.prod(_numbers(base))).reshape(_numbers(base))
    return numbers.transpose(_numbers(order)) if order else numbers


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
