"""`python -m train prepare | lm`: the training programs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from tinymodel_jax.cli import run_commands


def main(argv: Sequence[str] | None = None) -> int:
    """Run a training program; return its exit status."""
    named = (sys.argv[1:] if argv is None else list(argv))[:1]
    # Only the program that is named loads: prepare's workers start without JAX.
    commands: dict[str, Callable[..., None]] = {}
    if named != ["lm"]:
        from train.prepare import prepare

        commands["prepare"] = prepare
    if named != ["prepare"]:
        from train.lm import lm

        commands["lm"] = lm
    return run_commands("train", "Prepare data and train models.", commands, argv)


if __name__ == "__main__":
    sys.exit(main())
