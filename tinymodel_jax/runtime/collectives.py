"""What the processes of a program find out together; every process must call these functions in the same order.

`hosts.py` connects the processes. Only the first one writes files and prints. With one process, nothing here waits or
computes. Arrays are NumPy's, so no devices are at work while the processes exchange them, and they arrive bit for bit:
JAX would make float64 float32 on the way.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Shaped, UInt8

EXCHANGED = 2**24
"""Bytes of each process that are exchanged at once: every device receives those of all processes."""

T = TypeVar("T")


def is_first() -> bool:
    """Whether this process writes files and prints. The only function here that a single process may call alone."""
    return jax.process_index() == 0


def say(message: str) -> None:
    """Print a line on the first process."""
    if is_first():
        print(message, flush=True)


def warn(message: str) -> None:
    """Print a warning as one line on stderr, on the first process."""
    if is_first():
        print(f"warning: {message}", file=sys.stderr, flush=True)


def all_agree(answer: bool) -> bool:
    """Return whether `answer` is true on every process."""
    if jax.process_count() == 1:
        return answer
    return bool(np.all(multihost_utils.process_allgather(np.int32(answer))))


def of_first(number: int) -> int:
    """Return the first process's number on every process; the others' are ignored."""
    return int(gathered(np.array([number], np.int64))[0][0])


def on_first(action: Callable[[], object]) -> None:
    """Call `action` on the first process while the others wait.

    Raises:
        OSError, ValueError: the action's own error, on the first process.
        RuntimeError: the action failed, on the other processes.
    """
    on_all(lambda: action() if is_first() else None, "the first process")


def on_all(action: Callable[[], T], who: str = "another process") -> T:
    """Call `action` on every process and return its result; where it fails on one, all raise an error.

    Args:
        who: the process that failed, for the error of the others.

    Raises:
        OSError, ValueError: the action's own error.
        RuntimeError: the action failed on other processes only.
    """
    problem, result = None, None
    try:
        result = action()
    except (OSError, ValueError) as error:
        problem = error
    if not all_agree(problem is None):
        raise problem or RuntimeError(f"stopped because {who} failed; see its output.")
    return result  # pyright: ignore[reportReturnType]


def gathered(array: Shaped[np.ndarray, "length *shape"]) -> list[Shaped[np.ndarray, "_ *shape"]]:
    """Return the arrays of all processes, in the processes' order, on each of them.

    Args:
        array: of the same dtype on every process, and of the same shape except for the length of the first axis.
    """
    if jax.process_count() == 1:
        return [array]
    mine = np.ascontiguousarray(array)
    n_bytes = _exchanged(_bytes(np.array([mine.nbytes], np.int64))).view(np.int64)[:, 0]
    found = np.zeros((len(n_bytes), n_bytes.max()), np.uint8)
    sent = np.pad(_bytes(mine), (0, n_bytes.max() - mine.nbytes))
    for start in range(0, len(sent), EXCHANGED):
        found[:, start : start + EXCHANGED] = _exchanged(sent[start : start + EXCHANGED])
    return [one[:n].view(mine.dtype).reshape(-1, *mine.shape[1:]) for one, n in zip(found, n_bytes, strict=True)]


def summed(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the sums of named arrays over all processes, on each of them; names, dtypes and shapes are the same.

    Sums are taken in the arrays' dtype and in the processes' order, so every process gets the same numbers.
    """
    if jax.process_count() == 1:
        return dict(arrays)
    found: dict[str, np.ndarray] = {}
    for dtype in sorted({array.dtype for array in arrays.values()}, key=str):
        alike = {name: array for name, array in arrays.items() if array.dtype == dtype}
        flat = _sum(np.concatenate([array.ravel() for array in alike.values()]))
        ends = np.cumsum([array.size for array in alike.values()])[:-1]
        for (name, array), part in zip(alike.items(), np.split(flat, ends), strict=True):
            found[name] = part.reshape(array.shape)
    return {name: found[name] for name in arrays}


class SharedTimer:
    """Says after which turns the processes do something together that is due every few seconds, such as saving.

    All processes take the same number of turns. The first one's clock counts. The processes do not meet after every
    turn, but after 1, 2, 4, 8 … of them until the time is up; it then starts anew. One process looks every time.

    Args:
        seconds: time between two answers that are true, at least.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._start()

    def is_due(self) -> bool:
        """Return whether the time is up; call this once after every turn."""
        self._turns += 1
        alone = jax.process_count() == 1
        if not alone and self._turns & (self._turns - 1):
            return False
        up = time.monotonic() - self._started > self._seconds
        if not (up if alone else of_first(up)):
            return False
        self._start()
        return True

    def _start(self) -> None:
        self._started, self._turns = time.monotonic(), 0


def settled(arrays: T, exchange: bool | None = None) -> T:
    """Return the arrays; on CPUs, first wait until they are computed if devices exchange values in the program.

    There, the collectives of two programs that run at once can each hold a thread that the other waits for.

    Args:
        exchange: whether they do; None: if there are several processes.
    """
    exchange = jax.process_count() > 1 if exchange is None else exchange
    if exchange and jax.default_backend() == "cpu":
        jax.block_until_ready(arrays)
    return arrays


def _sum(flat: Shaped[np.ndarray, " n"]) -> Shaped[np.ndarray, " n"]:
    step = max(1, EXCHANGED // flat.itemsize)
    parts = [flat[start : start + step] for start in range(0, len(flat), step)]
    sums = [_exchanged(_bytes(part)).view(flat.dtype).sum(axis=0, dtype=flat.dtype) for part in parts]
    return np.concatenate([flat[:0], *sums])


def _exchanged(mine: UInt8[np.ndarray, " n"]) -> UInt8[np.ndarray, "processes n"]:
    return np.ascontiguousarray(multihost_utils.process_allgather(mine))


def _bytes(array: Any) -> UInt8[np.ndarray, " n"]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
