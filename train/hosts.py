"""Several processes that train together, on one machine or many: how they meet, agree and stop.

Rely on: every process runs the same program and takes the same turns; files and prints are the first process's alone,
and what fails there fails on all of them. A run of one process waits for nothing here. Starting the processes is the
work of SLURM, gcloud or a shell: docs/clusters.md.
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
"""How long a process that ends waits for the others to end too before all of them are ended."""
FAILURE_SECONDS = 0.5
"""How often a process asks whether another one failed; twice as long, it may take to end by itself."""
_FAILED = "train/failed"

T = TypeVar("T")
_failing = threading.Event()


@dataclass(frozen=True)
class Hosts:
    """The processes of a run; by default there is one."""

    coordinator: str | None = None
    """where process 0 can be reached, as HOST:PORT; auto: what SLURM, Open MPI, Kubernetes or the TPU pod says"""
    n_processes: int | None = None
    """processes of the run; not with auto"""
    process_id: int | None = None
    """which one of them this is, from 0; not with auto"""


ONE_PROCESS = Hosts()


def join_hosts(hosts: Hosts) -> None:
    """Meet the other processes of the run, if there are any. Call before devices are used.

    Raises:
        ValueError: the options do not fit together, or there is no cluster whose environment says them.
        RuntimeError: the processes did not meet.
    """
    _check_options(hosts)
    if hosts.coordinator is None:
        return
    # JAX's own way to agree on a stop hears SIGTERM only, and loses count when Orbax asks it from another thread.
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
        raise RuntimeError(f"--coordinator {hosts.coordinator}: the processes did not meet ({error}).") from error
    over = threading.Event()
    atexit.register(over.set)  # before JAX's own, which closes what the thread asks
    threading.Thread(target=_end_with_the_others, args=(over,), name="failures", daemon=True).start()


def end_all(status: int) -> None:
    """End this process after an error, and every other of the run, which may be waiting for this one.

    A run of one process is left to end by itself.
    """
    client = distributed.global_state.client
    if client is None:
        return
    _failing.set()
    client.key_value_set(_FAILED, "", allow_overwrite=True)
    _end_together(client, status)


def _end_with_the_others(over: threading.Event) -> None:
    """End this process once another one has failed."""
    client = distributed.global_state.client
    assert client is not None
    while not over.wait(FAILURE_SECONDS):
        try:
            client.key_value_try_get(_FAILED)
        except jax.errors.JaxRuntimeError:  # nobody has set it; or the first process is gone, which JAX takes care of
            continue
        if not _failing.wait(2 * FAILURE_SECONDS):
            print("train: stopped, because another process met an error; see what it printed.", file=sys.stderr)
            _end_together(client, 1)
        return


def _end_together(client: Any, status: int) -> None:
    """End once every process is about to, without waiting for threads, the first process last: the others need it."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # one does not come, and is left to JAX
        client.wait_at_barrier(_FAILED, int(4000 * FAILURE_SECONDS))
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():
        time.sleep(FAILURE_SECONDS)
    os._exit(status)


def is_first() -> bool:
    """Whether this is the process that writes files and prints."""
    return jax.process_index() == 0


def say(message: str) -> None:
    """Print a line, once for all processes."""
    if is_first():
        print(message, flush=True)


def warn(message: str) -> None:
    """Print a warning for the user as one line on stderr, once for all processes."""
    if is_first():
        print(f"warning: {message}", file=sys.stderr, flush=True)


def all_agree(answer: bool) -> bool:
    """Return whether every process answers yes; all have to ask."""
    if jax.process_count() == 1:
        return answer
    return bool(np.all(multihost_utils.process_allgather(np.int32(answer))))


def on_first(action: Callable[[], object]) -> None:
    """Do something on the first process while the others wait.

    Raises:
        OSError, ValueError: what the action raised, on the first process.
        RuntimeError: the same, on the others.
    """
    problem = None
    if is_first():
        try:
            action()
        except (OSError, ValueError) as error:
            problem = error
    if all_agree(problem is None):
        return
    raise problem or RuntimeError("stopped, because the first process met an error; see what it printed.")


def settled(arrays: T) -> T:
    """Return arrays, once they are computed where that is needed: by several processes on CPUs.

    There the collectives of two programs in flight may each hold a thread that the other one waits for.
    """
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        jax.block_until_ready(arrays)
    return arrays


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """While inside, SIGTERM and SIGINT at any process ask for a stop; a second one ends this process at once.

    Yields:
        Whether all processes stop now. Each has to ask after every step, and all get the same answer; with several
        processes it comes a step late, so that the step need not be waited for.
    """
    asked = threading.Event()
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(number: int, frame: Any) -> None:
        del frame
        asked.set()
        signal.signal(number, signal.SIG_DFL)
        print("stopping after this step; once more ends at once, without saving", file=sys.stderr, flush=True)

    for number in before:
        signal.signal(number, ask)
    try:
        yield asked.is_set if jax.process_count() == 1 else _vote(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _vote(asked: threading.Event) -> Callable[[], bool]:
    """Return a function that begins to count whether any process is asked, and returns the count begun before."""
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
            raise ValueError(f"--n-processes {count} --process-id {which}: they belong to --coordinator HOST:PORT.")
        return
    host, _, port = place.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"--coordinator {place} is neither HOST:PORT, such as 10.0.0.1:1234, nor auto.")
    if count is None or which is None or not 0 <= which < count:
        raise ValueError(
            f"--coordinator {place} --n-processes {count} --process-id {which}: "
            "give both numbers; a process's is from 0 to below how many there are."
        )
