"""The lock of a run's folder: one run at a time, the second names the first, and the lock ends with its process."""

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT, metrics_of, start, write_counting_data

from train.bundle import bundle
from train.run_folder import open_run_folder
from train.run_lock import held_folder

HOLD = """
import sys, time
from train.run_lock import held_folder
with held_folder(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_in_a_line_that_names_the_first_and_may_begin_when_that_has_ended(
    tmp_path: Path,
) -> None:
    out = tmp_path / "new" / "run"
    with held_folder(out):
        open_run_folder(out, {"steps": 1})
        says = rf"run is in use by another run \(process {os.getpid()} on .+ since 2"
        with pytest.raises(ValueError, match=says) as error, held_folder(out):
            pass
        assert "\n" not in str(error.value)
    with held_folder(out):
        open_run_folder(out, {"steps": 1})
    assert [path.name for path in out.iterdir()] == ["config.json"]


def test_a_process_that_is_killed_leaves_no_lock(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"process {process.pid} on "), held_folder(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    with held_folder(tmp_path):
        assert f"process {os.getpid()} on " in (tmp_path / "run.lock").read_text()


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with held_folder(tmp_path):
        pass
    warning = capsys.readouterr().err
    assert re.fullmatch(r"warning: .+ cannot lock files \(Operation not supported\); make sure .+\n", warning)


def test_a_folder_of_something_else_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("dear")
    with pytest.raises(ValueError, match="not a training run"), held_folder(tmp_path):
        open_run_folder(tmp_path, {"steps": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_second_bundle_in_a_work_folder_is_refused(tmp_path: Path) -> None:
    with held_folder(tmp_path / "work"), pytest.raises(ValueError, match="work is in use by another run"):
        bundle(tmp_path / "mini", work=tmp_path / "work")
    assert not (tmp_path / "mini").exists()


@pytest.mark.slow
def test_of_two_runs_started_at_once_one_trains_and_the_other_says_so(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    data, out = write_counting_data(tmp_path / "data"), tmp_path / "run"
    options = ("lm", "--preset", "smoke", "--data", data, "--out", out, "--steps", "300", "--batch-size", "4")
    processes = [start(*options) for _ in range(2)]
    results = sorted((process.communicate(timeout=300)[1], process.returncode, process.pid) for process in processes)
    (_, first, pid), (error, second, _) = results
    assert (first, second) == (0, 1)
    assert re.fullmatch(rf"train: {out} is in use by another run \(process {pid} on .+\n", error)
    assert [line["step"] for line in metrics_of(out)] == list(range(1, 301))
