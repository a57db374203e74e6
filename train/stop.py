"""A stop that several training processes make at the same step, after a signal to any of them."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tinymodel_jax.runtime.collectives import settled


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """In the block, SIGTERM and SIGINT to any process request a stop; a second signal ends this process at once.

    Yields:
        A function that returns whether to stop now. Every process must call it after every step, and all get the same
        answer. With several processes the answer is one step late, so that no process waits for the current step.
    """
    asked = threading.Event()
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(number: int, frame: Any) -> None:
        del frame
        asked.set()
        signal.signal(number, signal.SIG_DFL)
        print(
            "stopping after this step; a second signal ends the run at once, without saving",
            file=sys.stderr,
            flush=True,
        )

    for number in before:
        signal.signal(number, ask)
    try:
        yield asked.is_set if jax.process_count() == 1 else _vote(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _vote(asked: threading.Event) -> Callable[[], bool]:
    """Return a function that starts to count the processes asked to stop, and returns the result of the last count."""
    mesh = Mesh(np.array(jax.devices()), ("device",))
    places = NamedSharding(mesh, P("device"))
    count = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, P()))
    begun: list[jax.Array] = []

    def stops() -> bool:
        mine = np.full(1, asked.is_set(), np.int32)
        begun.append(settled(count(jax.make_array_from_callback((mesh.size,), places, lambda index: mine))))
        return len(begun) > 1 and int(begun.pop(0)) > 0

    return stops
