"""What commands that several processes may run together share: their options, and that the first process alone shows.

Every process runs the same command. `join` comes first, before anything is loaded. Each then computes its part and has
the whole result; `shows` says which one prints and writes it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from tyro.conf import OmitArgPrefixes

from tinymodel_jax.runtime.hosts import ONE_PROCESS as ONE_PROCESS
from tinymodel_jax.runtime.hosts import Hosts, join_hosts
from tinymodel_jax.runtime.progress import Track, no_progress, with_progress

HostOptions = OmitArgPrefixes[Hosts]
"""The options `--coordinator`, `--n-processes` and `--process-id`; the default is `ONE_PROCESS`."""


def join(hosts: Hosts) -> Track:
    """Connect to the other processes, and return how to show progress: on the first process only.

    Raises:
        ValueError: the options do not fit together, or `auto` finds no cluster in the environment.
        RuntimeError: the processes could not connect.
    """
    join_hosts(hosts, "tinymodel")
    if hosts.coordinator is None:
        return with_progress
    from tinymodel_jax.runtime.collectives import all_agree, is_first

    with _stdout_on_stderr():  # on CPUs, Gloo announces its connections on stdout, where JSON may be expected
        all_agree(True)
    return with_progress if is_first() else no_progress


def shows(hosts: Hosts) -> bool:
    """Whether this process prints and writes files."""
    if hosts.coordinator is None:
        return True
    from tinymodel_jax.runtime.collectives import is_first

    return is_first()


@contextlib.contextmanager
def _stdout_on_stderr() -> Iterator[None]:
    """Let what the process writes to stdout, also from C++, go to stderr."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
