"""Training data: batches drawn from a folder of token ids, and prefetching.

A batch is a pure function of (seed, step), so resuming a run needs only the step. Every row occurs once in each epoch.
A host reads only its own rows of a batch. Training steps put batches on devices and mask `[PAD]` in the loss.
"""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int32, Int64

from tinymodel_jax.training.data_folder import DataMeta, TokenData, open_data

__all__ = ["MAX_SEED", "DataMeta", "TokenData", "batch_indices", "host_batch", "open_data", "prefetch"]

MAX_SEED = (1 << 64) - 1

T = TypeVar("T")


def batch_indices(n_rows: int, batch_size: int, seed: int, step: int) -> Int64[np.ndarray, " batch"]:
    """Return the row numbers of a step's batch.

    The rows are shuffled again for every epoch, and the epochs are concatenated; step `s` takes `batch_size` rows from
    position `s * batch_size` on. So a batch may span epochs, each of which contains every row once.

    Args:
        n_rows: number of rows to draw from.
        batch_size: rows per batch, over all hosts; may exceed `n_rows`.
        seed: 0 to 2^64 - 1.
        step: counts from 0.

    Raises:
        ValueError: a number is out of its range.
    """
    _require_range("n_rows", n_rows, 1)
    _require_range("batch_size", batch_size, 1)
    _require_range("seed", seed, 0, MAX_SEED)
    _require_range("step", step, 0)
    place, end = step * batch_size, (step + 1) * batch_size
    parts = []
    while place < end:
        epoch, first = divmod(place, n_rows)
        part = _epoch_order(n_rows, seed, epoch)[first : first + end - place]
        parts.append(part)
        place += len(part)
    return np.concatenate(parts)


def host_batch(
    data: TokenData, batch_size: int, seed: int, step: int, process_index: int = 0, process_count: int = 1
) -> Int32[np.ndarray, "host_batch row_length"]:
    """Return this host's rows of a step's training batch: the contiguous `process_index`-th part of `process_count`.

    Args:
        data: only the returned rows of `data.train` are read from disk.
        batch_size: rows over all hosts.
        seed, step: as `batch_indices`.
        process_index: 0 to `process_count` - 1.
        process_count: number of hosts; must divide `batch_size`.

    Raises:
        ValueError: a number is out of its range.
    """
    _require_range("process_index", process_index, 0, process_count - 1)
    if batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} does not divide among {process_count} hosts; use a multiple of it.")
    indices = batch_indices(len(data.train), batch_size, seed, step)
    return data.train[np.split(indices, process_count)[process_index]].astype(np.int32)


def prefetch(
    make_batch: Callable[[int], T], start_step: int, stop_step: int, depth: int = 2
) -> Iterator[tuple[int, T]]:
    """Yield (step, batch) in order while a background thread makes the next ones.

    An error in `make_batch` is raised here, after the batches before it. Closing the iterator, or leaving a `for` loop
    over it early, ends the thread after the batch that it is working on.

    Args:
        make_batch: step -> batch; may put it on a device. Called in order by one thread.
        start_step: first step.
        stop_step: step after the last one.
        depth: largest number of batches made ahead.

    Raises:
        ValueError: `depth` is below 1.
    """
    _require_range("depth", depth, 1)
    return _prefetched(make_batch, range(start_step, stop_step), depth)


def _prefetched(make_batch: Callable[[int], T], steps: range, depth: int) -> Iterator[tuple[int, T]]:
    made: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    room = threading.Semaphore(depth)
    closed = threading.Event()

    def make() -> None:
        for step in steps:
            room.acquire()
            if closed.is_set():
                return
            try:
                made.put((make_batch(step), None))
            except BaseException as error:  # every kind, because the consumer waits for an answer
                made.put((None, error))
                return

    thread = threading.Thread(target=make, name="prefetch", daemon=True)
    thread.start()
    try:
        for step in steps:
            batch, error = made.get()
            if error is not None:
                raise error
            room.release()
            yield step, batch
    finally:
        closed.set()
        room.release()
        thread.join()


@functools.lru_cache(maxsize=4)  # two epochs for a batch that spans them, for two seeds or matrices; 8 bytes per row
def _epoch_order(n_rows: int, seed: int, epoch: int) -> np.ndarray:
    """Return a permutation of the rows.

    NumPy guarantees that a bit generator's raw stream never changes, but not the result of `Generator.permutation`.
    """
    bits = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(n_rows)
    order = np.argsort(bits, kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


def _require_range(name: str, value: int, least: int, most: int | None = None) -> None:
    if value < least or (most is not None and value > most):
        allowed = f"{least} or more" if most is None else f"{least} to {most}"
        raise ValueError(f"{name} must be {allowed}, got {value}.")
