"""The `tinymodel` command, and `python -m tinymodel_jax`.

It loads the command only once it runs, so that Ctrl-C ends it without a traceback from the beginning on.
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
