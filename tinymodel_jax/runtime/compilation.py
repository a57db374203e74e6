"""`fast_jit`: `jax.jit` with compiler options that make this package's programs faster.

On a CPU, XLA gives matrix products and sums to YNNPACK. That slows products of many rows by about a tenth and speeds up
those of few rows by as much (`benchmarks/RESULTS.md`), so a program says what YNNPACK may compute. On accelerators,
`fast_jit` is `jax.jit`. It never changes `XLA_FLAGS`, and has no effect if the user has set that flag there.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax

YNNPACK = Literal["nothing", "sums", "all"]
"""What YNNPACK computes in a program on a CPU.

`sums` halves the time of sums and maxima. It also takes over the products whose results are only summed, and is slower
at those.
"""
_YNN_FLAG = "xla_cpu_experimental_ynn_fusion_type"
_FUSIONS: dict[YNNPACK, str] = {"nothing": "", "sums": "LIBRARY_FUSION_TYPE_REDUCE"}
_FEW_ROWS = range(8, 129)
"""Rows of a product that YNNPACK multiplies faster than XLA's own code."""


def ynnpack_of_rows(rows: int) -> YNNPACK:
    """Return what YNNPACK should compute in a program whose products have so many rows."""
    return "all" if rows in _FEW_ROWS else "nothing"


def fast_jit(
    function: Callable[..., Any],
    *,
    static_argnames: Sequence[str] = (),
    donate_argnames: Sequence[str] = (),
    ynnpack: YNNPACK = "nothing",
) -> Callable[..., Any]:
    """Compile `function` like `jax.jit`, with `fast_compiler_options(ynnpack=ynnpack)`.

    The result may be called anywhere, also inside another `jit`, `grad` or `vmap`. XLA takes options for a whole
    program only, so inside another program the options of that program apply. A `ValueError` of `function` costs a
    second trace.
    """
    compile_ = functools.partial(
        jax.jit, function, static_argnames=static_argnames, donate_argnames=tuple(donate_argnames) or None
    )
    inner = compile_()

    @functools.cache
    def outer() -> Callable[..., Any]:
        return compile_(compiler_options=fast_compiler_options(ynnpack=ynnpack))

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # JAX raises a ValueError for options inside another program. `function`'s own is raised again below.
        with contextlib.suppress(ValueError):
            return outer()(*args, **kwargs)
        return inner(*args, **kwargs)

    return call


@functools.cache
def fast_compiler_options(platform: str | None = None, ynnpack: YNNPACK = "nothing") -> dict[str, str]:
    """Return the compiler options for a platform, by default that of the default backend; `{}` where none helps.

    The flag's name depends on the jaxlib version, so it is tried on a trivial program first.
    """
    chosen_by_user = _YNN_FLAG in os.environ.get("XLA_FLAGS", "")
    if ynnpack == "all" or chosen_by_user or (platform or jax.default_backend()) != "cpu":
        return {}
    options = {_YNN_FLAG: _FUSIONS[ynnpack]}
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options
