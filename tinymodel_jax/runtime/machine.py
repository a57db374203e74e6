"""A description of the processor, for published results. It contains no host name and no path."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def processor() -> str:
    """Return the number of cores and the processor model, such as `2 cores of AMD EPYC 7B13`."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{os.cpu_count()} cores of {next(models, platform.processor() or platform.machine())}"
