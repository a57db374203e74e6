"""PyTorch `.pt` files without PyTorch: read, describe and write them.

Reading maps the file into memory and returns read-only NumPy arrays; bfloat16 is `ml_dtypes.bfloat16`. The file must
not change while the arrays are in use. Code in a file never runs: a pickle that names anything but tensors and plain
containers is refused, and a damaged file raises a ValueError of one line. Members of a zip file must be uncompressed
and match their CRC-32; the older form has no checksums, so only sizes are checked. Pickled modules, TorchScript, tar
archives, sparse or quantized tensors and big-endian files are not supported.
"""

import math
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from mmap import ACCESS_READ, mmap
from typing import IO, Any, NamedTuple

import numpy as np

from tinymodel_jax.io.torch_pickle import STORAGE_DTYPES, PickleStream, RefusedGlobals, TensorRecord, TorchPickle
from tinymodel_jax.runtime.atomic_files import replaced
from tinymodel_jax.runtime.paths import user_path

MAX_PICKLE_BYTES = 16 << 20
"""Largest pickle read; the tensors' own bytes are not in it."""
_ALIGNMENT = 64
_ZIP_STARTS = (b"PK\x03\x04", b"PK\x05\x06")
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_PUSH_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"
_STORAGE_OF = {dtype: "c{}\n{}\n".format(*name.split(".")).encode() for name, dtype in STORAGE_DTYPES.items()}


class TensorEntry(NamedTuple):
    """One tensor of a file."""

    name: str
    """Keys and indices that lead to it, joined by dots, cut at 200 characters."""
    shape: tuple[int, ...]
    dtype: str
    """NumPy's name for it, for example `bfloat16`."""
    is_view: bool
    """False if the tensor is its whole storage in row-major order."""


class TorchFileSummary(NamedTuple):
    """What a PyTorch file holds."""

    form: str
    """`zip`, or `legacy` for the form before PyTorch 1.6."""
    file_bytes: int
    globals: tuple[str, ...]
    """Every global that the pickle names."""
    refused: tuple[str, ...]
    """Globals for which `load_torch_file` refuses the file."""
    tensors: tuple[TensorEntry, ...]
    """In the order of the file, outer ones first; empty if the file is refused."""


def load_torch_file(path: str | os.PathLike[str]) -> dict[Any, Any]:
    """Read a file written by `torch.save` whose top object is a mapping, usually a state dict: {name: array}.

    Tensors and parameters become read-only arrays mapped from the file, a `torch.dtype` becomes a `numpy.dtype`, and a
    `torch.Size` a tuple. Nested dicts, lists, tuples, numbers, strings and None are kept.

    Raises:
        ValueError: the file is damaged, was not written by `torch.save`, does not hold a mapping, or names a pickle
            global outside the allow-list. The message is one line and starts with the path.
        FileNotFoundError: the file does not exist.
        IsADirectoryError: the path is a folder.

    Examples:
        >>> import numpy as np
        >>> from tinymodel_jax import Dictionary, load_torch_file
        >>> dictionary = Dictionary.from_directions("blocks.1.hook_mlp_out", np.eye(128)[:3])
        >>> dictionary.save_pretrained("Mo1.pt", "tinymodel-pt")
        >>> sorted(load_torch_file("Mo1.pt"))
        ['decoder.bias', 'decoder.weight', 'encoder.bias', 'encoder.weight']
    """
    with _opened(path) as (file, mapped):
        content, storages = _read(file, mapped)
        if not isinstance(content.tree, dict):
            kind = "a tensor" if isinstance(content.tree, TensorRecord) else f"a {type(content.tree).__name__}"
            raise ValueError(f"it holds {kind}, not a mapping of names to tensors; save a state_dict()")
        for key, record in content.storages.items():
            if record.dtype == np.bool_ and np.frombuffer(storages[key], np.uint8).max(initial=0) > 1:
                raise ValueError(f"storage {key!a:.40} of booleans has bytes other than 0 and 1; fetch the file again")
        return content.build(lambda record: _array(record, storages[record.storage.key]))


def describe_torch_file(path: str | os.PathLike[str]) -> TorchFileSummary:
    """Return what a PyTorch file holds; for a refused file, its globals.

    Raises:
        ValueError, FileNotFoundError, IsADirectoryError: as `load_torch_file`, except that refused globals are returned
            and the top object may be anything.
    """
    with _opened(path) as (file, mapped):
        form = "zip" if mapped[:4] in _ZIP_STARTS else "legacy"
        try:
            content, storages = _read(file, mapped)
        except RefusedGlobals as refusal:
            return TorchFileSummary(form, len(mapped), refusal.names, refusal.refused, ())
        entries = [_entry(name, record, storages[record.storage.key]) for name, record in content.tensors]
        return TorchFileSummary(form, len(mapped), tuple(content.globals), (), tuple(entries))


def save_torch_file(tensors: Mapping[str, np.ndarray], path: str | os.PathLike[str]) -> None:
    """Write arrays as a file that `torch.load(path, weights_only=True)` reads as an OrderedDict of tensors.

    The same arrays give the same bytes. The file replaces `path` only when it is complete. Each array gets its own
    storage, aligned to 64 bytes.

    Raises:
        ValueError: a name is not a string, or PyTorch does not have a dtype; the message lists all of them.
    """
    wrong = [f"{name!a} ({array.dtype})" for name, array in tensors.items() if array.dtype not in _STORAGE_OF]
    wrong += [f"{name!a} (the name is not a string)" for name in tensors if not isinstance(name, str)]
    if wrong:
        allowed = ", ".join(dtype.name for dtype in _STORAGE_OF)
        raise ValueError(f"PyTorch cannot hold {', '.join(wrong)}; allowed are string names and the dtypes {allowed}")
    with replaced(user_path(path)) as partial, open(partial, "wb") as file, zipfile.ZipFile(file, "w") as archive:
        _write_member(archive, file.tell(), "data.pkl", _state_dict_pickle(tensors))
        _write_member(archive, file.tell(), "byteorder", b"little")
        for index, array in enumerate(tensors.values()):
            flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            _write_member(archive, file.tell(), f"data/{index}", flat.data)
        _write_member(archive, file.tell(), "version", b"3\n")


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[IO[bytes], mmap]]:
    """Open and map a file; put the path in front of the message of any ValueError inside the block."""
    path = user_path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a PyTorch file")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is a pipe or a device, not a PyTorch file")
    with open(path, "rb") as file:
        try:
            yield file, mmap(file.fileno(), 0, access=ACCESS_READ)
        except ValueError as error:
            raise ValueError(f"{path} cannot be read as a PyTorch file: {error}") from error


def _read(file: IO[bytes], mapped: mmap) -> tuple[TorchPickle, dict[str, memoryview]]:
    """Return the pickle of the saved object, and the bytes of each storage that it declares."""
    return _read_zip(file, memoryview(mapped)) if mapped[:4] in _ZIP_STARTS else _read_legacy(mapped)


def _read_zip(file: IO[bytes], whole: memoryview) -> tuple[TorchPickle, dict[str, memoryview]]:
    try:
        infos = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, OverflowError, struct.error) as error:
        raise ValueError(f"it is a zip archive cut short or damaged ({error}); fetch the file again") from None
    names = {info.filename for info in infos}
    roots = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")]
    if len(roots) != 1 or len(names) != len(infos):
        raise ValueError(f"it is a zip archive, but not of torch.save: it has {len(roots)} data.pkl")
    if any(name.startswith((f"{roots[0]}constants.pkl", f"{roots[0]}code/")) for name in names):
        raise ValueError("it is a TorchScript archive (torch.jit.save), which holds code; save its state_dict()")
    members = _stored_members(infos, whole)
    if members.get(f"{roots[0]}byteorder", b"little") != b"little":
        raise ValueError("it was saved on a big-endian machine; load and save it again on a little-endian one")
    if len(members[f"{roots[0]}data.pkl"]) > MAX_PICKLE_BYTES:
        raise ValueError(f"its pickle is larger than {MAX_PICKLE_BYTES >> 20} MiB, far more than tensors need")
    content, storages = TorchPickle(PickleStream(members[f"{roots[0]}data.pkl"])), {}
    for key, record in content.storages.items():
        storages[key] = members.get(f"{roots[0]}data/{key}")
        if storages[key] is None or len(storages[key]) != record.nbytes:
            raise ValueError(f"storage {key!a:.40} is not in the archive with the {record.nbytes} bytes of its pickle")
    return content, storages


def _stored_members(infos: list[zipfile.ZipInfo], whole: memoryview) -> dict[str, memoryview]:
    """Return name -> bytes of every member; their total is checked first, so that overlapping members cost nothing."""
    if sum(info.file_size for info in infos) > len(whole):
        raise ValueError("its zip members claim more bytes than the file has; it is damaged or malicious")
    # torch.serialization.set_crc32_options(False) leaves all checksums at zero.
    unchecked = not any(info.CRC for info in infos)
    members = {}
    for info in infos:
        header = whole[info.header_offset :][: _LOCAL_HEADER.size]
        signature, *lengths = _LOCAL_HEADER.unpack(header) if len(header) == _LOCAL_HEADER.size else (b"",)
        view = whole[info.header_offset + _LOCAL_HEADER.size + sum(lengths) :][: info.file_size]
        shown = ascii(info.filename)[:60]
        if info.compress_type or info.flag_bits & 1:
            raise ValueError(f"its zip member {shown} is compressed or encrypted, which torch.save never does")
        sound = signature == _ZIP_STARTS[0] and len(view) == info.file_size == info.compress_size
        if not sound or not (unchecked or zlib.crc32(view) == info.CRC):
            raise ValueError(f"its zip member {shown} does not match its checksum or size; fetch the file again")
        members[info.filename] = view
    return members


def _read_legacy(mapped: mmap) -> tuple[TorchPickle, dict[str, memoryview]]:
    """Read the form before PyTorch 1.6: five pickles (magic number, protocol, system, object, keys), then storages."""
    if mapped[257:262] == b"ustar":
        raise ValueError("it is a tar archive, as the first PyTorch releases wrote; save it again with a newer PyTorch")
    stream = PickleStream(mapped[:MAX_PICKLE_BYTES])
    try:
        magic = TorchPickle(stream).tree
    except ValueError as error:
        if mapped[0] == 0x80 or isinstance(error, RefusedGlobals):
            raise
        raise ValueError(f"torch.save did not write it; it begins with {mapped[:16]!r}") from None
    if magic != _MAGIC:
        raise ValueError("it is a plain pickle, not a file of torch.save")
    if TorchPickle(stream).tree != _PROTOCOL:
        raise ValueError(f"its protocol is not {_PROTOCOL}, the only one of torch.save's older form")
    facts = TorchPickle(stream).tree
    if not isinstance(facts, dict) or facts.get("little_endian") is not True:
        raise ValueError("it was saved on a big-endian machine; load and save it again on a little-endian one")
    content, keys = TorchPickle(stream), TorchPickle(stream).tree
    strings = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not strings or sorted(keys) != sorted(content.storages):
        raise ValueError("its list of storages is not the one that its pickle uses; fetch the file again")
    whole, storages, at = memoryview(mapped), {}, stream.tell()
    for key in keys:
        record, start = content.storages[key], at + 8
        at = start + record.nbytes
        if whole[start - 8 : start] != record.numel.to_bytes(8, "little") or at > len(whole):
            raise ValueError(f"storage {key!a:.40} is cut short or damaged; fetch the file again")
        storages[key] = whole[start:at]
    if at != len(whole):
        raise ValueError(f"{len(whole) - at} bytes follow its last storage; fetch the file again")
    return content, storages


def _array(record: TensorRecord, storage: memoryview) -> np.ndarray:
    """Return the tensor as a read-only array on its storage; NumPy checks again that it lies inside."""
    dtype = record.storage.dtype
    if 0 in record.shape:
        return np.ndarray(record.shape, dtype, b"")
    # In PyTorch an axis of length one may have any stride, even one that NumPy cannot hold.
    axes = zip(record.shape, record.strides, strict=True)
    strides = [stride * dtype.itemsize if length > 1 else dtype.itemsize for length, stride in axes]
    return np.ndarray(record.shape, dtype, storage, record.offset * dtype.itemsize, strides)


def _entry(name: str, record: TensorRecord, storage: memoryview) -> TensorEntry:
    array = _array(record, storage)
    is_whole = array.flags.c_contiguous and array.nbytes == storage.nbytes
    return TensorEntry(name, array.shape, array.dtype.name, not is_whole)


def _state_dict_pickle(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Return the pickle that `torch.save` writes for tensors that each have their own storage."""
    items = []
    for index, (name, array) in enumerate(tensors.items()):
        # In elements; in strides, PyTorch counts an empty axis as one.
        strides = tuple(math.prod(size or 1 for size in array.shape[axis + 1 :]) for axis in range(array.ndim))
        items += [_pushing(name), b"ctorch._utils\n_rebuild_tensor_v2\n(("]
        items += [_pushing("storage"), _STORAGE_OF[array.dtype], _pushing(f"{index}", "cpu", array.size), b"tQ"]
        items += [_pushing(0, array.shape, strides), b"\x89", _PUSH_ORDERED_DICT, b"tR"]
    return b"\x80\x02" + _PUSH_ORDERED_DICT + b"(" + b"".join(items) + b"u."


def _pushing(*values: str | int | tuple[int, ...]) -> bytes:
    """Return pickle instructions that push the values: their pickles without PROTO and STOP."""
    return b"".join(pickle.dumps(value, protocol=2)[2:-1] for value in values)


def _write_member(archive: zipfile.ZipFile, at: int, name: str, data: bytes | memoryview) -> None:
    """Store a member at file position `at`, padded as in PyTorch so that its bytes start at a multiple of 64."""
    member = zipfile.ZipInfo(f"archive/{name}")
    padding = -(at + _LOCAL_HEADER.size + len(member.filename) + 4) % _ALIGNMENT
    member.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    archive.writestr(member, data)
