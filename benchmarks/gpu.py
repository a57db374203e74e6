"""One accelerator: training, generation, ablations and graphs; training beside PyTorch.

    python benchmarks/gpu.py [--rounds 3] [--only NAME …] [--seconds 540] [--json FILE]
    python benchmarks/gpu.py --small            # tiny sizes on any machine, to check that it runs

`lm` trains the language model in bfloat16 with float32 parameters, on 256 rows of 128 tokens. `relu` and `topk` train
dictionaries of 25,000 features of 768-wide vectors in float32, as they are trained by default, with the whole `house`
recipe's step. A `sweep` trains several members in one step. `generate` continues prompts greedily, `ablate` turns off
features one at a time, and `graph` is that of `circuits.py`; these three use a random model in float32.

PyTorch (the reference's modules for the language model, and torch.compile) trains where it is installed and sees the
accelerator. Each case has processes of its own, in which JAX and PyTorch take turns. A case that fails or finds no time
left is named at the end, with a nonzero exit status, and the others' results stay; they are printed and written as they
come. A ratio is this package's time divided by PyTorch's. Every figure is a median over rounds.
"""

import dataclasses
import functools
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal, NamedTuple, get_args

import tyro
from floors import Rates
from gpu_pytorch import pytorch_calls
from gpu_steps import LARGE, SMALL, Sizes, our_calls
from machine import describe_machine
from rich.console import Console
from sides import Side, SideError

from tinymodel_jax.commands.frame import USER_PATHS
from tinymodel_jax.training.flops import training_flops_per_token

Name = Literal["lm", "relu", "topk", "sweep", "generate", "ablate", "graph"]
OURS, PYTORCH = "tinymodel_jax", "PyTorch"
COMPARED: tuple[Name, ...] = ("lm", "relu", "topk")
"""Cases that PyTorch runs as well."""
LONGEST_CALL = 180.0
"""Seconds of a call, its compilation included, after which it counts as failed."""
PUBLISHED_TOKENS, PUBLISHED_GOAL = 987e6, 600.0
"""Tokens that the published model was trained on, and the seconds in which one GPU is to do it."""
Times = dict[str, dict[str, list[float]]]
"""Seconds of every round, by call and side."""


class Device(NamedTuple):
    """What JAX computes on."""

    platform: str
    kind: str
    peak: float | None
    """Dense bfloat16 FLOP/s of the data sheet, if known."""
    rates: Rates


class Row(NamedTuple):
    """One figure."""

    title: str
    unit: str
    rates: dict[str, float]
    """Units per second, by side."""
    remark: str = ""
    goal: str = ""

    def shown(self) -> str:
        """Return the figure as a line of text."""
        ours, theirs = self.rates[OURS], self.rates.get(PYTORCH)
        parts = [f"{self.title}: {ours:,.1f} {self.unit}/s"]
        if theirs is not None:
            parts.append(f"PyTorch {theirs:,.1f}, ratio {theirs / ours:.3f}")
        parts += [self.remark] * bool(self.remark) + [f"goal {self.goal}"] * bool(self.goal)
        return "; ".join(parts)


def main(
    small: bool = False,
    rounds: int = 3,
    only: tuple[Name, ...] = get_args(Name),
    seconds: float = 540,
    dictionary_batch: int | None = None,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json", metavar="FILE")] = None,
) -> None:
    """Measure training and analyses on the accelerator that JAX finds.

    Args:
        small: run tiny sizes, on a CPU too.
        rounds: rounds of every case; the medians are reported.
        only: cases to run.
        seconds: after this time, what is left is not run.
        dictionary_batch: vectors per step of the large dictionaries; 32,768 need about 30 GB.
        json_file: file to write all results to, after every case.
    """
    end = time.monotonic() + seconds
    sizes = SMALL if small else LARGE
    if dictionary_batch is not None:
        sizes = dataclasses.replace(sizes, dictionary_batch=dictionary_batch)
    console = Console(soft_wrap=True, highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        device, makers, problem = find_sides(folder, sizes, small)
        facts = describe_machine() | {
            "accelerator": device.kind,
            "measured": device.rates.described(),
            "rounds": f"{rounds} of {sizes.steps} steps",
            PYTORCH: problem or "compared",
        }
        for name, fact in facts.items():
            console.print(f"{name}: {fact}")
        cases: dict[str, Any] = {}
        for name in only:
            used = makers if name in COMPARED else {OURS: makers[OURS]}
            times, problems = measure(name, used, calls_of(name, sizes), rounds, end)
            rows = rows_of(name, times, sizes, device)
            cases[name] = {"rows": [row._asdict() for row in rows], "seconds": times, "problems": problems}
            for line in (*(row.shown() for row in rows), *(f"FAILED {problem}" for problem in problems)):
                console.print(line)
            if json_file is not None:
                content = {"machine": facts, "sizes": dataclasses.asdict(sizes), "cases": cases}
                json_file.write_text(json.dumps(content, indent=2) + "\n")
    failed = [name for name, case in cases.items() if case["problems"]]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; the reasons are above.")


def find_sides(folder: str, sizes: Sizes, small: bool) -> tuple[Device, dict[str, Callable[[], Side]], str]:
    """Return the device, what starts each side, and why PyTorch is left out, or "".

    Raises:
        SystemExit: there is no accelerator, and sizes are not small.
    """
    makers = {OURS: functools.partial(Side, functools.partial(our_calls, sizes=sizes), folder)}
    with makers[OURS]() as ours:
        platform, kind, peak = ours.ask("device", LONGEST_CALL)
        if platform == "cpu" and not small:
            raise SystemExit("JAX finds no accelerator; --small runs tiny sizes on this CPU.")
        device = Device(platform, kind, peak, ours.ask("rates", LONGEST_CALL))
    missing = [name for name in ("torch", "tiny_model") if importlib.util.find_spec(name) is None]
    if missing:
        return device, makers, f"left out: not installed: {', '.join(missing)} (PyPI torch, tinymodel)"
    make = functools.partial(Side, functools.partial(pytorch_calls, sizes=sizes), folder)
    try:
        with make() as pytorch:
            found = pytorch.ask("device", LONGEST_CALL)
    except SideError as error:
        return device, makers, f"left out: {error}"
    if found == "cpu" and device.platform != "cpu":
        return device, makers, "left out: it sees no GPU"
    return device, {**makers, PYTORCH: make}, ""


def calls_of(name: Name, sizes: Sizes) -> list[str]:
    """Return the calls of a case."""
    several = {"sweep": sizes.sweep_members, "generate": sizes.generated}
    return [f"{name}-{n}" for n in several[name]] if name in several else [name]


def measure(
    name: str, makers: dict[str, Callable[[], Side]], calls: list[str], rounds: int, end: float
) -> tuple[Times, list[str]]:
    """Return the times of a case's calls, and what failed; a side that fails does not take part any longer.

    Args:
        end: when `time.monotonic()` reaches it, what is left counts as failed.
    """
    times: Times = {}
    problems: list[str] = []
    with ExitStack() as stack:
        sides = {label: stack.enter_context(make()) for label, make in makers.items()}
        for call, _ in ((call, i) for call in calls for i in range(rounds)):
            for label, side in list(sides.items()):
                left = end - time.monotonic()
                try:
                    if left <= 0:
                        raise SideError(f"{call}: no time left")
                    seconds = side.ask(call, min(left, LONGEST_CALL))
                    times.setdefault(call, {}).setdefault(label, []).append(seconds)
                except SideError as error:
                    problems.append(f"{name}, {label}: {error}")
                    del sides[label]
    return times, problems


def rows_of(name: Name, times: Times, sizes: Sizes, device: Device) -> list[Row]:
    """Return the figures of what was measured of this package."""
    rows = []
    for call, by_side in times.items():
        if OURS not in by_side:
            continue
        seconds = {side: median(values) for side, values in by_side.items()}
        count = int(call.rpartition("-")[2]) if "-" in call else 1
        first = times[calls_of(name, sizes)[0]].get(OURS)
        speedup = "" if count == 1 or first is None else f"{count * median(first) / seconds[OURS]:.2f} x one"
        rows.append(_row(name, seconds, count, speedup, sizes, device))
    return rows


def _row(name: Name, seconds: dict[str, float], count: int, speedup: str, sizes: Sizes, device: Device) -> Row:
    """Return the figure of one call.

    Args:
        count: members of a sweep, or prompts.
        speedup: the rate, compared with that of one member or prompt.
    """
    ours = seconds[OURS]

    def per_second(units: float) -> dict[str, float]:
        return {side: units / one for side, one in seconds.items()}

    size = f"{sizes.width} -> {sizes.n_features:,}"
    if name == "lm":
        rows, length = sizes.batch
        rates = per_second(rows * length)
        share = device.peak and rates[OURS] * training_flops_per_token(sizes.model, length) / device.peak
        remark = f"{share:.1%} of the bf16 peak" if share else "peak not known"
        remark += f"; the published training in {PUBLISHED_TOKENS / rates[OURS] / 60:,.1f} minutes"
        goal = f"ratio < 1, ≤ {PUBLISHED_GOAL / 60:.0f} minutes"
        return Row(f"language model, {rows} x {length}", "tokens", rates, remark, goal)
    if name in ("relu", "topk"):
        kind = "ReLU" if name == "relu" else f"TopK {sizes.k}"
        return Row(f"{kind} dictionary, {size}", "vectors", per_second(sizes.dictionary_batch), goal="ratio < 1")
    if name == "sweep":
        title = f"sweep of {count}, {sizes.width} -> {sizes.sweep_features:,}"
        return Row(title, "vectors", per_second(count * sizes.sweep_batch), speedup)
    if name == "generate":
        floor = device.rates.floor(0, 4 * sizes.model.n_params)
        remark = f"{ours / floor:.2f} x reading the weights{f', {speedup}' if speedup else ''}"
        return Row(f"{count} prompts x {sizes.new_tokens} tokens", "tokens", per_second(count), remark)
    if name == "ablate":
        title = f"ablations, {sizes.graph_tokens} tokens, {size}"
        return Row(title, "features", per_second(sizes.ablated))
    title = f"attribution graph, {sizes.graph_tokens} tokens, {sizes.graph_nodes:,} nodes"
    return Row(title, "nodes", per_second(sizes.graph_nodes), f"{ours:.2f} s per graph", "≤ 1 s")


if __name__ == "__main__":
    tyro.cli(main, registry=USER_PATHS)
