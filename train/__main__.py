"""`python -m train prepare | lm`: the training programs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tinymodel_jax.cli import run_commands


def main(argv: Sequence[str] | None = None) -> int:
    """Run a training program; return its exit status."""
    from train.prepare import prepare

    from train.lm import lm

    return run_commands("train", "Prepare data and train models.", {"prepare": prepare, "lm": lm}, argv)


if __name__ == "__main__":
    sys.exit(main())
