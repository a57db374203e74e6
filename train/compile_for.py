"""`--compile-for v5e:2x4`: compile a program's training step for TPUs that this machine lacks.

    report = report_step(step, arguments, mesh, flops)      # compiles, prints two tables, returns a StepReport

The real TPU compiler runs on any machine (`pip install "tinymodel-jax[tpu]"`), so memory and collectives are exactly
those of a run on these devices. Nothing runs: times are the compiler's estimates and leave out the collectives.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from tinymodel_jax.commands.frame import print_table
from tinymodel_jax.training.flops import peak_flops
from tinymodel_jax.training.sharding import axes_in_use
from train.hlo import Collective, collectives, estimated_cycles

TOPOLOGIES = "v5e:2x4, v6e:2x4, v5p:2x2x2"


@dataclass(frozen=True)
class Chip:
    """Properties of a TPU chip that a report uses."""

    hbm_bytes: int
    """Memory in bytes."""
    clock_hz: float
    """Clock of the matrix units; the peak is clock x units x 128² (v6e: 256²) x 2 FLOP."""


CHIPS = {
    "v5e": Chip(16 * 10**9, 1.5e9),
    "v6e": Chip(32 * 10**9, 1.75e9),
    "v5p": Chip(95 * 10**9, 1.75e9),
}
"""TPU generations that `--compile-for` accepts, with numbers from the maker's data sheets."""

_KINDS = {"TPU v5 lite": "v5e", "TPU v6 lite": "v6e", "TPU v5": "v5p"}
"""JAX's name of a chip -> its generation."""

_NO_TPU_HERE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""Settings that keep the compiler from querying the network about this machine and from locking out other compilers."""


@dataclass(frozen=True)
class StepReport:
    """Memory, arithmetic and collectives of a compiled step, per chip."""

    chips: int
    device_kind: str
    argument_bytes: int
    """State and batch, on one chip."""
    output_bytes: int
    """Results that do not reuse the arguments' memory, on one chip."""
    temporary_bytes: int
    """Largest size of the intermediate arrays on one chip."""
    program_bytes: int
    """Compiled code."""
    hbm_bytes: int | None
    """Memory of a chip; None if unknown."""
    compiled_flops: float
    """Floating-point operations of one chip as the compiler counts them, with loop bodies counted once."""
    flops: float
    """Floating-point operations of one chip that the algorithm needs, without recomputation."""
    peak_flops: float | None
    """A chip's dense bfloat16 peak in FLOP/s; None if unknown."""
    estimated_seconds: float | None
    """The compiler's estimate of the compute time, without collectives; None if it gives none."""
    collectives: tuple[Collective, ...]

    @property
    def peak_bytes(self) -> int:
        """Memory that one chip needs."""
        return self.argument_bytes + self.output_bytes + self.temporary_bytes + self.program_bytes

    @property
    def share_of_peak(self) -> float | None:
        """`flops` divided by what the chip could compute at its peak in the estimated time."""
        if self.estimated_seconds is None or self.peak_flops is None:
            return None
        return self.flops / (self.estimated_seconds * self.peak_flops)


def devices_for(name: str | None) -> list[Any]:
    """Return the devices of a TPU slice, such as `v5e:2x4`, for compiling only; None gives those of this run.

    Raises:
        ValueError: the slice does not exist.
        ModuleNotFoundError: the TPU compiler is not installed.
    """
    if name is None:
        return jax.devices()
    if name.partition(":")[0] not in CHIPS:
        raise ValueError(f"--compile-for {name!r}: must be one of {', '.join(CHIPS)} and a shape, as in {TOPOLOGIES}.")
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError("--compile-for needs the TPU compiler: pip install 'tinymodel-jax[tpu]'")
    for variable, value in _NO_TPU_HERE.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--compile-for {name!r}: this slice does not exist ({reason}). Examples: {TOPOLOGIES}."
        ) from None


def report_step(step: Any, arguments: Sequence[Any], mesh: Mesh, flops: float) -> StepReport:
    """Compile a step for the devices of a mesh, print the report and return it.

    Args:
        step: function made by `jax.jit`.
        arguments: its positional arguments, as trees of `jax.ShapeDtypeStruct` with shardings over `mesh`.
        flops: floating-point operations that one step needs, on all devices together.

    Raises:
        ValueError: the step does not fit the chips' memory.
    """
    try:
        compiled = step.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise ValueError(f"the step does not fit these chips: {reason} Use more chips.") from None
    report = read_compiled(compiled, mesh, flops)
    print_report(report, mesh)
    return report


def read_compiled(compiled: Any, mesh: Mesh, flops: float) -> StepReport:
    """Return the report on a compiled step; `mesh` and `flops` are as in `report_step`."""
    device = mesh.devices.flat[0]
    memory, text = compiled.memory_analysis(), compiled.as_text()
    chip = CHIPS.get(_KINDS.get(device.device_kind, ""))
    cycles = estimated_cycles(text)
    return StepReport(
        chips=mesh.size,
        device_kind=device.device_kind,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        program_bytes=memory.generated_code_size_in_bytes,
        hbm_bytes=chip.hbm_bytes if chip else None,
        compiled_flops=compiled.cost_analysis()["flops"],
        flops=flops / mesh.size,
        peak_flops=peak_flops(device),
        estimated_seconds=cycles / chip.clock_hz if chip and cycles is not None else None,
        collectives=tuple(collectives(text, mesh.shape)),
    )


def print_report(report: StepReport, mesh: Mesh) -> None:
    """Print a report as two tables."""
    axes = ", ".join(f"{axis}={size}" for axis, size in axes_in_use(mesh).items()) or "one device"
    share = f"{report.peak_bytes / report.hbm_bytes:.0%} of {_size(report.hbm_bytes)}" if report.hbm_bytes else "–"
    seconds, of_peak = report.estimated_seconds, report.share_of_peak
    rows = [
        ("arguments (state and batch)", _size(report.argument_bytes)),
        ("outputs that reuse no argument", _size(report.output_bytes)),
        ("temporaries", _size(report.temporary_bytes)),
        ("program", _size(report.program_bytes)),
        ("memory in all", f"{_size(report.peak_bytes)}, {share}"),
        ("FLOPs as compiled", f"{report.compiled_flops / 1e9:,.1f} G"),
        ("FLOPs the algorithm needs", f"{report.flops / 1e9:,.1f} G"),
        ("estimated time, without collectives", f"{seconds * 1e3:.2f} ms" if seconds is not None else "–"),
        ("share of the bfloat16 peak at that", f"{of_peak:.0%}" if of_peak is not None else "–"),
    ]
    print_table(["on each chip", ""], rows, title=f"{report.chips} x {report.device_kind}, {axes}")
    print_table(["collective", "over", "times", "in all", "largest array"], summarize(report.collectives))


def summarize(found: Sequence[Collective]) -> list[tuple[str, str, str, str, str]]:
    """Return kind, mesh axes, number of executions, total bytes and largest array of every kind of collective."""
    rows = []
    for kind, axes in sorted({(one.kind, one.axes) for one in found}):
        same = [one for one in found if (one.kind, one.axes) == (kind, axes)]
        largest = max((array for one in same for array in one.arrays), key=lambda array: array.bytes)
        total = sum(one.bytes * one.times for one in same)
        times = sum(one.times for one in same)
        rows.append((kind, "+".join(axes), str(times), _size(total), f"{largest} {_size(largest.bytes)}"))
    return rows


def _size(n_bytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.3g} {unit}"
    return f"{n_bytes} B"
