"""Contenders of a benchmark: each runs in its own process and is timed alone, while other processes are watched.

`Side` starts a process, which makes named calls on request. Every measurement also says how busy other processes kept
the cores, so that a benchmark can discard measurements on a busy machine. Linux only.
"""

import functools
import multiprocessing
import os
import resource
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

Calls = dict[str, Callable[[], Any]]
QUIET = 0.05
"""Largest share of the cores that other processes may use during a measurement that counts."""
ATTEMPTS = 20
"""Rounds tried for each one that counts."""
SHORTEST_MEASUREMENT = 0.5
STAT = Path("/proc/stat")


class Measured(NamedTuple):
    """The duration of a call."""

    seconds: float
    others: float
    """Share of all cores that other processes used in that time."""


class SideError(RuntimeError):
    """A call failed, took too long, or its process ended."""


class Side:
    """A process that holds one library and makes calls on request."""

    def __init__(self, make_calls: Callable[[Path], Calls], folder: str):
        context = multiprocessing.get_context("spawn")
        self._connection, far_end = context.Pipe()
        self._process = context.Process(target=serve, args=(make_calls, Path(folder), far_end), daemon=True)
        self._process.start()
        far_end.close()  # so that a dead process raises EOFError here instead of blocking forever

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.join()

    def measure(self, name: str) -> Measured:
        """Return the duration of a call, and the share of the cores that other processes used."""
        return self._answer(name, False, None)

    def ask(self, name: str, longest: float | None = None) -> Any:
        """Return the result of one call.

        Args:
            longest: seconds to wait for it; None for as long as it takes.

        Raises:
            SideError: the call failed, took longer, or ended its process.
        """
        return self._answer(name, True, longest)

    def _answer(self, name: str, wants_result: bool, longest: float | None) -> Any:
        try:
            self._connection.send((name, wants_result))
            if not self._connection.poll(longest):
                raise SideError(f"{name} took more than {longest:.3g} s")
            result = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join()
            raise SideError(f"{name} ended its process (exit status {self._process.exitcode})") from error
        if isinstance(result, SideError):
            raise result
        return result


def quiet_rounds(
    name: str, measure: Callable[[], dict[str, Measured]], rounds: int, quiet: float = QUIET
) -> tuple[dict[str, list[float]], int]:
    """Return the seconds of `rounds` quiet rounds, by side, and the number of rounds left out as not quiet.

    Args:
        name: of what is measured, for the error.
        measure: runs one round of all sides.
        quiet: largest share of the cores that others may use in a round that counts.

    Raises:
        SystemExit: others keep the machine busy.
    """
    times: dict[str, list[float]] = {}
    for tried in range(1, rounds * ATTEMPTS + 1):
        measured = measure()
        if max(one.others for one in measured.values()) <= quiet:
            for side, one in measured.items():
                times.setdefault(side, []).append(one.seconds)
        done = len(next(iter(times.values()), []))
        if done == rounds:
            return times, tried - done
    raise SystemExit(f"{name}: other processes kept the cores busy in too many rounds; try again later.")


def once(make: Callable[[], Callable[[], Any]]) -> Callable[[], Any]:
    """Return a call that is created on first use, so that a process holds only what it measures."""
    made = functools.cache(make)
    return lambda: made()()


def serve(make_calls: Callable[[Path], Calls], folder: Path, connection: Connection) -> None:
    """Answer requests until the other side ends this process."""
    calls = make_calls(folder)
    while True:
        name, wants_result = connection.recv()
        try:
            result = calls[name]() if wants_result else measured(calls[name])
            connection.send(np.asarray(result) if hasattr(result, "shape") else result)
        except Exception as error:  # the other side decides what a failure means
            traceback.print_exc()
            connection.send(SideError(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"))


def measured(call: Callable[[], Any]) -> Measured:
    """Time calls for at least half a second; the kernel counts others' use of the cores in steps of 10 ms only."""
    seconds: list[float] = []
    own, busy, start = own_seconds(), busy_seconds(), time.perf_counter()
    while not seconds or time.perf_counter() - start < SHORTEST_MEASUREMENT:
        before = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - before)
    own, busy, elapsed = own_seconds() - own, busy_seconds() - busy, time.perf_counter() - start
    return Measured(median(seconds), max(0.0, busy - own) / elapsed / (os.cpu_count() or 1))


def own_seconds() -> float:
    """Return the core-seconds that this process and the children it has waited for have used."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def busy_seconds() -> float:
    """Return the core-seconds that all processes together have used since the machine started."""
    user, nice, system, _, _, interrupt, soft_interrupt, *_ = map(int, STAT.read_text().split()[1:11])
    return (user + nice + system + interrupt + soft_interrupt) / os.sysconf("SC_CLK_TCK")
