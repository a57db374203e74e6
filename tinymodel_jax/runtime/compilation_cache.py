"""Compiled programs on disk, so that another process need not compile them again: JAX's persistent cache.

The commands and training programs use it; other processes call `use_compilation_cache`. The folder's name contains the
processor's, because a program that XLA compiled for one processor may not run on another, and JAX before 0.12 does not
tell them apart.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from tinymodel_jax.runtime.paths import cache_root, user_path

VARIABLE = "TINYMODEL_COMPILATION_CACHE"
"""Environment variable that names another folder, or disables the cache: `off` or `0`."""
MAX_BYTES = 1 << 30
"""Size above which the programs that were not used for longest are deleted."""


def use_compilation_cache(folder: str | os.PathLike[str] | None = None) -> Path | None:
    """Keep compiled programs in a folder, and load those that are there; return the folder, or None without one.

    Affects all of JAX in this process. The folder holds at most a gigabyte. A folder that you gave to JAX
    (`JAX_COMPILATION_CACHE_DIR` or its configuration) stays in use if no `folder` is given.

    Args:
        folder: by default `$TINYMODEL_COMPILATION_CACHE`, or else `programs` in the package's cache. If that variable
            is `off` or `0`, or the default folder cannot be written, nothing is kept.

    Raises:
        OSError: the given folder cannot be written.

    Examples:
        >>> from tinymodel_jax import use_compilation_cache
        >>> use_compilation_cache("programs")  # doctest: +SKIP
    """
    current = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    named = os.environ.get(VARIABLE, "")
    if folder is None and (current or named.lower() in ("off", "0")):
        return Path(current) if current else None
    root = user_path(folder or named or cache_root() / "programs")
    path = root / processor()
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(f"cannot write compiled programs to {path}; name another folder.")
    except OSError:
        if folder is not None:
            raise
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    # Most programs compile in less than a second, JAX's threshold, but a command has dozens of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    compilation_cache.reset_cache()  # programs compiled so far have fixed JAX's choice
    return path


@functools.cache
def processor() -> str:
    """Return a name for this machine's processor: its architecture, and a digest of its model and features."""
    try:
        cpu = Path("/proc/cpuinfo").read_text("utf-8", "replace").split("\n\n")[0]
        known = "\n".join(re.findall(r"^(?:model name|flags|Features)\s*:.*$", cpu, re.MULTILINE))
    except OSError:
        known = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(known.encode()).hexdigest()[:8]}"
