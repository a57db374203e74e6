"""Names of the number formats of parameters and computations."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

DTYPES = ("float32", "bfloat16", "float16", "float64")
COMPUTE_DTYPES = ("float32", "bfloat16")


def dtype_name(dtype: Any) -> str:
    """Return the name of a floating-point number format given as a name, a NumPy or a JAX dtype.

    Raises:
        ValueError: it is not one of float32, bfloat16, float16, float64.
    """
    try:
        if dtype is None:
            raise TypeError("NumPy would take None for float64")
        name = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not supported; choose one of {', '.join(DTYPES)}.")
    return name


def compute_dtype(dtype: Any) -> str:
    """Return the name of a number format that a TinyModel computes in.

    Raises:
        ValueError: it is neither float32 nor bfloat16.
    """
    name = dtype_name(dtype)
    if name not in COMPUTE_DTYPES:
        raise ValueError(f"dtype {name!r}: a TinyModel computes in {' or '.join(COMPUTE_DTYPES)}.")
    return name
