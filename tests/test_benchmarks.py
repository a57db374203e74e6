"""The benchmarks that need no PyTorch run, and `--help` of every one lists its options."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

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
def test_the_accelerator_s_benchmark_runs_small_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    done = run("benchmarks/gpu.py", "--small", "--rounds", "2", "--json", str(out))
    assert done.returncode == 0, done.stderr
    assert "x ReLU" in done.stdout
    seconds = json.loads(out.read_text())["seconds"]
    assert {*seconds} == {"lm", "relu", "topk", "sweep-1", "sweep-2", "sweep-4", "sweep-8", "graph"}
    assert all(len(times) == 2 and min(times) > 0 for sides in seconds.values() for times in sides.values())


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
for call in (*search_and_products(512, 64), *sweeps.evaluation_calls()):
    call()
"""
    done = run("-c", f"import sys; sys.path.insert(0, 'benchmarks')\n{code}")
    assert done.returncode == 0, done.stderr


def test_without_an_accelerator_it_says_what_to_do() -> None:
    done = run("benchmarks/gpu.py")
    assert done.returncode == 1
    assert "--small" in done.stderr
    assert "Traceback" not in done.stderr
