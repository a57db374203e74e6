"""Pickle byte code, cut into instructions and their arguments; nothing is interpreted here.

Every position and length is checked against the buffer before it is used, so a pickle that claims more than it has
costs nothing. The instruction set is the standard library's own table (`pickletools.opcodes`).
"""

import pickletools
import struct
from collections.abc import Callable, Iterator
from mmap import mmap
from typing import Any

MAX_INSTRUCTIONS = 250_000
"""Longest pickle read (instructions); a tensor takes about 40, so this is some 6,000 tensors."""
MAX_BYTES = 64 << 20
"""Largest pickle read (bytes); the tensors' own bytes are not in it."""

_CUT_SHORT = "its pickle is cut short or damaged; fetch the file again"
_TWO_LINES = ("GLOBAL", "INST")
_OPCODES = {ord(op.code): (op.name, 0 if op.arg is None else op.arg.n) for op in pickletools.opcodes}
_LENGTH_WIDTHS = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}


def instructions(buffer: bytes | mmap, start: int) -> Iterator[tuple[str, bytes, int]]:
    """Yield (name, argument bytes, position after it) of the pickle at `start`, up to and including its STOP.

    Raises:
        ValueError: the pickle is damaged, does not end inside the buffer, or is longer than the limits above.
    """
    at, end = start, len(buffer)
    for _ in range(MAX_INSTRUCTIONS):
        if at >= end:
            raise ValueError(_CUT_SHORT)
        name, length = _OPCODES.get(buffer[at], ("", 0))
        if not name:
            raise ValueError(f"its pickle is damaged: byte {at} is no instruction; fetch the file again")
        begin = at + 1
        if length == pickletools.UP_TO_NEWLINE:
            at = _after_newlines(buffer, begin, 2 if name in _TWO_LINES else 1)
        else:
            if length < 0:
                width = _LENGTH_WIDTHS[length]
                length = int.from_bytes(buffer[begin : begin + width], "little")
                begin += width
            at = begin + length
        if at > end:
            raise ValueError(_CUT_SHORT)
        if at - start > MAX_BYTES:
            raise ValueError(f"its pickle is larger than {MAX_BYTES >> 20} MiB, far more than tensors need")
        yield name, buffer[begin:at], at
        if name == "STOP":
            return
    raise ValueError(f"its pickle has more than {MAX_INSTRUCTIONS:,} instructions, far more than tensors need")


def dotted_name(payload: bytes) -> str:
    """`module.name` from the argument of GLOBAL or INST."""
    module, name, _ = payload.split(b"\n")
    return f"{module.decode('utf-8', 'backslashreplace')}.{name.decode('utf-8', 'backslashreplace')}"


def unsigned(payload: bytes) -> int:
    """A little-endian unsigned number."""
    return int.from_bytes(payload, "little")


def decimal(payload: bytes) -> int:
    """A number written as a line of decimal digits, with Python 2's L at the end or not."""
    if len(payload) > 40:
        raise ValueError(f"its pickle holds a number of {len(payload) - 1} digits, far more than tensors need")
    return int(payload.decode("ascii").strip().removesuffix("L"))


def _signed(payload: bytes) -> int:
    if len(payload) > 16:
        raise ValueError(f"its pickle holds a number of {len(payload)} bytes, far more than tensors need")
    return int.from_bytes(payload, "little", signed=True)


def _decimal_or_bool(payload: bytes) -> int:
    return {b"00\n": False, b"01\n": True}[payload] if payload in (b"00\n", b"01\n") else decimal(payload)


def _quoted(payload: bytes) -> str:
    return payload.decode("latin-1").strip().strip("'\"")


def _utf8(payload: bytes) -> str:
    return payload.decode("utf-8", "surrogatepass")


def _latin1(payload: bytes) -> str:
    return payload.decode("latin-1")


def _after_newlines(buffer: bytes | mmap, at: int, lines: int) -> int:
    for _ in range(lines):
        at = buffer.find(b"\n", at) + 1
        if not at:
            raise ValueError(_CUT_SHORT)
    return at


LITERALS: dict[str, Callable[[bytes], Any]] = {
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "INT": _decimal_or_bool,
    "BININT": _signed,
    "BININT1": unsigned,
    "BININT2": unsigned,
    "LONG": decimal,
    "LONG1": _signed,
    "LONG4": _signed,
    "FLOAT": float,
    "BINFLOAT": lambda payload: struct.unpack(">d", payload)[0],
    "STRING": _quoted,
    "BINSTRING": _latin1,
    "SHORT_BINSTRING": _latin1,
    "UNICODE": lambda payload: _utf8(payload[:-1]),
    "BINUNICODE": _utf8,
    "SHORT_BINUNICODE": _utf8,
    "BINUNICODE8": _utf8,
    "BINBYTES": bytes,
    "SHORT_BINBYTES": bytes,
    "BINBYTES8": bytes,
    "EMPTY_TUPLE": lambda _: (),
    "EMPTY_LIST": lambda _: [],
    "EMPTY_DICT": lambda _: {},
}
"""Instructions that push a value -> that value from the argument bytes; ValueError if they do not spell one."""
