"""What a PyTorch file's pickle speaks of, as inert values: globals, storages, tensors, and the dtypes they name.

A `TensorRecord` made by `tensor_record` lies inside its storage, so an array built from it cannot read elsewhere.
Nothing here touches a file or holds data.
"""

import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

MAX_EXPANDED_BYTES = 16 << 20
"""Largest tensor (bytes) that may be bigger than its storage, as `Tensor.expand` makes them."""

STORAGE_DTYPES: dict[str, np.dtype] = {
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
    "torch.ComplexDoubleStorage": np.dtype(np.complex128),
    "torch.ComplexFloatStorage": np.dtype(np.complex64),
}
"""Typed storage class named by a pickle -> dtype of its elements."""

UNTYPED_STORAGE = "torch.storage.UntypedStorage"
"""The storage class of the dtypes that have none of their own; it counts bytes, and the tensor names its dtype."""

TORCH_DTYPES: dict[str, np.dtype] = {
    **{f"torch.float{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    **{f"torch.complex{bits}": np.dtype(f"complex{bits}") for bits in (64, 128)},
    **{f"torch.{sign}int{bits}": np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)},
    "torch.bfloat16": np.dtype(ml_dtypes.bfloat16),
    "torch.bool": np.dtype(np.bool_),
}
"""`torch.dtype` named by a pickle -> the NumPy dtype that stands for it."""


@dataclass(frozen=True, slots=True)
class Global:
    """A `module.name` that a pickle asks for; never looked up."""

    name: str


@dataclass(frozen=True, slots=True)
class StorageRecord:
    """A flat block of `numel` elements of `dtype` that the file keeps under `key`."""

    key: str
    dtype: np.dtype
    numel: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A strided window on a storage; `offset` and `strides` count elements of `dtype`."""

    storage: StorageRecord
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def is_view(self) -> bool:
        """False if the tensor is its whole storage in row-major order."""
        whole = math.prod(self.shape) * self.dtype.itemsize == self.storage.nbytes
        strides = zip(self.shape, self.strides, row_major_strides(self.shape), strict=True)
        return not whole or any(size > 1 and have != want for size, have, want in strides)


def row_major_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of a contiguous tensor, by PyTorch's convention that an empty axis counts as one."""
    return tuple(math.prod(max(size, 1) for size in shape[axis + 1 :]) for axis in range(len(shape)))


def tensor_record(storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any = None) -> TensorRecord:
    """Check what a pickle says of a tensor and return its record. `dtype` defaults to the storage's.

    Raises:
        ValueError: a value has the wrong type, or the tensor does not lie inside its storage, or it is an expansion of
            more than `MAX_EXPANDED_BYTES`.
    """
    if not isinstance(storage, StorageRecord) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise ValueError("a tensor is not described by a storage, a shape and strides")
    if len(shape) != len(strides) or len(shape) > 64:
        raise ValueError(f"a tensor has {len(shape)} axes and {len(strides)} strides; they must agree, 64 at most")
    if not all(type(number) is int and 0 <= number < 2**60 for number in (offset, *shape, *strides)):
        raise ValueError("a tensor's offset, shape or strides are not whole numbers from 0 up to 2^60")
    dtype = storage.dtype if dtype is None else dtype
    if not isinstance(dtype, np.dtype):
        raise ValueError("a tensor's dtype is not one that NumPy or ml_dtypes has")
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes:
        end = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
        if end * dtype.itemsize > storage.nbytes:
            raise ValueError(
                f"a tensor of shape {shape} needs {end} elements of {dtype}, "
                f"but its storage {storage.key!a:.40} has {storage.nbytes} bytes"
            )
        if nbytes > max(storage.nbytes, MAX_EXPANDED_BYTES):
            raise ValueError(
                f"a tensor of shape {shape} expands a storage of {storage.nbytes} bytes to {nbytes}; "
                "save a contiguous copy, or the tensor before it was expanded"
            )
    elif math.prod(max(size, 1) for size in shape) >= 2**60:
        raise ValueError(f"an empty tensor has the impossible shape {shape}")
    return TensorRecord(storage, dtype, offset, shape, strides)
