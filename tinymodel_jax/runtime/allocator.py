"""`keep_freed_memory`: let a program's large arrays reuse memory, rather than be given new pages for every step.

XLA allocates a compiled function's temporaries anew in every call. For large ones glibc maps pages and gives them back
at once, so a training step on a CPU spends up to a quarter of its time in page faults. The setting holds for the whole
process, so programs make it (`python -m train` does) and the library by itself does not.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
"""glibc's names of the settings, from its malloc.h."""


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for the process's next allocations; call it before JAX computes anything.

    The process then holds on to the most memory that it ever used. Settings made with MALLOC_* variables are replaced.

    Returns:
        Whether it was done; False where the C library is not glibc.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no such function, or no such way to find it
        return False
    # One arena: the others are of 64 MB at most, and serve anything larger with pages of its own.
    return all(set_option(name, value) for name, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_ARENA_MAX, 1)))
