"""PyTorch `.pt` files without PyTorch: read them, say what is in them, write them.

Reading maps the file and returns read-only NumPy arrays on the mapping; bfloat16 is `ml_dtypes.bfloat16`. A file is
never run: one whose pickle names anything but tensors and plain containers is refused before anything is built, and a
damaged one gives a ValueError of one line. The file must not change while the arrays are in use. It deliberately reads
no pickled modules, TorchScript, sparse or quantized tensors, and writes only flat mappings of names to arrays.
"""

import os
import pickle
import stat
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from typing import Any

import numpy as np

from tinymodel_jax.atomic_files import replaced
from tinymodel_jax.io.torch_containers import LOCAL_HEADER, Container, open_container
from tinymodel_jax.io.torch_pickle import build, survey
from tinymodel_jax.io.torch_records import (
    STORAGE_DTYPES,
    TORCH_DTYPES,
    UNTYPED_STORAGE,
    TensorRecord,
    row_major_strides,
)
from tinymodel_jax.paths import user_path

_ALIGNMENT = 64
_PUSH_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"
_STORAGE_OF = {dtype: name for name, dtype in STORAGE_DTYPES.items()}
_TORCH_DTYPE_OF = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file."""

    name: str
    """Keys and indices on the way to it, joined by dots, cut at 200 characters."""
    shape: tuple[int, ...]
    dtype: str
    """NumPy's name for it, for example `bfloat16`."""
    storage: str
    """Key of its storage in the file; tensors that share memory name the same one."""
    storage_bytes: int
    is_view: bool
    """False if the tensor is its whole storage in row-major order."""


@dataclass(frozen=True)
class TorchFileSummary:
    """What a PyTorch file holds."""

    form: str
    """`zip`, or `legacy` for the form before PyTorch 1.6."""
    file_bytes: int
    globals: tuple[str, ...]
    """Every global that the pickle names."""
    refused: tuple[str, ...]
    """Those because of which `load_torch_file` refuses the file."""
    tensors: tuple[TensorEntry, ...]
    """In the order of the file; empty if something is refused."""


def load_torch_file(path: str | os.PathLike[str]) -> dict[Any, Any]:
    """Read a file of `torch.save` whose top object is a mapping, usually a state dict: {name: array}.

    Nested dicts, lists, tuples, numbers, strings and None come back as they are, tensors and parameters as read-only
    arrays mapped from the file, `torch.dtype` as `numpy.dtype`, `torch.Size` as a tuple.

    Raises:
        ValueError: the file is damaged, is not a file of `torch.save`, holds no mapping, or names a pickle global
            outside the allow-list. The message is one line and starts with the path.
        FileNotFoundError: there is no such file.
        IsADirectoryError: the path is a folder.
    """
    with _opened(path) as (container, _):
        found = survey(container.pickle).require()
        if not isinstance(found.tree, dict):
            kind = "a tensor" if isinstance(found.tree, TensorRecord) else f"a {type(found.tree).__name__}"
            raise ValueError(f"it holds {kind}, not a mapping of names to tensors; save a state_dict()")
        storages = container.storages(found.storages)
        for key, record in found.storages.items():
            if record.dtype == np.bool_ and np.frombuffer(storages[key], np.uint8).max(initial=0) > 1:
                raise ValueError(f"storage {key!a:.40} of booleans has bytes other than 0 and 1; fetch the file again")
        return build(container.pickle, lambda record: _array(record, storages[record.storage.key]))


def describe_torch_file(path: str | os.PathLike[str]) -> TorchFileSummary:
    """Say what a PyTorch file holds, without building its arrays; for a refused file, its globals.

    Raises:
        ValueError, FileNotFoundError, IsADirectoryError: as `load_torch_file`, except that refused globals are returned
            and that the top object may be anything.
    """
    with _opened(path) as (container, file_bytes):
        found = survey(container.pickle)
        if found.refused:
            return TorchFileSummary(container.form, file_bytes, found.globals, found.refused, ())
        tree = found.require().tree
        container.storages(found.storages)
        return TorchFileSummary(container.form, file_bytes, found.globals, (), tuple(_entries(tree)))


def save_torch_file(tensors: Mapping[str, np.ndarray], path: str | os.PathLike[str]) -> None:
    """Write arrays as a file that `torch.load(path, weights_only=True)` reads as an OrderedDict of tensors.

    The same arrays give the same bytes. The file replaces `path` only when it is complete. Every array gets a storage
    of its own, aligned to 64 bytes.

    Raises:
        ValueError: a name is not a string or a dtype has no PyTorch counterpart; the message lists them all.
    """
    wrong = [f"{name!a} ({array.dtype})" for name, array in tensors.items() if array.dtype not in _TORCH_DTYPE_OF]
    wrong += [f"{name!a} (a name that is no string)" for name in tensors if not isinstance(name, str)]
    if wrong:
        allowed = ", ".join(dtype.name for dtype in _TORCH_DTYPE_OF)
        raise ValueError(f"PyTorch cannot hold {', '.join(wrong)}; allowed are string names and the dtypes {allowed}")
    with replaced(user_path(path)) as partial, open(partial, "wb") as file, zipfile.ZipFile(file, "w") as archive:
        _write_member(archive, file.tell(), "data.pkl", _state_dict_pickle(tensors))
        _write_member(archive, file.tell(), "byteorder", b"little")
        for index, array in enumerate(tensors.values()):
            flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            _write_member(archive, file.tell(), f"data/{index}", flat.data)
        _write_member(archive, file.tell(), "version", b"3\n")


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[Container, int]]:
    """Map the file and open its container; any ValueError inside the block is told as one about the path."""
    path = user_path(path)
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{path} is a folder, not a PyTorch file")
    if not stat.S_ISREG(mode) or not os.path.getsize(path):
        raise ValueError(f"{path} is empty, or a pipe or a device; a PyTorch file is neither")
    with open(path, "rb") as file:
        try:
            mapped = mmap(file.fileno(), 0, access=ACCESS_READ)
            yield open_container(file, mapped), len(mapped)
        except ValueError as error:
            raise ValueError(f"{path} cannot be read as a PyTorch file: {error}") from error


def _array(record: TensorRecord, storage: memoryview) -> np.ndarray:
    """The tensor as a read-only array on its storage; NumPy checks once more that it lies inside."""
    size = record.dtype.itemsize
    if 0 in record.shape:
        array = np.empty(record.shape, record.dtype)
        array.setflags(write=False)
        return array
    # An axis of length one may have any stride in PyTorch, beyond what fits NumPy.
    axes = zip(record.shape, record.strides, strict=True)
    strides = [stride * size if length > 1 else size for length, stride in axes]
    return np.ndarray(record.shape, record.dtype, storage, record.offset * size, strides)


def _entries(tree: Any) -> Iterator[TensorEntry]:
    """Every tensor, each container visited once, so that shared ones do not multiply."""
    seen: set[int] = set()
    pending = [("", tree)]
    while pending:
        name, node = pending.pop()
        if isinstance(node, TensorRecord):
            storage = node.storage
            yield TensorEntry(name, node.shape, node.dtype.name, storage.key, storage.nbytes, node.is_view)
        elif isinstance(node, (dict, list, tuple)) and id(node) not in seen:
            seen.add(id(node))
            items = node.items() if isinstance(node, dict) else enumerate(node)
            prefix = f"{name}." if name else ""
            pending += reversed([(f"{prefix}{str(key)[:200]}"[:200], child) for key, child in items])


def _state_dict_pickle(tensors: Mapping[str, np.ndarray]) -> bytes:
    items = [_pushing(name) + _pushing_tensor(f"{i}", tensors[name]) for i, name in enumerate(tensors)]
    return b"\x80\x02" + _PUSH_ORDERED_DICT + b"(" + b"".join(items) + b"u."


def _pushing_tensor(key: str, array: np.ndarray) -> bytes:
    """The call that `torch.save` writes for a whole storage: v2, or v3 for the dtypes without a storage class."""
    typed = array.dtype in _STORAGE_OF
    name, numel = (_STORAGE_OF[array.dtype], array.size) if typed else (UNTYPED_STORAGE, array.nbytes)
    storage = b"(" + _pushing("storage") + _pushing_global(name) + _pushing(key, "cpu", numel) + b"tQ"
    geometry = _pushing(0, array.shape, row_major_strides(array.shape))
    dtype = b"" if typed else _pushing_global(_TORCH_DTYPE_OF[array.dtype])
    function = _pushing_global(f"torch._utils._rebuild_tensor_v{2 if typed else 3}")
    return function + b"(" + storage + geometry + b"\x89" + _PUSH_ORDERED_DICT + dtype + b"tR"


def _pushing(*values: str | int | tuple[int, ...]) -> bytes:
    """Pickle instructions that push the values: whole pickles without their PROTO and STOP."""
    return b"".join(pickle.dumps(value, protocol=2)[2:-1] for value in values)


def _pushing_global(name: str) -> bytes:
    return "c{}\n{}\n".format(*name.rsplit(".", 1)).encode()


def _write_member(archive: zipfile.ZipFile, at: int, name: str, data: bytes | memoryview) -> None:
    """Store a member at file position `at` with its bytes on a multiple of 64, padded as PyTorch pads."""
    member = zipfile.ZipInfo(f"archive/{name}")
    padding = -(at + LOCAL_HEADER.size + len(member.filename) + 4) % _ALIGNMENT
    member.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    archive.writestr(member, data)
