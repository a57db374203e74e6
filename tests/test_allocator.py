"""`keep_freed_memory`: large temporaries of a compiled function take no new pages in every call."""

import subprocess
import sys
from pathlib import Path

import pytest

from tinymodel_jax.runtime import allocator

ROOT = Path(__file__).parent.parent
FAULTS_OF_A_CALL = """
import resource, sys
from tinymodel_jax.runtime.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
import jax, jax.numpy as jnp
# a temporary of 128 MB: 32,768 pages of 4 kB
step = jax.jit(lambda x: jnp.sum(jax.lax.optimization_barrier(x[:, None] * x) @ x))
x = jnp.ones(5792)
faults = []
for _ in range(16):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults[8:]))  # the first calls still find their place
"""


def faults_of_a_call(how: str) -> int:
    command = [sys.executable, "-c", FAULTS_OF_A_CALL, how]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's setting")
def test_large_temporaries_stay_with_the_process() -> None:
    assert faults_of_a_call("leave") > 30_000
    assert faults_of_a_call("keep") < 3_000


def test_without_glibc_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    assert not allocator.keep_freed_memory()
