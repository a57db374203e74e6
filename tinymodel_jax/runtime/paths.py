"""Paths as users give them."""

from __future__ import annotations

import os
from pathlib import Path


def user_path(path: str | os.PathLike[str]) -> Path:
    """Return a path with `~` or `~user` in front expanded as a shell does; of no such user, as it is."""
    return Path(os.path.expanduser(path))
