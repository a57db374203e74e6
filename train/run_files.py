"""Writing a run's files to disks and object stores.

A reader sees a file's old content or its new content, never a part of it. Errors of the operating system, of
TensorStore and of object stores' clients all become one `OSError` with a message for users.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from etils import epath

from tinymodel_jax.runtime.atomic_files import replace_file
from tinymodel_jax.training.data_folder import is_remote


@contextmanager
def local_folder(place: epath.PathLike) -> Iterator[Path]:
    """Yield a local folder to write to: `place` itself or, for an object store, one whose files are then copied there.

    Raises:
        OSError: a file cannot be written.
    """
    if not is_remote(place):
        with writing(epath.Path(place)):
            yield Path(place)
        return
    with writing(epath.Path(place)), tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)
        for file in sorted(file for file in Path(temporary).rglob("*") if file.is_file()):
            target = epath.Path(place) / file.relative_to(temporary).as_posix()
            target.parent.mkdir(parents=True, exist_ok=True)
            send(file, target)


def write_file(path: epath.Path, content: bytes) -> None:
    """Write a file.

    Raises:
        OSError: it cannot be written.
    """
    with writing(path):
        if is_remote(path):
            path.write_bytes(content)
        else:
            replace_file(Path(path), content)


def send(file: Path, address: epath.Path) -> None:
    """Copy a file to an object store."""
    with file.open("rb") as source, address.open("wb") as copy:
        shutil.copyfileobj(source, copy, 1 << 20)


@contextmanager
def writing(what: epath.Path) -> Iterator[None]:
    """Turn every error of the system, Orbax or TensorStore in the block into an `OSError` that names `what`."""
    try:
        yield
    except Exception as error:
        raise OSError(
            f"{what} cannot be written: {_reason(error)}. Finished checkpoints are intact: "
            "remove the cause, and the same command resumes from the last one."
        ) from error


def words(error: BaseException) -> str:
    """Return an error's message on one line of at most 200 characters."""
    text = " ".join(str(error).split())
    code = re.search(r"\[os_error_code='(\d+)'\]", text)  # TensorStore writes it after many file names
    return os.strerror(int(code[1])) if code else text[:200] or type(error).__name__


def _reason(error: BaseException) -> str:
    """Return the operating system's message if it caused the error, and the error's own message otherwise."""
    system = error.strerror if isinstance(error, OSError) else None
    return system or (_reason(error.__cause__) if error.__cause__ else words(error))
