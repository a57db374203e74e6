"""The `tinymodel` command, and `python -m tinymodel_jax`.

The rest is imported inside `main`, so that Ctrl-C ends the program without a traceback even while it loads.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tinymodel`; return its exit status."""
    try:
        from tinymodel_jax.commands import cli

        return cli.main(argv)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
