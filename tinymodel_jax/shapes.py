"""The check that a set of named arrays is the expected one. It looks at names and shapes, never at numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def require_tree(params: Any) -> None:
    """Refuse parameters that are no mapping, or what Flax puts around them.

    Raises:
        ValueError: they are something else, or `{"params": parameters}`.
    """
    if not isinstance(params, Mapping) or set(params) == {"params"}:
        got = "{'params': …}" if isinstance(params, Mapping) else f"a {type(params).__name__}"
        raise ValueError(
            f"params is {got}; expected names and arrays: the variables['params'] of a Flax module's init."
        )


def require_shapes(arrays: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raise unless the arrays have just the expected names and shapes.

    Raises:
        ValueError: parameters are missing, unexpected or of the wrong shape; all of them are named.
    """
    problems = [f"missing {name!r} {shape}" for name, shape in expected.items() if name not in arrays]
    problems += [f"unexpected {name!r}" for name in arrays if name not in expected]
    problems += [
        f"{name!r} has shape {tuple(arrays[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in arrays and tuple(arrays[name].shape) != shape
    ]
    if problems:
        raise ValueError(f"parameters do not fit {what}: {'; '.join(problems)}.")
