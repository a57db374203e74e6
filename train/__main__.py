"""`python -m train prepare | lm | dictionaries`: the training programs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

from tinymodel_jax.cli import run_commands

PROGRAMS = ("prepare", "lm", "dictionaries")
"""Each is the function of that name in the module of that name."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a training program; return its exit status."""
    named = (sys.argv[1:] if argv is None else list(argv))[:1]
    # Only the program that is named loads: prepare's workers start without JAX.
    commands: dict[str, Callable[..., None]] = {}
    for name in PROGRAMS:
        if name in named or not set(named) & set(PROGRAMS):
            commands[name] = getattr(importlib.import_module(f"train.{name}"), name)
    return run_commands("train", "Prepare data and train models.", commands, argv)


if __name__ == "__main__":
    sys.exit(main())
