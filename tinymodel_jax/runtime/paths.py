"""Paths given by users, and the folder of what the package keeps for later."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "TINYMODEL_CACHE"
"""Environment variable that names another cache folder."""


def user_path(path: str | os.PathLike[str]) -> Path:
    """Return a path with a leading `~` or `~user` expanded as in a shell. Unknown users stay unchanged."""
    return Path(os.path.expanduser(path))


def cache_root() -> Path:
    """Return `$TINYMODEL_CACHE`, by default `~/.cache/tinymodel_jax`; the folder may not exist yet."""
    named = os.environ.get(CACHE_VARIABLE)
    return user_path(named) if named else Path.home() / ".cache" / "tinymodel_jax"
