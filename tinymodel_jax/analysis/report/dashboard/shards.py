"""Data for pages opened from disk: files of one call each, which a page loads by adding a script.

`file://` forbids `fetch`, so a file is JavaScript: `dashboard.receive("NAME", "TEXT")`, TEXT being the base64 of
gzipped JSON. It holds nothing that a browser could take for code.
"""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = "data"
"""Where in a dashboard the files are."""


def write_data(folder: Path, name: str, value: Any) -> None:
    """Write `data/NAME.js` in the folder of a dashboard.

    Raises:
        OSError: it cannot be written.
        ValueError: a number is not finite.
    """
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    packed = base64.b64encode(gzip.compress(text.encode(), compresslevel=6, mtime=0)).decode()
    (folder / FOLDER / f"{name}.js").write_text(f'dashboard.receive("{name}","{packed}");\n', "utf-8")


def shard_name(number: int) -> str:
    """Return the name of a shard of features, `shard-0012`."""
    return f"shard-{number:04d}"


def rounded(values: Any, digits: int = 4) -> Any:
    """Return numbers with so many significant digits, as nested lists."""
    array = np.asarray(values, np.float64)
    with np.errstate(divide="ignore"):
        size = np.floor(np.log10(np.abs(array)))
    scale = 10.0 ** (digits - 1 - np.where(np.isfinite(size), size, 0))
    return (np.round(array * scale) / scale + 0.0).tolist()  # no -0.0
