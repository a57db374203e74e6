"""Training data: batches drawn from a folder of token ids, and a thread that makes them ahead of time.

Guarantees: a batch is a pure function of (seed, step), so that resuming needs only the step; every row occurs once per
epoch; a host reads only its own rows of a batch. The training step puts batches on devices and masks `[PAD]`.
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
    """Return the indices of the rows of a step's batch.

    Every epoch is a new permutation of the rows, and the epochs are concatenated. Step `s` takes `batch_size` rows
    starting at position `s * batch_size`, so that a batch may span epochs.

    Args:
        n_rows: number of rows to draw from.
        batch_size: rows per batch, over all hosts; may exceed `n_rows`.
        seed: 0 to 2^64 - 1.
        step: counts from 0.

    Raises:
        ValueError: a number is out of its range.

    Examples:
        >>> from tinymodel_jax.training import batch_indices
        >>> epoch = [batch_indices(n_rows=6, batch_size=3, seed=0, step=step) for step in (0, 1)]
        >>> sorted(int(row) for batch in epoch for row in batch)
        [0, 1, 2, 3, 4, 5]
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
    """Return this host's rows of a step's batch: the `process_index`-th of `process_count` contiguous parts.

    Args:
        data: the rows are read from `data.train`; only this host's rows are read from disk.
        batch_size: rows over all hosts.
        seed: as in `batch_indices`.
        step: as in `batch_indices`.
        process_index: 0 to `process_count` - 1.
        process_count: number of hosts; must divide `batch_size`.

    Raises:
        ValueError: a number is out of its range.

    Examples:
        >>> from tinymodel_jax.training import host_batch, open_data
        >>> data = open_data("data")  # written by `python -m train prepare`
        >>> host_batch(data, batch_size=4, seed=0, step=0).shape == (4, data.row_length)
        True
    """
    _require_range("process_index", process_index, 0, process_count - 1)
    if batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} cannot be divided among {process_count} hosts; use a multiple.")
    indices = batch_indices(len(data.train), batch_size, seed, step)
    return data.train[np.split(indices, process_count)[process_index]].astype(np.int32)


def prefetch(
    make_batch: Callable[[int], T], start_step: int, stop_step: int, depth: int = 2
) -> Iterator[tuple[int, T]]:
    """Yield (step, batch) in order while a background thread makes the next ones.

    An error in `make_batch` is raised here, after the batches before it. Closing the iterator (leaving a `for` loop
    early does so, too) ends the thread as soon as its current batch is done.

    Args:
        make_batch: makes the batch of a step, possibly on a device. One thread calls it, in order.
        start_step: the first step.
        stop_step: the step after the last.
        depth: maximum number of batches made ahead.

    Raises:
        ValueError: `depth` is below 1.

    Examples:
        >>> from tinymodel_jax.training import prefetch
        >>> list(prefetch(lambda step: step * step, start_step=0, stop_step=3))
        [(0, 0), (1, 1), (2, 4)]
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
            except BaseException as error:  # the consumer waits for an answer, also after an error
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


@functools.lru_cache(maxsize=4)  # two epochs, for a batch that spans them, of two data sets; 8 bytes per row
def _epoch_order(n_rows: int, seed: int, epoch: int) -> np.ndarray:
    """Return a permutation of the rows.

    NumPy promises that the raw output of a bit generator never changes; `Generator.permutation` may change.
    """
    bits = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(n_rows)
    order = np.argsort(bits, kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


def _require_range(name: str, value: int, least: int, most: int | None = None) -> None:
    if value < least or (most is not None and value > most):
        allowed = f"{least} or more" if most is None else f"{least} to {most}"
        raise ValueError(f"{name} must be {allowed}, got {value}.")
