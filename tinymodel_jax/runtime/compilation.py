"""`fast_jit`: `jax.jit` with compiler options that make this package's programs faster.

On a CPU it turns off the YNNPACK rewrite of matrix products, which slows this model's shapes by about a tenth
(`benchmarks/vs_reference.py` shows it); on accelerators it is `jax.jit`. It never changes `XLA_FLAGS`, and has no
effect if the user has set that flag there.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax

_YNN_FLAG = "xla_cpu_experimental_ynn_fusion_type"


def fast_jit(
    function: Callable[..., Any],
    *,
    static_argnames: Sequence[str] = (),
    donate_argnames: Sequence[str] = (),
    fast_sums: bool = False,
) -> Callable[..., Any]:
    """Compile `function` like `jax.jit`, with `fast_compiler_options(fast_sums=fast_sums)`.

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
        return compile_(compiler_options=fast_compiler_options(fast_sums=fast_sums))

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # JAX raises a ValueError for options inside another program. `function`'s own is raised again below.
        with contextlib.suppress(ValueError):
            return outer()(*args, **kwargs)
        return inner(*args, **kwargs)

    return call


@functools.cache
def fast_compiler_options(platform: str | None = None, fast_sums: bool = False) -> dict[str, str]:
    """Return the compiler options for a platform, by default that of the default backend; `{}` where none helps.

    Args:
        fast_sums: let YNNPACK compute sums and maxima, in half the time. It also takes over the products whose results
            are only summed, and is slower at those.

    The flag's name depends on the jaxlib version, so it is tried on a trivial program first.
    """
    if (platform or jax.default_backend()) != "cpu" or _YNN_FLAG in os.environ.get("XLA_FLAGS", ""):
        return {}
    options = {_YNN_FLAG: "LIBRARY_FUSION_TYPE_REDUCE" if fast_sums else ""}
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options
