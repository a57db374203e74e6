"""The pickle inside a PyTorch file, read by the standard library's unpickler, restricted to tensors and plain data.

`pickletools` first checks that the pickle is complete and lists the globals it names. The unpickler then loads it with
stand-ins for the few globals that files of tensors need; it imports and calls nothing else. Time and memory are bounded
by the length of the pickle: memoized values cannot multiply, and keys are quick to hash.

`TorchPickle` extends `pickle._Unpickler`, the unpickler written in Python, and changes its private table `dispatch`:
the public `pickle.Unpickler` lets a subclass decide about globals and storages only, but instructions that hash any
value or set attributes must be refused or changed as well.
"""

import io
import math
import pickle
import pickletools
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

MAX_INSTRUCTIONS = 250_000
"""Longest pickle read (instructions); a tensor takes about 40, so this is some 6,000 tensors."""
MAX_LINE = 1000
"""Longest line of text in a pickle (characters), such as the name of a global."""
MAX_DEPTH = 32
"""Deepest nesting of containers."""
MAX_NAME = 200
"""Longest name of a tensor (characters); a longer one is cut."""
MAX_AXES = 64
"""Most axes of a tensor, as in NumPy."""
MAX_EXPANDED_BYTES = 16 << 20
"""Largest tensor (bytes) that may be bigger than its storage, as `Tensor.expand` makes them."""

_CLASSES = "Double Float Half BFloat16 Long Int Short Char Byte Bool ComplexDouble ComplexFloat"
_DTYPES = ["f8", "f4", "f2", ml_dtypes.bfloat16, "i8", "i4", "i2", "i1", "u1", "?", "c16", "c8"]
STORAGE_DTYPES = {f"torch.{c}Storage": np.dtype(dtype) for c, dtype in zip(_CLASSES.split(), _DTYPES, strict=True)}
"""Storage class that a pickle names -> dtype of its elements."""
_DAMAGED = "its pickle is damaged, or does not hold what a checkpoint of tensors holds"
# These instructions hash any value, or load registered objects without asking `find_class`.
_UNNEEDED = (
    pickle.DICT + pickle.EMPTY_SET + pickle.ADDITEMS + pickle.FROZENSET + pickle.EXT1 + pickle.EXT2 + pickle.EXT4
)


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
    """A strided window that lies inside its storage; `offset` and `strides` count elements."""

    storage: StorageRecord
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class RefusedGlobals(ValueError):
    """A pickle names globals that are not allowed: `refused`, among all `names` found."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        self.refused = tuple(name for name in self.names if name not in _STAND_INS)
        shown = ", ".join(ascii(name[:100])[1:-1] for name in self.refused[:8])
        more = f" and {len(self.refused) - 8} more" if len(self.refused) > 8 else ""
        super().__init__(
            f"its pickle asks for {shown}{more}, and nothing was run; only plain tensors, parameters, dtypes, "
            "dicts, lists, tuples, numbers and strings are allowed; save a state_dict()"
        )


class StackGlobals:
    """The globals that STACK_GLOBAL instructions name, followed without running the pickle.

    It takes the two strings pushed last, as all picklers write them. They serve to list what a refused pickle asks for;
    what is loaded is decided in `TorchPickle.find_class`.
    """

    def __init__(self) -> None:
        self._pairs: dict[tuple[str, str], None] = {}
        self._pushed: deque[str | None] = deque([None, None], maxlen=2)
        self._memo: dict[int, str | None] = {}

    def follow(self, instruction: str, argument: Any) -> None:
        """Follow the next instruction."""
        if instruction == "STACK_GLOBAL":
            module, name = self._pushed
            if module is not None and name is not None:
                self._pairs[module, name] = None
        elif instruction == "MEMOIZE":
            self._memo[len(self._memo)] = self._pushed[-1]
        elif instruction.endswith("PUT"):
            self._memo[argument] = self._pushed[-1]
        elif instruction.endswith("GET"):
            self._pushed.append(self._memo.get(argument))
        elif isinstance(argument, str):
            self._pushed.append(argument[:MAX_NAME])

    def names(self) -> dict[str, None]:
        """Return the names as keys, in the order of the pickle; a part longer than `MAX_NAME` is cut."""
        return {f"{module}.{name}": None for module, name in self._pairs}


class PickleStream(io.BytesIO):
    """Bytes for `pickletools` whose lines of text must be short and plain, so that they are quick to parse."""

    def readline(self, size: int | None = MAX_LINE, /) -> bytes:
        line = super().readline(MAX_LINE)
        if b"\\" in line or not line.isascii():
            raise ValueError("a line of text is not plain ASCII")
        return line


class TorchPickle(pickle._Unpickler):
    """Reads the next pickle of a stream.

    Raises:
        RefusedGlobals: it names a global that is not allowed.
        ValueError: it is damaged, too long, or holds anything but tensors and plain data.
    """

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, stream: PickleStream) -> None:
        self.globals: dict[str, None] = {}
        """All globals that it names."""
        self._stack_globals = StackGlobals()
        self.storages: dict[str, StorageRecord] = {}
        """Key -> declared storage."""
        self._code = self._surveyed(stream)
        self.tree = self.build(lambda record: record)
        """The object, with records in place of tensors."""
        self.tensors = _named_tensors(self.tree)
        """Name and record of every tensor, outer ones first."""

    def build(self, make_tensor: Callable[[TensorRecord], Any]) -> Any:
        """Return the object, with the results of `make_tensor` in place of the records."""
        super().__init__(io.BytesIO(self._code), encoding="latin-1")
        self._make_tensor = make_tensor
        try:
            return self.load()
        except (pickle.UnpicklingError, ArithmeticError, AttributeError, EOFError, LookupError, TypeError) as error:
            raise ValueError(_DAMAGED) from error

    def _surveyed(self, stream: PickleStream) -> bytes:
        """Check every instruction of the pickle; return its bytes."""
        start, problem = stream.tell(), ""
        at = start
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
                length, at = stream.tell() - at, stream.tell()
                if count == MAX_INSTRUCTIONS:
                    raise ValueError(f"more than {MAX_INSTRUCTIONS:,} instructions")
                if opcode.name in ("INT", "LONG", "LONG1", "LONG4") and length > 42:
                    problem = problem or f"a number in {length} bytes"
                if opcode.name in ("GLOBAL", "INST"):
                    self.globals[str(argument).replace(" ", ".", 1)] = None
                self._stack_globals.follow(opcode.name, argument)
        except ValueError as error:
            problem = problem or str(error)[:200]
        if not self.globals.keys() <= _STAND_INS.keys():
            raise self._refusal()
        if problem:
            raise ValueError(f"{_DAMAGED}: {problem}")
        return stream.getvalue()[start : stream.tell()]

    def _refusal(self) -> RefusedGlobals:
        return RefusedGlobals(self.globals | self._stack_globals.names())

    def find_class(self, module: str, name: str) -> Any:
        named = f"{module[:MAX_NAME]}.{name[:MAX_NAME]}"
        self.globals[named] = None
        if named not in _STAND_INS:
            raise self._refusal()
        stand_in = _STAND_INS[named]
        return self._tensor if stand_in is TensorRecord else stand_in

    def persistent_load(self, pid: Any) -> StorageRecord:
        """Return the storage of ("storage", class, key, location, numel), optionally followed by None."""
        match pid[:5] if isinstance(pid, tuple) and pid[5:] in ((), (None,)) else None:
            case ("storage", StorageRecord(dtype=dtype), str(key), str(_), int(numel)) if 0 <= numel < 2**60:
                record = StorageRecord(key, dtype, numel)
                if self.storages.setdefault(key, record) != record:
                    raise ValueError(f"storage {key!a:.40} is declared twice, differently")
                return record
        raise ValueError("a reference to a storage is malformed, or written by a PyTorch older than 0.4")

    def _tensor(
        self, storage: Any, offset: Any, shape: Any, strides: Any, grad: Any = 0, hooks: Any = 0, flags: Any = 0
    ) -> Any:
        """Check that a tensor lies inside its storage and does not expand a small one to a huge array."""
        declared = isinstance(storage, StorageRecord) and self.storages.get(storage.key) == storage
        if not declared or not isinstance(shape, tuple) or not isinstance(strides, tuple):
            raise ValueError("a tensor is not described by a storage, a shape and strides")
        if len(shape) != len(strides) or len(shape) > MAX_AXES:
            raise ValueError(
                f"a tensor has {len(shape)} axes and {len(strides)} strides; they must agree, {MAX_AXES} at most"
            )
        if not all(type(number) is int and 0 <= number < 2**60 for number in (offset, *shape, *strides)):
            raise ValueError("a tensor's offset, shape or strides are not whole numbers from 0 up to 2^60")
        if flags:
            raise ValueError("a tensor is a lazy conjugate or negative; save its resolve_conj() or resolve_neg()")
        end = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
        if 0 not in shape and end > storage.numel:
            raise ValueError(f"a tensor of shape {shape} needs {end} elements, but its storage has {storage.numel}")
        nbytes = math.prod(shape) * storage.dtype.itemsize
        if nbytes > max(storage.nbytes, MAX_EXPANDED_BYTES):
            raise ValueError(f"a tensor of shape {shape} expands a storage of {storage.nbytes} bytes to {nbytes}")
        return self._make_tensor(TensorRecord(storage, offset, shape, strides))

    def load_setitem(self) -> None:
        self._set_items([self.stack.pop(), self.stack.pop()][::-1])

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def _set_items(self, items: list[Any]) -> None:
        """Set keys of the last value. Nested tuples would hash recursively, and huge integers could collide."""
        if not all(isinstance(key, str) or (isinstance(key, int) and abs(key) < 2**63) for key in items[::2]):
            raise ValueError("a key of its pickle is neither a string nor a 64-bit integer")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def load_build(self) -> None:
        """Ignore the state. A state dict has one, `_metadata`, which does not concern the tensors."""
        state = self.stack.pop()
        if not isinstance(state, dict) or not isinstance(self.stack[-1], dict):
            raise ValueError("its pickle sets attributes")

    dispatch: ClassVar[dict[int, Any]] = {
        **{code: follow for code, follow in pickle._Unpickler.dispatch.items() if code not in _UNNEEDED},
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.BUILD[0]: load_build,
    }


def _size(sizes: Any = ()) -> tuple[int, ...]:
    """Return a `torch.Size` as a tuple.

    Raises:
        ValueError: it is not a tuple of at most `MAX_AXES` whole numbers from 0 on.
    """
    if not isinstance(sizes, tuple) or len(sizes) > MAX_AXES:
        raise ValueError(f"a torch.Size is not a tuple of at most {MAX_AXES} numbers")
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError("a torch.Size holds something other than whole numbers from 0 on")
    return sizes


# Each takes few arguments, so that a call cannot copy a long memoized tuple.
_STAND_INS: dict[str, Any] = {
    **{name: StorageRecord("", dtype, 0) for name, dtype in STORAGE_DTYPES.items()},
    **{f"torch.{dtype.name}": dtype for dtype in STORAGE_DTYPES.values()},
    **dict.fromkeys(("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"), TensorRecord),
    "torch._utils._rebuild_parameter": lambda tensor, requires_grad, hooks: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, requires_grad, hooks, state: tensor,
    "torch.Size": _size,
    "collections.OrderedDict": lambda: OrderedDict(),
}
"""Global that a pickle may name -> its stand-in; `TensorRecord` means `TorchPickle._tensor`."""
_CONTAINERS = (dict, list, tuple)
_PLAIN = (str, int, float, bytes, type(None), np.dtype)


def _named_tensors(tree: Any) -> list[tuple[str, TensorRecord]]:
    """Return every tensor with the keys and indices that lead to it, and refuse values that are not plain data.

    It visits the tree level by level, and a shared container once per level.
    """
    tensors: list[tuple[str, TensorRecord]] = []
    level = {0: ("", tree if isinstance(tree, _CONTAINERS) else [tree])}
    for _ in range(MAX_DEPTH):
        below: dict[int, tuple[str, Any]] = {}
        for name, node in level.values():
            prefix = f"{name}." if name else ""
            for key, child in node.items() if isinstance(node, dict) else enumerate(node):
                child_name = f"{prefix}{str(key)[:MAX_NAME]}"[:MAX_NAME]
                if isinstance(child, TensorRecord):
                    tensors.append((child_name, child))
                elif isinstance(child, _CONTAINERS):
                    below.setdefault(id(child), (child_name, child))
                elif not isinstance(child, _PLAIN):
                    raise ValueError(f"it holds a {type(child).__name__}, which has no NumPy form")
        level = below
    if level:
        raise ValueError(f"its containers are nested more than {MAX_DEPTH} deep, or one contains itself")
    return tensors
