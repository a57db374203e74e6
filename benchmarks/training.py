"""Training with this package against PyTorch and the peers, alternating on one machine.

    python benchmarks/training.py [--rounds 5] [--only NAME …] [--json FILE] [--tuned-allocator]

Language models train against the reference's model under PyTorch, and a dictionary against one written by hand, from
the same weights: before anything is timed, the losses of three steps must agree. Dictionaries train against the peers
that are installed (PyPI `sae-lens`, `dictionary-learning`, `eai-sparsify`), each with its own recipe. A sweep of eight
trains against eight runs of ours. Every contender runs in its own process, and only one of them works at a time; a
round in which other processes used over 5 % of the cores is left out, as in `vs_reference.py`.

Our programs make glibc keep freed memory, and so does our side here, whatever --tuned-allocator says: that gives the
others the same. The ratio is our time over that of the fastest other.
"""

import functools
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Literal, get_args

import tyro
from machine import TUNED_ALLOCATOR, describe_machine
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sides import QUIET, Calls, Side, quiet_rounds
from training_inputs import SWEEP_KS, write_inputs
from training_ours import our_calls, solo_calls
from training_peers import dictionary_learning_calls, saelens_calls, sparsify_calls
from training_pytorch import pytorch_calls

from tinymodel_jax.commands.frame import USER_PATHS

Name = Literal[
    "lm-full",
    "lm-small",
    "by-hand",
    "relu-768",
    "topk-768",
    "batch_topk-768",
    "relu-128",
    "topk-128",
    "batch_topk-128",
    "sweep",
]
Times = dict[str, list[float]]
"""Seconds of every quiet round, by contender."""
OURS = "tinymodel_jax"
CONTENDERS: dict[str, tuple[str, Callable[[Path], Calls]]] = {
    OURS: ("jax", our_calls),
    "PyTorch": ("torch", pytorch_calls),
    "PyTorch, fused Adam": ("torch", functools.partial(pytorch_calls, fused=True)),
    "SAELens": ("sae_lens", saelens_calls),
    "dictionary_learning": ("dictionary_learning", dictionary_learning_calls),
    "sparsify": ("sparsify", sparsify_calls),
    "solo runs": ("jax", solo_calls),
}
"""The module that each contender needs, and the function that creates its calls."""
PACKAGES = ("sae-lens", "dictionary-learning", "eai-sparsify")
WARM_UP, TOLERANCE = 3, 1e-3
"""Untimed steps, and the largest relative difference of their losses."""


@dataclass(frozen=True)
class Workload:
    """One line of the table."""

    title: str
    others: tuple[str, ...]
    goal: float
    """Largest ratio that the project aims for."""
    goal_tuned: float
    """The same with --tuned-allocator."""
    same_losses: bool = False
    """Whether all contenders compute the same."""
    activations: int | None = None
    """Activation vectors per step, if speed is measured in them."""


_PYTORCH, _PEERS = ("PyTorch", "PyTorch, fused Adam"), ("SAELens", "dictionary_learning")
WORKLOADS: dict[str, Workload] = {
    "lm-full": Workload("LM step, AdamW, 8 x 256", _PYTORCH, 0.95, 0.95, same_losses=True),
    "lm-small": Workload("LM step, d_model 128, 8 x 128", _PYTORCH, 0.95, 0.95, same_losses=True),
    "by-hand": Workload("ReLU dictionary by hand, 768 -> 25,000", _PYTORCH, 0.8, 0.8, True, 4096),
    "relu-768": Workload("ReLU, 768 -> 25,000", _PEERS, 1 / 1.4, 1 / 1.2, activations=4096),
    "topk-768": Workload("TopK 32, 768 -> 25,000", (*_PEERS, "sparsify"), 1 / 1.3, 1.0, activations=4096),
    "batch_topk-768": Workload("BatchTopK 32, 768 -> 25,000", _PEERS, 1 / 2.5, 1 / 2.5, activations=4096),
    "relu-128": Workload("ReLU, 128 -> 1,024", _PEERS, 0.7, 0.7, activations=4096),
    "topk-128": Workload("TopK 32, 128 -> 1,024", (*_PEERS, "sparsify"), 0.7, 0.7, activations=4096),
    "batch_topk-128": Workload("BatchTopK 32, 128 -> 1,024", _PEERS, 0.7, 0.7, activations=4096),
    "sweep": Workload(f"sweep of {len(SWEEP_KS)} small dictionaries, start to finish", ("solo runs",), 0.6, 0.6),
}


def main(
    rounds: int = 5,
    only: tuple[Name, ...] = get_args(Name),
    json_file: Annotated[Path | None, tyro.conf.arg(name="json", metavar="FILE")] = None,
    tuned_allocator: bool = False,
    quiet: float = QUIET,
) -> None:
    """Time training steps of this package against others'.

    Args:
        rounds: quiet rounds of each workload after the warm-up; medians count.
        only: workloads to run.
        json_file: file to write all times to.
        tuned_allocator: let glibc keep freed memory (MALLOC_MMAP_THRESHOLD_ and others), in all processes.
        quiet: largest share of the cores that others may use in a round that counts; 1 counts every round, for a trial.
    """
    if tuned_allocator:
        os.environ.update(TUNED_ALLOCATOR)  # glibc reads it when a process starts
    console = Console()
    missing = [name for name, (module, _) in CONTENDERS.items() if importlib.util.find_spec(module) is None]
    if missing:
        console.print(f"left out, because not installed: {', '.join(missing)}", highlight=False)
    results: dict[str, Times] = {}
    left_out = 0
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder))
        for name in track(only, description="timing", console=Console(stderr=True)):
            results[name], disturbed = measure(name, [OURS, *present(name, missing)], folder, rounds, quiet)
            left_out += disturbed
    machine = describe_machine(PACKAGES)
    machine["rounds"] = f"{rounds} per workload; {left_out} left out because others used over {quiet:.0%} of the cores"
    for fact, value in machine.items():
        console.print(f"{fact}: {value}", highlight=False)
    console.print(as_table(results, tuned_allocator))
    if json_file is not None:
        write_json(json_file, machine, results, tuned_allocator)


def present(name: str, missing: list[str]) -> list[str]:
    """Return a workload's other contenders that are installed."""
    return [other for other in WORKLOADS[name].others if other not in missing]


def measure(name: str, contenders: list[str], folder: str, rounds: int, quiet: float) -> tuple[Times, int]:
    """Return every contender's times of `rounds` quiet rounds, and the number of rounds left out as not quiet.

    Raises:
        SystemExit: losses differ that should not, or others keep the machine busy.
    """
    with ExitStack() as stack:
        sides = {label: stack.enter_context(Side(CONTENDERS[label][1], folder)) for label in contenders}
        if name != "sweep":
            losses = {label: [side.ask(name) for _ in range(WARM_UP)] for label, side in sides.items()}
            if WORKLOADS[name].same_losses:
                require_same_losses(name, losses)
        return quiet_rounds(name, lambda: {label: side.measure(name) for label, side in sides.items()}, rounds, quiet)


def require_same_losses(name: str, losses: dict[str, list[float]]) -> None:
    """Raise SystemExit if another contender's losses differ from ours."""
    for label, values in losses.items():
        for mine, other in zip(losses[OURS], values, strict=True):
            if abs(mine - other) > TOLERANCE * abs(other):
                raise SystemExit(f"{name}: the losses differ: {OURS} {losses[OURS]}, {label} {values}.")


def ratio(times: Times) -> float | None:
    """Return our median time over that of the fastest other contender, or None without others."""
    others = [median(values) for label, values in times.items() if label != OURS]
    return median(times[OURS]) / min(others) if others else None


def as_table(results: dict[str, Times], tuned: bool) -> Table:
    """Return a table of medians (for dictionaries also activations per second), ratios and goals."""
    table = Table(title="median time per step, in milliseconds; activations per second")
    for column in ("workload", "others", OURS, "ratio", "goal"):
        table.add_column(column, justify="left" if column in ("workload", "others") else "right")
    for name, times in results.items():
        workload, found = WORKLOADS[name], ratio(times)
        others = "\n".join(f"{label} {speed(values, workload)}" for label, values in times.items() if label != OURS)
        goal = workload.goal_tuned if tuned else workload.goal
        shown = "" if found is None else f"{found:.3f}"
        table.add_row(workload.title, others, speed(times[OURS], workload), shown, f"≤ {goal:.3g}")
    return table


def speed(seconds: list[float], workload: Workload) -> str:
    """Return a median in milliseconds, and activations per second if they are counted."""
    middle = median(seconds)
    rate = f" ({workload.activations / middle:,.0f}/s)" if workload.activations else ""
    return f"{middle * 1e3:,.1f}{rate}"


def write_json(path: Path, machine: dict[str, str], results: dict[str, Times], tuned: bool) -> None:
    """Write the machine, and all times in seconds."""
    rows = {
        name: {
            "title": WORKLOADS[name].title,
            "ratio": ratio(times),
            "goal": WORKLOADS[name].goal_tuned if tuned else WORKLOADS[name].goal,
            "seconds": times,
        }
        for name, times in results.items()
    }
    path.write_text(json.dumps({"machine": machine, "workloads": rows}, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main, registry=USER_PATHS)
