"""This package against the PyTorch reference: the same weights and inputs, alternating on one machine.

    python benchmarks/vs_reference.py [--rounds 9] [--only NAME …] [--json FILE] [--tuned-allocator]

Needs PyTorch and the reference (PyPI `torch`, `tinymodel`), and Linux. Each library runs in its own process, as its
users run it, and only one of them works at a time; with both in one process the reference measured 7 to 15 % slower.
Before anything is timed, both must give the same log-probabilities, activations and greedy tokens. The reference runs
without gradients; the clock stops when the result is computed.

A round is left out, for both sides and whatever it took, when other processes used more than 5 % of the cores during
it: PyTorch's threads suffer from that far more than XLA's, so such rounds would flatter this package. Our `lm['M1']` is
`T1` in this version of the reference.

The floor is the time of a workload's matrix products at the fastest rate that a large product reaches in XLA here, or
of the weights it must read and the results it must write at the rate of a matrix-vector product, whichever is longer.
Decoding reads all weights once per token. No side can be much faster, unless a large cache keeps a part of the weights.
"""

import importlib
import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal, get_args

import numpy as np
import tyro
from floors import Rates, measured_rates
from machine import TUNED_ALLOCATOR, describe_machine
from reference import CONFIG, DICTIONARY_FILE, MODEL_FILE, N_FEATURES, load_reference, write_weights
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sides import QUIET, Calls, Measured, Side, quiet_rounds

from tinymodel_jax.commands.frame import USER_PATHS

Name = Literal[
    "forward-8x256",
    "forward-8x256-plain-jit",
    "forward-1x32",
    "M1",
    "M1-made-once",
    "M1N123",
    "generate-1x50",
    "generate-32x50",
]
Times = dict[str, dict[str, list[float]]]
"""Workload -> side -> seconds of every quiet round."""
N_TOKS, PROMPT_LENGTH, N_PROMPTS, N_PROMPTS_REFERENCE = 50, 13, 32, 4
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Workload:
    """One line of the table."""

    title: str
    reference: str
    """The reference's call; several of ours may be compared with one of its."""
    goal: float | None = None
    """Largest ratio (our time / the reference's) that the project aims at."""
    scale: float = 1
    """Factor on the reference's time, where it does only a part of the work."""
    goal_of_floor: float | None = None
    """Largest multiple of the floor that the project aims at."""

    @property
    def shown_goal(self) -> str:
        """Return the goals as text."""
        goals = [f"≤ {self.goal}"] * (self.goal is not None)
        return ", ".join(goals + [f"≤ {self.goal_of_floor} x floor"] * (self.goal_of_floor is not None))


WORKLOADS: dict[str, Workload] = {
    "forward-8x256": Workload("log-probabilities, 8 x 256", "forward-8x256", goal=0.95),
    "forward-8x256-plain-jit": Workload("the same, plain jax.jit", "forward-8x256"),
    "forward-1x32": Workload("log-probabilities, 1 x 32", "forward-1x32", goal=0.85),
    "M1": Workload("lm['M1'](ids), 25,000 features, 8 x 256", "M1"),
    "M1-made-once": Workload("the same, function made once", "M1-made-once"),
    "M1N123": Workload("lm['M1N123'], made once, 8 x 256", "M1N123", goal=1.0),
    "generate-1x50": Workload("50 greedy tokens after 13", "generate-1x50", goal_of_floor=1.15),
    "generate-32x50": Workload(
        f"32 prompts x 50 tokens (reference: {N_PROMPTS_REFERENCE}, scaled)",
        "generate-32x50",
        goal=0.03,
        scale=N_PROMPTS / N_PROMPTS_REFERENCE,
    ),
}


def main(
    rounds: int = 9,
    only: tuple[Name, ...] = get_args(Name),
    json_file: Annotated[Path | None, tyro.conf.arg(name="json", metavar="FILE")] = None,
    tuned_allocator: bool = False,
) -> None:
    """Time this package against the reference.

    Args:
        rounds: quiet rounds of each workload after one untimed call; medians count.
        only: workloads to run.
        json_file: file to write all times to.
        tuned_allocator: let glibc keep freed memory (MALLOC_MMAP_THRESHOLD_ and others), in both processes.
    """
    if tuned_allocator:
        os.environ.update(TUNED_ALLOCATOR)  # glibc reads it when a process starts
    with tempfile.TemporaryDirectory() as folder:
        write_weights(Path(folder))
        with Side(our_calls, folder) as ours, Side(reference_calls, folder) as reference:
            check_same_results(ours, reference, only)
            times, left_out = alternate(ours, reference, only, rounds)
            rates: Rates = ours.ask("rates")
            facts = describe_machine() | {"YNN fusion": ours.ask("ynn"), "measured in XLA": rates.described()}
    facts["rounds"] = f"{rounds} per workload; {left_out} left out because others used over {QUIET:.0%} of the cores"
    console = Console()
    if not console.is_terminal:
        console.width = 160
    for name, fact in facts.items():
        console.print(f"{name}: {fact}", highlight=False)
    console.print(as_table(times, rates))
    if json_file is not None:
        write_json(json_file, facts, times, rates)


def inputs() -> dict[str, np.ndarray]:
    """Return token ids by workload size."""
    rng = np.random.default_rng(1)
    shapes = {"8x256": (8, 256), "1x32": (1, 32), "prompts": (N_PROMPTS, PROMPT_LENGTH)}
    return {name: rng.integers(0, CONFIG.begin_id, shape) for name, shape in shapes.items()}


def our_calls(folder: Path) -> Calls:
    """Load this package; return its calls, and the facts that only JAX knows."""
    jax: Any = importlib.import_module("jax")
    forward: Any = importlib.import_module("tinymodel_jax.model.forward")
    from tinymodel_jax.lm import TinyModel

    lm, ids = TinyModel(folder / MODEL_FILE), inputs()
    lm.attach("M1", folder / DICTIONARY_FILE)
    plain = jax.jit(forward.forward)
    wait = jax.block_until_ready
    all_features, one_feature = lm["M1"], lm["M1N123"]
    return {
        "forward-8x256": lambda: wait(lm(ids["8x256"])),
        "forward-8x256-plain-jit": lambda: wait(plain(lm.hooked(), ids["8x256"])[0]),
        "forward-1x32": lambda: wait(lm(ids["1x32"])),
        "M1": lambda: wait(lm["M1"](ids["8x256"])),
        "M1-made-once": lambda: wait(all_features(ids["8x256"])),
        "M1N123": lambda: wait(one_feature(ids["8x256"])),
        "generate-1x50": lambda: lm.generate_ids(ids["prompts"][:1], N_TOKS, 0, break_on_end=False),
        "generate-32x50": lambda: lm.generate_ids(ids["prompts"], N_TOKS, 0, break_on_end=False),
        "ynn": ynn_fusion,
        "rates": measured_rates,
    }


def ynn_fusion() -> str:
    """Say which matrix products XLA uses in this package's programs."""
    from tinymodel_jax.runtime.compilation import fast_compiler_options

    return "chosen by this package for every program" if fast_compiler_options() else "as XLA's default"


def floor(name: str, rates: Rates) -> float:
    """Return the seconds that a workload's products or its bytes take at least.

    Of attention, the causal half counts. What is read: the weights of the layers that run, once, or once per token
    that is decoded; what is written: the result. Embeddings are rows that are looked up, and count as nothing.
    """
    cfg = CONFIG
    attention, mlp, head = 4 * cfg.d_model**2, 2 * cfg.d_model * cfg.d_mlp, cfg.d_model * cfg.d_vocab
    whole = cfg.n_layers * (attention + mlp) + head
    if name.startswith("generate"):
        prompts = 1 if name == "generate-1x50" else N_PROMPTS
        length = PROMPT_LENGTH + N_TOKS
        products = (whole - head) * length + head * N_TOKS + cfg.n_layers * cfg.d_model * length**2
        flops = 2 * prompts * products
        return rates.floor(flops, 4 * whole * N_TOKS)
    rows, length = (1, 32) if name == "forward-1x32" else (8, 256)
    if name.startswith("forward"):
        matrices, layers, width = whole, cfg.n_layers, cfg.d_vocab
    else:  # to the input of the MLP of layer 1: two attentions, one MLP, and the encoder
        layers, width = 2, 1 if name == "M1N123" else N_FEATURES
        matrices = 2 * attention + mlp + cfg.d_model * width
    flops = rows * (2 * matrices * length + 2 * layers * cfg.d_model * length**2)
    return rates.floor(flops, 4 * (matrices + rows * length * width))


def reference_calls(folder: Path) -> Calls:
    """Load the reference; return its calls."""
    lm = load_reference(folder)
    torch: Any = importlib.import_module("torch")
    torch.set_grad_enabled(False)
    ids = {name: torch.tensor(array) for name, array in inputs().items()}
    all_features, one_feature = lm["T1"], lm["T1N123"]

    def generate(prompts: Iterable[Any]) -> Any:
        rows = [lm.generate(prompt[None], N_TOKS, temperature=0, break_on_end=False) for prompt in prompts]
        return torch.stack(rows)

    return {
        "forward-8x256": lambda: lm(ids["8x256"]),
        "forward-1x32": lambda: lm(ids["1x32"]),
        "M1": lambda: lm["T1"](ids["8x256"]),
        "M1-made-once": lambda: all_features(ids["8x256"]),
        "M1N123": lambda: one_feature(ids["8x256"]),
        "generate-1x50": lambda: generate(ids["prompts"][:1]),
        "generate-32x50": lambda: generate(ids["prompts"][:N_PROMPTS_REFERENCE]),
    }


def check_same_results(ours: Side, reference: Side, names: Iterable[str]) -> None:
    """Compare every workload's results.

    Raises:
        SystemExit: they differ.
    """
    for name in names:
        mine, theirs = ours.ask(name), reference.ask(WORKLOADS[name].reference)
        if name.startswith("generate"):
            mine = mine[: len(theirs), 1:]  # the reference drops the first id, which is [BEGIN] in real prompts
            difference = float(np.sum(mine != theirs))
        else:
            difference = float(np.max(np.abs(mine - theirs)))
        if mine.shape != theirs.shape or difference > TOLERANCE:
            raise SystemExit(f"{name}: results differ by {difference} (shapes {mine.shape} and {theirs.shape}).")


def alternate(ours: Side, reference: Side, names: Iterable[str], rounds: int) -> tuple[Times, int]:
    """Return the times of `rounds` quiet rounds of each workload, and the number of rounds left out as not quiet.

    Raises:
        SystemExit: others keep the machine busy.
    """
    times: Times = {}
    left_out = 0
    for name in track(list(names), description="timing", console=Console(stderr=True)):
        workload = WORKLOADS[name]

        def one_round(name: str = name, workload: Workload = workload) -> dict[str, Measured]:
            return {"reference": reference.measure(workload.reference), "ours": ours.measure(name)}

        times[name], disturbed = quiet_rounds(name, one_round, rounds)
        times[name]["reference"] = [workload.scale * seconds for seconds in times[name]["reference"]]
        left_out += disturbed
    return times, left_out


def as_table(times: Times, rates: Rates) -> Table:
    """Lay out medians, the fastest times, ratios beside their goals, and how many times the floor each side takes."""
    table = Table(title="median (fastest) in milliseconds")
    for column in ("workload", "reference", "tinymodel_jax", "ratio", "goal", "floor", "times the floor"):
        table.add_column(column, justify="left" if column == "workload" else "right")
    for name, both in times.items():
        least = floor(name, rates)
        cells = [f"{median(both[side]) * 1e3:,.1f} ({min(both[side]) * 1e3:,.1f})" for side in ("reference", "ours")]
        of_floor = " · ".join(f"{median(both[side]) / least:.2f}" for side in ("reference", "ours"))
        workload = WORKLOADS[name]
        cells += [f"{ratio(both):.3f}", workload.shown_goal, f"{least * 1e3:,.1f}", of_floor]
        table.add_row(workload.title, *cells)
    return table


def ratio(both: dict[str, list[float]]) -> float:
    """Return our median time over the reference's."""
    return median(both["ours"]) / median(both["reference"])


def write_json(path: Path, facts: dict[str, str], times: Times, rates: Rates) -> None:
    """Write the machine, and all times in seconds."""
    rows = {
        name: {
            "title": WORKLOADS[name].title,
            "ratio": ratio(both),
            "goal": WORKLOADS[name].shown_goal,
            "floor": floor(name, rates),
            "seconds": both,
        }
        for name, both in times.items()
    }
    path.write_text(json.dumps({"machine": facts, "workloads": rows}, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main, registry=USER_PATHS)
