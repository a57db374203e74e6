"""The benchmarks that need no PyTorch run, and `--help` of every one lists its options."""

import importlib
import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinymodel_jax.training.flops import training_flops_per_token

ROOT = Path(__file__).parent.parent
SCRIPTS = {
    "circuits": "--rounds",
    "gpu": "--rounds",
    "load": "--rounds",
    "name_copying": "--pictures",
    "quality": "--steps",
    "sweeps": "--rounds",
    "tokenizer": "--rounds",
    "training": "--rounds",
    "vs_reference": "--rounds",
}
"""A script, and an option of its own."""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "COLUMNS": "200"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_names_the_options(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = str(ROOT / f"benchmarks/{name}.py")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(script, run_name="__main__")
    assert done.value.code == 0
    assert SCRIPTS[name] in capsys.readouterr().out


@pytest.mark.slow
def test_every_case_of_the_accelerator_s_benchmark_runs_small_on_a_cpu(tmp_path: Path) -> None:
    """PyTorch's side runs where it is installed; the test environment is without it."""
    out = tmp_path / "results.json"
    done = run("benchmarks/gpu.py", "--small", "--rounds", "2", "--json", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    calls = {
        "lm": ["lm"],
        "relu": ["relu"],
        "topk": ["topk"],
        "sweep": ["sweep-1", "sweep-2"],
        "generate": ["generate-1", "generate-2"],
        "ablate": ["ablate"],
        "graph": ["graph"],
    }
    assert {name: [*case["seconds"]] for name, case in found["cases"].items()} == calls
    assert not any(case["problems"] for case in found["cases"].values())
    rows = [row for case in found["cases"].values() for row in case["rows"]]
    assert all(row["rates"]["tinymodel_jax"] > 0 and row["title"] in done.stdout for row in rows)
    assert len(rows) == 9
    assert {"processor", "versions", "accelerator", "measured", "PyTorch"} <= {*found["machine"]}


def failing_calls(folder: Path) -> dict[str, Callable[[], Any]]:
    return {
        "works": lambda: 2.0,
        "fails": lambda: [][1],
        "is slow": lambda: time.sleep(60),
        "dies": lambda: os._exit(3),
    }


def test_a_failed_call_says_why_and_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    gpu, sides = importlib.import_module("gpu"), importlib.import_module("sides")

    def start() -> Any:
        return sides.Side(failing_calls, str(tmp_path))

    monkeypatch.setattr(gpu, "LONGEST_CALL", 5.0)
    late = time.monotonic() + 60
    times, problems = gpu.measure("a", {"x": start}, ["works", "fails", "works"], 2, late)
    assert times == {"works": {"x": [2.0, 2.0]}}
    assert problems == ["a, x: fails: IndexError: list index out of range"]
    _, (problem,) = gpu.measure("a", {"x": start}, ["dies"], 1, late)
    assert problem == "a, x: dies ended its process (exit status 3)"
    monkeypatch.setattr(gpu, "LONGEST_CALL", 0.2)
    _, (problem,) = gpu.measure("a", {"x": start}, ["is slow"], 1, late)
    assert problem == "a, x: is slow took more than 0.2 s"
    _, (problem,) = gpu.measure("a", {"x": start}, ["works"], 1, time.monotonic())
    assert problem == "a, x: works: no time left"


@pytest.mark.slow
def test_the_circuits_benchmark_s_bundled_case_runs(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    done = run("benchmarks/circuits.py", "--only", "mini", "--rounds", "1", "--json", str(out))
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(out.read_text())["results"].values()
    assert 0 < found["products"] < found["warm"] < found["first"]
    assert 0 < found["before"] < found["peak"]


@pytest.mark.slow
def test_the_sweeps_benchmark_s_own_cases_run_small() -> None:
    code = """
import sweeps
from sweeps_top import search_and_products
sweeps.STORIES, sweeps.EVALUATED = 2, 2
calls = (*search_and_products(512, 64), *sweeps.evaluation_calls(), *sweeps.evaluation_calls(('Rm0', 'M1')))
for call in calls:
    call()
"""
    done = run("-c", f"import sys; sys.path.insert(0, 'benchmarks')\n{code}")
    assert done.returncode == 0, done.stderr


def test_the_floor_is_the_longer_of_products_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    floors, vs_reference = importlib.import_module("floors"), importlib.import_module("vs_reference")
    config = vs_reference.CONFIG
    only_products, only_bytes = floors.Rates(1.0, float("inf")), floors.Rates(float("inf"), 1.0)
    forward = training_flops_per_token(config, 256) / 3 * 8 * 256  # a step is a forward pass and twice as much backward
    assert vs_reference.floor("forward-8x256", only_products) == pytest.approx(forward)
    weights = 4 * (config.n_params - (config.d_vocab + config.n_ctx) * config.d_model)
    decoding = vs_reference.floor("generate-1x50", only_bytes)
    assert decoding == pytest.approx(50 * weights, rel=1e-3)  # the floor leaves out the biases
    assert vs_reference.floor("generate-32x50", only_bytes) == decoding


def test_without_an_accelerator_it_says_what_to_do() -> None:
    done = run("benchmarks/gpu.py")
    assert done.returncode == 1
    assert "--small" in done.stderr
    assert "Traceback" not in done.stderr
