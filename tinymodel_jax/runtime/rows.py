"""How an analysis divides the rows of a data set over the processes of a program and the devices of each.

A process reads and measures only its own rows: a part of them all (`share`), or, where the work is saved from time to
time, batches at which processes take turns (`turns`, `rows_of_turn`). Inside a process, the rows of a batch are spread
over the axis `data` of a mesh of its devices (`RowDevices`). No compiled program spans processes: they need not keep
step, and meet only to bring their results together (`collectives.summed`, `collectives.gathered`). One process has all
rows; one device gets arrays as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

T = TypeVar("T")


def share(n_rows: int) -> slice:
    """Return the rows of this process, where each takes a contiguous part; the parts differ by one row at most."""
    which, count = jax.process_index(), jax.process_count()
    return slice(n_rows * which // count, n_rows * (which + 1) // count)


def turns(first: int, n_rows: int, batch: int) -> range:
    """Return the row at which each turn starts, the same on every process.

    In a turn, every process takes one batch. All rows before a turn's start are measured when all processes have taken
    the turns before it; so a number of rows is all that a work file needs, and any number of processes can resume.

    Args:
        first: rows that are measured already.
        batch: rows of a process in one turn.
    """
    return range(first, n_rows, batch * jax.process_count())


def rows_of_turn(turn: int, n_rows: int, batch: int) -> slice:
    """Return the rows that this process takes in a turn; at the end there may be fewer than a batch, or none."""
    start = turn + batch * jax.process_index()
    return slice(min(start, n_rows), min(start + batch, n_rows))


class RowDevices(NamedTuple):
    """The devices of this process that share the rows of a batch."""

    mesh: Mesh | None
    """Its axis `data` divides the rows; None is one device."""

    @property
    def n(self) -> int:
        """Parts into which rows are divided; their number must be a multiple."""
        return 1 if self.mesh is None else dict(self.mesh.shape).get("data", 1)

    @property
    def exchange(self) -> bool:
        """Whether devices with the same rows exchange values, because parameters are sharded."""
        return self.mesh is not None and self.mesh.size > self.n

    def rows(self, arrays: T) -> T:
        """Return a tree of arrays whose first axis is spread over the devices."""
        if self.mesh is None:
            return arrays
        return jax.device_put(arrays, NamedSharding(self.mesh, P("data" if "data" in self.mesh.shape else None)))

    def shared(self, tree: T) -> T:
        """Return a tree of parameters that every device can read: a copy on each.

        Arrays that are sharded over these devices already, such as a dictionary's over `model`, stay so.
        """
        tree = jax.tree.map(_of_this_process, tree)
        if self.mesh is None:
            return tree
        copies = NamedSharding(self.mesh, P())
        return jax.tree.map(lambda leaf: leaf if _is_divided(leaf) else jax.device_put(leaf, copies), tree)

    def separately(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of (parameters, arrays of rows …) that each device runs on its own rows alone.

        Call it inside `jit`. The results are joined along their first axis. A loop that starts many programs ahead
        needs this on CPUs, where devices that wait for each other may do so for ever: XLA runs all devices in a pool of
        threads, which may be as few as the devices. Starting a program on a device on which 32 are waiting blocks one
        of the threads; if an all-reduce has begun, it lacks that thread, and XLA ends the process after 40 seconds.
        """
        if self.n == 1:
            return function

        def call(params: Any, *rows: Any) -> Any:
            specs = (P(), *[P("data")] * len(rows))
            places = {"mesh": self.mesh, "in_specs": specs, "out_specs": P("data"), "axis_names": {"data"}}
            return jax.shard_map(function, **places)(params, *rows)

        return call


ONE_DEVICE = RowDevices(None)


def row_devices(*trees: Any) -> RowDevices:
    """Return the devices over which rows are spread: all of this process's.

    Where a tree's arrays are divided over the devices of a mesh, that mesh is used. Features that do not fit on one
    device are therefore sharded by their owner, with `jax.device_put(params, NamedSharding(mesh, …))`.

    Args:
        trees: parameters that the rows are measured with.

    Raises:
        ValueError: arrays are divided over the devices of several processes, or over different meshes.
    """
    leaves = [leaf for leaf in jax.tree.leaves(trees) if _is_divided(leaf)]
    placed = (leaf.sharding for leaf in leaves if isinstance(leaf.sharding, NamedSharding))
    meshes = {sharding.mesh for sharding in placed if isinstance(sharding.mesh, Mesh)}
    if len(meshes) > 1 or not all(leaf.is_fully_addressable for leaf in leaves):
        raise ValueError(
            "an analysis takes arrays that are sharded over one mesh, of the devices of this process; shard the model "
            "and all dictionaries over Mesh(…, jax.local_devices()), or leave them unsharded."
        )
    if meshes:
        return RowDevices(meshes.pop())
    devices = jax.local_devices()
    return RowDevices(None if len(devices) == 1 else Mesh(np.array(devices), ("data",)))


def _is_divided(leaf: Any) -> bool:
    """Whether no single device has the whole array."""
    return isinstance(leaf, jax.Array) and not leaf.is_fully_replicated


def _of_this_process(leaf: Any) -> Any:
    """Return this process's copy of an array that all processes hold, such as parameters that they train together."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and leaf.is_fully_replicated:
        return leaf.addressable_data(0)
    return leaf
