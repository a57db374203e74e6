"""A description of the machine and the versions used in a measurement, without host names or paths."""

import importlib.metadata
import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path

from tinymodel_jax.runtime.machine import processor

PACKAGES = ("tinymodel-jax", "jax", "jaxlib", "flax", "numpy", "safetensors", "torch", "tinymodel")
TUNED_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 34),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 26),
}
"""Settings that make glibc keep freed memory, so that large arrays cause no page faults in every operation."""


def describe_machine(more_packages: Iterable[str] = ()) -> dict[str, str]:
    """Return processor, memory, system, allocator setting and the installed versions."""
    tuned = all(os.environ.get(name) == value for name, value in TUNED_ALLOCATOR.items())
    versions = {"Python": platform.python_version()} | {name: _version(name) for name in (*PACKAGES, *more_packages)}
    return {
        "processor": f"{processor()}{_generation()}",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
        "allocator": "tuned" if tuned else "as set by MALLOC_*" if _any_malloc_setting() else "default",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def _generation() -> str:
    """Return the numbers that tell apart processors with the same name, where Linux gives them."""
    info = Path("/proc/cpuinfo")
    found = dict(
        re.findall(r"^(cpu family|model|stepping)\s*: (\d+)$", info.read_text() if info.is_file() else "", re.M)
    )
    return f" ({', '.join(f'{name} {number}' for name, number in found.items())})" if found else ""


def _any_malloc_setting() -> bool:
    return any(name.startswith("MALLOC_") for name in os.environ)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
