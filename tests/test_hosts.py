"""Several processes that train together: the options, the stop, and real pairs of processes on loopback."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from runs import VOCAB, finish, metrics_of, start, wait_for_lines, write_counting_data
from two_processes import on_two_processes, two_processes

from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.runtime.collectives import (
    SharedTimer,
    all_agree,
    gathered,
    of_first,
    on_all,
    on_first,
    settled,
    summed,
)
from tinymodel_jax.runtime.hosts import Hosts, join_hosts
from tinymodel_jax.runtime.rows import row_devices, rows_of_turn, turns
from train.stop import stop_requests

STEPS = 20
LOSS_TOLERANCE = 1e-5
"""float32 sums in another order, on losses near 4."""
SECONDS_TO_STOP = 60
"""Generous: several processes share few cores in tests."""


# The options and the small parts, in one process


@pytest.mark.parametrize(
    ("hosts", "says"),
    [
        (Hosts(n_processes=2), "--n-processes 2 --process-id None: they need --coordinator"),
        (Hosts("auto", process_id=0), "need --coordinator HOST:PORT"),
        (Hosts("somewhere", 2, 0), "--coordinator somewhere is neither HOST:PORT"),
        (Hosts(":1234", 2, 0), "--coordinator :1234 is neither"),
        (Hosts("host:port", 2, 0), "--coordinator host:port is neither"),
        (Hosts("host:1234", 2), "--process-id None: give both"),
        (Hosts("host:1234", 2, 2), "--n-processes 2 --process-id 2: give both"),
        (Hosts("host:1234", 2, -1), "--process-id -1"),
    ],
)
def test_options_that_do_not_fit_together_are_an_error_that_quotes_them(hosts: Hosts, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        join_hosts(hosts, "train")


def test_one_process_agrees_with_itself_and_does_the_first_ones_work() -> None:
    done = []
    on_first(lambda: done.append(1))
    assert done == [1]
    assert all_agree(True)
    assert not all_agree(False)
    array = jnp.ones(3)
    assert settled(array) is array
    assert on_all(lambda: 3) == 3
    for ask in (on_first, on_all):
        with pytest.raises(FileNotFoundError, match="missing"):
            ask(lambda: Path("missing").read_text())


def test_one_process_takes_every_turn_and_one_device_gets_arrays_as_they_are() -> None:
    assert list(turns(4, 11, 3)) == [4, 7, 10]
    assert [rows_of_turn(turn, 11, 3) for turn in turns(4, 11, 3)] == [slice(4, 7), slice(7, 10), slice(10, 11)]
    array = np.arange(3.0)
    assert summed({"a": array})["a"] is array
    assert gathered(array)[0] is array
    assert of_first(5) == 5
    devices = row_devices({"W": array})
    assert devices.n == 1
    assert devices.rows(array) is array
    assert devices.shared({"W": array})["W"] is array
    timer = SharedTimer(0.0)
    assert [timer.is_due() for _ in range(3)] == [True] * 3
    assert not SharedTimer(1000.0).is_due()


EXCHANGE = """
import json
import jax, numpy as np
from tinymodel_jax.runtime import collectives
from tinymodel_jax.runtime.rows import rows_of_turn, turns

collectives.EXCHANGED = 64  # several exchanges for one array
which = jax.process_index()
alone = np.arange(10 * which + 3)[:, None] / 3
parts = collectives.gathered(alone)
sums = collectives.summed({"third": np.full((3, 7), 1 / 3 + which), "large": np.arange(5) + 2**40, "one": np.ones(())})
timer = collectives.SharedTimer(0.0)

def fail():
    if which:
        raise ValueError("mine")

try:
    collectives.on_all(fail)
except (ValueError, RuntimeError) as error:
    problem = str(error)
print(json.dumps({
    "parts": [part.tolist() for part in parts], "empty": [len(part) for part in collectives.gathered(alone[:0])],
    "sums": [sums["third"].tolist(), sums["large"].tolist(), float(sums["one"])],
    "of_first": collectives.of_first(7 + which), "due": [timer.is_due() for _ in range(3)], "problem": problem,
    "rows": [[*range(11)][rows_of_turn(turn, 11, 2)] for turn in turns(0, 11, 2)]}))
"""


@pytest.mark.slow
def test_two_processes_exchange_arrays_to_the_bit_and_take_turns() -> None:
    first, second = on_two_processes(EXCHANGE)
    assert first["parts"] == [(np.arange(n)[:, None] / 3).tolist() for n in (3, 13)]
    assert first["empty"] == [0, 0]
    assert first["sums"] == [np.full((3, 7), 1 / 3 + (1 / 3 + 1)).tolist(), (2 * (np.arange(5) + 2**40)).tolist(), 2.0]
    assert (first["of_first"], first["due"]) == (7, [True] * 3)
    own = [(one.pop("rows"), one.pop("problem")) for one in (first, second)]
    assert first == second
    assert own[0] == ([[0, 1], [4, 5], [8, 9]], "stopped because another process failed; see its output.")
    assert own[1] == ([[2, 3], [6, 7], [10]], "mine")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_for_a_stop_a_second_one_would_end_the_process_and_the_handlers_come_back(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    with stop_requests() as stop_requested:
        assert not stop_requested()
        os.kill(os.getpid(), number)
        assert stop_requested()
        assert signal.getsignal(number) is signal.SIG_DFL
    assert signal.getsignal(number) is before
    assert capsys.readouterr().err == "stopping after this step; a second signal ends the run at once, without saving\n"


# Pairs of processes


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_counting_data(tmp_path_factory.mktemp("hosts-data"))


def start_one(data: Path, out: Path, *options: str, devices: int = 1) -> subprocess.Popen[str]:
    run = ("--steps", str(STEPS), "--save-every", "5", "--eval-every", "10", "--batch-size", "4")
    return start("lm", "--preset", "smoke", "--data", data, "--out", out, *run, *options, devices=devices)


def start_two(data: Path, out: Path, *options: str, devices: int = 1) -> list[subprocess.Popen[str]]:
    return [start_one(data, out, *who, *options, devices=devices) for who in two_processes()]


def said(text: str) -> list[str]:
    """Return the lines that the project's own code printed; XLA announces connections and hardware too."""
    ours = re.compile(r"step \d|warning: |train: |Traceback|stopped at step|.*the model is in")
    return [line for line in text.splitlines() if ours.match(line)]


def finish_two(processes: list[subprocess.Popen[str]]) -> list[list[str]]:
    """Wait for processes that have to succeed; return what each said."""
    said_by = []
    for process in processes:
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, out + err
        said_by.append(said(out + err))
    return said_by


def assert_same_curve(out: Path, expected: Path) -> None:
    got, wanted = metrics_of(out), metrics_of(expected)
    assert [line["step"] for line in got] == list(range(1, STEPS + 1))
    for name in ("loss", "held_out_loss"):
        values = [[line[name] for line in lines if name in line] for lines in (got, wanted)]
        np.testing.assert_allclose(values[0], values[1], atol=LOSS_TOLERANCE, rtol=0)
    assert [line["tokens"] for line in got] == [line["tokens"] for line in wanted]


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process on one device."""
    out = tmp_path_factory.mktemp("hosts") / "alone"
    finish(start_one(data, out))
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "options"),
    [(1, ("--mesh", "model=2")), (2, ("--mesh", "data=2,model=2", "--fsdp"))],
    ids=["model", "both"],
)
def test_two_processes_train_as_one_does_and_the_first_alone_prints(
    data: Path, alone: Path, tmp_path: Path, devices: int, options: tuple[str, ...]
) -> None:
    first, second = finish_two(start_two(data, tmp_path / "pair", *options, devices=devices))
    assert_same_curve(tmp_path / "pair", alone)
    assert "the model is in" in first[0]
    assert second == []
    assert [line["step"] for line in metrics_of(tmp_path / "pair") if "sample" in line] == [10, 20]
    assert TinyModel(tmp_path / "pair").config.d_vocab == VOCAB


@pytest.mark.slow
def test_processes_find_each_other_by_what_slurm_says(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2"}
    processes = []
    for task in range(2):
        for name, value in {**job, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)}.items():
            monkeypatch.setenv(name, value)
        processes.append(start_one(data, tmp_path / "run", "--steps", "2", "--coordinator", "auto"))
    finish_two(processes)
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2]


@pytest.mark.slow
def test_sigterm_at_one_process_stops_both_at_one_step_and_one_process_goes_on(
    data: Path, alone: Path, tmp_path: Path
) -> None:
    out = tmp_path / "pair"
    processes = start_two(data, out, "--save-every", "1000")
    wait_for_lines(out, processes[0], 2)
    sent = time.monotonic()
    processes[1].send_signal(signal.SIGTERM)
    first, second = finish_two(processes)
    assert time.monotonic() - sent < SECONDS_TO_STOP
    lines = len(metrics_of(out))
    assert lines < STEPS
    assert f"stopped at step {lines} of {STEPS}; the same command resumes there" in first
    assert second == []
    assert [path.name for path in (out / "checkpoints").iterdir()] == [str(lines)]
    finish(start_one(data, out))
    assert_same_curve(out, alone)


@pytest.mark.slow
def test_two_processes_go_on_from_one_ones_checkpoint_and_skip_a_damaged_one(
    data: Path, alone: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(alone, out)
    shutil.rmtree(out / "checkpoints" / str(STEPS))
    shutil.rmtree(out / "model")
    newest = (out / "checkpoints" / "15" / "state").rglob("*")
    largest = max((path for path in newest if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    first, second = finish_two(start_two(data, out))
    warnings = [line for line in first if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert "checkpoint of step 15 is damaged" in warnings[0]
    assert second == []
    assert_same_curve(out, alone)
    assert TinyModel(out).config.d_vocab == VOCAB


DICTIONARY_STEPS = 10


def start_dictionaries(data: Path, lm: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    run = ("--steps", str(DICTIONARY_STEPS), "--save-every", "5", "--batch-size", "64", "--n-features", "32")
    sweep = ("--sites", "M0,A1", "--architecture", "topk", "--k", "2,4")
    return start("dictionaries", "--model", lm, "--data", data, "--out", out, *run, *sweep, *options)


@pytest.fixture(scope="module")
def dictionaries_alone(data: Path, alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dictionaries of one process on one device."""
    out = tmp_path_factory.mktemp("hosts") / "dictionaries"
    finish(start_dictionaries(data, alone, out))
    return out


def assert_same_dictionaries(out: Path, expected: Path) -> None:
    got, wanted = metrics_of(out), metrics_of(expected)
    assert [line["step"] for line in got] == list(range(1, DICTIONARY_STEPS + 1))
    for site in ("M0", "A1"):
        losses = [np.array([line[site]["loss"] for line in lines]) for lines in (got, wanted)]
        assert losses[0].shape == (DICTIONARY_STEPS, 2)
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    results = [json.loads((run / "sweep.json").read_text())["dictionaries"] for run in (out, expected)]
    for mine, theirs in zip(*results, strict=True):
        assert (mine["site"], mine["settings"]) == (theirs["site"], theirs["settings"])
        np.testing.assert_allclose(mine["results"]["ce_spliced"], theirs["results"]["ce_spliced"], rtol=1e-4)
        assert Dictionary.from_pretrained(out / mine["folder"]).config.n_features == 32


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["model=2", "sweep=2"])
def test_two_processes_train_dictionaries_as_one_does(
    data: Path, alone: Path, dictionaries_alone: Path, tmp_path: Path, mesh: str
) -> None:
    out = tmp_path / "pair"
    options = [(*who, "--mesh", mesh) for who in two_processes()]
    _, second = finish_two([start_dictionaries(data, alone, out, *option) for option in options])
    assert second == []
    assert_same_dictionaries(out, dictionaries_alone)


@pytest.mark.slow
def test_processes_of_another_number_go_on_with_dictionaries(
    data: Path, alone: Path, dictionaries_alone: Path, tmp_path: Path
) -> None:
    def without_the_end(run: Path, name: str) -> Path:
        out = tmp_path / name
        shutil.copytree(run, out)
        for result in (out / "checkpoints" / str(DICTIONARY_STEPS), out / "dictionaries"):
            shutil.rmtree(result)
        (out / "sweep.json").unlink()
        return out

    pair = without_the_end(dictionaries_alone, "pair")
    finish_two([start_dictionaries(data, alone, pair, *who) for who in two_processes()])
    assert_same_dictionaries(pair, dictionaries_alone)
    one = without_the_end(pair, "one")
    finish(start_dictionaries(data, alone, one))
    assert_same_dictionaries(one, dictionaries_alone)


@pytest.mark.slow
def test_an_error_of_the_first_process_ends_both_with_a_line_each(data: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("dear")
    started = time.monotonic()
    results = [(*process.communicate(timeout=300), process.returncode) for process in start_two(data, tmp_path)]
    assert [code for _, _, code in results] == [1, 1]
    assert "not a training run" in results[0][1]
    assert "the first process failed" in results[1][1]
    assert all(len(said(err)) == 1 for _, err, _ in results)
    assert time.monotonic() - started < SECONDS_TO_STOP, "neither waits for the other's end"


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_a_save_that_fails_at_either_process_ends_both_within_seconds(data: Path, tmp_path: Path, failing: int) -> None:
    out = tmp_path / "run"
    processes = start_two(data, out, "--steps", "100000", "--save-every", "20", "--eval-every", "1000000")
    while not (out / "checkpoints" / "40").exists():
        assert processes[0].poll() is None, processes[0].communicate()
        time.sleep(0.002)
    failed = time.monotonic()
    if failing == 0:  # the first process alone makes folders
        (out / "checkpoints").rename(out / "before")
        (out / "checkpoints").write_text("not a folder")
    else:
        resource.prlimit(processes[1].pid, resource.RLIMIT_FSIZE, (100, 100))
    results = [(*process.communicate(timeout=300), process.returncode) for process in processes]
    assert time.monotonic() - failed < 10, "5 s, and the steps to the next save"
    assert [code for _, _, code in results] == [1, 1]
    lines = [[line for line in said(err) if not line.startswith("step ")] for _, err, _ in results]
    assert [len(each) for each in lines] == [1, 1]
    assert f"{out}/checkpoints cannot be written: " in lines[failing][0]
    assert lines[1 - failing] == ["train: stopped because another process failed; see its output."]


@pytest.mark.slow
def test_processes_that_cannot_meet_are_one_line(data: Path, tmp_path: Path) -> None:
    process = start_one(data, tmp_path / "out", "--coordinator", "auto")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    (line,) = said(err)
    assert "not that of SLURM" in line
    assert not (tmp_path / "out").exists()
