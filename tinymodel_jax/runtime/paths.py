"""Paths that users give."""

from __future__ import annotations

import os
from pathlib import Path


def user_path(path: str | os.PathLike[str]) -> Path:
    """Return a path with a leading `~` or `~user` expanded as in a shell. An unknown user is left as it is."""
    return Path(os.path.expanduser(path))
