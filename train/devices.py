"""The devices of a run, whether they are there or, for `--compile-for`, known to a compiler only."""

from __future__ import annotations

from typing import Literal

import jax
from jax.sharding import Mesh

from tinymodel_jax.training.sharding import make_mesh
from train.compile_for import topology_devices

DType = Literal["auto", "float32", "bfloat16"]


def open_mesh(axes: str, compile_for: str | None) -> Mesh:
    """Return the mesh of `--mesh` over this run's devices, or over those of the TPU slice that `--compile-for` names.

    Raises:
        ValueError: the axes do not fit the devices, or there is no such slice.
        ModuleNotFoundError: the TPU compiler is not installed.
    """
    return make_mesh(axes, None if compile_for is None else topology_devices(compile_for))


def is_present(mesh: Mesh) -> bool:
    """Whether its devices are there."""
    return mesh.devices.flat[0] in jax.devices()


def number_format(dtype: DType, mesh: Mesh) -> str:
    """Return what a language model computes in: auto is bfloat16 on an accelerator, float32 on a CPU."""
    if dtype != "auto":
        return dtype
    return "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
