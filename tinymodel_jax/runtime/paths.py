"""Paths given by users."""

from __future__ import annotations

import os
from pathlib import Path


def user_path(path: str | os.PathLike[str]) -> Path:
    """Return a path with a leading `~` or `~user` expanded as in a shell. Unknown users stay unchanged."""
    return Path(os.path.expanduser(path))
