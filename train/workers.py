"""The worker processes of `prepare`, and what it shows while they work.

Rely on: batches come back in the order they went, with only a few of them in memory; an error in a worker is raised
here; no worker outlives a killed parent.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from train.encoding import Batch, Encoded, Encoder

SECONDS_BETWEEN_LINES = 10.0

_encoder: Encoder
"""Of a worker process."""


def encode_all(batches: Iterator[Batch], encoder: Encoder, workers: int) -> Iterator[Encoded]:
    """Yield the encoded batches in order, a few of them in the making at a time."""
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


def with_progress(results: Iterator[Encoded], done: int) -> Iterator[Encoded]:
    """Pass results on; show a bar on a terminal, else a line every ten seconds, on stderr."""
    started = line_at = time.monotonic()
    new = 0
    is_terminal = sys.stderr.isatty()
    columns = TextColumn("tokenizing"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not is_terminal, transient=True) as bar:
        task = bar.add_task("", total=None)
        for result in results:
            yield result
            new += result.read
            now = time.monotonic()
            shown = f"{done + new:,} stories, {new / (now - started):,.0f}/s"
            bar.update(task, description=shown)
            if not is_terminal and now - line_at > SECONDS_BETWEEN_LINES:
                line_at = now
                print(f"tokenizing: {shown}", file=sys.stderr, flush=True)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Let processes start that Ctrl-C does not reach, from their first moment on: the parent ends the pool."""
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
    """End this process when its parent is killed, which the pool's queues do not tell it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
