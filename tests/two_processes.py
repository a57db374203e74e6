"""Two processes that meet on loopback: the options of a command, and Python code that both run."""

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
JOIN = """
import sys
from tinymodel_jax.runtime.hosts import Hosts, join_hosts
join_hosts(Hosts(sys.argv[1], 2, int(sys.argv[2])), "test")
"""


def loopback() -> str:
    """Return an address on loopback that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def two_processes() -> list[tuple[str, ...]]:
    """Return the options of each of two processes."""
    where = ("--coordinator", loopback(), "--n-processes", "2")
    return [(*where, "--process-id", str(i)) for i in range(2)]


def on_two_processes(code: str, *arguments: str, devices: int = 1) -> list[Any]:
    """Run code in two processes with this many virtual devices each; return the JSON on the last line of each.

    Args:
        arguments: what the code finds in `sys.argv[3:]`.
    """
    place = loopback()
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN + code, place, str(which), *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for which in range(2)
    ]
    with ThreadPoolExecutor() as readers:  # at once: a process whose output nobody reads waits, and the other for it
        done = [*readers.map(lambda process: process.communicate(timeout=300), running)]
    assert [process.returncode for process in running] == [0, 0], done
    return [json.loads(out.splitlines()[-1]) for out, _ in done]
