"""The pickle inside a PyTorch file, read as data in two steps: survey it, then build it.

`survey` says what a pickle holds and which globals it names, without building anything from it; `build` is for a pickle
that a survey found good. Time and memory are bounded by the length of the pickle, and every fault is one line. Nothing
here imports or calls what a pickle names.
"""

from collections.abc import Callable
from dataclasses import dataclass
from mmap import mmap
from typing import Any

import numpy as np

from tinymodel_jax.io.pickle_instructions import dotted_name, instructions
from tinymodel_jax.io.pickle_machine import ALLOWED_GLOBALS, Machine, describe, shown
from tinymodel_jax.io.torch_records import StorageRecord, TensorRecord

MAX_DEPTH = 32
"""Deepest nesting of containers in what a file holds."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What one pickle holds, read without building anything from it."""

    tree: Any
    """The object, tensors as `TensorRecord`; None if there is a `problem`, or something `refused`."""
    end: int
    """Position in the buffer just after the pickle, or as far as it could be followed."""
    globals: tuple[str, ...]
    """Every global named."""
    storages: dict[str, StorageRecord]
    """Key -> storage declared."""
    problem: str
    """Why the pickle cannot be read; empty if it can."""

    @property
    def refused(self) -> tuple[str, ...]:
        """Names of the globals outside `ALLOWED_GLOBALS`."""
        return tuple(name for name in self.globals if name not in ALLOWED_GLOBALS)

    def require(self) -> "Survey":
        """Return the survey itself, or raise the ValueError that says what is wrong; refused globals come first."""
        if self.refused:
            names = [shown(name) for name in self.refused]
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            raise ValueError(
                f"its pickle asks for {', '.join(names[:8])}{more}, and nothing was run; only plain tensors, "
                "parameters, dtypes, dicts, lists, tuples, numbers and strings are allowed; save a state_dict()"
            )
        if self.problem:
            raise ValueError(self.problem)
        return self


def survey(buffer: bytes | mmap, start: int = 0) -> Survey:
    """Read the pickle at `start` in `buffer` and report what it holds and names. A bad pickle raises nothing."""
    machine = Machine(make_tensor=lambda record: record)
    tree, end, problem = None, start, ""
    try:
        # A first pass over the whole pickle names what an unreadable instruction would hide from the machine.
        for name, payload, after in instructions(buffer, start):
            end = after
            if name in ("GLOBAL", "INST"):
                machine.look_up(dotted_name(payload))
        tree = machine.run(buffer, start)
        if ALLOWED_GLOBALS.issuperset(machine.globals):
            _require_plain(tree)
        else:
            tree = None
    except ValueError as error:
        tree, problem = None, str(error)
    return Survey(tree, end, tuple(machine.globals), machine.storages, problem)


def build(buffer: bytes, make_tensor: Callable[[TensorRecord], np.ndarray]) -> Any:
    """Read a pickle that `survey` found good, with the arrays that `make_tensor` gives in place of the records."""
    return Machine(make_tensor).run(buffer, 0)


def _require_plain(tree: Any) -> None:
    """Check what `tree` holds, level by level: a shared container does not multiply, one inside itself is found."""
    level = {0: [tree]}
    for _ in range(MAX_DEPTH):
        below: dict[int, Any] = {}
        for container in level.values():
            for child in container.values() if isinstance(container, dict) else container:
                if isinstance(child, (dict, list, tuple)):
                    below[id(child)] = child
                elif not isinstance(child, _LEAVES):
                    raise ValueError(f"it holds {describe(child)}, which has no NumPy form")
        if not below:
            return
        level = below
    raise ValueError(f"its containers are nested more than {MAX_DEPTH} deep, or one contains itself")


_LEAVES = (str, int, float, bytes, type(None), np.dtype, TensorRecord)
