"""The worker processes of `prepare`.

Guarantees: results come in the order of the batches, and only a few batches are in memory; an error in a worker is
raised here; Ctrl-C does not reach the workers, and none outlives a killed parent.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait

from train.encoding import Batch, Encoded, Encoder

_encoder: Encoder
"""The encoder of a worker process."""


def encode_all(batches: Iterator[Batch], encoder: Encoder, workers: int) -> Iterator[Encoded]:
    """Yield the encoded batches in order."""
    if workers == 1:
        yield from map(encoder.encode, batches)
        return
    # Forking a process that has threads, as JAX and the readers do, may deadlock.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (encoder,))
    waiting: deque[Future[Encoded]] = deque()
    try:
        for batch in batches:
            with _interrupts_held_back():
                waiting.append(pool.submit(_encode, batch))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a worker process died, perhaps for lack of memory; run the same command again, with fewer --workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Let the processes that start here ignore Ctrl-C from their first moment: the parent ends the pool."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _encode(batch: Batch) -> Encoded:
    return _encoder.encode(batch)


def _end_with_parent() -> None:
    """End this process when its parent is killed: the pool's queues do not show that."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
