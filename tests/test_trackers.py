"""TensorBoard's files read back, W&B through a stand-in, and the errors for missing packages."""

import importlib
import struct
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import metrics_of, train_here, write_counting_data

from train.run_folder import MetricsLog
from train.trackers import NO_TRACKING, Tracking, flat_metrics, open_trackers, require_trackers

event_pb2 = importlib.import_module("tensorboardX.proto.event_pb2")

LINES = [
    {"step": 1, "loss": 4.5, "tokens": 92, "sample": "Once"},
    {"step": 2, "tokens": 90, "M1": {"loss": [2.5, 3.0], "l0": [7.0, 8.0]}},
]
VALUES = [{"loss": 4.5, "tokens": 92}, {"tokens": 90, "M1/loss/0": 2.5, "M1/loss/1": 3, "M1/l0/0": 7, "M1/l0/1": 8}]
"""The numbers of `LINES`, by the names of their curves."""

Curves = dict[int, dict[str, float]]


def events(folder: Path) -> Iterator[Any]:
    """Yield the events of TensorBoard's files: records of a length, its checksum, the content and its checksum."""
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            yield event_pb2.Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]


def curves(folder: Path) -> tuple[Curves, list[str]]:
    """Return what TensorBoard shows: step -> name -> value, and the texts."""
    found: Curves = {}
    texts = []
    for event in events(folder):
        if event.session_log.status == event_pb2.SessionLog.START:
            found = {step: values for step, values in found.items() if step < event.step}
        for value in event.summary.value:
            if value.tensor.string_val:
                texts += [text.decode() for text in value.tensor.string_val]
            else:
                found.setdefault(event.step, {})[value.tag] = value.simple_value
    return found, texts


def test_nested_metrics_are_named_by_their_path() -> None:
    for line, values in zip(LINES, VALUES, strict=True):
        flat = dict(flat_metrics(line))
        assert {name: value for name, value in flat.items() if name not in ("step", "sample")} == values


def test_nothing_is_opened_or_loaded_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)
    require_trackers(NO_TRACKING)
    assert open_trackers(NO_TRACKING, tmp_path, {}, 0) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tracking", "says"),
    [
        (
            Tracking(tensorboard=True),
            r"--tensorboard needs the package tensorboardX.*pip install -e '\.\[tensorb",
        ),
        (Tracking(wandb="project"), r"--wandb needs the package wandb.*pip install -e '\.\[wandb\]'"),
    ],
)
def test_a_missing_package_is_an_error_that_says_how_to_install_it(
    tracking: Tracking, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=says):
        require_trackers(tracking)


def test_tensorboard_shows_the_lines_and_a_run_that_goes_on_replaces_what_it_does_again(tmp_path: Path) -> None:
    def add(first_step: int, lines: list[dict[str, Any]]) -> None:
        trackers = open_trackers(Tracking(tensorboard=True), tmp_path, {}, first_step)
        log = MetricsLog(tmp_path / "metrics.jsonl", first_step, trackers)
        log.append(lines)
        log.close()

    add(0, LINES)
    shown, texts = curves(tmp_path / "tensorboard")
    assert shown == {1: VALUES[0], 2: VALUES[1]}
    assert texts == ["Once"]

    add(1, [{"step": 2, "loss": 0.5}, {"step": 3, "loss": 0.25}])
    assert curves(tmp_path / "tensorboard")[0] == {1: VALUES[0], 2: {"loss": 0.5}, 3: {"loss": 0.25}}


class StandIn(types.ModuleType):
    """The used part of W&B; records every call."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[dict[str, Any]] = []

    def init(self, *, project: str, name: str, id: str, resume: str, config: Any, dir: str | None) -> Any:
        run = {"project": project, "name": name, "id": id, "resume": resume, "config": config, "dir": dir}
        logged: list[tuple[int, dict[str, Any]]] = []
        self.runs.append({**run, "logged": logged, "finished": False})
        return types.SimpleNamespace(
            log=lambda values, step: logged.append((step, values)), finish=lambda: self.runs[-1].update(finished=True)
        )


def test_wandb_gets_the_lines_and_a_run_that_goes_on_is_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("run", "other"):
        (tmp_path / name).mkdir()
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for step, line in enumerate(LINES):
        trackers = open_trackers(Tracking(wandb="stories"), tmp_path / "run", {"seed": 3}, step)
        for tracker in trackers:
            tracker.log(line)
            tracker.close()
    first, second = wandb.runs
    assert first["logged"] == [(1, {**VALUES[0], "sample": "Once"})]
    assert second["logged"] == [(2, VALUES[1])]
    for run in (first, second):
        assert (run["project"], run["name"], run["config"]) == ("stories", "run", {"seed": 3})
        assert (run["resume"], run["dir"], run["finished"]) == ("allow", str(tmp_path / "run"), True)
    assert first["id"] == second["id"]
    assert open_trackers(Tracking(wandb="stories"), tmp_path / "other", {}, 0)
    assert wandb.runs[2]["id"] != first["id"]


@pytest.mark.slow
def test_a_training_run_shows_what_its_metrics_say(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write_counting_data(data)
    options = ["--steps", "3", "--eval-every", "3", "--batch-size", "4", "--tensorboard"]
    out = tmp_path / "run"
    assert train_here("lm", "--preset", "smoke", "--data", data, "--out", out, *options) == 0
    shown, texts = curves(out / "tensorboard")
    lines = metrics_of(out)
    assert texts == [line["sample"] for line in lines if "sample" in line]
    for line in lines:
        numbers = {name: value for name, value in line.items() if name not in ("step", "sample")}
        assert shown[line["step"]] == pytest.approx(numbers, rel=1e-6)  # TensorBoard keeps float32
