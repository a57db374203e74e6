"""The device mesh, and for each family of parameters one ordered table of partition rules.

Flax modules contain no sharding. A rule is (pattern, PartitionSpec) over paths such as `blocks_0/attn/W_Q`. The first
match applies, every leaf must match a rule, and every rule must be used, so a renamed parameter is an error. Optimizer
moments have the same paths below another prefix, hence the same shardings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, UInt32

MESH_AXES = ("data", "model", "sweep")
"""`data`: rows of a batch; `model`: heads, neurons, vocabulary or features; `sweep`: members of a sweep."""

Rules = Sequence[tuple[str, P]]

LM_RULES: Rules = (
    (r"W_(E|pos)$", P(None, None)),
    (r"attn/W_[QKV]$", P("model", None, None)),
    (r"attn/W_O$", P("model", None, None)),
    (r"mlp/W_in$", P(None, "model")),
    (r"mlp/(b_in|threshold)$", P("model")),
    (r"mlp/W_out$", P("model", None)),
    (r"b_(O|out)$", P(None)),
    (r"W_U$", P(None, "model")),
    (r"b_U$", P("model")),
)
"""Tensor parallelism for a language model's parameters: heads, neurons and vocabulary over `model`."""

LM_FSDP_RULES: Rules = (
    (r"W_(E|pos)$", P(None, "data")),
    (r"attn/W_[QKV]$", P("model", "data", None)),
    (r"attn/W_O$", P("model", None, "data")),
    (r"mlp/W_in$", P("data", "model")),
    (r"mlp/(b_in|threshold)$", P("model")),
    (r"mlp/W_out$", P("model", "data")),
    (r"b_(O|out)$", P(None)),
    (r"W_U$", P("data", "model")),
    (r"b_U$", P("model")),
)
"""The same, with every matrix (and its optimizer moments) also split over `data`."""

STEP_RULES: Rules = ((r"(^|/)(step|count|ns_coeffs)$", P()),)
"""For a training state, beside the rules of its parameters, which also match the optimizer's moments."""

DICTIONARY_RULES: Rules = (
    (r"/(W_enc_T|W_dec)$", P("sweep", "model", None)),
    (r"/(b_enc|b_gate|b_mag|r_mag|threshold)$|^silent_for$", P("sweep", "model")),
    (r"/(b_dec|W_skip)$|^(step|mean_in|scale_in|scale_out|sparsity_factor|threshold|key|reservoir/.*)$", P("sweep")),
    (r"^moments/count$", P("sweep")),
)
"""A sweep's training state: members over `sweep`, features over `model`; a member's devices share its other arrays."""


def make_mesh(axes: str = "", devices: Sequence[Any] | None = None) -> Mesh:
    """Return a mesh from `"data=4,model=2"`. Missing axes have size 1; the empty string puts all devices on `data`.

    Raises:
        ValueError: an axis is unknown or repeated, a size is not a number, or the sizes do not use all devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dict.fromkeys(MESH_AXES, 1)
    if not axes:
        sizes["data"] = len(devices)
    seen = set()
    for part in filter(None, axes.split(",")):
        name, _, size = part.partition("=")
        if name not in MESH_AXES or name in seen or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"mesh {axes!r}: {part!r} is not AXIS=SIZE with each of {', '.join(MESH_AXES)} at most once."
            )
        seen.add(name)
        sizes[name] = int(size)
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(f"mesh {axes!r} takes {math.prod(sizes.values())} devices; there are {len(devices)}.")
    return Mesh(np.array(devices).reshape(tuple(sizes.values())), MESH_AXES)


def axes_in_use(mesh: Mesh) -> dict[str, int]:
    """Return the axes of a mesh that divide something, with their sizes."""
    return {axis: size for axis, size in mesh.shape.items() if size > 1}


def rows_on_devices(matrix: np.ndarray, rows: np.ndarray, where: NamedSharding, dtype: Any) -> jax.Array:
    """Return rows of a host's matrix as one array; a process reads only the rows that its own devices hold.

    Args:
        rows: row numbers, in the array's order.
        where: sharding of the (rows, width) array, whose rows may be spread over several processes.
    """

    def read(index: Any) -> np.ndarray:
        return matrix[rows[index[0]]].astype(dtype)

    return jax.make_array_from_callback((len(rows), matrix.shape[1]), where, read)


def partition_specs(tree: Any, rules: Rules) -> Any:
    """Return the tree with each leaf's PartitionSpec.

    Raises:
        ValueError: a leaf matches no rule, or a rule matches no leaf.
    """
    unused = {pattern for pattern, _ in rules}

    def spec(path: Any, leaf: Any) -> P:
        name = path_name(path)
        for pattern, found in rules:
            if re.search(pattern, name):
                unused.discard(pattern)
                return found
        raise ValueError(f"no sharding rule matches {name!r} of shape {leaf.shape}; add one to the table.")

    specs = jax.tree_util.tree_map_with_path(spec, tree)
    if unused:
        raise ValueError(f"sharding rules that match nothing: {', '.join(sorted(unused))}.")
    return specs


def shardings(tree: Any, rules: Rules, mesh: Mesh) -> Any:
    """Return the tree with each leaf's `NamedSharding`.

    Raises:
        ValueError: as `partition_specs`, or an axis does not divide evenly over the mesh.
    """
    specs = partition_specs(tree, rules)
    problems: list[str] = []

    def place(path: Any, leaf: Any, spec: P) -> NamedSharding:
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                problems.append(f"{path_name(path)} ({size}) over {axis}={mesh.shape[axis]}")
        return NamedSharding(mesh, spec)

    placed = jax.tree_util.tree_map_with_path(place, tree, specs)
    if problems:
        raise ValueError(f"these do not divide evenly over the mesh: {'; '.join(problems)}. Choose another --mesh.")
    return placed


def abstract_arrays(tree: Any, placed: Any) -> Any:
    """Return the tree as `jax.ShapeDtypeStruct`s with shardings, to restore a checkpoint or to compile with.

    Args:
        placed: the tree's shardings.
    """
    return jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree, placed)


def path_name(path: Any) -> str:
    """Return a tree path as `blocks_0/attn/W_Q`."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


@jax.jit
def checksum(tree: Any) -> UInt32[Array, " leaves"]:
    """Return one number per leaf: the sum of its 32-bit words, each times an odd weight of its position, modulo 2^32.

    Integer sums do not depend on order, so every sharding gives the same number. A change in a single word always
    changes the sum, because an odd weight has an inverse.
    """
    return jnp.stack([_leaf_checksum(leaf) for leaf in jax.tree.leaves(tree)])


def _leaf_checksum(leaf: Array) -> Array:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        place = place * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    weight = (place * np.uint32(2654435761)) | np.uint32(1)
    return jnp.sum(words * weight, dtype=jnp.uint32)
