"""A stack machine for pickles that builds dicts, lists, tuples, scalars and tensors, and can call seven functions.

A global that a pickle names becomes an inert `Global`: nothing is imported or looked up. Calling one outside
`ALLOWED_GLOBALS` does nothing, so that a survey can go on and name the rest; a reader refuses such a file. It
deliberately knows no more than state dicts need: no sets, no bytearrays, no registered extensions. Every step costs no
more than the values that its own instructions brought, so memoized values cannot be multiplied.
"""

from collections import OrderedDict
from collections.abc import Callable
from mmap import mmap
from typing import Any

import numpy as np

from tinymodel_jax.io.pickle_instructions import LITERALS, decimal, dotted_name, instructions, unsigned
from tinymodel_jax.io.torch_records import (
    STORAGE_DTYPES,
    TORCH_DTYPES,
    UNTYPED_STORAGE,
    Global,
    StorageRecord,
    TensorRecord,
    tensor_record,
)

MAX_GLOBAL_LENGTH = 1000
"""Longest name of a global (characters) that is put together from two strings."""


class _Refused:
    """What calling a global outside `ALLOWED_GLOBALS` gives: an object on which everything may be done, in vain."""


REFUSED = _Refused()


class Machine:
    """A stack machine for the pickle instructions; the only functions it can call are `CALLABLES`."""

    def __init__(self, make_tensor: Callable[[TensorRecord], Any]) -> None:
        self.make_tensor = make_tensor
        self.globals: dict[str, None] = {}
        self.storages: dict[str, StorageRecord] = {}
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, buffer: bytes | mmap, start: int) -> Any:
        """Run the pickle at `start` to its STOP and return what it leaves on the stack."""
        for name, payload, after in instructions(buffer, start):
            try:
                self.step(name, payload)
            except ValueError as error:
                raise ValueError(f"{error} (pickle instruction {name} before byte {after})") from None
        return self.pop()

    def step(self, name: str, payload: bytes) -> None:
        """Run one instruction."""
        if name in LITERALS:
            self.push(LITERALS[name](payload))
        elif name in _MEMO_READS:
            self.push(self.recall(_MEMO_READS[name](payload)))
        elif name in _MEMO_WRITES:
            self.memo[_MEMO_WRITES[name](payload)] = self.top()
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.top()
        elif name in _ACTIONS:
            _ACTIONS[name](self)
        elif name == "GLOBAL":
            self.push(self.look_up(dotted_name(payload)))
        elif name == "INST":
            self.call_group([self.look_up(dotted_name(payload)), *self.pop_to_mark()])
        else:
            raise ValueError("its pickle does what no file of tensors needs")

    def push(self, value: Any) -> None:
        """Put a value on the stack."""
        self.stack.append(value)

    def top(self) -> Any:
        """The last value, which must be there."""
        if not self.stack:
            raise ValueError("its pickle is damaged: a value is missing")
        return self.stack[-1]

    def pop(self) -> Any:
        """Remove and return the last value."""
        value = self.top()
        self.stack.pop()
        return value

    def pop_pair(self) -> list[Any]:
        """Remove and return the last two values, in the order they came."""
        second, first = self.pop(), self.pop()
        return [first, second]

    def pop_to_mark(self) -> list[Any]:
        """Remove and return the values since the last mark, and the mark."""
        if not self.outer:
            raise ValueError("its pickle is damaged: a mark is missing")
        items, self.stack = self.stack, self.outer.pop()
        return items

    def mark(self) -> None:
        """Start a group of values."""
        self.outer.append(self.stack)
        self.stack = []

    def discard(self) -> None:
        """Drop the last value, or the mark if that is last."""
        if self.stack or not self.outer:
            self.pop()
        else:
            self.pop_to_mark()

    def recall(self, index: int) -> Any:
        """The value memoized under `index`."""
        if index not in self.memo:
            raise ValueError(f"its pickle is damaged: memo {index} was never stored")
        return self.memo[index]

    def look_up(self, name: str) -> Any:
        """Note that the pickle names a global, and return what stands for it."""
        self.globals[name] = None
        return TORCH_DTYPES.get(name, Global(name))

    def stack_global(self) -> None:
        """Push the global whose module and name are on the stack."""
        module, name = self.pop_pair()
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError(f"a global is named by {describe(module)} and {describe(name)}, not by two strings")
        # The two may come from the memo any number of times, so what is made of them must be small.
        if len(module) + len(name) > MAX_GLOBAL_LENGTH:
            raise ValueError(f"a global is named by {len(module) + len(name):,} characters")
        self.push(self.look_up(f"{module}.{name}"))

    def append(self, items: list[Any]) -> None:
        """Append to the list that is last on the stack."""
        target = self.top()
        if isinstance(target, list):
            target.extend(items)
        elif target is not REFUSED:
            raise ValueError(f"its pickle is damaged: it appends to {describe(target)}")

    def set_items(self, items: list[Any]) -> None:
        """Set keys of the dict that is last on the stack."""
        target = self.top()
        if isinstance(target, dict):
            target.update(_mapping(items))
        elif target is not REFUSED:
            raise ValueError(f"its pickle is damaged: it sets keys of {describe(target)}")

    def set_state(self) -> None:
        """Drop the state: a module's state dict has one (`_metadata`), which says nothing of the tensors."""
        target, state = self.pop_pair()
        if target is not REFUSED and not (isinstance(target, dict) and isinstance(state, dict)):
            raise ValueError(f"its pickle sets attributes of {describe(target)}")
        self.push(target)

    def call_group(self, group: list[Any]) -> None:
        """Push what its first item gives, called with the others."""
        if not group:
            raise ValueError("its pickle is damaged: a function is missing")
        self.push(self.call(group[0], tuple(group[1:])))

    def call(self, function: Any, args: Any) -> Any:
        """Call one of `CALLABLES`; a global outside `ALLOWED_GLOBALS` is not called and gives `REFUSED`."""
        if function is REFUSED or (isinstance(function, Global) and function.name not in ALLOWED_GLOBALS):
            return REFUSED
        if not isinstance(function, Global) or function.name not in CALLABLES or not isinstance(args, tuple):
            raise ValueError(f"its pickle calls {describe(function)}, which is not a function")
        fewest, most, run = CALLABLES[function.name]
        if not fewest <= len(args) <= most:
            raise ValueError(f"its pickle calls {function.name} with {len(args)} arguments, not {fewest} to {most}")
        return run(self, *args)

    def load_storage(self) -> None:
        """Push the storage named by a persistent id: ("storage", class, key, location, numel), maybe a None more."""
        named = self.pop()
        if isinstance(named, tuple) and len(named) == 6 and named[5] is None:
            named = named[:5]
        match named:
            case ("storage", Global(kind), str(key), str(_), int(numel)):
                dtype = np.dtype(np.uint8) if kind == UNTYPED_STORAGE else STORAGE_DTYPES.get(kind)
                if dtype is None or not 0 <= numel < 2**60:
                    raise ValueError(f"a storage of {shown(kind)} has an impossible size or an unknown class")
                record = StorageRecord(key, dtype, numel)
                if self.storages.setdefault(key, record) != record:
                    raise ValueError(f"storage {shown(key)} is declared twice, differently")
                self.push(record)
            case _:
                raise ValueError("a reference to a storage is malformed, or written by a PyTorch older than 0.4")


def _ordered_dict(machine: Machine) -> OrderedDict[str | int, Any]:
    return OrderedDict()


def _size(machine: Machine, numbers: Any = ()) -> tuple[int, ...]:
    if not isinstance(numbers, tuple) or len(numbers) > 64 or not all(type(number) is int for number in numbers):
        raise ValueError(f"a torch.Size is made of {describe(numbers)}, not of up to 64 whole numbers")
    return numbers


def _tensor(
    machine: Machine,
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    requires_grad: Any = None,
    hooks: Any = None,
    flags: Any = None,
) -> Any:
    return _tensor_of_dtype(machine, storage, offset, shape, strides, requires_grad, hooks, None, flags)


def _tensor_of_dtype(
    machine: Machine,
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    flags: Any = None,
) -> Any:
    if flags:
        raise ValueError("a tensor is a lazy conjugate or negative; save its resolve_conj() or resolve_neg()")
    return machine.make_tensor(tensor_record(storage, offset, shape, strides, dtype))


def _parameter(machine: Machine, tensor: Any, *unused: Any) -> Any:
    if not isinstance(tensor, (TensorRecord, np.ndarray)):
        raise ValueError(f"a parameter is made of {describe(tensor)}, not of a tensor")
    return tensor


CALLABLES: dict[str, tuple[int, int, Callable[..., Any]]] = {
    "collections.OrderedDict": (0, 0, _ordered_dict),
    "torch.Size": (0, 1, _size),
    "torch._utils._rebuild_tensor": (4, 4, _tensor),
    "torch._utils._rebuild_tensor_v2": (6, 7, _tensor),
    "torch._utils._rebuild_tensor_v3": (7, 8, _tensor_of_dtype),
    "torch._utils._rebuild_parameter": (3, 3, _parameter),
    "torch._utils._rebuild_parameter_with_state": (4, 4, _parameter),
}
ALLOWED_GLOBALS = frozenset({*CALLABLES, *STORAGE_DTYPES, UNTYPED_STORAGE, *TORCH_DTYPES})
"""The names a pickle may use; all are inert here."""

_MEMO_READS = {"GET": decimal, "BINGET": unsigned, "LONG_BINGET": unsigned}
_MEMO_WRITES = {"PUT": decimal, "BINPUT": unsigned, "LONG_BINPUT": unsigned}
_ACTIONS: dict[str, Callable[[Machine], None]] = {
    "PROTO": lambda machine: None,
    "FRAME": lambda machine: None,
    "STOP": lambda machine: None,
    "MARK": Machine.mark,
    "POP": Machine.discard,
    "POP_MARK": lambda machine: machine.pop_to_mark().clear(),
    "DUP": lambda machine: machine.push(machine.top()),
    "TUPLE": lambda machine: machine.push(tuple(machine.pop_to_mark())),
    "TUPLE1": lambda machine: machine.push((machine.pop(),)),
    "TUPLE2": lambda machine: machine.push(tuple(machine.pop_pair())),
    "TUPLE3": lambda machine: machine.push((*reversed((machine.pop(), machine.pop(), machine.pop())),)),
    "LIST": lambda machine: machine.push(machine.pop_to_mark()),
    "DICT": lambda machine: machine.push(_mapping(machine.pop_to_mark())),
    "APPEND": lambda machine: machine.append([machine.pop()]),
    "APPENDS": lambda machine: machine.append(machine.pop_to_mark()),
    "SETITEM": lambda machine: machine.set_items(machine.pop_pair()),
    "SETITEMS": lambda machine: machine.set_items(machine.pop_to_mark()),
    "BUILD": Machine.set_state,
    "STACK_GLOBAL": Machine.stack_global,
    "REDUCE": lambda machine: machine.push(machine.call(*machine.pop_pair())),
    "NEWOBJ": lambda machine: machine.push(machine.call(*machine.pop_pair())),
    "OBJ": lambda machine: machine.call_group(machine.pop_to_mark()),
    "BINPERSID": Machine.load_storage,
}


def _mapping(items: list[Any]) -> dict[str | int, Any]:
    """Pair up keys and values. Keys are few kinds: nested tuples hash by recursion, huge integers collide at will."""
    if len(items) % 2:
        raise ValueError("its pickle is damaged: a key has no value")
    for key in items[::2]:
        if not isinstance(key, str) and not (isinstance(key, int) and abs(key) < 2**63):
            raise ValueError(f"{describe(key)} is used as a key; only strings and 64-bit integers may be")
    return dict(zip(items[::2], items[1::2], strict=True))


def describe(value: Any) -> str:
    """Name what kind of value this is, for a message."""
    if isinstance(value, Global):
        return shown(value.name)
    return "a bare storage" if isinstance(value, StorageRecord) else f"a {type(value).__name__}"


def shown(text: str) -> str:
    """Make a text from the file fit for a message: ASCII, no control characters, not long."""
    return ascii(text)[1:-1][:100]
