"""Conversion, loading, import and first answers: time and memory of fresh processes.

    python benchmarks/load.py [--rounds 7] [--only checkpoint answers] [--json FILE]

`checkpoint` converts and loads a full-size synthetic checkpoint, with the published shapes in random bfloat16
(87.8 MB). `answers` runs commands on the bundled model whose programs are in the compilation cache, and divides their
time by that of `import jax`, which takes turns with them: of the processors (user and system), and on the clock. Every
number is the median of processes that did nothing else; files are in the system's cache, as after a download. It needs
no PyTorch. This process imports little, because the peak memory of a child process starts at that of its parent.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Literal, NamedTuple, get_args

import tyro
from machine import describe_machine
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tinymodel_jax.commands.frame import USER_PATHS

CONVERTER = Path(__file__).parents[1] / "convert_torch_weights.py"

WRITE = """
import sys
from pathlib import Path
import ml_dtypes, numpy as np
from tinymodel_jax.config import ModelConfig
from tinymodel_jax.io.convert import model_tensors
from tinymodel_jax.io.torch_files import save_torch_file
rng = np.random.default_rng(0)
shapes = {t.key: t.torch_shape for t in model_tensors(ModelConfig())}
state = {k: (0.03 * rng.standard_normal(s, dtype=np.float32)).astype(ml_dtypes.bfloat16) for k, s in shapes.items()}
save_torch_file(state, Path(sys.argv[1]))
"""
IMPORTS = """
import time
start = time.perf_counter()
import jax
after_jax = time.perf_counter()
import tinymodel_jax
after_package = time.perf_counter()
from tinymodel_jax import TinyModel
print(after_jax - start, after_package - after_jax, time.perf_counter() - after_package)
"""
LOAD = """
import sys, time
import jax
from tinymodel_jax import TinyModel
jax.block_until_ready(jax.numpy.zeros(1))
start = time.perf_counter()
lm = TinyModel(sys.argv[1])
jax.block_until_ready(lm.params)
print(time.perf_counter() - start)
"""

Part = Literal["checkpoint", "answers"]
PROMPT = "Once upon a time, there was a brave fox named"
ANSWERS = {
    "generate": ([PROMPT], 2.2),
    "features": ([PROMPT, "--site", "M1"], 2.2),
    "sweep": ([PROMPT, "--site", "M1"], 4.0),
}
"""Command -> arguments, and the largest ratio of its time to that of `import jax` that the project aims at."""


class Measurement(NamedTuple):
    """One line of the table."""

    title: str
    values: list[float]
    unit: str
    goal: float | None = None


class Finished(NamedTuple):
    """Time, memory and output of a process."""

    seconds: float
    cores: float
    """Seconds of all processors together, user and system."""
    peak_mb: float
    printed: list[float]


def main(
    rounds: int = 7,
    only: tuple[Part, ...] = get_args(Part),
    json_file: Annotated[Path | None, tyro.conf.arg(name="json", metavar="FILE")] = None,
) -> None:
    """Measure conversion, loading, import and first answers.

    Args:
        rounds: processes of each kind; the result is the median.
        only: parts to measure.
        json_file: file to write all values to.
    """
    parts = {"checkpoint": of_checkpoint, "answers": of_answers}
    with tempfile.TemporaryDirectory() as folder:
        measurements = [one for part in only for one in parts[part](Path(folder), rounds)]
    machine = describe_machine()
    console = Console()
    for name, fact in machine.items():
        console.print(f"{name}: {fact}", highlight=False)
    console.print(as_table(measurements))
    if json_file is not None:
        write_json(json_file, machine, measurements)


def of_answers(folder: Path, rounds: int) -> list[Measurement]:
    """Run the commands and `import jax` in turn, `rounds` times, after a run that fills the compilation cache."""
    os.environ["TINYMODEL_COMPILATION_CACHE"] = str(folder / "programs")
    commands = {name: ["-m", "tinymodel_jax", name, *given, "--model", "mini"] for name, (given, _) in ANSWERS.items()}
    for arguments in commands.values():
        run(*arguments)
    jax, answers = [], {name: [] for name in commands}
    for _ in track(range(rounds), description="first answers", console=Console(stderr=True)):
        jax.append(run("-c", "import jax"))
        for name, arguments in commands.items():
            answers[name].append(run(*arguments))
    return [
        Measurement("import jax, whole process", [one.seconds for one in jax], "s"),
        *(
            Measurement(
                f"tinymodel {name}, {what} / that of import jax",
                [getattr(one, field) / getattr(base, field) for one, base in zip(answers[name], jax, strict=True)],
                "x",
                goal,
            )
            for name, (_, goal) in ANSWERS.items()
            for what, field in (("processor time", "cores"), ("time on the clock", "seconds"))
        ),
    ]


def of_checkpoint(folder: Path, rounds: int) -> list[Measurement]:
    """Run all processes with the checkpoint in turn, `rounds` times."""
    source, destination = folder / "full_size.pt", folder / "converted"
    run("-c", WRITE, str(source))
    convert, load, load_pt, imports = [], [], [], []
    for _ in track(range(rounds), description="measuring", console=Console(stderr=True)):
        convert.append(run(str(CONVERTER), "lm", str(source), str(destination)))
        load.append(run("-c", LOAD, str(destination)))
        load_pt.append(run("-c", LOAD, str(source)))
        imports.append(run("-c", IMPORTS))
    in_jax, in_package, in_model = ([finished.printed[i] for finished in imports] for i in range(3))
    added = [package + model for package, model in zip(in_package, in_model, strict=True)]
    return [
        Measurement("convert_torch_weights.py lm, whole process", [c.seconds for c in convert], "s", 3),
        Measurement("its peak memory", [c.peak_mb for c in convert], "MB", 500),
        Measurement("TinyModel(converted folder), JAX imported", [x.printed[0] for x in load], "s", 1),
        Measurement("the same, whole process with its imports", [x.seconds for x in load], "s"),
        Measurement("its peak memory", [x.peak_mb for x in load], "MB"),
        Measurement("TinyModel(the .pt file), JAX imported", [x.printed[0] for x in load_pt], "s"),
        Measurement("import jax", in_jax, "s"),
        Measurement("import tinymodel_jax, after it", in_package, "s", 0.3),
        Measurement("from tinymodel_jax import TinyModel, after both", in_model, "s"),
        Measurement("the package and TinyModel together", added, "s"),
    ]


def run(*arguments: str) -> Finished:
    """Run Python in a new process.

    Raises:
        SystemExit: the process failed; its message is on stderr.
    """
    path = os.pathsep.join(filter(None, [str(CONVERTER.parent), os.environ.get("PYTHONPATH")]))
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{Path(arguments[0]).name} failed with exit status {process.returncode}.")
    numbers = [float(word) for word in printed.split()] if arguments[0] == "-c" else []
    return Finished(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6, numbers)


def as_table(measurements: list[Measurement]) -> Table:
    """Return a table of medians, extremes and goals."""
    table = Table()
    for column in ("measured", "median", "range", "goal"):
        table.add_column(column, justify="left" if column == "measured" else "right")
    for title, values, unit, goal in measurements:
        digits = 0 if unit == "MB" else 3
        limits = f"{min(values):.{digits}f} to {max(values):.{digits}f}"
        table.add_row(
            title, f"{median(values):.{digits}f} {unit}", limits, "" if goal is None else f"< {goal:g} {unit}"
        )
    return table


def write_json(path: Path, machine: dict[str, str], measurements: list[Measurement]) -> None:
    """Write a description of the machine and all values."""
    rows = [m._asdict() | {"median": median(m.values)} for m in measurements]
    path.write_text(json.dumps({"machine": machine, "measurements": rows}, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main, registry=USER_PATHS)
