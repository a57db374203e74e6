"""What tests of the training programs share: a small data folder, runs in this process or another, their results."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
from conftest import as_users_run_it

from tinymodel_jax.training.data import DataMeta
from train.__main__ import main
from train.run_folder import MetricsLog

ROOT = Path(__file__).parent.parent
VOCAB, ROW = 64, 24
WITHOUT_PRIVILEGES = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if shutil.which("setpriv") else []
"""Before a command, lets the permissions of files count for root too."""


def write_counting_data(folder: Path) -> Path:
    """Write a prepared folder of rows that count upwards, as something to learn; a third end with [PAD]."""
    rng = np.random.default_rng(0)
    starts = rng.integers(0, VOCAB - 4, (200, 1))
    rows = (starts + np.arange(ROW)) % (VOCAB - 4)
    rows[:, 0] = VOCAB - 4
    rows[::3, -6:] = VOCAB - 2
    rows.astype("<u2")[:150].tofile(folder / "train.bin")
    rows.astype("<u2")[150:].tofile(folder / "valid.bin")
    counts = {"train": 150, "valid": 50}
    meta = DataMeta(
        row_length=ROW,
        vocab_size=VOCAB,
        packed=False,
        rows=counts,
        tokens={"train": 150 * ROW - 50 * 6, "valid": 50 * ROW - 17 * 6},
        stories=counts,
        left_out={"refused": 0, "empty": 0},
        source="counting",
        source_fingerprint="0",
        tokenizer_fingerprint="0",
        limit=None,
        valid_fraction=None,
        seed=0,
    )
    (folder / "data.json").write_text(meta.to_json())
    return folder


def train_here(*arguments: str | Path) -> int:
    """Run `python -m train` in this process; return its exit status."""
    with as_users_run_it(), jax.numpy_dtype_promotion("standard"):
        return main([*map(str, arguments)])


@contextmanager
def signal_at(step: int, number: signal.Signals) -> Iterator[None]:
    """Send this process a signal as soon as the metrics of a step are on disk."""
    append = MetricsLog.append

    def append_and_signal(log: MetricsLog, lines: list[Mapping[str, Any]]) -> None:
        append(log, lines)
        if lines[-1]["step"] == step:
            os.kill(os.getpid(), number)

    with mock.patch.object(MetricsLog, "append", append_and_signal):
        yield


def start(*arguments: str | Path, devices: int = 1, privileged: bool = True) -> subprocess.Popen[str]:
    """Start `python -m train` in a separate process with this many virtual devices."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment["XLA_FLAGS"] = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    command = [*([] if privileged else WITHOUT_PRIVILEGES), sys.executable, "-m", "train", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a run that has to succeed; return what it wrote to stderr."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    return err


def wait_for_lines(out: Path, process: subprocess.Popen[str], count: int) -> None:
    """Wait until a run has written this many lines of metrics; fail if it ends earlier."""
    log = out / "metrics.jsonl"
    while not log.exists() or log.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def checkpoint_arrays(folder: Path) -> dict[str, np.ndarray]:
    """Return every array of a checkpoint's state by its path."""
    restored = ocp.StandardCheckpointer().restore((folder / "state").absolute())
    return {
        jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(restored)
    }


def metrics_of(out: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
