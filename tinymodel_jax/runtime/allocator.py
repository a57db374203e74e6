"""`keep_freed_memory` lets the large arrays of a program reuse memory instead of getting new pages in every step.

XLA allocates the temporaries of a compiled function anew in every call. For large ones, glibc maps pages and unmaps
them right after, so a training step on a CPU spends up to a quarter of its time in page faults. The setting applies to
the whole process, so programs such as `python -m train` call the function, and the library never does.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
"""Parameters of `mallopt`, from glibc's malloc.h."""


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for later allocations of this process. Call it before JAX computes anything.

    The process then keeps the largest amount of memory that it has used. Overrides the MALLOC_* variables.

    Returns:
        True if it was set; False if the C library is not glibc.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # the library has no such function, or cannot be searched
        return False
    # One arena: the others hold at most 64 MB each and map new pages for anything larger.
    return all(set_option(name, value) for name, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_ARENA_MAX, 1)))
