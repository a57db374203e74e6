"""Several processes that train together, on one machine or many: how they connect, agree and stop.

All processes run the same program and call these functions in the same order. Only the first process writes files and
prints; an error there ends all processes. With one process, nothing here waits. SLURM, gcloud or a shell starts the
processes: docs/clusters.md.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # JAX has no public way to its key-value store
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

SHUTDOWN_SECONDS = 60
"""How long an ending process waits for the others before JAX ends all of them."""
FAILURE_SECONDS = 0.5
"""How often a process checks whether another one failed. After a failure it has twice as long to end by itself."""
_FAILED = "train/failed"

T = TypeVar("T")
_failing = threading.Event()


@dataclass(frozen=True)
class Hosts:
    """The processes of a run; the default is one."""

    coordinator: str | None = None
    """address of process 0, as HOST:PORT; auto reads it from SLURM, Open MPI, Kubernetes or the TPU pod"""
    n_processes: int | None = None
    """number of processes of the run; not with auto"""
    process_id: int | None = None
    """number of this process, from 0; not with auto"""


ONE_PROCESS = Hosts()


def join_hosts(hosts: Hosts) -> None:
    """Connect to the other processes of the run, if there are any. Call this before any device is used.

    Raises:
        ValueError: the options do not fit together, or `auto` finds no cluster in the environment.
        RuntimeError: the processes could not connect.
    """
    _check_options(hosts)
    if hosts.coordinator is None:
        return
    # JAX's preemption service handles SIGTERM only, and miscounts when Orbax calls it from another thread.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            None if hosts.coordinator == "auto" else hosts.coordinator,
            hosts.n_processes,
            hosts.process_id,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except ValueError as error:
        raise ValueError(
            f"--coordinator {hosts.coordinator}: the environment is not that of SLURM, Open MPI, Kubernetes or a TPU "
            f"pod ({error}); give HOST:PORT, --n-processes and --process-id."
        ) from error
    except RuntimeError as error:
        raise RuntimeError(f"--coordinator {hosts.coordinator}: the processes could not connect ({error}).") from error
    over = threading.Event()
    atexit.register(over.set)  # registered before JAX's own exit handler, which closes the client that the thread uses
    threading.Thread(target=_end_with_the_others, args=(over,), name="failures", daemon=True).start()


def end_all(status: int) -> None:
    """End all processes of the run after an error in this one, because the others may be waiting for it.

    With one process, this does nothing.
    """
    client = distributed.global_state.client
    if client is None:
        return
    _failing.set()
    client.key_value_set(_FAILED, "", allow_overwrite=True)
    _end_together(client, status)


def _end_with_the_others(over: threading.Event) -> None:
    """End this process when another one has failed."""
    client = distributed.global_state.client
    assert client is not None
    while not over.wait(FAILURE_SECONDS):
        try:
            client.key_value_try_get(_FAILED)
        except jax.errors.JaxRuntimeError:  # no process has failed, or the first one is gone, which JAX handles
            continue
        if not _failing.wait(2 * FAILURE_SECONDS):
            print("train: stopped because another process failed; see its output.", file=sys.stderr)
            _end_together(client, 1)
        return


def _end_together(client: Any, status: int) -> None:
    """Wait until every process is ready to end, then exit without waiting for threads. The first process exits last."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # if a process does not arrive, JAX ends it
        client.wait_at_barrier(_FAILED, int(4000 * FAILURE_SECONDS))
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():
        time.sleep(FAILURE_SECONDS)
    os._exit(status)


def is_first() -> bool:
    """Whether this process writes files and prints."""
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
    """Return whether `answer` is true on every process; all of them must call this."""
    if jax.process_count() == 1:
        return answer
    return bool(np.all(multihost_utils.process_allgather(np.int32(answer))))


def on_first(action: Callable[[], object]) -> None:
    """Call `action` on the first process while the others wait.

    Raises:
        OSError, ValueError: the action's own error, on the first process.
        RuntimeError: the action failed, on the other processes.
    """
    problem = None
    if is_first():
        try:
            action()
        except (OSError, ValueError) as error:
            problem = error
    if all_agree(problem is None):
        return
    raise problem or RuntimeError("stopped because the first process failed; see its output.")


def settled(arrays: T) -> T:
    """Return the arrays; with several processes on CPUs, first wait until they are computed.

    There, the collectives of two programs that run at once can each hold a thread that the other waits for.
    """
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        jax.block_until_ready(arrays)
    return arrays


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


def _check_options(hosts: Hosts) -> None:
    place, count, which = hosts.coordinator, hosts.n_processes, hosts.process_id
    if place is None or place == "auto":
        if count is not None or which is not None:
            raise ValueError(f"--n-processes {count} --process-id {which}: they need --coordinator HOST:PORT.")
        return
    host, _, port = place.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"--coordinator {place} is neither HOST:PORT, such as 10.0.0.1:1234, nor auto.")
    if count is None or which is None or not 0 <= which < count:
        raise ValueError(
            f"--coordinator {place} --n-processes {count} --process-id {which}: "
            "give both numbers; process ids run from 0 to n-processes - 1."
        )
