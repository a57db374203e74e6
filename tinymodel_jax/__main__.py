"""The `tinymodel` command, and `python -m tinymodel_jax`.

The rest is imported inside `main`, so that Ctrl-C ends the program without a traceback even while it loads.
"""

from __future__ import annotations

import atexit
import gc
import sys
import traceback
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tinymodel`; return its exit status."""
    atexit.register(gc.freeze)  # as it ends, Python would search everything for garbage, a tenth of a command's time
    try:
        from tinymodel_jax.commands import cli

        status = cli.main(argv)
    except KeyboardInterrupt:
        status = 130
    except Exception:  # a defect; the other processes must not wait for this one
        traceback.print_exc()
        status = 1
    if status:
        from tinymodel_jax.runtime.hosts import end_all

        end_all(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
