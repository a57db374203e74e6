"""`keep_freed_memory`: large temporaries of a compiled function take no new pages in every call."""

import subprocess
import sys
from pathlib import Path

import pytest

from tinymodel_jax.runtime import allocator

ROOT = Path(__file__).parent.parent
FAULTS_OF_A_CALL = """
import resource
from tinymodel_jax.runtime.allocator import keep_freed_memory
assert keep_freed_memory()
import jax, jax.numpy as jnp
# a temporary of 128 MB: 32,768 pages of 4 kB
step = jax.jit(lambda x: jnp.sum(jax.lax.optimization_barrier(x[:, None] * x) @ x))
x = jnp.ones(5792)
def faults_of_a_call():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min([faults_of_a_call() for _ in range(16)][8:]))  # the first calls still find their place
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's setting")
def test_large_temporaries_stay_with_the_process() -> None:
    command = [sys.executable, "-c", FAULTS_OF_A_CALL]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(done.stdout) < 3_000  # by default glibc maps all 32,768 again


def test_without_glibc_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    assert not allocator.keep_freed_memory()
