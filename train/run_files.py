"""Writing a run's files: on disks and on object stores, and what is said when it fails.

Rely on: a reader sees a file's old content or its new one, never a part; whatever the system, TensorStore or an object
store's client raises becomes one error. What the files mean is not looked at here.
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
    """Yield a folder to write to: the place itself or, for an address, one whose files are sent there at the end.

    Raises:
        OSError: something in it cannot be written.
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
    """Make one error of whatever the system, Orbax or TensorStore raise when something cannot be written."""
    try:
        yield
    except Exception as error:
        raise OSError(
            f"{what} cannot be written: {_reason(error)}. Checkpoints that were finished are whole: "
            "mend the cause, and the same command goes on from the last of them."
        ) from error


def words(error: BaseException) -> str:
    """Return what an error says, on one line and not too long."""
    text = " ".join(str(error).split())
    code = re.search(r"\[os_error_code='(\d+)'\]", text)  # TensorStore's, after the names of many files
    return os.strerror(int(code[1])) if code else text[:200] or type(error).__name__


def _reason(error: BaseException) -> str:
    """Return the system's words for what stopped the writing, where they are behind an error, else its own."""
    system = error.strerror if isinstance(error, OSError) else None
    return system or (_reason(error.__cause__) if error.__cause__ else words(error))
