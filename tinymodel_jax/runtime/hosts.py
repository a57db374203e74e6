"""How the processes of one program, on one machine or many, connect and end.

All processes run the same program with the same arguments. SLURM, gcloud or a shell starts them
(docs/how-to/several-gpus.md). What they find out together is in `collectives.py`. An error in one of them ends all.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

SHUTDOWN_SECONDS = 60
"""How long an ending process waits for the others before JAX ends all of them."""
FAILURE_SECONDS = 0.5
"""How often a process checks whether another one failed. After a failure it has twice as long to end by itself."""
_FAILED = "tinymodel_jax/failed"

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


def join_hosts(hosts: Hosts, program: str) -> None:
    """Connect to the other processes of the run, if there are any. Call this before any device is used.

    Args:
        program: name that starts the line printed when another process has failed.

    Raises:
        ValueError: the options do not fit together, or `auto` finds no cluster in the environment.
        RuntimeError: the processes could not connect.
    """
    _check_options(hosts)
    if hosts.coordinator is None:
        return
    import jax

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
    threading.Thread(target=_end_with_the_others, args=(over, program), name="failures", daemon=True).start()


def end_all(status: int) -> None:
    """End all processes of the run after an error in this one, because the others may be waiting for it.

    With one process, this does nothing.
    """
    client = _client()
    if client is None:
        return
    _failing.set()
    client.key_value_set(_FAILED, "", allow_overwrite=True)
    _end_together(client, status)


def _client() -> Any:
    """Return JAX's client of its key-value store, which JAX has no public way to; None with one process."""
    if "jax" not in sys.modules:
        return None
    from jax._src import distributed

    return distributed.global_state.client


def _end_with_the_others(over: threading.Event, program: str) -> None:
    """End this process when another one has failed."""
    import jax

    client = _client()
    while not over.wait(FAILURE_SECONDS):
        try:
            client.key_value_try_get(_FAILED)
        except jax.errors.JaxRuntimeError:  # no process has failed, or the first one is gone, which JAX handles
            continue
        if not _failing.wait(2 * FAILURE_SECONDS):
            print(f"{program}: stopped because another process failed; see its output.", file=sys.stderr)
            _end_together(client, 1)
        return


def _end_together(client: Any, status: int) -> None:
    """Wait until every process is ready to end, then exit without waiting for threads. The first process exits last."""
    import jax

    with contextlib.suppress(jax.errors.JaxRuntimeError):  # if a process does not arrive, JAX ends it
        client.wait_at_barrier(_FAILED, int(4000 * FAILURE_SECONDS))
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        time.sleep(FAILURE_SECONDS)
    os._exit(status)


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
