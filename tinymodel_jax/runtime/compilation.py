"""`fast_jit`: `jax.jit` with the compiler options that measure faster on this package's work.

On a CPU it turns off the YNNPACK rewrite of matrix products, which slows this model's shapes by about a tenth
(`benchmarks/vs_reference.py` shows it); on accelerators it is `jax.jit`. It never touches `XLA_FLAGS`, and changes
nothing when the user has set that flag there.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.core import Tracer

_YNN_FLAG = "xla_cpu_experimental_ynn_fusion_type"


def fast_jit(function: Callable[..., Any], *, static_argnames: Sequence[str] = ()) -> Callable[..., Any]:
    """Compile `function` like `jax.jit`, with `fast_compiler_options()`.

    The result may be called anywhere, also inside another `jit`, `grad` or `vmap`. XLA takes options for a whole
    program only, so traced arguments make it part of the outer program, with the options of that; a call without
    traced arguments is a program of its own, run at once. `function` must not close over traced arrays.
    """
    inner = jax.jit(function, static_argnames=static_argnames)

    @functools.cache
    def outer() -> Callable[..., Any]:
        return jax.jit(function, static_argnames=static_argnames, compiler_options=fast_compiler_options())

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if is_traced(args, kwargs):
            return inner(*args, **kwargs)
        with jax.ensure_compile_time_eval():
            return outer()(*args, **kwargs)

    return call


def is_traced(*values: Any) -> bool:
    """Whether a value holds a tracer, so that the caller is inside `jit`, `grad` or `vmap`."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values))


@functools.cache
def fast_compiler_options(platform: str | None = None) -> dict[str, str]:
    """Return the compiler options for a platform, by default that of the default backend; `{}` where none helps.

    The flag's name depends on the jaxlib version, so it is tried on a trivial program first.
    """
    if (platform or jax.default_backend()) != "cpu" or _YNN_FLAG in os.environ.get("XLA_FLAGS", ""):
        return {}
    options = {_YNN_FLAG: ""}
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options
