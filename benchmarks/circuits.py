"""Attribution graphs: time, peak memory and the share of matrix products, by prompt length and number of nodes.

    python benchmarks/circuits.py [--rounds 3] [--only NAME …] [--json FILE]

All cases but `mini` use random weights of the published sizes in float32, with four transcoders of 25,000 features of
which 32 are active per token. `mini` is the bundled model, a story of 64 tokens and the default number of nodes. Every
case runs in a process of its own. The first graph includes compilation; the median of the others counts as warm.
Core-seconds (user and system) depend less than seconds on what else runs. Memory is the peak of the process, in which
the model and its dictionaries take what "before" says.

The share of matrix products is the time of the graph's own products alone, with the same shapes and compiler options,
divided by the time of the graph. `circuits_case.py` explains which these are. This process imports little, because the
peak memory of a child process starts at that of its parent.
"""

import json
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args

import tyro
from load import run
from machine import describe_machine
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tinymodel_jax.commands.frame import USER_PATHS

RUN = "import sys; sys.path.insert(0, sys.argv[1]); import circuits_case; circuits_case.main(*map(int, sys.argv[2:]))"


class Case(NamedTuple):
    """A graph to build."""

    tokens: int
    nodes: int
    seconds: float | None = None
    """Goal for a warm graph."""
    memory: float | None = None
    """Goal for the peak, in MB."""


class Result(NamedTuple):
    """What a process measured; times in seconds, memory in MB."""

    before: float
    peak: float
    first: float
    warm: float
    core_seconds: float
    products: float


Name = Literal["mini", "64x500", "64x2000", "64x4000", "256x500", "256x2000", "256x4000"]
CASES: dict[Name, Case] = {
    "mini": Case(64, 1000, 2),
    "64x500": Case(64, 500),
    "64x2000": Case(64, 2000, 20),
    "64x4000": Case(64, 4000),
    "256x500": Case(256, 500),
    "256x2000": Case(256, 2000, 90, 8000),
    "256x4000": Case(256, 4000),
}


def main(
    rounds: int = 3,
    only: tuple[Name, ...] = get_args(Name),
    json_file: Annotated[Path | None, tyro.conf.arg(name="json", metavar="FILE")] = None,
) -> None:
    """Measure attribution graphs.

    Args:
        rounds: graphs of each case after the first.
        only: cases to run, as tokens x nodes.
        json_file: file to write all values to.
    """
    results: dict[Name, Result] = {
        name: measure(name, rounds) for name in track(only, "measuring", console=Console(stderr=True))
    }
    machine, console = describe_machine(), Console()
    for name, fact in machine.items():
        console.print(f"{name}: {fact}", highlight=False)
    console.print(as_table(results))
    if json_file is not None:
        content = {"machine": machine, "results": {name: result._asdict() for name, result in results.items()}}
        json_file.write_text(json.dumps(content, indent=2) + "\n")


def measure(name: Name, rounds: int) -> Result:
    """Build the graphs of a case in a new process."""
    case = CASES[name]
    arguments = (case.tokens, case.nodes, rounds, name == "mini")
    done = run("-c", RUN, str(Path(__file__).parent), *(str(int(argument)) for argument in arguments))
    return Result(*done.printed)


def as_table(results: dict[Name, Result]) -> Table:
    """Return a table of all cases."""
    table = Table(title="seconds, and MB of memory")
    for column in ("model", "tokens x nodes", "first", "warm", "core-seconds", "products", "before", "peak"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, found in results.items():
        case = CASES[name]
        table.add_row(
            "mini" if name == "mini" else "full size",
            f"{case.tokens} x {case.nodes:,}",
            f"{found.first:.2f}",
            f"{found.warm:.2f}" + ("" if case.seconds is None else f" (goal {case.seconds:g})"),
            f"{found.core_seconds:.2f}",
            f"{found.products / found.warm:.0%}",
            f"{found.before:,.0f}",
            f"{found.peak:,.0f}" + ("" if case.memory is None else f" (goal {case.memory:,.0f})"),
        )
    return table


if __name__ == "__main__":
    tyro.cli(main, registry=USER_PATHS)
