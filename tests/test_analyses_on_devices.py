"""The numbers of analyses on several devices and processes are those of one device."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from analyses import ANALYSES, RESUMABLE, assert_same, measure, resumed, stopped
from eight_devices import ROOT, on_eight_devices
from two_processes import on_two_processes, two_processes

MEASURE = """
import json, sys
sys.path.insert(0, "tests")
import jax
import analyses

print(json.dumps([len(jax.devices()), analyses.measure(FOLDER, NAMES)]))
"""
MEASURE_AND_RESUME = """
import json
import analyses

folder, stopped_by_one, stopped_by_two = sys.argv[3:]
found = analyses.measure(folder)
analyses.stopped(folder, stopped_by_two, turns=2)
print(json.dumps([found, analyses.resumed(folder, stopped_by_one)]))
"""


@pytest.fixture(scope="module")
def alone(story_model: Path) -> dict[str, dict[str, Any]]:
    """The numbers of all analyses on one device."""
    return measure(story_model)


def on_eight(folder: Path, *names: str) -> dict[str, dict[str, Any]]:
    code = MEASURE.replace("FOLDER", repr(str(folder))).replace("NAMES", repr(names))
    n_devices, found = on_eight_devices(code)
    assert n_devices == 8
    return found


def test_eight_devices_evaluate_as_one_does(story_model: Path) -> None:
    assert_same(on_eight(story_model, "evaluations"), measure(story_model, ["evaluations"]))


@pytest.mark.slow
def test_eight_devices_measure_what_one_does(story_model: Path, alone: dict[str, dict[str, Any]]) -> None:
    names = [name for name in ANALYSES if name != "evaluations"]
    assert_same(on_eight(story_model, *names), {name: alone[name] for name in names})


@pytest.mark.slow
def test_two_processes_measure_what_one_device_does_and_any_number_resumes(
    story_model: Path, alone: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    work = [tmp_path / "stopped by one", tmp_path / "stopped by two"]
    for folder in work:
        folder.mkdir()
    stopped(story_model, work[0], turns=2)
    expected = {name: alone[name] for name in RESUMABLE}
    arguments = map(str, (story_model, *work))
    for found, (left, numbers) in on_two_processes(MEASURE_AND_RESUME, *arguments, devices=2):
        assert_same(found, alone)
        assert left == {"importance": [2, 4], "search": [2, 10, 18, 26, 34]}
        assert_same(numbers, expected)
    left, numbers = resumed(story_model, work[1])
    assert left == {"importance": [4], "search": [*range(8, 37, 2)]}
    assert_same(numbers, expected)


@pytest.mark.slow
def test_of_two_processes_that_run_a_command_the_first_alone_prints_and_writes(
    story_model: Path, alone: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    asked = ("--model", str(story_model), "--data", "storyworld", "--site", "M1", "--limit", "5", "--json")
    command = [sys.executable, "-m", "tinymodel_jax", "importance", *asked]
    outs = [tmp_path / "first" / "out.json", tmp_path / "second" / "out.json"]
    processes = [
        subprocess.Popen(
            [*command, *who, "-o", str(out)], cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for who, out in zip(two_processes(), outs, strict=True)
    ]
    (shown, _), (nothing, _) = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert nothing == b""
    assert not outs[1].parent.exists()
    table = json.loads(shown)
    assert table == json.loads(outs[0].read_text())
    assert sorted(path.name for path in outs[0].parent.iterdir()) == ["out.json", "out.png"]
    for entry in table["features"]:
        expected = [alone["importance"][f"kl_all {field}"][entry["feature"]] for field in ("mean", "half_width")]
        assert entry["kl_all"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
