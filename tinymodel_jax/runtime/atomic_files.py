"""Atomic writing: a file is written next to its destination and then moved there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tinymodel_jax.runtime.paths import user_path


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, and move it to `path` at the end unless the block raises.

    Raises:
        OSError: the file cannot be written; of the original class, and naming `path`, not the temporary file.
    """
    path = user_path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise type(error)(f"cannot write {path.name} to the folder {path.parent}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # if it could not be created, this fails the same way
            temporary.unlink(missing_ok=True)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file atomically: a reader sees either the old content or the new."""
    with replaced(path) as temporary:
        temporary.write_bytes(content)
