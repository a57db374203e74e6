"""Files that appear whole or not at all: written beside their place, then moved there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tinymodel_jax.runtime.paths import user_path


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a path to write to; what is there afterwards takes the place of `path` at once, unless an error got out.

    Raises:
        OSError: of the kind that stopped the writing; it names `path` and not the file beside it.
    """
    path = user_path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise type(error)(f"cannot write {path.name} to the folder {path.parent}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # where it could not be made, the same error again
            temporary.unlink(missing_ok=True)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    with replaced(path) as temporary:
        temporary.write_bytes(content)
