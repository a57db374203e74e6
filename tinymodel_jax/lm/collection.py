"""Activations of many rows: passes of a few compiled shapes over the devices, and their collection into arrays."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Int, Integer

from tinymodel_jax.config import ModelConfig
from tinymodel_jax.lm.text import rows_of
from tinymodel_jax.lm.tiny_model import TinyModel
from tinymodel_jax.model.forward import HookedModel, forward
from tinymodel_jax.model.hook_points import Names, chosen_names, vector_width, vectors
from tinymodel_jax.model.padding import as_array, bucket, check_shape, check_tok_ids, pad_below, pad_right
from tinymodel_jax.runtime.atomic_files import replaced
from tinymodel_jax.runtime.paths import user_path
from tinymodel_jax.runtime.progress import Track, no_progress
from tinymodel_jax.runtime.rows import row_devices

ROWS_PER_DEVICE = 16
"""Rows per device in one pass of the model."""
COUNTED_TOGETHER = 4096
"""Rows whose tokens are counted together."""
PLACES = ("row", "position", "tok_id")
"""The arrays that say where each vector comes from."""


class Collected(NamedTuple):
    """Activations at the tokens of some rows, in the order of rows and positions. `[PAD]` is left out."""

    acts: dict[str, np.ndarray]
    """Hook name -> vectors (tokens, width); heads are concatenated."""
    row: Int[np.ndarray, " tokens"]
    """Row of each token, counted from 0."""
    position: Int[np.ndarray, " tokens"]
    """Position of each token in its row."""
    tok_id: Int[np.ndarray, " tokens"]
    """Id of each token."""


class BatchedPass:
    """Runs the layers up to the last of some hook points. The rows of a batch are spread over this process's devices.

    Args:
        per_device: rows per device in one pass of the model.
        read_by: parameters that the activations go through next; where they are sharded, so are the rows.
    """

    def __init__(self, model: HookedModel, names: Iterable[str], per_device: int, read_by: Any = None):
        self.devices = row_devices(model, read_by)
        self.batch = per_device * self.devices.n
        """Rows of a batch."""
        self.names = tuple(names)
        self.model = self.devices.shared(model)

    def run(self, tok_ids: Integer[np.ndarray, "rows seq"]) -> dict[str, Array]:
        """Return hook name -> vectors (batch, seq, width); rows beyond the given ones are padding."""
        ids = pad_below(np.asarray(tok_ids, np.int32), self.batch, self.model.config.pad_id)
        _, acts = forward(self.model, self.devices.rows(ids), keep=self.names, output="none")
        return {name: vectors(acts[name]) for name in self.names}


def collect_activations(
    lm: TinyModel,
    rows: Any,
    names: Names,
    out: str | os.PathLike[str] | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    *,
    track: Track = no_progress,
) -> Collected:
    """Collect the activations at hook points, one vector per token, in memory or in files.

    Layers above the last hook point do not run. With `out`, memory holds one batch at a time, and the arrays returned
    are memory-mapped from the files `NAME.npy`, `row.npy`, `position.npy` and `tok_id.npy`. They appear when all are
    complete. `train_on_arrays` and `python -m train dictionaries --activations` train on these arrays.

    Args:
        rows: stories, or token ids (rows, seq), right-padded with `[PAD]`, which may be memory-mapped.
        names: names, patterns or a function, as `names` of `run_with_cache`, of hook points with a vector at each
            position: all but `hook_attn_scores` and `hook_pattern`.
        out: folder to write to; None collects in memory.
        dtype: number format of the vectors.
        track: wraps the iterator over batches, for example with a progress bar.

    Raises:
        ValueError: a name is not such a hook point, the rows hold no token or are not valid, or `dtype` is neither of
            the two.
        FileExistsError: `out` already has one of the files.

    Examples:
        >>> from tinymodel_jax import TinyModel, collect_activations
        >>> lm = TinyModel("mini")
        >>> found = collect_activations(lm, ["The dog ran."], "blocks.1.hook_mlp_*")
        >>> {name: values.shape for name, values in found.acts.items()}
        {'blocks.1.hook_mlp_in': (6, 128), 'blocks.1.hook_mlp_out': (6, 128)}
    """
    names = _checked_names(names, lm.config)
    if dtype not in ("float32", "float16"):
        raise ValueError(f"collect_activations: dtype={dtype!r}; it is 'float32' or 'float16'.")
    ids = as_array(rows_of(lm, rows))
    ids = ids[None] if ids.ndim == 1 else ids
    ids = ids if ids.size else ids.astype(np.int32)  # NumPy takes an empty list for floats
    check_shape(ids, lm.config)
    parts = (ids[start : start + COUNTED_TOGETHER] for start in range(0, len(ids), COUNTED_TOGETHER))
    n_tokens = sum(int(np.sum(part != lm.config.pad_id)) for part in parts)
    if not n_tokens:
        raise ValueError("collect_activations: the rows hold no token that is not [PAD]; give stories or rows of ids.")
    wanted = {name: np.dtype((dtype, vector_width(name, lm.config))) for name in names}
    wanted |= dict.fromkeys(PLACES, np.dtype("int32"))
    with _arrays(wanted, n_tokens, out) as arrays:
        done = 0
        for found in _batches(BatchedPass(lm.hooked(), names, ROWS_PER_DEVICE), ids, track):
            for name, values in found.items():
                arrays[name][done : done + len(values)] = values
            done += len(found["tok_id"])
    if out is not None:
        arrays = {name: np.load(_path(out, name), mmap_mode="r") for name in arrays}
    return Collected({name: arrays[name] for name in names}, *(arrays[name] for name in PLACES))


def _checked_names(names: Names, config: ModelConfig) -> tuple[str, ...]:
    chosen = chosen_names(names, config)
    without = [name for name in chosen if vector_width(name, config) is None]
    if without or not chosen:
        problem = f"{', '.join(without)} has no vector per token" if chosen else "names is empty"
        raise ValueError(f"collect_activations: {problem}; name hook points such as 'blocks.0.hook_mlp_out'.")
    return chosen


def _batches(passes: BatchedPass, ids: np.ndarray, track: Track) -> Iterator[dict[str, np.ndarray]]:
    """Yield the arrays of each batch; the devices compute the next batch meanwhile."""
    ahead = None
    for start in track(range(0, len(ids), passes.batch), "collecting activations"):
        behind, ahead = ahead, _start(passes, ids, start)
        if behind is not None:
            yield _finish(*behind)
    if ahead is not None:
        yield _finish(*ahead)


def _start(passes: BatchedPass, ids: np.ndarray, start: int) -> tuple[dict[str, Array], tuple, dict[str, np.ndarray]]:
    """Start the pass of a batch; return its activations, and where its tokens are in the batch and in the rows."""
    config = passes.model.config
    part = check_tok_ids(ids[start : start + passes.batch], config, start)
    row, position = np.nonzero(part != config.pad_id)
    width = bucket(int(position.max(initial=0)) + 1, config.n_ctx)
    wide = pad_right(part, max(width, part.shape[1]), config.pad_id)[:, :width]
    return (
        passes.run(wide),
        (row, position),
        dict(zip(PLACES, (row + start, position, part[row, position]), strict=True)),
    )


def _finish(acts: Mapping[str, Array], at: tuple, places: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.asarray(value)[at] for name, value in acts.items()} | places


@contextlib.contextmanager
def _arrays(
    wanted: Mapping[str, np.dtype], length: int, out: str | os.PathLike[str] | None
) -> Iterator[dict[str, np.ndarray]]:
    """Yield empty arrays, in memory or in files of a folder, which get their names at the end unless the block raises.

    Args:
        wanted: name -> number format of an entry, with its shape if it is a vector.
    """
    if out is None:
        yield {name: np.empty(length, entry) for name, entry in wanted.items()}
        return
    _require_new([_path(out, name) for name in wanted])
    user_path(out).mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as files:
        arrays = {}
        for name, entry in wanted.items():
            path = files.enter_context(replaced(_path(out, name)))
            arrays[name] = np.lib.format.open_memmap(path, "w+", entry.base, (length, *entry.shape))
        yield arrays
        for array in arrays.values():
            array.flush()


def _require_new(paths: Sequence[Path]) -> None:
    there = [path.name for path in paths if path.exists()]
    if there:
        raise FileExistsError(
            f"collect_activations: {paths[0].parent} already has {', '.join(there)}; name another folder, or delete "
            "them."
        )


def _path(out: str | os.PathLike[str], name: str) -> Path:
    return user_path(out) / f"{name}.npy"
