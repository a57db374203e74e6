"""The lock of a folder, so that two runs cannot write to it at the same time.

    OUT/run.lock        exists while a run holds the folder: its process, its machine, and since when

Guarantees: the lock ends with the process that holds it, even if that is killed; in a run of several processes, the
first holds it for all. Object stores, and file systems without `flock`, cannot be locked; a warning says so.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from etils import epath

from tinymodel_jax.runtime.collectives import on_first, warn
from tinymodel_jax.training.data_folder import is_remote
from train.run_files import writing

LOCK_FILE = "run.lock"


@contextmanager
def held_folder(out: epath.PathLike) -> Iterator[None]:
    """Lock a run's folder, for all processes of the run. The folder is made if it does not exist.

    Raises:
        ValueError: another run holds it, or it is a file.
        OSError: it cannot be written.
    """
    folder = epath.Path(out)
    with ExitStack() as locks:
        if is_remote(folder):
            warn(f"{folder} is in an object store, which cannot be locked; make sure that no other run uses it.")
        else:
            on_first(lambda: locks.enter_context(locked_folder(Path(folder))))
        yield


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Lock a folder, for this process alone. The folder is made if it does not exist.

    Raises:
        ValueError: another process holds it, or it is a file.
        OSError: it cannot be written.
    """
    lock = _take(folder)
    try:
        yield
    finally:
        Path(lock.name).unlink(missing_ok=True)
        lock.close()


def _take(folder: Path) -> IO[str]:
    """Return the lock's file, open and locked."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder.")
    with writing(epath.Path(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / LOCK_FILE
        lock = path.open("a+", encoding="utf-8")
    try:
        _lock(lock, folder)
    except BaseException:
        lock.close()
        raise
    if not path.exists() or not os.path.samestat(path.stat(), os.fstat(lock.fileno())):
        lock.close()  # of a run that has just ended and removed it
        return _take(folder)
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC")
    lock.flush()
    return lock


def _lock(lock: IO[str], folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise ValueError(
            f"{folder} is in use by another run ({lock.read()}); wait for it, stop it, or choose another folder."
        ) from None
    except OSError as error:
        warn(
            f"{folder} is on a file system that cannot lock files ({error.strerror}); "
            "make sure that no other run uses it."
        )
