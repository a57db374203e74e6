"""The lock of a run's folder, so that no two runs train in it at once.

    OUT/run.lock        while a run holds the folder: its process, its machine, and since when

Rely on: the lock ends with the process that holds it, however that ends; of several processes of one run the first
holds it for all. Object stores, and file systems that have no `flock`, cannot be locked: a warning says so.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from etils import epath

from tinymodel_jax.training.data_folder import is_remote
from train.hosts import on_first, warn
from train.run_files import writing

LOCK_FILE = "run.lock"


@contextmanager
def held_folder(out: epath.PathLike) -> Iterator[None]:
    """Hold a run's folder, which is made where there is none.

    Raises:
        ValueError: another run holds it, or it is a file.
        OSError: it cannot be written.
    """
    locks: list[IO[str]] = []
    on_first(lambda: locks.extend(_take(epath.Path(out))))
    try:
        yield
    finally:
        for lock in locks:
            Path(lock.name).unlink(missing_ok=True)
            lock.close()


def _take(folder: epath.Path) -> list[IO[str]]:
    """Return the lock's file, open and locked; none on an object store."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; --out wants a folder.")
    if is_remote(folder):
        warn(f"{folder} is in an object store, which cannot be locked; make sure that no other run uses it.")
        return []
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        path = Path(folder) / LOCK_FILE
        lock = path.open("a+", encoding="utf-8")
    try:
        _lock(lock, folder)
    except BaseException:
        lock.close()
        raise
    if not path.exists() or not os.path.samestat(path.stat(), os.fstat(lock.fileno())):
        lock.close()  # it is that of a run which has ended, and removed it, in this moment
        return _take(folder)
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC")
    lock.flush()
    return [lock]


def _lock(lock: IO[str], folder: epath.Path) -> None:
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
