"""One accelerator: training the language model, dictionaries and sweeps, beside PyTorch, and an attribution graph.

    python benchmarks/gpu.py [--rounds 3] [--dictionary-batch 32768] [--json FILE]
    python benchmarks/gpu.py --small            # tiny sizes on any machine, to check that it runs

The language model computes in bfloat16 with float32 parameters, on 256 rows of 128 tokens; dictionaries of 25,000
features read 768-wide vectors in float32, as they are trained by default, and take the whole `house` recipe's step. A
sweep of n members counts vectors times members. The graph is that of `circuits.py`, 64 tokens and 2,000 nodes; its goal
is 1 s. PyTorch (with bfloat16 autocast, and the reference's modules for the language model) trains where it is
installed and sees the accelerator; JAX and PyTorch run in separate processes and take turns. Every figure is a median
over rounds of steps that are queued one after the other and waited for together.
"""

import dataclasses
import functools
import importlib.util
import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated, NamedTuple

import tyro
from gpu_steps import LARGE, SMALL, SWEEP_MEMBERS, Sizes, our_calls, pytorch_calls
from machine import describe_machine
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sides import Side

from tinymodel_jax.commands.frame import USER_PATHS
from tinymodel_jax.training.flops import training_flops_per_token

OURS, PYTORCH = "tinymodel_jax", "PyTorch"
COMPARED = ("lm", "relu", "topk")
"""Workloads that PyTorch runs as well."""
Times = dict[str, dict[str, list[float]]]
"""Seconds per step of each round, by workload and side."""


class Row(NamedTuple):
    """One workload's result."""

    title: str
    rates: dict[str, float]
    """Tokens, vectors or nodes per second, by side."""
    remark: str


def main(
    small: bool = False,
    rounds: int = 3,
    dictionary_batch: int | None = None,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json", metavar="FILE")] = None,
) -> None:
    """Measure training and graphs on the accelerator that JAX finds.

    Args:
        small: run tiny sizes, on a CPU too.
        rounds: rounds of every workload; the medians are reported.
        dictionary_batch: vectors per step of the large dictionaries; 32,768 need about 30 GB.
        json_file: file to write all times to.
    """
    sizes = SMALL if small else LARGE
    if dictionary_batch is not None:
        sizes = dataclasses.replace(sizes, dictionary_batch=dictionary_batch)
    console = Console()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        ours = stack.enter_context(Side(functools.partial(our_calls, sizes=sizes), folder))
        platform, kind, peak = ours.ask("device")
        if platform == "cpu" and not small:
            raise SystemExit("JAX finds no accelerator; --small runs tiny sizes on this CPU.")
        sides = {OURS: ours}
        problem = pytorch_problem()
        if problem is None:
            pytorch = stack.enter_context(Side(functools.partial(pytorch_calls, sizes=sizes), folder))
            if pytorch.ask("device") != "cpu" or platform == "cpu":
                sides[PYTORCH] = pytorch
            else:
                problem = "it sees no GPU"
        if problem is not None:
            console.print(f"PyTorch is left out: {problem}.", highlight=False)
        times = alternate(sides, rounds)
    machine = describe_machine() | {"accelerator": kind, "rounds": f"{rounds} of {sizes.steps} steps"}
    rows = results(times, sizes, peak)
    for name, fact in machine.items():
        console.print(f"{name}: {fact}", highlight=False)
    console.print(as_table(rows))
    if json_file is not None:
        content = {"machine": machine, "sizes": dataclasses.asdict(sizes), "seconds": times}
        json_file.write_text(json.dumps(content, indent=2) + "\n")


def pytorch_problem() -> str | None:
    """Return why PyTorch cannot take part, or None."""
    missing = [name for name in ("torch", "tiny_model") if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(missing)} (PyPI torch, tinymodel)" if missing else None


def alternate(sides: dict[str, Side], rounds: int) -> Times:
    """Return the seconds per step or graph of every workload and side; each round runs all of them once."""
    names = [*COMPARED, *(f"sweep-{members}" for members in SWEEP_MEMBERS), "graph"]
    times: Times = {name: {} for name in names}
    for _ in track(range(rounds), description="timing", console=Console(stderr=True)):
        for name in names:
            for label, side in sides.items():
                if label == OURS or name in COMPARED:
                    times[name].setdefault(label, []).append(side.ask(name))
    return times


def results(times: Times, sizes: Sizes, peak: float | None) -> list[Row]:
    """Turn times into rates with remarks."""
    n_tokens = sizes.batch[0] * sizes.batch[1]
    per_step = {"lm": n_tokens, "relu": sizes.dictionary_batch, "topk": sizes.dictionary_batch}
    per_step |= {f"sweep-{members}": members * sizes.sweep_batch for members in SWEEP_MEMBERS}
    per_step["graph"] = sizes.graph_nodes
    rates = {
        name: {side: per_step[name] / median(seconds) for side, seconds in by_side.items()}
        for name, by_side in times.items()
    }
    flops = training_flops_per_token(sizes.model, sizes.batch[1])
    share = "peak not known" if peak is None else f"{rates['lm'][OURS] * flops / peak:.1%} of the bf16 peak"
    size = f"{sizes.width} -> {sizes.n_features:,}"
    rows = [
        Row(f"language model, {sizes.batch[0]} x {sizes.batch[1]}", rates["lm"], share),
        Row(f"ReLU dictionary, {size}", rates["relu"], ""),
        Row(
            f"TopK {sizes.k} dictionary, {size}",
            rates["topk"],
            f"{rates['topk'][OURS] / rates['relu'][OURS]:.2f} x ReLU",
        ),
    ]
    for members in SWEEP_MEMBERS:
        rate = rates[f"sweep-{members}"]
        title = f"sweep of {members}, {sizes.width} -> {sizes.sweep_features:,}"
        rows.append(Row(title, rate, f"{rate[OURS] / rates['sweep-1'][OURS]:.2f} x one member"))
    title = f"attribution graph, {sizes.graph_tokens} tokens, {sizes.graph_nodes:,} nodes"
    rows.append(Row(title, rates["graph"], f"{median(times['graph'][OURS]):.2f} s per graph"))
    return rows


def as_table(rows: list[Row]) -> Table:
    """Lay out the rates, and ours over PyTorch's."""
    table = Table(title="tokens, vectors or nodes per second")
    for column in ("workload", PYTORCH, OURS, "ours / PyTorch", "remark"):
        table.add_column(column, justify="left" if column in ("workload", "remark") else "right")
    for title, rates, remark in rows:
        theirs = rates.get(PYTORCH)
        shown = ("-", "-") if theirs is None else (f"{theirs:,.0f}", f"{rates[OURS] / theirs:.2f}")
        table.add_row(title, shown[0], f"{rates[OURS]:,.0f}", shown[1], remark)
    return table


if __name__ == "__main__":
    tyro.cli(main, registry=USER_PATHS)
